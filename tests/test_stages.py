"""What the stages give to those that do the work: which episodes, with which noise and settings, judged how."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from worldenv import audit, evaluation, presets
from worldenv.data.episode import Episode, EpisodeSet
from worldenv.learning import reward_head
from worldenv.run import Run
from worldenv.stages import desk as stage_desk
from worldenv.stages import evaluate, fleet, reward, world
from worldenv.stages.desk import AUDIT_NUMBERS, LOOP_NUMBERS, RECORD_NUMBERS, REPLAY_NUMBERS, Desk

SETTINGS = dataclasses.replace(
    presets.TINY,
    policy=dataclasses.replace(presets.TINY.policy, chunk=4),
    simulator=dataclasses.replace(presets.TINY.simulator, chunk=4),
    loop=dataclasses.replace(presets.TINY.loop, scale_factor=2.5),
    report=dataclasses.replace(presets.TINY.report, replays=7),
)


def episode(number: int, steps: int = 6) -> Episode:
    """With pictures, and a length, of its own."""
    frame = np.random.default_rng(number).integers(0, 256, (steps + 1, 8, 8, 3), dtype=np.uint8)
    pose = np.tile([0.0, 0, 0, 0, 0, 0, 1], (steps + 1, 1))
    success = np.arange(steps + 1) == steps
    return Episode("push", 0, "train", number, "drawn", frame, pose, np.ones(steps + 1), np.zeros((steps, 7), np.float32), success)


def kept(folder: Path, numbers: range) -> EpisodeSet:
    episodes = EpisodeSet(folder)
    for number in numbers:
        episodes.add(number, episode(number + 100 * (folder.name == "explore")))
    episodes.seal()
    return episodes


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """Of a run with 3 demonstrations and 10 explorations, 3 of them held out."""
    made = Desk(Run(tmp_path / "run", dataclasses.replace(SETTINGS, explore=dataclasses.replace(SETTINGS.explore, held_out=0.3))))
    for stage, numbers in (("demos", range(3)), ("explore", range(10))):
        made.run.folder(stage).mkdir(parents=True)
        kept(made.run.folder(stage), numbers)
    return made


def states(episodes: Any) -> list[int]:
    return [one.state_index for one in episodes]


def test_nothing_is_learned_from_what_judges(desk: Desk) -> None:
    learned, held = desk.explored
    assert (len(learned), len(held)) == (7, 3)
    assert sorted(states(learned) + states(held)) == list(range(100, 110))
    assert [states(one) for one in world._world_episodes(desk)] == [[0, 1, 2, *states(learned)], states(held)]
    desk.settings = dataclasses.replace(desk.settings, world=dataclasses.replace(desk.settings.world, extra_data=False))
    assert [states(one) for one in world._world_episodes(desk)] == [[0, 1, 2], states(held)]
    other = Desk(desk.run)
    other.seed += 1
    assert other.held_out != desk.held_out  # who is held out is a matter of the seed
    greedy = Desk(desk.run)
    greedy.settings = dataclasses.replace(SETTINGS, explore=dataclasses.replace(SETTINGS.explore, held_out=0.99))
    assert len(greedy.explored[0]) == 1  # something is left to learn from


def test_rollouts_of_different_purposes_have_different_numbers() -> None:
    most = 2**20
    begins = sorted([0, LOOP_NUMBERS, REPLAY_NUMBERS, AUDIT_NUMBERS, RECORD_NUMBERS, 2**32])
    assert all(end - begin >= 8 * most for begin, end in itertools.pairwise(begins))


def test_both_policies_are_replayed_with_loops_noise_and_numbers_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = {stage: SimpleNamespace(scale_factor=1.0) for stage in ("scale", "loop")}
    given: list[Any] = []
    made = {"judges": ["one on each", "of two GPUs"]}
    monkeypatch.setattr(
        evaluate, "assembled", lambda desk, folder, policy, _: SimpleNamespace(replicas=[policy], engines={"of": folder.name}, **made)
    )
    monkeypatch.setattr(audit, "replay", lambda replicas, env, by, contexts, **how: given.append((replicas, contexts, {**how, "by": by})) or [])
    env = SimpleNamespace(tasks=("a", "b", "c"), states=lambda split: {"train": 9}[split])
    here: Any = SimpleNamespace(
        settings=SETTINGS, env=env, policy=policies.get, reflector=lambda device: None, judging=None, seed=3, schedule="schedule", device="cpu",
        context=lambda task, state: (task, state),
    )  # fmt: skip
    for i, name in enumerate(("sft", "loop")):
        assert evaluate._replays(here, name, tmp_path, REPLAY_NUMBERS + i * SETTINGS.report.replays) == ([], {"of": name})
    for (replicas, contexts, how), stage, first in zip(given, ("scale", "loop"), (REPLAY_NUMBERS, REPLAY_NUMBERS + 7), strict=True):
        assert replicas == [policies[stage]]
        assert policies[stage].scale_factor == 2.5
        assert contexts == [(0, 0), (1, 0), (2, 0), (0, 3), (1, 3), (2, 3), (0, 6)]  # all tasks, states far from those of demonstrations too
        assert how["by"] == made["judges"]
        assert (how["first_number"], how["seed"], how["steps"], how["schedule"]) == (first, 3, SETTINGS.env.steps, "schedule")


def test_success_before_and_after_is_of_the_policy_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And by iteration of the copy that was kept then; the first and the last are not played again."""
    played: list[tuple[str, int]] = []

    def plays(policy: str, scenes: Any, chosen: Any, steps: int, *_: Any, savepoint: str) -> Any:
        played.append((policy, len(chosen)))
        return evaluation.Outcomes(tuple(chosen), np.tile([[False, policy == "loop"]], (len(chosen), 1)), None, 0.5)

    monkeypatch.setattr(evaluation, "evaluate", plays)
    monkeypatch.setattr(evaluate.policies, "load", lambda path, device: path.stem)
    kept_ = [(0, Path("begin")), (2, Path("second")), (4, Path("last"))]
    monkeypatch.setattr(evaluate, "snapshots", lambda out: kept_)
    settings = dataclasses.replace(
        SETTINGS, eval=dataclasses.replace(SETTINGS.eval, episodes=6, curve_episodes=3), loop=dataclasses.replace(SETTINGS.loop, iterations=4)
    )
    here: Any = SimpleNamespace(
        settings=settings, env=SimpleNamespace(tasks=("a", "b", "c"), states=lambda split: 5), policy=lambda stage: stage, device="cpu",
        judges=lambda: [SimpleNamespace(config=SETTINGS.reflector)], run=SimpleNamespace(out=tmp_path),
    )  # fmt: skip
    stage: Any = SimpleNamespace(savepoint=lambda part: part)
    found = evaluate._outcomes(here, stage, here)
    assert (played, {name: int(one.by("oracle").sum()) for name, one in found.items()}) == ([("scale", 6), ("loop", 6)], {"sft": 0, "loop": 6})
    rows = evaluate._curve(here, stage, here, found)
    assert played[2:] == [("second", 3)]
    assert [(row["iteration"], row["successes"], row["episodes"]) for row in rows] == [(0, 0, 3), (2, 0, 3), (4, 3, 3)]


class EnoughError(Exception):
    """What comes after was not asked for."""


def test_the_controller_is_fitted_to_training_and_measured_on_what_is_held_out(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned, held = (list(some) for some in world._world_episodes(desk))
    number = {id(e.pose): e.state_index for e in (*learned, *held)}
    given: dict[str, list[int]] = {}

    def fitted(poses: Any, commands: Any, robot: Any, margin_m: float) -> Any:
        given["fit"] = [number[id(pose)] for pose in poses]
        return SimpleNamespace(to_dict=dict)

    def measured(controller: Any, episodes: list[Episode], chunk: int) -> Any:
        given["measured"] = states(episodes)
        raise EnoughError

    for name, stand_in in (("_world_episodes", lambda desk: (learned, held)), ("fit", fitted), ("_off", measured)):
        monkeypatch.setattr(world, name, stand_in)
    stage: Any = SimpleNamespace(folder=tmp_path, metrics={})
    with pytest.raises(EnoughError):
        world.world(desk, stage)
    assert given == {"fit": states(learned), "measured": states(held)}
    assert not set(given["fit"]) & set(given["measured"])


def test_fidelity_is_of_the_frames_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = [episode(0), episode(1, 9)]
    drawn = [np.concatenate([e.frame[:1], e.frame[1:] ^ 1]) for e in episodes]  # off by one level everywhere
    monkeypatch.setattr(audit, "imagine_episodes", lambda worlds, given, batch, chunk, label: drawn)
    here: Any = SimpleNamespace(settings=SETTINGS, device="cpu", simulator=lambda: SimpleNamespace(reconstruct=lambda frames: frames ^ 2))
    found = evaluate._fidelity(here, SimpleNamespace(worlds=[]), episodes)  # type: ignore[arg-type]
    assert found["psnr_by_chunk"] == pytest.approx([20 * np.log10(255)] * 3)  # chunks of 4
    assert found["psnr_ceiling_by_chunk"] == pytest.approx([20 * np.log10(255 / 2)] * 3)
    last = episodes[1].frame
    assert found["psnr_copy_first_by_chunk"][2] == pytest.approx(audit.psnr(np.broadcast_to(last[:1], last[9:].shape), last[9:]))


def test_the_judge_is_measured_on_what_is_held_out_as_it_judges_rollouts(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk of the policy's length, on true frames and on drawn ones, each by the same settings."""
    seen: dict[str, Any] = {"imagined": [], "scored": []}
    judge = SimpleNamespace(config=dataclasses.replace(SETTINGS.reflector, threshold=0.7))

    def fitted(desk: Desk, stage: Any, training: list[Episode], drawn: Any) -> Any:
        seen["taught"] = states(training)
        assert states(drawn()) == seen["taught"]
        return judge

    def imagine(worlds: Any, episodes: list[Episode], batch: int, chunk: int, label: str) -> list[Episode]:
        seen["imagined"].append((states(episodes), batch, chunk))
        return episodes

    def score(judges: Any, episodes: list[Episode], drawn: Any = None, chunk: int = 8, batch: int = 16) -> list[NDArray[np.float32]]:
        seen["scored"].append((judges, states(episodes), drawn is not None, chunk))
        return [np.full(one.steps, 0.9 if drawn is not None else 0.1, np.float32) for one in episodes]

    monkeypatch.setattr(reward, "fitted_llava", fitted)
    monkeypatch.setattr(reward, "imagining", lambda desk, folder: fleet.Imagining([], [SimpleNamespace(plain={"simulator": 1})]))  # type: ignore[list-item]
    monkeypatch.setattr(audit, "imagine_episodes", imagine)
    monkeypatch.setattr(reward_head, "score", score)
    monkeypatch.setattr(reward.reflectors, "to_tree", lambda judge: {})
    monkeypatch.setattr(stage_desk.Desk, "env", SimpleNamespace(tasks=("push",)))
    stage: Any = SimpleNamespace(folder=desk.run.out, metrics={})
    reward.reward(desk, stage)
    learned, held = (states(one) for one in desk.explored)
    assert seen["taught"] == [0, 1, 2, *learned]
    slots = SETTINGS.loop.slots
    assert seen["imagined"] == [([0, 1, 2, *learned], slots, 4), (held, slots, 4)]
    assert seen["scored"] == [([judge], held, False, 4), ([judge], held, True, 4)]
    assert (stage.metrics["stops"]["missed"], stage.metrics["drawn"]["stops"]["early"]) == (3, 3)  # by its own threshold
    assert stage.metrics["engines"] == {"simulator": 1}
    left = reward.checkpoint.load(desk.run.out / "held-out.safetensors")
    assert left["success"].tolist() == np.concatenate([e.success[1:] for e in desk.explored[1]]).tolist()
    assert left["score"].shape == left["success"].shape == (18,)
