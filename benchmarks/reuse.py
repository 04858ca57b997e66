"""What is not computed again: ratios to edgevlm's own first token and to decoding without drafts, in one run.

    python -m benchmarks.reuse build/side_by_side/edgevlm-int4 [--kv-cache paged] [-o benchmarks/results/reuse.json]

Text to repeat needs real text weights, such as those of `make_checkpoint`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path

from benchmarks.results import tell_spreads
from edgevlm import VLM, Answer, GenerationConfig, RuntimeConfig
from edgevlm.bench.measure import QUESTION, perturb, sample_picture
from edgevlm.families.base import RGB, ImageBudget
from edgevlm.inputs.image import load_image
from edgevlm.runtime.config import KV_CACHES, KVCache

TO_REPEAT = json.dumps(
    [{"line": n, "part": f"A{n}-7731", "count": 12 + n, "state": "checked and accepted"} for n in range(1, 6)]
)
COPY = f"Repeat the following JSON exactly, without comment:\n{TO_REPEAT}"
PROSE = "Tell a short story about a lighthouse keeper and a storm."


HIGH, LOW = ImageBudget("high"), ImageBudget("low")
ROWS, COLS = 3, 4
"""The tiles that a picture of 1600x1200 is split into."""


def reuse(model: Path, picture: Path, repeat: int, kv_cache: KVCache) -> dict[str, list[float]]:
    """Return the time to the first token of a new picture, a next question and each tile changed, with ratios."""
    image, config = load_image(picture), GenerationConfig(max_new_tokens=1)
    found: dict[str, list[float]] = defaultdict(list)
    vlm = VLM(model, RuntimeConfig(kv_cache=kv_cache))
    vlm.generate(image, QUESTION, config, HIGH)
    for number in range(1, repeat + 1):
        shown = perturb(image, number)
        new = vlm.generate(shown, QUESTION, config, HIGH)
        cases = [
            ("new picture", new),
            ("next question", vlm.generate(shown, "How many people are there?", config, HIGH)),
        ]
        for row, col in product(range(ROWS), range(COLS)):
            vlm.generate(shown, QUESTION, config, HIGH)
            changed = vlm.generate(with_change(shown, row, col), QUESTION, config, HIGH)
            cases += [("one tile changed", changed), (f"one tile changed, row {row + 1} of {ROWS}", changed)]
        for name, answer in cases:
            found[f"{name}, TTFT s"].append(answer.timings.ttft_s)
            found[f"{name}, ratio"].append(answer.timings.ttft_s / new.timings.ttft_s)
            found[f"{name}, views encoded"].append(answer.views - answer.cached_views)
    return found


def with_change(image: RGB, row: int, col: int) -> RGB:
    """Return the picture with a patch inside one tile inverted."""
    height, width = image.shape[0] // ROWS, image.shape[1] // COLS
    changed = image.copy()
    rows = slice(row * height + height // 3, (row + 1) * height - height // 3)
    cols = slice(col * width + width // 4, (col + 1) * width - width // 4)
    changed[rows, cols] = 255 - changed[rows, cols]
    return changed


def drafting(model: Path, repeat: int, kv_cache: KVCache) -> dict[str, list[float]]:
    """Return the decoding speed with drafts over that without, where text repeats the prompt and where it does not."""
    vlm = VLM(model, RuntimeConfig(kv_cache=kv_cache, kept_sessions=0))
    found: dict[str, list[float]] = defaultdict(list)
    for name, prompt in (("copy", COPY), ("prose", PROSE)):
        config = GenerationConfig(max_new_tokens=200)
        for number in range(repeat + 1):
            plain = vlm.generate(None, prompt, replace(config, draft_tokens=0))
            drafted = vlm.generate(None, prompt, config)
            if number:  # the first pair warms up
                found[f"{name}, tokens/s with drafts / without"].append(_speed(drafted) / _speed(plain))
                found[f"{name}, tokens/s without drafts"].append(_speed(plain))
                found[f"{name}, same tokens"].append(float(drafted.token_ids == plain.token_ids))
                found[f"{name}, drafted tokens that came true"].append(
                    drafted.accepted_tokens / max(drafted.drafted_tokens, 1)
                )
    return found


def asked_again(model: Path, picture: Path, repeat: int, kv_cache: KVCache) -> dict[str, list[float]]:
    """Return the decoding time of a camera's next frames, drafted from earlier answers, over that without drafts."""
    vlm, found = VLM(model, RuntimeConfig(kv_cache=kv_cache)), defaultdict(list)
    image, config = load_image(picture), GenerationConfig(max_new_tokens=32)
    for number in range(repeat + 2):
        frame = perturb(image, number)
        drafted = vlm.generate(frame, QUESTION, config, LOW)
        plain = vlm.generate(perturb(image, number + 1000), QUESTION, replace(config, draft_tokens=0), LOW)
        if number > 1:  # two answers tell what may be drafted
            after_vision = [answer.timings.total_s - answer.timings.vision_s for answer in (drafted, plain)]
            found["asked again, seconds after vision, with drafts / without"].append(after_vision[0] / after_vision[1])
            found["asked again, drafted tokens that came true"].append(
                drafted.accepted_tokens / max(drafted.drafted_tokens, 1)
            )
    return found


def _speed(answer: Answer) -> float:
    assert answer.timings.tokens_per_s is not None
    return answer.timings.tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--kv-cache", choices=KV_CACHES, default="paged", help="paged is what serve and watch take")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        shown = arguments.model, sample_picture(Path(scratch)), arguments.repeat, arguments.kv_cache
        found = reuse(*shown) | asked_again(*shown)
    found |= drafting(arguments.model, arguments.repeat, arguments.kv_cache)
    tell_spreads(arguments.model, found, arguments.output, kv_cache=arguments.kv_cache)


if __name__ == "__main__":
    main()
