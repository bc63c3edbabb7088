"""What this machine has, what it lacks, and the cure: each thing is tried. What draws runs in a process of its own, which may crash."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

import torch

from worldenv.config import EnvConfig
from worldenv.envs import libero_install, offscreen
from worldenv.envs.libero import SUITES, Libero, Suite
from worldenv.envs.tabletop import Tabletop

Topic = Literal["core", "libero", "gpu", "tensorrt"]
TOPICS: tuple[Topic, ...] = ("core", "libero", "gpu", "tensorrt")
_GL_CURE = "apt-get install libegl1 libgl1-mesa-dri, or libosmesa6; or unset MUJOCO_GL"
_REINSTALL = "make env"


@dataclass(frozen=True)
class Finding:
    """One thing that was tried."""

    topic: Topic
    name: str
    state: Literal["ok", "missing", "broken"]
    """missing: not there; broken: there, and does not work."""
    detail: str
    """Versions, what was seen, or what went wrong."""
    cure: str = ""
    """What to do; empty where nothing is to be done."""

    def plain(self) -> dict[str, str]:
        """JSON-ready."""
        return asdict(self)


def _try(topic: Topic, name: str, check: Callable[[], str], cure: str) -> Finding:
    """Run `check`: what it returns is the detail; what it raises is what is wrong."""
    try:
        return Finding(topic, name, "ok", check())
    except (ModuleNotFoundError, metadata.PackageNotFoundError, libero_install.LiberoMissing, offscreen.NoOpenGL) as error:
        return Finding(topic, name, "missing", " ".join(str(error).split()), cure)
    except Exception as error:  # whatever it is, it is the finding
        return Finding(topic, name, "broken", f"{type(error).__name__}: {' '.join(str(error).split())}", cure)


def _python() -> str:
    return f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def _torch() -> str:
    value = float((torch.ones(2, 2) @ torch.ones(2, 2)).sum())
    if value != 8.0:
        raise RuntimeError(f"a matrix product gave {value}, not 8")
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {'cuda' if torch.cuda.is_available() else 'cpu'}"


def _extension() -> str:
    core = importlib.import_module("worldenv._core")
    return f"{core.__name__} ({getattr(core, '__file__', 'built in')})"


def _networks() -> str:
    packages = ("transformers", "diffusers", "peft")
    for name in packages:
        importlib.import_module(name)
    return ", ".join(f"{name} {metadata.version(name)}" for name in packages)


def _opencv() -> str:
    """Two distributions share the folder cv2; the later one wins, and to remove either breaks both."""
    installed = sorted({str(d.metadata["Name"]) for d in metadata.distributions() if str(d.metadata["Name"]).startswith("opencv")})
    if len(installed) > 1:
        raise RuntimeError(f"{' and '.join(installed)} are both installed, and overwrite each other")
    return f"{', '.join(installed)}, cv2 {importlib.import_module('cv2').__version__}"


def draw_tabletop() -> str:
    """One frame of the tabletop, and who drew it. Raises NoOpenGL."""
    env = Tabletop(EnvConfig(image=64))
    began = time.perf_counter()
    frame = env.begin(0, "test", 0).frame
    taken, renderer = time.perf_counter() - began, env.versions()["renderer"]
    env.close()
    return _seen(frame.std(), f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}, {renderer}, first frame in {taken:.2f} s")


def draw_libero(suite: Suite) -> str:
    """One frame of the first task of `suite`, and a control step. Raises LiberoMissing, NoOpenGL."""
    env = Libero(suite, image=128)
    began = time.perf_counter()
    frame = env.begin(0, "test", 0).frame
    taken = time.perf_counter() - began
    env.close()
    return _seen(frame.std(), f"{len(env.tasks)} tasks, {env.steps} steps, first frame in {taken:.1f} s")


def _seen(spread: float, detail: str) -> str:
    if spread < 1.0:
        raise RuntimeError(f"the picture is empty (all pixels alike); {detail}")
    return detail


class _Apart:
    """Calls in a process of its own: what crashes there is a finding here."""

    def __enter__(self) -> _Apart:
        self._pool = self._new()
        return self

    def _new(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def call(self, function: Callable[..., str], *arguments: Any) -> str:
        """`function(*arguments)`; RuntimeError where it took the process with it."""
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self._pool = self._new()
            raise RuntimeError("it crashed the process that tried it (a broken OpenGL driver?)") from None


def _libero_packages() -> str:
    libero_install.package()
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("hf-libero", "robosuite", "bddl", "mujoco", "numba"))


def _assets() -> str:
    folder = libero_install.assets()
    return f"{folder} ({libero_install.assets_hash(folder)})"


def _gpu() -> str:
    if not torch.cuda.is_available():
        raise ModuleNotFoundError("no CUDA device is visible to torch")
    device = torch.cuda.get_device_properties(0)
    return f"{device.name}, {device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _compilers() -> str:
    """What the back end inductor builds engines for a GPU with: minutes into a build is late to learn that it is not there."""
    from worldenv.engines import inductor  # which imports a compiler
    from worldenv.engines.recipe import EngineError

    if torch.version.cuda is None:
        raise ModuleNotFoundError("torch was built without CUDA")
    if lacking := inductor.requires():
        raise ModuleNotFoundError(lacking)
    try:
        return f"inductor: a C++ compiler, CUDA's headers in {inductor.toolkit_folder()}/include"
    except EngineError as error:
        raise ModuleNotFoundError(str(error)) from error


def _distribution(name: str) -> Callable[[], str]:
    def version() -> str:
        importlib.import_module(name)
        return f"{name} {metadata.version(name)}"

    return version


def _tensorrt() -> str:
    if importlib.util.find_spec("tensorrt") is None:  # looked up, not imported: only engines/ knows it
        raise ModuleNotFoundError("tensorrt is not installed")
    return f"tensorrt {metadata.version('tensorrt')}"


def examine(asked: tuple[Topic, ...]) -> Iterator[Finding]:
    """Try everything of the topics in `asked`, and what is cheap of the others; findings as they come."""
    yield _try("core", "python", _python, "install Python 3.11 or later")
    yield _try("core", "torch", _torch, _REINSTALL)
    yield _try("core", "extension", _extension, _REINSTALL)
    yield _try("core", "networks", _networks, "pip uninstall torchvision where it does not match torch; else " + _REINSTALL)
    yield _try("core", "opencv", _opencv, "pip uninstall opencv-python opencv-python-headless, then pip install opencv-python-headless")
    with _Apart() as apart:
        if "core" in asked or "libero" in asked:
            yield _try("core", "drawing", lambda: apart.call(draw_tabletop), _GL_CURE)
        packages = _try("libero", "LIBERO", _libero_packages, libero_install.CURE)
        yield packages
        if packages.state == "ok":
            assets = _try("libero", "assets", _assets, f"set {libero_install.ASSETS_VARIABLE} to a folder or archive of them, then make libero")
            yield assets
            if "libero" in asked and assets.state == "ok":
                for suite in SUITES:
                    yield _try("libero", suite, lambda suite=suite: apart.call(draw_libero, suite), _GL_CURE)  # type: ignore[misc]
    yield _try("gpu", "device", _gpu, "an NVIDIA driver, and a CUDA build of torch")
    yield _try("gpu", "kernels", _distribution("triton"), "pip install triton, on Linux")
    yield _try("gpu", "engines", _compilers, "install what it names; until then eager PyTorch runs the networks, or TensorRT where that is installed")
    yield _try("tensorrt", "TensorRT", _tensorrt, "pip install tensorrt, on a machine with an NVIDIA GPU")
