"""The C++ core (csrc/bindings): contiguous numpy arrays of exactly these dtypes in and out, without the GIL."""

import numpy as np
from numpy.typing import NDArray

_Words = NDArray[np.uint32]
_Doubles = NDArray[np.float64]

def philox_bits(seed: int, rollout: _Words, chunk: _Words, step: _Words, stream: int, count: int) -> _Words:
    """Words (B, count) of rollout, chunk, step (B,); else TypeError, ValueError."""

def philox_uniform(seed: int, rollout: _Words, chunk: _Words, step: _Words, stream: int, count: int) -> _Doubles:
    """The same words as uniform numbers in (0, 1)."""

def philox_normal(seed: int, rollout: _Words, chunk: _Words, step: _Words, stream: int, count: int) -> NDArray[np.float32]:
    """Standard normals of the same words, by pairs."""

def follow(
    pose: _Doubles,
    gripper: _Doubles,
    velocity: _Doubles,
    command: _Doubles,
    gain: _Doubles,
    decay: _Doubles,
    scale: _Doubles,
    gripper_step: float,
    low: _Doubles,
    high: _Doubles,
) -> tuple[_Doubles, _Doubles, _Doubles, _Doubles, _Doubles]:
    """B arms through K commands: path pose (B, K, 7) and gripper (B, K), then the last pose (B, 7), gripper (B,), velocity (B, 6)."""
