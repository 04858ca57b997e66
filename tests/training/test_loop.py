"""The training loop: batches, rates, interruptions, Muon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.conftest import heed_interrupts
from tests.helpers.serving import wait_until
from training import attention
from training.__main__ import main
from training.data import Drawer, collate
from training.feed import LAG, _draw, _start_worker, batches, order
from training.guide import Gaze
from training.model import make_config, make_model
from training.muon import Muon
from training.settings import Settings
from training.train import Run, load_tokenizer, loss_of, rate_at, train


@pytest.mark.parametrize(("bf16", "near"), [(True, 1e-2), (False, 1e-5)])
def test_attention_gives_what_transformers_own_gives(tokenizer: object, bf16: bool, near: float) -> None:
    drawer = Drawer(tokenizer, seed=8)
    batch = collate([drawer.row(drawer.scene(index)) for index in range(4)])
    assert len(batch.counts)
    losses, grads = [], []
    for install in (lambda model: model.set_attn_implementation("eager"), attention.install):
        model = make_model(make_config(tokenizer, 64, 2, 3), seed=2)
        install(model)
        gaze = Gaze(model)
        loss, _ = loss_of(model, batch, "cpu", bf16)
        gazing = gaze.loss(batch)
        (loss + gazing).backward()
        losses.append((float(loss.detach()), float(gazing.detach())))
        grads.append({name: each.grad for name, each in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=near)
    for name, grad in grads[0].items():
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), grads[1][name].flatten(), 0)
        assert name.endswith("k_proj.bias") or float(cosine) > 1 - near, name  # which is zero, but for rounding


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = Settings(
        tmp_path / "run", pictures=24, batch=4, width=64, vision_layers=1, text_layers=1, stop_minutes=0
    )
    for _ in range(6):
        train(settings)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["counts"] == {"pictures": 24}
    whole = Settings(tmp_path / "whole", pictures=24, batch=4, width=64, vision_layers=1, text_layers=1)
    train(whole)
    once = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)
    for name, weight in once["model"].items():
        torch.testing.assert_close(state["model"][name], weight, rtol=1e-2, atol=1e-3)
    assert (tmp_path / "whole" / "checkpoint" / "model.safetensors").is_file()
    going_on = replace(whole, folder=tmp_path / "next", start=tmp_path / "whole" / "checkpoint")
    run = Run(going_on, load_tokenizer(going_on), "pictures")
    for layer, weights in run.guide.state_dict().items():
        for name, weight in weights.items():
            assert weight.any()
            torch.testing.assert_close(weight, once["guide"][layer][name].bfloat16().float())


def test_each_batch_is_learned_from_again_after_others() -> None:
    assert list(islice(order(2), LAG + 4)) == [*range(LAG), LAG, 0, LAG + 1, 1]
    assert list(islice(order(3), 3 * LAG, 3 * LAG + 3)) == [2 * LAG, LAG, 0]


def test_what_is_learned_from_again_is_the_same_after_a_stop(tokenizer: object, tmp_path: Path) -> None:
    settings = Settings(tmp_path, pictures=2 * (LAG + 6), batch=2, seed=4)
    whole = [[half.pixels for half in batch] for batch in batches(settings, tokenizer, 0)]
    assert all(np.array_equal(*pair) for pair in zip(whole[0], whole[LAG + 1], strict=True))
    assert len(whole) == LAG + 6
    rest = [[half.pixels for half in batch] for batch in batches(settings, tokenizer, 2 * (LAG + 3))]
    assert len(rest) == 3
    for one, two in zip(rest, whole[-3:], strict=True):
        assert all(np.array_equal(*pair) for pair in zip(one, two, strict=True))


@pytest.mark.skipif(os.name == "nt", reason="there is no group of processes to interrupt")
def test_ctrl_c_saves_what_was_learned(tmp_path: Path) -> None:
    small = "pictures=10**6, batch=4, warmup=1, width=64, vision_layers=1, text_layers=1, workers=2"
    code = (
        "from pathlib import Path; from training.settings import Settings; from training.train import train\n"
        f"if __name__ == '__main__': train(Settings(Path({str(tmp_path / 'run')!r}), {small}, save_minutes=1e-3))"
    )
    script = tmp_path / "run.py"
    script.write_text(code, encoding="utf-8")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, script],
        start_new_session=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509
        env=environment,
        stderr=subprocess.PIPE,
    ) as run:
        state = tmp_path / "run" / "state.pt"
        try:
            wait_until(state.is_file, 300)  # a tokenizer is trained before
            state.unlink()  # another comes at once, and the last one with the interrupt
            os.killpg(run.pid, signal.SIGINT)
            _, errors = run.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)  # what hangs fails, and does not hang the tests
    assert b"KeyboardInterrupt" in errors
    assert torch.load(state, weights_only=True)["counts"]["pictures"] > 0


def test_sheets_teach_the_tower_and_leave_the_text_part_alone(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "run", pictures=8, batch=4, warmup=1, width=64, vision_layers=1, text_layers=1)
    tokenizer = load_tokenizer(settings)
    before = Run(settings, tokenizer, "sheets").model.state_dict()
    train(settings, sheets=True)
    run = Run(settings, tokenizer, "sheets")
    assert run.seen == 8
    assert Run(settings, tokenizer, "pictures").seen == 0
    changed = {name for name, weight in run.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert all("vision_model" in name for name in changed)


def test_batches_come_in_order_whatever_the_workers(tokenizer: object, tmp_path: Path) -> None:
    def pixels(workers: int) -> Iterator[np.ndarray]:
        settings = Settings(tmp_path, pictures=12, batch=4, workers=workers, seed=4)
        return (half.pixels for batch in batches(settings, tokenizer, 0) for half in batch)

    for one, two in zip(pixels(1), pixels(2), strict=True):
        assert np.array_equal(one, two)


def test_the_rate_warms_up_stays_and_falls() -> None:
    settings = Settings(Path(), pictures=1000, warmup=100, decay=0.2)
    assert [round(rate_at(seen, settings), 3) for seen in (0, 50, 100, 500, 800, 900, 1000)] == [
        0,
        0.5,
        1,
        1,
        1,
        0.5,
        0,
    ]


def test_a_run_bounded_in_time_falls_by_the_clock(tmp_path: Path) -> None:
    settings = Settings(Path(), pictures=1000, warmup=100, decay=0.2, minutes=10)
    assert [round(rate_at(500, settings, minutes), 3) for minutes in (0, 8, 9, 10, 11)] == [1, 1, 0.5, 0, 0]
    assert rate_at(900, settings, 1) == pytest.approx(0.5)
    small: dict[str, Any] = {"batch": 4, "width": 64, "vision_layers": 1, "text_layers": 1, "warmup": 1}
    train(Settings(tmp_path / "run", pictures=10**6, minutes=1e-3, **small))
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert 4 <= state["counts"]["pictures"] < 10**6
    assert state["minutes"]["pictures"] > 1e-3
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()
    settings = Settings(tmp_path / "run", pictures=10**6, **small)
    assert Run(settings, load_tokenizer(settings), "pictures").minutes == state["minutes"]["pictures"]
    assert Run(settings, load_tokenizer(settings), "sheets").minutes == 0  # another stage has its own time


@pytest.mark.parametrize("option", ["--minutes", "--warmup", "--pictures", "--decay"])
def test_a_run_of_no_length_is_refused_in_a_line(option: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["train", str(tmp_path / "run"), option, "0"])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_matrices_of_one_shape_move_as_torch_s_muon_moves_them_one_by_one() -> None:
    random = torch.Generator().manual_seed(5)
    shapes = [(48, 48), (48, 48), (96, 32), (32, 96), (96, 32)]
    begun = [torch.randn(shape, generator=random) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(each.clone()) for each in begun] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.01, "momentum": 0.95}
    optimisers = [Muon(ours, **settings), torch.optim.Muon(theirs, **settings)]
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = other.grad = torch.randn(one.shape, generator=random)
        for optimiser in optimisers:
            optimiser.step()
    for before, one, other in zip(begun, ours, theirs, strict=True):
        assert float((one.detach() - before).norm()) > 0.05
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_pictures_for_a_gpu_come_in_shared_memory(tokenizer: object, tmp_path: Path) -> None:
    settings = Settings(tmp_path, pictures=4, batch=4, seed=4)
    with torch.multiprocessing.get_context("spawn").Pool(1, _start_worker, (tokenizer, settings, False, True)) as pool:
        drawn = pool.apply(_draw, (0,))
    [plain] = batches(settings, tokenizer, 0)
    for one, other in zip(drawn, plain, strict=True):
        assert one.pixels.is_shared()
        assert np.array_equal(one.pixels.numpy(), other.pixels)
        assert np.array_equal(one.labels, other.labels)
