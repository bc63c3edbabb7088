"""The networks that make rollouts: on every GPU that takes part copies of those that it has, with the engines that the first of its kind took."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from worldenv import compiled
from worldenv.devices import on
from worldenv.engines.parity import Parity
from worldenv.engines.recipe import Precision
from worldenv.engines.store import Store
from worldenv.envs.true_world import TrueWorld
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.reflector.contract import Judge
from worldenv.reflector.judge import Watching
from worldenv.rollout.collect import Assignment, Part, Replica
from worldenv.simulator.evac import Evac
from worldenv.stages.desk import RECORD_NUMBERS, Desk
from worldenv.world import ImaginedWorld, advance, started


@dataclass(frozen=True)
class Fleet:
    """Who makes the rollouts of one policy."""

    replicas: list[Replica]
    """One for each worker."""
    least: list[Replica]
    """As few of them as have all networks."""
    fitted: list[tuple[torch.device, compiled.Fitted]]
    """Engines: those of the first device of each kind, where the first policy is; then of the others."""
    policies: list[OpenVLAOFT]
    """By device that has one; the first one is trained, the others are its copies."""
    judges: list[Judge]
    """The reflector, by device that has one; in the true environment none."""

    @property
    def engines(self) -> dict[str, dict[str, Any]]:
        """For a record, by name: what runs each network."""
        return self.fitted[0][1].plain

    def follow(self) -> dict[str, Parity]:
        """Have the engines of all devices act by their policies' present weights. Returns how the first's compared after that, by name."""
        found = []
        for device, one in self.fitted:
            with on(device):
                found.append(one.refit())
        return found[0]


@dataclass(frozen=True)
class _Member:
    """One device's part in it."""

    replica: Replica
    policy: OpenVLAOFT | None
    networks: list[compiled.Network]
    simulator: Evac | None
    judge: Judge | None


@dataclass(frozen=True)
class Imagining:
    """Who imagines commands that are given: nobody acts, and nobody judges."""

    worlds: list[ImaginedWorld]
    """One on every device that has a simulator of LOOP's."""
    fitted: list[compiled.Fitted]
    """Their engines."""

    @property
    def engines(self) -> dict[str, dict[str, Any]]:
        """As of a fleet."""
        return self.fitted[0].plain


def imagining(desk: Desk, folder: Path) -> Imagining:
    """Simulators by engines, as stage folder `folder` kept them, or takes them now."""
    chunk, loop = desk.settings.policy.chunk, desk.settings.loop
    simulators = [desk.simulator(device) for device, parts in desk.places if "simulator" in parts]
    devices = [simulator.latent_scale.device for simulator in simulators]
    worlds = [desk.world(None, simulator, device) for simulator, device in zip(simulators, devices, strict=True)]
    networks = [compiled.of_simulator(simulator, _precision(desk), (1, 4, max(16, loop.slots))) for simulator in simulators]
    shown = desk.episodes("demos")

    def rollouts() -> None:
        some = [shown.load(entry.number) for entry in shown.entries[: loop.bucket]]
        command = torch.from_numpy(np.stack([np.pad(e.command[:chunk], ((0, max(0, chunk - e.steps)), (0, 0)), mode="edge") for e in some]))
        scenes = started(worlds[0], [e.context for e in some], range(RECORD_NUMBERS, RECORD_NUMBERS + len(some)))
        for _ in range(2):  # what is remembered of one chunk is given to the next
            scenes = [one.after for one in advance(worlds[0], scenes, command)]

    store = _store(desk)
    fitted = compiled.fitted(networks[0], rollouts, desk.settings.engines, store, folder / "engines.json", simulators[0])
    copies = [compiled.alike(fitted, mine, store, device) for device, mine in zip(devices[1:], networks[1:], strict=True)]
    return Imagining(worlds, [fitted, *copies])


def _store(desk: Desk) -> Store:
    """One for all devices, whose plans it keeps."""
    return Store(desk.run.out / "engines", int(desk.settings.engines.limit_gb * 1e9))


def assembled(desk: Desk, folder: Path, policy: OpenVLAOFT, reflector: Judge | None) -> Fleet:
    """The fleet of `policy`, which is on the run's device: in the imagined world with `reflector`, or in the true environment without.

    `reflector` is on `desk.judging`. Engines are fitted, and what was taken is kept in stage folder `folder`. RunError where the run asks for GPUs
    that are not there.
    """
    members = [_in_truth(desk, policy)] if reflector is None else _in_imagination(desk, policy, reflector)
    by_parts: dict[frozenset[Part], _Member] = {}
    for member in members:
        by_parts.setdefault(member.replica.parts, member)
    leads = list(by_parts.values())
    replicas, least = ([one.replica for one in some] for some in (members, leads))
    if len(members) == 1:  # a CPU's workers share it
        replicas *= desk.schedule.workers(desk.device, members[0].replica.world)
    store = _store(desk)
    fitted = _fitted(desk, folder, replicas if len(members) == 1 else least, leads, store, imagined=reflector is not None)
    copies = [
        (member.replica.device, compiled.alike(fitted, member.networks, store, member.replica.device)) for member in members
        if member not in leads
    ]  # fmt: skip
    policies, judges = [one.policy for one in members if one.policy is not None], [one.judge for one in members if one.judge is not None]
    return Fleet(replicas, least, [(desk.devices[0], fitted), *copies], policies, judges)


def _in_truth(desk: Desk, policy: OpenVLAOFT) -> _Member:
    """It has a home, and so one device."""
    replica = Replica(policy, TrueWorld(desk.env, desk.device), desk.devices[0])
    networks = compiled.of_rollout(policy, None, None, _watching(desk, policy), _precision(desk), desk.settings.loop.bucket)
    return _Member(replica, policy, networks, None, None)


def _in_imagination(desk: Desk, policy: OpenVLAOFT, reflector: Judge) -> list[_Member]:
    members: list[_Member] = []
    loop, given = desk.settings.loop, [reflector]
    for number, (device, parts) in enumerate(desk.places):
        acts = None
        if "policy" in parts:
            acts = _copied(policy, device) if number else policy  # before engines, which cannot be copied, are in it
        simulator = desk.simulator(device) if "simulator" in parts else None
        judge = None
        if "reflector" in parts:
            judge = given.pop() if given else desk.reflector(device)
        networks = compiled.of_rollout(acts, simulator, judge, _watching(desk, policy), _precision(desk), loop.bucket)
        members.append(_Member(Replica(acts or policy, desk.world(judge, simulator, device), device, parts), acts, networks, simulator, judge))
    return members


def _copied(policy: OpenVLAOFT, device: torch.device) -> OpenVLAOFT:
    moved: dict[int, Any] = {id(one): nn.Parameter(one.detach().to(device), one.requires_grad) for one in policy.network.parameters()}
    moved |= {id(one): one.to(device) for one in policy.network.buffers()}
    return copy.deepcopy(policy, moved)  # what has a place there already is not copied here before: two might not fit


def _watching(desk: Desk, policy: OpenVLAOFT) -> Watching:
    return Watching(desk.site.tasks, desk.settings.env.steps, policy.chunk)


def _precision(desk: Desk) -> Precision:
    return compiled.precision_of(desk.settings.engines, desk.device)


def _fitted(
    desk: Desk, folder: Path, replicas: Sequence[Replica], leads: Sequence[_Member], store: Store, imagined: bool
) -> compiled.Fitted:
    settings, engines = desk.settings, desk.settings.engines
    if not imagined:  # the true environment is most of such a rollout
        engines = dataclasses.replace(engines, back_end="eager")
    tasks = len(desk.site.tasks)
    jobs = [Assignment(RECORD_NUMBERS + n, n, desk.context(n % tasks, 0)) for n in range(settings.loop.bucket)]

    def rollouts() -> None:
        with desk.flights(replicas, math.inf) as flights:
            list(flights.fly(jobs))

    networks = [network for lead in leads for network in lead.networks]
    simulator = next((lead.simulator for lead in leads if lead.simulator is not None), None)
    return compiled.fitted(networks, rollouts, engines, store, folder / "engines.json", simulator)
