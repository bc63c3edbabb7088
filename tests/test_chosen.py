"""Some of an environment's tasks, and what a run makes of them.

Tried against wrong versions, each found here: tasks in the environment's order instead of the chosen one; an episode recorded under the number
that its task has in the whole; cameras that are not compared, or only when the world model asks for them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from worldenv import config, presets, train
from worldenv.config import DemosConfig, EnvConfig
from worldenv.data import collect
from worldenv.data.episode import EpisodeSet
from worldenv.envs.chosen import ChosenTasks
from worldenv.envs.experts import tabletop as expert
from worldenv.envs.tabletop import Tabletop
from worldenv.run import Run, RunError
from worldenv.stages.desk import Desk


@pytest.fixture(scope="module")
def whole():
    env = Tabletop(EnvConfig(image=16, train_states=4, test_states=3))
    yield env
    env.close()


def test_tasks_are_numbered_anew(whole):
    some = ChosenTasks(whole, (2, 0))
    assert some.tasks == (whole.tasks[2], whole.tasks[0])
    assert (some.states("train"), some.states("test"), some.robot) == (4, 3, whole.robot)
    for here, there in ((0, 2), (1, 0)):
        ours, theirs = some.begin(here, "train", 1), whole.begin(there, "train", 1)
        assert np.array_equal(ours.frame, theirs.frame)
        assert some.begin(here, "train", 1) is not None
        assert whole.task == there
        assert np.array_equal(some.camera_of(here).camera_to_world, whole.camera_of(there).camera_to_world)
    moment = some.capture()
    first = some.advance(np.full(7, 0.5, np.float32))
    some.restore(moment)
    assert np.array_equal(some.advance(np.full(7, 0.5, np.float32)).pose, first.pose)
    assert ChosenTasks(whole, ()).tasks == whole.tasks
    with pytest.raises(ValueError, match="2 tasks were chosen"):
        some.begin(2, "train", 0)


@pytest.mark.parametrize("chosen", [(0, 0), (3,), (-1,)])
def test_tasks_that_are_not_there_are_refused(whole, chosen):
    with pytest.raises(ValueError, match=r"env\.tasks=.*0 \.\. 2.*yellow"):
        ChosenTasks(whole, chosen)


def test_episodes_carry_the_numbers_of_the_run(whole, tmp_path):
    some = ChosenTasks(whole, (1,))

    class Looks:
        def command(self, env, variation):
            return expert.command(env.whole, variation)

    collect.demonstrate(some, Looks(), expert.VARIATION, 32, DemosConfig(per_task=2), 0, tmp_path)
    assert [(e.task, e.instruction) for e in EpisodeSet(tmp_path).entries] == [(0, whole.tasks[1])] * 2


def test_a_run_of_one_task_demonstrates_that_task_alone(tmp_path):
    settings = dataclasses.replace(
        presets.fast(presets.TINY), env=EnvConfig(tasks=(2,), train_states=4, test_states=30), demos=DemosConfig(per_task=1, after_success=8)
    )
    train.train(tmp_path, settings, only="demos")
    (entry,) = EpisodeSet(tmp_path / "stages/demos").entries
    assert (entry.instruction, entry.task) == ("push the yellow puck onto the green strip", 0)
    assert entry.steps == min(32, entry.first_success + 8)


def test_tasks_that_are_seen_by_different_cameras_are_named(tmp_path, monkeypatch):
    desk = Desk(Run(tmp_path, presets.fast(presets.TINY)))
    seen = desk.env.camera_of(0)
    assert desk.camera is not None
    del desk.__dict__["camera"]
    turned = dataclasses.replace(seen, camera_to_world=seen.camera_to_world + 0.01)
    monkeypatch.setattr(ChosenTasks, "camera_of", lambda self, task: turned if task == 1 else seen)
    with pytest.raises(RunError, match=r"red puck.*blue puck.*different cameras.*--env\.tasks"):
        _ = desk.camera


@pytest.mark.parametrize("source", ["", "given"])
def test_tasks_that_are_seen_by_different_cameras_are_refused_before_anything_is_done(source, tmp_path, monkeypatch):
    if source:
        train.train(tmp_path / source, presets.fast(presets.TINY), only="demos")
    seen = Tabletop(EnvConfig(image=64)).camera
    turned = dataclasses.replace(seen, camera_to_world=seen.camera_to_world + 0.01)
    monkeypatch.setattr(ChosenTasks, "camera_of", lambda self, task: turned if task == 1 else seen)
    demos = DemosConfig(source=str(tmp_path / source / "stages/demos") if source else "")
    with pytest.raises(RunError, match=r"red puck.*blue puck.*different cameras.*--env\.tasks"):
        train.train(tmp_path / "run", dataclasses.replace(presets.fast(presets.TINY), demos=demos), until="demos")
    assert not list((tmp_path / "run").rglob("*.npz"))


def test_the_preset_of_libero_can_be_and_is_cut_short():
    settings = presets.preset("libero")
    assert settings.env.steps % settings.policy.chunk == 0
    assert settings.env.steps <= 220
    short = presets.fast(settings)
    assert short.fast
    assert len(short.env.tasks) == 1
    assert short.explore.episodes * short.env.steps < 1000  # frames to draw
    assert config.from_dict(config.RunConfig, config.to_dict(short)) == short
    with pytest.raises(ValueError, match=r"the prior's scenes are the tabletop's"):
        dataclasses.replace(settings, sft=presets.TINY.sft)
