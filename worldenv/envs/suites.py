"""True environments by name."""

from __future__ import annotations

import importlib
from typing import Any

from worldenv.config import EnvConfig
from worldenv.envs import libero
from worldenv.envs.libero import Libero
from worldenv.envs.tabletop import Tabletop
from worldenv.robots.contract import Robot
from worldenv.robots.panda import PANDA
from worldenv.robots.tabletop import TABLETOP

SUITES = ("tabletop", *libero.SUITES)
"""All there are."""


def check(suite: str) -> str:
    """`suite`, or ValueError where there is none of that name."""
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r}: want one of {', '.join(SUITES)}")
    return suite


def step_limit(suite: str) -> int:
    """Control steps of an episode, at 20 Hz."""
    return libero.STEPS[suite] if suite in libero.STEPS else EnvConfig().steps


def robot(suite: str) -> Robot:
    """Whose gripper it is."""
    return PANDA if suite in libero.STEPS else TABLETOP


def picture(suite: str) -> int:
    """Side of the picture that policies of this suite see [px]; published LIBERO policies: 256."""
    return 256 if suite in libero.STEPS else EnvConfig().image


def open_suite(suite: str, image: int, wrist: bool = False, pictures: bool = True, config: EnvConfig | None = None) -> Libero | Tabletop:
    """The environment. `image` [px], `wrist` and `pictures` as in `Libero`; the tabletop has no wrist camera, and always draws its first frame.

    `config` is the tabletop's, but for the picture; of LIBERO it says how many training states there are. Raises ValueError where there is no such
    suite or view, LiberoMissing as `Libero` does.
    """
    check(suite)
    given = config or EnvConfig()
    if suite != "tabletop":
        return Libero(suite, image, wrist, pictures, given.train_states)  # type: ignore[arg-type]
    if wrist:
        raise ValueError("the tabletop has one camera; this policy wants two views")
    return Tabletop(EnvConfig(**{**vars(given), "image": image}))


def expert(suite: str) -> Any:
    """The module with the scripted expert of `suite`: `command(env, variation)`, `VARIATION`; of LIBERO also `TASKS` by suite. ValueError if none."""
    module = "tabletop" if check(suite) == "tabletop" else "libero"
    return importlib.import_module(f"worldenv.envs.experts.{module}")
