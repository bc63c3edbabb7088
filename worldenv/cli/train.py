"""worldenv-train: from five demonstrations a task to a post-trained policy and its report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from worldenv import console, distributed, presets, run, train
from worldenv.cli import files
from worldenv.cli.arguments import parse, value_of
from worldenv.cli.ending import Ending
from worldenv.config import RunConfig
from worldenv.devices import device_of
from worldenv.learning import processes
from worldenv.stages.replay import replay

StageName = Literal["demos", "sft", "scale", "explore", "world", "reward", "loop", "eval", "report"]
_STAGES = get_args(StageName)
_LESS_MEMORY = (
    " Go on with less at once: --resume {0} with smaller --sft.microbatch, --world.microbatch, --loop.microbatch or --loop.slots, or with "
    "--sft.gradient-checkpointing, --world.gradient-checkpointing or --loop.gradient-checkpointing; what is finished stays. Or without the engines' "
    "weights, in a run that takes over what is finished before stage reward: --reuse {0} --out NEW --engines.back-end eager"
)


@dataclass(frozen=True)
class TrainArgs:
    """Post-train a policy inside a learned world. The same command again goes on where it stopped."""

    settings: Annotated[RunConfig, tyro.conf.arg(name="")]
    """Every knob, from the preset."""
    out: Path = Path("runs/tiny")
    """Folder of the run: everything is written here."""
    from_stage: Annotated[StageName | None, tyro.conf.arg(name="from")] = None
    """Do this stage and all later ones again; stopped, the run goes on with --resume."""
    only: StageName | None = None
    """Do this stage alone, again."""
    until: StageName | None = None
    """Stop after this stage."""
    resume: Path | None = None
    """Go on with the run in this folder, with the settings that it has stored."""
    replay: Annotated[int | None, tyro.conf.arg(metavar="ROLLOUT_ID")] = None
    """Make one stored rollout of the run in --out once more, alone, and say whether it is the same bit for bit; nothing is written."""
    reuse: tuple[Path, ...] = ()
    """Runs whose finished stages are taken over where settings and inputs are the same; they are not changed."""
    no_extra_data: bool = False
    """Train the world model on demonstrations alone (the paper's first ablation)."""
    no_reward_head: bool = False
    """Score by the probability of "Yes", without a reward head (the paper's second ablation)."""
    tensorboard: bool = False
    """Write what log.jsonl holds for TensorBoard too, below OUT/tensorboard; wants tensorboardX."""
    debug: bool = False
    """Show the traceback of an error."""


def _defaults(argv: Sequence[str]) -> TrainArgs:
    """The defaults that --preset, --fast, --resume and --replay choose, before the other flags are read."""
    asked = [flag for flag in ("--replay", "--resume") if value_of(argv, flag) is not None]
    if asked and "--fast" in argv:
        raise ValueError(f"{asked[0]} and --fast: a run keeps the settings that it was begun with; leave --fast away, or begin another run")
    if len(asked) > 1:
        raise ValueError("--replay takes --out and nothing else of the run's stages")
    if value_of(argv, "--replay") is not None:
        replayed = Path(value_of(argv, "--out") or TrainArgs.out)
        return TrainArgs(run.settings_of(replayed), out=replayed)
    if (folder := value_of(argv, "--resume")) is not None:
        return TrainArgs(run.settings_of(Path(folder)), out=Path(folder), resume=Path(folder))
    chosen = presets.preset(value_of(argv, "--preset") or "tiny")
    if value_of(argv, "--env.name") == "recorded":  # a preset's choice of tasks is of its own environment
        chosen = dataclasses.replace(chosen, env=dataclasses.replace(chosen.env, tasks=()))
    return TrainArgs(presets.fast(chosen) if "--fast" in argv else chosen)


def _settings(args: TrainArgs) -> RunConfig:
    settings = args.settings
    if args.no_extra_data:
        settings = dataclasses.replace(settings, world=dataclasses.replace(settings.world, extra_data=False))
    if args.no_reward_head:
        settings = dataclasses.replace(settings, reward=dataclasses.replace(settings.reward, head=False))
    return settings


def _refuse(args: TrainArgs, settings: RunConfig) -> None:
    """ValueError with one line for what cannot be asked for."""
    if args.resume is not None and args.resume != args.out:
        raise ValueError(f"--resume {args.resume} and --out {args.out}: a run goes on in its own folder; leave --out away")
    if args.only and args.from_stage:
        raise ValueError("--only and --from: choose one")
    if args.until and args.only:
        raise ValueError("--only and --until: choose one")
    if args.until and args.from_stage and _STAGES.index(args.from_stage) > _STAGES.index(args.until):
        raise ValueError(f"--from {args.from_stage} --until {args.until}: there is nothing between them")
    if missing := [str(folder) for folder in args.reuse if not (folder / "run.json").is_file()]:
        raise ValueError(f"--reuse {missing[0]}: no run there (no run.json)")
    if args.replay is not None and (args.only or args.from_stage or args.until or args.reuse):
        raise ValueError("--replay takes --out and nothing else of the run's stages")
    if args.replay is None:
        train.chosen(settings, args.only, args.until)
    if settings.device != "auto":
        device_of(settings.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the report is written or the replay is bit-equal, 1 when it is not or a stage failed, 2 for a bad command line or files."""
    argv = sys.argv[1:] if argv is None else argv
    with Ending("worldenv-train") as ending:
        # --fast has chosen the defaults; left in, it would ask to turn on what is on
        args = parse("worldenv-train", TrainArgs, _defaults(argv), [word for word in argv if word != "--fast"])
        settings = _settings(args)
        _refuse(args, settings)
        ending.debug = args.debug
        if args.replay is not None:
            found = replay(args.out, settings, args.replay)
            print(json.dumps(found, allow_nan=False))
            ending.code = 0 if found["bit_equal"] else 1
        else:
            _train(args, settings, ending)
    return ending.code


def _train(args: TrainArgs, settings: RunConfig, ending: Ending) -> None:
    # --from would begin what it has finished anew
    ending.stopped = f"; {f'--resume {args.out}' if args.from_stage else 'the same command'} goes on from here"
    ending.no_room = _LESS_MEMORY.format(args.out)
    board = console.board(args.out / "tensorboard") if args.tensorboard else contextlib.nullcontext()
    with files.written(args.out, ", then give the same command again"), distributed.joined(), board:
        train.train(args.out, settings, first=args.from_stage, only=args.only, reuse=args.reuse, until=args.until)
        speaks = processes.rank() == 0
    if speaks and args.only in (None, "report") and args.until in (None, "report"):
        print(json.dumps({"out": str(args.out), "report": str(args.out / "report.html"), "record": str(args.out / "report.json")}))


if __name__ == "__main__":
    raise SystemExit(main())
