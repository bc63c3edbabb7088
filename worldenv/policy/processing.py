"""OpenVLA-OFT's words, numbers and pictures: prompt and tokens, normalisation, gripper conventions, resize and crop.

Source: the published evaluation of OpenVLA-OFT on LIBERO (Kim et al. 2025, arXiv:2502.19645, and its code's behaviour).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer, models, pre_tokenizers

from worldenv.kernels.frames import resize_lanczos3
from worldenv.nouns import ACTION_DIM
from worldenv.policy.jpeg import jpeg_round_trip

BOS, STOP = 1, 2
"""Llama's <s> and </s>; the tokenizers that are built here keep them."""
PUBLISHED_EMPTY, PUBLISHED_PAD = 29871, 32000
"""Llama's empty token and OpenVLA's padding."""
_UNKNOWN = "<unk>"
_OWN_TOKENS = (_UNKNOWN, "<s>", "</s>", "▁", "<pad>")
"""Ids 0 .. 4 of a tokenizer built here; 3 plays 29871."""


def prompt(instruction: str) -> str:
    """The question that the policy answers."""
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


@dataclass(frozen=True)
class PromptTokenizer:
    """Instructions to token ids: [<s>] question [29871]."""

    tokenizer: Tokenizer
    empty: int
    """The id that ends every prompt; its hidden is the first that the heads read."""
    pad: int
    """Padding, hidden from everyone."""
    width: int = 0
    """Least length of a padded batch: with it, an answer does not depend on who else is in the batch."""
    _known: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def build(cls, instructions: Iterable[str]) -> PromptTokenizer:
        """A word-level tokenizer of the prompt's and the instructions' words: nothing is downloaded. Deterministic."""
        texts = [prompt(instruction) for instruction in instructions]
        if not texts:
            raise ValueError("PromptTokenizer.build: no instructions, so no words")
        split = pre_tokenizers.Whitespace()
        words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*_OWN_TOKENS, *words])}, unk_token=_UNKNOWN))
        tokenizer.pre_tokenizer = split
        longest = max(len(split.pre_tokenize_str(text)) for text in texts)
        return cls(tokenizer, empty=_OWN_TOKENS.index("▁"), pad=_OWN_TOKENS.index("<pad>"), width=longest + 2)

    @classmethod
    def published(cls, file: Path) -> PromptTokenizer:
        """The checkpoint's own `tokenizer.json`. ValueError where it is missing or is not Llama's."""
        if not file.is_file():
            raise ValueError(f"{file}: no such file; an OpenVLA-OFT checkpoint directory holds its tokenizer there")
        tokenizer = Tokenizer.from_file(str(file))
        if [tokenizer.token_to_id(token) for token in ("<s>", "</s>", "▁")] != [BOS, STOP, PUBLISHED_EMPTY]:
            raise ValueError(f"{file}: not Llama-2's tokenizer: <s>, </s> and the empty token are not {BOS}, {STOP}, {PUBLISHED_EMPTY}")
        tokenizer.no_padding()  # a file keeps what its tokenizer was last used with, and would pad or cut prompts by that
        tokenizer.no_truncation()
        return cls(tokenizer, empty=PUBLISHED_EMPTY, pad=PUBLISHED_PAD)

    @property
    def vocab(self) -> int:
        """Rows that an embedding table needs."""
        return max(int(self.tokenizer.get_vocab_size()), self.pad + 1)

    def ids(self, instruction: str) -> tuple[int, ...]:
        """Token ids of one prompt. ValueError that names the words that this tokenizer does not know."""
        if instruction not in self._known:
            self._known[instruction] = self._encode(instruction)
        return self._known[instruction]

    def _encode(self, instruction: str) -> tuple[int, ...]:
        text = prompt(instruction)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        unknown = self.tokenizer.token_to_id(_UNKNOWN)
        strange = [text[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if i == unknown]
        if strange:
            words = ", ".join(repr(word) for word in dict.fromkeys(strange))
            raise ValueError(
                f"instruction {instruction!r}: unknown word {words}; the policy's tokenizer was built from its training instructions"
            )
        ids = [BOS, *encoding.ids]
        return tuple(ids if ids[-1] == self.empty else [*ids, self.empty])

    def batch(self, instructions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids (B, L) int64, padded on the right, and lengths (B,) int64, or None where nothing is padded."""
        rows = [self.ids(instruction) for instruction in instructions]
        longest = max(self.width, *(len(row) for row in rows))
        ids = torch.tensor([[*row, *[self.pad] * (longest - len(row))] for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return ids, None if all(len(row) == longest for row in rows) else lengths

    def tree(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"tokenizer": self.tokenizer.to_str(), "empty": self.empty, "pad": self.pad, "width": self.width}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> PromptTokenizer:
        """The opposite of `tree`."""
        return cls(Tokenizer.from_str(tree["tokenizer"]), tree["empty"], tree["pad"], tree["width"])


IDLE_RANGE = 1e-4
"""A dimension whose q99 - q01 is below this [its own unit] carries nothing: it becomes 0; the published rule would blow up its noise."""
_EPS = 1e-8


@dataclass(frozen=True)
class Bounds:
    """`bounds_q99`: the 1 % and 99 % quantiles of each dimension go to -1 and 1."""

    q01: NDArray[np.float64]
    """(D,), in the dimension's own unit."""
    q99: NDArray[np.float64]
    """(D,)."""
    mask: NDArray[np.bool_]
    """(D,): the others pass unchanged."""

    def __post_init__(self) -> None:
        if not (self.q01.ndim == 1 and self.q01.shape == self.q99.shape == self.mask.shape):
            raise ValueError(f"Bounds: q01 {self.q01.shape}, q99 {self.q99.shape}, mask {self.mask.shape}: want three times (D,)")
        if not (np.isfinite(self.q01).all() and np.isfinite(self.q99).all() and (self.q99 >= self.q01)[self.mask].all()):
            raise ValueError(f"Bounds: q01 {self.q01.tolist()}, q99 {self.q99.tolist()}: want finite, q01 <= q99")

    @classmethod
    def of(cls, values: NDArray[np.floating[Any]], mask: ArrayLike | None = None) -> Bounds:
        """Quantiles of `values` (n, D), n >= 1."""
        wide = np.asarray(values, dtype=np.float64)
        used = np.ones(wide.shape[1], bool) if mask is None else np.asarray(mask, bool)
        return cls(np.quantile(wide, 0.01, axis=0), np.quantile(wide, 0.99, axis=0), used)

    def normalise(self, value: torch.Tensor) -> torch.Tensor:
        """`value` (..., D) to float64 in [-1, 1]: clipped, in training and at inference alike."""
        low, high, mask = self._on(value)
        wide = value.double()
        unit = (2.0 * (wide - low) / (high - low + _EPS) - 1.0).clamp(-1.0, 1.0)
        return torch.where(mask, torch.where(high - low < IDLE_RANGE, torch.zeros_like(unit), unit), wide)

    def unnormalise(self, value: torch.Tensor) -> torch.Tensor:
        """`value` (..., D), not clipped, back to the dimension's unit, float64."""
        low, high, mask = self._on(value)
        wide = value.double()
        return torch.where(mask, 0.5 * (wide + 1.0) * (high - low + _EPS) + low, wide)

    def _on(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if value.shape[-1:] != self.q01.shape:
            raise ValueError(f"statistics of {self.q01.shape[0]} dimensions, values of {tuple(value.shape)}: they belong to another robot")
        return tuple(torch.as_tensor(part, device=value.device) for part in (self.q01, self.q99, self.mask))  # type: ignore[return-value]

    def tree(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"q01": self.q01, "q99": self.q99, "mask": self.mask}


_ACTION_MASK = (True,) * (ACTION_DIM - 1) + (False,)


@dataclass(frozen=True)
class Statistics:
    """What normalises a policy's actions and proprio: of the demonstrations that it was trained on, and of no others."""

    action: Bounds
    """(7,): the last, the gripper, passes unchanged."""
    proprio: Bounds
    """(P,)."""
    source: str
    """Which demonstrations."""

    @classmethod
    def of(cls, commands: Sequence[NDArray[np.float32]], proprios: Sequence[NDArray[np.float32]], source: str) -> Statistics:
        """From demonstrations: commands (T, 7) in the environment's convention, proprio (T, P) seen before each."""
        if not commands:
            raise ValueError(f"statistics of {source}: no demonstrations")
        action = np.concatenate([gripper_to_training(torch.from_numpy(np.asarray(c))).numpy() for c in commands])
        return cls(Bounds.of(action, _ACTION_MASK), Bounds.of(np.concatenate(proprios)), source)

    @classmethod
    def published(cls, file: Path, name: str) -> Statistics:
        """Those of data set `name` in a checkpoint's `dataset_statistics.json`. ValueError that names what is missing."""
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: {error}; an OpenVLA-OFT checkpoint directory holds its statistics there") from error
        if name not in content:
            raise ValueError(f"{file}: no statistics of {name!r}; there are {', '.join(sorted(content))}")
        parts = []
        for key, default in (("action", _ACTION_MASK), ("proprio", None)):
            part = content[name].get(key, {})
            missing = sorted({"q01", "q99"} - part.keys())
            if missing:
                raise ValueError(f"{file}: {name}.{key} lacks {', '.join(missing)}")
            q01, q99 = (np.asarray(part[q], dtype=np.float64) for q in ("q01", "q99"))
            parts.append(Bounds(q01, q99, np.asarray(part.get("mask", default or [True] * len(q01)), bool)))
        return cls(parts[0], parts[1], name)

    def tree(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"action": self.action.tree(), "proprio": self.proprio.tree(), "source": self.source}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Statistics:
        """The opposite of `tree`."""
        return cls(Bounds(**tree["action"]), Bounds(**tree["proprio"]), tree["source"])

    def to_training(self, command: torch.Tensor) -> torch.Tensor:
        """Commands (..., 7), gripper -1 open .. +1 close, as the policy's targets: float32, gripper 1 open, 0 close."""
        return self.action.normalise(gripper_to_training(command)).float()

    def to_command(self, action: torch.Tensor) -> torch.Tensor:
        """The policy's actions (..., 7) as commands: float32 in [-1, 1], gripper -1 open or +1 close."""
        raw = self.action.unnormalise(action)
        gripper = torch.where(raw[..., -1:] > 0.5, -1.0, 1.0)
        return torch.cat([raw[..., :-1].clamp(-1.0, 1.0), gripper], dim=-1).float()


def gripper_to_training(command: torch.Tensor) -> torch.Tensor:
    """Commands (..., 7) with the gripper -1 open .. +1 close turned to 1 open .. 0 close; the rest is unchanged."""
    return torch.cat([command[..., :-1], 1.0 - command[..., -1:].clamp(0.0, 1.0)], dim=-1)


def resized(frames: torch.Tensor, size: int, jpeg: bool) -> torch.Tensor:
    """The published chain up to the crop: frames (B, H, W, 3) uint8 to (B, size, size, 3) uint8."""
    return resize_lanczos3(jpeg_round_trip(frames) if jpeg else frames, size)
