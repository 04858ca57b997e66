"""From OpenAI's messages to edgevlm's: roles, texts, and pictures from where the server may take them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from edgevlm.families.base import RGB, Detail
from edgevlm.inputs.image import ImageFile, probe_image
from edgevlm.inputs.messages import Message, check_variables, user_message, with_reasoning
from edgevlm.inputs.video import Video, probe_video
from edgevlm.server.errors import ApiError, blaming
from edgevlm.server.schemas import ChatMessage, ImagePart, Part, TextPart, VideoPart, VideoUrl
from edgevlm.server.settings import ServeConfig
from edgevlm.strict_json import write_json

_MOST_ESCAPES = 1_000_000
"""Of a `data:` URL: what is more than that is quickly read in base64, and slowly in this way."""
_ROLES = {"developer": "system", "tool": "user"}
"""Roles that small models' chat templates do not know, by what they come nearest to."""


class Conversation:
    """A request's messages, pictures and videos in edgevlm's form. Raises `ApiError` and `ImageError`."""

    def __init__(self, messages: Sequence[ChatMessage], config: ServeConfig) -> None:
        self._config = config
        self._room = config.max_prompt_chars
        self.images: list[bytes | ImageFile | RGB | Video] = []
        self._details: set[Detail] = set()
        self.messages: list[Message] = [self._message(*each) for each in enumerate(messages)]

    @classmethod
    def about(cls, image: ImagePart, messages: list[Message], config: ServeConfig) -> Conversation:
        """Return a conversation made by the server itself, about the picture in a request's `image`."""
        conversation = cls((), config)
        conversation._part("image", image)
        conversation.messages = messages
        return conversation

    @classmethod
    def of_page(cls, pixels: RGB, prompt: str, config: ServeConfig) -> Conversation:
        """Return a conversation made by the server itself, about a page of a document."""
        conversation = cls((), config)
        conversation.images.append(pixels)
        conversation.messages = [user_message(prompt, 1)]
        return conversation

    @property
    def detail(self) -> Detail:
        """How closely all pictures are looked at."""
        if len(self._details) > 1:
            raise ApiError(400, "mixed_detail", "all pictures of a request must have the same detail", param="messages")
        return next(iter(self._details), "auto")

    def add_system(self, text: str) -> None:
        """Tell the model `text` before everything else, after what the conversation's own beginning tells it.

        Raises `ApiError`.
        """
        self._text(text)
        first = self.messages[0]
        if first["role"] == "system":
            self.messages[0] = {"role": "system", "content": [*first["content"], {"type": "text", "text": f"\n{text}"}]}
        else:
            self.messages.insert(0, {"role": "system", "content": [{"type": "text", "text": text}]})

    def count(self, texts: Sequence[str]) -> None:
        """Count texts beside the messages like theirs. Raises `ApiError`."""
        for text in texts:
            self._text(text)

    def variables(self, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """Return the chat template's variables, whose texts count like those of messages."""
        if given:
            self._text(write_json(given))
            with blaming("chat_template_kwargs"):
                check_variables(given)
        return given or {}

    def _message(self, number: int, message: ChatMessage) -> Message:
        place = f"messages.{number}"
        said = [self._part(f"{place}.content.{at}", part) for at, part in enumerate(message.content or ())]
        said += [
            self._text(call_text(each.function.name, each.function.arguments)) for each in message.tool_calls or ()
        ]
        if not said:
            raise ApiError(400, "empty_message", f"{place}: a {message.role} message has no content", param=place)
        if message.reasoning_content:
            self._text(message.reasoning_content)  # which counts like any other
        answered = {"role": _ROLES.get(message.role, message.role), "content": said}
        return with_reasoning(answered, message.reasoning_content)

    def _part(self, place: str, part: Part) -> dict[str, str]:
        if isinstance(part, TextPart):
            return self._text(part.text)
        if len(self.images) == self._config.max_images:
            limit = self._config.max_images
            raise ApiError(413, "too_many_images", f"a request may have at most {limit} pictures", param="messages")
        if isinstance(part, VideoPart):
            with blaming(f"{place}.video_url"):
                self.images.append(read_video(part.video_url, self._config))
            return {"type": "video"}
        with blaming(f"{place}.image_url"):
            data = read_picture(part.image_url.url, self._config)
            probe_image(ImageFile(data, "the image"), self._config.max_pixels)
        self.images.append(data)
        self._details.add(part.image_url.detail or "auto")
        return {"type": "image"}

    def _text(self, text: str) -> dict[str, str]:
        self._room -= len(text)
        if self._room < 0:
            limit = self._config.max_prompt_chars
            raise ApiError(413, "prompt_too_long", f"the texts have more than {limit:,} characters", param="messages")
        return {"type": "text", "text": text}


def read_video(part: VideoUrl, config: ServeConfig) -> Video:
    """Return the video that a part holds or names, its header sound. Raises `ApiError` and `VideoError`."""
    video = Video(ImageFile(read_picture(part.url, config), "the video"), part.fps, part.frames)
    probe_video(video, config.max_pixels)
    return video


def call_text(name: str, arguments: str) -> str:
    """Return a call as the model writes it."""
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def read_picture(url: str, config: ServeConfig) -> bytes:
    """Return the bytes of the picture that `url` holds or names. Raises `ApiError`.

    Nothing is ever fetched: another host's picture is for the caller to send along.
    """
    scheme = url[:32].partition(":")[0].lower() if ":" in url[:32] else ""
    if scheme == "data":
        return decode_data_url(url)
    if scheme in ("http", "https", "ftp"):
        message = "this server fetches no URL; send the picture itself as a data: URL"
        raise ApiError(400, "remote_image_refused", message)
    return _read_file(url, config)


def decode_data_url(url: str) -> bytes:
    """Return what a `data:` URL (RFC 2397) holds. Raises `ApiError`."""
    head, comma, data = url.partition(",")
    if not comma:
        raise ApiError(400, "invalid_image", "a data: URL needs a comma before its data")
    if data.count("%") > _MOST_ESCAPES:
        raise ApiError(400, "invalid_image", f"the data: URL has more than {_MOST_ESCAPES:,} escapes; use base64")
    if not re.search(r";\s*base64\s*$", head, re.IGNORECASE):
        return unquote_to_bytes(data)
    try:
        text = unquote(data) if "%" in data else data
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "invalid_image", "the data: URL is not valid base64") from None


def _read_file(name: str, config: ServeConfig) -> bytes:
    """Return a file below the image folder; whether another exists is not told."""
    if config.image_folder is None:
        message = "must be a data: URL; this server reads no files (see --image-folder)"
        raise ApiError(400, "file_refused", message)
    path = url2pathname(urlsplit(name).path) if name.lower().startswith("file:") else name
    try:
        folder = config.image_folder.resolve(strict=True)
        file = (folder / Path(path)).resolve(strict=True)
        if not file.is_relative_to(folder) or not file.is_file():
            raise _no_picture()
        if file.stat().st_size > config.max_body_bytes:
            limit = config.max_body_bytes
            raise ApiError(413, "body_too_large", f"the picture's file is larger than {limit:,} bytes")
        return file.read_bytes()
    except (OSError, ValueError):
        raise _no_picture() from None


def _no_picture() -> ApiError:
    return ApiError(400, "file_refused", "names no picture under the image folder")
