"""simulator_unet: one denoising step of EVAC, for chunks that may each be at another level of noise.

What is constant over the steps (time rows, keys and values of the context) is an input, computed once per chunk outside.
"""

from __future__ import annotations

from worldenv.config import SimulatorConfig, UNetConfig
from worldenv.engines.recipe import Binding, EngineRecipe, Precision, Range

NAME = "simulator_unet"
# Measured (docs/engines.md): float32 differs by rounding of some 400 operations in a row, which random weights do not amplify;
# bf16 by 8 bits of mantissa in each of them. FP8 has 3 bits: it is opt-in, and its limit is what the published quantisers accept.
TOLERANCE = {"fp32": 2e-5, "bf16": 3e-2, "fp8": 1e-1}
LOOP_TOLERANCE = {"fp32": 1e-2, "bf16": 0.5, "fp8": 0.7}
_CPU_VALUES = 2**17
"""Of activations at full height and width, that a CPU's engine has at once: half a megabyte, of which several fit its core's cache."""


def widths(config: UNetConfig) -> tuple[list[int], list[int]]:
    """Channels of every residual block, and of every attention block, in the order of the network."""
    residual: list[int] = []
    attention: list[int] = []
    rate, levels = 1, [mult * config.model_channels for mult in config.channel_mult]
    for level, width in enumerate(levels):
        residual += [width] * config.num_res_blocks
        attention += [width] * config.num_res_blocks if rate in config.attention_resolutions else []
        rate *= 2 if level + 1 < len(levels) else 1
    residual += [levels[-1]] * 2
    attention.append(levels[-1])
    for level in reversed(range(len(levels))):
        residual += [levels[level]] * (config.num_res_blocks + 1)
        attention += [levels[level]] * (config.num_res_blocks + 1) if rate in config.attention_resolutions else []
        rate //= 2 if level else 1
    return residual, attention


def recipe(config: SimulatorConfig, precision: Precision = "fp32", batch: Range = (1, 4, 16)) -> EngineRecipe:
    """For a simulator of this size."""
    latent, unet = config.vae.z_channels, config.unet
    (height, width), frames = config.latent, config.memory + config.chunk
    residual, attention = widths(unet)
    inputs = [
        Binding("x", {"batch": batch, "channel": 3 * latent + 7, "frame": frames, "height": height, "width": width}),
        Binding("memory_row", {"one": 1, "row": sum(residual)}, spread=0.5),
        Binding("chunk_row", {"batch": batch, "row": sum(residual)}, spread=0.5),
    ]
    for number, channels in enumerate(attention):
        tokens = (config.image_resampler if number % 2 else config.action_resampler).queries
        wide = unet.num_head_channels
        axes: dict[str, int | Range] = {"batch": batch, "head": channels // wide, "token": tokens, "channel": wide}
        inputs += [Binding(f"key_{number}", axes, spread=0.5), Binding(f"value_{number}", axes, spread=0.5)]
    rows = max(1, _CPU_VALUES // (frames * height * width * unet.model_channels))
    return EngineRecipe(
        NAME, tuple(inputs), ("v",), TOLERANCE[precision], precision, loop_tolerance=LOOP_TOLERANCE[precision],
        fixed={"memory": config.memory}, cpu_rows=rows,
        wide=("norm", "norm1", "norm2", "norm3", "in_layers.0", "out_layers.0", "conv1.0", "conv2.0", "conv3.0", "conv4.0", "out.0"),
    )  # fmt: skip
