"""Stage reward: the reflector learns from frames that the true environment has labelled (paper, eq. 3 and appendix B.3).

The label of time t is the task's predicate at frame t, and the input is o_0 .. o_t: a success is about the last frame, not about one that is past.

1. `train_backbone`, only where no pretrained backbone is given: the small vision tower and language model learn the labels from scratch, through
   the answer ("Yes" or "No") and through a reward head of their own. This stands in for the pretraining that a published backbone has.
2. `fit_head`: the backbone is frozen, embeddings are computed once, and a fresh head is fitted to them as in the paper: BCE, Adam.
3. `measure`, on episodes that neither has seen.

The reflector judges what the simulator draws, which is not quite what the camera sees. So all three take `drawn`: the same frames as the simulator's
autoencoder (or the simulator) gives them back. Half of the training videos then show these from the second frame on; the first frame of an imagined
rollout is a true one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from worldenv import console, noise
from worldenv.checkpoint import Savepoint
from worldenv.config import RewardConfig
from worldenv.data.episode import Episode
from worldenv.learning.sft import one_cycle
from worldenv.reflector.contract import Judge
from worldenv.reflector.frames import shown
from worldenv.reflector.judge import Embedding, LlavaReflector
from worldenv.reflector.weights import fresh_head

_GRAD_CLIP = 1.0
_DRAWS = 4  # draws of `noise.integers` in one optimiser step, at most


class Labelled:
    """Every judged moment (episode, t >= 1) of some episodes, with its label."""

    def __init__(self, episodes: Sequence[Episode], drawn: Sequence[NDArray[np.uint8]] | None = None) -> None:
        """`drawn[e]` is like `episodes[e].frame`. ValueError where it is not, or where there is no success or no failure to learn from."""
        if drawn is not None and [frames.shape for frames in drawn] != [episode.frame.shape for episode in episodes]:
            raise ValueError(f"drawn: {len(drawn)} videos for {len(episodes)} episodes, or frames of another shape")
        self._episodes, self._drawn = episodes, drawn
        moments = [(e, t) for e, episode in enumerate(episodes) for t in range(1, len(episode.success))]
        holds = np.array([episodes[e].success[t] for e, t in moments], bool)
        self._moments = {label: np.array(moments, np.int64).reshape(-1, 2)[holds == label] for label in (True, False)}
        if not all(len(moments) for moments in self._moments.values()):
            raise ValueError(
                f"reward: {len(self._moments[True])} frames of success and {len(self._moments[False])} of failure in {len(episodes)} episodes: "
                "want some of both; explore more, or with a smaller scale factor"
            )

    def __len__(self) -> int:
        return sum(map(len, self._moments.values()))

    @property
    def successes(self) -> int:
        """Moments at which the predicate holds."""
        return len(self._moments[True])

    def draw(self, seed: int, stream: noise.Stream, step: int, count: int, positives: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """`count` moments with replacement, (count, 3) of episode, time and whether drawn frames are shown; and labels (count,), successes first."""
        wanted = {True: round(positives * count), False: count - round(positives * count)}
        picks = []
        for i, (label, number) in enumerate(wanted.items()):
            picks.append(self._moments[label][noise.integers(seed, stream, _DRAWS * step + i, len(self._moments[label]), number)])
        return self._finish(picks, noise.integers(seed, stream, _DRAWS * step + 2, 2, count))

    def choose(self, seed: int, stream: noise.Stream, count: int, positives: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """As `draw`, without replacement: fewer than `count` where there are not so many."""
        wanted = {True: round(positives * count), False: count - round(positives * count)}
        picks = []
        for i, (label, number) in enumerate(wanted.items()):
            pool = self._moments[label]
            picks.append(pool[np.argsort(noise.integers(seed, stream, i, 2**32, len(pool)), kind="stable")[:number]])
        return self._finish(picks, noise.integers(seed, stream, 2, 2, sum(map(len, picks))))

    def _finish(self, picks: Sequence[NDArray[np.int64]], coin: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        moments = np.concatenate(picks)
        shows = coin if self._drawn is not None else np.zeros_like(coin)
        label = np.repeat(np.array([1, 0], np.float32), [len(pick) for pick in picks])
        return np.column_stack([moments, shows]), label

    def video(self, episode: int, drawn: bool) -> NDArray[np.uint8]:
        """(T + 1, H, W, 3): what the reflector would see of an episode, in the true environment or in the imagined one."""
        true = self._episodes[episode].frame
        return np.concatenate([true[:1], self._drawn[episode][1:]]) if drawn and self._drawn is not None else true

    def embed(self, reflector: LlavaReflector, moments: NDArray[np.int64]) -> Embedding:
        """The reflector's embeddings of `moments` (B, 3), read from scratch."""
        config = reflector.config
        clips = [torch.from_numpy(self.video(e, bool(drawn))[list(shown(config.sampler, t, config.frames))]) for e, t, drawn in moments.tolist()]
        return reflector.embed([self._episodes[e].instruction for e in moments[:, 0].tolist()], clips)


def finite(loss: torch.Tensor, step: int, knob: str) -> float:
    """The loss as a number; FloatingPointError that names the `knob` to lower where it is not finite."""
    value = float(loss.detach())
    if not np.isfinite(value):
        raise FloatingPointError(f"reward: loss is {value} at step {step}; lower --reward.{knob}")
    return value


def descend(
    network: nn.Module, loss_at: Callable[[int], torch.Tensor], steps: int, lr: float, label: str, flag: str, savepoint: Savepoint
) -> list[float]:
    """Train all of `network` in place by AdamW for `steps`, one cycle to the peak `lr`; `loss_at` gives the loss of a step's batch.

    Returns the losses. FloatingPointError, naming the setting reward.`flag`, where one is not finite. A killed run goes on from `savepoint`.
    """
    network.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.01)
    first, losses = 0, []
    if kept := savepoint.load():
        network.load_state_dict(kept["weights"])
        optimizer.load_state_dict(kept["optimizer"])
        first, losses = kept["step"], kept["losses"]
    for step in (bar := console.track(first, steps, label)):
        loss = loss_at(step)
        losses.append(finite(loss, step, flag))
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, lr)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), _GRAD_CLIP)
        optimizer.step()
        bar.note(loss=float(np.mean(losses[-20:])))
        if savepoint.due():
            savepoint.save({"step": step + 1, "weights": dict(network.state_dict()), "optimizer": optimizer.state_dict(), "losses": losses})
    return losses


def train_backbone(
    reflector: LlavaReflector, episodes: Sequence[Episode], config: RewardConfig, seed: int, savepoint: Savepoint,
    drawn: Sequence[NDArray[np.uint8]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train the backbone of `reflector` in place on `episodes` (training ones only), together with a head that is thrown away.

    Returns metrics. Raises FloatingPointError where the loss is not finite. With a savepoint that holds a killed run's state, it goes on there.
    """
    moments = Labelled(episodes, drawn)
    device = reflector.llava.device
    head = fresh_head(reflector.config, seed).to(device)

    def loss_at(step: int) -> torch.Tensor:
        batch, label = moments.draw(seed, noise.Stream.BACKBONE, step, config.backbone_batch, config.positives)
        wanted = torch.from_numpy(label).to(device)
        embedding = moments.embed(reflector, batch)
        logits = torch.stack([head(embedding.pooled), reflector.llava.answer_logit(embedding.answer)])
        return nn.functional.binary_cross_entropy_with_logits(logits, wanted.expand_as(logits))

    parts = nn.ModuleDict({"llava": reflector.llava, "head": head})
    losses = descend(parts, loss_at, config.backbone_steps, config.backbone_lr, "reflector", "backbone-lr", savepoint)
    reflector.freeze()
    savepoint.clear()
    return {
        "backbone_steps": config.backbone_steps, "backbone_loss": float(np.mean(losses[-50:])), "train_episodes": len(episodes),
        "train_frames": len(moments), "train_successes": moments.successes, "saw_drawn_frames": drawn is not None,
    }  # fmt: skip


def fit_head(
    reflector: LlavaReflector, episodes: Sequence[Episode], config: RewardConfig, seed: int, savepoint: Savepoint,
    drawn: Sequence[NDArray[np.uint8]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fit a fresh reward head on the frozen backbone's embeddings of `episodes` (training ones only); it becomes `reflector.head`.

    Returns metrics. Raises FloatingPointError where the loss is not finite.
    """
    reflector.freeze()
    device = reflector.llava.device
    moments = Labelled(episodes, drawn)
    kept = savepoint.load()
    if kept is None:
        chosen, label = moments.choose(seed, noise.Stream.EMBEDDING, config.embeddings, config.positives)
        with torch.no_grad():
            pooled = [moments.embed(reflector, part).pooled.float() for part in np.array_split(chosen, max(1, len(chosen) // 64))]
        kept = {"epoch": 0, "embedding": torch.cat(pooled).cpu(), "label": torch.from_numpy(label), "head": None, "optimizer": None, "losses": []}
        savepoint.save(kept)
    embedding, wanted = kept["embedding"].to(device), kept["label"].to(device)
    head = fresh_head(reflector.config, seed).to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=config.head_lr)
    if kept["head"] is not None:
        head.load_state_dict(kept["head"])
        optimizer.load_state_dict(kept["optimizer"])
    losses = kept["losses"]
    for epoch in (bar := console.track(kept["epoch"], config.head_epochs, "reward head")):
        order = torch.from_numpy(np.argsort(noise.integers(seed, noise.Stream.REWARD, epoch, 2**32, len(wanted)), kind="stable"))
        total = 0.0
        for some in torch.split(order, config.head_batch):
            loss = nn.functional.binary_cross_entropy_with_logits(head(embedding[some]), wanted[some])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += finite(loss, epoch, "head-lr") * len(some)
        losses.append(total / len(wanted))
        bar.note(loss=losses[-1])
        if savepoint.due():
            state = {"head": dict(head.state_dict()), "optimizer": optimizer.state_dict(), "losses": losses}
            savepoint.save({**kept, **state, "epoch": epoch + 1})
    reflector.head = head
    reflector.freeze()
    savepoint.clear()
    return {"head_epochs": config.head_epochs, "embeddings": len(wanted), "head_loss": losses[-1], "positives": float(wanted.mean())}


def score(
    reflector: Judge, episodes: Sequence[Episode], drawn: Sequence[NDArray[np.uint8]] | None = None, chunk: int = 8, batch: int = 16
) -> list[NDArray[np.float32]]:
    """Scores (T,) of every episode after each of its steps, judged `chunk` frames at a time as in a rollout; `drawn` as in `Labelled`."""
    scores: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(episodes)
    lengths = [len(episode.frame) for episode in episodes]
    for length in sorted(set(lengths)):
        alike = [e for e in range(len(episodes)) if lengths[e] == length]
        for some in (alike[i : i + batch] for i in range(0, len(alike), batch)):
            true = np.stack([episodes[e].frame for e in some])
            later = true[:, 1:] if drawn is None else np.stack([drawn[e][1:] for e in some])
            watch = reflector.begin([episodes[e].instruction for e in some], torch.from_numpy(true[:, 0]))
            parts = []
            for frames in torch.split(torch.from_numpy(later), chunk, dim=1):
                part, watch = reflector.judge(watch, frames)
                parts.append(part.cpu())
            for e, row in zip(some, torch.cat(parts, dim=1), strict=True):
                scores[e] = row.numpy()
    return scores


def auc(score: NDArray[np.floating[Any]], label: NDArray[np.bool_]) -> float | None:
    """Chance that a success scores above a failure, ties counted half (Mann-Whitney); None where there is only one of the two."""
    positives, negatives = int(label.sum()), int((~label).sum())
    if not positives or not negatives:
        return None
    _, which, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[which]
    return float((rank[label].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def calibration_error(score: NDArray[np.floating[Any]], label: NDArray[np.bool_], bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3) over `bins` of equal width: mean |frequency - score|, weighted."""
    which = np.minimum((score * bins).astype(np.int64), bins - 1)
    gap = np.bincount(which, weights=label.astype(np.float64) - score, minlength=bins)
    return float(np.abs(gap).sum() / len(score))


def stops(scores: Sequence[NDArray[np.float32]], labels: Sequence[NDArray[np.bool_]], eta: float) -> dict[str, int]:
    """How the episodes would end, where each ends at the first score above `eta`.

    `right`: stopped while the predicate held. `early`: stopped while it did not, though it was to hold later. `false`: stopped, and it never held.
    `missed`: not stopped, though it held at some time. `left`: not stopped, and it never held.
    """
    count = dict.fromkeys(("right", "early", "false", "missed", "left"), 0)
    for score, label in zip(scores, labels, strict=True):
        above = score > eta
        if above.any():
            at = int(above.argmax())
            count["right" if label[at] else "early" if label[at:].any() else "false"] += 1
        else:
            count["missed" if label.any() else "left"] += 1
    return count


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def measure(reflector: Judge, episodes: Sequence[Episode], drawn: Sequence[NDArray[np.uint8]] | None = None) -> dict[str, Any]:
    """How good the reflector is on `episodes` that it was not trained on; all frames but the first of each, at its threshold. JSON-ready.

    auc, precision, recall, ece: over frames. false_stop_rate: of all episodes, the share that it would stop while the predicate does not hold,
    whether too early or in an episode that never succeeds; failure_stop_rate: of the episodes that never succeed, the share that it would stop;
    stop_recall: of the episodes that succeed at some time, the share that it would stop while the predicate holds. best_eta: the threshold on
    a grid of 0.05 at which most episodes would end right, for information: it is chosen on these same episodes, and nothing uses it.
    """
    scores = score(reflector, episodes, drawn)
    labels = [episode.success[1:] for episode in episodes]
    every, holds = np.concatenate(scores), np.concatenate(labels)
    eta = reflector.config.threshold
    called = every > eta
    ends = stops(scores, labels, eta)
    successes = sum(bool(label.any()) for label in labels)
    grid = [round(0.05 * i, 2) for i in range(1, 20)]
    by_eta = {threshold: stops(scores, labels, threshold) for threshold in grid}
    best = max(grid, key=lambda threshold: (by_eta[threshold]["right"] + by_eta[threshold]["left"], -abs(threshold - 0.5)))
    return {
        "auc": auc(every, holds),
        "precision": _share(int((called & holds).sum()), int(called.sum())),
        "recall": _share(int((called & holds).sum()), int(holds.sum())),
        "ece": calibration_error(every, holds),
        "false_stop_rate": _share(ends["early"] + ends["false"], len(episodes)),
        "failure_stop_rate": _share(ends["false"], len(episodes) - successes),
        "stop_recall": _share(ends["right"], successes),
        "stops": ends,
        "best_eta": best,
        "eta": eta,
        "frames": len(every),
        "success_frames": int(holds.sum()),
        "episodes": len(episodes),
        "success_episodes": successes,
    }
