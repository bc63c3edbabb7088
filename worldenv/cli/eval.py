"""worldenv-eval: success of a policy in the true environment, by the paper's protocols; two evaluations paired; a learned world against the truth;
one episode laid open."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro
from numpy.typing import NDArray

from worldenv import checkpoint, console, evaluation
from worldenv.cli import files
from worldenv.cli.arguments import parse
from worldenv.cli.ending import Ending
from worldenv.config import LIBERO_TEST_STATES, EnginesConfig, EnvConfig, tasks_of
from worldenv.devices import device_of, gpus_of
from worldenv.envs import suites
from worldenv.evaluation import Protocol
from worldenv.nouns import ACTION_DIM
from worldenv.policy import published
from worldenv.run import settings_of, snapshots
from worldenv.stages.evaluate import audit_run
from worldenv.trials import actors, inspection, runner
from worldenv.trials.runner import EPISODES_PER_TASK, Evaluation

Suite = Literal["tabletop", "libero_spatial", "libero_object", "libero_goal", "libero_10"]


@dataclass(frozen=True)
class RunArgs:
    """Evaluate a policy on the fixed test states of a suite. The same command again goes on where it stopped."""

    policy: str = ""
    """expert, a policy's file, a run's folder, an OpenVLA-OFT directory, or lerobot:PATH with --python."""
    suite: Suite | None = None
    """Which tasks; by default those of the policy's run, else libero_spatial."""
    mode: Protocol = "oracle"
    """oracle: ends at success (Table 1); limit: success at the step limit (Table 3, baselines); reflector: ends where the reflector says (ours)."""
    episodes: int | None = None
    """In all, spread over the tasks; by default 50 a task."""
    tasks: tuple[int, ...] = ()
    """Only these; by default those that the policy's run was about, all that an expert can do, or all."""
    out: Path | None = None
    """Folder of this evaluation; by default below runs/eval."""
    processes: int = 1
    """With an environment each."""
    python: str | None = None
    """Interpreter of lerobot:PATH, one in whose environment lerobot is."""
    reflector: Path | None = None
    """Its file, for --mode reflector; by default that of the policy's run."""
    sample: bool = False
    """Draw actions by the policy's density; else greedy."""
    seed: int = 7
    """Of what is drawn, and of an expert's manner."""
    demonstrations: int | None = None
    """Per task, that the policy was trained on: for the record, where the checkpoint does not know."""
    views: int | None = None
    """Pictures that an OpenVLA-OFT directory was trained with; the published LIBERO models: 2."""
    dataset: str | None = None
    """Whose statistics of an OpenVLA-OFT directory; by default the suite's (libero_goal_no_noops, libero_goal), else the only ones."""
    step: int | None = None
    """Of which step's heads, where an OpenVLA-OFT directory has several."""
    image: int | None = None
    """Side of the pictures [px]; by default that of the policy's run, else 256 in LIBERO."""
    device: str = "auto"
    """Of networks: auto, cpu, cuda."""
    gpus: int = 1
    """With --device cuda: GPUs of this machine, each with a policy (and reflector) of its own that answers its share of the processes; 0: all."""
    engines: EnginesConfig = field(default_factory=lambda: EnginesConfig(back_end="eager"))
    """What runs the policy, and the reflector in mode reflector (docs/engines.md)."""


@dataclass(frozen=True)
class CurveArgs:
    """Evaluate the copies of the policy that a run's stage loop kept: success by training step, for each task (the paper's Figure 3)."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    suite: Suite | None = None
    """Which tasks; by default those of the run."""
    tasks: tuple[int, ...] = ()
    """Only these."""
    mode: Protocol = "oracle"
    """As in run."""
    episodes: int | None = None
    """Per point, in all; by default 50 a task."""
    out: Path | None = None
    """Folder; by default below runs/eval."""
    processes: int = 1
    """With an environment each."""
    device: str = "auto"
    """Of networks: auto, cpu, cuda."""
    gpus: int = 1
    """As in run."""
    engines: EnginesConfig = field(default_factory=lambda: EnginesConfig(back_end="eager"))
    """As in run; built anew for every copy."""


@dataclass(frozen=True)
class CompareArgs:
    """B against A on the same initial states: wins, losses, exact McNemar p-value, difference with its interval."""

    left: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """Folder of an evaluation."""
    right: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """Folder of another."""


@dataclass(frozen=True)
class AuditArgs:
    """A run's learned world against the truth: rollouts of its policy with LOOP's noise, imagined, then the same commands in its true environment.

    Of a run from recordings: its held-out recordings, imagined."""

    run: tyro.conf.Positional[Path]
    """Folder of the run; its stages to reward are needed, with --policy loop also loop."""
    policy: Literal["loop", "scale"] = "loop"
    """Whose rollouts: the policy after LOOP, or the one that it began from. Recordings are of whoever was recorded."""
    episodes: int = 48
    """Rollouts, from training states spread over the tasks; recordings at most."""
    out: Path | None = None
    """File for the pairs (.safetensors): context, commands, frames, scores, success."""
    force: bool = False
    """Overwrite --out where it exists."""
    device: str = "auto"
    """Of networks: auto, cpu, cuda."""


@dataclass(frozen=True)
class InspectArgs:
    """Play known commands from an initial state, and write everything about it as arrays."""

    suite: Suite
    """Which tasks."""
    task: int
    """Which of them."""
    actions: Path
    """A .npy file (T, 7): six motions in [-1, 1], gripper -1 open .. +1 close."""
    out: Path
    """The .npz file to write."""
    init: int = 0
    """Which initial state."""
    split: Literal["train", "test"] = "test"
    """Published states are "test"."""
    image: int | None = None
    """Side of the pictures [px]; LIBERO: 256."""
    force: bool = False
    """Overwrite --out where it exists."""


def _tasks(asked: tuple[int, ...], suite: str, who: actors.Description) -> tuple[int, ...]:
    """Which tasks are evaluated. ValueError for one that is not there, or that the expert cannot do."""
    able = tuple(range(tasks_of(suite)))
    if who.name == "expert" and suite != "tabletop":
        able = suites.expert(suite).TASKS[suite]
    if odd := [task for task in asked if task not in able]:
        raise ValueError(f"--tasks {odd[0]}: {f'the expert of {suite} does' if who.name == 'expert' else f'{suite} has'} {', '.join(map(str, able))}")
    trained = who.env.tasks if who.env is not None and who.env.name == suite else ()
    return tuple(sorted(set(asked))) or trained or able


def _image(asked: int | None) -> None:
    if asked is not None and asked < 1:
        raise ValueError(f"--image {asked}: want at least 1 px")


def _mean_something(args: RunArgs, who: actors.Description) -> None:
    """ValueError with one line for a flag that means nothing to the policy, or in the mode, that is asked for."""
    path = Path(args.policy)
    directory = args.policy != "expert" and path.is_dir() and not (path / "run.json").is_file()
    if args.python is not None and not args.policy.startswith("lerobot:"):
        raise ValueError(f"--python {args.python}: is for lerobot:PATH, whose process it runs; leave it out for {args.policy}")
    for flag in ("views", "dataset", "step"):
        if (given := getattr(args, flag)) is not None and not directory:
            raise ValueError(f"--{flag} {given}: is for an OpenVLA-OFT directory; {args.policy} knows its own, leave it out")
    if args.views not in (None, 1, 2):
        raise ValueError(f"--views {args.views}: want 1, or 2 with the camera on the hand")
    if args.policy == "expert" and (args.gpus != 1 or args.device != "auto"):
        raise ValueError("--device, --gpus: an expert runs no network; leave them out")
    if args.demonstrations is not None and (args.policy == "expert" or who.env is not None):
        known = "an expert is trained on none" if args.policy == "expert" else f"the run of {args.policy} knows its own"
        raise ValueError(f"--demonstrations {args.demonstrations}: {known}; leave it out")
    if args.demonstrations is not None and args.demonstrations < 0:
        raise ValueError(f"--demonstrations {args.demonstrations}: want a count, 0 or more")
    if args.reflector is not None and args.mode != "reflector":
        raise ValueError(f"--reflector {args.reflector}: is for --mode reflector; {args.mode} asks none, leave it out")


def _suite(asked: Suite | None, policy: str) -> Suite:
    """What is evaluated where that is not said: the environment of the policy's run. ValueError where it is of recordings."""
    path = actors.weights_of(policy)
    run = None if path is None else actors.run_of(path.resolve())
    if asked is not None or run is None:
        return asked or "libero_spatial"
    if (its := settings_of(run).env.name) == "recorded":
        raise ValueError(f"--policy {policy}: its run is from recordings, in which nobody can act; say which --suite: {', '.join(get_args(Suite))}")
    return its


def _directory(args: RunArgs, suite: str) -> actors.Directory:
    """How the policy is opened if it is an OpenVLA-OFT directory."""
    dataset = args.dataset if args.dataset is not None else published.dataset_of(Path(args.policy), suite)
    return actors.Directory(args.views or actors.Directory.views, dataset, args.step)


def _evaluation(args: RunArgs) -> tuple[Evaluation, Path | None]:
    """What is asked for, and the reflector's file. ValueError with one line for what does not fit."""
    if not args.policy:
        raise ValueError("--policy: say whom to evaluate: expert, a checkpoint, lerobot:PATH")
    if args.processes < 1:
        raise ValueError(f"--processes {args.processes}: want at least 1")
    if args.gpus < 0:
        raise ValueError(f"--gpus {args.gpus}: want a count, or 0 for all")
    _image(args.image)
    files.seeded(args.seed)
    if args.policy != "expert":
        device_of(args.device)
    suite = _suite(args.suite, args.policy)
    who = actors.describe(args.policy, args.demonstrations, _directory(args, suite))
    _mean_something(args, who)
    if args.policy == "expert" and (args.mode == "reflector" or args.sample):
        raise ValueError("--policy expert: it is neither watched nor sampled; modes oracle and limit")
    engines = None if args.engines.back_end == "eager" else args.engines
    if engines is not None and (args.policy == "expert" or args.policy.startswith("lerobot:")):
        raise ValueError(f"--engines.back-end {engines.back_end}: {args.policy} runs no network here that an engine could; leave it out")
    judge = (args.reflector or who.reflector) if args.mode == "reflector" else None
    if args.mode == "reflector" and (judge is None or not judge.is_file()):
        raise ValueError(f"--mode reflector: no reflector at {judge}; give --reflector FILE (reflector.safetensors of a run's stage reward)")
    tasks = _tasks(args.tasks, suite, who)
    its = who.env if who.env is not None and who.env.name == suite else None
    ours = its if suite == "tabletop" else None
    most = (ours or EnvConfig()).test_states if suite == "tabletop" else LIBERO_TEST_STATES
    episodes = EPISODES_PER_TASK * len(tasks) if args.episodes is None else args.episodes
    if not 1 <= episodes <= most * len(tasks):
        raise ValueError(f"--episodes {episodes}: there are {most} test states for each of {len(tasks)} tasks; give 1 .. {most * len(tasks)}")
    if who.env is not None and its is None:
        console.say(f"{args.policy} is of a run in {who.env.name}, and is evaluated in {suite}")
    image = args.image or (its.image if its else suites.picture(suite))
    limit = ours.steps if ours else suites.step_limit(suite)
    views = 0 if args.policy == "expert" else 1  # of a network: known when it is open
    return Evaluation(
        suite, args.policy, who.identity, args.mode, episodes, tasks, limit, image, views, args.sample, args.seed, who.demonstrations,
        checkpoint.file_hash(judge) if judge else None, ours, engines,
    ), judge  # fmt: skip


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")[-60:]


def _evaluate(args: RunArgs) -> dict[str, Any]:
    asked, judge = _evaluation(args)
    out = args.out or Path("runs/eval") / f"{asked.suite}-{_name(args.policy)}-{args.mode}"
    goes_on = "; the same command then goes on from here"
    if args.policy == "expert":
        with files.written(out, goes_on):
            return runner.evaluate(asked, out, args.processes, ())
    robot = suites.robot(asked.suite)
    seed, directory = args.seed if args.sample else None, _directory(args, asked.suite)
    devices = gpus_of(device_of(args.device), args.gpus)
    if len(devices) > args.processes:
        raise ValueError(f"--gpus {len(devices)} --processes {args.processes}: want a process for each GPU at least, whose environment asks it")
    with contextlib.ExitStack() as opened, files.written(out, goes_on):
        benches = [opened.enter_context(actors.open_bench(args.policy, robot, device, args.python, seed, directory, judge)) for device in devices]
        return runner.evaluate(runner.seen_by(asked, benches[0].actor.views), out, args.processes, benches)


def _table(found: dict[str, Any]) -> str:
    """For people."""
    rows = [(f"{one['task']:2}  {one['instruction'][:76]:76}", one) for one in found["tasks"]] + [(f"    {'all':76}", found)]
    whose = f"{found['policy']} ({found['weights']})" if found["weights"] not in (None, found["policy"]) else found["policy"]
    lines = [f"{found['suite']}, {whose}, {found['mode']}: at most {found['limits']['steps']} steps, {found['sampling']}"]
    for name, one in rows:
        low, high = (100 * end for end in one["interval"])
        first = one.get("mean_first_success")
        share, when = 100 * one["successes"] / one["episodes"], "" if first is None else f"step {first:.0f}"
        lines.append(f"{name}  {one['successes']:3}/{one['episodes']:<3}  {share:5.1f} %  [{low:5.1f}, {high:5.1f}]  {when}")
    lines += [f"left out: {name}" for name in found["left_out"]]
    lines.append(
        f"{found['steps_per_second']} steps/s of an environment, {found['steps_per_cpu_second']} per second of its processor; 95 % Wilson intervals"
    )
    return "\n".join(lines)


def _run(argv: Sequence[str]) -> int:
    found = _evaluate(parse("worldenv-eval run", RunArgs, RunArgs(), argv))
    print(_table(found))
    print(json.dumps(found))
    return 0


def _curve(argv: Sequence[str]) -> int:
    args = parse("worldenv-eval curve", CurveArgs, None, argv)
    settings_of(args.run)
    if not (args.run / "stages" / "loop").is_dir():
        raise ValueError(f"{args.run}: stage loop, which keeps the copies of the policy, has not begun; worldenv-train --resume {args.run}")
    points = snapshots(args.run)
    if len(points) == 1:
        raise ValueError(f"{args.run}: no copies of the policy (stages/loop/policy-*.safetensors); train with loop.snapshot_every")
    suite = _suite(args.suite, str(points[-1][1]))
    out = args.out or Path("runs/eval") / f"{suite}-{_name(str(args.run))}-curve"
    rows = []
    for step, path in points:
        at = out / f"step-{step:04d}"
        one = RunArgs(
            str(path), suite, args.mode, args.episodes, args.tasks, at, args.processes, device=args.device, gpus=args.gpus, engines=args.engines
        )  # fmt: skip
        found = _evaluate(one)
        rows.append({"step": step, **{key: found[key] for key in ("episodes", "successes", "interval", "tasks")}})
        by_task = "  ".join(f"{task['task']}: {task['successes']}/{task['episodes']}" for task in found["tasks"])
        print(f"step {step:4}  {found['successes']:3}/{found['episodes']:<3}  {by_task}", flush=True)
    print(json.dumps({"suite": suite, "policy": str(args.run), "mode": args.mode, "curve": rows}))
    return 0


def _compare(argv: Sequence[str]) -> int:
    args = parse("worldenv-eval compare", CompareArgs, None, argv)
    found = runner.compare(args.left, args.right)
    low, high = (100 * end for end in found["interval"])
    for side in ("left", "right"):
        print(f"{side:5}  {found[side]['policy']:40}  {found[side]['successes']:3}/{found['pairs']:<3}  {found[side]['out']}")
    print(
        f"right - left: {100 * found['difference']:+.1f} points [{low:+.1f}, {high:+.1f}], {found['wins']} won, {found['losses']} lost, "
        f"McNemar p = {found['p_value']:.3g} (exact); {found['unpaired']} episodes have no partner"
    )
    print(json.dumps(found))
    return 0


def _commands(path: Path) -> NDArray[np.floating[Any]]:
    """The commands (T, 7) in a file. ValueError with one line for what is none."""
    name, commands = f"--actions {path}", files.numbers(path, "--actions")
    if commands.ndim != 2 or commands.shape[1] != ACTION_DIM or not len(commands):
        raise ValueError(f"{name}: {commands.shape}, want at least one command, (T, {ACTION_DIM})")
    files.in_range(commands, name)
    return commands if np.issubdtype(commands.dtype, np.floating) else commands.astype(np.float64)


def _inspect(argv: Sequence[str]) -> int:
    args = parse("worldenv-eval inspect", InspectArgs, None, argv)
    if args.out.suffix != ".npz":
        raise ValueError(f"--out {args.out}: want a name that ends in .npz")
    files.vacant(args.out, args.force)
    _image(args.image)
    command = _commands(args.actions)
    found = inspection.inspect(args.suite, args.task, args.split, args.init, command, args.image or suites.picture(args.suite))
    with files.written(args.out), checkpoint.atomic(args.out) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **found)  # type: ignore[arg-type]
    held = [int(t) for t in np.flatnonzero(found["success"])[:1]]
    print(*(f"{name:18} {array.dtype!s:8} {array.shape}" for name, array in found.items()), sep="\n")
    print(json.dumps({
        "suite": args.suite, "task": args.task, "init": args.init, "split": args.split, "steps": len(command), "out": str(args.out),
        "first_success": held[0] if held else None, "step_limit": int(found["step_limit"]), "state": str(found["state_hash"]),
    }))  # fmt: skip
    return 0


def _audit(argv: Sequence[str]) -> int:
    args = parse("worldenv-eval audit", AuditArgs, None, argv)
    if args.episodes < 1:
        raise ValueError(f"--episodes {args.episodes}: want at least 1")
    if args.out is not None:
        files.vacant(args.out, args.force)
    with files.written(args.out) if args.out is not None else contextlib.nullcontext():
        found = audit_run(args.run, "sft" if args.policy == "scale" else "loop", args.episodes, args.device, args.out)
    truth = "recorded" if settings_of(args.run).env.recorded else "true"
    rows = [*((name, one) for name, one in found["by_task"].items()), ("all", found)]
    for name, one in rows:
        low, high = (100 * end for end in evaluation.wilson(one["agree"], one["episodes"])) if one["episodes"] else (0.0, 100.0)
        print(
            f"{name[:60]:60}  agree {one['agree']:3}/{one['episodes']:<3} [{low:5.1f}, {high:5.1f}] %  imagined {one['imagined_successes']:3}, "
            f"{truth} {one['true_successes']:3}; only imagined {one['false_positives']}, only {truth} {one['false_negatives']}; "
            f"the reflector on {truth} frames: {one['reflector_false_positives']}, {one['reflector_false_negatives']}"
        )
    for name, title in (("psnr_by_chunk", "imagined"), ("psnr_copy_first_by_chunk", "first frame repeated")):
        print(f"PSNR by chunk, {title}: {' '.join(f'{value:.1f}' for value in found[name])} dB")
    whose = args.policy if truth == "true" else truth
    print(json.dumps({"run": str(args.run), "policy": whose, "out": str(args.out) if args.out else None, **found}))
    return 0


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": _run, "curve": _curve, "compare": _compare, "audit": _audit, "inspect": _inspect,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 where the evaluation failed, 2 for what was asked wrongly, 130 where it was stopped; the same command then goes on."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in _COMMANDS:
        said = f"commands: {', '.join(_COMMANDS)}; worldenv-eval COMMAND --help says more"
        if argv and argv[0] in ("-h", "--help"):
            print(said)
            return 0
        print(f"worldenv-eval: {f'unknown command {argv[0]!r}; ' if argv else ''}{said}", file=sys.stderr)
        return 2
    with Ending("worldenv-eval") as ending:
        if argv[0] in ("run", "curve"):
            ending.stopped = "; the same command goes on from here"
            ending.no_room = " Another --device may have room; the same command goes on from here"
        ending.code = _COMMANDS[argv[0]](argv[1:])
    return ending.code


if __name__ == "__main__":
    raise SystemExit(main())
