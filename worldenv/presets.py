"""Presets: values for every knob (worldenv.config), by name; and the settings of released networks, whose files do not hold them."""

from __future__ import annotations

import dataclasses

from worldenv.config import (
    ClipConfig,
    DemosConfig,
    EnginesConfig,
    EnvConfig,
    EvalConfig,
    ExploreConfig,
    LlamaConfig,
    LoopConfig,
    PolicyConfig,
    ReflectorConfig,
    ReportConfig,
    ResamplerConfig,
    RewardConfig,
    RunConfig,
    SftConfig,
    SimulatorConfig,
    UNetConfig,
    VAEConfig,
    VisionConfig,
    WorldConfig,
)
from worldenv.nouns import no_such

EVAC = SimulatorConfig(
    unet=UNetConfig(320, (1, 2, 4, 4), 2, (4, 2, 1), 64, 1024, dropout=0.1),
    vae=VAEConfig(128, (1, 2, 4, 4), 2, 4),
    clip=ClipConfig(image=224, patch=14, width=1280, layers=32, heads=16),
    image_resampler=ResamplerConfig(1024, 4, 12, 64, queries=256),
    action_resampler=ResamplerConfig(1024, 4, 12, 64, queries=16),
    height=320,
    width=512,
    chunk=16,
    posterior="sample",
    first_tokens="decoded",
    delta_rows="published",
    delta_stride=3.0,
)
"""The released EnerVerse-AC, with every switch as in its command line (AgibotTech/EnerVerse-AC, configs/agibotworld/config.yaml)."""

EVAC_RLINF = dataclasses.replace(
    EVAC, image_resampler=dataclasses.replace(EVAC.image_resampler, queries=128), height=256, width=256, chunk=8, denoise_steps=50
)
"""Shapes and steps of the EVAC that RLinf fine-tuned on LIBERO: chunks of 8 frames, 8 x 16 image tokens. How its maps were drawn (another
camera, one arm in both places) is not reproduced."""

RELEASED: dict[str, SimulatorConfig] = {"evac": EVAC, "evac-rlinf": EVAC_RLINF}
"""Settings of released files, which do not hold them."""

OPENVLA_OFT = PolicyConfig(
    image=224,
    dino=VisionConfig(width=1024, depth=24, heads=16, mlp=4096, patch=14, registers=4),
    siglip=VisionConfig(width=1152, depth=27, heads=16, mlp=4304, patch=14),
    llama=LlamaConfig(width=4096, layers=32, heads=32, ffn=11008, vocab=32064),
    head_width=4096,
    scale_floor=0.0,
    dino_mean=(0.484375, 0.455078125, 0.40625),
    dino_std=(0.228515625, 0.2236328125, 0.224609375),
)
"""The released OpenVLA-OFT for LIBERO with one view and proprio (moojink/openvla-oft), and the paper's density."""

LLAVA_ONEVISION = ReflectorConfig(
    image=384, patch=14, vision_width=1152, vision_layers=26, vision_heads=16, vision_mlp=4304,
    width=3584, layers=28, heads=28, kv_heads=4, ffn=18944,
)  # fmt: skip
"""The released LLaVA-OneVision-Qwen2-7B (llava-hf/llava-onevision-qwen2-7b-ov-hf), shown frames as the paper shows them."""
LLAVA_VOCAB = 152128
"""Rows of its embedding table."""

TINY = RunConfig(
    policy=PolicyConfig(
        image=64,
        dino=VisionConfig(width=64, depth=3, heads=4, mlp=256, patch=8, registers=4),
        siglip=VisionConfig(width=64, depth=3, heads=4, mlp=256, patch=8),
        llama=LlamaConfig(width=96, layers=3, heads=4, ffn=256, vocab=64),
        head_width=96,
        jpeg=False,
        crop_area=1.0,
    ),
    simulator=SimulatorConfig(
        unet=UNetConfig(64, (1, 1), 1, (1, 2), 32, 64, init_heads=2),
        vae=VAEConfig(8, (1, 2, 4, 4), 1, 16, norm_groups=4),
        clip=ClipConfig(image=64, patch=16, width=64, layers=2, heads=4),
        image_resampler=ResamplerConfig(64, 1, 4, 16, queries=16),
        action_resampler=ResamplerConfig(64, 1, 4, 16, queries=16),
        height=64,
        width=64,
        denoise_steps=1,
        eta=0.0,
        dynamic_rescale=False,
        final="pred_x0",
    ),
    reflector=ReflectorConfig(
        image=64, patch=8, vision_width=64, vision_layers=2, vision_heads=2, vision_mlp=128,
        width=64, layers=2, heads=2, kv_heads=1, ffn=128, frames=4, head_width=128, sampler="stable_dyadic",
    ),
    sft=SftConfig(steps=400, lr=3e-4, prior_per_task=300, prior_steps=1200),
    world=WorldConfig(vae_steps=1000, batch=8, steps=1000),
    reward=RewardConfig(backbone_steps=400, backbone_lr=2e-3, positives=0.2, embeddings=1000),
    engines=EnginesConfig(back_end="eager"),  # at this size a run's exports take about as long as its rollouts then save (docs/engines.md)
    loop=LoopConfig(
        scale_factor=4.0, contexts=24, hard_share=0.33, iterations=16, batch=24, lora_lr=4e-4, head_lr=1e-5, warmup=24, snapshot_every=4,
    ),
    env=EnvConfig(train_states=200, test_states=400),
    eval=EvalConfig(episodes=1200),
    explore=ExploreConfig(episodes=900, factors=(1.0, 4.0, 8.0)),
)  # fmt: skip

LIBERO = dataclasses.replace(
    TINY,
    preset="libero",
    env=EnvConfig(name="libero_spatial", tasks=(0, 2), steps=216, train_states=50, test_states=50),
    demos=DemosConfig(after_success=16),
    sft=dataclasses.replace(TINY.sft, steps=2000, prior_per_task=0, prior_steps=0),
    explore=ExploreConfig(episodes=60, factors=(1.0, 4.0), batch=8, processes=2),
    loop=dataclasses.replace(TINY.loop, contexts=6, iterations=10, batch=12, warmup=8, snapshot_every=5),
    eval=EvalConfig(episodes=60, curve_episodes=20, processes=2),
    report=ReportConfig(replays=12),
)
"""The tiny networks on two tasks of LIBERO-Spatial, whose limit of 220 steps is no multiple of the chunk: 216, which is the stricter."""

PAPER = RunConfig(
    preset="paper",
    policy=OPENVLA_OFT,
    simulator=dataclasses.replace(
        EVAC, height=256, width=256, chunk=8, posterior="mean", first_tokens="given", delta_rows="aligned", delta_stride=1.0,
        dynamic_rescale=False, final="pred_x0",  # else each chunk ends at 0.973 of its latents, and the next ones remember that
    ),
    reflector=LLAVA_ONEVISION,
    env=EnvConfig(name="libero_spatial", image=256, steps=216, train_states=50, test_states=50),
    demos=DemosConfig(per_task=5, after_success=16),
    sft=SftConfig(
        start="weights/openvla-7b", steps=150_000, batch=64, microbatch=8, lr=5e-4, schedule="steps", beta2=0.999, lora_rank=32, lora_alpha=16,
        augmentation="published", proprio_noise=0.0, precision="bfloat16", gradient_checkpointing=True,
    ),
    explore=ExploreConfig(episodes=500, factors=(1.0,), batch=8, processes=2),
    world=WorldConfig(
        initial="weights/evac.pt", frozen=("vae", "clip", "action_resampler"), steps=100_000, batch=64, lr=5e-5, grad_clip=0.5, dropout=0.1,
        sampled_levels=0.0, aligned_starts=0.0, ema=0.9999, check_every=1000, sampling="curriculum", precision="bfloat16", microbatch=8,
        gradient_checkpointing=True,
    ),
    reward=RewardConfig(start="weights/llava-onevision-qwen2-7b-ov-hf"),
    loop=LoopConfig(gradient_checkpointing=True, microbatch=8),  # a step has about eight: GPUs share them
    engines=EnginesConfig(limit_gb=70.0),  # seven plans of 35 GB, and those of the policy's next weights
    eval=EvalConfig(episodes=500, curve_episodes=100, processes=8),
    report=ReportConfig(replays=20),
)  # fmt: skip
"""The paper's networks and settings (section 4.4, appendices B and C) on LIBERO-Spatial, from published weights that the user has. What the paper
leaves open is the published recipe of each part (OpenVLA-OFT's fine-tuning, EVAC's training), or ours: the number of explorations, contexts and
iterations, and how long the world model is trained. Pictures are LIBERO's, and a chunk of the simulator is one of the policy. The paper learns from
LIBERO's own demonstrations: `demos.source` is where they lie; without it our expert shows them."""

PRESETS: dict[str, RunConfig] = {"tiny": TINY, "libero": LIBERO, "paper": PAPER}


def preset(name: str) -> RunConfig:
    """The preset `name`; ValueError with the nearest name where there is none."""
    if name not in PRESETS:
        raise no_such("preset", name, PRESETS)
    return PRESETS[name]


def fast(settings: RunConfig) -> RunConfig:
    """The same run with every stage cut short: it shows that the path is whole, and says nothing about success."""
    sft = settings.sft
    short = dataclasses.replace(
        settings,
        fast=True,
        sft=dataclasses.replace(sft, steps=40, prior_per_task=min(4, sft.prior_per_task), prior_steps=min(20, sft.prior_steps)),
        scale=dataclasses.replace(settings.scale, steps=60),
        explore=dataclasses.replace(settings.explore, episodes=36),
        world=dataclasses.replace(settings.world, vae_steps=30, steps=30, check_every=10),
        reward=dataclasses.replace(settings.reward, backbone_steps=20, head_epochs=4, embeddings=200, classifier_steps=20),
        loop=dataclasses.replace(settings.loop, contexts=3, iterations=2, snapshot_every=1),
        eval=dataclasses.replace(settings.eval, episodes=30, curve_episodes=6),
        report=dataclasses.replace(settings.report, replays=6, videos=3),
    )
    return short if settings.env.name == "tabletop" else _scarce(short)


def _scarce(settings: RunConfig) -> RunConfig:
    """One task, and few episodes: where drawing a frame takes as long as a whole episode of the tabletop."""
    return dataclasses.replace(
        settings,
        env=dataclasses.replace(settings.env, tasks=settings.env.tasks[:1] or (0,), steps=160),
        demos=dataclasses.replace(settings.demos, per_task=1),
        explore=dataclasses.replace(settings.explore, episodes=4),
        loop=dataclasses.replace(settings.loop, contexts=1, batch=settings.loop.group),
        eval=dataclasses.replace(settings.eval, episodes=2, curve_episodes=1),
        report=dataclasses.replace(settings.report, replays=1),
    )
