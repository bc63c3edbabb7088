"""A report's numbers as tables, once, for the page and for the terminal; and how each kind of number is written."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from worldenv.report.fields import POLICIES, is_unverified, protocols

POLICY_NAMES = {"sft": "fine-tuned", "loop": "post-trained"}
ENDED_BY = {"oracle": "the success predicate", "limit": "the step limit", "reflector": "the reflector", "imagined": "the reflector, unverified"}
_SUCCEEDED_IF = {
    "oracle": "the predicate held at any step",
    "limit": "the predicate held at the last step",
    "reflector": "the predicate held where the reflector stopped, or at the last step",
    "imagined": "the reflector said so of imagined frames; nobody saw a robot do it",
}
STAGE_NAMES = {
    "demos": "demonstrations",
    "sft": "fine-tuning of the policy",
    "scale": "scale head of the policy",
    "explore": "exploration, acted or recorded",
    "world": "world model",
    "reward": "reflector and its reward head",
    "loop": "post-training in the imagined world",
    "eval": "evaluation",
    "report": "this report",
}


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns. What stands after a line break in a cell explains what stands before it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)
    """Columns that hold words; the others hold numbers and are set flush right."""
    note: str = ""
    """What a reader must know to read it."""
    total: bool = False
    """The last row sums the others."""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title}: {len(self.columns)} columns, rows of {sorted({len(row) for row in self.rows})}")


_NO_BREAK = "\u00a0"  # a number and its unit stay on one line


def percent(part: float, whole: float) -> str:
    """`part` of `whole` as a percentage, with a decimal where 200 or more were counted; a dash of nothing."""
    return "–" if whole == 0 else f"{100 * part / whole:.{1 if whole >= 200 else 0}f}{_NO_BREAK}%"


def tally(counts: Mapping[str, Any]) -> str:
    """Successes as a percentage, its 95 % interval, and the counts."""
    successes, episodes, (low, high) = counts["successes"], counts["episodes"], counts["interval"]
    digits = 1 if episodes >= 200 else 0
    return f"{percent(successes, episodes)}\n[{100 * low:.{digits}f}, {100 * high:.{digits}f}]  {successes}/{episodes}"


def p_value(p: float) -> str:
    """A p-value to two digits: "p = 0.032", "p < 0.0001"."""
    return ("p < 0.0001" if p < 1e-4 else f"p = {p:.2g}" if p < 0.995 else "p = 1").replace(" ", _NO_BREAK)


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.42 s, 12.3 s, 3 min 12 s, 2 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.3g} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(mb: float | None) -> str:
    """Megabytes (1e6 bytes) as MB or GB."""
    if mb is None:
        return "–"
    return f"{mb / 1000:.2f} GB" if mb >= 1000 else f"{mb:.0f} MB"


def share(value: float | None) -> str:
    """A figure in 0 .. 1, or a dash where it has no value."""
    return "no value" if value is None else f"{value:.3f}"


def success(report: Mapping[str, Any]) -> Table:
    """Three protocols, both policies; of a run from recordings, what was imagined."""
    evaluation = report["eval"]
    rows = []
    for protocol in protocols(report):
        before, after = (evaluation[policy][protocol] for policy in POLICIES)
        change = 100 * (after["successes"] / after["episodes"] - before["successes"] / before["episodes"])
        rows.append((f"{ENDED_BY[protocol]}\n{_SUCCEEDED_IF[protocol]}", tally(before), tally(after), f"{change:+.1f}"))
    paired = evaluation["paired"]
    where, by = "Greedy episodes in the true environment, on test states that no training stage saw.", "the success predicate"
    if is_unverified(report):
        where = "Greedy episodes in the imagined world, from where held-out recordings began, each once: no evidence of success."
        by = "the reflector"
    note = (
        f"{where} Brackets: 95\u00a0% Wilson interval. Paired over the same episodes, ended by {by}: {paired['wins']} only the post-trained policy "
        f"solved, {paired['losses']} only the fine-tuned one; two-sided exact McNemar {p_value(paired['p_value'])}."
    )
    columns = ("episode ended by; a success if", *(POLICY_NAMES[policy] for policy in POLICIES), "points")
    return Table("Imagined success, unverified" if is_unverified(report) else "Success in the true environment", columns, tuple(rows), note=note)


def success_by_task(report: Mapping[str, Any]) -> Table | None:
    """The same by task, where it was counted by task."""
    evaluation = report["eval"]
    rows = []
    for protocol in protocols(report):
        before, after = (evaluation[policy][protocol].get("by_task", {}) for policy in POLICIES)
        rows += [(task, ENDED_BY[protocol], tally(before[task]), tally(after[task])) for task in before if task in after]
    if not rows:
        return None
    order = {task: i for i, task in enumerate(dict.fromkeys(row[0] for row in rows))}
    rows.sort(key=lambda row: order[row[0]])
    columns = ("task", "episode ended by", *(POLICY_NAMES[policy] for policy in POLICIES))
    title = "Imagined success by task, unverified" if is_unverified(report) else "Success by task"
    return Table(title, columns, tuple(rows), words=(0, 1))


def imagined(report: Mapping[str, Any]) -> Table:
    """Imagined against true outcome of the same actions: of the post-trained policy, or as they were recorded."""
    counts = report["world"]["outcome_agreement"]
    if is_unverified(report):
        note = (
            "Held-out recordings, and the same actions from the same first frames in the imagined world, judged by the reflector there and by the "
            "recorded labels here; all steps, success at any of them."
        )
        return _outcomes("Imagined against recorded outcomes: held-out recordings", counts, note, "recorded")
    note = (
        "The same actions in the imagined world, judged by the reflector, and in the true one, judged by the predicate; "
        "all steps, success at any of them."
    )
    return _outcomes("Imagined against true outcomes: post-trained policy", counts, note)


def imagined_before(report: Mapping[str, Any]) -> Table | None:
    """The same of the fine-tuned policy, where it was measured: errors that only the post-trained policy meets are errors that it was led to."""
    counts = report["world"].get("outcome_agreement_sft")
    return None if counts is None else _outcomes("Imagined against true outcomes: fine-tuned policy", counts, "")


def _outcomes(title: str, whole: Mapping[str, Any], note: str, truth: str = "true") -> Table:
    def row(name: str, counts: Mapping[str, Any]) -> tuple[str, ...]:
        n = counts["episodes"]
        parts = (f"{counts[key]}/{n}" for key in ("imagined_successes", "true_successes", "agree"))
        return (name, *parts, str(counts["false_positives"]), str(counts["false_negatives"]))

    rows = [row(task, counts) for task, counts in whole["by_task"].items()]
    if "reflector_false_positives" in whole:
        note += (
            f" On the {truth} videos of these rollouts the reflector alone errs {whole['reflector_false_positives']} times towards success "
            f"and {whole['reflector_false_negatives']} times towards failure, in the same rollouts or in others."
        )
    first = f"{title.rpartition(': ')[2]}, task"
    columns = (first, "imagined success", f"{truth} success", "agree", "false positives", "false negatives")
    return Table(title, columns, (*rows, row("all tasks", whole)), note=note.strip(), total=True)


def reflector(report: Mapping[str, Any]) -> Table:
    """The reflector on held-out episodes; where it was measured, also on what the simulator imagines of the same commands."""
    reward = report["reward"]
    lines = (
        ("auc", "AUC", "1: every successful frame scores above every other; 0.5: chance"),
        ("precision", "precision", "of the frames called a success, those that are"),
        ("recall", "recall", "of the successful frames, those that are called so"),
        ("false_stop_rate", "false stops", "of all episodes, those that it would end while the task is not done"),
        ("ece", "calibration error", "mean distance between score and frequency of success"),
    )
    sources = {"true frames": reward} | ({"imagined frames": reward["drawn"]} if "drawn" in reward else {})
    rows = tuple((f"{name}\n{meaning}", *(share(source[key]) for source in sources.values())) for key, name, meaning in lines)
    note = ""
    if "episodes" in reward and "success_episodes" in reward:
        note = f"{reward['episodes']} episodes, {reward['success_episodes']} of them with a success. "
    if "drawn" in reward:
        note += "Imagined: of the same commands, judged by the labels of the true ones. "
    else:
        note += "Imagined frames are harder."
    return Table("Reflector on held-out episodes", ("figure", *sources), rows, note=note)


def stages(report: Mapping[str, Any]) -> Table:
    """Seconds and memory of each stage."""
    total = max(report["seconds_total"], 1e-9)
    rows = []
    for name, one in report["stages"].items():
        part = f"{100 * one['seconds'] / total:.0f}{_NO_BREAK}%"
        rows.append((name, STAGE_NAMES.get(name, ""), duration(one["seconds"]), part, memory(one.get("peak_rss_mb"))))
    last = ("all", "", duration(report["seconds_total"]), "", memory(report["peak_rss_mb"]))
    note = "Memory: largest sum of the resident memory (RSS) of all processes of the run; pages that they share count in each."
    columns = ("stage", "what it does", "time", "share", "peak memory")
    return Table("Time and memory", columns, (*rows, last), words=(0, 1), note=note, total=True)


def for_terminal(table: Table, width: int = 160) -> Iterator[str]:
    """The table as lines of plain text; its note is wrapped at `width` columns."""
    rows = [tuple(cell.replace("\n", "  ") for cell in row) for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.columns, *rows, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        cells = [cell.ljust(w) if i in table.words else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        return "  " + "   ".join(cells).rstrip()

    yield table.title
    yield line(table.columns)
    yield "  " + "-" * (sum(widths) + 3 * (len(widths) - 1))
    yield from map(line, rows)
    yield from textwrap.wrap(table.note, width, initial_indent="  ", subsequent_indent="  ")
