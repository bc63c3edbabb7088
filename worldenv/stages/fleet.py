"""The networks that make rollouts: on every GPU that takes part a copy of all, with the engines that the first one took."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worldenv import compiled
from worldenv.devices import on
from worldenv.engines.parity import Parity
from worldenv.engines.store import Store
from worldenv.envs.true_world import TrueWorld
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.reflector.contract import Judge
from worldenv.rollout.collect import Assignment, Replica
from worldenv.simulator.evac import Evac
from worldenv.stages.desk import RECORD_NUMBERS, Desk
from worldenv.world import World


@dataclass(frozen=True)
class Fleet:
    """Who makes the rollouts of one policy."""

    replicas: list[Replica]
    """One for each worker."""
    fitted: list[compiled.Fitted]
    """Engines, by device."""
    policies: list[OpenVLAOFT]
    """By device; the first one is trained, the others are its copies."""

    @property
    def engines(self) -> dict[str, dict[str, Any]]:
        """For a record, by name: what runs each network on the first device."""
        return self.fitted[0].plain

    def follow(self) -> dict[str, Parity]:
        """Have all devices act by the first policy's present weights. Returns how its engines compared after that, by name."""
        first = dict(self.policies[0].network.named_parameters())
        with torch.no_grad():
            for other in self.policies[1:]:
                for name, own in other.network.named_parameters():
                    if own.requires_grad:
                        own.copy_(first[name])
        found = []
        for one, policy in zip(self.fitted, self.policies, strict=True):
            with on(policy.device):
                found.append(one.refit())
        return found[0]


def assembled(desk: Desk, folder: Path, policy: OpenVLAOFT, reflector: Judge | None) -> Fleet:
    """The fleet of `policy`, which is on the run's device: in the imagined world with `reflector`, or in the true environment without.

    Engines are fitted, and what was taken is kept in stage folder `folder`. RunError where the run asks for GPUs that are not there.
    """
    simulator = None if reflector is None else desk.simulator()
    world: World = TrueWorld(desk.env, desk.device) if simulator is None else desk.world(reflector, simulator)
    elsewhere = [] if world.at_home else desk.devices[1:]
    others = [(device, _copied(policy, device)) for device in elsewhere]  # before engines, which cannot be copied, are in it
    replicas = [Replica(policy, world, desk.devices[0])] * desk.schedule.workers(desk.device, world)
    fitted = [_fitted(desk, folder, policy, replicas, simulator, reflector)]
    for device, other in others:
        simulator, judge = desk.simulator(device), desk.reflector(device)
        replicas.append(Replica(other, desk.world(judge, simulator, device), device))
        fitted.append(compiled.alike(fitted[0], _networks(desk, other, simulator, judge), _store(desk), device))
    return Fleet(replicas, fitted, [policy, *(other for _, other in others)])


def _copied(policy: OpenVLAOFT, device: torch.device) -> OpenVLAOFT:
    other = copy.deepcopy(policy)
    other.network.to(device)
    return other


def _store(desk: Desk) -> Store:
    return Store(desk.run.out / "engines", int(desk.settings.engines.limit_gb * 1e9))


def _networks(desk: Desk, policy: OpenVLAOFT, simulator: Evac | None, reflector: Judge | None) -> list[compiled.Network]:
    precision, loop = compiled.precision_of(desk.settings.engines, desk.device), desk.settings.loop
    return compiled.of_rollout(policy, simulator, reflector, precision, loop.bucket, loop.judge_bucket)


def _fitted(
    desk: Desk, folder: Path, policy: OpenVLAOFT, replicas: Sequence[Replica], simulator: Evac | None, reflector: Judge | None
) -> compiled.Fitted:  # fmt: skip
    settings, engines = desk.settings, desk.settings.engines
    if simulator is None:  # the true environment is most of such a rollout
        engines = dataclasses.replace(engines, back_end="eager")
    tasks = len(desk.env.tasks)
    jobs = [Assignment(RECORD_NUMBERS + n, n, desk.context(n % tasks, 0)) for n in range(settings.loop.bucket)]

    def rollouts() -> None:
        with desk.flights(replicas, math.inf) as flights:
            list(flights.fly(jobs))

    networks = _networks(desk, policy, simulator, reflector)
    return compiled.fitted(networks, rollouts, engines, _store(desk), desk.device, folder / "engines.json", simulator)
