"""Llama-2 as OpenVLA-OFT uses it: embeddings in, normed hiddens of the last tokens out, every token sees every other.

Names of parameters are those of Hugging Face's LlamaForCausalLM below `language_model.`; the output layer is not built, since actions
come from the hiddens. Sources: Touvron et al. 2023 (arXiv:2307.09288); RoPE: Su et al. 2021 (arXiv:2104.09864), half-split pairing;
bidirectional attention over the whole sequence: Kim et al. 2025 (arXiv:2502.19645).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from worldenv.config import LlamaConfig

Rotation = tuple[torch.Tensor, torch.Tensor]
"""cos, sin of the rotary angles, each (B or 1, 1, N, head channels)."""

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each (B, kv heads, N, head channels)."""


class RMSNorm(nn.Module):
    """x / rms(x), computed in float32, times a weight per channel."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (..., width), normed, in its own dtype."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def _rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    cos, sin = rotation
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = config.heads, config.kv_heads or config.heads, config.width // config.heads
        self.q_proj = nn.Linear(config.width, self.heads * self.head, bias=False)
        self.k_proj = nn.Linear(config.width, self.kv_heads * self.head, bias=False)
        self.v_proj = nn.Linear(config.width, self.kv_heads * self.head, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head, config.width, bias=False)

    def forward(
        self, x: torch.Tensor, rotation: Rotation, visible: torch.Tensor | None, last: int, past: KeyValue | None
    ) -> tuple[torch.Tensor, KeyValue]:
        """Mix tokens: the `last` of x (B, N, width) ask, all of x, and `past` before it, answer."""
        batch, tokens, _ = x.shape
        cos, sin = rotation
        k = _rotate(self.k_proj(x).view(batch, tokens, self.kv_heads, self.head).transpose(1, 2), rotation)
        v = self.v_proj(x).view(batch, tokens, self.kv_heads, self.head).transpose(1, 2)
        q = self.q_proj(x[:, tokens - last :]).view(batch, last, self.heads, self.head).transpose(1, 2)
        q = _rotate(q, (cos[:, :, tokens - last :], sin[:, :, tokens - last :]))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mask = None if visible is None else visible[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.kv_heads != self.heads)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, last, self.heads * self.head)), (k, v)


class _MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.width, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.rms_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.rms_eps)
        self.mlp = _MLP(config)

    def forward(
        self, x: torch.Tensor, rotation: Rotation, visible: torch.Tensor | None, last: int, past: KeyValue | None = None
    ) -> tuple[torch.Tensor, KeyValue]:
        mixed, now = self.self_attn(self.input_layernorm(x), rotation, visible, last, past)
        x = x[:, x.shape[1] - last :] + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), now


class LlamaModel(nn.Module):
    """The decoder stack. Called on embeddings; `positions` (B or 1, N) int64 are the rotary positions.

    `visible` (B, N) bool hides padding from everyone; None where there is none, which avoids a mask altogether.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.rms_eps)
        self.recompute = False
        """Compute a layer again in the backward pass instead of remembering what is inside it."""

    def _run(
        self, layer: nn.Module, x: torch.Tensor, rotation: Rotation, visible: torch.Tensor | None, last: int, past: KeyValue | None = None
    ) -> torch.Tensor:
        """What one layer puts out for the `last` tokens of x."""
        if self.recompute and torch.is_grad_enabled():
            return cast(torch.Tensor, checkpoint(layer, x, rotation, visible, last, past, use_reentrant=False, preserve_rng_state=False)[0])
        return cast(torch.Tensor, layer(x, rotation, visible, last, past)[0])

    def _rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
        head = self.config.width // self.config.heads
        even = torch.arange(0, head, 2, device=positions.device, dtype=torch.float32)
        angle = positions[:, None, :, None].float() * (1.0 / self.config.rope_theta ** (even / head))
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor | None, last: int) -> torch.Tensor:
        """Hiddens (B, last, width) of the last tokens of x (B, N, width), after the final norm; all see all.

        The last layer works for these tokens alone: nothing else of it is used, so this is exact.
        """
        rotation = self._rotation(positions, x.dtype)
        for i, layer in enumerate(self.layers):
            x = self._run(layer, x, rotation, visible, last if i == len(self.layers) - 1 else x.shape[1])
        return cast(torch.Tensor, self.norm(x))

    def prefix_lm(self, x: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor | None, last: int) -> torch.Tensor:
        """As `forward`, but the tokens before the last ones do not see these and carry no gradient.

        Another function than `forward`: a policy that was trained with one must not be rolled out with the other. Its backward pass costs
        only the last tokens (Tan et al. 2025, RIPT-VLA, arXiv:2505.17016).
        """
        begin = x.shape[1] - last
        cos, sin = self._rotation(positions, x.dtype)
        before, after = (cos[:, :, :begin], sin[:, :, :begin]), (cos[:, :, begin:], sin[:, :, begin:])
        pasts: list[KeyValue] = []
        with torch.no_grad():
            prefix = x[:, :begin]
            for i, layer in enumerate(self.layers):  # of the last layer only keys and values are used, so one token asks
                queries = 1 if i == len(self.layers) - 1 else begin
                prefix, past = layer(prefix, before, None if visible is None else visible[:, :begin], queries)
                pasts.append(past)
        y = x[:, begin:]
        for layer, past in zip(self.layers, pasts, strict=True):
            y = self._run(layer, y, after, visible, last, past)
        return cast(torch.Tensor, self.norm(y))


class LanguageModel(nn.Module):
    """Holds the stack under the published name `model`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
