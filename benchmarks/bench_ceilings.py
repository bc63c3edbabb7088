"""What does this machine do at best? Its copy bandwidth and its matrix rate, which every other case is held against."""

from __future__ import annotations

import statistics

from worldenv.benchmarks.harness import Row, Setting, Variants, backend, copy_rates, matrix_rates, spread

_GIGA, _TERA = 1e9, 1e12
_MS = 1e3


def copy(setting: Setting) -> Variants:
    """Bytes read and written by copies of one buffer to another."""

    def measured() -> Row:
        rates = copy_rates(setting)
        return Row("copy", "torch", statistics.median(rates) * _MS / _GIGA, "GB/s", spread=spread(rates))

    return {"copy": measured}


def matmul(setting: Setting) -> Variants:
    """FLOPs of a large square matrix product in the setting's type."""

    def measured() -> Row:
        rates = matrix_rates(setting)
        return Row("matmul", backend(setting), statistics.median(rates) * _MS / _TERA, "TFLOP/s", spread=spread(rates))

    return {"matmul": measured}
