"""Checkpoints made of others: larger, deeper, averaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.average import average
from training.data import Drawer, collate
from training.deepen import deepen
from training.enlarge import enlarge
from training.guide import Guide
from training.model import IMAGE_SIZE, IMAGE_TOKENS, PATCH, SIDE, load_model, make_config, make_model, save_checkpoint
from training.settings import GUIDE
from training.train import loss_of


def test_larger_pictures_keep_what_was_learned_from_smaller_ones(tokenizer: object, tmp_path: Path) -> None:
    config = make_config(tokenizer, 64, 1, 1)
    config.vision_config.image_size = 8 * PATCH
    old = make_model(config, seed=1)
    places = old.model.vision_model.embeddings.position_embedding.weight
    rows, columns = torch.arange(8.0).repeat_interleave(8), torch.arange(8.0).repeat(8)
    places.data[:, 0], places.data[:, 1] = rows / 7, columns / 7
    save_checkpoint(old, tokenizer, tmp_path / "old" / "checkpoint")
    Guide(old, "cpu").save(tmp_path / "old" / GUIDE)
    enlarge(tmp_path / "old" / "checkpoint", tmp_path / "new" / "checkpoint")
    new = load_model(tmp_path / "new" / "checkpoint")
    moved = new.model.vision_model.embeddings.position_embedding.weight.detach().view(SIDE, SIDE, -1)
    edge = -(-3 * SIDE // 16)
    inside = slice(edge, -edge)  # at the borders there is nothing to interpolate with
    wanted = ((torch.arange(SIDE) + 0.5) * 8 / SIDE - 0.5) / 7
    assert torch.allclose(moved[inside, :, 0], wanted[inside, None].expand(-1, SIDE), atol=0.01)
    assert torch.allclose(moved[:, inside, 1], wanted[None, inside].expand(SIDE, -1), atol=0.01)
    kept = {name: weight for name, weight in new.state_dict().items() if "position_embedding" not in name}
    before = load_model(tmp_path / "old" / "checkpoint").state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in kept.items())
    Guide(new, "cpu").load(tmp_path / "new" / GUIDE)
    assert new.model.vision_model(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)).last_hidden_state.shape[1] == IMAGE_TOKENS


def test_a_deeper_model_begins_with_the_answers_of_the_one_it_is_made_from(tokenizer: object, tmp_path: Path) -> None:
    old = make_model(make_config(tokenizer, 64, 1, 3), seed=1)
    save_checkpoint(old, tokenizer, tmp_path / "old" / "checkpoint")
    Guide(old, "cpu").save(tmp_path / "old" / GUIDE)
    deepen(tmp_path / "old" / "checkpoint", tmp_path / "new" / "checkpoint", text_layers=5, vision_layers=2)
    before, after = (load_model(tmp_path / name / "checkpoint") for name in ("old", "new"))
    layers = after.model.text_model.layers
    assert (len(layers), len(after.model.vision_model.encoder.layers)) == (5, 2)
    drawer = Drawer(tokenizer, seed=12)
    batch = collate([drawer.row(drawer.scene(0))])
    losses = [loss_of(model, batch, "cpu", bf16=False)[0] for model in (before, after)]
    assert torch.equal(*losses)
    for index, source in enumerate((0, 1, 1, 2, 2)):
        kept = before.model.text_model.layers[source]
        assert torch.equal(layers[index].mlp.up_proj.weight, kept.mlp.up_proj.weight)
    losses[1].backward()
    assert all(layer.mlp.down_proj.weight.grad.any() for layer in layers)  # the new ones learn from the first step on
    assert load_file(tmp_path / "new" / GUIDE).keys() == load_file(tmp_path / "old" / GUIDE).keys()
    guide = (tmp_path / "old" / GUIDE).read_bytes()
    deepen(tmp_path / "old" / "checkpoint", tmp_path / "old" / "deeper", text_layers=4, vision_layers=1)
    assert (tmp_path / "old" / GUIDE).read_bytes() == guide  # which both now lie beside


@pytest.mark.parametrize("layers", [1, 5])
def test_a_model_is_not_made_shallower_nor_more_than_twice_as_deep(
    layers: int, tokenizer: object, tmp_path: Path
) -> None:
    save_checkpoint(make_model(make_config(tokenizer, 64, 1, 2), seed=1), tokenizer, tmp_path / "old" / "checkpoint")
    with pytest.raises(SystemExit, match=f"2 layers of text_model.layers cannot become {layers}"):
        deepen(tmp_path / "old" / "checkpoint", tmp_path / "new" / "checkpoint", text_layers=layers)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_the_mean_of_two_checkpoints_is_one(share: float, tokenizer: object, tmp_path: Path) -> None:
    models = [make_model(make_config(tokenizer, 64, 1, 1), seed) for seed in (1, 2)]
    for name, model in zip(("one", "other"), models, strict=True):
        save_checkpoint(model, tokenizer, tmp_path / name / "checkpoint")
        guide = Guide(model, "cpu")
        guide.share.bias.data.fill_(len(name))
        guide.scale.bias.data.fill_(7.0)
        guide.save(tmp_path / name / GUIDE)
    old = {name: each for name, each in load_file(tmp_path / "one" / GUIDE).items() if "scale" not in name}
    save_file(old, tmp_path / "one" / GUIDE)
    average(*(tmp_path / name / "checkpoint" for name in ("one", "other", "mean")), share)
    mean = load_model(tmp_path / "mean" / "checkpoint").state_dict()
    for name, weight in mean.items():
        first, last = (model.state_dict()[name].bfloat16().float() for model in models)
        torch.testing.assert_close(weight, first + share * (last - first), rtol=1e-2, atol=1e-6)
    guide = load_file(tmp_path / "mean" / GUIDE)
    assert (guide["share.bias"] == 3.0 + share * 2.0).all()
    assert (guide["scale.bias"] == 7.0).all()
