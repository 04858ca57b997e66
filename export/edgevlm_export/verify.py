"""The exported folder against the reference: each submodel on real inputs, then greedy tokens end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm.decoding.fidelity import fidelity
from edgevlm.errors import VerificationError
from edgevlm.families.base import LanguageInputs
from edgevlm.inputs.prompt import merge
from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION
from edgevlm.vlm import VLM
from edgevlm_export.options import UNCOMPRESSED, Precision
from edgevlm_export.samples import pixel_views

Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = Mapping[str, Array]

TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2}
"""Largest absolute error of an uncompressed submodel, relative to the reference's largest absolute value."""


@dataclass(frozen=True)
class PartFigures:
    """Distance of one submodel's outputs from the reference."""

    precision: str
    max_abs_error: float
    cosine: float
    """Of all outputs together, flattened."""


@dataclass(frozen=True)
class Verification:
    """All figures of one export; computed in float32 arithmetic, so that they show the weights alone."""

    parts: Mapping[str, PartFigures]
    greedy_agreement: float
    """Share of positions where the export's likeliest next token is the reference's, the reference's text given."""
    kl_divergence: float
    """Mean over those positions of KL(reference || export), in nats."""
    positions: int
    reference: str = "transformers"
    """What computed the values compared with."""

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into the manifest."""
        return asdict(self)


def verify(vlm: VLM, cases: Arrays, reference: Arrays) -> Verification:
    """Compare the export `vlm`, loaded in float32, with the reference's outputs on `cases`."""
    embeds: list[tuple[Array, Array]] = []
    logits: list[tuple[Array, Array]] = []
    table: list[tuple[Array, Array]] = []
    for name in sorted({key.split(".")[0] for key in cases}):
        image_embeds = np.empty((0, vlm.manifest.hidden_size), np.float32)
        if f"{name}.pixel_values" in cases:
            views = pixel_views(cases[f"{name}.pixel_values"], _below(cases, f"{name}.view."))
            encoded = [*vlm.vision.encode(views)]
            embeds += [(reference[f"{name}.{key}"], np.stack([each[key] for each in encoded])) for key in encoded[0]]
            image_embeds = reference[f"{name}.image_embeds"].reshape(-1, vlm.manifest.hidden_size)
        ids = np.concatenate([cases[f"{name}.input_ids"], reference[f"{name}.token_ids"][:-1]])
        found = _logits(vlm, ids, image_embeds, len(reference[f"{name}.logits"]), _prompt_inputs(cases, name))
        logits.append((reference[f"{name}.logits"], found))
        table.append((reference[f"{name}.text_embeds"], vlm.language_model.session().embed(ids)[0]))
    pairs = {VISION: embeds, TEXT_EMBEDDINGS: table, LANGUAGE: logits}
    parts = {
        part: PartFigures(vlm.manifest.submodels[part].precision, *_compare(each))
        for part, each in pairs.items()
        if each
    }
    near = fidelity(*map(np.concatenate, zip(*logits, strict=True)))
    return Verification(parts, near.greedy_agreement, near.kl_divergence, near.positions)


def _below(arrays: Arrays, prefix: str) -> dict[str, Array]:
    """Return the arrays whose names begin so, without that."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _prompt_inputs(cases: Arrays, name: str) -> LanguageInputs | None:
    """Return positions and extra inputs of a case's prompt and answer, None where they are those of any text."""
    positions = cases.get(f"{name}.positions")
    return None if positions is None else LanguageInputs(positions, _below(cases, f"{name}.extra."))


def _logits(vlm: VLM, ids: Array, image_embeds: Array, count: int, inputs: LanguageInputs | None) -> Array:
    """Return the logits of the last `count` positions, in one pass over prompt and answer."""
    session = vlm.language_model.session()
    inputs_embeds = merge(session.embed(ids), vlm.processor.family.image_rows(ids), image_embeds)
    return session.prefill(inputs_embeds, count, inputs=inputs)


def _compare(pairs: Sequence[tuple[Array, Array]]) -> tuple[float, float]:
    """Return the largest absolute error and the cosine of all outputs together."""
    want = np.concatenate([each.ravel() for each, _ in pairs]).astype(np.float64)
    got = np.concatenate([each.ravel() for _, each in pairs]).astype(np.float64)
    return float(np.abs(want - got).max()), float(want @ got / (np.linalg.norm(want) * np.linalg.norm(got)))


def check(figures: Verification, scales: Mapping[str, float], *, merges_tokens: bool = False) -> None:
    """Raise `VerificationError` when an uncompressed submodel is out of tolerance; `scales` are the largest values.

    Also when a figure of any submodel is no number: the submodel, or the reference, overflows.
    `merges_tokens`: the vision submodel merges tokens, and the reference does not, so it has no tolerance.
    """
    for part, each in figures.parts.items():
        if not np.isfinite([each.max_abs_error, each.cosine, figures.kl_divergence]).all():
            raise VerificationError(
                f"the {each.precision} {part} part cannot be compared with the reference, for there are outputs that"
                " are no numbers; nothing was written (use --no-verify to export all the same)"
            )
        if each.precision not in UNCOMPRESSED or (part == VISION and merges_tokens):
            continue
        limit = TOLERANCE[each.precision] * scales[part]  # type: ignore[index]
        if not each.max_abs_error <= limit:
            raise VerificationError(
                f"the {each.precision} {part} part differs from the reference by {each.max_abs_error:.2g}, more than"
                f" {limit:.2g}; nothing was written (use --no-verify to export all the same)"
            )


def scales(reference: Arrays) -> dict[str, float]:
    """Return each submodel's largest absolute reference value, at least 1."""
    parts = {"text_embeds": TEXT_EMBEDDINGS, "logits": LANGUAGE, "token_ids": None}
    largest = dict.fromkeys((VISION, TEXT_EMBEDDINGS, LANGUAGE), 1.0)
    for key, array in reference.items():
        if part := parts.get(key.partition(".")[2], VISION):
            largest[part] = max(largest[part], float(np.abs(array).max()))
    return largest


def load_arrays(path: Path) -> dict[str, Array]:
    """Return all arrays of an npz file."""
    with np.load(path) as arrays:
        return dict(arrays)
