"""Stage world: the autoencoder, then the simulator, learn from episodes how the world looks and how it moves.

The autoencoder learns frames and action maps, is frozen, and every episode is encoded once (`clips`). The simulator learns v at the chunk's frames
(mean squared error).

Published recipe (EnerVerse-AC, arXiv:2505.09723, and its training code): AdamW; autoencoder, CLIP tower and action resampler frozen. A small
simulator begins from random weights, so by default CLIP tower and both resamplers are trained with the U-Net; `WorldConfig.initial` begins
from published weights and `frozen` says what stays. Averaged weights (EMA) are kept, those of the best held-out loss.

Several processes (worldenv.distributed) train one simulator: each takes its rows of the very batch that one process would take, and gradients
are averaged. A process goes through its rows in microbatches, whose gradients are added. Every example is drawn for the whole batch, so the number
of processes and the microbatch change results by rounding and the network's own dropout masks only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from worldenv import console, noise
from worldenv.checkpoint import Savepoint
from worldenv.config import SimulatorConfig, WorldConfig
from worldenv.data.episode import Episode
from worldenv.learning import processes
from worldenv.learning.autoencoder import train_vae
from worldenv.learning.clips import Batch, Clips, draw_windows, encode, example, set_delta_statistics
from worldenv.learning.finite import finite
from worldenv.learning.optimizer import one_cycle, restore
from worldenv.noise import Stream
from worldenv.nouns import Camera
from worldenv.robots.contract import Robot
from worldenv.simulator import schedule
from worldenv.simulator.evac import Evac
from worldenv.simulator.weights import begin_from

_HELD_OUT_STEP = 2**31  # the held-out batch's place among optimiser steps: no training step has it


def v_loss(simulator: Evac, batch: Batch, rays: torch.Tensor) -> torch.Tensor:
    """Mean squared error of v over the chunk's frames. With dynamic rescale, clean latents, memory's too, are scaled by their level."""
    config = simulator.config

    def at_level(table: NDArray[np.float64]) -> torch.Tensor:
        return torch.from_numpy(table).to(batch.target)[batch.level].view(-1, 1, 1, 1, 1)

    alphas = schedule.alphas_cumprod()
    signal, rest = at_level(np.sqrt(alphas)), at_level(np.sqrt(1.0 - alphas))
    scale = at_level(schedule.latent_scales(config.dynamic_rescale))
    clean = batch.target * scale
    noisy, v = signal * clean + rest * batch.noise, signal * batch.noise - rest * clean
    condition = simulator.condition(
        batch.memory,
        batch.maps,
        rays.expand(len(batch.target), -1, -1, -1),
        simulator.image_tokens(batch.first),
        simulator.action_tokens(batch.deltas),
        batch.seen,
    )
    remembered = batch.memory.shape[2]
    x = torch.cat([torch.cat([batch.memory * scale, noisy], dim=2), condition.fixed], dim=1)
    count = torch.ones_like(batch.level)
    predicted = simulator.unet(x, batch.level, condition.image, condition.action, config.fps_token * count, config.domain * count, remembered)
    return torch.nn.functional.mse_loss(predicted[:, :, remembered:], v)


class Objective(nn.Module):
    """`v_loss` of one simulator as a module, in the precision of the settings: what several processes wrap."""

    def __init__(self, simulator: Evac, config: WorldConfig) -> None:
        super().__init__()
        self.simulator, self._bfloat16 = simulator, config.precision == "bfloat16"

    def forward(self, batch: Batch, rays: torch.Tensor) -> torch.Tensor:
        """The scalar loss of `batch`."""
        with torch.autocast(rays.device.type, torch.bfloat16, enabled=self._bfloat16):
            return v_loss(self.simulator, batch, rays)


class _Course:
    """A simulator in training: what a savepoint holds of it."""

    def __init__(self, simulator: Evac, config: WorldConfig) -> None:
        held = tuple(f"{part}." for part in config.frozen)
        self.trained = {name: parameter for name, parameter in simulator.named_parameters() if not name.startswith(held)}
        for name, parameter in simulator.named_parameters():
            parameter.requires_grad_(name in self.trained)
        self.averaged = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.best = {name: value.clone() for name, value in self.averaged.items()}
        self.best_loss, self.checks = math.inf, list[list[float]]()
        """[step, held-out loss] of each."""
        self.losses = list[float]()
        self._optimizer = torch.optim.AdamW(self.trained.values(), lr=config.lr, fused=True)
        self._config = config

    def tree(self, step: int) -> dict[str, Any]:
        """Before `step`, for `checkpoint.save`."""
        return {
            "step": step, "losses": self.losses, "checks": self.checks, "best_loss": self.best_loss, "averaged": self.averaged, "best": self.best,
            "trained": {name: parameter.detach() for name, parameter in self.trained.items()}, "optimizer": self._optimizer.state_dict(),
        }  # fmt: skip

    def load_tree(self, kept: Mapping[str, Any]) -> int:
        """Go on from what `tree` returned, at the step that is returned. ValueError where it is of another network."""
        if kept["trained"].keys() != self.trained.keys():
            raise ValueError("the simulator's savepoint is of another network; delete it")
        self.losses, self.checks, self.best_loss = kept["losses"], kept["checks"], kept["best_loss"]
        self.put(kept["trained"])
        for mine, stored in ((self.averaged, kept["averaged"]), (self.best, kept["best"])):
            for name, value in mine.items():
                value.copy_(stored[name])
        restore(self._optimizer, kept["optimizer"])
        return int(kept["step"])

    @torch.no_grad()
    def put(self, values: Mapping[str, torch.Tensor]) -> None:
        """Have the simulator be `values`."""
        for name, parameter in self.trained.items():
            parameter.copy_(values[name])

    def check(self, step: int, held_out_loss: Callable[[], float]) -> None:
        """Of the averaged weights, once at a step, whether or not it was killed after that; the best are kept."""
        if self.checks and self.checks[-1][0] == step:
            return
        now = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.put(self.averaged)
        self.checks.append([step, held_out_loss()])
        self.put(now)
        if self.checks[-1][1] < self.best_loss:
            self.best_loss, self.best = self.checks[-1][1], {name: value.clone() for name, value in self.averaged.items()}

    @property
    def waiting(self) -> int:
        """How many checks have passed since the best."""
        losses = [loss for _, loss in self.checks]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def step(self, step: int) -> None:
        """Down the slope that is at the weights, which is forgotten then; the averages follow."""
        for group in self._optimizer.param_groups:
            group["lr"] = one_cycle(step, self._config.steps, self._config.lr)
        torch.nn.utils.clip_grad_norm_(self.trained.values(), self._config.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        decay = min(self._config.ema, (1.0 + step) / (10.0 + step))  # early averages forget the random weights
        torch._foreach_lerp_(list(self.averaged.values()), [p.detach() for p in self.trained.values()], 1.0 - decay)

    def metrics(self, steps: int) -> dict[str, Any]:
        """JSON-ready, after `steps`."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        best = min(self.checks, key=lambda row: row[1])[0] if self.checks else steps
        return {"steps": steps, "loss": float(np.mean(last)) if last else None, "held_out": self.checks, "best_step": int(best)}


class _HeldOut:
    """Clips that nothing is learned from; of several processes each judges its share of their batches."""

    def __init__(self, simulator: Evac, clips: Clips, config: WorldConfig, seed: int) -> None:
        windows = clips.windows(simulator.config.chunk, aligned=True)
        self._windows = windows[noise.integers(seed, Stream.WORLD, _HELD_OUT_STEP, len(windows), config.held_out_clips)]
        self._simulator, self._clips, self._config, self._seed = simulator, clips, config, seed

    @torch.no_grad()
    def loss(self) -> float:
        """Of the simulator as it is, by all processes."""
        self._simulator.eval()
        config, judge, total = self._config, Objective(self._simulator, self._config), 0.0
        parts = [self._windows[i : i + config.batch] for i in range(0, len(self._windows), config.batch)]
        for i, part in enumerate(parts):
            if i % processes.count() == processes.rank():
                batch = example(self._simulator, self._clips, part, config, self._seed, _HELD_OUT_STEP + i, training=False)
                total += len(part) * sum(share * float(judge(piece, self._clips.rays)) for share, piece in batch.pieces(config.microbatch))
        self._simulator.train()
        return processes.total(total, self._clips.latents.device) / len(self._windows)


def _descend(objective: nn.Module, batch: Batch, rays: torch.Tensor, microbatch: int) -> float:
    """Leave the gradient of the mean loss of `batch` at the weights, of several processes averaged over theirs, and return that loss."""
    total, pieces = 0.0, list(batch.pieces(microbatch))
    among = objective if isinstance(objective, DistributedDataParallel) else None
    for number, (share, piece) in enumerate(pieces, 1):
        with contextlib.nullcontext() if among is None or number == len(pieces) else among.no_sync():  # the others are told once, the sum
            loss = objective(piece, rays)
            (loss * share).backward()
        total += share * float(loss.detach())
    return total


def train_simulator(simulator: Evac, clips: Clips, held_out: Clips, config: WorldConfig, seed: int, savepoint: Savepoint) -> dict[str, Any]:
    """Train everything of `simulator` but `config.frozen`, in place; it ends with the averaged weights of the best held-out loss.

    A killed stage goes on from `savepoint`, to the same bits. Returns JSON-ready metrics: `steps` taken, `loss` (mean of the last tenth),
    `held_out` [[step, loss]], `best_step`. FloatingPointError where the loss is not finite; ValueError where the batch cannot be divided
    among the processes.
    """
    rank, count = processes.rank(), processes.count()
    if config.batch % count:
        raise ValueError(f"world.batch={config.batch} clips over {count} processes: make it a multiple")
    course, judged = _Course(simulator, config), _HeldOut(simulator, held_out, config, seed)
    simulator.unet.recompute = config.gradient_checkpointing
    objective: nn.Module = Objective(simulator, config)
    if count > 1:
        objective = DistributedDataParallel(objective, broadcast_buffers=False)
    chunk, few = simulator.config.chunk, round(config.aligned_starts * config.batch)
    drawn = ((clips.windows(chunk, aligned=True), few), (clips.windows(chunk, aligned=False), config.batch - few))
    kept = savepoint.load("step", "losses", "checks", "best_loss", "averaged", "best", "trained", "optimizer")
    begin = 0 if kept is None else course.load_tree(kept)

    def keep(step: int) -> None:
        if rank == 0:
            savepoint.save(course.tree(step))

    step = begin
    simulator.train()
    for step in (bar := console.track(begin, config.steps, "simulator")):
        if step and step % config.check_every == 0:
            course.check(step, judged.loss)
        if course.waiting >= config.patience:
            break
        if savepoint.due():
            keep(step)
        starts = [draw_windows(of, chunk, config, seed, 2 * step + i, many, step / config.steps) for i, (of, many) in enumerate(drawn)]
        batch = example(simulator, clips, np.concatenate(starts), config, seed, step)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise.torch_seed(seed, Stream.WORLD_DROPOUT, step) + rank)  # the network's own dropout layers
            loss = _descend(objective, batch.rows(rank, count) if count > 1 else batch, clips.rays, config.microbatch)
        course.losses.append(processes.total(finite(loss, "simulator", step, "world.lr"), clips.latents.device) / count)
        course.step(step)
        bar.note(loss=float(np.mean(course.losses[-50:])), held_out=course.checks[-1][1] if course.checks else math.nan)
    else:
        step = config.steps
        course.check(step, judged.loss)
    keep(step)
    course.put(course.best)
    simulator.eval()
    return course.metrics(step)


def train(
    simulator_config: SimulatorConfig,
    config: WorldConfig,
    training: Sequence[Episode],
    held_out: Sequence[Episode],
    camera: Camera,
    robot: Robot,
    seed: int,
    device: torch.device,
    savepoint: Callable[[str], Savepoint],
) -> tuple[Evac, dict[str, Any]]:
    """A simulator trained on `training` episodes, from `config.initial` or random weights, and its metrics; `held_out` decides when to stop.

    `savepoint` gives the place of each part's savepoint. Of several processes each returns the simulator; the metrics are the first one's.
    Errors as those of the two stages; CheckpointError where `config.initial` or `config.clip` does not fit.
    """
    metrics: dict[str, Any] = {}
    if config.initial:
        clip = Path(config.clip) if config.clip else None
        simulator, new = begin_from(Path(config.initial), simulator_config, seed, device, clip)
        metrics["initial"] = {"file": config.initial, "not_in_it": len(new)}
    else:
        simulator = Evac.initialised(simulator_config, seed).to(device)
        if processes.rank() == 0:
            metrics["autoencoder"] = train_vae(simulator, training, camera, robot, config, seed, savepoint("autoencoder"))
        processes.agreed("autoencoder")  # the others have waited for it
        processes.share(simulator.state_dict().values())
    clips, judged = (encode(simulator, episodes, camera, robot) for episodes in (training, held_out))
    set_delta_statistics(simulator, clips)
    metrics["simulator"] = train_simulator(simulator, clips, judged, config, seed, savepoint("simulator"))
    metrics["parameters"] = {name: sum(p.numel() for p in part.parameters()) for name, part in simulator.named_children()}
    return simulator.eval(), metrics
