"""What one update needs in memory, counted before there is a GPU: forward and backward run on the meta device, where tensors have a size and no data.

    python -m worldenv.learning.loop.memory [--microbatch 16]

What is alive is counted tensor by tensor, as it is made and freed. On the meta device attention is the plain one, which holds all its weights;
a fused kernel needs less, so this errs on the safe side. The allocator's own gaps and workspaces of libraries are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worldenv.config import LoopConfig, PolicyConfig
from worldenv.learning.loop.update import HEADS
from worldenv.nouns import ACTION_DIM
from worldenv.policy import laplace, lora
from worldenv.policy.openvla_oft import Network
from worldenv.presets import OPENVLA_OFT

PROMPT = 32
"""Tokens of a prompt, as long as LIBERO's."""


@dataclass(frozen=True)
class Memory:
    """Bytes, all of which are there at once at the worst moment."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    activations: int
    """Whatever else is alive at the peak of a forward and backward pass."""

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.gradients + self.optimizer + self.activations


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known and key not in given:
                    self._known.add(key)
                    self.now += size
                    weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.now)
        return made

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def count(policy: PolicyConfig, loop: LoopConfig, dtype: torch.dtype = torch.bfloat16) -> Memory:
    """Of an update of `policy` under `loop`: backbone in `dtype`; heads, proprio projector and LoRA in float32. Takes no memory itself."""
    with torch.device("meta"):
        network = Network(policy).to(dtype)
    for part in (network.action_head, network.scale_head, network.proprio_projector):
        part.float()
    lora.attach(network, loop.lora_rank, loop.lora_alpha, 0)
    trained = [p for name, p in network.named_parameters() if ".lora_" in name or name.startswith(HEADS)]
    for parameter in trained:
        parameter.requires_grad_(True)
        parameter.grad = torch.zeros_like(parameter)  # as from the microbatch before
    network.recompute = loop.gradient_checkpointing
    batch = loop.microbatch
    with torch.device("meta"), _Alive() as alive:
        pixels = torch.empty(batch, 6 * policy.images, policy.image, policy.image)
        ids, proprio = torch.empty(batch, PROMPT, dtype=torch.int64), torch.empty(batch, policy.proprio)
        action = torch.empty(batch, policy.chunk, ACTION_DIM)
        hidden = network(pixels, ids, None, proprio).float()
        log_scale = laplace.scale(network.scale_head(hidden), policy.scale_factor, policy.scale_floor, policy.scale_ceiling)
        laplace.log_prob(action, network.action_head(hidden), log_scale).sum().backward()  # type: ignore[no-untyped-call]
    gradients = sum(parameter.nbytes for parameter in trained)
    return Memory(sum(p.nbytes for p in network.parameters()), gradients, 2 * gradients, alive.peak)


def main(argv: Sequence[str] | None = None) -> int:
    """A table for people, then one JSON line, at the published size with and without gradient checkpointing. Exit code 2 for a bad command line."""
    parser = argparse.ArgumentParser(description="Memory of a LOOP update at the published size, counted.")
    parser.add_argument("--microbatch", type=int, default=LoopConfig().microbatch, help="queries per forward and backward pass")
    parser.add_argument("--images", type=int, default=1, help="camera views per query")
    args = parser.parse_args(argv)
    try:
        policy, settings = dataclasses.replace(OPENVLA_OFT, images=args.images), LoopConfig(microbatch=args.microbatch)
    except ValueError as error:
        print(f"worldenv.learning.loop.memory: {error}", file=sys.stderr)
        return 2
    rows = []
    for checkpointing in (False, True):
        memory = count(policy, dataclasses.replace(settings, gradient_checkpointing=checkpointing))
        rows.append({"gradient_checkpointing": checkpointing, "microbatch": args.microbatch, **dataclasses.asdict(memory), "total": memory.total})
        said = "  ".join(f"{name} {value / 1e9:6.2f}" for name, value in {**dataclasses.asdict(memory), "total": memory.total}.items())
        print(f"gradient checkpointing {'on ' if checkpointing else 'off'}  {said} GB")
    print(json.dumps({"rows": rows, "unit": "bytes"}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
