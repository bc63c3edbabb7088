"""One step of a world, and when it ends: commands in, frames and scores out (paper, Algorithm 1, lines 13 to 18).

A world is either imagined (kinematics, action map, simulator, reflector) or true (`envs/true_world.py`); LOOP cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from worldenv import action_map, kinematics, noise
from worldenv.nouns import Camera, Context, Observation
from worldenv.reflector.contract import Reflector
from worldenv.robots.contract import Robot
from worldenv.simulator.contract import Simulator


@dataclass(frozen=True)
class Scene:
    """One rollout between two chunks. Never changed in place, so a scene can be stepped twice with the same outcome."""

    context: Context
    number: int
    """The rollout's own number: the second half of its noise key."""
    chunk: int
    """Chunks so far."""
    frame: torch.Tensor
    """(H, W, 3) uint8: what the policy sees next."""
    proprio: torch.Tensor
    """(P,) float32."""
    inside: Any
    """What the world itself remembers."""


@dataclass(frozen=True)
class Outcome:
    """K steps of B rollouts."""

    frames: torch.Tensor
    """(B, K, H, W, 3) uint8: what is seen after each step."""
    score: torch.Tensor
    """(B, K) float32 in [0, 1] after each step, on the CPU."""
    scenes: list[Scene]
    """The B rollouts after the chunk."""


class World(Protocol):
    """Where rollouts happen."""

    def begin(self, contexts: Sequence[Context], numbers: Sequence[int]) -> list[Scene]:
        """Rollouts `numbers` at the start of their contexts."""
        ...

    def step(self, scenes: Sequence[Scene], command: torch.Tensor) -> Outcome:
        """Execute one chunk of commands (B, K, 7) in B scenes, which may be at different chunks."""
        ...


def ended_at(score: torch.Tensor, threshold: float) -> torch.Tensor:
    """(B,) int64: index of the first step whose score is above `threshold`, or K where there is none; `score` (B, K)."""
    above = score > threshold
    first = above.to(torch.int64).argmax(dim=1)
    return torch.where(above.any(dim=1), first, score.shape[1])


def observe(scenes: Sequence[Scene]) -> Observation:
    """What the policy sees in B scenes."""
    return Observation(
        frame=torch.stack([scene.frame for scene in scenes]),
        proprio=torch.stack([scene.proprio for scene in scenes]),
        instruction=tuple(scene.context.instruction for scene in scenes),
    )


@dataclass(frozen=True)
class _Imagined:
    """What the imagined world remembers of one rollout."""

    state: kinematics.KinematicState
    memory: Any
    watch: Any


class ImaginedWorld:
    """Kinematics moves the gripper, the action map draws its path, the simulator imagines the frames, the reflector scores them."""

    def __init__(
        self, simulator: Simulator, reflector: Reflector | None, robot: Robot, controller: kinematics.ControllerModel,
        camera: Camera, latent: tuple[int, int], seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        """`latent` (h, w) is the simulator's latent size; without a reflector every score is 0 and nothing ends."""
        self._simulator, self._reflector = simulator, reflector
        self._robot, self._controller, self._camera, self._latent = robot, controller, camera, latent
        self._seed, self._device = seed, device

    def begin(self, contexts: Sequence[Context], numbers: Sequence[int]) -> list[Scene]:
        """See `World.begin`."""
        frame = torch.from_numpy(np.stack([context.frame for context in contexts])).to(self._device)
        memories = self._simulator.begin(frame)
        watches = self._reflector.begin([c.instruction for c in contexts], frame) if self._reflector else [None] * len(contexts)
        scenes = []
        for i, (context, number) in enumerate(zip(contexts, numbers, strict=True)):
            pose, gripper = torch.from_numpy(context.pose)[None], torch.tensor([context.gripper], dtype=torch.float64)
            inside = _Imagined(kinematics.rest(pose, gripper), memories[i], watches[i])
            scenes.append(Scene(context, number, 0, frame[i], self._proprio(pose, gripper)[0], inside))
        return scenes

    def _proprio(self, pose: torch.Tensor, gripper: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self._robot.proprio(pose, gripper), dtype=torch.float32, device=self._device)

    def step(self, scenes: Sequence[Scene], command: torch.Tensor) -> Outcome:
        """See `World.step`. The noise of a chunk is a function of (seed, rollout number, chunk) alone."""
        inside: list[_Imagined] = [scene.inside for scene in scenes]
        before = kinematics.stack([one.state for one in inside])
        path, after = kinematics.follow(before, command.double().cpu(), self._controller)
        drawn = action_map.draw(path, (before.pose, before.gripper), self._camera, self._robot, self._latent, self._device)
        frames, memories = self._simulator.imagine([one.memory for one in inside], drawn, self._noise(scenes))
        if self._reflector:
            score, watches = self._reflector.judge([one.watch for one in inside], frames)
        else:
            score, watches = torch.zeros(frames.shape[:2]), [None] * len(scenes)
        proprio = self._proprio(after.pose, after.gripper)
        states = kinematics.unstack(after)
        return Outcome(
            frames, score.float().cpu(),
            [
                replace(scene, chunk=scene.chunk + 1, frame=frames[i, -1], proprio=proprio[i], inside=_Imagined(states[i], memories[i], watches[i]))
                for i, scene in enumerate(scenes)
            ],
        )  # fmt: skip

    def _noise(self, scenes: Sequence[Scene]) -> torch.Tensor:
        draws, *shape = self._simulator.noise_shape()
        numbers, chunks = np.array([s.number for s in scenes]), np.array([s.chunk for s in scenes])
        steps = [noise.normal(self._seed, numbers, chunks, step, noise.Stream.SIMULATOR, tuple(shape)) for step in range(draws)]
        return torch.from_numpy(np.stack(steps, axis=1)).to(self._device)
