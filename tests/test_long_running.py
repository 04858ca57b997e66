"""What a process that lives for months does about its memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

HAS_GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")
FREED = """
import ctypes, psutil
from edgevlm.malloc import return_freed_memory

libc, memory = ctypes.CDLL(None), psutil.Process().memory_info
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.free(libc.malloc(16 * 2**20))  # from now on blocks of less lie in the heap
blocks = []
for _ in range(64):
    large, small = libc.malloc(2**20), libc.malloc(70_000)
    ctypes.memset(large, 1, 2**20)
    blocks += [large]
for block in blocks:
    libc.free(block)  # between small ones that stay
before = memory().rss
return_freed_memory()
print(before - memory().rss)
"""
ONEDNN = """
import os
from edgevlm.runtime.core import import_openvino
import_openvino()
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
"""


def output(script: str, **environment: str) -> str:
    """Run a script in a process of its own and return what it prints."""
    env = {name: value for name, value in os.environ.items() if "ONEDNN" not in name and "MALLOC" not in name}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env=env | environment, check=True).stdout.strip()


@pytest.mark.skipif(not HAS_GLIBC, reason="glibc's malloc")
def test_freed_blocks_between_blocks_that_stay_go_back_to_the_system() -> None:
    assert int(output(FREED)) > 50 * 2**20


def test_onednn_keeps_few_primitives_unless_the_user_says_more() -> None:
    assert output(ONEDNN) == "64"
    assert output(ONEDNN, ONEDNN_PRIMITIVE_CACHE_CAPACITY="0") == "0"
