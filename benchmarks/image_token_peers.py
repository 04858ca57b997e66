"""One system of `benchmarks.image_tokens` in a process of its own: a JSON line for each size of picture on stdout.

    python -m benchmarks.image_token_peers SYSTEM MODEL TOKENS THREADS CASE=WARM_UP,PICTURE [CASE=WARM_UP,PICTURE ...]

Every system makes exactly TOKENS tokens, greedily. The first line is of the start: the first answer after loading. Then
for each pair of pictures of one size an answer to warm up, and two questions about the other picture, whose conditions
are taken from the first question to the last token. OpenVINO GenAI gets the second in a chat, all others as a prompt of
its own. MODEL is a checkpoint for transformers, and for the others what they make of it. Beside what is measured the
environment needs Pillow and psutil, and with transformers torchvision where the checkpoint's processor does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from benchmarks.child import tell_case, tell_start
from benchmarks.llama_cpp import LlamaCpp
from edgevlm.bench.conditions import Meter

QUESTIONS = ("Describe this picture in detail.", "Which colours are in it?")


@dataclass(frozen=True)
class Answer:
    """One answer; seconds from the picture still a file."""

    ttft_s: float
    tpot_s: float
    prompt_tokens: int
    views: int | None = None
    image_tokens: int | None = None
    vision_arithmetic: str | None = None


Asker: TypeAlias = Callable[[Path, bool], list[Answer]]
"""Answers one question about a picture, or both."""


def timed(started: float, marks: list[float], prompt_tokens: int) -> Answer:
    """Return the figures of an answer that began at `started` and whose tokens came at `marks`."""
    return Answer(marks[0] - started, (marks[-1] - marks[0]) / max(len(marks) - 1, 1), prompt_tokens)


def edgevlm(model: Path, tokens: int, threads: int) -> Asker:
    """edgevlm with its defaults: vision cache and prefix reuse."""
    from edgevlm import VLM, RuntimeConfig
    from edgevlm.bench.measure import ask
    from edgevlm.families.base import ImageBudget

    # room for the compiled models of all exports that take turns
    vlm = VLM(model, RuntimeConfig(threads=threads, cache_limit_bytes=32 * 2**30))

    def answer(picture: Path, both: bool) -> list[Answer]:
        answers = []
        for question in QUESTIONS[: 1 + both]:
            sample = ask(vlm, picture, question, ImageBudget("high"), tokens)
            timings, prompt = sample.timings, sample.prompt
            told = prompt.views, prompt.image_tokens, vlm.vision_arithmetic.name
            answers.append(Answer(timings.ttft_s, timings.tpot_s or 0.0, len(prompt), *told))
        return answers

    return answer


def optimum(model: Path, tokens: int, threads: int) -> Asker:
    """optimum-intel; image processor and tokenizer apart, because the processor as a whole needs torchvision."""
    from optimum.intel import OVModelForVisualCausalLM
    from transformers import AutoTokenizer, Qwen2VLImageProcessor

    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "CACHE_DIR": str(model / "cache")}
    loaded = OVModelForVisualCausalLM.from_pretrained(model, ov_config=config)
    tokenizer = AutoTokenizer.from_pretrained(model)
    processor = Qwen2VLImageProcessor.from_pretrained(model)

    def inputs(image: Image.Image, question: str) -> dict[str, Any]:
        found = processor(images=[image], return_tensors="pt")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        message = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        count = int(found["image_grid_thw"].prod()) // processor.merge_size**2
        text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
        return {**found, **tokenizer([text], return_tensors="pt")}

    return generating(loaded, inputs, tokens)


def pytorch(dtype: str) -> Callable[[Path, int, int], Asker]:
    """transformers on PyTorch, the checkpoint as it is."""

    def system(model: Path, tokens: int, threads: int) -> Asker:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        torch.set_num_threads(threads)
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        processor = AutoProcessor.from_pretrained(model)

        def inputs(image: Image.Image, question: str) -> dict[str, Any]:
            content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            form = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            found = processor.apply_chat_template([{"role": "user", "content": content}], **form)
            return dict(found.to(loaded.dtype))

        return generating(loaded, inputs, tokens)

    return system


def generating(model: Any, inputs: Callable[[Image.Image, str], dict[str, Any]], tokens: int) -> Asker:
    """Answer with anything that has transformers' `generate`, given how the inputs of a question are made."""
    marks: list[float] = []

    def mark(*_: Any, **__: Any) -> bool:
        marks.append(time.perf_counter())
        return False

    def once(picture: Path, question: str) -> Answer:
        marks.clear()
        started = time.perf_counter()
        with Image.open(picture) as opened:
            given = inputs(opened.convert("RGB"), question)
        counts = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        model.generate(**given, **counts, do_sample=False, stopping_criteria=[mark])
        return timed(started, marks, given["input_ids"].shape[1])

    return lambda picture, both: [once(picture, question) for question in QUESTIONS[: 1 + both]]


def genai(model: Path, tokens: int, threads: int) -> Asker:
    """OpenVINO GenAI on optimum-intel's export."""
    import openvino
    import openvino_genai

    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "CACHE_DIR": str(model / "cache-genai")}
    pipeline = openvino_genai.VLMPipeline(str(model), "CPU", **config)
    options = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)

    def once(picture: Path | None, question: str) -> Answer:
        started = time.perf_counter()
        images = []
        if picture is not None:
            with Image.open(picture) as opened:
                images = [openvino.Tensor(np.asarray(opened.convert("RGB"))[None])]
        found = pipeline.generate(question, images=images, generation_config=options).perf_metrics
        # its streamer gets text, which a token need not end: its own clocks count tokens
        generated = time.perf_counter() - started - found.get_generate_duration().mean / 1000
        ttft_s = generated + found.get_ttft().mean / 1000
        return Answer(ttft_s, found.get_tpot().mean / 1000, found.get_num_input_tokens())

    def answer(picture: Path, both: bool) -> list[Answer]:
        pipeline.start_chat()
        answers = [once(picture, QUESTIONS[0])] + ([once(None, QUESTIONS[1])] if both else [])
        pipeline.finish_chat()
        return answers

    return answer


def llama_cpp(model: Path, tokens: int, threads: int) -> Asker:
    """llama.cpp on what `benchmarks.gguf` wrote; it keeps the last prompt's KV cache."""
    llama = LlamaCpp(model, threads)

    def once(picture: Path, question: str) -> Answer:
        reply = llama.ask(picture, question, tokens, reuse=True)
        return Answer(reply.ttft_s, reply.tpot_s, reply.prompt_tokens)

    return lambda picture, both: [once(picture, question) for question in QUESTIONS[: 1 + both]]


SYSTEMS: dict[str, Callable[[Path, int, int], Asker]] = {
    "edgevlm": edgevlm,
    "optimum": optimum,
    "torch-bf16": pytorch("bfloat16"),
    "torch-fp32": pytorch("float32"),
    "genai": genai,
    "llama.cpp": llama_cpp,
}


def main() -> None:
    system, model, tokens, threads, *named = sys.argv[1:]
    start = Meter(int(threads))
    with start.part():
        answer = SYSTEMS[system](Path(model), int(tokens), int(threads))
    for number, (case, pair) in enumerate(each.split("=", 1) for each in named):
        warm_up, picture = (Path(path) for path in pair.split(","))
        began = time.time()
        with nullcontext() if number else start.part():
            (first,) = answer(warm_up, False)
        if not number:
            tell_start(began + first.ttft_s, start)
        meter = Meter(int(threads))
        with meter.part():
            one, two = answer(picture, True)
        figures = {**asdict(one), "tokens_per_s": 1 / one.tpot_s if one.tpot_s else None}
        tell_case(case, figures | {"second_ttft_s": two.ttft_s, "cold_ttft_s": first.ttft_s}, meter)


if __name__ == "__main__":
    main()
