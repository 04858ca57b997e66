"""The Python API on the tiny export."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from edgevlm import (
    VLM,
    Answer,
    Constraint,
    DamagedModelError,
    DeviceError,
    GenerationConfig,
    ImageError,
    ModelNotFoundError,
    OptionError,
    PromptError,
    RuntimeConfig,
)
from edgevlm.answer import Progress
from edgevlm.decoding.config import override
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.chat_template import user_message
from edgevlm.manifest import load_manifest
from edgevlm.metrics import Stopwatch
from edgevlm.runtime.core import core, import_openvino
from tests.conftest import F32, photograph
from tests.helpers.damage import copy_export, edit_manifest, reseal

QUESTION = "What is in this picture?"
SHORT = GenerationConfig(max_new_tokens=16)


def facts(answer: Answer) -> tuple[Any, ...]:
    """Return what of an answer does not depend on the clock."""
    return answer.text, answer.token_ids, answer.finish_reason, answer.prompt_tokens, answer.image_tokens, answer.views


@pytest.mark.parametrize("stop", [(), ("he", "zzz")])
def test_a_stream_s_pieces_are_the_answer(vlm: VLM, china: Path, stop: tuple[str, ...]) -> None:
    config = GenerationConfig(max_new_tokens=60, stop=stop)
    *pieces, last = vlm.stream(china, QUESTION, config)
    assert len(pieces) > 5
    assert all(piece.answer is None and piece.text for piece in pieces)
    assert last.answer is not None
    assert "".join(map(str, [*pieces, last])) == last.answer.text
    assert facts(vlm.generate(china, QUESTION, config)) == facts(last.answer)


def test_an_answer_adds_up(vlm: VLM, china: Path) -> None:
    answer = vlm.generate([china, photograph("flower.jpg")], QUESTION, SHORT)
    messages = [user_message(QUESTION, 2)]
    tiles = vlm.processor.preprocess([china, photograph("flower.jpg")], ImageBudget())
    assert answer.prompt_tokens == len(vlm.processor.prompt_ids(messages, tiles))
    assert (answer.views, answer.image_tokens) == (26, 26 * 4)
    assert answer.generated_tokens == len(answer.token_ids) == 16
    timings = answer.timings
    assert timings.load_s == vlm.load_s
    assert timings.preprocess_s + timings.vision_s + timings.prefill_s <= timings.ttft_s <= timings.total_s
    assert timings.tpot_s is not None
    assert timings.ttft_s + 15 * timings.tpot_s == pytest.approx(timings.total_s)
    assert timings.tokens_per_s == pytest.approx(1 / timings.tpot_s)


def test_a_picture_in_any_form_gives_the_same_answer(vlm: VLM, china: Path) -> None:
    with Image.open(china) as opened:
        image = opened.copy()
    forms = [china, str(china), china.read_bytes(), image, np.asarray(image), [china], (image,)]
    answers = {facts(vlm.generate(form, QUESTION, SHORT)) for form in forms}
    assert len(answers) == 1
    assert facts(vlm.generate(photograph("flower.jpg"), QUESTION, SHORT)) not in answers


def test_no_picture_is_none_or_an_empty_list(vlm: VLM) -> None:
    assert facts(vlm.generate(None, QUESTION, SHORT)) == facts(vlm.generate([], QUESTION, SHORT))


def test_the_order_of_pictures_matters(vlm: VLM) -> None:
    pictures = [photograph("china.jpg"), photograph("flower.jpg")]
    assert vlm.generate(pictures, QUESTION, SHORT).text != vlm.generate(pictures[::-1], QUESTION, SHORT).text


def test_threads_at_once_answer_as_one_after_another(vlm: VLM) -> None:
    jobs = [(photograph("china.jpg"), "What?"), (photograph("flower.jpg"), QUESTION), (None, "How many parts?")]
    config = GenerationConfig(max_new_tokens=60)
    wanted = [facts(vlm.generate(image, question, config)) for image, question in jobs]
    assert len(set(wanted)) == len(jobs)
    start = Barrier(len(jobs))

    def ask(job: tuple[Any, str]) -> list[tuple[Any, ...]]:
        start.wait(timeout=60)
        return [facts(vlm.generate(*job, config)) for _ in range(3)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(ask, jobs))
    assert found == [[each] * 3 for each in wanted]


def test_an_abandoned_stream_does_not_disturb_the_next(vlm: VLM, china: Path) -> None:
    wanted = facts(vlm.generate(china, QUESTION, SHORT))
    abandoned = vlm.stream(china, "Describe the gauge.", GenerationConfig(max_new_tokens=100))
    for _ in range(5):
        next(abandoned)
    assert facts(vlm.generate(china, QUESTION, SHORT)) == wanted
    next(abandoned)
    del abandoned
    assert facts(vlm.generate(china, QUESTION, SHORT)) == wanted


def test_interleaved_streams_keep_apart(vlm: VLM, china: Path) -> None:
    questions = ["What?", "How many parts are there?"]
    wanted = [vlm.generate(china, question, SHORT).text for question in questions]
    streams = [vlm.stream(china, question, SHORT) for question in questions]
    texts = ["", ""]
    while streams[0] or streams[1]:
        for index, stream in enumerate(streams):
            piece = next(stream, None) if stream else None
            if piece is None:
                streams[index] = None
            else:
                texts[index] += piece.text
    assert texts == wanted


def test_length_ends_an_answer(vlm: VLM) -> None:
    answer = vlm.generate(None, QUESTION, GenerationConfig(max_new_tokens=3))
    assert (answer.finish_reason, answer.generated_tokens) == ("length", 3)


def test_options_may_be_named_in_the_call_and_win_over_the_configuration(vlm: VLM) -> None:
    config = GenerationConfig(max_new_tokens=9, draft_tokens=0)
    assert vlm.generate(None, "Why?", max_new_tokens=3).generated_tokens == 3
    assert vlm.generate(None, "Why?", config, max_new_tokens=3).generated_tokens == 3
    chat = vlm.chat(config, max_new_tokens=2, detail="low")
    assert (chat.config, chat.image_budget) == (replace(config, max_new_tokens=2), ImageBudget("low"))
    with pytest.raises(OptionError, match="there is no option 'max_tokens'; did you mean max_new_tokens"):
        vlm.generate(None, "Why?", max_tokens=3)
    with pytest.raises(
        OptionError, match="there is no option 'beams'; there are chat_template_kwargs, constraint, detail, "
    ):
        next(vlm.stream(None, "Why?", beams=3))
    with pytest.raises(OptionError, match="max_new_tokens must be at least 1, not 0"):
        vlm.generate(None, "Why?", max_new_tokens=0)


def test_the_context_ends_an_answer(vlm: VLM) -> None:
    question = "how many " * 80
    config = GenerationConfig(max_new_tokens=10_000)
    answer = vlm.generate(None, question, config)
    assert answer.finish_reason == "context"
    assert answer.prompt_tokens + answer.generated_tokens == vlm.manifest.context_length == 512
    exact = GenerationConfig(max_new_tokens=answer.generated_tokens)
    assert vlm.generate(None, question, exact).finish_reason == "length"
    assert vlm.generate(None, question, exact).text == answer.text


def test_the_end_token_stops_an_answer_and_is_not_shown(vlm: VLM, exported: Path, tmp_path: Path) -> None:
    ids = vlm.generate(None, QUESTION, GenerationConfig(max_new_tokens=40)).token_ids
    end = next(token for token in ids[5:] if token not in ids[:5])
    folder = copy_export(exported, tmp_path / "ends-early")
    edit_manifest(folder, lambda data: data.update(eos_token_ids=[419, end]))
    answer = VLM(folder, F32).generate(None, QUESTION, GenerationConfig(max_new_tokens=40))
    assert answer.finish_reason == "stop"
    assert answer.token_ids == ids[: ids.index(end) + 1]
    assert answer.text == vlm.processor.tokenizer.decode(list(answer.token_ids[:-1]))


def test_a_stop_text_ends_an_answer_before_it(vlm: VLM) -> None:
    whole = vlm.generate(None, QUESTION, GenerationConfig(max_new_tokens=60))
    stop = whole.text[20:24]
    answer = vlm.generate(None, QUESTION, GenerationConfig(max_new_tokens=60, stop=("\0", stop)))
    assert answer.finish_reason == "stop"
    assert answer.text == whole.text[: whole.text.find(stop)]
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert len(answer.token_ids) < 60


def test_a_seed_repeats_a_sampled_answer(vlm: VLM, china: Path) -> None:
    def sampled(seed: int | None, **options: Any) -> str:
        config = GenerationConfig(max_new_tokens=24, temperature=1.5, seed=seed, **options)
        return vlm.generate(china, QUESTION, config).text

    assert sampled(3) == sampled(3)
    assert len({sampled(seed) for seed in (3, 4, None)}) == 3
    greedy = vlm.generate(china, QUESTION, GenerationConfig(max_new_tokens=24)).text
    assert sampled(3, top_k=1) == greedy
    assert sampled(3, top_p=1e-9) == greedy


def test_progress_counts_the_tiles_that_are_not_known(exported: Path, china: Path) -> None:
    vlm = VLM(exported, F32)

    def steps(images: list[Path]) -> list[Progress]:
        events = vlm.events([user_message(QUESTION, len(images))], images, SHORT)
        return [event for event in events if isinstance(event, Progress)]

    shown = steps([china, china])
    vision = [step for step in shown if step.stage == "vision"]
    # The second picture is the first: all of its views are known when its turn comes.
    assert [step.done for step in vision] == [*range(14), 26]
    assert {step.total for step in vision} == {26}
    tokens = [step for step in shown if step.stage == "decode"]
    assert tokens == [Progress("decode", done, SHORT.max_new_tokens) for done in range(1, len(tokens) + 1)]
    assert shown == vision + tokens
    for images in ([china], []):
        assert {step.stage for step in steps(images)} == {"decode"}


def test_closing_the_events_ends_the_answer_and_loses_nothing(exported: Path, china: Path) -> None:
    """Also between two views: those that were encoded are known, and the next answer is as if nothing had been."""
    vlm, messages = VLM(exported, F32), [user_message(QUESTION, 1)]
    wanted = vlm.generate(china, QUESTION, SHORT).token_ids
    vlm = VLM(exported, F32)
    events = vlm.events(messages, [china], SHORT)
    assert [next(events) for _ in range(5)][-1] == Progress("vision", 4, 13)
    events.close()
    answer = vlm.generate(china, QUESTION, SHORT)
    assert (answer.cached_views, answer.cached_tokens) == (4, 0)
    assert answer.token_ids == wanted
    for event in (events := vlm.events(messages, [china], SHORT)):
        if isinstance(event, Progress) and (event.stage, event.done) == ("decode", 3):
            break
    events.close()
    again = vlm.generate(china, QUESTION, SHORT)
    assert again.token_ids == wanted
    assert again.cached_tokens == again.prompt_tokens - 1


def test_a_smaller_kv_cache_moves_the_logits_a_little(exported: Path) -> None:
    """Each precision is what the cache really holds, and the fewer bits, the farther from float32."""
    exact, near, far = (
        logits_with(exported, *kind) for kind in (("f32", "float32"), ("f16", "float16"), ("u8", "uint8"))
    )
    drifts = [float(np.abs(logits - exact).max()) for logits in (near, far)]
    assert 0 < drifts[0] < drifts[1] < 0.5


def logits_with(exported: Path, precision: Any, held: str) -> np.ndarray:
    """Return the logits of 50 steps after a text of 150 tokens."""
    language_model = VLM(exported, replace(F32, kv_cache_precision=precision)).language_model
    assert held in str(language_model._compiled.get_property("KV_CACHE_PRECISION"))
    session = language_model.session()
    session.step([number % 40 + 50 for number in range(150)])
    return np.concatenate([session.step([number % 40 + 50]) for number in range(50)])


def test_a_session_that_is_reset_forgets(vlm: VLM) -> None:
    session = vlm.language_model.session()
    embeds = session.embed(range(60, 90))
    wanted = session.prefill(embeds)
    assert np.abs(session.prefill(embeds) - wanted).max() > 0.1
    session.reset()
    assert session.length == 0
    np.testing.assert_allclose(session.prefill(embeds), wanted, atol=1e-5)


def test_int4_answers_too(exported_int4: Path, china: Path) -> None:
    answer = VLM(exported_int4, F32).generate(china, QUESTION, SHORT)
    assert (answer.generated_tokens, answer.views) == (16, 13)


@pytest.mark.parametrize(
    ("ask", "error", "line"),
    [
        (lambda vlm: vlm.generate("nonesuch.png", QUESTION), ImageError, "no such image file: nonesuch.png"),
        (
            lambda vlm: vlm.generate([photograph("china.jpg")] * 12, QUESTION),
            PromptError,
            "the prompt has 1,014 tokens and the model's context holds 512;"
            " shorten the question, or use fewer pictures or frames, a lower detail or max_image_tokens",
        ),
    ],
)
def test_a_bad_request_leaves_the_model_usable(
    vlm: VLM, ask: Callable[[VLM], Answer], error: type[Exception], line: str
) -> None:
    with pytest.raises(error) as caught:
        ask(vlm)
    assert str(caught.value) == line
    assert vlm.generate(None, QUESTION, SHORT).generated_tokens == 16


def test_a_tokenizer_may_know_more_tokens_than_the_model(exported: Path, tmp_path: Path) -> None:
    folder = copy_export(exported, tmp_path / "tiny")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocab_size = load_manifest(folder).vocab_size
    for number in range(vocab_size - tokenizer.get_vocab_size() + 1):
        tokenizer.add_tokens([f"<extra_{number}>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    reseal(folder)
    vlm = VLM(folder, F32)
    with pytest.raises(PromptError, match=f"no embedding for <extra_{number}>; leave it out"):
        vlm.generate(None, f"What is <extra_{number}>?", SHORT)
    answer = vlm.generate(None, QUESTION, replace(SHORT, constraint=Constraint.choices(["yes", "no"])))
    assert answer.text in {"yes", "no"}


def test_parts_that_do_not_fit_each_other_are_told_when_they_are_loaded(exported: Path, tmp_path: Path) -> None:
    opset = import_openvino().opset13
    folder = copy_export(exported, tmp_path / "tiny")
    ids = opset.parameter([-1, -1], np.int64, name="input")
    table = opset.constant(np.zeros((1000, 3), np.float32))  # embeddings narrower than the language model's
    found = import_openvino().Model([opset.gather(table, ids, np.int64(0))], [ids], "table")
    found.output(0).set_names({"inputs_embeds"})
    import_openvino().save_model(found, folder / "openvino_text_embeddings_model.xml")
    reseal(folder)
    with pytest.raises(DeviceError, match="CPU cannot run this model: "):
        VLM(folder, F32)


def test_the_cpu_is_what_auto_means_without_a_gpu(vlm: VLM, exported: Path) -> None:
    if any(device.startswith("GPU") for device in core().available_devices):
        pytest.skip("OpenVINO sees a GPU")
    config = RuntimeConfig(device="auto", inference_precision="f32", cache=False)
    found = VLM(exported, config)
    assert found.device == "CPU"
    assert facts(found.generate(None, QUESTION, SHORT)) == facts(vlm.generate(None, QUESTION, SHORT))


def test_threads_do_not_change_an_exact_answer(vlm: VLM, exported: Path, china: Path) -> None:
    one = VLM(exported, RuntimeConfig(device="CPU", threads=1, inference_precision="f32", cache=False))
    assert one.generate(china, QUESTION, SHORT).token_ids == vlm.generate(china, QUESTION, SHORT).token_ids


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="where a thread may run cannot be asked here")
def test_no_thread_is_bound_to_a_core(exported: Path, china: Path) -> None:
    """In a process of its own: what NNCF compiles during an export leaves bound threads behind in that of the tests."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        free, seen = pool.submit(affinities, exported, china).result()
    assert seen == {free}


def affinities(model: Path, picture: Path) -> tuple[frozenset[int], set[frozenset[int]]]:
    """Return the cores that this process may use, and those that its threads used while it answered."""
    vlm, free, seen = VLM(model, replace(F32, threads=1)), os.sched_getaffinity(0), set()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(vlm.generate, picture, "What is this?", GenerationConfig(max_new_tokens=40))
        while not answer.done():
            for task in Path("/proc/self/task").iterdir():
                with suppress(OSError):  # it ended meanwhile
                    seen.add(frozenset(os.sched_getaffinity(int(task.name))))
    return frozenset(free), seen


def test_no_such_device_or_model(exported: Path) -> None:
    with pytest.raises(DeviceError, match=r"^no device NPU7 here; OpenVINO sees "):
        VLM(exported, RuntimeConfig(device="NPU7"))
    with pytest.raises(ModelNotFoundError, match=r"^no model 'nonesuch': not a folder here and not under "):
        VLM("nonesuch")
    with pytest.raises(DamagedModelError, match=r"has no edgevlm\.json"):
        VLM(exported.parent)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_tiles": 0}, "max_views must be at least 1, not 0"),
        ({"max_image_tokens": 0}, "max_image_tokens must be at least 1, not 0"),
        ({"detail": "medium"}, "detail must be one of auto, low, high, not 'medium'"),
        ({"stop": ("a", "")}, "stop must be a tuple of texts, none of them empty"),
        ({"stop": "a"}, "stop must be a tuple of texts, none of them empty"),
        ({"stop": ["a"]}, "stop must be a tuple of texts, none of them empty"),
        ({"stop": (1,)}, "stop must be a tuple of texts, none of them empty"),
    ],
)
def test_generation_options_out_of_range(options: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError) as caught:
        override(None, None, options)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"threads": 0}, "threads must be between 1 and 1024, not 0"),
        ({"threads": 1025}, "threads must be between 1 and 1024, not 1025"),
        ({"inference_precision": "f8"}, "inference precision must be one of auto, f32, bf16, f16"),
        ({"kv_cache_precision": "u4"}, "KV cache precision must be one of auto, u8, f16, f32"),
        ({"vision_arithmetic": "f64"}, "vision arithmetic must be one of auto, exported, compressed, float32"),
    ],
)
def test_runtime_options_out_of_range(options: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError) as caught:
        RuntimeConfig(**options)
    assert str(caught.value) == line


def test_cached_decoding_equals_uncached(vlm: VLM) -> None:
    images, config = [photograph("china.jpg")], GenerationConfig(max_new_tokens=40)
    answer = vlm.generate(images, QUESTION, config)
    prompt = vlm.prepare([user_message(QUESTION, 1)], images, config, Stopwatch())
    ids: list[int] = []
    for _ in answer.token_ids:
        session = vlm.language_model.session()
        embeds = [prompt.inputs_embeds, *([session.embed(ids)] if ids else [])]
        ids.append(int(session.prefill(np.concatenate(embeds, axis=1))[-1].argmax()))
    assert tuple(ids) == answer.token_ids


def test_logits_to_keep_gives_the_last_rows_of_all(vlm: VLM) -> None:
    embeds = vlm.language_model.session().embed(range(50, 90))
    everything = vlm.language_model.session().prefill(embeds, logits_to_keep=40)
    last = vlm.language_model.session().prefill(embeds, logits_to_keep=3)
    assert everything.shape == (40, vlm.manifest.vocab_size)
    np.testing.assert_allclose(last, everything[-3:], atol=1e-5)
