"""Where LIBERO is on this machine, and how it is imported without a prompt, a log in somebody's temporary folder, or a library that draws.

LIBERO asks on the terminal at its first import unless a `config.yaml` is there; here one is written into a folder of ours, never into the user's
`~/.libero`. Its packages carry no assets (meshes, textures): they lie in one of the places of `places`, or LIBERO downloads them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import io
import os
import shutil
import sys
import tarfile
import tempfile
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from worldenv import checkpoint
from worldenv.envs import offscreen
from worldenv.nouns import Failed

ASSETS_VARIABLE = "WORLDENV_LIBERO_ASSETS"
"""Environment variable: a folder with LIBERO's assets, or an archive (.tar, .tar.xz, .tar.gz) of one."""
WITHOUT_DEPENDENCIES = ("robosuite==1.4.0", "bddl==1.0.1", "hf-libero==0.1.4")
"""Installed with --no-deps: what they declare would replace torch and OpenCV by builds that do not fit; extra `libero` has what they import."""
ASSETS_REPOSITORY = "lerobot/libero-assets"
"""The data set that LIBERO's own download fetches (HF_ASSETS_REPO_ID)."""
PARTS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures", "turbosquid_objects")
"""Folders of the assets."""
_EXTRA = "in the clone: pip install -c constraints.txt -e '.[libero]'"
CURE = "run `make libero`, or see docs/libero.md"

_SOURCE = "worldenv-source.txt"  # which archive was unpacked there


class LiberoMissing(Failed):
    """LIBERO or its assets are not there. The message says what is missing and what to do."""


def package() -> Path:
    """The folder `libero/libero` of the installed package. Raises LiberoMissing where there is none. Imports nothing."""
    found = importlib.util.find_spec("libero")
    if found is None or not found.submodule_search_locations:
        raise LiberoMissing(f"LIBERO is not installed ({_EXTRA}, then pip install --no-deps {' '.join(WITHOUT_DEPENDENCIES)}); {CURE}")
    return Path(next(iter(found.submodule_search_locations))) / "libero"


def cache() -> Path:
    """A folder of ours that can be written to, for this user and this installation of LIBERO."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "worldenv" / f"libero-{hashlib.sha256(str(package()).encode()).hexdigest()[:8]}"


def _is_assets(folder: Path) -> bool:
    return all((folder / part).is_dir() for part in PARTS)


def places() -> list[Path]:
    """Where assets are looked for, first to last: the variable's folder, LIBERO's own, ours, LIBERO's download."""
    asked = Path(os.environ.get(ASSETS_VARIABLE, "")).expanduser()
    given = [asked] if asked.is_dir() and os.environ.get(ASSETS_VARIABLE) else []
    return [*given, package() / "assets", cache() / "assets", Path.home() / ".cache" / "libero" / "assets"]


def assets() -> Path:
    """The folder of the assets. Raises LiberoMissing where there is none, and where the variable names nothing that is there."""
    asked = os.environ.get(ASSETS_VARIABLE)
    if asked and not Path(asked).expanduser().exists():
        raise LiberoMissing(f"{ASSETS_VARIABLE}={asked}: no such folder or archive; correct it, or unset it")
    if asked and Path(asked).expanduser().is_dir() and not _is_assets(Path(asked).expanduser()):
        missing = [part for part in PARTS if not (Path(asked).expanduser() / part).is_dir()]
        raise LiberoMissing(f"{ASSETS_VARIABLE}={asked}: no assets of LIBERO, {missing[0]} is missing; name the folder that holds {', '.join(PARTS)}")
    for place in places():
        if _is_assets(place):
            return place
    raise LiberoMissing(f"LIBERO's assets are not here (looked in {', '.join(map(str, places()))}); set {ASSETS_VARIABLE} and {CURE}")


@functools.lru_cache(maxsize=4)
def assets_hash(folder: Path) -> str:
    """16 hex digits of names and sizes of all files of the assets: other assets, other pixels."""
    found = sorted(
        (path.relative_to(folder).as_posix(), path.stat().st_size) for path in folder.rglob("*") if path.is_file() and path.name != _SOURCE
    )
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def install_assets() -> Path:
    """Put the assets where LIBERO finds them without the variable: unpack its archive, link its folder; without it, what LIBERO itself downloads.

    What is there already stays, unless the variable names another archive. Raises LiberoMissing where it cannot be done.
    """
    asked = os.environ.get(ASSETS_VARIABLE)
    if not asked and (there := _installed()):
        return there
    place = package() / "assets"
    if not os.access(place.parent, os.W_OK):
        place = cache() / "assets"
    place.parent.mkdir(parents=True, exist_ok=True)
    if not asked:
        _replace(place, _download)
        return assets()
    source = Path(asked).expanduser().absolute()
    if source.is_dir():
        assets()  # says what is wrong with it
        if not (place.is_dir() and place.samefile(source)):
            _replace(place, lambda new: new.symlink_to(source))
    elif not source.is_file():
        raise LiberoMissing(f"{ASSETS_VARIABLE}={asked}: no such folder or archive; correct it, or unset it")
    else:
        digest = checkpoint.file_hash(source)
        note = place / _SOURCE
        if not (_is_assets(place) and note.is_file() and note.read_text(encoding="utf-8") == digest):
            _replace(place, lambda new: _unpack(source, new, digest))
    return assets()


def _installed() -> Path | None:
    return next((place for place in places() if _is_assets(place)), None)


def _replace(place: Path, make: Any) -> None:
    """`make` a new entry beside `place`, then let it take that name; what was there goes when the new one is whole."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".assets-") as scratch:
        make(Path(scratch) / "new")
        if place.is_symlink() or place.exists():
            place.rename(Path(scratch) / "old")
        (Path(scratch) / "new").rename(place)


def _unpack(archive: Path, place: Path, digest: str) -> None:
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                _extract(opened, member, place)
    except (tarfile.TarError, EOFError, OSError) as error:
        why = " ".join(str(error).split())
        raise LiberoMissing(f"{archive}: cannot be unpacked ({why}); {ASSETS_VARIABLE} wants a folder or a tar archive of assets") from error
    if not _is_assets(place):
        raise LiberoMissing(f"{archive}: holds no assets of LIBERO (want {', '.join(PARTS)} at its top)")
    (place / _SOURCE).write_text(digest, encoding="utf-8")


def _extract(opened: tarfile.TarFile, member: tarfile.TarInfo, place: Path) -> None:
    """One file or folder below `place`, with nothing but its bytes: Python's own filter for that is not there before 3.11.4."""
    inside = Path(os.path.normpath(member.name))
    if inside.is_absolute() or ".." in inside.parts or not (member.isfile() or member.isdir()):
        raise tarfile.TarError(f"{member.name!r} is no file or folder below the archive's top")
    target = place / inside
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    read = opened.extractfile(member)
    assert read is not None
    with read, target.open("xb") as file:
        shutil.copyfileobj(read, file)


def _download(new: Path) -> None:
    """The assets that LIBERO's own download would fetch, into the hub's cache, where a broken download goes on; `new` links there.

    LIBERO's function itself gives the hub's client an argument that it has not known since its version 1. Raises LiberoMissing where it fails.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(ASSETS_REPOSITORY, repo_type="dataset"))
    except Exception as error:  # whatever the hub's client says
        why = " ".join(str(error).split())
        raise LiberoMissing(f"LIBERO's assets could not be downloaded ({type(error).__name__}: {why}); set {ASSETS_VARIABLE}") from error
    if not _is_assets(folder):
        raise LiberoMissing(f"{folder}: what was downloaded from {ASSETS_REPOSITORY} holds no assets of LIBERO; set {ASSETS_VARIABLE}")
    new.symlink_to(folder)


@functools.cache
def prepare() -> None:
    """Make `import libero` safe in this process: its configuration (LIBERO_CONFIG_PATH where set, else ours), robosuite's private macros.

    Those keep robosuite from writing a log into the system's temporary folder, which users would share, and from insisting on EGL.
    Raises LiberoMissing where it is not installed.
    """
    folder, root = Path(os.environ.get("LIBERO_CONFIG_PATH") or cache()), package()
    config = folder / "config.yaml"
    keys = {"benchmark_root": root, "bddl_files": root / "bddl_files", "init_states": root / "init_files"}
    text = "".join(f"{key}: {path}\n" for key, path in {**keys, "datasets": folder / "datasets", "assets": root / "assets"}.items())
    if not config.is_file() or ("LIBERO_CONFIG_PATH" not in os.environ and config.read_text(encoding="utf-8") != text):
        checkpoint.write_text(config, text)
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    macros = types.ModuleType("robosuite.macros_private")
    macros.__dict__.update(FILE_LOGGING_LEVEL=None, MUJOCO_GPU_RENDERING=False)
    sys.modules.setdefault(macros.__name__, macros)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """LIBERO's own chatter on stdout is dropped in this block: stdout belongs to the command."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@functools.cache
def load() -> types.SimpleNamespace:
    """LIBERO, imported: `benchmark` (its suites), `ControlEnv` (its environment), `camera` (robosuite's camera functions).

    Raises LiberoMissing where LIBERO, what it imports, or the assets are missing.
    """
    prepare()
    folder = assets()
    said = os.environ.get("MUJOCO_GL")
    try:
        offscreen.backend()
    except offscreen.NoOpenGL:
        os.environ["MUJOCO_GL"] = "disable"  # for robosuite's import: physics needs none
    try:
        with quiet():
            libero = importlib.import_module("libero.libero")
            libero._assets_path_cache = str(folder)  # type: ignore[attr-defined]  # asked before its own places
            found = types.SimpleNamespace(
                benchmark=importlib.import_module("libero.libero.benchmark"),
                ControlEnv=importlib.import_module("libero.libero.envs.env_wrapper").ControlEnv,
                camera=importlib.import_module("robosuite.utils.camera_utils"),
            )
    except ImportError as error:
        raise LiberoMissing(f"LIBERO cannot be imported ({error}): install the extra, {_EXTRA}; {CURE}") from error
    finally:
        if os.environ.get("MUJOCO_GL") == "disable" and said != "disable":
            os.environ.pop("MUJOCO_GL")
            os.environ.update({} if said is None else {"MUJOCO_GL": said})
    return found


def versions() -> dict[str, str]:
    """Packages and assets that decide what happens, and what it looks like. Raises LiberoMissing where they are missing."""
    packages = {name: metadata.version(name) for name in ("hf-libero", "robosuite", "mujoco", "numpy")}
    return {**packages, "libero assets": assets_hash(assets())}
