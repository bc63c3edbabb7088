"""How episodes ended, drawn: the plots of the paper's Figure 10 from what `outcomes` counts."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from worldenv.report.figures import AFTER, BEFORE, STYLE, axes_of, finished
from worldenv.report.outcomes import Outcomes, lengths_of, summary
from worldenv.report.plots import Plot

_BINS = 24


def draw(found: Outcomes) -> list[Plot]:
    """Length distribution, cumulative distribution, and outcomes by task. ValueError of no episodes."""
    summary(found)
    with matplotlib.rc_context(STYLE):
        return [_distribution(found), _cumulative(found), _by_task(found)]


_KINDS = (("successes", "success", AFTER), ("failures", "failure", BEFORE))


def _distribution(found: Outcomes) -> Plot:
    figure, (axes,) = axes_of()
    longest = max(lengths_of(found, outcome).max(initial=1) for outcome, _, _ in _KINDS)
    edges = np.linspace(0, longest, min(_BINS, int(longest)) + 1).tolist()
    for outcome, label, colour in _KINDS:
        lengths = lengths_of(found, outcome)
        axes.hist(lengths, bins=edges, color=colour, alpha=0.75, label=f"{label} ({len(lengths)})")
    axes.set_xlabel("control steps")
    axes.set_ylabel("episodes")
    figure.legend(loc="outside upper center", ncols=2)
    caption = "Length of an episode: of a success, until the task was first done; of a failure, as long as it ran (cf. the paper's Figure 10a)."
    return finished("lengths", "Lengths of episodes", caption, figure)


def _cumulative(found: Outcomes) -> Plot:
    figure, (axes,) = axes_of()
    for outcome, label, colour in _KINDS:
        lengths = np.sort(lengths_of(found, outcome))
        if len(lengths):
            axes.step([0, *lengths], np.arange(len(lengths) + 1) / len(lengths), where="post", color=colour, label=label)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("control steps")
    axes.set_ylabel("share that ended by then")
    figure.legend(loc="outside upper center", ncols=2)
    return finished("cumulative", "Cumulative distribution of lengths", "Of each outcome by itself (cf. the paper's Figure 10b).", figure)


def _by_task(found: Outcomes) -> Plot:
    figure, (axes,) = axes_of()
    figure.set_figheight(1.2 + 0.32 * len(found))
    at, left = np.arange(len(found))[::-1], np.zeros(len(found))
    for outcome, label, colour in _KINDS:
        share = np.array([100 * len(task[outcome]) / max(1, sum(map(len, task.values()))) for task in found.values()])
        axes.barh(at, share, left=left, height=0.7, color=colour, label=label)
        left += share
    names = [name if len(name) <= 48 else name[:46] + " …" for name in found]
    counts = [sum(map(len, task.values())) for task in found.values()]
    axes.set_yticks(at, [f"{name} ({count})" for name, count in zip(names, counts, strict=True)], fontsize=6.5)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("episodes [%]")
    figure.legend(loc="outside upper center", ncols=2)
    return finished("outcomes", "Outcomes by task", "In brackets: episodes (cf. the paper's Figure 10c).", figure)
