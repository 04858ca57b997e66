"""Reading a checkpoint: its folder, its config.json and its safetensors files."""
