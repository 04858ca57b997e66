"""What a form costs and saves: ratios to edgevlm without it, in one run.

python -m benchmarks.forms build/side_by_side/edgevlm-int4 [--repeat 5] [-o benchmarks/results/forms.json]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

from benchmarks.results import tell_spreads
from edgevlm import VLM, Answer, Constraint, GenerationConfig
from edgevlm.decoding.sampling import greedy
from edgevlm.decoding.structured import GrammarMatcher

PROMPT = "Tell a short story about a lighthouse keeper and a storm."
READING = Constraint.json_schema(
    {
        "type": "object",
        "properties": {
            "instrument": {"enum": ["pressure gauge", "digital display", "thermometer"]},
            "reading": {"type": "integer", "minimum": 0, "maximum": 9999},
            "unit": {"enum": ["bar", "degrees Celsius", "volts"]},
            "needs_attention": {"type": "boolean"},
        },
        "required": ["instrument", "reading", "unit", "needs_attention"],
        "additionalProperties": False,
    }
)
CHOICES = ["yes", "no", "cannot be seen"]


def measure(model: Path, repeat: int) -> dict[str, list[float]]:
    """Return the figures, one of each name for each round; the first round warms up and is not kept."""
    found: dict[str, list[float]] = defaultdict(list)
    vlm = VLM(model)
    started = perf_counter()
    vlm.grammar_tokenizer.encode("x")
    found["vocabulary, s, once"].append(perf_counter() - started)
    free = GenerationConfig(max_new_tokens=100, draft_tokens=0)
    for number in range(repeat + 1):
        started = perf_counter()
        vlm.grammar_tokenizer.matcher(READING, greedy)
        compiled = perf_counter() - started
        plain = vlm.generate(None, PROMPT, free)
        anything = vlm.generate(None, PROMPT, replace(free, constraint=Constraint.regex("(?s:.*)")))
        form = replace(free, constraint=READING)
        together = vlm.generate(None, PROMPT, form)
        with patch.object(GrammarMatcher, "fast_forward", property(lambda _: [])):
            singly = vlm.generate(None, PROMPT, form)
        one_of = vlm.generate(None, PROMPT, replace(free, constraint=Constraint.choices(CHOICES)))
        scores = vlm.score(None, PROMPT, CHOICES)
        if number:
            found["schema compiled, ms"].append(1000 * compiled)
            found["time a token, anything allowed / free"].append(_tpot(anything) / _tpot(plain))
            found["whole answer, forced tokens together / singly"].append(
                together.timings.total_s / singly.timings.total_s
            )
            found["same tokens"].append(float(together.token_ids == singly.token_ids))
            found["tokens of it"].append(together.generated_tokens)
            found["tokens of it forced"].append(together.fast_forward_tokens)
            found["three choices, known prompt, score / generate"].append(
                scores.timings.total_s / one_of.timings.total_s
            )
    return found


def _tpot(answer: Answer) -> float:
    assert answer.timings.tpot_s is not None
    return answer.timings.tpot_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.repeat)
    tell_spreads(arguments.model, found, arguments.output)


if __name__ == "__main__":
    main()
