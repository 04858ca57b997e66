"""What a timing was taken under: who used the cores, and when a thread starved."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edgevlm.bench.conditions import Conditions, Meter, describe_machine, load_average, machine_line
from edgevlm.runtime.cpu import cpu_features

ROOT = Path(__file__).parents[1]
QUIET = Conditions(
    threads=2,
    cores=2,
    wall_s=0.82,
    cpu_s=1.62,
    thread_cpu_s=(0.82, 0.80),
    others_cpu_s=0.01,
    load_before=0.3,
    load_after=1.2,
)
STARVED = replace(QUIET, wall_s=1.20, cpu_s=1.19, thread_cpu_s=(1.16, 0.03), others_cpu_s=1.15, load_before=3.1)
"""60 decode steps of two threads with another process busy on one of two cores."""


def test_two_threads_on_two_quiet_cores_do_not_starve() -> None:
    assert QUIET.cores_used == pytest.approx(1.98, abs=0.01)
    assert not QUIET.busy
    assert not QUIET.starved


def test_a_second_thread_without_a_core_starves() -> None:
    assert STARVED.busy
    assert STARVED.starved


@pytest.mark.parametrize(
    ("what", "conditions"),
    [
        ("one thread has its core", replace(STARVED, threads=1, thread_cpu_s=(1.16,))),
        ("the program computes with one thread, the other core idles", replace(STARVED, others_cpu_s=0.2)),
        ("many cores are left", replace(STARVED, cores=16)),
        ("others took a little", replace(STARVED, cpu_s=1.9, thread_cpu_s=(0.99, 0.91), others_cpu_s=0.4)),
        ("too short for the clock to tell", replace(STARVED, wall_s=0.1, cpu_s=0.1, others_cpu_s=0.09)),
        ("nothing was measured", replace(STARVED, wall_s=0.0, cpu_s=0.0, others_cpu_s=0.0)),
    ],
)
def test_it_is_not_called_starving_where(what: str, conditions: Conditions) -> None:
    assert not conditions.starved, what


@pytest.mark.parametrize(
    ("what", "conditions"),
    [
        ("the system tells no threads", replace(STARVED, thread_cpu_s=())),
        ("more threads than cores were asked for", replace(STARVED, threads=8)),
        (
            "one of four threads is behind, though three quarters of the time were used",
            Conditions(4, 4, 1.0, 3.2, (1.0, 1.0, 1.0, 0.2), 0.8, None, None),
        ),
        ("there is no load average", replace(STARVED, load_before=None, load_after=None)),
    ],
)
def test_it_is_called_starving_where(what: str, conditions: Conditions) -> None:
    assert conditions.starved, what


def test_a_line_tells_all_of_it() -> None:
    assert QUIET.line == (
        "1.98 cores used by 2 threads of 2 cores (CPU 1.62 s, wall 0.82 s), 0.00 by others, load 0.3 before, 1.2 after"
    )
    assert STARVED.line.endswith("busy machine, a thread starved (1.16 + 0.03 s)")
    assert "load not known before" in replace(QUIET, load_before=None).line


def test_json_keeps_it() -> None:
    assert Conditions.from_dict(json.loads(json.dumps(STARVED.to_dict()))) == STARVED


def test_measurements_add_up() -> None:
    both = Conditions.together([QUIET, STARVED])
    assert both.wall_s == pytest.approx(2.02)
    assert both.thread_cpu_s == pytest.approx((1.98, 0.83))
    assert (both.load_before, both.load_after) == (0.3, 1.2)


def test_a_meter_sees_this_process_and_a_busy_neighbour() -> None:
    meter = Meter(1)
    with meter.part():
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass
    own = meter.conditions
    assert own.cpu_s >= 0.3
    assert own.wall_s >= own.cpu_s * 0.9
    assert len(own.thread_cpu_s) == 1
    idle = Meter(1)
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as child:
        try:
            assert child.stdout
            child.stdout.readline()
            with idle.part():
                time.sleep(1)
        finally:
            child.kill()
    assert idle.conditions.busy
    assert idle.conditions.cores_of_others > idle.conditions.cores_used


def test_threads_left_to_the_runtime_are_the_cores() -> None:
    assert Meter(None).threads >= 1


def test_the_machine_is_described_in_a_line() -> None:
    machine = describe_machine()
    assert machine["isa"] == list(cpu_features())
    line = machine_line(machine)
    assert f"{machine['cores']} cores" in line
    assert "not recorded" not in line
    del machine["isa"]
    assert "instruction sets: not recorded" in machine_line(machine)


def test_the_load_is_a_number_or_unknown() -> None:
    load = load_average()
    assert load is None or load >= 0


def test_it_can_be_imported_without_openvino_or_edgevlms_other_dependencies() -> None:
    code = "import json, sys, benchmarks.child; print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"openvino", "numpy", "msgspec", "tokenizers", "archspec"} & set(json.loads(done.stdout))
