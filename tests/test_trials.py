"""Evaluation in a folder: protocols, processes, killed runs, pairs; LeRobot's policies behind their process; who can be evaluated at all.

Meant to find: a reflector's stop one observation late; a last chunk that runs past the limit; success
at the limit read at any time; a half-written line taken for an episode; an episode made twice; a worker that is given two episodes at once.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_directories import write_policy
from pusher import THRESHOLD, Onlooker, Pusher
from small_policy import SMALL, published_policy, statistics

from worldenv import checkpoint, evaluation, noise
from worldenv.cli import eval as command_line
from worldenv.cli import files
from worldenv.config import EnvConfig, to_dict
from worldenv.data.scenes import OneScene, Start
from worldenv.envs.contract import Snapshot
from worldenv.envs.offscreen import NoOpenGL
from worldenv.envs.tabletop import Tabletop
from worldenv.policy import weights as policies
from worldenv.policy.lerobot import LeRobotError, LeRobotPolicy
from worldenv.policy.lerobot_server import places
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.policy.processing import PromptTokenizer
from worldenv.presets import preset
from worldenv.robots.tabletop import TABLETOP
from worldenv.run import Run, RunError
from worldenv.trials import actors, runner
from worldenv.trials.actors import Bench, PolicyActor
from worldenv.trials.episode import Answer, Question, Trial, play
from worldenv.trials.runner import Evaluation, TrialError

CPU = torch.device("cpu")


def asked(**other: Any) -> Evaluation:
    settings = {
        "suite": "tabletop", "policy": "expert", "identity": "expert", "mode": "oracle", "episodes": 6, "tasks": (0, 1, 2), "limit": 32, "image": 64,
        "views": 0, "sampled": False, "seed": 7, "demonstrations": None, "reflector": None,
    }  # fmt: skip
    return Evaluation(**{**settings, **other})


def same(trial: Trial) -> dict[str, Any]:
    """What does not depend on the machine."""
    return {name: value for name, value in trial.plain().items() if "seconds" not in name}


# Protocols, on a world whose success is known


class Counter:
    """Succeeds at the observations in `held`; a frame is the number of its observation."""

    tasks = ("count",)

    def __init__(self, *held: int) -> None:
        self.held, self.commands, self.drawn = held, 0, []

    def _now(self) -> Snapshot:
        return Snapshot(np.full((2, 2, 3), self.commands, np.uint8), np.zeros(7), 0.0, self.commands in self.held)

    def begin(self, task: int, split: str, index: int) -> Snapshot:
        self.commands = 0
        return self._now()

    def advance(self, command: Any, render: bool = True) -> Snapshot:
        self.commands += 1
        self.drawn += [self.commands] if render else []
        return self._now()

    def state_hash(self, *state: Any) -> str:
        return "same"


def run_through(env: Counter, mode: str, limit: int, chunk: int, ends: int | None = None) -> tuple[Trial, list[Question]]:
    """Play with an actor of chunks of `chunk`, and a reflector that ends at observation `ends`."""
    questions: list[Question] = []
    game = play(env, Start(0, 0, "test", 0), mode, limit, None, 0, 0)  # type: ignore[arg-type]
    try:
        question = next(game)
        while True:
            questions.append(question)
            over = ends is not None and question.frames is not None and ends <= question.step
            command = None if over or question.last else np.zeros((chunk, 7), np.float32)
            question = game.send(Answer(command, ends if over else None))
    except StopIteration as stop:
        return stop.value, questions


@pytest.mark.parametrize(
    ("held", "mode", "ends", "success", "ended", "steps"),
    [
        ((3, 4), "oracle", None, True, 3, 3),
        ((0,), "oracle", None, True, 0, 0),
        ((10,), "oracle", None, True, 10, 10),
        ((), "oracle", None, False, 10, 10),
        ((3, 4), "limit", None, False, 10, 10),
        ((10,), "limit", None, True, 10, 10),
        ((3, 4), "reflector", 4, True, 4, 4),
        ((3, 4), "reflector", 3, True, 3, 4),
        ((3, 4), "reflector", 5, False, 5, 8),
        ((3, 10), "reflector", None, True, 10, 10),
        ((3, 9), "reflector", 9, True, 9, 10),
    ],
)
def test_protocols(held, mode, ends, success, ended, steps):
    """With chunks of 4 and a limit of 10: the last chunk is cut."""
    env = Counter(*held)
    trial, questions = run_through(env, mode, 10, 4, ends)
    assert (trial.success, trial.ended, trial.steps) == (success, ended, steps)
    assert trial.first_success == next((t for t in sorted(held) if t <= steps), None)
    asks = [step for step in (0, 4, 8, 10) if step < steps or (mode == "reflector" and step <= steps)]
    assert [question.step for question in questions] == asks
    if mode == "reflector":
        assert env.drawn == list(range(1, steps + 1))
        shown = np.concatenate([question.frames[:, 0, 0, 0] for question in questions if question.frames is not None])
        assert shown.tolist() == env.drawn
    else:
        assert env.drawn == [t for t in (4, 8, 10) if t <= steps]


class Fading:
    """A reflector that scores a frame by its first pixel, times a tenth; a watch is how many it has seen."""

    config = dataclasses.make_dataclass("Config", [("threshold", float)])(0.5)

    def begin(self, instruction: Any, frame: torch.Tensor) -> list[int]:
        return [0]

    def judge(self, watch: Any, frames: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        return frames[:, :, 0, 0, 0].float() / 10, [watch[0] + frames.shape[1]]


def test_a_judge_ends_an_episode_at_the_first_score_above_eta():
    actor = dataclasses.make_dataclass("Actor", [("views", int)])(1)
    actor.command = lambda question: np.zeros((4, 7), np.float32)
    bench = Bench(actor, Fading(), CPU)  # type: ignore[arg-type]
    trial = runner._drive(play(Counter(6, 7), Start(3, 0, "test", 0), "reflector", 10, None, 0, 0), bench.answer)  # type: ignore[arg-type]
    assert (trial.ended, trial.success, trial.steps) == (6, True, 8)  # 0.5 is not above
    assert not bench._watches


def test_an_actor_is_shown_the_fingers_that_it_was_trained_on_and_draws_by_episode_and_chunk():
    """A published policy reads each finger; ours reads the opening, half of it on either side. Frames and words are the question's."""
    seen: list[Any] = []

    class Policy:
        chunk = 4

        def act(self, observation: Any, uniform: Any = None) -> Any:
            seen.append((observation, uniform))
            return dataclasses.make_dataclass("Chunk", ["command"])(torch.arange(28.0).view(1, 4, 7))

    pose, fingers = np.array([0.1, 0.2, 0.3, 1.0, 0, 0, 0]), np.array([0.031, -0.012])
    now = Snapshot(np.full((2, 2, 3), 7, np.uint8), pose, 0.5, False, fingers)
    question = Question(3, 8, "count", now, None, False)
    for true_fingers, seed in ((True, None), (False, 5)):
        command = PolicyActor(Policy(), TABLETOP, CPU, 1, true_fingers, seed).command(question)  # type: ignore[arg-type]
        assert command.tolist() == np.arange(28.0).reshape(4, 7).tolist()
    (greedy, nothing), (drawn, uniform) = seen
    assert nothing is None
    assert np.array_equal(uniform[0], noise.uniform(5, 3, 2, 0, noise.Stream.POLICY, (4, 7)))
    assert greedy.instruction == drawn.instruction == ("count",)
    assert int(greedy.frame[0, 0, 0, 0]) == 7
    ours = TABLETOP.proprio(pose, 0.5)
    np.testing.assert_allclose(drawn.proprio[0], ours, atol=1e-7)
    np.testing.assert_allclose(greedy.proprio[0], [*ours[:6], *fingers], atol=1e-7)
    blind = PolicyActor(Policy(), TABLETOP, CPU, 2, False, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two views"):
        blind.command(question)


# Against the evaluation of the training pipeline, which runs many episodes side by side


@pytest.mark.parametrize("mode", ["oracle", "limit", "reflector"])
def test_agrees_with_the_pipelines_own_evaluation(mode, tmp_path):
    """A policy that pushes: some episodes succeed, some only for a while."""
    pusher = Pusher()
    judge = Onlooker() if mode == "reflector" else None
    bench = Bench(PolicyActor(pusher, TABLETOP, CPU, 1, False, None), judge, CPU)  # type: ignore[arg-type]
    want = asked(policy="pusher", mode=mode, episodes=9, views=1)
    runner.evaluate(want, tmp_path / "e", 1, [bench])
    env = Tabletop(EnvConfig(image=64))
    outcomes = evaluation.evaluate(pusher, OneScene(env), want.starts(), 32, [judge] if judge else (), THRESHOLD, CPU)  # type: ignore[list-item]
    found = runner.read_trials(tmp_path / "e")
    made = {trial.number: trial for trial in found}
    assert [made[n].success for n in range(9)] == outcomes.by(mode).tolist()
    if judge is not None:
        assert [made[n].ended for n in range(9)] == outcomes.ends().tolist()
        assert sum(made[n].ended < 32 for n in range(9)) > 0
    assert {trial.state for trial in found} == {env.state_hash(0, "test", i) for i in range(3)}
    assert any(trial.success for trial in found)


# The folder


@pytest.mark.slow
def test_a_killed_run_goes_on_and_processes_change_nothing(tmp_path):
    reference = runner.evaluate(asked(episodes=12), tmp_path / "reference", 1, ())
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "worldenv.cli.eval", "run", "--policy", "expert", "--suite", "tabletop", "--episodes", "12", "--out", str(out)]
    process = subprocess.Popen([*command, "--processes", "2"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    lines = out / "episodes.jsonl"
    limit = time.monotonic() + 300
    while not (lines.is_file() and len(lines.read_text().splitlines()) >= 2) and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(runner.read_trials(out))
    assert kept >= 2
    with lines.open("a") as file:
        file.write('{"number": 11, "task"')  # the kill may cut a line
    assert len(runner.read_trials(out)) == kept
    found = runner.evaluate(asked(episodes=12), out, 1, ())
    trials = [sorted(map(json.dumps, map(same, runner.read_trials(tmp_path / name)))) for name in ("reference", "killed")]
    assert trials[0] == trials[1]
    assert len(trials[0]) == 12
    fixed = ("suite", "policy", "mode", "episodes", "successes", "interval", "limits", "tasks", "states", "renderer", "versions")
    assert {name: found[name] for name in fixed} == {name: reference[name] for name in fixed}
    again = runner.evaluate(asked(episodes=12), out, 2, ())  # nothing is left to do
    assert again == found


def test_result_says_what_it_depends_on(tmp_path, capsys):
    run = ["run", "--policy", "expert", "--suite", "tabletop", "--episodes", "3", "--tasks", "0", "2"]
    code = command_line.main([*run, "--out", str(tmp_path / "e")])
    said = capsys.readouterr().out.splitlines()
    assert code == 0
    found = json.loads(said[-1])
    assert found == json.loads((tmp_path / "e" / "result.json").read_text())
    assert {"suite", "policy", "mode", "episodes", "successes", "interval", "limits", "tasks"} <= found.keys()
    assert (found["episodes"], [row["episodes"] for row in found["tasks"]]) == (3, [2, 1])
    assert found["left_out"] == ["push the blue puck onto the green strip"]
    assert found["limits"] == {"steps": 32, "settle_steps": 0}
    assert (found["sampling"], found["views"], found["demonstrations_per_task"]) == ("scripted", 0, None)
    assert isinstance(found["renderer"], str)
    assert found["renderer"]
    assert {"mujoco", "numpy", "torch", "python"} <= found["versions"].keys()
    low, high = evaluation.wilson(found["successes"], 3)
    assert found["interval"] == [round(low, 4), round(high, 4)]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda out: (out / "eval.json").write_text(json.dumps({**json.loads((out / "eval.json").read_text()), "limit": 30})), "limit: 30 there, 32"),
        (lambda out: (out / "versions.json").write_text('{"mujoco": "2.3.7"}'), "mujoco 2.3.7, here 3"),
        (lambda out: (out / "episodes.jsonl").write_text('{"number": 0}\n'), "episodes.jsonl: damaged"),
    ],
)
def test_a_folder_of_something_else_is_refused(damage, why, tmp_path):
    runner.evaluate(asked(episodes=3), tmp_path / "e", 1, ())
    (tmp_path / "e" / "episodes.jsonl").write_text("".join((tmp_path / "e" / "episodes.jsonl").read_text().splitlines(keepends=True)[:2]))
    damage(tmp_path / "e")
    before = (tmp_path / "e" / "episodes.jsonl").read_bytes()
    with pytest.raises(RunError, match=why):
        runner.evaluate(asked(episodes=3), tmp_path / "e", 1, ())
    assert (tmp_path / "e" / "episodes.jsonl").read_bytes() == before


@pytest.mark.parametrize("left", [b"", b'{"suite": "table', b"[]", b"null", b"{}", b"\xff\xfe\x00"])
@pytest.mark.parametrize("name", ["eval.json", "versions.json", "episodes.jsonl"])
def test_a_damaged_file_is_one_line_that_names_it(name, left, tmp_path, capsys):
    if (name, left) == ("episodes.jsonl", b""):
        return  # nothing was finished
    out = tmp_path / "e"
    runner.evaluate(asked(episodes=3), out, 1, ())
    whole = (out / "episodes.jsonl").read_bytes()
    left += b"\n" if name == "episodes.jsonl" else b""
    (out / name).write_bytes(left)
    refused = (RunError, checkpoint.CheckpointError)
    with pytest.raises(refused, match=rf"{re.escape(str(out))}.*choose another --out"):
        runner.evaluate(asked(episodes=4), out, 1, ())
    assert name == "episodes.jsonl" or (out / "episodes.jsonl").read_bytes() == whole
    if name == "eval.json":
        with pytest.raises(refused, match=r"eval\.json: "):
            runner.compare(out, out)


def test_a_run_whose_later_stage_is_not_finished_is_not_evaluated_for_it(tmp_path):
    """Else the policy from before LOOP would pass for the one after it."""
    (tmp_path / "run.json").write_text(json.dumps({"settings": to_dict(preset("tiny"))}))
    files = {stage: tmp_path / "stages" / stage / "policy.safetensors" for stage in ("sft", "scale", "loop")}
    with pytest.raises(ValueError, match="no policy yet"):
        actors.locate(str(tmp_path))
    for stage in ("sft", "scale"):
        files[stage].parent.mkdir(parents=True)
        files[stage].write_bytes(stage.encode())
        assert actors.locate(str(tmp_path)) == files[stage], "the latest, where no later stage was begun"
    files["loop"].parent.mkdir()
    with pytest.raises(ValueError, match=rf"stage loop is not finished; --resume it, or give .*: {re.escape(str(files['scale']))}"):
        actors.locate(str(tmp_path))
    assert actors.locate(str(files["scale"])) == files["scale"]
    files["loop"].write_bytes(b"loop")
    assert actors.weights_of(str(tmp_path)) == files["loop"]
    assert actors.weights_of("expert") is None
    assert actors.weights_of("lerobot:somewhere") is None


def test_a_folder_in_which_nothing_was_finished_is_taken_over(tmp_path, monkeypatch):
    """A command that could not begin (a mistyped suite, no renderer) must not bar its folder to the right one."""
    def broken(*_):
        raise NoOpenGL("no picture here")

    with monkeypatch.context() as patch:
        patch.setattr(runner.Evaluation, "open", broken)
        with pytest.raises(NoOpenGL):
            runner.evaluate(asked(episodes=3, seed=1), tmp_path / "e", 1, ())
    assert runner.evaluate(asked(episodes=2), tmp_path / "e", 1, ())["episodes"] == 2
    assert json.loads((tmp_path / "e" / "eval.json").read_text())["seed"] == 7


def test_files_of_somebody_are_refused(tmp_path):
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(RunError, match="no evaluation of ours"):
        runner.evaluate(asked(), tmp_path, 1, ())


@pytest.mark.slow
def test_a_process_that_cannot_begin_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLDENV_LIBERO_ASSETS", str(tmp_path / "nowhere"))
    with pytest.raises(TrialError, match=r"LiberoMissing: (LIBERO is not installed|WORLDENV_LIBERO_ASSETS=.*nowhere: no such folder)"):
        runner.evaluate(asked(suite="libero_spatial"), tmp_path / "e", 2, ())


# Pairs


def _stored(out: Path, success: list[bool], **other: Any) -> Path:
    out.mkdir()
    settings = asked(episodes=len(success), **other)
    (out / "eval.json").write_text(json.dumps(settings.plain()))
    rows = [Trial(s.number, s.task, "test", s.index, f"state {s.index}", good, None, 9, 9, 1.0, 1.0) for s, good in zip(settings.starts(), success)]  # noqa: B905
    (out / "episodes.jsonl").write_text("".join(json.dumps(row.plain()) + "\n" for row in rows))
    return out


def test_processes_end_without_a_word_where_another_has_failed(capfd):
    workers = runner._Workers(asked(policy="somebody", mode="limit"), 1)
    (pipe,) = workers.processes
    pipe.send(Start(0, 0, "test", 0))
    assert pipe.recv()[0] == "question"
    workers.close()
    assert capfd.readouterr().err == ""


def test_two_who_answer_are_asked_by_their_processes_alone(tmp_path):
    """As on two GPUs: each answers whole episodes, a judge sees each from its beginning, and the result is that of one."""
    want = asked(policy="pusher", mode="reflector", episodes=9, views=1)

    def bench() -> Bench:
        return Bench(PolicyActor(Pusher(), TABLETOP, CPU, 1, False, None), Onlooker(), CPU)  # type: ignore[arg-type]

    one, two = bench(), [bench(), bench()]
    alone = runner.evaluate(want, tmp_path / "one", 1, [one])
    shared = runner.evaluate(want, tmp_path / "two", 2, two)
    fixed = ("episodes", "successes", "interval", "tasks", "states")
    assert {name: shared[name] for name in fixed} == {name: alone[name] for name in fixed}
    by_number = [sorted(map(same, runner.read_trials(tmp_path / name)), key=lambda trial: trial["number"]) for name in ("one", "two")]
    assert by_number[0] == by_number[1]
    counts = [len(each.actor.policy.batches) for each in (one, *two)]  # type: ignore[attr-defined]
    assert counts[0] == sum(counts[1:])
    assert min(counts[1:]) > 0


def test_who_cannot_answer_ends_the_evaluation(tmp_path):
    class Blind:
        device = CPU

        def answer(self, question):
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        runner.evaluate(asked(policy="somebody", mode="limit", episodes=3, views=1), tmp_path / "e", 2, [Blind()])  # type: ignore[list-item]
    assert not multiprocessing.active_children()


def test_a_process_that_dies_while_it_is_answered_is_named():
    class Deadly:
        device = CPU

        def answer(self, question):
            (victim,) = multiprocessing.active_children()
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            return Answer(np.zeros((8, 7), np.float32), None)

    want = asked(policy="somebody", mode="limit", episodes=1)
    with pytest.raises(TrialError, match=r"^task 0, state 0: its process died \(exit code -9\); the same command goes on from here$"):
        next(runner._together(want, want.starts(), [Deadly()], 1))  # type: ignore[arg-type]


def test_compare(tmp_path, capsys):
    left = _stored(tmp_path / "a", [True, False, False, False, True, False, False])
    right = _stored(tmp_path / "b", [True, True, True, False, False, True], policy="other")
    assert command_line.main(["compare", str(left), str(right)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["pairs"], found["unpaired"], found["wins"], found["losses"]) == (6, 1, 3, 1)
    assert found["p_value"] == evaluation.mcnemar(3, 1)
    assert found["difference"] == pytest.approx(2 / 6)
    assert (found["left"]["successes"], found["right"]["successes"]) == (2, 4)


def test_compare_wants_the_same_states(tmp_path):
    left, right = _stored(tmp_path / "a", [True] * 3), _stored(tmp_path / "b", [True] * 3)
    path = right / "episodes.jsonl"
    path.write_text(path.read_text().replace("state 0", "another", 1))
    with pytest.raises(RunError, match="task 0, state 0 is not the same"):
        runner.compare(left, right)
    other = _stored(tmp_path / "c", [True] * 3, mode="limit")
    with pytest.raises(RunError, match="mode: oracle and limit"):
        runner.compare(left, other)


# LeRobot, with a package of its name that stands in for it


def _lerobot(folder: Path, config: str = "") -> str:
    """A package `lerobot` in `folder`, with the entry points that the server uses as LeRobot 0.4 has them, and a policy directory; its path."""
    for name in ("configs", "policies"):
        (folder / "lerobot" / name).mkdir(parents=True)
        (folder / "lerobot" / name / "__init__.py").touch()
    (folder / "lerobot" / "__init__.py").touch()
    (folder / "lerobot" / "configs" / "policies.py").write_text(textwrap.dedent(f"""
        class Feature:
            def __init__(self, *shape): self.shape = shape
        class PreTrainedConfig:
            type, n_action_steps, n_obs_steps = "standin", 3, 1
            input_features = {{"observation.images.image": Feature(3, 8, 8), "observation.images.image2": Feature(3, 8, 8),
                              "observation.images.empty_camera_0": Feature(3, 8, 8), "observation.state": Feature(8)}}
            @classmethod
            def from_pretrained(cls, path):
                self = cls(); self.path = path
                {config or "pass"}
                return self
    """))
    (folder / "lerobot" / "policies" / "factory.py").write_text(textwrap.dedent("""
        import torch
        from collections import deque
        print("chatter that must not reach the pipe")
        class Policy:
            def __init__(self, config): self.config, self.queue = config, deque()
            @classmethod
            def from_pretrained(cls, path, config): return cls(config)
            def to(self, device): return self
            def eval(self): return self
            def reset(self): self.queue.clear()
            def select_action(self, batch):
                assert batch["ready"] and batch["observation.state"].shape == (1, 8)
                if "die" in batch["task"][0]:
                    import os; os._exit(7)
                if "fail" in batch["task"][0]:
                    raise RuntimeError("no such task")
                if not self.queue:
                    seen = [batch[f"observation.images.{name}"][0, c].mean() for name in ("image", "image2")
                            for c in (0, 2) if f"observation.images.{name}" in batch]
                    for k in range(self.config.n_action_steps):
                        self.queue.append(torch.tensor([[*seen, *[0.0] * (4 - len(seen)), batch["observation.state"][0, 0], k / 10, 1.0]]))
                return self.queue.popleft()
        def get_policy_class(name):
            assert name == "standin"
            return Policy
        def make_pre_post_processors(config, pretrained_path, preprocessor_overrides):
            assert preprocessor_overrides == {"device_processor": {"device": "cpu"}}
            def before(observation): return {**observation, "ready": True}
            def after(action): return action * 2
            return before, after
    """))
    return str(folder / "policy")


@pytest.fixture
def lerobot(tmp_path, monkeypatch):
    def make(config: str = "") -> str:
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return _lerobot(tmp_path, config)

    return make


def test_a_lerobot_policy_answers_from_its_own_process(lerobot):
    policy = LeRobotPolicy(lerobot(), sys.executable, "cpu")
    try:
        assert (policy.kind, policy.chunk, policy.views) == ("standin", 3, 2)
        frame, wrist = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
        frame[..., 0], wrist[..., 2] = 51, 102
        for state in (0.25, -0.5):  # no question depends on the one before
            answer = policy.commands("pick", frame, wrist, np.full(8, state, np.float32))
            want = [[2 * one for one in (0.2, 0.0, 0.0, 0.4, state, k / 10, 1.0)] for k in range(3)]
            np.testing.assert_allclose(answer, want, rtol=1e-6)
        with pytest.raises(LeRobotError, match="RuntimeError: no such task"):
            policy.commands("fail", frame, wrist, np.zeros(8, np.float32))
        policy.commands("pick", frame, wrist, np.zeros(8, np.float32))  # it is still there
        with pytest.raises(LeRobotError, match=r"ended \(exit code 7\)"):
            policy.commands("die", frame, wrist, np.zeros(8, np.float32))
    finally:
        policy.close()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("self.n_obs_steps = 2", "n_obs_steps=2"),
        ('del self.input_features["observation.images.image"], self.input_features["observation.images.image2"]', r"views \[\]: want"),
        ('self.input_features["observation.state"] = Feature(14)', "a state of 8"),
        ("self.temporal_ensemble_coeff = 0.01", "temporal_ensemble_coeff"),
    ],
)
def test_a_lerobot_policy_that_cannot_be_asked_is_one_error(config, why, lerobot):
    with pytest.raises(LeRobotError, match=why):
        LeRobotPolicy(lerobot(config), sys.executable, "cpu")


def test_a_lerobot_policys_views_are_told_apart_by_name():
    full = "observation.images.".__add__
    assert places([full("wrist_image"), full("image")]) == {full("image"): "frame", full("wrist_image"): "wrist"}
    assert places([full("image2"), full("image")]) == {full("image"): "frame", full("image2"): "wrist"}
    assert places([full("camera1"), full("camera2")]) == {full("camera1"): "frame", full("camera2"): "wrist"}
    assert places([full("base_0_rgb"), full("left_wrist_0_rgb")]) == {full("base_0_rgb"): "frame", full("left_wrist_0_rgb"): "wrist"}
    assert places([full("top")]) == {full("top"): "frame"}
    assert places([full("hand_camera")]) == {full("hand_camera"): "wrist"}
    for names in (["front", "side"], ["left_wrist", "right_wrist"], ["a", "b", "wrist"]):
        with pytest.raises(ValueError, match=r"one of the scene, one of the wrist"):
            places([full(name) for name in names])


def test_a_lerobot_policy_is_evaluated(lerobot, tmp_path, capsys):
    path = lerobot('del self.input_features["observation.images.image2"]')
    run = ["run", "--policy", f"lerobot:{path}", "--suite", "tabletop", "--episodes", "2", "--out", str(tmp_path / "e"), "--demonstrations", "50"]
    assert command_line.main([*run, "--python", sys.executable]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["episodes"], found["views"], found["demonstrations_per_task"], found["sampling"]) == (2, 1, 50, "greedy")
    assert [trial.steps for trial in runner.read_trials(tmp_path / "e")] == [32, 32]


# Who and what


def test_a_checkpoint_is_evaluated_and_knows_its_file(tmp_path, capsys):
    path, out = tmp_path / "policy.safetensors", tmp_path / "e"

    def write(seed: int) -> None:
        words = PromptTokenizer.build(Tabletop(EnvConfig()).tasks)
        policies.save(path, OpenVLAOFT.create(SMALL, words, statistics(), seed, CPU))

    write(0)
    run = ["run", "--policy", str(path), "--suite", "tabletop", "--episodes", "2", "--out", str(out)]
    assert command_line.main(run) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["identity"] == checkpoint.file_hash(path)
    assert (found["views"], found["sampling"]) == (1, "greedy")
    write(1)
    assert command_line.main(run) == 2  # another policy, the same folder
    assert "identity" in capsys.readouterr().err
    drawn = [*run[:-1], str(tmp_path / "drawn"), "--sample", "--seed", "3"]
    assert command_line.main(drawn) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sampling"] == "sampled, seed 3"


def test_a_published_directory_of_several_suites_is_evaluated_and_its_content_is_who_it_is(tmp_path, capsys):
    oft = tmp_path / "oft"
    write_policy(oft, published_policy(instructions=Tabletop(EnvConfig()).tasks), 7)
    (stated,) = json.loads((oft / "dataset_statistics.json").read_text()).values()
    suites = dict.fromkeys(("libero_goal_no_noops", "libero_spatial_no_noops"), stated)
    (oft / "dataset_statistics.json").write_text(json.dumps(suites))
    assert command_line._directory(command_line.RunArgs(str(oft)), "libero_goal").dataset == "libero_goal_no_noops"
    run = ["run", "--policy", str(oft), "--suite", "tabletop", "--views", "1", "--tasks", "0", "--episodes", "1", "--out", str(tmp_path / "e")]
    assert command_line.main(run) == 2
    assert "say which data set (--dataset" in capsys.readouterr().err
    run += ["--dataset", "libero_goal_no_noops"]
    assert command_line.main(run) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["successes"] in (0, 1)
    assert command_line.main(run) == 0, "it goes on"
    assert command_line.main([*run[:-1], "libero_spatial_no_noops"]) == 2
    assert "identity" in capsys.readouterr().err
    head = oft / "action_head--7_checkpoint.pt"
    (oft / "action_head--8_checkpoint.pt").write_bytes(head.read_bytes())
    elsewhere = [*run, "--out", str(tmp_path / "f")]
    assert command_line.main(elsewhere) == 2
    assert "say which (--step" in capsys.readouterr().err
    assert command_line.main([*elsewhere, "--step", "7"]) == 0
    (oft / "action_head--8_checkpoint.pt").unlink()
    assert command_line.main(run) == 0
    changed = torch.load(head, weights_only=True)
    changed["module.model.fc2.bias"] += 0.01  # in place, as large as before
    torch.save(changed, head)
    capsys.readouterr()
    assert command_line.main(run) == 2
    assert "identity" in capsys.readouterr().err


def test_every_point_of_a_curve_is_run_as_asked(tmp_path, capsys, monkeypatch):
    """The policy that LOOP starts from, then its copies, each in a folder of its own."""
    Run(tmp_path, preset("tiny"))
    (tmp_path / "stages" / "loop").mkdir(parents=True)
    for name in ("policy-0005", "policy-0010", "policy"):
        (tmp_path / "stages" / "loop" / f"{name}.safetensors").touch()
    asked, found = [], {"episodes": 2, "successes": 1, "interval": [0.0, 1.0], "tasks": []}
    monkeypatch.setattr(command_line, "_evaluate", lambda args: asked.append(args) or found)
    words = ["curve", str(tmp_path), "--suite", "tabletop", "--episodes", "2", "--out", str(tmp_path / "c"), "--engines.back-end", "onnxruntime"]
    assert command_line.main(words) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["curve"]] == [0, 5, 10]
    names = ["scale/policy", "loop/policy-0005", "loop/policy-0010"]
    assert [one.policy for one in asked] == [str(tmp_path / "stages" / f"{name}.safetensors") for name in names]
    assert [one.out.name for one in asked] == ["step-0000", "step-0005", "step-0010"]
    assert {(one.suite, one.episodes, one.engines.back_end) for one in asked} == {("tabletop", 2, "onnxruntime")}


def test_a_policy_runs_by_an_engine_where_that_is_asked_for(tmp_path, capsys, monkeypatch):
    """Its actions are eager's to rounding; the result and the folder say what ran it, and the folder is of this choice alone."""
    path, words = tmp_path / "policy.safetensors", PromptTokenizer.build(Tabletop(EnvConfig()).tasks)
    policies.save(path, OpenVLAOFT.create(SMALL, words, statistics(), 0, CPU))
    asked_by, commands, answer = [], [], Bench.answer

    def watched(bench: Bench, question: Question) -> Answer:
        given = answer(bench, question)
        asked_by.append({name: getattr(call, "engine", call).__class__.__name__ for name, call in bench.actor.policy.runs.items()})  # type: ignore[attr-defined]
        commands.append(given.command)
        return given

    monkeypatch.setattr(Bench, "answer", watched)
    run = ["run", "--policy", str(path), "--suite", "tabletop", "--tasks", "0", "--episodes", "1", "--out", str(tmp_path / "e")]
    assert command_line.main([*run, "--engines.back-end", "onnxruntime"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["engines"] == {"policy_backbone": "onnxruntime", "policy_heads": "onnxruntime"}
    assert json.loads((tmp_path / "e" / "engines.json").read_text()) == found["engines"]
    assert (tmp_path / "engines").is_dir()
    assert set(asked_by[-1].values()) == {"OnnxRuntime"}
    assert "OnnxRuntime" not in asked_by[0].values()
    ours = [one for one in commands[-4:] if one is not None]
    assert command_line.main(run) == 2  # eager, in the folder of an engine's evaluation
    assert "engines" in capsys.readouterr().err
    commands.clear()
    assert command_line.main([*run[:-1], str(tmp_path / "eager")]) == 0
    assert "engines" not in json.loads(capsys.readouterr().out.splitlines()[-1])
    theirs = [one for one in commands[-4:] if one is not None]
    assert len(ours) == len(theirs) == 4
    for mine, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, want, atol=1e-4)


def test_a_run_says_what_its_policy_was_trained_on(tmp_path, capsys):
    """Its latest policy, its environment's pictures, limit and tasks, its demonstrations and its reflector."""
    settings = preset("tiny")
    env = dataclasses.replace(settings.env, image=48, steps=24, test_states=9)
    demos, episodes = dataclasses.replace(settings.demos, per_task=4), dataclasses.replace(settings.eval, episodes=27)
    simulator = dataclasses.replace(settings.simulator, height=48, width=48)
    settings = dataclasses.replace(settings, env=env, demos=demos, eval=episodes, simulator=simulator)
    (tmp_path / "run.json").write_text(json.dumps({"settings": to_dict(settings)}))
    for stage, name in (("sft", "policy"), ("loop", "policy"), ("reward", "reflector")):
        (tmp_path / "stages" / stage).mkdir(parents=True)
        (tmp_path / "stages" / stage / f"{name}.safetensors").write_text(stage)
    asked_for = command_line.RunArgs(str(tmp_path), "tabletop", "reflector")
    with pytest.raises(ValueError, match="--episodes 150: there are 9 test states"):
        command_line._evaluation(asked_for)
    with pytest.raises(ValueError, match=r"--demonstrations 50: the run of .* knows its own"):
        command_line._evaluation(dataclasses.replace(asked_for, episodes=27, demonstrations=50))
    found, judge = command_line._evaluation(dataclasses.replace(asked_for, episodes=27))
    assert (found.image, found.limit, found.demonstrations, found.env) == (48, 24, 4, env)
    assert found.identity == checkpoint.file_hash(tmp_path / "stages" / "loop" / "policy.safetensors")
    assert judge == tmp_path / "stages" / "reward" / "reflector.safetensors"
    assert found.reflector == checkpoint.file_hash(judge)
    assert capsys.readouterr().err == ""
    assert command_line._evaluation(command_line.RunArgs(str(tmp_path), episodes=27))[0].suite == "tabletop"
    assert command_line.main(["curve", str(tmp_path), "--episodes", "2"]) == 2
    assert "no copies of the policy (stages/loop/policy-*.safetensors)" in capsys.readouterr().err
    (tmp_path / "stages" / "loop").rename(tmp_path / "stages" / "noloop")
    assert command_line.main(["curve", str(tmp_path), "--episodes", "2"]) == 2
    assert "stage loop, which keeps the copies of the policy, has not begun" in capsys.readouterr().err
    (tmp_path / "stages" / "noloop").rename(tmp_path / "stages" / "loop")
    elsewhere, _ = command_line._evaluation(command_line.RunArgs(str(tmp_path), "libero_goal"))
    assert capsys.readouterr().err == f"{tmp_path} is of a run in tabletop, and is evaluated in libero_goal\n"
    assert (elsewhere.image, elsewhere.limit, elsewhere.episodes, elsewhere.env) == (256, 300, 500, None)


EXPERT = ["run", "--policy", "expert", "--suite", "tabletop"]
INSPECT = ["inspect", "--suite", "tabletop", "--task", "0", "--out", "x.npz"]


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["run"], "--policy: say whom"),
        (["walk"], "unknown command 'walk'"),
        (["run", "--policy", "nobody", "--suite", "tabletop"], "--policy nobody: no such checkpoint"),
        (["run", "--policy", "univla:x"], "univla: not built in"),
        (["run", "--policy", "lerobot:x", "--suite", "tabletop"], "wants --python"),
        (["run", "--policy", "lerobot:x", "--suite", "tabletop", "--python", "/no/python"], "--python /no/python: cannot be run"),
        (["run", "--policy", "expert", "--suite", "tabletop", "--mode", "reflector"], "neither watched nor sampled"),
        (["run", "--policy", "expert", "--suite", "tabletop", "--episodes", "601"], "give 1 .. 600"),
        (["run", "--policy", "expert", "--suite", "tabletop", "--tasks", "3"], "--tasks 3"),
        (["run", "--policy", "expert", "--suite", "libero_90"], "libero_90"),
        (["run", "--policy", "expert", "--suite", "tabletop", "--engines.back-end", "auto"], "runs no network here that an engine could"),
        (["run", "--policy", "lerobot:x", "--engines.back-end", "onnxruntime"], "runs no network here that an engine could"),
        (["run", "--policy", "expert", "--engines.back-end", "onxruntime"], "did you mean 'onnxruntime'"),
        (["run", "--polcy", "expert"], "did you mean '--policy'"),
        (["compare", "no", "where"], "no: no evaluation there"),
        (["run", "--policy", "expert", "--suite", "tabletop", "--image", "-3"], "--image -3: want at least 1 px"),
        (["curve", "nowhere"], "nowhere: no run there (no run.json); start one: worldenv-train --out nowhere"),
        (["audit", "nowhere"], "nowhere: no run there (no run.json); start one: worldenv-train --out nowhere"),
        ([*EXPERT, "--device", "cpu"], "an expert runs no network; leave them out"),
        ([*EXPERT, "--gpus", "2"], "an expert runs no network; leave them out"),
        ([*EXPERT, "--gpus", "-1"], "--gpus -1: want a count"),
        ([*EXPERT, "--seed", "-4"], "--seed -4: want 0 .. 4294967295"),
        (["run", "--policy", "bad.json", "--suite", "tabletop"], "bad.json: truncated or damaged"),
        (["curve"], "run"),
        (["curve", "nowhere", "--episode", "2"], "did you mean '--episodes'"),
        (["inspect", "--suite", "tabletop", "--task", "one", "--actions", "a.npy", "--out", "x.npz"], "--task 'one': want a whole number"),
        ([*EXPERT, "--python", "/usr/bin/python3"], "--python /usr/bin/python3: is for lerobot:PATH"),
        ([*EXPERT, "--views", "2"], "--views 2: is for an OpenVLA-OFT directory"),
        ([*EXPERT, "--demonstrations", "50"], "--demonstrations 50: an expert is trained on none"),
        ([*EXPERT, "--reflector", "r.safetensors"], "--reflector r.safetensors: is for --mode reflector"),
        (["run", "--policy", "a.npy", "--suite", "tabletop", "--views", "1"], "--views 1: is for an OpenVLA-OFT directory; a.npy knows its own"),
        (["run", "--policy", "a.npy", "--suite", "tabletop", "--dataset", "x"], "--dataset x: is for an OpenVLA-OFT directory; a.npy knows its own"),
        ([*EXPERT, "--step", "7"], "--step 7: is for an OpenVLA-OFT directory"),
        (["run", "--policy", "a.npy", "--suite", "tabletop", "--python", "p"], "--python p: is for lerobot:PATH"),
        (["run", "--policy", "a.npy", "--suite", "tabletop", "--demonstrations", "-1"], "--demonstrations -1: want a count"),
        (["run", "--policy", "lerobot:x", "--suite", "tabletop", "--views", "1"], "--views 1: is for an OpenVLA-OFT directory"),
        (["run", "--policy", "oft", "--suite", "tabletop", "--views", "3"], "--views 3: want 1, or 2"),
        ([*INSPECT, "--actions", "gone.npy"], "--actions gone.npy: no such file"),
        ([*INSPECT, "--actions", "nan.npy"], "--actions nan.npy: value at (1, 3) is not finite"),
        ([*INSPECT, "--actions", "four.npy"], "--actions four.npy: row 2, column 6 is 4, want commands in -1 .. 1"),
        ([*INSPECT, "--actions", "none.npy"], "--actions none.npy: (0, 7), want at least one command"),
        ([*INSPECT, "--actions", "empty.npy"], "--actions empty.npy: not an .npy file"),
        ([*INSPECT, "--actions", "several.npz"], "--actions several.npz: want one array"),
        ([*INSPECT, "--actions", "a.npy", "--image", "0"], "--image 0: want at least 1 px"),
        ([*INSPECT, "--actions", "a.npy", "--image", "-1"], "--image -1: want at least 1 px"),
        ([*INSPECT[:-1], "mine.npz", "--actions", "a.npy"], "--out mine.npz exists; --force overwrites it"),
        ([*INSPECT[:-1], "oft.npz", "--actions", "a.npy"], "--out oft.npz: a folder"),
        ([*INSPECT[:-1], "a.npy/x.npz", "--actions", "a.npy"], "a.npy is no folder that can be written to"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(argv, why, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    actions = {name: np.zeros((4, 7), np.float32) for name in ("a", "nan", "four")}
    actions["nan"][1, 3], actions["four"][2, 6], actions["none"] = np.nan, 4, np.zeros((0, 7))
    for name, array in actions.items():
        np.save(f"{name}.npy", array)
    np.savez("several.npz", **actions)
    Path("empty.npy").touch()
    Path("bad.json").write_text("{}")
    Path("mine.npz").write_text("mine")
    for name in ("oft", "oft.npz"):
        Path(name).mkdir()
    assert command_line.main(argv) in (1, 2)
    said = capsys.readouterr().err.strip()
    assert why in said
    assert "\n" not in said
    assert "delete" not in said  # files of the user's own
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "x.npz").exists()
    assert (tmp_path / "mine.npz").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "No space left on device; free space there; the same command then goes on from here"),
        (errno.EACCES, "Permission denied; choose another --out, that can be written to"),
    ],
)
def test_a_disk_that_refuses_is_one_line_with_the_cure(number, cure, capsys, tmp_path, monkeypatch):
    """After the first episode; what is finished stays."""
    out, opened = tmp_path / "e", Path.open

    def refusing(path, mode="r", *args, **more):
        if mode == "a" and len(runner.read_trials(out)) == 1:
            raise OSError(number, os.strerror(number), *([str(path)] if number == errno.EACCES else []))
        return opened(path, mode, *args, **more)

    run = [*EXPERT, "--episodes", "3", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refusing)
        assert command_line.main(run) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"worldenv-eval: --out {out}: {cure}"
    assert len(runner.read_trials(out)) == 1
    assert command_line.main(run) == 0


def test_a_file_that_is_not_the_evaluations_is_not_blamed_on_it(tmp_path):
    with pytest.raises(PermissionError, match="policy"), files.written(tmp_path / "runs" / "e"):
        raise PermissionError(errno.EACCES, "Permission denied", "/models/policy")


def test_inspect_of_the_tabletop(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((5, 7), np.float32))
    out = tmp_path / "x.npz"
    run = ["inspect", "--suite", "tabletop", "--task", "1", "--init", "2", "--actions", str(tmp_path / "a.npy"), "--out", str(out)]
    assert command_line.main(run) == 0
    found = np.load(out)
    env = Tabletop(EnvConfig())
    now = env.begin(1, "test", 2)
    np.testing.assert_array_equal(found["frames"][0], now.frame)
    np.testing.assert_array_equal(found["initial_state"], env.sim_state)
    assert found["state_path"].shape[0] == found["gripper_uv"].shape[0] == len(found["success"]) == 6
    assert str(found["state_hash"]) == json.loads(capsys.readouterr().out.splitlines()[-1])["state"] == env.state_hash(1, "test", 2)
    assert command_line.main([*run[:-1], str(tmp_path / "x.txt")]) == 2
    assert command_line.main(run) == 2
    assert command_line.main([*run, "--force"]) == 0
    np.save(tmp_path / "a.npy", np.zeros((5, 6), np.float32))
    assert command_line.main([*run, "--force"]) == 2
