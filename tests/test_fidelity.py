"""The fidelity benchmark's arithmetic: which pixels move, what is compared with what, and which runs may be compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import fidelity
from tests.test_world_model import episode
from worldenv import presets
from worldenv.run import Run


def test_a_pixel_moves_with_its_neighbours() -> None:
    frames = np.full((5, 9, 9, 3), 100, np.uint8)
    frames[3, 4, 4, 1] = 120  # for one moment, in one colour
    frames[2, 0, 8] = 110  # less than the threshold
    mask = fidelity.moving(frames, 16, 2)
    want = np.zeros((9, 9), bool)
    want[2:7, 2:7] = True
    np.testing.assert_array_equal(mask, want)
    assert not fidelity.moving(frames, 20, 2).any(), "a difference of the threshold is no move"


def test_psnr_counts_the_mask_of_the_frames_that_follow() -> None:
    one = episode(0, steps=8)
    mask = np.zeros(one.frame.shape[1:3], bool)
    mask[2:5, 3] = True
    drawn = one.frame[1:].copy()
    drawn[4:][:, ~mask] ^= 255  # wrong where it does not count
    drawn[0, 2:5, 3] ^= 16  # off by 16 levels in one of four frames
    table = fidelity.psnr_table([drawn], [one], [mask], 4)
    assert table.shape == (1, 2)
    assert table[0, 0] == pytest.approx(10 * np.log10(255**2 / (256 / 4)))
    assert table[0, 1] == 99.0
    before = fidelity.psnr_table([one.frame[np.arange(8) // 4 * 4]], [one], [np.ones_like(mask)], 4)
    true_before = [np.broadcast_to(one.frame[[0]], (4, 16, 16, 3)), np.broadcast_to(one.frame[[4]], (4, 16, 16, 3))]
    want = [fidelity.audit.psnr(copy, one.frame[1 + s : 5 + s]) for s, copy in zip((0, 4), true_before, strict=True)]
    np.testing.assert_allclose(before[0], want)


def test_advantages_are_paired() -> None:
    ours, other = np.array([[20.0, 10.0], [30.0, 12.0], [25.0, 11.0]]), np.array([[19.0, 12.0], [29.0, 14.0], [24.0, 13.0]])
    (first, second) = fidelity.paired(ours, other)
    assert first == [1.0, 1.0, 1.0], "the same in every episode, however they differ: no doubt"
    assert second == [-2.0, -2.0, -2.0]
    wide = fidelity.paired(ours[:, :1], np.array([[19.0], [27.0], [25.0]]))[0]
    assert wide[0] == pytest.approx(4 / 3)
    assert wide[2] - wide[0] == pytest.approx(1.96 * np.std([1, 3, 0], ddof=1) / np.sqrt(3))


def test_the_strip_shows_every_row_at_every_time() -> None:
    rows = {name: np.full((9, 4, 6, 3), shade, np.uint8) for name, shade in (("true", 10), ("simulator", 200))}
    picture = fidelity.strip(rows, "title", [0, 4, 8])
    for i, shade in enumerate((10, 200)):
        top = 2 * fidelity._HEAD + i * (8 + fidelity._GAP)
        for j in range(3):
            left = fidelity._MARGIN + j * (12 + fidelity._GAP)
            assert (picture[top : top + 8, left : left + 12] == shade).all()


def test_the_strip_shows_the_failure_that_moves_most() -> None:
    episodes = [dataclasses.replace(episode(i), success=np.full(13, i == 1)) for i in range(3)]
    masks = [np.arange(9).reshape(3, 3) < n for n in (2, 9, 5)]
    assert fidelity._chosen(None, episodes, masks) == 2
    assert fidelity._chosen(1, episodes, masks) == 1
    with pytest.raises(ValueError, match=r"0 \.\. 2"):
        fidelity._chosen(3, episodes, masks)


@pytest.fixture
def runs(tmp_path: Path) -> Any:
    """Make a run's folder with an explored stage."""

    def make(name: str, explored: str = "same", **changes: Any) -> Path:
        settings = presets.TINY
        for section, values in changes.items():
            settings = dataclasses.replace(settings, **{section: dataclasses.replace(getattr(settings, section), **values)})
        run = Run(tmp_path / name, settings)
        with run.at_work("explore", "f") as stage:
            (stage.folder / "data.txt").write_text(explored)
        return run.out

    return make


def test_only_runs_that_differ_in_the_one_thing_are_compared(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main = fidelity._desk(runs("main"))
    blind = {"simulator.action_maps": False}
    assert fidelity._variant(runs("blind", simulator={"action_maps": False}), main, blind).run.out.name == "blind"
    for name, settings in {
        "equal": {}, "longer": {"simulator": {"action_maps": False}, "world": {"steps": 7}}, "no extra": {"world": {"extra_data": False}},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: settings differ"):
            fidelity._variant(runs(name, **settings), main, blind)
    with pytest.raises(ValueError, match="explored otherwise"):
        fidelity._variant(runs("other", explored="other", simulator={"action_maps": False}), main, blind)
    assert fidelity.main([]) == 2
    assert "give --run" in capsys.readouterr().err
    assert fidelity.main(["--run", "nowhere"]) == 2
    assert "no run there" in capsys.readouterr().err
