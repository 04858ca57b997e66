"""Token merging: equal to ToMe in torch on the same checkpoint, fused, verified, refused where it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm import VLM, OptionError, RuntimeConfig
from edgevlm.families.base import PIXEL_VALUES, ImageBudget
from edgevlm.manifest import VISION, load_manifest
from edgevlm.runtime.core import core, import_openvino, read_ir
from edgevlm_export import ExportOptions, export
from edgevlm_export.graphs.stages import Values
from edgevlm_export.graphs.token_merging import LAYERS, SIMILARITY, TokenMerging, merge_tokens, merged_tokens
from edgevlm_export.options import MERGED_SHARES
from edgevlm_export.routes import native
from edgevlm_export.tune.scores import is_right
from tests.conftest import F32, make_checkpoint, photograph
from tests.families import gemma3, granite_docling, internvl, llava, llava_onevision, qwen_vl
from tests.helpers.command import cli
from tests.helpers.graphs import runtime_kinds
from training.settings import PANEL

LAYER_COUNT = 6
EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = ExportOptions("fp32", via="native", verify=False)


@dataclass(frozen=True)
class Tower:
    """transformers' vision encoder of one family: what comes before its layers, those, and what comes after."""

    start: Callable[[Any, torch.Tensor], torch.Tensor]
    layers: Callable[[Any], Sequence[Any]]
    end: Callable[[Any, torch.Tensor], torch.Tensor]
    make: Callable[[Path], Path]
    has_class_token: bool = False


def idefics3_start(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    side = pixel_values.shape[-1] // model.vision_model.patch_size
    mask = torch.ones((len(pixel_values), side, side), dtype=torch.bool)
    return model.vision_model.embeddings(pixel_values, mask)


def internvl_end(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    patches = model.vision_tower.layernorm(hidden)[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    shuffled = model.pixel_shuffle(patches.reshape(len(patches), side, side, -1), scale_factor=0.5)
    return model.multi_modal_projector(shuffled.reshape(len(patches), -1, shuffled.shape[-1]))


def granite_docling_end(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    rows, _ = model.vision_model.connector(model.vision_model.post_layernorm(hidden), [])
    return rows[None]


def clip_start(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    return model.vision_tower.pre_layrnorm(model.vision_tower.embeddings(pixel_values))


def siglip_end(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    rows = model.multi_modal_projector(hidden)
    return torch.cat([rows, model.image_newline.expand(len(rows), 1, -1)], 1)


TOWERS = {
    "gemma3": Tower(
        lambda model, pixel_values: model.vision_tower.embeddings(pixel_values),
        lambda model: model.vision_tower.encoder.layers,
        lambda model, hidden: model.multi_modal_projector(model.vision_tower.post_layernorm(hidden)),
        lambda folder: gemma3.make_checkpoint(folder / "saved", vision_config={"num_hidden_layers": LAYER_COUNT}),
    ),
    "granite_docling": Tower(
        lambda model, pixel_values: model.vision_model.embeddings(pixel_values),
        lambda model: model.vision_model.encoder.layers,
        granite_docling_end,
        lambda folder: granite_docling.make_checkpoint(
            folder / "saved", vision_config={"num_hidden_layers": LAYER_COUNT}
        ),
    ),
    "idefics3": Tower(
        idefics3_start,
        lambda model: model.vision_model.encoder.layers,
        lambda model, hidden: model.connector(model.vision_model.post_layernorm(hidden)),
        lambda folder: make_checkpoint(folder / "saved", "idefics3", vision_layers=LAYER_COUNT),
    ),
    "internvl": Tower(
        lambda model, pixel_values: model.vision_tower.embeddings(pixel_values),
        lambda model: model.vision_tower.encoder.layer,
        internvl_end,
        lambda folder: internvl.make_checkpoint(
            folder / "saved",
            vision_config={"num_hidden_layers": LAYER_COUNT, "use_qk_norm": True, "use_mean_pooling": False},
        ),
        has_class_token=True,
    ),
    "llava": Tower(
        clip_start,
        lambda model: model.vision_tower.encoder.layers[:-1],
        lambda model, hidden: model.multi_modal_projector(hidden[:, 1:]),
        lambda folder: llava.make_llava(folder / "saved", vision={"num_hidden_layers": LAYER_COUNT}),
        has_class_token=True,
    ),
    "llava_onevision": Tower(
        lambda model, pixel_values: model.vision_tower.embeddings(pixel_values),
        lambda model: model.vision_tower.encoder.layers,
        siglip_end,
        lambda folder: llava_onevision.make_llava_onevision(
            folder / "saved", vision={"num_hidden_layers": LAYER_COUNT}
        ),
    ),
}


def bipartite_soft_matching(
    metric: torch.Tensor, count: int, has_class_token: bool
) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """Return ToMe's merging of tokens `(1, T, C)`, as the paper's authors publish it.

    One thing differs: tokens left alone keep their order without a class token, too.
    """
    metric = metric / metric.norm(dim=-1, keepdim=True)
    a, b = metric[..., ::2, :], metric[..., 1::2, :]
    scores = a @ b.transpose(-1, -2)
    if has_class_token:
        scores[..., 0, :] = -torch.inf
    node_max, node_idx = scores.max(dim=-1)
    edge_idx = node_max.argsort(dim=-1, descending=True)[..., None]
    unm_idx = edge_idx[..., count:, :].sort(dim=1)[0]
    src_idx = edge_idx[..., :count, :]
    dst_idx = node_idx[..., None].gather(dim=-2, index=src_idx)

    def merge(x: torch.Tensor, mode: str) -> torch.Tensor:
        src, dst = x[..., ::2, :], x[..., 1::2, :]
        n, _, c = src.shape
        unm = src.gather(dim=-2, index=unm_idx.expand(n, -1, c))
        src = src.gather(dim=-2, index=src_idx.expand(n, count, c))
        return torch.cat([unm, dst.scatter_reduce(-2, dst_idx.expand(n, count, c), src, reduce=mode)], dim=1)

    return merge


def tome(model: Any, tower: Tower, pixel_values: torch.Tensor, counts: dict[int, int]) -> torch.Tensor:
    """Return the image embeddings `(1, tokens, D)` of transformers' modules with ToMe between attention and MLP."""
    x = tower.start(model, pixel_values)
    size = torch.ones_like(x[..., :1])
    source = torch.eye(x.shape[1])[None]  # which of the view's tokens are in each token
    for index, layer in enumerate(tower.layers(model)):
        norm_1, attention, scale_1, norm_2, scale_2 = parts(layer)
        normal = norm_1(x)
        bias = size.log()[:, None, None, :, 0]
        x = x + scale_1 * attention(normal, attention_mask=bias)[0]
        if count := counts.get(index):
            keys = getattr(attention, "k_norm", lambda each: each)(attention.k_proj(normal))
            metric = keys.unflatten(-1, (attention.num_heads, -1)).mean(2)
            merge = bipartite_soft_matching(metric, count, tower.has_class_token)
            source = merge(source, "amax")
            x, size = merge(x * size, "sum"), merge(size, "sum")
            x = x / size
        x = x + scale_2 * layer.mlp(norm_2(x))
    return tower.end(model, source.transpose(1, 2) @ x)


def parts(layer: Any) -> tuple[Any, ...]:
    """Return first norm, attention, its scale, second norm, and the MLP's scale."""
    if hasattr(layer, "self_attn"):
        return layer.layer_norm1, layer.self_attn, 1.0, layer.layer_norm2, 1.0
    return layer.layernorm_before, layer.attention, layer.lambda_1, layer.layernorm_after, layer.lambda_2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives a family's checkpoint, made once."""
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            made[name] = TOWERS[name].make(tmp_path_factory.mktemp(name))
        return made[name]

    return checkpoint


def encoded(vlm: VLM, image: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return `pixel_values` `(1, 3, H, W)` and `image_embeds` of each view of a picture."""
    views = [view for visual in vlm.processor.preprocess([image], ImageBudget("high")) for view in visual.views]
    return [view.inputs()[PIXEL_VALUES] for view in views], [each["image_embeds"] for each in vlm.vision.encode(views)]


@pytest.mark.parametrize("ratio", LAYERS)
@pytest.mark.parametrize("name", TOWERS)
def test_embeddings_equal_tome_s(name: str, ratio: float, checkpoints: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    checkpoint, tower = checkpoints(name), TOWERS[name]
    vlm = VLM(export(checkpoint, tmp_path / "out", replace(QUICK, merge_tokens=ratio)).folder, F32)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval().model
    pixel_values, found = encoded(vlm, photograph("china.jpg")[:200, :300])
    layers = len(tower.layers(model))
    for pixels, embeds in zip(pixel_values, found, strict=True):
        with torch.inference_mode():
            start = tower.start(model, torch.from_numpy(pixels))
            counts = merged_tokens(ratio, start.shape[1] - int(tower.has_class_token), layers)
            wanted = tome(model, tower, torch.from_numpy(pixels), counts)[0]
            plain = tome(model, tower, torch.from_numpy(pixels), {})[0]
        np.testing.assert_allclose(embeds, wanted, atol=1e-4)
        assert np.abs(embeds - plain.numpy()).max() > 0.01  # merging changed something


def merged(x: np.ndarray, keys: np.ndarray, merging: TokenMerging, bias: np.ndarray | None = None) -> list[np.ndarray]:
    """Return what `merge_tokens` makes of tokens `(1, T, D)` and keys `(1, 1, T, d)`: tokens, places, sizes."""
    opset = import_openvino().opset13
    parameters = [opset.parameter(each.shape, np.float32) for each in (x, keys)]
    values = Values({} if bias is None else {"attention_bias": opset.constant(bias).output(0)})
    left = merge_tokens(*parameters, merging, values)
    sizes = opset.exp(values["attention_bias"])
    model = import_openvino().Model([left.output(0), values["token_places"], sizes.output(0)], parameters)
    outputs = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x, keys])
    return [np.array(each[0]) for each in outputs.values()]


def test_a_class_token_is_never_merged() -> None:
    """Though its key is another's."""
    random = np.random.default_rng(1)
    x, keys = random.normal(size=(2, 1, 9, 16)).astype(np.float32)
    keys[0, 0] = keys[0, 1]
    found, places, _ = merged(x, keys[None], TokenMerging("layer", 2, has_class_token=True))
    assert places[0] == 0
    np.testing.assert_array_equal(found[0], x[0, 0])
    found, places, _ = merged(x, keys[None], TokenMerging("layer", 2, has_class_token=False))
    assert places[0] == places[1]
    np.testing.assert_allclose(found[places[0]], x[0, :2].mean(0), atol=1e-6)


@pytest.mark.parametrize("tokens", [8, 9])
def test_no_token_is_lost_where_all_are_alike(tokens: int) -> None:
    x = np.arange(tokens, dtype=np.float32)[None, :, None]
    found, places, sizes = merged(x, np.ones((1, 1, tokens, 4), np.float32), TokenMerging("layer", 3, False))
    assert sorted({*places.tolist()}) == list(range(tokens - 3))
    assert sizes.sum() == pytest.approx(tokens)
    np.testing.assert_array_equal(sizes.ravel().round(), np.bincount(places))
    np.testing.assert_allclose(found[:, 0], np.bincount(places, x.ravel()) / np.bincount(places), rtol=1e-6)


def test_padding_adds_nothing_to_what_it_is_merged_with() -> None:
    x, keys = np.random.default_rng(2).normal(size=(2, 1, 8, 4)).astype(np.float32)
    keys[0, 0] = keys[0, 1]
    bias = np.zeros((1, 1, 1, 8), np.float32)
    bias[..., 0] = -65504
    found, places, sizes = merged(x, keys[None], TokenMerging("layer", 1, False), bias)
    assert places[0] == places[1]
    np.testing.assert_allclose(found[places[1]], x[0, 1], atol=1e-6)
    np.testing.assert_allclose(sizes, np.ones((1, 1, 7)), atol=1e-6)


def test_a_stage_in_each_partition_gives_the_same_embeddings(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(QUICK, merge_tokens=0.5)
    whole = VLM(export(checkpoints("idefics3"), tmp_path / "whole", options).folder, F32)
    monkeypatch.setattr(native, "PARTITION_WEIGHTS", 1000)
    parted = VLM(export(checkpoints("idefics3"), tmp_path / "parted", options).folder, F32)
    image = photograph("china.jpg")[:64, :64]
    np.testing.assert_allclose(encoded(parted, image)[1], encoded(whole, image)[1], atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "patches", "layers", "wanted"),
    [
        (0.25, 576, 8, {2: 144}),
        (0.5, 576, 8, {1: 72, 2: 72, 3: 72, 4: 72}),
        (0.5, 729, 27, {1: 91, 2: 91, 3: 91, 4: 91}),
        (0.25, 16, 3, {2: 4}),
    ],
)
def test_tokens_are_merged_in_early_layers_but_never_in_the_first(
    ratio: float, patches: int, layers: int, wanted: dict[int, int]
) -> None:
    assert merged_tokens(ratio, patches, layers) == wanted


def kinds_of_ir(folder: Path) -> list[str]:
    """Return the types of the vision submodel's operations."""
    model = read_ir(folder / load_manifest(folder).submodels[VISION].file)
    return [node.get_type_name() for node in model.get_ops()]


def test_nothing_is_merged_unless_asked_for(exported: Path) -> None:
    kinds = kinds_of_ir(exported)
    assert {"TopK", "ScatterElementsUpdate", "CumSum"}.isdisjoint(kinds)
    assert load_manifest(exported).export_options["merge_tokens"] == 0
    model = read_ir(exported / load_manifest(exported).submodels[VISION].file)
    assert model.input(PIXEL_VALUES).get_partial_shape()[2].is_dynamic


@pytest.mark.parametrize("ratio", LAYERS)
@pytest.mark.parametrize("name", TOWERS)
def test_attention_stays_fused_and_shapes_static(name: str, ratio: float, checkpoints: Any, tmp_path: Path) -> None:
    vlm = VLM(export(checkpoints(name), tmp_path / "out", replace(QUICK, merge_tokens=ratio)).folder, F32)
    kinds = runtime_kinds(vlm.vision._compiled)
    layers = LAYER_COUNT - 1 if name == "llava" else LAYER_COUNT
    assert kinds["FullyConnected"] >= 4 * layers
    assert kinds["Softmax"] == 0
    assert kinds["MatMul"] == len(LAYERS[ratio])  # of the similarities; attention shows none of its own
    assert all(output.partial_shape.is_static for output in vlm.vision._compiled.outputs)
    nodes = vlm.vision._compiled.get_runtime_model().get_ops()
    assert all(output.partial_shape.is_static for node in nodes for output in node.outputs())


@pytest.mark.parametrize(
    ("precision", "vision", "least"),
    [("fp32", None, 0.9), ("fp16", None, 0.9), ("int8", "int8", 0.9), ("int8", "w8a8", 0.85), ("int4", "int4", 0.7)],
)
def test_the_verification_reports_what_merging_changes(
    precision: Any, vision: Any, least: float, checkpoints: Any, tmp_path: Path
) -> None:
    """Also where an uncompressed submodel would be refused."""
    options = ExportOptions(precision, vision_precision=vision, merge_tokens=0.25)
    report = export(checkpoints("idefics3"), tmp_path / "out", options)
    assert report.verification is not None
    assert report.verification.reference == "openvino, float32, uncompressed, tokens not merged"
    figures = report.verification.parts[VISION]
    assert least < figures.cosine < 0.9999
    assert figures.max_abs_error > 0.01
    assert load_manifest(report.folder).export_options["merge_tokens"] == 0.25
    answer = VLM(report.folder).generate(photograph("china.jpg"), "What?", max_new_tokens=8)
    assert answer.generated_tokens == 8 or answer.finish_reason == "stop"


def test_quantized_activations_leave_the_similarities_alone(checkpoints: Any, tmp_path: Path) -> None:
    options = replace(QUICK, precision="int8", vision_precision="w8a8", merge_tokens=0.5)
    folder = export(checkpoints("idefics3"), tmp_path / "out", options).folder
    model = read_ir(folder / load_manifest(folder).submodels[VISION].file)
    products = [node for node in model.get_ops() if node.get_friendly_name().endswith(f"/{SIMILARITY}")]
    halves = [each.get_node() for node in products for each in node.input_values()]
    assert len(halves) == 2 * 4
    assert {(half.get_type_name(), half.input_value(0).get_node().get_type_name()) for half in halves} == {
        ("Slice", "Divide")  # the keys as they are, no FakeQuantize between
    }
    assert "FakeQuantize" in kinds_of_ir(folder)


def test_the_compile_cache_keeps_the_exports_apart(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    shares = {
        ratio: export(checkpoints("llava"), tmp_path / str(ratio), replace(QUICK, merge_tokens=ratio)).folder
        for ratio in MERGED_SHARES
    }
    assert len({load_manifest(folder).fingerprint for folder in shares.values()}) == len(shares)
    cached, image = RuntimeConfig(device="CPU", inference_precision="f32"), photograph("china.jpg")
    for _ in range(2):  # the second time from the cache
        for folder in shares.values():
            wanted = encoded(VLM(folder, F32), image)[1]
            np.testing.assert_allclose(encoded(VLM(folder, cached), image)[1], wanted, atol=1e-5)


def test_the_list_of_models_tells_what_is_merged(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    export(checkpoints("llava"), tmp_path / "models" / "merged", replace(QUICK, merge_tokens=0.25))
    [row] = [each for each in json.loads(cli("models", "--json").stdout) if each["name"] == "merged"]
    assert row["precision"].endswith("language fp32, 25% of vision tokens merged")


@pytest.mark.parametrize("share", ["0.25", "0.5"])
def test_the_bundled_model_still_reads_its_pictures(share: str, tmp_path: Path) -> None:
    arguments = ("export", PANEL, "--int8", "--merge-tokens", share, "--no-verify", "-o", tmp_path / "out", "--json")
    result = cli(*arguments)
    assert result.exit_code == 0, result.stderr
    vlm = VLM(tmp_path / "out")
    lines = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    wrong = []
    for line in lines:
        answer = vlm.generate(EXAMPLES / line["image"], line["question"]).text
        if not is_right(answer, line["answer"], line["tolerance"]):
            wrong.append((line["question"], line["answer"], answer))
    assert wrong == []


def test_a_share_that_is_not_offered_is_refused() -> None:
    with pytest.raises(OptionError, match=r"merge_tokens must be one of \(0, 0.25, 0.5\), not 0.3"):
        ExportOptions(merge_tokens=0.3)
    assert set(MERGED_SHARES) == {0, *LAYERS}


@pytest.mark.parametrize("via", ["optimum", "onnx"])
def test_other_routes_refuse_to_merge(via: Any) -> None:
    with pytest.raises(OptionError, match=f"--via {via} merges no tokens; leave out --merge-tokens"):
        ExportOptions(via=via, merge_tokens=0.5)


def test_a_checkpoint_without_safetensors_is_refused(checkpoints: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("idefics3"), tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    (folder / "onnx").mkdir()
    for name in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
        (folder / "onnx" / f"{name}.onnx").touch()
    with pytest.raises(OptionError, match="--merge-tokens needs safetensors, which the checkpoint lacks; leave it out"):
        export(folder, tmp_path / "out", ExportOptions("int8", merge_tokens=0.25))


def test_a_family_whose_views_differ_in_size_is_refused(tmp_path: Path) -> None:
    checkpoint = qwen_vl.make_checkpoint(tmp_path / "checkpoint", "qwen2_vl")
    message = "--merge-tokens needs views of one size, and those of family 'qwen2_vl' differ; leave it out"
    result = cli("export", checkpoint, "--merge-tokens", "0.25", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_an_encoder_of_too_few_layers_is_refused(idefics3: Path, tmp_path: Path) -> None:
    message = "--merge-tokens 0.5 needs a vision encoder of 5 layers, and this one runs 2; leave it out"
    with pytest.raises(OptionError, match=message):
        export(idefics3, tmp_path / "out", replace(QUICK, merge_tokens=0.5))
