"""The true environment as a world: what LOOP, the audit and the scheduler need to run where nothing is imagined.

It answers what the imagined world answers, with the predicate in place of the reflector. So a loss of success between the two is the
learned world's, and LOOP itself can be tried without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from worldenv.envs.contract import Snapshot, Split, TrueEnvironment
from worldenv.nouns import Context
from worldenv.world import Made, Scene, WorldStage


class TrueWorld:
    """`World` over one true environment, which serves all its scenes in turn; it draws on the thread that made it, as OpenGL wants."""

    at_home = True

    def __init__(self, env: TrueEnvironment, device: torch.device, split: Split = "train", every_frame: bool = False) -> None:
        """`split` is where contexts count their states. Without `every_frame`, only the last frame of a chunk is drawn and the others repeat the
        frame before it: a policy sees no more, and drawing is what costs.
        """
        self._env, self._device, self._split, self._every_frame = env, device, split, every_frame

    def begin(self, contexts: Sequence[Context], numbers: Sequence[int]) -> list[Scene]:
        """See `World.begin`; task and state index of a context say where."""
        scenes = []
        for context, number in zip(contexts, numbers, strict=True):
            now = self._env.begin(context.task, self._split, context.state_index)
            scenes.append(Scene(context, number, 0, self._frames([now])[0], self._proprio(now), self._env.capture()))
        return scenes

    def enter(self, scenes: Sequence[Scene]) -> list[Any]:
        """See `World.enter`: what `begin` has seen to."""
        return [scene.inside for scene in scenes]

    def _frames(self, moments: Sequence[Snapshot]) -> torch.Tensor:
        return torch.from_numpy(np.stack([moment.frame for moment in moments])).to(self._device)

    def _proprio(self, now: Snapshot) -> torch.Tensor:
        return torch.from_numpy(self._env.robot.proprio(now.pose, np.float64(now.gripper))).to(self._device)

    @property
    def stages(self) -> tuple[WorldStage, ...]:
        """See `World.stages`; a score is 1 while the predicate holds, else 0."""
        return (WorldStage("act", self._act, batched=False),)

    def _act(self, work: Sequence[tuple[Scene, torch.Tensor]]) -> list[Made]:
        made = []
        for scene, command in work:
            moments, inside = self._play(scene.inside, command.detach().cpu().numpy())
            seen, score = self._frames(moments), torch.tensor([float(moment.success) for moment in moments])
            after = replace(scene, chunk=scene.chunk + 1, frame=seen[-1], proprio=self._proprio(moments[-1]), inside=inside)
            made.append(Made(seen, after, score))
        return made

    def watch(self, scenes: Sequence[Scene]) -> list[Any]:
        """See `World.watch`: the predicate remembers nothing."""
        return [None] * len(scenes)

    def judge(self, watches: Sequence[Any], made: Sequence[Made]) -> tuple[torch.Tensor, list[Any]]:
        """See `World.judge`."""
        return torch.stack([one.score for one in made if one.score is not None]), list(watches)

    def _play(self, inside: Any, commands: np.ndarray[Any, np.dtype[np.floating[Any]]]) -> tuple[list[Snapshot], Any]:
        self._env.restore(inside)
        last = len(commands) - 1
        moments = [self._env.advance(command, render=self._every_frame or k == last) for k, command in enumerate(commands)]
        return moments, self._env.capture()
