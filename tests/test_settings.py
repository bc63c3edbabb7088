"""Settings as values: all that are published here can be built, and what a damaged file holds is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine_rows
from worldenv import config, presets
from worldenv.cli import train
from worldenv.run import Run

EVERY = {
    **presets.PRESETS,
    **{f"{name}, fast": presets.fast(settings) for name, settings in presets.PRESETS.items()},
    **presets.RELEASED,
    "OpenVLA-OFT": presets.OPENVLA_OFT,
    "LLaVA-OneVision": presets.LLAVA_ONEVISION,
    "narrow EVAC": engine_rows.NARROW_EVAC,
    "narrow OpenVLA-OFT": engine_rows.NARROW_OFT,
    "narrow LLaVA": engine_rows.NARROW_LLAVA,
}


@pytest.mark.parametrize("name", EVERY)
def test_what_is_stored_comes_back(name: str) -> None:
    settings = EVERY[name]
    assert config.from_dict(type(settings), json.loads(json.dumps(config.to_dict(settings)))) == settings


def test_a_whole_number_is_a_number_and_none_is_none() -> None:
    plain = config.to_dict(presets.TINY)
    plain["sft"]["lr"] = 0
    assert config.from_dict(config.RunConfig, plain) == dataclasses.replace(presets.TINY, sft=dataclasses.replace(presets.TINY.sft, lr=0.0))
    plain["demos"]["after_success"], plain["policy"]["scale_ceiling"] = 3, 2
    read = config.from_dict(config.RunConfig, plain)
    assert (read.demos.after_success, read.policy.scale_ceiling, read.policy.llama.kv_heads) == (3, 2.0, None)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("seed", "x", "stored seed='x': want a whole number"),
        ("seed", 1.5, "stored seed=1.5: want a whole number"),
        ("seed", True, "stored seed=True: want a whole number"),
        ("seed", None, "stored seed=None: want a whole number"),
        ("fast", 1, "stored fast=1: want true or false"),
        ("device", 3, "stored device=3: want words"),
        ("loop", [1], "stored loop=[1]: want fields by name"),
        ("loop.clip", "0.1", "stored loop.clip='0.1': want a number"),
        ("loop.clip", False, "stored loop.clip=False: want a number"),
        ("loop.control", "shufle", "stored loop.control='shufle': want one of none, shuffle, frozen, true-simulator"),
        ("env.tasks", 1, "stored env.tasks=1: want a list of any length"),
        ("env.tasks", [0, "1"], "stored env.tasks[1]='1': want a whole number"),
        ("world.frozen", ["vae", "eyes"], "stored world.frozen[1]='eyes': want one of vae, clip, image_resampler, action_resampler"),
        ("world.curriculum_end", [1.0], "stored world.curriculum_end=[1.0]: want a list of 2"),
        ("demos.after_success", "no", "stored demos.after_success='no': want a whole number"),
        ("policy.llama.kv_heads", 1.0, "stored policy.llama.kv_heads=1.0: want a whole number"),
        ("loop.magic", 1, "stored settings and this version differ in loop.magic; use the version that wrote them"),
        ("loop.batch", 0, "loop.batch=0: want at least 1"),
    ],
)
def test_a_damaged_run_is_named_in_one_line(name: str, value: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(tmp_path, presets.TINY)._lock.close()
    path = tmp_path / "run.json"
    stored = json.loads(path.read_text())
    *sections, last = name.split(".")
    place = stored["settings"]
    for section in sections:
        place = place[section]
    place[last] = value
    path.write_text(json.dumps(stored))
    assert train.main(["--resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"worldenv-train: {path}: ")
    assert says in said
    assert said.count("\n") == 1
