"""Plots: drawn once, written as PNG and SVG files, and as an SVG that takes the page's colours and font."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from worldenv.report.fields import POLICIES, is_unverified, protocols
from worldenv.report.plots import Figures, Plot
from worldenv.report.tables import ENDED_BY, POLICY_NAMES, share

# One meaning each, in all plots. In the page they are its variables, so that they change with light and dark.
_INK, _RULE, BEFORE, AFTER, _IMAGINED, _CEILING = "#1f2430", "#d4d9e1", "#7b8698", "#1f6fd6", "#ca5b17", "#1c8a4c"
_VARIABLES = {
    _INK: "currentColor", _RULE: "var(--rule)", BEFORE: "var(--before)", AFTER: "var(--after)", _IMAGINED: "var(--imagined)",
    _CEILING: "var(--ceiling)",
}  # fmt: skip
_SIZE = (4.8, 3.1)
_BINS = 10
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "text.color": _INK, "text.parse_math": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "axes.facecolor": "none",
    "axes.linewidth": 0.7, "axes.grid": True, "axes.axisbelow": True, "grid.color": _RULE, "grid.linewidth": 0.6,
    "xtick.color": _INK, "ytick.color": _INK, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
    "legend.frameon": False, "lines.linewidth": 1.6, "figure.constrained_layout.use": True,
    "svg.fonttype": "none", "svg.hashsalt": "worldenv",
}  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """Scores in bins of equal width: how often the frames of a bin were successes."""

    score: NDArray[np.float64]
    """(b,) mean score of each bin that holds frames."""
    frequency: NDArray[np.float64]
    """(b,) share of successes."""
    count: NDArray[np.int64]
    """(b,) frames."""


def calibration(score: NDArray[np.floating], success: NDArray[np.bool_], bins: int = _BINS) -> Calibration:
    """Bin `score` (n,) in [0, 1] against `success` (n,); a bin holds its lower edge, the last one also 1."""
    which = np.minimum((score * bins).astype(np.int64), bins - 1)
    count = np.bincount(which, minlength=bins)
    some = count > 0
    sums = [np.bincount(which, weights=values.astype(np.float64), minlength=bins)[some] for values in (score, success)]
    return Calibration(sums[0] / count[some], sums[1] / count[some], count[some])


def draw(report: Mapping[str, Any], figures: Figures) -> list[Plot]:
    """Every plot that the report has numbers for, in the page's order."""
    with matplotlib.rc_context(STYLE):
        plots = [_success(report), _returns(report), _psnr(report)]
        plots += [plot for plot in (_by_iteration(report), _updates(report), _calibration(report, figures)) if plot is not None]
        return plots + [_curve(i, title, curve) for i, (title, curve) in enumerate(figures.curves.items())]


def _logarithmic(axes: Axes) -> None:
    """A log axis with plain numbers: Matplotlib's own labels are formulas, which text in an SVG is not."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def axes_of(rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the usual size, and its panels from top to bottom."""
    figure = Figure(figsize=_SIZE)
    return figure, list(np.atleast_1d(figure.subplots(rows, 1, sharex=rows > 1)))


def finished(name: str, title: str, caption: str, figure: Figure) -> Plot:
    """The figure as files and for the page."""
    files = {}
    for kind in ("svg", "png"):
        memory = io.BytesIO()
        figure.savefig(memory, format=kind, dpi=180, facecolor="white", metadata={"Date": None} if kind == "svg" else {"Software": None})
        files[kind] = memory.getvalue()
    return Plot(name, title, caption, _inline(files["svg"], name, title), files["svg"], files["png"])


def _inline(svg: bytes, name: str, title: str) -> str:
    """The SVG for a page: no namespaces, metadata, style sheet or white ground; identifiers begin with `name`; colours are the page's."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):  # a style sheet would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        plain = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in plain.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = value.replace("#", f"#{name}-", 1)
            value = value.replace("url(#", f"url(#{name}-")
            for colour, variable in _VARIABLES.items():
                value = value.replace(colour, variable)
            element.set(key, value)
    for ground in root.iter("g"):
        if ground.get("id") == f"{name}-patch_1":  # the first patch of a figure is its white ground
            ground.clear()
    view = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-label": title, "style": "stroke-linejoin:round;stroke-linecap:butt"})
    return re.sub(r"\s*\n\s*", "\n", ElementTree.tostring(root, encoding="unicode"))


def _success(report: Mapping[str, Any]) -> Plot:
    figure, (axes,) = axes_of()
    ended_by = protocols(report)
    for policy, colour, shift in zip(POLICIES, (BEFORE, AFTER), (0.14, -0.14), strict=True):
        tallies = [report["eval"][policy][protocol] for protocol in ended_by]
        rate = np.array([100 * one["successes"] / one["episodes"] for one in tallies])
        ends = 100 * np.array([one["interval"] for one in tallies]).T
        error = np.maximum([rate - ends[0], ends[1] - rate], 0)
        at = np.arange(len(ended_by))[::-1] + shift
        axes.errorbar(rate, at, xerr=error, fmt="o", ms=5, color=colour, capsize=3, elinewidth=1.4, label=POLICY_NAMES[policy])
    axes.set_yticks(np.arange(len(ended_by))[::-1], [ENDED_BY[protocol] for protocol in ended_by])
    axes.set_ylim(-0.5, len(ended_by) - 0.5)
    axes.grid(False, axis="y")
    axes.set_xlim(max(0, axes.get_xlim()[0]), min(100, axes.get_xlim()[1]))
    axes.set_xlabel("episodes that succeed [%]")
    axes.set_ylabel("episode ended by")
    figure.legend(loc="outside upper center", ncols=2)
    caption = "Success in the true environment, test states, with 95 % Wilson intervals."
    if is_unverified(report):
        caption = "Imagined success, unverified: the reflector's word on imagined frames, with 95 % Wilson intervals."
    title = "Imagined success before and after, unverified" if is_unverified(report) else "Success before and after"
    return finished("success", title, caption, figure)


def _returns(report: Mapping[str, Any]) -> Plot:
    figure, (axes,) = axes_of()
    returns = report["loop"]["returns"]
    iteration = np.arange(1, len(returns) + 1)
    axes.plot(iteration, returns, color=_IMAGINED, marker="o", ms=3 if len(returns) < 40 else 0, label="imagined return, unverified")
    for policy, at, colour in zip(POLICIES, (0, len(returns) + 1), (BEFORE, AFTER), strict=True):
        one = report["eval"][policy][protocols(report)[0]]
        rate = one["successes"] / one["episodes"]
        ends = np.maximum([[rate - one["interval"][0]], [one["interval"][1] - rate]], 0)
        label = f"{'imagined, greedy' if is_unverified(report) else 'true success'}: {POLICY_NAMES[policy]}"
        axes.errorbar([at], [rate], yerr=ends, fmt="s", ms=4.5, color=colour, capsize=3, elinewidth=1.4, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("iteration")
    axes.set_ylabel("mean return; success")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=3, fontsize=7, columnspacing=1, handletextpad=0.5)
    squares = "Squares: greedy success in the true environment on test states. Only the squares say whether the policy got better."
    if is_unverified(report):
        squares = "Squares: greedy imagined success from held-out first frames. Neither says whether the policy got better."
    caption = (
        "Line: mean return of each iteration's sampled rollouts in the imagined world, from training contexts, by the reflector's own "
        f"judgement. {squares}"
    )
    return finished("returns", "Return by iteration", caption, figure)


def _by_iteration(report: Mapping[str, Any]) -> Plot | None:
    """Greedy true success of the policy's kept copies, in all and by task (cf. the paper's Figure 3), beside imagined success."""
    points = report["loop"].get("curve", [])
    if len(points) < 2:
        return None
    figure, (axes,) = axes_of()
    iteration = [one["iteration"] for one in points]
    for task, dash in zip(points[0].get("by_task", {}), itertools.cycle(("-.", "--", ":"))):
        counts = [one["by_task"][task] for one in points]
        axes.plot(iteration, [100 * one["successes"] / one["episodes"] for one in counts], dash, lw=1.1, color=BEFORE, label=task)
    rate = np.array([100 * one["successes"] / one["episodes"] for one in points])
    ends = 100 * np.array([one["interval"] for one in points]).T
    error = np.maximum([rate - ends[0], ends[1] - rate], 0)
    axes.errorbar(iteration, rate, yerr=error, fmt="o-", ms=4, capsize=3, elinewidth=1.2, color=AFTER, label="all tasks, true")
    imagined = [(i, 100 * one["imagined_success"]) for i, one in enumerate(report["loop"]["metrics"]) if one.get("imagined_success") is not None]
    if imagined:
        axes.plot(*zip(*imagined, strict=True), lw=0.9, color=_IMAGINED, label="rollouts that LOOP saw succeed, sampled")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("iteration")
    axes.set_ylabel("success [%]")
    figure.legend(loc="outside upper center", ncols=2, fontsize=7, columnspacing=1)
    caption = (
        f"Greedy success in the true environment on {points[0]['episodes']} test states, episodes ended by the predicate, with 95 % Wilson "
        "intervals; nothing was chosen by it. Thin line: what the rollouts of each iteration, which are made before its update, were judged to be, "
        "noise included."
    )
    return finished("iterations", "Success by iteration", caption, figure)


def _psnr(report: Mapping[str, Any]) -> Plot:
    figure, (axes,) = axes_of()
    world = report["world"]
    lines = (
        ("psnr_ceiling_by_chunk", "autoencoder alone (ceiling)", _CEILING, "--"),
        ("psnr_by_chunk", "imagined", _IMAGINED, "-"),
        ("psnr_copy_first_by_chunk", "first frame, copied", BEFORE, "--"),
    )
    for key, label, colour, dash in lines:
        axes.plot(np.arange(1, len(world[key]) + 1), world[key], dash, color=colour, marker="o", ms=3.5, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("chunk")
    axes.set_ylabel("PSNR [dB]")
    figure.legend(loc="outside upper center", ncols=3, fontsize=7.5)
    caption = (
        "Held-out episodes, imagined from their first frame with their own actions, against the true frames. A world model that is of use "
        "lies above the copied first frame; it cannot lie above what its autoencoder keeps."
    )
    return finished("psnr", "Picture quality by chunk", caption, figure)


def _updates(report: Mapping[str, Any]) -> Plot | None:
    """What the loop says about its updates, a panel each."""
    metrics = report["loop"]["metrics"]
    lines = []
    for key, label in (
        ("clip_fraction", "clip fraction"),
        ("ratio_max", "largest ratio"),
        ("kl", "KL [nat]"),
        ("entropy", "entropy [nat]"),
    ):
        known = [(i, one[key]) for i, one in enumerate(metrics, 1) if one.get(key) is not None]
        if known:
            lines.append((label, np.array(known, np.float64)))
    if not lines:
        return None
    figure = Figure(figsize=_SIZE)
    columns = 2 if len(lines) > 2 else 1
    panels = figure.subplots(math.ceil(len(lines) / columns), columns, squeeze=False).flat
    for axes, (label, line) in zip(panels, lines, strict=False):
        axes.plot(line[:, 0], line[:, 1], color=AFTER, marker="o", ms=2.5 if len(line) < 40 else 0, lw=1.3)
        axes.set_title(label)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if label == "clip fraction":
            axes.set_ylim(bottom=0)
        elif (line[:, 1] > 0).all() and line[:, 1].max() > 20 * line[:, 1].min():
            _logarithmic(axes)
    for axes in panels:  # what is left of an even grid
        axes.remove()
    figure.supxlabel("iteration", fontsize=8.5)
    caption = (
        "Share of executed steps that the clip keeps from the gradient; largest probability ratio (1: the policy has not moved); "
        "divergence from the policy that drew the rollouts; entropy of its actions. Measured on the way: each step at the weights before it."
    )
    return finished("updates", "Updates of the policy", caption, figure)


def _calibration(report: Mapping[str, Any], figures: Figures) -> Plot | None:
    if figures.score is None or figures.success is None or not len(figures.score):
        return None
    bins = calibration(figures.score, figures.success)
    figure = Figure(figsize=_SIZE)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], "--", color=BEFORE, lw=1, label="calibrated")
    upper.plot(bins.score, bins.frequency, color=AFTER, marker="o", ms=4, label="reflector")
    upper.set_ylabel("share of successes")
    upper.set_ylim(-0.03, 1.03)
    lower.bar(bins.score, bins.count, width=0.05, color=AFTER)
    lower.set_ylim(0.7, 1.5 * bins.count.max())
    _logarithmic(lower)
    lower.set_ylabel("frames")
    lower.set_xlabel("score")
    lower.set_xlim(-0.03, 1.03)
    figure.legend(loc="outside upper center", ncols=2, fontsize=7.5)
    frames = "Held-out recorded frames" if is_unverified(report) else "Held-out frames of the true environment"
    caption = (
        f"{frames} in {_BINS} bins of the score, and how many lie in each. Expected calibration error "
        f"{share(report['reward']['ece'])}, AUC {share(report['reward']['auc'])}. Above the dashed line the reflector is too shy, "
        "below it too bold."
    )
    return finished("calibration", "Calibration of the reflector", caption, figure)


def _curve(number: int, title: str, curve: NDArray[np.floating]) -> Plot:
    figure, (axes,) = axes_of()
    axes.plot(curve[:, 0], curve[:, 1], color=AFTER, lw=1.2)
    if (curve[:, 1] > 0).all() and curve[:, 1].max() > 20 * curve[:, 1].min():
        _logarithmic(axes)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss")
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return finished(f"curve-{number:02d}-{slug}"[:60], title, "", figure)
