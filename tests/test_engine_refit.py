"""New weights into an engine: all or an error, from the pristine base, whatever a runtime's refitter does wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from worldenv.engines.refit import RefitError, refit_tensorrt

NAMES = ("layer.0.weight", "layer.0.bias", "layer.1.weight")


class Fake:
    """TensorRT's refitter, as its header describes it, over an engine that is a dict; it can misbehave in the ways that are known."""

    def __init__(self, engine: dict[str, Any], refuses: str = "", hides: str = "", fails: bool = False) -> None:
        self.engine, self._new = engine, dict[str, Any]()
        self._refuses, self._hides, self._fails = refuses, hides, fails
        self.touched = False

    def get_all_weights(self) -> list[str]:
        return list(self.engine)

    def set_named_weights(self, name: str, weights: Any) -> bool:
        self.touched = True
        if name == self._refuses:
            return False
        if name != self._hides:
            self._new[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.engine if name not in self._new]

    def refit_cuda_engine(self) -> bool:
        if self._fails:  # "a subset of weights may have been refitted"
            self.engine[NAMES[0]] = self._new[NAMES[0]]
            return False
        self.engine.update(self._new)
        return True


def weights(of: str) -> dict[str, str]:
    return {name: f"{of}/{name}" for name in NAMES}


def test_all_weights_are_exchanged_and_back() -> None:
    engine: dict[str, Any] = weights("A")
    for of in ("B", "A"):
        refit_tensorrt("policy_backbone", Fake(engine), weights(of))
        assert engine == weights(of)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict.fromkeys(NAMES[:2], 1), r"missing \['layer\.1\.weight'\]"),
        (dict.fromkeys((*NAMES, "layer.9.weight"), 1), r"unknown \['layer\.9\.weight'\]"),
        ({}, "missing"),
    ],
)
def test_names_are_compared_before_the_first_is_set(given: Mapping[str, Any], said: str) -> None:
    engine: dict[str, Any] = weights("A")
    fake = Fake(engine)
    with pytest.raises(RefitError, match=said):
        refit_tensorrt("policy_backbone", fake, given)
    assert not fake.touched
    assert engine == weights("A")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"refuses": NAMES[1]}, r"refused weight layer\.0\.bias"), ({"hides": NAMES[2]}, r"still misses \['layer\.1\.weight'\]"),
        ({"fails": True}, "refused to refit"),
    ],
    ids=["refuses one", "skips one", "mixes two sets"],
)  # fmt: skip
def test_whatever_a_refitter_does_wrong_is_an_error(how: dict[str, Any], said: str) -> None:
    with pytest.raises(RefitError, match=said):
        refit_tensorrt("policy_backbone", Fake(weights("A"), **how), weights("B"))
