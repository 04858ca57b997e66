"""Every error that a user can cause, each with one line that says what is wrong and what to do.

EdgeVLMError
├── ImageError             the picture: missing, unreadable, truncated
│   ├── ImageTooLargeError
│   └── VideoError         the video: damaged, without frames, or not for this model
├── PromptError            the question: it holds the image placeholder, or is no text
│   └── ContextLengthError
├── OptionError            a generation option out of its range, or a constraint that cannot be
│   └── ThinkingError      a thought asked of a model that does not think
├── IncompleteAnswerError  an answer that ended before it satisfied its constraint
├── OutputError            results that cannot be written, or a file that holds others
├── ModelError             the exported folder
│   ├── ModelNotFoundError
│   └── DamagedModelError
├── DeviceError            no such device, or the device refuses the model
├── ServerError            the server cannot listen, lacks what it needs, or its model's thread died
└── ExportError            the exporter
    ├── SourceError        the checkpoint, or an adapter of it: missing, not cached, of an unknown family
    ├── TuningError        rows that nothing can be learned from, or a tuned model that is no better
    └── VerificationError  an exported submodel differs from the reference
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgevlm.answer import Answer

__all__ = [
    "ContextLengthError",
    "DamagedModelError",
    "DeviceError",
    "EdgeVLMError",
    "ExportError",
    "ImageError",
    "ImageTooLargeError",
    "IncompleteAnswerError",
    "ModelError",
    "ModelNotFoundError",
    "OptionError",
    "OutputError",
    "PromptError",
    "ServerError",
    "SourceError",
    "ThinkingError",
    "TuningError",
    "VerificationError",
    "VideoError",
]


class EdgeVLMError(Exception):
    """Base of all errors that edgevlm raises on purpose; `str()` of it is one line for the user."""


class ImageError(EdgeVLMError):
    """The picture cannot be used."""


class ImageTooLargeError(ImageError):
    """The picture has more pixels than are taken."""


class VideoError(ImageError):
    """The video cannot be used."""


class PromptError(EdgeVLMError):
    """The question cannot be used."""


class ContextLengthError(PromptError):
    """The conversation is longer than the model's context."""


class OptionError(EdgeVLMError):
    """An option has a value outside its range."""


class ThinkingError(OptionError):
    """The model cannot be asked to think before it answers."""


class IncompleteAnswerError(EdgeVLMError):
    """An answer ended before it satisfied its constraint; `answer` is what there is of it."""

    def __init__(self, message: str, answer: Answer) -> None:
        super().__init__(message)
        self.answer = answer


class OutputError(EdgeVLMError):
    """Results cannot be written, or the file that is to hold them holds others."""


class ModelError(EdgeVLMError):
    """The exported model folder cannot be used."""


class ModelNotFoundError(ModelError):
    """There is no exported model under that name or path."""


class DamagedModelError(ModelError):
    """The exported model folder is incomplete, changed, or not an export at all."""


class DeviceError(EdgeVLMError):
    """OpenVINO has no such device, or the device cannot run the model."""


class ServerError(EdgeVLMError):
    """The server cannot listen, lacks what it needs, or its model's thread died."""


class BenchmarkError(EdgeVLMError):
    """A figure could not be taken."""


class ExportError(EdgeVLMError):
    """The export cannot be done; the target folder is as it was before."""


class SourceError(ExportError):
    """The checkpoint to export, or an adapter of it, is missing, incomplete or of an unknown family."""


class TuningError(ExportError):
    """The rows cannot be learned from, or what was learned is no better."""


class VerificationError(ExportError):
    """An exported submodel differs from the reference by more than its tolerance."""


def one_line(error: BaseException) -> str:
    """Return another library's error as one line, its type's name when it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
