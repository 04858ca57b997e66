"""The route from a checkpoint's own ONNX files, with ONNX Runtime on the same files as the reference.

The files are those that Transformers.js reads: a vision encoder with its connector, the embedding table, and a decoder
that takes past key values and gives present ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import edgevlm
from edgevlm.errors import SourceError
from edgevlm.families.base import IMAGE_EMBEDS
from edgevlm.inputs.processor import Processor
from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION
from edgevlm.runtime.core import core, first_line, import_openvino
from edgevlm_export.calibration import Pair, verification_pairs
from edgevlm_export.options import VERIFY_TOKENS
from edgevlm_export.output_folder import FILE_NAMES, Written, save_ir
from edgevlm_export.routes import onnx_stateful as onnx_graph
from edgevlm_export.routes.base import ExportJob, compress_submodels, copy_small_files
from edgevlm_export.routes.onnx_merged_decoder import SWITCH, check_switch, with_past
from edgevlm_export.samples import decoder_inputs, make_sample, pixel_values
from edgevlm_export.verify import Array

if TYPE_CHECKING:
    import openvino as ov

LIBRARIES = ("onnx", "onnxruntime")
_QUANTIZED = {"DynamicQuantizeLinear", "DequantizeLinear", "MatMulNBits", "MatMulInteger", "ConvInteger"}
_QUANTIZED |= {"QuantizeLinear", "GatherBlockQuantized", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
_QUANTIZED |= {"QLinearMatMul", "QLinearConv", "MatMulBnb4"}
_INPUTS: Mapping[str, set[str]] = {
    VISION: {"pixel_values"},
    TEXT_EMBEDDINGS: {"input_ids"},
    LANGUAGE: {"inputs_embeds", "attention_mask", "past_key_values.0.key"},
}
_OPTIONAL = {"pixel_attention_mask", "position_ids", SWITCH}


def check_parts(parts: Mapping[str, Path]) -> None:
    """Read the graphs without their weights and refuse what cannot be exported. Raises `SourceError`."""
    import onnx

    for part, path in parts.items():
        try:
            graph = onnx.load(path, load_external_data=False).graph
        except Exception as error:  # protobuf's own errors share no base class with onnx's
            raise SourceError(f"{path} is no ONNX file, or a damaged one: {first_line(error)}") from None
        kinds = {node.op_type for node in _nodes(graph)}
        if kinds & _QUANTIZED:
            raise SourceError(
                f"{path.name} is quantized already ({min(kinds & _QUANTIZED)}); take the float32 file, which edgevlm"
                " compresses itself"
            )
        names = {each.name for each in graph.input}
        if missing := _INPUTS[part] - names:
            raise SourceError(
                f"{path.name} has no input {min(missing)}, so it is not the {part} part that is read here"
            )
        check_switch(graph, path.name)
        others = {name for name in names - _INPUTS[part] - _OPTIONAL if not name.startswith("past_key_values.")}
        if others := others - {each.name for each in graph.initializer}:
            raise SourceError(f"{path.name} asks for an input {min(others)}, which edgevlm does not have")
        halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
        if any(each.type.tensor_type.elem_type in halves for each in graph.input):
            raise SourceError(
                f"{path.name} takes 16-bit inputs; take the float32 file, which edgevlm compresses itself"
            )


def _nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph and of the branches in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def write_submodels(files: Mapping[str, Path], job: ExportJob) -> Written:
    """Convert, fuse and compress the submodels. Raises `ExportError`."""
    processor, manifest, work = Processor(job.work, job.manifest), job.manifest, job.work
    cases: dict[str, Array] = {}
    reference: dict[str, Array] = {}
    if job.options.verify:
        job.clock.begin("reference")
        cases, reference = run_reference(files, processor, job.pairs)
    job.clock.begin("convert")
    files = {**files, LANGUAGE: with_past(files[LANGUAGE], work / "branch")}
    makers: dict[str, Callable[[ov.Model], ov.Model]] = {
        VISION: lambda model: onnx_graph.vision(model, manifest.family_config["image_seq_len"], manifest.hidden_size),
        TEXT_EMBEDDINGS: onnx_graph.text_embeddings,
        LANGUAGE: onnx_graph.language,
    }
    for name, path in files.items():
        save_ir(convert(path, makers[name]), work / FILE_NAMES[name], "fp32")
    precisions = compress_submodels(job)
    copy_small_files(work, job.staging)
    versions = {"edgevlm": edgevlm.__version__, **{name: version(name) for name in ("openvino", "nncf", *LIBRARIES)}}
    return Written(precisions, versions, "onnxruntime", cases, reference)


def convert(path: Path, make: Callable[[ov.Model], ov.Model]) -> ov.Model:
    """Read an ONNX file and make it what the runtime takes. Raises `SourceError`."""
    try:
        model = make(core().read_model(path))
    except RuntimeError as error:
        raise SourceError(f"OpenVINO cannot convert {path.name}: {first_line(error)}") from None
    transpose_matmul_weights(model)
    return model


def transpose_matmul_weights(model: ov.Model) -> None:
    """Keep weights as `(out, in)`, as torch has them: NNCF's scale estimation goes wrong on `(in, out)`."""
    opset = import_openvino().opset13
    for node in model.get_ops():
        if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_b"]:
            continue
        weights = node.input_value(1).get_node()
        if weights.get_type_name() == "Constant" and len(weights.get_output_shape(0)) == 2:
            turned = opset.constant(np.ascontiguousarray(weights.data.T))
            product = opset.matmul(node.input_value(0), turned, node.get_attributes()["transpose_a"], True)
            product.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(product.output(0))


def run_reference(
    parts: Mapping[str, Path], processor: Processor, pairs: Sequence[Pair]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return inputs and what ONNX Runtime makes of them, as `verify` takes them. Raises `SourceError`."""
    reference = Reference(parts)
    cases: dict[str, Array] = {}
    outputs: dict[str, Array] = {}
    for name, pair in verification_pairs(pairs).items():
        sample = make_sample(processor, pair)
        ids = cases[f"{name}.input_ids"] = sample.ids[: sample.prompt]
        encoded = []
        if sample.views:
            pixels = cases[f"{name}.pixel_values"] = pixel_values(sample.views)
            image_embeds = outputs[f"{name}.image_embeds"] = reference.encode(pixels)
            encoded = [{IMAGE_EMBEDS: each} for each in image_embeds]
        inputs = decoder_inputs(processor.family, ids, sample.visuals, reference.embed(ids), encoded)
        tokens, logits = reference.greedy(inputs["inputs_embeds"], VERIFY_TOKENS)
        outputs[f"{name}.token_ids"], outputs[f"{name}.logits"] = tokens, logits
        outputs[f"{name}.text_embeds"] = reference.embed(np.concatenate([ids, tokens[:-1]]))[0]
    return cases, outputs


@dataclass(frozen=True)
class _Session:
    """One ONNX file in ONNX Runtime."""

    session: Any
    inputs: Mapping[str, Any]

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self.session.run(None, {name: feed[name] for name in self.inputs})
        return {each.name: value for each, value in zip(self.session.get_outputs(), outputs, strict=True)}


class Reference:
    """The original ONNX files in ONNX Runtime, on the CPU."""

    def __init__(self, parts: Mapping[str, Path]) -> None:
        self._parts = {part: _open(path) for part, path in parts.items()}

    def encode(self, pixel_values: Array) -> Array:
        """Return the image_embeds `(T, tokens, hidden)` of `pixel_values` `(T, 3, H, W)`, one tile at a time."""
        part = self._parts[VISION]
        several = len(part.inputs["pixel_values"].shape) == 5
        embeds = []
        for tile in pixel_values[:, None]:
            values = tile[None] if several else tile
            mask = np.ones((*values.shape[:-3], *values.shape[-2:]), np.bool_)
            if "pixel_attention_mask" in part.inputs and "int64" in part.inputs["pixel_attention_mask"].type:
                mask = mask.astype(np.int64)
            outputs = part.run({"pixel_values": values, "pixel_attention_mask": mask})
            embeds.append(next(iter(outputs.values())))
        return np.concatenate(embeds)

    def embed(self, ids: Array) -> Array:
        """Return the embeddings `(1, n, D)` of token ids `(n,)`."""
        return next(iter(self._parts[TEXT_EMBEDDINGS].run({"input_ids": ids[None]}).values()))

    def greedy(self, inputs_embeds: Array, count: int) -> tuple[Array, Array]:
        """Return `count` greedy tokens and the logits `(count, V)` they were chosen from, the end of text ignored."""
        part = self._parts[LANGUAGE]
        past = {
            name: np.empty((1, each.shape[1], 0, each.shape[3]), np.float32)
            for name, each in part.inputs.items()
            if name.startswith("past_key_values.")
        }
        tokens: list[int] = []
        logits: list[Array] = []
        embeds, length = inputs_embeds, 0
        for _ in range(count):
            new = embeds.shape[1]
            outputs = part.run(
                {
                    "inputs_embeds": embeds,
                    "attention_mask": np.ones((1, length + new), np.int64),
                    "position_ids": np.arange(length, length + new)[None],
                    SWITCH: np.array([length > 0]),
                    **past,
                }
            )
            length += new
            past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
            logits.append(outputs["logits"][0, -1])
            tokens.append(int(logits[-1].argmax()))
            embeds = self.embed(np.array(tokens[-1:]))
        return np.asarray(tokens, np.int64), np.stack(logits)


def _open(path: Path) -> _Session:
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        raise SourceError(f"ONNX Runtime cannot load {path.name}: {first_line(error)}") from None
    return _Session(session, {each.name: each for each in session.get_inputs()})
