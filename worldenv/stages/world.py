"""Stage world: controller, autoencoder and simulator, from demonstrations and exploration."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from worldenv import checkpoint
from worldenv.checkpoint import Savepoint
from worldenv.data.episode import Episode
from worldenv.kinematics import fit
from worldenv.learning import processes, world_model
from worldenv.run import Stage
from worldenv.simulator import weights as simulators
from worldenv.simulator.evac import Evac
from worldenv.stages.desk import Desk


def _world_episodes(desk: Desk) -> tuple[list[Episode], list[Episode]]:
    """What the world model learns from, and what it is judged by."""
    training, held_out = list(desk.episodes("demos")), desk.explored[1]
    return training + (desk.explored[0] if desk.settings.world.extra_data else []), held_out


def fit_world(desk: Desk, savepoint: Callable[[str], Savepoint]) -> tuple[Evac, dict[str, Any]]:
    training, held_out = _world_episodes(desk)
    return world_model.train(
        desk.settings.simulator, desk.settings.world, training, held_out, desk.camera, desk.site.robot, desk.seed, desk.device, savepoint
    )


def world(desk: Desk, stage: Stage) -> None:
    """Controller, autoencoder and simulator learn how the world moves and looks; of several processes, all take part."""
    training, _ = _world_episodes(desk)
    controller = fit([e.pose for e in training], [e.command for e in training], desk.site.robot, margin_m=0.0)
    checkpoint.write_text(stage.folder / "controller.json", json.dumps(controller.to_dict()))
    processes.agreed("world")
    simulator, metrics = fit_world(desk, stage.savepoint)
    stage.metrics |= metrics
    checkpoint.save(stage.folder / "simulator.safetensors", simulators.to_tree(simulator))
