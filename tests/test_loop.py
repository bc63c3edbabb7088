"""LOOP: advantage, loss and update; every wrong version that was thought of fails here."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peft
import pytest
import torch
from small_policy import LIKE, SMALL, observation, published_policy, rollouts, small_policy, uniform

from worldenv import checkpoint
from worldenv.config import LoopConfig
from worldenv.learning.loop import memory
from worldenv.learning.loop import update as update_module
from worldenv.learning.loop.advantage import baseline, leave_one_out
from worldenv.learning.loop.loss import Surrogate, surrogate
from worldenv.learning.loop.update import Learner, RatioError
from worldenv.nouns import Observation, Rollout
from worldenv.policy import lora
from worldenv.policy.openvla_oft import Network, OpenVLAOFT
from worldenv.policy.weights import fill, load, save
from worldenv.presets import OPENVLA_OFT

CONFIG = LoopConfig(group=4, contexts=2, batch=4, microbatch=5, lora_rank=4, lora_alpha=2)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# advantage


def test_leave_one_out_by_hand() -> None:
    """Two groups of different sizes, mixed. With itself in the baseline, the first advantage would be 0.6."""
    value, group = double(1.0, 0.5, 0.4, 0.1, 0.0), torch.tensor([7, 3, 7, 3, 7])
    torch.testing.assert_close(baseline(value, group), double(0.2, 0.1, 0.5, 0.5, 0.7))
    torch.testing.assert_close(leave_one_out(value, group), double(0.8, 0.4, -0.1, -0.4, -0.7))


def test_equal_returns_give_no_advantage() -> None:
    assert float(leave_one_out(torch.full((8,), 0.7, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)).abs().max()) < 1e-15


def test_alone_in_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"groups \[5\] hold one rollout"):
        leave_one_out(double(1.0, 0.0, 0.3), torch.tensor([2, 2, 5]))


# loss


def test_surrogate_by_hand() -> None:
    """eps 0.1. Ratios 1.2, 0.8, 1.05 with A = 2 and with A = -1; the last step of the second row was not executed."""
    new = double(1.2, 0.8, 1.05, 1.2, 0.8, 1.05).log().reshape(2, 3).requires_grad_()
    live = torch.tensor([[True, True, True], [True, True, False]])
    result = surrogate(new, torch.zeros(2, 3, dtype=torch.float64), double(2.0, -1.0), live, 0.1)
    gained = (2 * 1.1 + 2 * 0.8 + 2 * 1.05) + (-1.2 - 0.9)
    assert float(result.loss.detach()) == pytest.approx(-gained / 5)
    assert result.clipped.tolist() == [[True, False, False], [False, True, False]]
    torch.testing.assert_close(result.ratio, double(1.2, 0.8, 1.05, 1.2, 0.8, 0.0).reshape(2, 3))
    result.loss.backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, -double(0.0, 1.6, 2.1, -1.2, 0.0, 0.0).reshape(2, 3) / 5)
    kl = [r - 1 - math.log(r) for r in (1.2, 0.8, 1.05, 1.2, 0.8)]
    assert float(result.kl.sum()) == pytest.approx(sum(kl))


def test_what_was_not_executed_does_not_matter() -> None:
    live = torch.tensor([[True, False]])
    new = torch.tensor([[0.1, float("nan")]], requires_grad=True)
    result = surrogate(new, torch.tensor([[0.0, 3.0]]), torch.tensor([1.0]), live, 0.5)
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(-math.exp(0.1))
    assert new.grad is not None
    assert float(new.grad[0, 1]) == 0.0
    with pytest.raises(ValueError, match="no executed step"):
        surrogate(new, new, torch.tensor([1.0]), torch.zeros(1, 2, dtype=torch.bool), 0.1)
    with pytest.raises(ValueError, match="surrogate: new"):
        surrogate(new, new, torch.tensor([1.0, 2.0]), live, 0.1)


def test_gradient_is_that_of_autograd_through_the_definition() -> None:
    draw = np.random.default_rng(3)
    new, old = (torch.from_numpy(draw.normal(0, 0.1, (6, 8))) for _ in range(2))
    new.requires_grad_()
    advantage, live = torch.from_numpy(draw.normal(size=6)), torch.from_numpy(draw.uniform(size=(6, 8)) < 0.7)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(6):
        for t in range(8):
            if live[n, t]:
                r = (new[n, t] - old[n, t]).exp()
                total = total - torch.min(r * advantage[n], r.clamp(0.9, 1.1) * advantage[n])
    want = torch.autograd.grad(total / live.sum(), new)[0]
    got = torch.autograd.grad(surrogate(new, old, advantage, live, 0.1).loss, new)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


# update


def learner(config: LoopConfig = CONFIG, policy: OpenVLAOFT | None = None) -> Learner:
    made = Learner(policy or small_policy(), config, seed=5)
    with torch.no_grad():  # as after an update: LoRA that is not nothing
        generator = torch.Generator().manual_seed(0)
        for name, parameter in made.policy.network.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def gradients(made: Learner, monkeypatch: pytest.MonkeyPatch, given: list[Rollout]) -> list[dict[str, torch.Tensor]]:
    """The gradient of every optimiser step of one update, none of which is taken."""
    caught: list[dict[str, torch.Tensor]] = []

    def catch(*_: Any, **__: Any) -> None:
        caught.append({name: p.grad.clone() for name, p in made.policy.network.named_parameters() if p.grad is not None})

    with monkeypatch.context() as patch:
        patch.setattr(made._optimizer, "step", catch)
        made.update(given, 0)
    return caught


ROUGH = 5.0 if torch.__version__ < "2.13" else 1.0
"""How much further an older torch rounds away."""


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2 distance: float32 gives 1e-4 and less (torch 2.11: 1e-3), a batch divided by its own length 0.1 and more."""
    return float((one - other).norm() / (other.norm() + 1e-12))


FREE = dataclasses.replace(CONFIG, grad_clip=1e9)


def seen_by(r: Rollout) -> Observation:
    """What the policy saw in a rollout, query by query."""
    return Observation(r.frame, r.proprio, (r.context.instruction,) * len(r.live))


def test_microbatches_give_the_full_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learner(dataclasses.replace(FREE, microbatch=1000))
    given = rollouts(whole.policy)
    for size in (1, 3):
        parts = learner(dataclasses.replace(FREE, microbatch=size))
        for one, other in zip(gradients(whole, monkeypatch, given), gradients(parts, monkeypatch, given), strict=True):
            for name, gradient in one.items():
                assert apart(other[name], gradient) < 1e-3 * ROUGH, name


def test_batches_add_up_to_eq_5(monkeypatch: pytest.MonkeyPatch) -> None:
    """At fixed weights, the mean gradient of an iteration's batches is that of Eq. 5 over the whole iteration, which is written out here."""
    made = learner(FREE)
    given = rollouts(made.policy)
    assert len({r.steps for r in given}) > 3
    steps = gradients(made, monkeypatch, given)
    assert len(steps) == 2
    value, group = double(*(r.value for r in given)), torch.tensor([r.group for r in given])
    advantage = leave_one_out(value, group).float()
    total, count = torch.zeros(()), 0
    for n, rollout in enumerate(given):
        seen = dataclasses.replace(observation(len(rollout.live)), frame=rollout.frame, proprio=rollout.proprio,
                                   instruction=(rollout.context.instruction,) * len(rollout.live))  # fmt: skip
        new, _, _ = made.policy.evaluate_actions(seen, rollout.action)
        ratio = (new - rollout.log_prob).exp()
        total = total + (torch.minimum(ratio * advantage[n], ratio.clamp(0.9, 1.1) * advantage[n]) * rollout.live).sum()
        count += rollout.steps
    made.policy.network.zero_grad()
    (-total / count).backward()
    for name, parameter in made.policy.network.named_parameters():
        if parameter.grad is not None:
            mean = (steps[0][name] + steps[1][name]) / 2
            assert apart(mean, parameter.grad) < 1e-3, name


def test_update_makes_good_actions_likelier() -> None:
    """One group, returns 1 and 0: the better rollouts' steps become likelier than the worse ones'."""
    made = Learner(small_policy(), dataclasses.replace(CONFIG, lora_lr=1e-3, head_lr=1e-4, clip=10.0, contexts=1), seed=0)
    given = [dataclasses.replace(r, score=r.score * 0 + (r.number % 2) * r.live) for r in rollouts(made.policy, groups=1, group=4)]

    def lead(of: list[Rollout]) -> float:
        """How much likelier a good step is than a bad one, on average."""
        good, bad = (torch.cat([r.log_prob[r.live] for r in of if r.number % 2 == odd]) for odd in (1, 0))
        return float(good.mean() - bad.mean())

    for iteration in range(3):
        fresh = []
        for r in given:
            seen = dataclasses.replace(observation(len(r.live)), frame=r.frame, proprio=r.proprio, instruction=(r.context.instruction,) * len(r.live))
            log_prob = made.policy.evaluate_actions(seen, r.action)[0].detach()
            fresh.append(dataclasses.replace(r, log_prob=log_prob))
        made.update(fresh, iteration)
    assert lead(fresh) > lead(given) + 0.1


def test_the_gradient_of_some_rollouts_is_that_of_a_step_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = learner(dataclasses.replace(FREE, batch=8))
    given = rollouts(made.policy)
    (step,) = gradients(made, monkeypatch, given)
    value = torch.tensor([r.value for r in given], dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in made.policy.network.named_parameters()}
    found = made.gradient(given, leave_one_out(value, torch.tensor([r.group for r in given])).float())
    for name, of in (("lora", made._lora), ("action_head", made._heads), ("scale_head", made._heads)):
        want = torch.cat([step[key].flatten() for key in of if name == "lora" or key.startswith(name)])
        assert apart(found[name], want) < 1e-4 * ROUGH, name
    assert all(torch.equal(p, before[name]) for name, p in made.policy.network.named_parameters())


def test_learning_rates_rise_over_the_first_steps_and_go_on_rising_from_a_savepoint() -> None:
    """Adam's first step is of full length, its rate, for every weight with a gradient, however small."""
    warm = dataclasses.replace(CONFIG, warmup=8, head_lr=1e-3, weight_decay=0.0)

    def moved(made: Learner, iteration: int) -> float:
        before = {name: p.detach().clone() for name, p in made._heads.items()}
        made.update(rollouts(made.policy), iteration)
        return max(float((p.detach() - before[name]).abs().max()) for name, p in made._heads.items())

    made, still = learner(dataclasses.replace(warm, batch=8)), learner(dataclasses.replace(CONFIG, batch=8, head_lr=1e-3, weight_decay=0.0))
    assert moved(still, 0) == pytest.approx(1e-3, rel=1e-3)
    assert moved(made, 0) == pytest.approx(1e-3 / 8, rel=1e-3)
    later = learner(dataclasses.replace(warm, batch=8))
    later.load_tree(made.tree())
    assert [group["lr"] for group in later._optimizer.param_groups] == [CONFIG.lora_lr / 8, 1e-3 / 8]
    moved(later, 1)
    assert [group["lr"] for group in later._optimizer.param_groups] == [CONFIG.lora_lr / 4, 1e-3 / 4]
    for iteration in range(2, 9):
        moved(later, iteration)
    assert [group["lr"] for group in later._optimizer.param_groups] == [CONFIG.lora_lr, 1e-3]


def test_metrics_and_what_is_trained() -> None:
    made = learner()
    given = rollouts(made.policy)
    before = {name: p.detach().clone() for name, p in made.policy.network.named_parameters()}
    metrics = made.update(given, 0)
    assert metrics["updates"] == 2
    assert metrics["steps"] == sum(r.steps for r in given)
    assert 0.0 <= metrics["clip_fraction"] < 1.0
    assert metrics["kl"] >= 0.0
    assert metrics["ratio_max"] >= 1.0
    assert metrics["grad_norm_lora"] > 0.0
    assert metrics["grad_norm_heads"] > 0.0
    assert json.loads(json.dumps(metrics)) == metrics
    changed = {name for name, p in made.policy.network.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name in before if ".lora_" in name or name.startswith(("action_head", "scale_head"))}
    assert changed <= trained
    assert {name.split(".")[0] for name in changed} == {"vision_backbone", "projector", "language_model", "action_head", "scale_head"}


def test_metrics_are_of_executed_steps() -> None:
    """Where no weight changes all ratios are 1, and Eq. 5 is the mean advantage of an executed step."""
    made = learner(dataclasses.replace(CONFIG, control="frozen", passes=2))
    given = rollouts(made.policy)
    advantage = update_module.advantages(given).tolist()
    log_scale = [made.policy.evaluate_actions(seen_by(r), r.action)[2].detach() for r in given]
    entropy = sum(float(((1 + math.log(2.0) + of).sum(-1) * r.live).sum()) for r, of in zip(given, log_scale, strict=True))
    steps = sum(r.steps for r in given)
    assert steps < sum(r.live.numel() for r in given)
    found = made.update(given, 0)
    assert found["loss"] == pytest.approx(-sum(a * r.steps for a, r in zip(advantage, given, strict=True)) / steps, rel=1e-3)
    assert abs(found["loss"]) > 1e-3
    assert found["entropy"] == pytest.approx(entropy / steps, rel=1e-4)
    assert (found["updates"], found["steps"]) == (4, steps)


def test_lora_and_heads_are_clipped_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads' gradients are far longer: clipped together with them, LoRA would hardly learn."""
    made = learner(dataclasses.replace(CONFIG, grad_clip=1e-4))
    for gradient in gradients(made, monkeypatch, rollouts(made.policy)):
        for of in (made._lora, made._heads):
            length = math.sqrt(sum(float(gradient[name].double().square().sum()) for name in of))
            assert length == pytest.approx(1e-4, rel=1e-3)


def test_a_learner_draws_with_the_factor_that_it_is_told() -> None:
    made = learner(dataclasses.replace(CONFIG, scale_factor=2.5))
    assert made.policy.scale_factor == 2.5
    assert made.check_ratio(rollouts(made.policy)) < 5e-4


def test_all_rollouts_are_checked_at_first_and_some_later() -> None:
    """What a killed run left may have been drawn by other weights, all of it or a part."""
    made = learner()
    given = rollouts(made.policy)
    spoiled = [*given[:-1], dataclasses.replace(given[-1], log_prob=given[-1].log_prob + 0.5)]
    with pytest.raises(RatioError, match="iteration 0: the ratio is off 1"):
        made.update(spoiled, 0)
    made.update(given, 0)
    given = rollouts(made.policy)
    with pytest.raises(RatioError, match="iteration 1: the ratio is off 1"):
        made.update([dataclasses.replace(given[0], log_prob=given[0].log_prob + 0.5), *given[1:]], 1)


def test_first_ratios_are_one_and_others_rollouts_are_refused() -> None:
    made = learner()
    given = rollouts(made.policy)
    assert made.check_ratio(given) < 5e-4  # half of what is refused: rounding alone, of random weights
    made.policy.scale_factor = 2.0
    with pytest.raises(RatioError, match=r"iteration 4: the ratio is off 1 by .*collect them again"):
        made.update(given, 4)
    made.policy.scale_factor = 1.0
    spoiled = [dataclasses.replace(r, log_prob=r.log_prob * float("nan")) for r in given]
    with pytest.raises(RatioError, match="off 1 by nan"):
        made.check_ratio(spoiled)


def half_policy(attention: Literal["full", "prefix_lm"] = "full") -> OpenVLAOFT:
    """A policy as it is opened from a published directory: backbone in bfloat16, the rest in float32."""
    policy = published_policy(dataclasses.replace(LIKE, attention=attention))
    policy.network.to(torch.bfloat16)
    for part in (policy.network.action_head, policy.network.scale_head, policy.network.proprio_projector):
        part.float()
    return policy


@pytest.mark.parametrize(("devices", "precision"), [(3, "float32"), (2, "bfloat16")])
def test_an_update_by_several_devices_is_that_of_one_bit_for_bit(devices: int, precision: str) -> None:
    """Microbatches take turns on copies of the policy; copies follow every step, and a state that is loaded."""

    def learned(count: int) -> tuple[list[dict[str, float]], Learner]:
        policy = half_policy() if precision == "bfloat16" else small_policy()
        made = learner(dataclasses.replace(CONFIG, microbatch=3, passes=2, lora_lr=1e-2, head_lr=1e-3), policy)
        copies = [copy.deepcopy(made.policy) for _ in range(count - 1)]
        made.share(copies)
        found = [made.update(rollouts(made.policy, seed=iteration), iteration) for iteration in range(2)]
        state = {name: tensor.clone() for name, tensor in made.tree()["trained"].items()}
        for other in copies:
            theirs = dict(other.network.named_parameters())
            assert all(torch.equal(theirs[name], tensor) for name, tensor in state.items())
            assert all(parameter.grad is None for parameter in theirs.values())
        return found, made

    (alone, one), (shared, several) = learned(1), learned(devices)
    assert alone == shared
    before = learner(CONFIG, small_policy()).tree()["trained"]
    for name, tensor in one.tree()["trained"].items():
        assert torch.equal(tensor, several.tree()["trained"][name]), name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in one.tree()["trained"].items())
    several.load_tree(learner(CONFIG, half_policy() if precision == "bfloat16" else small_policy()).tree())
    fresh = several.tree()["trained"]
    for other in several._hands[1:]:
        assert all(torch.equal(dict(other.network.named_parameters())[name], tensor) for name, tensor in fresh.items())


def test_beside_a_half_precision_backbone_lora_is_multiplied_in_half_precision_and_learned_in_float32() -> None:
    """By itself PEFT takes what LoRA is given to float32: products a tenth as fast on a GPU, and inputs twice as wide kept for the way back."""
    made, seen = learner(CONFIG, half_policy()), list[torch.dtype]()

    def note(_module: object, _given: object, out: torch.Tensor) -> None:
        seen.append(out.dtype)

    for name, module in made.policy.network.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(note)
    made.gradient(rollouts(made.policy), torch.tensor([0.3, -0.1, -0.1, -0.1] * 2))
    assert len(seen) > 10
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in made._lora.values()} == {torch.float32}


@pytest.mark.parametrize("attention", ["full", "prefix_lm"])
def test_in_half_precision_ratios_begin_at_one_too(attention: Literal["full", "prefix_lm"], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 answer depends on who shares the batch, so the rollouts' own log-densities would give ratios far off 1."""
    config = dataclasses.replace(CONFIG, microbatch=16, passes=2, gradient_checkpointing=True)
    made = learner(config, half_policy(attention))
    given, seen = rollouts(made.policy), []
    with pytest.raises(RatioError, match=r"off 1 by \d"):
        made.check_ratio(given)
    right = update_module.surrogate

    def noted(new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, live: torch.Tensor, *rest: float) -> Surrogate:
        seen.append(float((new.detach() - old)[live].abs().max()))
        return right(new, old, advantage, live, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(update_module, "surrogate", noted)
        patch.setattr(made._optimizer, "step", lambda *_: None)
        made.update(given, 0)
    assert len(seen) >= 4
    assert max(seen) == 0.0
    before = made.merged()
    metrics = made.update(given, 0)
    assert metrics["updates"] == 4
    changed = {name.split(".")[0] for name, tensor in made.merged().items() if not torch.equal(tensor, before[name])}
    assert {"language_model", "action_head", "scale_head"} <= changed
    given = rollouts(made.policy)
    for factor in (0.7, 1.3):
        made.policy.scale_factor = factor
        with pytest.raises(RatioError, match=r"iteration 4: the policy is 0\.\d+ nat per step from the one .*collect them again"):
            made.update(given, 4)


def test_nan_stops_the_update_before_it_harms() -> None:
    made = learner()
    given = [dataclasses.replace(r, action=r.action.clone()) for r in rollouts(made.policy)]
    before = made.merged()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "check_ratio", lambda *_: 0.0)
        for r in given:
            r.action[0, 0, 0] = float("nan")
        with pytest.raises(FloatingPointError, match=r"loop: loss is nan.*iteration 3, batch 0; lower loop.lora_lr"):
            made.update(given, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.merged().items())


def test_order_is_a_function_of_seed_and_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of the order in which rollouts ended."""
    made = learner(FREE)
    given = rollouts(made.policy)
    one, other = gradients(made, monkeypatch, given), gradients(made, monkeypatch, given[::-1])
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)
    chosen = []
    monkeypatch.setattr(made, "_step", lambda batch, *_: chosen.append(sorted(r.number for r in batch)))
    monkeypatch.setattr(update_module._Totals, "metrics", lambda *_: {})
    made.update(given, 0)
    made.update(given, 1)
    assert sorted(chosen[0] + chosen[1]) == sorted(chosen[2] + chosen[3]) == list(range(8))
    assert chosen[:2] != chosen[2:]


def test_no_two_passes_take_rollouts_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where densities were rescored in the batches of the first pass: there every pass takes these."""
    made = learner(dataclasses.replace(CONFIG, passes=2))
    orders = [[i for batch in made._batches(32, iteration, sweep) for i in batch] for iteration in range(3) for sweep in range(2)]
    assert all(sorted(order) == list(range(32)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    monkeypatch.setattr(update_module._Totals, "metrics", lambda *_: {})
    for policy, alike in ((half_policy(), True), (small_policy(), False)):
        made, chosen = learner(dataclasses.replace(CONFIG, passes=2), policy), list[list[int]]()
        monkeypatch.setattr(made, "_step", lambda batch, *_, chosen=chosen: chosen.append([r.number for r in batch]))
        made.update(rollouts(policy), 0)
        assert (chosen[:2] == chosen[2:]) is alike


def test_shuffle_control_gives_the_same_advantages_to_other_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else differs from the method; and every iteration shuffles otherwise."""
    monkeypatch.setattr(update_module._Totals, "metrics", lambda *_: {})

    def advantages(control: Any, iteration: int, permutation: int = 0) -> dict[int, float]:
        made, given = learner(dataclasses.replace(CONFIG, control=control, permutation=permutation)), {}
        monkeypatch.setattr(made, "_step", lambda batch, advantage, *_: given.update(zip([r.number for r in batch], advantage.tolist(), strict=True)))
        made.update(rollouts(made.policy), iteration)
        return given

    plain, first, second = advantages("none", 0), advantages("shuffle", 0), advantages("shuffle", 1)
    assert plain == advantages("none", 1)
    assert sorted(plain.values()) == sorted(first.values()) == sorted(second.values())
    assert plain != first != second != plain
    again = advantages("shuffle", 0, 1)
    assert sorted(again.values()) == sorted(plain.values())
    assert again not in (plain, first, second, advantages("shuffle", CONFIG.iterations - 1)), "another permutation, of no iteration of the first run"


def test_frozen_control_changes_no_weight() -> None:
    made = learner(dataclasses.replace(CONFIG, control="frozen"))
    before = {name: tensor.clone() for name, tensor in made.tree()["trained"].items()}
    made.update(rollouts(made.policy), 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.tree()["trained"].items())


def test_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    straight = learner()
    first = rollouts(straight.policy)
    straight.update(first, 0)
    checkpoint.save(tmp_path / "loop.safetensors", straight.tree())
    again = Learner(small_policy(), CONFIG, seed=99)
    again._seed = 5
    again.load_tree(checkpoint.load(tmp_path / "loop.safetensors"))
    for made in (straight, again):
        made.update(rollouts(made.policy, seed=1), 1)
    ours, theirs = straight.merged(), again.merged()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_state_of_another_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loop state does not fit this policy: .*was lora_rank"):
        learner(dataclasses.replace(CONFIG, lora_rank=2)).load_tree(learner().tree())


# LoRA


def test_lora_is_where_the_module_says() -> None:
    targets = lora.targets(Network(SMALL))
    assert "vision_backbone.featurizer.blocks.0.attn.qkv" in targets
    assert "projector.fc3" in targets
    assert "language_model.model.layers.1.mlp.down_proj" in targets
    assert not any(name.startswith(("proprio", "action", "scale")) or "patch_embed" in name for name in targets)
    made = learner()
    adapted = {name.split(".lora_")[0] for name, _ in made.policy.network.named_parameters() if ".lora_" in name}
    assert adapted == set(targets)


def test_fresh_lora_changes_nothing() -> None:
    plain, seen = small_policy(), observation(3)
    want = plain.act(seen, uniform(3))
    made = Learner(plain, CONFIG, seed=1)
    assert torch.equal(made.policy.act(seen, uniform(3)).action, want.action)
    state = torch.get_rng_state()
    Learner(small_policy(), CONFIG, seed=1)  # neither a policy nor LoRA draws from torch's global generator
    assert torch.equal(torch.get_rng_state(), state)


def test_merged_weights_act_the_same_and_the_base_stays_pristine() -> None:
    base = {name: tensor.clone() for name, tensor in small_policy().network.state_dict().items()}
    made = learner()
    merged = made.merged()
    assert merged.keys() == base.keys()
    name = "language_model.model.layers.0.self_attn.q_proj"
    layer = made.policy.network.get_submodule(name)
    delta = CONFIG.lora_alpha / CONFIG.lora_rank * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    assert float(delta.abs().max()) > 1e-3
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + delta, rtol=0, atol=1e-7)
    assert torch.equal(layer.base_layer.weight, base[f"{name}.weight"])
    plain = small_policy()
    fill(plain.network, merged, "merged")
    torch.testing.assert_close(plain.act(observation(4)).mu, made.policy.act(observation(4)).mu, rtol=0, atol=1e-5)


def test_what_changed_is_read_as_the_whole_policy(tmp_path: Path) -> None:
    base, made, seen = small_policy(), learner(), observation(3)
    with torch.no_grad():
        made.policy.network.scale_head.model.fc2.bias.add_(0.3)
    (tmp_path / "scale").mkdir()
    save(tmp_path / "scale" / "policy.safetensors", base)
    made.save_change(tmp_path / "loop" / "policy-0001.safetensors", tmp_path / "scale" / "policy.safetensors")
    (tmp_path / "elsewhere").mkdir()
    for part in ("scale", "loop"):  # a run may be moved
        (tmp_path / part).rename(tmp_path / "elsewhere" / part)
    changed, whole = tmp_path / "elsewhere" / "loop" / "policy-0001.safetensors", tmp_path / "whole.safetensors"
    save(whole, made.policy, made.merged())
    got, want = (load(path, torch.device("cpu")) for path in (changed, whole))
    assert all(torch.equal(tensor, want.network.state_dict()[name]) for name, tensor in got.network.state_dict().items())
    assert got.network.state_dict().keys() == want.network.state_dict().keys()
    assert torch.equal(got.act(seen, uniform(3)).action, want.act(seen, uniform(3)).action)
    assert not torch.equal(got.act(seen, uniform(3)).action, base.act(seen, uniform(3)).action)


def test_what_changed_of_another_policy_is_refused(tmp_path: Path) -> None:
    base, changed = tmp_path / "scale.safetensors", tmp_path / "policy-0001.safetensors"
    save(base, small_policy())
    learner().save_change(changed, base)
    save(base, small_policy(seed=1))
    with pytest.raises(checkpoint.CheckpointError, match=r"policy-0001.safetensors: holds what LOOP changed of .*scale.safetensors.*another by now"):
        load(changed, torch.device("cpu"))
    base.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"scale.safetensors, which is not there"):
        load(changed, torch.device("cpu"))


def test_adapter_is_pefts(tmp_path: Path) -> None:
    made = learner()
    made.export_adapter(tmp_path)
    network = small_policy().network
    for part in ("action_head", "scale_head"):
        network.get_submodule(part).load_state_dict(made.policy.network.get_submodule(part).state_dict())
    adapted = peft.PeftModel.from_pretrained(network, str(tmp_path))
    query = made.policy.query(observation(2))
    with torch.no_grad():
        got = adapted(query.pixels, query.ids, query.lengths, query.proprio)
    torch.testing.assert_close(got, made.policy.hidden(query).detach(), rtol=0, atol=1e-6)


# Memory


def test_computing_activations_again_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    for attention in ("full", "prefix_lm"):
        plain, again = (
            learner(dataclasses.replace(FREE, gradient_checkpointing=on), small_policy(dataclasses.replace(SMALL, attention=attention)))
            for on in (False, True)
        )
        given = rollouts(plain.policy)
        calls: list[int] = []
        layer = again.policy.network.language_model.model.layers[0]
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        for one, other in zip(gradients(plain, monkeypatch, given), gradients(again, monkeypatch, given), strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
        forwards = len(calls)
        calls.clear()
        again.check_ratio(given)  # forward alone
        assert forwards > 2 * len(calls)  # ratios, forward, and once more


def test_memory_is_what_is_alive_at_once() -> None:
    with torch.device("meta"), memory._Alive() as alive:
        x = torch.empty(1000, requires_grad=True)  # 4000 bytes
        y = (x * 2).sin()  # two more; the product is kept for the backward pass
        assert alive.now == 12_000
        del y
        assert alive.now == 4_000
        x.view(10, 100).t()  # no memory of their own
        assert (alive.now, alive.peak) == (4_000, 12_000)


def test_an_update_at_the_published_size_fits_96_gb() -> None:
    """Counted: 26.1 GB with activations computed again; weights are 7.1 billion in bfloat16, heads and LoRA in float32."""
    loop = LoopConfig(microbatch=16, gradient_checkpointing=True)
    found = memory.count(OPENVLA_OFT, loop)
    with torch.device("meta"):
        network = Network(OPENVLA_OFT)
    trained = 2 * 151_117_831 + sum(32 * sum(network.get_submodule(name).weight.shape) for name in lora.targets(network))
    assert found.gradients == 4 * trained
    assert found.optimizer == 2 * found.gradients
    assert 16.0e9 < found.weights < 17.0e9
    assert found.total < 30e9 < 96e9
    small = [memory.count(SMALL, dataclasses.replace(loop, gradient_checkpointing=on)).activations for on in (True, False)]
    assert small[0] < small[1]


def test_groups_without_spread_are_left_out_of_the_update_where_asked() -> None:
    """The update is that of an iteration without them; without the switch they count as executed steps."""

    def learned(drop: bool, chosen: slice = slice(None)) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        made = Learner(small_policy(), LoopConfig(group=4, contexts=2, batch=4, drop_uniform_groups=drop), seed=0)
        given = rollouts(made.policy)
        given[:4] = [dataclasses.replace(one, score=torch.where(one.live, 0.25, 0.0)) for one in given[:4]]
        return made.update(given[chosen], 0), made.tree()["trained"]

    dropped, weights = learned(drop=True)
    alone, want = learned(drop=False, chosen=slice(4, None))
    assert dropped.pop("dropped_groups") == 1
    assert alone.pop("dropped_groups") == 0
    assert dropped == alone
    assert all(torch.equal(weights[name], tensor) for name, tensor in want.items())
    assert learned(drop=False)[0]["steps"] > dropped["steps"]


def test_no_update_where_no_group_has_spread() -> None:
    made = Learner(small_policy(), LoopConfig(group=4, contexts=2, batch=4, drop_uniform_groups=True), seed=0)
    before = {name: tensor.clone() for name, tensor in made.tree()["trained"].items()}
    metrics = made.update([dataclasses.replace(one, score=torch.where(one.live, 0.25, 0.0)) for one in rollouts(made.policy)], 0)
    assert (metrics["updates"], metrics["dropped_groups"]) == (0, 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.tree()["trained"].items())
