"""Robots by name, or from a file that says in what one differs from another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from worldenv import config
from worldenv.robots.agibot_g1 import AGIBOT_G1
from worldenv.robots.contract import Robot
from worldenv.robots.panda import PANDA
from worldenv.robots.tabletop import TABLETOP

ROBOTS = {robot.name: robot for robot in (AGIBOT_G1, PANDA, TABLETOP)}
"""Those that are described here."""
_LIKE = "like"


def named(which: str) -> Robot:
    """The robot of that name, or that of the JSON file `which`: `like`, a name, and every field of `Robot` that is otherwise (docs/own-robot.md);
    of its arms, too, what is otherwise.

    Its own `name` and `source` must be among them. Raises ValueError that names the file and the field for what is missing, unknown, of another
    type or out of range.
    """
    if which in ROBOTS:
        return ROBOTS[which]
    path = Path(which)
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(f"robot {which!r}: want one of {', '.join(ROBOTS)}, or a .json file that describes one (docs/own-robot.md)")
    try:
        given: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(given, dict) or given.get(_LIKE) not in ROBOTS:
        raise ValueError(f'{path}: want an object whose "{_LIKE}" is one of {", ".join(ROBOTS)}: what is not said is as it is there')
    changes = {name: value for name, value in given.items() if name != _LIKE}
    fields = [field.name for field in dataclasses.fields(Robot)]
    if unknown := sorted(changes.keys() - set(fields)):
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; a robot has {', '.join(fields)}")
    if missing := [name for name in ("name", "source") if name not in changes]:
        raise ValueError(f"{path}: no {' and no '.join(missing)}: whose numbers are these, and where do they come from?")
    if changes["name"] in ROBOTS:
        raise ValueError(f"{path}: name {changes['name']!r} is that of another robot; give it one of its own")
    like = config.to_dict(ROBOTS[given[_LIKE]])
    if isinstance(arms := changes.get("arms"), list) and len(arms) == len(like["arms"]) and all(isinstance(arm, dict) for arm in arms):
        changes["arms"] = [{**one, **arm} for one, arm in zip(like["arms"], arms, strict=True)]
    try:
        return config.from_dict(Robot, {**like, **changes})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
