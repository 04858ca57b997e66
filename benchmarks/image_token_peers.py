"""One system of `benchmarks.image_tokens` or `benchmarks.pages` in a process of its own: a JSON line for each case.

    python -m benchmarks.image_token_peers SYSTEM MODEL TOKENS THREADS CASE=WARM_UP,PICTURE [CASE=WARM_UP,PICTURE ...]
        [--question TEXT ...]

Every system makes exactly TOKENS tokens, greedily. The first line is of the start: the first answer after loading. Then
for each case an answer of at most 32 tokens to warm up, and the questions, of which there are one or two, about the
other picture; their conditions are taken from the first question to the last token. OpenVINO GenAI gets the second in a
chat, all others as a prompt of its own. MODEL is a checkpoint for transformers, and for the others what they make of
it. Beside what is measured the environment needs Pillow and psutil, and with transformers torchvision where the
checkpoint's processor does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from benchmarks.child import tell_case, tell_start
from benchmarks.llama_cpp import LlamaCpp
from edgevlm.bench.conditions import Meter

if TYPE_CHECKING:
    from edgevlm.families.base import Detail

QUESTIONS = ("Describe this picture in detail.", "Which colours are in it?")
WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class Answer:
    """One answer; seconds from the picture still a file."""

    ttft_s: float
    tpot_s: float
    prompt_tokens: int
    views: int | None = None
    image_tokens: int | None = None
    vision_arithmetic: str | None = None


Asker: TypeAlias = Callable[[Path, Sequence[str], int], list[Answer]]
"""Answers questions about a picture, each with exactly as many tokens."""
Loader: TypeAlias = Callable[[Path, int], Asker]
"""Loads a model for as many threads."""


def timed(started: float, marks: list[float], prompt_tokens: int) -> Answer:
    """Return the figures of an answer that began at `started` and whose tokens came at `marks`."""
    return Answer(marks[0] - started, (marks[-1] - marks[0]) / max(len(marks) - 1, 1), prompt_tokens)


def edgevlm(detail: Detail = "high", draft_tokens: int = 0) -> Loader:
    """edgevlm with its defaults: vision cache and prefix reuse."""

    def load(model: Path, threads: int) -> Asker:
        from edgevlm import VLM, RuntimeConfig
        from edgevlm.bench.measure import ask
        from edgevlm.families.base import ImageBudget

        # room for the compiled models of all exports that take turns
        vlm = VLM(model, RuntimeConfig(threads=threads, cache_limit_bytes=32 * 2**30))

        def once(picture: Path, question: str, tokens: int) -> Answer:
            sample = ask(vlm, picture, question, ImageBudget(detail), tokens, draft_tokens)
            timings, prompt = sample.timings, sample.prompt
            told = prompt.views, prompt.image_tokens, vlm.vision_arithmetic.name
            return Answer(timings.ttft_s, timings.tpot_s or 0.0, len(prompt), *told)

        return lambda picture, questions, tokens: [once(picture, question, tokens) for question in questions]

    return load


def optimum(model: Path, threads: int) -> Asker:
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

    return generating(loaded, inputs)


def pytorch(dtype: str) -> Loader:
    """transformers on PyTorch, the checkpoint as it is."""

    def load(model: Path, threads: int) -> Asker:
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

        return generating(loaded, inputs)

    return load


def generating(model: Any, inputs: Callable[[Image.Image, str], dict[str, Any]]) -> Asker:
    """Answer with anything that has transformers' `generate`, given how the inputs of a question are made."""
    marks: list[float] = []

    def mark(*_: Any, **__: Any) -> bool:
        marks.append(time.perf_counter())
        return False

    def once(picture: Path, question: str, tokens: int) -> Answer:
        marks.clear()
        started = time.perf_counter()
        with Image.open(picture) as opened:
            given = inputs(opened.convert("RGB"), question)
        counts = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        model.generate(**given, **counts, do_sample=False, stopping_criteria=[mark])
        return timed(started, marks, given["input_ids"].shape[1])

    return lambda picture, questions, tokens: [once(picture, question, tokens) for question in questions]


def genai(model: Path, threads: int) -> Asker:
    """OpenVINO GenAI on optimum-intel's export."""
    import openvino
    import openvino_genai

    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "CACHE_DIR": str(model / "cache-genai")}
    pipeline = openvino_genai.VLMPipeline(str(model), "CPU", **config)

    def once(picture: Path | None, question: str, tokens: int) -> Answer:
        options = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
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

    def answer(picture: Path, questions: Sequence[str], tokens: int) -> list[Answer]:
        pipeline.start_chat()
        answers = [once(None if number else picture, each, tokens) for number, each in enumerate(questions)]
        pipeline.finish_chat()
        return answers

    return answer


def llama_cpp(model: Path, threads: int) -> Asker:
    """llama.cpp on what `benchmarks.gguf` wrote; it keeps the last prompt's KV cache."""
    llama = LlamaCpp(model, threads)

    def once(picture: Path, question: str, tokens: int) -> Answer:
        reply = llama.ask(picture, question, tokens, reuse=True)
        return Answer(reply.ttft_s, reply.tpot_s, reply.prompt_tokens)

    return lambda picture, questions, tokens: [once(picture, question, tokens) for question in questions]


SYSTEMS: dict[str, Loader] = {
    "edgevlm": edgevlm(),
    "edgevlm-drafts": edgevlm(draft_tokens=8),
    "edgevlm-convert": edgevlm("auto", draft_tokens=8),
    "optimum": optimum,
    "torch-bf16": pytorch("bfloat16"),
    "torch-fp32": pytorch("float32"),
    "genai": genai,
    "llama.cpp": llama_cpp,
}
"""`edgevlm-drafts` drafts tokens by prompt lookup; so does `edgevlm-convert`, with no more views than a page has pixels
for: the defaults of `edgevlm convert`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=int)
    parser.add_argument("threads", type=int)
    parser.add_argument("case", nargs="+", metavar="CASE=WARM_UP,PICTURE")
    parser.add_argument("--question", action="append", help="instead of two about any picture")
    arguments = parser.parse_args()
    questions, tokens = arguments.question or QUESTIONS, arguments.tokens
    start = Meter(arguments.threads)
    with start.part():
        answer = SYSTEMS[arguments.system](arguments.model, arguments.threads)
    for number, (case, pair) in enumerate(each.split("=", 1) for each in arguments.case):
        warm_up, picture = (Path(path) for path in pair.split(","))
        began = time.time()
        with nullcontext() if number else start.part():
            (first,) = answer(warm_up, questions[:1], min(tokens, WARM_UP_TOKENS))
        if not number:
            tell_start(began + first.ttft_s, start)
        meter = Meter(arguments.threads)
        with meter.part():
            one, *rest = answer(picture, questions, tokens)
        figures = {**asdict(one), "tokens_per_s": 1 / one.tpot_s if one.tpot_s else None}
        figures["total_s"] = one.ttft_s + (tokens - 1) * one.tpot_s
        if rest:
            figures["second_ttft_s"] = rest[0].ttft_s
        tell_case(case, figures | {"cold_ttft_s": first.ttft_s}, meter)


if __name__ == "__main__":
    main()
