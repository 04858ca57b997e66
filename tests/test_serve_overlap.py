"""While one answer is made, the server encodes the next one's pictures; no answer is changed by it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgevlm import VLM
from edgevlm.families.base import Arrays, View
from edgevlm.interrupt import Interrupted, check
from tests.conftest import F32, noise
from tests.helpers.serving import QUESTION, Braked, ask, ask_error, data_url, raw, serving, shown, wait_until


def picture(height: int, width: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Return a picture of its own, and the conversation that asks about it."""
    image = Image.fromarray(noise(height, width))
    return image, shown(data_url(image))


@pytest.fixture
def braked(exported: Path) -> Iterator[Braked]:
    model = Braked(VLM(exported, F32))
    yield model
    model.release()


@pytest.fixture
def encoders(braked: Braked, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of the thread that encoded each view, in the order in which they were encoded."""
    names: list[str] = []
    encode = braked.vision.encode

    def spy(views: Iterable[View]) -> Iterator[Arrays]:
        for outputs in encode(views):
            names.append(threading.current_thread().name)
            yield outputs

    monkeypatch.setattr(braked.vision, "encode", spy)
    return names


def test_the_next_pictures_are_encoded_before_the_answer_has_ended(
    braked: Braked, encoders: list[str], vlm: VLM
) -> None:
    (first, first_messages), (second, second_messages) = picture(40, 90), picture(90, 40)
    with serving(braked) as server, ThreadPoolExecutor() as pool:
        encoders.clear()
        one = pool.submit(ask, server, messages=first_messages)
        wait_until(lambda: braked.holding)
        views = len(encoders)
        two = pool.submit(ask, server, messages=second_messages)
        wait_until(lambda: len(encoders) == 2 * views)
        assert braked.holding  # the first answer's third token
        assert encoders == ["edgevlm-worker"] * views + ["edgevlm-encoder"] * views
        braked.release()
        for image, asked in ((first, one), (second, two)):
            status, answer = asked.result()
            assert status == 200
            assert answer["choices"][0]["message"]["content"] == vlm.generate(image, QUESTION, max_new_tokens=8).text
            assert (answer["timings"]["views"], answer["timings"]["cached_views"]) == (views, 0)
        assert len(encoders) == 2 * views


def test_the_vision_encoder_has_one_job_at_a_time(
    braked: Braked, encoders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer's pictures are encoded before the next one's, which waits for the prefill to begin."""
    waiting, encode = threading.Event(), braked.vision.encode

    def slowly(views: Iterable[View]) -> Iterator[Arrays]:
        for outputs in encode(views):
            assert waiting.wait(20)
            yield outputs

    with serving(braked) as server, ThreadPoolExecutor() as pool:
        monkeypatch.setattr(braked.vision, "encode", slowly)
        encoders.clear()
        asked = [pool.submit(ask, server, messages=picture(128, 128)[1])]
        wait_until(lambda: encoders)
        asked.append(pool.submit(ask, server, messages=picture(96, 128)[1]))
        wait_until(lambda: server.worker.waiting == 1)
        waiting.set()
        braked.release()
        assert [each.result()[0] for each in asked] == [200, 200]
    views = encoders.index("edgevlm-encoder")
    assert views > 1
    assert encoders == ["edgevlm-worker"] * views + ["edgevlm-encoder"] * (len(encoders) - views)


def test_a_client_that_goes_away_ends_the_encoding_of_its_pictures(
    braked: Braked, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()

    def forever(views: Iterable[View]) -> Iterator[Arrays]:
        begun.set()
        try:
            while True:
                check()
                time.sleep(0.005)
        except Interrupted:
            ended.set()
            raise
        yield from ()

    with serving(braked) as server, ThreadPoolExecutor() as pool:
        first = pool.submit(ask, server)
        wait_until(lambda: braked.holding)
        with monkeypatch.context() as endless:
            endless.setattr(braked.vision, "encode", forever)
            with raw(server, {"messages": picture(40, 90)[1]}):
                assert begun.wait(20)
            wait_until(ended.is_set)
        assert braked.holding
        later = pool.submit(ask, server, messages=picture(40, 90)[1])
        wait_until(lambda: server.worker.waiting == 1)
        braked.release()
        assert first.result()[0] == later.result()[0] == 200


def test_what_is_refused_after_waiting_is_refused_as_ever(braked: Braked, encoders: list[str]) -> None:
    url = data_url(Image.fromarray(noise(40, 90)))
    Image.fromarray(noise(200, 200)).save(whole := BytesIO(), "PNG")
    half = data_url(whole.getvalue()[:50_000])
    with serving(braked) as server, ThreadPoolExecutor() as pool:
        encoders.clear()
        first = pool.submit(ask, server)
        wait_until(lambda: braked.holding)
        broken = pool.submit(ask_error, server, messages=shown(half))
        wait_until(lambda: server.worker.waiting == 1)
        long = pool.submit(ask_error, server, messages=shown(url, text="word " * 900))
        wait_until(lambda: server.worker.waiting == 2)
        braked.release()
        assert first.result()[0] == 200
        assert broken.result() == (400, "invalid_image")
        assert long.result() == (400, "context_length_exceeded")
        assert encoders == []  # no view of a prompt that does not fit is encoded
