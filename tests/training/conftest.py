"""What the tests of training share: fonts or a skip, grounds that are the same everywhere, and a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from training.draw import font_files
from training.grounds import textures_alone
from training.tokenizer import train_tokenizer


@pytest.fixture(scope="session", autouse=True)
def fonts() -> None:
    """Skip where the fonts that the pictures are written in are not installed."""
    try:
        font_files()
    except SystemExit as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session", autouse=True)
def grounds() -> Iterator[None]:
    """Draw against textures alone: which photographs are installed differs from machine to machine."""
    with textures_alone():
        yield


@pytest.fixture(scope="session")
def tokenizer() -> object:
    """The tokenizer, trained for these tests."""
    return train_tokenizer(seed=3)
