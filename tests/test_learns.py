"""The learning benchmark: what its switches mean, and how rows are pooled. Whole runs are in tests/flow."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
from scipy import stats

from worldenv import evaluation, presets
from worldenv.benchmarks import learns, learns_figures
from worldenv.benchmarks.learns import LearnsArgs
from worldenv.data.episode import Episode, EpisodeSet
from worldenv.evaluation import Outcomes
from worldenv.nouns import Camera


def row(seed, before, after, variant="method"):
    def tally(hit):
        return {"oracle": {"successes": int(hit.sum()), "episodes": len(hit), "interval": [0.0, 1.0]}}

    return {
        "variant": variant, "settings": "s", "seed": seed, "commit": "abcdef0123", "eval": {"sft": tally(before), "loop": tally(after)},
        "paired": evaluation.paired(before, after), "hits": learns._hits({"sft": outcomes(before), "loop": outcomes(after)}),
    }  # fmt: skip


def outcomes(hit):
    return Outcomes((), hit[:, None], None, 0.5)


def without_hits(row):
    """As rows were before each state's outcome was kept."""
    return {name: value for name, value in row.items() if name != "hits"}


def drawn(seed, n=80):
    draw = np.random.default_rng(seed)
    return draw.random(n) < 0.5, draw.random(n) < 0.7


def test_one_run_is_the_paired_test_itself():
    before, after = drawn(0)
    got, want = learns.pool([row(0, before, after)]), evaluation.paired(before, after)
    assert {name: got[name] for name in want} == want
    assert (got["sft"], got["loop"], got["episodes"]) == (before.sum(), after.sum(), 80)


def test_a_policy_that_is_counted_three_times_is_no_surer_than_once():
    """Seeds share their test states: what n episodes of one policy say is not said better by copies of it; of unlike policies it is."""
    before, after = drawn(0, 400)
    once, copies = evaluation.paired(before, after), learns.pool([row(seed, before, after) for seed in range(3)])
    difference = after.astype(float) - before
    half = 1.959964 * difference.std() / 20
    assert copies["interval"] == pytest.approx([once["difference"] - half, once["difference"] + half], rel=1e-5)
    assert copies["interval"] == pytest.approx(once["interval"], abs=0.01)  # another method, of the same standard error
    assert copies["p_value"] == pytest.approx(2 * stats.norm.sf(20 * difference.mean() / difference.std()))
    assert (copies["wins"], copies["losses"], copies["episodes"]) == (3 * once["wins"], 3 * once["losses"], 1200)

    unlike = [row(seed, *drawn(seed, 400)) for seed in range(3)]
    known, at_most = learns.pool(unlike), learns.pool([without_hits(one) for one in unlike])
    width, most = (low_high["interval"][1] - low_high["interval"][0] for low_high in (known, at_most))
    assert most == pytest.approx(np.sqrt(3) * width, rel=0.1)  # where nothing is known of each state they may be copies
    assert learns.pool([unlike[0], unlike[1], without_hits(unlike[2])])["interval"] == pytest.approx(at_most["interval"])
    assert known["difference"] == pytest.approx(at_most["difference"])


def test_method_and_shuffle_are_compared_on_the_same_states():
    (_, shuffled), (before, method), other = drawn(0), drawn(1), drawn(2)
    rows = [row(0, before, method), row(0, before, shuffled, "shuffle"), row(1, *other), without_hits(row(1, *other, "shuffle"))]
    wins, losses = int((method & ~shuffled).sum()), int((shuffled & ~method).sum())
    lines = learns.table_against(rows).splitlines()[2:]
    assert len(lines) == 1  # of seed 1 the shuffle does not say what came of each state
    assert lines[0].startswith(f"| 0 | {shuffled.sum()}/80 | {method.sum()}/80 | ")
    assert f"| {wins}, {losses} | {evaluation.mcnemar(wins, losses):.2g} |" in lines[0]
    pooled = learns.table_against([*rows, row(2, *other), row(2, *drawn(3), "shuffle")]).splitlines()[-1]
    assert pooled.startswith(f"| **pooled** | {shuffled.sum() + drawn(3)[1].sum()}/160 | {method.sum() + other[1].sum()}/160 | ")


def test_the_table_keeps_every_seed_and_the_newest_row_of_each():
    first, again = row(0, *drawn(0)), row(0, *drawn(5))
    text = learns.table([first, row(1, *drawn(1)), row(0, *drawn(3), variant="shuffle"), again])
    lines = text.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["method", "method", "**method**", "shuffle"]
    assert f"{again['eval']['loop']['oracle']['successes']}/80" in lines[0]


def test_a_seed_that_was_measured_with_two_settings_is_pooled_once():
    old, new, other = {**row(0, *drawn(0)), "settings": "old"}, row(0, *drawn(5)), row(1, *drawn(1))
    lines = learns.table([old, new, other]).splitlines()[2:]
    assert len(lines) == 4
    both = learns.pool([new, other])
    assert f"| {both['sft']}/160 | {both['loop']}/160 |" in lines[-1]


def test_runs_of_the_shuffle_stand_side_by_side_and_their_mean_has_its_own_interval():
    """Student's t over runs, by hand: three differences, 2 degrees of freedom, t = 4.3027. The pooled line keeps to the first permutation."""
    parts = [drawn(0), drawn(1), drawn(2)]
    rows = [{**row(0, *part, "shuffle"), "permutation": k, "settings": str(k)} for k, part in enumerate(parts)]
    rows.append(row(1, *drawn(3), "shuffle"))
    text = learns.table(rows).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in text] == ["0", "0, permutation 1", "0, permutation 2", "1", "pooled"]
    both = learns.pool([rows[0], rows[3]])
    assert f"| {both['sft']}/160 | {both['loop']}/160 |" in text[-1]
    points = np.array([after.mean() - before.mean() for before, after in parts])
    got = learns.over_runs(rows[:3])
    half = 4.3027 * points.std(ddof=1) / np.sqrt(3)
    assert (got["runs"], got["mean"]) == (3, pytest.approx(points.mean()))
    assert got["interval"] == pytest.approx((points.mean() - half, points.mean() + half), rel=1e-4)
    assert learns.table_of_runs(rows).splitlines()[2].startswith("| shuffle | 4 | ")
    assert learns.over_runs([rows[0], rows[0]])["interval"] == pytest.approx((points[0], points[0]))


def test_ends_and_verdicts_are_added_up_over_seeds():
    def more(seed, counts):
        found = row(seed, *drawn(seed))
        for which, some in zip(("sft", "loop"), counts, strict=True):
            for end, n in zip(("oracle", "limit", "reflector"), some, strict=True):
                found["eval"][which][end] = {"successes": n, "episodes": 80, "interval": [0.0, 1.0]}
            found.setdefault("world", {})[f"outcome_agreement_{which}"] = {
                "episodes": 10, "imagined_successes": some[0] // 10, "true_successes": some[1] // 10, "false_positives": some[2] // 10,
                "false_negatives": seed,
            }  # fmt: skip
        return found

    rows = [more(0, [(10, 20, 30), (40, 50, 60)]), more(1, [(11, 22, 33), (44, 55, 66)]), row(0, *drawn(3), variant="true-simulator")]
    assert learns.table_of_ends(rows).splitlines()[2:] == [
        "| method | 2 | fine-tuned | 21/160 | 42/160 | 63/160 |",
        "| method | 2 | after | 84/160 | 105/160 | 126/160 |",
    ]
    assert learns.table_of_verdicts(rows).splitlines()[2:] == [
        "| method | 2 | fine-tuned | 20 | 2 | 4 | 6 of 16 | 1 |",
        "| method | 2 | after | 20 | 8 | 10 | 12 of 10 | 1 |",
    ]


def test_switches_reach_the_settings_and_name_the_variant():
    args = LearnsArgs(seed=4, control="shuffle", no_extra_data=True, no_termination=True)
    settings = learns.settings_for(args)
    assert learns.variant(args) == "shuffle+no-extra-data+no-termination"
    assert (settings.seed, settings.loop.control, settings.loop.termination, settings.world.extra_data) == (4, "shuffle", False, False)
    again = LearnsArgs(seed=4, control="shuffle", permutation=2)
    assert learns.settings_for(again).loop.permutation == 2
    assert learns.settings_for(LearnsArgs()) == presets.TINY
    assert dataclasses.replace(settings, loop=presets.TINY.loop, world=presets.TINY.world, seed=0) == presets.TINY


def test_a_bad_command_line_is_refused(capsys):
    assert learns.main(["--control", "shufle"]) == 2
    assert learns.main(["--instead", "more-sft", "--control", "frozen"]) == 2
    assert "choose one" in capsys.readouterr().err
    assert learns.main(["--permutation", "1"]) == 2
    assert "loop.permutation=1 with loop.control=none" in capsys.readouterr().err


def test_an_explored_success_becomes_a_demonstration_that_ends_with_it():
    success = np.array([False, False, False, True, True, False])
    episode = Episode(
        instruction="push", task=0, split="train", state_index=0, source="policy", frame=np.zeros((6, 2, 2, 3), np.uint8),
        pose=np.tile(np.eye(7)[6], (6, 1)), gripper=np.arange(6) / 8, command=np.arange(35, dtype=np.float32).reshape(5, 7) / 64,
        success=success, camera=Camera(np.eye(3), np.eye(4), 2, 2), versions={},
    )  # fmt: skip
    cut = learns.until_first_success(episode)
    assert cut.success.tolist() == [False, False, False, True]
    assert (cut.steps, len(cut.frame), len(cut.pose), cut.gripper.tolist()) == (3, 4, 4, [0, 0.125, 0.25, 0.375])
    assert np.array_equal(cut.command, episode.command[:3])


@pytest.mark.slow
@pytest.mark.timeout(1500)  # five short runs, and a machine may be busy
def test_controls_and_alternatives_run_whole_and_share_equal_stages(tmp_path, capsys, monkeypatch):
    fast = presets.fast

    def shorter(settings):
        """Whether anything is learned is not asked."""
        short = fast(settings)
        return dataclasses.replace(
            short,
            sft=dataclasses.replace(short.sft, steps=8, prior_steps=4),
            explore=dataclasses.replace(short.explore, episodes=18),
            world=dataclasses.replace(short.world, vae_steps=8, vae_batch=8, steps=8, batch=2, held_out_clips=4, check_every=4),
            reward=dataclasses.replace(short.reward, backbone_steps=8, embeddings=100),
            loop=dataclasses.replace(short.loop, contexts=2, group=4, batch=4),
        )

    monkeypatch.setattr(presets, "fast", shorter)
    base = ["--fast", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "rows.jsonl")]
    rows = {}
    for name, more in {
        "method": [], "frozen": ["--control", "frozen"], "true-simulator": ["--control", "true-simulator"], "more-sft": ["--instead", "more-sft"],
        "exploration-demos": ["--instead", "exploration-demos"],
    }.items():  # fmt: skip
        assert learns.main([*base, *more]) == 0
        rows[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert rows[name]["variant"] == name
    assert {row["eval"]["sft"]["oracle"]["successes"] for row in rows.values()} == {rows["method"]["eval"]["sft"]["oracle"]["successes"]}
    assert (rows["frozen"]["paired"]["wins"], rows["frozen"]["paired"]["losses"]) == (0, 0)
    assert rows["true-simulator"]["loop"]["returns"] != rows["method"]["loop"]["returns"]
    assert not (tmp_path / "runs" / "seed-0" / "true-simulator" / "stages" / "world").exists()
    assert rows["more-sft"]["episodes_used"] == 15
    explored = EpisodeSet(tmp_path / "runs" / "seed-0" / "method" / "stages" / "explore")
    shown = [e for e in explored if e.success.any() and not e.success[0]]  # so few steps of training may leave none
    assert rows["exploration-demos"]["episodes_used"] == 15 + len(shown)
    assert not (tmp_path / "rows.jsonl").exists()
    shared = [tmp_path / "runs" / "seed-0" / name / "stages" / "world" / "simulator.safetensors" for name in ("method", "frozen")]
    assert os.path.samefile(*shared)
    assert learns_figures.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "figures" / "success_by_iteration.png").stat().st_size > 10_000
    assert learns_figures.main(["--runs", str(tmp_path / "none"), "--out", str(tmp_path / "figures")]) == 2
