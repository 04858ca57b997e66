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
    ThinkingError,
    TuningError,
    VerificationError,
    VideoError,
)

if TYPE_CHECKING:
    from edgevlm.answer import Answer, Piece, Progress, TokenLogprob
    from edgevlm.chat import Chat
    from edgevlm.decoding.config import GenerationConfig
    from edgevlm.decoding.repetition import RepetitionDetection
    from edgevlm.decoding.scoring import LabelScores, Scores
    from edgevlm.decoding.structured import Constraint
    from edgevlm.families.base import ImageBudget
    from edgevlm.inputs.video import Video
    from edgevlm.locations import Location, Locations
    from edgevlm.runtime.config import RuntimeConfig
    from edgevlm.vlm import VLM

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
    "ImageBudget",
    "ImageError",
    "ImageTooLargeError",
    "IncompleteAnswerError",
    "LabelScores",
    "Location",
    "Locations",
    "ModelError",
    "ModelNotFoundError",
    "OptionError",
    "OutputError",
    "Piece",
    "Progress",
    "PromptError",
    "RepetitionDetection",
    "RuntimeConfig",
    "Scores",
    "ServerError",
    "SourceError",
    "ThinkingError",
    "TokenLogprob",
    "TuningError",
    "VerificationError",
    "Video",
    "VideoError",
]

_LAZY = {
    "Chat": "edgevlm.chat",
    "Constraint": "edgevlm.decoding.structured",
    "Location": "edgevlm.locations",
    "Locations": "edgevlm.locations",
    "LabelScores": "edgevlm.decoding.scoring",
    "Scores": "edgevlm.decoding.scoring",
    "TokenLogprob": "edgevlm.answer",
    "VLM": "edgevlm.vlm",
    "RuntimeConfig": "edgevlm.runtime.config",
    "Answer": "edgevlm.answer",
    "GenerationConfig": "edgevlm.decoding.config",
    "RepetitionDetection": "edgevlm.decoding.repetition",
    "Piece": "edgevlm.answer",
    "Progress": "edgevlm.answer",
    "ImageBudget": "edgevlm.families.base",
    "Video": "edgevlm.inputs.video",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'edgevlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
