"""Engines of small networks on this CPU: exported, compared, put into rollouts, refitted; and what happens to those that compute something else."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from small_policy import INSTRUCTIONS, SMALL, small_policy
from test_reflector import SMALL as SMALL_REFLECTOR
from test_rollout_bits import GROUP, SEED, SMALL_SIMULATOR, Plant, check, fly, networks, plant
from test_simulator import trained
from torch import nn
from torch.utils import cpp_extension

from worldenv import checkpoint, compiled
from worldenv.benchmarks.bench_rollout import inside
from worldenv.checkpoint import CheckpointError
from worldenv.config import EnginesConfig, LoopConfig
from worldenv.engines import backend, export, inductor, onnxruntime, parity, policy_heads, tensorrt
from worldenv.engines.eager import Eager
from worldenv.engines.recipe import Binding, EngineError, EngineRecipe, Precision, relative_error
from worldenv.engines.refit import RefitError
from worldenv.engines.store import Store, Wanted
from worldenv.learning.loop.update import RATIO_TOLERANCE, Learner, RatioError
from worldenv.policy import lora
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.reflector.judge import Watching
from worldenv.rollout.collect import Schedule

CPU = torch.device("cpu")
POLICY = dataclasses.replace(SMALL, chunk=SMALL_SIMULATOR.chunk)
ONNX = EnginesConfig(back_end="onnxruntime")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As workers have it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def eager() -> Plant:
    """Rollouts by the modules themselves; other networks than those that `by_engines` changes."""
    return plant(networks(POLICY, trained(SMALL_SIMULATOR), SMALL_REFLECTOR, small_policy), SMALL_SIMULATOR, 3, 2)


@dataclasses.dataclass(frozen=True)
class Engined:
    """The same rollouts by engines."""

    plant: Plant
    fitted: compiled.Fitted
    kept: Path


def everything(replica: Any, precision: Precision = "fp32") -> list[compiled.Network]:
    simulator, judge = inside(replica.world)
    return compiled.of_rollout(replica.policy, simulator, judge, Watching(INSTRUCTIONS, 3 * POLICY.chunk, POLICY.chunk), precision)


def rollouts_of(like: Plant, replica: Any) -> Any:
    return lambda: fly(dataclasses.replace(like, replica=replica, jobs=like.jobs[:2]), Schedule(2, 2), [replica])


@pytest.fixture(scope="module")
def by_engines(eager: Plant, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Engined:
    replica = networks(POLICY, trained(SMALL_SIMULATOR), SMALL_REFLECTOR, small_policy)
    kept = tmp_path_factory.mktemp("run") / "engines.json"
    simulator, _ = inside(replica.world)
    fitted = compiled.fitted(everything(replica), rollouts_of(eager, replica), ONNX, store, kept, simulator)
    return Engined(plant(replica, SMALL_SIMULATOR, 3, 2), fitted, kept)


@pytest.mark.slow
def test_every_network_is_built_passes_parity_and_says_so_beside_its_plan(by_engines: Engined, store: Store) -> None:
    assert [one.network.name for one in by_engines.fitted.choices] == list(compiled.NAMES)
    for one in by_engines.fitted.choices:
        assert one.engine.back_end == "onnxruntime", one.why
        assert one.parity is not None
        assert one.plan is not None
        assert one.parity.passed
        assert 0.0 < one.parity.max_rel_error <= one.network.recipe.tolerance
        stored = json.loads((one.plan.folder / "parity.json").read_text())
        assert stored["max_rel_error"] == one.parity.max_rel_error
        assert stored["passed"]
        in_a_loop = one.network.recipe.loop_tolerance is not None
        assert set(stored["loop"]) == ({str(chunks) for chunks in parity.LOOP_CHUNKS} if in_a_loop else set())
    assert json.loads(by_engines.kept.read_text()) == dict.fromkeys((one.network.name for one in by_engines.fitted.choices), "onnxruntime")


@pytest.mark.slow
def test_rollouts_by_engines_are_those_of_eager_to_rounding(eager: Plant, by_engines: Engined) -> None:
    for number, want in eager.want.items():
        ours, theirs = by_engines.plant.want[number].rollout(), want.rollout()
        assert torch.equal(ours.live, theirs.live)
        assert not torch.equal(ours.log_prob, theirs.log_prob)  # they were run by something else
        assert relative_error(ours.action, theirs.action) < 1e-3  # measured: 3.3e-4; a pixel that rounds the other way is seen by the policy
        assert float((ours.score - theirs.score).abs().max()) < 1e-3
        moved = (by_engines.plant.want[number].frames().float() - want.frames().float()).abs()
        assert float(moved.mean()) < 0.05  # a pixel in twenty may round to the next of 256 levels


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "overlap", "workers"), [(1, "off", 1), (3, "auto", 1), (7, "always", 2), (16, "always", 4)])
def test_rollouts_by_engines_do_not_depend_on_the_schedule(by_engines: Engined, slots: int, overlap: Any, workers: int) -> None:
    """Bit for bit, as eager's (test_rollout_bits)."""
    check(by_engines.plant, Schedule(slots, by_engines.plant.bucket, 1, overlap, streams=2), [by_engines.plant.replica] * workers)


def learner_and_engines(like: Plant, store: Store, folder: Path) -> tuple[Learner, Any, compiled.Fitted]:
    """A policy with LoRA, and engines for it alone."""
    replica = networks(POLICY, trained(SMALL_SIMULATOR), SMALL_REFLECTOR, small_policy)
    learner = Learner(replica.policy, LoopConfig(group=GROUP, contexts=3, batch=4, lora_lr=0.03, head_lr=0.003), SEED)
    fitted = compiled.fitted(compiled.of_policy(replica.policy), rollouts_of(like, replica), ONNX, store, folder / "engines.json")
    return learner, replica, fitted


def test_inductor_is_told_of_an_older_torch_and_of_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    varying = policy_heads.recipe(SMALL)
    settled = dataclasses.replace(varying, inputs=tuple(dataclasses.replace(one, axes=dict.fromkeys(one.axes, 4)) for one in varying.inputs))
    headers = {"cpp_cache_precompile_headers": False, "aot_inductor.precompile_headers": False}
    coalescing = {"triton.coalesce_tiling_analysis": False}
    for version, found, recipe, want in (
        ("2.11.0+cu130", True, varying, coalescing), ("2.11.0+cu130", True, settled, {}), ("2.13.0+cpu", True, varying, {}),
        ("2.13.0+cpu", False, varying, headers), ("2.11.0", False, varying, headers | coalescing),
    ):  # fmt: skip
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        monkeypatch.setattr(inductor.shutil, "which", lambda name, found=found: f"/usr/bin/{name}" if found else None)
        assert inductor.options(recipe) == want
    for name in headers | coalescing:  # of this torch too
        assert isinstance(functools.reduce(getattr, name.split("."), torch._inductor.config), bool)


def test_loop_learns_from_rollouts_by_engines_that_follow_its_weights(eager: Plant, store: Store, tmp_path: Path) -> None:
    """Two iterations: before each, the ratio of old to new densities is 1 to a quarter of what LOOP allows; without a refit it is not."""
    learner, replica, fitted = learner_and_engines(eager, store, tmp_path)
    assert {one.engine.back_end for one in fitted.choices} == {"onnxruntime"}
    ours = dataclasses.replace(eager, replica=replica)
    for iteration in range(2):
        found = fitted.refit()
        assert set(found) == {"policy_backbone", "policy_heads"}
        assert all(one.passed and one.refits == iteration + 1 and one.refit_s is not None for one in found.values())
        made, _ = fly(ours, Schedule(7, 2), [replica])
        rollouts = [flight.rollout() for flight in made.values()]
        assert learner.check_ratio(rollouts) < RATIO_TOLERANCE / 4  # measured: 1.1e-4
        learner.update(rollouts, iteration)
    made, _ = fly(ours, Schedule(7, 2), [replica])  # still by the weights of before the last update
    with pytest.raises(RatioError, match="other weights"):
        learner.check_ratio([flight.rollout() for flight in made.values()])


def test_a_float32_policy_acts_by_float32_engines_on_a_gpu_too(eager: Plant) -> None:
    """Of bfloat16 ones, which pass parity, LOOP refuses the rollouts: a GPU's `auto` ended at the first iteration, and at every resumption."""
    for asked in ("auto", "bf16", "fp8"):
        simulator, _ = inside(eager.replica.world)
        settings, watching = EnginesConfig(precision=asked), Watching(INSTRUCTIONS, 3 * POLICY.chunk, POLICY.chunk)  # type: ignore[arg-type]
        precision = compiled.precision_of(settings, torch.device("cuda"))
        policy = small_policy(POLICY)
        found = compiled.of_rollout(policy, simulator, None, watching, precision)
        assert {one.name: one.recipe.precision for one in found if one.recipe.refit} == {"policy_backbone": "fp32", "policy_heads": "fp32"}
        assert found[0].recipe.precision == precision
        policy.network.to(torch.bfloat16)
        assert compiled.of_rollout(policy, None, None, watching, precision)[0].recipe.precision == "bf16"
    replica = networks(POLICY, trained(SMALL_SIMULATOR), SMALL_REFLECTOR, small_policy)
    learner = Learner(replica.policy, LoopConfig(group=GROUP, contexts=3, batch=4), SEED)
    for made, ends in (
        (compiled.of_policy(replica.policy, "bf16"), pytest.raises(RatioError, match="other weights")),
        (compiled.of_rollout(replica.policy, None, None, watching, "bf16"), contextlib.nullcontext()),
    ):
        ready = [compiled.Choice(one, Eager(export.prepared(one.plain(), one.recipe), one.recipe), None, None) for one in made]
        for one in ready:
            given = [one.network.recipe.example({"batch": 2})]
            assert parity.compare(one.network.recipe, "another", backend.Running(one.engine), one.network.eager, given).passed
        with compiled.placed(ready):
            flights, _ = fly(dataclasses.replace(eager, replica=replica), Schedule(7, 2), [replica])
        with ends:
            learner.check_ratio([flight.rollout() for flight in flights.values()])


@pytest.mark.parametrize("which", [0, 1], ids=["backbone", "heads"])
def test_refit_goes_back_to_the_same_bits(which: int, store: Store) -> None:
    """A -> B -> A, and B is what eager computes with B."""
    network = compiled.of_policy(small_policy(POLICY))[which]
    given = network.recipe.example({"batch": 2}, seed=3)
    one = compiled.built(network, "onnxruntime", store, CPU, [given], timed=False)
    module = export.prepared(one.network.plain(), one.network.recipe)
    first = export.state(module)
    second = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) for name, tensor in first.items()}
    before = parity.outputs(one.engine(*given))
    one.engine.refit(second)
    changed = parity.outputs(one.engine(*given))
    assert not any(torch.equal(a, b) for a, b in zip(before, changed, strict=True))
    other = export.prepared(module, one.network.recipe)
    with torch.no_grad():
        for name, tensor in export.state(other).items():
            tensor.copy_(second[name])
        want = parity.outputs(other(*given))
    assert all(relative_error(a, b) < 2e-5 for a, b in zip(changed, want, strict=True))
    with pytest.raises(RefitError, match="missing"):
        one.engine.refit({name: tensor for name, tensor in first.items() if not name.endswith("bias")})
    with pytest.raises(RefitError, match="unknown"):
        one.engine.refit({**first, "lora_A": torch.zeros(1)})
    assert all(torch.equal(a, b) for a, b in zip(changed, parity.outputs(one.engine(*given)), strict=True))  # nothing was changed
    one.engine.refit(first)
    assert all(torch.equal(a, b) for a, b in zip(before, parity.outputs(one.engine(*given)), strict=True))


class Streamed:
    """An engine that keeps nothing of its weights but their hash."""

    back_end = "streamed"

    def __init__(self, recipe: EngineRecipe) -> None:
        self.recipe, self.found = recipe, dict[str, str]()

    def __call__(self, *given: torch.Tensor) -> Any:
        raise EngineError("only refitted")

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.found = {name: checkpoint.tensors_hash({name: weights[name]}) for name in weights}


def most_bytes(work: Callable[[], object]) -> int:
    """That tensors took at once, more than before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    assert found.profiler is not None
    events = sorted((one for one in found.profiler.kineto_results.events() if one.name() == "[memory]"), key=lambda one: one.start_ns())
    return max(itertools.accumulate((one.nbytes() for one in events), initial=0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("which", [0, 1], ids=["backbone", "heads"])
def test_a_refit_has_no_second_set_of_weights(which: int, precision: Any) -> None:
    """LoRA is added to one weight at a time, and to none where a graph has none; what arrives is a prepared module's, bit for bit."""
    policy = small_policy(POLICY)
    for name, one in lora.attach(policy.network, 2, 4, 0).items():
        one.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    network = compiled.of_policy(policy, precision)[which]
    engine = Streamed(network.recipe)
    fitted = compiled.Fitted([compiled.Choice(network, engine, None, None)], {network.name: [network.recipe.example()]})
    given = export.state(export.prepared(network.plain(), network.recipe))
    want = {name: checkpoint.tensors_hash({name: tensor}) for name, tensor in given.items()}
    largest = max(tensor.numel() for tensor in given.values()) * 4
    del given
    assert most_bytes(fitted.refit) <= 3 * largest  # a product, a sum, and the sum in the weight's type; the network has 10 times that
    assert engine.found == want
    assert any(name.endswith("layer.weight") for name in want) == (which == 0 and precision == "bf16")


def test_an_engine_keeps_its_weights_while_the_policys_change_in_place(store: Store) -> None:
    """As an optimizer changes them: also those without LoRA, which a refit gives without a copy."""
    network = heads()
    made = compiled.built(network, "onnxruntime", store, CPU, recorded(network), timed=False)
    assert network.weights is not None
    made.engine.refit(network.weights())
    with torch.no_grad():
        for one in network.eager.parameters():
            one.add_(1.0)
        for size in (4, 5):  # each of a session of its own; the second is opened only now
            given = network.recipe.example({"batch": size}, 7)
            assert all(relative_error(a, b) < 2e-5 for a, b in zip(made.engine(*given), heads().eager(*given), strict=True))


def heads() -> compiled.Network:
    return compiled.of_policy(small_policy(POLICY))[1]


def recorded(network: compiled.Network) -> list[tuple[torch.Tensor, ...]]:
    return [network.recipe.example({"batch": size}, seed) for seed, size in enumerate((1, 2, 4))]


class Wrong:
    """An engine that computes something else, as `how` says."""

    back_end = "onnxruntime"

    def __init__(self, engine: Any, how: Any) -> None:
        self.engine, self.recipe, self._how = engine, engine.recipe, how

    def __call__(self, *given: torch.Tensor) -> Any:
        made = parity.outputs(self.engine(*given))
        out = tuple(self._how(one) for one in made)
        return out[0] if len(out) == 1 else out

    def refit(self, weights: Any) -> None:
        self.engine.refit(weights)


WRONG = {
    "a little off": lambda x: x * 1.001,
    "not a number": lambda x: torch.where(x == x.max(), float("nan"), x),
    "rows exchanged": lambda x: x.flip(0),
    "half of it": lambda x: x[..., :-1],
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("how", WRONG.values(), ids=list(WRONG))
def test_an_engine_that_computes_something_else_is_not_used_and_the_run_says_so_once(
    how: Any, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network, load = heads(), onnxruntime.load
    monkeypatch.setattr(onnxruntime, "load", lambda *given: Wrong(load(*given), how))
    choice = compiled.choose(network, ONNX, store, CPU, recorded(network))
    assert choice.engine.back_end == "eager"
    said = capsys.readouterr().err
    assert said.count("policy_heads: onnxruntime") == 1
    assert "FAILED" in said
    assert "eager is used" in said
    assert "FAILED" in choice.plain["why"]


def test_plans_that_a_run_works_with_are_not_thrown_away(by_engines: Engined, store: Store) -> None:
    """By `worldenv-engine gc`, or for want of room by another run: its refit may read them again."""
    assert by_engines.fitted.store is store
    keys = {one.plan.key for one in by_engines.fitted.choices if one.plan is not None}
    assert len(keys) == len(by_engines.fitted.choices)
    assert not any(Store(store.root).remove(key) for key in keys)
    assert all(store.folder(key).exists() for key in keys)


def test_a_back_end_that_is_not_here_is_said_once_for_all_networks(
    eager: Plant, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "requires", lambda: "onnxruntime is not installed")
    replica = networks(POLICY, trained(SMALL_SIMULATOR), SMALL_REFLECTOR, small_policy)
    fitted = compiled.fitted(compiled.of_policy(replica.policy), rollouts_of(eager, replica), ONNX, store, tmp_path / "engines.json")
    assert [one.why for one in fitted.choices] == ["onnxruntime is not installed"] * 2
    assert capsys.readouterr().err.count("onnxruntime is not installed") == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"policy_heads": "onnx"}', '{"policy_heads": []}'])
def test_a_damaged_choice_of_engines_is_named(content: str, eager: Plant, store: Store, tmp_path: Path) -> None:
    kept = tmp_path / "engines.json"
    kept.write_text(content)
    with pytest.raises(CheckpointError, match=r"engines\.json: damaged .*begin the stage anew"):
        compiled.fitted(compiled.of_policy(eager.replica.policy), rollouts_of(eager, eager.replica), ONNX, store, kept)


def test_auto_takes_an_engine_only_where_it_is_faster(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    network = heads()
    for speedup, name in ((1.4, "onnxruntime"), (1.05, "eager"), (0.7, "eager")):  # near 1 a measurement comes out either way
        monkeypatch.setattr(parity, "_speedup", lambda *given, now=speedup: now)
        assert compiled.choose(network, EnginesConfig(), store, CPU, recorded(network)).engine.back_end == name
    assert compiled.choose(network, ONNX, store, CPU, recorded(network)).engine.back_end == "onnxruntime"  # asked for by name


class FakeEngine:
    """The network itself under the name of a back end."""

    def __init__(self, network: compiled.Network, name: str) -> None:
        self.recipe, self.back_end, self._call = network.recipe, name, Eager(network.eager, network.recipe)

    def __call__(self, *given: torch.Tensor) -> Any:
        return self._call(*given)

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        raise NotImplementedError


@dataclasses.dataclass
class Fakes:
    """In the place of `compiled.built`: engines that are so much faster than eager, or wrong at such a speed (below 0), or not to be had (why)."""

    speed: dict[str, float | str]
    root: Path
    asked: list[str] = dataclasses.field(default_factory=list)
    alive: dict[str, list[weakref.ref[FakeEngine]]] = dataclasses.field(default_factory=dict)

    def __call__(self, network: compiled.Network, name: str, store: Store, *given: Any, timed: bool) -> compiled.Choice:
        assert timed
        assert all(one() is None for one in self.alive.setdefault(network.name, [])), "a GPU may have no room for two"
        self.asked.append(name)
        speed = self.speed[name]
        if isinstance(speed, str):
            raise EngineError(speed)
        engine = FakeEngine(network, name)
        self.alive[network.name].append(weakref.ref(engine))
        wanted = Wanted(network.name, name, "fake", "fp32", "graph", "weights", {})
        plan = store.get(wanted, lambda folder: (folder / "plan").touch())
        found = parity.Parity(network.name, name, 0.0 if speed > 0 else 1.0, network.recipe.tolerance, 1, speedup=abs(speed))
        return compiled.Choice(network, engine, found, plan)


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fakes:
    fakes = Fakes({}, tmp_path)
    monkeypatch.setattr(compiled, "AUTOMATIC", {"cpu": ("onnxruntime", "inductor", "tensorrt")})
    monkeypatch.setattr(compiled, "built", fakes)
    return fakes


@pytest.mark.parametrize(
    ("speeds", "want"),
    [((1.2, 1.5, 2.0), "tensorrt"), ((2.0, 1.5, 1.2), "onnxruntime"), ((1.2, 2.0, "not here"), "inductor"), ((-9.0, 1.2, -2.0), "inductor"),
     ((1.05, -2.0, "not here"), "eager"), ((1.05, 1.2, 9.0), "tensorrt"), (("no", "nor this", "not here"), "eager")],
)  # fmt: skip
def test_auto_takes_the_fastest_of_those_that_passed(
    three: Fakes, speeds: tuple[float | str, ...], want: str, capsys: pytest.CaptureFixture[str]
) -> None:
    three.speed = dict(zip(("onnxruntime", "inductor", "tensorrt"), speeds, strict=True))
    network, store = heads(), Store(three.root)
    choice = compiled.choose(network, EnginesConfig(), store, CPU, [network.recipe.example()])
    assert choice.engine.back_end == want
    assert choice.own == (want == "eager")
    assert three.asked[:3] == ["onnxruntime", "inductor", "tensorrt"]
    said = capsys.readouterr().err
    for name, speed in three.speed.items():
        if isinstance(speed, str):
            assert speed in choice.why
            assert speed not in said or name != "tensorrt"  # that it is not here is no news to `auto`
        elif name != want:
            assert f"policy_heads: {name}: " in choice.why
            assert (f"policy_heads: {name}: " in said) == (speed < compiled.FASTER and name != "tensorrt")  # that another is faster is no fault
    assert [store.read(key).wanted.back_end for key in store._in_use] == ([want] if want != "eager" else [])


def test_an_engine_that_was_fastest_and_cannot_be_had_again_gives_way_to_the_next(three: Fakes) -> None:
    three.speed = {"onnxruntime": 2.0, "inductor": 1.5, "tensorrt": 1.2}
    once = type(three).__call__

    def at_first(self: Fakes, network: compiled.Network, name: str, *given: Any, timed: bool) -> compiled.Choice:
        made = once(self, network, name, *given, timed=timed)
        self.speed["onnxruntime"] = "out of memory"
        return made

    network = heads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(three), "__call__", at_first)
        choice = compiled.choose(network, EnginesConfig(), Store(three.root), CPU, [network.recipe.example()])
    assert choice.engine.back_end == "inductor"
    assert "out of memory" in choice.why


def fails(error: Exception) -> Any:
    def call(*given: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(("device", "want"), [("cuda", ["planned", "emptied", "loaded"]), ("cpu", ["planned", "loaded"])])
def test_an_engine_is_loaded_into_memory_that_torch_has_given_back(device: str, want: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what a build has left in a cycle of references."""
    made, left = list[str](), list[weakref.ref[Any]]()

    def planned(*given: Any) -> Any:
        program = nn.Module()
        program.itself = program
        left.append(weakref.ref(program))
        made.append("planned")
        return SimpleNamespace(folder=Path("none"))

    def load(*given: Any) -> Any:
        made.append("loaded")
        raise EngineError("as far as this")

    def emptied() -> None:
        assert left[0]() is None
        made.append("emptied")

    monkeypatch.setattr("torch.cuda.empty_cache", emptied)
    monkeypatch.setattr(compiled, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(compiled, "planned", planned)
    monkeypatch.setattr(compiled, "back_end", lambda name: SimpleNamespace(requires=lambda: None, architecture=lambda device: "sm_90", load=load))
    with pytest.raises(EngineError, match="as far as this"):
        compiled.built(heads(), "inductor", Store(Path("none")), torch.device(device), [], timed=False)
    assert made == want


def first_and_copy(store: Store, seed: int = 0) -> tuple[compiled.Fitted, compiled.Network]:
    """An engine of a policy's heads, and those of a policy drawn with `seed`."""
    network = heads()
    given = recorded(network)
    return (
        compiled.Fitted([compiled.built(network, "onnxruntime", store, CPU, given, timed=True)], {network.name: given}, store),
        compiled.of_policy(small_policy(POLICY, seed=seed))[1],
    )


def test_a_copy_of_an_engine_takes_the_plan_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is prepared or hashed again, or exported; what was found where the plan was built stays beside it."""
    store = Store(tmp_path)
    first, network = first_and_copy(store)
    (one,) = first.choices
    assert one.plan is not None
    kept = store.parity(one.plan.key)
    for name in ("worldenv.checkpoint.file_hash", "worldenv.checkpoint.tensors_hash", "worldenv.engines.export.prepared"):
        monkeypatch.setattr(name, lambda *given: pytest.fail("again"))
    made = compiled.alike(first, [dataclasses.replace(network, plain=lambda: pytest.fail("again"))], store, CPU)
    (copied,) = made.choices
    assert copied.engine is not one.engine
    assert copied.plan is one.plan
    given = recorded(network)[1]
    assert all(torch.equal(a, b) for a, b in zip(copied.engine(*given), one.engine(*given), strict=True))
    assert network.runs[network.name] is not None
    assert store.parity(one.plan.key) == kept


def test_a_copy_on_another_architecture_has_a_plan_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    first, network = first_and_copy(store)
    monkeypatch.setattr(onnxruntime, "architecture", lambda device: "another")
    monkeypatch.setattr(onnxruntime, "only_here", lambda *given: None)
    (copied,) = compiled.alike(first, [network], store, CPU).choices
    assert copied.plan is not None
    assert copied.plan.wanted.arch == "another"


def test_a_copy_that_is_of_other_weights_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, network = first_and_copy(store, seed=1)
    with pytest.raises(EngineError, match="policy_heads: onnxruntime passed on the first GPU and not on cpu"):
        compiled.alike(first, [network], store, CPU)
    assert network.runs == {}


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14 GiB")


@pytest.mark.parametrize(("part", "error"), [("plain", FULL), ("build", FULL), ("load", FULL), ("load", FileNotFoundError(2, "No such file"))])
def test_what_fails_on_the_way_to_an_engine_makes_room_for_the_next(
    part: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also while a plan is prepared or read; of two back ends the second here is not installed, so that eager is left."""
    network = heads()
    if part == "plain":
        network = dataclasses.replace(network, plain=fails(error))
    else:
        monkeypatch.setattr(onnxruntime, part, fails(error))
    monkeypatch.setattr(compiled, "AUTOMATIC", {"cpu": ("onnxruntime", "tensorrt")})
    monkeypatch.setattr(tensorrt, "requires", lambda: "tensorrt is not installed")
    choice = compiled.choose(network, EnginesConfig(), Store(tmp_path), CPU, recorded(network))
    assert choice.engine.back_end == "eager"
    assert choice.why.startswith("policy_heads: onnxruntime does not run: ")
    assert str(error) in choice.why
    assert choice.why.endswith("tensorrt is not installed")
    assert "the next back end is used" in capsys.readouterr().err


def test_a_simulator_that_drifts_is_run_by_the_next_back_end(
    three: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Right in a step, wrong after 16 chunks. What the policy is run by has nothing to do with that."""
    three.speed = {"onnxruntime": 1.2, "inductor": 1.5, "tensorrt": 2.0}
    drifting = {"tensorrt"}

    def loops(simulator: Any, mine: Any, given: Any) -> dict[str, float]:
        names = {one.engine.back_end for one in mine}
        return {"1": 0.0, "4": 0.0, "16": 1.0 if names & drifting else 0.0}

    monkeypatch.setattr(compiled, "compare_loops", loops)
    simulator = trained(SMALL_SIMULATOR)
    networks_ = [*compiled.of_simulator(simulator), *compiled.of_policy(small_policy(POLICY))]
    examples = {one.name: [one.recipe.example()] for one in networks_}
    frame = torch.zeros(SMALL_SIMULATOR.height, SMALL_SIMULATOR.width, 3, dtype=torch.uint8)
    for gone, want in ((set(), "tensorrt"), ({"tensorrt"}, "inductor"), ({"tensorrt", "inductor"}, "onnxruntime"), (set(three.speed), "eager")):
        drifting = gone
        three.alive.clear()  # this test has those of before
        store = Store(three.root / want)
        choices = compiled.chosen(networks_, EnginesConfig(), store, examples, (simulator, frame))
        names = [one.engine.back_end for one in choices]
        assert names == [want] * 3 + ["tensorrt"] * 2
        assert capsys.readouterr().err.count("after 16 chunks") == len(gone)
        for one in choices[:3]:
            assert all(f"simulator: {name}: " in one.why for name in gone)
            assert one.plan is None or (store.parity(one.plan.key) or {})["loop"]["16"] == 0.0
        three.alive.clear()
        if want != "eager":
            again = compiled.chosen(networks_, EnginesConfig(), store, examples, (simulator, frame), dict.fromkeys(compiled.NAMES[:3], "inductor"))
            assert [one.engine.back_end for one in again[:3]] == ["eager" if "inductor" in gone else "inductor"] * 3
            capsys.readouterr()


def test_a_closed_loop_whose_latents_are_not_finite_is_infinitely_far() -> None:
    simulator = trained(SMALL_SIMULATOR)
    network = compiled.of_simulator(simulator)[0]
    engine = Eager(lambda *given: network.eager(*given) * float("nan"), network.recipe)
    given = compiled.loop_inputs(simulator, torch.zeros(SMALL_SIMULATOR.height, SMALL_SIMULATOR.width, 3, dtype=torch.uint8))
    far = dict.fromkeys(("1", "4", "16"), float("inf"))
    assert compiled.compare_loops(simulator, [compiled.Choice(network, engine, None, None)], given) == far
    next(simulator.unet.parameters()).data.fill_(float("nan"))  # then eager's are none either
    assert compiled.compare_loops(simulator, [compiled.Choice.eager(network)], given) == far


@pytest.mark.slow
def test_an_engine_that_drifts_in_a_closed_loop_is_not_used(by_engines: Engined, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Right to two parts in a hundred thousand in a step, and still wrong after 16 chunks: then the whole simulator is eager."""
    simulator, _ = inside(by_engines.plant.replica.world)
    mine = [one.network for one in by_engines.fitted.choices if one.network.runs is simulator.runs]
    frame, recorded_ = torch.zeros(8, 16, 3, dtype=torch.uint8), by_engines.fitted.recorded
    for limit, want, count in ((1e-9, "eager", 1), (mine[0].recipe.loop_tolerance, "onnxruntime", 0)):
        networks_ = [dataclasses.replace(one, recipe=dataclasses.replace(one.recipe, loop_tolerance=limit)) for one in mine]
        choices = compiled.chosen(networks_, ONNX, store, recorded_, (simulator, frame))
        assert {one.engine.back_end for one in choices} == {want}
        assert capsys.readouterr().err.count("after 16 chunks") == count


def test_a_run_that_goes_on_takes_the_back_ends_that_it_was_begun_with(eager: Plant, store: Store, tmp_path: Path) -> None:
    _, replica, _ = learner_and_engines(eager, store, tmp_path)
    networks_, auto = compiled.of_policy(replica.policy), EnginesConfig()
    assert set(json.loads((tmp_path / "engines.json").read_text()).values()) == {"onnxruntime"}
    again = compiled.fitted(networks_, rollouts_of(eager, replica), auto, store, tmp_path / "engines.json")
    assert {one.engine.back_end for one in again.choices} == {"onnxruntime"}
    (tmp_path / "engines.json").write_text(json.dumps(dict.fromkeys((one.name for one in networks_), "tensorrt")))
    with pytest.raises(EngineError, match=r"policy_backbone was begun with tensorrt.*begin the stage anew"):
        compiled.fitted(networks_, rollouts_of(eager, replica), auto, store, tmp_path / "engines.json")


def test_eager_is_in_the_precision_of_the_run_where_nothing_trains(tmp_path: Path) -> None:
    """In float32 it is the very module; in bfloat16 the prepared copy of it, which takes and gives float32. What trains is as it was."""
    simulator, policy = trained(SMALL_SIMULATOR), small_policy(POLICY)
    eager, before = EnginesConfig("eager"), dict(simulator.runs)
    for precision in ("fp32", "bf16", "fp8"):
        networks_ = [*compiled.of_simulator(simulator, precision), *compiled.of_policy(policy, precision)]  # type: ignore[arg-type]
        compiled.fitted(networks_, lambda: pytest.fail("recorded"), eager, Store(tmp_path), tmp_path / "none")
        assert policy.runs == {}
        assert (simulator.runs == before) == (precision == "fp32")
    for network in compiled.of_simulator(simulator, "bf16"):
        given = network.recipe.example(dict.fromkeys(network.recipe.ranges, 2))
        with torch.no_grad():
            want = parity.outputs(export.prepared(network.eager, network.recipe)(*given))
            wide = parity.outputs(network.eager(*(one.float() for one in given)))
            got = parity.outputs(simulator.runs[network.name](*(one.float() for one in given)))
        assert all(a.dtype == torch.float32 and torch.equal(a, b.float()) for a, b in zip(got, want, strict=True))
        assert all(1e-4 < relative_error(a, b) < network.recipe.tolerance for a, b in zip(got, wide, strict=True))


def test_keys_and_values_are_cast_once_for_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of both branches of guidance; and what is imagined stays what it was, bit for bit."""
    simulator = trained(SMALL_SIMULATOR)
    simulator.sample_with(guidance=2.0)
    given, seen = compiled.loop_inputs(simulator, torch.zeros(8, 16, 3, dtype=torch.uint8), chunks=2), set[torch.dtype]()
    choices = [compiled.Choice.eager(one) for one in compiled.of_simulator(simulator, "bf16")]
    call = backend.Running.__call__

    def watched(self: backend.Running, *inputs: torch.Tensor) -> Any:
        seen.update(one.dtype for one in inputs[3:])
        return call(self, *inputs)

    monkeypatch.setattr(backend.Running, "__call__", watched)
    with compiled.placed(choices):
        once = compiled.loop_histories(simulator, given)
        assert seen == {torch.bfloat16}
        engine = simulator.runs["simulator_unet"]
        simulator.runs["simulator_unet"] = lambda *inputs: engine(*inputs)  # of which nobody knows a type
        every = compiled.loop_histories(simulator, given)
    assert torch.float32 in seen
    assert torch.equal(once[1], every[1])


def test_an_engine_is_timed_against_eager_in_its_own_precision(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And compared with the float32 original: 1.1 times a float32 network is nothing in bfloat16."""
    network, rivals = compiled.of_simulator(trained(SMALL_SIMULATOR), "bf16")[2], list[Any]()
    made = backend.back_end("eager")
    monkeypatch.setattr(made, "load", lambda *given: compiled.Choice.eager(network).engine)
    monkeypatch.setattr(made, "build", lambda module, recipe, folder, *given: (folder / "plan").write_bytes(b"nothing"))
    monkeypatch.setattr(parity, "_speedup", lambda engine, rival, given: rivals.append(rival) or 2.0)
    given = [one.float() for one in network.recipe.example({"picture": 2})]
    found = compiled.built(network, "eager", store, CPU, [given], timed=True).parity
    assert found is not None
    assert found.passed
    assert found.max_rel_error > 1e-4  # not of bfloat16 to itself
    with torch.no_grad():
        assert torch.equal(rivals[0](*given), compiled.Choice.eager(network).run(*given))
        assert not torch.equal(rivals[0](*given), network.eager(*given))


def test_a_graph_is_exported_once_for_all_weights(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    network = heads()
    backend.planned("onnxruntime", network.plain(), network.recipe, "cpu", store)
    monkeypatch.setattr(export, "to_onnx", lambda *given: pytest.fail("exported again"))
    other = compiled.of_policy(small_policy(POLICY, seed=1))[1]
    plan = backend.planned("onnxruntime", other.plain(), other.recipe, "cpu", store)
    engine = onnxruntime.load(plan.folder, other.recipe, CPU)
    assert parity.compare(other.recipe, "onnxruntime", engine, other.eager, recorded(other)).passed
    assert not parity.compare(network.recipe, "onnxruntime", engine, network.eager, recorded(network)).passed


def test_a_plan_whose_graph_is_not_one_is_named(store: Store, tmp_path: Path) -> None:
    network = heads()
    plan = backend.planned("onnxruntime", network.plain(), network.recipe, "cpu", store)
    for name in (export.GRAPH, export.WEIGHTS):
        folder = tmp_path / name
        folder.mkdir()
        for path in plan.folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
        with pytest.raises(EngineError, match="build it anew"):
            onnxruntime.load(folder, network.recipe, CPU)


def test_weights_lie_beside_the_graph_and_carry_the_modules_names(store: Store) -> None:
    network = heads()
    plan = backend.planned("onnxruntime", network.plain(), network.recipe, "cpu", store)
    graph = onnx.load(plan.folder / export.GRAPH, load_external_data=False)
    outside = {one.name for one in graph.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL}
    assert outside == set(export.state(network.eager))
    assert (plan.folder / export.GRAPH).stat().st_size < 100_000
    assert {one.version for one in graph.opset_import if one.domain == ""} == {export.OPSET}
    onnx.checker.check_model(str(plan.folder / export.GRAPH))


class _Eigen(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x).real


class _Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class _Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 2


def test_an_export_error_names_module_and_operator(tmp_path: Path) -> None:
    recipe = EngineRecipe("toy", (Binding("x", {"batch": (1, 2, 4), "row": 3, "column": 3}),), ("y",), 1e-6)
    with pytest.raises(export.ExportError, match=r"toy: _Outer\.inner: operator aten\.\w*eig"):
        export.to_onnx(_Outer(_Eigen()), recipe, tmp_path)
    with pytest.raises(export.ExportError, match=r"toy: _Outer cannot be traced"):
        export.to_onnx(_Outer(_Branches()), recipe, tmp_path)
    with pytest.raises(EngineError, match="opset 23: TensorRT builds 22 at most"):
        export.to_onnx(_Outer(nn.Identity()), recipe, tmp_path, opset=23)
    assert not (tmp_path / export.GRAPH).exists()


def test_what_a_cpu_cannot_run_is_refused(store: Store) -> None:
    network = heads()
    narrow = dataclasses.replace(network.recipe, precision="bf16")
    with pytest.raises(EngineError, match="no bf16 kernels: take precision fp32"):
        backend.planned("onnxruntime", network.plain(), narrow, "cpu", store)
    with pytest.raises(EngineError, match=r"onnxruntime builds for the machine.*sm_90"):
        backend.planned("onnxruntime", network.plain(), network.recipe, "sm_90", store)


def test_narrow_weights_keep_their_norms_wide() -> None:
    network = everything(networks(POLICY, trained(SMALL_SIMULATOR), SMALL_REFLECTOR, small_policy), "bf16")[5]
    made = export.prepared(network.eager, network.recipe)
    kinds = {name: tensor.dtype for name, tensor in made.named_parameters()}
    assert {kind for name, kind in kinds.items() if "layer_norm" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "q_proj" in name} == {torch.bfloat16}
    assert {one.dtype for one in network.eager.parameters()} == {torch.float32}  # the network itself is as it was
    given = network.recipe.example({"frame": 2})
    with torch.no_grad():
        error = relative_error(made(*given).float(), network.eager(given[0].float()))
    assert 1e-4 < error < network.recipe.tolerance


@pytest.mark.parametrize(
    ("name", "want"), [("tensorrt", "modelopt"), ("tensorrt_rtx", "modelopt"), ("torch_tensorrt", "modelopt"), ("inductor", "torchao")]
)
def test_fp8_is_what_the_back_end_takes_whatever_else_is_installed(name: str, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for both quantisers: ModelOpt's is given the recorded inputs, torchao's none."""
    network, asked, seen = compiled.of_simulator(trained(SMALL_SIMULATOR), "fp8")[0], list[str](), list[torch.Tensor]()
    given = tuple(one.float() for one in network.recipe.example({"batch": 1}, 3))

    def quantize(module: nn.Module, _: Any, calibrate: Any) -> nn.Module:
        asked.append("modelopt")
        handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        calibrate(module)
        handle.remove()
        return module

    modelopt = SimpleNamespace(quantize=quantize, FP8_DEFAULT_CFG={})
    torchao = SimpleNamespace(quantize_=lambda *_: asked.append("torchao"), Float8DynamicActivationFloat8WeightConfig=dict)
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", modelopt)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torchao.quantization", torchao)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module)
    export.prepared(network.eager, network.recipe, [given], name)
    assert asked == [want]
    assert [one.tolist() for one in seen] == ([given[0].bfloat16().tolist()] if want == "modelopt" else [])


@pytest.mark.parametrize(
    ("name", "words"),
    [("tensorrt", "wants modelopt, .*pip install nvidia-modelopt;"), ("inductor", "wants torchao, .*pip install torchao;"),
     ("onnxruntime", "has none: take tensorrt, .*inductor; or")],
)  # fmt: skip
def test_fp8_says_in_one_line_what_it_needs(name: str, words: str) -> None:
    network = compiled.of_simulator(trained(SMALL_SIMULATOR), "fp8")[0]
    with pytest.raises(EngineError, match=rf"fp8: {name} {words}"):
        export.prepared(network.eager, network.recipe, (), name)


def test_a_recorder_keeps_calls_of_different_shapes() -> None:
    recorder = parity.Recorder(lambda x: x + 1, most=3)
    for size in (2, 2, 2, 2, 4, 2, 1):
        assert torch.equal(recorder(torch.zeros(size)), torch.ones(size))
    assert {len(one[0]) for one in recorder.recorded} == {1, 2, 4}
    assert len(recorder.recorded) == 3


def test_a_linker_is_shown_the_driver_and_the_environment_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, driver, cache = (tmp_path / name for name in ("other", "driver", "cache"))
    for folder in (other, driver, cache):
        folder.mkdir()
    (driver / "libcuda.so.1").write_text("the driver")
    monkeypatch.setattr("triton.backends.nvidia.driver.libcuda_dirs", lambda: [str(other), str(driver)])
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setenv("LIBRARY_PATH", "/before")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    found = inductor._libraries(cache, "/a/toolkit")
    assert found == {"CUDA_HOME": "/a/toolkit", "LIBRARY_PATH": f"{cache}:/before"}
    assert (cache / "libcuda.so").read_text() == "the driver"
    before = dict(os.environ)
    with inductor._environment(found):
        assert os.environ["CUDA_HOME"] == "/a/toolkit"
        assert {"/a/toolkit/include"} < set(cpp_extension.include_paths("cuda"))
        assert {"/a/toolkit/lib64"} < set(cpp_extension.library_paths("cuda"))
        os.environ["TRITON_CACHE_DIR"] = str(cache)  # as torch does
    assert dict(os.environ) == before
    assert cpp_extension.CUDA_HOME is None


def test_a_gpu_without_a_toolkit_takes_headers_of_pip_or_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is traced; those that come with torch are not all that is included."""
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(inductor.importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path / name)]))
    monkeypatch.setattr(inductor, "only_here", lambda *given: None)
    traced = list[str]()
    monkeypatch.setattr(export, "traced", lambda *given: traced.append("one"))
    monkeypatch.setattr(export, "state", lambda module: {"weight": SimpleNamespace(device=torch.device("cuda"))})
    pip = tmp_path / "nvidia" / "cu13"
    for path in (pip / "include" / name for name in inductor._HEADERS):
        with pytest.raises(EngineError, match=r"needs CUDA's headers .*CUDA_HOME, or of version 13\.0 pip install"):
            inductor.build(nn.Identity(), policy_heads.recipe(SMALL), tmp_path, "sm_90", Store(tmp_path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert traced == []
    assert inductor.toolkit_folder() == str(pip)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))  # one that holds libraries alone, as of an image that runs programs
    assert inductor.toolkit_folder() == str(pip)
    for place in ("targets/x86_64-linux/include", "include"):  # conda's, NVIDIA's; what cuda.h includes is theirs to know
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "cuda.h").touch()
        assert inductor.toolkit_folder() == str(tmp_path)
        shutil.rmtree(tmp_path / place)


@pytest.mark.slow
def test_inductor_builds_passes_and_is_refitted_in_place(store: Store) -> None:
    """AOTInductor's machine code for the policy's heads: parity, and A -> B -> A to the same bits."""
    network = heads()
    made = compiled.built(network, "inductor", store, CPU, recorded(network), timed=False)
    assert made.parity is not None
    assert made.parity.passed
    assert isinstance(made.engine, inductor.Inductor)
    first = export.state(network.plain())
    second = export.state(compiled.of_policy(small_policy(POLICY, seed=1))[1].plain())
    given = recorded(network)[2]
    before = made.engine(*given)
    made.engine.refit(second)
    other = compiled.of_policy(small_policy(POLICY, seed=1))[1]
    assert parity.compare(other.recipe, "inductor", made.engine, other.eager, recorded(other)).passed
    with pytest.raises(RefitError, match="missing"):
        made.engine.refit(dict(list(first.items())[:3]))
    made.engine.refit(first)
    assert all(torch.equal(a, b) for a, b in zip(before, made.engine(*given), strict=True))


@pytest.mark.slow
def test_engines_of_one_plan_are_loaded_from_where_it_lies(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on several GPUs: nothing is unpacked for either, and a refit is one engine's. Every file is checked when the plan is opened."""
    network = heads()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    plan = backend.planned("inductor", network.plain(), network.recipe, inductor.architecture(CPU), store)
    one, other = (inductor.load(plan.folder, network.recipe, CPU) for _ in range(2))
    assert list(tmp_path.rglob("*.so")) == []
    (code,) = plan.folder.rglob("*.so")
    assert f"{code.relative_to(plan.folder)}" in json.loads((plan.folder / "manifest.json").read_text())["files"]
    assert plan.bytes < 2 * code.stat().st_size  # no package is kept beside it
    given = recorded(network)[2]
    before = one(*given)
    other.refit(export.state(compiled.of_policy(small_policy(POLICY, seed=1))[1].plain()))
    assert all(torch.equal(a, b) for a, b in zip(before, one(*given), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, other(*given), strict=True))
    del one, other
    with code.open("r+b") as file:
        file.seek(code.stat().st_size // 2)
        file.write(b"another")
    with pytest.raises(EngineError, match=r"\.so: truncated or damaged"):
        store.read(plan.key)
    shutil.rmtree(plan.folder)


def test_a_policy_without_engines_is_left_as_it_is() -> None:
    policy: OpenVLAOFT = small_policy(POLICY)
    nothing = Path("none")
    fitted = compiled.fitted(compiled.of_policy(policy), lambda: pytest.fail("recorded"), EnginesConfig("eager"), Store(nothing), nothing)
    assert {one.engine.back_end for one in fitted.choices} == {"eager"}
    assert fitted.refit() == {}
    assert policy.runs == {}
    assert policy_heads.NAME in compiled.NAMES


