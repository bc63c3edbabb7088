"""The pipeline on LIBERO: what needs its assets. Whole runs are a command (docs/libero-training.md)."""

from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest

from worldenv import presets, train
from worldenv.data import lerobot, libero_hdf5
from worldenv.data.episode import EpisodeSet
from worldenv.run import Run, RunError
from worldenv.stages.desk import Desk

pytestmark = [pytest.mark.libero, pytest.mark.slow]


def test_demonstrations_in_libero_are_of_the_chosen_task_and_go_into_every_format(tmp_path):
    settings = presets.fast(presets.preset("libero"))
    train.train(tmp_path / "run", settings, until="demos")
    (episode,) = EpisodeSet(tmp_path / "run/stages/demos")
    assert episode.instruction == "pick up the black bowl between the plate and the ramekin and place it on the plate"
    assert episode.success[-1]
    assert episode.steps == episode.first_success + settings.demos.after_success
    assert episode.camera.mirrored
    assert episode.frame.shape[1:] == (64, 64, 3)
    assert len({frame.tobytes() for frame in episode.frame}) > episode.first_success  # every frame is drawn
    lerobot.write(tmp_path / "set", [episode])
    assert next(lerobot.read(tmp_path / "set"))[1].content == episode.content
    with libero_hdf5.writing(tmp_path / "demo.hdf5", episode.instruction) as add:
        add(episode)
    ((_, again),) = libero_hdf5.read(tmp_path / "demo.hdf5")
    assert np.array_equal(again.frame, episode.frame)
    assert np.array_equal(again.pose, episode.pose)


def test_a_file_as_libero_publishes_it_is_what_the_environment_showed(tmp_path):
    settings = presets.fast(presets.preset("libero"))
    train.train(tmp_path / "run", settings, until="demos")
    (episode,) = EpisodeSet(tmp_path / "run/stages/demos")
    file = tmp_path / f"{episode.instruction.replace(' ', '_')}_demo.hdf5"
    inside = "Pick the akita black bowl between the plate and the ramekin and place it on the plate"  # as LIBERO's task file says it
    with libero_hdf5.writing(file, inside) as add:
        add(dataclasses.replace(episode, instruction=inside))
    with h5py.File(file, "a") as opened:
        del opened["data/demo_0"].attrs["worldenv"]
    theirs = dataclasses.replace(settings, demos=dataclasses.replace(settings.demos, source=str(file)))
    train.train(tmp_path / "theirs", theirs, until="demos")
    (again,) = EpisodeSet(tmp_path / "theirs/stages/demos")
    assert (again.instruction, again.camera.mirrored) == (episode.instruction, True)
    for name in ("frame", "pose", "command", "success"):
        assert np.array_equal(getattr(again, name), getattr(episode, name)), name
    with h5py.File(file, "a") as opened:
        opened["data"].attrs["macros_image_convention"] = "opencv"  # untrue: its pictures are upside down
    with pytest.raises(ValueError, match="its first picture is like the environment's when it is upside down"):
        train.train(tmp_path / "over", theirs, until="demos")


def test_tasks_of_scenes_with_different_cameras_are_refused(tmp_path):
    settings = presets.fast(presets.preset("libero"))
    env = dataclasses.replace(settings.env, name="libero_10", tasks=(0, 2))  # a living room and a kitchen
    desk = Desk(Run(tmp_path, dataclasses.replace(settings, env=env)))
    with pytest.raises(RunError, match="different cameras"):
        _ = desk.camera
