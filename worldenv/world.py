"""One chunk in a world, and when it ends: commands in, frames and scores out (paper, Algorithm 1, lines 13 to 18).

A chunk passes the stages of its world, which make frames, and is then judged. Stages take and return one value per rollout and change nothing in
place, so that a batch may hold any rollouts at any chunk, work that turns out to be for nothing is dropped by forgetting it, and whatever failed
can be done again. A world is either imagined (kinematics, action map, simulator, reflector) or true (`envs/true_world.py`); LOOP cannot tell
them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from worldenv import action_map, kinematics, noise
from worldenv.kernels.philox import Draw, normal
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
    """What the world itself remembers, None before `World.enter`; what its judge does is a watch, and apart from this: it comes later."""


@dataclass(frozen=True)
class Made:
    """One chunk of one rollout, before it is judged."""

    frames: torch.Tensor
    """(K, H, W, 3) uint8: what is seen after each step."""
    after: Scene
    """The rollout after the chunk."""
    score: torch.Tensor | None = None
    """(K,) float32, where the world itself knows it."""


@dataclass(frozen=True)
class WorldStage:
    """One part of making a chunk."""

    name: str
    run: Callable[[Sequence[Any]], list[Any]]
    """From what the stage before left of B rollouts to what this one leaves. The first is given (Scene, command (K, 7)) pairs; `Made` comes last."""
    steps: int = 1
    """How often a chunk passes it, one after the other."""
    batched: bool = True
    """It is faster on many at once."""


class World(Protocol):
    """Where rollouts happen."""

    @property
    def stages(self) -> tuple[WorldStage, ...]:
        """In the order of a chunk."""
        ...

    @property
    def at_home(self) -> bool:
        """It must be called on one thread, always the same: that which made it."""
        ...

    def begin(self, contexts: Sequence[Context], numbers: Sequence[int]) -> list[Scene]:
        """Rollouts `numbers` at the start of their contexts, as a policy sees them."""
        ...

    def enter(self, scenes: Sequence[Scene]) -> list[Any]:
        """What the world remembers of B rollouts that have just begun (`Scene.inside`), which its stages are to be given."""
        ...

    def watch(self, scenes: Sequence[Scene]) -> list[Any]:
        """The judge's watches of B rollouts that have just begun."""
        ...

    def judge(self, watches: Sequence[Any], made: Sequence[Made]) -> tuple[torch.Tensor, list[Any]]:
        """Scores (B, K) float32 in [0, 1] after each step of the chunks `made`, on the CPU, and the watches after them."""
        ...


def advance(world: World, scenes: Sequence[Scene], command: torch.Tensor) -> list[Made]:
    """Execute one chunk of commands (B, K, 7) in B scenes, which may be at different chunks: all stages, one after the other, not judged.

    ValueError where there is not one row of commands for each scene.
    """
    if command.dim() != 3 or len(command) != len(scenes):
        raise ValueError(f"world: {len(scenes)} scenes, command {tuple(command.shape)}: want one row each")
    work: list[Any] = list(zip(scenes, command, strict=True))
    for stage in world.stages:
        for _ in range(stage.steps):
            work = stage.run(work)
    return work


def started(world: World, contexts: Sequence[Context], numbers: Sequence[int]) -> list[Scene]:
    """Rollouts `numbers` at the start of their contexts, which can be advanced."""
    scenes = world.begin(contexts, numbers)
    return [replace(scene, inside=inside) for scene, inside in zip(scenes, world.enter(scenes), strict=True)]


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


@dataclass(frozen=True)
class _Imagining:
    """One rollout's chunk under way."""

    before: Scene
    state: kinematics.KinematicState
    """After the chunk."""
    proprio: torch.Tensor
    """(P,) after the chunk."""
    chunk: Any
    """The simulator's."""


def _start(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """Pose (1, 7) and gripper (1,) there."""
    return torch.from_numpy(context.pose)[None], torch.tensor([context.gripper], dtype=torch.float64)


class ImaginedWorld:
    """Kinematics moves the gripper, the action map draws its path, the simulator imagines the frames, the reflector scores them."""

    at_home = False

    def __init__(
        self, simulator: Simulator | None, reflector: Reflector | None, robot: Robot, controller: kinematics.ControllerModel,
        camera: Camera, latent: tuple[int, int], seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        """`latent` (h, w) is the simulator's latent size; without a reflector every score is 0 and nothing ends. Without a simulator it can begin
        and judge: the simulator is on another device.
        """
        self._simulated, self._reflector = simulator, reflector
        self._robot, self._controller, self._camera, self._latent = robot, controller, camera, latent
        self._seed, self._device = seed, device

    @property
    def _simulator(self) -> Simulator:
        if self._simulated is None:
            raise RuntimeError(f"the world on {self._device} has no simulator: chunks are made on another device")
        return self._simulated

    @property
    def stages(self) -> tuple[WorldStage, ...]:
        """See `World.stages`. The noise of a chunk is a function of (seed, rollout number, chunk) alone. RuntimeError without a simulator."""
        denoise = WorldStage("denoise", self._denoise, self._simulator.steps)
        return WorldStage("encode", self._encode), denoise, WorldStage("decode", self._decode)

    def begin(self, contexts: Sequence[Context], numbers: Sequence[int]) -> list[Scene]:
        """See `World.begin`."""
        frame = self._frames(contexts)
        proprio = [self._proprio(*_start(context))[0] for context in contexts]
        return [Scene(context, number, 0, frame[i], proprio[i], None) for i, (context, number) in enumerate(zip(contexts, numbers, strict=True))]

    def enter(self, scenes: Sequence[Scene]) -> list[Any]:
        """See `World.enter`."""
        memories = self._simulator.begin(self._frames([scene.context for scene in scenes]))
        return [_Imagined(kinematics.rest(*_start(scene.context)), memory) for scene, memory in zip(scenes, memories, strict=True)]

    def _frames(self, contexts: Sequence[Context]) -> torch.Tensor:
        return torch.from_numpy(np.stack([context.frame for context in contexts])).to(self._device)

    def watch(self, scenes: Sequence[Scene]) -> list[Any]:
        """See `World.watch`."""
        if not self._reflector:
            return [None] * len(scenes)
        return self._reflector.begin([scene.context.instruction for scene in scenes], torch.stack([scene.frame for scene in scenes]))

    def judge(self, watches: Sequence[Any], made: Sequence[Made]) -> tuple[torch.Tensor, list[Any]]:
        """See `World.judge`."""
        frames = torch.stack([one.frames for one in made])
        if not self._reflector:
            return torch.zeros(frames.shape[:2]), list(watches)
        score, after = self._reflector.judge(watches, frames)
        return score.float().cpu(), after

    def _proprio(self, pose: torch.Tensor, gripper: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self._robot.proprio(pose, gripper), dtype=torch.float32, device=self._device)

    def _encode(self, work: Sequence[tuple[Scene, torch.Tensor]]) -> list[_Imagining]:
        scenes = [scene for scene, _ in work]
        inside: list[_Imagined] = [scene.inside for scene in scenes]
        command = torch.stack([command for _, command in work])
        before = kinematics.stack([one.state for one in inside])
        path, after = kinematics.follow(before, command.double().cpu(), self._controller)
        drawn = action_map.draw(path, (before.pose, before.gripper), self._camera, self._robot, self._latent, self._device)
        chunks = self._simulator.begin_chunk([one.memory for one in inside], drawn, self._noise(scenes))
        return list(map(_Imagining, scenes, kinematics.unstack(after), self._proprio(after.pose, after.gripper), chunks))

    def _denoise(self, work: Sequence[_Imagining]) -> list[_Imagining]:
        chunks = self._simulator.step([one.chunk for one in work])
        return [replace(one, chunk=chunk) for one, chunk in zip(work, chunks, strict=True)]

    def _decode(self, work: Sequence[_Imagining]) -> list[Made]:
        frames, memories = self._simulator.finish_chunk([one.chunk for one in work])
        made = []
        for one, seen, memory in zip(work, frames, memories, strict=True):
            last = seen[-1].clone()  # a view would hold the frames of the whole batch for as long as the rollout
            after = replace(one.before, chunk=one.before.chunk + 1, frame=last, proprio=one.proprio, inside=_Imagined(one.state, memory))
            made.append(Made(seen, after))
        return made

    def _noise(self, scenes: Sequence[Scene]) -> torch.Tensor:
        draws, *shape = self._simulator.noise_shape()
        numbers, chunks = np.array([s.number for s in scenes]), np.array([s.chunk for s in scenes])
        steps = np.tile(np.arange(draws), len(scenes))
        draw = Draw.of(self._seed, numbers.repeat(draws), chunks.repeat(draws), steps, noise.Stream.SIMULATOR, self._device)
        return normal(draw, shape).view(len(scenes), draws, *shape)
