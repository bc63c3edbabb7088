"""A short training of the small simulator whose gradients are kept; started by torchrun, each process takes its share of every batch.

    torchrun --nproc-per-node 2 -m tests.two_processes FOLDER MICROBATCH
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.test_world_model import CONFIG, EPISODES, HELD_OUT, WORLD, Kept, clips_of
from worldenv import distributed
from worldenv.learning import processes, world_model
from worldenv.learning.clips import Batch
from worldenv.simulator.evac import Evac

STEPS = 3


def train(folder: Path, microbatch: int) -> None:
    """Write FOLDER/RANK.safetensors: gradients of every step before clipping, trained weights, sizes of batches, losses."""
    simulator = Evac.initialised(CONFIG, 0)
    kept: dict[str, torch.Tensor] = {}
    sizes: list[int] = []
    steps: list[int] = []
    forward = world_model.Objective.forward
    clip = torch.nn.utils.clip_grad_norm_

    def sized(self: Any, batch: Batch, rays: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch.target))
        return forward(self, batch, rays)

    def keeping(parameters: Any, largest: float) -> torch.Tensor:
        chosen = list(parameters)
        steps.append(len(steps))
        kept.update({f"gradient.{steps[-1]}.{i}": p.grad.clone().contiguous() for i, p in enumerate(chosen)})
        return clip(chosen, largest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world_model.Objective, "forward", sized)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", keeping)
        clips, held_out = clips_of(simulator, EPISODES), clips_of(simulator, HELD_OUT)
        settings = dataclasses.replace(WORLD, steps=STEPS, check_every=2, microbatch=microbatch)
        metrics = world_model.train_simulator(simulator, clips, held_out, settings, 0, Kept(folder / "savepoint"))
    weights = {f"weight.{name}": value.contiguous() for name, value in simulator.state_dict().items()}
    losses = torch.tensor([metrics["loss"], *(loss for _, loss in metrics["held_out"])], dtype=torch.float64)
    rank = processes.rank()
    encoded = {"clips.latents": clips.latents, "clips.maps": clips.maps}
    save_file({**kept, **weights, **encoded, "sizes": torch.tensor(sizes), "losses": losses}, folder / f"{rank}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.joined():
        train(Path(sys.argv[1]), int(sys.argv[2]))
