"""Tiny seeded Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 checkpoints, and transformers on them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm import VLM
from edgevlm_export import ExportOptions, export
from tests.conftest import F32, make_tokenizer, seed_weights
from tests.families.base import Builder, Reference
from tests.helpers.json_files import read_json, write_json

PATCH, MERGE = 4, 2
WINDOW = 2 * MERGE * PATCH
"""Two image tokens a side, so that small pictures have several windows."""
NAMES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_5": "Qwen3_5"}
OF_QWEN3 = ("qwen3_vl", "qwen3_5")
"""Those with a table of positions for patches, and timestamps in videos."""
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_start|>", "<|vision_end|>"]
TOKENS += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
BOX_TOKENS = ["<|box_start|>", "<|box_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_SECTIONED = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_INTERLEAVED = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True, "rope_theta": 10000.0}
_PARTIAL = {"mrope_section": [3, 3, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.5, "rope_theta": 10000.0}
TEXT: dict[str, dict[str, Any]] = {
    "qwen2_vl": {**_TEXT, "rope_parameters": _SECTIONED},
    "qwen2_5_vl": {**_TEXT, "rope_parameters": _SECTIONED},
    "qwen3_vl": {**_TEXT, "head_dim": 32, "rope_parameters": _INTERLEAVED},
    "qwen3_5": {
        **_TEXT,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "rope_parameters": {"rope_type": "default", **_PARTIAL},
    },
}
_VISION = {"depth": 3, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {**_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "qwen2_5_vl": {
        **_VISION,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 44,
        "window_size": WINDOW,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        **_VISION,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 48,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    },
    "qwen3_5": {
        **_VISION,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 48,
        "num_position_embeddings": 36,
    },
}


def image_processor(**options: Any) -> Any:
    """Return the reference's image processor on Pillow and NumPy with the tiny checkpoint's sizes."""
    from transformers import Qwen2VLImageProcessorPil

    side = PATCH * MERGE
    sizes = {"size": {"shortest_edge": 4 * side**2, "longest_edge": 40 * side**2}}
    return Qwen2VLImageProcessorPil(**{**sizes, "patch_size": PATCH, "merge_size": MERGE, **options})


def make_checkpoint(
    folder: Path,
    kind: str,
    *,
    tied: bool = False,
    held: bool = False,
    tokens: Sequence[str] = TOKENS,
    **sections: dict[str, Any],
) -> Path:
    """Write a seeded checkpoint as transformers 5.24 saves it; `sections` change what config.json says in them.

    `held` calls the tensors as transformers' classes do in memory; `tokens` are the tokenizer's special tokens.
    """
    import transformers

    made = make_tokenizer(tokens, end="<|im_end|>")
    config = getattr(transformers, f"{NAMES[kind]}Config")(
        **{
            f"{name}_token_id": made.convert_tokens_to_ids(f"<|{token}|>")
            for name, token in (
                ("image", "image_pad"),
                ("video", "video_pad"),
                ("vision_start", "vision_start"),
                ("vision_end", "vision_end"),
            )
        },
        tie_word_embeddings=tied,
        text_config={**TEXT[kind], "vocab_size": len(made), **sections.get("text_config", {})},
        vision_config={**VISION[kind], **sections.get("vision_config", {})},
    )
    transformers.set_seed(7)  # what is left as it is initialised, such as the decay of a delta net
    model = seed_weights(getattr(transformers, f"{NAMES[kind]}ForConditionalGeneration")(config))
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=made.eos_token_id, pad_token_id=made.pad_token_id
    )
    model.save_pretrained(folder, save_original_format=not held)
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def tiny_vlm(folder: Path, kind: str) -> VLM:
    """Return a tiny checkpoint of a kind, exported into `folder` without compression and loaded."""
    checkpoint = make_checkpoint(folder / "saved", kind)
    return VLM(export(checkpoint, folder / "out", ExportOptions("fp32", via="native", verify=False)).folder, F32)


def as_published(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint's files as those on the hub are: RoPE as transformers 4 has it, most keys left to the class.

    Qwen2-VL and Qwen2.5-VL have the text model's keys beside the others, and the size of pictures in older words.
    """
    shutil.copytree(checkpoint, folder)
    config = read_json(folder / "config.json")
    text = config.pop("text_config")
    kind = config["model_type"]
    rope = text["rope_parameters"]
    kept = {name: text[name] for name in (*TEXT[kind], "vocab_size", "rms_norm_eps") if name != "rope_parameters"}
    kept["rope_theta"] = rope.pop("rope_theta")
    config["vision_config"] = {**VISION[kind], "model_type": kind, "in_channels": 3}
    if kind in OF_QWEN3:
        config["text_config"] = {**kept, "rope_scaling": rope, "model_type": f"{kind}_text", "attention_bias": False}
    if kind == "qwen3_5":
        add_published_extras(folder, config)
    if kind not in OF_QWEN3:
        rope = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config |= {**kept, "rope_scaling": rope, "use_sliding_window": False, "sliding_window": 32768}
        config["vision_config"] |= {"in_chans": 3, "spatial_patch_size": PATCH}
        settings = read_json(folder / "preprocessor_config.json")
        size = settings.pop("size")
        settings |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        write_json(folder / "preprocessor_config.json", settings)
    write_json(folder / "config.json", config)
    return folder


def add_published_extras(folder: Path, config: dict[str, Any]) -> None:
    """Write what published Qwen3.5 checkpoints hold besides: layers for multi-token prediction, and keys of others."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    norm = tensors["model.language_model.norm.weight"]
    extras = {f"mtp.{name}.weight": norm.clone() for name in ("norm", "layers.0.input_layernorm")}
    save_file(tensors | extras, folder / "model.safetensors", {"format": "pt"})
    config["text_config"] |= {
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "mamba_ssm_dtype": "float32",
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
    }
    config["vision_config"] |= {"deepstack_visual_indexes": []}
    config["language_model_only"] = False


def reference_processor(words: Any, image_processor: Any, config: Any) -> Any:
    """Return `Qwen2VLProcessor` without its video part, which needs torchvision; for pictures it is Qwen3-VL's, too."""
    from transformers import Qwen2VLProcessor

    class ForPictures(Qwen2VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    return ForPictures(image_processor, words, chat_template=TEMPLATE)


class QwenReference(Reference):
    """transformers on one checkpoint, and what its own functions make for the submodels."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint, reference_processor)
        self.config = self.model.config
        if self.config.model_type == "qwen3_5":
            self.logits_atol = 1e-3  # that much it differs itself, a prompt read in chunks or token by token

    def inputs(self, images: Sequence[np.ndarray], question: str) -> dict[str, Any]:
        """Return the model's inputs for one question about `images`."""
        self.model.model.rope_deltas = None  # of the prompt before
        return super().inputs(images, question)

    def around(self, images: Sequence[np.ndarray], words: Sequence[int]) -> dict[str, Any]:
        """Return the model's inputs: each picture's block, one of the token ids `words` after each, and all of them."""
        import torch

        config, ids = self.config, [*words[:3]]
        given = dict(self.processor.image_processor([*images], **_PICTURES)) if images else {}
        for number, (_, height, width) in enumerate(given["image_grid_thw"].tolist() if images else []):
            ids += [config.vision_start_token_id, *[config.image_token_id] * (height * width // MERGE**2)]
            ids += [config.vision_end_token_id, words[number]]
        tokens = torch.tensor([[*ids, *words]])
        types = (tokens == config.image_token_id).int()
        self.model.model.rope_deltas = None
        return {**given, "input_ids": tokens, "attention_mask": torch.ones_like(tokens), "mm_token_type_ids": types}

    def views(self, inputs: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
        """Return the vision submodel's inputs for each picture, made by transformers' own functions."""
        import torch
        from transformers import vision_utils

        if "image_grid_thw" not in inputs:
            return []
        counts = inputs["image_grid_thw"].prod(-1).tolist()
        views = []
        for grid, rows in zip(inputs["image_grid_thw"][:, None], inputs["pixel_values"].split(counts), strict=True):
            view = {"pixel_values": rows, "patch_positions": vision_utils.get_vision_position_ids(grid, MERGE)}
            if self.config.model_type in OF_QWEN3:
                found = vision_utils.get_vision_interpolation_indices_and_weights(
                    grid, 6, align_corners=True, spatial_merge_size=MERGE
                )
                view |= dict(zip(("table_indices", "table_weights"), (each.T for each in found), strict=True))
            if self.config.model_type == "qwen2_5_vl":
                index, ends = vision_utils.get_vision_window_index(grid, MERGE, WINDOW, PATCH)
                lengths = ends.diff().long()
                ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
                view |= {"window_index": index, "window_ids": ids}
            views.append({name: np.ascontiguousarray(array[None].numpy()) for name, array in view.items()})
        return views

    def features(self, inputs: Mapping[str, Any]) -> list[list[np.ndarray]]:
        """Return each picture's image embeddings `(M, D)`, and those of DeepStack after them."""
        import torch

        if "image_grid_thw" not in inputs:
            return []
        with torch.inference_mode():
            found = self.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        outputs = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]
        return [[each.numpy() for each in picture] for picture in zip(*outputs, strict=True)]

    def positions(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Return the position ids `(3, S)`."""
        found, _ = self.model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs.get("image_grid_thw")
        )
        return np.ascontiguousarray(found[:, 0].numpy())

    def logits(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Return the logits at every position `(S, V)`."""
        import torch

        with torch.inference_mode():
            return np.asarray(self.model(**inputs).logits[0].numpy())


_PICTURES = {"input_data_format": "channels_last", "return_tensors": "pt"}


def builder(kind: str) -> Builder:
    """Return the builder of one of the models; of Qwen3.5 published tensors are called as those held in memory."""
    variants = {
        "published": lambda folder: as_published(make_checkpoint(folder / "saved", kind), folder / "published"),
        "saved": lambda folder: make_checkpoint(folder / "saved", kind),
        "held": lambda folder: make_checkpoint(folder / "saved", kind, held=True),
        "tied": lambda folder: make_checkpoint(folder / "saved", kind, tied=True),
    }
    if kind == "qwen3_5":  # pictures are prepared as Qwen3-VL's
        return Builder({"published": variants["published"]}, QwenReference, shapes=((9, 150), (7, 7)))
    return Builder(variants, QwenReference)
