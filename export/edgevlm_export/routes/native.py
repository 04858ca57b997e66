"""The route without torch: graphs made from the checkpoint's own tensors, a few layers in memory at a time.

Each part goes through piece by piece. A piece is built with its weights mapped from the safetensors, run in float32 on
what came out of the piece before (which gives the next piece's inputs, calibration data and, at the end, the reference
that the finished folder is compared with), compressed, and written to disk; the written pieces are mapped back and
joined. So memory is bounded by a piece, whatever the model's size.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

import edgevlm
from edgevlm.errors import SourceError
from edgevlm.families.base import IMAGE_EMBEDS, PIXEL_VALUES
from edgevlm.inputs.processor import Processor
from edgevlm.manifest import LANGUAGE, SUBMODELS, TEXT_EMBEDDINGS, VISION, Manifest
from edgevlm.runtime.config import RuntimeConfig
from edgevlm.runtime.core import core, read_ir
from edgevlm_export.calibration import Pair, verification_pairs, with_questions
from edgevlm_export.clock import StageClock
from edgevlm_export.compress import compress, import_nncf
from edgevlm_export.families import Architecture
from edgevlm_export.graphs.layers import Constants
from edgevlm_export.graphs.stages import join, pieces, produced
from edgevlm_export.options import UNCOMPRESSED, VERIFY_TOKENS, ExportOptions, Precision
from edgevlm_export.output_folder import FILE_NAMES, Written, save_ir
from edgevlm_export.samples import Sample, decoder_inputs, encoder_inputs, make_sample, pixel_values, vision_samples
from edgevlm_export.source.safetensors_reader import Stored, Weights
from edgevlm_export.verify import Array, Arrays

if TYPE_CHECKING:
    import openvino as ov

LIBRARIES = ("nncf", "safetensors", "huggingface_hub")
PIECE_WEIGHTS = 64_000_000
"""Weights of a piece: 0.26 GB in float32, of which compiling and compressing hold several copies."""
_FLOAT32 = RuntimeConfig(device="CPU", inference_precision="f32", cache=False)


def write_parts(
    architecture: Architecture,
    weights: Weights,
    manifest: Manifest,
    pairs: Sequence[Pair],
    options: ExportOptions,
    staging: Path,
    work: Path,
    clock: StageClock,
) -> Written:
    """Write the compressed parts into `staging`. Raises `ExportError`."""
    Thread(target=import_nncf, daemon=True).start()  # takes a second or more
    processor = Processor(work, manifest)
    chosen = verification_pairs(pairs) if options.verify else {}
    needs_data = options.part_precision(LANGUAGE) == "int4" and options.int4.needs_data
    learned = with_questions(pairs) if needs_data else []
    samples = {pair: make_sample(processor, pair) for pair in [*chosen.values(), *learned]}
    table = weights.take(f"{architecture.decoder.prefix}.embed_tokens.weight")
    embeds = {pair: look_up(table, sample.ids) for pair, sample in samples.items()}
    writer = PartWriter(architecture, weights, options, staging, work, clock)

    feeds = [encoder_inputs(processor.family, view) for sample in samples.values() for view in sample.views]
    data = vision_samples(processor, pairs, manifest.hidden_size) if options.part_precision(VISION) == "w8a8" else []
    outputs = iter(writer.write(VISION, feeds, data))
    encoded = {pair: [{IMAGE_EMBEDS: next(outputs)[0]} for _ in sample.views] for pair, sample in samples.items()}
    writer.write(TEXT_EMBEDDINGS, [], [])

    inputs = {
        pair: decoder_inputs(processor.family, sample.ids, sample.visuals, embeds[pair], encoded[pair])
        for pair, sample in samples.items()
    }
    data = [inputs[pair] for pair in learned]
    kept = [compared(samples[pair]) for pair in chosen.values()]
    logits = writer.write(LANGUAGE, [inputs[pair] for pair in chosen.values()], data, kept)

    for path in work.iterdir():
        shutil.copyfile(path, staging / path.name)
    cases: dict[str, Array] = {}
    reference: dict[str, Array] = {}
    for (name, pair), scores in zip(chosen.items(), logits, strict=True):
        case, expected = as_case(samples[pair], embeds[pair], encoded[pair], scores)
        cases |= {f"{name}.{key}": array for key, array in case.items()}
        reference |= {f"{name}.{key}": array for key, array in expected.items()}
    precisions = {part: options.part_precision(part) for part in SUBMODELS}
    versions = {"edgevlm": edgevlm.__version__, **{name: version(name) for name in ("openvino", "nncf")}}
    return Written(precisions, versions, "openvino, float32, uncompressed", cases, reference)


def compared(sample: Sample) -> int:
    """Return at how many of the last positions logits are compared: of the answer, or of a prompt without one."""
    answer = len(sample.ids) - sample.prompt
    return min(VERIFY_TOKENS, answer + 1 if answer else len(sample.ids))


def look_up(table: Stored, ids: Array) -> Array:
    """Return the embeddings `(1, n, D)` of token ids. Raises `SourceError` for a token that the table lacks."""
    if ids.max() >= len(table.array):
        raise SourceError(
            f"the tokenizer makes token {ids.max()}, and the model knows {len(table.array)}: tokenizer.json and the"
            " weights do not belong together"
        )
    return replace(table, array=table.array[ids]).float32()[None]


def as_case(sample: Sample, embeds: Array, encoded: Sequence[Arrays], logits: Array) -> tuple[Arrays, Arrays]:
    """Return inputs and outputs as `verify` takes them: logits `(compared, V)` of the last positions of the sample."""
    prompt = len(sample.ids) - compared(sample) + 1
    following = np.append(sample.ids[prompt:], logits[-1].argmax())
    case = {"input_ids": sample.ids[:prompt]}
    outputs = {"token_ids": following, "logits": logits, "text_embeds": embeds[0]}
    if sample.views:
        case[PIXEL_VALUES] = pixel_values(sample.views)
        outputs[IMAGE_EMBEDS] = np.stack([each[IMAGE_EMBEDS] for each in encoded])
    return case, outputs


class PartWriter:
    """Writes one part after another, piece by piece."""

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        options: ExportOptions,
        staging: Path,
        work: Path,
        clock: StageClock,
    ) -> None:
        self._graphs = architecture.graphs()
        self._weights, self._options = weights, options
        self._draft, self._work, self._clock = staging, work, clock

    def write(
        self, part: str, feeds: Sequence[Arrays], data: Sequence[Arrays], kept: Sequence[int] | None = None
    ) -> list[Array]:
        """Write one part; return its uncompressed float32 output for each of `feeds`.

        `data` are the inputs to calibrate compression on; `kept` are the last positions whose output is wanted.
        """
        precision = self._options.part_precision(part)
        constants = Constants(self._weights, widen=precision in UNCOMPRESSED)
        graph = self._graphs[part](constants)
        alone = sum(block.weights for block in graph.blocks) <= PIECE_WEIGHTS
        wanted: list[dict[str, Array]] = [dict(feed) for feed in feeds]
        samples: list[dict[str, Array]] = [dict(sample) for sample in data]
        models: list[ov.Model] = []
        for number, piece in enumerate(pieces(graph, PIECE_WEIGHTS)):
            last = graph.value in produced(piece)
            self._clock.begin(f"{part}: reference")
            run(piece, wanted + ([] if last else samples), kept if last else None)
            self._clock.begin(f"{part}: compress")
            model = self._compress(piece, precision, samples, last=last, alone=alone)
            if not alone:
                model = mapped(model, self._work / f"{part}-{number}.xml")
                constants.release()
            models.append(model)
        self._clock.begin(f"{part}: write")
        self._save(part, join(models, graph, part), precision)
        del models
        constants.release()
        for path in self._work.glob(f"{part}-*.*"):
            path.unlink()
        return [feed[graph.value] for feed in wanted]

    def _compress(
        self, model: ov.Model, precision: Precision, samples: Sequence[Arrays], *, last: bool, alone: bool
    ) -> ov.Model:
        recipe = self._options.int4
        if precision == "int4" and last and not alone and not recipe.all_layers and _products(model) == 1:
            return compress(model, "int8", recipe)  # the head by itself, which stays INT8
        if not last:  # what NNCF takes for the last layer here is none
            recipe = replace(recipe, all_layers=True)
        return compress(model, precision, recipe, samples)

    def _save(self, part: str, model: ov.Model, precision: Precision) -> None:
        if part == LANGUAGE:  # as optimum-intel marks what it converts: for a GPU's float16, and for the KV cache
            model.set_rt_info("8.0", ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"])
            model.set_rt_info("f16", ["runtime_options", "KV_CACHE_PRECISION"])
        save_ir(model, self._draft / FILE_NAMES[part], precision)


def mapped(model: ov.Model, path: Path) -> ov.Model:
    """Write a model and return it with its weights mapped from the file instead of held in memory."""
    save_ir(model, path, "fp32")
    return read_ir(path)


def run(model: ov.Model, feeds: Sequence[dict[str, Array]], kept: Sequence[int] | None = None) -> None:
    """Run a piece in float32 and add its outputs to each feed; `kept` are the last positions to keep of them."""
    if not feeds:
        return
    compiled = core().compile_model(model, "CPU", _FLOAT32.language_properties("CPU"))
    names = [each.get_any_name() for each in model.inputs]
    for number, feed in enumerate(feeds):
        outputs = compiled.create_infer_request().infer({name: feed[name] for name in names}, share_inputs=True)
        for name, value in zip(produced(model), outputs.values(), strict=True):
            feed[name] = np.array(value[0, -kept[number] :] if kept else value)


def _products(model: ov.Model) -> int:
    return sum(node.get_type_name() == "MatMul" for node in model.get_ops())
