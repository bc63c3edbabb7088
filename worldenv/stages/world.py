"""Stage world: controller, autoencoder and simulator, from demonstrations and exploration."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from worldenv import checkpoint, console
from worldenv.checkpoint import Savepoint
from worldenv.data.episode import Episode, OnDisk
from worldenv.kinematics import ControllerModel, drift, fit
from worldenv.learning import processes, world_model
from worldenv.run import Stage
from worldenv.simulator import weights as simulators
from worldenv.simulator.evac import Evac
from worldenv.stages.desk import Desk

_UNEXPLAINED = 0.15
"""Of the tabletop's episodes it is 0.005 at most, 0.07 where a policy that learned nothing presses against what holds it; with two axes of the
commands exchanged 0.2 to 0.4, whatever controller is fitted."""


def _world_episodes(desk: Desk) -> tuple[Sequence[Episode], Sequence[Episode]]:
    """What the world model learns from, and what it is judged by."""
    demos, (training, held_out) = desk.episodes("demos"), desk.explored_on_disk
    shown = OnDisk([(demos, e.number) for e in demos.entries])
    return shown + training if desk.settings.world.extra_data else shown, held_out


def fit_world(desk: Desk, savepoint: Callable[[str], Savepoint]) -> tuple[Evac, dict[str, Any]]:
    training, held_out = _world_episodes(desk)
    return world_model.train(
        desk.settings.simulator, desk.settings.world, training, held_out, desk.camera, desk.site.robot, desk.seed, desk.device, savepoint
    )


def _off(controller: ControllerModel, episodes: Sequence[Episode], chunk: int) -> dict[str, float]:
    """How far kinematics is off after `chunk` commands of `episodes`, of which one at least is that long: medians [mm, rad, share of travel], and
    `unexplained`, the share of squared displacements [m^2] that is error.
    """
    moved = np.concatenate([np.linalg.norm(e.pose[chunk:, :3] - e.pose[:-chunk, :3], axis=1) for e in episodes if e.steps >= chunk])
    errors = drift(controller, [e.pose for e in episodes], [e.command for e in episodes], chunk, [e.gripper for e in episodes])
    return {
        "position_mm": 1000 * float(np.median(errors.position)), "angle_rad": float(np.median(errors.angle)),
        "gripper": float(np.median(errors.gripper)), "unexplained": float(np.sum(errors.position**2) / max(np.sum(moved**2), 1e-12)),
        "commands": chunk,
    }  # fmt: skip


def world(desk: Desk, stage: Stage) -> None:
    """Controller, autoencoder and simulator learn how the world moves and looks; of several processes, all take part."""
    training, held_out = _world_episodes(desk)
    moves = [(e.pose, e.command) for e in training]
    controller = fit([pose for pose, _ in moves], [command for _, command in moves], desk.site.robot, margin_m=0.0)
    checkpoint.write_text(stage.folder / "controller.json", json.dumps(controller.to_dict()))
    stage.metrics["kinematics"] = off = _off(controller, list(held_out), desk.settings.simulator.chunk)
    if off["unexplained"] > _UNEXPLAINED:
        console.say(
            f"world: commands explain only {100 * (1 - off['unexplained']):.0f} % of how far the gripper of held-out episodes moves in a chunk "
            f"({off['position_mm']:.0f} mm off, median), and action maps are drawn by them: are their axes and frame those of the poses?"
        )
    processes.agreed("world")
    simulator, metrics = fit_world(desk, stage.savepoint)
    stage.metrics |= metrics
    checkpoint.save(stage.folder / "simulator.safetensors", simulators.to_tree(simulator))
