"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: the facts about preprocessing and prompt for the runtime, and graphs."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgevlm.errors import SourceError
from edgevlm.families.base import DecoderTraits
from edgevlm_export.families.base import (
    Architecture,
    FamilyExporter,
    is_tied,
    read_activation,
    read_axial_theta,
    read_layer_indexes,
)
from edgevlm_export.families.preprocessing import (
    CLIP_DEFAULTS,
    check_always_done,
    read_arithmetic,
    read_block_token_ids,
    read_image_token_id,
    read_pixels,
)
from edgevlm_export.families.text_models import read_decoder, text_section
from edgevlm_export.graphs.decoder import GatedMLP
from edgevlm_export.graphs.modules import Embedding, FrameConvolution, Linear, Norm
from edgevlm_export.graphs.packed_vit import Block, Merger, PackedTransformer, PlainMLP, axial_rope, packed_stages
from edgevlm_export.graphs.stages import Graph
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

# What transformers' Qwen2VLImageProcessor and the config classes of the four models assume where the checkpoint is
# silent: models/qwen2_vl/, models/qwen2_5_vl/, models/qwen3_vl/ and models/qwen3_5/ of transformers 5.24.
_QWEN2: dict[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _QWEN2),
    "qwen3_5": {
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
        "tie_word_embeddings": False,
    },
}
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    **CLIP_DEFAULTS,
}
_VIDEO_DEFAULTS: dict[str, dict[str, Any]] = {
    kind: {**_PREPROCESSOR_DEFAULTS, "size": {"shortest_edge": 128 * unit**2, "longest_edge": 768 * unit**2}}
    for kind, unit in (("qwen2_vl", 28), ("qwen2_5_vl", 28), ("qwen3_vl", 32))
}
_VIDEO_DEFAULTS["qwen3_vl"] |= {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_VIDEO_DEFAULTS["qwen3_5"] = _VIDEO_DEFAULTS["qwen3_vl"]
"""Of `Qwen2VLVideoProcessor` and `Qwen3VLVideoProcessor`."""
_VISION: dict[str, Any] = {
    "depth": 32,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_vl": _VISION | {"embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "hidden_act": "quick_gelu"},
    "qwen2_5_vl": _VISION
    | {
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
        "hidden_act": "silu",
        "window_size": 112,
        "tokens_per_second": 4,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "qwen3_vl": _VISION
    | {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "out_hidden_size": 3584,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}
_VISION_DEFAULTS["qwen3_5"] = {
    key: value for key, value in _VISION_DEFAULTS["qwen3_vl"].items() if key != "deepstack_visual_indexes"
}
_OF_QWEN3 = ("qwen3_vl", "qwen3_5")
"""Whose vision transformer has a table of positions, stretched over the picture."""
_HARMLESS = ("ignore_index", "video_token_id", "vision_end_token_id", "vision_start_token_id", "vision_token_id")
"""Of videos and training, and ids that the runtime has as facts."""
_TEXT_HARMLESS = (*_HARMLESS, "image_token_id", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
"""Layers for multi-token prediction besides, which transformers does not load either."""
_UNUSED = {"qwen3_5": ("mtp.*",)}
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers")
"""Beside `text_config`, which has its own; without it they are read."""
_PREPROCESSOR_HARMLESS = ("data_format", "default_to_square", "do_pad", "image_processor_type")
_VISION_HARMLESS = ("in_chans", "spatial_patch_size", "tokens_per_second")
"""What the classes do not read, and the speed of videos."""
_TOKENS = {"image_token": "<|image_pad|>", "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
_SIZES = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "merge_size": "spatial_merge_size"}
"""What the image processor calls the sizes of `vision_config`."""
_EPS = 1e-6
"""Of all norms of the vision transformer, which no config changes."""
_NO_CHAT = re.compile(r"qwen3-vl-(embedding|reranker)", re.IGNORECASE)
_NO_CHAT_TEMPLATES = {
    "Represent the user": "embedding",
    "Judge whether the Document meets the requirements": "reranker",
}
"""What the chat templates of Qwen3-VL-Embedding and Qwen3-VL-Reranker say where Qwen3-VL's say nothing."""
_RETRIEVAL_FILES = {
    "1_LogitScore/config.json": "reranker",
    "1_Pooling/config.json": "embedding",
    "modules.json": "embedding or reranker",
    "config_sentence_transformers.json": "embedding or reranker",
}
"""The files of sentence-transformers."""


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return the facts that `edgevlm.families.qwen_vl` reads, and the image processor's settings as they were read.

    Raises `SourceError` where they do not fit together.
    """
    _refuse_retrieval(checkpoint)
    _refuse_text_model(checkpoint)
    preprocessor = checkpoint.image_processor(_PREPROCESSOR_DEFAULTS, _PREPROCESSOR_HARMLESS)
    check_always_done(preprocessor)
    kind = checkpoint.model_type
    vision = checkpoint.section("vision_config", _VISION_DEFAULTS[kind])
    for name, other in _SIZES.items():
        if preprocessor.size(name) != vision.size(other):
            raise SourceError(
                f"the checkpoint contradicts itself: {name} of {preprocessor.file} is {preprocessor.size(name)},"
                f" {vision.name_of(other)} is {vision.size(other)}"
            )
    facts = {
        "model_type": kind,
        **_tokens(checkpoint),
        **{name: preprocessor.size(name) for name in _SIZES},
        **read_pixels(preprocessor),
        **read_arithmetic(preprocessor),
        **_video(checkpoint, vision),
    }
    if kind in _OF_QWEN3:
        facts["table_side"] = _table_side(vision)
    if kind == "qwen2_5_vl":
        facts["window_size"] = _window_size(vision)
    return facts, preprocessor


def _refuse_retrieval(checkpoint: Checkpoint) -> None:
    """Raise `SourceError` for Qwen3-VL-Embedding and Qwen3-VL-Reranker, whose config.json is that of Qwen3-VL.

    They are known by their name, that in the title of their model card included, by the files of sentence-transformers,
    or by what their chat templates say; the reranker's own is not its default one.
    """
    if checkpoint.model_type == "qwen3_vl" and (kind := _retrieval_kind(checkpoint)):
        raise SourceError(
            f"{checkpoint.source} is a Qwen3-VL {kind} checkpoint, which writes no answers; take Qwen3-VL itself"
        )


def _refuse_text_model(checkpoint: Checkpoint) -> None:
    """Raise `SourceError` for a Qwen3.5 without its vision encoder, whose `model_type` may be the same."""
    config = checkpoint.config
    is_text = config.get("language_model_only") or config.get("vision_config") is None
    if checkpoint.model_type == "qwen3_5" and is_text:
        raise SourceError(
            f"{checkpoint.source} is a text model of Qwen3.5, without a vision encoder; take one that looks at pictures"
        )


def _retrieval_kind(checkpoint: Checkpoint) -> str | None:
    """Return what a checkpoint for retrieval is called, None for one that answers."""
    cached = [part for part in checkpoint.folder.parts if part.startswith("models--")]  # in the Hugging Face cache
    names = [checkpoint.source, str(checkpoint.config.get("_name_or_path", "")), *cached, _title(checkpoint)]
    if found := next((found for name in names if (found := _NO_CHAT.search(name))), None):
        return found[1].lower()
    for name, kind in _RETRIEVAL_FILES.items():
        if (checkpoint.folder / name).is_file():
            return kind
    templates = [_template(checkpoint, name) for name in ("default", "reranker")]
    return next((kind for said, kind in _NO_CHAT_TEMPLATES.items() if any(said in each for each in templates)), None)


def _title(checkpoint: Checkpoint) -> str:
    """Return the first heading of the model card; further ones may be comments in its code."""
    card = checkpoint.folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return next((line for line in text.splitlines() if line.startswith("# ")), "")


def _template(checkpoint: Checkpoint, name: str) -> str:
    try:
        return checkpoint.chat_template(name)
    except SourceError:
        return ""


def _tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the tokens of an image block are called, and their ids."""
    names = {**_TOKENS, "image_token": checkpoint.named_tokens.get("image_token", _TOKENS["image_token"])}
    ids = read_block_token_ids(checkpoint, names, _DEFAULTS[checkpoint.model_type])
    return {**names, "image_token_id": ids["image_token_id"], "vision_start_token_id": ids["vision_start_token_id"]}


def _video(checkpoint: Checkpoint, vision: ConfigReader) -> dict[str, Any]:
    """Return the facts about videos as `video`, none for a tokenizer without their token. Raises `SourceError`."""
    kind = checkpoint.model_type
    token = checkpoint.named_tokens.get("video_token", "<|video_pad|>")
    token_id = checkpoint.added_tokens.get(token, {}).get("id")
    default = _DEFAULTS[kind]["video_token_id"]
    if token_id is None or token_id != read_image_token_id(checkpoint, default, "video_token_id"):
        return {}
    processor = checkpoint.video_processor(_VIDEO_DEFAULTS[kind], ())
    check_always_done(processor)
    for name, other in _SIZES.items():
        if name in processor and processor.size(name) != vision.size(other):
            raise SourceError(
                f"the checkpoint contradicts itself: {name} of {processor.file} is {processor.size(name)},"
                f" {vision.name_of(other)} is {vision.size(other)}"
            )
    facts = {"token": token, "token_id": token_id, **read_pixels(processor), **read_arithmetic(processor)}
    if kind == "qwen2_5_vl":
        facts["tokens_per_second"] = vision.number("tokens_per_second")
    return {"video": facts}


def _table_side(vision: ConfigReader) -> int:
    rows = vision.size("num_position_embeddings")
    side = math.isqrt(rows)
    if side**2 != rows:
        raise SourceError(f"config.json: {vision.name_of('num_position_embeddings')} must be a square, not {rows}")
    return side


def _window_size(vision: ConfigReader) -> int:
    """Return the side of a window in pixels, which holds one image token or more."""
    size, token = vision.size("window_size"), vision.size("patch_size") * vision.size("spatial_merge_size")
    if size < token:
        raise SourceError(f"config.json: {vision.name_of('window_size')} {size} is less than an image token's {token}")
    return size


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:  # noqa: ARG001
    """Return the model's graphs. Raises `SourceError`, and `UnsupportedError` for what is not built here."""
    kind, names = checkpoint.model_type, _Names(tensors)
    harmless = (*_HARMLESS, *_WINDOWS, *_repeated(checkpoint), "language_model_only")
    config = checkpoint.section("", _DEFAULTS[kind], harmless=harmless)
    text = text_section(config, _TEXT_HARMLESS)
    seen = config.section("vision_config", _VISION_DEFAULTS[kind], harmless=_VISION_HARMLESS)
    decoder = read_decoder(text, names.decoder, "lm_head", tied=is_tied(config, text, tensors))
    vision = _VisionReader(seen, names.vision, decoder.hidden_size, kind).read()
    if len(vision.deepstack) > len(decoder.layers):
        raise SourceError(f"config.json: {seen.name_of('deepstack_visual_indexes')} are more than the decoder's layers")
    config.get("image_token_id")
    first, *others = vision.outputs
    graph = Graph(vision.inputs, packed_stages(vision), first, first, others=others)
    decoder = replace(decoder, deepstack=len(others))
    fixed = decoder.has_fixed_states
    traits = DecoderTraits(3, recurrent=decoder.recurrent, rewindable=not fixed, fixed_states=fixed)
    return Architecture(decoder, graph, _UNUSED.get(kind, ()), (config, text, seen), traits)


def _repeated(checkpoint: Checkpoint) -> list[str]:
    """Return the keys that config.json has twice, equal in `text_config`, which alone is read then."""
    text = checkpoint.config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    return [key for key, value in checkpoint.config.items() if key in inner and inner[key] == value]


class _Names:
    """What weights begin with: as published for Qwen2-VL and 2.5-VL, or as transformers 5 holds them in memory."""

    def __init__(self, tensors: Container[str]) -> None:
        held = "model.language_model.embed_tokens.weight" in tensors
        self.decoder = "model.language_model" if held else "model"
        self.vision = "model.visual" if "model.visual.patch_embed.proj.weight" in tensors else "visual"


@dataclass(frozen=True)
class _VisionReader:
    """Reads `vision_config` of one of the four models."""

    section: ConfigReader
    prefix: str
    hidden_size: int
    """Channels of the decoder."""
    kind: str

    def read(self) -> PackedTransformer:
        """Return the vision submodel. Raises `SourceError` and `UnsupportedError`."""
        section, is_third = self.section, self.kind in _OF_QWEN3
        hidden, depth = self._width(), section.size("depth")
        heads = section.heads("num_heads", hidden)
        if hidden // heads % 4:
            raise SourceError(f"config.json: heads of {hidden // heads} channels cannot be rotated by row and column")
        frames, patch = section.size("temporal_patch_size"), section.size("patch_size")
        table = Embedding(f"{self.prefix}.pos_embed", _table_side(section) ** 2, hidden) if is_third else None
        windowed = self._windowed(depth) if self.kind == "qwen2_5_vl" else set()
        tapped = self._tapped(depth)
        merge = section.size("spatial_merge_size")
        return PackedTransformer(
            FrameConvolution(
                f"{self.prefix}.patch_embed.proj", hidden, section.size("in_channels"), frames, patch, bias=is_third
            ),
            table,
            tuple(self._block(index, hidden, windowed=index in windowed) for index in range(depth)),
            self._merger("merger", hidden, merge),
            tuple(
                (after, self._merger(f"deepstack_merger_list.{number}", hidden, merge, joins_first=True))
                for number, after in enumerate(tapped)
            ),
            heads,
            merge,
            axial_rope(hidden // heads, read_axial_theta(self.section)),
            (_window_size(section) // merge // patch * merge) ** 2 if windowed else 0,
        )

    def _tapped(self, depth: int) -> list[int]:
        """Return the blocks after which Qwen3-VL takes features for deeper layers of the decoder."""
        if self.kind == "qwen3_vl":
            return read_layer_indexes(self.section, "deepstack_visual_indexes", depth)
        if self.kind == "qwen3_5" and self.section.get("deepstack_visual_indexes"):
            raise UnsupportedError("the native route builds no Qwen3.5 with deepstack_visual_indexes")
        return []

    def _windowed(self, depth: int) -> set[int]:
        """Return the blocks whose attention stays within windows."""
        windowed = {*range(depth)} - {*read_layer_indexes(self.section, "fullatt_block_indexes", depth)}
        if not windowed:
            raise UnsupportedError("the native route builds no vision transformer of Qwen2.5-VL without windows")
        return windowed

    def _width(self) -> int:
        """Return the channels of the vision transformer, whose output must fit the decoder."""
        section = self.section
        out, width = ("hidden_size", "embed_dim") if self.kind == "qwen2_vl" else ("out_hidden_size", "hidden_size")
        if section.size(out) != self.hidden_size:
            raise SourceError(
                f"config.json contradicts itself: {section.name_of(out)} is {section.size(out)}, and the decoder has"
                f" {self.hidden_size} channels"
            )
        return section.size(width)

    def _block(self, index: int, hidden: int, *, windowed: bool) -> Block:
        at = f"{self.prefix}.blocks.{index}"
        norm1, norm2 = (
            Norm(f"{at}.{name}", hidden, _EPS, bias=self.kind != "qwen2_5_vl") for name in ("norm1", "norm2")
        )
        qkv, proj = Linear(f"{at}.attn.qkv", 3 * hidden, hidden, True), Linear(f"{at}.attn.proj", hidden, hidden, True)
        return Block(at, norm1, (qkv,), proj, norm2, self._mlp(f"{at}.mlp", hidden), windowed)

    def _mlp(self, at: str, hidden: int) -> PlainMLP | GatedMLP:
        section = self.section
        act = read_activation(section, "hidden_act")
        inner = hidden * section.size("mlp_ratio") if self.kind == "qwen2_vl" else section.size("intermediate_size")
        if self.kind == "qwen2_5_vl":
            gate, up = (Linear(f"{at}.{name}_proj", inner, hidden, True) for name in ("gate", "up"))
            return GatedMLP(gate, up, Linear(f"{at}.down_proj", hidden, inner, True), act)
        first, second = ("fc1", "fc2") if self.kind == "qwen2_vl" else ("linear_fc1", "linear_fc2")
        return PlainMLP(
            Linear(f"{at}.{first}", inner, hidden, True), Linear(f"{at}.{second}", hidden, inner, True), act
        )

    def _merger(self, name: str, hidden: int, merge: int, *, joins_first: bool = False) -> Merger:
        at, joined = f"{self.prefix}.{name}", hidden * merge**2
        third = self.kind in _OF_QWEN3
        norm, first, second = ("norm", "linear_fc1", "linear_fc2") if third else ("ln_q", "mlp.0", "mlp.2")
        size = joined if joins_first else hidden
        mlp = PlainMLP(
            Linear(f"{at}.{first}", joined, joined, True),
            Linear(f"{at}.{second}", self.hidden_size, joined, True),
            "gelu",
        )
        return Merger(Norm(f"{at}.{norm}", size, _EPS, bias=self.kind != "qwen2_5_vl"), mlp, joins_first)


EXPORTER = FamilyExporter(family_config, architecture, covers_onnx=False)
