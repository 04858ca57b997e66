"""One system in a process of its own: load, warm up, answer; a JSON line for each answer on stdout.

    python -m benchmarks.peers SYSTEM MODEL PICTURE [--question Q] [--tokens 32] [--answers 2] [--threads 2]

`side_by_side` calls it for each system in turn. Every system gets the same picture file and question and makes exactly
as many tokens as asked for, greedily; the time to the first token begins with the picture still a file.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from edgevlm.metrics import peak_memory


@dataclass(frozen=True)
class Job:
    """What every system is asked."""

    model: Path
    picture: Path
    question: str
    tokens: int
    answers: int
    threads: int


@dataclass(frozen=True)
class Measured:
    """One answer; seconds."""

    ttft_s: float
    tpot_s: float
    total_s: float
    prompt_tokens: int
    text: str


Answers: TypeAlias = Iterator[Measured]


def measured(started: float, marks: list[float], prompt_tokens: int, text: str) -> Measured:
    """Return the figures of an answer that began at `started` and whose tokens came at `marks`."""
    first, last = marks[0], marks[-1]
    return Measured(first - started, (last - first) / max(len(marks) - 1, 1), last - started, prompt_tokens, text)


def transformers_answers(job: Job, model: Any) -> Answers:
    """Answer with anything that has transformers' `generate`."""
    from PIL import Image
    from transformers import Idefics3Processor

    processor = Idefics3Processor.from_pretrained(job.model)
    content = [{"type": "image"}, {"type": "text", "text": job.question}]
    marks: list[float] = []

    def mark(*_: Any, **__: Any) -> bool:
        marks.append(time.perf_counter())
        return False

    while True:
        marks.clear()
        started = time.perf_counter()
        with Image.open(job.picture) as opened:
            image = opened.convert("RGB")
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[image], text=prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        ids = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=job.tokens,
            min_new_tokens=job.tokens,
            stopping_criteria=[mark],
        )
        length = inputs["input_ids"].shape[1]
        yield measured(started, list(marks), length, processor.tokenizer.decode(ids[0][length:]))


def torch_system(dtype: str) -> Callable[[Job], Answers]:
    """transformers on PyTorch."""

    def answers(job: Job) -> Answers:
        import torch
        from transformers import Idefics3ForConditionalGeneration

        torch.set_num_threads(job.threads)
        model = Idefics3ForConditionalGeneration.from_pretrained(job.model, dtype=getattr(torch, dtype)).eval()
        return transformers_answers(job, model)

    return answers


def optimum_answers(job: Job) -> Answers:
    """optimum-intel on an export of optimum-cli's."""
    from optimum.intel import OVModelForVisualCausalLM

    config = {
        "INFERENCE_NUM_THREADS": job.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "CACHE_DIR": str(job.model / "cache"),
    }
    return transformers_answers(job, OVModelForVisualCausalLM.from_pretrained(job.model, ov_config=config))


def edgevlm_system(detail: str) -> Callable[[Job], Answers]:
    """edgevlm, every picture as if never seen before."""

    def answers(job: Job) -> Answers:
        from edgevlm import VLM, GenerationConfig, RuntimeConfig
        from edgevlm.bench import ask

        vlm = VLM(job.model, RuntimeConfig(threads=job.threads, image_cache_bytes=0, kept_sessions=0))
        options = GenerationConfig(max_new_tokens=job.tokens, detail=detail)  # type: ignore[arg-type]
        while True:
            once = ask(vlm, job.picture, job.question, options)
            timings = once.timings
            text = vlm.processor.tokenizer.decode(once.token_ids)
            yield Measured(timings.ttft_s, timings.tpot_s or 0.0, timings.total_s, len(once.prompt), text)

    return answers


SYSTEMS: dict[str, Callable[[Job], Answers]] = {
    "torch-fp32": torch_system("float32"),
    "torch-bf16": torch_system("bfloat16"),
    "optimum": optimum_answers,
    "edgevlm": edgevlm_system("high"),
    "edgevlm-auto": edgevlm_system("auto"),
    "edgevlm-low": edgevlm_system("low"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("model", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--question", default="Describe this picture in detail.")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--answers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = vars(parser.parse_args())
    system = SYSTEMS[arguments.pop("system")]
    job = Job(**arguments)
    for number, each in zip(range(job.answers), system(job), strict=False):
        line = {"number": number, **asdict(each), "at": time.time(), "peak_memory_bytes": peak_memory()}
        print(json.dumps(line, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
