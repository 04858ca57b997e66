"""The uncompressed export against transformers on the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, Idefics3Processor

from edgevlm import VLM, GenerationConfig
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.chat_template import user_message
from edgevlm.metrics import Stopwatch
from tests.conftest import F32, image_processor, photograph

QUESTION = "What is in this picture? Größe 42.7"
TOKENS = 40


class Reference:
    """transformers' model, image processor and tokenizer on one checkpoint, greedy and in float32."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def inputs(self, images: list[Any], question: str) -> dict[str, Any]:
        """Return the processor's inputs for one question about `images`."""
        messages = [user_message(question, len(images))]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # SmolVLMProcessor cannot be imported without torchvision, for its video part; on pictures it is this one,
        # and `test_preprocess` compares the two image processors.
        processor = Idefics3Processor(image_processor("idefics3"), self.tokenizer, image_seq_len=4)
        pictures = {"images": [images]} if images else {}
        return dict(processor(text=[text], return_tensors="pt", **pictures))

    def generate(self, images: list[Any], question: str) -> list[int]:
        """Return up to TOKENS greedy token ids."""
        inputs = self.inputs(images, question)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    def logits(self, images: list[Any], question: str) -> np.ndarray:
        """Return the logits at every position of the prompt, `(S, V)`."""
        with torch.inference_mode():
            return self.model(**self.inputs(images, question)).logits[0].numpy()


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
def pair(request: pytest.FixtureRequest) -> tuple[Reference, VLM]:
    """A reference and the float32 export of the same checkpoint."""
    folder = request.getfixturevalue({"idefics3": "exported", "smolvlm": "exported_smolvlm"}[request.param])
    return Reference(request.getfixturevalue(request.param)), VLM(folder, F32)


def pictures(case: str) -> list[np.ndarray]:
    china, flower = photograph("china.jpg"), photograph("flower.jpg")
    return {"one": [china], "two": [china, flower[:, :300]], "none": []}[case]


def as_pil(images: list[np.ndarray]) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images]


@pytest.mark.parametrize("case", ["one", "two", "none"])
def test_prompt_token_ids_equal_the_reference(pair: tuple[Reference, VLM], case: str) -> None:
    reference, vlm = pair
    tiles = vlm.processor.preprocess(pictures(case), ImageBudget("high"))
    ids = vlm.processor.prompt_ids([user_message(QUESTION, len(tiles))], tiles)
    assert ids == reference.inputs(as_pil(pictures(case)), QUESTION)["input_ids"][0].tolist()


@pytest.mark.parametrize("case", ["one", "two", "none"])
def test_logits_at_every_position_equal_the_reference(pair: tuple[Reference, VLM], case: str) -> None:
    reference, vlm = pair
    wanted = reference.logits(as_pil(pictures(case)), QUESTION)
    session = vlm.language_model.session()
    messages = [user_message(QUESTION, len(pictures(case)))]
    config = GenerationConfig()
    budget = ImageBudget("high")
    prompt = vlm.prepare(messages, pictures(case), config, Stopwatch(), budget)
    found = session.prefill(prompt.inputs_embeds, logits_to_keep=len(prompt))
    assert np.ptp(wanted) > 5  # logits flat enough to agree by accident would prove nothing
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("case", ["one", "two", "none"])
def test_greedy_tokens_equal_the_reference(pair: tuple[Reference, VLM], case: str) -> None:
    reference, vlm = pair
    wanted = reference.generate(as_pil(pictures(case)), QUESTION)
    answer = vlm.generate(pictures(case), QUESTION, GenerationConfig(max_new_tokens=TOKENS), ImageBudget("high"))
    assert len(wanted) >= 32
    assert list(answer.token_ids) == wanted
    assert answer.text == reference.tokenizer.decode(wanted, skip_special_tokens=True)


def test_cached_decoding_equals_uncached(vlm: VLM) -> None:
    images, config = pictures("one"), GenerationConfig(max_new_tokens=TOKENS)
    answer = vlm.generate(images, QUESTION, config)
    prompt = vlm.prepare([user_message(QUESTION, 1)], images, config, Stopwatch())
    ids: list[int] = []
    for _ in answer.token_ids:
        session = vlm.language_model.session()
        embeds = [prompt.inputs_embeds, *([session.embed(ids)] if ids else [])]
        ids.append(int(session.prefill(np.concatenate(embeds, axis=1))[-1].argmax()))
    assert tuple(ids) == answer.token_ids


def test_logits_to_keep_gives_the_last_rows_of_all(vlm: VLM) -> None:
    embeds = vlm.language_model.session().embed(range(50, 90))
    everything = vlm.language_model.session().prefill(embeds, logits_to_keep=40)
    last = vlm.language_model.session().prefill(embeds, logits_to_keep=3)
    assert everything.shape == (40, vlm.manifest.vocab_size)
    np.testing.assert_allclose(last, everything[-3:], atol=1e-5)


def test_position_ids_of_a_tile_equal_the_reference(pair: tuple[Reference, VLM]) -> None:
    reference, vlm = pair
    seen = {}
    table = reference.model.model.vision_model.embeddings.position_embedding
    hook = table.register_forward_hook(lambda _, inputs, __: seen.update(ids=inputs[0].numpy()))
    reference.logits(as_pil(pictures("one")), QUESTION)
    hook.remove()
    assert (seen["ids"] == vlm.processor.family.constants["patch_position_ids"]).all()
