"""On GPUs, real or pretended (tests/pretend_gpu.py): they compute what the CPU computes, and rollouts do not depend on how many there are."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import random
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_reward_head
import test_sft
import torch
from small_policy import SMALL, observation, small_policy
from test_reflector import SMALL as SMALL_REFLECTOR
from test_rollout_bits import CPU, GROUP, SEED, SMALL_SIMULATOR, Plant, assert_same, fly, networks, plant
from test_simulator import trained
from test_world_model import Kept, trained_simulator, trained_vae

from worldenv import noise
from worldenv.benchmarks import engine_rows
from worldenv.config import LoopConfig, ScaleConfig
from worldenv.learning.loop.update import Learner
from worldenv.learning.reward_head import fit_head, train_backbone
from worldenv.learning.scale_head import fit_scale_head
from worldenv.learning.sft import sft, untrained
from worldenv.nouns import Rollout
from worldenv.policy import lora
from worldenv.presets import TINY
from worldenv.robots.tabletop import TABLETOP
from worldenv.rollout.collect import Flight, Replica, Schedule, placement
from worldenv.run import Run, RunError
from worldenv.stages import fleet
from worldenv.stages.desk import Desk

pytestmark = pytest.mark.gpu
PRETENDED = "WORLDENV_PRETENDED_GPU" in os.environ
GPU = torch.device("cuda")
POLICY = dataclasses.replace(SMALL, chunk=SMALL_SIMULATOR.chunk)
ATOL = 1e-4 if PRETENDED else 1e-3
"""Real ones round otherwise; pretended ones take attention apart."""


def rows_stand_alone() -> bool:
    """Whether a product's row has the same bits whatever the others are: the pretended GPU's products are MKL's, whose rows do on Intel's machines
    and do not on AMD's, in small odd shapes.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(15, 7, generator=generator), torch.randn(7, 17, generator=generator)
    return all(torch.equal((a @ b)[row], (a[row].expand(count, 7).contiguous() @ b)[0]) for row in range(15) for count in (1, 2, 3, 5, 15))


EXACT = PRETENDED and rows_stand_alone()


def on(device: torch.device) -> Replica:
    return networks(POLICY, trained(SMALL_SIMULATOR), SMALL_REFLECTOR, small_policy, device)


@pytest.fixture(scope="module")
def one() -> Plant:
    """By a plain loop on the first GPU."""
    return plant(on(torch.device("cuda", 0)), SMALL_SIMULATOR, 3, 2)


REFUSED: dict[str, Callable[[torch.Tensor], object]] = {
    "sum": lambda there: there + torch.ones(3),
    "product": lambda there: torch.ones(3) * there,
    "stack": lambda there: torch.stack([there, torch.ones(3)]),
    "stack of numbers": lambda there: torch.stack([there[0], torch.tensor(1.0)]),
    "number of another GPU": lambda there: there + torch.tensor(1.0, device="cuda:1"),
    "values put": lambda there: there.index_put_((torch.tensor([0]),), torch.ones(1)),
    "index": lambda there: torch.ones(3)[torch.zeros(1, dtype=torch.int64, device=GPU)],
    "linear": lambda there: torch.nn.Linear(3, 2)(there),
    "other GPU": lambda there: there + torch.ones(3, device="cuda:1"),
    "no such GPU": lambda there: torch.ones(3, device="cuda:9"),
    "generator of a GPU": lambda there: torch.zeros(3).normal_(generator=torch.Generator(GPU)),
    "generator of a CPU": lambda there: there.normal_(generator=torch.Generator()),
    "numpy": lambda there: there.numpy(),
    "asarray": lambda there: np.asarray(there),
    "from_numpy": lambda there: torch.from_numpy(np.ones(3, np.float32)) - there,
}


@pytest.mark.skipif(not PRETENDED, reason="asks the pretended GPU whether it is as strict as a real one")
@pytest.mark.parametrize("name", REFUSED)
def test_pretended_gpus_refuse_what_real_ones_refuse(name: str) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[name](torch.zeros(3, device=GPU))


@pytest.mark.skipif(not PRETENDED, reason="asks the pretended GPU whether it allows what a real one allows")
def test_pretended_gpus_allow_what_real_ones_allow() -> None:
    there = torch.arange(3.0, device=GPU)
    assert (there + torch.tensor(1.0)).tolist() == [1, 2, 3]
    assert there[torch.tensor([2, 0])].cpu().tolist() == [2, 0]
    assert torch.zeros(3).copy_(there).tolist() == there.to("cuda:1").tolist() == [0, 1, 2]
    there[1:] *= 5
    assert float(there.sum()) == 15.0
    drawn = [torch.randn(3, device=GPU, generator=torch.Generator(GPU).manual_seed(seed)).tolist() for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
    layer = torch.nn.Conv2d(1, 2, 3, padding=1).to(GPU)
    picture = torch.ones(1, 1, 4, 4, device=GPU)
    want = torch.nn.functional.conv2d(picture.cpu(), layer.weight.cpu(), layer.bias.cpu(), padding=1)  # type: ignore[union-attr]
    got = layer(picture)
    assert torch.equal(got.cpu(), want)
    got.square().mean().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.device == torch.device("cuda", 0)


def close(got: torch.Tensor, want: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(got.cpu().float(), want.float(), atol=atol, rtol=0.0)


def test_a_policy_acts_there_as_on_the_cpu() -> None:
    here, there = small_policy(), small_policy()
    there.network.to(GPU)
    uniform = torch.from_numpy(noise.uniform(SEED, np.arange(3), 0, 0, noise.Stream.POLICY, (SMALL.chunk, 7)))
    with torch.no_grad():
        want, got = here.act(observation(3), uniform), there.act(observation(3), uniform)
    for field in dataclasses.fields(want):
        close(getattr(got, field.name), getattr(want, field.name), ATOL)


def _tuned(path: Path, dies_at: int | None = None) -> tuple[torch.nn.Module, dict[str, Any]]:
    shown = test_sft.episodes()
    policy = untrained(SMALL, shown, test_sft.INSTRUCTIONS, TABLETOP, 0, GPU)
    return policy.network, sft(policy, shown, TABLETOP, test_sft.LORA, 0, Kept(path, dies_at))


def _scaled(path: Path, dies_at: int | None = None) -> tuple[torch.nn.Module, dict[str, Any]]:
    shown = test_sft.episodes()
    policy = untrained(SMALL, shown, test_sft.INSTRUCTIONS, TABLETOP, 0, GPU)
    return policy.network, fit_scale_head(policy, shown, TABLETOP, ScaleConfig(steps=6), 0, Kept(path, dies_at))


def _judging(path: Path, dies_at: int | None = None) -> tuple[torch.nn.Module, dict[str, Any]]:
    judge, config = test_reward_head.reflector().to(GPU), dataclasses.replace(test_reward_head.QUICK, backbone_steps=6, backbone_batch=8)
    return judge.llava, train_backbone(judge, test_reward_head.TRAIN, config, 0, Kept(path, dies_at))


def _headed(path: Path, dies_at: int | None = None) -> tuple[torch.nn.Module, dict[str, Any]]:
    judge, config = test_reward_head.reflector().to(GPU), dataclasses.replace(test_reward_head.QUICK, head_epochs=6, embeddings=40)
    metrics = fit_head(judge, test_reward_head.TRAIN, config, 0, Kept(path, dies_at))
    assert judge.head is not None
    return judge.head, metrics


STAGES: dict[str, Callable[..., tuple[torch.nn.Module, dict[str, Any]]]] = {
    "sft": _tuned, "scale head": _scaled, "reflector": _judging, "reward head": _headed, "autoencoder": functools.partial(trained_vae, device=GPU),
    "simulator": functools.partial(trained_simulator, device=GPU),
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_killed_there_goes_on_there(stage: str, tmp_path: Path) -> None:
    """What comes back from a file is on the CPU first."""
    whole, want = STAGES[stage](tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        STAGES[stage](tmp_path / "killed", dies_at=4)
    again, got = STAGES[stage](tmp_path / "killed")
    assert str(got) == str(want) or not PRETENDED
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0 if PRETENDED else 1e-2)


def test_merged_weights_leave_the_gpu_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second policy beside the one that learns, at each save, would be 15 GB of the published size."""
    network = small_policy().network.to(GPU)
    lora.attach(network, 2, 4, 0)
    here, there, add = lora.merged(network.cpu()), network.to(GPU), lora._sum
    made, most = list[weakref.ref[torch.Tensor]](), 0

    def watched(weight: torch.Tensor, delta: torch.Tensor, sign: float) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(one() is not None for one in made))
        made.append(weakref.ref(total := add(weight, delta, sign)))
        assert total.device.type == "cuda"
        return total

    monkeypatch.setattr(lora, "_sum", watched)
    merged = lora.merged(there)
    assert len(made) == len(lora.targets(small_policy().network)) > most
    assert most <= 1
    for name, tensor in merged.items():
        assert tensor.device == CPU
        close(tensor, here[name], 1e-6)


def test_random_networks_of_benchmarks_are_drawn_where_they_run() -> None:
    """Weights of billions take minutes on a CPU. What is no weight is float32 and right, as rotary frequencies are."""
    there, here = (engine_rows.Setting(device, torch.bfloat16, "tiny") for device in (GPU, CPU))
    for made in (engine_rows.random_policy(TINY.policy, there).network, engine_rows.random_reflector(TINY.reflector, there).llava):
        assert {one.device.type for one in (*made.parameters(), *made.buffers())} == {"cuda"}
        assert all(bool(torch.isfinite(one.float()).all()) and bool(one.any()) for one in made.parameters() if one.dim() > 1)
    want = dict(engine_rows.random_reflector(TINY.reflector, here).llava.named_buffers())
    for name, buffer in made.named_buffers():
        assert buffer.dtype == want[name].dtype
        close(buffer, want[name], 1e-6)


@pytest.mark.parametrize("gpus", [1, 2])
def test_an_update_is_there_what_it_is_on_the_cpu(one: Plant, gpus: int) -> None:
    """LOOP on the rollouts of a plain loop: metrics, and weights after it."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    rollouts = [flight.rollout() for flight in one.want.values()]

    def learned(device: torch.device) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        policy = small_policy(POLICY)
        policy.network.to(device)
        learner = Learner(policy, LoopConfig(group=GROUP, contexts=3, batch=4, microbatch=3), SEED)
        if device == GPU:
            learner.share([fleet._copied(learner.policy, torch.device("cuda", number)) for number in range(1, gpus)])
        return learner.update(rollouts, 0), learner.tree()["trained"]

    (want, weights), (got, there) = learned(CPU), learned(GPU)
    assert got == pytest.approx(want, rel=1e-4, abs=1e-3)  # the heads' gradient has a norm of 70 here
    off = torch.cat([(there[name].cpu() - tensor).abs().flatten() for name, tensor in weights.items()])
    # Adam makes a step of its full length, 1e-4, also of what rounding leaves of a gradient of zero
    assert float((off > 2e-5).float().mean()) < 0.05
    assert float(off.max()) < 1e-3
    before = Learner(small_policy(POLICY), LoopConfig(group=GROUP, contexts=3, batch=4), SEED).tree()["trained"]
    moved = torch.cat([(before[name] - tensor).abs().flatten() for name, tensor in weights.items()])
    assert float((moved > 2e-5).float().mean()) > 0.5


def same(got: Rollout, want: Rollout) -> None:
    """As on one GPU, whose sums run in another order where batches have other company: a few pixels then round the other way, and one of these
    was seen to move an action by 1.2e-3. Another rollout's noise moves it by more than 0.1.
    """
    assert (got.number, got.stopped, got.steps) == (want.number, want.stopped, want.steps)
    close(got.frame, want.frame, 2.0)
    for name in ("action", "log_prob", "score"):
        close(getattr(got, name), getattr(want, name), 5e-3)


def as_on_one(made: dict[int, Flight], one: Plant) -> None:
    assert made.keys() == one.want.keys()
    for number, flight in made.items():
        if EXACT:
            assert_same(flight, one.want[number])
        same(flight.rollout(), one.want[number].rollout())


@pytest.mark.parametrize("gpus", [1, 2])
def test_rollouts_do_not_depend_on_the_number_of_gpus(one: Plant, gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    replicas = [one.replica, *(on(torch.device("cuda", number)) for number in range(1, gpus))]
    made, statistics = fly(one, Schedule(6, one.bucket, 1, "always", streams=2), replicas)
    as_on_one(made, one)
    queries = [query for flight in made.values() for query in flight.queries]
    everywhere = {torch.device("cuda", number) for number in range(gpus)}
    assert {query.action.device for query in queries} == {query.made.frames.device for query in queries if query.made} == everywhere
    assert {row["device"] for row in statistics["stages"] if row["items"]} == set(range(gpus))


@pytest.mark.parametrize("alone", ["simulator", "reflector"])
def test_rollouts_do_not_depend_on_which_gpu_has_which_network(one: Plant, alone: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    replicas = []
    for replica, parts in zip([one.replica, on(torch.device("cuda", 1))], placement(2, alone, 1), strict=True):
        world = copy.copy(replica.world)
        for part in {"simulator", "reflector"} - parts:
            setattr(world, {"simulator": "_simulated", "reflector": "_reflector"}[part], None)
        replicas.append(dataclasses.replace(replica, world=world, parts=parts))
    made, statistics = fly(one, Schedule(6, one.bucket, 1, "always", streams=2), replicas)
    as_on_one(made, one)
    stages = {"simulator": {"encode", "denoise", "decode"}, "reflector": {"reflector"}}[alone]
    assert {row["stage"] for row in statistics["stages"] if row["items"] and row["device"] == 1} == stages
    queries = [query for flight in made.values() for query in flight.queries]
    assert {query.action.device for query in queries} == {torch.device("cuda", 0)}
    assert {query.made.frames.device for query in queries if query.made} == {torch.device("cuda", int(alone == "simulator"))}


@pytest.mark.skipif(not PRETENDED, reason="has kernels fail that were queued well")
def test_a_batch_whose_kernels_fail_has_changed_nothing(one: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU tells of it when the host waits for them, after the batch's Python has ended."""
    dice, lock, failed = random.Random(3), threading.Lock(), []

    def synchronize(stream: Any) -> None:
        with lock:
            if dice.random() < 0.2:
                failed.append(stream)
                raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda.Stream, "synchronize", synchronize)
    made, statistics = fly(one, Schedule(6, one.bucket, 1, "always", attempts=50, streams=2), [one.replica])
    as_on_one(made, one)
    assert len(failed) == sum(row["failures"] for row in statistics["stages"]) > 9


@pytest.mark.skipif(not PRETENDED, reason="looks at the streams that were made")
@pytest.mark.parametrize(("streams", "want"), [(1, {0}), (2, {0, -1})])
def test_stages_that_run_at_once_have_streams_of_their_own(one: Plant, streams: int, want: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    waited: set[Any] = set()
    order: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", order.append)
    torch.cuda.Stream.taken.clear()  # type: ignore[attr-defined]  # numbers of threads come again
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", lambda stream: (waited.add(stream), order.append("a batch")))
    fly(one, Schedule(6, one.bucket, 1, "always", streams=streams), [one.replica])
    assert order[0] == torch.device("cuda", 0), "weights are there before the first batch"
    assert order.count("a batch") == len(order) - 1
    assert len(waited) == 5, "one for each stage's thread"
    assert {stream.priority for stream in waited} == want
    assert sum(stream.priority == 0 for stream in waited) == (5 if streams == 1 else 1), "denoising gives way"


@pytest.mark.skipif(not PRETENDED, reason="knows how many GPUs there are")
@pytest.mark.parametrize(("alone", "count", "want"), [("none", 0, ["prs", "prs"]), ("reflector", 1, ["ps", "r"]), ("simulator", 1, ["pr", "s"])])
def test_a_run_places_its_networks_as_it_is_told(alone: Any, count: int, want: list[str], tmp_path: Path) -> None:
    loop = dataclasses.replace(TINY.loop, apart=alone, apart_gpus=count)
    places = Desk(Run(tmp_path, dataclasses.replace(TINY, device="cuda", loop=loop))).places
    assert ["".join(sorted(part[0] for part in parts)) for _, parts in places] == want
    assert [str(device) for device, _ in places] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(("devices", "alone"), [(1, 1), (2, 2), (3, 0)])
def test_a_placement_that_leaves_nothing_is_refused(devices: int, alone: int) -> None:
    with pytest.raises(ValueError, match=f"reflector on {alone} of {devices} devices"):
        placement(devices, "reflector", alone)


@pytest.mark.skipif(not PRETENDED, reason="knows how many GPUs there are")
@pytest.mark.parametrize(
    ("device", "gpus", "want"),
    [("cuda", 0, ["cuda:0", "cuda:1"]), ("cuda", 1, ["cuda:0"]), ("cuda", 2, ["cuda:0", "cuda:1"]), ("auto", 0, ["cuda:0", "cuda:1"]),
     ("cuda:1", 0, ["cuda:1"]), ("cuda:1", 1, ["cuda:1"]), ("cpu", 0, ["cpu"])],
)  # fmt: skip
def test_a_run_takes_the_gpus_that_it_is_given(one: Plant, device: str, gpus: int, want: list[str], tmp_path: Path) -> None:
    desk = Desk(Run(tmp_path, dataclasses.replace(TINY, device=device, gpus=gpus)))
    assert [str(place) for place in desk.devices] == want
    replicas = [Replica(one.replica.policy, one.replica.world, place) for place in desk.devices]
    assert desk.schedule.each(replicas) * len(replicas) == TINY.loop.slots * len(want)


@pytest.mark.skipif(not PRETENDED, reason="knows how many GPUs there are")
@pytest.mark.parametrize(
    ("device", "gpus", "said"), [("cuda", 3, "this machine has 2"), ("cuda:1", 2, "set device to cuda"), ("cpu", 2, "set device to cuda")]
)
def test_gpus_that_are_not_there_are_refused(device: str, gpus: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=said):
        _ = Desk(Run(tmp_path, dataclasses.replace(TINY, device=device, gpus=gpus))).devices
