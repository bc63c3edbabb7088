"""The networks of a rollout, and what runs them: engines are chosen, put into place, refitted, and taken out again here.

Policy, simulator and reflector know no engine: each holds a table `runs` of what to call, and is given other callables. Learning always goes
through the modules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from worldenv import checkpoint, console, noise
from worldenv.config import EnginesConfig
from worldenv.devices import give_back, on
from worldenv.engines import (
    parity,
    policy_backbone,
    policy_heads,
    reflector_llm,
    reflector_vision,
    simulator_unet,
    simulator_vae,
)
from worldenv.engines.backend import AUTOMATIC, WITHOUT_REFIT, Engine, Running, back_end, planned
from worldenv.engines.eager import Eager
from worldenv.engines.export import Weights, prepared
from worldenv.engines.parity import Parity, Recorder
from worldenv.engines.recipe import EngineError, EngineRecipe, Precision, Range, relative_error, said
from worldenv.engines.store import Plan, Store
from worldenv.nouns import ActionMap
from worldenv.policy import graphs as policy_graphs
from worldenv.policy import lora
from worldenv.policy.openvla_oft import Network as PolicyNetwork
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.reflector import graphs as reflector_graphs
from worldenv.reflector.judge import ROW_TOKENS, LlavaReflector, Watching
from worldenv.simulator import graphs as simulator_graphs
from worldenv.simulator.evac import DELTA_DIM, Evac, Memory

FASTER = 1.1
"""`auto` takes an engine that is at least this many times as fast as eager: measured ratios near 1 come out either way, from run to run, and are not
worth an export."""
NAMES = (
    simulator_unet.NAME, simulator_vae.ENCODER, simulator_vae.DECODER, policy_backbone.NAME, policy_heads.NAME, reflector_vision.NAME,
    reflector_llm.NAME,
)  # fmt: skip
"""Of all graphs; the two of simulator_vae are one engine of the issue that a user has with it: to encode and to decode."""


@dataclass(frozen=True)
class Network:
    """One graph of a rollout."""

    recipe: EngineRecipe
    eager: nn.Module
    """The module as it is used and perhaps trained: what an engine is compared with."""
    plain: Callable[[], nn.Module]
    """The same with plain weights, LoRA added in: what is exported. It shares what it can with `eager`."""
    runs: MutableMapping[str, Callable[..., Any]]
    """Where its user looks up what to call."""
    weights: Callable[[], Mapping[str, torch.Tensor]] | None = None
    """Of those that are refitted: present weights, as an engine takes them."""

    @property
    def name(self) -> str:
        """Of its recipe."""
        return self.recipe.name

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        return next(self.eager.parameters()).device


def of_simulator(simulator: Evac, precision: Precision = "fp32", batch: Range = (1, 4, 16)) -> list[Network]:
    """U-Net, encoder, decoder; `batch` rollouts at once."""
    config = simulator.config
    modules = simulator_graphs.graphs(simulator.unet, simulator.vae, config.memory)
    recipes = (simulator_unet.recipe(config, precision, batch), *simulator_vae.recipes(config, precision))
    return [Network(one, modules[one.name], _itself(modules[one.name]), simulator.runs) for one in recipes]


def of_policy(policy: OpenVLAOFT, precision: Precision = "fp32", batch: Range = (1, 4, 32)) -> list[Network]:
    """Backbone and heads, of those that have a graph."""
    modules = policy_graphs.graphs(policy.network)
    recipes = (policy_backbone.recipe(policy.config, precision, batch), policy_heads.recipe(policy.config, batch))
    found = []
    for one in (one for one in recipes if one.name in modules):
        parts = _PolicyGraph(policy, one)
        found.append(Network(one, modules[one.name], parts.plain, policy.runs, parts.weights))
    return found


def of_reflector(reflector: object, watching: Watching, precision: Precision = "fp32") -> list[Network]:
    """Vision tower and language model, for all passes that come up in `watching`; nothing of a judge that is no LLaVA."""
    if not isinstance(reflector, LlavaReflector):
        return []
    modules = reflector_graphs.graphs(reflector.llava.model)
    language = reflector_llm.recipe(reflector.config, *_passes(reflector.row_tokens(watching)), precision)
    recipes = (reflector_vision.recipe(reflector.config, precision), language)
    return [Network(one, modules[one.name], _itself(modules[one.name]), reflector.llava.runs) for one in recipes]


def _passes(tokens: Sequence[tuple[int, int]]) -> tuple[Range, Range, Range]:
    """Rows in a pass, their new tokens and their old ones, where rows have so many of these: the usual ones, and the most that come up."""
    new, old = (sorted(some) for some in zip(*tokens, strict=True))
    rows = max(1, ROW_TOKENS // new[0])
    # an axis that varies needs two lengths, also where all that is judged is one chunk and nothing is old
    return (1, min(2, rows), rows), (2, new[len(new) // 2], new[-1]), (0, old[len(old) // 2], max(2, old[-1]))


def of_rollout(
    policy: OpenVLAOFT | None, simulator: Evac | None, reflector: object, watching: Watching, precision: Precision = "fp32", bucket: int = 4
) -> list[Network]:
    """All networks of a rollout, of these, for batches of up to `bucket` rollouts and for all that the judge is asked in `watching`.

    Where the policy is float32 so are its engines: LOOP wants their densities to be the module's to a part in a thousand (`Learner.check_ratio`).
    """
    simulated = of_simulator(simulator, precision, (1, 4, max(16, bucket))) if simulator is not None else []
    acting: list[Network] = []
    if policy is not None:
        whole = policy.network.projector.fc1.weight.dtype == torch.float32
        acting = of_policy(policy, "fp32" if whole else precision, (1, 4, max(32, bucket)))
    return [*simulated, *acting, *of_reflector(reflector, watching, precision)]


def _itself(module: nn.Module) -> Callable[[], nn.Module]:
    return lambda: module


@dataclass(frozen=True)
class _PolicyGraph:
    """One graph of a policy, with those weights alone that are its own: LoRA is added to no others."""

    policy: OpenVLAOFT
    recipe: EngineRecipe

    def _bare(self) -> nn.Module:
        """On the meta device."""
        with torch.device("meta"):
            network = PolicyNetwork(self.policy.config)
        module = policy_graphs.graphs(network)[self.recipe.name].eval()
        if self.recipe.name == policy_backbone.NAME:  # a refit gives all weights of a graph, and no others
            for part in policy_graphs.READERS:
                if hasattr(network, part):
                    delattr(network, part)
        return module

    def _given(self) -> Callable[[str], torch.Tensor]:
        """Its weights, by name in the graph."""
        plain = lora.Plain(self.policy.network)
        return lambda name: plain[name.removeprefix("network.")]

    def plain(self) -> nn.Module:
        """See `Network`."""
        module, given = self._bare(), self._given()
        module.load_state_dict({name: given(name) for name in module.state_dict()}, assign=True)
        return module

    def weights(self) -> Mapping[str, torch.Tensor]:
        """See `Network`."""
        return Weights(self._bare(), self.recipe, self._given())


@dataclass(frozen=True)
class Choice:
    """What runs one network."""

    network: Network
    engine: Engine
    parity: Parity | None
    """None of eager."""
    plan: Plan | None
    why: str = ""
    """What was tried before it and not taken."""

    @classmethod
    def eager(cls, network: Network, why: str = "") -> Choice:
        """The network's own module; of one that does not train and is wider than its recipe, a copy in the recipe's precision (fp8's is bf16)."""
        recipe = network.recipe
        if recipe.refit or recipe.precision == "fp32" or all(one.dtype == recipe.dtype for one in network.eager.parameters()):
            return cls(network, Eager(network.eager, recipe), None, None, why)
        narrow = dataclasses.replace(recipe, precision="bf16")
        return cls(network, Eager(prepared(network.eager, narrow), narrow), None, None, why)

    @property
    def own(self) -> bool:
        """Whether it is the network's own module, which takes and gives what it is used with."""
        return isinstance(self.engine, Eager) and self.engine.module is self.network.eager

    @property
    def run(self) -> Callable[..., Any]:
        """What a network's user calls: what is outside an engine's ranges is run by the network's own module."""
        if self.own:
            return self.engine
        return Running(self.engine, None if self.engine.back_end == "eager" else self.network.eager)

    @property
    def plain(self) -> dict[str, Any]:
        """For a record: names and errors, no times."""
        found: dict[str, Any] = {"back_end": self.engine.back_end}
        if self.parity is not None:
            found |= {"max_rel_error": self.parity.plain()["max_rel_error"], "tolerance": self.parity.tolerance}
        return found | ({"why": self.why} if self.why else {})


def built(network: Network, name: str, store: Store, device: torch.device, recorded: Sequence[Any], timed: bool) -> Choice:
    """`network` by back end `name`, compared on `recorded`, its parity kept beside the plan. EngineError where it cannot be made."""
    chosen = back_end(name)
    if missing := chosen.requires():
        raise EngineError(missing)
    with _making(network, name, device):
        plan = planned(name, network.plain(), network.recipe, chosen.architecture(device), store, recorded)
        made = _loaded(network, name, plan, device, recorded, timed)
    assert made.parity is not None
    store.write_parity(plan.key, made.parity.plain())
    return made


@contextlib.contextmanager
def _making(network: Network, name: str, device: torch.device) -> Iterator[None]:
    """On `device`; an EngineError for whatever CUDA, a compiled graph or a file raises, or no memory does: the next back end may do better."""
    with on(device):
        try:
            yield
        except EngineError:
            raise
        except (RuntimeError, OSError) as error:
            raise EngineError(f"{network.name}: {name} does not run: {said(error)[0]}") from error


def _loaded(network: Network, name: str, plan: Plan, device: torch.device, recorded: Sequence[Any], timed: bool) -> Choice:
    """`network` by `plan` on `device`, as it compared on `recorded`."""
    give_back(device)  # engines hold their weights and activations past torch
    engine = back_end(name).load(plan.folder, network.recipe, device)
    rival = Choice.eager(network).run if timed else None
    found = parity.compare(network.recipe, name, Running(engine), network.eager, recorded, rival)
    return Choice(network, engine, found, plan)


def choose(
    network: Network, settings: EnginesConfig, store: Store, device: torch.device, recorded: Sequence[Any], told: set[str] | None = None,
    without: Mapping[str, str] = MappingProxyType({}),
) -> Choice:  # fmt: skip
    """The back end that `settings` name, or of `auto` the fastest of those that passed and are `FASTER` than eager; else eager. What is not taken
    is said.

    `told`: reasons that were said before, of other networks, and are not said again; the present ones are added. `without`: back ends that are not
    to be taken, and why.
    """
    told = set() if told is None else told
    asked = AUTOMATIC.get(device.type, ()) if settings.back_end == "auto" else (settings.back_end,)
    names = [name for name in asked if name not in without and name != "eager"]
    why = list(dict.fromkeys(without.values()))
    made: Choice | None = None
    passed: list[tuple[float, Parity, Plan]] = []
    for name in names:
        made = None  # an engine is let go before the next is built: a GPU may have no room for two
        try:
            if network.recipe.refit and name in WITHOUT_REFIT:
                raise EngineError(f"{network.name}: {name} builds plans that cannot be refitted")
            made = built(network, name, store, device, recorded, timed=True)
        except EngineError as error:
            reason = str(error)
        else:
            found = made.parity
            assert found is not None
            assert found.speedup is not None
            assert made.plan is not None
            if found.passed and (found.speedup >= FASTER or settings.back_end != "auto"):
                passed.append((found.speedup, found, made.plan))
                continue
            store.release(made.plan.key)
            reason = f"{network.name}: {name}: {found.said}{f', auto wants {FASTER}x eager' if found.passed else ''}"
        why.append(reason)
        if reason not in told and (back_end(name).requires() is None or settings.back_end != "auto"):
            told.add(reason)
            console.say(f"engines: {reason}; {'the next back end' if name != names[-1] else 'the best of the others' if passed else 'eager'} is used")
    if not passed:
        return Choice.eager(network, "; ".join(why))
    passed.sort(key=lambda one: -one[0])
    name = passed[0][1].back_end
    for _, found, plan in passed[1:]:
        store.release(plan.key)
        why.append(f"{network.name}: {found.back_end}: {found.said}, {name} is faster")
    if made is None or made.engine.back_end != name:
        made = None
        try:
            made = built(network, name, store, device, recorded, timed=True)
        except EngineError as error:  # it could be had a moment ago
            return choose(network, settings, store, device, recorded, told, {**without, name: str(error)})
    return dataclasses.replace(made, why="; ".join(why))


@contextlib.contextmanager
def recording(networks: Sequence[Network], most: int = 4) -> Iterator[dict[str, Recorder]]:
    """While it is open, keep what the networks are given; they run in eager mode."""
    before = [dict(network.runs) for network in networks]
    recorders = {network.name: Recorder(network.eager, most) for network in networks}
    for network in networks:
        network.runs[network.name] = recorders[network.name]
    try:
        yield recorders
    finally:
        for network, runs in zip(networks, before, strict=True):
            network.runs.clear()
            network.runs.update(runs)


@dataclass(frozen=True)
class LoopInputs:
    """What a closed loop of chunks is driven by."""

    frame: torch.Tensor
    """(1, H, W, 3) uint8."""
    maps: Sequence[ActionMap]
    noise: Sequence[torch.Tensor]


def loop_inputs(simulator: Evac, frame: torch.Tensor, chunks: int = max(parity.LOOP_CHUNKS), seed: int = 0) -> LoopInputs:
    """Random action maps and noise, a function of `seed`, that follow `frame` (H, W, 3) uint8."""
    config, device = simulator.config, frame.device
    generator = torch.Generator("cpu").manual_seed(noise.torch_seed(seed, noise.Stream.WEIGHTS, 31))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    maps = []
    for _ in range(chunks):
        picture = torch.zeros(1, config.chunk, config.height, config.width, 3, dtype=torch.uint8)
        for step in range(config.chunk):
            row, column = (int(torch.randint(0, side // 2, (1,), generator=generator)) for side in (config.height, config.width))
            picture[0, step, row : row + config.height // 8, column : column + config.width // 8] = torch.tensor([255, 64, 64], dtype=torch.uint8)
        maps.append(ActionMap(picture.to(device), normal(1, 6, *config.latent), normal(1, config.chunk, DELTA_DIM)))
    return LoopInputs(frame[None], maps, [normal(1, *simulator.noise_shape()) for _ in range(chunks)])


def loop_histories(simulator: Evac, given: LoopInputs) -> dict[int, torch.Tensor]:
    """Latents (n, z, h, w) of all frames after some of the chunks, by number of chunks."""
    memory: list[Memory] = simulator.begin(given.frame)
    kept = {}
    for number, (action_map, drawn) in enumerate(zip(given.maps, given.noise, strict=True), 1):
        _, memory = simulator.imagine(memory, action_map, drawn)
        if number in parity.LOOP_CHUNKS:
            kept[number] = memory[0].history
    return kept


def compare_loops(simulator: Evac, choices: Sequence[Choice], given: LoopInputs) -> dict[str, float]:
    """Relative L2 distance of the latents that a closed loop made with the engines to those of eager, by number of chunks.

    Infinite where either's are not finite: there is nothing to compare.
    """
    try:
        with placed([dataclasses.replace(one, engine=Eager(one.network.eager, one.network.recipe)) for one in choices]):
            want = loop_histories(simulator, given)
        with placed(choices):
            ours = loop_histories(simulator, given)
    except FloatingPointError:
        return dict.fromkeys(map(str, parity.LOOP_CHUNKS), math.inf)
    return {str(number): relative_error(ours[number].float().cpu(), latents.float().cpu()) for number, latents in want.items()}


def place(choices: Sequence[Choice]) -> None:
    """Have the networks run by what was chosen."""
    for one in choices:
        one.network.runs[one.network.name] = one.run


@contextlib.contextmanager
def placed(choices: Sequence[Choice]) -> Iterator[None]:
    """`place`, while it is open."""
    before = [dict(one.network.runs) for one in choices]
    place(choices)
    try:
        yield
    finally:
        for one, runs in zip(choices, before, strict=True):
            one.network.runs.clear()
            one.network.runs.update(runs)


def checked_loop(simulator: Evac, choices: Sequence[Choice], store: Store, frame: torch.Tensor) -> list[Choice]:
    """`choices`, those of `simulator` with what a closed loop that follows `frame` (H, W, 3) said, which is kept beside their plans."""
    mine = [one for one in choices if one.network.runs is simulator.runs]
    if all(one.parity is None for one in mine):
        return list(choices)
    loop = compare_loops(simulator, mine, loop_inputs(simulator, frame))
    checked: list[Choice] = []
    for one in choices:
        if one.network.runs is simulator.runs and one.parity is not None and one.plan is not None:
            found = dataclasses.replace(one.parity, loop=loop, loop_tolerance=one.network.recipe.loop_tolerance)
            store.write_parity(one.plan.key, found.plain())
            one = dataclasses.replace(one, parity=found)
        checked.append(one)
    return checked


def chosen(
    networks: Sequence[Network], settings: EnginesConfig, store: Store, recorded: Mapping[str, Sequence[Any]],
    loop: tuple[Evac, torch.Tensor] | None = None, kept: Mapping[str, Any] = MappingProxyType({}),
) -> list[Choice]:  # fmt: skip
    """What runs each network, see `choose`; of those in `kept`, that back end. `recorded`: inputs of each, by name.

    `loop`: the simulator and a frame (H, W, 3) uint8 on its device. Where its closed loop drifts too far, which is said, it is run by what is left.
    """
    told: set[str] = set()
    drifted: dict[str, str] = {}

    def one_of(network: Network) -> Choice:
        asked = dataclasses.replace(settings, back_end=kept[network.name]) if network.name in kept else settings
        return choose(network, asked, store, network.device, recorded[network.name], told, drifted)

    choices = [one_of(network) for network in networks]
    while loop is not None:
        with on(loop[1].device):
            choices = checked_loop(loop[0], choices, store, loop[1])
        wrong = {one.network.name: (one.engine.back_end, one.parity.said) for one in choices if one.parity is not None and not one.parity.passed}
        if not wrong:
            break
        reason = "simulator: {}: {}".format(*next(iter(wrong.values())))
        console.say(f"engines: {reason}; the next back end is used, or eager")
        drifted |= dict.fromkeys((name for name, _ in wrong.values()), reason)
        sound = {one.network.name: one for one in choices if one.network.name not in wrong}
        choices = []  # lets the engines of the others go
        choices = [sound.get(network.name) or one_of(network) for network in networks]
    return choices


@dataclass
class Fitted:
    """Engines in their places; those of the policy follow its weights."""

    choices: list[Choice]
    recorded: Mapping[str, Sequence[Any]]
    store: Store | None = None
    """Whose plans they are: nobody throws them away while it lives."""
    refits: int = 0

    @property
    def plain(self) -> dict[str, dict[str, Any]]:
        """For a record, by name: what ran each network."""
        return {one.network.name: one.plain for one in self.choices}

    def refit(self) -> dict[str, Parity]:
        """Give the policy's engines its present weights, LoRA added to the pristine ones, and compare again.

        An engine that refuses, or fails, is replaced by eager, which is said. Returns what was found, by name.
        """
        self.refits += 1
        found = {}
        for i, one in enumerate(self.choices):
            if one.engine.back_end == "eager" or one.network.weights is None:
                continue
            began = time.monotonic()
            try:
                one.engine.refit(one.network.weights())
                seconds = time.monotonic() - began
                name, recorded = one.engine.back_end, self.recorded[one.network.name]
                compared = parity.compare(one.network.recipe, name, Running(one.engine), one.network.eager, recorded)
                now = dataclasses.replace(compared, refits=self.refits, refit_s=seconds)
                reason = "" if now.passed else f"{one.network.name}: after refit {self.refits}: {now.said}"
                found[one.network.name] = now
            except (RuntimeError, OSError) as error:  # an EngineError, or one of CUDA, of a compiled graph or of a plan's file
                reason = str(error)
            if reason:
                console.say(f"engines: {reason}; eager is used")
                self.choices[i] = Choice.eager(one.network, reason)
                place([self.choices[i]])
        return found


def alike(first: Fitted, networks: Sequence[Network], store: Store, device: torch.device) -> Fitted:
    """The back ends of `first`, for copies of its networks on another GPU: compared there on the same inputs, put into place.

    By its plans as they are, whose bytes were checked when `first` took them: only a GPU of another architecture has plans of its own.
    EngineError where one does not pass there.
    """
    names, before = [network.name for network in networks], {one.network.name: one for one in first.choices}
    recorded = {name: [tuple(one.to(device) for one in given) for given in first.recorded.get(name, ())] for name in names}
    choices = []
    for one, network in ((before[network.name], network) for network in networks):
        name, plan, given = one.engine.back_end, one.plan, recorded[network.name]
        if plan is None:
            choices.append(Choice.eager(network, one.why))
            continue
        if back_end(name).architecture(device) == plan.wanted.arch:
            with _making(network, name, device):
                made = _loaded(network, name, plan, device, given, timed=False)
        else:
            made = built(network, name, store, device, given, timed=False)
        assert made.parity is not None
        if not made.parity.passed:
            raise EngineError(f"{network.name}: {name} passed on the first GPU and not on {device}: {made.parity.said}; use one GPU, or eager")
        choices.append(made)
    place(choices)
    return Fitted(choices, recorded, store)


def precision_of(settings: EnginesConfig, device: torch.device) -> Precision:
    """`settings.precision`, where auto was chosen for `device`."""
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if device.type == "cuda" else "fp32"


def _kept(path: Path) -> dict[str, Any]:
    """Back ends by network, as `fitted` wrote them; none where it did not yet. CheckpointError where they are damaged."""
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in found.values():
            back_end(name)
    except (ValueError, TypeError, AttributeError) as error:
        raise checkpoint.CheckpointError(f"{path}: damaged ({error}); begin the stage anew (--from)") from error
    return found


def fitted(
    networks: Sequence[Network], rollouts: Callable[[], object], settings: EnginesConfig, store: Store, kept: Path, simulator: Evac | None = None
) -> Fitted:
    """Engines for `networks`, each on its own device, put into place. `rollouts` makes a few in eager mode: their inputs are what engines are
    compared on.

    What is taken is written to `kept`; where that is there, its back ends are taken again, so that a run that goes on makes the same bits.
    EngineError where one of these cannot be had any more.
    """
    if settings.back_end == "eager" or not networks:
        plain = [Choice.eager(one) for one in networks]
        place([one for one in plain if not one.own])
        return Fitted(plain, {})
    before = _kept(kept)
    with recording(networks) as recorders:
        rollouts()
    recorded = {name: one.recorded for name, one in recorders.items()}
    loop = None
    if simulator is not None:
        config, device = simulator.config, simulator.latent_scale.device
        loop = simulator, torch.zeros(config.height, config.width, 3, dtype=torch.uint8, device=device)
    choices = chosen(networks, settings, store, recorded, loop, before)
    for one in choices:
        name = before.get(one.network.name, one.engine.back_end)
        if one.engine.back_end != name:
            raise EngineError(f"{kept}: {one.network.name} was begun with {name}, which is not to be had now ({one.why}); begin the stage anew")
    place(choices)
    if not kept.is_file():
        checkpoint.write_text(kept, json.dumps({one.network.name: one.engine.back_end for one in choices}, indent=1))
    return Fitted(choices, recorded, store)
