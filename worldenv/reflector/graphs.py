"""The reflector's networks as functions of tensors alone: what may be run by something else than eager PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:  # see llava.py
    from transformers import LlavaOnevisionForConditionalGeneration

VISION, LLM = "reflector_vision", "reflector_llm"


class Vision(nn.Module):
    """Frames to what the language model is shown of them."""

    def __init__(self, model: LlavaOnevisionForConditionalGeneration) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self._pooling = model.model.apply_pooling

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Projected, pooled features (N, frame_tokens, width) of pixels (N, 3, S, S) in [-1, 1], each for itself."""
        patches = self.tower.embeddings(pixels)
        # hidden_states[-1] of the tower is this: the encoder's output, not yet through post_layernorm
        features: torch.Tensor = self._pooling(self.projector(self.tower.encoder(inputs_embeds=patches).last_hidden_state))
        return features


class Prefill(nn.Module):
    """The language model over new tokens that follow old ones."""

    def __init__(self, model: LlavaOnevisionForConditionalGeneration) -> None:
        from transformers import DynamicCache

        super().__init__()
        self.model, self._memory = model.model.language_model, DynamicCache

    def forward(
        self, embedding: torch.Tensor, sees_old: torch.Tensor, sees_new: torch.Tensor, position: torch.Tensor, past: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Llava.read`, its `allowed` cut into old (B or 1, S, P) and new tokens (B or 1, S, S)."""
        allowed = torch.cat((sees_old, sees_new), dim=-1)
        mask = torch.zeros(allowed.shape, dtype=embedding.dtype, device=embedding.device)
        mask = mask.masked_fill(~allowed, torch.finfo(embedding.dtype).min)
        memory: Any = self._memory([(past[layer, 0], past[layer, 1]) for layer in range(past.shape[0])])
        answer = self.model(inputs_embeds=embedding, attention_mask=mask[:, None], position_ids=position, past_key_values=memory, use_cache=True)
        old = past.shape[-2]
        fresh = torch.stack([torch.stack((layer.keys[..., old:, :], layer.values[..., old:, :])) for layer in memory.layers])
        return answer.last_hidden_state, fresh


def graphs(model: LlavaOnevisionForConditionalGeneration) -> dict[str, nn.Module]:
    """Both, by name."""
    return {VISION: Vision(model), LLM: Prefill(model)}
