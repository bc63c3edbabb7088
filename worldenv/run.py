"""The folder of a run: its settings, and what each stage left, so that the same command goes on where it stopped.

    OUT/run.json                 the settings; a folder in which a stage was begun belongs to one set of settings
    OUT/log.jsonl                what was noted on the way, a line a second (worldenv.console); for looking, nothing reads it
    OUT/stages/NAME/...          what a stage wrote
    OUT/stages/NAME/stage.json   written last: fingerprint of settings and inputs, hash of every file, seconds, memory, metrics
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from worldenv import checkpoint, config, console
from worldenv.checkpoint import CheckpointError, Savepoint
from worldenv.config import RunConfig
from worldenv.report import PeakMemory

RECORD = "stage.json"
BEGUN = "begun.json"
_SAVEPOINT = ".savepoint"
_BEGUN = {"fingerprint": str, "seconds": float}
_RECORD = {
    "stage": str, "fingerprint": str, "output": str, "seconds": float, "peak_rss_mb": float,
    "metrics": dict, "timings": dict, "files": dict, "beside": list,
}  # fmt: skip


class RunError(ValueError):
    """A run that cannot go on as asked. The message names the folder or stage and the cure."""


def held(out: Path) -> IO[str]:
    """The lock of the folder `out`, held until it is closed or the process ends. Raises RunError where another process holds it."""
    lock = (out / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise RunError(f"{out}: another process is at work there; wait for it, or choose another --out") from error
    return lock


class Stage:
    """One stage while it runs: where it writes, and what it has to say for itself."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.metrics: dict[str, Any] = {}
        """Results: equal for equal seeds."""
        self.timings: dict[str, Any] = {}
        """Seconds and rates: never equal."""
        self.beside: list[str] = []
        """What it wrote elsewhere in the run's folder, for people: paths from there. Gone, they are made again."""
        self._fingerprint, self._began, self._before_s = fingerprint, time.monotonic(), 0.0
        if folder.exists():
            begun = checkpoint.read_json(folder / BEGUN, "delete it", _BEGUN) if (folder / BEGUN).is_file() else {}
            if begun.get("fingerprint") == fingerprint:
                self._before_s = float(begun["seconds"])
            else:
                shutil.rmtree(folder)  # half of another stage, or output whose settings or inputs have changed
        self.keep_time()

    @property
    def seconds(self) -> float:
        """Seconds of work, those of killed runs up to their last savepoint included."""
        return self._before_s + time.monotonic() - self._began

    def keep_time(self) -> None:
        """Write down whose work this is and how long it took so far."""
        checkpoint.write_text(self.folder / BEGUN, json.dumps({"fingerprint": self._fingerprint, "seconds": self.seconds}))

    def savepoint(self, part: str) -> Savepoint:
        """Where `part` of the stage keeps what it has so far."""
        return Savepoint(savepoint_path(self.folder, part), saved=self.keep_time)


def savepoint_path(folder: Path, part: str) -> Path:
    """Where `part` of the stage in `folder` keeps what it has so far."""
    return folder / f"{part}{_SAVEPOINT}"


def snapshot_path(folder: Path, iterations: int) -> Path:
    """Where stage loop in `folder` keeps what it has changed of the policy after so many iterations."""
    return folder / f"policy-{iterations:04d}.safetensors"


def snapshots(out: Path) -> list[tuple[int, Path]]:
    """Policies of the run in `out` by LOOP iteration: 0, which is what stage loop starts from, then the copies that it kept."""
    kept = sorted((out / "stages" / "loop").glob("policy-*.safetensors"))
    return [(0, out / "stages" / "scale" / "policy.safetensors"), *((int(path.stem.rpartition("-")[2]), path) for path in kept)]


def done(out: Path, stage: str) -> bool:
    """Whether the run in `out` has finished `stage`, with whatever settings."""
    return (out / "stages" / stage / RECORD).is_file()


def settings_of(out: Path) -> RunConfig:
    """The settings that the run in `out` has stored. RunError where there is no run, CheckpointError where they are damaged or of another version."""
    path = out / "run.json"
    if not path.is_file():
        raise RunError(f"{out}: no run there (no run.json); start one: worldenv-train --out {out}")
    stored = checkpoint.read_json(path, "restore it, or start again in a new --out", {"settings": dict})["settings"]
    try:
        return config.from_dict(RunConfig, stored)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _begun(name: str) -> bool:
    """Whether it is left of a run that came no further: its lock, and settings that a full disk or a kill kept from being whole."""
    return name == ".lock" or name.startswith(".run.json.")


class Run:
    """A run's folder, held by one process at a time."""

    def __init__(self, out: Path, settings: RunConfig, leads: bool = True) -> None:
        """Open or make `out`. Raises RunError where it holds another run's stages, other files, or another process is at work.

        A process that does not lead only reads what the leading one wrote.
        """
        self.out, self.settings = out, settings
        if not leads:
            return
        known = out / "run.json"
        binds = known.is_file() and any((out / "stages").glob("*"))  # settings with which nothing was begun are nobody's
        if binds:
            stored = settings_of(out)
            theirs, ours = config.to_dict(_where_asked(stored, settings)), config.to_dict(settings)
            if differing := list(_differences(theirs, ours)):
                more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
                what = f"{'; '.join(differing[:3])}{more}"
                raise RunError(
                    f"{out} holds a run with other settings ({what}); choose another --out, to which --reuse {out} takes over what these do "
                    f"not decide, or go on with it as it is: --resume {out}"
                )
        elif not known.is_file() and out.exists() and (not out.is_dir() or any(not _begun(entry.name) for entry in out.iterdir())):
            raise RunError(f"{out} exists and is no run of ours; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        self._lock = held(out)
        if not binds:
            self.keep_settings()

    def keep_settings(self) -> None:
        """Store the settings, where what is stored is placed otherwise, or has recordings elsewhere, or nothing is stored."""
        known = self.out / "run.json"
        if not known.is_file() or settings_of(self.out) != self.settings:
            checkpoint.write_text(known, json.dumps({"settings": config.to_dict(self.settings)}, indent=1))

    def folder(self, stage: str) -> Path:
        """Where `stage` writes."""
        return self.out / "stages" / stage

    def record(self, stage: str) -> dict[str, Any]:
        """What `stage` left on record. Raises RunError where it has not finished, CheckpointError where the record is damaged."""
        path = self.folder(stage) / RECORD
        if not path.is_file():
            raise RunError(f"stage {stage} has no output in {self.out}; run it first (--from {stage})")
        return checkpoint.read_json(path, f"run the stage again (--from {stage})", _RECORD)

    def fingerprint(self, stage: str, sections: list[Any], inputs: list[str]) -> str:
        """Of a stage's own settings and of what its inputs put out. Raises RunError where an input has no output yet."""
        return config.fingerprint(stage, *sections, *(self.record(name)["output"] for name in inputs))

    def check(self, stage: str, fingerprint: str) -> bool:
        """Whether `stage` is done with this fingerprint; every file is hashed. Raises CheckpointError for a missing or damaged file.

        It is not done where something that it wrote beside its folder is gone: a page that was deleted is written again.
        """
        if not (self.folder(stage) / RECORD).is_file():
            return False
        record = self.record(stage)
        if record["fingerprint"] != fingerprint or not all((self.out / name).exists() for name in record["beside"]):
            return False
        for name, digest in record["files"].items():
            path = self.folder(stage) / name
            if not path.is_file() or checkpoint.file_hash(path) != digest:
                what = "damaged or truncated" if path.is_file() else "missing"
                raise CheckpointError(f"{path}: {what} since stage {stage} wrote it; make it again with --from {stage}")
        return True

    def borrow(self, stage: str, fingerprint: str, others: Sequence[Path]) -> bool:
        """Take `stage` from the first run folder of `others` that has done it with this fingerprint: hard links where the disk has them.

        Files are never changed in place, so neither run can harm the other. What wrote beside its folder, the report, is not taken: it is the other
        run's. Raises CheckpointError as `check` does, OSError as the disk does.
        """
        for other in others:
            theirs, ours = other / "stages" / stage, self.folder(stage)
            if not (theirs / RECORD).is_file():
                continue
            record = checkpoint.read_json(theirs / RECORD, f"delete {theirs}", _RECORD)
            if record["fingerprint"] != fingerprint or record["beside"]:
                continue
            self.forget(stage)
            for name in record["files"]:
                (ours / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    _link(theirs / name, ours / name)
                except FileNotFoundError as error:
                    raise CheckpointError(f"{theirs / name}: missing since stage {stage} wrote it; leave --reuse {other} out") from error
            checkpoint.write_text(ours / RECORD, json.dumps(record, indent=1))  # last, as at the end of a stage
            return self.check(stage, fingerprint)
        return False

    def forget(self, stage: str) -> None:
        """Remove what `stage` left. Raises OSError where that cannot be."""
        if self.folder(stage).exists():
            shutil.rmtree(self.folder(stage))

    @contextlib.contextmanager
    def at_work(self, stage: str, fingerprint: str) -> Iterator[Stage]:
        """Run a stage in this block; its record is written when the block ends well. Half a stage with another fingerprint is removed first.

        Of a stage that fails before it has anything nothing is left: it was not begun.
        """
        folder = self.folder(stage)
        current = Stage(folder, fingerprint)
        try:
            with PeakMemory() as memory:
                yield current
        except BaseException:
            if [entry.name for entry in folder.glob("*")] == [BEGUN]:
                self.forget(stage)
            raise
        for kept in (*folder.glob(f"*{_SAVEPOINT}"), *checkpoint.left_behind(folder)):
            kept.unlink()
        files = {str(p.relative_to(folder)): checkpoint.file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != BEGUN}
        record = {
            "stage": stage,
            "fingerprint": fingerprint,
            "output": config.fingerprint(files),
            "seconds": round(current.seconds, 2),
            "peak_rss_mb": round(memory.peak_mb, 1),
            "metrics": current.metrics,
            "timings": current.timings,
            "files": files,
            "beside": current.beside,
        }
        checkpoint.write_text(folder / RECORD, json.dumps(record, indent=1))
        (folder / BEGUN).unlink()
        console.say(f"{stage:>7}: {record['seconds']:8.1f} s  {record['peak_rss_mb']:7.0f} MB  {_headline(current.metrics)}")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def _where_asked(stored: config.RunConfig, asked: config.RunConfig) -> config.RunConfig:
    """`stored` with what may change when a run goes on: devices and memory, and where recordings lie, since what they hold is compared
    (worldenv.train)."""
    placed = stored.placed_as(asked)
    if not (stored.env.recorded and asked.env.recorded):
        return placed
    env = dataclasses.replace(stored.env, recordings=asked.env.recordings, robot=asked.env.robot)
    return dataclasses.replace(placed, env=env, explore=dataclasses.replace(stored.explore, source=asked.explore.source))


def _differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(theirs.keys() | ours.keys()):
        old, new = theirs.get(key), ours.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}: {old} there, {new} asked"


def _headline(metrics: dict[str, Any]) -> str:
    plain = {k: v for k, v in metrics.items() if isinstance(v, int | float | str) and not isinstance(v, bool)}
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items())
