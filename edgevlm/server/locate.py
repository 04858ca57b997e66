"""`POST /v1/locate`: a request understood, and the places of its answer."""

from __future__ import annotations

from typing import Any

from edgevlm.answer import Answer
from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.stream import check_satisfied
from edgevlm.errors import IncompleteAnswerError
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.image import KeptImage
from edgevlm.locate import Search, grounding_of
from edgevlm.server.completion import timings, usage
from edgevlm.server.errors import ApiError, blaming
from edgevlm.server.messages import Conversation
from edgevlm.server.schemas import LocateRequest
from edgevlm.server.settings import ServeConfig
from edgevlm.vlm import VLM

PLACES = {"messages": "image"}
"""The request's own places, by those of a conversation: it has no messages."""
_MAX_LOCATIONS = 20
"""Where the request names no other number."""


class LocatePlan:
    """A request, understood: what a job is made of, and how its answer is read."""

    def __init__(self, request: LocateRequest, vlm: VLM, config: ServeConfig) -> None:
        """Raises `ApiError` and `ImageError`."""
        family = vlm.processor.family
        with blaming("model"):
            grounding_of(family)
        with blaming("phrase"):
            self._search = Search.of(family, request.phrase, request.max_locations or _MAX_LOCATIONS)
        self.conversation = Conversation.about(request.image, self._search.messages, config)
        [data] = self.conversation.images
        assert isinstance(data, bytes)
        self._image = KeptImage(data, "the image")  # decoded when its turn has come, and read once more with the answer
        self.conversation.images = [self._image]
        self.image_budget = ImageBudget(self.conversation.detail, request.max_image_tokens)
        self.config = self._search.config(GenerationConfig(), vlm.context_length)

    def read(self, answer: Answer, waited_s: float) -> dict[str, Any]:
        """Return the places, and what they took. Raises `ApiError`."""
        try:
            check_satisfied(answer)
        except IncompleteAnswerError as error:
            raise ApiError(400, "context_length_exceeded", str(error), param="image") from None
        found = self._search.read(answer, self._image.picture, self.image_budget)
        return {**found.places(), "usage": usage(answer), "timings": timings(answer, waited_s)}
