"""Words, numbers and pictures of the policy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_policy import INSTRUCTIONS, statistics
from tokenizers import Tokenizer, models

from worldenv.kernels.frames import centre_crop, normalise_pixels, resize_lanczos3
from worldenv.policy.processing import (
    BOS,
    IDLE_RANGE,
    PUBLISHED_EMPTY,
    STOP,
    Bounds,
    PromptTokenizer,
    Statistics,
    gripper_to_training,
    prompt,
    resized,
)  # fmt: skip
from worldenv.presets import TINY


def test_prompt_is_the_published_one() -> None:
    assert prompt("Put the Bowl on the plate") == "In: What action should the robot take to put the bowl on the plate?\nOut:"


def test_built_tokenizer_keeps_llamas_ids_and_ends_with_the_empty_token() -> None:
    tokenizer = PromptTokenizer.build(INSTRUCTIONS)
    ids = tokenizer.ids(INSTRUCTIONS[0])
    assert (BOS, STOP) == (1, 2)
    assert ids[0] == BOS
    assert ids[-1] == tokenizer.empty
    assert ids.count(tokenizer.empty) == 1
    assert tokenizer.pad not in ids
    words = [tokenizer.tokenizer.id_to_token(i) for i in ids[1:-1]]
    assert " ".join(words) == "In : What action should the robot take to push the red block onto the strip ? Out :"
    assert tokenizer.vocab == 5 + len(set(" ".join(prompt(i).replace(":", " :").replace("?", " ?") for i in INSTRUCTIONS).split()))


def test_built_tokenizer_is_a_function_of_the_words_alone() -> None:
    one, other = (PromptTokenizer.build(order) for order in (INSTRUCTIONS, INSTRUCTIONS[::-1]))
    assert one.tree() == other.tree()


def test_unknown_words_are_named() -> None:
    tokenizer = PromptTokenizer.build(INSTRUCTIONS)
    with pytest.raises(ValueError, match="unknown word 'green', 'mug2'; "):
        tokenizer.ids("push the green mug2 onto the green strip")


def test_batches_are_padded_on_the_right_to_a_length_of_their_own() -> None:
    tokenizer = PromptTokenizer.build(INSTRUCTIONS)
    ids, lengths = tokenizer.batch(INSTRUCTIONS[:2])
    assert lengths is not None
    longest = max(len(tokenizer.ids(i)) for i in INSTRUCTIONS)
    short = min(INSTRUCTIONS, key=lambda one: len(tokenizer.ids(one)))
    assert ids.shape == (2, longest)
    assert tokenizer.batch([short])[0].shape == (1, longest)  # not the longest of who asks: an answer must not depend on the others
    for row, length, instruction in zip(ids.tolist(), lengths.tolist(), INSTRUCTIONS, strict=False):
        assert tuple(row[:length]) == tokenizer.ids(instruction)
        assert set(row[length:]) <= {tokenizer.pad}
    assert tokenizer.batch(INSTRUCTIONS[2:])[1] is None


def test_tokenizer_comes_back_from_its_tree() -> None:
    tokenizer = PromptTokenizer.build(INSTRUCTIONS)
    again = PromptTokenizer.from_tree(json.loads(json.dumps(tokenizer.tree())))
    assert [again.ids(i) for i in INSTRUCTIONS] == [tokenizer.ids(i) for i in INSTRUCTIONS]
    assert (again.empty, again.pad, again.width) == (tokenizer.empty, tokenizer.pad, tokenizer.width)


def _llama_like(folder: Path, empty: int) -> Path:
    """A tokenizer file whose ids stand where Llama-2's do, with a last prompt token that may be the empty one already."""
    vocab = {f"w{i}": i for i in range(3, 29900)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    del vocab[f"w{empty}"]
    Tokenizer(models.WordLevel(vocab | {"▁": empty}, unk_token="w3")).save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_published_tokenizer_is_checked(tmp_path: Path) -> None:
    assert PromptTokenizer.published(_llama_like(tmp_path, PUBLISHED_EMPTY)).ids("x") == (BOS, 3, PUBLISHED_EMPTY)
    for change in ("enable_padding", "enable_truncation"):  # as its last use left it
        stored = Tokenizer.from_file(str(_llama_like(tmp_path, PUBLISHED_EMPTY)))
        getattr(stored, change)(**({"length": 40} if change == "enable_padding" else {"max_length": 0}))
        stored.save(str(tmp_path / "tokenizer.json"))
        assert PromptTokenizer.published(tmp_path / "tokenizer.json").ids("x") == (BOS, 3, PUBLISHED_EMPTY), change
    with pytest.raises(ValueError, match="not Llama-2's tokenizer"):
        PromptTokenizer.published(_llama_like(tmp_path, 29000))
    with pytest.raises(ValueError, match="no such file"):
        PromptTokenizer.published(tmp_path / "nothing.json")


def test_normalisation_takes_quantiles_to_one_and_clips() -> None:
    bounds = Bounds(np.array([-1.0, 0.0, 5.0]), np.array([3.0, 0.5, 6.0]), np.array([True, True, False]))
    value = torch.tensor([[-1.0, 0.5, 7.0], [1.0, 0.25, -7.0], [99.0, -99.0, 5.5]])
    want = torch.tensor([[-1.0, 1.0, 7.0], [0.0, 0.0, -7.0], [1.0, -1.0, 5.5]]).double()
    torch.testing.assert_close(bounds.normalise(value), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(bounds.unnormalise(want[:2]), value[:2].double(), rtol=0, atol=1e-7)
    beyond = bounds.unnormalise(torch.tensor([[2.0, 0.0, 0.0]]))  # not clipped on the way back
    assert float(beyond[0, 0]) == pytest.approx(5.0, abs=1e-6)


def test_idle_dimensions_carry_nothing() -> None:
    """The published rule would turn a tenth of a micrometre into the whole range."""
    bounds = Bounds(np.array([0.3, 0.3]), np.array([0.3, 0.3 + 0.5 * IDLE_RANGE]), np.ones(2, bool))
    assert bounds.normalise(torch.tensor([[0.3 + 1e-7, 0.3], [0.2, 9.0]])).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert bounds.unnormalise(torch.tensor([0.0, 0.0])).tolist() == pytest.approx([0.3, 0.3], abs=IDLE_RANGE)


def test_statistics_are_those_of_the_demonstrations() -> None:
    command = np.linspace(-1, 1, 101, dtype=np.float32)[:, None] * np.arange(1, 8, dtype=np.float32) / 7
    proprio = np.linspace(0, 100, 101, dtype=np.float32)[:, None] * np.ones(8, np.float32)
    made = Statistics.of([command[:40], command[40:]], [proprio[:40], proprio[40:]], "these")
    assert made.proprio.q01.tolist() == pytest.approx([1.0] * 8)
    assert made.proprio.q99.tolist() == pytest.approx([99.0] * 8)
    assert made.action.q01[:6].tolist() == pytest.approx((-0.98 * np.arange(1, 7) / 7).tolist(), abs=1e-6)
    assert made.action.mask.tolist() == [True] * 6 + [False]
    with pytest.raises(ValueError, match="no demonstrations"):
        Statistics.of([], [], "none")
    with pytest.raises(ValueError, match="another robot"):
        made.proprio.normalise(torch.zeros(2, 7))


def test_gripper_conventions() -> None:
    """Environment -1 open, +1 close; the policy's target 1 open, 0 close."""
    command = torch.zeros(4, 7)
    command[:, 6] = torch.tensor([-1.0, 1.0, -0.2, 0.3])
    assert gripper_to_training(command)[:, 6].tolist() == pytest.approx([1.0, 0.0, 1.0, 0.7])
    made = statistics()
    action = torch.zeros(4, 7)
    action[:, 6] = torch.tensor([0.9, 0.1, 0.51, 0.49])
    assert made.to_command(action)[:, 6].tolist() == [-1.0, 1.0, -1.0, 1.0]
    command[:, 6] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    torch.testing.assert_close(made.to_command(made.to_training(command)), command, rtol=0, atol=1e-6)


def test_commands_stay_in_range() -> None:
    made = statistics().to_command(torch.tensor([[-9.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    assert made.dtype == torch.float32
    assert made[0, :2].tolist() == [-1.0, 1.0]


def _published_file(folder: Path, content: object) -> Path:
    file = folder / "dataset_statistics.json"
    file.write_text(json.dumps(content))
    return file


def test_published_statistics(tmp_path: Path) -> None:
    part = {"q01": [0.0] * 7, "q99": [1.0] * 7}
    file = _published_file(tmp_path, {"libero_goal": {"action": part, "proprio": {"q01": [0.0] * 8, "q99": [2.0] * 8}}})
    read = Statistics.published(file, "libero_goal")
    assert read.action.mask.tolist() == [True] * 6 + [False]
    assert read.proprio.mask.all()
    with pytest.raises(ValueError, match="no statistics of 'libero_spatial'; there are libero_goal"):
        Statistics.published(file, "libero_spatial")
    with pytest.raises(ValueError, match=r"libero_goal.proprio lacks q01, q99"):
        Statistics.published(_published_file(tmp_path, {"libero_goal": {"action": part}}), "libero_goal")
    file.write_text("{")
    with pytest.raises(ValueError, match=r"dataset_statistics\.json"):
        Statistics.published(file, "libero_goal")
    with pytest.raises(ValueError, match="want finite, q01 <= q99"):
        Bounds(np.array([1.0]), np.array([0.0]), np.array([True]))


def test_picture_chain_changes_nothing_where_it_is_off() -> None:
    frames = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(centre_crop(resized(frames, 12, jpeg=False), 1.0), frames)


@pytest.mark.parametrize("size", [7, 20])
def test_constant_pictures_stay(size: int) -> None:
    frames = torch.full((1, 12, 10, 3), 77, dtype=torch.uint8)
    larger = resize_lanczos3(frames, size)
    assert torch.equal(larger, torch.full((1, size, size, 3), 77, dtype=torch.uint8))
    assert torch.equal(centre_crop(larger, 0.9), larger)


def test_crop_keeps_the_centre_and_refuses_no_share() -> None:
    ramp = torch.arange(0, 200, 2, dtype=torch.uint8)[None, :, None, None].expand(1, 100, 100, 3)
    low, high = (1 - 0.9**0.5) / 2 * 198, (1 + 0.9**0.5) / 2 * 198
    cropped = centre_crop(ramp, 0.9)[0, :, 0, 0]
    assert [int(cropped[0]), int(cropped[-1])] == [round(low), round(high)]
    with pytest.raises(ValueError, match="area 0"):
        centre_crop(ramp, 0.0)


def test_pixels_are_dinos_then_siglips() -> None:
    frame = torch.tensor([124, 116, 104], dtype=torch.uint8).expand(1, 2, 2, 3)
    pixels = normalise_pixels(frame, TINY.policy.dino_mean, TINY.policy.dino_std)
    assert pixels.shape == (1, 6, 2, 2)
    assert pixels[0, :3].abs().max() < 0.01  # ImageNet's mean colour
    assert pixels[0, 3:, 0, 0].tolist() == pytest.approx([124 / 127.5 - 1, 116 / 127.5 - 1, 104 / 127.5 - 1], abs=1e-6)
