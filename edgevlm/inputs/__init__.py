"""What is made ready for the models: pictures, text, prompts, and the vision cache. No OpenVINO here."""
