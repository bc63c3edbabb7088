"""Videos for the page: imagined beside true, and above them, where no player's controls lie, what the reflector said and what was so."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from worldenv.config import ReflectorConfig

FPS = 10
"""Pictures per second: half the control rate, so that a person can follow."""
_SIDE = 256
"""Frames are enlarged by the largest whole factor that keeps them within this [px]: 4 at 64."""
_GAP = 8
_STRIP = 36
# A dark strip, as players have one: it stands on a light page and on a dark one.
_PAPER = (22, 25, 31)
_INK = (140, 148, 160)
_DIM = (58, 64, 75)
_SCORE = (96, 160, 255)
_ABOVE = (255, 150, 70)
_TRUE = (70, 200, 120)


@dataclass(frozen=True)
class Video:
    """T frames of one rollout."""

    title: str
    caption: str
    imagined: NDArray[np.uint8]
    """(T, H, W, 3)."""
    true: NDArray[np.uint8] | None = None
    """(T, H, W, 3): the same actions in the true environment."""
    scores: NDArray[np.floating] | None = None
    """(T,) in [0, 1]: the reflector after each imagined frame."""
    success: NDArray[np.bool_] | None = None
    """(T,): the predicate after each true frame."""
    threshold: float = ReflectorConfig.threshold
    """A score above it ends a rollout; a dotted line in the strip."""

    def __post_init__(self) -> None:
        frames = self.imagined
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise ValueError(f"Video {self.title!r}: imagined {frames.shape} {frames.dtype}, want (T, H, W, 3) uint8")
        if self.true is not None and (self.true.shape != frames.shape or self.true.dtype != np.uint8):
            raise ValueError(f"Video {self.title!r}: true {self.true.shape} {self.true.dtype}, want {frames.shape} uint8 as imagined")
        for name in ("scores", "success"):
            line = getattr(self, name)
            if line is not None and line.shape != frames.shape[:1]:
                raise ValueError(f"Video {self.title!r}: {name} {line.shape}, want ({len(frames)},), one for each frame")
        if self.scores is not None and not (np.isfinite(self.scores).all() and (self.scores >= 0).all() and (self.scores <= 1).all()):
            raise ValueError(f"Video {self.title!r}: scores outside 0 .. 1")


@dataclass(frozen=True)
class Clip:
    """An encoded video."""

    title: str
    caption: str
    frames: int
    has_true: bool
    """Two pictures side by side, imagined left and true right; else imagined alone."""
    has_strip: bool
    """Scores or successes are drawn above the pictures."""
    mp4: bytes
    """H.264 in MP4."""
    size: tuple[int, int]
    """Width, height [px]."""


def _strip(video: Video, now: int, width: int) -> NDArray[np.uint8]:
    """(_STRIP, width, 3): a column per frame as high as its score, the threshold as a line, a mark where success held; later is dim."""
    strip = np.full((_STRIP, width, 3), _PAPER, np.uint8)
    floor, top = _STRIP - 8, 2  # the score spans these rows, success lies below
    edges = np.linspace(0, width, len(video.imagined) + 1).round().astype(int)
    for t, (left, right) in enumerate(pairwise(edges.tolist())):
        inside = slice(left, max(right - 1, left + 1))
        if video.scores is not None:
            score = float(video.scores[t])
            colour = _DIM if t > now else _ABOVE if score > video.threshold else _SCORE
            strip[floor - max(round(score * (floor - top)), 1) : floor, inside] = colour
        if video.success is not None and video.success[t]:
            strip[floor + 2 : floor + 6, inside] = _DIM if t > now else _TRUE
    if video.scores is not None:
        strip[floor - round(video.threshold * (floor - top)), ::2] = _INK
    return strip


def side_by_side(views: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """`views` (H, W, 3) uint8 enlarged by the largest whole factor that suits them, one beside the other: (height, width, 3)."""
    factor = max(1, _SIDE // max(views[0].shape[:2]))
    gap = np.full((views[0].shape[0] * factor, _GAP, 3), _PAPER, np.uint8)
    parts = [part for view in views for part in (gap, view.repeat(factor, axis=0).repeat(factor, axis=1))]
    return np.concatenate(parts[1:], axis=1)


def picture(video: Video, t: int) -> NDArray[np.uint8]:
    """Frame `t` as it is shown: (height, width, 3) uint8, both sides even, as 4:2:0 video needs."""
    whole = side_by_side([video.imagined[t]] if video.true is None else [video.imagined[t], video.true[t]])
    if video.scores is not None or video.success is not None:
        whole = np.concatenate([_strip(video, t, whole.shape[1]), np.full((4, whole.shape[1], 3), _PAPER, np.uint8), whole])
    return even(whole)


def even(whole: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`whole` (height, width, 3) with its last row or column again where a side is odd."""
    return np.pad(whole, (*((0, side % 2) for side in whole.shape[:2]), (0, 0)), mode="edge")


def write_mp4(target: BinaryIO | Path, pictures: Iterable[NDArray[np.uint8]], fps: int = FPS) -> tuple[int, int, int]:
    """Encode `pictures` (height, width, 3) uint8, all of one even size and at least one, as H.264 in MP4, one at a time.

    Returns how many there were, their width and height [px]. Raises ValueError where this build of FFmpeg has no H.264 encoder.
    """
    import av  # FFmpeg whole, which a run needs for its videos alone

    if "libx264" not in av.codecs_available:
        raise ValueError("videos need FFmpeg with libx264; the av wheels have it: pip install --force-reinstall --only-binary=av av")
    count, size, stream = 0, (0, 0), None
    with av.open(target if isinstance(target, io.IOBase) else str(target), "w", format="mp4") as container:
        for one in pictures:
            if stream is None:
                # One thread, no mbtree (it reads memory that nothing wrote) and no B-frames: the same frames give the same bytes, and every
                # player shows the first frame at time 0.
                options = {"crf": "20", "preset": "slow", "threads": "1", "bf": "0", "x264-params": "mbtree=0"}
                stream = container.add_stream("libx264", rate=fps, options=options)
                stream.height, stream.width = one.shape[:2]
                stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, fps)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(one, format="rgb24")))
            count, size = count + 1, (one.shape[1], one.shape[0])
        if stream is None:
            raise ValueError("a video of no pictures")
        container.mux(stream.encode())
    return count, *size


def encode(video: Video) -> Clip:
    """The video as H.264 in MP4, T frames at 10 per second. Raises ValueError as `write_mp4` does."""
    memory = io.BytesIO()
    count, width, height = write_mp4(memory, (picture(video, t) for t in range(len(video.imagined))))
    has_strip = video.scores is not None or video.success is not None
    return Clip(video.title, video.caption, count, video.true is not None, has_strip, memory.getvalue(), (width, height))
