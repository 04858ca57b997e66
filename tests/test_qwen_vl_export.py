"""The graphs of Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers, on inputs that its own functions make."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.errors import SourceError
from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION
from edgevlm.runtime.core import core
from edgevlm_export.families import Architecture, architecture, family_config
from edgevlm_export.families import qwen_vl as exporter
from edgevlm_export.families.text_models import DEFAULTS
from edgevlm_export.graphs.constants import Constants
from edgevlm_export.graphs.stages import partition, stitch
from edgevlm_export.routes.native import PARTITION_WEIGHTS
from edgevlm_export.source.checkpoint import Checkpoint, open_checkpoint
from edgevlm_export.source.config_reader import UnsupportedError, overlooked
from edgevlm_export.source.safetensors_reader import Weights
from tests.conftest import F32, noise
from tests.helpers.graphs import runtime_kinds
from tests.helpers.published import published_folder
from tests.helpers.qwen_checkpoints import (
    NAMES,
    WINDOW,
    Reference,
    as_published,
    image_processor,
    make_checkpoint,
    read_json,
    write_json,
)

KINDS = tuple(NAMES)
WORDS = [40, 51, 62, 73, 84, 95, 106, 117, 128]
PICTURES = [noise(44, 61), noise(33, 15)]
"""Of 8x6 and of 4x2 image tokens; the larger has windows of one column, of two, and a row that is cut."""


class Model:
    """A checkpoint's graphs, read, built and stitched as the native route does it, and compiled in float32."""

    def __init__(self, checkpoint: Path, limit: int = PARTITION_WEIGHTS) -> None:
        found, weights = read(checkpoint)
        weights.expect(found.shapes, found.unused)
        self.architecture = found
        self._constants = constants = Constants(weights, upcast=True)  # they hold the memory that the graphs read
        self.compiled = {}
        self.inputs: dict[str, dict[str, Any]] = {}
        for name, graph in found.graphs.items():
            model = stitch([*partition(graph, constants, limit)], graph, name)
            self.inputs[name] = {each.get_any_name(): each.get_partial_shape() for each in model.inputs}
            self.compiled[name] = core().compile_model(model, "CPU", F32.language_properties("CPU"))

    def encode(self, view: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs `(M, D)` of one picture, in the graph's order."""
        return [each[0] for each in self.compiled[VISION](view).values()]

    def logits(
        self,
        reference: Reference,
        inputs: dict[str, Any],
        features: Sequence[Sequence[np.ndarray]],
        cuts: Sequence[int],
    ) -> np.ndarray:
        """Return the logits `(S, V)` of a prompt that is read in pieces."""
        ids = inputs["input_ids"].numpy()
        shown = ids[0] == reference.config.image_token_id
        embeds = self.compiled[TEXT_EMBEDDINGS](ids)[0]
        deep = np.zeros((self.architecture.decoder.deepstack, *embeds.shape), np.float32)
        if features:
            first, *others = [np.concatenate(each) for each in zip(*features, strict=True)]
            embeds[0, shown] = first
            for each, rows in zip(deep, others, strict=True):
                each[0, shown] = rows
        positions, request = reference.positions(inputs), self.compiled[LANGUAGE].create_infer_request()
        found = []
        for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
            given = {
                "inputs_embeds": embeds[:, start:stop],
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": positions[:, :, start:stop],
                "beam_idx": np.zeros(1, np.int32),
                **{f"deepstack_embeds.{number}": each[:, start:stop] for number, each in enumerate(deep)},
            }
            found.append(np.array(request.infer(given)["logits"][0]))
        return np.concatenate(found)


def read(folder: Path) -> tuple[Architecture, Weights]:
    """Return a checkpoint's architecture, nothing of its configuration overlooked."""
    checkpoint = open_checkpoint(folder)
    facts, preprocessor = family_config(checkpoint)
    weights = Weights(checkpoint)
    found = architecture(checkpoint, facts, weights)
    assert overlooked([*found.sections, preprocessor]) == {}
    return found, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qwen")


@lru_cache
def saved(folder: Path, kind: str) -> Path:
    """A checkpoint as transformers 5 saves it. Tests must not change it."""
    return make_checkpoint(folder / kind, kind)


@lru_cache
def published(folder: Path, kind: str) -> Path:
    """A checkpoint as those on the hub are. Tests must not change it."""
    return as_published(saved(folder, kind), folder / f"{kind}-published")


VARIANTS: dict[str, Any] = {
    "saved": saved,
    "published": published,
    "held": lambda folder, kind: make_checkpoint(folder / f"{kind}-held", kind, held=True),
    "tied": lambda folder, kind: make_checkpoint(folder / f"{kind}-tied", kind, tied=True),
    "yarn": lambda folder, kind: make_checkpoint(
        folder / f"{kind}-yarn", kind, text_config={"rope_parameters": yarn(kind)}
    ),
}


def yarn(kind: str) -> dict[str, Any]:
    """RoPE stretched as the model cards advise for long texts."""
    sections = [6, 5, 5] if kind == "qwen3_vl" else [2, 3, 3]
    stated = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mrope_section": sections}
    return {**stated, "rope_theta": 10000.0, **({"mrope_interleaved": True} if kind == "qwen3_vl" else {})}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_features_and_logits_are_those_of_transformers(kind: str, variant: str, folder: Path) -> None:
    """Without pictures, with one and with two, read at once and in two pieces, the cut within a picture."""
    checkpoint = VARIANTS[variant](folder, kind)
    model, reference = Model(checkpoint), Reference(checkpoint)
    for images in ([], PICTURES[:1], PICTURES):
        inputs = reference.inputs(images, WORDS)
        expected = reference.features(inputs)
        features = [model.encode(view) for view in reference.views(inputs)]
        for found, wanted in zip(features, expected, strict=True):
            assert len(found) == len(wanted) == (3 if kind == "qwen3_vl" else 1)
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-4)
        logits = reference.logits(inputs)
        for cuts in ([], [7]):
            np.testing.assert_allclose(model.logits(reference, inputs, features, cuts), logits, atol=1e-4)
