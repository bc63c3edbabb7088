"""`worldenv-train --resume FOLDER --only loop` in one process of several, which writes down the rollouts that it makes, and has a fault.

    python -m tests.machine FOLDER NOTES sound | dies ITERATION ROLLOUTS | blind

dies: killed, without warning, when it has finished so many rollouts of that iteration. blind: every judgement of its rollouts fails.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from worldenv.cli import train
from worldenv.rollout.store import RolloutStore
from worldenv.world import ImaginedWorld


def main(folder: str, notes: str, fault: str, *counts: str) -> int:
    add, made = RolloutStore.add, dict[str, int]()

    def noted(self: RolloutStore, rollout: Any) -> None:
        add(self, rollout)
        log = Path(self._file.name).name
        with Path(notes).open("a") as file:
            file.write(f"{log} {rollout.number}\n")
        made[log] = made.get(log, 0) + 1
        if fault == "dies" and log.startswith(f"iteration-{int(counts[0]):04d}.") and made[log] == int(counts[1]):
            os.kill(os.getpid(), signal.SIGKILL)

    def blind(*_: Any) -> Any:
        raise RuntimeError("no light here")

    if not dist.is_nccl_available():  # nor used in this stage; pretended GPUs would have it asked for
        init = dist.init_process_group
        dist.init_process_group = lambda _, **more: init("gloo", **more)
    RolloutStore.add = noted  # type: ignore[method-assign]
    if fault == "blind":
        ImaginedWorld.judge = blind  # type: ignore[method-assign]
    return train.main(["--resume", folder, "--only", "loop"])


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
