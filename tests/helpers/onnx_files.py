"""ONNX files of a tiny checkpoint, as Transformers.js publishes them: torch's exporter on the parts."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

LAYERS = range(2)
PAST = [f"past_key_values.{index}.{kind}" for index in LAYERS for kind in ("key", "value")]
PRESENT = [f"present.{index}.{kind}" for index in LAYERS for kind in ("key", "value")]
LOWEST = torch.finfo(torch.float32).min


class Vision(torch.nn.Module):
    """Encoder and connector: empty pictures are left out and padding is masked, as the published graphs have it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision, self.connector = model.model.vision_model, model.model.connector

    def forward(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> torch.Tensor:
        tiles, mask = pixel_values.flatten(0, 1), pixel_attention_mask.flatten(0, 1)
        real = (tiles != 0.0).any(3).any(2).any(1)
        tiles, mask = tiles[real], mask[real]
        seen = mask.reshape(-1, 8, 8, 8, 8).any(4).any(2).reshape(-1, 64)
        patches = self.vision.embeddings.patch_embedding(tiles).flatten(2).transpose(1, 2)
        hidden = patches + self.vision.embeddings.position_embedding(torch.arange(64))
        bias = torch.where(seen[:, None, None, :], 0.0, LOWEST)
        hidden = self.vision.encoder(inputs_embeds=hidden, attention_mask=bias).last_hidden_state
        return self.connector(self.vision.post_layernorm(hidden))


class FirstDecoder(torch.nn.Module):
    """The decoder of a first call, without past keys and values."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = Decoder(model)

    def forward(self, inputs_embeds: Any, attention_mask: Any, position_ids: Any) -> tuple[Any, ...]:
        nothing = inputs_embeds.new_zeros(inputs_embeds.shape[0], 2, 0, 16)
        return self.decoder(inputs_embeds, attention_mask, position_ids, *(nothing for _ in PAST))


class Decoder(torch.nn.Module):
    """Decoder and head with the keys and values so far as inputs, one longer as outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text, self.head = model.model.text_model, model.lm_head

    def forward(self, inputs_embeds: Any, attention_mask: Any, position_ids: Any, *past: Any) -> tuple[Any, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        before = past[0].shape[2]
        queries = torch.arange(inputs_embeds.shape[1]) + before
        causal = torch.arange(before + inputs_embeds.shape[1])[None] <= queries[:, None]
        bias = torch.where(causal & attention_mask[:, None, None, :].bool(), 0.0, LOWEST)
        output = self.text(
            inputs_embeds=inputs_embeds, attention_mask=bias, position_ids=position_ids, past_key_values=cache
        )
        present = output.past_key_values.layers
        return self.head(output.last_hidden_state), *(each for layer in present for each in (layer.keys, layer.values))


def write_onnx(checkpoint: Path, folder: Path) -> Path:
    """Write a checkpoint's small files, and the three parts into `onnx/`; no safetensors."""
    from transformers import AutoModelForImageTextToText

    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "onnx").mkdir()
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager").eval()
    pixels, mask = torch.randn(1, 1, 3, 64, 64), torch.ones(1, 1, 64, 64, dtype=torch.bool)
    several = {0: "batch_size", 1: "num_images"}
    text, total = {0: "batch_size", 1: "sequence_length"}, {0: "batch_size", 1: "total_sequence_length"}
    cached = {0: "batch_size", 2: "past_sequence_length"}
    past = [torch.randn(2, 2, 5, 16) for _ in PAST]
    write_part(
        Vision(model),
        folder / "onnx" / "vision_encoder.onnx",
        {"pixel_values": pixels, "pixel_attention_mask": mask},
        ["image_features"],
        {"pixel_values": several, "pixel_attention_mask": several},
    )
    write_part(
        model.get_input_embeddings(),
        folder / "onnx" / "embed_tokens.onnx",
        {"input_ids": torch.zeros(1, 4, dtype=torch.long)},
        ["inputs_embeds"],
        {"input_ids": text, "inputs_embeds": text},
    )
    inputs = {
        "inputs_embeds": torch.randn(2, 3, 64),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "position_ids": torch.arange(5, 8)[None].repeat(2, 1),
        **dict(zip(PAST, past, strict=True)),
    }
    axes = {"inputs_embeds": text, "attention_mask": total, "position_ids": text, "logits": text}
    axes |= dict.fromkeys([*PAST, *PRESENT], cached)
    write_part(Decoder(model), folder / "onnx" / "decoder_with_past_model.onnx", inputs, ["logits", *PRESENT], axes)
    return folder


def merge_decoders(checkpoint: Path, with_past: Path, target: Path) -> None:
    """Write one file of a checkpoint's two decoders, behind `use_cache_branch`, as optimum merges them."""
    import onnx
    from onnx import TensorProto, helper
    from onnx.compose import add_prefix
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager").eval()
    text, total = {0: "batch_size", 1: "sequence_length"}, {0: "batch_size", 1: "total_sequence_length"}
    inputs = {
        "inputs_embeds": torch.randn(2, 3, 64),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
        "position_ids": torch.arange(3)[None].repeat(2, 1),
    }
    axes = {"inputs_embeds": text, "attention_mask": total, "position_ids": text, "logits": text}
    axes |= {name: {0: "batch_size", 2: "sequence_length"} for name in PRESENT}
    write_part(FirstDecoder(model), target, inputs, ["logits", *PRESENT], axes)
    past = onnx.load(with_past)
    branches = {
        name: add_prefix(each, f"{name}/", rename_inputs=False).graph
        for name, each in (("then_branch", past), ("else_branch", onnx.load(target)))
    }
    shared = list(branches["else_branch"].initializer)  # optimum keeps what both have outside, and the rest within
    for branch in branches.values():
        del branch.input[:]
    del branches["else_branch"].initializer[:]
    outputs = [each.name for each in past.graph.output]
    switch = helper.make_node("If", ["use_cache_branch"], outputs, **branches)
    flag = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    graph = helper.make_graph([switch], "merged", [*past.graph.input, flag], past.graph.output, shared)
    merged = helper.make_model(graph, opset_imports=past.opset_import, ir_version=past.ir_version)
    onnx.checker.check_model(merged)
    onnx.save(merged, target)


def write_part(module: Any, path: Path, inputs: dict[str, Any], outputs: list[str], axes: dict[str, Any]) -> None:
    """Trace one module into an ONNX file."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of tracing, and that the exporter without onnxscript is the older one
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
