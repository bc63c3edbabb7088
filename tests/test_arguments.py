"""Mistakes on a command line: one line that names the mistake and the cure."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from worldenv.cli import train
from worldenv.cli.arguments import parse, value_of
from worldenv.config import LIBERO_TEST_STATES, EnvConfig, RunConfig
from worldenv.devices import device_of
from worldenv.envs import libero, suites
from worldenv.envs.tabletop import Tabletop
from worldenv.learning.loop import memory
from worldenv.presets import PAPER, TINY


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--world.precision", "bfloat"], "--world.precision 'bfloat': did you mean 'bfloat16'? There are: bfloat16, float32"),
        (["--loop.iterations", "abc"], "--loop.iterations 'abc': want a whole number"),
        (["--sft.lr=x"], "--sft.lr 'x': want a number"),
        (["--env.tasks", "1", "b"], "--env.tasks '1' 'b': want whole numbers"),
        (["--world.curriculum-begin", "1", "x"], "--world.curriculum-begin '1' 'x': want numbers"),
        (["--world.curriculum-begin", "1"], "--world.curriculum-begin: want 2 values after it"),
        (["--loop.iterations"], "--loop.iterations: want 1 value after it"),
        (["--sft.gradient-checkpointing=true"], "--sft.gradient-checkpointing=true: this flag takes no value; want --sft.gradient-checkpointing"),
        (["--world.step", "5"], "unknown flag '--world.step'; did you mean '--world.steps'"),
        (["--world.steps", "-3"], "world.steps=-3: want at least 0"),
        (["--world.lr", "nan"], "world.lr=nan: want a finite number"),
        (["--world.batch", "0"], "world.batch=0: want at least 1"),
        (["--explore.held-out", "1.5"], "explore.held_out=1.5: a share, want 0 .. 1"),
        (["--explore.factors", "1", "inf"], "explore.factors=(1.0, inf): want a finite number"),
        (["--simulator.guidance", "nan"], "guidance=nan"),
        (["--simulator.memory", "1"], "memory=1"),
        (["--sft.start", "x", "--sft.microbatch", "0"], "sft.microbatch=0"),
        (["--env.steps", "12"], "env.steps=12: want a multiple of policy.chunk=8"),
        (["--env.tasks", "0", "0"], "env.tasks=(0, 0): want different numbers, 0 .. 2"),
        (["--env.tasks", "3"], "env.tasks=(3,): want different numbers, 0 .. 2"),
        (["--env.name", "libero_goal", "--env.tasks", "10"], "env.tasks=(10,): want different numbers, 0 .. 9"),
        (["--demos.per-task", "9", "--env.train-states", "8"], "demos.per_task=9: want at most env.train_states=8"),
        (["--eval.episodes", "1201"], "eval.episodes=1201: there are 1200 test states over all tasks; give fewer, or raise env.test_states"),
        (["--env.tasks", "1"], "eval.episodes=1200: there are 400 test states"),
        (["--env.name", "libero_10"], "env.test_states=400: libero_10 has the 50 that LIBERO publishes; set it to that"),
        (["--env.name", "libero_10", "--env.test-states", "50", "--sft.prior-steps", "0"], "eval.episodes=1200: there are 500 test states"),
        (["--sft.prior-per-task", "0"], "sft.prior_per_task=0: sft.prior_steps=1200 want episodes"),
        (["--sft.beta2", "1"], "sft.beta2=1.0: want at least 0 and less than 1"),
        (["--explore.factors"], "explore.factors=(): want at least one factor"),
        (["--explore.factors", "1", "0"], "explore.factors=(1.0, 0.0): want more than 0"),
        (["--world.vae-steps", "0"], "world.vae_steps=0: the autoencoder begins from random weights"),
        (["--world.clip", "x"], "world.clip='x': is for a released EVAC that lacks its image tower; give that as world.initial"),
        (["--world.grad-clip", "0"], "world.grad_clip=0.0: want more than 0"),
        (["--world.dropout", "2"], "world.dropout=2.0: a share, want 0 .. 1"),
        (["--reward.backbone-steps", "0"], "reward.backbone_steps=0: the backbone begins from random weights"),
        (["--reward.classifier-width", "6"], "reward.classifier_width=6: want a multiple of 4"),
        (["--loop.batch", "5"], "loop.batch=5 does not divide group * contexts = 192 rollouts"),
        (["--loop.scale-factor", "0"], "loop.scale_factor=0.0: want more than 0"),
        (["--loop.permutation", "-1"], "loop.permutation=-1: want at least 0"),
        (["--engines.limit-gb", "0"], "engines.limit_gb=0.0: want more than 0"),
        (["--policy.crop-area", "0"], "policy.crop_area=0.0: a share that is kept, want more than 0, at most 1"),
        (["--policy.crop-area", "1.1"], "policy.crop_area=1.1: a share that is kept"),
        (["--policy.image", "60"], "policy.image=60: want a multiple of policy.dino.patch=8"),
        (["--policy.images", "2"], "policy.images=2: a run has one camera"),
        (["--policy.scale-ceiling", "0.01"], "policy.scale_ceiling=0.01: want more than policy.scale_floor=0.02"),
        (["--policy.scale-factor", "0"], "policy.scale_factor=0.0: want more than 0"),
        (["--policy.dino-std", "0.2", "0", "0.2"], "policy.dino_std=(0.2, 0.0, 0.2): want more than 0"),
        (["--policy.dino.heads", "3"], "policy.dino.width=64: want a multiple of policy.dino.heads=3"),
        (["--policy.siglip.heads", "3"], "policy.siglip.width=64: want a multiple of policy.siglip.heads=3"),
        (["--policy.siglip.patch", "16"], "policy.dino.patch=8, policy.siglip.patch=16: features are joined by patch"),
        (["--policy.siglip.depth", "1"], "policy.siglip.depth=1: want at least 2"),
        (["--policy.llama.heads", "7"], "policy.llama.width=96: want a multiple of policy.llama.heads=7"),
        (["--policy.llama.heads", "32"], "policy.llama.heads=32 of 3 channels each: want an even number of them"),
        (["--policy.llama.kv-heads", "3"], "policy.llama.heads=4: want a multiple of policy.llama.kv_heads=3"),
        (["--policy.llama.rope-theta", "0"], "policy.llama.rope_theta=0.0: want more than 0"),
        (["--simulator.unet.model-channels", "80"], "simulator.unet.model_channels=80: "),
        (["--simulator.unet.num-head-channels", "48"], "a level's channels=64: want a multiple of simulator.unet.num_head_channels=48"),
        (["--simulator.unet.channel-mult"], "simulator.unet.channel_mult=(): want at least one level"),
        (["--simulator.unet.channel-mult", "1", "0"], "simulator.unet.channel_mult=(1, 0): want at least 1"),
        (["--simulator.unet.dropout", "1.5"], "simulator.unet.dropout=1.5: a share, want 0 .. 1"),
        (["--simulator.vae.channel-mult"], "simulator.vae.channel_mult=(): want at least one level"),
        (["--simulator.vae.norm-groups", "3"], "simulator.vae.channels=8: want a multiple of simulator.vae.norm_groups=3"),
        (["--simulator.clip.patch", "7"], "simulator.clip.image=64: want a multiple of simulator.clip.patch=7"),
        (["--simulator.clip.heads", "3"], "simulator.clip.width=64: want a multiple of simulator.clip.heads=3"),
        (["--simulator.height", "128"], "env.image=64, simulator.height=128, simulator.width=64: imagined frames go on where"),
        (["--simulator.height", "72"], "simulator.height=72, simulator.width=64: want multiples of 16"),
        (["--simulator.domain", "30"], "simulator.domain=30: want a row of the domain embedding, 0 .. 29"),
        (["--simulator.delta-stride", "0"], "simulator.delta_stride=0.0: want more than 0"),
        (["--simulator.latent-scale", "0"], "simulator.latent_scale=0.0: want more than 0"),
        (["--reflector.frames", "1"], "reflector.frames=1: want at least 2"),
        (["--reflector.patch", "65"], "reflector.patch=65: want at most reflector.image=64"),
        (["--reflector.vision-heads", "3"], "reflector.vision_width=64: want a multiple of reflector.vision_heads=3"),
        (["--reflector.heads", "3"], "reflector.width=64: want a multiple of reflector.heads=3"),
        (["--reflector.kv-heads", "3"], "reflector.heads=2: want a multiple of reflector.kv_heads=3"),
        (["--reflector.heads", "64"], "reflector.heads=64 of 1 channels each: want an even number of them"),
    ],
)
def test_a_mistake_is_one_line(argv: list[str], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse("worldenv-train", RunConfig, TINY, argv)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(ord(letter) < 128 for letter in str(caught.value)), "no rest of a box"


COUNTS = {
    "env": "image steps train-states test-states",
    "demos": "per-task",
    "sft": "batch microbatch lora-alpha",
    "scale": "batch",
    "explore": "episodes batch processes",
    "world": "vae-batch batch patience check-every held-out-clips microbatch",
    "reward": "backbone-batch head-epochs head-batch embeddings classifier-width classifier-steps classifier-batch",
    "loop": "contexts iterations passes batch lora-rank lora-alpha slots bucket judge-bucket streams microbatch",
    "eval": "episodes curve-episodes",
    "policy": "image chunk proprio head-width",
    "policy.dino": "width depth heads mlp patch",
    "policy.siglip": "heads patch",
    "policy.llama": "width layers heads kv-heads ffn vocab",
    "simulator": "height width chunk",
    "simulator.unet": "model-channels num-res-blocks num-head-channels context-dim init-heads domains",
    "simulator.vae": "channels num-res-blocks z-channels norm-groups",
    "simulator.clip": "image patch width heads",
    "simulator.image-resampler": "width depth heads head-channels queries",
    "simulator.action-resampler": "queries",
    "reflector": "image patch vision-width vision-layers vision-heads vision-mlp width layers heads kv-heads ffn head-width",
}


@pytest.mark.parametrize("flag", [f"{section}.{name}" for section, names in COUNTS.items() for name in names.split()])
def test_of_what_there_must_be_one_none_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(flag.replace('-', '_'))}=0: want at least 1$"):
        parse("worldenv-train", RunConfig, TINY, [f"--{flag}", "0"])


def test_nothing_where_nothing_has_a_meaning() -> None:
    flags = [
        "sft.steps", "sft.prior-steps", "sft.prior-per-task", "sft.lora-rank", "scale.steps", "world.steps", "loop.warmup", "loop.snapshot-every",
        "report.videos", "demos.after-success", "policy.head-blocks", "policy.dino.registers", "simulator.clip.layers", "explore.held-out",
    ]  # fmt: skip
    assert parse("worldenv-train", RunConfig, TINY, [word for flag in flags for word in (f"--{flag}", "0")]).sft.steps == 0
    world = parse("worldenv-train", RunConfig, TINY, ["--world.initial", "evac.ckpt", "--world.vae-steps", "0"]).world
    assert world.vae_steps == 0
    assert parse("worldenv-train", RunConfig, TINY, ["--reward.start", "llava", "--reward.backbone-steps", "0"]).reward.backbone_steps == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--loop.batch", "0"], "worldenv-train: loop.batch=0: want at least 1"),
        (["--simulator.denoise-steps", "61"], "worldenv-train: denoise_steps=61: its trailing timesteps are 62, from -1; use 60"),
        (["--simulator.denoise-steps", "0"], "worldenv-train: denoise_steps=0: want 1 .. 1000"),
        (["--simulator.eta", "1.5"], "worldenv-train: eta=1.5: want 0 (deterministic) .. 1 (ancestral)"),
    ],
)
def test_nothing_is_begun_with_settings_that_no_stage_could_work_with(
    argv: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"{says}\n"
    assert not (tmp_path / "run").exists()


def test_the_last_preset_counts() -> None:
    assert value_of(["--preset", "tiny", "--preset=libero"], "--preset") == "libero"
    assert value_of(["--preset=tiny", "--preset", "libero", "--preset"], "--preset") == "libero"
    assert value_of(["--out", "x"], "--preset") is None


def test_memory_of_an_update_of_no_queries(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main(["--microbatch", "0"]) == 2
    assert memory.main(["--images", "3"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "worldenv.learning.loop.memory: loop.microbatch=0: want at least 1", "worldenv.learning.loop.memory: policy.images=3: want 1 or 2 views",
    ]  # fmt: skip


def test_the_manuals_commands_are_of_the_published_sizes() -> None:
    """Of docs/policy-and-reflector.md: without the preset they would be of the tiny networks, for published weights."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "policy-and-reflector.md").read_text().replace("\\\n", " ")
    found = {}
    for line in re.findall(r"^(?:worldenv-train|torchrun \S+ \S+ -m worldenv\.cli\.train) (.*/models/.*)$", page, flags=re.MULTILINE):
        argv = line.partition("#")[0].split()
        found[argv[argv.index("--out") + 1]] = parse("worldenv-train", train.TrainArgs, train._defaults(argv), argv).settings
    assert found.keys() == {"runs/oft", "runs/oft-as-is", "runs/judged"}
    for settings in found.values():
        assert (settings.policy, settings.env.image) == (PAPER.policy, 256)
        assert dataclasses.replace(settings.reflector, sampler=PAPER.reflector.sampler) == PAPER.reflector
    fine, as_it_is, judged = (found[out] for out in ("runs/oft", "runs/oft-as-is", "runs/judged"))
    assert fine.sft == dataclasses.replace(PAPER.sft, start="/models/openvla-7b")
    told = ("lora_rank", "lora_alpha", "lr", "schedule", "steps", "beta2", "batch")
    assert [getattr(fine.sft, name) for name in told] == [32, 16, 5e-4, "steps", 150_000, 0.999, 64]
    assert (as_it_is.sft.steps, as_it_is.sft.views, as_it_is.sft.precision) == (0, 1, "bfloat16")
    assert (judged.reflector.sampler, judged.reflector.frames) == ("stable_dyadic", 32)


def test_tasks_and_test_states_are_those_of_the_environments() -> None:
    assert EnvConfig(test_states=7).test_starts == 7 * len(Tabletop(EnvConfig()).tasks)
    assert EnvConfig(test_states=7, tasks=(1,)).test_starts == 7
    for suite in libero.SUITES:
        assert EnvConfig(name=suite, test_states=50).test_starts == 10 * LIBERO_TEST_STATES
        assert EnvConfig(name=suite, test_states=50, tasks=(9, 4)).test_starts == 2 * LIBERO_TEST_STATES


def test_training_states_of_libero_are_as_many_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(suites, "Libero", lambda *words: asked.append(words))  # LIBERO itself need not be there
    suites.open_suite("libero_goal", 64, config=EnvConfig(name="libero_goal", train_states=7, test_states=50))
    suites.open_suite("libero_goal", 256, wrist=True)
    assert asked == [("libero_goal", 64, False, True, 7), ("libero_goal", 256, True, True, 50)]


def test_what_may_be_below_zero_or_nothing_still_may() -> None:
    config = parse("worldenv-train", RunConfig, TINY, ["--world.curriculum-begin", "-1", "-2", "--world.steps", "0", "--sft.lr", "0"])
    assert config.world == dataclasses.replace(TINY.world, curriculum_begin=(-1.0, -2.0), steps=0)


def test_a_device_that_is_not_here_is_one_line() -> None:
    assert device_of("cpu") == torch.device("cpu")
    for name in ("cuda:99", "cupid", "meta", "cpu:x"):
        with pytest.raises(ValueError, match=f"--device {name}: ") as said:
            device_of(name)
        assert "\n" not in str(said.value)
