"""The smallest policy that has every part, observations and rollouts for it: a real OpenVLA-OFT in milliseconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from worldenv import noise
from worldenv.config import LlamaConfig, PolicyConfig, VisionConfig
from worldenv.nouns import ActionChunk, Context, Observation, Rollout
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.policy.processing import PUBLISHED_EMPTY, PUBLISHED_PAD, PromptTokenizer, Statistics, prompt
from worldenv.presets import OPENVLA_OFT

INSTRUCTIONS = ("push the red block onto the strip", "lift the mug", "open the top drawer of the cabinet")
SMALL = PolicyConfig(
    image=16,
    dino=VisionConfig(width=16, depth=2, heads=2, mlp=32, patch=8, registers=2),
    siglip=VisionConfig(width=8, depth=2, heads=2, mlp=16, patch=8),
    llama=LlamaConfig(width=16, layers=2, heads=2, ffn=32, vocab=40),
    head_width=16,
    jpeg=False,
    crop_area=1.0,
)


def statistics(seed: int = 0) -> Statistics:
    draw = np.random.default_rng(seed)
    command = draw.uniform(-1, 1, (200, 7)).astype(np.float32)
    command[:, 6] = np.sign(command[:, 6])
    return Statistics.of([command], [draw.uniform(-1, 1, (200, 8)).astype(np.float32)], "drawn numbers")


def small_policy(config: PolicyConfig = SMALL, seed: int = 0) -> OpenVLAOFT:
    """Its heads are made lively, so that mu and scale differ between observations as a trained policy's do."""
    policy = OpenVLAOFT.create(config, PromptTokenizer.build(INSTRUCTIONS), statistics(), noise.torch_seed(seed, 9), torch.device("cpu"))
    with torch.no_grad():
        policy.network.scale_head.last.weight.mul_(50.0)
    return policy


LIKE: PolicyConfig = dataclasses.replace(
    SMALL, llama=dataclasses.replace(SMALL.llama, vocab=32064, rms_eps=1e-5, kv_heads=1), jpeg=True, crop_area=0.9, scale_floor=0.0,
    dino_mean=OPENVLA_OFT.dino_mean, dino_std=OPENVLA_OFT.dino_std,
)  # fmt: skip
"""As a published directory states it; nothing of it is what we would take by default."""


def llama_like_tokenizer(instructions: Sequence[str] = INSTRUCTIONS) -> PromptTokenizer:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": PUBLISHED_EMPTY, "<pad>": PUBLISHED_PAD}
    split = pre_tokenizers.Whitespace()
    for text in instructions:
        for word, _ in split.pre_tokenize_str(prompt(text)):
            words.setdefault(word, 100 + len(words))
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PromptTokenizer(tokenizer, PUBLISHED_EMPTY, PUBLISHED_PAD)


def published_policy(config: PolicyConfig = LIKE, seed: int = 0, instructions: Sequence[str] = INSTRUCTIONS) -> OpenVLAOFT:
    made = OpenVLAOFT.create(config, llama_like_tokenizer(instructions), statistics(), noise.torch_seed(seed, 9), torch.device("cpu"))
    with torch.no_grad():
        made.network.scale_head.last.weight.mul_(50.0)
    return made


def observation(batch: int, seed: int = 0, instruction: str | None = None, size: int = 16) -> Observation:
    """`batch` random observations; the instructions go round, so prompts differ in length, unless one is given."""
    draw = np.random.default_rng(seed)
    words = tuple(instruction or INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(batch))
    frame = torch.from_numpy(draw.integers(0, 256, (batch, size, size, 3), dtype=np.uint8))
    return Observation(frame, torch.from_numpy(draw.uniform(-1, 1, (batch, 8)).astype(np.float32)), words)


def uniform(batch: int, seed: int = 0, chunk: int = 8) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(1e-6, 1 - 1e-6, (batch, chunk, 7)))


def rollouts(policy: OpenVLAOFT, groups: int = 2, group: int = 4, seed: int = 0) -> list[Rollout]:
    """Rollouts that `policy` really drew, of different lengths: their log-densities are its own."""
    made, draw = [], np.random.default_rng(seed)
    for number in range(groups * group):
        instruction = INSTRUCTIONS[(number // group) % len(INSTRUCTIONS)]
        queries = 1 + int(draw.integers(3))
        seen = observation(queries, seed=1000 * seed + number, instruction=instruction)
        chunk: ActionChunk = policy.act(seen, uniform(queries, seed=5000 * seed + number))
        live = torch.ones(queries, 8, dtype=torch.bool)
        live[-1, 1 + int(draw.integers(8)) :] = False
        score = torch.where(live, torch.from_numpy(draw.uniform(0, 1, (queries, 8))).float(), 0.0)
        context = Context(instruction, 0, number // group, seen.frame[0].numpy(), np.array([0, 0, 0, 0, 0, 0, 1.0]), 1.0)
        parts = (seen.frame, seen.proprio, chunk.action, chunk.log_prob, score, live)
        made.append(Rollout(number, number // group, context, *parts, stopped=bool(draw.integers(2))))
    return made
