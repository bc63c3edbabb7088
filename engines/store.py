"""Where plans are kept: found by their content, written whole, locked between processes, checked when they are read, thrown away by age.

    ROOT/index.json             what there is, how large, and when it was used last; made anew from the plans where it is damaged
    ROOT/plans/KEY/...          a plan's files, its parity.json, and manifest.json with their SHA-256, which is written last
    ROOT/locks/KEY              held by the one process that builds KEY; the others wait, and then find it there
    ROOT/locks/KEY.used         shared by all stores that have handed KEY out, in whatever process: who throws plans away passes it over

KEY is the SHA-256 of everything that decides a plan's bytes (`Wanted`), so that a plan of other weights, another version or another
architecture has another name, and is never found.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from worldenv import checkpoint, console
from worldenv.engines.recipe import EngineError

DEFAULT_STORE = Path("runs/engines")
"""Of plans that belong to no run."""
FORMAT = "worldenv-plan-1"
MANIFEST, PARITY = "manifest.json", "parity.json"
_NAMED = ("engine", "back_end", "arch", "precision")


@dataclass(frozen=True)
class Wanted:
    """Everything that decides a plan's bytes."""

    engine: str
    """Name of the recipe."""
    back_end: str
    arch: str
    """"sm_90", or of a CPU."""
    precision: str
    graph: str
    """`export.architecture`: recipe, layers, sources."""
    weights: str
    """`checkpoint.tensors_hash`."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the libraries that make it and run it."""

    @property
    def key(self) -> str:
        """64 hex digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """One that is there, whole."""

    key: str
    folder: Path
    wanted: Wanted
    bytes: int
    seconds: float
    """That building it took."""


class Store:
    """A folder of plans."""

    def __init__(self, root: Path, limit_bytes: int = 20 * 2**30) -> None:
        """`limit_bytes`: after a build, plans used longest ago are removed until the rest fit [bytes]; never those that a store has handed out and
        not released, for as long as it lives.
        """
        self.root, self.limit = root, limit_bytes
        self._in_use: dict[str, TextIO] = {}
        """What keeps the plans that were handed out: their locks."""
        self._told = False

    def folder(self, key: str) -> Path:
        """Of a plan."""
        return self.root / "plans" / key

    def get(self, wanted: Wanted, build: Callable[[Path], None]) -> Plan:
        """The plan that is wanted: the one that is there and whole, else what `build(folder)` writes. One process builds, the others wait for it.

        Raises EngineError where the disk is full; whatever `build` raises leaves nothing behind.
        """
        with self._locked(f"locks/{wanted.key}"), contextlib.ExitStack() as stack:
            if wanted.key not in self._in_use:  # before it is looked for: else it may be thrown away while it is read
                self._in_use[wanted.key] = self._opened(f"locks/{wanted.key}.used")
                stack.callback(self.release, wanted.key)
                fcntl.flock(self._in_use[wanted.key], fcntl.LOCK_SH)
            plan = self._found(wanted.key)
            built = plan is None
            plan = plan or self._build(wanted, build)
            self._note(plan)
            if built:
                self.gc()
            stack.pop_all()
            return plan

    def _found(self, key: str) -> Plan | None:
        """Plan `key`, if it is there; one that is damaged is said, and is not there any more."""
        if not self.folder(key).exists():
            return None
        try:
            return self.read(key)
        except EngineError as error:
            console.say(f"engines: {error}; it is built anew")
            shutil.rmtree(self.folder(key))
            return None

    def release(self, key: str) -> None:
        """Plan `key`, which was handed out, is not used any more: it may go where there is no room."""
        if (lock := self._in_use.pop(key, None)) is not None:
            lock.close()

    def _build(self, wanted: Wanted, build: Callable[[Path], None]) -> Plan:
        part = checkpoint.part_of(self.folder(wanted.key))
        shutil.rmtree(part, ignore_errors=True)
        began = time.monotonic()
        try:
            part.mkdir(parents=True)
            build(part)
            files = {str(path.relative_to(part)): checkpoint.file_hash(path) for path in sorted(part.rglob("*")) if path.is_file()}
            if not files:
                raise EngineError(f"{wanted.engine}: {wanted.back_end} wrote no plan")
            seconds = time.monotonic() - began
            manifest = {"format": FORMAT, "key": wanted.key, "wanted": asdict(wanted), "files": files, "seconds": seconds}
            checkpoint.write_text(part / MANIFEST, json.dumps(manifest, indent=1))
            part.rename(self.folder(wanted.key))
        except OSError as error:
            if error.errno in checkpoint.NO_ROOM:
                raise EngineError(
                    f"{self.root}: no room for {wanted.engine} ({wanted.back_end}): {error.strerror}; make room, or worldenv-engine gc"
                ) from error
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return self.read(wanted.key)

    def read(self, key: str) -> Plan:
        """Plan `key`, after all of its bytes were checked. EngineError names the file that is missing, damaged or foreign."""
        folder = self.folder(key)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            wanted, files, seconds = Wanted(**manifest["wanted"]), dict(manifest["files"]), float(manifest["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{folder / MANIFEST}: damaged or missing ({error})") from error
        if manifest.get("format") != FORMAT or wanted.key != key:
            raise EngineError(f"{folder}: a plan of another version, or under a name that is not its own")
        size = 0
        for name, digest in files.items():
            path = folder / name
            try:
                if checkpoint.file_hash(path) != digest:
                    raise EngineError(f"{path}: truncated or damaged, its checksum is not the one that it was built with")
                size += path.stat().st_size
            except OSError as error:  # also of a plan that was thrown away since its manifest was read
                raise EngineError(f"{path}: missing ({error.strerror})") from error
        return Plan(key, folder, wanted, size, seconds)

    def write_parity(self, key: str, found: Mapping[str, Any]) -> None:
        """Keep beside plan `key` how it compared; nothing where another process has thrown it away: a parity alone would be a damaged plan."""
        if (self.folder(key) / MANIFEST).is_file():
            checkpoint.write_text(self.folder(key) / PARITY, json.dumps(found, indent=1, allow_nan=False))

    def parity(self, key: str) -> dict[str, Any] | None:
        """How plan `key` compared; None where it never was, as of plans for other machines. EngineError where what was kept is damaged."""
        path = self.folder(key) / PARITY
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            _ = found["passed"], found["max_rel_error"], found["tolerance"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{path}: damaged ({error}); delete it, the plan is compared again where it is used") from error
        return found

    def keys(self) -> list[str]:
        """Of all plans, whole or not."""
        plans = self.root / "plans"
        return sorted(path.name for path in plans.iterdir() if path.is_dir() and not path.name.startswith(".")) if plans.is_dir() else []

    def index(self) -> dict[str, dict[str, Any]]:
        """By key: engine, back_end, arch, bytes, used [s since 1970]. A damaged index is said, and made anew from the plans."""
        path, damaged = self.root / "index.json", False
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            known = {
                str(key): {**{name: str(one[name]) for name in _NAMED}, "bytes": int(one["bytes"]), "used": float(one["used"])}
                for key, one in found["plans"].items()
            }
        except FileNotFoundError:
            known = {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            console.say(f"engines: {path}: damaged ({error}); it is made anew from the plans that are there")
            known, damaged = {}, True
        entries = {}
        for key in self.keys():
            if key in known:
                entries[key] = known[key]
                continue
            try:
                manifest = json.loads((self.folder(key) / MANIFEST).read_text(encoding="utf-8"))
                entries[key] = self._entry(Wanted(**manifest["wanted"]), self._size(key), (self.folder(key) / MANIFEST).stat().st_mtime)
            except (OSError, ValueError, KeyError, TypeError):
                entries[key] = {**dict.fromkeys(_NAMED, "?"), "bytes": self._size(key), "used": 0.0}
        if damaged:
            self._write_index(entries)
        return entries

    def _write_index(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        checkpoint.write_text(self.root / "index.json", json.dumps({"plans": entries}, indent=1))

    @staticmethod
    def _entry(wanted: Wanted, size: int, used: float) -> dict[str, Any]:
        return {**{name: getattr(wanted, name) for name in _NAMED}, "bytes": size, "used": used}

    def _size(self, key: str) -> int:
        return sum(path.stat().st_size for path in self.folder(key).rglob("*") if path.is_file())

    def _note(self, plan: Plan) -> None:
        with self._locked("index.lock"):
            entries = self.index()
            entries[plan.key] = self._entry(plan.wanted, plan.bytes, time.time())
            self._write_index(entries)

    def gc(self, limit_bytes: int | None = None) -> list[str]:
        """Remove plans used longest ago until the rest fit, and whatever a killed build of this machine left. Returns the keys of what went.

        What stores have handed out, here or in another process, stays, whatever the limit: a run would else build again what it is using, or find
        nothing where its plan was. That the limit is too small for this store's own is said once.
        """
        limit, gone = self.limit if limit_bytes is None else limit_bytes, []
        if not (self.root / "plans").is_dir():
            return []
        with self._locked("index.lock"):
            for part in checkpoint.abandoned(self.root / "plans"):
                shutil.rmtree(part, ignore_errors=True)
            entries = self.index()
            total = sum(int(one["bytes"]) for one in entries.values())
            for key, one in sorted(entries.items(), key=lambda item: float(item[1]["used"])):
                if total > limit and self.remove(key):
                    total -= int(one["bytes"])
                    gone.append(key)
            self._write_index({key: one for key, one in entries.items() if key not in gone})
        used = sum(int(one["bytes"]) for key, one in entries.items() if key in self._in_use)
        if used > limit and not self._told:
            self._told = True
            console.say(
                f"engines: {self.root}: plans in use take {used / 1e9:.1f} GB, more than the limit of {limit / 1e9:.1f} GB; they are kept, and the "
                "next run may build some anew: set limit-gb to twice what they take"
            )
        return gone

    def remove(self, key: str) -> bool:
        """Throw plan `key` away, whatever is left of it. Returns whether it went: not where a store has it handed out."""
        with self._opened(f"locks/{key}.used") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            shutil.rmtree(self.folder(key), ignore_errors=True)
        return True

    def _opened(self, name: str) -> TextIO:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w")

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with self._opened(name) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
