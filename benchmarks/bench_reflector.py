"""How long does it take to score videos after each of their frames? Ceiling: the counted FLOPs of judging at the matrix rate.

A group of rollouts grows in step, a chunk at a time, as LOOP's do; `LlavaReflector.judge` computes what is new. The baseline computes every score
from its first pixel with the same sampler (`strict`), and both must give the same scores. 32 frames are shown at most, at either size.

    python -m benchmarks.bench_reflector [--steps 220]     operations at the published size instead of seconds, counted on the meta device
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence

import torch

from worldenv.benchmarks.harness import Agreement, Row, Setting, Variants, Work, compare
from worldenv.config import ReflectorConfig
from worldenv.presets import LLAVA_ONEVISION, LLAVA_VOCAB, PRESETS
from worldenv.reflector import flops
from worldenv.reflector.flops import INSTRUCTION
from worldenv.reflector.frames import Sampler
from worldenv.reflector.judge import LlavaReflector
from worldenv.reflector.llava import Llava, architecture, backbone, cast
from worldenv.reflector.prompt import Prompt, word_tokenizer
from worldenv.reflector.weights import fresh_head

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Largest difference of a score in [0, 1] from the one that is computed anew; scores spread by about 0.2."""
SAMPLERS: tuple[Sampler, ...] = ("stable_dyadic", "uniform")
_SEED, _CHUNK = 11, 8
_FRAMES = 32


def _config(setting: Setting, sampler: Sampler) -> tuple[ReflectorConfig, int]:
    """Sizes, and rows of the embedding table."""
    base, vocab = (PRESETS["tiny"].reflector, 64) if setting.size == "tiny" else (LLAVA_ONEVISION, LLAVA_VOCAB)
    return dataclasses.replace(base, sampler=sampler, frames=_FRAMES), vocab


def _extent(setting: Setting) -> tuple[int, int]:
    """Videos of a group, and steps of each."""
    return (2, 16) if setting.brief else (8, 64) if setting.size == "tiny" else (1, 64)


def made(config: ReflectorConfig, vocab: int, setting: Setting) -> LlavaReflector:
    """A reflector with random weights whose scores spread, on the setting's device in its type."""
    prompt = Prompt(word_tokenizer([INSTRUCTION]))
    with torch.random.fork_rng(devices=[]), torch.device(setting.device):
        torch.manual_seed(_SEED)
        model = cast(backbone(architecture(config, vocab, prompt.image, prompt.video)), setting.dtype)
        found = LlavaReflector(config, Llava(model, prompt), fresh_head(config, _SEED).to(setting.device)).freeze()
    assert found.head is not None
    video = _videos(config, 1, 12, setting)[0]
    with torch.no_grad():
        logit = found.logit(found.embed([INSTRUCTION] * 12, [video[: 1 + i] for i in range(12)]))
        found.head.outer.weight.div_(logit.std())
        found.head.outer.bias.sub_(logit.mean()).div_(logit.std())
    return found


def _videos(config: ReflectorConfig, count: int, steps: int, setting: Setting) -> torch.Tensor:
    generator = torch.Generator(setting.device).manual_seed(_SEED)
    shape = (count, steps + 1, config.image, config.image, 3)
    return torch.randint(0, 256, shape, generator=generator, device=setting.device, dtype=torch.uint8)


def judged(reflector: LlavaReflector, video: torch.Tensor) -> torch.Tensor:
    """Scores (B, T) of videos (B, T + 1, H, W, 3) as they grow by chunks."""
    watch, parts = reflector.begin([INSTRUCTION] * len(video), video[:, 0]), []
    for some in torch.split(video[:, 1:], _CHUNK, dim=1):
        part, watch = reflector.judge(watch, some)
        parts.append(part)
    return torch.cat(parts, dim=1)


def strict(reflector: LlavaReflector, video: torch.Tensor) -> torch.Tensor:
    """The same scores, each from its first pixel; as many at once as are judged at once."""
    times = range(1, video.shape[1])
    rows = [[reflector.strict(INSTRUCTION, one, times[i : i + _CHUNK]) for i in range(0, len(times), _CHUNK)] for one in video]
    return torch.stack([torch.cat(row) for row in rows])


def _measure(sampler: Sampler, setting: Setting) -> Row:
    config, vocab = _config(setting, sampler)
    count, steps = _extent(setting)
    reflector, video = made(config, vocab, setting), _videos(config, count, steps, setting)
    agreement = Agreement(float((judged(reflector, video) - strict(reflector, video)).abs().max()), LIMITS[setting.dtype])
    cost = flops.count(config, vocab, steps, _CHUNK)
    work = Work(count * cost.judged, sum(p.nbytes for p in reflector.llava.parameters()))
    row = compare(
        f"reflector {sampler}", setting, lambda: judged(reflector, video), ("strict, same sampler", lambda: strict(reflector, video)), agreement, work
    )  # fmt: skip
    counted = cost.strict / cost.judged
    return dataclasses.replace(row, note=f"{row.note}; {count} videos of {steps} steps; counted ratio {counted:.1f}")


def reflector(setting: Setting) -> Variants:
    """A group of videos, scored after each frame, for each way to choose the frames that are shown."""
    return {sampler: functools.partial(_measure, sampler, setting) for sampler in SAMPLERS}


def main(argv: Sequence[str] | None = None) -> int:
    """Operations of scoring one rollout at every step at the published size: a table, then one JSON line."""
    parser = argparse.ArgumentParser(description="Operations of scoring one rollout after each of its steps, at the published size, counted.")
    parser.add_argument("--steps", type=int, default=220, help="steps of the rollout")
    parser.add_argument("--sampler", choices=SAMPLERS, action="append", help="which frames are shown; both without it")
    args = parser.parse_args(argv)
    rows = []
    for sampler in args.sampler or SAMPLERS:
        cost = flops.count(dataclasses.replace(LLAVA_ONEVISION, sampler=sampler), LLAVA_VOCAB, args.steps, _CHUNK)
        ratio = cost.stretched_causal / cost.judged
        rows.append({"sampler": sampler, "steps": args.steps, **dataclasses.asdict(cost), "ratio": ratio})
        said = "  ".join(f"{name} {value / 1e15:.3f}" for name, value in dataclasses.asdict(cost).items())
        print(f"{sampler:14} {said} PFLOP; stretched_causal / judged {ratio:.1f}")
    print(json.dumps({"rows": rows, "unit": "FLOP"}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
