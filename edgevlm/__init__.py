"""Ask a small vision-language model about a picture, on a machine with no GPU.

    from edgevlm import VLM

    vlm = VLM("SmolVLM-256M-Instruct-int4")
    print(vlm.generate("photo.jpg", "What is in this picture?").text)

Names are resolved on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgevlm.errors import (
    BenchmarkError,
    ContextLengthError,
    DamagedModelError,
    DeviceError,
    EdgeVLMError,
    ExportError,
    ImageError,
    ImageTooLargeError,
    IncompleteAnswerError,
    ModelError,
    ModelNotFoundError,
    OptionError,
    OutputError,
    PromptError,
    ServerError,
    SourceError,
    VerificationError,
)

if TYPE_CHECKING:
    from edgevlm.answer import Answer, Piece, TokenLogprob
    from edgevlm.constraint import Constraint
    from edgevlm.conversation import Chat
    from edgevlm.device import RuntimeConfig
    from edgevlm.generate import GenerationConfig
    from edgevlm.model import VLM
    from edgevlm.scoring import Scores

__version__ = "0.1.0"

__all__ = [
    "VLM",
    "Answer",
    "BenchmarkError",
    "Chat",
    "Constraint",
    "ContextLengthError",
    "DamagedModelError",
    "DeviceError",
    "EdgeVLMError",
    "ExportError",
    "GenerationConfig",
    "ImageError",
    "ImageTooLargeError",
    "IncompleteAnswerError",
    "ModelError",
    "ModelNotFoundError",
    "OptionError",
    "OutputError",
    "Piece",
    "PromptError",
    "RuntimeConfig",
    "Scores",
    "ServerError",
    "SourceError",
    "TokenLogprob",
    "VerificationError",
]

_LAZY = {
    "Chat": "edgevlm.conversation",
    "Constraint": "edgevlm.constraint",
    "Scores": "edgevlm.scoring",
    "TokenLogprob": "edgevlm.answer",
    "VLM": "edgevlm.model",
    "RuntimeConfig": "edgevlm.device",
    "Answer": "edgevlm.answer",
    "GenerationConfig": "edgevlm.generate",
    "Piece": "edgevlm.answer",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'edgevlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
