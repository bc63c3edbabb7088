"""LLaVA-OneVision (SigLIP, projector, Qwen2) from transformers, taken apart where a growing video can be read piece by piece.

    frames -> SigLIP's encoder, before its last norm (published: 26 of 27 layers) -> Linear GELU Linear -> bilinear to half size, rounded up
    words before | tokens of frame 1 | ... | tokens of frame n | one `image_newline` | question  -> Qwen2, causal -> last norm

Frames do not see each other before the language model, so the features of a frame never change; there, each token sees only what stands before
it, so neither do the keys and values of a prefix. Pixels are normalised with mean = std = 0.5, which the tower was trained with; the default of
transformers' video processor is CLIP's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from worldenv.config import ReflectorConfig
from worldenv.kernels.frames import for_reflector
from worldenv.reflector.graphs import LLM, VISION, graphs
from worldenv.reflector.prompt import Prompt

if TYPE_CHECKING:  # it takes longer to import than torch: a command that judges nothing does without
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

VISION_BATCH = 32
"""Frames per pass of the vision tower: more only pushes activations out of the cache (CPU) or fills memory (GPU)."""


def architecture(config: ReflectorConfig, vocab: int, image: int, video: int) -> LlavaOnevisionConfig:
    """transformers' config of a backbone of this size; `vocab` rows, `image` and `video` the numbers of these tokens."""
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model", "image_size": config.image, "patch_size": config.patch, "hidden_size": config.vision_width,
            "num_hidden_layers": config.vision_layers, "num_attention_heads": config.vision_heads, "intermediate_size": config.vision_mlp,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": vocab, "hidden_size": config.width, "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "intermediate_size": config.ffn,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "initializer_range": config.width**-0.5,  # about the published 0.02 at the published width; a narrow model does not learn with that
        },
        image_token_index=image, video_token_index=video, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip


def backbone(config: LlavaOnevisionConfig) -> LlavaOnevisionForConditionalGeneration:
    """transformers' model of `config`: weights are drawn by torch's generator, on its default device."""
    from transformers import LlavaOnevisionForConditionalGeneration

    return LlavaOnevisionForConditionalGeneration(config)


def cast(model: LlavaOnevisionForConditionalGeneration, dtype: torch.dtype) -> LlavaOnevisionForConditionalGeneration:
    """`model` with its weights in `dtype`, in place. Rotary frequencies stay float32, as from_pretrained leaves them and `model.to` would not: of 8
    bits, they turn a token some hundred places on the wrong way."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def described(hf: LlavaOnevisionConfig, like: ReflectorConfig) -> ReflectorConfig:
    """`like` with the sizes that a backbone's own config states. ValueError where it is not the kind that is read here."""
    vision, text = hf.vision_config, hf.text_config
    if hf.vision_feature_layer != -1 or hf.vision_feature_select_strategy != "full":
        raise ValueError(
            f"vision_feature_layer={hf.vision_feature_layer!r}, vision_feature_select_strategy={hf.vision_feature_select_strategy!r}: "
            "want -1 and 'full', as LLaVA-OneVision has them"
        )
    return replace(
        like, image=vision.image_size, patch=vision.patch_size, vision_width=vision.hidden_size, vision_layers=vision.num_hidden_layers,
        vision_heads=vision.num_attention_heads, vision_mlp=vision.intermediate_size, width=text.hidden_size, layers=text.num_hidden_layers,
        heads=text.num_attention_heads, kv_heads=text.num_key_value_heads, ffn=text.intermediate_size,
    )  # fmt: skip


def to_pixels(frame: torch.Tensor, size: int) -> torch.Tensor:
    """Frames (N, H, W, 3) uint8 as the tower takes them: (N, 3, size, size) float32 in [-1, 1].

    The largest square in the middle, resized as Pillow's bicubic filter does (antialiased, rounded to 8 bits) where it has another size.
    """
    if frame.dim() != 4 or frame.shape[-1] != 3 or not frame.numel() or frame.dtype != torch.uint8:
        raise ValueError(f"reflector: frames {tuple(frame.shape)} {frame.dtype}, want (N, H, W, 3) uint8, at least one")
    return for_reflector(frame, size)


class Llava(nn.Module):
    """The backbone and its prompt. Everything here is a pure function of its arguments and the weights."""

    def __init__(self, model: LlavaOnevisionForConditionalGeneration, prompt: Prompt) -> None:
        """`model` as transformers builds or loads it; `prompt` with the tokenizer that belongs to it."""
        super().__init__()
        self.model = model
        self.runs: dict[str, Callable[..., Any]] = dict(graphs(model))
        """What runs the networks, by name (`reflector.graphs`): in the beginning these modules themselves."""
        self.prompt = prompt
        vision, text = model.config.vision_config, model.config.text_config
        self.image: int = vision.image_size
        self.frame_tokens: int = (-(-(vision.image_size // vision.patch_size) // 2)) ** 2
        self.width: int = text.hidden_size
        self.layers: int = text.num_hidden_layers
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        linear = text.num_attention_heads * head * 2 + text.num_key_value_heads * head * 2 + 3 * text.intermediate_size
        self.token_flops: int = 2 * self.layers * self.width * linear
        """Of one token of the language model, attention itself apart; a product and a sum are 2."""
        self.pair_flops: int = 4 * self.layers * text.num_attention_heads * head
        """Of one token looking at one other."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        place: torch.device = self.model.model.image_newline.device
        return place

    def encode(self, frame: torch.Tensor) -> torch.Tensor:
        """Projected, pooled features (N, frame_tokens, width) of frames (N, H, W, 3) uint8, each for itself."""
        parts = [self.runs[VISION](to_pixels(part, self.image)) for part in torch.split(frame.to(self.device), VISION_BATCH)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


    def words(self, tokens: Sequence[int]) -> torch.Tensor:
        """Embeddings (len(tokens), width)."""
        rows: torch.Tensor = self.model.get_input_embeddings()(torch.tensor(tokens, device=self.device))
        return rows

    @property
    def newline(self) -> torch.Tensor:
        """(1, width): stands once, after the last frame."""
        row: torch.Tensor = self.model.model.image_newline[None]
        return row

    def read(self, embedding: torch.Tensor, allowed: torch.Tensor, position: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The language model over B rows of S new tokens that follow P old ones.

        embedding (B, S, width); allowed (B or 1, S, P + S) bool: which tokens each new one sees, at least itself; position (B or 1, S) int64;
        past (layers, 2, B, kv_heads, P, d): keys (rotated) and values of the old ones. Returns hiddens after the last norm (B, S, width) and the
        new tokens' keys and values, as `past` with S for P.
        """
        old = past.shape[-2]
        hidden, fresh = self.runs[LLM](embedding, allowed[..., :old], allowed[..., old:], position, past)
        return hidden, fresh

    def answer_logit(self, embedding: torch.Tensor) -> torch.Tensor:
        """Logit (...,) float32 of "Yes" against "No" as the first word of the answer; `embedding` (..., width) of the last token."""
        rows = self.model.lm_head.weight[[self.prompt.yes, self.prompt.no]].float()
        logit: torch.Tensor = embedding.float() @ (rows[0] - rows[1])
        return logit

    def empty_past(self) -> torch.Tensor:
        """Keys and values of no tokens: (layers, 2, kv_heads, 0, d)."""
        text = self.model.config.text_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return torch.empty(self.layers, 2, text.num_key_value_heads, 0, head, device=self.device, dtype=self.model.model.image_newline.dtype)
