"""How episodes ended: the statistics of appendix C.1.

Tried against wrong versions, each found here: a success counted to the episode's end; failures left out of the tasks' shares; a distribution
of both outcomes together; a folder that is read as a run.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
from test_episode import make

from worldenv.cli import report as command
from worldenv.data.episode import EpisodeSet
from worldenv.report import lengths_by_outcome as gather
from worldenv.report.outcome_figures import draw
from worldenv.report.outcomes import summary


def ended(instruction, steps, first):
    return SimpleNamespace(instruction=instruction, steps=steps, first_success=first)


EPISODES = [ended("push", 32, 10), ended("push", 32, None), ended("pull", 32, 30), ended("pull", 32, 12), ended("pull", 24, None)]


def test_a_success_is_as_long_as_it_took_and_a_failure_as_it_ran():
    found = gather(EPISODES)
    assert found == {"push": {"successes": [10], "failures": [32]}, "pull": {"successes": [30, 12], "failures": [24]}}
    told = summary(found)
    assert told["by_task"] == {"push": {"successes": 1, "failures": 1}, "pull": {"successes": 2, "failures": 1}}
    assert told["successes"] == {"episodes": 3, "mean": pytest.approx(52 / 3), **{f"p{p}": np.percentile([10, 30, 12], p) for p in (10, 50, 90)}}
    assert told["failures"]["episodes"] == 2
    none = summary(gather(EPISODES[1:2]))["successes"]
    assert none == {"episodes": 0, "mean": None, "p10": None, "p50": None, "p90": None}
    with pytest.raises(ValueError, match="no episodes"):
        summary({})


@pytest.mark.parametrize("episodes", [EPISODES, EPISODES[:1], EPISODES[1:2], [ended("push", 32, 0)]], ids=["both", "success", "failure", "at once"])
def test_the_three_plots_are_drawn(episodes):
    plots = draw(gather(episodes))
    assert [plot.name for plot in plots] == ["lengths", "cumulative", "outcomes"]
    for plot in plots:
        ElementTree.fromstring(plot.svg)
        assert plot.png.startswith(b"\x89PNG")
    words = plots[2].svg.decode()
    assert all(f"{one.instruction} (" in words for one in episodes)


def test_the_command_draws_any_folder_of_episodes(tmp_path, capsys):
    episodes = EpisodeSet(tmp_path / "explore")
    for number in range(4):
        success = np.arange(7) >= (3 if number % 2 else 99)
        episodes.add(number, make(number, success=success))
    episodes.seal()
    assert command.main(["--episodes", str(tmp_path / "explore"), "--out", str(tmp_path / "out")]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["successes"]["episodes"], said["successes"]["mean"], said["failures"]["mean"]) == (2, 3.0, 6.0)
    names = {"lengths", "cumulative", "outcomes"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"statistics.json", *(f"{n}.{kind}" for n in names for kind in ("svg", "png"))}
    kept = json.loads((tmp_path / "out/statistics.json").read_text())
    assert kept["lengths"] == {'push the "größte" puck': {"successes": [3, 3], "failures": [6, 6]}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "file").touch()
    for wrong, why in (
        ([str(tmp_path), "--episodes", str(tmp_path)], "--episodes FOLDER"),
        (["--episodes", str(tmp_path / "none")], "no such folder"),
        (["--out", str(tmp_path)], "give the folder"),
        (["--episodes", str(tmp_path / "out")], f"--episodes {tmp_path / 'out'}: no episodes there"),
        (["--episodes", str(tmp_path / "run")], f"--episodes {tmp_path / 'run'}: the folder of a run, not of episodes; they lie in RUN/stages/demos"),
    ):
        assert command.main(wrong) == 2
        assert why in capsys.readouterr().err
    assert command.main(["--episodes", str(tmp_path / "explore"), "--out", str(tmp_path / "file")]) == 1
    assert f"report not written, {tmp_path / 'file'}: no folder" in capsys.readouterr().err
