"""Mistakes on a command line: one line that names the mistake and the cure."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from worldenv.cli.arguments import parse, value_of
from worldenv.config import TINY, RunConfig
from worldenv.devices import device_of


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--world.precision", "bfloat"], "--world.precision 'bfloat': did you mean 'bfloat16'? There are: bfloat16, float32"),
        (["--world.step", "5"], "unknown flag '--world.step'; did you mean '--world.steps'"),
        (["--world.steps", "many"], "--world.steps: invalid literal for int() with base 10: 'many'"),
        (["--world.steps"], "Missing value for argument '--world.steps'"),
        (["--world.steps", "-3"], "world.steps=-3: want at least 0"),
        (["--world.lr", "nan"], "world.lr=nan: want a finite number"),
        (["--world.batch", "0"], "world.batch=0: want at least 1"),
        (["--explore.held-out", "1.5"], "explore.held_out=1.5: a share, want 0 .. 1"),
        (["--explore.factors", "1", "inf"], "explore.factors=(1.0, inf): want a finite number"),
        (["--simulator.guidance", "nan"], "guidance=nan"),
        (["--simulator.memory", "1"], "memory=1"),
        (["--sft.start", "x", "--sft.microbatch", "0"], "sft.microbatch=0"),
    ],
)
def test_a_mistake_is_one_line(argv: list[str], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse("worldenv-train", RunConfig, TINY, argv)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(ord(letter) < 128 for letter in str(caught.value)), "no rest of a box"


def test_the_last_preset_counts() -> None:
    assert value_of(["--preset", "tiny", "--preset=libero"], "--preset") == "libero"
    assert value_of(["--preset=tiny", "--preset", "libero", "--preset"], "--preset") == "libero"
    assert value_of(["--out", "x"], "--preset") is None


def test_what_may_be_below_zero_or_nothing_still_may() -> None:
    config = parse("worldenv-train", RunConfig, TINY, ["--world.curriculum-begin", "-1", "-2", "--world.steps", "0", "--sft.lr", "0"])
    assert config.world == dataclasses.replace(TINY.world, curriculum_begin=(-1.0, -2.0), steps=0)


def test_a_device_that_is_not_here_is_one_line() -> None:
    assert device_of("cpu") == torch.device("cpu")
    for name in ("cuda:99", "cupid", "meta", "cpu:x"):
        with pytest.raises(ValueError, match=f"--device {name}: ") as said:
            device_of(name)
        assert "\n" not in str(said.value)
