"""The embedded environment: three pucks on a table, and a gripper that is to push one of them onto the green strip. MuJoCo, primitives only.

World frame [m]: the table top is z = 0; +x leads from the robot to the strip and on to the camera, which looks back; +y is the picture's
right. A push toward the camera keeps puck and strip in view: the gripper is never in front of what it moves, and success stays visible.

The palm goes exactly where kinematics leads it; contact never deflects it. It is a heavy free body whose velocity is prescribed for each
control step, so contacts see how fast it moves: a pushed puck neither lags behind through penetration nor is held in place by a finger that
slides along it, as with bodies that are only repositioned. Nothing is crushed by it: the fingers close softly, and stop at a puck between them
(the opening that is reported is then the true one); and they give way upward, on springs, when they come down on one.

A puck that the fingers' flat meets beside its middle rolls off, so a push must be aimed to within two thirds of the puck's radius; pucks pushed
into each other move each other, and a puck looks the same whichever way it is turned. Shadows and multisampling are off: they cost many times
what the rest of a picture does.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from worldenv import kinematics, noise
from worldenv.config import EnvConfig
from worldenv.envs.contract import Snapshot, Split
from worldenv.envs.gymnasium_env import GymnasiumEnv
from worldenv.envs.offscreen import Offscreen, mujoco
from worldenv.kinematics import ControllerModel, KinematicState
from worldenv.nouns import ACTION_DIM, Camera
from worldenv.robots.contract import Robot
from worldenv.robots.tabletop import TABLETOP

ID = "worldenv/Tabletop-v0"

COLOURS = ("red", "blue", "yellow")
"""Left to right in the picture; task t is about puck t."""
PUCK_RADIUS = 0.03
"""[m]"""
PUCK_HALF = 0.022
"""Half height of a puck [m]."""
LINE = 0.055
"""Where the strip begins (x) [m]: a puck whose centre is past it is on the strip."""
STRIP_END = 0.17
"""Where the strip ends (x) [m]."""
STRIP_SIDE = 0.15
"""Where it ends to the sides (y, either way) [m]."""
FINGER_HALF = np.array([0.01, 0.008, 0.03])
"""Half sides of a finger, in the gripper's frame [m]."""
DOWN = np.array([1.0, 0.0, 0.0, 0.0])
"""Quaternion xyzw of a gripper that points at the table: its z is world -z, its y world -y."""

_RGBA = {"red": "0.85 0.12 0.10 1", "blue": "0.12 0.25 0.85 1", "yellow": "0.95 0.80 0.10 1"}
NOMINAL = np.array([[-0.02, -0.10], [-0.02, 0.0], [-0.02, 0.10]])
"""(3, 2): where pucks lie without jitter [m]."""
_LEAST_GAP = 0.012  # between neighbours, side by side (y) [m]
_REST = np.array([-0.118, 0.0, 0.08])
_REST_JITTER = np.array([0.01, 0.01, 0.01])
_REST_TURN = 0.05  # about each axis [rad]
_REST_OPENING = (0.6, 0.9)

_LOW = (-0.16, -0.17, 0.02)
_HIGH = (0.095, 0.17, 0.18)

_FINGER_Z = -0.022  # centre of a finger in the gripper's frame, whose z points out of it [m]
_PALM_HALF = np.array([0.016, 0.046, 0.014])
_PALM_Z = -0.068
_YIELD_M = 0.042  # how far a finger gives way upward
_FINGERS = ("left", "right")
_SERVO = (1000.0, 20.0)  # a finger's stiffness [N/m] and damping [N s/m]: settled within one control step, and 5 N on what it closes on
_BLOCKED_M = 0.003  # a finger this far from where it should be is held by something

_FOVY = 33.0
_PITCH = np.deg2rad(55.0)
_TARGET = np.array([-0.005, 0.0, 0.01])
_VIEW_WIDTH = 0.395  # at the target [m]

_CONTROL_S = 0.05
_SUBSTEPS = 10
_SETTLE_SUBSTEPS = 40  # in which pucks come to rest on the table
_STANDS_M = 0.01  # a puck stands while its centre is this near its height on the table
_TRAVEL_M = TABLETOP.finger_m / 2  # of one finger
_PUCKS, _PALM, _OPENING = slice(0, 21), slice(21, 28), slice(28, 32, 2)  # in qpos
_PALM_QVEL = slice(18, 24)
_PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION.value

_STATES_SEED = 20250928  # of the fixed initial states: the same in every run, whatever its seed
_TEST_BASE = 1 << 16  # test state i is state number 2^16 + i, train state i is number i: no number is both
MOST_JITTER_M = 0.05
"""Beyond it pucks begin out of reach or on the strip [m]."""


def _scene(image: int) -> str:
    """The scene in MuJoCo's XML, for pictures of `image` x `image` px."""
    distance = _VIEW_WIDTH / 2 / np.tan(np.deg2rad(_FOVY) / 2)
    eye = _TARGET + distance * np.array([np.cos(_PITCH), 0.0, np.sin(_PITCH)])

    def numbers(*values: float) -> str:
        return " ".join(repr(float(value)) for value in values)

    pucks = "".join(f'<body name="{c}"><freejoint/><geom class="puck" rgba="{_RGBA[c]}"/></body>' for c in COLOURS)
    fingers = "".join(
        f"""
      <body name="{name}" pos="0 0 {_FINGER_Z}">
        <inertial pos="0 0 0" mass="0.05" diaginertia="1e-4 1e-4 1e-4"/>
        <joint name="{name}" class="opening" axis="0 {side} 0"/>
        <joint class="spring"/>
        <geom class="gripper" pos="{numbers(0, side * FINGER_HALF[1], 0)}" size="{numbers(*FINGER_HALF)}" rgba="0.10 0.10 0.12 1"/>
      </body>"""
        for name, side in zip(_FINGERS, (-1, 1), strict=True)
    )
    servos = "".join(f'<position joint="{name}" kp="{_SERVO[0]}" kv="{_SERVO[1]}"/>' for name in _FINGERS)
    middle, half = (LINE + STRIP_END) / 2, (STRIP_END - LINE) / 2
    return f"""
<mujoco>
  <option timestep="{_CONTROL_S / _SUBSTEPS}" integrator="implicitfast"/>
  <visual>
    <global offwidth="{image}" offheight="{image}"/>
    <quality shadowsize="0" offsamples="0" numslices="16" numstacks="2"/>
    <headlight ambient="0.35 0.35 0.35" diffuse="0.2 0.2 0.2" specular="0 0 0"/>
    <map znear="0.05" zfar="20"/>
  </visual>
  <default>
    <geom friction="0.4 0.005 0.0001" solref="0.01 1"/>
    <default class="puck"><geom type="cylinder" size="{PUCK_RADIUS} {PUCK_HALF}" mass="0.15" contype="1" conaffinity="3"/></default>
    <default class="gripper"><geom type="box" contype="2" conaffinity="0"/></default>
    <default class="opening"><joint type="slide" armature="0.1"/></default>
    <default class="spring">
      <joint type="slide" axis="0 0 -1" limited="true" range="0 {_YIELD_M}" stiffness="20" springref="-0.1" damping="4" armature="0.05"/>
    </default>
  </default>
  <worldbody>
    <light pos="0.3 -0.4 1.5" dir="-0.2 0.3 -1" diffuse="0.6 0.6 0.6" specular="0 0 0" castshadow="false"/>
    <camera name="agentview" pos="{numbers(*eye)}" xyaxes="{numbers(0, 1, 0, -np.sin(_PITCH), 0, np.cos(_PITCH))}" fovy="{_FOVY}"/>
    <geom name="table" type="plane" size="0.6 0.6 0.1" rgba="0.80 0.76 0.70 1"/>
    <geom name="strip" type="box" pos="{middle} 0 0.0005" size="{half} {STRIP_SIDE} 0.0005" rgba="0.20 0.65 0.30 1" contype="0" conaffinity="0"/>
    {pucks}
    <body name="palm" gravcomp="1">
      <freejoint/>
      <inertial pos="0 0 0" mass="1000" diaginertia="10 10 10"/>
      <geom class="gripper" pos="0 0 {_PALM_Z}" size="{numbers(*_PALM_HALF)}" rgba="0.36 0.36 0.40 1"/>{fingers}
    </body>
  </worldbody>
  <actuator>{servos}</actuator>
</mujoco>"""


@dataclass(frozen=True)
class InitialState:
    """One fixed initial state."""

    pucks: NDArray[np.float64]
    """(3, 2): x, y [m] of each puck, in the order of `COLOURS`."""
    pose: NDArray[np.float64]
    """(7,) of the gripper, which is at rest [m, unit quaternion xyzw]."""
    gripper: float
    """0 shut .. 1 open."""

    def name(self) -> str:
        """SHA-256 (64 hex digits) of its numbers: two states are the same where theirs is."""
        numbers = np.concatenate([self.pucks.ravel(), self.pose, [self.gripper]])
        return hashlib.sha256(numbers.astype("<f8").tobytes()).hexdigest()


def drawn_state(
    number: int, jitter_m: float, middle: NDArray[np.float64], spread: NDArray[np.float64], turn: float, opening: tuple[float, float]
) -> InitialState:
    """The scene of state `number`: pucks within `jitter_m` of their nominal places, gripper within `spread` of `middle` [m] and `turn` [rad].

    Under one key, the counter is (number of the state, attempt): Philox maps different counters to different blocks, so no two states begin
    with the same numbers. Draws in which neighbours stand too close are drawn again.
    """
    for attempt in itertools.count():
        u = 2.0 * noise.uniform(_STATES_SEED, 0, number, attempt, noise.Stream.SCENE, (13,)) - 1.0
        pucks = NOMINAL + jitter_m * u[:6].reshape(3, 2)
        if np.all(np.diff(pucks[:, 1]) >= 2 * PUCK_RADIUS + _LEAST_GAP):  # of the largest jitter, one draw in two
            break
    pose = np.concatenate([middle + spread * u[6:9], kinematics.multiply(kinematics.exp(turn * u[9:12]), DOWN)])
    low, high = opening
    return InitialState(pucks, pose, float(low + (high - low) * (u[12] + 1) / 2))


def initial_state(config: EnvConfig, split: Split, index: int) -> InitialState:
    """State `index` of `split`, the same for every task, so that nothing but the instruction tells what to do: a function of these and of
    `config.jitter_m` alone (`drawn_state`); train and test states have different numbers.

    Raises ValueError where there is no such state, and for too much jitter.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: want 'train' or 'test'")
    count = config.train_states if split == "train" else config.test_states
    if not 0 <= index < count:
        raise ValueError(f"{split} state {index}: there are {count}, 0 .. {count - 1}; raise env.{split}_states for more")
    if not 0 <= config.jitter_m <= MOST_JITTER_M:
        raise ValueError(f"env.jitter_m={config.jitter_m}: want 0 .. {MOST_JITTER_M} m; beyond it pucks begin out of reach or on the strip")
    number = index + (_TEST_BASE if split == "test" else 0)
    return drawn_state(number, config.jitter_m, _REST, _REST_JITTER, _REST_TURN, _REST_OPENING)


def _in_mujoco(pose: NDArray[np.float64]) -> NDArray[np.float64]:
    """MuJoCo's order of a pose (7,) x y z, quaternion x y z w: the quaternion's w first."""
    return pose[[0, 1, 2, 6, 3, 4, 5]]


@dataclass(frozen=True)
class _Moment:
    """A captured moment."""

    task: int
    steps: int
    physics: NDArray[np.float64]
    arm: KinematicState
    frame: NDArray[np.uint8]


class Tabletop(GymnasiumEnv):
    """`TrueEnvironment`, and a Gymnasium environment: reset(options={"task", "split", "index"}), reward 1 while the predicate holds.

    Episodes never terminate (they go on past success); they are truncated at the step limit. One scene and one OpenGL context per
    instance: many episodes at once share an instance through `capture` and `restore`.
    """

    def __init__(self, config: EnvConfig | None = None, render_mode: str | None = "rgb_array") -> None:
        """`config.image` is the side of the picture [px]. Raises ValueError for an unknown render mode."""
        super().__init__(render_mode)
        self._config = config or EnvConfig()
        self.model = mujoco.MjModel.from_xml_string(_scene(self._config.image))
        """MuJoCo's model, to look at: whoever writes into it breaks the promise of determinism."""
        self.data = mujoco.MjData(self.model)
        """MuJoCo's data, to look at."""
        self._offscreen: Offscreen | None = None
        self._eye = int(self.model.camera("agentview").id)
        self._controller = replace(ControllerModel.of(TABLETOP), low=_LOW, high=_HIGH)
        self._qpos, self._qvel = self.data.qpos, self.data.qvel  # views
        joints = [int(self.model.body(name).jntadr[0]) for name in (*COLOURS, "palm", *_FINGERS)]
        if [int(self.model.jnt_qposadr[j]) for j in joints] != [0, 7, 14, 21, 28, 30]:
            raise AssertionError("qpos is no longer pucks, palm, then opening and spring of each finger")
        self._task: int | None = None
        self._arm: KinematicState
        self._frame: NDArray[np.uint8]
        side, finger = self._config.image, TABLETOP.finger_m / 2
        turn = [2 * np.pi] * 3
        low, high = np.array([*_LOW, *(-t for t in turn), 0, -finger]), np.array([*_HIGH, *turn, finger, 0])
        proprio = spaces.Box(low.astype(np.float32), high.astype(np.float32))
        seen = spaces.Dict({"frame": spaces.Box(0, 255, (side, side, 3), np.uint8), "proprio": proprio})
        self.observation_space = cast("spaces.Space[dict[str, NDArray[Any]]]", seen)
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `TrueEnvironment`."""
        return tuple(f"push the {colour} puck onto the green strip" for colour in COLOURS)

    @property
    def steps(self) -> int:
        """The step limit [control steps at 20 Hz]."""
        return self._config.steps

    @property
    def robot(self) -> Robot:
        """See `TrueEnvironment`."""
        return TABLETOP

    @property
    def controller(self) -> ControllerModel:
        """See `TrueEnvironment`: exact, workspace included."""
        return self._controller

    @functools.cached_property
    def camera(self) -> Camera:
        """See `TrueEnvironment`. Pixel coordinates are those of pixel centres (OpenCV): the picture's middle is (W - 1) / 2."""
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        side = self._config.image
        focal = side / 2 / np.tan(np.deg2rad(float(self.model.cam_fovy[self._eye])) / 2)
        middle = (side - 1) / 2
        to_world = np.eye(4)
        to_world[:3, :3] = self.data.cam_xmat[self._eye].reshape(3, 3) @ np.diag([1.0, -1.0, -1.0])  # OpenGL looks along -z, y up
        to_world[:3, 3] = self.data.cam_xpos[self._eye]
        return Camera(np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1.0]]), to_world, side, side)

    def camera_of(self, task: int) -> Camera:
        """See `TrueEnvironment`: all tasks share their scene."""
        return self.camera

    def versions(self) -> dict[str, str]:
        """See `TrueEnvironment`."""
        return {**{package: metadata.version(package) for package in ("mujoco", "numpy")}, "renderer": self._eyes().renderer()}

    def states(self, split: Split) -> int:
        """See `TrueEnvironment`."""
        return self._config.train_states if split == "train" else self._config.test_states

    def state_hash(self, task: int, split: Split, index: int) -> str:
        """The name of a fixed initial state: `InitialState.name`. Tasks share their states."""
        return self._start(task, split, index).name()

    def _start(self, task: int, split: Split, index: int) -> InitialState:
        if not 0 <= task < len(COLOURS):
            raise ValueError(f"task={task}: there are {len(COLOURS)} tasks, 0 .. {len(COLOURS) - 1}")
        return self._state(split, index)

    def _state(self, split: Split, index: int) -> InitialState:
        return initial_state(self._config, split, index)

    @property
    def pucks(self) -> NDArray[np.float64]:
        """(3, 3): centres of the pucks, in the order of `COLOURS` [m]. Privileged: for experts and tests."""
        places: NDArray[np.float64] = self._qpos[_PUCKS].reshape(-1, 7)[:, :3].copy()
        return places

    @property
    def arm(self) -> KinematicState:
        """The gripper and how it moves (B = 1)."""
        return self._arm

    @property
    def task(self) -> int:
        """The task of the current episode. RuntimeError before the first."""
        if self._task is None:
            raise RuntimeError("Tabletop: no episode yet; call begin (or reset) first")
        return self._task

    @property
    def sim_state(self) -> NDArray[np.float64]:
        """MuJoCo's state now: time [s], joint positions, joint velocities."""
        return np.concatenate([[self.data.time], self._qpos, self._qvel])

    def begin(self, task: int, split: Split, index: int) -> Snapshot:
        """See `TrueEnvironment`. Always draws the frame."""
        start = self._start(task, split, index)
        self._task, self._steps = task, 0
        self._arm = kinematics.rest(torch.from_numpy(start.pose)[None], torch.tensor([start.gripper], dtype=torch.float64))
        mujoco.mj_resetData(self.model, self.data)
        pucks = np.tile([0.0, 0.0, PUCK_HALF, 1.0, 0.0, 0.0, 0.0], (len(COLOURS), 1))
        pucks[:, :2] = start.pucks
        self._qpos[_PUCKS], self._qpos[_PALM] = pucks.ravel(), _in_mujoco(start.pose)
        self._qpos[_OPENING] = self.data.ctrl[:] = start.gripper * _TRAVEL_M
        mujoco.mj_step(self.model, self.data, _SETTLE_SUBSTEPS)
        self._qpos[_PALM], self._qpos[_OPENING] = _in_mujoco(start.pose), start.gripper * _TRAVEL_M
        self._qvel[:] = 0.0
        return self._snapshot(render=True)

    def advance(self, command: NDArray[np.floating[Any]], render: bool = True) -> Snapshot:
        """See `TrueEnvironment`."""
        self.task  # noqa: B018 -- raises before the first episode
        if np.shape(command) != (ACTION_DIM,):
            raise ValueError(f"Tabletop.advance: command {np.shape(command)}, want ({ACTION_DIM},)")
        asked = torch.from_numpy(np.asarray(command, np.float64))[None, None]
        _, self._arm = kinematics.follow(self._arm, asked, self._controller)
        self._steps += 1
        target, opening = _in_mujoco(self._arm.pose[0].numpy()), float(self._arm.gripper[0])
        here, turn = self._qpos[_PALM], np.empty(3)
        mujoco.mju_subQuat(turn, target[3:], here[3:])  # in the body's own axes, as a free joint's velocity is
        self._qvel[_PALM_QVEL] = np.concatenate([target[:3] - here[:3], turn]) / _CONTROL_S
        self.data.ctrl[:] = opening * _TRAVEL_M
        mujoco.mj_step(self.model, self.data, _SUBSTEPS)
        self._qpos[_PALM] = target  # takes back what contact deflected it: micrometres
        if np.abs(self._qpos[_OPENING] - opening * _TRAVEL_M).max() < _BLOCKED_M:
            self._qpos[_OPENING] = opening * _TRAVEL_M
        else:
            held = min(max(float(self._qpos[_OPENING].mean()) / _TRAVEL_M, 0.0), 1.0)
            blocked = torch.tensor([held], dtype=torch.float64)
            self._arm = replace(self._arm, gripper=blocked, ramp=blocked)
        return self._snapshot(render)

    def _eyes(self) -> Offscreen:
        if self._offscreen is None:
            self._offscreen = Offscreen(self.model, self._config.image, self._config.image)
        return self._offscreen

    def _snapshot(self, render: bool) -> Snapshot:
        if render:
            mujoco.mj_kinematics(self.model, self.data)  # a step ends with positions of its start
            mujoco.mj_camlight(self.model, self.data)
            self._frame = self._eyes().picture(self.data, self._eye)
        return Snapshot(self._frame, self._arm.pose[0].numpy().copy(), float(self._arm.gripper[0]), self._success())

    def _success(self) -> bool:
        """The task's puck stands on the table with its centre on the strip. Wherever that holds, puck and strip are in the picture."""
        x, y, z = self._qpos[7 * self.task :][:3]
        return bool(LINE < x < STRIP_END and abs(y) < STRIP_SIDE and abs(z - PUCK_HALF) < _STANDS_M)

    def capture(self) -> _Moment:
        """See `TrueEnvironment`."""
        physics = np.empty(mujoco.mj_stateSize(self.model, _PHYSICS))
        mujoco.mj_getState(self.model, self.data, physics, _PHYSICS)
        return _Moment(self.task, self._steps, physics, self._arm, self._frame)

    def restore(self, moment: _Moment) -> None:
        """See `TrueEnvironment`."""
        mujoco.mj_setState(self.model, self.data, moment.physics, _PHYSICS)
        self._task, self._steps, self._arm, self._frame = moment.task, moment.steps, moment.arm, moment.frame

    def _last_frame(self) -> NDArray[np.uint8]:
        return self._frame

    def close(self) -> None:
        """Free the OpenGL context."""
        if self._offscreen is not None:
            self._offscreen.close()
            self._offscreen = None


def register() -> None:
    """Make `gymnasium.make(ID)` known. Nothing is registered by import."""
    if ID not in gymnasium.registry:
        gymnasium.register(id=ID, entry_point=f"{__name__}:{Tabletop.__name__}")
