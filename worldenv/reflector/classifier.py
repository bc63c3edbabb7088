"""The baseline that peers use: a small network says of every frame for itself whether the task is done, and remembers nothing.

A residual network from scratch (He et al. 2016, arXiv:1512.03385), group normalised (Wu & He 2018, arXiv:1803.08494), whose channels are scaled and
shifted by the task (FiLM; Perez et al. 2018, arXiv:1709.07871). RLinf trains one such classifier per suite, without an instruction; here one scene
has several tasks, so it is told which. Everything else is the contract's: frames in, scores out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from worldenv import noise
from worldenv.checkpoint import CheckpointError
from worldenv.config import ReflectorConfig, from_dict, to_dict
from worldenv.reflector.llava import to_pixels

KIND = "frame classifier 1"
_NUMBER = 102  # of this network in Stream.WEIGHTS
_LEVELS, _GROUPS = 4, 4


class _Block(nn.Module):
    """norm, FiLM, ReLU, conv; twice; beside a 1 x 1 convolution that halves the picture too."""

    def __init__(self, inputs: int, outputs: int, told: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(_GROUPS, inputs), nn.GroupNorm(_GROUPS, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.beside = nn.Conv2d(inputs, outputs, 1)
        self.film1, self.film2 = nn.Linear(told, 2 * inputs), nn.Linear(told, 2 * outputs)

    def forward(self, x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        y = self.conv1(_filmed(self.norm1(x), self.film1(told)).relu())
        y = self.conv2(_filmed(self.norm2(y), self.film2(told)).relu())
        # every other pixel is taken first: with strides, oneDNN (torch 2.13) writes beyond 4 channels' gradient on processors without AVX-512
        return cast(torch.Tensor, self.beside(x[:, :, ::2, ::2]) + y)


def _filmed(x: torch.Tensor, film: torch.Tensor) -> torch.Tensor:
    scale, shift = film[:, :, None, None].chunk(2, dim=1)
    return x * (1.0 + scale) + shift


class Classifier(nn.Module):
    """Pixels (N, 3, S, S) in [-1, 1] and task numbers (N,) int64 to logits (N,)."""

    def __init__(self, tasks: int, width: int) -> None:
        """`width` channels at first, twice as many after each of 4 halvings; a multiple of 4."""
        super().__init__()
        told = 4 * width
        self.task = nn.Embedding(tasks, told)
        self.begin = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width << i, width << (i + 1), told) for i in range(_LEVELS))
        self.norm = nn.GroupNorm(_GROUPS, width << _LEVELS)
        self.end = nn.Linear(width << _LEVELS, 1)

    def forward(self, pixels: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x, told = self.begin(pixels), self.task(task)
        for block in self.blocks:
            x = block(x, told)
        logit: torch.Tensor = self.end(self.norm(x).relu().mean(dim=(2, 3)))[:, 0]
        return logit


@dataclass(frozen=True)
class Task:
    """What is remembered of one video: its task."""

    number: int


class ClassifierReflector:
    """A `Classifier` behind the contract `Reflector`. Of its config, `image` and `threshold` count."""

    def __init__(self, config: ReflectorConfig, network: Classifier, instructions: Sequence[str]) -> None:
        """`instructions` in the order of the network's task numbers."""
        self.config, self.network, self.instructions = config, network, tuple(instructions)

    @classmethod
    def initialise(cls, config: ReflectorConfig, width: int, instructions: Sequence[str], seed: int) -> ClassifierReflector:
        """Random weights, a function of `seed`, for these tasks; on the CPU."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise.torch_seed(seed, noise.Stream.WEIGHTS, _NUMBER))
            return cls(config, Classifier(len(instructions), width), instructions)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.task.weight.device

    def to(self, device: torch.device) -> ClassifierReflector:
        """Move the weights; returns itself."""
        self.network.to(device)
        return self

    def freeze(self) -> ClassifierReflector:
        """No weight takes gradients any more; returns itself."""
        self.network.eval().requires_grad_(False)
        return self

    def numbers(self, instruction: Sequence[str]) -> list[int]:
        """Task numbers. ValueError names an instruction that the classifier was not trained on."""
        if strange := sorted(set(instruction) - set(self.instructions)):
            raise ValueError(f"instruction {strange[0]!r}: the frame classifier knows only {', '.join(map(repr, self.instructions))}")
        return [self.instructions.index(text) for text in instruction]

    def logit(self, frame: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """(N,) float32 of frames (N, H, W, 3) uint8 and task numbers (N,), with gradients where they are on."""
        logit: torch.Tensor = self.network(to_pixels(frame.to(self.device), self.config.image), task.to(self.device))
        return logit.float()

    def begin(self, instruction: Sequence[str], frame: torch.Tensor) -> list[Task]:
        """See `Reflector.begin`."""
        if len(instruction) != frame.shape[0]:
            raise ValueError(f"reflector: {len(instruction)} instructions for {frame.shape[0]} videos")
        return [Task(number) for number in self.numbers(instruction)]

    @torch.no_grad()
    def judge(self, watch: Sequence[Task], frames: torch.Tensor) -> tuple[torch.Tensor, list[Task]]:
        """See `Reflector.judge`."""
        if frames.dim() != 5 or len(watch) != frames.shape[0]:
            raise ValueError(f"reflector: frames {tuple(frames.shape)} for {len(watch)} videos, want (B, K, H, W, 3)")
        task = torch.tensor([one.number for one in watch]).repeat_interleave(frames.shape[1])
        return self.logit(frames.flatten(0, 1), task).sigmoid().view(frames.shape[:2]), list(watch)


def to_tree(reflector: ClassifierReflector) -> dict[str, Any]:
    """The whole classifier as a tree for `checkpoint`."""
    width = reflector.network.begin.out_channels
    return {
        "kind": KIND, "config": to_dict(reflector.config), "width": width, "instructions": list(reflector.instructions),
        "weights": dict(reflector.network.state_dict()),
    }  # fmt: skip


def from_tree(tree: Mapping[str, Any], name: str) -> ClassifierReflector:
    """The inverse of `to_tree`; `name` says in errors where the tree came from. CheckpointError where it is no classifier."""
    if tree.get("kind") != KIND:
        raise CheckpointError(f"{name}: no frame classifier ({KIND}); was it written by the stage reward?")
    made = ClassifierReflector.initialise(from_dict(ReflectorConfig, tree["config"]), tree["width"], tree["instructions"], 0)
    try:
        made.network.load_state_dict(tree["weights"])
    except RuntimeError as error:
        raise CheckpointError(f"{name}: these weights are not of this classifier: {' '.join(str(error).split())[:200]}") from error
    return made
