"""How near do the kernels come to the memory's own speed? Ceiling: the bytes that must be read and written, at the rate of a large copy.

On a GPU each kernel is held against its definition, eager and by torch.compile, in the same run, after its numbers agreed with the definition's in
float64. Kernels of few bytes are bound by starting them: their rows have sizes of one rollout step, and of one that fills the GPU.
"maps" is for the CPU: the share of a tiny rollout's time that its action maps take.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from worldenv.benchmarks import harness, networks
from worldenv.benchmarks.bench_chunk_loop import rollout
from worldenv.benchmarks.harness import Agreement, Row, Setting, Variants, Work
from worldenv.engines.recipe import relative_error
from worldenv.kernels import action_map, ddim_step, frames, laplace, philox
from worldenv.kernels.action_map import Brush
from worldenv.noise import Stream
from worldenv.nouns import Camera, StatePath
from worldenv.presets import PRESETS
from worldenv.robots.tabletop import TABLETOP
from worldenv.simulator.schedule import Sampler, latent_scales

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative L2 to the definition: float32 inside, rounded once to the type of the result."""
_LEVELS = 1e-3
"""Of pictures of 256 levels, where a sum may be rounded to the next level."""
_AXES = ((0, 0, 255), (255, 255, 0), (0, 255, 255))


@dataclass(frozen=True)
class Subject:
    """One kernel at one size."""

    ours: Callable[[], Any]
    definition: Callable[[], Any]
    """In the real types."""
    judge: Callable[[], torch.Tensor]
    """The definition in float64, as one flat tensor, like `flat(ours())`."""
    bytes: float
    limit: float


def flat(made: Any) -> torch.Tensor:
    """All tensors of a result as one, in float64."""
    parts = made if isinstance(made, tuple) else (made,)
    return torch.cat([part.detach().double().flatten() for part in parts])


def moved(*tensors: torch.Tensor | None) -> float:
    """Bytes of `tensors`."""
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None))


def _random(setting: Setting) -> Callable[..., torch.Tensor]:
    generator = torch.Generator(setting.device).manual_seed(7)
    return lambda *shape: torch.randn(shape, generator=generator, device=setting.device)


def _philox(setting: Setting, rows: int, shape: Sequence[int]) -> Subject:
    draw = philox.Draw.of(7, range(rows), 0, 0, Stream.SIMULATOR, setting.device)
    host = philox.Draw(draw.words.cpu())
    made = philox.normal(draw, shape)
    return Subject(
        lambda: philox.normal(draw, shape), lambda: philox.fill_ref("normal", host, shape).to(setting.device),
        lambda: flat(philox.fill_ref("normal", host, shape).to(setting.device)), moved(made), 0.0,
    )  # fmt: skip


def _density(setting: Setting, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    normal = _random(setting)
    mu, log_scale = normal(rows, 8, 7).to(dtype), (normal(rows, 8, 7) - 1.0).to(dtype)
    return normal(rows, 8, 7), mu, log_scale


def _draw(setting: Setting, rows: int) -> Subject:
    _, mu, log_scale = _density(setting, rows, setting.dtype)
    draw = philox.Draw.of(7, range(rows), 0, 0, Stream.POLICY, setting.device)
    uniform = philox.fill_ref("uniform", philox.Draw(draw.words.cpu()), mu.shape[1:]).to(setting.device)

    def judged() -> torch.Tensor:
        action = laplace.sample(mu.double(), log_scale.double(), uniform)
        return flat((action, laplace.log_prob_ref(action, mu.double(), log_scale.double())))

    ours = functools.partial(laplace.draw, mu, log_scale, draw)
    return Subject(ours, lambda: laplace.draw_ref(mu, log_scale, uniform), judged, moved(mu, log_scale, *ours()), LIMITS[setting.dtype])


def _log_prob(setting: Setting, rows: int) -> Subject:
    given = _density(setting, rows, setting.dtype)
    leaves = [one.requires_grad_() for one in given[1:]]
    upstream = torch.ones(given[0].shape[:-1], device=setting.device)

    def through(score: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        made = score(given[0], *leaves)
        return (made, *torch.autograd.grad(made, leaves, upstream.to(made.dtype)))

    def judged() -> torch.Tensor:
        wide = [one.detach().double().requires_grad_() for one in leaves]
        made = laplace.log_prob_ref(given[0].double(), *wide)
        return flat((made, *torch.autograd.grad(made, wide, upstream.double())))

    size = 2 * moved(*given) + 2 * moved(upstream) + moved(*leaves)  # read by both passes; scores, upstream, gradients
    return Subject(lambda: through(laplace.log_prob), lambda: through(laplace.log_prob_ref), judged, size, LIMITS[setting.dtype])


def _clipped(setting: Setting, rows: int) -> Subject:
    normal = _random(setting)
    new, old, advantage = 0.2 * normal(rows, 8), 0.2 * normal(rows, 8), normal(rows)
    live = normal(rows, 8) > -1.0
    new.requires_grad_()

    def through(surrogate: Callable[..., laplace.Steps], new: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = surrogate(new, *rest, live, 0.2)
        return (*made, *torch.autograd.grad(made.gain.sum(), new))

    def judged() -> torch.Tensor:
        return flat(through(laplace.clipped_ref, new.detach().double().requires_grad_(), old.double(), advantage.double()))

    ours = functools.partial(through, laplace.clipped, new, old, advantage)
    # gain, slope, ratio, kl, then slope and upstream again, gradient
    return Subject(
        ours, functools.partial(through, laplace.clipped_ref, new, old, advantage), judged,
        moved(new, old, advantage, live, live) + 7 * moved(new), LIMITS[torch.float32],
    )  # fmt: skip


def _ddim(setting: Setting, rows: int, latent: tuple[int, int], guidance: float, counter: bool) -> Subject:
    normal, steps, device = _random(setting), 50 if setting.size == "published" else 5, setting.device
    sampler = Sampler.ddim(steps)
    memory, x = normal(rows, 4, 4, *latent), normal(rows, 4, 20, *latent)
    v, u = (normal(rows, 20, *latent, 4).to(setting.dtype).permute(0, 4, 1, 2, 3) for _ in range(2))  # as the network writes them
    other = None if guidance == 1.0 else u
    index = torch.arange(rows, device=device) % steps
    draws = philox.Draw.of(7, range(rows), 0, 0, Stream.SIMULATOR, device)
    drawn = philox.fill_ref("normal", draws.at(steps - index), (4, 16, *latent)).to(device)
    plain = drawn[:, None].expand(-1, 1 + steps, *drawn.shape[1:]).contiguous()
    table, scales = sampler.table(device), torch.from_numpy(latent_scales()[sampler.timesteps]).to(device, torch.float32)

    def judged() -> torch.Tensor:
        wide = None if other is None else other.double()
        return flat(
            ddim_step.ddim_step_ref(
                x.double(), v.double(), wide, memory.double(), table.double(), scales.double(), index, plain.double(), guidance, 0.7
            )
        )

    size = 3 * moved(drawn) + moved(v[:, :, 4:], memory, memory)  # latents, next latents and foreseen ones, the answer, memory twice
    size += 0.0 if counter else moved(drawn)
    size += 0.0 if other is None else moved(v, other, other[:, :, 4:])  # guidance reads the answers a second time, for their deviations
    source = draws if counter else plain
    return Subject(
        lambda: ddim_step.ddim_step(x, v, other, memory, table, scales, index, source, guidance, 0.7),
        lambda: ddim_step.ddim_step_ref(x, v, other, memory, table, scales, index, plain, guidance, 0.7),
        judged, size, LIMITS[torch.float32] if other is None else LIMITS[setting.dtype],
    )  # fmt: skip


def _paint(setting: Setting, count: int, size: tuple[int, int]) -> Subject:
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, min(size), (count, 2, 4, 2), generator=generator).numpy()
    colours = torch.randint(0, 256, (count, 2, 3), generator=generator).to(torch.uint8).numpy()
    brushes = [Brush(size[0] // 6, max(1, size[0] // 40), _AXES)] * 2
    few, opencv = min(count, 4), functools.partial(action_map.paint_opencv, pixels, colours, brushes, size, 50)

    def ours() -> torch.Tensor:
        return action_map.paint(pixels, colours, brushes, size, 50, setting.device)

    def judged() -> torch.Tensor:
        if setting.device.type == "cpu":
            return flat(opencv())
        made = ours()  # the definition takes its time: a few pictures will do
        made[:few] = action_map.paint_ref(pixels[:few], colours[:few], brushes, size, 50).to(setting.device)
        return flat(made)

    return Subject(ours, lambda: opencv().to(setting.device), judged, moved(ours()), 0.0)


def _for_policy(setting: Setting, count: int, size: tuple[int, int]) -> Subject:
    given = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, device=setting.device)
    args = (given, PRESETS["tiny"].policy.image if setting.size == "tiny" else 224, 0.9, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ours = functools.partial(frames.for_policy, *args)
    judge = functools.partial(frames.for_policy_ref, *args)
    return Subject(ours, judge, lambda: flat(judge()), moved(given, ours()), _LEVELS)


def _for_vae(setting: Setting, count: int, size: tuple[int, int]) -> Subject:
    given = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, device=setting.device)
    ours = functools.partial(frames.for_vae, given, size, torch.float32)
    judge = functools.partial(frames.for_vae_ref, given, size)
    return Subject(ours, lambda: judge(torch.float32), lambda: flat(judge(torch.float64)), moved(given, ours()), LIMITS[torch.float32])


def _for_reflector(setting: Setting, count: int, size: tuple[int, int]) -> Subject:
    given = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, device=setting.device)
    side = 384 if setting.size == "published" else 48
    ours, judge = functools.partial(frames.for_reflector, given, side), functools.partial(frames.for_reflector_ref, given, side)
    return Subject(ours, judge, lambda: flat(judge()), moved(given, ours()), _LEVELS)


def _to_frames(setting: Setting, count: int, size: tuple[int, int]) -> Subject:
    given = _random(setting)(count, *size, 3).permute(0, 3, 1, 2)
    ours = functools.partial(frames.to_frames, given)
    return Subject(ours, lambda: frames.to_frames_ref(given), lambda: flat(frames.to_frames_ref(given)), moved(given, ours()), _LEVELS)


def _measure(name: str, against: str, make: Callable[[], Subject], setting: Setting) -> Row:
    subject = make()
    error = relative_error(flat(subject.ours()), subject.judge())
    baseline = torch.compile(subject.definition) if against == "torch.compile" else subject.definition
    how = "definition, by torch.compile" if against == "torch.compile" else "definition, eager"
    row = harness.compare(name, setting, subject.ours, (how, baseline), Agreement(error, subject.limit), Work(0.0, subject.bytes))
    return replace(row, backend=row.backend.replace("eager", "triton")) if setting.device.type == "cuda" else row


def kernels(setting: Setting) -> Variants:
    """Every kernel at its working sizes, against the definition as it is and, where torch.compile takes it, compiled.

    On a CPU both sides are the definition: that tries the measuring, and measures nothing.
    """
    large = setting.size == "published"
    rows, many = (16, 2**18) if large else (2, 16)
    latent, size, count = ((40, 64), (320, 512), 128) if large else ((8, 8), (64, 64), 4)
    made: dict[str, Callable[[], Subject]] = {
        f"philox normal {rows}x4x16x{latent[0]}x{latent[1]}": functools.partial(_philox, setting, rows, (4, 16, *latent)),
        **{f"laplace draw {n}x8x7": functools.partial(_draw, setting, n) for n in (rows, many)},
        **{f"laplace log_prob with gradients {n}x8x7": functools.partial(_log_prob, setting, n) for n in (rows, many)},
        **{f"laplace surrogate with gradient {n}x8": functools.partial(_clipped, setting, n) for n in (rows, many)},
        f"ddim_step of {rows}": functools.partial(_ddim, setting, rows, latent, 1.0, False),
        f"ddim_step of {rows}, noise by counter": functools.partial(_ddim, setting, rows, latent, 1.0, True),
        f"ddim_step of {rows}, guided": functools.partial(_ddim, setting, rows, latent, 3.0, False),
        f"action_map of {count}": functools.partial(_paint, setting, count, size),
        f"frames to policy, {count}": functools.partial(_for_policy, setting, count, (256, 256) if large else size),
        f"frames to reflector, {count}": functools.partial(_for_reflector, setting, count, size),
        f"frames to vae, {count}": functools.partial(_for_vae, setting, count, size),
        f"frames back, {count}": functools.partial(_to_frames, setting, count, size),
    }
    if importlib.util.find_spec("cv2") is None:
        print("kernels: no action_map, whose baseline is OpenCV's, and that is not installed", file=sys.stderr)
        made = {name: subject for name, subject in made.items() if not name.startswith("action_map")}
    uncompiled = ("philox", "action_map", "frames to policy")  # of the last Dynamo would make the resize's matrices anew at every call
    against = {name: ("eager",) if name.startswith(uncompiled) else ("eager", "torch.compile") for name in made}
    if setting.device.type == "cpu":
        against = dict.fromkeys(made, ("eager",))
    return {
        f"{name} / {how}": functools.partial(_measure, name, how, make, setting)
        for name, make in made.items()
        for how in against[name]
    }


def _camera(height: int, width: int) -> Camera:
    to_world = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)).numpy()
    to_world[2, 3] = 0.8
    focal = 1.2 * height
    return Camera(torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64).numpy(), to_world, height, width)


def _share_of_maps(setting: Setting) -> Row:
    from worldenv import action_map as drawing

    config = PRESETS["tiny"].simulator
    simulator = networks.simulator(config, setting)
    chunks = 4
    frame, maps, noise = networks.rollout_inputs(config, setting, chunks)
    generator = torch.Generator().manual_seed(7)
    place = 0.1 * torch.rand(1, chunks * config.chunk + 1, 3, generator=generator, dtype=torch.float64)
    pose = torch.cat([place, torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64).expand(1, place.shape[1], 4)], dim=-1)
    gripper, camera = torch.rand(1, place.shape[1], generator=generator, dtype=torch.float64), _camera(config.height, config.width)

    def drawn() -> list[torch.Tensor]:
        pictures = []
        for first in range(0, chunks * config.chunk, config.chunk):
            steps = slice(first + 1, first + 1 + config.chunk)
            path = StatePath(pose[:, steps], gripper[:, steps])
            made = drawing.draw(path, (pose[:, first], gripper[:, first]), camera, TABLETOP, config.latent, setting.device)
            pictures.append(made.picture)
        return pictures

    assert len(maps) == len(drawn())
    ours, whole = harness.measure(setting, drawn, lambda: rollout(simulator, frame, maps, noise))
    shares = [a / (a + b) for a, b in zip(ours, whole, strict=True)]
    said = f"maps {statistics.median(ours):.3g} ms, simulator {statistics.median(whole):.4g} ms: {chunks} chunks of {config.chunk}"
    return Row(
        "maps, share of an imagined rollout", harness.backend(setting), 100.0 * statistics.median(shares), "%", spread=harness.spread(shares),
        note=said,
    )  # fmt: skip


def maps(setting: Setting) -> Variants:
    """Which share of a tiny rollout's time drawing its action maps takes; simulator and maps alone, so that the true share is smaller."""
    return {"share": functools.partial(_share_of_maps, setting)}
