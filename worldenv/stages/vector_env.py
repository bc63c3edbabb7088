"""The learned world of a run as a Gymnasium vector environment."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gymnasium

from worldenv.gym import WorldVectorEnv
from worldenv.run import Run, settings_of
from worldenv.stages.desk import Desk
from worldenv.world import ImaginedWorld

ID = "worldenv/LearnedWorld-v0"


def vector_env(
    run: Path | str, num_envs: int = 8, *, device: str = "auto", steps: int | None = None, threshold: float | None = None,
    render_mode: str | None = None,
) -> WorldVectorEnv:  # fmt: skip
    """The world and the judge of the run in folder `run` (its stages world and reward), and its training states to begin from.

    `steps` [control steps] and `threshold` are the run's unless given. Nothing is written. Raises RunError where there is no such run,
    CheckpointError where a stage has left nothing or is damaged, and ValueError as `WorldVectorEnv` does.
    """
    out = Path(run)
    desk = Desk(Run(out, dataclasses.replace(settings_of(out), device=device), leads=False))
    simulator, reflector = desk.simulator(), desk.reflector()

    def world_of(seed: int) -> ImaginedWorld:
        return desk.world(reflector, simulator, seed=seed)

    return WorldVectorEnv(
        num_envs, world_of, desk.context, desk.site.tasks, desk.site.states("train"), desk.settings.policy.chunk,
        desk.settings.env.steps if steps is None else steps, reflector.config.threshold if threshold is None else threshold, render_mode,
        close=desk.site.close,
    )  # fmt: skip


def register() -> None:
    """Make `gymnasium.make_vec(ID, num_envs=8, run="runs/tiny")` known. Nothing is registered by import."""
    if ID not in gymnasium.registry:
        gymnasium.register(id=ID, vector_entry_point=f"{__name__}:{vector_env.__name__}")
