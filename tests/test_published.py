"""Published configurations in the layouts of transformers 4 and 5, exported natively, against transformers 5."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, Idefics3Processor
from transformers import PreTrainedTokenizerFast as FastTokenizer

from edgevlm import VLM, GenerationConfig
from edgevlm.errors import SourceError
from edgevlm.families.base import IMAGE_EMBEDS, ImageBudget
from edgevlm.inputs.chat_template import user_message
from edgevlm.manifest import load_manifest
from edgevlm.metrics import Stopwatch
from edgevlm_export import ExportOptions, export
from edgevlm_export.families import architecture, family_config
from edgevlm_export.samples import pixel_values
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import overlooked
from tests.conftest import F32, photograph
from tests.helpers.published import (
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
HIGH = GenerationConfig(max_new_tokens=TOKENS)
HIGH_BUDGET = ImageBudget("high")
CUT = (SMOLVLM_256M, SMOLVLM2_500M, GRANITE_DOCLING)
"""Those that two layers of still fit into memory several times over."""


class Reference:
    """transformers 5 on one checkpoint, greedy and in float32.

    The tokenizer is tokenizer.json as it stands, which the weights were trained with. SmolVLM's own processor needs
    torchvision, for videos; on pictures it is Idefics3's with SmolVLM's image processor (`test_preprocess` compares
    both).
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


LAYOUTS = [pytest.param((each, layout), id=f"{each}-layout-{layout}") for each in CUT for layout in (4, 5)]


@pytest.fixture(scope="module", params=LAYOUTS)
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
    [tiles] = vlm.processor.preprocess([image], HIGH_BUDGET)
    prompt = vlm.prepare([user_message(QUESTION, 1)], [image], HIGH, Stopwatch(), HIGH_BUDGET)
    assert list(prompt.ids) == prompt_ids
    assert prompt.image_tokens == len(tiles) * published.image_seq_len
    assert np.array_equal(pixel_values(tiles.views), inputs["pixel_values"][0].numpy())
    with torch.inference_mode():
        outputs = reference.model(**inputs)
        ids = reference.model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, use_cache=True)
    wanted = torch.cat(list(outputs.image_outputs.pooler_output)).numpy()
    embeds = np.stack([each[IMAGE_EMBEDS] for each in vlm.vision.encode(tiles.views)]).reshape(wanted.shape)
    np.testing.assert_allclose(embeds, wanted, atol=1e-4)
    logits = outputs.logits[0].numpy()
    found = vlm.language_model.session().prefill(prompt.inputs_embeds, logits_to_keep=len(prompt))
    assert np.ptp(logits) > 5  # logits flat enough to agree by accident would prove nothing
    np.testing.assert_allclose(found, logits, atol=1e-4)
    answer = vlm.generate(image, QUESTION, HIGH, HIGH_BUDGET)
    answered = list(answer.token_ids)
    assert answered == ids[0, len(prompt_ids) :].tolist()[: len(answered)]
    assert len(answered) == TOKENS or answered[-1] in vlm.manifest.eos_token_ids


def on_disk(folder: Path) -> Checkpoint:
    """The checkpoint of a folder that holds no weights."""
    return Checkpoint(folder, folder.name, None, json.loads((folder / "config.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("published", ALL, ids=str)
def test_tensors_and_their_shapes_are_those_of_transformers_5(published: Published, tmp_path: Path) -> None:
    """With all layers, and so with the sizes that a config leaves to its class."""
    folder = write_files(published, tmp_path / "checkpoint", layers=None)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    facts, processor = family_config(on_disk(folder))
    found = architecture(on_disk(folder), facts, wanted)
    assert dict(found.shapes) == wanted
    assert overlooked([*found.sections, processor]) == {}
    text = config.text_config
    assert facts["image_seq_len"] == published.image_seq_len
    mixers, norms = ([getattr(layer, name) for layer in found.decoder.layers] for name in ("mixer", "input_norm"))
    assert {mixer.num_heads for mixer in mixers} == {text.num_attention_heads}
    assert {mixer.num_kv_heads for mixer in mixers} == {text.num_key_value_heads}
    assert {mixer.head_dim for mixer in mixers} == {text.head_dim}
    assert {norm.eps for norm in (*norms, found.decoder.norm)} == {text.rms_norm_eps}
    assert found.decoder.layers[0].mixer.rope.frequencies[1] ** (-text.head_dim / 2) == pytest.approx(
        text.rope_parameters["rope_theta"], rel=1e-5
    )


def test_a_config_that_states_no_heads_has_those_of_its_class(tmp_path: Path) -> None:
    folder = write_files(IDEFICS3_8B, tmp_path / "checkpoint", layers=None)
    facts, _ = family_config(on_disk(folder))
    decoder = architecture(on_disk(folder), facts, ("lm_head.weight",)).decoder
    assert (decoder.hidden_size, decoder.layers[0].mixer.num_heads, len(decoder.layers)) == (4096, 32, 32)


def edited(published: Published, folder: Path, section: str, **changes: Any) -> Checkpoint:
    """A checkpoint whose config.json says something else in one section."""
    checkpoint = on_disk(write_files(published, folder / "checkpoint"))
    changed = {**checkpoint.config[section], **changes} if section else changes
    return Checkpoint(
        checkpoint.folder, "x", None, {**checkpoint.config, **({section: changed} if section else changed)}
    )


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_config", "embedding_multiplier", 12.0),
        ("text_config", "attention_multiplier", 0.015625),
        ("text_config", "logits_scaling", 4.0),
        ("text_config", "residual_multiplier", 0.263),
        ("text_config", "final_logit_softcapping", 30.0),
        ("text_config", "num_local_experts", 8),
        ("text_config", "router_aux_loss_coef", 0.001),
        ("text_config", "rope_interleaved", True),
        ("text_config", "use_resampler", True),
        ("text_config", "qk_layer_norms", True),
        ("vision_config", "use_window_attention", True),
        ("vision_config", "qkv_bias", True),
        ("", "vision_feature_scale", 2),
    ],
)
def test_a_key_that_speaks_of_the_arithmetic_and_is_not_read_is_refused(
    section: str, key: str, value: Any, tmp_path: Path
) -> None:
    checkpoint = edited(SMOLVLM_256M, tmp_path, section, **{key: value})
    facts, _ = family_config(checkpoint)
    sections = architecture(checkpoint, facts, ("lm_head.weight",)).sections
    name = f"{section}.{key}" if section else key
    line = f"config.json: edgevlm does not know {name} ({value!r}), which may change what the model computes;"
    with pytest.raises(SourceError, match=re.escape(line)) as caught:
        overlooked(sections)
    assert f"--ignore-config-key {name} " in str(caught.value)
    for ignored in (key, name):
        assert overlooked(sections, [ignored]) == {f"config.json: {name}": value}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"embedding_multiplier": None, "use_sliding_window": False, "sliding_window": None}, {}),
        ({"pretraining_tp": 1, "attention_dropout": 0.1}, {}),
        ({"vendor_note": "hello"}, {"config.json: text_config.vendor_note": "hello"}),
    ],
)
def test_a_key_that_says_nothing_passes_and_any_other_is_told(
    changes: dict[str, Any], told: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = edited(SMOLVLM_256M, tmp_path, "text_config", **changes)
    facts, _ = family_config(checkpoint)
    assert overlooked(architecture(checkpoint, facts, ("lm_head.weight",)).sections) == told


def test_what_is_not_read_stands_in_the_manifest_and_ignoring_it_is_the_users_word(
    idefics3: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(idefics3, tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= {"logits_scaling": 4.0, "vendor": "x"}
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generation = json.loads((checkpoint / "generation_config.json").read_text(encoding="utf-8"))
    (checkpoint / "generation_config.json").write_text(json.dumps(generation | {"repetition_penalty": 1.05}), "utf-8")
    options = ExportOptions("int8", verify=False)
    with pytest.raises(SourceError, match=r"--ignore-config-key text_config\.logits_scaling"):
        export(checkpoint, tmp_path / "out", options)
    export(checkpoint, tmp_path / "out", replace(options, ignore_config_keys=("logits_scaling",)))
    assert load_manifest(tmp_path / "out").overlooked == {
        "config.json: text_config.logits_scaling": 4.0,
        "config.json: text_config.vendor": "x",
        "generation_config.json: repetition_penalty": 1.05,
    }
