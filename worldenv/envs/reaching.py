"""The tabletop with other tasks: move the gripper over a puck. What the small policy learns before it sees a demonstration of a push.

Published policies begin from a backbone that has seen many robots and tasks; nothing small can be downloaded. This stands in for it: looking for
the puck that an instruction names. Pucks lie further apart and the gripper begins anywhere over the table, so no scene here is one of the
tabletop's, and nothing is pushed here.
"""

from __future__ import annotations

import numpy as np

from worldenv.config import EnvConfig
from worldenv.envs.contract import Snapshot, Split
from worldenv.envs.tabletop import COLOURS, MOST_JITTER_M, InitialState, Tabletop, drawn_state

OVER_M = 0.085
"""Height of the gripper over the table when it is there [m]: its fingers are clear of the pucks."""
STEPS = 12
"""Of an episode. Few, so that most of what is recorded is the way there: where the gripper hangs still, its commands say nothing of the puck."""
_BASE = 1 << 17  # states of the tabletop have lower numbers
_MIDDLE = np.array([-0.05, 0.0, 0.11])
_JITTER = np.array([0.09, 0.14, 0.04])  # far and near: from near, a command says where the puck is, from far only on which side
_TURN = 0.1  # about each axis [rad]
_OPENING = (0.5, 1.0)


class Reaching(Tabletop):
    """`TrueEnvironment` of three reaching tasks, one for each puck. All its states are training states; one episode at a time (no `capture`)."""

    def __init__(self, config: EnvConfig, states: int) -> None:
        """`states` initial states per task; picture and step limit are those of `config`."""
        super().__init__(config)
        self._states, self._from = states, 0.0

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `TrueEnvironment`."""
        return tuple(f"move the gripper over the {colour} puck" for colour in COLOURS)

    def states(self, split: Split) -> int:
        """See `TrueEnvironment`."""
        return self._states if split == "train" else 0

    def _state(self, split: Split, index: int) -> InitialState:
        if not 0 <= index < self.states(split):
            raise ValueError(f"{split} state {index}: reaching has {self.states(split)}")
        return drawn_state(_BASE + index, MOST_JITTER_M, _MIDDLE, _JITTER, _TURN, _OPENING)

    def begin(self, task: int, split: Split, index: int) -> Snapshot:
        """See `TrueEnvironment`."""
        self._from = 0.0
        now = super().begin(task, split, index)
        self._from = self._aside()
        return now

    def _aside(self) -> float:
        """From the gripper to its puck, in the plane [m]."""
        return float(np.hypot(*(self.arm.pose[0, :2].numpy() - self.pucks[self.task, :2])))

    def _success(self) -> bool:
        """On its way: half of the distance is behind it."""
        return self._aside() < self._from / 2
