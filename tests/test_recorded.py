"""Runs from what a robot was recorded doing, without an environment: the tabletop's episodes serve as such recordings (docs/own-robot.md).

Wrong versions that were seen to fail here: held-out recordings among LOOP's starts; held out from all tasks at once; demonstrations explored twice,
and so held out from what is learned; the place of the recordings in place of their content deciding what is done again; changed recordings done
again in silence; the first task's camera for all; tasks of two hands; signs of quaternions as they come; pictures flipped, or not, by another
rule for a camera that was given; a ragged episode's PSNR over chunks that it lacks.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data_formats import strip_ours
from test_given import written

from worldenv import audit, checkpoint, presets, report, train
from worldenv.checkpoint import CheckpointError
from worldenv.cli import convert as convert_command
from worldenv.cli import eval as eval_command
from worldenv.cli import train as command
from worldenv.config import DemosConfig, EnvConfig, RunConfig
from worldenv.data import convert, given, in_view, lerobot, recorded
from worldenv.data.episode import Episode, EpisodeSet, camera_to_plain, read_camera, save
from worldenv.data.recorded import Recorded
from worldenv.kinematics import fit
from worldenv.presets import TINY
from worldenv.report import tables
from worldenv.robots.named import named
from worldenv.robots.tabletop import TABLETOP
from worldenv.run import Run, RunError, settings_of
from worldenv.stages import evaluate, world
from worldenv.stages.desk import Desk, open_env
from worldenv.stages.loop import contexts_of
from worldenv.stages.replay import replay
from worldenv.stages.vector_env import vector_env


def short(env: EnvConfig, explored: str = "") -> RunConfig:
    """The tiny preset with every stage cut to a few steps, in `env`."""
    one = presets.fast(TINY)
    return dataclasses.replace(
        one,
        device="cpu",
        env=env,
        demos=dataclasses.replace(one.demos, per_task=2),
        sft=dataclasses.replace(one.sft, steps=2, prior_steps=0),
        scale=dataclasses.replace(one.scale, steps=2),
        explore=dataclasses.replace(one.explore, source=explored, episodes=9, held_out=0.3),
        world=dataclasses.replace(one.world, vae_steps=2, steps=2, batch=2, check_every=2, held_out_clips=2),
        reward=dataclasses.replace(one.reward, backbone_steps=2, embeddings=24, head_epochs=1),
        loop=dataclasses.replace(one.loop, contexts=3, iterations=1, batch=6),
        eval=dataclasses.replace(one.eval, episodes=3, curve_episodes=3),
        report=dataclasses.replace(one.report, replays=3, videos=2),
    )


def recordings(folder: Path, robot: str = "tabletop") -> EnvConfig:
    return EnvConfig(name="recorded", recordings=str(folder), robot=robot)


def marked(episode: Episode, number: int) -> Episode:
    """With a first frame of its own: exploration begins several times from one state."""
    frame = episode.frame.copy()
    frame[0, 0, 0] = 200, number, 0
    return dataclasses.replace(episode, frame=frame)


def cut(episode: Episode, steps: int) -> Episode:
    """Its first steps; success is said of the last of them."""
    return dataclasses.replace(
        episode, frame=episode.frame[: steps + 1], pose=episode.pose[: steps + 1], gripper=episode.gripper[: steps + 1],
        command=episode.command[:steps], success=np.arange(steps + 1) == steps,
    )  # fmt: skip


@pytest.fixture(scope="module")
def acted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tabletop up to its exploration."""
    out = tmp_path_factory.mktemp("acted") / "run"
    train.train(out, short(EnvConfig()), until="explore")
    return out


@pytest.fixture(scope="module")
def ragged(acted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a robot did: episodes of several lengths, some of which succeed, those of a task that is none of the run's, and a demonstration."""
    explored = [marked(episode, number) for number, episode in enumerate(EpisodeSet(acted / "stages/explore"))]
    some = [cut(e, (19, 32, 24)[i // 3]) if i % 2 else e for i, e in enumerate(explored)]
    stranger = dataclasses.replace(explored[0], instruction="open the drawer")
    return written(tmp_path_factory.mktemp("ragged") / "set", *some[:4], stranger, EpisodeSet(acted / "stages/demos").load(0), *some[4:])


@pytest.fixture(scope="module")
def whole(acted: Path, ragged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from recordings, to its report."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.train(out, short(recordings(acted / "stages/demos"), str(ragged)))
    return out


def metrics(out: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "stages" / stage / "stage.json").read_text())["metrics"]
    return found


def test_demonstrations_and_exploration_are_what_was_recorded(acted: Path, ragged: Path, whole: Path) -> None:
    for ours, theirs in zip(EpisodeSet(whole / "stages/demos"), EpisodeSet(acted / "stages/demos"), strict=True):
        assert ours.content == theirs.content
    strangers = (4, 5)
    source = [episode for number, episode in enumerate(EpisodeSet(ragged)) if number not in strangers]
    for mine, theirs in zip(EpisodeSet(whole / "stages/explore"), source, strict=True):
        for name in ("frame", "pose", "gripper", "command", "success", "task", "instruction"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
    assert 0 < metrics(whole, "world")["kinematics"]["position_mm"] < 20
    told = metrics(whole, "explore")
    assert (told["episodes"], told["passed_over"], told["demonstrations"]) == (9, 1, 1)
    assert told["success"] == sum(e.first_success is not None for e in source) / 9 > 0
    assert {e.steps for e in EpisodeSet(whole / "stages/explore")} == {19, 24, 32}


def test_the_report_says_unverified_and_claims_no_true_success(whole: Path) -> None:
    told, page = report.read(whole), (whole / "report.html").read_text()
    assert told["eval"]["sft"].keys() == {"imagined"}
    held = Desk(Run(whole, short(EnvConfig()), leads=False)).held_out
    assert told["eval"]["loop"]["imagined"]["episodes"] == min(3, len(held)) == 3
    assert told["world"]["outcome_agreement"]["episodes"] == 3
    assert "curve" not in told["loop"]
    assert told["notes"][0].startswith("No environment: a robot (tabletop) was recorded, 2 demonstrations of each of 3 tasks")
    for text in ("is unverified: this run had recordings and no robot", "Imagined success, unverified", "Imagined against recorded"):
        assert text in page
    for text in ("Success in the true environment", "true success", "test states that no"):
        assert text not in page
    assert '<section class="card verdict "' in page  # whatever p is, no colour of a finding


def test_recordings_are_the_truth_of_what_is_imagined(whole: Path) -> None:
    desk = Desk(Run(whole, settings_of(whole), leads=False))
    pairs = checkpoint.load(whole / "stages/eval/recorded.safetensors")
    assert len(pairs) == 3
    for pair, episode in zip(pairs, evaluate._spread(desk.explored[1]), strict=True):
        assert np.array_equal(pair["true"], episode.frame[1:])
        assert np.array_equal(pair["success"], episode.success[1:])
        assert np.array_equal(pair["command"], episode.command)
        assert pair["imagined"].shape == pair["true"].shape
        assert pair["imagined_score"].shape == pair["true_score"].shape == (episode.steps,)
    psnr = metrics(whole, "eval")["world"]["psnr_by_chunk"]
    longest = max(e.steps for e in desk.explored[1])
    assert len(psnr) == -(-longest // 8)
    assert all(5 < one < 60 for one in psnr)


def test_psnr_of_ragged_episodes_is_of_those_that_have_the_chunk() -> None:
    true = [np.zeros((4, 2, 2, 3), np.uint8), np.zeros((3, 2, 2, 3), np.uint8), np.zeros((8, 2, 2, 3), np.uint8)]
    drawn = [frames + np.uint8(1 + i) for i, frames in enumerate(true)]
    by = [audit.psnr(ours, truth) for ours, truth in zip(drawn, true, strict=True)]
    assert audit.psnr_by_chunk(drawn, true, 4) == pytest.approx([np.mean(by), by[2]])


def test_loop_begins_where_recordings_began_that_it_may_learn_from(acted: Path, ragged: Path, whole: Path) -> None:
    settings = short(recordings(acted / "stages/demos"), str(ragged))
    often = dataclasses.replace(settings, loop=dataclasses.replace(settings.loop, contexts=30, batch=30, hard_share=0.5))
    desk = Desk(Run(whole, often, leads=False))
    demos = {e.frame[0].tobytes() for e in desk.episodes("demos")}
    learned = {e.frame[0].tobytes(): e for e in desk.explored[0]}
    begun = [context for iteration in range(3) for context in contexts_of(desk, iteration)]
    hard = [context for i, context in enumerate(begun) if i % 30 < 15]
    failed_of = {e.task for e in desk.explored[0] if e.first_success is None}
    for context in begun:
        assert context.frame.tobytes() in demos | learned.keys(), "held out"
    assert all(learned[c.frame.tobytes()].first_success is None for c in hard if c.task in failed_of)
    assert {c.frame.tobytes() for c in begun} & demos
    only = dataclasses.replace(often, loop=dataclasses.replace(often.loop, context_states="demos", hard_share=0.0))
    assert {c.frame.tobytes() for c in contexts_of(Desk(Run(whole, only, leads=False)), 0)} <= demos


def test_what_else_reads_a_run_reads_this_one(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_command.main(["audit", str(whole), "--episodes", "9", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    told = metrics(whole, "eval")["world"]
    assert found["episodes"] == 3
    assert found["agree"] == told["outcome_agreement_recorded"]["agree"]
    assert found["psnr_by_chunk"] == pytest.approx(told["psnr_by_chunk"])
    with pytest.raises(ValueError, match="none of stage eval, from recordings"):
        replay(whole, settings_of(whole), 1 << 31)
    world = vector_env(whole, 2, device="cpu")
    seen, _ = world.reset(seed=3)
    _, reward, *_ = world.step(np.zeros(world.action_space.shape, np.float32))
    starts = {e.frame[0].tobytes() for e in EpisodeSet(whole / "stages/demos")}
    assert {frame.tobytes() for frame in seen["frame"]} <= starts
    assert reward.shape == (2,)
    world.close()


def test_the_stage_that_needs_a_robot_says_what_to_do(acted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "tiny", "--fast", "--device", "cpu", "--sft.steps", "2", "--sft.prior-steps", "0", "--scale.steps", "2"]
    words += ["--env.name", "recorded", "--env.recordings", str(acted / "stages/demos"), "--env.robot", "tabletop", "--demos.per-task", "2"]
    assert command.main([*words, "--out", str(tmp_path / "run")]) == 2
    assert "explore.source: env.name=recorded has nothing to explore: run --until scale" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert command.main([*words, "--out", str(tmp_path / "run"), "--until", "scale"]) == 0
    assert (tmp_path / "run/stages/scale/policy.safetensors").is_file()
    more = ["--explore.source", str(tmp_path / "nowhere"), "--reuse", str(tmp_path / "run")]
    assert command.main([*words, "--out", str(tmp_path / "more"), *more]) == 2
    assert f"explore.source='{tmp_path / 'nowhere'}': nothing is there" in capsys.readouterr().err
    goes_on = ["--resume", str(tmp_path / "run"), "--explore.source", str(acted / "stages/explore"), "--until", "explore"]
    assert command.main(goes_on) == 0
    assert "scale: skipped" in capsys.readouterr().err
    assert metrics(tmp_path / "run", "explore")["episodes"] == 9
    assert settings_of(tmp_path / "run").explore.source == str(acted / "stages/explore")


def test_what_was_recorded_decides_and_not_where_it_lies(acted: Path, ragged: Path, tmp_path: Path) -> None:
    source = tmp_path / "first"
    shutil.copytree(acted / "stages/demos", source)
    shutil.copytree(ragged, tmp_path / "explored")
    settings = short(recordings(source), str(tmp_path / "explored"))
    train.train(tmp_path / "a", settings, until="explore")
    source.rename(tmp_path / "moved")
    moved = short(recordings(tmp_path / "moved"), str(ragged))
    train.train(tmp_path / "b", moved, until="explore", reuse=[tmp_path / "a"])
    for stage in ("demos", "sft", "scale", "explore"):
        first, other = (json.loads((tmp_path / run / f"stages/{stage}/stage.json").read_text()) for run in "ab")
        assert first["fingerprint"] == other["fingerprint"], stage
    train.train(tmp_path / "a", dataclasses.replace(moved, loop=dataclasses.replace(moved.loop, contexts=3)), until="explore")
    more = dataclasses.replace(cut(EpisodeSet(ragged).load(0), 16), source="another day")
    grown = written(tmp_path / "grown", *EpisodeSet(ragged), more)
    train.train(tmp_path / "c", short(recordings(tmp_path / "moved"), str(grown)), until="explore", reuse=[tmp_path / "a"])
    assert metrics(tmp_path / "c", "explore")["episodes"] == 10
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a/stages").rglob("*")}
    with pytest.raises(RunError, match=r"explore\.source='.*grown': not what stage explore of .* took; .*--reuse .*a\), or lose"):
        train.train(tmp_path / "a", short(recordings(tmp_path / "moved"), str(grown)), until="explore")
    fewer = written(tmp_path / "fewer", *list(EpisodeSet(tmp_path / "moved"))[::-1])
    with pytest.raises(RunError, match=r"env\.recordings='.*fewer' or env\.robot: not what stage demos"):
        train.train(tmp_path / "a", short(recordings(fewer), str(ragged)), until="explore")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a/stages").rglob("*")} == before
    assert json.loads((tmp_path / "c/stages/scale/stage.json").read_text())["seconds"] == json.loads(
        (tmp_path / "a/stages/scale/stage.json").read_text()
    )["seconds"], "taken over"


def test_recordings_of_another_robot_are_refused(acted: Path, ragged: Path, tmp_path: Path) -> None:
    assert {episode.robot for stage in ("demos", "explore") for episode in EpisodeSet(acted / "stages" / stage)} == {"tabletop"}
    asked = dataclasses.replace(short(EnvConfig()).demos, source=str(acted / "stages/demos"))
    site = Recorded(recordings(acted / "stages/demos", "panda"))
    with pytest.raises(ValueError, match=r"demonstration 0: its commands are those of robot 'tabletop', not of 'panda': .*--env\.robot"):
        given.take(site, asked, tmp_path / "taken", "env.recordings")
    of_another = written(tmp_path / "explored", *(dataclasses.replace(episode, robot="arm") for episode in EpisodeSet(ragged)))
    ours = Recorded(recordings(acted / "stages/demos"))
    with pytest.raises(ValueError, match=r"explored: .*, episode 0: its commands are those of robot 'arm', not of 'tabletop'"):
        given.take_exploration(ours, EpisodeSet(of_another), EpisodeSet(acted / "stages/demos"), tmp_path / "acts")
    unsaid = written(tmp_path / "unsaid", *(dataclasses.replace(episode, robot="") for episode in EpisodeSet(ragged)))
    assert given.take_exploration(ours, EpisodeSet(unsaid), EpisodeSet(acted / "stages/demos"), tmp_path / "kept")["episodes"] == 9


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"name": "recorded"}, r"env\.name=recorded without env\.recordings: say where its demonstrations lie"),
        ({"name": "recorded", "recordings": "x"}, r"env\.name=recorded without env\.robot: say whose they are"),
        ({"recordings": "x"}, r"env\.recordings='x': tabletop has its own"),
        ({"robot": "panda"}, r"env\.robot='panda': tabletop has its own"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(words: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        EnvConfig(**words)  # type: ignore[arg-type]


def test_settings_that_ask_an_environment_are_refused() -> None:
    settings = short(recordings(Path("x")), "y")
    for change, why in (
        ({"demos": dataclasses.replace(settings.demos, source="z")}, r"demos\.source='z': with env\.name=recorded the demonstrations are env\.rec"),
        ({"loop": dataclasses.replace(settings.loop, control="true-simulator")}, "no true environment"),
        ({"sft": dataclasses.replace(settings.sft, prior_steps=1), "env": recordings(Path("x"), "panda")}, "with recorded set it to 0"),
        ({"env": EnvConfig()}, r"explore\.source='y': the policy explores tabletop itself"),
    ):
        with pytest.raises(ValueError, match=why):
            dataclasses.replace(settings, **change)  # type: ignore[arg-type]


def test_a_site_is_what_its_recordings_show(acted: Path, tmp_path: Path) -> None:
    episodes = list(EpisodeSet(acted / "stages/demos"))
    site = Recorded(recordings(written(tmp_path / "set", *reversed(episodes[1:]))))
    assert site.tasks == tuple(dict.fromkeys(e.instruction for e in reversed(episodes)))
    assert (site.states("train"), site.states("test")) == (1, 0)  # of one task a single one is left
    now = site.begin(0, "train", 0)
    assert np.array_equal(now.frame, episodes[-1].frame[0])
    assert np.array_equal(now.pose, episodes[-1].pose[0])
    for task, split, index in ((0, "train", 1), (0, "test", 0)):
        with pytest.raises(ValueError, match="and none is number"):
            site.begin(task, split, index)  # type: ignore[arg-type]
    half = Recorded(dataclasses.replace(recordings(tmp_path / "set"), image=32))
    assert half.begin(0, "train", 0).frame.shape == (32, 32, 3)
    assert half.camera_of(0).intrinsics[0, 0] == site.camera_of(0).intrinsics[0, 0] / 2
    blind = written(tmp_path / "blind", dataclasses.replace(episodes[0], camera=None))
    with pytest.raises(ValueError, match=r"blind: episode 0: does not say where its camera stood.*--camera FILE"):
        Recorded(recordings(blind)).camera_of(0)
    loud = written(tmp_path / "loud", episodes[0], dataclasses.replace(episodes[1], instruction=f" {episodes[1].instruction.upper()}"))
    assert Recorded(recordings(loud)).tasks == (episodes[0].instruction,)
    with pytest.raises(CheckpointError, match=r"env\.recordings='.*empty': no episodes there"):
        Recorded(recordings(tmp_path / "empty"))
    with pytest.raises(ValueError, match="robot 'arm': want one of agibot_g1, panda, tabletop"):
        Recorded(recordings(tmp_path / "set", "arm"))


def test_exploration_of_other_tasks_alone_is_one_line(acted: Path, tmp_path: Path) -> None:
    site, demos = Recorded(recordings(acted / "stages/demos")), EpisodeSet(acted / "stages/demos")
    stranger = dataclasses.replace(demos.load(0), instruction="open the drawer")
    why = "0 different episodes of the run's tasks that are no demonstrations, want 2 .*1 are of other tasks: 'open the drawer'"
    with pytest.raises(ValueError, match=why):
        given.take_exploration(site, EpisodeSet(written(tmp_path / "set", stranger, demos.load(0))), demos, tmp_path / "out")


def test_a_recording_that_is_there_twice_is_taken_once(acted: Path, tmp_path: Path) -> None:  # else one is learned from, the other held out
    site, demos, explored = Recorded(recordings(acted / "stages/demos")), EpisodeSet(acted / "stages/demos"), EpisodeSet(acted / "stages/explore")
    source = written(tmp_path / "set", explored.load(0), explored.load(1), marked(explored.load(0), 7), demos.load(0), explored.load(1))
    told = given.take_exploration(site, EpisodeSet(source), demos, tmp_path / "out")
    assert (told["episodes"], told["repeated"], told["demonstrations"]) == (2, 2, 1)
    for mine, theirs in zip(EpisodeSet(tmp_path / "out"), (explored.load(0), explored.load(1)), strict=True):
        assert np.array_equal(mine.frame, theirs.frame)
    same = written(tmp_path / "same", explored.load(0), marked(explored.load(0), 7))
    with pytest.raises(ValueError, match="1 different episodes of the run's tasks"):
        given.take_exploration(site, EpisodeSet(same), demos, tmp_path / "none")


def test_a_report_of_recordings_has_its_own_successes(whole: Path) -> None:
    told = report.read(whole)
    for change, why in (
        (lambda r: r.pop("unverified"), "unverified is .*want true where successes are imagined"),
        (lambda r: r["eval"]["loop"].pop("imagined"), r"eval\.loop\.imagined"),
        (lambda r: r["eval"]["sft"]["imagined"].update(successes=99), r"eval\.sft\.imagined"),
        (lambda r: r["eval"]["paired"].update(wins=r["eval"]["paired"]["wins"] + 1), r"eval\.paired"),
    ):
        wrong = copy.deepcopy(told)
        change(wrong)  # type: ignore[no-untyped-call]
        with pytest.raises(ValueError, match=why):
            report.validate(wrong)
    assert tables.success(told).title == "Imagined success, unverified"
    assert "recorded success" in tables.imagined(told).columns


@pytest.mark.slow
def test_the_same_world_and_judge_are_learned_as_where_it_was_recorded(acted: Path, tmp_path: Path) -> None:
    """Nothing of the environment but its episodes goes into them: bit for bit."""
    shutil.copytree(acted, tmp_path / "acted")
    train.train(tmp_path / "acted", short(EnvConfig()), until="reward")
    settings = short(recordings(acted / "stages/demos"), str(acted / "stages/explore"))
    train.train(tmp_path / "run", settings, until="reward")
    for name in ("sft/policy", "scale/policy", "world/simulator", "reward/reflector"):
        ours, theirs = (checkpoint.load(tmp_path / run / f"stages/{name}.safetensors") for run in ("run", "acted"))
        mine, other = (one.get("weights", one) for one in (ours, theirs))
        assert mine.keys() == other.keys()
        for part, value in mine.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, other[part]), (name, part)
        files = [(tmp_path / run / f"stages/{name}.safetensors").read_bytes() for run in ("run", "acted")]
        assert files[0] == files[1], name


# docs/own-robot.md, docs/extending.md


MANUAL_FOLDER = Path(__file__).resolve().parents[1] / "docs"
MANUAL = (MANUAL_FOLDER / "own-robot.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", MANUAL, re.DOTALL)


class Arm:
    """The tabletop in the place of somebody's robot."""

    def __init__(self) -> None:
        self.env, self.begun = open_env(EnvConfig()), 0

    def reset(self) -> None:
        self.now = self.env.begin(1, "train", 20 + self.begun)
        self.begun += 1

    def look(self) -> tuple[np.ndarray, np.ndarray, float]:
        return self.now.frame, self.now.pose, self.now.gripper

    def move(self, command: np.ndarray) -> None:
        self.now = self.env.advance(command)

    def is_done(self) -> bool:
        return self.now.success


def test_the_code_of_the_manual_records_what_a_run_takes(whole: Path, tmp_path: Path) -> None:
    arm, (code,) = Arm(), blocks("python")
    site = Recorded(recordings(whole / "stages/demos"))
    (tmp_path / "camera.json").write_text(json.dumps(camera_to_plain(arm.env.camera_of(1))))
    given_ = {
        "arm": arm, "run": whole, "device": "cpu", "robot_file": "tabletop", "out": tmp_path / "explored", "episodes": 2, "steps": 24,
        "instruction": site.tasks[1], "camera_file": tmp_path / "camera.json",
    }  # fmt: skip
    exec(code, given_)
    arm.env.close()
    told = given.take_exploration(site, EpisodeSet(tmp_path / "explored"), EpisodeSet(whole / "stages/demos"), tmp_path / "taken")
    assert (told["episodes"], told["passed_over"]) == (2, 0)
    for episode in EpisodeSet(tmp_path / "taken"):
        assert (episode.task, episode.steps) == (1, 24)
        env = open_env(EnvConfig())
        env.begin(1, "train", 20 + episode.state_index)
        again = [env.advance(one) for one in episode.command]
        env.close()
        assert np.array_equal(np.stack([moment.pose for moment in again]), episode.pose[1:])


def test_the_robot_and_the_camera_of_the_manual_are_such(tmp_path: Path) -> None:
    camera, robot = blocks("json")
    (tmp_path / "camera.json").write_text(camera)
    (tmp_path / "arm.json").write_text(robot)
    seen = read_camera(tmp_path / "camera.json")
    assert (seen.height, seen.width, seen.mirrored) == (256, 256, False)
    arm = named("panda"), named(str(tmp_path / "arm.json"))
    differing = {f.name for f in dataclasses.fields(arm[0]) if getattr(arm[0], f.name) != getattr(arm[1], f.name)}
    assert differing == json.loads(robot).keys() - {"like", "holds_turn", "gripper_shares"} | {
        name for name in ("holds_turn", "gripper_shares") if getattr(arm[0], name) != json.loads(robot)[name]
    }
    for name in re.findall(r"^\| `([a-z_`, ]+)` \|", MANUAL, re.MULTILINE):
        for field in name.replace("`", "").split(", "):
            assert field in {f.name for f in dataclasses.fields(arm[0])}, field


def test_of_an_arm_what_is_otherwise_is_enough(tmp_path: Path) -> None:
    (tmp_path / "arm.json").write_text('{"like": "panda", "name": "mine", "source": "s", "arms": [{"tool_m": 0.1034}]}')
    (arm,), (like,) = named(str(tmp_path / "arm.json")).arms, named("panda").arms
    assert arm == dataclasses.replace(like, tool_m=0.1034)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("[]", '"like" is one of agibot_g1, panda, tabletop'),
        ('{"like": "ur5"}', '"like" is one of'),
        ('{"like": "panda", "name": "x"}', "no source: whose numbers"),
        ('{"like": "panda", "name": "panda", "source": "s"}', "'panda' is that of another robot"),
        ('{"like": "panda", "name": "x", "source": "s", "fingers": 2}', "unknown fingers; a robot has name, source"),
        ('{"like": "panda", "name": "x", "source": "s", "finger_m": "wide"}', "finger_m='wide'.*want a number"),
        ('{"like": "panda", "name": "x", "source": "s", "gain": [1, 2]}', "gain=.*want a list of 6"),
        ('{"like": "panda", "name": "x", "source": "s", "gripper_step": 3}', "gripper_step=3"),
        ('{"like": "panda", "name": "x", "source": "s", "control_hz": -5}', "control_hz=.*more than 0"),
        ('{"like": "panda", "name": "x", "source": "s", "action_scale": [0, 1, 1, 1, 1, 1]}', "action_scale=.*more than 0"),
        ('{"like": "panda", "name": "x", "source": "s", "gain": [NaN, 1, 1, 1, 1, 1]}', "finite"),
        ('{"like": "panda", "name": "x", "source": "s", "coupling": [[1.0]]}', "want 6 rows of 18"),
        ('{"like": "panda", "name": "x", "source": "s", "gripper_shares": [2, 1]}', "gripper_shares"),
        ('{"like": "panda", "name": "x", "source": "s", "arms": [{"tools": 1}]}', "tools"),
    ],
)
def test_a_file_that_describes_no_robot_is_one_line(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "arm.json").write_text(text)
    with pytest.raises(ValueError, match=why) as refused:
        named(str(tmp_path / "arm.json"))
    assert str(refused.value).startswith(str(tmp_path / "arm.json"))


def test_a_set_without_a_camera_is_given_one(acted: Path, tmp_path: Path) -> None:
    episode = EpisodeSet(acted / "stages/demos").load(0)
    assert episode.camera is not None
    lerobot.write(tmp_path / "set", [dataclasses.replace(episode, camera=None)], robot=TABLETOP)
    for mirrored in (False, True):
        file = tmp_path / f"camera-{mirrored}.json"
        file.write_text(json.dumps(camera_to_plain(dataclasses.replace(episode.camera, mirrored=mirrored))))
        own = written(tmp_path / f"own-{mirrored}", dataclasses.replace(episode, camera=None))
        (kept,) = (one for _, one in convert.read(own, convert.Choices(camera=file)))  # as they were taken
        assert np.array_equal(kept.frame, episode.frame)
        assert kept.mirrored == mirrored
        out = tmp_path / f"out-{mirrored}"
        assert convert_command.main([str(tmp_path / "set"), "--camera", str(file), "--out", str(out)]) == 0
        (made,) = EpisodeSet(out)
        assert made.camera is not None
        assert (made.mirrored, made.camera.mirrored) == (mirrored, mirrored)
        assert np.array_equal(made.camera.intrinsics, episode.camera.intrinsics)
        assert np.array_equal(made.frame, episode.frame if mirrored else episode.frame[:, :, ::-1])
    plain = camera_to_plain(dataclasses.replace(episode.camera))
    assert plain is not None
    turned = np.array(plain["camera_to_world"])
    turned[:3, 0] *= -1
    for change, why in (
        ({"height": 128}, "64 x 128 px, pictures of .* are 64 x 64"),
        ({"intrinsics": [[1.0]]}, r"want a \.json file with intrinsics \(3, 3\)"),
        ({"camera_to_world": turned.tolist()}, "want a rotation, a translation .m. and"),
        ({"camera_to_world": [*(turned @ np.diag([-1.0, 1, 1, 1]))[:3].tolist(), [1, 2, 3, 4]]}, "a last row of 0 0 0 1"),
        ({"intrinsics": [[60.0, 0, 32], [0, -60.0, 32], [0, 0, 1]]}, "fx and fy above 0"),
        ({"height": "64"}, "height '64', width 64: want whole numbers"),
        ({"mirrored": "no"}, "mirrored 'no': want true or false"),
    ):
        (tmp_path / "wrong.json").write_text(json.dumps({**plain, **change}))
        with pytest.raises(ValueError, match=why):
            list(convert.read(tmp_path / "set", convert.Choices(camera=tmp_path / "wrong.json")))
    with pytest.raises(ValueError, match="says itself where its camera stood"):
        list(convert.read(acted / "stages/demos", convert.Choices(camera=tmp_path / "camera-True.json")))


def test_pictures_of_somebody_elses_set_are_as_their_camera_says(acted: Path, tmp_path: Path) -> None:
    """Without a camera they are taken for mirrored, as OpenVLA-OFT's are; of a camera that is not, they are not."""
    episode = EpisodeSet(acted / "stages/demos").load(0)
    assert episode.camera is not None
    lerobot.write(tmp_path / "set", [dataclasses.replace(episode, camera=None)], "v2.1", robot=TABLETOP)
    strip_ours(tmp_path / "set", "v2.1")
    ((_, kept),) = convert.read(tmp_path / "set", convert.Choices(gripper="open-1"))
    as_stored, file = kept.frame, tmp_path / "camera.json"
    for mirrored, flag, want in ((False, True, as_stored), (False, False, as_stored), (True, True, as_stored), (True, False, as_stored[:, :, ::-1])):
        file.write_text(json.dumps(camera_to_plain(dataclasses.replace(episode.camera, mirrored=mirrored))))
        ((_, made),) = convert.read(tmp_path / "set", convert.Choices(camera=file, mirrored=flag, gripper="open-1"))
        assert made.mirrored == mirrored
        assert np.array_equal(made.frame, want)


def elsewhere(episode: Episode, to_world: np.ndarray) -> Episode:
    assert episode.camera is not None
    return dataclasses.replace(episode, camera=dataclasses.replace(episode.camera, camera_to_world=to_world))


def test_a_camera_that_never_sees_the_gripper_is_refused(acted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Inverted, the commonest mistake; converted, shown, explored."""
    episodes = list(EpisodeSet(acted / "stages/demos"))
    assert episodes[0].camera is not None
    inverted = np.linalg.inv(episodes[0].camera.camera_to_world)
    inverted[:3, 3] += [5.0, 0.0, 0.0]
    wrong = elsewhere(episodes[0], inverted)
    (tmp_path / "camera.json").write_text(json.dumps(camera_to_plain(wrong.camera)))
    bare = written(tmp_path / "bare", dataclasses.replace(episodes[0], camera=None))
    assert convert_command.main([str(bare), "--camera", str(tmp_path / "camera.json"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"--camera {tmp_path / 'camera.json'}: at its poses the gripper is in the picture at 0 of {len(wrong.frame)} moments" in said
    assert not (tmp_path / "out").exists()
    own = [elsewhere(one, inverted) for one in episodes]
    settings = dataclasses.replace(recordings(written(tmp_path / "shown", *own)), test_states=1)
    site = Desk(Run(tmp_path / "run", dataclasses.replace(short(settings), demos=DemosConfig(per_task=1)), leads=False)).site
    with pytest.raises(ValueError, match=r"demos\.source=.* 0 of .* is it inverted, in mm"):
        given.take(site, DemosConfig(source=str(tmp_path / "shown"), per_task=1), tmp_path / "taken")
    explored = written(tmp_path / "explored", *(cut(one, one.steps - 1) for one in own))
    with pytest.raises(ValueError, match=r"explore\.source=.* 0 of "):
        given.take_exploration(site, EpisodeSet(explored), EpisodeSet(tmp_path / "shown"), tmp_path / "taken-too")


def far(episode: Episode, times: float) -> np.ndarray:
    """Its camera so many times as far from where the gripper is halfway, which stays in the picture."""
    assert episode.camera is not None
    there, to_world = episode.pose[episode.steps // 2, :3], episode.camera.camera_to_world.copy()
    to_world[:3, 3] = there + times * (to_world[:3, 3] - there)
    return to_world


def test_a_camera_in_millimetres_is_refused(acted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From hundreds of metres the gripper is in the picture throughout, and its map never moves; converted, shown, explored."""
    episodes = list(EpisodeSet(acted / "stages/demos"))
    view = far(episodes[0], 1000.0)
    own = [elsewhere(one, view) for one in episodes]
    (tmp_path / "camera.json").write_text(json.dumps(camera_to_plain(own[0].camera)))
    bare = written(tmp_path / "bare", *(dataclasses.replace(one, camera=None) for one in episodes))
    assert convert_command.main([str(bare), "--camera", str(tmp_path / "camera.json"), "--out", str(tmp_path / "out")]) == 2
    assert re.search(r"camera\.json: the gripper moves by \d+ cm, and in the picture by 0\.0\d+ % of its side.*in mm\?", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    shown = written(tmp_path / "shown", *own)
    with pytest.raises(ValueError, match=r"env\.recordings=.* moves by .*in mm\?"):
        train.train(tmp_path / "run", short(recordings(shown)), until="demos")
    site = Desk(Run(tmp_path / "other", dataclasses.replace(short(recordings(shown)), demos=DemosConfig(per_task=1)), leads=False)).site
    explored = written(tmp_path / "explored", *(cut(one, one.steps - 1) for one in own))
    with pytest.raises(ValueError, match=r"explore\.source=.* moves by .*in mm\?"):
        given.take_exploration(site, EpisodeSet(explored), EpisodeSet(shown), tmp_path / "taken")


def test_a_camera_that_sees_the_gripper_move_is_not_refused(acted: Path) -> None:
    """Nor one from five times as far, nor one along whose axis one episode moves."""
    episodes = list(EpisodeSet(acted / "stages/demos"))
    camera = episodes[0].camera
    assert camera is not None
    forward = np.linspace(0.3, 0.5, episodes[0].steps + 1)[:, None] * camera.camera_to_world[:3, 2]
    pose = np.concatenate([camera.camera_to_world[:3, 3] + forward, episodes[0].pose[:, 3:]], axis=1)
    along = dataclasses.replace(episodes[0], pose=pose)
    still = dataclasses.replace(episodes[0], pose=episodes[0].pose[:1].repeat(len(pose), axis=0))
    for some, wrong in (
        ([along], True), ([along, *episodes[1:]], False), ([elsewhere(one, far(episodes[0], 5.0)) for one in episodes], False),
        ([elsewhere(one, far(episodes[0], 300.0)) for one in episodes], True), ([still], False), ([elsewhere(still, far(still, 1000.0))], False),
    ):  # fmt: skip
        seen = in_view.InView(TABLETOP, "--camera c.json")
        for one in some:
            seen.add(one)
        assert bool(seen.wrong()) == wrong


def test_a_camera_that_seldom_sees_the_gripper_is_worth_a_word(acted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episode = EpisodeSet(acted / "stages/demos").load(0)
    away = elsewhere(episode, episode.camera.camera_to_world + np.array([[0, 0, 0, 5.0], [0] * 4, [0] * 4, [0] * 4]))  # type: ignore[union-attr]
    for ours, theirs, word in ((1, 2, True), (1, 1, False)):
        seen = in_view.InView(TABLETOP, "--camera c.json")
        assert list(seen.of([episode] * ours + [away] * theirs)) == [episode] * ours + [away] * theirs
        assert ("is the camera right?" in capsys.readouterr().err) == word


def test_the_policy_of_the_manual_is_rolled_out(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (MANUAL_FOLDER / "extending.md").read_text(), re.DOTALL)
    made: dict[str, Any] = {"run": whole}
    exec(code, made)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list("012345")
    for rollout in made["rollouts"]:
        assert (rollout.action[rollout.live][:, 0] == 0.5).all()
        assert rollout.stopped or rollout.steps == 32


def test_views_signs_and_hands_are_one(acted: Path, tmp_path: Path) -> None:
    episodes = list(EpisodeSet(acted / "stages/demos"))

    def mirrored(one: Episode) -> Episode:
        assert one.camera is not None
        frame = np.ascontiguousarray(one.frame[:, :, ::-1])
        return dataclasses.replace(one, frame=frame, camera=dataclasses.replace(one.camera, mirrored=True))

    def turned(one: Episode) -> Episode:
        return dataclasses.replace(one, pose=one.pose * np.array([1, 1, 1, -1, -1, -1, -1.0]))

    some = written(tmp_path / "set", episodes[0], mirrored(turned(episodes[1])), *episodes[2:4], *map(turned, episodes[4:]))
    site = Recorded(recordings(some))
    for index in range(2):
        now = site.begin(0, "train", index)
        assert np.array_equal(now.frame, episodes[index].frame[0])
        assert np.array_equal(now.pose, episodes[index].pose[0])
    given.take(site, dataclasses.replace(TINY.demos, per_task=2, source=str(some)), tmp_path / "out", "env.recordings")
    for mine, original in zip(EpisodeSet(tmp_path / "out"), episodes, strict=True):
        assert np.array_equal(mine.pose, original.pose)
        assert np.array_equal(mine.frame, original.frame)
    hand = written(tmp_path / "hand", *episodes[:2], *map(mirrored, episodes[2:]))
    with pytest.raises(RunError, match="are seen by different cameras"):
        train.train(tmp_path / "run", short(recordings(hand)), until="demos")
    near = episodes[0].camera
    assert near is not None
    moved = near.camera_to_world.copy()
    moved[0, 3] += 5e-4
    wobbly = [dataclasses.replace(e, camera=dataclasses.replace(near, camera_to_world=moved)) for e in episodes[2:]]
    train.train(tmp_path / "wobbly", short(recordings(written(tmp_path / "close", *episodes[:2], *wobbly))), until="demos")


def test_a_recording_that_was_changed_is_seen_whatever_its_index_says(acted: Path, tmp_path: Path) -> None:
    """And nobody is told to delete what may be the only one."""
    folder = tmp_path / "set"
    shutil.copytree(acted / "stages/demos", folder)
    settings = recordings(folder)
    before = recorded.opened(folder, "env.recordings").fingerprint
    changed = EpisodeSet(folder).load(4)
    save(folder / "000004.npz", dataclasses.replace(changed, success=~changed.success))
    with pytest.raises(CheckpointError, match=r"000004\.npz: not the episode that index\.json lists; restore it, or delete index\.json to take it"):
        Recorded(settings)
    (folder / "index.json").unlink()
    assert recorded.opened(folder, "env.recordings").fingerprint != before
    (folder / "000004.npz").write_bytes((folder / "000004.npz").read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"000004\.npz: .*damaged.*; restore it, or move it elsewhere and delete index\.json"):
        recorded.opened(folder, "env.recordings")


def test_what_cannot_go_well_is_said_at_once(acted: Path, ragged: Path, tmp_path: Path) -> None:
    settings = short(recordings(acted / "stages/demos"), str(ragged))
    with pytest.raises(ValueError, match=r"env\.steps=8: demonstrations take up to \d+ control steps to succeed; want at least (24|32)"):
        train.train(tmp_path / "brief", dataclasses.replace(settings, env=dataclasses.replace(settings.env, steps=8)), until="demos")
    for wrong, why in (
        (short(recordings(acted / "stages/demos"), str(tmp_path)), r"explore\.source='.*': no episodes there"),
        (short(recordings(tmp_path / "nothing")), r"env\.recordings='.*nothing': no episodes there"),
        (short(recordings(acted / "stages/demos", "arm.json")), r"robot 'arm\.json'"),
    ):
        with pytest.raises(ValueError, match=why):
            train.train(tmp_path / "never", wrong, until="explore" if wrong.explore.source else "demos")
        assert not (tmp_path / "never").exists(), "the corrected command is another run's"
    brief = written(tmp_path / "short", *(cut(marked(e, i), 4) for i, e in enumerate(EpisodeSet(acted / "stages/explore"))))
    train.train(tmp_path / "run", settings, until="scale")
    with pytest.raises(ValueError, match=r"what is learned from of it has 4 control steps at most, want a chunk of 8"):
        train.train(tmp_path / "run", short(recordings(acted / "stages/demos"), str(brief)), until="explore")
    blind = written(tmp_path / "blind", *(dataclasses.replace(e, camera=None) for e in EpisodeSet(acted / "stages/explore")))
    with pytest.raises(ValueError, match=r"blind: .*, episode 0: does not say where its camera stood"):
        train.train(tmp_path / "run", short(recordings(acted / "stages/demos"), str(blind)), until="explore")


def test_held_out_are_of_every_task_and_in_turn(acted: Path, tmp_path: Path) -> None:
    explored = [marked(e, i) for i, e in enumerate(EpisodeSet(acted / "stages/explore"))]
    by_task = sorted(explored, key=lambda e: e.task)  # as people record
    settings = short(recordings(acted / "stages/demos"), str(written(tmp_path / "set", *by_task)))
    settings = dataclasses.replace(settings, explore=dataclasses.replace(settings.explore, held_out=0.6))
    train.train(tmp_path / "run", settings, until="explore")
    held = Desk(Run(tmp_path / "run", settings, leads=False)).explored[1]
    assert [e.task for e in held] == [0, 0, 1, 1, 2, 2]
    assert [e.task for e in evaluate._spread(held)] == [0, 1, 2, 0, 1, 2]


def test_commands_that_are_not_the_robots_are_said(acted: Path) -> None:
    episodes = list(EpisodeSet(acted / "stages/demos"))
    controller = fit([e.pose for e in episodes], [e.command for e in episodes], TABLETOP, margin_m=0.0)
    assert world._off(controller, episodes, 8)["unexplained"] < world._UNEXPLAINED / 4
    swapped = [dataclasses.replace(e, command=np.ascontiguousarray(e.command[:, [1, 2, 0, 3, 4, 5, 6]])) for e in episodes]
    controller = fit([e.pose for e in swapped], [e.command for e in swapped], TABLETOP, margin_m=0.0)
    assert world._off(controller, swapped, 8)["unexplained"] > world._UNEXPLAINED
