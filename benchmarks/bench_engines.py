"""How much faster than eager is an engine? The rows are made in engine_rows.py, which needs what exports engines; this asks for nothing."""

from __future__ import annotations

import functools

from worldenv.benchmarks.harness import Row, Setting, Variants


def engines(setting: Setting) -> Variants:
    """Every network by every back end of this machine that is installed; at the tiny size on a CPU whole rollouts too."""
    try:
        from worldenv.benchmarks import engine_rows
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "worldenv":
            raise
        return {f"needs {error.name}": functools.partial(Row, "engines", "none", None, "ms", note=f"skipped: needs {error.name}")}
    return engine_rows.variants(setting)
