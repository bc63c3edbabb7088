"""The things that pass between rooms: shape, dtype and unit, each checked once, when it is made.

Everywhere: B rollouts, K steps of one chunk, H x W pixels, P proprioceptive values. Lengths m, angles rad, gripper
0 shut .. 1 open; frames uint8 RGB; `pose` is x y z [m] and a unit quaternion x y z w whose sign is continuous in time.
Tensors of one noun share a batch dimension and a device.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

ACTION_DIM = 7
"""dx dy dz [0.05 m], drx dry drz [0.5 rad], gripper (-1 open, +1 close); each in [-1, 1]. Source: OSC_POSE of LIBERO."""


class Failed(RuntimeError):
    """Work that failed, in one line that names the thing and the cure; what was asked for wrongly is a ValueError."""


def no_such(what: str, word: str, names: Iterable[str]) -> ValueError:
    """The error where `word` is none of `names`, with the nearest of them."""
    names = list(names)
    return ValueError(f"{what} {word!r}: did you mean {difflib.get_close_matches(word, names, n=1, cutoff=0.0)[0]!r}? There are: {', '.join(names)}")


def _want(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> None:
    fits = tensor.dim() == len(shape) and all(w is None or g == w for g, w in zip(tensor.shape, shape, strict=True))
    if not fits or (dtype is not None and tensor.dtype != dtype):
        wanted = ", ".join("*" if w is None else str(w) for w in shape)
        raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}, want ({wanted}) {dtype or ''}".rstrip())


@dataclass(frozen=True)
class Camera:
    """A pinhole camera, OpenCV axes: x right, y down, z forward; u = fx x/z + cx."""

    intrinsics: NDArray[np.float64]
    """(3, 3) [px] at `height` x `width`."""
    camera_to_world: NDArray[np.float64]
    """(4, 4) [m]."""
    height: int
    """[px]"""
    width: int
    """[px]"""
    mirrored: bool = False
    """The picture is flipped left-right after projection (OpenVLA-OFT's rotated LIBERO frames): u' = width - 1 - u."""

    def __post_init__(self) -> None:
        if self.intrinsics.shape != (3, 3) or self.camera_to_world.shape != (4, 4):
            shapes = f"intrinsics {self.intrinsics.shape}, camera_to_world {self.camera_to_world.shape}"
            raise ValueError(f"Camera: {shapes}: want (3, 3), (4, 4)")


@dataclass(frozen=True)
class Observation:
    """What the policy sees at one query."""

    frame: torch.Tensor
    """(B, H, W, 3) uint8."""
    proprio: torch.Tensor
    """(B, P) float32, in the robot's own convention (robots/), not normalised."""
    instruction: tuple[str, ...]
    """B instructions."""
    wrist: torch.Tensor | None = None
    """(B, H', W', 3) uint8: the second view, for a policy of two; the imagined world draws none."""

    def __post_init__(self) -> None:
        batch = len(self.instruction)
        if not batch:
            raise ValueError("Observation: of no query at all")
        _want("Observation.frame", self.frame, (batch, None, None, 3), torch.uint8)
        if self.wrist is not None:
            _want("Observation.wrist", self.wrist, (batch, None, None, 3), torch.uint8)
        _want("Observation.proprio", self.proprio, (batch, None), torch.float32)


@dataclass(frozen=True)
class ActionChunk:
    """One answer of the policy: K actions, in its normalised space and as the robot's command."""

    mu: torch.Tensor
    """(B, K, 7) float32, normalised: the greedy action; of a Laplace density, its location."""
    log_scale: torch.Tensor | None
    """(B, K, 7) float32: log of the Laplace density's scale, factor and floor included; None for a policy of tokens."""
    action: torch.Tensor
    """(B, K, 7) float32, normalised, not clipped: the sample that was drawn, whose density counts; mu if greedy."""
    log_prob: torch.Tensor
    """(B, K) float32: log-density of `action`, or log-probability of its tokens, summed over the 7 dimensions."""
    command: torch.Tensor
    """(B, K, 7) float32 in [-1, 1]: `action` un-normalised and clipped, gripper -1 open .. +1 close."""

    def __post_init__(self) -> None:
        shape = tuple(self.mu.shape)
        for name in ("mu", "log_scale", "action", "command"):
            if (given := getattr(self, name)) is not None:
                _want(f"ActionChunk.{name}", given, (*shape[:2], ACTION_DIM), torch.float32)
        _want("ActionChunk.log_prob", self.log_prob, shape[:2], torch.float32)


@dataclass(frozen=True)
class StatePath:
    """Where K commands take the gripper, from kinematics alone."""

    pose: torch.Tensor
    """(B, K, 7) float64 [m, unit quaternion xyzw]."""
    gripper: torch.Tensor
    """(B, K) float64, 0 shut .. 1 open."""

    def __post_init__(self) -> None:
        _want("StatePath.pose", self.pose, (*self.gripper.shape, 7), torch.float64)
        _want("StatePath.gripper", self.gripper, (None, None), torch.float64)


@dataclass(frozen=True)
class ActionMap:
    """The path drawn on the image plane, and the camera's rays: the simulator's spatial condition."""

    picture: torch.Tensor
    """(B, K, H, W, 3) uint8."""
    rays: torch.Tensor
    """(B, 6, h, w) float32 at latent size: unit direction, then origin [m]."""
    delta: torch.Tensor
    """(B, K, 14) float32: per arm dxyz [m], d(rpy) [rad], gripper 0..1; not normalised, the absent arm 0."""

    def __post_init__(self) -> None:
        batch, chunk = self.picture.shape[:2]
        _want("ActionMap.picture", self.picture, (batch, chunk, None, None, 3), torch.uint8)
        _want("ActionMap.rays", self.rays, (batch, 6, None, None), torch.float32)
        _want("ActionMap.delta", self.delta, (batch, chunk, 14), torch.float32)


@dataclass(frozen=True)
class Context:
    """Where a rollout begins: instruction, first frame, first state (at rest)."""

    instruction: str
    task: int
    """Index of the task in its environment."""
    state_index: int
    """Index of the initial state in its split."""
    frame: NDArray[np.uint8]
    """(H, W, 3)."""
    pose: NDArray[np.float64]
    """(7,) [m, unit quaternion xyzw]."""
    gripper: float
    """0 shut .. 1 open."""

    def __post_init__(self) -> None:
        if self.frame.ndim != 3 or self.frame.dtype != np.uint8 or self.pose.shape != (7,):
            shapes = f"frame {self.frame.shape} {self.frame.dtype}, pose {self.pose.shape}"
            raise ValueError(f"Context: {shapes}: want (H, W, 3) uint8, (7,)")


@dataclass(frozen=True)
class Rollout:
    """One finished rollout of Q queries and `steps` executed steps: what LOOP learns from."""

    number: int
    """The rollout's own number: the second half of its noise key."""
    group: int
    """Rollouts of one group share a context; the leave-one-out baseline is taken within it."""
    context: Context
    frame: torch.Tensor
    """(Q, H, W, 3) uint8: what the policy saw at each query."""
    proprio: torch.Tensor
    """(Q, P) float32."""
    action: torch.Tensor
    """(Q, K, 7) float32, normalised."""
    log_prob: torch.Tensor
    """(Q, K) float32, of the behaviour policy."""
    score: torch.Tensor
    """(Q, K) float32 in [0, 1]: the reflector's verdict after each step; 0 past the end."""
    live: torch.Tensor
    """(Q, K) bool: the steps that were executed, up to and with the one that ended the rollout."""
    stopped: bool
    """Ended by the reflector; else by the step limit."""

    def __post_init__(self) -> None:
        queries, chunk = self.live.shape
        _want("Rollout.frame", self.frame, (queries, None, None, 3), torch.uint8)
        _want("Rollout.proprio", self.proprio, (queries, None), torch.float32)
        _want("Rollout.action", self.action, (queries, chunk, ACTION_DIM), torch.float32)
        for name in ("log_prob", "score"):
            _want(f"Rollout.{name}", getattr(self, name), (queries, chunk), torch.float32)
        _want("Rollout.live", self.live, (queries, chunk), torch.bool)
        if not bool(self.live[:, 0].all()):
            raise ValueError("Rollout: a query none of whose steps was executed")

    @property
    def steps(self) -> int:
        """Executed steps."""
        return int(self.live.sum())

    @property
    def value(self) -> float:
        """The return: the score at the last executed step (Algorithm 1, line 20)."""
        return float(self.score[self.live][-1])
