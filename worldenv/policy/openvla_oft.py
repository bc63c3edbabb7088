"""OpenVLA-OFT: the network, and the policy that asks it.

One query is one sequence. Everything sees everything, so the order in memory is free and only rotary positions tell tokens apart:

    position   0     1 .. P-1 (patches)   P (proprio)   P+1 .. P+L-2      P+L-1   P+L .. P+L+55   P+L+56
    token      <s>   view after view      one token     rest of prompt    29871   56 zero slots   </s>

with P patches and proprio, L prompt tokens from <s> to 29871. The heads read the hiddens at P+L-1 .. P+L+54: they begin at the 29871 token,
one before the slots, as the published model does; the last slot and </s> are seen but not read. Prompts of a batch may differ in length:
padding stands in the middle, hidden, and the last 58 tokens are always 29871, slots, </s>.
Source: Kim et al. 2025 (arXiv:2502.19645), the published code's behaviour.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from worldenv.config import PolicyConfig
from worldenv.kernels.frames import for_policy, normalise_pixels
from worldenv.nouns import ACTION_DIM, ActionChunk, Observation
from worldenv.policy import laplace, tokens
from worldenv.policy.heads import L1Head, ProprioProjector, ScaleHead, TokenHead, begin
from worldenv.policy.jpeg import jpeg_round_trip
from worldenv.policy.llama import LanguageModel
from worldenv.policy.processing import STOP, PromptTokenizer, Statistics, resized
from worldenv.policy.vision import VisionBackbone

BACKBONE, HEADS = "policy_backbone", "policy_heads"
"""Names of what runs its networks."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Query:
    """What the network takes: B queries, processed."""

    pixels: torch.Tensor
    """(B, 6 V, S, S), normalised."""
    ids: torch.Tensor
    """(B, L) int64: <s> .. 29871, padded on the right."""
    lengths: torch.Tensor | None
    """(B,) int64 prompt lengths; None where all are L."""
    proprio: torch.Tensor | None
    """(B, P) float32, normalised; None for a model without."""


class _Projector(nn.Module):
    def __init__(self, vision: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision, 4 * vision)
        self.fc2 = nn.Linear(4 * vision, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features))))))


class Network(nn.Module):
    """Queries to the hiddens of the action slots, and those to mu and beta, or to logits. Parameter names are the published ones."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.llama.width
        self.vision_backbone = VisionBackbone(config.dino, config.siglip, config.image)
        self.projector = _Projector(config.dino.width + config.siglip.width, width)
        self.language_model = LanguageModel(config.llama)
        self.proprio_projector = ProprioProjector(config.proprio, width)
        if config.head == "tokens":
            self.token_head = TokenHead(width)
        else:
            self.action_head = L1Head(width, config.head_width, config.head_blocks)
            self.scale_head = ScaleHead(width, config.head_width, config.head_blocks, config.scale_form)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Random weights, all from `generator`: for training from scratch and for benchmarks.

        Matrices and tokens truncated normal (0.02 where tokens, else by fan-in), norms 1, biases 0; the towers' positions as `VisionTower.begin`
        says; the scale head at b = exp(-3) with a small last layer.
        """
        begin(self, generator)
        self.vision_backbone.featurizer.begin()
        self.vision_backbone.fused_featurizer.begin()
        if self.config.head == "laplace":
            self.scale_head.begin()

    @property
    def recompute(self) -> bool:
        """Whether blocks and layers are computed again in the backward pass instead of being remembered."""
        return self.language_model.model.recompute

    @recompute.setter
    def recompute(self, on: bool) -> None:
        for part in (self.language_model.model, self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer):
            part.recompute = on

    def image_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 6 V, S, S) to projected patch tokens (B, V N, width)."""
        return cast(torch.Tensor, self.projector(self.vision_backbone(pixels)))

    def forward(
        self, pixels: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor | None = None, proprio: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hiddens (B, 7 K, width) that the heads read; arguments as in `Query`."""
        llama, slots = self.language_model.model, ACTION_DIM * self.config.chunk
        batch, prompt = ids.shape
        text = llama.embed_tokens(ids)
        full = self.config.attention == "full"
        with torch.set_grad_enabled(full and torch.is_grad_enabled()):  # the prefix of prefix_lm carries no gradient
            first = [text[:, :1], self.image_tokens(pixels.to(text.dtype))]
            if proprio is not None:
                projector = self.proprio_projector  # may be wider than the backbone
                first.append(projector(proprio.to(projector.fc1.weight.dtype)).to(text.dtype)[:, None])
        seen = sum(part.shape[1] for part in first) - 1
        last = text[:, -1:] if lengths is None else text[torch.arange(batch, device=ids.device), lengths - 1][:, None]
        stop = llama.embed_tokens(ids.new_full((batch, 1), STOP))
        x = torch.cat([*first, text[:, 1:-1], last, text.new_zeros(batch, slots, text.shape[2]), stop], dim=1)

        tail = torch.arange(slots + 2, device=ids.device)
        body = torch.arange(seen + prompt - 1, device=ids.device)
        visible = None
        if lengths is None:
            positions = torch.cat([body, seen + prompt - 1 + tail])[None]
        else:
            positions = torch.cat([body.expand(batch, -1), (seen + lengths - 1)[:, None] + tail], dim=1)
            visible = torch.cat([body < (seen + lengths - 1)[:, None], torch.ones_like(tail, dtype=torch.bool).expand(batch, -1)], dim=1)
        attend = llama if full else llama.prefix_lm
        return cast(torch.Tensor, attend(x, positions, visible, slots + 2)[:, :slots])


class OpenVLAOFT:
    """A policy (`policy.contract.Policy`): the network with its words, its statistics and its distribution over actions."""

    def __init__(self, config: PolicyConfig, network: Network, tokenizer: PromptTokenizer, statistics: Statistics) -> None:
        """ValueError where tokenizer or statistics do not fit the network."""
        if tokenizer.vocab > config.llama.vocab:
            raise ValueError(f"llama.vocab={config.llama.vocab} rows, the tokenizer has {tokenizer.vocab} tokens: raise policy.llama.vocab")
        if len(statistics.proprio.q01) != config.proprio or len(statistics.action.q01) != ACTION_DIM:
            raise ValueError(
                f"statistics of {statistics.source}: proprio {len(statistics.proprio.q01)}, action {len(statistics.action.q01)}; "
                f"want {config.proprio}, {ACTION_DIM}: they belong to another robot"
            )
        self.config, self.network, self.tokenizer, self.statistics = config, network, tokenizer, statistics
        self.runs: dict[str, Callable[..., Any]] = {}
        """What runs the networks while the policy acts, by name (`policy.graphs`); where there is none, the network itself does."""
        self.scale_factor = config.scale_factor
        """Factor on the Laplace scale, inside the density, or temperature of the tokens: of what is drawn and of what is scored."""

    @classmethod
    def create(
        cls, config: PolicyConfig, tokenizer: PromptTokenizer, statistics: Statistics, torch_seed: int, device: torch.device,
        drawn_on: torch.device = _CPU,
    ) -> OpenVLAOFT:  # fmt: skip
        """A policy with random weights; `torch_seed` from `noise.torch_seed`. The same numbers whatever `device` is, where they are drawn on a CPU:
        billions of them take minutes there.
        """
        with torch.device("meta"):  # torch's own start would be thrown away, and draws from the global generator
            network = Network(config)
        network.to_empty(device=drawn_on)
        network.initialize(torch.Generator(drawn_on).manual_seed(torch_seed))
        return cls(config, network.to(device), tokenizer, statistics)

    @property
    def chunk(self) -> int:
        """Actions per query (K)."""
        return self.config.chunk

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.language_model.model.embed_tokens.weight.device

    def query(self, observation: Observation, augment: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Query:
        """Observations as the network takes them. ValueError for words, views or values that it was not built for.

        `augment`, in training, takes the place of the centre crop: (B, S, S, 3) uint8 to the same.
        """
        ids, lengths = self.tokenizer.batch(observation.instruction)
        config, pixels = self.config, []
        for view in (observation.frame, observation.wrist):
            if view is not None:
                seen = view.to(self.device)
                if augment:
                    pixels.append(normalise_pixels(augment(resized(seen, config.image, config.jpeg)), config.dino_mean, config.dino_std))
                else:
                    stored = jpeg_round_trip(seen) if config.jpeg else seen
                    pixels.append(for_policy(stored, config.image, config.crop_area, config.dino_mean, config.dino_std))
        if len(pixels) != config.images:
            raise ValueError(f"policy.images={config.images}, the observation carries {len(pixels)} views")
        return Query(
            torch.cat(pixels, dim=1),
            ids.to(self.device),
            None if lengths is None else lengths.to(self.device),
            self.statistics.proprio.normalise(observation.proprio.to(self.device)).float(),
        )

    def hidden(self, query: Query) -> torch.Tensor:
        """Hiddens (B, 7 K, width) float32 that the heads read, with gradients where they are on."""
        device, dtype = self.device.type, self.network.language_model.model.embed_tokens.weight.dtype
        # what is float32 beside a half precision backbone, LoRA, is multiplied in half precision too: by itself it would take its inputs there
        with torch.autocast(device, dtype) if dtype != torch.float32 and device != "meta" else contextlib.nullcontext():
            hidden: torch.Tensor = self.network(query.pixels, query.ids, query.lengths, query.proprio)
        return hidden.float()

    def density(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mu and log-scale (B, K, 7) float32 of the Laplace density: factor, floor and ceiling included. ValueError for a policy of tokens."""
        self.config.want_laplace("scoring actions")
        beta = self.network.scale_head(hidden)
        return self.network.action_head(hidden), laplace.scale(beta, self.scale_factor, self.config.scale_floor, self.config.scale_ceiling)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, K, 7, 256) float32 of the action tokens, divided by the temperature. ValueError unless that is above 0."""
        if not self.scale_factor > 0:
            raise ValueError(f"scale factor {self.scale_factor}: of tokens it is the softmax's temperature, want more than 0")
        logits: torch.Tensor = self.network.token_head(hidden)
        return logits / self.scale_factor

    def _seen(self, query: Query) -> torch.Tensor:
        """`hidden`, by what runs the network here."""
        backbone = self.runs.get(BACKBONE)
        if backbone is None:
            return self.hidden(query)
        ids, proprio = query.ids, query.proprio
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device) if query.lengths is None else query.lengths
        hidden: torch.Tensor = backbone(query.pixels, ids, lengths, proprio).float()
        return hidden

    def _answer(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`density`, by what runs the heads here."""
        heads = self.runs.get(HEADS)
        if heads is None:
            return self.density(hidden)
        mu, beta = heads(hidden)
        return mu, laplace.scale(beta, self.scale_factor, self.config.scale_floor, self.config.scale_ceiling)

    @torch.no_grad()
    def act(self, observation: Observation, uniform: torch.Tensor | None = None) -> ActionChunk:
        """See `policy.contract.Policy`."""
        shape = (len(observation.instruction), self.chunk, ACTION_DIM)
        if uniform is not None and (uniform.shape != shape or uniform.dtype != torch.float64):
            raise ValueError(f"act: uniform {tuple(uniform.shape)} {uniform.dtype}, want {shape} float64")
        hidden, log_scale = self._seen(self.query(observation)), None
        if self.config.head == "tokens":
            logits = self.logits(hidden)
            greedy = logits.argmax(-1)
            row = greedy if uniform is None else tokens.draw(logits, uniform)
            mu, action, log_prob = tokens.to_actions(greedy), tokens.to_actions(row), tokens.log_prob(logits, row)
        else:
            mu, log_scale = self._answer(hidden)
            if uniform is None:
                action, log_prob = mu, laplace.log_prob(mu, mu, log_scale)
            else:
                action, log_prob = laplace.draw(mu, log_scale, uniform.to(mu.device))
        return ActionChunk(mu, log_scale, action, log_prob, self.statistics.to_command(action))

    def evaluate_actions(self, observation: Observation, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score normalised actions (B, K, 7) under the current weights, with gradients.

        Returns log-density (B, K) summed over the 7 dimensions, mu and log-scale (B, K, 7), float32: the same path as `act`. ValueError for actions
        of another shape, and for a policy of tokens.
        """
        mu, log_scale = self.density(self.hidden(self.query(observation)))
        if action.shape != mu.shape:
            raise ValueError(f"evaluate_actions: action {tuple(action.shape)}, want {tuple(mu.shape)}")
        return laplace.log_prob(action.to(mu.device), mu, log_scale), mu, log_scale
