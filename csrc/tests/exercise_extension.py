"""Calls every function of a _core built with a sanitizer, from several threads at once: python exercise_extension.py FOLDER."""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np


def load(folder: Path) -> Any:
    """The _core that lies in `folder`, whatever else is installed."""
    (path,) = folder.glob("_core*.so")
    spec = importlib.util.spec_from_file_location("_core", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers(core: Any, number: int) -> list[np.ndarray]:
    """What every function says to the question `number`, at odd sizes and at none."""
    out = []
    for rows, count in ((0, 5), (1, 0), (3, 1), (5, 4097)):
        words = np.arange(rows, dtype=np.uint32) + number
        for name in ("philox_bits", "philox_uniform", "philox_normal"):
            out.append(getattr(core, name)(number, words, words, words, 1, count))
    for rows, steps in ((0, 3), (1, 0), (7, 33)):
        command = np.sin(np.arange(rows * steps * 7, dtype=np.float64) + number).reshape(rows, steps, 7)
        upright = [0.0, 0.0, 0.0, 1.0]
        state = np.tile([0.1, 0.2, 0.3, *upright, 1.0, *[0.0] * 12, *upright, 1.0], (rows, 1))
        law = (np.full(6, 0.1), np.full(6, 0.6), np.full(6, 0.5), 0.125, np.full(3, -0.5), np.full(3, 0.5))
        for more in ((None, False, 1.0, 0.0), (np.full((6, 18), 1e-3), True, 0.6, 0.2)):
            out += core.follow(state, command, core.ControllerModel(*law, *more))
    return out + scheduled(core, number)


def scheduled(core: Any, number: int) -> list[np.ndarray]:
    """Rollouts on two devices' worker threads, one executor of which raises now and then, and the same on a virtual clock."""
    stages = [core.Stage("policy", [1, 2], 1, [0, 1]), core.Stage("denoise", [2], 3, [0, 1]), core.Stage("reflector", [1, 4], 1, [1])]
    config = core.SchedulerConfig(stages, devices=2, slots=3, streams=2, overlap="always", linger=1e-4)
    raised = set()

    def draw(batch: Any) -> None:
        if batch.step[0] == 2 and (key := int(batch.rollout[0])) % 3 == 0 and key not in raised:
            raised.add(key)
            raise RuntimeError("once")

    def judge(batch: Any) -> list[tuple[bool, float]]:
        return [(int(c) >= int(r) % 4, float(r)) for r, c in zip(batch.rollout, batch.chunk, strict=True)]

    ended = {}
    with core.Runner(config, [draw, draw, judge]) as runner:
        runner.submit([(i, i // 4, 5) for i in range(number, number + 12)])
        runner.submit([(1000, 1000, 5)])
        runner.cancel(1000)
        while (report := runner.next(30.0)) is not None:
            if hasattr(report, "rollout") and report.rollout < 1000:
                ended[report.rollout] = (report.chunks, report.value)
        runner.statistics()
    forecast = core.simulate(config_of_one(core), [[(0.1, 0.2)], [(0.3, 0.1)]], [9 + number, 20, 3], chunk=8, limit=4, jitter=0.1, seed=number)
    spent = core.measure_overhead(config, [(i, i, 3) for i in range(9)], [1, 2, 3])
    return [np.array([ended[i] for i in sorted(ended)]), np.array(forecast["ended_at_s"]), np.array([len(spent) > 0 and spent.min() >= 0])]


def config_of_one(core: Any) -> Any:
    """Two stages on one device."""
    return core.SchedulerConfig([core.Stage("policy", [1, 2]), core.Stage("reflector", [1, 2])], slots=2)


def main() -> int:
    core = load(Path(sys.argv[1]))
    want = [answers(core, number) for number in range(4)]
    wrong = []

    def ask(number: int) -> None:
        for _ in range(5):
            got = answers(core, number)
            if not all(np.array_equal(a, b) for a, b in zip(got, want[number], strict=True)):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number % 4,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for bad in (lambda: core.philox_bits(0, np.zeros(3), *[np.zeros(2, np.uint32)] * 2, 1, 4), lambda: core.follow(*[np.zeros((2, 7))] * 3)):
        try:
            bad()
        except (TypeError, ValueError):
            continue
        wrong.append(-1)
    print(f"extension: {len(threads)} threads, {'wrong: ' + str(sorted(set(wrong))) if wrong else 'all answers equal'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
