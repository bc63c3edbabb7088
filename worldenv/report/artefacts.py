"""The files of a report: written whole or not at all, and read again to make the page anew.

OUT/report.json                      the record
OUT/report.html                      the page, with everything in it
OUT/figures/NAME.{svg,png}           each plot as a file
OUT/figures/figures.safetensors      the arrays behind plots that report.json does not hold
OUT/videos/NN-TITLE.mp4              each video as a file
OUT/videos/index.json                their titles and captions
"""

from __future__ import annotations

import dataclasses
import errno
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from worldenv import checkpoint
from worldenv.report import fields, outcomes
from worldenv.report.page import page
from worldenv.report.plots import Figures, Plot
from worldenv.report.videos import Clip, Video, encode

_ARRAYS = Path("figures/figures.safetensors")
_AGAIN = "make it again (worldenv-train --resume RUN --only report)"
_INDEX = Path("videos/index.json")


class ReportError(OSError):
    """A report that cannot be written. The message names the file, the reason and the cure; what was there before is still whole."""

    def __str__(self) -> str:
        return self.strerror or ""


def _put(out: Path, files: Mapping[Path, bytes]) -> None:
    """Write all `files` below `out`, each beside its place; only when the last is on disk does the first take its name."""
    path = out
    for name in files:
        place = out / name
        if place.is_dir():  # would be found only when others have taken their names
            raise ReportError(errno.EISDIR, f"report not written, {place}: a folder is in its place; move it away")
        nearest = next(folder for folder in place.parents if folder.exists())
        if not nearest.is_dir():
            raise ReportError(errno.ENOTDIR, f"report not written, {nearest}: no folder; move it away, or give another one")
    try:
        with ExitStack() as stack:
            for name, content in files.items():
                path = out / name
                stack.enter_context(checkpoint.atomic(path)).write_bytes(content)
    except OSError as error:
        cure = "free space there, or give a folder that can be written to"
        raise ReportError(error.errno, f"report not written, {error.filename2 or path}: {error.strerror or error}; {cure}") from error


def _plots(report: Mapping[str, Any], figures: Figures) -> list[Plot]:
    """Of the run, and of its exploration."""
    from worldenv.report import figures as drawing  # brings Matplotlib, which only who draws should wait for, or hear of its cache
    from worldenv.report import outcome_figures

    explored = report.get("explore", {}).get("outcomes")
    return [*drawing.draw(report, figures), *(outcome_figures.draw(explored) if explored else ())]


def write_outcomes(out: Path, found: outcomes.Outcomes) -> dict[str, Any]:
    """Write the three plots of `found` and statistics.json to folder `out`; returns the statistics. Raises ValueError, ReportError as `write`."""
    from worldenv.report import outcome_figures

    told = outcomes.summary(found)
    text = json.dumps({**told, "lengths": found}, indent=1, ensure_ascii=False) + "\n"
    files = {path.relative_to("figures"): content for path, content in _plot_files(outcome_figures.draw(found)).items()}
    _put(out, {**files, Path("statistics.json"): text.encode()})
    return told


def _plot_files(plots: Sequence[Plot]) -> dict[Path, bytes]:
    return {Path("figures") / f"{plot.name}.{kind}": getattr(plot, kind) for plot in plots for kind in ("svg", "png")}


def _clip_files(clips: Sequence[Clip]) -> dict[Path, bytes]:
    names = [f"{i:02d}-{re.sub(r'[^a-z0-9]+', '-', clip.title.lower()).strip('-')}"[:60] + ".mp4" for i, clip in enumerate(clips, 1)]
    rows = [{name: value for name, value in dataclasses.asdict(clip).items() if name != "mp4"} for clip in clips]
    index = [{"file": file, **row} for file, row in zip(names, rows, strict=True)]
    files = {Path("videos") / name: clip.mp4 for name, clip in zip(names, clips, strict=True)}
    return {**files, _INDEX: (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode()}


def write(out: Path, report: Mapping[str, Any], figures: Figures | None = None, videos: Sequence[Video] = ()) -> list[Path]:
    """Write report.json, report.html, figures and videos below `out`; returns the paths of all, from there.

    Everything is checked and drawn before the first byte is written. Videos of an earlier report that this one has no more are removed.
    Raises ValueError naming a field that is missing or wrong (see `fields.FIELDS`), ReportError where the disk refuses.
    """
    whole = fields.plain(report)
    fields.validate(whole)
    figures = figures or Figures()
    clips = [encode(video) for video in videos]
    plots = _plots(whole, figures)
    arrays = {"score": figures.score, "success": figures.success, "curves": dict(figures.curves)}
    files = {
        Path("report.json"): (json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        Path("report.html"): page(whole, plots, clips).encode(),
        _ARRAYS: checkpoint.to_bytes(arrays),
        **_plot_files(plots),
        **_clip_files(clips),
    }
    _put(out, files)
    for stale in (out / "videos").glob("[0-9][0-9]-*.mp4"):
        if stale.relative_to(out) not in files:
            stale.unlink()
    return list(files)


def read(run: Path) -> dict[str, Any]:
    """The report in `run`, a run's folder or a report.json. Raises ValueError where there is none, it is damaged or it lacks a field."""
    path = run / "report.json" if run.is_dir() else run
    if path.is_dir():
        raise ValueError(f"{path}: a folder, where a file was to be; move it away, and {_AGAIN}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the last stage of worldenv-train writes it")
    try:
        report: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError("it holds no object")
        fields.validate(report)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_AGAIN}") from error
    return report


def _clips(run: Path) -> list[Clip]:
    path = run / _INDEX
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [Clip(mp4=(path.parent / Path(row.pop("file")).name).read_bytes(), **{**row, "size": tuple(row["size"])}) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path}: damaged, or a video is gone ({error}); {_AGAIN}, or remove {path.parent}") from error


def rebuild(run: Path) -> Path:
    """Make report.html and the plots' files anew from what a run left in its folder; returns the page's path.

    Raises ValueError where something is missing or damaged, ReportError where the disk refuses.
    """
    report = read(run)
    figures = Figures(**checkpoint.load(run / _ARRAYS)) if (run / _ARRAYS).is_file() else Figures()
    plots = _plots(report, figures)
    _put(run, {Path("report.html"): page(report, plots, _clips(run)).encode(), **_plot_files(plots)})
    return run / "report.html"
