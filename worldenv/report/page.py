"""report.html: one file that needs nothing else, no network, no script; it is read in light and dark, on a screen and on a phone."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from worldenv.report import findings, tables
from worldenv.report.fields import is_unverified
from worldenv.report.plots import Plot
from worldenv.report.tables import Table
from worldenv.report.videos import FPS, Clip

# Nothing but what stands in the file itself may load, whatever a text in it says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; media-src data:; img-src data:"

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #5a6475; --paper: #ffffff; --ground: #f4f6f9; --rule: #d9dee6;
  --before: #6b7688; --after: #1f6fd6; --imagined: #c45512; --ceiling: #1c8a4c; --good: #1c8a4c; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --soft: #a0aabb; --paper: #181c23; --ground: #101319; --rule: #313846;
  --before: #93a0b5; --after: #6aa9ff; --imagined: #ff9b5e; --ceiling: #5fcf92; --good: #5fcf92; --bad: #ff8b82; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 56px; }
header { margin-bottom: 20px; }
h1 { font-size: 22px; margin: 0 0 2px; letter-spacing: -.01em; }
h2 { font-size: 17px; margin: 36px 0 10px; }
p { margin: 6px 0 10px; max-width: 88ch; }
.soft, .note, figcaption { color: var(--soft); }
.note, figcaption { font-size: 13px; }
.note { max-width: 110ch; }
code { font: 13px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.card, figure, .scroll { background: var(--paper); border: 1px solid var(--rule); border-radius: 8px; }
.verdict { padding: 18px 22px; border-left: 5px solid var(--before); }
.verdict.better { border-left-color: var(--good); }
.verdict.worse { border-left-color: var(--bad); }
.verdict p:first-child { font-size: 18px; line-height: 1.45; margin-top: 0; max-width: none; }
.verdict p:last-child { margin-bottom: 0; max-width: none; }
.scroll { overflow-x: auto; }
.note + .scroll { margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: 7px 14px; text-align: left; vertical-align: top; border-top: 1px solid var(--rule); }
thead th { border-top: 0; font-weight: 600; font-size: 13px; color: var(--soft); white-space: nowrap; }
tbody th { font-weight: 500; min-width: 9em; }
td small, th small { display: block; font-size: 12px; font-weight: 400; color: var(--soft); }
td.number, th.number { text-align: right; white-space: pre; }
tr.total > * { font-weight: 600; border-top-width: 2px; }
.plots, .videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 16px; }
figure h3 { font-size: 14px; margin: 0 0 8px; overflow-wrap: anywhere; }
figure h3::first-letter { text-transform: uppercase; }
figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
figure svg text { font-family: inherit !important; }
figcaption { margin-top: 8px; }
video { display: block; width: 100%; height: auto; border-radius: 4px; background: #16191f; }
.sides { display: flex; font-size: 12px; color: var(--soft); margin-bottom: 4px; }
.sides span { flex: 1; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
ul { padding-left: 20px; max-width: 80ch; }
li { margin: 4px 0; }
details { margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; }
details > .scroll, details > .plots { margin-top: 10px; }
pre { margin: 0; padding: 14px 16px; font: 12px/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 560px) { main { padding: 18px 12px 40px; } th, td { padding: 6px 8px; }
  tbody th { min-width: 7em; } td small { font-size: 11px; } .verdict { padding: 14px 16px; } }
@media print { body { background: none; } figure, .verdict, table { break-inside: avoid; } details { display: none; } }
"""


def _table(table: Table) -> Iterator[str]:
    """An HTML table; equal neighbours in the first column become one cell."""

    def cell(tag: str, i: int, text: str, extra: str = "") -> str:
        number = ' class="number"' if i not in table.words else ""
        main, _, rest = text.partition("\n")
        detail = f"<small>{escape(rest)}</small>" if rest else ""
        return f"<{tag}{number}{extra}>{escape(main)}{detail}</{tag}>"

    yield f'<div class="scroll"><table><caption>{escape(table.title)}</caption><thead><tr>'
    yield "".join(cell("th", i, name, ' scope="col"') for i, name in enumerate(table.columns))
    yield "</tr></thead><tbody>"
    last = len(table.rows) - 1 if table.total else -1
    for _, group in groupby(enumerate(table.rows), key=lambda numbered: (numbered[0] == last, numbered[1][0])):
        rows = list(group)
        for k, (number, row) in enumerate(rows):
            span = f' rowspan="{len(rows)}"' if len(rows) > 1 else ""
            head = cell("th", 0, row[0], f' scope="row"{span}') if k == 0 else ""
            rest = "".join(cell("td", i, text) for i, text in enumerate(row) if i > 0)
            total = ' class="total"' if number == last else ""
            yield f"<tr{total}>{head}{rest}</tr>"
    yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="note">{escape(table.note)}</p>'


def _plot(plot: Plot) -> str:
    caption = f"<figcaption>{escape(plot.caption)}</figcaption>" if plot.caption else ""
    return f"<figure><h3>{escape(plot.title)}</h3>{plot.inline}{caption}</figure>"


def _video(clip: Clip, truth: str) -> str:
    names = ("imagined", f"{truth}, same actions") if clip.has_true else ("imagined",)
    sides = "".join(f"<span>{name}</span>" for name in names)
    length = f"{clip.frames} frames, {clip.frames / FPS:.1f} s."
    data = base64.b64encode(clip.mp4).decode("ascii")
    width, height = clip.size
    return (
        f'<figure><h3>{escape(clip.title)}</h3><div class="sides">{sides}</div>'
        f'<video controls loop muted playsinline preload="auto" width="{width}" height="{height}" aria-label="{escape(clip.title)}" '
        f'src="data:video/mp4;base64,{data}"></video><figcaption>{escape(f"{clip.caption} {length}")}</figcaption></figure>'
    )


def _versions(report: Mapping[str, Any]) -> Table:
    rows = (("worldenv commit", report["commit"]), *report["versions"].items())
    return Table("Versions and machine", ("what", "which"), tuple((name, str(value)) for name, value in rows), words=(0, 1))


def _body(report: Mapping[str, Any], plots: Sequence[Plot], clips: Sequence[Clip]) -> Iterator[str]:
    paired, truth = report["eval"]["paired"], "recorded" if is_unverified(report) else "true"
    measured = paired["p_value"] < findings.SIGNIFICANT and not report["settings"]["fast"] and not is_unverified(report)
    tone = ("better" if paired["wins"] > paired["losses"] else "worse") if measured else ""
    length, size = tables.duration(report["seconds_total"]), tables.memory(report["peak_rss_mb"])
    short = ", cut short (--fast)" if report["settings"]["fast"] else ""
    run = f"Preset {report['preset']}{short}, seed {report['seed']}, {length}, peak memory {size}"
    yield f'<header><h1>worldenv: report of a run</h1><div class="soft">{escape(run)}</div></header>'
    yield f'<section class="card verdict {tone}"><p>{escape(findings.verdict(report))}</p>'
    yield f'<p class="soft">{escape(findings.imagined_beside_true(report))}</p></section>'

    shown = tables.success(report)
    yield f"<h2>{escape(shown.title)}</h2>"
    yield from _table(shown)
    if (by_task := tables.success_by_task(report)) is not None:
        yield f"<h2>{escape(by_task.title)}</h2>"
        yield from _table(by_task)
    yield f"<h2>Imagined against {truth}</h2>"
    yield from _table(tables.imagined(report))
    if (before := tables.imagined_before(report)) is not None:
        yield from _table(before)

    yield '<h2>Plots</h2><div class="plots">'
    yield from (_plot(plot) for plot in plots if not plot.name.startswith("curve-"))
    yield "</div>"
    if curves := [plot for plot in plots if plot.name.startswith("curve-")]:
        yield '<details><summary>Training curves</summary><div class="plots">'
        yield from map(_plot, curves)
        yield "</div></details>"

    if clips:
        yield "<h2>Videos</h2>"
        if any(clip.has_strip for clip in clips):
            yield '<p class="note legend"><span><i style="background:#60a0ff"></i>reflector’s score, one column per frame</span>'
            yield '<span><i style="background:#ff9646"></i>score above the threshold (dotted)</span>'
            yield '<span><i style="background:#46c878"></i>the task is done</span></p>'
        yield '<div class="videos">'
        yield from (_video(clip, truth) for clip in clips)
        yield "</div>"

    yield "<h2>Reflector</h2>"
    yield from _table(tables.reflector(report))
    yield "<h2>Time and memory</h2>"
    yield from _table(tables.stages(report))
    iteration = tables.duration(report["loop"]["seconds_per_iteration"])
    yield f'<p class="note">One iteration of the loop took {iteration} on average.</p>'

    yield "<h2>What this report does not show</h2><ul>"
    yield from (f"<li>{escape(line)}</li>" for line in findings.limits(report))
    yield "</ul>"
    if report["notes"]:
        yield "<h2>Notes of the run</h2><ul>"
        yield from (f"<li>{escape(line)}</li>" for line in report["notes"])
        yield "</ul>"

    yield "<h2>Versions and settings</h2>"
    yield from _table(_versions(report))
    settings = escape(json.dumps(report["settings"], indent=2, ensure_ascii=False))
    yield f'<details><summary>All settings</summary><div class="scroll"><pre>{settings}</pre></div></details>'


def page(report: Mapping[str, Any], plots: Sequence[Plot], clips: Sequence[Clip]) -> str:
    """The whole page of a report that `fields.validate` has passed."""
    title = f"worldenv: {report['preset']}, seed {report['seed']}"
    body = "\n".join(_body(report, plots, clips))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
