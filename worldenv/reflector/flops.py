"""What scoring a growing video costs, counted by torch's own counter on the meta device: real calls, no data.

    stretched    every step from its first pixel, `frames` of them from the first step on, repeated while there are fewer: what a plain loop does
    strict       every step from its first pixel, the frames that the sampler shows
    judged       what `LlavaReflector.judge` does, a chunk at a time

A product and a sum are 2 operations. Attention is counted as it runs here, with an explicit mask and so over all pairs; `strict` and `stretched` have
one causal sequence each, of which a kernel for that case skips half the pairs: `causal` is with these taken off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from worldenv.config import ReflectorConfig
from worldenv.reflector.frames import shown
from worldenv.reflector.judge import LlavaReflector
from worldenv.reflector.llava import Llava, architecture, backbone
from worldenv.reflector.prompt import Prompt, word_tokenizer
from worldenv.reflector.weights import fresh_head

INSTRUCTION = "pick up the black bowl between the plate and the ramekin and place it on the plate"
"""Of LIBERO: its question has about as many words here as tokens in the published model."""


@dataclass(frozen=True)
class Cost:
    """Operations of scoring one video after each of its steps."""

    judged: int
    strict: int
    stretched: int
    strict_causal: int
    """`strict` without the pairs that a causal kernel skips."""
    stretched_causal: int


def on_meta(config: ReflectorConfig, vocab: int) -> LlavaReflector:
    """A reflector of any size that takes no memory: shapes without data."""
    prompt = Prompt(word_tokenizer([INSTRUCTION]))
    with torch.device("meta"):
        model = backbone(architecture(config, vocab, prompt.image, prompt.video))
        head = fresh_head(config, 0)
    return LlavaReflector(config, Llava(model, prompt), head).freeze()


def counted(call: Callable[[], object]) -> int:
    """Operations of `call`."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@torch.no_grad()
def count(config: ReflectorConfig, vocab: int, steps: int, chunk: int = 8) -> Cost:
    """Of one video with a score after each of `steps` steps, judged `chunk` steps at a time."""
    reflector = on_meta(config, vocab)
    llava, geometry = reflector.llava, reflector._geometry(INSTRUCTION)

    def frames(number: int) -> torch.Tensor:
        return torch.empty(1, number, config.image, config.image, 3, dtype=torch.uint8, device="meta")

    whole, skipped = {}, {}
    for number in sorted({len(shown(config.sampler, t, config.frames)) for t in range(1, steps + 1)} | {config.frames}):
        whole[number] = counted(functools.partial(reflector.embed, [INSTRUCTION], [frames(number)[0]]))
        tokens = geometry.before + number * geometry.frame + geometry.question
        skipped[number] = tokens * (tokens - 1) // 2 * llava.pair_flops
    shows = [len(shown(config.sampler, t, config.frames)) for t in range(1, steps + 1)]
    watch, judged = reflector.begin([INSTRUCTION], frames(1)[:, 0]), counted(lambda: llava.encode(frames(1)[0]))
    for start in range(0, steps, chunk):
        with FlopCounterMode(display=False) as counter:
            _, watch = reflector.judge(watch, frames(min(chunk, steps - start)))
        judged += int(counter.get_total_flops())
    strict, stretched = sum(whole[n] for n in shows), steps * whole[config.frames]
    return Cost(judged, strict, stretched, strict - sum(skipped[n] for n in shows), stretched - steps * skipped[config.frames])
