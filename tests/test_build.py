"""How the C++ code is compiled: whoever installs it may have a compiler that warns of more than ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.prefix) / "bin"


@pytest.mark.parametrize(("given", "errors"), [((), False), (("-DWORLDENV_WERROR=ON",), True)])
def test_warnings_are_errors_for_those_alone_who_ask(given: tuple[str, ...], errors: bool, tmp_path: Path) -> None:
    if not (BIN / "cmake").exists() or not (BIN / "ninja").exists():
        pytest.skip("no cmake and ninja beside this Python")
    asked = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}", "-DWORLDENV_EXTENSION=OFF", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *given]
    subprocess.run([str(BIN / "cmake"), "-S", str(ROOT), "-B", str(tmp_path), *asked], check=True, capture_output=True)
    commands = [one["command"] for one in json.loads((tmp_path / "compile_commands.json").read_text())]
    assert len(commands) > 5
    assert all(" -Wall " in command and ("-Werror" in command) is errors for command in commands)


def test_the_builds_of_our_tests_ask() -> None:
    for file in ("Makefile", ".ci/sanitize"):
        builds = [line for line in (ROOT / file).read_text().splitlines() if "cmake -S" in line]
        assert len(builds) == 1
        assert "WORLDENV_WERROR=ON" in builds[0]
