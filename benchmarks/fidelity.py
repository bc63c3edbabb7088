"""Does the simulator foresee what moves? Imagined against true on held-out exploration, over the pixels that move, chunk by chunk.

    python -m benchmarks.fidelity --run RUN [--without-maps RUN2 ...] [--without-extra-data RUN3 ...]

Every held-out episode's commands are imagined from its first true frame, the only one that is given. Ceiling: true frames as the simulator's
autoencoder draws them, since imagined frames are decoded by it. Floor: the given frame, copied. Beside it, as a harder opponent that no rollout
has, the true frame just before each chunk, copied. An episode's moving pixels are those whose brightest and darkest true value, over the whole
episode and in any colour, differ by more than a threshold, and every pixel within a few pixels of these.

Results of the other runs are for the same episodes, which none of the simulators was trained on: the runs must share their exploration.
Also writes the picture strip of the paper's Figure 4: one episode, true and imagined by each simulator, under the same commands.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from worldenv import audit, checkpoint, config, report
from worldenv.cli.arguments import parse
from worldenv.cli.ending import Ending
from worldenv.data.episode import Episode
from worldenv.run import Run, settings_of
from worldenv.stages.desk import Desk

OURS, NO_MAPS, NO_EXTRA = "simulator", "without action maps", "without extra data"
COPY, COPY_BEFORE, CEILING = "copy of the given frame", "copy of the true frame before", "autoencoder (ceiling)"
_Z95 = 1.96
_ENLARGED, _MARGIN, _HEAD, _GAP = 2, 150, 22, 2
_PAPER, _INK = 255, (30, 30, 30)

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class FidelityArgs:
    """How well a run's simulator foresees what moves, on its held-out exploration."""

    run: Path | None = None
    """Folder of the run whose simulator is measured."""
    without_maps: tuple[Path, ...] = ()
    """Runs that differ in --simulator.no-action-maps alone."""
    without_extra_data: tuple[Path, ...] = ()
    """Runs that differ in --no-extra-data alone."""
    threshold: int = 16
    """A pixel moves where its values over the episode differ by more than this [levels of 0 .. 255]."""
    dilation: int = 2
    """Pixels within this of a moving one count as moving [px]."""
    episode: int | None = None
    """Held-out episode of the picture strip; None: of those that fail, the one with the most moving pixels."""
    out: Path | None = None
    """Folder for fidelity.json and strip.png; None: RUN/fidelity."""


def moving(frames: Frames, threshold: int, dilation: int) -> NDArray[np.bool_]:
    """(H, W): the pixels of an episode's true `frames` (T + 1, H, W, 3) that move, dilated by a square."""
    spread = (frames.max(axis=0) - frames.min(axis=0)).max(axis=-1) > threshold
    side = 2 * dilation + 1
    grown: NDArray[np.bool_] = cv2.dilate(spread.astype(np.uint8), np.ones((side, side), np.uint8)).astype(bool)
    return grown


def psnr_table(drawn: Sequence[Frames], episodes: Sequence[Episode], masks: Sequence[NDArray[np.bool_]], chunk: int) -> NDArray[np.float64]:
    """(E, chunks) PSNR [dB] of `drawn` (T, H, W, 3) against what followed each episode's first frame, over the pixels of its mask."""
    rows = []
    for ours, episode, mask in zip(drawn, episodes, masks, strict=True):
        starts = range(0, episode.steps, chunk)
        rows.append([audit.psnr(ours[s : s + chunk][:, mask], episode.frame[1 + s : 1 + s + chunk][:, mask]) for s in starts])
    return np.array(rows)


def paired(ours: NDArray[np.float64], other: NDArray[np.float64]) -> list[list[float]]:
    """For each chunk, mean over episodes of `ours` - `other` (E, chunks) and its normal 95 % interval [dB]."""
    difference = ours - other
    mean, error = difference.mean(0), _Z95 * difference.std(0, ddof=1) / np.sqrt(len(difference))
    return [[float(m), float(m - e), float(m + e)] for m, e in zip(mean, error, strict=True)]


def _desk(folder: Path) -> Desk:
    return Desk(Run(folder, settings_of(folder), leads=False))


def _variant(folder: Path, main: Desk, allowed: Mapping[str, Any]) -> Desk:
    """The run in `folder`. Raises ValueError unless it differs from `main` in the settings `allowed` alone, and has explored the same."""
    desk = _desk(folder)
    theirs, ours = (
        {f"{section}.{name}": value for section in ("simulator", "world", "env") for name, value in config.to_dict(d.settings)[section].items()}
        for d in (desk, main)
    )
    differing = {name for name in ours if theirs[name] != ours[name]}
    if differing != allowed.keys() or any(theirs[name] != value for name, value in allowed.items()):
        told, found = ", ".join(f"{name}={value}" for name, value in allowed.items()), ", ".join(sorted(differing)) or "nothing"
        raise ValueError(f"{folder}: settings differ from {main.run.out} in {found}; want {told} and nothing else")
    if desk.run.record("explore")["output"] != main.run.record("explore")["output"]:
        raise ValueError(f"{folder}: explored otherwise, so it may have been trained on what is held out here; make it with --reuse {main.run.out}")
    return desk


def _named(kind: str, folders: Sequence[Path]) -> list[tuple[str, Path]]:
    return [(kind if len(folders) == 1 else f"{kind}: {folder}", folder) for folder in folders]


def strip(rows: Mapping[str, Frames], title: str, times: Sequence[int]) -> Frames:
    """A picture: a row for each of `rows`, name -> frames (T + 1, H, W, 3), and a column for each of `times`."""
    height, width = (side * _ENLARGED for side in next(iter(rows.values())).shape[1:3])
    canvas = np.full((2 * _HEAD + len(rows) * (height + _GAP), _MARGIN + len(times) * (width + _GAP), 3), _PAPER, np.uint8)

    def write(text: str, x: int, y: int) -> None:
        cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.42, _INK, 1, cv2.LINE_AA)

    write(title, 4, _HEAD - 7)
    for j, t in enumerate(times):
        write(f"step {t}", _MARGIN + j * (width + _GAP) + 4, 2 * _HEAD - 7)
    for i, (name, frames) in enumerate(rows.items()):
        top = 2 * _HEAD + i * (height + _GAP)
        write(name, 4, top + height // 2)
        for j, t in enumerate(times):
            left = _MARGIN + j * (width + _GAP)
            canvas[top : top + height, left : left + width] = frames[t].repeat(_ENLARGED, axis=0).repeat(_ENLARGED, axis=1)
    return canvas


def _chosen(wanted: int | None, episodes: Sequence[Episode], masks: Sequence[NDArray[np.bool_]]) -> int:
    if wanted is not None:
        if not 0 <= wanted < len(episodes):
            raise ValueError(f"--episode {wanted}: there are {len(episodes)} held-out episodes, 0 .. {len(episodes) - 1}")
        return wanted
    failed = [i for i, e in enumerate(episodes) if e.first_success is None] or list(range(len(episodes)))
    return max(failed, key=lambda i: int(masks[i].sum()))


def measure(args: FidelityArgs) -> dict[str, Any]:
    """What the module says, JSON-ready; writes the strip. Raises ValueError where runs, settings or episodes do not fit."""
    if args.run is None:
        raise ValueError("give --run RUN, a folder whose stage world is done")
    main = _desk(args.run)
    chunk, batch, reconstruct = main.settings.policy.chunk, main.settings.loop.slots, main.simulator().reconstruct
    desks = {OURS: main}
    for kind, folders, allowed in (
        (NO_MAPS, args.without_maps, {"simulator.action_maps": False}),
        (NO_EXTRA, args.without_extra_data, {"world.extra_data": False}),
    ):
        desks |= {name: _variant(folder, main, allowed) for name, folder in _named(kind, folders)}
    episodes = main.explored[1]
    masks = [moving(e.frame, args.threshold, args.dilation) for e in episodes]
    still = sum(not mask.any() for mask in masks)
    kept = [(e, mask) for e, mask in zip(episodes, masks, strict=True) if mask.any()]
    if len(kept) < 2:
        raise ValueError(f"{len(kept)} of {len(episodes)} held-out episodes move by more than --threshold {args.threshold} levels; want 2 or more")
    episodes, masks = [e for e, _ in kept], [mask for _, mask in kept]
    drawn: dict[str, list[Frames]] = {}
    for name, desk in desks.items():
        drawn[name] = [frames[1:] for frames in audit.imagine_episodes([desk.world(None, desk.simulator())], episodes, batch, chunk, name)]
    pictures: dict[str, Sequence[Frames]] = {
        **drawn,
        COPY: [np.broadcast_to(e.frame[:1], e.frame[1:].shape) for e in episodes],
        COPY_BEFORE: [e.frame[np.arange(e.steps) // chunk * chunk] for e in episodes],
        CEILING: [reconstruct(torch.from_numpy(e.frame[1:]).to(main.device)).cpu().numpy() for e in episodes],
    }
    everywhere = [np.ones_like(mask) for mask in masks]
    tables = {name: psnr_table(frames, episodes, masks, chunk) for name, frames in pictures.items()}
    whole = {name: psnr_table(frames, episodes, everywhere, chunk) for name, frames in pictures.items()}
    others = [name for name in pictures if name not in (OURS, CEILING)]
    number = _chosen(args.episode, episodes, masks)
    shown = {"true": episodes[number].frame, **{name: np.concatenate([episodes[number].frame[:1], frames[number]]) for name, frames in drawn.items()}}
    picture = strip(shown, f"held-out episode {number}: {episodes[number].instruction}", range(0, episodes[number].steps + 1, chunk // 2))
    out = args.out or args.run / "fidelity"
    encoded = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
    with checkpoint.atomic(out / "strip.png") as temporary:
        temporary.write_bytes(encoded)
    result = {
        "run": str(args.run),
        "fast": main.settings.fast,
        "episodes": len(episodes),
        "episodes_without_motion": still,
        "chunk": chunk,
        "mask": {"threshold_levels": args.threshold, "dilation_px": args.dilation, "share_of_pixels": float(np.mean([m.mean() for m in masks]))},
        "psnr_moving_db": {name: table.mean(0).tolist() for name, table in tables.items()},
        "psnr_whole_db": {name: table.mean(0).tolist() for name, table in whole.items()},
        "moving_advantage_over_db": {name: paired(tables[OURS], tables[name]) for name in others},
        "beats_at_every_chunk": {name: bool((tables[OURS].mean(0) > tables[name].mean(0)).all()) for name in others},
        "strip": {"file": str(out / "strip.png"), "episode": number, "instruction": episodes[number].instruction},
        "runs": {name: str(desk.run.out) for name, desk in desks.items()},
        "versions": report.versions(main.env.versions()["renderer"]),
        "commit": report.commit(),
    }
    checkpoint.write_text(out / "fidelity.json", json.dumps(result, indent=1))
    return result


def _print(result: dict[str, Any]) -> None:
    for title, key in (("pixels that move", "psnr_moving_db"), ("all pixels", "psnr_whole_db")):
        chunks = len(next(iter(result[key].values())))
        print(f"PSNR [dB], {title}, {result['episodes']} held-out episodes; chunk".ljust(62), *(f"{c + 1:7}" for c in range(chunks)))
        for name, values in result[key].items():
            print(f"  {name:60}", *(f"{value:7.2f}" for value in values))
    for name, rows in result["moving_advantage_over_db"].items():
        print(f"  better than {name} by (95 %)".ljust(62), *(f"{m:+.2f} ({low:+.2f} .. {high:+.2f})" for m, low, high in rows))
    if result["fast"]:
        print("a --fast run: these figures say nothing about what the simulator can learn")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 2 where the arguments or the runs are no good."""
    with Ending("benchmarks.fidelity") as ending:
        result = measure(parse("benchmarks.fidelity", FidelityArgs, FidelityArgs(), sys.argv[1:] if argv is None else argv))
        _print(result)
        print(json.dumps(result))
    return ending.code


if __name__ == "__main__":
    raise SystemExit(main())
