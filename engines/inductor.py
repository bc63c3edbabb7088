"""Back end inductor: AOTInductor's compiled graph; on CUDA replayed from CUDA graphs where few shapes come up.

A plan is machine code for one kind of machine. Its weights are exchanged in place, between two calls.

    plan/           AOTInductor's package, unpacked, from where it is loaded; before torch 2.13, which loads no folder, the package plan.pt2
    weights.json    shapes of the weights, by name
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor.package.package import load_package
from torch.export.pt2_archive._package import AOTICompiledModel
from torch.utils import cpp_extension

from worldenv.engines import export
from worldenv.engines.backend import Engine, compute_capability, only_here
from worldenv.engines.cuda_graphs import Replayed
from worldenv.engines.recipe import EngineError, EngineRecipe, said
from worldenv.engines.refit import RefitError
from worldenv.engines.store import Store

_PACKAGE, _UNPACKED, _SHAPES = "plan.pt2", "plan", "weights.json"
_HEADERS = ("cuda.h", "cuda_runtime.h", "crt/host_defines.h", "nv/target")
"""What code for a GPU includes of CUDA, by itself or by one of these. The packages that pip brings with torch hold the first two alone."""


class Inductor:
    """See `Engine`."""

    back_end = "inductor"

    def __init__(self, plan: Path, recipe: EngineRecipe, device: torch.device) -> None:
        self.recipe, self._device = recipe, device
        try:
            # a runner is one call at a time: on a CPU each worker of the scheduler has its own (Schedule.workers), and they share the weights
            # and on a GPU nothing may ask whether a run has ended, which is forbidden while a CUDA graph is captured
            on_gpu = device.type == "cuda"
            runners = 1 if on_gpu else torch.get_num_threads()
            if plan.is_dir():  # as `load_package` would, which takes no folder
                self._loaded = AOTICompiledModel(torch._C._aoti.AOTIModelPackageLoader(str(plan), "model", on_gpu, runners, -1))
            else:
                self._loaded = load_package(str(plan), run_single_threaded=on_gpu, num_runners=runners)
        except Exception as error:  # a damaged package is a RuntimeError, a foreign one anything
            raise EngineError(f"{recipe.name}: AOTInductor does not load {plan}: {error}; build it anew") from error
        self._names = set(self._loaded.get_constant_fqns())
        self._shapes = {name: torch.Size(shape) for name, shape in json.loads((plan.parent / _SHAPES).read_text()).items()}
        self._call: Any = Replayed(self._loaded, recipe.few) if device.type == "cuda" else self._loaded

    @torch.no_grad()
    def __call__(self, *given: torch.Tensor) -> Any:
        """See `Engine`."""
        self.recipe.check(given)
        made = self._call(*given)
        return made[0] if isinstance(made, list | tuple) and len(made) == 1 else tuple(made) if isinstance(made, list) else made

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Engine`. In place, so that captured graphs read the new ones; weights that the graph does not use may be given too."""
        if missing := sorted(self._names - weights.keys()):
            raise RefitError(f"{self.recipe.name}: refit is given {len(weights)} weights, missing {missing[:3]}; nothing was changed")
        wrong = [name for name in sorted(self._names) if self._shapes.get(name) != weights[name].shape]
        if wrong:
            raise RefitError(f"{self.recipe.name}: weights {wrong[:3]} have other shapes than the engine's; nothing was changed")
        for name in self._names:  # one at a time: a GPU may have no room for two sets. Copied, since AOTInductor reads all of a tensor's storage
            tensor = weights[name].detach().to(self._device).clone(memory_format=torch.contiguous_format)
            self._settle()  # the tensor is made on the caller's stream
            self._loaded.load_constants({name: tensor}, check_full_update=False)
            self._settle()  # it is copied on a stream of AOTInductor's, and its memory is given back

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def requires() -> str | None:
    """A C++ compiler; on CUDA Triton."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++") if name):
        return "inductor: no C++ compiler: install g++, or set CXX"
    return None


def versions() -> dict[str, str]:
    """Of torch, and of CUDA where it was built with it."""
    return {"torch": torch.__version__, "cuda": str(torch.version.cuda)}


def architecture(device: torch.device) -> str:
    """Of this machine."""
    return compute_capability(device)


def options(recipe: EngineRecipe) -> dict[str, bool]:
    """What is set otherwise than Inductor would: by its version, and by what this machine has."""
    found = {}
    if torch.__version__ < "2.13" and recipe.ranges:
        # it is not for lengths that vary, and 2.11 fails on them: an assertion of get_pw_red_splits
        found["triton.coalesce_tiling_analysis"] = False
    if shutil.which("openssl") is None:  # by which it tells headers apart that it would compile before the rest
        found |= {"cpp_cache_precompile_headers": False, "aot_inductor.precompile_headers": False}
    return found


def build(module: nn.Module, recipe: EngineRecipe, folder: Path, arch: str, store: Store) -> None:
    """See `backend`."""
    device = next((one.device for one in export.state(module).values()), torch.device("cpu"))
    only_here("inductor", arch, device)
    toolkit = toolkit_folder() if device.type == "cuda" else None
    program = export.traced(module, recipe)
    with tempfile.TemporaryDirectory(dir=folder) as cache:  # what is left of a build elsewhere would be found by the next one, whatever made it
        found = {} if toolkit is None else _libraries(Path(cache), toolkit)
        with _environment({"TORCHINDUCTOR_CACHE_DIR": cache, **found}):
            try:
                torch._inductor.aoti_compile_and_package(program, package_path=str(folder / _PACKAGE), inductor_configs=options(recipe))
                shapes = {name: list(tensor.shape) for name, tensor in export.state(module).items()}
                (folder / _SHAPES).write_text(json.dumps(shapes), encoding="utf-8")
            except Exception as error:  # a compiler's errors have no base
                raise EngineError(f"{recipe.name}: AOTInductor does not compile it: {said(error)[-1][:300]}") from error
    if torch.__version__ >= "2.13":  # a package would be unpacked by each engine that loads it, into memory where /tmp is that
        with zipfile.ZipFile(folder / _PACKAGE) as package:
            package.extractall(folder)  # all of it is in a folder of the package's name
        (folder / _PACKAGE).unlink()


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """With `changes`; afterwards as before, also what torch sets to a folder in its cache. CUDA_HOME torch has read when it was imported."""
    before, toolkit = {name: os.environ.get(name) for name in (*changes, "TRITON_CACHE_DIR")}, cpp_extension.CUDA_HOME
    os.environ.update(changes)
    cpp_extension.CUDA_HOME = changes.get("CUDA_HOME", toolkit)
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = toolkit
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def toolkit_folder() -> str:
    """The folder that holds CUDA's headers in include/: torch's CUDA_HOME, or where pip puts them. EngineError where neither has all of them: torch
    would say so after minutes of lowering.
    """
    version, toolkit, found = str(torch.version.cuda), cpp_extension.CUDA_HOME, importlib.util.find_spec("nvidia")
    if toolkit is not None and any(path for place in ("include", "targets/*/include") for path in Path(toolkit).glob(f"{place}/{_HEADERS[0]}")):
        return toolkit  # the others are where its release has them
    places = found.submodule_search_locations or () if found is not None else ()
    of_pip = [str(Path(one) / f"cu{version.partition('.')[0]}") for one in places]
    for folder in of_pip:
        if all((Path(folder) / "include" / one).is_file() for one in _HEADERS):
            return folder
    raise EngineError(
        f"inductor: needs CUDA's headers ({', '.join(_HEADERS)}), not all in {' or '.join([toolkit or 'CUDA_HOME, which is not set', *of_pip])}: "
        f"install the CUDA toolkit, or set CUDA_HOME, or of version {version} pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    )


def _libraries(folder: Path, toolkit: str) -> dict[str, str]:
    """Where a linker finds CUDA's: torch names the toolkit's folders only where CUDA_HOME is set, and many a driver comes without libcuda.so."""
    from triton.backends.nvidia.driver import libcuda_dirs

    found = {"CUDA_HOME": toolkit}
    with contextlib.suppress(AssertionError, OSError, subprocess.SubprocessError):  # Triton finds no driver: the linker says so itself
        driver = next(path for one in libcuda_dirs() if (path := Path(one) / "libcuda.so.1").exists())
        (folder / "libcuda.so").symlink_to(driver)
        found["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("LIBRARY_PATH")]))
    return found


def load(folder: Path, recipe: EngineRecipe, device: torch.device) -> Engine:
    """See `backend`."""
    unpacked = folder / _UNPACKED
    return Inductor(unpacked if unpacked.is_dir() else folder / _PACKAGE, recipe, device)
