"""What the parity suite asks of a family: checkpoints to make, and transformers on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.inputs.chat_template import user_message


class Reference:
    """transformers 5 on one checkpoint, greedy and in float32, its image processor on Pillow and NumPy.

    `make_processor` makes the family's processor of tokenizer, image processor and config: those of transformers need
    torchvision for their video parts.
    """

    strip = 9
    """Rows of the flat strip in the suite; there are references that take none which they shrink to nothing."""
    logits_atol = 1e-4
    """How near logits are to its own."""

    def __init__(self, checkpoint: Path, make_processor: Callable[[Any, Any, Any], Any]) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        words = PreTrainedTokenizerFast.from_pretrained(checkpoint)
        words.model_input_names = ["input_ids", "attention_mask"]
        self.processor = make_processor(words, self.image_processor(checkpoint), self.model.config)

    def image_processor(self, checkpoint: Path) -> Any:
        """Return the checkpoint's image processor."""
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(checkpoint, backend="pil")

    def inputs(self, images: Sequence[np.ndarray], question: str) -> dict[str, Any]:
        """Return the model's inputs for one question about `images`."""
        messages = [user_message(question, len(images))]
        text = self.processor.tokenizer.apply_chat_template(
            messages, chat_template=self.processor.chat_template, tokenize=False, add_generation_prompt=True
        )
        pictures = {"images": [list(images)]} if images else {}
        begun = text.startswith(self.processor.tokenizer.bos_token)  # as the processor's own apply_chat_template asks
        return dict(self.processor(text=[text], add_special_tokens=not begun, return_tensors="pt", **pictures))

    def pixels(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Return what the vision model is given of all pictures, in the order of the views made here, flat."""
        return np.asarray(inputs["pixel_values"].numpy()).ravel()

    def positions(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Return the position ids that the model gives a prompt, `(axes, S)`."""
        return np.arange(inputs["input_ids"].shape[1])[None]

    def run(self, images: Sequence[np.ndarray], question: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the logits at every position `(S, V)` and the image embeddings `(n, D)`."""
        import torch

        with torch.inference_mode():
            outputs = self.model(**self.inputs(images, question))
        pooled = outputs.image_outputs.pooler_output if images else []
        rows = [each.reshape(-1, each.shape[-1]).numpy() for each in pooled]
        hidden = self.model.config.get_text_config().hidden_size
        return outputs.logits[0].numpy(), np.concatenate([np.empty((0, hidden), np.float32), *rows])

    def generate(self, images: Sequence[np.ndarray], question: str, count: int) -> list[int]:
        """Return `count` greedy token ids."""
        import torch

        inputs = self.inputs(images, question)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=count)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Builder:
    """One family in the parity suite."""

    variants: Mapping[str, Callable[[Path], Path]]
    """Each writes a seeded checkpoint below a folder and returns it; the first is compressed, too."""
    reference: Callable[[Path], Reference]
    shapes: Sequence[tuple[int, int]] = ((9, 150), (150, 9), (97, 28), (7, 7))
    """Heights and widths of odd pictures; the reference takes 1, 3 or 4 rows for channels."""
    int8_cosine: float = 0.95
    """What the image embeddings of the INT8 export reach at least; their activations are quantized."""
