"""The paper's preset at small sizes, from directories and files as users bring them: every stage of that recipe, whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import small_policy
import torch
from published_directories import write_policy, write_reflector

from worldenv import checkpoint, presets, report, train
from worldenv.cli import train as command
from worldenv.config import RunConfig
from worldenv.policy import lora, published
from worldenv.presets import PAPER, TINY
from worldenv.reflector import weights as reflectors
from worldenv.simulator import weights as simulators
from worldenv.simulator.evac import Evac
from worldenv.stages.desk import open_env


def small(folder: Path) -> RunConfig:
    """PAPER with the tiny networks on the tabletop, which begin from weights in `folder`, and every stage cut short."""
    tasks = open_env(TINY.env).tasks
    write_policy(folder / "openvla", small_policy.published_policy(instructions=tasks), 1)
    write_reflector(folder / "llava", reflectors.initialise(TINY.reflector, tasks, 0))
    sampler = {name: getattr(PAPER.simulator, name) for name in ("posterior", "eta", "dynamic_rescale", "final")}
    simulator = replace(TINY.simulator, **sampler, denoise_steps=2)
    checkpoint.save(folder / "evac.safetensors", simulators.to_tree(Evac.initialised(simulator, 0)))
    judge = replace(TINY.reflector, sampler=PAPER.reflector.sampler)
    short = presets.fast(replace(PAPER, device="cpu", env=TINY.env, policy=TINY.policy, simulator=simulator, reflector=judge))
    return replace(
        short,
        sft=replace(short.sft, start=str(folder / "openvla"), steps=4, batch=4, microbatch=2),
        explore=replace(short.explore, episodes=6, processes=1),
        world=replace(short.world, initial=str(folder / "evac.safetensors"), steps=4, batch=2, check_every=2, held_out_clips=2),
        reward=replace(short.reward, start=str(folder / "llava"), embeddings=24, head_epochs=2),
        loop=replace(short.loop, contexts=1, iterations=1, batch=4),
        eval=replace(short.eval, episodes=3, curve_episodes=3),
        report=replace(short.report, replays=2, videos=1),
        engines=replace(short.engines, back_end="eager"),
    )


@pytest.mark.slow
def test_it_runs_from_published_directories_to_its_report(tmp_path: Path) -> None:
    settings, out = small(tmp_path / "weights"), tmp_path / "run"
    train.train(out, settings)
    told = report.read(out)
    assert told["preset"] == "paper"
    assert f"The policy began from {settings.sft.start}" in told["notes"][0]
    base = published.open_directory(tmp_path / "weights" / "openvla", dtype=torch.bfloat16).network.state_dict()
    tuned = checkpoint.load(out / "stages" / "sft" / "policy.safetensors")["weights"]
    moved = {name for name, tensor in tuned.items() if not torch.equal(tensor.float(), base[name].float())}
    adapted = {f"{name}.weight" for name in lora.Adapter.read(out / "stages" / "sft" / "lora_adapter").factors}
    assert adapted
    backbone = ("vision_backbone", "projector", "language_model")
    assert not {name for name in moved - adapted if name.startswith(backbone)}, "LoRA alone moves it"
    files = (tmp_path / "weights" / "evac.safetensors", out / "stages" / "world" / "simulator.safetensors")
    before, after = (checkpoint.load(path)["weights"] for path in files)
    parts = {name.partition(".")[0] for name, tensor in after.items() if name in before and not torch.equal(tensor, before[name])}
    assert {"unet", "image_resampler"} <= parts
    assert not {"vae", "clip", "action_resampler"} & parts


def test_weights_that_are_not_there_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(["--preset", "paper", "--out", "run", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("worldenv-train: sft.start='weights/openvla-7b': nothing is there, and stage sft begins from it")
    assert list(tmp_path.iterdir()) == []


def test_what_the_paper_states_is_what_the_preset_has() -> None:
    """Section 4.4, appendices B.1 to B.3: the rest is the published recipe of each part, or ours."""
    loop, scale, reward = PAPER.loop, PAPER.scale, PAPER.reward
    assert (loop.group, loop.batch, loop.clip, loop.lora_rank, loop.lora_lr, loop.head_lr, loop.scale_factor) == (8, 4, 0.1, 32, 1e-4, 1e-5, 1.0)
    assert (loop.warmup, loop.hard_share, loop.termination, loop.control) == (0, 0.0, True, "none")
    assert (scale.steps, scale.batch, scale.lr) == (1000, 8, 5e-4)
    assert (reward.head, reward.head_epochs, reward.head_batch, reward.head_lr, reward.judge) == (True, 50, 8, 1e-4, "llava")
    assert (PAPER.reflector.threshold, PAPER.reflector.frames, PAPER.reflector.image, PAPER.reflector.sampler) == (0.5, 32, 384, "uniform")
    assert (PAPER.demos.per_task, PAPER.policy.scale_floor, PAPER.policy.chunk, PAPER.env.name) == (5, 0.0, 8, "libero_spatial")
    assert PAPER.policy == presets.OPENVLA_OFT
