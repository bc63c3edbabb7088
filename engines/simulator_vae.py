"""simulator_vae: the two graphs of EVAC's autoencoder. One picture is one row, of whichever rollout and time."""

from __future__ import annotations

from worldenv.config import SimulatorConfig
from worldenv.engines.recipe import Binding, EngineRecipe, Precision, Range

ENCODER, DECODER = "simulator_vae_encoder", "simulator_vae_decoder"
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2, "fp8": 5e-2}
"""Of FP8 recipes only the U-Net is quantised: the autoencoder then stays in bfloat16. At the published widths two ways to compute it in
bfloat16 are 0.029 apart, each 0.027 from float32."""
_CPU_PIXELS = 2**15
"""Of the pictures that a CPU's engine takes at once (docs/performance.md)."""
LOOP_TOLERANCE = {"fp32": 1e-2, "bf16": 0.5, "fp8": 0.7}


def recipes(config: SimulatorConfig, precision: Precision = "fp32", pictures: Range = (1, 32, 32)) -> tuple[EngineRecipe, EngineRecipe]:
    """Encoder (pictures to mean and log-variance) and decoder (latents to pictures) for a simulator of this size."""
    kept: Precision = "bf16" if precision == "fp8" else precision
    (height, width), channels = config.latent, config.vae.z_channels
    seen = Binding("pictures", {"picture": pictures, "colour": 3, "height": config.height, "width": config.width}, spread=0.5)
    latents = Binding("latents", {"picture": pictures, "channel": channels, "height": height, "width": width})
    limits = (TOLERANCE[precision], kept)
    loop, rows = LOOP_TOLERANCE[precision], max(1, _CPU_PIXELS // (config.height * config.width))
    norms = ("norm", "norm1", "norm2", "norm_out")
    return (
        EngineRecipe(ENCODER, (seen,), ("mean", "logvar"), *limits, loop_tolerance=loop, wide=norms, cpu_rows=rows),
        EngineRecipe(DECODER, (latents,), ("pictures",), *limits, loop_tolerance=loop, wide=norms, cpu_rows=rows),
    )
