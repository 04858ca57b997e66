"""What a process that lives for months does about its memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

HAS_GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")
MAPPED = """
import ctypes, sys
from edgevlm.malloc import return_large_blocks

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.mallinfo2.restype = [ctypes.c_void_p], Info
if sys.argv[1] == "fixed":
    return_large_blocks()
libc.free(libc.malloc(16 * 2**20))  # the first large block that is freed
before = libc.mallinfo2().hblkhd
libc.malloc(2**20)
print(libc.mallinfo2().hblkhd - before)
"""
ONEDNN = """
import os
from edgevlm.runtime.core import import_openvino
import_openvino()
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
"""


def output(script: str, *arguments: str, **environment: str) -> str:
    """Run a script in a process of its own and return what it prints."""
    env = {name: value for name, value in os.environ.items() if "ONEDNN" not in name and "MALLOC" not in name}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env | environment, check=True).stdout.strip()


@pytest.mark.skipif(not HAS_GLIBC, reason="glibc's malloc")
def test_a_block_is_mapped_by_itself_also_after_a_larger_one_was_freed() -> None:
    assert int(output(MAPPED, "as it is")) == 0
    assert int(output(MAPPED, "fixed")) >= 2**20
    assert int(output(MAPPED, "fixed", MALLOC_MMAP_THRESHOLD_=str(32 * 2**20))) == 0  # the user's word wins


def test_onednn_keeps_few_primitives_unless_the_user_says_more() -> None:
    assert output(ONEDNN) == "64"
    assert output(ONEDNN, ONEDNN_PRIMITIVE_CACHE_CAPACITY="0") == "0"
