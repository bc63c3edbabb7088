"""The fields of report.json: which there must be, of what kind, and which of them differ between two runs of one seed.

A report is plain: dicts with text keys, lists, text, numbers, true, false, null. Null stands where a number has no value (an AUC
without successes); a number that is not finite is refused, since JSON has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

POLICIES = ("sft", "loop")
"""The fine-tuned and the post-trained policy."""
TRUE_PROTOCOLS = ("oracle", "limit", "reflector")
"""Who ends an episode in the true environment: the success predicate, the step limit, the reflector."""
IMAGINED_PROTOCOLS = ("imagined",)
"""Of a run from recordings, which has no true environment: the reflector ends an imagined episode, and its word is all there is."""

_Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_share, value)) and value[0] <= value[1]


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_number, value))


def _is_point(value: Any) -> bool:
    counted = isinstance(value, dict) and all(_count(value.get(key)) for key in ("iteration", "successes", "episodes"))
    return counted and _interval(value.get("interval"))


_TEXT: tuple[_Check, str] = (lambda v: isinstance(v, str) and v != "", "text")
_COUNT: tuple[_Check, str] = (_count, "a whole number, 0 or more")
_AMOUNT: tuple[_Check, str] = (lambda v: _number(v) and v >= 0, "a number, 0 or more")
_SHARE: tuple[_Check, str] = (_share, "a number in 0 .. 1")
_SHARE_OR_NULL: tuple[_Check, str] = (lambda v: v is None or _share(v), "a number in 0 .. 1, or null where it has no value")
_INTERVAL: tuple[_Check, str] = (_interval, "[low, high] with 0 <= low <= high <= 1")
_DIFFERENCE: tuple[_Check, str] = (lambda v: _number(v) and -1 <= v <= 1, "a number in -1 .. 1")
_SPAN: tuple[_Check, str] = (
    lambda v: isinstance(v, list) and len(v) == 2 and all(map(_number, v)) and -1 <= v[0] <= v[1] <= 1,
    "[low, high] with -1 <= low <= high <= 1",
)
_ENGINES: tuple[_Check, str] = (
    lambda v: isinstance(v, dict) and all(isinstance(one, dict) and isinstance(one.get("back_end"), str) for one in v.values()),
    "by network, what ran it in rollouts (back_end)",
)
_NUMBERS: tuple[_Check, str] = (_numbers, "a list of numbers, not empty")
_TEXTS: tuple[_Check, str] = (lambda v: isinstance(v, list) and all(isinstance(one, str) for one in v), "a list of texts")
_TEXT_BY_NAME: tuple[_Check, str] = (
    lambda v: isinstance(v, dict) and len(v) > 0 and all(isinstance(one, str) for one in v.values()),
    "an object whose values are texts",
)
_STEPS: tuple[_Check, str] = (
    lambda v: isinstance(v, list) and all(isinstance(one, dict) and all(n is None or _number(n) for n in one.values()) for one in v),
    "a list of objects of numbers, one per iteration",
)
_CURVE: tuple[_Check, str] = (
    lambda v: isinstance(v, list) and len(v) > 0 and all(_is_point(one) for one in v),
    "a list of {iteration, successes, episodes, interval, by_task}, not empty",
)


@dataclass(frozen=True)
class Field:
    """One place in a report."""

    path: str
    """Keys joined by dots; `*` stands for every key there is (at least one), `a|b` for both; a key that ends in `?` may be missing."""
    check: tuple[_Check, str]
    """What its value must satisfy, and that in words."""


_TALLY = ("successes", _COUNT), ("episodes", _COUNT), ("interval", _INTERVAL)
_AGREED = ("outcome_agreement", "outcome_agreement_sft?")
_AGREEMENT = ("episodes", "agree", "imagined_successes", "true_successes", "false_positives", "false_negatives")
_JUDGED = ("auc", "false_stop_rate", "recall", "precision", "ece")


def _counted(protocols: tuple[str, ...]) -> Iterator[Field]:
    where = f"eval.{'|'.join(POLICIES)}.{'|'.join(protocols)}"
    for name, check in _TALLY:
        yield from (Field(f"{where}.{name}", check), Field(f"{where}.by_task?.*.{name}", check))


_ALWAYS: tuple[Field, ...] = (
    Field("preset", _TEXT),
    Field("seed", _COUNT),
    Field("versions", _TEXT_BY_NAME),
    Field("commit", _TEXT),
    Field("seconds_total", _AMOUNT),
    Field("peak_rss_mb", _AMOUNT),
    Field("notes", _TEXTS),
    Field("settings.fast", (lambda v: isinstance(v, bool), "true where every stage was cut short (--fast), else false")),
    Field("stages.*.seconds", _AMOUNT),
    Field("stages.*.peak_rss_mb?", _AMOUNT),
    Field("eval.paired.wins", _COUNT),
    Field("eval.paired.losses", _COUNT),
    Field("eval.paired.p_value", _SHARE),
    Field("eval.paired.difference?", _DIFFERENCE),
    Field("eval.paired.interval?", _SPAN),
    Field("world.psnr_by_chunk", _NUMBERS),
    Field("world.psnr_copy_first_by_chunk", _NUMBERS),
    Field("world.psnr_ceiling_by_chunk", _NUMBERS),
    *(Field(f"world.{whose}.{name}", _COUNT) for whose in _AGREED for name in _AGREEMENT),
    *(Field(f"world.{whose}.by_task.*.{name}", _COUNT) for whose in _AGREED for name in _AGREEMENT),
    *(Field(f"reward.{name}", _SHARE_OR_NULL) for name in _JUDGED),
    *(Field(f"reward.drawn?.{name}", _SHARE_OR_NULL) for name in _JUDGED),
    Field("reward.episodes?", _COUNT),
    Field("reward.success_episodes?", _COUNT),
    Field("loop.returns", _NUMBERS),
    Field("loop.engines?", _ENGINES),
    Field("loop.seconds_per_iteration", _AMOUNT),
    Field("loop.metrics", _STEPS),
    Field("loop.curve?", _CURVE),
)
FIELDS: tuple[Field, ...] = (*_ALWAYS, *_counted(TRUE_PROTOCOLS))
"""What a report holds at least, and what it may hold. Other fields are allowed and kept. One of a run from recordings has IMAGINED_PROTOCOLS in place
of TRUE_PROTOCOLS."""


def protocols(report: Mapping[str, Any]) -> tuple[str, ...]:
    """By whom the episodes of this report were ended; the first is the one that its policies are compared by."""
    return IMAGINED_PROTOCOLS if is_unverified(report) else TRUE_PROTOCOLS


def is_unverified(report: Mapping[str, Any]) -> bool:
    """Nothing in this report was seen to happen in truth but what was recorded before it: its successes are imagined."""
    found = report.get("eval")
    found = found.get(POLICIES[0]) if isinstance(found, Mapping) else None
    return isinstance(found, Mapping) and IMAGINED_PROTOCOLS[0] in found


def plain(value: Any, where: str = "report") -> Any:
    """`value` as JSON would give it back: NumPy scalars and arrays as numbers and lists, tuples as lists.

    Raises ValueError naming the field for a number that is not finite, a key that is not text, and what JSON cannot hold.
    """
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist(), where)
    if isinstance(value, Mapping):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{where}: key {strange[0]!r} is not text")
        return {key: plain(one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, f"{where}[{i}]") for i, one in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {value} is not finite; put None where a number has no value")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where}: {type(value).__name__} cannot stand in report.json; want objects, lists, text, numbers")


def _find(node: Any, keys: list[str], where: str) -> Iterator[tuple[str, Any]]:
    """Every (path, value) that `keys` lead to from `node`. Raises ValueError naming the first key that is needed and not there."""
    if not keys:
        yield where, node
        return
    if not isinstance(node, dict):
        raise ValueError(f"report: {where} is {_shown(node)}, want an object")
    key, optional = keys[0].removesuffix("?"), keys[0].endswith("?")
    for name in key.split("|") if key != "*" else list(node) or ["*"]:
        path = f"{where}.{name}" if where else name
        if name in node:
            yield from _find(node[name], keys[1:], path)
        elif not optional:
            raise ValueError(f"report: field {'.'.join([path, *keys[1:]])} is missing")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"report: {what}")


def _check_tally(tally: dict[str, Any], where: str) -> None:
    successes, episodes, interval = tally["successes"], tally["episodes"], tally["interval"]
    _need(episodes > 0, f"{where}.episodes is 0, want at least 1")
    _need(successes <= episodes, f"{where}: {successes} successes of {episodes} episodes")
    slack = 1e-9  # rounding of the ends where every or no episode succeeded
    inside = interval[0] - slack <= successes / episodes <= interval[1] + slack
    _need(inside, f"{where}.interval {interval} does not hold {successes}/{episodes} = {successes / episodes:.4f}")


def _check_agreement(counts: dict[str, Any], where: str) -> None:
    episodes, agree, wrong = counts["episodes"], counts["agree"], counts["false_positives"] + counts["false_negatives"]
    _need(agree + wrong == episodes, f"{where}: {agree} agree and {wrong} do not, but there are {episodes} episodes")
    both = counts["imagined_successes"] - counts["false_positives"]
    _need(both == counts["true_successes"] - counts["false_negatives"], f"{where}: imagined and true successes do not fit the errors")


def validate(report: Mapping[str, Any]) -> None:
    """Check every field of FIELDS and that counts fit together. Raises ValueError naming the first field that is missing or wrong."""
    whole = plain(report)
    ended_by = protocols(whole)
    said = whole.get("unverified", False)
    _need(said is is_unverified(whole), f"unverified is {_shown(said)}, want true where successes are imagined")
    for field in (*_ALWAYS, *_counted(ended_by)):
        check, wanted = field.check
        for where, value in _find(whole, field.path.split("."), ""):
            _need(check(value), f"{where} is {_shown(value)}, want {wanted}")
    for policy in POLICIES:
        for protocol in ended_by:
            tally, where = whole["eval"][policy][protocol], f"eval.{policy}.{protocol}"
            _check_tally(tally, where)
            by_task = tally.get("by_task", {})
            for task, part in by_task.items():
                _check_tally(part, f"{where}.by_task.{task}")
            for name in ("successes", "episodes"):
                summed = sum(part[name] for part in by_task.values())
                _need(not by_task or summed == tally[name], f"{where}.by_task: {name} sum to {summed}, not {tally[name]}")
    before, after = (whole["eval"][policy][ended_by[0]] for policy in POLICIES)
    paired = whole["eval"]["paired"]
    _need(before["episodes"] == after["episodes"], f"eval.paired: the policies ran different numbers of {ended_by[0]} episodes")
    change, surplus = after["successes"] - before["successes"], paired["wins"] - paired["losses"]
    _need(surplus == change, f"eval.paired: wins - losses = {surplus}, but successes changed by {change}")
    lengths = {name: len(whole["world"][name]) for name in ("psnr_by_chunk", "psnr_copy_first_by_chunk", "psnr_ceiling_by_chunk")}
    _need(len(set(lengths.values())) == 1, f"world: {lengths} chunks, want as many in each")
    for name in (key for key in ("outcome_agreement", "outcome_agreement_sft") if key in whole["world"]):
        _check_agreement(whole["world"][name], f"world.{name}")
        for task, part in whole["world"][name]["by_task"].items():
            _check_agreement(part, f"world.{name}.by_task.{task}")
    returns, metrics = whole["loop"]["returns"], whole["loop"]["metrics"]
    _need(len(metrics) == len(returns), f"loop.metrics has {len(metrics)} iterations, loop.returns {len(returns)}")


def _is_volatile(key: str) -> bool:
    """Times, rates and memory: `seconds`, `seconds_total`, `frames_per_second`, `peak_rss_mb`."""
    return not {"seconds", "second", "rss"}.isdisjoint(key.split("_"))


def comparable(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without times, rates and memory: equal for two runs of one seed on one machine.

    A key goes when one of its words is `seconds`, `second` or `rss`, unless an object lies under it (a task may be called anything).
    """

    def keep(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: keep(value) for key, value in node.items() if isinstance(value, dict) or not _is_volatile(key)}
        return [keep(one) for one in node] if isinstance(node, list) else node

    kept: dict[str, Any] = keep(plain(report))
    return kept


def differences(left: Any, right: Any, where: str = "") -> Iterator[str]:
    """Every place where two plain values differ, as `path: left | right`."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in [*left, *(key for key in right if key not in left)]:
            path = f"{where}.{key}" if where else key
            if key not in left or key not in right:
                yield f"{path}: only {'on the left' if key in left else 'on the right'}"
            else:
                yield from differences(left[key], right[key], path)
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for i, pair in enumerate(zip(left, right, strict=True)):
            yield from differences(*pair, f"{where}[{i}]")
    elif left != right or isinstance(left, bool) != isinstance(right, bool):
        yield f"{where}: {_shown(left)} | {_shown(right)}"
