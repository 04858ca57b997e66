"""The route without torch: graphs made from the checkpoint's own tensors, a few layers in memory at a time.

Each submodel is partitioned. A partition is built with its weights mapped from the safetensors files and run in float32
on the outputs of the partition before, which gives the next one's inputs, the calibration data, and at the end the
reference that the finished folder is verified against. Then it is compressed and written to disk. The written
partitions are mapped back and stitched. So memory is bounded by a partition, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

import edgevlm
from edgevlm.errors import SourceError
from edgevlm.families.base import IMAGE_EMBEDS, PIXEL_VALUES, SLIDING_CACHE_START
from edgevlm.inputs.processor import Processor
from edgevlm.manifest import LANGUAGE, SUBMODELS, TEXT_EMBEDDINGS, VISION
from edgevlm.runtime.config import RuntimeConfig
from edgevlm.runtime.core import core, import_openvino, read_ir
from edgevlm_export.calibration import Pair, verification_pairs, with_questions
from edgevlm_export.compress import compress, import_nncf
from edgevlm_export.families import Architecture
from edgevlm_export.graphs.constants import Constants
from edgevlm_export.graphs.stages import Graph, outputs_of, partition, stitch
from edgevlm_export.options import UNCOMPRESSED, VERIFY_TOKENS, Precision
from edgevlm_export.output_folder import FILE_NAMES, Written, save_ir
from edgevlm_export.routes.base import ExportJob, copy_small_files
from edgevlm_export.samples import (
    DECODER_INPUTS,
    Sample,
    decoder_inputs,
    encoder_inputs,
    make_sample,
    other_inputs,
    pixel_values,
    prompt_inputs,
    vision_samples,
)
from edgevlm_export.source.safetensors_reader import RawTensor, Weights
from edgevlm_export.verify import Array, Arrays

if TYPE_CHECKING:
    import openvino as ov

LIBRARIES = ("nncf", "safetensors", "huggingface_hub")
PARTITION_WEIGHTS = 64_000_000
"""Weights of a partition: 0.26 GB in float32, of which compiling and compressing hold several copies."""
_DTYPES = {"f32": np.float32, "i64": np.int64}
_FLOAT32 = RuntimeConfig(device="CPU", inference_precision="f32", cache=False)


def write_submodels(architecture: Architecture, weights: Weights, job: ExportJob) -> Written:
    """Write the compressed submodels. Raises `ExportError`."""
    options, manifest, pairs = job.options, job.manifest, job.pairs
    Thread(target=import_nncf, daemon=True).start()  # takes a second or more
    processor = Processor(job.work, manifest)
    verified = verification_pairs(pairs) if options.verify else {}
    needs_data = options.part_precision(LANGUAGE) == "int4" and options.int4.needs_data
    calibration_pairs = with_questions(pairs) if needs_data else []
    samples = {pair: make_sample(processor, pair) for pair in [*verified.values(), *calibration_pairs]}
    embed_tokens = architecture.decoder.embed_tokens
    embeds = text_embeds(weights.get(f"{embed_tokens.name}.weight"), samples, embed_tokens.scale)
    writer = SubmodelWriter(architecture, weights, job)

    views = [encoder_inputs(processor.family, view) for sample in samples.values() for view in sample.views]
    is_w8a8 = options.part_precision(VISION) == "w8a8"
    calibration = vision_samples(processor, pairs, manifest.hidden_size) if is_w8a8 else []
    if architecture.reference_vision is None:
        outputs = iter(writer.write(VISION, views, calibration))
    else:
        writer.write(VISION, [], calibration)
        outputs = iter(writer.compute(architecture.reference_vision, views))
    encoded = {pair: [_features(next(outputs)) for _ in sample.views] for pair, sample in samples.items()}
    writer.write(TEXT_EMBEDDINGS, [], [])

    inputs = {
        pair: {
            **_zero_extras(architecture.graphs[LANGUAGE], len(sample.ids)),
            **decoder_inputs(processor.family, sample.ids, sample.visuals, embeds[pair], encoded[pair]),
            SLIDING_CACHE_START: np.zeros(1, np.int64),
        }
        for pair, sample in samples.items()
    }
    calibration = [inputs[pair] for pair in calibration_pairs]
    last_positions = [compared(samples[pair]) for pair in verified.values()]
    logits = writer.write(LANGUAGE, [inputs[pair] for pair in verified.values()], calibration, last_positions)

    copy_small_files(job.work, job.staging)
    cases: dict[str, Array] = {}
    reference: dict[str, Array] = {}
    for (name, pair), scores in zip(verified.items(), logits, strict=True):
        case, expected = as_case(samples[pair], embeds[pair], encoded[pair], scores["logits"], inputs[pair])
        cases |= {f"{name}.{key}": array for key, array in case.items()}
        reference |= {f"{name}.{key}": array for key, array in expected.items()}
    precisions = {part: options.part_precision(part) for part in SUBMODELS}
    versions = {"edgevlm": edgevlm.__version__, **{name: version(name) for name in ("openvino", "nncf")}}
    name = "openvino, float32, uncompressed" + (", tokens not merged" if architecture.reference_vision else "")
    return Written(precisions, versions, name, cases, reference)


def compared(sample: Sample) -> int:
    """Return at how many of the last positions logits are compared: of the answer, or of a prompt without one."""
    answer = len(sample.ids) - sample.prompt
    return min(VERIFY_TOKENS, answer + 1 if answer else len(sample.ids))


def text_embeds(table: RawTensor, samples: Mapping[Pair, Sample], scale: float) -> dict[Pair, Array]:
    """Return the embeddings of each sample's token ids; the table, which may be a merged one, is let go of."""
    return {pair: look_up(table, sample.ids, scale) for pair, sample in samples.items()}


def look_up(table: RawTensor, ids: Array, scale: float) -> Array:
    """Return the embeddings `(1, n, D)` of token ids, multiplied by `scale` as in the graph.

    Raises `SourceError` for a token that the table lacks.
    """
    if ids.max() >= len(table.array):
        raise SourceError(
            f"the tokenizer makes token {ids.max()}, and the model knows {len(table.array)}: tokenizer.json and the"
            " weights do not belong together"
        )
    return replace(table, array=table.array[ids]).float32()[None] * table.rounded(scale)


def _zero_extras(graph: Graph, count: int) -> Arrays:
    """Return zeros for the inputs that this decoder alone has, `(1, count, ...)`: families leave them out for text."""
    return {
        name: np.zeros((1, count, *shape[2:]), _DTYPES[dtype])
        for name, (dtype, shape) in graph.inputs.items()
        if name not in DECODER_INPUTS
    }


def _features(outputs: Arrays) -> Arrays:
    """Return a view's encoding as the runtime names it: the vision submodel's first output is `image_embeds`."""
    first, *others = outputs
    return {IMAGE_EMBEDS: outputs[first][0], **{name: outputs[name][0] for name in others}}


def as_case(
    sample: Sample, embeds: Array, encoded: Sequence[Arrays], logits: Array, inputs: Arrays
) -> tuple[Arrays, Arrays]:
    """Return inputs and outputs as `verify` takes them: logits `(compared, V)` of the last positions of the sample.

    `inputs` are the decoder's.
    """
    prompt = len(sample.ids) - compared(sample) + 1
    following = np.append(sample.ids[prompt:], logits[-1].argmax())
    case = {"input_ids": sample.ids[:prompt]}
    outputs = {"token_ids": following, "logits": logits, "text_embeds": embeds[0]}
    if sample.views:
        case[PIXEL_VALUES] = pixel_values(sample.views)
        case |= {f"view.{name}": array for name, array in other_inputs(sample.views).items()}
        outputs |= {name: np.stack([each[name] for each in encoded]) for name in encoded[0]}
    if own := prompt_inputs(inputs):
        case["positions"] = own.positions
        case |= {f"extra.{name}": array for name, array in own.extras.items()}
    return case, outputs


class SubmodelWriter:
    """Writes one submodel after another, partition by partition."""

    def __init__(self, architecture: Architecture, weights: Weights, job: ExportJob) -> None:
        self._graphs, self._weights = architecture.graphs, weights
        self._options, self._staging, self._work, self._clock = job.options, job.staging, job.work, job.clock

    def write(
        self,
        name: str,
        inputs: Sequence[Arrays],
        calibration: Sequence[Arrays],
        last_positions: Sequence[int] | None = None,
    ) -> list[dict[str, Array]]:
        """Write one submodel; return its uncompressed float32 outputs for each of `inputs`, its main one first.

        Compression is calibrated on the inputs `calibration`. Of each output only so many of the last positions are
        kept, all where `last_positions` is None.
        """
        precision, graph = self._options.part_precision(name), self._graphs[name]
        constants = Constants(self._weights, upcast=precision in UNCOMPRESSED)
        is_single = sum(stage.weights for stage in graph.stages) <= PARTITION_WEIGHTS
        reference, samples = [dict(each) for each in inputs], [dict(each) for each in calibration]
        models: list[ov.Model] = []
        for number, model in enumerate(partition(graph, constants, PARTITION_WEIGHTS)):
            is_last = graph.value in outputs_of(model)
            self._clock.begin(f"{name}: reference")
            computed = run(model, graph.states, reference, last_positions if is_last else None)
            reference = [values | new for values, new in zip(reference, computed, strict=True)]
            if not is_last:
                samples = [values | new for values, new in zip(samples, run(model, graph.states, samples), strict=True)]
            self._clock.begin(f"{name}: compress")
            compressed = self._compress(model, precision, samples, is_last=is_last, is_single=is_single)
            if not is_single:
                compressed = mapped(compressed, self._work / f"{name}-{number}.xml")
                constants.release()
            models.append(compressed)
        self._clock.begin(f"{name}: write")
        self._save(name, stitch(models, graph, name), precision)
        del models
        constants.release()
        for path in self._work.glob(f"{name}-*.*"):
            path.unlink()
        return [{name: values[name] for name in (graph.value, *graph.others)} for values in reference]

    def compute(self, graph: Graph, inputs: Sequence[Arrays]) -> list[dict[str, Array]]:
        """Return a graph's float32 outputs for each of `inputs`, its main one first; nothing is written."""
        self._clock.begin(f"{VISION}: reference")
        constants = Constants(self._weights, upcast=False)
        reference = [dict(each) for each in inputs]
        for model in partition(graph, constants, PARTITION_WEIGHTS):
            computed = run(model, graph.states, reference)
            reference = [values | new for values, new in zip(reference, computed, strict=True)]
            constants.release()
        return [{name: values[name] for name in (graph.value, *graph.others)} for values in reference]

    def _compress(
        self, model: ov.Model, precision: Precision, samples: Sequence[Arrays], *, is_last: bool, is_single: bool
    ) -> ov.Model:
        recipe = self._options.int4
        if precision == "int4" and is_last and not is_single and not recipe.all_layers and _matmuls(model) == 1:
            return compress(model, "int8", recipe)  # the LM head by itself, which stays INT8
        if not is_last:  # NNCF would take this partition's last matmul for the LM head and leave it INT8
            recipe = replace(recipe, all_layers=True)
        return compress(model, precision, recipe, samples)

    def _save(self, name: str, model: ov.Model, precision: Precision) -> None:
        if name == LANGUAGE:  # as optimum-intel marks what it converts: for a GPU's float16, and for the KV cache
            model.set_rt_info("8.0", ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"])
            model.set_rt_info("f16", ["runtime_options", "KV_CACHE_PRECISION"])
        save_ir(model, self._staging / FILE_NAMES[name], precision)


def mapped(model: ov.Model, path: Path) -> ov.Model:
    """Write a model and return it with its weights mapped from the file instead of held in memory."""
    save_ir(model, path, "fp32")
    return read_ir(path)


def run(
    model: ov.Model,
    states: Collection[str],
    inputs: Sequence[Arrays],
    last_positions: Sequence[int] | None = None,
) -> list[dict[str, Array]]:
    """Return a partition's float32 outputs, but for states, for each of `inputs`, which may hold more than it reads.

    Of each output only so many of the last positions are kept, all where `last_positions` is None.
    """
    if not inputs:
        return []
    outputs = [output for name, output in outputs_of(model).items() if name not in states]
    names = [name for name in outputs_of(model) if name not in states]
    results = [output.get_node() for output in outputs]
    without_states = import_openvino().Model(results, model.get_parameters())
    compiled = core().compile_model(without_states, "CPU", _FLOAT32.language_properties("CPU"))
    parameters = [each.get_any_name() for each in without_states.inputs]
    computed = []
    for number, values in enumerate(inputs):
        found = compiled.create_infer_request().infer({name: values[name] for name in parameters}, share_inputs=True)
        kept = slice(-last_positions[number], None) if last_positions else slice(None)
        computed.append(
            {
                name: np.array(value[0, kept] if last_positions else value)
                for name, value in zip(names, found.values(), strict=True)
            }
        )
    return computed


def _matmuls(model: ov.Model) -> int:
    return sum(node.get_type_name() == "MatMul" for node in model.get_ops())
