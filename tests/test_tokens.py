"""OpenVLA's action tokens: bins, order of tokens, draws, fine-tuning, files, and who cannot work with them.

Meant to find: 256 intervals instead of 255, an edge that belongs to the bin below, tokens counted upwards, another slice of the vocabulary, slots in
another order, a draw that is not the softmax's, a temperature that moves the greedy answer, a loss on some of the slots.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from published_directories import write_policy
from safetensors.torch import load_file, save_file
from small_policy import INSTRUCTIONS, LIKE, SMALL, observation, published_policy, small_policy, statistics, uniform
from test_sft import LORA, episodes, savepoint

from worldenv import compiled, noise, train
from worldenv.checkpoint import CheckpointError
from worldenv.cli import train as command_line
from worldenv.config import EnvConfig, LoopConfig, ScaleConfig, SftConfig
from worldenv.data.collect import act_out
from worldenv.data.scenes import OneScene, Start
from worldenv.envs.tabletop import Tabletop
from worldenv.learning.chunks import Chunks
from worldenv.learning.loop.update import Learner
from worldenv.learning.scale_head import fit_scale_head
from worldenv.learning.sft import l1, loss_at, pretrained, sft, untrained
from worldenv.policy import tokens
from worldenv.policy.contract import Policy
from worldenv.policy.openvla_oft import BACKBONE, OpenVLAOFT
from worldenv.policy.processing import PromptTokenizer
from worldenv.policy.published import open_base
from worldenv.policy.weights import from_published, load, save
from worldenv.presets import TINY
from worldenv.robots.tabletop import TABLETOP

CPU = torch.device("cpu")
TOKENS = dataclasses.replace(SMALL, head="tokens")
CONFIG = SftConfig(steps=6, batch=4, lr=3e-3, stop_l1=0.0)
ONE_LINE = r"policy\.head=tokens: {} needs the Laplace density.*set policy\.head to laplace, or stop after stage sft \(--until sft\)"
EDGES = np.linspace(-1.0, 1.0, 256)


def token_policy() -> OpenVLAOFT:
    return OpenVLAOFT.create(TOKENS, PromptTokenizer.build(INSTRUCTIONS), statistics(), noise.torch_seed(0, 9), CPU)


def lively(batch: int) -> tuple[OpenVLAOFT, torch.Tensor]:
    """A policy whose backbone answers with drawn hiddens (batch, 56, 16): an untrained one says nearly the same in every slot. Its logits too."""
    policy, hidden = token_policy(), torch.from_numpy(np.random.default_rng(1).normal(0, 2, (batch, 56, 16))).float()
    policy.runs[BACKBONE] = lambda *_: hidden
    logits = hidden.reshape(batch, 8, 7, 16) @ policy.network.token_head.weight.detach().T
    return policy, logits


def published_digits(action: np.ndarray) -> np.ndarray:
    """As published: numpy's digitize, 1 .. 256; the token's id is 32000 less."""
    return np.digitize(np.clip(action, -1.0, 1.0), EDGES)


def published_action(digit: np.ndarray) -> np.ndarray:
    centres = (EDGES[:-1] + EDGES[1:]) / 2.0
    return centres[np.clip(digit - 1, 0, len(centres) - 1)]


# Bins


def test_bins_are_numpys_digitize() -> None:
    """At edges, a rounding beside them, beyond the ends and between, in float32 and float64; token ids are the last 256 of 32000, downwards."""
    beside = np.concatenate([np.nextafter(EDGES, -2.0), EDGES, np.nextafter(EDGES, 2.0)])
    given = np.concatenate([beside, np.random.default_rng(0).uniform(-1.2, 1.2, 4000), [-1.0, 1.0, 0.0, -7.0, 7.0]])
    for action in (given, given.astype(np.float32)):
        row = tokens.of_actions(torch.from_numpy(action))
        digit = published_digits(action)
        assert np.array_equal(32000 - 256 + row.numpy(), 32000 - digit)
        assert np.array_equal(tokens.to_actions(row).numpy(), published_action(digit).astype(np.float32))
    assert {int(row) for row in tokens.of_actions(torch.from_numpy(given))} == set(range(256))


def test_256_edges_have_255_centres() -> None:
    centre = tokens.to_actions(torch.arange(256))
    assert (float(centre[255]), float(centre[1])) == (pytest.approx(-254 / 255), pytest.approx(254 / 255))
    assert centre[0] == centre[1]  # the action 1 alone has a token of its own, and is executed as the bin below it
    assert torch.unique(centre).numel() == 255
    torch.testing.assert_close(centre[1:-1] - centre[2:], torch.full((254,), 2 / 255), rtol=0, atol=1e-6)
    inside = torch.linspace(-1, 1, 10001, dtype=torch.float64)
    error = (tokens.to_actions(tokens.of_actions(inside)).double() - inside).abs()
    assert float(error.max()) == pytest.approx(1 / 255, rel=1e-4)
    assert tokens.of_actions(torch.tensor([0.0, 1.0])).tolist() == [128, 0]  # a gripper, shut and open


# The policy


def test_it_is_a_policy_and_greedy_is_the_argmax() -> None:
    made, logits = lively(5)
    policy: Policy = made
    chunk = policy.act(observation(5))
    row = logits.numpy().argmax(-1)
    assert np.array_equal(chunk.action.numpy(), published_action(256 - row).astype(np.float32))
    assert torch.equal(chunk.action, chunk.mu)
    assert chunk.log_scale is None
    assert torch.equal(chunk.command, made.statistics.to_command(chunk.action))
    assert len(np.unique(row)) > 50  # observations and slots differ, so a slice or an order that is wrong would show
    want = torch.distributions.Categorical(logits=logits).log_prob(torch.from_numpy(row)).sum(-1)
    torch.testing.assert_close(chunk.log_prob, want, rtol=1e-5, atol=1e-4)


def test_a_slot_is_step_times_seven_plus_dimension() -> None:
    """The head reads one hidden for one token: that of its slot, and no other."""
    policy = token_policy()
    hidden = policy.hidden(policy.query(observation(2))).detach().requires_grad_()
    policy.logits(hidden)[1, 3, 5].sum().backward()
    touched = hidden.grad.abs().sum(-1).nonzero().tolist()
    assert touched == [[1, 3 * 7 + 5]]


def test_draws_are_the_softmaxs() -> None:
    """Frequencies of 40,000 draws, by chi square; a token without probability is never drawn, at whatever uniform."""
    draw = np.random.default_rng(0)
    logits = torch.from_numpy(draw.normal(0, 2, 256)).float()
    logits[[0, 17, 255]] = -torch.inf
    count = 40_000
    u = torch.from_numpy(draw.uniform(size=count))
    rows = tokens.draw(logits.expand(count, 256), u)
    p = logits.double().softmax(-1).numpy()
    want, got = count * p, np.bincount(rows.numpy(), minlength=256)
    assert got[[0, 17, 255]].sum() == 0
    some = want >= 5
    pooled = [np.append(x[some], x[~some].sum()) for x in (got, want)]
    chi2 = ((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum()
    free = len(pooled[0]) - 1
    assert abs(chi2 - free) < 4 * np.sqrt(2 * free)
    ends = tokens.draw(logits.expand(2, 256), torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64))
    assert ends.tolist() == [254, 1]  # the least action that has a probability, and the greatest


def test_draws_are_the_inverse_cdf_of_the_action() -> None:
    (policy, logits), seen, u = lively(5), observation(5), uniform(5)
    drawn, greedy = policy.act(seen, u), policy.act(seen)
    assert torch.equal(drawn.mu, greedy.action)
    assert 0.05 < float((drawn.action == drawn.mu).double().mean()) < 0.95
    assert torch.equal(policy.act(seen, u).action, drawn.action)
    higher = policy.act(seen, (u + 0.1).clamp_max(1 - 1e-6))
    assert bool((higher.action >= drawn.action).all())
    p = logits.double().softmax(-1)
    row = tokens.of_actions(drawn.action)
    below = (p * (torch.arange(256) > row[..., None])).sum(-1)  # rows above are actions below
    upto = below + p.gather(-1, row[..., None])[..., 0] + torch.where(row == 1, p[..., 0], 0.0)  # rows 0 and 1 are one action
    assert bool(((below <= u + 1e-9) & (u < upto + 1e-9)).all())
    with pytest.raises(ValueError, match=r"act: uniform \(5, 8, 7\) torch.float32, want \(5, 8, 7\) float64"):
        policy.act(seen, u.float())


def test_temperature_is_of_draws_and_scores_and_not_of_the_greedy_answer() -> None:
    (policy, logits), seen, u = lively(5), observation(5), uniform(5)
    cold = policy.act(seen, u)
    policy.scale_factor = 3.0
    hot = policy.act(seen, u)
    assert torch.equal(hot.mu, cold.mu)
    assert not torch.equal(hot.action, cold.action)
    row = tokens.draw(logits / 3.0, u)
    assert torch.equal(hot.action, tokens.to_actions(row))
    want = torch.distributions.Categorical(logits=logits / 3.0).log_prob(row).sum(-1)
    torch.testing.assert_close(hot.log_prob, want, rtol=1e-5, atol=1e-4)
    policy.scale_factor = 0.0
    with pytest.raises(ValueError, match="temperature, want more than 0"):
        policy.act(seen)


def test_the_backbone_is_that_of_the_laplace_policy() -> None:
    """The same layers, slots and hiddens; what reads them differs, and the head has no other weights than 256 rows."""
    one, other = small_policy(), token_policy()
    ours = {name: t for name, t in one.network.state_dict().items() if not name.startswith(("action_head.", "scale_head."))}
    assert other.network.state_dict().keys() == {*ours, "token_head.weight"}
    assert other.network.token_head.weight.shape == (256, SMALL.llama.width)
    other.network.load_state_dict(ours, strict=False)
    assert torch.equal(one.hidden(one.query(observation(3))), other.hidden(other.query(observation(3))))
    assert [network.name for network in compiled.of_policy(other)] == [BACKBONE]
    exported = compiled.of_policy(other)[0].plain().state_dict()
    assert not [name for name in exported if "head" in name.split(".")]
    assert exported.keys() == compiled.of_policy(one)[0].plain().state_dict().keys()


def test_it_acts_in_the_true_environment() -> None:
    """As exploration and evaluation ask it: greedy, and drawn by the counter noise, a function of seed and number alone."""
    env = Tabletop(EnvConfig(image=16, train_states=3))
    settings = dataclasses.replace(TOKENS, llama=dataclasses.replace(TOKENS.llama, vocab=64))
    policy = OpenVLAOFT.create(settings, PromptTokenizer.build(env.tasks), statistics(), noise.torch_seed(0, 9), CPU)
    starts = [Start(3, 0, "train", 1), Start(4, 1, "train", 2)]
    scenes = OneScene(env)
    drawn, again, greedy = (act_out(scenes, policy, some, 8, seed, False, CPU) for some, seed in ((starts, 5), (starts[1:], 5), (starts, None)))
    env.close()
    assert np.array_equal(drawn[1].commands, again[0].commands)
    assert not np.array_equal(drawn[1].commands, greedy[1].commands)
    motion = policy.statistics.action.normalise(torch.from_numpy(np.array(greedy[0].commands, np.float32)))[:, :6].numpy()
    assert np.abs(motion - published_action(published_digits(motion))).max() < 1e-5  # on bin centres


# Fine-tuning


def test_the_loss_is_the_cross_entropy_of_every_slots_token() -> None:
    given = episodes()
    policy = untrained(TOKENS, given, INSTRUCTIONS, TABLETOP, 0, CPU)
    settings = dataclasses.replace(CONFIG, shift_px=0, colour=0.0, proprio_noise=0.0)
    chunks, rows = Chunks(given, TABLETOP, policy.statistics, 8), np.arange(4)
    loss, error = loss_at(policy, chunks, settings, 0, 2, rows)
    seen, target = chunks.take(noise.integers(0, noise.Stream.SFT, 2, len(chunks), 4))
    logits = policy.network.token_head(policy.hidden(policy.query(seen))).detach().double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    digit = published_digits(target.numpy())
    total = [log_p[b, k, d, 256 - digit[b, k, d]] for b in range(4) for k in range(8) for d in range(7)]
    assert float(loss.detach()) == pytest.approx(-np.mean(total), rel=1e-5)
    assert float(error) == pytest.approx(np.abs(published_action(256 - logits.argmax(-1)) - target.numpy()).mean(), rel=1e-5)
    assert float(loss.detach()) > 4.0  # near log 256: nothing is learned yet
    loss.backward()
    untouched = [name for name, p in policy.network.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert untouched == []


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["whole", "LoRA"])
def test_it_learns_and_goes_on_after_a_kill(tmp_path: Path, lora_rank: int) -> None:
    given = episodes((24, 24))
    settings = dataclasses.replace(CONFIG, steps=60, batch=16, lr=1e-2, lora_rank=lora_rank, lora_alpha=4)
    policy = untrained(TOKENS, given, INSTRUCTIONS, TABLETOP, 0, CPU)
    start = l1(policy, Chunks(given, TABLETOP, policy.statistics, 8), 8)
    metrics = sft(policy, given, TABLETOP, settings, 0, savepoint(tmp_path, every_s=0.0))
    assert metrics["l1"] < 0.6 * start
    assert metrics["cross_entropy_train"] < 0.6 * np.log(256)
    assert policy.network.token_head.weight.requires_grad
    again = untrained(TOKENS, given, INSTRUCTIONS, TABLETOP, 0 if lora_rank else 3, CPU)  # whatever it was, the savepoint counts: of the last step
    assert sft(again, given, TABLETOP, settings, 0, savepoint(tmp_path)) == metrics


def test_it_stops_by_the_l1_of_its_greedy_tokens(tmp_path: Path) -> None:
    given = episodes()  # 7 chunk starts: an epoch is 2 steps of 4
    policy = untrained(TOKENS, given, INSTRUCTIONS, TABLETOP, 0, CPU)
    metrics = sft(policy, given, TABLETOP, dataclasses.replace(CONFIG, stop_l1=2.0), 0, savepoint(tmp_path))
    assert metrics["steps"] == 2
    assert metrics["l1_train"] < 2.0 < 4.0 < metrics["cross_entropy_train"]  # [nat] near log 256 still


# Files


def test_it_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    policy, seen, u = token_policy(), observation(3), uniform(3)
    save(tmp_path / "p.safetensors", policy)
    again = load(tmp_path / "p.safetensors", CPU)
    assert again.config == policy.config
    assert again.config.head == "tokens"
    for drawn in (None, u):
        one, other = policy.act(seen, drawn), again.act(seen, drawn)
        assert torch.equal(one.action, other.action)
        assert torch.equal(one.log_prob, other.log_prob)


def test_a_published_output_layer_is_the_head(tmp_path: Path) -> None:
    """Rows 31744 .. 31999 of 32064, not the last 256; a directory without that layer, or with zeros in its place, is refused."""
    settings = dataclasses.replace(LIKE, head="tokens")
    words = torch.arange(32064.0)[:, None].expand(-1, LIKE.llama.width).clone()
    state = from_published({"language_model.lm_head.weight": words}, {}, {}, {}, settings)
    assert state.keys() == {"token_head.weight"}
    assert state["token_head.weight"][:, 0].tolist() == list(range(31744, 32000))
    assert from_published({"language_model.lm_head.weight": words}, {}, {}, {}, LIKE) == {}

    source = published_policy()
    write_policy(tmp_path, source, 5)
    with pytest.raises(CheckpointError, match=r"language_model\.lm_head\.weight is missing or zero for the action tokens"):
        open_base(tmp_path, source.statistics, torch.float32, head="tokens")
    (shard,) = tmp_path.glob("model-*.safetensors")
    save_file(load_file(shard) | {"language_model.lm_head.weight": words * 1e-3}, shard, metadata={"format": "pt"})
    given = episodes((24,))
    recipe = dataclasses.replace(LORA, start=str(tmp_path), precision="bfloat16", steps=2)
    policy = pretrained(TOKENS, recipe, given, TABLETOP, 0, CPU)
    assert (policy.config.head, policy.config.jpeg) == ("tokens", True)
    weight = policy.network.token_head.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight.detach(), words[31744:32000] * 1e-3)
    assert policy.network.projector.fc1.weight.dtype == torch.bfloat16
    assert sft(policy, given, TABLETOP, recipe, 0, savepoint(tmp_path / "s"))["steps"] == 2


# Who needs the density


def test_what_needs_the_density_says_so(tmp_path: Path) -> None:
    policy = token_policy()
    with pytest.raises(ValueError, match=ONE_LINE.format("the scale head's fit")):
        fit_scale_head(policy, episodes(), TABLETOP, ScaleConfig(), 0, savepoint(tmp_path))
    with pytest.raises(ValueError, match=ONE_LINE.format("LOOP")):
        Learner(policy, LoopConfig(), 0)
    with pytest.raises(ValueError, match=ONE_LINE.format("scoring actions")):
        policy.evaluate_actions(observation(2), torch.zeros(2, 8, 7))
    with pytest.raises(ValueError, match=r"policy\.head=tokens, sft\.start='x', sft\.steps=0: .*fine-tune it"):
        dataclasses.replace(
            TINY, policy=dataclasses.replace(TINY.policy, head="tokens"), sft=dataclasses.replace(TINY.sft, start="x", steps=0, views=1)
        )


def test_a_run_ends_with_stage_sft() -> None:
    tokens_run = dataclasses.replace(TINY, policy=dataclasses.replace(TINY.policy, head="tokens"))
    assert train.chosen(tokens_run, until="sft") == ["demos", "sft"]
    assert train.chosen(tokens_run, only="sft") == ["sft"]
    assert train.chosen(TINY) == list(train.STAGES)
    for asked in ({}, {"until": "loop"}):
        with pytest.raises(ValueError, match=ONE_LINE.format("stage scale")):
            train.chosen(tokens_run, **asked)
    for name in ("scale", "explore", "world", "reward", "loop", "eval", "report"):
        with pytest.raises(ValueError, match=ONE_LINE.format(f"stage {name}")):
            train.chosen(tokens_run, only=name)


def test_the_command_refuses_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--preset", "tiny", "--policy.head", "tokens", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "stage scale needs the Laplace density" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert command_line.main(["--preset", "tiny", "--policy.head", "token", "--out", str(tmp_path / "run")]) == 2
    assert "tokens" in capsys.readouterr().err
