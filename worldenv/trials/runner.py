"""An evaluation in a folder: the same command goes on where it stopped, whatever was killed, with the same result.

    OUT/eval.json          what is evaluated, and how; a folder belongs to one evaluation
    OUT/versions.json      what decided the outcomes: packages, assets, renderer; going on with others is refused
    OUT/episodes.jsonl     one line per finished episode, on disk before it is counted
    OUT/engines.json       what ran each network, where engines were asked for
    OUT/result.json        the result, when all episodes are finished

An episode is a function of policy, initial state and seed alone: not of the process that it ran in, nor of the order. Whoever acts is asked one
question at a time, by this process; environments live in processes of their own. On several GPUs a policy of each answers its share of these.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from worldenv import checkpoint, compiled, console, report
from worldenv.config import EnginesConfig, EnvConfig
from worldenv.data.scenes import Start
from worldenv.devices import on
from worldenv.engines.store import Store
from worldenv.envs import libero, suites
from worldenv.evaluation import Protocol, paired, wilson
from worldenv.nouns import Failed
from worldenv.run import RunError, held
from worldenv.trials import actors
from worldenv.trials.actors import Bench
from worldenv.trials.episode import Answer, Trial, play

EPISODES_PER_TASK = 50
"""By default: OpenVLA-OFT's, and the paper's."""
_ANEW = "choose another --out"
_RECORDED_STEPS = 24
"""Of one episode a task: what engines are compared on."""


class TrialError(Failed):
    """An episode failed, or the process that made it. What is finished stays."""


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how."""

    suite: str
    policy: str
    identity: str
    """Of the policy: see `actors.Description`."""
    mode: Protocol
    episodes: int
    tasks: tuple[int, ...]
    """Which; episodes take turns among them."""
    limit: int
    """Step limit [control steps at 20 Hz]."""
    image: int
    """Side of the pictures [px]."""
    views: int
    """Pictures that the policy sees; 0: an expert sees none."""
    sampled: bool
    """Actions are drawn, not greedy."""
    seed: int
    """Of what is drawn, and of an expert's manner."""
    demonstrations: int | None
    """Per task, that the policy was trained on; None: not known, or an expert."""
    reflector: str | None
    """SHA-256 of the reflector's file."""
    env: EnvConfig | None = None
    """Of the tabletop, where the policy's run has its own."""
    engines: EnginesConfig | None = None
    """What runs the policy, and the reflector where it stops; None: eager. Actions depend on it in their last bits."""

    def starts(self) -> list[Start]:
        """Test states, spread evenly over the tasks, each task's in order."""
        return [Start(n, self.tasks[n % len(self.tasks)], "test", n // len(self.tasks)) for n in range(self.episodes)]

    def open(self) -> Any:
        """Its environment; without a renderer for an expert in LIBERO."""
        return suites.open_suite(self.suite, self.image, self.views == 2, self.views > 0, self.env)

    def plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def seen_by(asked: Evaluation, views: int) -> Evaluation:
    """`asked`, for a policy that turned out to see `views` pictures."""
    return replace(asked, views=views)


class _Folder:
    """What is on disk."""

    def __init__(self, out: Path, asked: Evaluation) -> None:
        """Open or make `out`. Raises RunError where it holds another evaluation, other files, or another process is at work."""
        self.out = out
        known = out / "eval.json"
        if not known.is_file() and out.exists() and (not out.is_dir() or any(entry.name != ".lock" for entry in out.iterdir())):
            raise RunError(f"{out} exists and is no evaluation of ours; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        self._lock = held(out)
        try:
            self._claim(known, asked.plain())
        except (RunError, checkpoint.CheckpointError):
            self._lock.close()
            raise
        self.trials = {trial.number: trial for trial in read_trials(out)}

    def _claim(self, known: Path, ours: dict[str, Any]) -> None:
        """Make the folder this evaluation's. One that never finished an episode, as of a command that could not begin, has nothing to lose."""
        theirs = checkpoint.read_json(known, _ANEW, {}) if known.is_file() else {}
        differing = [f"{key}: {theirs.get(key)} there, {ours[key]} asked" for key in ours if theirs.get(key) != ours[key]]
        if differing and read_trials(self.out):
            raise RunError(f"{self.out} holds another evaluation ({'; '.join(differing[:3])}); choose another --out")
        if differing:
            checkpoint.write_text(known, json.dumps(ours, indent=1))
            (self.out / "versions.json").unlink(missing_ok=True)

    def add(self, trial: Trial) -> None:
        """On disk when this returns."""
        path = self.out / "episodes.jsonl"
        whole = "".join(json.dumps(one.plain()) + "\n" for one in self.trials.values())
        if not self.trials or (path.is_file() and path.read_text(encoding="utf-8") != whole):
            checkpoint.write_text(path, whole)  # takes away half a line that a killed process left
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(trial.plain()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.trials[trial.number] = trial

    def made_with(self, versions: dict[str, str]) -> None:
        """Raises RunError where earlier episodes were made with others."""
        path = self.out / "versions.json"
        if not path.is_file():
            checkpoint.write_text(path, json.dumps(versions, indent=1))
        theirs = checkpoint.read_json(path, _ANEW, {})
        if differing := [f"{key} {theirs.get(key)}, here {versions.get(key)}" for key in sorted(versions) if theirs.get(key) != versions[key]]:
            raise RunError(f"{self.out}: its episodes were made with {'; '.join(differing)}: choose another --out, or go back to these")

    def close(self) -> None:
        """Let others in."""
        self._lock.close()


def read_trials(out: Path) -> list[Trial]:
    """The finished episodes of the evaluation in `out`; half a line at the end, of a killed process, is none. RunError for a damaged file."""
    path = out / "episodes.jsonl"
    if not path.is_file():
        return []
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        return [Trial(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: damaged ({error}); {_ANEW}") from error


def _versions(env: Any) -> dict[str, str]:
    return {**env.versions(), "torch": torch.__version__, "python": platform.python_version()}


def _episode(env: Any, asked: Evaluation, start: Start) -> Any:
    expert = suites.expert(asked.suite) if asked.policy == "expert" else None
    variation = expert.VARIATION if expert else 0
    return play(env, start, asked.mode, asked.limit, expert, variation, asked.seed)


def _drive(game: Any, ask: Callable[[Any], Answer]) -> Trial:
    """Play `game` to its end, each question being answered by `ask`."""
    try:
        question = next(game)
        while True:
            question = game.send(ask(question))
    except StopIteration as stop:
        trial: Trial = stop.value
        return trial


def _work(pipe: Connection, asked: Evaluation) -> None:
    """What a process does: episodes as they are asked for, questions to the process that asked."""

    def ask(question: Any) -> Answer:
        pipe.send(("question", question))
        answer: Answer | None = pipe.recv()
        if answer is None:  # another episode has failed, and all are ended
            raise EOFError
        return answer

    torch.set_num_threads(1)
    try:
        env = asked.open()
        while (start := pipe.recv()) is not None:
            pipe.send(("trial", (_drive(_episode(env, asked, start), ask), _versions(env))))
        env.close()
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the other process has ended
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(("failed", f"{type(error).__name__}: {error}"))
            traceback.print_exc()


def _alone(asked: Evaluation, missing: Sequence[Start], benches: Sequence[Bench]) -> Generator[tuple[Trial, dict[str, str]], None, None]:
    env = asked.open()
    try:
        for start in sorted(missing, key=lambda start: (start.task, start.index)):  # scenes are slow to build: one task after the other
            assert benches or asked.policy == "expert"
            yield _drive(_episode(env, asked, start), benches[0].answer if benches else _nobody), _versions(env)
    finally:
        env.close()


def _nobody(question: Any) -> Answer:
    raise AssertionError("an expert asks nothing")


class _Workers:
    """Processes with an environment each."""

    def __init__(self, asked: Evaluation, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes: dict[Connection, Any] = {}
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, asked), daemon=True)
            process.start()
            theirs.close()
            self.processes[ours] = process

    def close(self) -> None:
        """End them."""
        for pipe in self.processes:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process in self.processes.values():
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()


class _Answering:
    """Those who answer, each on a thread of its own; every process asks one of them, always the same."""

    def __init__(self, benches: Sequence[Bench], pipes: Sequence[Connection]) -> None:
        self._asked = [SimpleQueue[tuple[Connection, Any] | None]() for _ in benches]
        self._of = {pipe: self._asked[i % len(benches)] for i, pipe in enumerate(pipes) if benches}
        self._threads = [
            threading.Thread(target=self._answer, args=both, daemon=True) for both in zip(benches, self._asked, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        self.failed, self._fail = multiprocessing.Pipe(duplex=False)
        """Has an error where one could not answer: its process would wait for ever."""
        self._error: BaseException | None = None

    def ask(self, pipe: Connection, question: Any) -> None:
        """Have `question`, which came by `pipe`, answered there."""
        self._of[pipe].put((pipe, question))

    def _answer(self, bench: Bench, asked: SimpleQueue[tuple[Connection, Any] | None]) -> None:
        while (one := asked.get()) is not None:
            pipe, question = one
            try:
                with on(bench.device):
                    answer = bench.answer(question)
            except BaseException as error:
                self._error = error
                self._fail.send(None)
                return
            with contextlib.suppress(OSError):  # its process has died: whoever waits for it is told
                pipe.send(answer)

    def check(self) -> None:
        """Raises what kept one from answering."""
        if self._error is not None:
            raise self._error

    def close(self, stopped: bool) -> None:
        """When what is being answered has been; at once where a person has `stopped` it, since an answer may never come."""
        for asked in self._asked:
            asked.put(None)
        if not stopped:
            for thread in self._threads:
                thread.join()
            self.failed.close()
            self._fail.close()


def _together(
    asked: Evaluation, missing: Sequence[Start], benches: Sequence[Bench], count: int
) -> Generator[tuple[Trial, dict[str, str]], None, None]:
    """Episodes in `count` processes, each preferring the task that it has a scene of. Raises TrialError where one fails or dies."""
    workers, waiting = _Workers(asked, count), list(missing)
    answering, stopped = _Answering(benches, list(workers.processes)), False
    at: dict[Connection, Start | None] = {}

    def next_for(pipe: Connection) -> Start | None:
        if not waiting:
            return None
        before = at.get(pipe)
        left = {start.task: sum(one.task == start.task for one in waiting) for start in waiting}
        busy = {start.task for other, start in at.items() if start is not None and other is not pipe}
        task = before.task if before and before.task in left else max(left, key=lambda task: (task not in busy, left[task], -task))
        chosen = min((start for start in waiting if start.task == task), key=lambda start: start.index)
        waiting.remove(chosen)
        return chosen

    def give(pipe: Connection) -> None:
        at[pipe] = next_for(pipe)
        pipe.send(at[pipe])

    def where(pipe: Connection) -> str:
        return "" if (start := at.get(pipe)) is None else f"task {start.task}, state {start.index}: "

    @contextlib.contextmanager
    def alive(pipe: Connection) -> Iterator[None]:
        """TrialError where its process turns out to be gone."""
        try:
            yield
        except (EOFError, OSError) as error:
            workers.processes[pipe].join(timeout=5)
            code = workers.processes[pipe].exitcode
            raise TrialError(f"{where(pipe)}its process died (exit code {code}); the same command goes on from here") from error

    try:
        for pipe in workers.processes:
            with alive(pipe):
                give(pipe)
        while any(start is not None for start in at.values()):
            ready = wait([answering.failed, *(pipe for pipe, start in at.items() if start is not None)])
            answering.check()
            for pipe in [pipe for pipe in at if pipe in ready]:
                with alive(pipe):
                    kind, content = pipe.recv()
                if kind == "failed":
                    raise TrialError(f"{where(pipe)}{content}")
                if kind == "question":
                    answering.ask(pipe, content)
                else:
                    with alive(pipe):
                        give(pipe)
                    yield content
    except KeyboardInterrupt:
        stopped = True
        raise
    finally:
        answering.close(stopped)
        workers.close()


def _fit_engines(asked: Evaluation, out: Path, benches: Sequence[Bench]) -> list[compiled.Fitted]:
    """The engines that were asked for, in their places; they are compared on what an episode's first chunks ask, and what the first of `benches`
    takes the others take. Plans lie beside `out`, so that the next evaluation exports nothing."""
    if asked.engines is None:
        return []
    bench, env = benches[0], asked.open()

    def rollouts() -> None:
        limit = min(asked.limit, _RECORDED_STEPS)
        for start in asked.starts()[: len(asked.tasks)]:
            _drive(play(env, start, asked.mode, limit, None, 0, asked.seed), bench.answer)

    try:
        tasks, store = [env.tasks[task] for task in asked.tasks], Store(out.parent / "engines", int(asked.engines.limit_gb * 1e9))
        networks = [one.networks(asked.engines, tasks, asked.limit) for one in benches]
        first = compiled.fitted(networks[0], rollouts, asked.engines, store, out / "engines.json")
        return [first, *(compiled.alike(first, mine, store, one.device) for one, mine in zip(benches[1:], networks[1:], strict=True))]
    finally:
        env.close()


def evaluate(asked: Evaluation, out: Path, processes: int, benches: Sequence[Bench]) -> dict[str, Any]:
    """Make the episodes that are missing in `out`, and the result, which is JSON-ready. `benches`, alike and one on each device, answer questions;
    an expert needs none.

    Raises RunError where the folder is another evaluation's, EngineError where an engine that it was begun with is not to be had, TrialError where an
    episode fails; what is finished stays.
    """
    where = actors.weights_of(asked.policy)  # now: a run may go on while it is evaluated
    weights = None if where is None else str(where)
    folder = _Folder(out, asked)
    try:
        missing = [start for start in asked.starts() if start.number not in folder.trials]
        if missing:
            engines = _fit_engines(asked, out, benches)
            made = _alone(asked, missing, benches) if processes == 1 else _together(asked, missing, benches, min(processes, len(missing)))
            with contextlib.closing(made):
                for _ in (bar := console.track(len(folder.trials), asked.episodes, f"eval {asked.suite}")):
                    trial, versions = next(made)
                    folder.made_with(versions)
                    folder.add(trial)
                    bar.note(success=float(np.mean([one.success for one in folder.trials.values()])))
            del engines  # until here nobody else has thrown their plans away
        versions = checkpoint.read_json(out / "versions.json", _ANEW, {"renderer": str})
        found = result(asked, list(folder.trials.values()), versions, weights)
        if asked.engines is not None:
            found["engines"] = checkpoint.read_json(out / "engines.json", _ANEW, {})
        checkpoint.write_text(out / "result.json", json.dumps(found, indent=1))
        return found
    finally:
        folder.close()


def _counted(trials: Sequence[Trial]) -> dict[str, Any]:
    successes = sum(trial.success for trial in trials)
    return {"episodes": len(trials), "successes": successes, "interval": [round(end, 4) for end in wilson(successes, len(trials))]}


def result(asked: Evaluation, trials: Sequence[Trial], versions: dict[str, str], weights: str | None) -> dict[str, Any]:
    """What `evaluate` found, JSON-ready: the counts with 95 % Wilson intervals, and all that they depend on; `weights`: the policy's file."""
    settle = libero.SETTLE_STEPS if asked.suite in libero.SUITES else 0
    states = sorted(f"{trial.task} {trial.index} {trial.state}" for trial in trials)
    names = _instructions(asked)
    by_task = []
    for task in asked.tasks:
        mine = [trial for trial in trials if trial.task == task]
        if mine:
            first = [trial.first_success for trial in mine if trial.success and trial.first_success is not None]
            mean = round(float(np.mean(first)), 1) if first else None
            by_task.append({"task": task, "instruction": names[task], **_counted(mine), "mean_first_success": mean})
    steps, seconds, cpu = (sum(getattr(trial, name) for trial in trials) for name in ("steps", "seconds", "cpu_seconds"))
    return {
        "suite": asked.suite,
        "policy": asked.policy,
        "weights": weights,
        "mode": asked.mode,
        **_counted(trials),
        "limits": {"steps": asked.limit, "settle_steps": settle},
        "tasks": by_task,
        "left_out": [name for task, name in enumerate(names) if task not in asked.tasks],
        "demonstrations_per_task": asked.demonstrations,
        "views": asked.views,
        "image": asked.image,
        "sampling": f"sampled, seed {asked.seed}" if asked.sampled else "scripted" if asked.policy == "expert" else "greedy",
        "renderer": versions["renderer"],
        "states": hashlib.sha256("\n".join(states).encode()).hexdigest(),
        "identity": asked.identity,
        "reflector": asked.reflector,
        "versions": {name: version for name, version in versions.items() if name != "renderer"},
        "commit": report.commit(),
        "steps_per_second": round(steps / max(seconds, 1e-9), 2),
        "steps_per_cpu_second": round(steps / max(cpu, 1e-9), 2),
    }


def _instructions(asked: Evaluation) -> tuple[str, ...]:
    if asked.suite == "tabletop":
        env = suites.open_suite(asked.suite, asked.image)
        names = env.tasks
        env.close()
        return names
    return libero.instructions(asked.suite)


def compare(left: Path, right: Path) -> dict[str, Any]:
    """`right` against `left`, episode by episode on the same initial states: wins, losses, exact McNemar p, difference with its interval.

    Only states that both have finished count, and both must have been begun alike. RunError where they are not comparable.
    """
    asked = []
    for out in (left, right):
        if not (out / "eval.json").is_file():
            raise RunError(f"{out}: no evaluation there (no eval.json)")
        asked.append(checkpoint.read_json(out / "eval.json", "make this evaluation anew", {"suite": str, "mode": str, "limit": int, "policy": str}))
    if differing := [f"{name}: {asked[0][name]} and {asked[1][name]}" for name in ("suite", "mode", "limit") if asked[0][name] != asked[1][name]]:
        raise RunError(f"{left} and {right} cannot be paired: {'; '.join(differing)}")
    before, after = ({(trial.task, trial.index): trial for trial in read_trials(out)} for out in (left, right))
    both = sorted(before.keys() & after.keys())
    if not both:
        raise RunError(f"{left} and {right} have no initial state in common")
    if other := [key for key in both if before[key].state != after[key].state]:
        task, index = other[0]
        raise RunError(f"task {task}, state {index} is not the same in {left} and {right}, nor are {len(other) - 1} others: were they made alike?")
    rows = [np.array([one[key].success for key in both]) for one in (before, after)]
    return {
        "suite": asked[0]["suite"],
        "mode": asked[0]["mode"],
        "left": {"out": str(left), "policy": asked[0]["policy"], "successes": int(rows[0].sum())},
        "right": {"out": str(right), "policy": asked[1]["policy"], "successes": int(rows[1].sum())},
        "pairs": len(both),
        "unpaired": len(before) + len(after) - 2 * len(both),
        **paired(rows[0], rows[1]),
    }
