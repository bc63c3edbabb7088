"""The record of a run, and the page that a person reads. Made from plain data: numbers, arrays, videos; it knows no network."""

from worldenv.report.artefacts import ReportError, read, rebuild, write
from worldenv.report.fields import FIELDS, comparable, differences, validate
from worldenv.report.figures import Figures
from worldenv.report.record import PeakMemory, commit, versions
from worldenv.report.videos import Video

__all__ = [
    "FIELDS", "Figures", "PeakMemory", "ReportError", "Video", "commit", "comparable", "differences", "read",
    "rebuild", "validate", "versions", "write",
]  # fmt: skip
