"""What a whole run takes beside LOOP's iterations: hours of the stages that GPUs work in, disk, and memory of the host, as sums over its settings.

What is left out takes minutes of a GPU: stages scale and explore, and of replays all but what one GPU scores. How long the true environment takes is
the host's affair: `environment_steps` says how many control steps it makes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from worldenv.benchmarks import networks
from worldenv.benchmarks.plan_costs import Counts, Gpu
from worldenv.config import RunConfig
from worldenv.learning.clips import ENCODED_TOGETHER
from worldenv.nouns import ACTION_DIM
from worldenv.policy.heads import L1Head, ProprioProjector, ScaleHead

_LEARNING = 3
"""Forward passes that a training step takes: one, and two back; one more where activations are computed again."""
_HELD_OUT_SCORED = 2
"""How often stage reward scores all held-out episodes: true frames and imagined ones."""
_HELD_OUT_IMAGINED = 1
"""How often stage eval imagines them."""
_POLICIES = 2
"""Before and after LOOP: each is evaluated, and its rollouts are replayed."""
_WORLD_STATES = 5
"""Copies of what is trained in the world's savepoint: weights, their average, the best average, and AdamW's two moments."""
_FLOAT32 = 4
_QUERY = {False: 4.6e9, True: 0.3e9}
"""Activations of a query that the published policy learns from, without and with gradient checkpointing [byte]: `worldenv.learning.loop.memory`."""
_CLIP = {False: 9.35e9 / (256 * 256 * 12), True: 1.13e9 / (256 * 256 * 12)}
"""As much of a clip that the published U-Net learns from, by pixel of its frames, memory's too; counted in the same way, in bfloat16."""


@dataclass(frozen=True)
class StageCost:
    """Part of a stage."""

    stage: str
    what: str
    flops: float
    """Of all of it."""
    shared: bool = False
    """All GPUs take part; else one does it, the others wait."""
    float32: bool = False
    """In float32, else in bfloat16."""

    def hours(self, gpu: Gpu, gpus: int, efficiency: float) -> float:
        """On `gpus` of `gpu`, at a share `efficiency` of the rate of their type."""
        rate = efficiency * (gpu.flops32 if self.float32 else gpu.flops) * (gpus if self.shared else 1)
        return self.flops / rate / 3600


def _demonstrations(settings: RunConfig) -> int:
    return settings.demos.per_task * (settings.env.test_starts // settings.env.test_states)


def _episodes(settings: RunConfig) -> int:
    """Demonstrations and exploration."""
    return settings.explore.episodes + _demonstrations(settings)


def _snapshots(settings: RunConfig) -> int:
    loop = settings.loop
    return loop.iterations // loop.snapshot_every if loop.snapshot_every else 0


def _curve_episodes(settings: RunConfig) -> int:
    """Of the policies between the first and the last: these two are evaluated anyway."""
    loop = settings.loop
    return (loop.iterations - 1) // loop.snapshot_every * settings.eval.curve_episodes if loop.snapshot_every else 0


def stage_costs(settings: RunConfig, found: Counts) -> Iterator[StageCost]:
    """In the order of a run. Every episode is as long as the limit: demonstrations are shorter, training may stop before its last step."""
    sft, world, chunks = settings.sft, settings.world, len(found.judged)
    held_out = max(1, round(settings.explore.held_out * settings.explore.episodes))
    imagined, scored = chunks * found.imagined(settings.simulator.denoise_steps), sum(found.judged)
    shown = _POLICIES * settings.eval.episodes
    acted = shown + _curve_episodes(settings)
    passes = _LEARNING + sft.gradient_checkpointing, _LEARNING + world.gradient_checkpointing
    yield StageCost("sft", f"at most {sft.steps} steps", sft.steps * sft.batch * passes[0] * found.query, shared=True)
    pictures = 2 * _episodes(settings) * (settings.env.steps + 1)
    yield StageCost("world", "frames and action maps encoded", pictures * found.picture, shared=True, float32=True)
    steps = world.steps * world.batch * (passes[1] * found.step + found.tokens)
    yield StageCost("world", f"at most {world.steps} steps", steps, shared=True)
    yield StageCost("reward", f"{_episodes(settings)} episodes imagined", _episodes(settings) * imagined, shared=True)
    yield StageCost("reward", f"{settings.reward.embeddings} embeddings", settings.reward.embeddings * found.embedding)
    yield StageCost("reward", f"{held_out} held-out episodes scored {_HELD_OUT_SCORED} times", _HELD_OUT_SCORED * held_out * scored, shared=True)
    yield StageCost("eval", f"{shown} episodes scored, each to its end", shown * scored, shared=True)
    yield StageCost("eval", f"{acted} episodes acted", acted * chunks * found.query)
    yield StageCost("eval", f"{held_out} held-out episodes imagined", _HELD_OUT_IMAGINED * held_out * imagined, shared=True)
    replays = _POLICIES * settings.report.replays
    yield StageCost("eval", f"{replays} replays scored", replays * scored, shared=True)
    yield StageCost("eval", f"{replays} replays imagined", replays * (imagined + scored + chunks * found.query), shared=True)


def environment_steps(settings: RunConfig) -> dict[str, int]:
    """Control steps that the true environment makes, by stage; of explore's and of eval's shown episodes every frame is drawn, of the curve one in a
    chunk."""
    limit, evaluated = settings.env.steps, settings.eval
    return {
        "explore": settings.explore.episodes * limit,
        "eval": (_POLICIES * (evaluated.episodes + settings.report.replays) + _curve_episodes(settings)) * limit,
    }


def disk_gb(settings: RunConfig, found: Counts) -> dict[str, float]:
    """What a run leaves or needs at once on its disk [GB]; LoRA, optimisers of policy and heads, and pages are smaller."""
    frame, loop = _frame(settings), settings.loop
    snapshots = _snapshots(settings)
    simulator, trained = _simulator(settings)
    sizes = {
        "pictures of episodes, before compression": _episodes(settings) * (settings.env.steps + 1) * frame,
        "3 policies": 3 * found.weights["policy"],  # of sft, scale, loop; each is the whole network
        f"what LOOP changed, {snapshots} copies": snapshots * found.changed,
        "simulator": simulator,
        "savepoint of stage world": _WORLD_STATES * trained,
        "reflector": found.weights["reflector"],
        "plans of engines, at most": settings.engines.limit_gb * 1e9,
        "rollouts of an iteration": loop.contexts * loop.group * len(found.judged) * frame,
        "replays": _POLICIES * settings.report.replays * 2 * settings.env.steps * frame,
    }
    return {name: size / 1e9 for name, size in sizes.items()}


def gpu_memory_gb(
    settings: RunConfig, found: Counts, processes: int, rollouts: Mapping[frozenset[str], float]
) -> dict[str, dict[str, float]]:
    """Of the fullest GPU by stage, and what takes it [GB]; `processes` of `torchrun` train in stages sft and world. `rollouts` says what they take
    on a GPU that has these networks [byte]. Stages that are left out take less: they learn nothing large.
    """
    sft, world, loop = settings.sft, settings.world, settings.loop
    lora = found.changed - _heads(settings)[0]  # the projector LOOP leaves as it is
    picture = settings.simulator.height * settings.simulator.width * (settings.simulator.memory + settings.simulator.chunk)
    simulator, trained = _simulator(settings)

    def learning(microbatch: int, checkpointing: bool) -> dict[str, float]:
        return {"gradients, moments, LoRA": 3 * found.changed + lora, "activations": microbatch * _QUERY[checkpointing]}

    def looping(networks: frozenset[str]) -> dict[str, float]:
        copied = [name for name in ("policy", "reflector") if name in networks and settings.engines.back_end != "eager"]
        update = learning(loop.microbatch, loop.gradient_checkpointing)
        return {
            "rollouts": rollouts[networks], "weights of engines, at most": sum(found.weights[name] for name in copied),
            "an update": sum(update.values()) if "policy" in networks else 0.0,
        }  # fmt: skip

    stages = {
        "sft": {"policy": found.weights["policy"], **learning(sft.microbatch, sft.gradient_checkpointing)},
        "world": {
            "weights": simulator, "averages, moments, gradients": 5 * trained,  # the average and the best of it, two moments
            "in bfloat16": trained / 2 if world.precision == "bfloat16" else 0.0, "sums of processes": trained if processes > 1 else 0.0,
            "activations": min(world.microbatch, world.batch // processes) * _CLIP[world.gradient_checkpointing] * picture,
        },
        "loop": max((looping(networks) for networks in rollouts), key=lambda one: sum(one.values())),
    }  # fmt: skip
    return {stage: {what: size / 1e9 for what, size in parts.items() if size} for stage, parts in stages.items()}


def host_memory_gb(settings: RunConfig, found: Counts, processes: int) -> dict[str, float]:
    """In the memory of one machine by stage, `processes` of `torchrun` in stages sft and world [GB]: pictures of episodes, what begins or stays on
    the host, and what is put together there to be saved. Files that are read are mapped: once for all processes, given back where memory is short."""
    each = (settings.env.steps + 1) * _frame(settings)
    demonstrations, everything = _demonstrations(settings) * each, _episodes(settings) * each
    simulator, trained = _simulator(settings)
    sizes = {
        "sft": processes * (demonstrations + (sum(_heads(settings)) if settings.sft.start else found.weights["policy"])) + found.weights["policy"],
        "scale": demonstrations + _hiddens(settings) + found.weights["policy"],
        # random weights are made by every process; an autoencoder learns from all episodes, put together
        "world": processes * (2 * ENCODED_TOGETHER * each + (0 if settings.world.initial else simulator))
        + (0 if settings.world.initial else 3 * everything) + _WORLD_STATES * trained,
        "reward": 2 * everything + found.weights["reflector"],  # true and imagined
        "eval": settings.explore.episodes * each,
    }  # fmt: skip
    return {name: size / 1e9 for name, size in sizes.items()}


@functools.cache
def _simulator(settings: RunConfig) -> tuple[float, float]:
    """All of it in float32, and what of it is trained [byte]."""
    evac = networks.meta_simulator(settings.simulator)
    held = tuple(f"{part}." for part in settings.world.frozen)
    sizes = {name: float(_FLOAT32 * parameter.numel()) for name, parameter in evac.named_parameters()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if not name.startswith(held))


def _heads(settings: RunConfig) -> tuple[float, float]:
    """What a published policy is given, random, in float32 [byte]: both heads; and the proprio projector."""
    policy = settings.policy
    with torch.device("meta"):
        heads = (
            L1Head(policy.llama.width, policy.head_width, policy.head_blocks),
            ScaleHead(policy.llama.width, policy.head_width, policy.head_blocks, policy.scale_form),
        )
        projector = ProprioProjector(policy.proprio, policy.llama.width)
    return float(sum(parameter.nbytes for one in heads for parameter in one.parameters())), float(sum(p.nbytes for p in projector.parameters()))


def _hiddens(settings: RunConfig) -> float:
    """Of every chunk start of the demonstrations, in the backbone's type [byte]."""
    policy, starts = settings.policy, _demonstrations(settings) * (settings.env.steps - settings.policy.chunk + 1)
    return float(starts * policy.chunk * ACTION_DIM * policy.llama.width * (2 if settings.sft.precision == "bfloat16" else _FLOAT32))


def _frame(settings: RunConfig) -> float:
    return 3.0 * settings.env.image**2
