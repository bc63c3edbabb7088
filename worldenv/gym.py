"""A world as a Gymnasium vector environment, for any RL library: what LOOP rolls out in, stepped from outside.

An action is a chunk of K commands, since a chunk is what the simulator imagines at once. All environments that are under way are imagined in one
batch. The reward is LOOP's return (World-Env, section 4.2): the score where the episode ends, 0 before. `stages/vector_env.py` opens a run's world.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from worldenv import nouns
from worldenv.nouns import ACTION_DIM, Context
from worldenv.world import Scene, World, advance, ended_at, observe, started

Observation = dict[str, NDArray[Any]]


class WorldVectorEnv(gymnasium.vector.VectorEnv[Observation, NDArray[np.float32], NDArray[Any]]):
    """`num_envs` episodes in one world.

    Observation: "frame" (H, W, 3) uint8, "proprio" (P,) float32, "task". Action: (K, 7) commands in -1 .. 1. Terminated where a score is above the
    threshold: the frame then is the one that was scored so; its proprio is that after the whole chunk, which was not executed to its end.
    Truncated at the step limit. Info of a step: "score" (K,) after each command, "steps" executed [control steps], and of every reset
    "instruction", "task", "index". An episode that has ended begins anew in the next step (AutoresetMode.NEXT_STEP), whose action does not count.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 -- Gymnasium's own declaration

    def __init__(
        self, num_envs: int, world_of: Callable[[int], World], context_of: Callable[[int, int], Context], tasks: Sequence[str], states: int,
        chunk: int, steps: int, threshold: float, render_mode: str | None = None, close: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """`world_of(seed)` is the world with the noise of a seed, `context_of(task, index)` one of `states` start states of each task.

        `steps`: step limit [control steps, a multiple of `chunk`]; `close` frees what these hold. ValueError for what does not fit.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}: want at least 1")
        if steps < chunk or steps % chunk:
            raise ValueError(f"steps={steps}: want a multiple of the chunk of {chunk}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode={render_mode!r}: want 'rgb_array' or None")
        self.num_envs, self.render_mode = num_envs, render_mode
        self._world_of, self._context_of, self._close = world_of, context_of, close
        self._tasks, self._states, self._chunk, self._limit, self._threshold = tuple(tasks), states, chunk, steps, threshold
        self._world = world_of(0)
        (example,) = self._world.begin([context_of(0, 0)], [0])
        self.single_observation_space = spaces.Dict({
            "frame": spaces.Box(0, 255, tuple(example.frame.shape), np.uint8),
            "proprio": spaces.Box(-np.inf, np.inf, tuple(example.proprio.shape), np.float32),
            "task": spaces.Discrete(len(self._tasks)),
        })  # fmt: skip
        self.single_action_space = spaces.Box(-1.0, 1.0, (chunk, ACTION_DIM), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._begun = 0
        self._scenes: list[Scene] = []
        self._watches: list[Any] = [None] * num_envs
        self._shown: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Frame and proprio, as they are observed."""
        self._ended = np.zeros(num_envs, bool)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin all episodes anew. `seed` decides start states and the world's noise; `options` may name "task" and "index", a number each or one
        for every environment, else they are drawn.

        Raises ValueError for an unknown option, and for a start state that is not there.
        """
        super().reset(seed=seed)
        chosen = dict(options or {})
        wanted = {name: chosen.pop(name, None) for name in ("task", "index")}
        if chosen:
            raise ValueError(f"reset: unknown options {sorted(chosen)}; there are task, index")
        if seed is not None or not self._scenes:
            drawn = self.np_random_seed if seed is None else seed
            self._world, self._begun = self._world_of(int(drawn or 0) % 2**32), 0
        where = self._start_states(range(self.num_envs), wanted)
        self._scenes, self._shown = [], []
        for number, (scene, watch) in enumerate(self._started(where)):
            self._scenes.append(scene)
            self._shown.append((scene.frame, scene.proprio))
            self._watches[number] = watch
        self._ended[:] = False
        return self._observation(), self._told(range(self.num_envs))

    def step(self, actions: NDArray[np.floating[Any]]) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """One chunk in every environment that is under way; those that have ended begin anew. Raises ValueError for actions of another shape, or
        beyond -1 .. 1, and RuntimeError before the first reset.
        """
        if not self._scenes:
            raise RuntimeError("WorldVectorEnv: no episode yet; call reset first")
        commands = np.asarray(actions)
        if commands.shape != self.action_space.shape:
            raise ValueError(f"actions: {commands.shape}, want {self.action_space.shape}")
        again, going = (np.flatnonzero(mask).tolist() for mask in (self._ended, ~self._ended))
        if going and not (np.abs(commands[going]) <= 1.0).all():
            first = next(i for i in going if not (np.abs(commands[i]) <= 1.0).all())
            raise ValueError(f"actions: those of environment {first} are not all finite and in -1 .. 1")
        reward, terminated, truncated = np.zeros(self.num_envs), np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        score, executed = np.zeros((self.num_envs, self._chunk), np.float32), np.zeros(self.num_envs, np.int64)
        if going:
            self._advance(going, commands, reward, terminated, truncated, score, executed)
        for i, (scene, watch) in zip(again, self._started(self._start_states(again, {})), strict=True):
            self._scenes[i], self._watches[i], self._shown[i] = scene, watch, (scene.frame, scene.proprio)
        self._ended = terminated | truncated
        made = np.zeros(self.num_envs, bool)
        made[going] = True
        told = {"score": score, "_score": made, "steps": executed, "_steps": made, **(self._told(again) if again else {})}
        return self._observation(), reward, terminated, truncated, told

    @torch.no_grad()
    def _advance(
        self, going: Sequence[int], commands: NDArray[Any], reward: NDArray[Any], terminated: NDArray[Any], truncated: NDArray[Any],
        score: NDArray[Any], executed: NDArray[Any],
    ) -> None:  # fmt: skip
        command = torch.from_numpy(np.ascontiguousarray(commands[going], dtype=np.float32))
        made = advance(self._world, [self._scenes[i] for i in going], command)
        scores, watches = self._world.judge([self._watches[i] for i in going], made)
        for i, one, mine, watch, end in zip(going, made, scores.cpu().numpy(), watches, ended_at(scores, self._threshold).tolist(), strict=True):
            self._scenes[i], self._watches[i], score[i] = one.after, watch, mine
            terminated[i] = end < self._chunk
            truncated[i] = not terminated[i] and one.after.chunk * self._chunk >= self._limit
            executed[i] = end + 1 if terminated[i] else self._chunk
            reward[i] = mine[executed[i] - 1] if terminated[i] or truncated[i] else 0.0
            self._shown[i] = (one.frames[executed[i] - 1], one.after.proprio)

    def _start_states(self, which: Sequence[int] | range, wanted: dict[str, Any]) -> list[tuple[int, int]]:
        count, most = len(which), {"task": len(self._tasks), "index": self._states}
        found = []
        for name, limit in most.items():
            given = wanted.get(name)
            numbers = self.np_random.integers(limit, size=count) if given is None else np.broadcast_to(np.asarray(given), (count,))
            if numbers.dtype.kind not in "iu" or ((numbers < 0) | (numbers >= limit)).any():
                raise ValueError(f"reset: {name}={given}: want 0 .. {limit - 1}")
            found.append(numbers.tolist())
        return list(zip(*found, strict=True))

    @torch.no_grad()
    def _started(self, where: Sequence[tuple[int, int]]) -> list[tuple[Scene, Any]]:
        """Episodes at these tasks and states, each under a number of its own: it is half of the key of their noise."""
        if not where:
            return []
        contexts = [self._context_of(task, index) for task, index in where]
        scenes = started(self._world, contexts, range(self._begun, self._begun + len(contexts)))
        self._begun += len(contexts)
        return list(zip(scenes, self._world.watch(scenes), strict=True))

    def _observation(self) -> Observation:
        return {
            "frame": torch.stack([frame for frame, _ in self._shown]).cpu().numpy(),
            "proprio": torch.stack([proprio for _, proprio in self._shown]).float().cpu().numpy(),
            "task": np.array([scene.context.task for scene in self._scenes], np.int64),
        }

    def _told(self, which: Sequence[int] | range) -> dict[str, Any]:
        contexts, fresh = [scene.context for scene in self._scenes], np.zeros(self.num_envs, bool)
        fresh[list(which)] = True
        told = {
            "instruction": np.array([one.instruction for one in contexts], object),
            "task": np.array([one.task for one in contexts], np.int64),
            "index": np.array([one.state_index for one in contexts], np.int64),
        }
        return told | {f"_{name}": fresh for name in told}

    def query(self) -> nouns.Observation:
        """What a policy of this project is asked now, on the world's device."""
        return observe(self._scenes)

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """The present frames, (H, W, 3) each, or None where no render mode was asked for."""
        return tuple(frame.cpu().numpy() for frame, _ in self._shown) if self.render_mode else None

    def close_extras(self, **_: Any) -> None:
        """Free what the world holds."""
        if self._close is not None:
            self._close()
