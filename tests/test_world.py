"""The imagined world hands on what it should: by a simulator and a judge that write down what they are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from worldenv import action_map, kinematics, noise
from worldenv.kernels.philox import Draw, normal
from worldenv.kinematics import ControllerModel
from worldenv.nouns import ActionMap, Camera, Context
from worldenv.robots.tabletop import TABLETOP
from worldenv.world import ImaginedWorld, Made, advance, observe, started

K, SEED, NUMBERS = 4, 5, (9, 4, 7)
CPU = torch.device("cpu")
CAMERA = Camera(
    np.array([[20.0, 0, 8], [0, 20.0, 8], [0, 0, 1]]), np.array([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 0.6], [0, 0, 0, 1]]), 16, 16
)


@dataclasses.dataclass
class Told:
    """What one rollout's chunk was begun with."""

    memory: list[int]
    drawn: ActionMap
    noise: torch.Tensor
    steps: int = 0


class Clerk:
    """A simulator that remembers a rollout's chunks by their numbers; frame k of a chunk is of the brightness 10 * chunk + k."""

    chunk, steps = K, 2

    def __init__(self) -> None:
        self.told: list[list[Told]] = []

    def noise_shape(self) -> tuple[int, ...]:
        return 3, 1, K, 2, 2

    def begin(self, frame: torch.Tensor) -> list[list[int]]:
        return [[int(one[0, 0, 0])] for one in frame]

    def begin_chunk(self, memory: Sequence[list[int]], drawn: ActionMap, given: torch.Tensor) -> list[Told]:
        rows = [ActionMap(drawn.picture[i : i + 1], drawn.rays[i : i + 1], drawn.delta[i : i + 1]) for i in range(len(memory))]
        made = [Told(list(one), row, given[i]) for i, (one, row) in enumerate(zip(memory, rows, strict=True))]
        self.told.append(made)
        return made

    def step(self, chunks: Sequence[Told]) -> list[Told]:
        return [dataclasses.replace(one, steps=one.steps + 1) for one in chunks]

    def finish_chunk(self, chunks: Sequence[Told]) -> tuple[torch.Tensor, list[list[int]]]:
        assert all(one.steps == self.steps for one in chunks)
        number = torch.tensor([len(one.memory) for one in chunks])
        bright = (10 * number[:, None] + torch.arange(K)).to(torch.uint8)
        return bright[:, :, None, None, None].expand(-1, -1, 16, 16, 3), [[*one.memory, len(one.memory)] for one in chunks]

    def imagine(self, *_: Any) -> Any:
        raise AssertionError("a chunk is made in its stages")


def contexts() -> list[Context]:
    rise = np.linspace(0.0, 0.2, len(NUMBERS))
    poses = [np.array([0.05 * i, -0.05 * i, 0.1 + z, 1.0, 0, 0, 0]) for i, z in enumerate(rise)]
    return [Context(f"task {i}", i, i, np.full((16, 16, 3), i, np.uint8), pose, 1.0 - 0.25 * i) for i, pose in enumerate(poses)]


def commands(chunks: int) -> torch.Tensor:
    """(B, chunks K, 7), some beyond what is allowed; grippers shut and open again."""
    drawn = np.random.default_rng(0).uniform(-1.3, 1.3, (len(NUMBERS), chunks * K, 7))
    drawn[..., 6] = np.sign(drawn[..., 6])
    return torch.from_numpy(drawn).float()


MODEL = dataclasses.replace(ControllerModel.of(TABLETOP), low=(-0.1, -0.2, 0.02), high=(0.2, 0.2, 0.35))


def walked(chunks: int) -> tuple[Clerk, list[list[Made]]]:
    clerk = Clerk()
    world = ImaginedWorld(clerk, None, TABLETOP, MODEL, CAMERA, (2, 2), SEED, CPU)
    scenes, made = started(world, contexts(), NUMBERS), list[list[Made]]()
    for start in range(0, chunks * K, K):
        made.append(advance(world, scenes, commands(chunks)[:, start : start + K]))
        scenes = [one.after for one in made[-1]]
    return clerk, made


def test_chunks_draw_the_path_that_all_commands_together_take() -> None:
    """The arm goes on where the last chunk left it, as fast as it was; the first delta of a chunk is from there too."""
    clerk, made = walked(3)
    start = kinematics.rest(torch.from_numpy(np.stack([one.pose for one in contexts()])), torch.tensor([one.gripper for one in contexts()]).double())
    path, end = kinematics.follow(start, commands(3).double(), MODEL)
    whole = action_map.draw(path, (start.pose, start.gripper), CAMERA, TABLETOP, (2, 2))
    told = [torch.cat([getattr(rows[i].drawn, name) for rows in clerk.told], dim=1) for name in ("picture", "delta") for i in range(3)]
    want = [getattr(whole, name)[i : i + 1] for name in ("picture", "delta") for i in range(3)]
    for got, expected in zip(told, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert len({picture.numpy().tobytes() for picture in whole.picture.flatten(0, 1)}) > 20
    for chunk, rows in enumerate(made, start=1):
        at, gripper = path.pose[:, chunk * K - 1].numpy(), path.gripper[:, chunk * K - 1].numpy()
        want_proprio = torch.from_numpy(np.asarray(TABLETOP.proprio(at, gripper), np.float32))
        torch.testing.assert_close(observe([one.after for one in rows]).proprio, want_proprio, rtol=0, atol=1e-6)
    assert float(end.velocity.abs().max()) > 1e-3


def test_memory_goes_on_and_the_policy_sees_the_last_frame() -> None:
    clerk, made = walked(3)
    assert [[one.memory for one in rows] for rows in clerk.told] == [[[i, *range(1, chunk + 1)] for i in range(3)] for chunk in range(3)]
    for chunk, rows in enumerate(made, start=1):
        assert [one.after.chunk for one in rows] == [chunk] * 3
        assert [one.after.number for one in rows] == list(NUMBERS)
        assert [one.frames[:, 0, 0, 0].tolist() for one in rows] == [[10 * chunk + k for k in range(K)]] * 3
        seen = observe([one.after for one in rows])
        assert seen.instruction == ("task 0", "task 1", "task 2")
        assert seen.frame[:, 0, 0, 0].tolist() == [10 * chunk + K - 1] * 3


def test_noise_is_that_of_rollout_chunk_and_draw() -> None:
    clerk, _ = walked(2)
    draws, *shape = clerk.noise_shape()
    for chunk, rows in enumerate(clerk.told):
        for number, one in zip(NUMBERS, rows, strict=True):
            for step in range(draws):
                want = normal(Draw.of(SEED, number, chunk, step, noise.Stream.SIMULATOR, CPU), shape)[0]
                assert torch.equal(one.noise[step], want)
    assert len({float(one.noise[step].flatten()[0]) for rows in clerk.told for one in rows for step in range(draws)}) == 2 * 3 * draws


def test_before_a_rollout_the_policy_sees_its_context() -> None:
    world = ImaginedWorld(Clerk(), None, TABLETOP, MODEL, CAMERA, (2, 2), SEED, CPU)
    seen = observe(world.begin(contexts(), NUMBERS))
    assert seen.frame[:, 0, 0, 0].tolist() == [0, 1, 2]
    want = TABLETOP.proprio(np.stack([one.pose for one in contexts()]), np.array([one.gripper for one in contexts()]))
    torch.testing.assert_close(seen.proprio, torch.from_numpy(np.asarray(want, np.float32)))
    with pytest.raises(ValueError, match="3 scenes"):
        advance(world, started(world, contexts(), NUMBERS), commands(1)[:2])
