"""The reflector equals transformers' own forward, and what it keeps of a growing video changes nothing; wrong versions of either are seen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from published_directories import write_reflector
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from worldenv import checkpoint
from worldenv.checkpoint import CheckpointError
from worldenv.config import ReflectorConfig
from worldenv.presets import LLAVA_ONEVISION, LLAVA_VOCAB
from worldenv.reflector import cache, flops, frames, graphs, judge, llava, prompt, weights
from worldenv.reflector.contract import Reflector
from worldenv.reflector.head import RewardHead
from worldenv.reflector.judge import LlavaReflector

INSTRUCTIONS = ("push the red block onto the green strip", "turn on the stove", "push the blue block left of the red block now")
SMALL = ReflectorConfig(
    image=24, patch=8, vision_width=16, vision_layers=2, vision_heads=2, vision_mlp=24, width=24, layers=2, heads=4, kv_heads=2, ffn=32, frames=5,
    head_width=16,
)  # fmt: skip
TOLERANCE = 1e-5
"""Of scores in [0, 1], float32: the order of sums differs between the two ways, nothing else. Measured: 2e-7 where scores spread by 0.2."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def lively(config: ReflectorConfig) -> LlavaReflector:
    """A reflector whose scores spread over [0, 1]: with freshly initialised weights, everything is near 0.5 and hides mistakes."""
    reflector = weights.initialise(config, INSTRUCTIONS, seed=3)
    reflector.head = weights.fresh_head(config, seed=3)
    reflector.freeze()
    generator = torch.Generator().manual_seed(5)
    for module in (reflector.llava, reflector.head):
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1 and "norm" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() > 1:
                spread = 0.5 if "embed" in name else 2.0 / parameter[0].numel() ** 0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    clips = [video[: 1 + i % 5] for i, video in enumerate(videos(12, 5, config.image, seed=2))]
    logit = reflector.logit(reflector.embed([INSTRUCTIONS[i % 3] for i in range(12)], clips))
    reflector.head.outer.weight.div_(logit.std())
    reflector.head.outer.bias.sub_(logit.mean()).div_(logit.std())
    return reflector


def videos(count: int, length: int, side: int = 24, seed: int = 0) -> torch.Tensor:
    """(count, length, side, side, 3) uint8; frames of a video are related, as they are in life."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (count, 1, side, side, 3))
    change = rng.integers(-60, 61, (count, length, side, side, 3)).cumsum(axis=1) // 4
    return torch.from_numpy(np.clip(base + change, 0, 255).astype(np.uint8))


# Frames


@given(t=st.integers(0, 400), limit=st.integers(2, 40), sampler=st.sampled_from(["uniform", "stable_dyadic"]))
def test_shown_frames(t: int, limit: int, sampler: frames.Sampler) -> None:
    path = frames.shown(sampler, t, limit)
    assert path[0] == 0
    assert path[-1] == t
    assert len(path) <= limit
    assert list(path) == sorted(set(path))
    if t < limit:
        assert path == tuple(range(t + 1))
    for later in range(t + 1, t + 20):  # what is forgotten is never asked for again
        assert all(frames.needed(sampler, t, limit, index) for index in frames.shown(sampler, later, limit) if index <= t)


@pytest.mark.parametrize("limit", [2, 4, 32])
def test_uniform_is_the_papers_linspace(limit: int) -> None:
    for t in range(limit, 600):
        assert frames.shown("uniform", t, limit) == tuple(np.linspace(0, t, limit, dtype=int).tolist())


def test_stable_dyadic_grows_at_its_end_between_doublings() -> None:
    breaks = 0
    for t in range(1, 500):
        before, now = (frames.shown("stable_dyadic", time, 32) for time in (t - 1, t))
        kept = before if before[-1] in now else before[:-1]
        breaks += now[: len(kept)] != kept
    assert breaks == 5  # the stride doubles 5 times: at t = 32, 63, 125, 249, 497
    assert frames.shown("stable_dyadic", 63, 32)[:3] == (0, 4, 8)
    assert frames.shown("stable_dyadic", 61, 32) == (*range(0, 61, 2), 61)


def test_frames_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="at least 2 frames"):
        frames.shown("uniform", 4, 1)
    with pytest.raises(ValueError, match="dyadic"):
        frames.shown("random", 4, 4)  # type: ignore[arg-type]


# Prompt


def test_the_prompt_is_the_papers_question_in_chatml() -> None:
    assert prompt.BEFORE + prompt.VIDEO + prompt.question("open the drawer") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<video>\nWatch the video and determine whether it completes"
        " the task: open the drawer — answer only 'Yes' or 'No'.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_words_before_and_after_the_video_can_be_cut_apart() -> None:
    asked = prompt.Prompt(prompt.word_tokenizer(INSTRUCTIONS))
    whole = asked.tokenizer.encode(prompt.BEFORE + prompt.VIDEO * 7 + prompt.question(INSTRUCTIONS[1]), add_special_tokens=False).ids
    assert tuple(whole) == (*asked.before, *[asked.video] * 7, *asked.question(INSTRUCTIONS[1]))
    assert asked.question(INSTRUCTIONS[0]) != asked.question(INSTRUCTIONS[2])
    assert len({asked.yes, asked.no, asked.video, asked.image}) == 4


def test_the_tokenizer_is_a_function_of_the_instructions_and_survives_its_text() -> None:
    tokenizer = prompt.word_tokenizer(INSTRUCTIONS)
    assert tokenizer.to_str() == prompt.word_tokenizer(INSTRUCTIONS[::-1]).to_str()
    again = prompt.Prompt(Tokenizer.from_str(tokenizer.to_str()))
    assert again.question(INSTRUCTIONS[0]) == prompt.Prompt(tokenizer).question(INSTRUCTIONS[0])


def test_an_unknown_word_is_named() -> None:
    reflector = weights.initialise(SMALL, INSTRUCTIONS, 0)
    with pytest.raises(ValueError, match="the word 'mauve'"):
        reflector.begin(["push the mauve block"], videos(1, 1)[:, 0])


def test_another_models_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="no token '<video>'"):
        prompt.Prompt(Tokenizer.from_str(prompt.word_tokenizer(INSTRUCTIONS).to_str().replace("<video>", "<film>")))


# Against transformers


def theirs(
    model: LlavaOnevisionForConditionalGeneration, asked: prompt.Prompt, instruction: str, clip: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hiddens after the last norm (S, width) and logits of the last token, by transformers' forward from pixels and tokens of the whole text."""
    grid = -(-(model.config.vision_config.image_size // model.config.vision_config.patch_size) // 2)
    text = prompt.BEFORE + prompt.VIDEO * (len(clip) * grid**2 + 1) + prompt.question(instruction)
    ids = torch.tensor([asked.tokenizer.encode(text, add_special_tokens=False).ids])
    pixels = (clip.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        answer = model(input_ids=ids, pixel_values_videos=pixels[None], output_hidden_states=True)
    return answer.hidden_states[-1][0], answer.logits[0, -1]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("image", [16, 24], ids=["even grid", "odd grid"])
def test_equals_transformers_on_a_saved_directory(tmp_path: Path, image: int, count: int) -> None:
    config = replace(SMALL, image=image)
    reflector = lively(config)
    write_reflector(tmp_path, reflector)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path, local_files_only=True)
    opened = weights.open_directory(tmp_path, SMALL, torch.float32)
    assert opened.config == config
    clip = videos(1, count, image)[0]
    hidden, logits = theirs(model, reflector.llava.prompt, INSTRUCTIONS[1], clip)
    for ours in (reflector, opened):
        last, mean = (LlavaReflector(replace(ours.config, pooling=p), ours.llava, None).embed(INSTRUCTIONS[1:2], [clip]) for p in ("last", "mean"))
        torch.testing.assert_close(last.answer[0], hidden[-1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last.pooled[0], hidden[-1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mean.pooled[0], hidden.mean(0), rtol=1e-5, atol=1e-5)
        chance = logits[[ours.llava.prompt.yes, ours.llava.prompt.no]].softmax(0)[0]
        headless = LlavaReflector(ours.config, ours.llava, None)
        torch.testing.assert_close(headless.logit(last).sigmoid()[0], chance, rtol=1e-5, atol=1e-6)


def test_vision_features_are_those_before_the_last_norm() -> None:
    """True of transformers 5.17 only because SigLIP does not tie hidden_states[-1] to the normalised output: looked at again on every upgrade."""
    reflector = lively(SMALL)
    inner = reflector.llava.model.model
    clip = videos(1, 3)[0]
    mine = reflector.llava.encode(clip)
    inner.vision_tower.post_layernorm.weight.data.mul_(7)
    model_answer = inner.get_video_features(llava.to_pixels(clip, 24)[None], vision_feature_layer=-1, vision_feature_select_strategy="full")
    torch.testing.assert_close(mine.flatten(0, 1), model_answer.pooler_output[0], rtol=1e-6, atol=1e-6)
    assert mine.shape == (3, 4, 24)  # 3 x 3 patches, halved upward to 2 x 2


def test_published_sizes() -> None:
    published = LlavaOnevisionConfig()
    assert published.vision_config.num_hidden_layers == 26  # of SigLIP-So400m's 27: the last one was deleted
    assert (published.vision_feature_layer, published.vision_feature_select_strategy) == (-1, "full")
    assert (-(-(published.vision_config.image_size // published.vision_config.patch_size) // 2)) ** 2 == 196


@pytest.mark.parametrize("shape", [(256, 256), (40, 40), (300, 200)], ids=str)
def test_frames_are_cropped_and_resized_as_pillow_does(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    frame = np.asarray(Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)).resize(shape[::-1], Image.Resampling.BILINEAR))
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    want = np.asarray(Image.fromarray(frame[top : top + side, left : left + side]).resize((96, 96), Image.Resampling.BICUBIC))
    got = (llava.to_pixels(torch.from_numpy(frame.copy())[None], 96)[0].permute(1, 2, 0) + 1) * 127.5
    assert np.abs(got.numpy() - want.astype(np.float32)).max() < 1.01  # Pillow has fixed-point weights: one level


def test_pixels_run_from_minus_one_to_one() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 24, 24, 3)
    assert llava.to_pixels(ends, 24)[:, 0, 0, 0].tolist() == [-1.0, 1.0]
    with pytest.raises(ValueError, match="uint8"):
        llava.to_pixels(ends.float(), 24)


def test_the_head_is_float32_whatever_the_backbone_is() -> None:
    reflector = lively(SMALL)
    whole = reflector.strict(INSTRUCTIONS[0], videos(1, 6)[0], [3, 5])
    llava.cast(reflector.llava.model, torch.bfloat16)
    half = reflector.strict(INSTRUCTIONS[0], videos(1, 6)[0], [3, 5])
    assert half.dtype == torch.float32
    assert reflector.head is not None
    assert {p.dtype for p in reflector.head.parameters()} == {torch.float32}
    torch.testing.assert_close(half, whole, rtol=0, atol=0.1)


# Growing videos


def judged(reflector: Reflector, video: torch.Tensor, instruction: tuple[str, ...], lead: tuple[int, ...], chunk: int) -> list[torch.Tensor]:
    """Scores of each video after every frame but the first; video i is `lead[i]` frames ahead, the rest is judged in one batch, `chunk` at a time."""
    watch, scores, at = [], [], []
    for i, ahead in enumerate(lead):
        one = reflector.begin(instruction[i : i + 1], video[i : i + 1, 0])
        parts = []
        if ahead:
            part, one = reflector.judge(one, video[i : i + 1, 1 : 1 + ahead])
            parts.append(part[0])
        watch += one
        scores.append(parts)
        at.append(1 + ahead)
    while left := [i for i in range(len(at)) if at[i] < video.shape[1]]:  # who is at the end leaves, the others go on
        step = min(chunk, *(video.shape[1] - at[i] for i in left))
        part, after = reflector.judge([watch[i] for i in left], torch.stack([video[i, at[i] : at[i] + step] for i in left]))
        for row, i in enumerate(left):
            scores[i].append(part[row])
            watch[i] = after[row]
            at[i] += step
    return [torch.cat(parts) for parts in scores]


def error(reflector: LlavaReflector, length: int = 24, lead: tuple[int, ...] = (0, 3, 7), chunk: int = 4) -> float:
    """The largest difference between judged and strictly recomputed scores."""
    video = videos(len(lead), length)
    instruction = tuple(INSTRUCTIONS[i % 3] for i in range(len(lead)))
    scores = judged(reflector, video, instruction, lead, chunk)
    worst = 0.0
    for i, score in enumerate(scores):
        want = reflector.strict(instruction[i], video[i], range(1, length))
        assert score.shape == want.shape
        assert want.std() > 0.02  # or nothing is shown
        worst = max(worst, float((score - want).abs().max()))
    return worst


SAMPLERS = pytest.mark.parametrize("sampler", ["uniform", "stable_dyadic"])


@SAMPLERS
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("limit", [4, 12, 32])
def test_judging_a_growing_video_equals_reading_it_anew(sampler: frames.Sampler, pooling: str, limit: int) -> None:
    """At every one of 64 frames, of three videos of one batch that are of different length until the longest ends; chunks of 8 and what is left."""
    reflector = lively(dataclasses.replace(SMALL, sampler=sampler, pooling=pooling, frames=limit))  # type: ignore[arg-type]
    assert error(reflector, length=64, lead=(0, 3, 17), chunk=8) <= TOLERANCE


@SAMPLERS
@pytest.mark.parametrize("costs", [(1, 0), (0, 1)], ids=["whole chunk in one row", "a row for each question"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "yes or no"])
def test_every_way_to_put_questions_into_rows_is_exact(sampler: frames.Sampler, costs: tuple[int, int], head: bool) -> None:
    reflector = lively(replace(SMALL, sampler=sampler, pooling="mean"))
    reflector.llava.token_flops, reflector.llava.pair_flops = costs
    if not head:
        reflector = LlavaReflector(reflector.config, reflector.llava, None)
    geometry = cache.Geometry(14, 4, 30, *costs)
    rows = cache.plan(sampler, 5, 9, 6, (0,), geometry)
    assert len(rows) == (1 if costs == (1, 0) else 6)
    assert error(reflector) <= TOLERANCE


def test_a_whole_video_in_one_call_equals_chunks() -> None:
    reflector = lively(SMALL)
    video = videos(2, 33)
    score, _ = reflector.judge(reflector.begin(INSTRUCTIONS[:2], video[:, 0]), video[:, 1:])
    torch.testing.assert_close(score, torch.stack(judged(reflector, video, INSTRUCTIONS[:2], (0, 0), 8)), rtol=0, atol=TOLERANCE)


@SAMPLERS
def test_a_watch_is_never_changed_and_frames_count_as_they_are_now(sampler: frames.Sampler) -> None:
    """The same watch, judged with other frames, and what comes of it judged on: what was remembered for the first ones must not show through."""
    reflector = lively(replace(SMALL, sampler=sampler))
    video, other = videos(1, 25), videos(1, 25, seed=9)
    other[:, :9] = video[:, :9]
    _, watch = reflector.judge(reflector.begin(INSTRUCTIONS[:1], video[:, 0]), video[:, 1:9])
    held = {name: getattr(watch[0], name) for name in ("length", "trunk", "instruction")}
    tensors = {"past": watch[0].past.clone(), **{f: tensor.clone() for f, tensor in watch[0].feature.items()}}
    for film in (video, other, video):
        score, after = reflector.judge(watch, film[:, 9:17])
        later, _ = reflector.judge(after, film[:, 17:])
        want = reflector.strict(INSTRUCTIONS[0], film[0], range(9, 25))
        torch.testing.assert_close(torch.cat((score[0], later[0])), want, rtol=0, atol=TOLERANCE)
        assert after[0] is not watch[0]
    assert held == {name: getattr(watch[0], name) for name in held}
    assert torch.equal(watch[0].past, tensors.pop("past"))
    assert watch[0].feature.keys() == tensors.keys()
    assert all(torch.equal(watch[0].feature[f], tensor) for f, tensor in tensors.items())


def test_a_watch_holds_what_can_be_used_and_no_batch() -> None:
    reflector = lively(replace(SMALL, sampler="stable_dyadic", frames=4))
    video = videos(6, 25)
    watch = reflector.begin([INSTRUCTIONS[0]] * 6, video[:, 0])
    for start in (1, 9, 17):
        _, watch = reflector.judge(watch, video[:, start : start + 8])
    assert set(watch[0].feature) == {0, 16}  # the stride is 16 from the next frame on
    assert watch[0].trunk == (0,)
    tensors = [watch[0].past, *watch[0].feature.values()]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("way", ["judge", "embed"])
@SAMPLERS
def test_no_pass_finds_what_an_earlier_one_made_in_memory(monkeypatch: pytest.MonkeyPatch, sampler: frames.Sampler, way: str) -> None:
    """At the published size keys and values are 57 kB a token, and a call has up to a million tokens."""
    monkeypatch.setattr(judge, "ROW_TOKENS", 100)
    reflector = lively(replace(SMALL, sampler=sampler))
    read, passes, most = reflector.llava.runs[graphs.LLM], list[StorageWeakRef](), 0

    def watched(*given: torch.Tensor) -> Any:
        nonlocal most
        most = max(most, sum(not one.expired() for one in passes))
        made = read(*given)
        passes.extend(StorageWeakRef(one.untyped_storage()) for one in (given[0], *made))  # type: ignore[no-untyped-call]
        return made

    reflector.llava.runs[graphs.LLM] = watched
    video = videos(4, 17)
    if way == "judge":
        reflector.judge(reflector.begin([INSTRUCTIONS[0]] * 4, video[:, 0]), video[:, 1:])
    else:
        with torch.no_grad():
            reflector.embed([INSTRUCTIONS[0]] * 4, [one[:n] for one, n in zip(video, (1, 2, 4, 5), strict=True)])
    assert len(passes) >= 3 * 4  # three of each
    assert most == 0


def test_rows_reuse_what_is_known() -> None:
    """The count that the plan minimises: 32 frames at the published size, one chunk of 8 at t = 150 (facts of the architecture, not of a run)."""
    token, pair = 2 * 28 * 3584 * (2 * 28 * 128 + 2 * 4 * 128 + 3 * 18944), 4 * 28 * 28 * 128
    published = cache.Geometry(14, 196, 46, token, pair)
    assert token == pytest.approx(13.05e9, rel=0.002)

    def scored(sampler: frames.Sampler, trunk: tuple[int, ...] | None) -> float:
        return sum(row.flops(published) for row in cache.plan(sampler, 32, 150, 8, trunk, published)) / 1e12

    strict = sum(cache.single(frames.shown("stable_dyadic", t, 32), t).flops(published) for t in range(150, 158)) / 1e12
    path = frames.shown("stable_dyadic", 149, 32)
    trunk = path[: cache.shared_length(path, frames.shown("stable_dyadic", 150, 32))]
    assert scored("stable_dyadic", trunk) * 16 < strict
    assert len(cache.plan("stable_dyadic", 32, 150, 8, trunk, published)) < 8  # frame 152 is shared by what comes after it


def test_operations_of_scoring_a_rollout_at_every_step() -> None:
    """One layer of each kind at the published widths stands for all, which are alike: 220 steps, a score at each, 32 frames, counted by torch.

    At the whole depth (`python -m benchmarks.bench_reflector`): 24.6 PF from scratch, 1.08 PF judged with stable_dyadic, a ratio of 22.8; the
    tolerance, 8 %, is what the depths of tower and language model and the projector shift.
    """
    found = flops.count(replace(LLAVA_ONEVISION, sampler="stable_dyadic", layers=1, vision_layers=1), LLAVA_VOCAB, 220)
    assert found.stretched_causal / found.judged == pytest.approx(22.8, rel=0.08)
    assert found.judged < found.strict_causal < found.strict < found.stretched


def test_a_whole_call_costs_what_its_architecture_says() -> None:
    """32 frames at the published size, every layer: 112 TF where a causal kernel skips half the pairs, of 8.03 billion parameters."""
    reflector = flops.on_meta(LLAVA_ONEVISION, LLAVA_VOCAB)
    assert sum(p.numel() for p in reflector.llava.parameters()) == pytest.approx(8.03e9, rel=1e-3)
    clip = torch.empty(32, 384, 384, 3, dtype=torch.uint8, device="meta")
    with torch.no_grad():
        whole = flops.counted(lambda: reflector.embed([flops.INSTRUCTION], [clip]))
    tokens = 14 + 32 * 196 + 46
    assert (whole - tokens * (tokens - 1) // 2 * reflector.llava.pair_flops) / 1e12 == pytest.approx(112, rel=0.01)


def _everything_seen(plain: cache.Layout) -> cache.Layout:
    return replace(plain, allowed=torch.ones_like(plain.allowed))


def _questions_see_each_other(plain: cache.Layout) -> cache.Layout:
    old = plain.allowed.shape[1] - plain.allowed.shape[0]
    allowed = plain.allowed.clone()
    for earlier, later in zip(plain.last, plain.last[1:], strict=False):
        allowed[earlier + 1 : later + 1, old + plain.last[0] - 5 : old + earlier + 1] = True
    return replace(plain, allowed=allowed)


def _positions_count_on(plain: cache.Layout) -> cache.Layout:
    old = plain.allowed.shape[1] - plain.allowed.shape[0]
    return replace(plain, position=torch.arange(len(plain.position)) + old)


@pytest.mark.parametrize("wrong", [_everything_seen, _questions_see_each_other, _positions_count_on])
@SAMPLERS
def test_wrong_layouts_are_seen(monkeypatch: pytest.MonkeyPatch, sampler: frames.Sampler, wrong: Callable[[cache.Layout], cache.Layout]) -> None:
    """Judging alone is made wrong; strict recomputation has rows of one question that start with the first word, and stays right."""
    reflector = lively(replace(SMALL, sampler=sampler))
    reflector.llava.token_flops, reflector.llava.pair_flops = 1, 0
    assert error(reflector) <= TOLERANCE
    right = cache.layout
    monkeypatch.setattr(
        judge,
        "layout",
        lambda row, *where: right(row, *where) if row.opens and len(row.times) == 1 else wrong(right(row, *where)),
    )
    assert error(reflector) > 100 * TOLERANCE


def test_a_stale_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that keeps a frame's features by its number alone gives a changed frame the old one's."""
    reflector = lively(SMALL)
    video, other = videos(1, 9), videos(1, 9, seed=9)
    watch = reflector.begin(INSTRUCTIONS[:1], video[:, 0])
    other[:, 0] = video[:, 0]
    kept: list[torch.Tensor] = []
    right = reflector.llava.encode

    def stale(frame: torch.Tensor) -> torch.Tensor:
        kept.append(right(frame))
        return kept[0]

    want = reflector.strict(INSTRUCTIONS[0], other[0], range(1, 9))
    monkeypatch.setattr(reflector.llava, "encode", stale)
    reflector.judge(watch, video[:, 1:])
    wrong, _ = reflector.judge(watch, other[:, 1:])
    assert (wrong[0] - want).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("what", ["no newline", "newline after every frame", "not causal", "normalised features", "nearest pooling"])
def test_wrong_readings_differ_from_transformers(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    reflector = lively(SMALL)
    model, inner = reflector.llava.model, reflector.llava.model.model
    clip = videos(1, 3)[0]
    hidden, _ = theirs(model, reflector.llava.prompt, INSTRUCTIONS[0], clip)
    if what == "no newline":
        monkeypatch.setattr(llava.Llava, "newline", property(lambda self: inner.image_newline[None][:0]))
        monkeypatch.setattr(LlavaReflector, "_geometry", _geometry_with(question=-1))
    elif what == "newline after every frame":
        right = reflector.llava.encode
        monkeypatch.setattr(reflector.llava, "encode", lambda frame: torch.cat((right(frame), inner.image_newline.expand(len(frame), 1, -1)), dim=1))
        monkeypatch.setattr(LlavaReflector, "_geometry", _geometry_with(frame=1, question=-1))
        monkeypatch.setattr(llava.Llava, "newline", property(lambda self: inner.image_newline[None][:0]))
    elif what == "not causal":
        plain = cache.layout
        monkeypatch.setattr(judge, "layout", lambda *given: _everything_seen(plain(*given)))
    elif what == "normalised features":
        encoder, last = inner.vision_tower.encoder.forward, inner.vision_tower.post_layernorm

        def normalised(**given: torch.Tensor) -> object:
            answer = encoder(**given)
            answer.last_hidden_state = last(answer.last_hidden_state)
            return answer

        monkeypatch.setattr(inner.vision_tower.encoder, "forward", normalised)
    else:

        def nearest(x: torch.Tensor) -> torch.Tensor:
            return nn.functional.interpolate(x.unflatten(1, (3, 3)).permute(0, 3, 1, 2), size=2).flatten(2).mT

        monkeypatch.setattr(reflector.llava.runs[graphs.VISION], "_pooling", nearest)
    wrong = reflector.embed(INSTRUCTIONS[:1], [clip]).answer[0]
    assert (wrong - hidden[-1]).abs().max() > 1e-3


def _geometry_with(frame: int = 0, question: int = 0) -> Callable[[LlavaReflector, str], cache.Geometry]:
    right = LlavaReflector._geometry

    def changed(self: LlavaReflector, instruction: str) -> cache.Geometry:
        plain = right(self, instruction)
        return replace(plain, frame=plain.frame + frame, question=plain.question + question)

    return changed


def test_a_wrong_sampler_is_seen() -> None:
    reflector = lively(SMALL)
    video = videos(1, 17)
    other = LlavaReflector(replace(SMALL, sampler="stable_dyadic"), reflector.llava, reflector.head)
    late = reflector.strict(INSTRUCTIONS[0], video[0], range(6, 17)) - other.strict(INSTRUCTIONS[0], video[0], range(6, 17))
    assert late.abs().max() > 100 * TOLERANCE


def test_batches_that_do_not_fit_are_refused() -> None:
    reflector = lively(SMALL)
    video = videos(2, 9)
    with pytest.raises(ValueError, match="1 instructions for 2 videos"):
        reflector.begin(INSTRUCTIONS[:1], video[:, 0])
    watch = reflector.begin(INSTRUCTIONS[:2], video[:, 0])
    with pytest.raises(ValueError, match=r"\(B, K, H, W, 3\)"):
        reflector.judge(watch[:1], video[:, 1:])
    for times in ([9], [-1], []):
        with pytest.raises(ValueError, match=r"times \[.*\] of a video of 9 frames"):
            reflector.strict(INSTRUCTIONS[0], video[0], times)
    with pytest.raises(ValueError, match=r"want .*at least one"):
        reflector.begin([], video[:0, 0])
    for some, new in (([], video[:0, 1:]), (watch, video[:, :0])):
        with pytest.raises(ValueError, match=r"want .*at least one"):
            reflector.judge(some, new)


# Files


def test_a_whole_reflector_survives_its_file(tmp_path: Path) -> None:
    reflector = lively(replace(SMALL, sampler="stable_dyadic", pooling="mean", threshold=0.6))
    first, second = (checkpoint.save(tmp_path / name, weights.to_tree(reflector)) for name in ("a.safetensors", "b.safetensors"))
    assert first == second
    again = weights.load_judge(tmp_path / "a.safetensors").freeze()
    assert again.config == reflector.config
    video = videos(1, 9)
    assert torch.equal(again.strict(INSTRUCTIONS[2], video[0], [4, 8]), reflector.strict(INSTRUCTIONS[2], video[0], [4, 8]))
    checkpoint.save(tmp_path / "c.safetensors", weights.to_tree(LlavaReflector(reflector.config, reflector.llava, None)))
    assert weights.load_judge(tmp_path / "c.safetensors").head is None


def test_in_half_precision_places_stay_exact(tmp_path: Path) -> None:
    """Rotary frequencies of 8 bits would not be seen by shapes or names: what is opened in bfloat16 has them in float32."""
    reflector = lively(SMALL)
    write_reflector(tmp_path / "d", reflector)
    opened = weights.open_directory(tmp_path / "d", SMALL, torch.bfloat16)
    opened.head = reflector.head
    checkpoint.save(tmp_path / "r.safetensors", weights.to_tree(opened))
    again, video = weights.load_judge(tmp_path / "r.safetensors").freeze(), videos(1, 20)[0]
    for one in (opened, again):
        buffers = dict(one.llava.model.named_buffers())
        assert {p.dtype for p in one.llava.parameters()} == {torch.bfloat16}
        assert {tensor.dtype for name, tensor in buffers.items() if "inv_freq" in name} == {torch.float32}
        assert torch.equal(one.strict(INSTRUCTIONS[0], video, [5, 19]), opened.strict(INSTRUCTIONS[0], video, [5, 19]))
    assert any("inv_freq" in name for name in buffers)


class Drawn(TorchDispatchMode):
    """Operations that fill memory with random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(word in str(func) for word in ("normal", "uniform", "rand")) and made.device.type != "meta":
            self.found.append(str(func))
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_is_opened_without_drawing_weights_first(dtype: torch.dtype) -> None:
    """They would take 32 GB and minutes at the published size. What is in no file is as transformers makes it, and types are the file's."""
    reflector = lively(SMALL)
    llava.cast(reflector.llava.model, dtype)
    tree, before = weights.to_tree(reflector), torch.get_rng_state()
    with Drawn() as drawn:
        again = weights.from_tree(tree, "here")
    assert drawn.found == []
    assert torch.equal(before, torch.get_rng_state())
    assert weights.to_tree(again)["backbone"] == tree["backbone"]
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(one.llava.model, kind)()) for one in (again, reflector))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    video = videos(1, 9)[0]
    assert torch.equal(again.freeze().strict(INSTRUCTIONS[0], video, [3, 8]), reflector.strict(INSTRUCTIONS[0], video, [3, 8]))
    with Drawn() as drawn:
        weights.initialise(SMALL, INSTRUCTIONS, 0)
    assert drawn.found, "it is seen where it happens"


def test_the_same_seed_gives_the_same_weights() -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        return {**weights.initialise(SMALL, INSTRUCTIONS, seed).llava.state_dict(), **weights.fresh_head(SMALL, seed).state_dict()}

    before = torch.get_rng_state()
    one, same, other = state(4), state(4), state(5)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["inner.weight"], other["inner.weight"])
    assert not torch.equal(one["model.model.image_newline"], other["model.model.image_newline"])


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    reflector = lively(SMALL)
    checkpoint.save(path, weights.to_tree(reflector))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"r\.safetensors: truncated or damaged"):
        weights.load_judge(path)
    tree = weights.to_tree(reflector)
    tree["weights"].pop("lm_head.weight")
    with pytest.raises(weights.ReflectorError, match=r"here: backbone: missing \['lm_head\.weight'\]"):
        weights.from_tree(tree, "here")
    with pytest.raises(weights.ReflectorError, match="no reflector"):
        weights.from_tree({"kind": "policy"}, "here")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published")
    write_reflector(directory, lively(SMALL))
    return directory


def copied(published: Path, target: Path) -> Path:
    for path in published.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_directories_of_older_releases_load(published: Path, tmp_path: Path) -> None:
    """The hub's files name the tower `vision_tower.vision_model.*`."""
    directory = copied(published, tmp_path)
    stored = load_file(directory / "model.safetensors")
    older = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1) if name.startswith("vision_tower.") else name: t for name, t in stored.items()
    }
    assert older.keys() != stored.keys()
    save_file(older, directory / "model.safetensors", metadata={"format": "pt"})
    one, other = (weights.open_directory(d, SMALL, torch.float32) for d in (published, directory))
    clip = videos(1, 4)[0]
    assert torch.equal(one.embed(INSTRUCTIONS[:1], [clip]).answer, other.embed(INSTRUCTIONS[:1], [clip]).answer)


def test_the_question_is_whole_whatever_the_tokenizer_was_last_used_with(published: Path, tmp_path: Path) -> None:
    directory = copied(published, tmp_path)
    want = weights.open_directory(directory, SMALL, torch.float32).llava.prompt
    stored = Tokenizer.from_file(str(directory / "tokenizer.json"))
    stored.enable_padding(length=64)
    stored.enable_truncation(max_length=4)
    stored.save(str(directory / "tokenizer.json"))
    got = weights.open_directory(directory, SMALL, torch.float32).llava.prompt
    assert (got.before, got.question(INSTRUCTIONS[0])) == (want.before, want.question(INSTRUCTIONS[0]))


def _edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return edit


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        content = load_file(directory / "model.safetensors")
        change(content)
        save_file(content, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda d: (d / "config.json").unlink(), r"/config\.json: .*No such file"),
        (lambda d: (d / "tokenizer.json").unlink(), r"/tokenizer\.json: no such file"),
        (lambda d: (d / "preprocessor_config.json").unlink(), r"/preprocessor_config\.json: .*No such file"),
        (lambda d: (d / "model.safetensors").unlink(), r"no file named model\.safetensors"),
        (lambda d: (d / "config.json").write_text("{"), r"/config\.json: Expecting"),
        (lambda d: (d / "tokenizer.json").write_text("{"), r"/tokenizer\.json: EOF"),
        (lambda d: (d / "model.safetensors").write_bytes(b"short"), r"/model\.safetensors: truncated or damaged"),
        (_edit("config.json", lambda c: c.update(model_type="llava")), r"/config\.json: model_type 'llava'"),
        (_edit("config.json", lambda c: c.update(vision_feature_layer=-2)), "vision_feature_layer=-2"),
        (_edit("config.json", lambda c: c.update(video_token_index=99)), r"/tokenizer\.json: <video> \d, .*config\.json says {'video': 99"),
        (_edit("config.json", lambda c: c["vision_config"].update(image_size=32)), r"another shape for 1 tensors .*position_embedding"),
        (_edit("config.json", lambda c: c["text_config"].update(num_hidden_layers=1)), "num_hidden_layers"),
        (_edit("preprocessor_config.json", lambda c: c.update(image_mean=[0.48, 0.45, 0.4])), r"/preprocessor_config\.json: image_mean \[0\.48"),
        (_weights(lambda t: [t.pop(name) for name in list(t) if name.endswith("image_newline")]), r"no weights for 1 tensors .*image_newline"),
        (_weights(lambda t: t.update(stray=torch.zeros(2))), r"unknown weights for 1 tensors .*\['stray'\]"),
    ],
)
def test_a_broken_directory_is_named_in_one_line(published: Path, tmp_path: Path, break_it: Callable[[Path], object], says: str) -> None:
    directory = copied(published, tmp_path)
    break_it(directory)
    with pytest.raises(weights.ReflectorError, match=says) as caught:
        weights.open_directory(directory, SMALL, torch.float32)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


# Config and contract


@pytest.mark.parametrize(
    "change", [{"frames": 1}, {"heads": 5}, {"kv_heads": 3}, {"vision_heads": 3}, {"threshold": 1.0}, {"width": 20, "heads": 4}], ids=str
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="reflector"):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_keeps_the_contract() -> None:
    reflector: Reflector = lively(SMALL)
    video = videos(2, 5)
    score, watch = reflector.judge(reflector.begin(INSTRUCTIONS[:2], video[:, 0]), video[:, 1:])
    assert score.shape == (2, 4)
    assert score.dtype == torch.float32
    assert bool(((score >= 0) & (score <= 1)).all())
    assert len(watch) == 2
    assert not score.requires_grad


def test_the_head_is_two_layers_after_a_norm() -> None:
    head = RewardHead(8, 4)
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    inner = normed @ head.inner.weight.T + head.inner.bias
    want = (inner * 0.5 * (1 + torch.erf(inner / 2**0.5))) @ head.outer.weight[0] + head.outer.bias
    torch.testing.assert_close(head(x), want, rtol=1e-5, atol=1e-6)
