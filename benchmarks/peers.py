"""One system in a process of its own: load, warm up, answer; JSON lines for its start and the answer on stdout.

    python -m benchmarks.peers SYSTEM MODEL PICTURE [--question Q] [--tokens 32] [--threads 2]

`side_by_side` calls it for each system in turn. Every system gets the same picture file and question and makes exactly
as many tokens as asked for, greedily; the time to the first token begins with the picture still a file. Systems that
run the text part alone get as many tokens as the prompt would have, and one that runs the vision part alone its tiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from benchmarks.child import tell_case, tell_start
from benchmarks.llama_cpp import LlamaCpp
from benchmarks.peer_models import VISION_ONNX
from edgevlm.bench.conditions import Meter


@dataclass(frozen=True)
class Job:
    """What every system is asked."""

    model: Path
    picture: Path
    question: str
    tokens: int
    threads: int
    prompt_tokens: int
    """For systems that run the text part alone."""
    tiles: int
    """Of the picture, which has 1600x1200 pixels, the global view counted."""


@dataclass(frozen=True)
class Measured:
    """One answer; seconds."""

    ttft_s: float
    tpot_s: float
    total_s: float
    prompt_tokens: int
    text: str
    vision_s: float | None = None
    prefill_s: float | None = None
    views: int | None = None
    image_tokens: int | None = None
    vision_arithmetic: str | None = None


COLUMNS = {1: 1, 5: 2, 13: 4}
"""Columns of the grid that a picture of 1600x1200 is split into, by its number of tiles."""
Answers: TypeAlias = Iterator[Measured]


def measured(started: float, marks: list[float], prompt_tokens: int, text: str) -> Measured:
    """Return the figures of an answer that began at `started` and whose tokens came at `marks`."""
    first, last = marks[0], marks[-1]
    return Measured(first - started, (last - first) / max(len(marks) - 1, 1), last - started, prompt_tokens, text)


def transformers_answers(job: Job, model: Any, split: bool = True) -> Answers:
    """Answer with anything that has transformers' `generate`; without `split` it sees the global view alone."""
    from PIL import Image
    from transformers import Idefics3Processor

    processor = Idefics3Processor.from_pretrained(job.model)
    processor.image_processor.do_image_splitting = split and job.tiles > 1
    tile = processor.image_processor.max_image_size["longest_edge"]
    processor.image_processor.size = {"longest_edge": tile * COLUMNS[job.tiles]}
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


def optimum_system(split: bool) -> Callable[[Job], Answers]:
    """optimum-intel on an export of optimum-cli's."""

    def answers(job: Job) -> Answers:
        from optimum.intel import OVModelForVisualCausalLM

        config = {
            "INFERENCE_NUM_THREADS": job.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "CACHE_DIR": str(job.model / "cache"),
        }
        model = OVModelForVisualCausalLM.from_pretrained(job.model, ov_config=config)
        return transformers_answers(job, model, split)

    return answers


def edgevlm_system(detail: str) -> Callable[[Job], Answers]:
    """edgevlm, every picture as if never seen before."""

    def answers(job: Job) -> Answers:
        from edgevlm import VLM, RuntimeConfig
        from edgevlm.bench.measure import ask
        from edgevlm.families.base import ImageBudget

        vlm = VLM(job.model, RuntimeConfig(threads=job.threads, image_cache_bytes=0, kept_sessions=0))
        budget = ImageBudget(detail, max_views=job.tiles)  # type: ignore[arg-type]
        while True:
            once = ask(vlm, job.picture, job.question, budget, job.tokens)
            timings = once.timings
            text = vlm.processor.tokenizer.decode(once.token_ids)
            yield Measured(
                timings.ttft_s,
                timings.tpot_s or 0.0,
                timings.total_s,
                len(once.prompt),
                text,
                timings.vision_s,
                timings.prefill_s,
                once.prompt.views,
                once.prompt.image_tokens,
                vlm.vision_arithmetic.name,
            )

    return answers


def llama_cpp_answers(job: Job) -> Answers:
    """llama.cpp, every picture as if never seen before."""
    llama = LlamaCpp(job.model, job.threads)
    while True:
        yield Measured(*llama.ask(job.picture, job.question, job.tokens, reuse=False))


def prompt_ids(job: Job) -> list[int]:
    """Return a text of as many tokens as the picture's prompt has, for systems that know no pictures."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    text = "The valve is open, the pump runs and the pressure reads four bar. " * (1 + job.prompt_tokens // 10)
    return list(tokenizer(text)["input_ids"])[: job.prompt_tokens]


def genai_answers(job: Job) -> Answers:
    """OpenVINO GenAI, text part alone."""
    import openvino
    import openvino_genai

    properties = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
    pipeline = openvino_genai.LLMPipeline(str(job.model), "CPU", **properties)
    options = openvino_genai.GenerationConfig(max_new_tokens=job.tokens, ignore_eos=True, do_sample=False)
    marks: list[float] = []

    class Streamer(openvino_genai.StreamerBase):  # type: ignore[misc]
        def write(self, _token: Any) -> Any:
            marks.append(time.perf_counter())
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    for turn in itertools.count():
        ids = np.roll(np.array([prompt_ids(job)], np.int64), turn)  # it keeps the beginning that it saw last
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        marks.clear()
        started = time.perf_counter()
        result = pipeline.generate(inputs, options, Streamer())
        yield measured(started, list(marks), ids.size, pipeline.get_tokenizer().decode(result.tokens[0]))


def onnx_text_answers(job: Job) -> Answers:
    """ONNX Runtime GenAI, text part alone."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(job.model))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": job.threads}}}}))
    model = onnxruntime_genai.Model(config)
    tokenizer, ids = onnxruntime_genai.Tokenizer(model), prompt_ids(job)
    while True:
        params = onnxruntime_genai.GeneratorParams(model)
        length = len(ids) + job.tokens
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        marks = []
        started = time.perf_counter()
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(ids)
        for _ in range(job.tokens):
            generator.generate_next_token()
            marks.append(time.perf_counter())
        yield measured(started, marks, len(ids), tokenizer.decode(generator.get_sequence(0)[len(ids) :]))


def onnx_vision_answers(job: Job) -> Answers:
    """ONNX Runtime, vision part alone: `job.tiles` tiles."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(str(job.model / VISION_ONNX), options, ["CPUExecutionProvider"])
    tile = np.random.default_rng(0).standard_normal(session.get_inputs()[0].shape).astype(np.float32)
    while True:
        started = time.perf_counter()
        for _ in range(job.tiles):
            session.run(None, {"pixel_values": tile})
        seconds = time.perf_counter() - started
        yield Measured(seconds, 0.0, seconds, 0, "", vision_s=seconds)


SYSTEMS: dict[str, Callable[[Job], Answers]] = {
    "torch-fp32": torch_system("float32"),
    "torch-bf16": torch_system("bfloat16"),
    "optimum": optimum_system(split=True),
    "optimum-low": optimum_system(split=False),
    "edgevlm": edgevlm_system("high"),
    "edgevlm-auto": edgevlm_system("auto"),
    "edgevlm-low": edgevlm_system("low"),
    "llama.cpp": llama_cpp_answers,
    "genai-text": genai_answers,
    "onnx-text": onnx_text_answers,
    "onnx-vision": onnx_vision_answers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("model", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--question", default="Describe this picture in detail.")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt-tokens", type=int, default=877, help="for systems of the text part alone")
    parser.add_argument("--tiles", type=int, default=13, choices=COLUMNS)
    parser.add_argument("--case", default="picture", help="what the line is called")
    arguments = vars(parser.parse_args())
    case = arguments.pop("case")
    make = SYSTEMS[arguments.pop("system")]
    job = Job(**arguments)
    start, meter = Meter(job.threads), Meter(job.threads)
    with start.part():
        answers = make(job)
        warm_up = next(answers)
    tell_start(time.time() - warm_up.total_s + warm_up.ttft_s, start)
    with meter.part():
        answer = next(answers)
    speed = {"tokens_per_s": 1 / answer.tpot_s if answer.tpot_s else None}
    tell_case(case, {**asdict(answer), **speed}, meter)


if __name__ == "__main__":
    main()
