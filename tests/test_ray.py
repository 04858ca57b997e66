"""A batch on a Ray cluster, one of several processes on this machine; skipped where Ray is not installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.helpers.batches import lines, questions, read, start, wait_for, write
from tests.helpers.command import POSIX, cli

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture
def folder(twelve_pictures: Path) -> Path:
    """A folder of twelve pictures."""
    return twelve_pictures


def models_of(process: psutil.Process) -> list[psutil.Process]:
    """Return the cluster's processes that hold a model."""
    found = []
    for each in process.children(recursive=True):
        try:
            found += [each] if "ray::RayWorker" in " ".join(each.cmdline()) else []
        except psutil.Error:
            continue
    return found


@POSIX
@needs_ray
def test_a_worker_killed_half_way_is_made_up_for(exported: Path, folder: Path) -> None:
    write(folder / "jobs.jsonl", questions(120))
    process = start(folder, exported, "--ray", "local", "--workers", "2", "--threads", "1", "--json")
    wait_for(lambda: lines(folder / "out.jsonl") > 20, process)
    first, second = models_of(psutil.Process(process.pid))
    first.kill()
    assert lines(folder / "out.jsonl") < 120
    wait_for(lambda: lines(folder / "out.jsonl") > 90, process)
    assert second.is_running()
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout.count(b"\n") == 1, stdout
    assert json.loads(stdout) == {"jobs": 120, "answered": 120, "failed": 0, "resumed": 0}
    assert [row["id"] for row in read(folder / "out.jsonl")] == list(range(120))


@needs_ray
def test_no_such_cluster_is_one_line(exported: Path, folder: Path) -> None:
    write(folder / "jobs.jsonl", questions(2))
    out = folder / "out.jsonl"
    result = cli("batch", folder / "jobs.jsonl", "-o", out, "-m", exported, "--ray", "127.0.0.1:9")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no Ray cluster at 127.0.0.1:9: ")
    assert not out.exists()


def test_without_ray_the_extra_is_named(exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.jobs.ray.find_spec", lambda _: None)
    write(folder / "jobs.jsonl", questions(2))
    result = cli("batch", folder / "jobs.jsonl", "-o", folder / "out.jsonl", "-m", exported, "--ray", "auto")
    assert result.exit_code == 1
    assert result.stderr == "Error: a Ray cluster needs ray; install it with: pip install 'edgevlm[ray]'\n"
