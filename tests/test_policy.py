"""The policy as a whole: what it promises through `policy.contract.Policy`, and its file."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from small_policy import INSTRUCTIONS, SMALL, observation, small_policy, uniform

from worldenv import checkpoint
from worldenv.nouns import Observation
from worldenv.policy import laplace
from worldenv.policy.contract import Policy
from worldenv.policy.heads import begin
from worldenv.policy.llama import LlamaModel
from worldenv.policy.openvla_oft import Network, OpenVLAOFT
from worldenv.policy.vision import VisionTower
from worldenv.policy.weights import fill, from_published, load, never_read, save
from worldenv.presets import TINY


def test_it_is_a_policy() -> None:
    policy: Policy = small_policy()
    chunk = policy.act(observation(4))
    assert policy.chunk == 8
    assert chunk.action.shape == (4, 8, 7)


def test_greedy_is_mu_and_a_draw_is_the_inverse_cdf() -> None:
    policy, seen, u = small_policy(), observation(5), uniform(5)
    greedy, drawn = policy.act(seen), policy.act(seen, u)
    assert torch.equal(greedy.action, greedy.mu)
    assert torch.equal(greedy.mu, drawn.mu)
    want = laplace.sample(drawn.mu.double(), drawn.log_scale.double(), u)
    torch.testing.assert_close(drawn.action.double(), want, rtol=0, atol=1e-6)
    assert torch.equal(drawn.command, policy.statistics.to_command(drawn.action))
    assert float(drawn.action.abs().max()) > 1.0  # the density is of the unclipped sample; only the command is clipped
    assert float(drawn.command.abs().max()) <= 1.0


def test_the_ceiling_holds_in_draws_and_in_scores() -> None:
    policy, seen, u = small_policy(dataclasses.replace(SMALL, scale_floor=0.0, scale_ceiling=0.06)), observation(5), uniform(5)
    drawn = policy.act(seen, u)
    assert float(drawn.log_scale.exp().max()) == pytest.approx(0.06, rel=1e-5)
    assert float((drawn.log_scale.exp() < 0.059).double().mean()) > 0.1
    assert torch.equal(policy.evaluate_actions(seen, drawn.action)[0].detach(), drawn.log_prob)
    want = laplace.sample(drawn.mu.double(), drawn.log_scale.double(), u)
    torch.testing.assert_close(drawn.action.double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_score_is_that_of_the_density_that_drew(factor: float) -> None:
    policy, seen = small_policy(dataclasses.replace(SMALL, scale_floor=0.05)), observation(5)
    policy.scale_factor = factor
    drawn = policy.act(seen, uniform(5))
    log_prob, mu, log_scale = policy.evaluate_actions(seen, drawn.action)
    assert torch.equal(log_prob.detach(), drawn.log_prob)
    assert torch.equal(mu.detach(), drawn.mu)
    assert torch.equal(log_scale.detach(), drawn.log_scale)
    floored = drawn.log_scale.exp() <= factor * 0.05 * (1 + 1e-5)
    assert float(drawn.log_scale.exp().min()) == pytest.approx(factor * 0.05, rel=1e-5)
    assert 0.1 < float(floored.double().mean()) < 0.9
    want = torch.distributions.Laplace(drawn.mu, drawn.log_scale.exp()).log_prob(drawn.action).sum(-1)
    torch.testing.assert_close(drawn.log_prob, want, rtol=1e-5, atol=1e-4)


def test_scale_factor_widens_draws_and_density_alike() -> None:
    policy, seen, u = small_policy(), observation(3), uniform(3)
    narrow = policy.act(seen, u)
    policy.scale_factor = 4.0
    wide = policy.act(seen, u)
    torch.testing.assert_close(wide.action - wide.mu, 4.0 * (narrow.action - narrow.mu), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(wide.log_prob, narrow.log_prob - 7 * torch.tensor(4.0).log(), rtol=1e-5, atol=1e-4)


def test_gradients_reach_everything_that_acts() -> None:
    policy, seen = small_policy(), observation(4)
    log_prob, _, _ = policy.evaluate_actions(seen, policy.act(seen, uniform(4)).action)
    log_prob.sum().backward()
    without = [name for name, p in policy.network.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    # A key's bias shifts all scores of a query alike and cancels in the softmax, but q, k, v are one vector here: all have some gradient.
    assert without == []


def test_answers_do_not_depend_on_who_else_asks() -> None:
    """Neither on the other queries' words (padding) nor on the number of queries."""
    policy, seen, u = small_policy(), observation(6), uniform(6)
    together = policy.act(seen, u)
    for i in range(6):
        alone = policy.act(Observation(seen.frame[i : i + 1], seen.proprio[i : i + 1], seen.instruction[i : i + 1]), u[i : i + 1])
        torch.testing.assert_close(alone.action[0], together.action[i], rtol=0, atol=2e-5)


def test_padding_is_seen_by_nobody() -> None:
    policy, seen = small_policy(), observation(3)
    query = policy.query(seen)
    assert query.lengths is not None
    other = query.ids.clone()
    for row, length in enumerate(query.lengths.tolist()):
        other[row, length:] = 7
    assert not torch.equal(other, query.ids)
    assert torch.equal(policy.hidden(query), policy.hidden(dataclasses.replace(query, ids=other)))


def test_words_order_and_picture_matter() -> None:
    policy = small_policy()
    one = observation(1, instruction=INSTRUCTIONS[0])
    greedy = policy.act(one).mu
    swapped = policy.act(dataclasses.replace(one, instruction=("push the strip onto the red block",))).mu
    moved = policy.act(dataclasses.replace(one, frame=one.frame.flip(2))).mu
    assert float((swapped - greedy).abs().max()) > 1e-4
    assert float((moved - greedy).abs().max()) > 1e-4


def test_proprio_is_clipped_at_inference_too() -> None:
    policy, seen = small_policy(), observation(2)
    at_limit = seen.proprio.clone()
    at_limit[:, 0] = 5.0
    beyond = at_limit.clone()
    beyond[:, 0] = 50.0
    one, other = (policy.act(dataclasses.replace(seen, proprio=p)) for p in (at_limit, beyond))
    assert torch.equal(one.mu, other.mu)


def test_two_views_are_seen_in_their_order() -> None:
    policy, one = small_policy(dataclasses.replace(SMALL, images=2)), observation(3)
    both = dataclasses.replace(one, wrist=observation(3, seed=1, size=20).frame)
    query = policy.query(both)
    assert query.pixels.shape == (3, 12, 16, 16)
    alone = small_policy()
    for at, frame in ((0, both.frame), (6, both.wrist)):
        assert frame is not None
        assert torch.equal(query.pixels[:, at : at + 6], alone.query(dataclasses.replace(one, frame=frame)).pixels)
    swapped = dataclasses.replace(both, frame=both.wrist, wrist=both.frame)
    assert float((policy.act(swapped).mu - policy.act(both).mu).abs().max()) > 1e-3
    with pytest.raises(ValueError, match=r"policy\.images=2, the observation carries 1 views"):
        policy.act(one)
    with pytest.raises(ValueError, match=r"policy\.images=1, the observation carries 2 views"):
        alone.act(both)
    with pytest.raises(ValueError, match=r"Observation\.wrist"):
        dataclasses.replace(one, wrist=both.frame[:2])


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunks_of_any_length(chunk: int) -> None:
    policy = small_policy(dataclasses.replace(SMALL, chunk=chunk))
    drawn = policy.act(observation(3), uniform(3, chunk=chunk))
    assert drawn.action.shape == (3, chunk, 7)
    assert torch.equal(policy.evaluate_actions(observation(3), drawn.action)[0].detach(), drawn.log_prob)


def test_prompts_and_slots_stand_where_the_module_says() -> None:
    """Position by position: the text before, the views, one proprio token, 29871, 56 zeros, </s>."""
    policy, seen = small_policy(), observation(2, instruction=INSTRUCTIONS[1])
    caught: dict[str, torch.Tensor] = {}

    def catch(module: torch.nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        caught["x"], caught["positions"], caught["visible"] = args[0], args[1], args[2]

    llama = policy.network.language_model.model
    with llama.register_forward_hook(catch), torch.no_grad():
        query = policy.query(seen)
        policy.hidden(query)
        x, positions = caught["x"][0], caught["positions"][0]
        assert query.lengths is not None
        length = int(query.lengths[0])
        order = [i for i in torch.argsort(positions, stable=True).tolist() if bool(caught["visible"][0, i])]
        assert positions[order].tolist() == list(range(len(order)))
        embed, ids = llama.embed_tokens, query.ids[0]
        assert query.proprio is not None
        proprio = policy.network.proprio_projector(query.proprio)[0]
        want = [
            embed(ids[:1]), policy.network.image_tokens(query.pixels)[0], proprio[None], embed(ids[1:length]),
            torch.zeros(56, SMALL.llama.width), embed(torch.tensor([2])),
        ]  # fmt: skip
        torch.testing.assert_close(x[order], torch.cat(want), rtol=0, atol=1e-6)


def test_heads_that_share_keys_are_heads_with_equal_ones() -> None:
    config = dataclasses.replace(SMALL.llama, width=32, heads=4, kv_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shared, apart = LlamaModel(config), LlamaModel(dataclasses.replace(config, kv_heads=None))
        x = torch.randn(2, 6, 32)
    state = shared.state_dict()
    for name in [name for name in state if name.endswith(("k_proj.weight", "v_proj.weight"))]:
        state[name] = state[name].view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1)  # heads 0 and 1 ask the first
    apart.load_state_dict(state)
    places = torch.arange(6)[None]
    torch.testing.assert_close(shared(x, places, None, 4), apart(x, places, None, 4))


def test_positions_are_begun_as_waves_of_both_axes() -> None:
    tower = VisionTower(SMALL.dino, 32)  # 4 x 4 patches, 16 channels
    tower.begin()
    rate = 4 * math.pi * 100.0 ** (-torch.arange(4) / 4)
    for at, given in enumerate(tower.pos_embed[0].detach()):
        angle = torch.cat([at % 4 / 4 * rate, at // 4 / 4 * rate])
        torch.testing.assert_close(given, torch.cat([angle.sin(), angle.cos()]), atol=1e-5, rtol=0)


def test_what_the_eyes_do_not_remember_they_see_again() -> None:
    tower, calls = VisionTower(SMALL.dino, 16), []
    begin(tower, torch.Generator().manual_seed(0))
    pixels, gradients = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), []
    tower.blocks[0].register_forward_pre_hook(lambda *_: calls.append(tower.recompute))
    for again in (False, True):
        tower.recompute = again
        tower.zero_grad(set_to_none=True)
        tower(pixels).square().sum().backward()
        gradients.append([p.grad for p in tower.parameters() if p.grad is not None])
    assert calls == [False, True, True]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_same_seed_gives_the_same_weights() -> None:
    one, same, other = small_policy(), small_policy(), small_policy(seed=1)
    for name, tensor in one.network.state_dict().items():
        assert torch.equal(tensor, same.network.state_dict()[name])
    assert not torch.equal(one.network.action_head.model.fc1.weight, other.network.action_head.model.fc1.weight)


def test_untrained_scale_is_the_papers_start() -> None:
    policy = OpenVLAOFT.create(SMALL, small_policy().tokenizer, small_policy().statistics, 3, torch.device("cpu"))
    assert float((policy.act(observation(4)).log_scale + 3.0).abs().max()) < 0.1


def test_whole_policy_comes_back_from_its_file(tmp_path: Path) -> None:
    policy, seen = small_policy(), observation(3)
    save(tmp_path / "policy.safetensors", policy)
    again = load(tmp_path / "policy.safetensors", torch.device("cpu"))
    assert torch.equal(again.act(seen, uniform(3)).action, policy.act(seen, uniform(3)).action)
    assert again.config == policy.config
    assert again.statistics.source == policy.statistics.source


def test_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    policy = small_policy()
    state = policy.network.state_dict()
    state["projector.fc1.weight"] = torch.zeros(3, 3)
    state["projector.fc9.weight"] = state.pop("projector.fc2.weight")
    save(tmp_path / "p.safetensors", policy, state)
    want = r"p.safetensors.*missing projector.fc2.weight; unknown projector.fc9.weight; wrong shape projector.fc1.weight \(3, 3\), want \(96, 24\)"
    with pytest.raises(ValueError, match=want):
        load(tmp_path / "p.safetensors", torch.device("cpu"))
    checkpoint.save(tmp_path / "other.safetensors", {"kind": "worldenv simulator"})
    with pytest.raises(checkpoint.CheckpointError, match="not a policy"):
        load(tmp_path / "other.safetensors", torch.device("cpu"))


def test_misfit_leaves_the_network_as_it_was() -> None:
    network = small_policy().network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match="unknown stray"):
        fill(network, {**{name: tensor + 1 for name, tensor in before.items()}, "stray": torch.zeros(1)}, "here")
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_what_does_not_fit_the_policy_is_refused() -> None:
    policy = small_policy()
    few = dataclasses.replace(SMALL, llama=dataclasses.replace(SMALL.llama, vocab=10))
    with pytest.raises(ValueError, match=r"raise policy.llama.vocab"):
        OpenVLAOFT(few, Network(few), policy.tokenizer, policy.statistics)
    seven = dataclasses.replace(SMALL, proprio=7)
    with pytest.raises(ValueError, match="another robot"):
        OpenVLAOFT(seven, Network(seven), policy.tokenizer, policy.statistics)
    for views in (0, 3):
        with pytest.raises(ValueError, match="want 1 or 2 views"):
            dataclasses.replace(SMALL, images=views)
    with pytest.raises(ValueError, match="joined by patch"):
        dataclasses.replace(SMALL, siglip=dataclasses.replace(SMALL.siglip, patch=4))
    with pytest.raises(ValueError, match="uniform"):
        policy.act(observation(2), uniform(2).float())
    with pytest.raises(ValueError, match=r"evaluate_actions: action \(1, 8, 7\), want \(2, 8, 7\)"):
        policy.evaluate_actions(observation(2), torch.zeros(1, 8, 7))
    with pytest.raises(ValueError, match="no query"):
        observation(0)
    with pytest.raises(ValueError, match="unknown word 'banana'"):
        policy.act(observation(1, instruction="push the banana"))


def test_published_names_become_ours() -> None:
    """Wrappers off, prefixes on, LayerScale's own name, and what has no influence left out."""
    network = Network(SMALL)
    ours = {name: torch.full_like(tensor, i) for i, (name, tensor) in enumerate(network.state_dict().items())}
    prefixes = ("action_head.", "proprio_projector.", "scale_head.")
    vla = {name.replace("ls1.scale_factor", "ls1.gamma"): tensor for name, tensor in ours.items() if not name.startswith(prefixes)}
    dead = (
        "language_model.lm_head.weight", "vision_backbone.featurizer.norm.weight", "vision_backbone.fused_featurizer.attn_pool.q.bias",
        "vision_backbone.featurizer.blocks.1.attn.qkv.weight", "vision_backbone.fused_featurizer.blocks.1.ls1.gamma",
    )  # fmt: skip
    vla |= {name: torch.zeros(1) for name in dead}
    heads = [{f"module.{name.removeprefix(p)}": t for name, t in ours.items() if name.startswith(p)} for p in prefixes]
    made = from_published(vla, *heads, config=SMALL)
    assert made.keys() == ours.keys()
    assert all(made[name] is ours[name] for name in ours)
    assert not never_read("vision_backbone.featurizer.blocks.0.norm1.weight", SMALL)


def test_published_size() -> None:
    """Counted on no memory at all: 7.5 billion parameters, the heads 151,117,831 and the proprio projector 16.8 million (published figures)."""
    published = dataclasses.replace(
        TINY.policy,
        image=224,
        dino=dataclasses.replace(TINY.policy.dino, width=1024, depth=24, heads=16, mlp=4096, patch=14),
        siglip=dataclasses.replace(TINY.policy.siglip, width=1152, depth=27, heads=16, mlp=4304, patch=14),
        llama=dataclasses.replace(TINY.policy.llama, width=4096, layers=32, heads=32, ffn=11008, vocab=32064),
        head_width=4096,
    )
    with torch.device("meta"):
        network = Network(published)
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in network.named_children()}
    assert count["action_head"] == count["scale_head"] == 151_117_831
    assert count["proprio_projector"] == 8 * 4096 + 4096 + 4096 * 4096 + 4096
    assert count["language_model"] == 6_738_415_616 - 2 * 32000 * 4096 + 32064 * 4096  # Llama-2-7B, wider table, no output layer
    assert count["projector"] == pytest.approx(71.4e6, rel=1e-3)
