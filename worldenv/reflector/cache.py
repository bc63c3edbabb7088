"""What need not be computed again while a video grows, and how the K questions of a new chunk are read.

A question at time t is asked after the frames shown(t). Its tokens see the words before the video, those frames and themselves, nothing else;
so one row of tokens can hold the frames of several times, each once, and several questions that do not see each other:

    trunk (keys and values known)   new frames (each sees the path that leads to it)      questions, isolated
    before | 0 | 2 | 4              | 6 | 7 (only for t = 7) | 8                           | newline, words (t = 6) | ... (t = 7) | ... (t = 8)

Positions are those that the path alone would have, so the result is that of reading every path from its first token. A row may also be asked
about one time only; which split of the K questions into rows is cheapest is counted, in floating-point operations, and remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from worldenv.reflector.frames import Sampler, shown


@dataclass(frozen=True)
class Watch:
    """What the reflector remembers of one video. Never changed in place: judging makes a new one, which shares tensors with the old."""

    instruction: str
    length: int
    """Frames seen so far."""
    feature: Mapping[int, torch.Tensor]
    """Projected, pooled features (frame_tokens, width) of the frames that may still be shown."""
    trunk: tuple[int, ...] | None
    """Frames whose keys and values are known, in the order in which they stand after the words before the video; None: not even those words'."""
    past: torch.Tensor
    """(layers, 2, kv_heads, P, d): keys and values of the words before the video and of the trunk."""
    total: torch.Tensor
    """(1 + len(trunk), width) float32: sums of final hiddens over the words before the video and over each frame of the trunk (mean pooling)."""


@dataclass(frozen=True)
class Geometry:
    """Tokens and costs that decide how questions are put into rows."""

    before: int
    """Words before the video [tokens]."""
    frame: int
    """A frame [tokens]."""
    question: int
    """The newline after the video and the question [tokens]."""
    token_flops: int
    """Floating-point operations of one token, attention itself apart."""
    pair_flops: int
    """Floating-point operations of one token looking at one other."""


@dataclass(frozen=True)
class Row:
    """New tokens that are read in one sequence: perhaps the words before the video, then frames, then questions."""

    opens: bool
    """It begins with the words before the video; else their keys and values are known."""
    reused: int
    """Frames of the trunk whose keys and values are used."""
    frames: tuple[int, ...]
    """Numbers of the new frames."""
    above: tuple[int, ...]
    """For each new frame the index in `frames` of the one that stands before it on its path; -1: only frames of the trunk do."""
    depth: tuple[int, ...]
    """For each new frame, how many frames stand before it on its path."""
    times: tuple[int, ...]
    """When the questions are asked."""
    ends: tuple[int, ...]
    """For each question, the index in `frames` of the last frame that it sees."""

    def lineage(self, node: int) -> list[int]:
        """Indices in `frames` of the new frames on the path to `node`, `node` last."""
        path = [node]
        while self.above[path[-1]] >= 0:
            path.append(self.above[path[-1]])
        return path[::-1]

    def tokens(self, geometry: Geometry) -> int:
        """New tokens."""
        return self.opens * geometry.before + len(self.frames) * geometry.frame + len(self.times) * geometry.question

    def known(self, geometry: Geometry) -> int:
        """Old tokens, whose keys and values are used."""
        return 0 if self.opens else geometry.before + self.reused * geometry.frame

    def flops(self, geometry: Geometry) -> int:
        """Floating-point operations of reading it in the language model."""
        new = self.tokens(geometry)
        return new * geometry.token_flops + new * (new + self.known(geometry)) * geometry.pair_flops


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading entries are the same."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def _row(trunk: tuple[int, ...] | None, times: Sequence[int], lists: Sequence[tuple[int, ...]]) -> Row:
    """The row that asks at all of `times`, after the frames in `lists`."""
    known = trunk or ()
    reused = max(shared_length(known, path) for path in lists)
    number: dict[tuple[int, ...], int] = {}
    frames: list[int] = []
    above: list[int] = []
    depth: list[int] = []
    ends: list[int] = []
    for path in lists:
        node = -1
        for i in range(shared_length(known[:reused], path), len(path)):
            parent, key = node, path[: i + 1]
            if key not in number:
                number[key] = len(frames)
                frames.append(path[i])
                above.append(parent)
                depth.append(i)
            node = number[key]
        ends.append(node)
    return Row(trunk is None, reused, tuple(frames), tuple(above), tuple(depth), tuple(times), tuple(ends))


LONGEST_ROW = 16
"""Questions in one row, at most."""


@lru_cache(maxsize=4096)
def plan(sampler: Sampler, limit: int, length: int, count: int, trunk: tuple[int, ...] | None, geometry: Geometry) -> tuple[Row, ...]:
    """The cheapest rows that ask once after each of `count` new frames of a video of `length` frames, in the order of time.

    Cheapest by counted operations, over all splits into runs of consecutive times of at most LONGEST_ROW.
    """
    times = range(length, length + count)
    lists = [shown(sampler, t, limit) for t in times]
    best: list[tuple[int, tuple[Row, ...]]] = [(0, ())]
    for stop in range(1, count + 1):
        options = []
        for start in range(max(0, stop - LONGEST_ROW), stop):
            row = _row(trunk, times[start:stop], lists[start:stop])
            options.append((best[start][0] + row.flops(geometry), (*best[start][1], row)))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]


def trunk_after(sampler: Sampler, limit: int, time: int) -> tuple[int, ...]:
    """The frames shown at `time` that stand at the same places at the next time: those whose keys and values are worth keeping."""
    now = shown(sampler, time, limit)
    return now[: shared_length(now, shown(sampler, time + 1, limit))]


def single(path: tuple[int, ...], time: int) -> Row:
    """The row that asks once after the frames `path`, with nothing known: strict recomputation."""
    return _row(None, (time,), (path,))


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a row stand and what they see."""

    position: torch.Tensor
    """(S,) int64."""
    allowed: torch.Tensor
    """(S, P + S) bool."""
    last: tuple[int, ...]
    """For each question, its last token."""
    frame_start: tuple[int, ...]
    """For each new frame, its first token."""


def _layout(row: Row, geometry: Geometry, device: torch.device) -> Layout:
    opening = int(row.opens)
    nodes = opening + len(row.frames) + len(row.times)
    sees = torch.zeros(nodes, nodes, dtype=torch.bool)  # node by node, itself not
    sees[opening:, :opening] = True
    start, known = [0] * nodes, [0] * nodes  # position of a node's first token; frames of the trunk that it sees
    for i in range(len(row.frames)):
        path = row.lineage(i)
        sees[opening + i, [opening + j for j in path[:-1]]] = True
        start[opening + i] = geometry.before + row.depth[i] * geometry.frame
        known[opening + i] = row.depth[path[0]]
    for i, end in enumerate(row.ends, opening + len(row.frames)):
        path = row.lineage(end)
        sees[i, [opening + j for j in path]] = True
        start[i] = geometry.before + (row.depth[end] + 1) * geometry.frame
        known[i] = row.depth[path[0]]
    sizes = torch.tensor([geometry.before] * opening + [geometry.frame] * len(row.frames) + [geometry.question] * len(row.times))
    first = sizes.cumsum(0) - sizes
    token = torch.arange(row.tokens(geometry), device=device)  # from here on where the model is: a published row has 6000 tokens
    node = torch.repeat_interleave(torch.arange(nodes, device=device), sizes.to(device), output_size=len(token))
    begins, sees = torch.stack((torch.tensor(start), first)).to(device), sees.to(device)
    position = begins[0][node] + token - begins[1][node]
    new = sees[node][:, node] | ((node[:, None] == node[None]) & (token[None] <= token[:, None]))
    reach = torch.tensor(known, device=device)[node] * geometry.frame + geometry.before  # old tokens seen: a prefix of them
    old = torch.arange(row.known(geometry), device=device)[None] < reach[:, None]
    asked = opening + len(row.frames)
    ends, starts = (first + sizes - 1).tolist(), first.tolist()
    return Layout(position, torch.cat((old, new), dim=1), tuple(ends[asked:]), tuple(starts[opening:asked]))


_remembered_layout = lru_cache(maxsize=512)(_layout)
_REMEMBERED = 2**18


def layout(row: Row, geometry: Geometry, device: torch.device) -> Layout:
    """Positions and visibility of the tokens of `row`, on `device`; remembered where they are small [2^18 bool]."""
    new = row.tokens(geometry)
    small = new * (new + row.known(geometry)) <= _REMEMBERED
    return _remembered_layout(row, geometry, device) if small else _layout(row, geometry, device)
