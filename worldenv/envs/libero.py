"""LIBERO behind the contract of a true environment: four suites of ten tasks each, a simulated Franka Panda, LIBERO's own predicates.

Conventions are OpenVLA-OFT's: ten steps of no motion after an initial state, pictures turned by 180 degrees (upright and mirrored left-right),
poses and fingers as LIBERO's observations say them. LIBERO takes its observation one or two physics steps (2 ms each) before the end of a control
step, and its positions are those of the step before; so do snapshots here, at the same moments, so that they equal LIBERO's bit for bit.

Test states are the 50 that LIBERO publishes for each task, and are for evaluation alone. Where a published state leaves something open (cabinets
and stoves are placed anew by every reset, within a centimetre or two), it is what OpenVLA-OFT's evaluation has in its episode of that number: the
environment seeded with 0, then one reset per episode. Training states (demonstrations, exploration, LOOP) are drawn by LIBERO's own sampler of
initial states under seeds of ours: never a published one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from worldenv.config import LIBERO_TEST_STATES
from worldenv.envs import libero_install
from worldenv.envs.contract import Snapshot, Split
from worldenv.envs.gymnasium_env import GymnasiumEnv
from worldenv.envs.offscreen import Offscreen, mujoco
from worldenv.kinematics import ControllerModel
from worldenv.nouns import ACTION_DIM, Camera
from worldenv.robots.contract import Robot
from worldenv.robots.panda import PANDA

ID = "worldenv/Libero-v0"

Suite = Literal["libero_spatial", "libero_object", "libero_goal", "libero_10"]
SUITES: tuple[Suite, ...] = get_args(Suite)
STEPS: dict[Suite, int] = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
"""Step limits [control steps at 20 Hz], settling not counted. Source: OpenVLA-OFT, experiments/robot/libero/run_libero_eval.py."""
SETTLE_STEPS = 10
"""Control steps without motion, gripper opening, in which objects come to rest. Source: as `STEPS`."""
IDLE = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
"""The command of a settling step."""

_TRAIN_SEED = 20250928  # training state i is drawn under seed _TRAIN_SEED + i
_AGENTVIEW, _WRIST = "agentview", "robot0_eye_in_hand"
_COLLISION_GROUP = 0  # geoms of this group are for contacts, and not drawn
_PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION.value
_PROBE = "worldenv"
_PROPRIO_HIGH = np.array([2.0, 2.0, 3.0, *[2 * np.pi] * 3, 0.045, 0.005], np.float32)
_PROPRIO_LOW = np.array([-2.0, -2.0, -0.5, *[-2 * np.pi] * 3, -0.005, -0.045], np.float32)


class _Seen(NamedTuple):
    """What LIBERO's observation holds, at the moment when it is taken."""

    position: NDArray[np.float64]
    """(3,) of the point between the fingertips [m]."""
    quaternion: NDArray[np.float64]
    """(4,) of the hand, xyzw."""
    fingers: NDArray[np.float64]
    """(2,) [m]."""
    frame: NDArray[np.uint8]
    wrist: NDArray[np.uint8] | None


@dataclass(frozen=True)
class _Moment:
    """A captured moment."""

    task: int
    split: Split
    index: int
    steps: int
    physics: NDArray[np.float64]
    fixtures: tuple[NDArray[np.float64], ...]
    """Body positions, body quaternions, site colours of the model: a reset places fixtures, a burner lights up."""
    goal: tuple[NDArray[np.float64], NDArray[np.float64]]
    """The controller's position and orientation."""
    gripper: NDArray[np.float64]
    """The gripper's ramp."""
    clock: tuple[float, bool]
    """When the next observation is due."""
    initial: NDArray[np.float64]
    seen: _Seen


class _Scene:
    """One task: LIBERO's environment, and what is asked of it again and again."""

    def __init__(self, libero: Any, suite: Any, task: int, image: int) -> None:
        with libero_install.quiet():
            self.inner = libero.ControlEnv(
                bddl_file_name=suite.get_task_bddl_file_path(task),
                use_camera_obs=False, has_offscreen_renderer=False, hard_reset=False, ignore_done=True,
                camera_names=[_AGENTVIEW, _WRIST], camera_heights=image, camera_widths=image,
            )  # fmt: skip
        self.published: NDArray[np.float64] = np.asarray(suite.get_task_init_states(task))
        self.env = self.inner.env
        self.model, self.data = self.inner.sim.model._model, self.inner.sim.data._data
        self.robot = self.env.robots[0]
        self.random: list[Any] = []
        """State of numpy's generator before reset n of LIBERO's own evaluation."""
        self.samplers = list(self.env.object_property_initializers)
        """Of joints: drawers, doors, knobs."""

    def reset(self, split: Split, index: int) -> None:
        """Place everything as initial state `index` of `split` has it, LIBERO's global random numbers being left as they were."""
        before = np.random.get_state()  # noqa: NPY002 -- what LIBERO draws from
        try:
            if split == "train":
                self.inner.seed(_TRAIN_SEED + index)
                self._reset(1)
                state = self.inner.get_sim_state()
            else:
                while len(self.random) <= index:
                    self.inner.seed(0)
                    if self.random:
                        np.random.set_state(self.random[-1])  # noqa: NPY002
                        self._reset(len(self.random) + 1)
                    self.random.append(np.random.get_state())  # noqa: NPY002
                np.random.set_state(self.random[index])  # noqa: NPY002
                self._reset(index + 2)
                state = self.published[index]
        finally:
            np.random.set_state(before)  # noqa: NPY002
        self.inner.set_init_state(state)

    def _reset(self, times: int) -> None:
        """LIBERO's reset without building the model anew. What building it does besides is done here: the gripper's ramp begins at 0; and LIBERO
        never empties its list of samplers of joints, which so draw once more with each build (`times`).
        """
        self.env.object_property_initializers = self.samplers * times
        self.robot.gripper.current_action = np.zeros(self.robot.gripper.dof)
        with libero_install.quiet():
            self.inner.reset()

    def state_hash(self) -> str:
        """SHA-256 of the state just after `reset`: joints, velocities, and where the fixtures are."""
        numbers = np.concatenate([self.inner.get_sim_state(), self.model.body_pos.ravel(), self.model.body_quat.ravel()])
        return hashlib.sha256(numbers.astype("<f8").tobytes()).hexdigest()

    def refresh(self) -> None:
        """Positions and contacts of now, for who looks; what the next step depends on stays as it is."""
        warm = self.data.qacc_warmstart.copy()
        mujoco.mj_forward(self.model, self.data)
        self.data.qacc_warmstart[:] = warm

    def alterable(self) -> tuple[NDArray[np.float64], ...]:
        """Arrays of the model that episodes change."""
        return self.model.body_pos, self.model.body_quat, self.model.site_rgba


@functools.cache
def _benchmark(suite: Suite) -> Any:
    with libero_install.quiet():
        return libero_install.load().benchmark.get_benchmark(suite)()


@functools.cache
def instructions(suite: Suite) -> tuple[str, ...]:
    """Of each task of `suite`. Raises LiberoMissing where LIBERO is not there."""
    found = _benchmark(suite)
    return tuple(found.get_task(i).language for i in range(found.get_num_tasks()))


class Libero(GymnasiumEnv):
    """`TrueEnvironment`, and a Gymnasium environment: reset(options={"task", "split", "index"}), reward 1 while the predicate holds.

    Episodes never terminate (they go on past success); they are truncated at the suite's step limit. Scenes are built when they are first needed
    and kept (80 MB each); many episodes at once share an instance through `capture` and `restore`. Not for use by two threads at once.
    """

    def __init__(
        self, suite: Suite, image: int = 256, wrist: bool = False, pictures: bool = True, train_states: int = 50,
        render_mode: str | None = "rgb_array",
    ) -> None:  # fmt: skip
        """`image` is the side of the pictures [px]; `wrist` adds the view of the camera on the hand. Without `pictures` nothing is ever drawn, and
        frames are black: physics alone needs no OpenGL library.

        Raises ValueError for an unknown suite or render mode, LiberoMissing where LIBERO or its assets are not there.
        """
        if suite not in SUITES:
            raise ValueError(f"suite={suite!r}: want one of {', '.join(SUITES)}")
        super().__init__(render_mode)
        if image < 1 or train_states < 0:
            raise ValueError(f"image={image}, train_states={train_states}: want at least 1 px, and no fewer than 0 states")
        self.suite = suite
        self._image, self._wrist, self._pictures, self._train_states = image, wrist, pictures, train_states
        self._libero = libero_install.load()
        self._benchmark = _benchmark(suite)
        self._scenes: dict[int, _Scene] = {}
        self._eyes: dict[int, Offscreen] = {}
        self._hashes: dict[tuple[int, Split, int], str] = {}
        self._start: tuple[int, Split, int] | None = None
        self._drawing = False
        self._seen: _Seen
        self._initial: NDArray[np.float64]
        black = np.zeros((image, image, 3), np.uint8)
        self._black, self._frames = black, (black, black if wrist else None)
        seen: dict[str, spaces.Space[Any]] = {"frame": spaces.Box(0, 255, black.shape, np.uint8)}
        seen |= {"wrist": spaces.Box(0, 255, black.shape, np.uint8)} if wrist else {}
        seen |= {"proprio": spaces.Box(_PROPRIO_LOW, _PROPRIO_HIGH)}
        self.observation_space = cast("spaces.Space[dict[str, NDArray[Any]]]", spaces.Dict(seen))
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    # What is known without an episode

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `TrueEnvironment`."""
        return instructions(self.suite)

    @property
    def steps(self) -> int:
        """The suite's step limit [control steps at 20 Hz]."""
        return STEPS[self.suite]

    @property
    def robot(self) -> Robot:
        """See `TrueEnvironment`."""
        return PANDA

    @property
    def controller(self) -> ControllerModel:
        """See `TrueEnvironment`: nominal."""
        return ControllerModel.of(PANDA)

    def states(self, split: Split) -> int:
        """See `TrueEnvironment`."""
        return self._train_states if split == "train" else LIBERO_TEST_STATES

    def versions(self) -> dict[str, str]:
        """See `TrueEnvironment`. The renderer is "none" where nothing is drawn."""
        if not self._pictures:
            return {**libero_install.versions(), "renderer": "none"}
        return {**libero_install.versions(), "renderer": self._eye(self._start[0] if self._start else 0).renderer()}

    @property
    def camera(self) -> Camera:
        """See `TrueEnvironment`: `camera_of` the current episode's task; before the first episode, of task 0."""
        return self.camera_of(self._start[0] if self._start else 0)

    def camera_of(self, task: int) -> Camera:
        """agentview in `task`'s scene. Pixel coordinates are those of pixel centres (OpenCV), half a pixel less than robosuite's, whose picture's
        middle is W / 2. Frames are mirrored.
        """
        return self._view(task, _AGENTVIEW)

    def _view(self, task: int, name: str) -> Camera:
        scene, side = self.scene(task), self._image
        intrinsics = self._libero.camera.get_camera_intrinsic_matrix(scene.inner.sim, name, side, side)
        intrinsics[:2, 2] -= 0.5
        to_world = self._libero.camera.get_camera_extrinsic_matrix(scene.inner.sim, name)
        return Camera(intrinsics, to_world, side, side, mirrored=True)

    def scene(self, task: int) -> _Scene:
        """The scene of `task`, built where it is not there yet (one to ten seconds). ValueError for a task that is none."""
        if not 0 <= task < len(self.tasks):
            raise ValueError(f"task={task}: {self.suite} has {len(self.tasks)} tasks, 0 .. {len(self.tasks) - 1}")
        if task not in self._scenes:
            scene = self._scenes[task] = _Scene(self._libero, self._benchmark, task, self._image)
            self._instrument(scene)
        return self._scenes[task]

    def _instrument(self, scene: _Scene) -> None:
        """Put one observable in the place of LIBERO's thirty: it looks when they would, at what snapshots need, and draws only when asked."""
        observables = scene.env._observables
        like = next(iter(observables.values()))

        def look(_cache: dict[str, Any]) -> float:
            if self._drawing:
                self._frames = self._picture(scene, _AGENTVIEW), self._picture(scene, _WRIST) if self._wrist else None
            sim, robot = scene.inner.sim, scene.robot
            self._seen = _Seen(
                np.array(sim.data.site_xpos[robot.eef_site_id]),
                np.array(sim.data.get_body_xquat(robot.robot_model.eef_name))[[1, 2, 3, 0]],
                np.array([sim.data.qpos[i] for i in robot._ref_gripper_joint_pos_indexes]),
                *self._frames,
            )
            return 0.0

        look.__modality__ = "worldenv"  # type: ignore[attr-defined]  # what robosuite's decorator sets
        probe = type(like)(name=_PROBE, sensor=look, sampling_rate=scene.env.control_freq)
        observables.clear()
        observables[_PROBE] = probe

    def _eye(self, task: int) -> Offscreen:
        if task not in self._eyes:
            model = self.scene(task).model
            model.vis.global_.offwidth, model.vis.global_.offheight = (max(self._image, side) for side in (640, 480))
            self._eyes[task] = Offscreen(model, self._image, self._image, hidden=(_COLLISION_GROUP,))
        return self._eyes[task]

    def _picture(self, scene: _Scene, name: str) -> NDArray[np.uint8]:
        task = next(task for task, known in self._scenes.items() if known is scene)
        picture = self._eye(task).picture(scene.data, scene.inner.sim.model.camera_name2id(name))
        return np.ascontiguousarray(picture[:, ::-1])

    # Privileged

    @property
    def task(self) -> int:
        """The task of the current episode. RuntimeError before the first."""
        if self._start is None:
            raise RuntimeError("Libero: no episode yet; call begin (or reset) first")
        return self._start[0]

    @property
    def inner(self) -> Any:
        """LIBERO's own environment of the current task (ControlEnv), to look at: whoever steps it breaks the promise of determinism.

        `inner.env` is its domain (BDDLBaseDomain), `inner.sim` its simulation, whose positions and contacts are those of the end of the last control
        step.
        """
        return self.scene(self.task).inner

    @property
    def poses(self) -> dict[str, NDArray[np.float64]]:
        """Pose (7,) [m, unit quaternion xyzw] of every object and fixture by LIBERO's name, now. Privileged: for experts and tests."""
        scene = self.scene(self.task)
        ids = scene.env.obj_body_id
        return {name: np.concatenate([scene.data.xpos[i], scene.data.xquat[i][[1, 2, 3, 0]]]) for name, i in ids.items()}

    @property
    def gripper_pose(self) -> NDArray[np.float64]:
        """(7,) of the gripper now [m, unit quaternion xyzw], at most 4 ms later than the snapshot's. Privileged."""
        scene = self.scene(self.task)
        turn = scene.inner.sim.data.get_body_xquat(scene.robot.robot_model.eef_name)[[1, 2, 3, 0]]
        return np.concatenate([scene.data.site_xpos[scene.robot.eef_site_id], turn])

    # Episodes

    @property
    def sim_state(self) -> NDArray[np.float64]:
        """LIBERO's flattened state now: time [s], joint positions, joint velocities."""
        return np.array(self.scene(self.task).inner.get_sim_state())

    @property
    def initial_state(self) -> NDArray[np.float64]:
        """The flattened state that the current episode began from, before it settled: for a test state, the published one."""
        self.task  # noqa: B018 -- raises before the first episode
        return self._initial.copy()

    def state_hash(self, task: int, split: Split, index: int) -> str:
        """SHA-256 (64 hex digits) of an initial state, fixtures included: two are the same where theirs is. An episode under way is kept."""
        self._check(task, split, index)
        if (task, split, index) not in self._hashes:
            with self._kept():
                self._place(task, split, index)
        return self._hashes[task, split, index]

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        moment = self.capture() if self._start else None
        yield
        if moment is not None:
            self.restore(moment)

    def _check(self, task: int, split: Split, index: int) -> None:
        self.scene(task)
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r}: want 'train' or 'test'")
        if not 0 <= index < self.states(split):
            more = "; raise env.train_states for more" if split == "train" else ""
            raise ValueError(f"{split} state {index}: {self.suite} has {self.states(split)} per task, 0 .. {self.states(split) - 1}{more}")

    def _place(self, task: int, split: Split, index: int) -> _Scene:
        scene = self.scene(task)
        self._drawing = False
        scene.reset(split, index)
        self._hashes[task, split, index] = scene.state_hash()
        return scene

    def begin(self, task: int, split: Split, index: int) -> Snapshot:
        """See `TrueEnvironment`: LIBERO's reset and initial state, then `SETTLE_STEPS` idle steps, which are not counted. Always draws the frame."""
        self._check(task, split, index)
        scene = self._place(task, split, index)
        self._start, self._steps, self._initial = (task, split, index), 0, np.array(scene.inner.get_sim_state())
        success = False
        for left in reversed(range(SETTLE_STEPS)):
            success = self._step(scene, IDLE, render=not left)
        return self._snapshot(success)

    def advance(self, command: NDArray[np.floating[Any]], render: bool = True) -> Snapshot:
        """See `TrueEnvironment`. Success is LIBERO's `done`."""
        scene = self.scene(self.task)
        if np.shape(command) != (ACTION_DIM,):
            raise ValueError(f"Libero.advance: command {np.shape(command)}, want ({ACTION_DIM},)")
        if not np.isfinite(command).all():
            raise ValueError("Libero.advance: a command is not finite: the policy that gave it has diverged")
        self._steps += 1
        return self._snapshot(self._step(scene, command, render))

    def _step(self, scene: _Scene, command: NDArray[np.floating[Any]], render: bool) -> bool:
        self._drawing = render and self._pictures
        *_, done, _ = scene.inner.step(np.asarray(command, np.float64))  # clips it to [-1, 1]
        scene.refresh()
        return bool(done)

    def _snapshot(self, success: bool) -> Snapshot:
        seen = self._seen
        gripper = float(np.clip((seen.fingers[0] - seen.fingers[1]) / PANDA.finger_m, 0.0, 1.0))
        return Snapshot(seen.frame, np.concatenate([seen.position, seen.quaternion]), gripper, success, seen.fingers, seen.wrist)

    def capture(self) -> _Moment:
        """See `TrueEnvironment`."""
        task, split, index = self.task, *cast("tuple[int, Split, int]", self._start)[1:]
        scene = self.scene(task)
        physics = np.empty(mujoco.mj_stateSize(scene.model, _PHYSICS))
        mujoco.mj_getState(scene.model, scene.data, physics, _PHYSICS)
        controller, probe = scene.robot.controller, scene.env._observables[_PROBE]
        return _Moment(
            task, split, index, self._steps, physics,
            tuple(array.copy() for array in scene.alterable()),
            (np.array(controller.goal_pos), np.array(controller.goal_ori)),
            np.array(scene.robot.gripper.current_action),
            (probe._time_since_last_sample, probe._sampled),
            self._initial,
            self._seen,
        )  # fmt: skip

    def restore(self, moment: _Moment) -> None:
        """See `TrueEnvironment`; the moment may be another task's."""
        scene = self.scene(moment.task)
        self._start, self._steps, self._initial = (moment.task, moment.split, moment.index), moment.steps, moment.initial
        for array, kept in zip(scene.alterable(), moment.fixtures, strict=True):
            array[:] = kept
        mujoco.mj_setState(scene.model, scene.data, moment.physics, _PHYSICS)
        scene.refresh()
        controller, probe = scene.robot.controller, scene.env._observables[_PROBE]
        controller.goal_pos, controller.goal_ori = (kept.copy() for kept in moment.goal)
        controller.new_update = True  # what it knows of the robot is of another moment
        scene.robot.gripper.current_action = moment.gripper.copy()
        probe._time_since_last_sample, probe._sampled = moment.clock
        self._seen, self._frames = moment.seen, (moment.seen.frame, moment.seen.wrist)

    def _last_frame(self) -> NDArray[np.uint8]:
        return self._seen.frame

    def close(self) -> None:
        """Free scenes and OpenGL contexts."""
        for eye in self._eyes.values():
            eye.close()
        for scene in self._scenes.values():
            scene.inner.close()
        self._eyes, self._scenes, self._start = {}, {}, None


def register() -> None:
    """Make `gymnasium.make(ID, suite=...)` known. Nothing is registered by import."""
    if ID not in gymnasium.registry:
        gymnasium.register(id=ID, entry_point=f"{__name__}:{Libero.__name__}")
