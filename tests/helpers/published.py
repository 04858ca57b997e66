"""Checkpoints of the published configurations' form: their real files where they are at hand, else the facts of them.

`EDGEVLM_PUBLISHED_CONFIGS` names a folder with one folder for each checkpoint (`/` in its name as `__`), holding the
files that it has on the hub, weights excepted. Without it the facts below make up the same configurations. Layers are
cut to two, and weights are seeded.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import CHAT_TEMPLATE, image_processor_class, make_tokenizer, seed_weights

_FOLDER = os.environ.get("EDGEVLM_PUBLISHED_CONFIGS")


def published_folder(name: str) -> Path | None:
    """Return the folder of a published checkpoint's real files, where it is at hand."""
    found = sorted(Path(_FOLDER).glob(f"{name}*")) if _FOLDER else []
    exact = [path for path in found if path.name.removesuffix(".RECONSTRUCTED") == name]
    return exact[0] if exact else None


@dataclass(frozen=True)
class Published:
    """A published checkpoint: what its config.json and its image processor's file state, beside what is harmless."""

    name: str
    config: dict[str, Any]
    tile: int
    longest_edge: int
    image_seq_len: int
    tokenizer_of: str | None = None
    """The checkpoint whose tokenizer it has, if not its own."""

    def __str__(self) -> str:
        return self.name.partition("__")[2]

    @property
    def folder(self) -> Path | None:
        """The folder of its real files."""
        return published_folder(self.name)


_SMOLLM2_135M = {
    "head_dim": 64,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "neftune_noise_alpha": 0.0,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pixel_shuffle_factor": 4,
    "qk_layer_norms": False,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "use_resampler": False,
    "vocab_size": 49280,
}
_SIGLIP_BASE = {
    "hidden_size": 768,
    "image_size": 512,
    "intermediate_size": 3072,
    "max_image_size": {"longest_edge": 512},
    "num_attention_heads": 12,
    "patch_size": 16,
    "size": {"longest_edge": 2048},
}
_SIGLIP_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "patch_size": 14}
SMOLVLM_256M = Published(
    "HuggingFaceTB__SmolVLM-256M-Instruct",
    {
        "image_token_id": 49190,
        "model_type": "idefics3",
        "scale_factor": 4,
        "text_config": _SMOLLM2_135M,
        "tie_word_embeddings": False,
        "vision_config": {**_SIGLIP_BASE, "model_type": "idefics3", "use_base_siglip": True},
    },
    tile=512,
    longest_edge=2048,
    image_seq_len=64,
)
SMOLVLM2_500M = Published(
    "HuggingFaceTB__SmolVLM2-500M-Video-Instruct",
    {
        "image_token_id": 49190,
        "model_type": "smolvlm",
        "scale_factor": 4,
        "text_config": {
            **_SMOLLM2_135M,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_attention_heads": 15,
            "num_hidden_layers": 32,
            "num_key_value_heads": 5,
        },
        "tie_word_embeddings": False,
        "vision_config": {**_SIGLIP_BASE, "model_type": "smolvlm_vision", "use_base_siglip": False},
    },
    tile=512,
    longest_edge=2048,
    image_seq_len=64,
    tokenizer_of=SMOLVLM_256M.name,
)
SMOLVLM2_2B = Published(
    "HuggingFaceTB__SmolVLM2-2.2B-Instruct",
    {
        "image_token_id": 49190,
        "model_type": "smolvlm",
        "scale_factor": 3,
        "text_config": {  # no heads: they are LlamaConfig's own
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_hidden_layers": 24,
            "pixel_shuffle_factor": 3,
            "rms_norm_eps": 1e-05,
            "rope_theta": 130000,
            "vocab_size": 49280,
        },
        "tie_word_embeddings": False,
        "vision_config": {**_SIGLIP_SO400M, "image_size": 384, "model_type": "smolvlm_vision"},
    },
    tile=384,
    longest_edge=1536,
    image_seq_len=81,
    tokenizer_of=SMOLVLM_256M.name,
)
IDEFICS3_8B = Published(
    "HuggingFaceM4__Idefics3-8B-Llama3",
    {
        "image_token_id": 128257,
        "model_type": "idefics3",
        "scale_factor": 2,
        "text_config": {  # neither width nor heads: they are LlamaConfig's own
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "vocab_size": 128259,
        },
        "tie_word_embeddings": False,
        "vision_config": {**_SIGLIP_SO400M, "image_size": 364, "model_type": "idefics3", "num_attention_heads": 16},
    },
    tile=364,
    longest_edge=1456,
    image_seq_len=169,
)
GRANITE_DOCLING = Published(
    "ibm-granite__granite-docling-258M",
    {
        "bos_token_id": 100264,
        "dtype": "bfloat16",
        "eos_token_id": 100257,
        "image_token_id": 100270,
        "model_type": "idefics3",
        "pad_token_id": 100257,
        "scale_factor": 4,
        "text_config": {**_SMOLLM2_135M, "rope_theta": 100000.0, "tie_word_embeddings": True, "vocab_size": 100352},
        "tie_word_embeddings": True,
        "vision_config": {**_SIGLIP_BASE, "model_type": "idefics3_vision", "num_hidden_layers": 12},
    },
    tile=512,
    longest_edge=2048,
    image_seq_len=64,
)
ALL = (SMOLVLM_256M, SMOLVLM2_500M, SMOLVLM2_2B, IDEFICS3_8B, GRANITE_DOCLING)


def write_files(published: Published, folder: Path, layers: int | None = 2) -> Path:
    """Write all but the weights, as transformers 4 lays them out; `layers` of them, None for all."""
    folder.mkdir()
    config = dict(published.config)
    if published.folder:
        for path in published.folder.iterdir():
            if path.name != "SOURCE.txt":
                shutil.copyfile(path, folder / path.name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    else:
        sizes = {"size": {"longest_edge": published.longest_edge}, "max_image_size": {"longest_edge": published.tile}}
        family = str(config["model_type"])
        image_processor_class(family)(**sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
        _write(folder / "processor_config.json", {"image_seq_len": published.image_seq_len})
    if layers is not None:
        for section in ("text_config", "vision_config"):
            config[section] = {**config[section], "num_hidden_layers": layers}
    _write_tokenizer(published, folder, config)
    _write(folder / "config.json", config)
    return folder


def _write_tokenizer(published: Published, folder: Path, config: dict[str, Any]) -> None:
    """Write its own tokenizer, that of its sister, one made of its vocabulary, or the tests' own."""
    sister = next((each for each in ALL if each.name == published.tokenizer_of), None)
    if sister and sister.folder:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "generation_config.json"):
            shutil.copyfile(sister.folder / name, folder / name)
    elif (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    if (folder / "tokenizer.json").is_file():
        return
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config["image_token_id"] = tokenizer.convert_tokens_to_ids("<image>")
    _write(folder / "generation_config.json", {"eos_token_id": tokenizer.eos_token_id})


def make_published(published: Published, folder: Path) -> Path:
    """Write a checkpoint of two layers, as transformers 4 lays it out."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    write_files(published, folder)
    model = seed_weights(AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)))
    weights = model.state_dict()
    if model.config.tie_word_embeddings:  # and then so wide a table makes logits of hundreds
        model.lm_head.weight.data.mul_(0.1)
        weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def save_anew(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint as transformers 5 saves it."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, Idefics3Processor

    AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    image_seq_len = json.loads((checkpoint / "processor_config.json").read_text(encoding="utf-8"))["image_seq_len"]
    processor = Idefics3Processor(
        AutoImageProcessor.from_pretrained(checkpoint, backend="pil"),
        tokenizer,
        image_seq_len=image_seq_len,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)
    return folder


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
