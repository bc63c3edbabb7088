"""Demonstrations that the user has (worldenv.data.given), through stage demos of whole commands, and what is refused.

Wrong versions that were seen to fail here: pictures neither flipped nor resized; the nearest pixel in place of Lanczos; the file's name not read;
case kept in instructions; the source's task number or state kept; demonstrations of all tasks counted against per_task; failures taken; a resumed
stage that does not compare; the camera of the source kept; training states in place of first observations as LOOP's start.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from test_data_formats import strip_ours

from worldenv import presets, train
from worldenv.cli import train as command
from worldenv.config import DemosConfig, EnvConfig
from worldenv.data import given, lerobot
from worldenv.data.convert import Choices, Format, convert
from worldenv.data.convert import read as read_any
from worldenv.data.episode import Episode, EpisodeSet
from worldenv.envs.chosen import ChosenTasks
from worldenv.kernels.frames import resize_lanczos3
from worldenv.robots.tabletop import TABLETOP
from worldenv.run import Run
from worldenv.stages import record
from worldenv.stages.desk import Desk, open_env
from worldenv.stages.loop import contexts_of

SMALL = ["--preset", "tiny", "--fast", "--device", "cpu", "--demos.per-task", "2", "--sft.steps", "2", "--sft.prior-steps", "0"]


def run(out: Path, *words: Any, until: str = "demos") -> int:
    return command.main([*SMALL, "--until", until, "--out", str(out), *map(str, words)])


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripted demonstrations of a run, two of each of three tasks."""
    out = tmp_path_factory.mktemp("shown") / "run"
    assert run(out) == 0
    return out / "stages" / "demos"


@pytest.fixture(scope="module")
def env() -> Iterator[ChosenTasks]:
    opened = open_env(EnvConfig())
    yield opened
    opened.whole.close()  # type: ignore[attr-defined]


def written(folder: Path, *episodes: Episode) -> Path:
    kept = EpisodeSet(folder)
    for number, episode in enumerate(episodes):
        kept.add(number, episode)
    kept.seal()
    return folder


def taken(env: ChosenTasks, source: Path, out: Path, per_task: int = 1) -> tuple[dict[str, Any], list[Episode]]:
    metrics = given.take(env, DemosConfig(per_task=per_task, source=str(source)), out)
    return metrics, list(EpisodeSet(out))


def metrics_of(out: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((out / "stages" / "demos" / "stage.json").read_text())["metrics"]
    return metrics


@pytest.mark.parametrize("setting", ["demos.source", "env.recordings"])
def test_success_that_was_said_of_the_episode_is_refused(setting: str, env: ChosenTasks, shown: Path, tmp_path: Path) -> None:
    episodes = list(EpisodeSet(shown))
    whole = dataclasses.replace(episodes[1], success=np.ones(episodes[1].steps + 1, bool))
    source = written(tmp_path / "set", episodes[0], whole, *episodes[2:])
    with pytest.raises(ValueError, match=r"set: 'push the red .*', demonstration 1: its task is done before the first command: .*label frames"):
        given.take(env, DemosConfig(per_task=2, source=str(source)), tmp_path / "out", setting)
    assert given.take(env, DemosConfig(per_task=1, source=str(source)), tmp_path / "one", setting)["episodes"] == 3  # that one is not taken


@pytest.mark.parametrize("form", ["episodes", "libero-hdf5", "lerobot-v2.1", "lerobot-v3.0"])
def test_no_demonstration_of_ours_or_of_a_published_format_is_done_before_it_begins(form: Format, shown: Path, tmp_path: Path) -> None:
    convert(shown, form, tmp_path / "source")
    if form == "libero-hdf5":
        for file in (tmp_path / "source").glob("*.hdf5"):
            with h5py.File(file, "a") as opened:  # as LIBERO publishes it
                for demo in opened["data"].values():
                    demo.attrs.pop("worldenv", None)
    elif form.startswith("lerobot"):
        strip_ours(tmp_path / "source", form.removeprefix("lerobot-"))
    found = [one for _, one in read_any(tmp_path / "source", Choices(gripper="open-1" if form.startswith("lerobot") else None))]
    assert len(found) == 6
    assert all(one.first_success for one in found)


@pytest.mark.parametrize("form", ["episodes", "libero-hdf5", "lerobot-v2.1", "lerobot-v3.0"])
def test_a_run_learns_from_what_another_showed(form: Format, shown: Path, tmp_path: Path) -> None:
    convert(shown, form, tmp_path / "source")
    assert run(tmp_path / "run", "--demos.source", tmp_path / "source", until="sft") == 0
    ours, theirs = EpisodeSet(tmp_path / "run" / "stages" / "demos"), EpisodeSet(shown)
    assert len(ours) == 6
    for mine, original in zip(ours, theirs, strict=True):
        for name in ("instruction", "task", "split", "state_index", "source", "versions"):
            assert getattr(mine, name) == getattr(original, name), name
        for name in ("frame", "pose", "command", "success"):
            assert np.array_equal(getattr(mine, name), getattr(original, name)), name
        np.testing.assert_allclose(mine.gripper, original.gripper, rtol=0, atol=1e-15)  # LIBERO's goes through metres
    metrics = metrics_of(tmp_path / "run")
    assert (metrics["passed_over"], metrics["without_success"], metrics["repeated"], metrics["flipped"]) == (0, 0, 0, 0)
    assert metrics["resized_from_px"] == {}
    assert (tmp_path / "run" / "stages" / "sft" / "policy.safetensors").is_file()


def test_the_source_is_not_read_again_and_another_content_is_another_output(shown: Path, tmp_path: Path) -> None:
    episodes, source = list(EpisodeSet(shown)), tmp_path / "source"
    written(source, *episodes)
    words = ("--demos.source", source, "--demos.per-task", 1)
    assert run(tmp_path / "a", *words) == 0
    shutil.rmtree(source)
    written(source, *reversed(episodes))
    assert run(tmp_path / "b", *words) == 0
    first, other = (json.loads((tmp_path / name / "stages/demos/stage.json").read_text()) for name in "ab")
    assert first["fingerprint"] == other["fingerprint"]
    assert first["output"] != other["output"]
    shutil.rmtree(source)
    assert run(tmp_path / "a", *words, until="sft") == 0  # nothing is there any more, and nothing is wanted
    assert json.loads((tmp_path / "a/stages/demos/stage.json").read_text()) == first
    assert run(tmp_path / "a", *words, "--from", "demos") == 2


def test_a_killed_stage_goes_on_unless_the_source_has_changed(env: ChosenTasks, shown: Path, tmp_path: Path) -> None:
    whole, _ = taken(env, shown, tmp_path / "whole", 2)
    (tmp_path / "cut").mkdir()
    for number in (0, 1, 2):
        shutil.copy(tmp_path / f"whole/{number:06d}.npz", tmp_path / "cut")
    before = (tmp_path / "cut/000001.npz").stat().st_mtime_ns
    assert taken(env, shown, tmp_path / "cut", 2)[0] == whole
    assert (tmp_path / "cut/000001.npz").stat().st_mtime_ns == before
    changed = written(tmp_path / "changed", *reversed(list(EpisodeSet(shown))))
    with pytest.raises(ValueError, match=r"changed: .*not what this stage took from there.*--from demos"):
        taken(env, changed, tmp_path / "cut", 2)


def test_tasks_are_told_by_words_and_take_their_first_in_order(env: ChosenTasks, shown: Path, tmp_path: Path) -> None:
    episodes = list(EpisodeSet(shown))
    loud = [dataclasses.replace(e, instruction=f"  {e.instruction.upper()} ", task=9, split="test", state_index=77) for e in episodes]
    stranger = dataclasses.replace(episodes[0], instruction="open the drawer")
    failed = dataclasses.replace(episodes[0], success=np.zeros_like(episodes[0].success))
    source = written(tmp_path / "source", stranger, failed, *loud[::-1], stranger)
    metrics, ours = taken(env, source, tmp_path / "out")
    assert [(e.instruction, e.task, e.split, e.state_index) for e in ours] == [(words, i, "train", 0) for i, words in enumerate(env.tasks)]
    for mine, original in zip(ours, episodes[1::2], strict=True):
        assert np.array_equal(mine.frame, original.frame)
    assert (metrics["episodes"], metrics["passed_over"], metrics["without_success"]) == (3, 1, 1)  # nothing after the last that is wanted is read
    two, _ = taken(ChosenTasks(env.whole, [1]), source, tmp_path / "one", 2)
    assert (two["episodes"], two["passed_over"]) == (2, 4)  # the stranger, the failure and two of task 2


def test_a_demonstration_that_is_there_twice_counts_once(env: ChosenTasks, shown: Path, tmp_path: Path) -> None:
    first, second = list(EpisodeSet(shown))[:2]
    one = ChosenTasks(env.whole, [first.task])
    again = dataclasses.replace(first, state_index=77, source="a copy", frame=np.ascontiguousarray(255 - first.frame))
    metrics, ours = taken(one, written(tmp_path / "source", first, again, second), tmp_path / "out", 2)
    assert (metrics["episodes"], metrics["repeated"]) == (2, 1)
    assert [np.array_equal(mine.command, original.command) for mine, original in zip(ours, (first, second), strict=True)] == [True, True]
    with pytest.raises(ValueError, match=rf"1 demonstrations of '{first.instruction}' and 2 that repeat another, demos\.per_task=2"):
        taken(one, written(tmp_path / "copies", first, again, again), tmp_path / "few", 2)


def test_the_name_of_liberos_file_tells_the_task(env: ChosenTasks, shown: Path, tmp_path: Path) -> None:
    convert(shown, "libero-hdf5", tmp_path / "source")
    files = sorted((tmp_path / "source").glob("*.hdf5"))
    for file, place in zip(files, ("", "KITCHEN_SCENE10_", "LIVING_ROOM_SCENE2_"), strict=True):
        with h5py.File(file, "a") as opened:
            opened["data"].attrs["problem_info"] = json.dumps({"language_instruction": "pick the akita black puck"})
        file.rename(file.with_name(place + file.name))
    _, ours = taken(env, tmp_path / "source", tmp_path / "out", 2)
    assert [e.instruction for e in ours] == [words for words in env.tasks for _ in range(2)]


def test_a_published_file_becomes_what_the_environment_shows(shown: Path, tmp_path: Path) -> None:
    """Upside down in the file, no camera, success at the end alone, longer than the run's step limit, of twice the size."""
    big, episodes = open_env(EnvConfig(image=128)), list(EpisodeSet(shown))
    source = tmp_path / "source"
    convert(shown, "libero-hdf5", source)
    view, drawn = big.camera_of(0), {}
    for file in source.glob("*.hdf5"):
        with h5py.File(file, "a") as opened:
            for demo in opened["data"].values():
                told = json.loads(demo.attrs["worldenv"])
                del demo.attrs["worldenv"]
                (episode,) = (e for e in episodes if (e.task, e.state_index) == (told["task"], told["state_index"]))
                moments = [big.begin(episode.task, "train", episode.state_index), *(big.advance(one) for one in episode.command)]
                drawn[episode.task, episode.state_index] = np.stack([m.frame for m in moments])
                del demo["obs/agentview_rgb"]
                demo["obs/agentview_rgb"] = drawn[episode.task, episode.state_index][:, ::-1]
                demo["rewards"][:-1] = 0
    big.whole.close()  # type: ignore[attr-defined]
    assert not view.mirrored
    assert run(tmp_path / "run", "--demos.source", source, "--env.steps", 16) == 0
    for mine, original in zip(EpisodeSet(tmp_path / "run" / "stages" / "demos"), episodes, strict=True):
        wanted = resize_lanczos3(torch.from_numpy(drawn[original.task, original.state_index]), 64).numpy()
        assert np.array_equal(mine.frame, wanted)
        assert float(np.abs(mine.frame.astype(float) - original.frame).mean()) < 4.0  # what the environment draws at this size
        assert mine.camera is not None
        assert original.camera is not None
        assert np.array_equal(mine.camera.intrinsics, original.camera.intrinsics)
        assert (mine.camera.mirrored, mine.camera.height) == (False, 64)
        assert mine.steps == 32
        assert mine.success.tolist() == [False] * 32 + [True]
        assert mine.source.startswith("LIBERO demonstration: ")
    metrics = metrics_of(tmp_path / "run")
    assert (metrics["resized_from_px"], metrics["flipped"]) == ({"128": 6}, 6)


def _with_camera(episode: Episode, **changes: Any) -> Episode:
    assert episode.camera is not None
    return dataclasses.replace(episode, camera=dataclasses.replace(episode.camera, **changes))


def test_a_mirrored_camera_is_flipped_and_one_of_another_size_is_the_same(env: ChosenTasks, shown: Path, tmp_path: Path) -> None:
    episodes = list(EpisodeSet(shown))
    mirrored = [_with_camera(dataclasses.replace(e, frame=np.ascontiguousarray(e.frame[:, :, ::-1])), mirrored=True) for e in episodes]
    metrics, ours = taken(env, written(tmp_path / "mirrored", *mirrored), tmp_path / "a")
    assert metrics["flipped"] == 3
    assert all(np.array_equal(mine.frame, original.frame) for mine, original in zip(ours, episodes[::2], strict=True))
    assert all(mine.camera is not None and not mine.camera.mirrored for mine in ours)
    big = open_env(EnvConfig(image=256))
    metrics, _ = taken(big, shown, tmp_path / "b")
    big.whole.close()  # type: ignore[attr-defined]
    assert metrics["resized_from_px"] == {"64": 3}


def test_what_cannot_be_the_environments_is_one_line(env: ChosenTasks, shown: Path, tmp_path: Path) -> None:
    episodes = list(EpisodeSet(shown))[::2]
    pose = episodes[0].camera.camera_to_world.copy()  # type: ignore[union-attr]
    pose[0, 3] += 0.01
    unknown = dataclasses.replace(episodes[0], camera=None)
    wrong = {
        "elsewhere": (_with_camera(episodes[0], camera_to_world=pose), "seen by another camera"),
        "narrow": (dataclasses.replace(unknown, frame=episodes[0].frame[:, :, 4:-4]), "pictures of 56 x 64 px.*cut them to squares"),
        "plain": (unknown, "when it is mirrored: mirror its pictures first .of a LeRobot set: --no-mirrored of python -m worldenv.cli.convert"),
        "over": (dataclasses.replace(unknown, frame=episodes[0].frame[:, ::-1]), "when it is turned by 180 degrees: turn its pictures first"),
    }
    for name, (episode, why) in wrong.items():
        with pytest.raises(ValueError, match=rf"{name}: '{episode.instruction}', demonstration 0: .*({why})"):
            taken(env, written(tmp_path / name, episode, *episodes[1:]), tmp_path / f"out-{name}")
        assert not list((tmp_path / f"out-{name}").glob("*.npz"))


def test_too_few_is_one_line_that_names_what_comes_near(shown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = list(EpisodeSet(shown))
    failed = dataclasses.replace(episodes[2], success=np.zeros_like(episodes[2].success))
    near = dataclasses.replace(episodes[2], instruction="push the azure puck")
    source = written(tmp_path / "source", *episodes[:3], failed, near, *episodes[4:])
    assert run(tmp_path / "run", "--demos.source", source) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"demos.source='{source}': 1 demonstrations of {episodes[2].instruction!r} and 1 without success, demos.per_task=2" in said
    assert "instructions there that come near: 'push the azure puck'" in said
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "other", "--demos.source", tmp_path / "empty") == 2
    assert f"demos.source: {tmp_path / 'empty'}: no episodes" in capsys.readouterr().err.splitlines()[-1]


def test_a_set_that_takes_a_flag_says_where_to_give_it(env: ChosenTasks, shown: Path, tmp_path: Path) -> None:
    episodes = list(EpisodeSet(shown))
    for episode in episodes:
        episode.command[:, 6] = np.arange(episode.steps) % 2
    lerobot.write(tmp_path / "set", episodes, "v2.1", robot=TABLETOP)
    strip_ours(tmp_path / "set", "v2.1")
    with pytest.raises(ValueError, match=r"demos\.source: .*--gripper open\+1.*convert it first \(python -m worldenv\.cli\.convert\)"):
        taken(env, tmp_path / "set", tmp_path / "out")


def test_loop_begins_where_the_demonstrations_began(shown: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "source", *reversed(list(EpisodeSet(shown))))
    loop = dataclasses.replace(presets.TINY.loop, contexts=6, batch=6, hard_share=0.0, context_states="demos")
    settings = dataclasses.replace(presets.TINY, device="cpu", demos=DemosConfig(per_task=2, source=str(source)), loop=loop)
    train.train(tmp_path / "run", settings, until="demos")
    desk = Desk(Run(tmp_path / "run", settings))
    for context in (one for iteration in range(3) for one in contexts_of(desk, iteration)):
        (began,) = (e for e in desk.episodes("demos") if (e.task, e.state_index) == (context.task, context.state_index))
        assert np.array_equal(context.frame, began.frame[0])
        assert np.array_equal(context.pose, began.pose[0])
        assert (context.instruction, context.gripper) == (began.instruction, began.gripper[0])
    notes = record._notes(desk)
    assert f"2 demonstrations read from {source} a task." in notes
    assert "LOOP started from the first observations of the demonstrations, never from test states." in notes
    with pytest.raises(ValueError, match=r"loop\.control=true-simulator, demos\.source=.*set loop\.context_states=train"):
        dataclasses.replace(settings, loop=dataclasses.replace(loop, control="true-simulator"))
    many = dataclasses.replace(settings, demos=DemosConfig(per_task=500, source="x"))
    assert many.demos.per_task > many.env.train_states
    with pytest.raises(ValueError, match=r"env\.train_states"):
        dataclasses.replace(settings, demos=DemosConfig(per_task=500))
