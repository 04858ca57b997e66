"""One inference, broken off where the answer that it is for is not wanted any more."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from edgevlm.interrupt import Interrupted, check, is_interruptible

if TYPE_CHECKING:
    import openvino as ov

_CHECK_MS = 10


def infer(request: ov.InferRequest, inputs: Mapping[str, Any]) -> Any:
    """Return the outputs of `request` for `inputs`, which are not copied. Raises `Interrupted`.

    OpenVINO leaves a cancelled inference between two operations of the graph; state that it has written is then that of
    no whole inference, and its session must not be used again.
    """
    if not is_interruptible():
        return request.infer(inputs, share_inputs=True)
    request.start_async(inputs, share_inputs=True)
    try:
        while not request.wait_for(_CHECK_MS):
            check()
    except Interrupted:
        request.cancel()
        with suppress(RuntimeError):  # which says that it was cancelled
            request.wait()
        raise
    request.wait()
    return request.results
