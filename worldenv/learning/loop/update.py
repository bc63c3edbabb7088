"""One LOOP update: rollouts in, new LoRA and head weights out (paper, Algorithm 1, lines 23 to 32).

LoRA sits on the backbone (`worldenv.policy.lora`). Both heads are trained in full; everything else stays as it was.

Eq. 5 divides by the executed steps of all rollouts. A batch of 4 rollouts is one optimiser step on an unbiased estimate of that: its sum is
divided by 4 times the mean length over the iteration, not by its own length, so that every executed step of an iteration weighs the same.
Where a batch is the whole iteration, that is Eq. 5 itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from worldenv import noise
from worldenv.config import LoopConfig
from worldenv.devices import on
from worldenv.learning import processes
from worldenv.learning.loop.advantage import leave_one_out
from worldenv.learning.loop.loss import Surrogate, surrogate
from worldenv.nouns import Failed, Observation, Rollout
from worldenv.policy import laplace, lora, weights
from worldenv.policy.openvla_oft import OpenVLAOFT

RATIO_TOLERANCE = 1e-3
"""Largest |ratio - 1| before the first update of an iteration: float32 rounding between batches of different sizes stays well below."""
HALF_TOLERANCE = 0.1
"""Largest mean of ratio - 1 - log ratio [nat per step] there, where the backbone computes in half precision. Rounding then differs with who shares a
batch, and shifts mu by as much as the density is wide: single ratios mean little, but other weights or another factor stand out."""
HEADS = ("action_head", "scale_head")
T = TypeVar("T")


class RatioError(Failed):
    """The rollouts were not drawn by the policy that is to learn from them."""


@dataclass(frozen=True)
class _Microbatch:
    """Some queries of rollouts, on one device."""

    part: slice
    """Rows of all."""
    observation: Observation
    action: torch.Tensor
    """(b, K, 7), normalised."""
    old: torch.Tensor
    """(b, K) log-density under the policy that drew them."""
    live: torch.Tensor
    """(b, K) whether the step was executed."""


def _scored(policy: OpenVLAOFT, one: _Microbatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return policy.evaluate_actions(one.observation, one.action)


class Learner:
    """Holds the trainable weights of a policy and improves them. `policy` acts with them at once."""

    def __init__(self, policy: OpenVLAOFT, config: LoopConfig, seed: int) -> None:
        """Put fresh LoRA into `policy`, in place, and set its scale factor; `seed` decides the LoRA's start and the order of batches.

        ValueError for a policy of tokens.
        """
        policy.config.want_laplace("LOOP")
        self.policy, self.config = policy, config
        self._seed = seed
        self._fresh = True  # no update yet in this process: then all rollouts are checked, later the first few
        policy.scale_factor = config.scale_factor
        network = policy.network
        network.recompute = config.gradient_checkpointing
        self._lora = lora.attach(network, config.lora_rank, config.lora_alpha, noise.torch_seed(seed, noise.Stream.LOOP))
        self._heads = {name: parameter for name, parameter in network.named_parameters() if name.startswith(HEADS)}
        for parameter in self._heads.values():
            parameter.requires_grad_(True)
        lora_lr, head_lr = (0.0, 0.0) if config.control == "frozen" else (config.lora_lr, config.head_lr)
        groups = [{"params": list(self._lora.values()), "lr": lora_lr}, {"params": list(self._heads.values()), "lr": head_lr}]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=config.weight_decay)
        self._rates = (lora_lr, head_lr)
        self._steps = 0
        self._hands = [policy]

    def share(self, copies: Sequence[OpenVLAOFT]) -> None:
        """Work on the devices of `copies` too, each a copy of `policy` with its LoRA, whose weights follow every step.

        Microbatches take turns on the devices, and gradients are added in their order: where the devices are alike, to the bits of one alone.
        """
        self._hands = [self.policy, *copies]
        self._follow()

    def keep_up(self, machines: processes.Machines) -> None:
        """Take the weights of the leading machine's learner, on all devices; there, nothing changes."""
        machines.share((self._lora | self._heads).values())
        if machines.number:
            self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        trained = self._lora | self._heads
        for hand in self._hands[1:]:
            for name, own in hand.network.named_parameters():
                if name in trained:
                    own.copy_(trained[name])

    def update(self, rollouts: Sequence[Rollout], iteration: int) -> dict[str, float]:
        """Learn from one iteration's rollouts, all drawn by `policy` as it is now. Returns the metrics of the update.

        loss (Eq. 5), clip_fraction, kl [nat per step], ratio_max, grad_norm_lora and grad_norm_heads before clipping, entropy [nat per step],
        updates (optimiser steps), steps (executed steps), dropped_groups (with `drop_uniform_groups`: the update then is that of an iteration
        which had the other groups alone, and none where there are none).

        Raises RatioError where the rollouts are not this policy's, FloatingPointError where loss or gradient is not finite; the weights of
        the last whole optimiser step are then still there.
        """
        groups = len({r.group for r in rollouts})
        rollouts = sorted(rollouts, key=lambda r: r.number)  # not the order in which they ended
        if self.config.drop_uniform_groups:
            rollouts = with_spread(rollouts)
        dropped = float(groups - len({r.group for r in rollouts}))
        if not rollouts:
            return {**dict.fromkeys(_METRICS, 0.0), "dropped_groups": dropped}
        advantage = advantages(rollouts)
        if self.config.control == "shuffle":
            step = self.config.permutation * self.config.iterations + iteration
            draw = noise.integers(self._seed, noise.Stream.SHUFFLE, step, 2**32, len(rollouts))
            advantage = advantage[np.argsort(draw, kind="stable")]
        mean_steps = sum(r.steps for r in rollouts) / len(rollouts)
        whole = self.policy.network.projector.fc1.weight.dtype == torch.float32
        if whole:
            self.check_ratio(rollouts if self._fresh else rollouts[: self.config.batch], iteration)
        else:
            rollouts = self._rescored(rollouts, self._batches(len(rollouts), iteration, 0), iteration)
        self._fresh = False
        total = _Totals()
        for sweep in range(self.config.passes):
            for batch, chosen in enumerate(self._batches(len(rollouts), iteration, sweep if whole else 0)):
                self._step(
                    [rollouts[i] for i in chosen],
                    advantage[chosen],
                    mean_steps * len(chosen),
                    total,
                    f"iteration {iteration}, batch {batch}",
                )
        return {**total.metrics(len(rollouts) * mean_steps), "dropped_groups": dropped}

    def _batches(self, count: int, iteration: int, sweep: int) -> list[list[int]]:
        """The rollouts of each optimiser step of one pass, by index."""
        draw = noise.integers(self._seed, noise.Stream.LOOP, iteration * self.config.passes + sweep, 2**32, count)
        order: list[int] = np.argsort(draw, kind="stable").tolist()
        return [order[start : start + self.config.batch] for start in range(0, count, self.config.batch)]

    def gradient(self, rollouts: Sequence[Rollout], advantage: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradient of Eq. 5 over `rollouts` with `advantage` (R,), before any clipping, at the present weights; no step is taken.

        Flat, float32, by what is trained: lora, action_head, scale_head.
        """
        self._backward(rollouts, advantage, float(sum(r.steps for r in rollouts)), _Totals())
        parts = {"lora": self._lora, **{head: {n: p for n, p in self._heads.items() if n.startswith(head)} for head in HEADS}}
        slopes = {name: [torch.zeros_like(p) if p.grad is None else p.grad for p in of.values()] for name, of in parts.items()}
        flat = {name: torch.cat([slope.float().flatten() for slope in some]) for name, some in slopes.items()}
        self._optimizer.zero_grad(set_to_none=True)
        return flat

    def _backward(self, rollouts: Sequence[Rollout], advantage: torch.Tensor, steps: float, total: _Totals) -> float:
        """Leave the gradient of the loss at the weights, and return the loss; it does not depend on the microbatch."""
        self._optimizer.zero_grad(set_to_none=True)
        repeats = torch.tensor([len(r.live) for r in rollouts])
        rows = advantage.repeat_interleave(repeats)

        def learn(policy: OpenVLAOFT, one: _Microbatch) -> tuple[Surrogate, torch.Tensor]:
            new, _, log_scale = policy.evaluate_actions(one.observation, one.action)
            result = surrogate(new, one.old, rows[one.part].to(new.device), one.live, self.config.clip, steps)
            result.loss.backward()  # type: ignore[no-untyped-call]
            return result, laplace.entropy(log_scale.detach()).sum(-1)

        loss = 0.0
        for policy, one, (result, entropy) in self._by_hands(rollouts, learn):
            if policy is not self.policy:
                self._add_gradient(policy)
            loss += float(result.loss.detach())
            total.add(result.ratio, result.clipped, result.kl, entropy, one.live)
        return loss

    def _step(self, rollouts: Sequence[Rollout], advantage: torch.Tensor, steps: float, total: _Totals, where: str) -> None:
        """One optimiser step; every part of the loss is divided by the same `steps`."""
        loss = self._backward(rollouts, advantage, steps, total)
        norms = [float(nn.utils.clip_grad_norm_(group.values(), self.config.grad_clip)) for group in (self._lora, self._heads)]
        if not all(math.isfinite(x) for x in (loss, *norms)):
            raise FloatingPointError(
                f"loop: loss is {loss}, gradient norms are {norms} at {where}; lower loop.lora_lr and loop.head_lr, or raise policy.scale_floor"
            )
        self._steps += 1
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * min(1.0, self._steps / max(1, self.config.warmup))
        self._optimizer.step()
        self._follow()
        total.step(loss * steps, *norms)

    def _microbatches(self, rollouts: Sequence[Rollout]) -> Iterator[tuple[OpenVLAOFT, _Microbatch]]:
        """The queries of `rollouts`, `microbatch` at a time, and whose turn it is: on that policy's device."""
        instruction = [r.context.instruction for r in rollouts for _ in range(len(r.live))]
        frame, proprio, action, old, live = (
            torch.cat([getattr(r, name) for r in rollouts]) for name in ("frame", "proprio", "action", "log_prob", "live")
        )
        for turn, start in enumerate(range(0, len(instruction), self.config.microbatch)):
            part, hand = slice(start, start + self.config.microbatch), self._hands[turn % len(self._hands)]
            device = hand.device
            observation = Observation(frame[part].to(device), proprio[part].to(device), tuple(instruction[part]))
            yield hand, _Microbatch(part, observation, action[part].to(device), old[part].to(device), live[part].to(device))

    def _by_hands(self, rollouts: Sequence[Rollout], call: Callable[[OpenVLAOFT, _Microbatch], T]) -> Iterator[tuple[OpenVLAOFT, _Microbatch, T]]:
        """`call` for every microbatch, on all devices at once; who made it, what of, and what came of it, in the order of microbatches."""
        turns = self._microbatches(rollouts)
        if len(self._hands) == 1:
            yield from ((policy, one, call(policy, one)) for policy, one in turns)
            return
        learns = torch.is_grad_enabled()

        def work(policy: OpenVLAOFT, one: _Microbatch) -> T:
            with on(policy.device), torch.set_grad_enabled(learns):  # both are a thread's own
                return call(policy, one)

        with ThreadPoolExecutor(len(self._hands)) as pool:
            while some := list(itertools.islice(turns, len(self._hands))):
                waiting = [(*turn, pool.submit(work, *turn)) for turn in some]
                for policy, one, made in waiting:
                    yield policy, one, made.result()

    @torch.no_grad()
    def _add_gradient(self, copy: OpenVLAOFT) -> None:
        """Of one microbatch, to what is there; the copy's own is forgotten."""
        trained = self._lora | self._heads
        for name, own in copy.network.named_parameters():
            if name in trained and own.grad is not None:
                there, more = trained[name], own.grad.to(trained[name].device)
                there.grad = more if there.grad is None else there.grad.add_(more)
            own.grad = None

    @torch.no_grad()
    def check_ratio(self, rollouts: Sequence[Rollout], iteration: int = 0) -> float:
        """Largest |ratio - 1| over the executed steps of `rollouts` under the present weights; RatioError above 1e-3 and for nan."""
        worst = 0.0
        for _, one, (new, _, _) in self._by_hands(rollouts, _scored):
            error = float(((new - one.old)[one.live].double().exp() - 1.0).abs().max())
            worst = max(worst, error)
            if not error <= RATIO_TOLERANCE:
                raise RatioError(
                    f"loop: iteration {iteration}: the ratio is off 1 by {error:.3g} before the first update, not {RATIO_TOLERANCE:g}: "
                    "these rollouts were drawn with other weights, scale_factor or precision; collect them again"
                )
        return worst

    @torch.no_grad()
    def _rescored(self, rollouts: Sequence[Rollout], batches: Sequence[Sequence[int]], iteration: int) -> list[Rollout]:
        """`rollouts` with the log-densities that the update's own passes over `batches` give: ratios hold what learning changed, nothing else.

        RatioError where these are, on average, not those of the rollouts (HALF_TOLERANCE).
        """
        scored, gap = list(rollouts), 0.0
        for chosen in batches:
            parts = []
            for _, one, (new, _, _) in self._by_hands([rollouts[i] for i in chosen], _scored):
                log_ratio = (new - one.old)[one.live].double()
                gap += float((log_ratio.exp() - 1.0 - log_ratio).sum())
                parts.append(new.cpu())
            for i, log_prob in zip(chosen, torch.split(torch.cat(parts), [len(rollouts[i].live) for i in chosen]), strict=True):
                scored[i] = dataclasses.replace(rollouts[i], log_prob=log_prob.to(rollouts[i].log_prob.device))
        gap /= sum(r.steps for r in rollouts)
        if not gap <= HALF_TOLERANCE:
            raise RatioError(
                f"loop: iteration {iteration}: the policy is {gap:.3g} nat per step from the one that drew these rollouts, above {HALF_TOLERANCE:g}: "
                "they were drawn with other weights or scale_factor; collect them again"
            )
        return scored

    def tree(self) -> dict[str, Any]:
        """Everything that an update changes, for `checkpoint.save`."""
        trained = {name: parameter.detach() for name, parameter in (self._lora | self._heads).items()}
        return {"trained": trained, "optimizer": self._optimizer.state_dict(), "steps": self._steps}

    @torch.no_grad()
    def load_tree(self, tree: Mapping[str, Any]) -> None:
        """Go on from what `tree` returned: the next update gives the same bits as if nothing had been. ValueError for a misfit."""
        own, stored = self._lora | self._heads, tree["trained"]
        wrong = [
            name for name in sorted(own.keys() | stored.keys()) if name not in own or name not in stored or own[name].shape != stored[name].shape
        ]
        if wrong:
            raise ValueError(f"loop state does not fit this policy: {', '.join(wrong[:3])}; was lora_rank or the policy's size changed?")
        for name, parameter in own.items():
            parameter.copy_(stored[name])
        self._optimizer.load_state_dict(dict(tree["optimizer"]))
        self._steps = tree["steps"]
        self._follow()

    def merged(self) -> dict[str, torch.Tensor]:
        """The network's weights under their plain names, on the CPU, LoRA added to the pristine ones, which stay as they are."""
        return lora.merged(self.policy.network)

    def save_change(self, path: Path, base: Path) -> None:
        """Write what it changed so far of the policy in file `base`, from which it began, for `policy.weights.load`."""
        weights.save_change(path, base, lora.Adapter.of(self.policy.network), {name: one.detach() for name, one in self._heads.items()})

    def export_adapter(self, directory: Path) -> None:
        """Write LoRA in PEFT's format (the heads are in the policy's own file)."""
        lora.Adapter.of(self.policy.network).write(directory)


def advantages(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """(R,) float32, in their order: returns by `leave_one_out`, whose errors are raised."""
    value = torch.tensor([r.value for r in rollouts], dtype=torch.float64)
    return leave_one_out(value, torch.tensor([r.group for r in rollouts])).float()


def with_spread(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts of groups whose returns are not all equal."""
    values: dict[int, set[float]] = {}
    for one in rollouts:
        values.setdefault(one.group, set()).add(one.value)
    return [one for one in rollouts if len(values[one.group]) > 1]


_METRICS = ("loss", "clip_fraction", "kl", "ratio_max", "grad_norm_lora", "grad_norm_heads", "entropy", "updates", "steps")


class _Totals:
    """Sums over the executed steps of an update."""

    def __init__(self) -> None:
        self.executed = self.clipped = self.kl = self.entropy = self.loss = 0.0
        self.ratio_max = 0.0
        self.norms: list[tuple[float, float]] = []

    def add(self, ratio: torch.Tensor, clipped: torch.Tensor, kl: torch.Tensor, entropy: torch.Tensor, live: torch.Tensor) -> None:
        self.executed += float(live.sum())
        self.clipped += float(clipped.sum())
        self.kl += float(kl.sum())
        self.entropy += float(entropy[live].sum())
        self.ratio_max = max(self.ratio_max, float(ratio.max()))

    def step(self, loss: float, lora: float, heads: float) -> None:
        self.loss += loss
        self.norms.append((lora, heads))

    def metrics(self, steps: float) -> dict[str, float]:
        lora, heads = (sum(norm) / len(self.norms) for norm in zip(*self.norms, strict=True))
        return {
            "loss": self.loss / self.executed,
            "clip_fraction": self.clipped / self.executed,
            "kl": self.kl / self.executed,
            "ratio_max": self.ratio_max,
            "grad_norm_lora": lora,
            "grad_norm_heads": heads,
            "entropy": self.entropy / self.executed,
            "updates": len(self.norms),
            "steps": steps,
        }
