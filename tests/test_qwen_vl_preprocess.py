"""Pictures, prompts and positions of Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_window_index

from edgevlm.errors import DamagedModelError, ImageError, OptionError
from edgevlm.families import make_family
from edgevlm.families.base import (
    IMAGE_EMBEDS,
    PIXEL_VALUES,
    Array,
    Arrays,
    DecoderTraits,
    Detail,
    ImageBudget,
    LanguageInputs,
    Visual,
)
from edgevlm.families.qwen_vl import AUTO_TOKENS, LOW_TOKENS, Grid, QwenVL, nearest_grid, smart_grid
from edgevlm.inputs.chat_template import Message, text_message, user_message
from edgevlm.inputs.processor import Processor
from edgevlm.manifest import Manifest
from edgevlm.runtime.kv_session import DecoderInfo, Requests, Session
from tests.conftest import make_tokenizer, noise, photograph

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|box_start|>",
    "<|box_end|>",
]
IMAGE_TOKEN = "<|image_pad|>"
TEMPLATE = (
    "{% for message in messages %}SYSTEM<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM_TURN = (
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)
TEMPLATES = {
    "qwen2_vl": TEMPLATE.replace("SYSTEM", DEFAULT_SYSTEM_TURN),
    "qwen2_5_vl": TEMPLATE.replace("SYSTEM", DEFAULT_SYSTEM_TURN),
    "qwen3_vl": TEMPLATE.replace("SYSTEM", ""),
}
PREFIX = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
TABLE_SIDE = 6
SIZES = [  # height, width
    (1, 1),
    (2, 3),
    (14, 14),  # half of a unit of 28 pixels
    (16, 48),  # halves of one of 32 pixels
    (1, 150),
    (200, 1),
    (28, 28),
    (42, 70),
    (33, 77),
    (56, 112),
    (300, 40),
    (40, 300),
    (101, 99),
    (227, 341),
]


def image_processor(model_type: str, **options: Any) -> Any:
    """Return the reference's image processor on Pillow and NumPy, set up as in published checkpoints."""
    if model_type == "qwen3_vl":
        half, bounds = [0.5] * 3, {"shortest_edge": 65536, "longest_edge": 16777216}
        published = {"patch_size": 16, "image_mean": half, "image_std": half, "size": bounds}
    else:
        published = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
    return transformers.Qwen2VLImageProcessorPil(**{**published, **options})


def family(model_type: str, processor: Any = None, image_token_id: int = 6) -> QwenVL:
    """Return the runtime's family from the facts that the exporter takes from such a processor's file."""
    processor = processor or image_processor(model_type)
    names = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "rescale_factor", "resample")
    made = make_family(
        model_type,
        {
            "model_type": model_type,
            "image_token": IMAGE_TOKEN,
            "image_token_id": image_token_id,
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
            "vision_start_token_id": 3,
            "min_pixels": processor.size["shortest_edge"],
            "max_pixels": processor.size["longest_edge"],
            **{name: getattr(processor, name) for name in names},
            **({"table_side": TABLE_SIDE} if model_type == "qwen3_vl" else {}),
            **({"window_size": 112} if model_type == "qwen2_5_vl" else {}),
        },
    )
    assert isinstance(made, QwenVL)
    return made


def reference(image: np.ndarray, processor: Any, **bounds: int) -> tuple[np.ndarray, Grid]:
    """Return `pixel_values` `(N, C * T * P * P)` and the grid of image tokens that the reference makes of a picture.

    It is told that channels come last: left to guess, it takes a picture of 1, 3 or 4 rows for one of as many channels.
    """
    size = {**dict(processor.size), **bounds}
    size = {name: size[name] for name in ("shortest_edge", "longest_edge")}
    made = processor([image], input_data_format="channels_last", return_tensors="np", size=size)
    [[frames, rows, cols]] = made["image_grid_thw"].tolist()
    assert frames == 1
    return made["pixel_values"], Grid(rows // processor.merge_size, cols // processor.merge_size)


def grid_of(visual: Visual) -> Grid:
    assert isinstance(visual.layout, Grid)
    return visual.layout


def assert_equal(visual: Visual, expected: tuple[np.ndarray, Grid]) -> None:
    pixel_values, grid = expected
    [view] = visual.views
    found = view.inputs()[PIXEL_VALUES]
    assert visual.layout == grid
    assert found.dtype == pixel_values.dtype == np.float32
    assert np.array_equal(found, pixel_values[None])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"size": {"shortest_edge": 3136, "longest_edge": 12 * 32**2}, "resample": 2},
    {"patch_size": 4, "merge_size": 3, "temporal_patch_size": 1},
    {"image_mean": [0.1, 0.2, 0.3], "rescale_factor": 1 / 127.5},
]


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("options", OPTIONS, ids=["published", "shrinking", "patches", "arithmetic"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_high_equals_the_reference(height: int, width: int, options: dict[str, Any], model_type: str) -> None:
    processor, image = image_processor(model_type, **options), noise(height, width)
    visual = family(model_type, processor).preprocess(image, ImageBudget("high"))
    assert_equal(visual, reference(image, processor))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_a_photograph_equals_the_reference_at_every_detail(name: str, model_type: str) -> None:
    processor, image = image_processor(model_type), photograph(name)
    bounds: list[tuple[Detail, int | None]] = [("high", None), ("auto", None), ("low", LOW_TOKENS)]
    for detail, most in bounds:
        visual = family(model_type, processor).preprocess(image, ImageBudget(detail))
        unit = processor.patch_size * processor.merge_size
        assert_equal(visual, reference(image, processor, **({"longest_edge": most * unit**2} if most else {})))


def test_grids_equal_the_reference() -> None:
    random = np.random.default_rng(1)
    sides = np.exp(random.uniform(0, np.log(4000), (600, 2))).astype(int).tolist()
    exact = [(a * 7, b * 7) for a, b in itertools.product(range(1, 20), repeat=2)]
    for height, width in [*sides, *exact]:
        if max(height, width) > 200 * min(height, width):
            continue
        for least, most in ((56 * 56, 28 * 28 * 1280), (1, 28 * 28), (65536, 16777216), (65536, 65536)):
            grid = smart_grid(height, width, 28, least, most)
            expected = smart_resize(height, width, 28, least, most)
            assert (grid.rows * 28, grid.cols * 28) == expected, (height, width, least, most)


def test_a_picture_too_long_for_its_width_is_refused_as_by_the_reference() -> None:
    processor = image_processor("qwen2_vl")
    for height, width in ((1, 201), (402, 2), (1, 30000)):
        with pytest.raises(ValueError, match="absolute aspect ratio"):
            reference(noise(height, width), processor)
        line = f"^the picture is {width} x {height} pixels, and this model takes none that is more than 200 times"
        details: tuple[Detail, ...] = ("auto", "low", "high")
        for detail in details:
            with pytest.raises(ImageError, match=line):
                family("qwen2_vl", processor).preprocess(noise(height, width), ImageBudget(detail))


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl"])
def test_auto_and_low_bound_large_pictures_alone(model_type: str) -> None:
    processor, image = image_processor(model_type), noise(1300, 1900)
    made, unit = family(model_type, processor), processor.patch_size * processor.merge_size
    bounds: list[tuple[Detail, int]] = [("auto", AUTO_TOKENS), ("low", LOW_TOKENS)]
    for detail, most in bounds:
        visual = made.preprocess(image, ImageBudget(detail))
        assert_equal(visual, reference(image, processor, longest_edge=most * unit**2))
        assert 0.9 * most < grid_of(visual).tokens <= most
    for height, width in SIZES:
        image = noise(height, width)
        assert made.preprocess(image, ImageBudget("high")).layout == made.preprocess(image, ImageBudget("auto")).layout


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl"])
def test_a_budget_gives_the_sizes_of_the_reference_with_fewer_pixels(model_type: str) -> None:
    """Where those keep to the bounds; else a grid within them. A budget that does not bind changes nothing."""
    processor = image_processor(model_type)
    made, unit = family(model_type, processor), processor.patch_size * processor.merge_size
    overstepped = 0
    for (height, width), most in itertools.product(SIZES, (made.least_tokens, made.least_tokens + 3, 90, 300)):
        image = noise(height, width)
        visual, (_, free) = made.preprocess(image, ImageBudget("high", most)), reference(image, processor)
        if free.tokens <= most:
            assert visual.layout == free
            continue
        bound = reference(image, processor, longest_edge=most * unit**2)
        if made.least_tokens <= bound[1].tokens <= most:
            assert_equal(visual, bound)
            continue
        overstepped += 1
        assert visual.layout == nearest_grid(height, width, made.least_tokens, most)
        assert made.least_tokens <= grid_of(visual).tokens <= most
    assert overstepped
    with pytest.raises(OptionError, match=f"takes this model {made.least_tokens} image tokens or more"):
        made.preprocess(noise(40, 40), ImageBudget("low", made.least_tokens - 1))


def test_the_nearest_grid_distorts_least() -> None:
    for (height, width), (least, most) in itertools.product(SIZES, ((1, 1), (2, 2), (4, 5), (7, 30), (64, 65))):
        grids = [Grid(rows, cols) for rows in range(1, most + 1) for cols in range(1, most // rows + 1)]
        distortions = {
            grid: abs(math.log(grid.cols * height / (grid.rows * width))) for grid in grids if grid.tokens >= least
        }
        found = nearest_grid(height, width, least, most)
        assert least <= found.tokens <= most
        assert distortions[found] == pytest.approx(min(distortions.values()), abs=1e-9), (height, width, least, most)


def test_facts_that_a_model_type_needs_are_missed() -> None:
    for model_type, name in (("qwen2_5_vl", "window_size"), ("qwen3_vl", "table_side")):
        with pytest.raises(DamagedModelError, match=name):
            make_family(model_type, {**_facts_of_qwen2_vl(), "model_type": model_type})


def _facts_of_qwen2_vl() -> dict[str, Any]:
    names = {"image_token": IMAGE_TOKEN, "image_token_id": 6, "vision_start": "<", "vision_end": ">"}
    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 3136, "max_pixels": 10**6}
    return {**names, **sizes, "resample": 3, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def tiny_model(model_type: str, patch_size: int, image_token_id: int = 6) -> Any:
    """Return the reference's model with two layers of each tower, seeded."""
    sizes: dict[str, Any] = {"depth": 2, "patch_size": patch_size, "num_heads": 2, "spatial_merge_size": 2}
    if model_type == "qwen2_vl":
        sizes |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    else:
        sizes |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}
    if model_type == "qwen2_5_vl":
        sizes |= {"window_size": 112, "fullatt_block_indexes": [1]}
    if model_type == "qwen3_vl":
        sizes |= {"num_position_embeddings": TABLE_SIDE**2, "deepstack_visual_indexes": [0, 1]}
    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    if model_type == "qwen3_vl":
        text["head_dim"] = 16
    config = getattr(transformers, f"{PREFIX[model_type]}Config")(
        text_config=text,
        vision_config=sizes,
        image_token_id=image_token_id,
        video_token_id=7,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    torch.manual_seed(7)
    return getattr(transformers, f"{PREFIX[model_type]}Model")(config).eval()


def vision_call(model: Any, pixel_values: Array, grid: Grid) -> dict[str, Any]:
    """Run the vision tower on a picture; return what its first block gets, by name, and the patches' embeddings."""
    seen: dict[str, Any] = {}

    def look(_: Any, args: Any, kwargs: Any) -> None:
        seen.update(kwargs, hidden_states=args[0] if args else kwargs["hidden_states"])

    hook = model.visual.blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    patches = torch.from_numpy(pixel_values)
    with torch.inference_mode():
        model.visual(patches, grid_thw=torch.tensor([[1, 2 * grid.rows, 2 * grid.cols]]))
        seen["patch_embeds"] = model.visual.patch_embed(patches)
    hook.remove()
    return seen


PICTURES = [(60, 90), (300, 40), (56, 900), (13, 9), (230, 230), (640, 427)]
"""Heights and widths of pictures: odd, a portrait, a panorama, one smaller than an image token, of whole windows."""


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_encoder_gets_what_the_reference_computes_within(model_type: str) -> None:
    """RoPE of each patch, its position embedding, windows, and the order of the patches as the first block meets it."""
    processor = image_processor(model_type)
    made, model = family(model_type, processor), tiny_model(model_type, processor.patch_size)
    names = {PIXEL_VALUES, "patch_positions"}
    names |= {"qwen2_5_vl": {"window_index", "window_ids"}, "qwen3_vl": {"table_indices", "table_weights"}}.get(
        model_type, set()
    )
    for height, width in PICTURES:
        visual = made.preprocess(noise(height, width), ImageBudget("auto"))
        inputs = visual.views[0].inputs()
        assert inputs.keys() == names
        seen = vision_call(model, inputs[PIXEL_VALUES][0], grid_of(visual))
        embeds, order = seen["patch_embeds"].numpy(), np.arange(4 * grid_of(visual).tokens)
        if model_type == "qwen2_5_vl":
            order = order.reshape(-1, 4)[inputs["window_index"][0]].reshape(-1)
            windows = np.cumsum(np.bincount(inputs["window_ids"][0]))
            assert seen["cu_seqlens"].tolist() == [0, *windows]
            assert (np.diff(inputs["window_ids"][0]) >= 0).all()
        if model_type == "qwen3_vl":
            table = model.visual.pos_embed.weight.detach().numpy()
            corners = table[inputs["table_indices"][0]] * inputs["table_weights"][0][..., None]
            embeds = embeds + corners.sum(axis=0)
        np.testing.assert_allclose(embeds[order], seen["hidden_states"].numpy(), atol=1e-6)
        positions = torch.from_numpy(inputs["patch_positions"][0])
        for expected, ours in zip(
            seen["position_embeddings"], model.visual.rotary_pos_emb(seen["hidden_states"], positions), strict=True
        ):
            assert np.array_equal(ours.detach().numpy()[order], expected.numpy())


@pytest.mark.parametrize("side", [1, 2, TABLE_SIDE, 48])
def test_table_corners_equal_the_reference_bit_for_bit(side: int) -> None:
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    made = family("qwen3_vl")
    made.table_side = side
    for height, width in PICTURES:
        visual = made.preprocess(noise(height, width), ImageBudget("auto"))
        rows, cols = grid_of(visual)
        inputs = visual.views[0].inputs()
        indices, weights = get_vision_interpolation_indices_and_weights(
            torch.tensor([[1, 2 * rows, 2 * cols]]), side, align_corners=True, spatial_merge_size=2
        )
        assert inputs["table_indices"].dtype == np.int64
        assert inputs["table_weights"].dtype == np.float32
        assert np.array_equal(inputs["table_indices"][0], indices.numpy().T)
        assert np.array_equal(inputs["table_weights"][0], weights.numpy().T)


@pytest.mark.parametrize("window_size", [28, 56, 112, 130])
def test_windows_equal_the_reference(window_size: int) -> None:
    made = family("qwen2_5_vl")
    made.window_size = window_size
    for size in itertools.product((28, 84, 112, 140, 224, 252), repeat=2):
        visual = made.preprocess(noise(*size), ImageBudget("high"))
        rows, cols = grid_of(visual)
        inputs = visual.views[0].inputs()
        index, bounds = get_vision_window_index(torch.tensor([[1, 2 * rows, 2 * cols]]), 2, window_size, 14)
        assert inputs["window_index"].dtype == inputs["window_ids"].dtype == np.int64
        assert np.array_equal(inputs["window_index"][0], index.numpy())
        ids = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds.numpy()))
        assert np.array_equal(inputs["window_ids"][0], ids)


class Conversation:
    """Prompts of one family and the reference's, of a tokenizer and a template of the published form."""

    def __init__(self, model_type: str, folder: Path) -> None:
        self.tokenizer = make_tokenizer(TOKENS, end="<|im_end|>")
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.pictures = image_processor(model_type)
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(TEMPLATES[model_type])
        self.processor = Processor(folder, self._manifest(model_type))
        self.reference = self._reference(model_type)
        self.model = tiny_model(model_type, self.pictures.patch_size, self.image_token_id)
        self.family = self.processor.family

    def _manifest(self, model_type: str) -> Manifest:
        made = family(model_type, self.pictures)
        config = {
            **_facts_of_qwen2_vl(),
            "model_type": model_type,
            "image_token_id": self.image_token_id,
            "vision_start": made.vision_start,
            "vision_end": made.vision_end,
            "patch_size": made.patch_size,
            "min_pixels": made.min_pixels,
            "max_pixels": made.max_pixels,
            "table_side": TABLE_SIDE,
            "window_size": 112,
        }
        return Manifest(
            source="tiny",
            revision=None,
            family=model_type,
            family_config=config,
            submodels={},
            files={},
            hidden_size=32,
            vocab_size=len(self.tokenizer),
            context_length=4096,
            eos_token_ids=(2,),
            special_tokens={},
            chat_template="chat_template.jinja",
            tool_versions={},
            text_tokens=("<|box_start|>", "<|box_end|>"),
        )

    def _reference(self, model_type: str) -> Any:
        """Return the reference's processor without its video part, which needs torchvision."""
        base = getattr(transformers, f"{PREFIX[model_type]}Processor")

        class ForPictures(base):  # type: ignore[misc, valid-type]
            def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
                return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

        return ForPictures(self.pictures, self.tokenizer, chat_template=TEMPLATES[model_type])

    def prompt(self, messages: Sequence[Message], images: Sequence[Array]) -> tuple[Array, list[Visual]]:
        """Return a prompt's token ids `(n,)` and its pictures."""
        visuals = self.processor.preprocess(images, ImageBudget("high"))
        return np.asarray(self.processor.prompt_ids(messages, visuals), np.int64), visuals

    def expected(self, messages: Sequence[Message], images: Sequence[Array]) -> dict[str, Any]:
        """Return what the reference makes of the conversation."""
        text = self.reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        given = {"images": [list(images)], "input_data_format": "channels_last"} if images else {}
        return dict(self.reference(text=[text], return_tensors="pt", **given))

    def rope_index(self, ids: Array, grids: Array | None) -> tuple[Array, int]:
        """Return the reference's positions `(3, n)` of a text with pictures of the grids `(n, 3)`, and their delta."""
        given = torch.from_numpy(ids[None])
        types = (given == self.image_token_id).int()
        grid_thw = None if grids is None else torch.as_tensor(grids)
        positions, delta = self.model.get_rope_index(given, types, image_grid_thw=grid_thw)
        return positions[:, 0].numpy(), int(delta)


@pytest.fixture(scope="module", params=MODEL_TYPES)
def conversation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Conversation:
    return Conversation(request.param, tmp_path_factory.mktemp(request.param))


def mixed(*parts: str | None) -> Message:
    """Return a user turn of texts, and of pictures where there is None."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


CHATS: dict[str, tuple[list[Message], list[tuple[int, int]]]] = {
    "text": ([user_message("What is this?", 0)], []),
    "system": ([text_message("system", "Be brief."), user_message("What?", 1)], [(90, 150)]),
    "one": ([user_message("What is this?", 1)], [(200, 300)]),
    "two": ([user_message("Compare them.", 2)], [(120, 90), (90, 200)]),
    "portrait": ([user_message("What is this?", 1)], [(500, 60)]),
    "panorama": ([user_message("What is this?", 1)], [(30, 900)]),
    "tiny": ([user_message("What is this?", 1)], [(5, 9)]),
    "between": ([mixed("First", None, "then", None, "and last", None)], [(40, 90), (5, 9), (300, 20)]),
    "turns": (
        [user_message("What?", 1), text_message("assistant", "A cat."), mixed("And", None, "this?")],
        [(60, 60), (200, 100)],
    ),
}


@pytest.mark.parametrize("chat", CHATS)
def test_prompts_and_positions_equal_the_reference(chat: str, conversation: Conversation) -> None:
    messages, sizes = CHATS[chat]
    images = [noise(*size) for size in sizes]
    ids, visuals = conversation.prompt(messages, images)
    expected = conversation.expected(messages, images)
    assert ids.tolist() == expected["input_ids"][0].tolist()
    if images:
        pixel_values = np.concatenate([visual.views[0].inputs()[PIXEL_VALUES][0] for visual in visuals])
        assert pixel_values.shape == expected["pixel_values"].shape
    inputs = conversation.family.language_inputs(ids, [visual.layout for visual in visuals], [])
    positions, _ = conversation.rope_index(ids, expected.get("image_grid_thw"))
    assert inputs.positions.dtype == np.int64
    assert np.array_equal(inputs.positions, positions)
    assert not inputs.extras


def test_what_a_caller_writes_makes_no_image_tokens(conversation: Conversation) -> None:
    said = "<|vision_start|><|image_pad|><|vision_end|>"
    assert conversation.family.block_text() == said
    ids, _ = conversation.prompt([user_message(said, 0)], [])
    assert conversation.image_token_id not in ids


def test_features_of_deeper_layers_lie_at_image_tokens(conversation: Conversation) -> None:
    images = [noise(60, 90), noise(90, 60)]
    ids, visuals = conversation.prompt([user_message("Compare.", 2)], images)
    layouts = [visual.layout for visual in visuals]
    random = np.random.default_rng(3)
    names = (IMAGE_EMBEDS, "deepstack_embeds.0", "deepstack_embeds.1")
    outputs: list[dict[str, Array]] = [
        {name: random.normal(size=(grid_of(visual).tokens, 5)).astype(np.float32) for name in names}
        for visual in visuals
    ]
    features: list[Arrays] = [
        conversation.family.assemble(layout, [output]) for layout, output in zip(layouts, outputs, strict=True)
    ]
    extras = conversation.family.language_inputs(ids, layouts, features).extras
    assert extras.keys() == set(names[1:])
    shown = ids == conversation.image_token_id
    for name, array in extras.items():
        assert array.shape == (len(ids), 5)
        assert array.dtype == np.float32
        assert not array[~shown].any()
        assert np.array_equal(array[shown], np.concatenate([output[name] for output in outputs]))


class Positions(Session):
    """The generic session without a decoder: it keeps what a decoder would be given."""

    cached_attention_slowdown = 1

    def __init__(self) -> None:
        super().__init__(Requests(None, None), DecoderInfo(4, DecoderTraits(position_axes=3)))
        self.read: list[Array] = []

    def _forget(self, length: int) -> None:
        pass

    def _read(self, inputs_embeds: Array, inputs: LanguageInputs, logits_to_keep: int) -> Array:
        self.read.append(inputs.positions)
        return np.zeros((logits_to_keep, 8), np.float32)

    def append(self, ids: Array, inputs: LanguageInputs | None = None) -> Array:
        """Prefill tokens and return the positions `(3, n)` that the decoder is given."""
        self.prefill(np.zeros((1, len(ids), 4), np.float32), 1, ids.tolist(), inputs)
        return self.read[-1]


def test_generated_tokens_and_second_questions_continue_the_positions(conversation: Conversation) -> None:
    """As the reference counts on by its delta, and as it counts the whole conversation anew."""
    image, other = noise(60, 300), noise(200, 70)
    question, answer = user_message("What is this?", 1), text_message("assistant", "A big cat.")
    ids, visuals = conversation.prompt([question], [image])
    whole, all_visuals = conversation.prompt([question, answer, mixed("And", None)], [image, other])
    generated = whole[len(ids) : len(ids) + 4]
    session = Positions()
    session.append(ids, conversation.family.language_inputs(ids, [each.layout for each in visuals], []))

    grids = conversation.expected([question, mixed(None)], [image, other])["image_grid_thw"]
    _, delta = conversation.rope_index(ids, grids[:1])
    assert delta < 0
    for place, token in enumerate(generated, len(ids)):
        assert session.append(np.array([token])).tolist() == [[place + delta]] * 3
    rejected = whole[len(ids) + 4 : len(ids) + 7]  # a draft
    session.append(rejected)
    session.rewind(len(ids) + 4)
    assert session.append(rejected[:1]).tolist() == [[len(ids) + 4 + delta]] * 3

    inputs = conversation.family.language_inputs(whole, [each.layout for each in all_visuals], [])
    reused = session.reuse_prefix(whole.tolist(), inputs)
    assert reused == len(ids) + 5
    rest = session.append(whole[reused:], inputs.after(reused))
    positions, delta = conversation.rope_index(whole, grids)
    assert np.array_equal(rest, positions[:, reused:])
    assert session.append(generated[:2]).tolist() == [[len(whole) + delta, len(whole) + delta + 1]] * 3
