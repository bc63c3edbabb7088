"""The reflector: R(o_1:t, g) for every new frame of many growing videos (paper, eq. 3).

`judge` computes what is new and nothing else; `embed` and `strict` read every video from its first pixel, which is what training uses and what
judges the other way. Both are the same function of frames, instruction and weights, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from worldenv.config import ReflectorConfig
from worldenv.reflector.cache import Geometry, Layout, Row, Watch, layout, plan, single, trunk_after
from worldenv.reflector.frames import needed, shown
from worldenv.reflector.head import RewardHead
from worldenv.reflector.llava import Llava

ROW_TOKENS = 4096
"""Tokens of the language model per pass, padding included, unless one row alone has more."""


@dataclass(frozen=True)
class Watching:
    """What a reflector will be asked to judge: which passes of the language model there will be follows from it."""

    instruction: Sequence[str]
    """Of the videos."""
    steps: int
    """Frames of the longest video after its first."""
    chunk: int
    """Frames judged at a time."""


@dataclass(frozen=True)
class Embedding:
    """What the backbone says of B videos."""

    pooled: torch.Tensor
    """(B, width): the reward head's input."""
    answer: torch.Tensor
    """(B, width): the last token, from which the answer's first word is drawn."""


@dataclass(frozen=True)
class _Reading:
    """One row of one video, with all that it needs."""

    row: Row
    watch: Watch
    geometry: Geometry
    embeddings: Sequence[torch.Tensor]
    """Of its S tokens, in pieces (n, width): joined when it is read, so that all rows of a call need not be in memory at once."""

    @property
    def shape(self) -> tuple[int, int]:
        """S, and P + S."""
        new = self.row.tokens(self.geometry)
        return new, self.row.known(self.geometry) + new


@dataclass(frozen=True)
class _Read:
    """What came out of one row."""

    hidden: torch.Tensor
    """(S, width)."""
    fresh: torch.Tensor
    """(layers, 2, kv_heads, S, d): part of what the whole pass made, so whoever keeps some of it copies that."""
    plain: Layout
    """Where its tokens stood."""


class LlavaReflector:
    """LLaVA-OneVision and a reward head behind the contract `Reflector`."""

    def __init__(self, config: ReflectorConfig, llava: Llava, head: RewardHead | None) -> None:
        """Without a head, the score is the probability of "Yes" against "No" as the first word of the answer (the paper's ablation)."""
        if llava.image != config.image or llava.width != config.width:
            raise ValueError(f"reflector: backbone for {llava.image} px and width {llava.width}, config says {config.image} px and {config.width}")
        self.config = config
        self.llava = llava
        self.head = head

    def to(self, device: torch.device) -> LlavaReflector:
        """Move the weights; returns itself."""
        self.llava.to(device)
        if self.head is not None:
            self.head.to(device)
        return self

    def freeze(self) -> LlavaReflector:
        """No weight of backbone or head takes gradients any more; returns itself."""
        self.llava.eval().requires_grad_(False)
        if self.head is not None:
            self.head.eval().requires_grad_(False)
        return self

    def logit(self, embedding: Embedding) -> torch.Tensor:
        """(B,) float32: the score before the sigmoid."""
        return self.llava.answer_logit(embedding.answer) if self.head is None else self.head(embedding.pooled)

    @torch.no_grad()
    def begin(self, instruction: Sequence[str], frame: torch.Tensor) -> list[Watch]:
        """See `Reflector.begin`. ValueError names a word of an instruction that the tokenizer does not know."""
        if len(instruction) != frame.shape[0]:
            raise ValueError(f"reflector: {len(instruction)} instructions for {frame.shape[0]} videos")
        for text in set(instruction):
            self.llava.prompt.question(text)
        features = self.llava.encode(frame)
        past, total = self.llava.empty_past(), torch.empty(0, self.llava.width, device=self.llava.device)
        return [Watch(text, 1, {0: features[i].clone()}, None, past, total) for i, text in enumerate(instruction)]

    @torch.no_grad()
    def judge(self, watch: Sequence[Watch], frames: torch.Tensor) -> tuple[torch.Tensor, list[Watch]]:
        """See `Reflector.judge`. The videos of a batch may have different lengths."""
        if frames.dim() != 5 or len(watch) != frames.shape[0]:
            raise ValueError(f"reflector: frames {tuple(frames.shape)} for {len(watch)} videos, want (B, K, H, W, 3)")
        count = frames.shape[1]
        features = self.llava.encode(frames.flatten(0, 1))
        features = features.view(*frames.shape[:2], *features.shape[1:])
        seen = [
            replace(one, length=one.length + count, feature={**one.feature, **{one.length + k: features[i, k] for k in range(count)}})
            for i, one in enumerate(watch)
        ]
        rows: list[tuple[int, Row]] = []
        for i, one in enumerate(watch):
            planned = plan(self.config.sampler, self.config.frames, one.length, count, one.trunk, self._geometry(one.instruction))
            rows += [(i, row) for row in planned]
        pooled, answer = (torch.empty(len(watch), count, self.llava.width, device=self.llava.device) for _ in range(2))
        after = list(seen)

        def take(number: int, out: _Read) -> None:
            i, row = rows[number]
            at = [time - watch[i].length for time in row.times]
            embedding = self._pool(row, seen[i], out)
            pooled[i, at], answer[i, at] = embedding.pooled.float(), embedding.answer.float()
            if row.times[-1] == seen[i].length - 1:
                after[i] = self._remember(row, watch[i], seen[i], out)

        self._read(self._readings([(row, seen[i]) for i, row in rows]), take)
        return self.logit(Embedding(pooled, answer)).sigmoid(), after

    def embed(self, instruction: Sequence[str], clips: Sequence[torch.Tensor]) -> Embedding:
        """Embeddings of B videos from the frames that are shown of each, (n, H, W, 3) uint8, from scratch and with gradients if enabled."""
        features = torch.split(self.llava.encode(torch.cat(list(clips))), [len(clip) for clip in clips])
        past, total = self.llava.empty_past(), torch.empty(0, self.llava.width, device=self.llava.device)
        wanted = []
        for text, feature in zip(instruction, features, strict=True):
            path = tuple(range(len(feature)))
            wanted.append((single(path, path[-1]), Watch(text, len(path), dict(enumerate(feature)), None, past, total)))
        pools: dict[int, Embedding] = {}

        def take(number: int, out: _Read) -> None:
            pools[number] = self._pool(*wanted[number], out)

        self._read(self._readings(wanted), take)
        return Embedding(*(torch.cat([getattr(pools[i], name) for i in range(len(wanted))]) for name in ("pooled", "answer")))

    def row_tokens(self, watching: Watching) -> list[tuple[int, int]]:
        """New tokens, and old ones that they follow, of every row that is read while a video of each instruction is judged so.

        Where the last chunk is a shorter one, of what is read when it is whole too: an imagined video ends with a whole chunk.
        """
        sampler, limit, found = self.config.sampler, self.config.frames, list[tuple[int, int]]()
        for geometry in {self._geometry(text) for text in watching.instruction}:
            trunk: tuple[int, ...] | None = None
            for length in range(1, watching.steps + 1, watching.chunk):
                for count in {watching.chunk, min(watching.chunk, watching.steps + 1 - length)}:
                    rows = plan(sampler, limit, length, count, trunk, geometry)
                    found += [(row.tokens(geometry), row.known(geometry)) for row in rows]
                trunk = trunk_after(sampler, limit, length + watching.chunk - 1)
        return found

    @torch.no_grad()
    def strict(self, instruction: str, video: torch.Tensor, times: Iterable[int]) -> torch.Tensor:
        """Scores (len(times),) of one video (T + 1, H, W, 3) uint8 at `times`, each recomputed from its first pixel."""
        times = list(times)
        if not times or not 0 <= min(times) <= max(times) < len(video):
            raise ValueError(f"reflector: times {times} of a video of {len(video)} frames")
        clips = [video[list(shown(self.config.sampler, t, self.config.frames))] for t in times]
        return self.logit(self.embed([instruction] * len(clips), clips)).sigmoid()

    def _geometry(self, instruction: str) -> Geometry:
        prompt = self.llava.prompt
        question = 1 + len(prompt.question(instruction))
        return Geometry(len(prompt.before), self.llava.frame_tokens, question, self.llava.token_flops, self.llava.pair_flops)

    def _readings(self, wanted: Sequence[tuple[Row, Watch]]) -> list[_Reading]:
        """Rows with the embeddings of their tokens."""
        llava, prompt = self.llava, self.llava.prompt
        opening = llava.words(prompt.before)
        texts = sorted({watch.instruction for _, watch in wanted})  # in one order: gradients of shared rows are summed in it
        asked = {text: torch.cat((llava.newline, llava.words(prompt.question(text)))) for text in texts}
        geometry = {text: self._geometry(text) for text in texts}
        readings = []
        for row, watch in wanted:
            # views of their own: so gradients of shared words are summed in this order too, and not in that of the passes
            words = [opening.view_as(opening)] if row.opens else []
            questions = [asked[watch.instruction].view_as(asked[watch.instruction])] * len(row.times)
            readings.append(_Reading(row, watch, geometry[watch.instruction], [*words, *(watch.feature[f] for f in row.frames), *questions]))
        return readings

    def _read(self, readings: Sequence[_Reading], take: Callable[[int, _Read], None]) -> None:
        """Read every row, in passes of rows of like length; `take` is given each row's number and what came out of it, pass by pass."""
        shapes = [one.shape for one in readings]
        for batch in _batches(sorted(range(len(readings)), key=lambda i: shapes[i]), shapes):
            self._pass(readings, batch, take)

    def _pass(self, readings: Sequence[_Reading], batch: Sequence[int], take: Callable[[int, _Read], None]) -> None:
        """As `_read`, of the rows `batch`. What they hold in memory, keys and values above all, is free again when this returns."""
        layouts = {i: layout(readings[i].row, readings[i].geometry, self.llava.device) for i in batch}
        new = max(readings[i].shape[0] for i in batch)
        old = max(readings[i].shape[1] - readings[i].shape[0] for i in batch)
        embedding = pad_sequence([torch.cat(list(readings[i].embeddings)) for i in batch], batch_first=True)
        position, allowed, past = _alike(readings, layouts, batch) or _padded(readings, layouts, batch, new, old)
        hidden, keys = self.llava.read(embedding, allowed, position, past)
        for b, i in enumerate(batch):
            fresh = readings[i].shape[0]
            take(i, _Read(hidden[b, :fresh], keys[:, :, b, :, :fresh], layouts[i]))

    def _pool(self, row: Row, watch: Watch, out: _Read) -> Embedding:
        """Embeddings at the row's questions."""
        geometry = self._geometry(watch.instruction)
        answer = out.hidden[list(out.plain.last)]
        if self.config.pooling == "last":
            return Embedding(answer, answer)
        hidden = out.hidden.float()
        sums = self._frame_sums(row, geometry, hidden)
        pooled = []
        for end, last in zip(row.ends, out.plain.last, strict=True):
            path = row.lineage(end)
            known = 0 if row.opens else 1 + row.depth[path[0]]
            opening = hidden[: geometry.before].sum(0) if row.opens else watch.total[:known].sum(0)
            asked = hidden[last + 1 - geometry.question : last + 1].sum(0)
            tokens = geometry.before + (row.depth[end] + 1) * geometry.frame + geometry.question
            pooled.append((opening + sums[path].sum(0) + asked) / tokens)
        return Embedding(torch.stack(pooled), answer)

    def _frame_sums(self, row: Row, geometry: Geometry, hidden: torch.Tensor) -> torch.Tensor:
        """(frames of the row, width): sums of final hiddens over the tokens of each new frame."""
        start = row.opens * geometry.before
        stop = start + len(row.frames) * geometry.frame
        return hidden[start:stop].view(len(row.frames), geometry.frame, -1).sum(1)

    def _remember(self, row: Row, before: Watch, watch: Watch, out: _Read) -> Watch:
        """`watch`, the successor of `before`, after its last question was read in `row`: what the next question can use, and no more.

        What is new is copied, so that it does not hold a whole batch in memory.
        """
        sampler, limit, time = self.config.sampler, self.config.frames, watch.length - 1
        trunk = trunk_after(sampler, limit, time)
        geometry = self._geometry(watch.instruction)
        path = row.lineage(row.ends[-1])
        reused = min(row.depth[path[0]], len(trunk))
        starts = out.plain.frame_start
        new = [node for node in path if row.depth[node] < len(trunk)]
        known = 0 if row.opens else geometry.before + reused * geometry.frame
        pieces = [watch.past[..., :known, :]]
        if row.opens:
            pieces.append(out.fresh[..., : geometry.before, :])
        pieces += [out.fresh[..., starts[node] : starts[node] + geometry.frame, :] for node in new]
        total = watch.total
        if self.config.pooling == "mean":
            hidden = out.hidden.float()
            opening = hidden[: geometry.before].sum(0, keepdim=True) if row.opens else watch.total[: 1 + reused]
            total = torch.cat((opening, self._frame_sums(row, geometry, hidden)[new]))
        feature = {f: tensor if f in before.feature else tensor.clone() for f, tensor in watch.feature.items() if needed(sampler, time, limit, f)}
        return replace(watch, feature=feature, trunk=trunk, past=torch.cat(pieces, dim=-2), total=total)


def _alike(
    readings: Sequence[_Reading], layouts: Mapping[int, Layout], batch: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Position, visibility (one for all rows) and past of a pass whose rows are laid out alike, as those of a group that grows in step; else None."""
    first = readings[batch[0]]
    if any((readings[i].row, readings[i].geometry) != (first.row, first.geometry) for i in batch):
        return None
    plain, known = layouts[batch[0]], first.row.known(first.geometry)
    return plain.position[None], plain.allowed[None], torch.stack([readings[i].watch.past[..., :known, :] for i in batch], dim=2)


def _padded(
    readings: Sequence[_Reading], layouts: Mapping[int, Layout], batch: Sequence[int], new: int, old: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_alike`, row by row, each with padding behind its old and its new tokens."""
    like = readings[batch[0]].watch.past
    past = like.new_zeros(*like.shape[:2], len(batch), like.shape[2], old, like.shape[4])
    position = torch.zeros(len(batch), new, dtype=torch.int64, device=like.device)
    allowed = torch.zeros(len(batch), new, old + new, dtype=torch.bool, device=like.device)
    allowed[:, range(new), range(old, old + new)] = True  # padding sees itself: a row of nothing but -inf would be nan
    for b, i in enumerate(batch):
        plain = layouts[i]
        fresh, known = plain.allowed.shape[0], plain.allowed.shape[1] - plain.allowed.shape[0]
        past[:, :, b, :, :known] = readings[i].watch.past[..., :known, :]
        position[b, :fresh] = plain.position
        allowed[b, :fresh, :known] = plain.allowed[:, :known]
        allowed[b, :fresh, old : old + fresh] = plain.allowed[:, known:]
    return position, allowed, past


def _batches(order: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Cut `order` (by shape, ascending) where padding would be more than a quarter of a pass, or a pass too large."""
    batches: list[list[int]] = []
    for i in order:
        if batches:
            batch = [*batches[-1], i]
            new, whole = (max(shapes[j][axis] for j in batch) for axis in (0, 1))
            used = sum(shapes[j][0] * shapes[j][1] for j in batch)
            if len(batch) * new <= ROW_TOKENS and 4 * used >= 3 * len(batch) * new * whole:
                batches[-1] = batch
                continue
        batches.append([i])
    return batches
