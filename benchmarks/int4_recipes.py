"""What each INT4 recipe costs and keeps, on one checkpoint's language part.

    python -m benchmarks.int4_recipes FP32_EXPORT OUT.jsonl [--only NAME ...] [--tokens 48]

FP32_EXPORT is a folder made with `edgevlm export --fp32`. Its language part is compressed by every recipe; each is
then judged on questions outside the calibration set, along the FP32 model's own greedy answers: the share of
positions where the likeliest next token stays the same, and the mean KL divergence. Arithmetic is float32 for the
judgement and OpenVINO's own choice for the decode speed, for which each recipe and INT8 take turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.make_checkpoint import photograph
from benchmarks.prompts import PICTURE, TEXT
from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.fidelity import kl
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.chat_template import user_message
from edgevlm.inputs.processor import Processor
from edgevlm.manifest import LANGUAGE, load_manifest
from edgevlm.metrics import Stopwatch
from edgevlm.runtime.config import RuntimeConfig
from edgevlm.runtime.core import read_ir
from edgevlm.runtime.loader import ModelLoader
from edgevlm.vlm import VLM
from edgevlm_export.calibration import load_pairs
from edgevlm_export.compress import compress
from edgevlm_export.options import Int4Recipe
from edgevlm_export.output_folder import FILE_NAMES, save_ir, seal
from edgevlm_export.samples import language_samples

F32 = RuntimeConfig(device="CPU", inference_precision="f32", cache=False)
FAST = RuntimeConfig(device="CPU", cache=False)
PLAIN = Int4Recipe(group_size=64, ratio=1.0, scale_estimation=False)
SCALED = replace(PLAIN, group_size=32, scale_estimation=True)
RECIPES: dict[str, Int4Recipe | None] = {
    "int8": None,
    "asym, group 64 (as optimum-cli)": PLAIN,
    "sym, group 64": replace(PLAIN, sym=True),
    "asym, group 128": replace(PLAIN, group_size=128),
    "asym, group 32": replace(PLAIN, group_size=32),
    "asym, group 32, awq": replace(PLAIN, group_size=32, awq=True),
    "asym, group 32, gptq": replace(PLAIN, group_size=32, gptq=True),
    "asym, group 64, scale estimation": replace(SCALED, group_size=64),
    "asym, group 32, scale estimation": SCALED,
    "sym, group 32, scale estimation": replace(SCALED, sym=True),
    "asym, group 32, scale estimation, awq": replace(SCALED, awq=True),
    "asym, group 64, scale estimation, ratio 0.8": replace(SCALED, group_size=64, ratio=0.8),
    "asym, group 32, scale estimation, ratio 0.8": replace(SCALED, ratio=0.8),
    "asym, group 32, scale estimation, ratio 0.8, awq": replace(SCALED, ratio=0.8, awq=True),
    "asym, group 32, scale estimation, ratio 0.6": replace(SCALED, ratio=0.6),
    "asym, group 32, scale estimation, ratio 0.8, all layers": replace(SCALED, ratio=0.8, all_layers=True),
}


def sequences(vlm: VLM, tokens: int) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yield kind, embeddings of prompt and FP32 answer `(1, n, hidden)`, and the number of answer positions."""
    pictures = [photograph(1024, 768), photograph(640, 960)]
    cases = [("text", question, []) for question in TEXT]
    cases += [("picture", question, [picture]) for picture in pictures for question in PICTURE]
    for kind, question, images in cases:
        config = GenerationConfig(max_new_tokens=tokens)
        budget = ImageBudget("low")
        prompt = vlm.prepare([user_message(question, len(images))], images, config, Stopwatch(), budget)
        answer = vlm.generate(images, question, config, budget)
        embeds = (
            vlm.language_model.embed(answer.token_ids[:-1])
            if len(answer.token_ids) > 1
            else prompt.inputs_embeds[:, :0]
        )
        yield kind, np.concatenate([prompt.inputs_embeds, embeds], axis=1), len(answer.token_ids)


def judge(vlm: VLM, cases: list[tuple[str, np.ndarray, int]], wanted: list[np.ndarray]) -> dict[str, Any]:
    """Return agreement and KL by kind of prompt."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for (kind, inputs_embeds, count), want in zip(cases, wanted, strict=True):
        got = vlm.language_model.session().prefill(inputs_embeds, logits_to_keep=count)
        found.setdefault(kind, []).append((want.argmax(-1) == got.argmax(-1), kl(want, got)))
    return {
        f"{kind}_{name}": round(float(np.concatenate([each[i] for each in pairs]).mean()), 4)
        for kind, pairs in found.items()
        for i, name in enumerate(("agreement", "kl"))
    }


def decode_speed(vlm: VLM, context: int = 900, tokens: int = 48) -> float:
    """Return decoded tokens a second after `context` positions."""
    session = vlm.language_model.session()
    session.prefill(session.embed(np.arange(context) % 1000 + 100))
    started = perf_counter()
    for token in range(tokens):
        session.step([100 + token])
    return tokens / (perf_counter() - started)


def speed_beside(vlm: VLM, other: VLM, rounds: int = 9) -> dict[str, float]:
    """Return the median speed of `vlm` and of its ratio to `other`, the two taking turns."""
    pairs = [(decode_speed(vlm), decode_speed(other)) for _ in range(rounds)]
    return {
        "decode_tokens_per_s": round(statistics.median(speed for speed, _ in pairs), 1),
        "decode_over_int8": round(statistics.median(speed / beside for speed, beside in pairs), 2),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as kept:
        compare(kept)


def compare(kept: str) -> None:
    """Run every recipe; `kept` is a folder for the INT8 export that all are timed against."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("export", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    manifest = load_manifest(arguments.export)
    reference = VLM(arguments.export, F32)
    cases = list(sequences(reference, arguments.tokens))
    wanted = [reference.language_model.session().prefill(each, count) for _, each, count in cases]
    del reference
    samples = language_samples(
        Processor(arguments.export, manifest), ModelLoader(arguments.export, manifest, FAST, "CPU"), load_pairs()
    )
    for name, recipe in RECIPES.items():
        if arguments.only and recipe is not None and name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "export"
            shutil.copytree(arguments.export, folder, ignore=shutil.ignore_patterns("openvino_language*"))
            started = perf_counter()
            model = read_ir(arguments.export / FILE_NAMES[LANGUAGE])
            data = samples if recipe and recipe.needs_data else None
            model = compress(model, "int4" if recipe else "int8", recipe or Int4Recipe(), data)
            save_ir(model, folder / FILE_NAMES[LANGUAGE], "int4")
            seconds = perf_counter() - started
            precisions = {part: each.precision for part, each in manifest.submodels.items()}
            sealed = seal(folder, replace(manifest, verification=None), precisions | {LANGUAGE: "int4"})  # type: ignore[arg-type]
            del model
            row = {"recipe": name, "options": asdict(recipe) if recipe else None, "compress_s": round(seconds, 1)}
            row["size_mb"] = round(sealed.submodels[LANGUAGE].size_bytes / 1e6, 1)
            row |= judge(VLM(folder, F32), cases, wanted)
            fast = VLM(folder, FAST)
            if recipe is None:
                int8 = VLM(shutil.copytree(folder, Path(kept) / "int8"), FAST)
            row |= speed_beside(fast, int8)
            question = "What is the capital of France?"
            row["answer"] = fast.generate(None, question, GenerationConfig(max_new_tokens=32)).text
        print(json.dumps(row, ensure_ascii=False), flush=True)
        with arguments.results.open("a", encoding="utf-8") as results:
            results.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
