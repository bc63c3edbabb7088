"""Rows of worldenv-bench engines. Ceiling: the FLOPs of eager's graph at the measured matrix rate, every weight read once.

Each back end of this machine is built, or found where worldenv-engine keeps its plans, compared on recorded inputs, and timed pair by pair against
eager in the same run, in the same type and with the same threads. The last case is a whole rollout of the tiny preset, every network by its engine.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from worldenv import compiled, config, noise, presets
from worldenv.benchmarks import networks
from worldenv.benchmarks.harness import Row, Setting, Variants, Work, ceilings, count_flops, measure, spread
from worldenv.engines import backend
from worldenv.engines.recipe import EngineError, Precision, Range, symbol
from worldenv.engines.store import DEFAULT_STORE, Store
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.policy.processing import PromptTokenizer, Statistics
from worldenv.presets import EVAC, LLAVA_ONEVISION, OPENVLA_OFT
from worldenv.reflector import weights as reflectors
from worldenv.reflector.judge import LlavaReflector, Watching
from worldenv.simulator.evac import Evac

if TYPE_CHECKING:
    from worldenv.benchmarks import bench_rollout

NARROW_EVAC = dataclasses.replace(
    EVAC, unet=dataclasses.replace(EVAC.unet, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2, 1)),
    vae=dataclasses.replace(EVAC.vae, num_res_blocks=1), clip=dataclasses.replace(EVAC.clip, layers=1), height=256, width=256, chunk=8,
)  # fmt: skip
NARROW_OFT = dataclasses.replace(
    OPENVLA_OFT, dino=dataclasses.replace(OPENVLA_OFT.dino, depth=2), siglip=dataclasses.replace(OPENVLA_OFT.siglip, depth=2),
    llama=dataclasses.replace(OPENVLA_OFT.llama, layers=1), head_blocks=1,
)  # fmt: skip
NARROW_LLAVA = dataclasses.replace(LLAVA_ONEVISION, vision_layers=1, layers=1)
"""The published widths, heads and pictures, with as few layers as there can be."""
_INSTRUCTIONS = ("put the bowl on the plate", "open the drawer")
_BRIEFLY = Watching(_INSTRUCTIONS, steps=2, chunk=1)
"""Passes of a few hundred tokens, which a CPU can make at the published widths."""
_SCORES_AGREE = 1e-3
"""Largest difference of a score between rollouts by engines and by eager networks, which must end at the same steps."""


@dataclass(frozen=True)
class Subject:
    """Networks to build engines of, and how to get inputs of a rollout."""

    networks: list[compiled.Network]
    recorded: Callable[[], Mapping[str, Sequence[Any]]]
    """By name of the network."""
    simulator: Evac | None
    frame: torch.Tensor
    """(H, W, 3) uint8, to begin a closed loop with."""


def subject(
    preset: str, size: Literal["preset", "narrow", "published"], of_run: Path | None, device: torch.device, precision: Precision, rows: int = 4
) -> Subject:
    """What the arguments of `worldenv-engine build` name; inputs of `rows` rollouts at once. ValueError for a preset or a run that there is not."""
    if size != "preset":
        return _published(size == "narrow", device, precision)
    from worldenv.benchmarks import bench_rollout  # asks for an environment's packages, which the published sizes do without

    presets.preset(preset)
    if of_run is not None and not (of_run / "run.json").is_file():
        raise ValueError(f"--run {of_run}: no run there (no run.json)")
    args = bench_rollout.RolloutArgs(rollouts=4, group=1, slots=rows, bucket=rows, run=of_run, device=str(device))
    bench = bench_rollout.prepared(args)
    policy, world = bench.replica.policy, bench.replica.world
    assert isinstance(policy, OpenVLAOFT)
    simulator, judge = bench_rollout.inside(world)
    everything = compiled.of_rollout(policy, simulator, judge, bench.watching, precision, rows)

    def recorded() -> Mapping[str, Sequence[Any]]:
        with compiled.recording(everything) as recorders:
            bench_rollout.scheduled(bench, bench.schedule(), bench.jobs)
        return {name: one.recorded for name, one in recorders.items()}

    return Subject(everything, recorded, simulator, torch.from_numpy(bench.jobs[0].context.frame).to(device))


def _published(narrow: bool, device: torch.device, precision: Precision) -> Subject:
    """The published sizes, or their widths, with random weights in the engine's own type; inputs are random too."""
    setting = Setting(device, torch.float32 if precision == "fp32" else torch.bfloat16, "published")
    evac, oft, llava = (NARROW_EVAC, NARROW_OFT, NARROW_LLAVA) if narrow else (EVAC, OPENVLA_OFT, LLAVA_ONEVISION)
    simulator = networks.simulator(evac, setting)
    batch: Range = (1, 1, 4)
    everything = compiled.of_simulator(simulator, precision, batch)
    if narrow:
        everything += compiled.of_policy(random_policy(oft, setting), precision, batch)
        everything += compiled.of_reflector(random_reflector(llava, setting), _BRIEFLY, precision)

    def recorded() -> Mapping[str, Sequence[Any]]:
        return {one.name: [one.recipe.example({}, seed, str(device)) for seed in range(2)] for one in everything}

    return Subject(everything, recorded, None, torch.zeros(evac.height, evac.width, 3, dtype=torch.uint8, device=device))


def fixed(network: compiled.Network, lengths: Mapping[str, int]) -> compiled.Network:
    """`network` for these lengths and no others."""
    inputs = tuple(
        dataclasses.replace(
            one, axes={axis: lengths.get(symbol(axis), n[1]) if isinstance(n, tuple) else n for axis, n in one.axes.items()},
            values=(2, 3) if one.name == "lengths" else one.values,
        )
        for one in network.recipe.inputs
    )  # fmt: skip
    return dataclasses.replace(network, recipe=dataclasses.replace(network.recipe, inputs=inputs, cpu_rows=None))


def _evac(setting: Setting, precision: Precision, which: int, size: tuple[int, int]) -> compiled.Network:
    simulator = networks.simulator(dataclasses.replace(EVAC, height=size[0], width=size[1]), setting)
    return compiled.of_simulator(simulator, precision)[which]


_OFT_HEADS = dataclasses.replace(NARROW_OFT, head_blocks=OPENVLA_OFT.head_blocks)
_LLAVA_EYES, _LLAVA_WORDS = dataclasses.replace(LLAVA_ONEVISION, layers=1), dataclasses.replace(LLAVA_ONEVISION, vision_layers=1)
"""One network at its published size and the others narrow: random weights of billions of parameters take minutes."""


def _oft(setting: Setting, precision: Precision, which: int) -> compiled.Network:
    return compiled.of_policy(random_policy((OPENVLA_OFT, _OFT_HEADS)[which], setting), precision)[which]


def _llava(setting: Setting, precision: Precision, which: int) -> compiled.Network:
    watching = Watching(_INSTRUCTIONS, steps=216, chunk=8)  # a run's, of the preset paper: the passes of a language model differ in length
    return compiled.of_reflector(_kept_reflector((_LLAVA_EYES, _LLAVA_WORDS)[which], setting), watching, precision)[which]


@functools.lru_cache(maxsize=1)
def _kept_reflector(size: config.ReflectorConfig, setting: Setting) -> LlavaReflector:
    return random_reflector(size, setting)


_FRAME, _WORDS = 196, 40
"""Tokens of a frame and about those of a question, at the published size."""
Made = Callable[[Setting, Precision], compiled.Network]
_ONE_SHAPE = "simulator_unet of one shape"
PUBLISHED: dict[str, tuple[Made, Mapping[str, int]]] = {
    **{
        f"{name} {size}": (functools.partial(_evac, which=which, size=pixels), {"batch": 1, "picture": EVAC.chunk})
        for size, pixels in networks.PUBLISHED_SIZES.items()
        for which, name in enumerate(compiled.NAMES[:3])
    },
    _ONE_SHAPE: (functools.partial(_evac, which=0, size=networks.PUBLISHED_SIZES["320x512"]), {"batch": 1}),
    "policy_backbone": (functools.partial(_oft, which=0), {"batch": 8, "prompt": 32}),
    "policy_heads": (functools.partial(_oft, which=1), {"batch": 8}),
    "reflector_vision": (functools.partial(_llava, which=0), {"frame": 8}),
    "reflector_llm prefill": (functools.partial(_llava, which=1), {"row": 1, "new": 16 * _FRAME + _WORDS, "old": 0}),
    "reflector_llm appended": (functools.partial(_llava, which=1), {"row": 1, "new": 8 * (_FRAME + _WORDS), "old": 16 * _FRAME}),
}
"""At the published sizes: how each network is made, with random weights, and the lengths that it is measured at. It is built as a run builds it, for
lengths that vary; `_ONE_SHAPE`, beside that, says what this costs the denoising step at 320x512."""


def _published_case(variant: str, name: str, setting: Setting) -> Row:
    """One network at its published size. Nothing else is in memory."""
    made, lengths = PUBLISHED[variant]
    network = made(setting, "fp32" if setting.dtype == torch.float32 else "bf16")
    network = fixed(network, lengths) if variant == _ONE_SHAPE else network
    given = [network.recipe.example(lengths, seed, str(setting.device)) for seed in range(2)]
    row = _engine_row(network, name, setting, given, _store(setting))
    return dataclasses.replace(row, case=f"engines {variant} {name}")


def random_policy(size: config.PolicyConfig, setting: Setting) -> OpenVLAOFT:
    """With random weights, drawn where they will run: on a CPU, billions of them take minutes. For a vocabulary and statistics that mean nothing."""
    statistics = Statistics.of([torch.randn(8, 7).numpy()], [torch.randn(8, size.proprio).numpy()], "random numbers")
    words, seed = PromptTokenizer.build(_INSTRUCTIONS), noise.torch_seed(0, noise.Stream.WEIGHTS)
    policy = OpenVLAOFT.create(size, words, statistics, seed, setting.device, drawn_on=setting.device)
    network = policy.network.eval().requires_grad_(False)
    for part in (network.vision_backbone, network.projector, network.language_model):
        part.to(setting.dtype)
    return policy


def random_reflector(size: config.ReflectorConfig, setting: Setting) -> LlavaReflector:
    """As `random_policy`."""
    with setting.device:
        judge = reflectors.initialise(size, _INSTRUCTIONS, 0)
    judge.head = reflectors.fresh_head(size, 0)
    judge.freeze().to(setting.device)
    for parameter in judge.llava.parameters():
        parameter.data = parameter.data.to(setting.dtype)
    return judge


def _store(setting: Setting) -> Store:
    """Where worldenv-engine keeps its plans, so that what was built is not built again; a brief run leaves nothing."""
    return Store(Path(tempfile.gettempdir()) / f"worldenv-engines-{os.getpid()}" if setting.brief else DEFAULT_STORE)


def _engine_row(network: compiled.Network, name: str, setting: Setting, recorded: Sequence[Any], store: Store) -> Row:
    """As `_measured`, with what ran without a CUDA graph in its note: that is another speed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        row = _measured(network, name, setting, recorded, store)
    said = dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, RuntimeWarning) and "CUDA graph" in str(one.message))
    return dataclasses.replace(row, note="; ".join(text for text in (row.note, *said) if text))


def _measured(network: compiled.Network, name: str, setting: Setting, recorded: Sequence[Any], store: Store) -> Row:
    """One network by one back end against eager. A row without a speed where parity failed, or where it cannot be built here, which it says."""
    case = f"engines {network.name} {name}"
    try:
        made = compiled.built(network, name, store, setting.device, recorded, timed=False)
    except EngineError as error:
        return Row(case, name, None, "ms", "eager", note=str(error), engine=network.name)
    assert made.parity is not None
    found: dict[str, Any] = {"engine": network.name, "max_rel_error": made.parity.max_rel_error if math.isfinite(made.parity.max_rel_error) else None}
    precision, limit = network.recipe.precision, network.recipe.tolerance
    if not made.parity.passed:
        return Row(case, f"{name} {precision}", None, "ms", "eager", parity="fail", note=made.parity.said, tolerance=limit, **found)
    given = max(recorded, key=lambda one: sum(tensor.numel() for tensor in one))
    engine = backend.Running(made.engine)
    with torch.no_grad():
        taken, eager = measure(setting, lambda: engine(*given), lambda: network.eager(*given))
        flops = count_flops(lambda: network.eager(*given))
    value = statistics.median(taken)
    read = sum(tensor.numel() * tensor.element_size() for tensor in network.eager.parameters())
    least = ceilings(setting).least_ms(Work(flops, read))
    shapes = "rows " + str(given[0].shape[0])
    ratio = statistics.median(b / a for a, b in zip(taken, eager, strict=True))
    return Row(
        case, f"{name} {precision}", value, "ms", "eager", statistics.median(eager), ratio, least, least / value, "pass",
        spread=spread(taken), note=f"{shapes}, {made.parity.said}", tolerance=limit, **found,
    )  # fmt: skip


def _rollout_row(setting: Setting, rows: int) -> Row:
    """Whole rollouts of the tiny preset on the scheduler, `rows` in a batch, each network by what `auto` takes here, against eager: CPU seconds."""
    from worldenv.benchmarks import bench_rollout  # as in `subject`

    count, group = (4, 4) if setting.brief else (16, 8)
    bench = bench_rollout.prepared(bench_rollout.RolloutArgs(rollouts=count, group=group, slots=4 * rows if rows > 1 else 1, bucket=rows))
    choices, eager = bench_rollout.engines(bench, "auto", _store(setting))

    def seconds(chosen: Sequence[compiled.Choice]) -> tuple[float, bench_rollout.Outcome]:
        with compiled.placed(chosen):
            began = time.process_time()
            made = bench_rollout.scheduled(bench, bench.schedule(), bench.jobs)
            return time.process_time() - began, made

    pairs, until = [], time.monotonic() + 4 * setting.seconds
    for number in range(max(3, setting.pairs)):
        if number >= 3 and time.monotonic() > until:
            break
        ours, theirs = (seconds(chosen) for chosen in (choices, eager))
        pairs.append((ours, theirs))
    taken, plain = ([pair[which][0] for pair in pairs] for which in range(2))
    error = bench_rollout.score_error(pairs[0][0][1].rollouts, pairs[0][1][1].rollouts)
    share = {row["stage"]: row["busy_s"] for row in pairs[-1][0][1].statistics["stages"]} if pairs[-1][0][1].statistics else {}
    spent = ", ".join(f"{name} {value / sum(share.values()):.0%}" for name, value in share.items())
    by = ", ".join(sorted({one.engine.back_end for one in choices}))
    return Row(
        f"engines rollout{_of(rows)}", f"auto fp32 ({by})", 1e3 * statistics.median(taken), "ms", "eager", 1e3 * statistics.median(plain),
        statistics.median(b / a for a, b in zip(taken, plain, strict=True)),
        parity="pass" if error is not None and error <= _SCORES_AGREE else "fail",
        spread=spread(taken), note=f"{len(bench.jobs)} rollouts, CPU ms, scores off by {error}; {spent}",
        engine="rollout", max_rel_error=error, tolerance=_SCORES_AGREE,
    )  # fmt: skip


_ROWS = (1, 4)
"""Rollouts at once: one alone, which is where engines gain most, and as many as the preset's batches have."""


def _of(rows: int) -> str:
    return ", one at a time" if rows == 1 else ""


def _case(network_name: str, name: str, rows: int, setting: Setting) -> Row:
    network = next(one for one in _tiny(setting.device, rows).networks if one.name == network_name)
    row = _engine_row(network, name, setting, _recorded(setting.device, rows)[network_name], _store(setting))
    return dataclasses.replace(row, case=f"{row.case}{_of(rows)}")


@functools.lru_cache(maxsize=len(_ROWS))
def _tiny(device: torch.device, rows: int) -> Subject:
    return subject("tiny", "preset", None, device, "fp32", rows)


@functools.lru_cache(maxsize=len(_ROWS))
def _recorded(device: torch.device, rows: int) -> Mapping[str, Sequence[Any]]:
    return _tiny(device, rows).recorded()


def variants(setting: Setting) -> Variants:
    """What `bench_engines.engines` says."""
    kind = setting.device.type
    names = [name for name in dict.fromkeys((*backend.AUTOMATIC[kind], "inductor")) if kind == "cpu" or backend.back_end(name).requires() is None]
    if setting.size == "published":
        return {f"{variant} {name}": functools.partial(_published_case, variant, name, setting) for variant in PUBLISHED for name in names}
    found: dict[str, Callable[[], Row]] = {
        f"{network} {name}{_of(rows)}": functools.partial(_case, network, name, rows, setting)
        for name in names for network in compiled.NAMES for rows in (_ROWS if network == compiled.NAMES[0] else _ROWS[-1:])
    }  # fmt: skip
    if kind == "cpu":
        found |= {f"rollout{_of(rows)}": functools.partial(_rollout_row, setting, rows) for rows in _ROWS}
    return found
