"""What holds for every command."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = "import os, sys, worldenv.cli; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"


def said(**environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=kept | environment, capture_output=True, text=True, check=True).stdout.strip()


def test_threads_wait_passively_unless_the_environment_says_otherwise() -> None:
    assert said() == "False passive"  # once torch is there, it would be too late
    assert said(OMP_WAIT_POLICY="active") == "False active"
