"""`python -m benchmarks.learns`: does post-training in the imagined world raise true success, and what of the method does it?

    python -m benchmarks.learns --seed S [--control shuffle|frozen|true-simulator] [--no-extra-data] [--no-reward-head] [--no-termination]
    python -m benchmarks.learns --seed S --control shuffle --permutation K
    python -m benchmarks.learns --seed S --instead more-sft|exploration-demos
    python -m benchmarks.learns --table

The first form is a whole run of `worldenv-train` with one part taken out by name, in its own folder below --runs; stages that another run
there has done with the same settings are taken over; in the true simulator no world model is trained. The third trains what a user would try
first instead of LOOP: fine-tuning for twice as long, on the demonstrations or on these and the successes of the exploration. Every form pairs
the result with the fine-tuned policy on the same test states, and adds one row to benchmarks/results/learns.jsonl. --table prints all rows, and
pools seeds; then the method beside its shuffle on the same states, the mean over runs with an interval of its own, successes by what ends an
episode, and how often the judge is fooled.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from worldenv import checkpoint, config, evaluation, presets, report, train
from worldenv.benchmarks import harness
from worldenv.cli.arguments import parse
from worldenv.cli.ending import Ending
from worldenv.config import RunConfig
from worldenv.data.episode import Episode
from worldenv.data.scenes import OneScene
from worldenv.evaluation import Outcomes
from worldenv.learning import sft
from worldenv.policy import weights as policies
from worldenv.run import Run
from worldenv.stages.desk import Desk
from worldenv.stages.policy import begun_policy

RESULTS = Path(__file__).parent / "results" / "learns.jsonl"


@dataclass(frozen=True)
class LearnsArgs:
    """One run of the method, of a control or of an ablation; or the table of all."""

    seed: int = 0
    """Seed of the whole run."""
    control: Literal["none", "shuffle", "frozen", "true-simulator"] = "none"
    """What is put in the method's place (loop.control)."""
    permutation: int = 0
    """Which run of --control shuffle (loop.permutation)."""
    no_extra_data: bool = False
    """The world model is trained on demonstrations alone."""
    no_reward_head: bool = False
    """Scores are the probability of "Yes"."""
    no_termination: bool = False
    """No rollout is ended by the reflector."""
    instead: Literal["more-sft", "exploration-demos"] | None = None
    """What a user might try instead of LOOP."""
    preset: str = "tiny"
    """Preset of the run."""
    fast: bool = False
    """Cut every stage short: shows that the command works, and is not written to the results."""
    runs: Path = Path("runs/learns")
    """Folder of the runs."""
    results: Path = RESULTS
    """Where rows are added."""
    table: bool = False
    """Print what the rows that there are say, and nothing else."""


def variant(args: LearnsArgs) -> str:
    """The name of what is run: `method`, or what was taken out or put in."""
    switches = {"no-extra-data": args.no_extra_data, "no-reward-head": args.no_reward_head, "no-termination": args.no_termination}
    parts: list[str] = [args.instead] if args.instead else []
    parts += [args.control] if args.control != "none" else []
    parts += [name for name, on in switches.items() if on]
    return "+".join(parts) or "method"


def _folder(args: LearnsArgs) -> Path:
    """Where the run that `args` ask for is kept: one folder for each variant, and for each permutation of the shuffle."""
    again = f"-{args.permutation}" if args.permutation else ""
    return args.runs / f"seed-{args.seed}" / f"{variant(args)}{again}"


def settings_for(args: LearnsArgs) -> RunConfig:
    """The preset with what `args` take out."""
    chosen = presets.preset(args.preset)
    chosen = presets.fast(chosen) if args.fast else chosen
    return dataclasses.replace(
        chosen,
        seed=args.seed,
        world=dataclasses.replace(chosen.world, extra_data=not args.no_extra_data),
        reward=dataclasses.replace(chosen.reward, head=not args.no_reward_head),
        loop=dataclasses.replace(chosen.loop, control=args.control, permutation=args.permutation, termination=not args.no_termination),
    )


def _siblings(folder: Path, out: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path != out and (path / "run.json").is_file()]


def until_first_success(episode: Episode) -> Episode:
    """A successful episode up to the first observation at which the predicate holds: what a demonstration would be."""
    end = int(np.argmax(episode.success))
    cut = {name: getattr(episode, name)[: end + 1] for name in ("frame", "pose", "gripper", "success")}
    return dataclasses.replace(episode, **cut, command=episode.command[:end])


def _hits(outcomes: Mapping[str, Outcomes]) -> dict[str, str]:
    """Success on each test state by the predicate, by policy: a bit a state, the first state's the highest, in hexadecimal."""
    return {name: np.packbits(one.by("oracle")).tobytes().hex() for name, one in outcomes.items()}


def _hit(row: Mapping[str, Any], which: str) -> NDArray[np.bool_]:
    """What `_hits` wrote of policy `which`: (n,). KeyError for a row from before it did."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["hits"][which]), np.uint8), count=row["eval"][which]["oracle"]["episodes"])
    return bits.astype(np.bool_)


def _alternative(args: LearnsArgs, base: Path) -> dict[str, Any]:
    """Fine-tune for twice as many steps, from scratch as stage sft does, and pair it with stage sft's policy on stage eval's test states."""
    settings = settings_for(dataclasses.replace(args, instead=None))
    desk = Desk(Run(base, settings))
    episodes = list(desk.episodes("demos"))
    if args.instead == "exploration-demos":
        episodes += [until_first_success(e) for e in desk.episodes("explore") if e.success.any() and not e.success[0]]
    before = Outcomes.from_tree(checkpoint.load(base / "stages" / "eval" / "outcomes.safetensors")["sft"])
    folder = args.runs / f"seed-{args.seed}" / f"{args.instead}-policy"
    folder.mkdir(parents=True, exist_ok=True)
    policy, _ = begun_policy(desk, episodes, lambda part: checkpoint.Savepoint(folder / f"{part}.savepoint"))
    longer, began = dataclasses.replace(settings.sft, steps=2 * settings.sft.steps), time.monotonic()
    fitted = sft.sft(policy, episodes, desk.env.robot, longer, desk.seed, checkpoint.Savepoint(folder / "fit.savepoint"))
    seconds = time.monotonic() - began
    policies.save(folder / "policy.safetensors", policy)
    reflector = desk.reflector()
    after = evaluation.evaluate(policy, OneScene(desk.env), before.start, settings.env.steps, [reflector], reflector.config.threshold, desk.device)
    return {
        "episodes_used": len(episodes),
        "fit": fitted,
        "seconds": {"fit": round(seconds, 2)},
        "eval": {"sft": before.tally(desk.env.tasks), "loop": after.tally(desk.env.tasks)},
        "paired": evaluation.paired(before.by("oracle"), after.by("oracle")),
        "hits": _hits({"sft": before, "loop": after}),
    }


def _true_simulator(args: LearnsArgs, out: Path) -> dict[str, Any]:
    """LOOP where nothing is imagined: stages up to loop without a world model, then both policies by the predicate on stage eval's test states."""
    desk = Desk(Run(out, settings_for(args)))
    chosen, steps = evaluation.starts(desk.env, desk.settings.eval.episodes), desk.settings.env.steps
    policies_by, scenes = {"sft": desk.policy("scale"), "loop": desk.policy("loop")}, OneScene(desk.env)
    outcomes = {
        name: evaluation.evaluate(policy, scenes, chosen, steps, (), 1.0, desk.device, f"eval {name}") for name, policy in policies_by.items()
    }
    record = desk.run.record("loop")
    return {
        "eval": {name: one.tally(desk.env.tasks) for name, one in outcomes.items()},
        "paired": evaluation.paired(outcomes["sft"].by("oracle"), outcomes["loop"].by("oracle")),
        "hits": _hits(outcomes),
        "loop": {"returns": [row["return"] for row in record["metrics"]["history"]], **record["timings"]},
        "clip_fraction": float(np.mean([row["clip_fraction"] for row in record["metrics"]["history"]])),
        "seconds": {name: desk.run.record(name)["seconds"] for name in ("sft", "loop")},
    }


def _from_report(out: Path) -> dict[str, Any]:
    record = report.read(out)
    outcomes = checkpoint.load(out / "stages" / "eval" / "outcomes.safetensors")
    return {
        "eval": {name: record["eval"][name] for name in ("sft", "loop")},
        "paired": record["eval"]["paired"],
        "hits": _hits({name: Outcomes.from_tree(outcomes[name]) for name in ("sft", "loop")}),
        "world": record["world"],
        "reward": record["reward"],
        "loop": {name: record["loop"][name] for name in ("returns", "curve", "seconds_per_iteration")},
        "clip_fraction": float(np.mean([row["clip_fraction"] for row in record["loop"]["metrics"]])),
        "seconds": {name: stage["seconds"] for name, stage in record["stages"].items()},
    }


def measure(args: LearnsArgs) -> dict[str, Any]:
    """Run what `args` ask for, or go on with it, and return its row."""
    method = dataclasses.replace(args, instead=None)
    settings, out = settings_for(method), _folder(method)
    true = args.control == "true-simulator"
    train.train(out, settings, reuse=_siblings(out.parent, out), until="loop" if true else None)
    return {
        "benchmark": "learns",
        "variant": variant(args),
        "seed": args.seed,
        "permutation": args.permutation,
        "preset": args.preset,
        "commit": report.commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": harness.machine(torch.device("cpu")),
        "versions": harness.versions(),
        "settings": config.fingerprint(settings),
        **(_alternative(args, out) if args.instead else _true_simulator(args, out) if true else _from_report(out)),
    }


@dataclass(frozen=True)
class _Pair:
    """Two policies on the same n test states."""

    found: Mapping[str, Any]
    """As `evaluation.paired` gives it."""
    episodes: int
    """n."""
    difference: NDArray[np.float64] | None
    """(n,): success of the second less that of the first, by state; None where a row does not say."""


def pool(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Successes by policy, episodes, and what `evaluation.paired` gives, of one run; of several, with sums of the counts (`_together`)."""
    count = {name: sum(row["eval"][name]["oracle"]["successes"] for row in rows) for name in ("sft", "loop")}
    pairs = []
    for row in rows:
        difference = _hit(row, "loop").astype(np.float64) - _hit(row, "sft") if "hits" in row else None
        pairs.append(_Pair(row["paired"], row["eval"]["sft"]["oracle"]["episodes"], difference))
    return {**count, "episodes": sum(pair.episodes for pair in pairs), **_together(pairs)}


def _together(pairs: Sequence[_Pair]) -> dict[str, Any]:
    """What `evaluation.paired` gives, of several pairs of policies on the same states: of several seeds, whose test states are the same ones.

    Episodes from one state go together, so the observation is a state: the error of the mean is that of the states' sums of differences.
    Where a row does not say what came of each state, it is the most that it can be, since the deviation of a sum is at most the sum of the
    deviations: the mean of the single errors, weighted by episodes. p and interval are those of the normal distribution.
    """
    if len(pairs) == 1:
        return dict(pairs[0].found)
    n = np.array([pair.episodes for pair in pairs], dtype=np.float64)
    wins, losses = np.array([[pair.found["wins"], pair.found["losses"]] for pair in pairs], dtype=np.float64).T
    difference = float((wins - losses).sum() / n.sum())
    known = [pair.difference for pair in pairs if pair.difference is not None]
    if len(known) == len(pairs) and len(set(n)) == 1:
        error = float(np.std(np.mean(known, axis=0)) / np.sqrt(n[0]))
    else:
        error = float(np.sqrt(wins + losses - (wins - losses) ** 2 / n).sum() / n.sum())
    half = float(stats.norm.isf(0.025)) * error
    return {
        "wins": int(wins.sum()), "losses": int(losses.sum()), "p_value": float(2 * stats.norm.sf(abs(difference) / error)) if error else 1.0,
        "difference": difference, "interval": [difference - half, difference + half],
    }  # fmt: skip


def _newest(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """By variant, the newest row of each (settings, seed), by seed and then by age; a file's rows stand in the order in which they were added."""
    newest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        newest.pop(key := (row["variant"], row["settings"], row["seed"]), None)
        newest[key] = row
    by_variant: dict[str, list[Mapping[str, Any]]] = {row["variant"]: [] for row in rows}
    for row in sorted(newest.values(), key=lambda row: (int(row["seed"]), _permutation(row))):
        by_variant[row["variant"]].append(row)
    return by_variant


def _permutation(row: Mapping[str, Any]) -> int:
    return int(row.get("permutation", 0))  # rows from before there were several are of the first


def _one_per_seed(some: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The newest row of every seed; of the shuffle, of its first permutation: other runs on the same test states are no other episodes."""
    return list({row["seed"]: row for row in some if not _permutation(row)}.values())


def _last_runs(some: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The newest row of every seed, and of every permutation of the shuffle."""
    return list({(row["seed"], _permutation(row)): row for row in some}.values())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows as Markdown: newest of each (variant, settings, seed), and a pooled line of the newest of each seed where a variant has several."""
    lines = ["| what | seed | fine-tuned | after | points (95 %) | gained, lost | p | commit |", "|---|---|---|---|---|---|---|---|"]
    for name, some in _newest(rows).items():
        for row in some:
            again = f", permutation {_permutation(row)}" if _permutation(row) else ""
            lines.append(_line(name, f"{row['seed']}{again}", pool([row]), row["commit"][:7]))
        last = _one_per_seed(some)
        lines += [_line(f"**{name}**", "pooled", pool(last), "")] if len(last) > 1 else []
    return "\n".join(lines)


def over_runs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each run's difference as one observation: their mean, standard deviation and Student's 95 % interval of the mean; at least two rows.

    The paired interval of one run holds that run's policy fixed and says what other test states would give. What another draw of the same
    updates would give is in no single run: only several say it, and for a control whose updates are drawn at random it is the question.
    """
    points = np.array([row["paired"]["difference"] for row in rows])
    mean, spread, error = float(points.mean()), float(points.std(ddof=1)), float(points.std(ddof=1) / np.sqrt(len(points)))
    low, high = stats.t.interval(0.95, len(points) - 1, loc=mean, scale=error) if error else (mean, mean)
    return {"runs": len(points), "mean": mean, "spread": spread, "interval": (float(low), float(high))}


def table_of_runs(rows: Sequence[Mapping[str, Any]]) -> str:
    """As Markdown, for each variant of which there are several runs: what `over_runs` gives of the newest of each."""
    lines = ["| what | runs | mean points over runs (95 %) | standard deviation of a run |", "|---|---|---|---|"]
    for name, some in _newest(rows).items():
        if len(last := _last_runs(some)) > 1:
            one = over_runs(last)
            low, high = one["interval"]
            mean = f"{100 * one['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            lines.append(f"| {name} | {one['runs']} | {mean} | {100 * one['spread']:.1f} |")
    return "\n".join(lines)


def table_against(rows: Sequence[Mapping[str, Any]]) -> str:
    """The method beside its shuffle (first permutation) on the same states, as Markdown: the seeds of which both rows say what came of each state."""
    newest = _newest(rows)
    shuffle, method = ({row["seed"]: row for row in _one_per_seed(newest.get(name, [])) if "hits" in row} for name in ("shuffle", "method"))
    pairs: dict[str, _Pair] = {}
    counts: dict[str, tuple[int, int]] = {}
    for seed in sorted(shuffle.keys() & method.keys()):
        before, after = _hit(shuffle[seed], "loop"), _hit(method[seed], "loop")
        pairs[str(seed)] = _Pair(evaluation.paired(before, after), len(before), after.astype(np.float64) - before)
        counts[str(seed)] = int(before.sum()), int(after.sum())
    lines = ["| seed | shuffle | method | points (95 %) | gained, lost | p |", "|---|---|---|---|---|---|"]
    for name, some in [*((seed, [seed]) for seed in pairs), *([("**pooled**", list(pairs))] if len(pairs) > 1 else [])]:
        one, n = _together([pairs[seed] for seed in some]), sum(pairs[seed].episodes for seed in some)
        shuffled, learned = (sum(counts[seed][i] for seed in some) for i in (0, 1))
        lines.append(f"| {name} | {shuffled}/{n} | {learned}/{n} | {_points(one)} | {one['wins']}, {one['losses']} | {one['p_value']:.2g} |")
    return "\n".join(lines)


_ENDS = {"oracle": "by the predicate", "limit": "at the step limit", "reflector": "by the reflector"}


def table_of_ends(rows: Sequence[Mapping[str, Any]]) -> str:
    """The paper's Table 3 as Markdown, with the cell that it lacks: successes by what ends an episode; seeds added up, the newest row of each."""
    lines = ["| what | seeds | policy | " + " | ".join(f"ended {said}" for said in _ENDS.values()) + " |", "|---|---|---|---|---|---|"]
    for name, some in _newest(rows).items():
        last = [row for row in _one_per_seed(some) if all(end in row["eval"][which] for which in ("sft", "loop") for end in _ENDS)]
        for which, said in (("sft", "fine-tuned"), ("loop", "after")):
            cells = [[row["eval"][which][end] for row in last] for end in _ENDS]
            counts = [f"{sum(one['successes'] for one in cell)}/{sum(one['episodes'] for one in cell)}" for cell in cells]
            lines += [f"| {name} | {len(last)} | {said} | " + " | ".join(counts) + " |"] if last else []
    return "\n".join(lines)


def table_of_verdicts(rows: Sequence[Mapping[str, Any]]) -> str:
    """Is the judge fooled, and more so after LOOP? As Markdown: imagined rollouts against the true outcome of the same actions, seeds added up."""
    lines = ["| what | seeds | policy | rollouts | imagined successes | true | true failures imagined as successes | true successes missed |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, some in _newest(rows).items():
        last = [row for row in _one_per_seed(some) if "outcome_agreement_loop" in row.get("world", {})]
        for which, said in (("sft", "fine-tuned"), ("loop", "after")):
            found = [row["world"][f"outcome_agreement_{which}"] for row in last]
            n, imagined, true, fooled, missed = (
                sum(one[key] for one in found) for key in ("episodes", "imagined_successes", "true_successes", "false_positives", "false_negatives")
            )
            cells = (name, len(last), said, n, imagined, true, f"{fooled} of {n - true}", missed)
            lines += ["| " + " | ".join(str(cell) for cell in cells) + " |"] if last else []
    return "\n".join(lines)


def _points(one: Mapping[str, Any]) -> str:
    low, high = one["interval"]
    return f"{100 * one['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _line(name: str, seed: str, one: Mapping[str, Any], commit: str) -> str:
    n, gained = one["episodes"], f"{one['wins']}, {one['losses']}"
    return f"| {name} | {seed} | {one['sft']}/{n} | {one['loop']}/{n} | {_points(one)} | {gained} | {one['p_value']:.2g} | {commit} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the row is written or the table printed, 2 for a bad command line."""
    with Ending("benchmarks.learns") as ending:
        args = parse("benchmarks.learns", LearnsArgs, LearnsArgs(), sys.argv[1:] if argv is None else argv)
        if args.instead and args.control != "none":
            raise ValueError("--instead and --control: choose one")
        settings_for(args)
        if args.table:
            rows = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
            print("\n\n".join(made(rows) for made in (table, table_against, table_of_runs, table_of_ends, table_of_verdicts)))
        else:
            row = measure(args)
            if not args.fast:
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            print(table([row]))
            print(json.dumps(row))
    return ending.code


if __name__ == "__main__":
    raise SystemExit(main())
