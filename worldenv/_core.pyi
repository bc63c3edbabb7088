"""The C++ core (csrc/bindings): contiguous numpy arrays of exactly these dtypes in and out, without the GIL."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

_Words = NDArray[np.uint32]
_Doubles = NDArray[np.float64]

MOST_KEYS: int
MOST_WIDTH: int
MOST_CHANNELS_IN: int
MOST_CHANNELS_OUT: int
MOST_ROW: int
PANEL: int
QUAD: int
"""What the operators FewKeysAttention, NarrowConv and WinogradConv for ONNX Runtime take (csrc/onnxruntime/kernels.hpp)."""
OPERATORS: str
"""SHA-256 of the operators' sources, 64 hex digits."""

def philox_bits(seed: int, rollout: _Words, chunk: _Words, step: _Words, stream: int, count: int) -> _Words:
    """Words (B, count) of rollout, chunk, step (B,); else TypeError, ValueError."""

def philox_uniform(seed: int, rollout: _Words, chunk: _Words, step: _Words, stream: int, count: int) -> _Doubles:
    """The same words as uniform numbers in (0, 1)."""

def philox_normal(seed: int, rollout: _Words, chunk: _Words, step: _Words, stream: int, count: int) -> NDArray[np.float32]:
    """Standard normals of the same words, by pairs."""

class ControllerModel:
    """Constants of how commands become motion."""

    def __init__(
        self,
        gain: _Doubles,
        decay: _Doubles,
        scale: _Doubles,
        gripper_step: float,
        low: _Doubles,
        high: _Doubles,
        coupling: _Doubles | None,
        holds_turn: bool,
        gripper_now: float,
        gripper_last: float,
    ) -> None:
        """Gain, decay, scale (6,), low, high (3,), coupling (6, 18) or None."""

def follow(state: _Doubles, command: _Doubles, model: ControllerModel) -> tuple[_Doubles, _Doubles, _Doubles]:
    """B arms through K commands: path pose (B, K, 7) and gripper (B, K), then the state (B, 25) after them.

    A row of the state is pose 7, gripper, velocity 6, asked 6, aim 4, ramp.
    """

class Stage:
    """One stage of a chunk; a schedule is a list of them, of which the last judges."""

    def __init__(
        self, name: str, buckets: Sequence[int], steps: int = 1, devices: Sequence[int] = (0,), cost: Sequence[tuple[float, float]] = ()
    ) -> None:
        """`buckets`: shapes of a batch, ascending; `steps`: visits per chunk; `cost`: (fixed, per item) [s] per device, where it is known."""

    @property
    def name(self) -> str: ...
    @property
    def buckets(self) -> list[int]: ...
    @property
    def steps(self) -> int: ...
    @property
    def devices(self) -> list[int]: ...

class SchedulerConfig:
    """How rollouts are scheduled (csrc/core/scheduler.hpp)."""

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        devices: int = 1,
        slots: int = 1,
        streams: int = 1,
        overlap: Literal["off", "auto", "always"] = "auto",
        lock_step: bool = False,
        linger: float = 0.0,
        max_wait: float = 1.0,
        attempts: int = 3,
        unread: int = 0,
    ) -> None:
        """`slots` per home device, `streams` batches at once on a device; `linger`, `max_wait` [s]; ValueError says what cannot be scheduled."""

    @property
    def stages(self) -> list[Stage]: ...
    @property
    def devices(self) -> int: ...
    @property
    def slots(self) -> int: ...

class Batch:
    """What an executor is to run: n items, at most `shape`; arrays (n,)."""

    @property
    def stage(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def shape(self) -> int: ...
    @property
    def slot(self) -> _Words: ...
    @property
    def rollout(self) -> _Words: ...
    @property
    def chunk(self) -> _Words: ...
    @property
    def step(self) -> _Words: ...

class Ending:
    """A rollout has ended; none of its work runs any more."""

    @property
    def rollout(self) -> int: ...
    @property
    def group(self) -> int: ...
    @property
    def chunks(self) -> int: ...
    @property
    def why(self) -> Literal["stopped", "limit", "failed", "cancelled"]: ...
    @property
    def value(self) -> float: ...
    @property
    def message(self) -> str: ...

class GroupEnding:
    """All rollouts of a group have ended; mean, low and high of the values of those that neither failed nor were cancelled."""

    @property
    def group(self) -> int: ...
    @property
    def rollouts(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def cancelled(self) -> int: ...
    @property
    def mean(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...

class Runner:
    """Rollouts on worker threads, one per device and stage."""

    def __init__(self, config: SchedulerConfig, executors: Sequence[Callable[[Batch], Sequence[tuple[bool, float]] | None]]) -> None:
        """One callable per stage: the last returns (ended, value) per item, the others None. What one raises fails its batch."""

    def submit(self, jobs: Sequence[tuple[int, int, int]]) -> None:
        """(rollout, group, limit of chunks) each; a group's rollouts together. ValueError: one that is in flight."""

    def cancel(self, rollout: int) -> None:
        """Give a rollout up; its ending says so."""

    def next(self, patience: float = 1e9) -> Ending | GroupEnding | None:
        """The next ending; None after `patience` [s], or at once where nothing is under way."""

    def stop(self) -> None:
        """Join the threads after their running batches."""

    @property
    def idle(self) -> bool:
        """Nothing is under way and every ending taken."""

    def statistics(self) -> dict[str, Any]:
        """Counts since the start, and a row per stage and device."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...

def simulate(
    config: SchedulerConfig,
    cost: Sequence[Sequence[tuple[float, float]]],
    lengths: Sequence[int],
    *,
    chunk: int,
    limit: int,
    group: int = 1,
    warm_up: int = 0,
    event_time: float = 0.0,
    jitter: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """The same scheduler on a virtual clock (csrc/core/virtual_clock.hpp).

    `cost` [stage][device of the stage] (fixed, per item) [s]; `lengths` [frames] of the rollouts, `chunk` frames per chunk, `limit` [chunks].
    `work_s` [device]: what the useful items of the window take in the largest batches.
    """

def measure_overhead(config: SchedulerConfig, jobs: Sequence[tuple[int, int, int]], lengths: Sequence[int]) -> NDArray[np.int64]:
    """Nanoseconds (n,) that each event takes the scheduler on this thread; rollout n ends after `lengths[n % len]` chunks."""
