"""Which frames of a video the reflector is shown: indices into o_0 .. o_t, ascending, frame 0 first and frame t last.

A video of at most `limit` frames is shown whole, by both samplers. Stretching it to `limit` frames instead, as the published video loader does
where it is told to force sampling, would repeat frames and move every index with each new frame; a short clip shown whole is what the backbone
saw in its own training, costs less, and lets the language model's keys and values be reused while the video grows.

    uniform         floor(linspace(0, t, limit)): the paper's "uniformly sample 32 frames" (appendix B.3). Almost every index moves when t grows.
    stable_dyadic   the multiples of s up to t, and t itself, where s is the least power of two for which these are at most `limit` frames.
                    The list only grows, but for its last entry, until s doubles: keys and values stay good between the log2(t / limit) doublings.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

Sampler = Literal["uniform", "stable_dyadic"]


def _stride(t: int, limit: int) -> int:
    """The least power of two s with ceil(t / s) + 1 <= limit."""
    stride = 1
    while t > stride * (limit - 1):
        stride *= 2
    return stride


@cache
def shown(sampler: Sampler, t: int, limit: int) -> tuple[int, ...]:
    """The frames of o_0 .. o_t that are shown, at most `limit` of them. ValueError unless t >= 0 and limit >= 2, or for an unknown sampler."""
    if t < 0 or limit < 2:
        raise ValueError(f"frames shown at t={t}, at most {limit}: want t >= 0 and at least 2 frames, the first and the current")
    if sampler == "uniform":
        return tuple(range(t + 1)) if t < limit else tuple(i * t // (limit - 1) for i in range(limit))
    if sampler == "stable_dyadic":
        stride = _stride(t, limit)
        kept = tuple(range(0, t + 1, stride))
        return kept if kept[-1] == t else (*kept, t)
    raise ValueError(f"sampler={sampler!r}: there are uniform and stable_dyadic")


def needed(sampler: Sampler, t: int, limit: int, index: int) -> bool:
    """Whether frame `index` <= t may be shown at some time after t; if not, nothing of it need be remembered."""
    return sampler == "uniform" or index % _stride(t + 1, limit) == 0
