"""Stage loop on several machines: processes of this one, started as torchrun starts the first process of each."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.pretend_gpu import NOT_HERE
from tests.untrained import untrained_run
from worldenv import config, presets
from worldenv.checkpoint import CheckpointError
from worldenv.learning.processes import Machines
from worldenv.rollout.store import RolloutStore, stored
from worldenv.run import settings_of
from worldenv.stages.desk import LOOP_NUMBERS
from worldenv.stages.loop import log_path, logs
from worldenv.stages.replay import replay

ROOT = Path(__file__).parents[1]
LOOP = dataclasses.replace(presets.TINY.loop, group=2, contexts=3, iterations=2, batch=3, hard_share=0.0, warmup=0, snapshot_every=1)
SETTINGS = dataclasses.replace(presets.TINY, device="cpu", env=dataclasses.replace(presets.TINY.env, steps=16), loop=LOOP)
NUMBERS = [LOOP_NUMBERS + n for n in range(12)]
"""Of the rollouts of two iterations."""
SOUND = ("sound",)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process went."""

    code: int
    said: str
    made: list[tuple[str, int]]
    """Log and number of every rollout that it finished, in that order."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def train(out: Path, *faults: Sequence[str], within: Sequence[str] = ()) -> list[Ended]:
    """Stage loop of the run in `out`, by as many machines as faults are given (tests/machine.py); `within` is a module that runs it."""
    port = free_port()
    notes = [out.parent / f"{out.name}.notes.{rank}" for rank in range(len(faults))]
    started = []
    for rank, (fault, file) in enumerate(zip(faults, notes, strict=True)):
        file.write_text("")
        here = {"RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "WORLD_SIZE": len(faults), "MASTER_PORT": port}
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in here.items()}}
        command = [sys.executable, "-m", *within, "tests.machine", str(out), str(file), *fault]
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    ended = []
    for process, file in zip(started, notes, strict=True):
        _, said = process.communicate(timeout=300)
        made = [(log, int(number)) for log, number in (line.split() for line in file.read_text().splitlines())]
        ended.append(Ended(process.returncode, said, made))
    return ended


def outcome(out: Path) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Of stage loop: metrics, and every file that it left, by its bytes."""
    record = json.loads((out / "stages" / "loop" / "stage.json").read_text())
    return record["metrics"], record["output"], record["files"]


def machines_of(out: Path) -> int:
    """That made its rollouts, by stage loop's record."""
    machines: int = json.loads((out / "stages" / "loop" / "stage.json").read_text())["timings"]["machines"]
    return machines


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run before stage loop."""
    return untrained_run(tmp_path_factory.mktemp("machines") / "begun", SETTINGS)


@pytest.fixture(scope="module")
def alone(begun: Path) -> Path:
    """The same after it, on one machine."""
    out = begun.parent / "alone"
    shutil.copytree(begun, out)
    (one,) = train(out, SOUND)
    assert (one.code, sorted(number for _, number in one.made)) == (0, NUMBERS), one.said
    for iteration in outcome(out)[0]["history"]:  # there is something to learn, and so something to send
        assert iteration["grad_norm_lora"] > 0.1
        assert 0 < iteration["imagined_success"] < 1
    return out


def test_every_rollout_is_dealt_to_one_machine() -> None:
    for count in range(1, 6):
        for missing in ([], NUMBERS[:1], NUMBERS[:7], NUMBERS):
            parts = [Machines(number, count).dealt(missing) for number in range(count)]
            assert sorted(itertools.chain(*parts)) == missing
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_logs_are_those_of_all_machines_and_of_one_iteration(tmp_path: Path) -> None:
    for iteration in (100, 1000, 10000):
        for machine in (0, 1, 12):
            log_path(tmp_path, iteration, machine).touch()
    assert [path.name for path in logs(tmp_path, 1000)] == ["iteration-1000.1.log", "iteration-1000.12.log", "iteration-1000.log"]
    assert logs(tmp_path, 3) == []


def test_a_log_has_one_writer(tmp_path: Path) -> None:
    """Of a machine that hears of the end of its run when its part is done, and goes on after the next run has begun."""
    first = RolloutStore(tmp_path / "log")
    with pytest.raises(CheckpointError, match=r"log: another process, of a run that was stopped, still writes it"):
        RolloutStore(tmp_path / "log")
    first.close()
    RolloutStore(tmp_path / "log").close()


def begin(begun: Path, name: str) -> Path:
    shutil.copytree(begun, begun.parent / name)
    return begun.parent / name


def test_two_machines_learn_what_one_learns_bit_for_bit(begun: Path, alone: Path) -> None:
    out = begin(begun, "two")
    both = train(out, SOUND, SOUND)
    assert [one.code for one in both] == [0, 0], [one.said for one in both]
    assert outcome(out) == outcome(alone)
    assert len(outcome(out)[0]["history"]) == 2
    for iteration in range(2):  # each made half, and nobody what another made
        numbers = [[n for log, n in one.made if log == log_path(out, iteration, machine).name] for machine, one in enumerate(both)]
        assert [len(some) for some in numbers] == [3, 3]
        assert sorted(itertools.chain(*numbers)) == NUMBERS[6 * iteration : 6 * iteration + 6]
    assert machines_of(out) == 2
    assert both[1].said == ""


def test_a_machine_that_fails_ends_the_run_with_a_line_that_names_it(begun: Path) -> None:
    out = begin(begun, "failing")
    leader, other = train(out, SOUND, ("blind",))
    assert (leader.code, other.code) == (1, 1)
    (line,) = [line for line in leader.said.splitlines() if line.startswith("worldenv-train: ")]
    assert line.startswith(f"worldenv-train: process 1 on {platform.node()}: RolloutError: rollout ")
    assert "no light here" in line
    (line,) = other.said.splitlines()  # though it is quiet else
    assert re.match(r"worldenv-train: rollout \d+ of group \d+ \(seed 0\): .*no light here", line)
    kept = [one.number for one in stored(log_path(out / "stages" / "loop", 0))]
    assert kept == [number for _, number in leader.made]
    assert sorted(kept) == NUMBERS[0:6:2]


FROZEN = """
import datetime, sys, time
import torch
from worldenv import distributed
from worldenv.learning import processes
processes.STEP_PATIENCE = datetime.timedelta(seconds=2)
with distributed.joined():
    if processes.rank() == 0:
        time.sleep(4)
    print(processes.agreed("sft"), flush=True)  # whatever the leader does alone, they wait
    if processes.rank() == 1:
        time.sleep(60)
    try:
        processes.total(1.0, torch.device("cpu"))
    except processes.ProcessError as error:
        print(error, flush=True)
"""


def test_a_machine_that_is_frozen_is_noticed() -> None:
    """It closes no connection."""
    here, started = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, []
    for rank in ("0", "1"):
        env = {**here, "RANK": rank, "LOCAL_RANK": rank}
        started.append(subprocess.Popen([sys.executable, "-c", FROZEN], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True))
    said = started[0].communicate(timeout=60)[0].splitlines()
    started[1].kill()
    assert said[0] == started[1].communicate()[0].splitlines()[0] == "sft"
    assert said[1].startswith(f"process 0 on {platform.node()}: another process says nothing any more: is its machine frozen, or its network gone?")


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_a_machine_that_is_gone_ends_the_run(gone: int, begun: Path) -> None:
    out = begin(begun, f"gone {gone}")
    faults = [SOUND, SOUND]
    faults[gone] = ("dies", "1", "1")
    both = train(out, *faults)
    assert both[gone].code == -signal.SIGKILL
    left = both[1 - gone]
    assert left.code == 1
    assert f"process {1 - gone} on {platform.node()}: another process has ended before its time" in left.said.splitlines()[-1]
    assert len(left.made) == 6, "its own part of both iterations"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_a_run_that_is_killed_goes_on_with_another_number_of_machines(before: int, after: int, begun: Path, alone: Path) -> None:
    out = begin(begun, f"{before} then {after}")
    killed = train(out, *[("dies", "1", "1")] * before)
    assert [one.code for one in killed] == [-signal.SIGKILL] * before
    kept = {one.number for log in logs(out / "stages" / "loop", 1) for one in stored(log)}
    assert len(kept) == before
    for number in kept:
        assert replay(out, settings_of(out), number)["bit_equal"]
    resumed = train(out, *[SOUND] * after)
    assert [one.code for one in resumed] == [0] * after, [one.said for one in resumed]
    assert sorted([*kept, *(number for one in resumed for _, number in one.made)]) == NUMBERS[6:]
    assert outcome(out) == outcome(alone)


TRUE = dataclasses.replace(SETTINGS, loop=dataclasses.replace(LOOP, control="true-simulator"))
ENGINES = dataclasses.replace(SETTINGS, engines=config.EnginesConfig(back_end="onnxruntime"))
GPUS = dataclasses.replace(SETTINGS, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "within"),
    [
        (TRUE, []),
        (ENGINES, []),
        pytest.param(GPUS, ["tests.pretend_gpu"], marks=pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)),
    ],
    ids=["a scene of its own", "engines", "pretended GPUs"],
)
def test_each_machine_has(settings: config.RunConfig, within: list[str], tmp_path: Path) -> None:
    """Of its own: a true environment; engines, of those plans that the leader chose; two GPUs, whose copies of the policy get the weights, too."""
    outcomes = []
    for machines in (1, 2):
        out = untrained_run(tmp_path / f"{machines}", settings)
        if (built := tmp_path / "1" / "engines").is_dir() and machines > 1:  # which takes a minute
            shutil.copytree(built, out / "engines")
        ended = train(out, *[SOUND] * machines, within=within)
        assert [one.code for one in ended] == [0] * machines, [one.said for one in ended]
        outcomes.append(outcome(out))
    assert outcomes[0] == outcomes[1]
    assert {one["back_end"] for one in outcomes[0][0]["engines"].values()} == {"onnxruntime" if settings is ENGINES else "eager"}


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun_with_two_processes_on_each_machine(machines: int, begun: Path, alone: Path) -> None:
    """As docs/scheduler.md has it; of each machine's processes one waits."""
    out, port = begin(begun, f"torchrun {machines}"), free_port()
    flags = ["--nnodes", str(machines), "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [sys.executable, "-m", "torch.distributed.run", *flags, "--node-rank", "{}", "-m", "worldenv.cli.train", "--resume", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([part.format(node) for part in command] + ["--only", "loop"], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        for node in range(machines)
    ]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * machines, said
    assert outcome(out) == outcome(alone)
    assert machines_of(out) == machines
