"""The order of rooms: imports go one way, and some things are known to one room alone. Planted violations must be found."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From left to right; a room imports itself and what stands left of it.
ROOMS = (
    *("_core", "nouns", "config", "presets", "noise", "checkpoint", "console", "devices", "kernels", "robots", "kinematics", "action_map"),
    "engines",
    *("policy", "simulator", "reflector", "compiled", "world", "gym", "envs", "data", "rollout", "learning", "evaluation", "audit", "distributed"),
    *("report", "run", "stages", "train", "trials", "doctor", "cli"),
)

# They are given something to call, and do not know what runs it.
GIVEN = {"policy", "simulator", "reflector"}

# Only engines/ knows what runs a network.
RUNTIMES = {"tensorrt", "tensorrt_rtx", "tensorrt_bindings", "torch_tensorrt", "onnxruntime", "torch._inductor"}

NAMES_NOTHING = {"util", "utils", "common", "helper", "helpers", "manager", "managers"}


def room_of(path: Path, root: Path) -> str:
    """The room of a Python file; "" is worldenv/__init__.py."""
    parts = path.relative_to(root).with_suffix("").parts
    if parts[0] == "worldenv":
        parts = parts[1:]
    return "" if parts[0] == "__init__" else parts[0]


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported, at module level, inside functions, relatively, or by importlib."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, node.args[0].value


def import_violations(path: Path, root: Path) -> Iterator[str]:
    """What is wrong with the imports of one Python file."""
    room, where = room_of(path, root), path.relative_to(root)
    if room and room not in ROOMS:
        yield f"{where}: {room!r} is no room: {' '.join(ROOMS)}"
        return
    rank = ROOMS.index(room) if room else -1
    inside = path.relative_to(root).with_suffix("").parts
    package = ".".join(inside if inside[0] == "worldenv" else ("worldenv", *inside)).rpartition(".")[0]
    for line, name in imported(ast.parse(path.read_text()), package):
        top, *rest = name.split(".")
        if top in ("kernels", "engines"):
            yield f"{where}:{line}: {name}: say worldenv.{name}"
        elif top == "worldenv" and rest and not rest[0].startswith("__"):
            if rest[0] == "benchmarks":
                if room != "cli":
                    yield f"{where}:{line}: {room or 'worldenv'} imports benchmarks: only cli does, and benchmarks may import everything"
            elif rest[0] not in ROOMS:
                yield f"{where}:{line}: {name}: {rest[0]!r} is no room"
            elif ROOMS.index(rest[0]) > rank:
                yield f"{where}:{line}: {room or 'worldenv'} imports {rest[0]}, which stands right of it"
            elif rest[0] == "engines" and room in GIVEN:
                yield f"{where}:{line}: {room} imports engines: it is given something to call"
        if room != "engines" and any(name == runtime or name.startswith(runtime + ".") for runtime in RUNTIMES):
            yield f"{where}:{line}: {name}: only engines/ knows what runs a network"


def says_nothing(name: str) -> bool:
    """Whether the noun of an identifier or a file name, its last word, is one that names nothing; `common_prefix` is a prefix."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return bool(words) and words[-1].lower() in NAMES_NOTHING


def name_violations(path: Path, root: Path) -> Iterator[str]:
    """Files, folders, classes and functions with a name that says nothing."""
    where = path.relative_to(root)
    for part in where.parts:
        if says_nothing(Path(part).stem):
            yield f"{where}: {part} names nothing"
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and says_nothing(node.name):
                yield f"{where}:{node.lineno}: {node.name} names nothing"


def files(root: Path, *folders: str) -> Iterator[Path]:
    """All files under `folders`; links to folders, as worldenv/kernels, are not followed."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            linked = any(parent.is_symlink() for parent in path.parents if parent != root and root in parent.parents)
            if path.is_file() and not linked and "__pycache__" not in path.parts:
                yield path


def violations(root: Path) -> list[str]:
    """Everything in the tree at `root` that breaks the order of rooms."""
    found: list[str] = []
    for path in files(root, "worldenv", "kernels", "engines"):
        if path.suffix == ".py":
            found += import_violations(path, root)
    for path in files(root, "worldenv", "kernels", "engines", "csrc", "benchmarks", "tests"):
        found += name_violations(path, root)
    for room in ("kernels", "engines"):
        if (root / room / "__init__.py").exists():
            found.append(f"{room}/__init__.py: makes a top-level package {room!r}, which transformers, diffusers and peft then import")
    for path in files(root, "csrc"):
        python = re.search(r"#\s*include\s*[<\"](pybind11/|Python\.h)", path.read_text())
        if python and path.parent != root / "csrc" / "bindings":
            found.append(f"{path.relative_to(root)}: only csrc/bindings knows Python")
    return found


def test_imports_go_one_way() -> None:
    assert violations(ROOT) == []


def test_every_room_that_is_there_was_looked_at() -> None:
    seen = {room_of(path, ROOT) for path in files(ROOT, "worldenv", "kernels", "engines") if path.suffix == ".py"}
    assert {"", "nouns", "noise", "kinematics", "robots", "policy", "simulator", "reflector", "learning", "cli"} <= seen


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree in order."""
    for name, text in {
        "worldenv/__init__.py": '__version__ = "1"',
        "worldenv/nouns.py": "import torch",
        "worldenv/noise.py": "from worldenv import _core, __version__",
        "worldenv/policy/__init__.py": "",
        "worldenv/policy/heads.py": "from worldenv.nouns import ACTION_DIM\nfrom . import contract\nfrom .. import noise",
        "worldenv/policy/contract.py": "def f():\n    from worldenv.kernels import laplace",
        "worldenv/learning/loop/loss.py": "from worldenv.learning.loop import advantage\nimport worldenv.engines.store",
        "kernels/laplace.py": "import triton\nfrom worldenv.nouns import ACTION_DIM",
        "engines/onnx.py": "def f():\n    import onnxruntime",
        "csrc/core/philox.cpp": '#include "philox.hpp"',
        "csrc/bindings/module.cpp": "#include <pybind11/pybind11.h>",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "worldenv" / "kernels").symlink_to("../kernels")
    (tmp_path / "worldenv" / "engines").symlink_to("../engines")
    assert violations(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("worldenv/nouns.py", "from worldenv.policy import heads", "nouns imports policy"),
        ("worldenv/nouns.py", "from worldenv import policy", "nouns imports policy"),
        ("worldenv/nouns.py", "import worldenv.policy.heads as heads", "nouns imports policy"),
        ("worldenv/policy/heads.py", "from ..simulator import unet", "policy imports simulator"),
        ("worldenv/policy/heads.py", "from .. import train", "policy imports train"),
        ("worldenv/policy/heads.py", "def f():\n    if True:\n        from worldenv.train import main", "policy imports train"),
        ("worldenv/policy/heads.py", "import importlib\nx = importlib.import_module('worldenv.train')", "policy imports train"),
        ("worldenv/learning/loop/loss.py", "from ...report import page", "learning imports report"),
        ("worldenv/__init__.py", "from worldenv.nouns import ACTION_DIM", "worldenv imports nouns"),
        ("kernels/laplace.py", "from worldenv.policy import heads", "kernels imports policy"),
        ("kernels/laplace.py", "import kernels.other", "say worldenv.kernels"),
        ("engines/onnx.py", "from worldenv.policy import heads", "engines imports policy"),
        ("worldenv/policy/heads.py", "from worldenv.engines import store", "given something to call"),
        ("worldenv/reflector/llava.py", "import worldenv.engines.store", "given something to call"),
        ("worldenv/policy/heads.py", "import onnxruntime", "only engines/ knows"),
        ("worldenv/rollout/collect.py", "def f():\n    from tensorrt.plugin import x", "only engines/ knows"),
        ("worldenv/train.py", "from torch._inductor import config", "only engines/ knows"),
        ("worldenv/stuff.py", "", "is no room"),
        ("worldenv/train.py", "from worldenv.stuff import x", "is no room"),
        ("worldenv/train.py", "from worldenv.benchmarks import harness", "only cli does"),
        ("worldenv/policy/utils.py", "", "names nothing"),
        ("worldenv/common/x.py", "", "names nothing"),
        ("kernels/softmax_helpers.py", "", "names nothing"),
        ("csrc/core/slot_manager.cpp", "", "names nothing"),
        ("worldenv/nouns.py", "class SlotManager: pass", "names nothing"),
        ("worldenv/nouns.py", "def loss_helper(): pass", "names nothing"),
        ("kernels/__init__.py", "", "top-level package"),
        ("engines/__init__.py", "", "top-level package"),
        ("csrc/core/philox.cpp", "#include <pybind11/numpy.h>", "only csrc/bindings knows Python"),
        ("csrc/core/philox.hpp", '# include "Python.h"', "only csrc/bindings knows Python"),
        ("csrc/tests/test_philox.cpp", "#include <pybind11/embed.h>", "only csrc/bindings knows Python"),
    ],
)
def test_a_planted_violation_is_found(tree: Path, name: str, text: str, why: str) -> None:
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text(text + "\n")
    found = violations(tree)
    assert any(why in one and one.startswith(name) for one in found), found


@pytest.mark.parametrize("room", ["world", "kinematics", "noise"])
def test_the_order_is_checked_both_ways(tree: Path, room: str) -> None:
    """A file of each later room may import `room`; a file of no earlier room may."""
    for other in ROOMS:
        if other in ("_core", "kernels", "engines", room):
            continue
        path = tree / "worldenv" / f"{other}.py"
        text = path.read_text() if path.exists() else None
        path.write_text(f"import worldenv.{room}\n")
        wrong = any(one.startswith(f"worldenv/{other}.py") for one in violations(tree))
        assert wrong == (ROOMS.index(other) < ROOMS.index(room)), other
        path.unlink() if text is None else path.write_text(text)
