"""Whatever a request is made to cost, it is answered or refused, and another caller's answers are what they were."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from PIL import Image

import edgevlm.runtime.inference
from benchmarks.serve_costs import CASES, KEYS, chain, jpeg_of_scans, nested, png_of_chunks, properties
from edgevlm import VLM, Constraint, ImageError, OptionError
from edgevlm.inputs.image import load_image
from edgevlm.interrupt import Interrupted, check, interruptible
from edgevlm.runtime.inference import infer
from edgevlm.runtime.kv_session import Session
from edgevlm.server.run import Server
from tests.conftest import F32
from tests.helpers.serving import QUESTION, ask, ask_error, raw, request, serving, wait_until

PLAIN, COSTLY = ({"Authorization": f"Bearer {key}"} for key in reversed(KEYS))


@pytest.fixture(scope="module")
def server(vlm: VLM) -> Iterator[Server]:
    with serving(vlm, api_keys=KEYS) as server:
        yield server


@pytest.mark.parametrize("case", CASES)
def test_a_costly_request_is_answered_or_refused_and_another_caller_is_served(server: Server, case: str) -> None:
    expected = ask(server, PLAIN)[1]["choices"]
    body = CASES[case]()
    with ThreadPoolExecutor(1) as pool:
        costly = pool.submit(request, server, "POST", "/v1/chat/completions", body, COSTLY)
        asked = 0
        while not costly.done() or not asked:
            status, answer = ask(server, PLAIN)
            assert (status, answer["choices"]) == (200, expected)
            asked += 1
        status, _, answer = costly.result()
    assert status in (200, 400, 413), answer
    assert status == 200 or json.loads(answer)["error"]["code"]


# Schemas


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "integer", "multipleOf": 10_007}, "multipleOf: more than 10,000 remainders"),
        ({"type": "number", "multipleOf": 12.3457}, "multipleOf: more than 10,000 remainders"),
        (
            properties(20, lambda number: {"type": "integer", "multipleOf": 990 + number}),
            "multipleOf: more than 10,000",
        ),
        ({"allOf": [{"multipleOf": 997}, {"type": "integer", "multipleOf": 991}]}, "multipleOf: more than 10,000"),
        (nested(2), "minItems: the shortest text"),
        ({"type": "array", "items": {"const": "x" * 99}, "minItems": 9_999}, "minItems: the shortest text"),
        (chain(300, lambda name: {"items": {"$ref": name}}, {}), r"\$ref: its parts lie more than 200 deep"),
        (chain(20, lambda name: properties(2, lambda _: {"$ref": name}), {"type": "null"}), "required: the shortest"),
    ],
)
def test_a_schema_that_would_cost_too_much_is_refused_by_its_keyword(schema: dict, keyword: str) -> None:
    with pytest.raises(OptionError, match=f"the JSON schema cannot be used: {keyword}"):
        Constraint.json_schema(schema)


def test_large_schemas_that_cost_little_are_taken() -> None:
    for multiple in (9973, 100_000, 250_000):
        assert Constraint.json_schema({"type": "integer", "multipleOf": multiple})
    assert Constraint.json_schema({"type": "number", "multipleOf": 0.25})
    assert Constraint.json_schema(nested(1))
    assert Constraint.json_schema(properties(500, lambda number: {"type": "integer", "maximum": number}))
    huge = {"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 9_000}, {"type": "null"}]}
    assert Constraint.json_schema(huge)  # for it may be null


def test_the_schemas_of_a_request_are_bounded_together(vlm: VLM) -> None:
    tools = [
        {"type": "function", "function": {"name": f"t{at}", "parameters": {"title": "x" * 400}}} for at in range(3)
    ]
    with serving(vlm, max_schema_chars=1_000) as server:
        assert ask_error(server, tools=tools) == (413, "schema_too_long")
        assert ask(server, tools=tools[:2], tool_choice="none")[0] == 200
        form = {"type": "json_schema", "json_schema": {"schema": {"title": "x" * 1_000}}}
        assert ask_error(server, response_format=form) == (413, "schema_too_long")


# Pictures


def test_a_jpeg_of_many_scans_is_refused_and_one_of_ten_is_not() -> None:
    with pytest.raises(ImageError, match="scans over its pixels; save it again as a baseline JPEG"):
        load_image(jpeg_of_scans(40))
    Image.effect_noise((300, 200), 50).save(buffer := BytesIO(), "JPEG", progressive=True)
    assert load_image(buffer.getvalue()).shape == (200, 300, 3)
    trailer = b"\xff\xda" * 5_000  # what a telephone puts behind the picture is no part of it
    assert load_image(buffer.getvalue() + trailer).shape == (200, 300, 3)


def test_a_picture_of_more_parts_than_can_be_read_soon_is_refused() -> None:
    segments = b"\xff\xe1\0\2" * 300_000
    for data in (png_of_chunks(100_000), b"\xff\xd8" + segments, b"P6 " + b"#" * 300_000):
        with pytest.raises(ImageError, match="more than 200,000 parts"):
            load_image(data)
    assert load_image(png_of_chunks(20_000)).shape == (64, 64, 3)


def test_a_picture_s_header_is_looked_at_while_another_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevlm.inputs.image import ImageFile, probe_image

    Image.new("RGB", (30, 20)).save(buffer := BytesIO(), "PNG")
    load = Image.Image.convert

    def probe_first(self: Image.Image, *args: object) -> Image.Image:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(probe_image, ImageFile(buffer.getvalue(), "another")).result(20)
        return load(self, *args)

    monkeypatch.setattr(Image.Image, "convert", probe_first)
    assert load_image(buffer.getvalue()).shape == (20, 30, 3)


# Breaking off


def slow_model() -> ov.CompiledModel:
    """Compile a graph of many operations, which together take seconds."""
    opset = ov.opset13
    parameter = opset.parameter([-1, 1024], np.float32, name="x")
    weights = opset.constant(np.eye(1024, dtype=np.float32)[::-1].copy())
    node = parameter
    for _ in range(60):
        node = opset.matmul(node, weights, False, False)
    return ov.Core().compile_model(ov.Model([node], [parameter]), "CPU")


def test_an_inference_is_broken_off_in_the_middle() -> None:
    model = slow_model()
    request, x = model.create_infer_request(), np.ones((4096, 1024), np.float32)
    asked = []

    def at_the_second() -> bool:
        asked.append(1)
        return len(asked) == 2

    with interruptible(at_the_second), pytest.raises(Interrupted):
        infer(request, {"x": x})
    assert len(asked) == 2
    expected = model.create_infer_request().infer({"x": x})
    with interruptible(lambda: False):
        assert np.array_equal(infer(request, {"x": x})[0], expected[0])


def test_a_prefill_that_is_broken_off_leaves_the_next_answer_as_it_is(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = f"{QUESTION} {'word ' * 60}"
    expected = VLM(exported, F32).generate(None, question, max_new_tokens=16).token_ids
    vlm = VLM(exported, F32)
    vlm.generate(None, QUESTION, max_new_tokens=4)
    monkeypatch.setattr(edgevlm.runtime.inference, "_CHECK_MS", 0)
    with interruptible(lambda: True), pytest.raises(Interrupted):
        vlm.generate(None, question, max_new_tokens=16)
    with interruptible(lambda: False):
        assert vlm.generate(None, question, max_new_tokens=16).token_ids == expected
    assert vlm.generate(None, question, max_new_tokens=16).token_ids == expected


def test_hanging_up_ends_a_prefill(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill goes on until it is broken off: nothing else ends it."""
    in_prefill, once = [], Session._infer

    def forever(self: Session, inputs: dict, count: int) -> object:
        if count <= 32 or in_prefill:
            return once(self, inputs, count)
        in_prefill.append(count)
        while True:
            check()
            time.sleep(0.005)

    with serving(vlm) as server:
        monkeypatch.setattr(Session, "_infer", forever)
        fields = {"messages": [{"role": "user", "content": "word " * 70}], "max_tokens": 8}
        with raw(server, fields):
            wait_until(lambda: in_prefill)
        wait_until(lambda: not server.worker.running)
        assert ask(server)[0] == 200
