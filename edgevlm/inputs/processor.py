"""Preprocessing of pictures to views, and of conversations to token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.errors import DamagedModelError, PromptError
from edgevlm.families import Family, Visual, make_family
from edgevlm.families.base import ImageBudget, LaidOut
from edgevlm.inputs.chat_template import ChatTemplate
from edgevlm.inputs.image import ImageInput, load_image
from edgevlm.inputs.messages import Message
from edgevlm.inputs.thinking import Thinking
from edgevlm.inputs.tokenizer import Tokenizer
from edgevlm.manifest import Manifest


class Processor:
    """Family, tokenizer and chat template of one exported folder."""

    def __init__(self, folder: Path, manifest: Manifest, family: Family | None = None) -> None:
        self.family = family or make_family(manifest.family, manifest.family_config)
        self.tokenizer = Tokenizer(folder, manifest.text_tokens)
        source = _read_text(folder / manifest.chat_template)
        self.template = ChatTemplate(source, manifest.special_tokens)
        self.thinking = Thinking(self.template, self.tokenizer)
        known = (self.family.placeholder, *self.family.other_placeholders)
        self._placeholder = next((each for each in known if each in source), self.family.placeholder)
        video = self.family.video_placeholder
        self._video_template = self.template
        if self.family.video_template is not None:
            source = self.family.video_template
            self._video_template = ChatTemplate(source, manifest.special_tokens)
        self._video_placeholder = video if video is not None and video in source else None
        placeholders = [each for each in (self._placeholder, self._video_placeholder) if each is not None]
        self._placeholders = re.compile("|".join(re.escape(each) for each in placeholders))
        self._vocab_size = manifest.vocab_size
        self._bos_token = manifest.special_tokens.get("bos_token")

    def preprocess(self, images: Sequence[ImageInput], budget: ImageBudget) -> list[Visual]:
        """Return the views of each picture of one prompt. Raises `ImageError`."""
        budget = self.family.budget_for(budget, len(images))
        return [self.family.preprocess(load_image(image), budget) for image in images]

    def prompt_ids(
        self,
        messages: Sequence[Message],
        pictures: Sequence[LaidOut],
        variables: Mapping[str, Any] | None = None,
        suffix: str = "",
    ) -> list[int]:
        """Return the prompt's token ids, each image placeholder replaced by its picture's block.

        Only the template and the image blocks make control tokens and placeholders; the same letters in a message stay
        letters. A template that begins with the BOS token gets no second one, as in transformers. `suffix` comes after
        the rendered template: see `Opening`.
        """
        said, given = self._escaped(list(messages)), self._escaped(dict(variables or {}))
        videos = [self.family.is_video(each.layout) for each in pictures]
        rendered = (self._video_template if any(videos) else self.template).render(said, given) + suffix
        first, *rest = self._placeholders.split(rendered)
        self._check_placeholders(self._placeholders.findall(rendered), videos)
        blocks = self.family.image_texts([each.layout for each in pictures])
        prompt = first + "".join(block + text for block, text in zip(blocks, rest, strict=True))
        has_bos = self._bos_token is not None and prompt.startswith(self._bos_token)
        return self.tokenizer.encode(prompt, add_special_tokens=not has_bos)

    def _check_placeholders(self, placeholders: Sequence[str], videos: Sequence[bool]) -> None:
        """Raise `PromptError` unless a prompt's placeholders are those of its pictures and `videos`, in order."""
        if any(videos) and self._video_placeholder is None:
            raise PromptError("the model's chat template has no place for a video; give it single frames as pictures")
        if len(placeholders) != len(videos):
            raise PromptError(f"the prompt has {len(placeholders)} image placeholders for {len(videos)} images")
        if [each == self._video_placeholder for each in placeholders] != videos:
            raise PromptError("the prompt's placeholders are not in the order of its pictures and videos")

    def _escaped(self, value: Any) -> Any:
        """Return a text, or a structure of texts, with control tokens and placeholders escaped."""
        if isinstance(value, str):
            video = () if self._video_placeholder is None else (self._video_placeholder,)
            return self.tokenizer.escape(value, self._placeholder, *video)
        if isinstance(value, Mapping):
            return {key: self._escaped(each) for key, each in value.items()}
        return [self._escaped(each) for each in value] if isinstance(value, list | tuple) else value

    def check_known(self, ids: npt.NDArray[np.int64]) -> None:
        """Raise `PromptError` for a token id beyond the model's embedding table."""
        unknown = ids[ids >= self._vocab_size]
        if len(unknown):
            raise PromptError(f"the model has no embedding for {self.tokenizer.token(int(unknown[0]))}; leave it out")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedModelError(f"{path} cannot be read: {error}; export the model again") from None
