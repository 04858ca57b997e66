"""Published configurations, in transformers 4's layout and in 5's, exported natively and compared with transformers 5."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, Idefics3Processor
from transformers import PreTrainedTokenizerFast as FastTokenizer

from edgevlm import VLM, GenerationConfig
from edgevlm.chat import user_message
from edgevlm.errors import SourceError
from edgevlm.manifest import load_manifest
from edgevlm.metrics import Stopwatch
from edgevlm_export import ExportOptions, export
from edgevlm_export.checkpoint import Checkpoint
from edgevlm_export.config import overlooked
from edgevlm_export.families import architecture, family_facts
from tests.conftest import F32, photograph
from tests.published import (
    ALL,
    GRANITE_DOCLING,
    IDEFICS3_8B,
    SMOLVLM2_500M,
    SMOLVLM_256M,
    Published,
    make_published,
    save_anew,
    write_files,
)

QUESTION = "What does the display of unit 12 show? Größe 42.7"
TOKENS = 32
HIGH = GenerationConfig(max_new_tokens=TOKENS, detail="high")
CUT = (SMOLVLM_256M, SMOLVLM2_500M, GRANITE_DOCLING)
"""Those that two layers of still fit into memory several times over."""


class Reference:
    """transformers 5 on one checkpoint, greedy and in float32.

    The tokenizer is tokenizer.json as it stands, which the weights were trained with. SmolVLM's own processor needs
    torchvision, for videos; on pictures it is Idefics3's with SmolVLM's image processor (`test_preprocess` compares both).
    """

    def __init__(self, checkpoint: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.tokenizer = FastTokenizer.from_pretrained(checkpoint)
        self.tokenizer.model_input_names = ["input_ids", "attention_mask"]
        self.processor = Idefics3Processor(
            AutoImageProcessor.from_pretrained(checkpoint, backend="pil"),
            self.tokenizer,
            image_seq_len=json.loads((checkpoint / "processor_config.json").read_text("utf-8"))["image_seq_len"],
        )

    def inputs(self, images: list[np.ndarray], template: str) -> dict[str, Any]:
        """Return the model's inputs for the question about `images`."""
        messages = [user_message(QUESTION, len(images))]
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return dict(self.processor(text=[text], images=[images], return_tensors="pt"))


@pytest.fixture(scope="module", params=[(each, layout) for each in CUT for layout in (4, 5)], ids=lambda each: f"{each[0]}-layout-{each[1]}")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Published, Path, Reference, VLM]:
    """A checkpoint in one layout, the reference on it, and its export."""
    published, layout = request.param
    folder = tmp_path_factory.mktemp(str(published))
    checkpoint = make_published(published, folder / "layout-4")
    if layout == 5:
        checkpoint = save_anew(checkpoint, folder / "layout-5")
    report = export(checkpoint, folder / "out", ExportOptions("fp32", via="native", verify=False))
    assert report.manifest.overlooked == {}
    return published, checkpoint, Reference(checkpoint), VLM(folder / "out", F32)


def test_prompt_pictures_embeddings_logits_and_tokens_equal_transformers_5(
    pair: tuple[Published, Path, Reference, VLM],
) -> None:
    published, _, reference, vlm = pair
    image = photograph("china.jpg")[200:300]  # in five tiles
    inputs = reference.inputs([image], (vlm.folder / "chat_template.jinja").read_text(encoding="utf-8"))
    prompt_ids = inputs["input_ids"][0].tolist()
    [tiles] = vlm.processor.preprocess([image], HIGH)
    prompt = vlm.prepare([user_message(QUESTION, 1)], [image], HIGH, Stopwatch())
    assert list(prompt.ids) == prompt_ids
    assert prompt.image_tokens == len(tiles) * published.image_seq_len
    assert np.array_equal(tiles.pixel_values, inputs["pixel_values"][0].numpy())
    with torch.inference_mode():
        outputs = reference.model(**inputs)
        ids = reference.model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, use_cache=True)
    wanted = torch.cat(list(outputs.image_outputs.pooler_output)).numpy()
    embeds = vlm.vision.encode(tiles.pixel_values).reshape(wanted.shape)
    np.testing.assert_allclose(embeds, wanted, atol=1e-4)
    logits = outputs.logits[0].numpy()
    found = vlm.language_model.session().prefill(prompt.inputs_embeds, logits_to_keep=len(prompt))
    assert np.ptp(logits) > 5  # logits flat enough to agree by accident would prove nothing
    np.testing.assert_allclose(found, logits, atol=1e-4)
    answer = vlm.generate(image, QUESTION, HIGH)
    answered = list(answer.token_ids)
    assert answered == ids[0, len(prompt_ids) :].tolist()[: len(answered)]
    assert len(answered) == TOKENS or answered[-1] in vlm.manifest.eos_token_ids
