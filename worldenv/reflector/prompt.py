"""What the reflector is asked, in words and in tokens.

The paper's question (appendix B.3) in the chat format that LLaVA-OneVision was trained with (ChatML with its system turn; LLaVA-NeXT's
`qwen_1_5`). The video stands between two runs of words: the same ones before it for every task, the question after it. `<video>` is a token
of its own, so the two runs can be cut into tokens apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
"""The words before the video."""
VIDEO = "<video>"
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", VIDEO)
_WORD = r"\n|[\w-]+|[^\w\s]"


def question(instruction: str) -> str:
    """The words after the video."""
    return (
        f"\nWatch the video and determine whether it completes the task: {instruction} — answer only 'Yes' or 'No'."
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def word_tokenizer(instructions: Sequence[str]) -> Tokenizer:
    """A tokenizer that knows the words of the prompt and of `instructions`, and no others; the same ones give the same numbers, in any order."""
    plain = re.sub("|".join(map(re.escape, _SPECIAL)), " ", BEFORE + "".join(question(text) for text in sorted(instructions)))
    words = sorted({*re.findall(_WORD, plain), "Yes", "No"})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*_SPECIAL, *words))}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _SPECIAL])
    return tokenizer


class Prompt:
    """A tokenizer, asked the reflector's question."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """ValueError where a token that the prompt needs is no single token of `tokenizer`."""
        self.tokenizer = tokenizer
        self.video, self.image, self.yes, self.no = (self._single(word) for word in (VIDEO, "<image>", "Yes", "No"))
        self.before = self._cut(BEFORE)
        self.question = lru_cache(maxsize=4096)(self._question)

    def _single(self, word: str) -> int:
        number: int | None = self.tokenizer.token_to_id(word)
        if number is None:
            raise ValueError(f"the tokenizer has no token {word!r}: is it LLaVA-OneVision's?")
        return number

    def _cut(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"the reflector's tokenizer cannot cut {text!r}: {error}") from error

    def _question(self, instruction: str) -> tuple[int, ...]:
        """Tokens after the video for one instruction. ValueError names the first word that the tokenizer does not know."""
        if isinstance(self.tokenizer.model, models.WordLevel):
            for word in re.findall(_WORD, instruction):
                if self.tokenizer.token_to_id(word) is None:
                    raise ValueError(f"instruction {instruction!r}: the reflector has never seen the word {word!r}; train it on this instruction")
        return self._cut(question(instruction))
