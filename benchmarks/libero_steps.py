"""Control steps of LIBERO per second of one process, without pictures, with one view and with two.

    python -m benchmarks.libero_steps [SUITE ...]        needs make libero

Wall time on a busy machine says little: seconds of the process's own processor time stand beside it. The ceiling is physics without anything of
LIBERO's or robosuite's around it: the same number of MuJoCo's own steps, each with the forward pass that robosuite makes before it.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from worldenv import report
from worldenv.envs.libero import SUITES, Libero
from worldenv.envs.libero_install import LiberoMissing
from worldenv.envs.offscreen import NoOpenGL, mujoco

STEPS = 20
SUBSTEPS = 25


def measure(work: Callable[[], None]) -> tuple[float, float]:
    """Steps per second of wall time, and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        work()
    return STEPS / (time.perf_counter() - wall), STEPS / (time.process_time() - cpu)


def _bare(model: Any, data: Any) -> None:
    for _ in range(SUBSTEPS):
        mujoco.mj_forward(model, data)
        mujoco.mj_step(model, data)


def rows(suite: str) -> list[dict[str, object]]:
    """One row per way of looking."""
    command = np.array([0.1, 0.0, -0.1, 0.0, 0.0, 0.0, -1.0])
    found: list[dict[str, object]] = []
    for name, views in (("physics alone", 0), ("one view", 1), ("two views", 2)):
        env = Libero(suite, 256, wrist=views == 2, pictures=views > 0)  # type: ignore[arg-type]
        env.begin(0, "train", 0)
        wall, cpu = measure(lambda env=env: env.advance(command))  # type: ignore[misc]
        found.append({"suite": suite, "what": name, "steps_per_s": round(wall, 1), "steps_per_cpu_s": round(cpu, 1)})
        if not views:
            wall, cpu = measure(functools.partial(_bare, env.inner.sim.model._model, env.inner.sim.data._data))
            found.insert(0, {"suite": suite, "what": "MuJoCo's steps alone", "steps_per_s": round(wall, 1), "steps_per_cpu_s": round(cpu, 1)})
        env.close()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a suite that there is not, or where LIBERO is not there."""
    suites = list(sys.argv[1:] if argv is None else argv) or list(SUITES)
    everything = []
    try:
        if unknown := [suite for suite in suites if suite not in SUITES]:
            raise ValueError(f"suite {unknown[0]!r}: want some of {', '.join(SUITES)}, or none for all")
        for suite in suites:
            for row in rows(suite):
                everything.append(row)
                print(f"{row['suite']:15}  {row['what']:22}  {row['steps_per_s']:7} steps/s  {row['steps_per_cpu_s']:7} per CPU second", flush=True)
    except (ValueError, LiberoMissing, NoOpenGL) as error:
        print(f"benchmarks.libero_steps: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"machine": report.versions(), "rows": everything}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
