"""What Inductor would launch on a GPU that is not there, and whether each of its kernels compiles: built, never run.

    python -m tests.pretend_gpu --kernels tests.inductor_code [--published] [--one] [--no-compile] [--arch sm_90] [WORDS...]

The engines' graphs are traced and lowered as `engines/inductor.py` does it, on pretended GPUs, up to where a GPU would time kernels. A JSON line for
each graph: kernels, launches, calls of libraries, bytes that both read and write (each buffer whole, so that a kernel that reads one frame of many
counts all), weights that are laid out anew at every call, and what else is copied. All in bfloat16. WORDS: graphs whose names hold one.

    --published    the simulator's at 320x512; else small networks
    --one          of one rollout alone; else for the numbers of rollouts that recipes let vary
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # pretended GPUs interpret kernels; these are compiled
sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch._dynamo.device_interface
import torch._inductor.codegen.wrapper
import torch._inductor.runtime.triton_helpers
from small_policy import SMALL, small_policy
from test_reflector import SMALL as SMALL_REFLECTOR
from test_simulator import SMALL as SMALL_SIMULATOR
from torch._inductor.codecache import PyCodeCache
from torch._inductor.virtualized import V
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.runtime import driver

from worldenv import compiled
from worldenv.benchmarks import engine_rows
from worldenv.benchmarks.compile_kernels import assembled
from worldenv.benchmarks.harness import Setting
from worldenv.engines import export, inductor
from worldenv.presets import EVAC
from worldenv.reflector import weights as reflectors
from worldenv.reflector.judge import Watching
from worldenv.simulator.evac import Evac

GPU = torch.device("cuda")
_SOURCE = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)


class _Driver:
    """In the place of Triton's, which asks a GPU."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return GPU

    def get_current_device(self) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return str(ty_to_cpp(name))


_MOVES = {"clone", "convolution", "permute", "squeeze", "view"}


def _moved(node: Any) -> str:
    """The layout of what a node writes, if it computes nothing; else empty."""
    origins = {re.sub(r"_?\d+$", "", str(one)) for part in node.get_nodes() for one in part.node.origins}
    return str(node.get_nodes()[-1].node.layout) if origins <= _MOVES else ""


def _said(graph: Any) -> dict[str, Any]:
    """Counts; see the top."""
    kernels, calls, weights, copies, constants = [], [], [], [], set(graph.constants)
    for node in graph.scheduler.nodes:
        if type(node).__name__.startswith("Nop"):
            continue
        if node.is_extern():
            calls.append(node.get_read_write_buffers_sizes())
            continue
        kernels.append(node.get_read_write_buffers_sizes())
        reads = {one.name for one in node.read_writes.reads}
        if reads and reads <= constants:
            weights += sorted(reads)
        elif layout := _moved(node):
            copies.append(layout)
    return {
        "launches": len(kernels), "library_calls": len([one for one in calls if one]),
        "kernel_gb": round(sum(kernels) / 1e9, 2), "library_gb": round(sum(calls) / 1e9, 2), "weights_copied": weights, "copies": copies,
    }  # fmt: skip


class Lowered(BaseException):
    """Code is there: what follows would time it on a GPU. No Exception, which a compiler would catch."""

    def __init__(self, wrapper: Any) -> None:
        self.sources: dict[str, str] = dict(_SOURCE.findall(wrapper.kernel_autotune_defs.getvalue()))
        self.said = _said(V.graph)


def _stop(wrapper: Any) -> None:
    raise Lowered(wrapper)


def install(arch: int) -> None:
    """What Inductor asks of a GPU and of its driver; numbers of an H100."""
    found = SimpleNamespace(
        name="pretended GPU", total_memory=80 * 2**30, major=arch // 10, minor=arch % 10, multi_processor_count=132, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448, L2_cache_size=50 * 2**20, gcnArchName="",
    )  # fmt: skip
    torch.cuda.get_device_properties = lambda *_: found  # type: ignore[assignment,return-value]
    torch.cuda.get_device_capability = lambda *_: (found.major, found.minor)
    interface: Any = torch._dynamo.device_interface.CudaInterface
    interface.Worker.get_device_properties = staticmethod(lambda *_: found)
    interface.get_compute_capability = staticmethod(lambda *_: arch)
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
    torch._inductor.codegen.wrapper.PythonWrapperCodegen.generate_and_run_autotune_block = _stop  # type: ignore[method-assign]
    driver.set_active(_Driver(arch))


def small() -> list[compiled.Network]:
    """All graphs, of small networks."""
    judge = reflectors.initialise(SMALL_REFLECTOR, ("push",), 0)
    judge.llava.model.to(GPU)
    policy = small_policy(SMALL)
    policy.network.to(GPU, torch.bfloat16)  # engines of a float32 one would be that
    return compiled.of_rollout(policy, Evac.initialised(SMALL_SIMULATOR, 0).eval().to(GPU), judge, Watching(["push"], 8, 4), "bf16")


def published() -> list[compiled.Network]:
    """Those of the simulator at 320x512; weights are all alike, since nothing runs."""
    for name in ("normal_", "uniform_"):
        setattr(torch.Tensor, name, lambda tensor, *_, **__: tensor.fill_(0.01))
    made = [engine_rows.PUBLISHED[f"{name} 320x512"] for name in compiled.NAMES[:3]]
    return [make(Setting(GPU, torch.bfloat16, "published"), "bf16") for make, _ in made]


def lower(network: compiled.Network) -> Lowered:
    """Its code."""
    with torch.no_grad():
        program = export.traced(export.prepared(network.plain(), network.recipe), network.recipe)
        try:
            torch._inductor.aoti_compile_and_package(program, package_path="never-written.pt2", inductor_configs=inductor.options(network.recipe))
        except Lowered as made:
            return made
    raise AssertionError("Inductor timed no kernel: this version lowers otherwise")


def compile_all(code: Lowered, arch: int) -> dict[str, Any]:
    """All configurations that a GPU would time, and those that spill registers, which it would pass over."""
    count, spilling = 0, []
    for name, source in code.sources.items():
        kernel = getattr(PyCodeCache.load(source), name)
        for choice in kernel.configs:
            made = kernel._precompile_config(choice).kernel
            count += 1
            if assembled(name, made.asm["ptx"], arch)[1]:
                spilling.append(f"{name} {choice}")
    return {"configurations": count, "spilling": spilling}


def main() -> None:
    """Of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--one", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    arch = int(args.arch.removeprefix("sm_"))
    install(arch)
    for network in published() if args.published else small():
        if args.words and not any(word in network.name for word in args.words):
            continue
        began = time.monotonic()
        code = lower(engine_rows.fixed(network, {"batch": 1, "picture": EVAC.chunk}) if args.one else network)
        row = {"network": network.name, "arch": args.arch, "kernels": len(code.sources), **code.said}
        if not args.no_compile:
            row |= compile_all(code, arch)
        print(json.dumps({**row, "seconds": round(time.monotonic() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
