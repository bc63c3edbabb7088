"""The record of a run, and the page that a person reads. Made from plain data: numbers, arrays, videos; it knows no network."""

from worldenv.report.artefacts import ReportError, read, rebuild, write, write_outcomes
from worldenv.report.fields import FIELDS, comparable, differences, validate
from worldenv.report.outcomes import lengths_by_outcome
from worldenv.report.plots import Figures
from worldenv.report.record import PeakMemory, commit, versions
from worldenv.report.videos import Video

__all__ = [
    "FIELDS", "Figures", "PeakMemory", "ReportError", "Video", "commit", "comparable", "differences", "lengths_by_outcome",
    "read", "rebuild", "validate", "versions", "write", "write_outcomes",
]  # fmt: skip
