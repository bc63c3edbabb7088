"""Every knob of a run, frozen, with its unit. A default lives here and nowhere else; values by name: worldenv.presets.

`worldenv-train` builds its flags from these classes, so a field's docstring is its help text.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Want:
    """What a number must be."""

    words: str
    holds: Callable[[float], bool]


Count = Annotated[int, _Want("want at least 1", lambda n: n >= 1)]
Positive = Annotated[float, _Want("want more than 0", lambda x: x > 0)]
Share = Annotated[float, _Want("a share, want 0 .. 1", lambda x: 0 <= x <= 1)]
Decay = Annotated[float, _Want("want at least 0 and less than 1", lambda x: 0 <= x < 1)]
Signed = Annotated[float, _Want("want a number", lambda x: True)]
_USUAL = _Want("want at least 0", lambda x: x >= 0)
"""Of a number whose field says nothing else."""


def _wanted(hint: Any) -> _Want:
    """What the annotation `hint` of a field asks of each number in it."""
    if typing.get_origin(hint) is Annotated:
        return next(one for one in hint.__metadata__ if isinstance(one, _Want))
    return next((found for part in typing.get_args(hint) if (found := _wanted(part)) is not _USUAL), _USUAL)


@functools.cache
def _wants(kind: type) -> dict[str, _Want]:
    return {name: _wanted(hint) for name, hint in typing.get_type_hints(kind, include_extras=True).items()}


def _check_numbers(config: Any, path: str = "") -> None:
    """Raise ValueError that names the first number anywhere in `config`, the section at `path`, that is not finite or not what its field wants."""
    for entry in dataclasses.fields(config):
        name, given = f"{path}{entry.name}", getattr(config, entry.name)
        if dataclasses.is_dataclass(given):
            _check_numbers(given, f"{name}.")
        for value in given if isinstance(given, tuple) else (given,):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise ValueError(f"{name}={given}: want a finite number")
            if not (want := _wants(config.__class__)[entry.name]).holds(value):
                raise ValueError(f"{name}={given}: {want.words}")


def _want_multiple(name: str, given: int, of: str, part: int) -> None:
    """ValueError that names both where `given`, the setting `name`, is no multiple of `part`, the setting `of`."""
    if given % part:
        raise ValueError(f"{name}={given}: want a multiple of {of}={part}")


LIBERO_TEST_STATES = 50
"""Initial states per task that LIBERO publishes; there are no others to evaluate on."""


def tasks_of(environment: str) -> int:
    """How many tasks the tabletop has, or a suite of LIBERO."""
    return 3 if environment == "tabletop" else 10


_OF_RECORDED = {"recordings": "where its demonstrations lie", "robot": "whose they are"}


@dataclass(frozen=True)
class EnvConfig:
    """The true environment, or what a robot was recorded doing in its place."""

    name: Literal["tabletop", "libero_spatial", "libero_object", "libero_goal", "libero_10", "recorded"] = "tabletop"
    """Which environment: the embedded one, a suite of LIBERO (docs/libero.md), or none but recordings of a robot (docs/own-robot.md)."""
    recordings: str = ""
    """With recorded: folder of demonstrations, episodes in our format: they say which tasks there are, in the order in which they first appear."""
    robot: str = ""
    """With recorded: whose they are: agibot_g1, panda, tabletop, or a .json file that describes a robot."""
    tasks: tuple[int, ...] = ()
    """Which of its tasks, by their numbers there; none: all. They must share a camera, as the tasks of libero_spatial do."""
    image: Count = 64
    """Side of the square camera picture [px]."""
    steps: Count = 32
    """Step limit of an episode [control steps at 20 Hz]."""
    jitter_m: float = 0.03
    """Initial objects lie within this distance of their nominal places, per axis [m]."""
    train_states: Count = 50
    """Fixed initial states per task for demonstrations, exploration and LOOP."""
    test_states: Count = 200
    """Fixed initial states per task for evaluation only, disjoint from the others. In LIBERO want 50, those that it publishes."""

    def __post_init__(self) -> None:
        _check_numbers(self, "env.")
        for name in ("recordings", "robot"):
            given = getattr(self, name)
            if self.recorded and not given:
                raise ValueError(f"env.name=recorded without env.{name}: say {_OF_RECORDED[name]} (--env.{name}; docs/own-robot.md)")
            if given and not self.recorded:
                raise ValueError(f"env.{name}={given!r}: {self.name} has its own; leave it out, or choose --env.name recorded")
        if self.recorded:
            return  # only the recordings say how many tasks there are
        there = tasks_of(self.name)
        if len(set(self.tasks)) < len(self.tasks) or max(self.tasks, default=0) >= there:
            raise ValueError(f"env.tasks={self.tasks}: want different numbers, 0 .. {there - 1}: {self.name} has {there} tasks")
        if self.name != "tabletop" and self.test_states != LIBERO_TEST_STATES:
            raise ValueError(f"env.test_states={self.test_states}: {self.name} has the {LIBERO_TEST_STATES} that LIBERO publishes; set it to that")

    @property
    def recorded(self) -> bool:
        """There is no environment to act in."""
        return self.name == "recorded"

    @property
    def test_starts(self) -> int:
        """Test states of all the tasks of an environment."""
        return (len(self.tasks) or tasks_of(self.name)) * self.test_states


@dataclass(frozen=True)
class VisionConfig:
    """One vision transformer tower."""

    width: Count
    """Channels of a token."""
    depth: Count
    """Blocks in the checkpoint; the last is never run (features come from the second-to-last)."""
    heads: Count
    """Attention heads."""
    mlp: Count
    """Hidden channels of a block's MLP."""
    patch: Count
    """Side of a patch [px]."""
    registers: int = 0
    """Register tokens after the class token (DINOv2); a tower with registers has LayerScale and a class token."""


@dataclass(frozen=True)
class LlamaConfig:
    """The policy's language model."""

    width: Count
    """Channels of a token."""
    layers: Count
    """Decoder layers."""
    heads: Count
    """Attention heads."""
    ffn: Count
    """Hidden channels of the gated MLP."""
    vocab: Count
    """Rows of the embedding table."""
    kv_heads: Count | None = None
    """Key/value heads; None: as many as `heads` (Llama-2-7B)."""
    rms_eps: float = 1e-6
    """RMSNorm epsilon (OpenVLA's conversion: 1e-6, not Llama-2's 1e-5)."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""

    def __post_init__(self) -> None:
        _check_numbers(self, "policy.llama.")
        _want_multiple("policy.llama.width", self.width, "policy.llama.heads", self.heads)
        _want_multiple("policy.llama.heads", self.heads, "policy.llama.kv_heads", self.kv_heads or self.heads)
        if self.width // self.heads % 2:
            raise ValueError(f"policy.llama.heads={self.heads} of {self.width // self.heads} channels each: want an even number of them")


@dataclass(frozen=True)
class PolicyConfig:
    """OpenVLA-OFT: two vision towers, projector, Llama, and what reads actions off its hiddens."""

    image: Count
    """Side of the picture that the towers see [px]."""
    dino: VisionConfig
    """First tower (DINOv2 with registers)."""
    siglip: VisionConfig
    """Second tower (SigLIP)."""
    llama: LlamaConfig
    """Language model."""
    head_width: Count
    """Hidden channels of both MLPResNet heads."""
    head: Literal["laplace", "tokens"] = "laplace"
    """How actions are read off: L1 head and scale head, a Laplace density (the paper); or OpenVLA's tokens, 256 bins per dimension by the language
    model's output layer, fine-tuned by cross-entropy: a baseline, which ends with stage sft."""
    chunk: Count = 8
    """Actions per query (K), executed open loop."""
    proprio: Count = 8
    """Proprioceptive values (P)."""
    images: int = 1
    """Camera views per query."""
    head_blocks: int = 2
    """Residual blocks of both heads."""
    scale_form: Literal["mlp", "trunk"] = "mlp"
    """Scale head: the L1 head's architecture (paper), or RIPT-VLA's trunk with one more linear layer."""
    jpeg: bool = True
    """Send pictures through JPEG before resizing, as the published training data went; off where the policy is trained from scratch here."""
    crop_area: Annotated[float, _Want("a share that is kept, want more than 0, at most 1", lambda x: 0 < x <= 1)] = 0.9
    """Share of the picture that the centre crop keeps (its counterpart in training: a random crop); 1 keeps all."""
    attention: Literal["full", "prefix_lm"] = "full"
    """Who sees the action slots: everyone (OpenVLA-OFT), or the slots alone (RIPT-VLA: cheaper gradients, another function)."""
    scale_factor: Positive = 1.0
    """Factor on the Laplace scale, inside the density (1 is the paper); of tokens, the softmax's temperature."""
    scale_floor: float = 0.02
    """Least Laplace scale before the factor [normalised action]; 0 is the paper. Idle dimensions fit a scale near 0."""
    scale_ceiling: Positive | None = None
    """Greatest Laplace scale before the factor [normalised action]; None, no limit, is the paper."""
    dino_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """What DINOv2's pixels in [0, 1] are reduced by: ImageNet's means; published checkpoints have them rounded to bfloat16."""
    dino_std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """And then divided by."""

    def __post_init__(self) -> None:
        _check_numbers(self, "policy.")
        if self.images not in (1, 2):
            raise ValueError(f"policy.images={self.images}: want 1 or 2 views")
        if self.scale_ceiling is not None and self.scale_ceiling <= self.scale_floor:
            raise ValueError(f"policy.scale_ceiling={self.scale_ceiling}: want more than policy.scale_floor={self.scale_floor}")
        for name, tower in (("policy.dino", self.dino), ("policy.siglip", self.siglip)):
            _want_multiple(f"{name}.width", tower.width, f"{name}.heads", tower.heads)
            _want_multiple("policy.image", self.image, f"{name}.patch", tower.patch)
            if tower.depth < 2:
                raise ValueError(f"{name}.depth={tower.depth}: want at least 2, since the last block is never run")
        if self.dino.patch != self.siglip.patch:
            given = f"policy.dino.patch={self.dino.patch}, policy.siglip.patch={self.siglip.patch}"
            raise ValueError(f"{given}: features are joined by patch; make them equal")

    def want_laplace(self, who: str) -> None:
        """ValueError that names `who`, which works with the Laplace density, where there is none."""
        if self.head != "laplace":
            raise ValueError(
                f"policy.head={self.head}: {who} needs the Laplace density, which this head has not; set policy.head to laplace, or stop after "
                "stage sft (--until sft)"
            )


@dataclass(frozen=True)
class UNetConfig:
    """EVAC's denoising network."""

    model_channels: Count
    """Base width; at least 64, since GroupNorm(32) over 32 channels cancels time and biases."""
    channel_mult: tuple[Count, ...]
    """Width of each level, in units of `model_channels`."""
    num_res_blocks: Count
    """Residual blocks per level."""
    attention_resolutions: tuple[Count, ...]
    """Downsampling rates whose levels have attention."""
    num_head_channels: Count
    """Channels per attention head."""
    context_dim: Count
    """Channels of image and action tokens."""
    init_heads: Count = 8
    """Heads of the temporal block behind the first convolution; it is `init_heads * num_head_channels` wide inside."""
    dropout: Share = 0.0
    """Share of channels dropped in residual blocks while training (the released model: 0.1)."""
    domains: Count = 30
    """Rows of the domain embedding."""

    def __post_init__(self) -> None:
        _check_numbers(self, "simulator.unet.")
        if self.model_channels < 64 or self.model_channels % 32:
            why = "at 32 GroupNorm(32) cancels the time embedding; use 64 or more, a multiple of 32"
            raise ValueError(f"simulator.unet.model_channels={self.model_channels}: {why}")
        if not self.channel_mult:
            raise ValueError("simulator.unet.channel_mult=(): want at least one level")
        for mult in self.channel_mult:
            level = f"simulator.unet.channel_mult={self.channel_mult}: a level's channels"
            _want_multiple(level, self.model_channels * mult, "simulator.unet.num_head_channels", self.num_head_channels)


@dataclass(frozen=True)
class VAEConfig:
    """The latent autoencoder (SD type, KL)."""

    channels: Count
    """Base width."""
    channel_mult: tuple[Count, ...]
    """Width of each level, in units of `channels`; n levels shrink the picture by 2^(n-1)."""
    num_res_blocks: Count
    """Residual blocks per level."""
    z_channels: Count
    """Latent channels."""
    norm_groups: Count = 32
    """Groups of its GroupNorms."""

    def __post_init__(self) -> None:
        _check_numbers(self, "simulator.vae.")
        if not self.channel_mult:
            raise ValueError("simulator.vae.channel_mult=(): want at least one level")
        _want_multiple("simulator.vae.channels", self.channels, "simulator.vae.norm_groups", self.norm_groups)

    @property
    def factor(self) -> int:
        """Pixels per latent, along one side."""
        return 1 << (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class ClipConfig:
    """The CLIP image tower (all tokens of the last layer, no final norm)."""

    image: Count
    """Side of its input [px]."""
    patch: Count
    """Side of a patch [px]."""
    width: Count
    """Channels of a token."""
    layers: int
    """Transformer layers."""
    heads: Count
    """Attention heads."""

    def __post_init__(self) -> None:
        _check_numbers(self, "simulator.clip.")
        _want_multiple("simulator.clip.image", self.image, "simulator.clip.patch", self.patch)
        _want_multiple("simulator.clip.width", self.width, "simulator.clip.heads", self.heads)


@dataclass(frozen=True)
class ResamplerConfig:
    """A Perceiver resampler: learned queries attend to tokens."""

    width: Count
    """Channels inside."""
    depth: Count
    """Layers."""
    heads: Count
    """Attention heads."""
    head_channels: Count
    """Channels per head."""
    queries: Count
    """Output tokens."""


@dataclass(frozen=True)
class SimulatorConfig:
    """EVAC: latent video diffusion with action maps."""

    unet: UNetConfig
    """Denoising network."""
    vae: VAEConfig
    """Autoencoder."""
    clip: ClipConfig
    """Image tower."""
    image_resampler: ResamplerConfig
    """Image tokens."""
    action_resampler: ResamplerConfig
    """Action tokens."""
    height: Count
    """Picture height [px]."""
    width: Count
    """Picture width [px]."""
    memory: int = 4
    """Memory frames: first, n/3, 2n/3, last."""
    chunk: Count = 8
    """Frames imagined at once (the released model: 16)."""
    denoise_steps: int = 27
    """DDIM steps, trailing spacing."""
    eta: float = 1.0
    """Noise of a DDIM step: 0 deterministic, 1 ancestral (the released sampler)."""
    guidance: float = 1.0
    """Classifier-free guidance weight; 1 is off (the released command line)."""
    guidance_rescale: float = 0.7
    """Share of the guided prediction whose deviation is matched to the conditional one."""
    dynamic_rescale: bool = True
    """Scale latents by 1 .. 0.7 over the first 400 noise steps (DynamiCrafter). The sampler ends at the scale of its lowest level, and the next chunk
    remembers that: 27 steps leave 0.973 of every chunk, one step 0.7. For a simulator that is trained here and rolled out for long, False."""
    latent_scale: Positive = 0.18215
    """Factor on VAE latents; the `world` stage replaces it by 1/std of its own autoencoder's."""
    fps_token: int = 2
    """Value of the fps condition (constant in the released model)."""
    domain: int = 11
    """Row of the domain embedding (agibotworld)."""
    posterior: Literal["mean", "sample"] = "mean"
    """What the autoencoder's posterior gives as a latent: its mean, or a sample (the released sampler)."""
    final: Literal["x_prev", "pred_x0"] = "x_prev"
    """What the last DDIM step returns: its noisy end (the released sampler) or its estimate of the clean latent."""
    scale_memory: bool = False
    """Scale the memory latents in the noisy channels as `dynamic_rescale` scales the others: so in training; not in the released sampler."""
    first_tokens: Literal["given", "decoded"] = "given"
    """Image tokens after the first chunk: those of the given picture, or of its decoded latent (the released sampler)."""
    delta_rows: Literal["aligned", "published"] = "aligned"
    """Deltas of chunk i of a known path: rows iK .. iK + K - 1, or iK + memory - 1 .. iK + K + memory - 1 (the released sampler, i > 0)."""
    delta_stride: Positive = 1.0
    """Deltas are normalised by this multiple of mean and deviation (the released training and command line: 3)."""
    action_maps: bool = True
    """Show the action maps; else their channels are zero, in training and in rollouts: what is left knows the motion from its tokens alone."""

    def __post_init__(self) -> None:
        _check_numbers(self, "simulator.")
        side = self.vae.factor << (len(self.unet.channel_mult) - 1)
        if self.height % side or self.width % side:
            why = f"{self.vae.factor} px are the side of a latent's patch, which is halved {len(self.unet.channel_mult) - 1} times"
            raise ValueError(f"simulator.height={self.height}, simulator.width={self.width}: want multiples of {side}: {why}")
        if self.memory < 2:
            raise ValueError(f"simulator.memory={self.memory}: want at least 2, the first frame and the last")
        if self.domain >= self.unet.domains:
            raise ValueError(f"simulator.domain={self.domain}: want a row of the domain embedding, 0 .. {self.unet.domains - 1}")
        if self.posterior == "sample" and self.memory > self.chunk:
            raise ValueError(
                f"simulator.posterior=sample, memory={self.memory} > chunk={self.chunk}: the first chunk's noise has no room for the memory's"
            )

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of a latent frame."""
        return self.height // self.vae.factor, self.width // self.vae.factor


@dataclass(frozen=True)
class ReflectorConfig:
    """LLaVA-OneVision (SigLIP, Qwen2) with a reward head."""

    image: Count
    """Side of its picture [px]."""
    patch: Count
    """Side of a patch [px]."""
    vision_width: Count
    """Channels of the vision tower."""
    vision_layers: Count
    """Its layers."""
    vision_heads: Count
    """Its attention heads."""
    vision_mlp: Count
    """Hidden channels of its MLPs."""
    width: Count
    """Channels of the language model."""
    layers: Count
    """Its layers."""
    heads: Count
    """Its query heads."""
    kv_heads: Count
    """Its key/value heads."""
    ffn: Count
    """Hidden channels of its MLPs."""
    frames: int = 32
    """Frames shown at most, the first and the current one among them."""
    sampler: Literal["uniform", "stable_dyadic"] = "uniform"
    """Which frames of a longer video: spread evenly (the paper), or at a stride that doubles, so that more can be kept from frame to frame."""
    head_width: Count = 512
    """Hidden channels of the reward head."""
    pooling: Literal["last", "mean"] = "last"
    """Embedding of the video: the last token, or the mean of all."""
    threshold: float = 0.5
    """eta: a score above it ends the rollout."""

    def __post_init__(self) -> None:
        _check_numbers(self, "reflector.")
        if self.frames < 2:
            raise ValueError(f"reflector.frames={self.frames}: want at least 2, the first frame and the current one")
        if self.patch > self.image:
            raise ValueError(f"reflector.patch={self.patch}: want at most reflector.image={self.image}")
        _want_multiple("reflector.vision_width", self.vision_width, "reflector.vision_heads", self.vision_heads)
        _want_multiple("reflector.width", self.width, "reflector.heads", self.heads)
        _want_multiple("reflector.heads", self.heads, "reflector.kv_heads", self.kv_heads)
        if self.width // self.heads % 2:
            raise ValueError(f"reflector.heads={self.heads} of {self.width // self.heads} channels each: want an even number of them")
        if not 0 < self.threshold < 1:
            raise ValueError(f"reflector.threshold={self.threshold}: want a probability between 0 and 1")


@dataclass(frozen=True)
class DemosConfig:
    """Stage demos: demonstrations of a scripted expert, or the user's own."""

    per_task: Count = 5
    """Demonstrations per task."""
    source: str = ""
    """Folder or file of demonstrations to learn from, in a format that worldenv.cli.convert reads; empty: a scripted expert shows them."""
    after_success: int | None = None
    """Control steps that the expert goes on after the first success; None: to the step limit. Those of a source end where they end."""

    def __post_init__(self) -> None:
        _check_numbers(self, "demos.")


@dataclass(frozen=True)
class SftConfig:
    """Stage sft: fine-tuning on the demonstrations, by L1; of tokens, by cross-entropy."""

    steps: int = 1000
    """Optimiser steps."""
    batch: Count = 32
    """Queries per step."""
    lr: float = 1e-3
    """Peak learning rate (one cycle)."""
    weight_decay: float = 0.01
    """AdamW's weight decay, on matrices."""
    shift_px: int = 2
    """Pictures are moved by up to this, each axis [px]; actions are relative, so the target stays."""
    colour: float = 0.15
    """Brightness, contrast and saturation change by up to this share."""
    proprio_noise: float = 0.1
    """Normal noise on the normalised proprio, so that the picture counts [1 = half its range]."""
    stop_l1: float = 0.01
    """Stop when the mean L1 of the last epoch is below this [normalised action]; of tokens, that of the greedy ones."""
    start: str = ""
    """Directory of a published OpenVLA or OpenVLA-OFT checkpoint to begin from, with fresh heads and the statistics of the demonstrations; with
    steps=0 the policy as it is, its own heads and statistics. Empty: random weights, and `prior_steps`."""
    prior_per_task: int = 0
    """Scripted episodes per task of `envs.reaching`, other tasks in other scenes: what a policy that begins from random weights learns first."""
    prior_steps: int = 0
    """Optimiser steps on these, before the demonstrations; 0: none."""
    prior_lr: float = 1e-3
    """Peak learning rate of these."""
    dataset: str = ""
    """With steps=0: whose statistics, where the directory has those of several data sets."""
    views: int = 0
    """With steps=0: views that the policy was trained with, which its directory does not say; want 1, since a run has one camera. 0: not said."""
    lora_rank: int = 0
    """Train LoRA of this rank on the backbone (published: 32); 0 trains everything."""
    lora_alpha: Count = 16
    """LoRA's alpha; the update is scaled by alpha / rank."""
    augmentation: Literal["shift", "published"] = "shift"
    """How pictures are changed: shift_px and colour, or OpenVLA-OFT's random crop and colours."""
    schedule: Literal["one_cycle", "steps"] = "one_cycle"
    """Learning rate: up and down once, or constant and a tenth of it in the last third of the steps (published)."""
    beta2: Decay = 0.95
    """AdamW's second beta (published: 0.999)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the backbone's arithmetic; heads, LoRA and optimiser are float32."""
    microbatch: Count = 32
    """Queries per forward and backward pass of a process: a step accumulates the gradients of as many as its batch needs."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, which saves memory and changes no result."""

    def __post_init__(self) -> None:
        _check_numbers(self, "sft.")
        if self.prior_steps and not self.prior_per_task and not self.start:
            raise ValueError(f"sft.prior_per_task=0: sft.prior_steps={self.prior_steps} want episodes; give at least 1, or set sft.prior_steps to 0")
        if self.dataset and self.steps:
            raise ValueError(f"sft.dataset={self.dataset!r}: fine-tuning takes those of its demonstrations; leave it away, or set sft.steps=0")
        as_it_is = bool(self.start) and not self.steps
        if self.views and not as_it_is:
            raise ValueError(f"sft.views={self.views}: is for a policy that is taken as it is (sft.start, sft.steps=0); leave it away")
        if as_it_is and self.views != 1:
            raise ValueError(
                f"sft.start={self.start!r}, sft.steps=0, sft.views={self.views}: a run has one camera, and a directory does not say how many views "
                "its policy was trained with (the released LIBERO ones: 2): say sft.views=1 where it was one; else fine-tune it (sft.steps), or "
                "evaluate it (worldenv-eval run --views 2)"
            )


@dataclass(frozen=True)
class ScaleConfig:
    """Stage scale: Laplace NLL of the scale head, everything else frozen (paper, appendix B.1)."""

    steps: int = 1000
    """Optimiser steps."""
    batch: Count = 8
    """Queries per step."""
    lr: float = 5e-4
    """Learning rate."""


@dataclass(frozen=True)
class ExploreConfig:
    """Stage explore: the policy with its noise in the true environment, past success; or what was recorded of that."""

    source: str = ""
    """With env.name=recorded: folder of episodes in our format, of the policy of stage scale on the robot, successes and failures, every frame
    labelled. All of them are taken."""
    episodes: Count = 600
    """Episodes over all tasks, on training states."""
    factors: tuple[Positive, ...] = (1.0, 3.0)
    """Factors on the scale, one after another over the episodes: a spread of behaviour for the world model."""
    held_out: Share = 0.1
    """Share of episodes kept from training, for stop rules and for the figures of the report."""
    batch: Count = 32
    """Episodes that are made side by side in one scene; of a batch that was cut short, all are made again."""
    processes: Count = 1
    """Processes that make batches side by side, each with a scene of its own. What comes out does not depend on it."""

    def __post_init__(self) -> None:
        _check_numbers(self, "explore.")
        if not self.factors:
            raise ValueError("explore.factors=(): want at least one factor on the scale")


@dataclass(frozen=True)
class WorldConfig:
    """Stage world: autoencoder and simulator trained on demonstrations and exploration."""

    extra_data: bool = True
    """Train on exploration too, not on demonstrations alone (the paper's first ablation)."""
    vae_steps: int = 500
    """Optimiser steps of the autoencoder."""
    vae_batch: Count = 32
    """Frames per step."""
    vae_lr: float = 1e-3
    """Peak learning rate."""
    vae_kl: float = 1e-5
    """Weight of the divergence from the standard normal, per latent value [1 / nat]."""
    map_share: Share = 0.25
    """Share of a batch that is action maps: the autoencoder encodes them too."""
    foreground_weight: float = 7.0
    """Weight of pixels that differ from the median picture, in the autoencoder's loss."""
    steps: int = 1000
    """Optimiser steps of the simulator, at most."""
    batch: Count = 12
    """Clips per step."""
    lr: float = 1e-3
    """Peak learning rate."""
    grad_clip: Positive = 1.0
    """Largest gradient norm (the released model: 0.5)."""
    sampled_levels: Share = 0.75
    """Share of training examples whose noise level is one that the sampler visits; the others are uniform (the released model: 0)."""
    aligned_starts: Share = 0.5
    """Share of training clips that begin where a chunk of a rollout begins; the others begin anywhere."""
    dropout: Share = 0.02
    """Conditions are dropped with probabilities of 1 to 2 times this (the released model: 0.1; see learning/clips.py)."""
    memory_noise: bool = True
    """Train with noise on the memory frames, later ones noisier."""
    ema: Share = 0.99
    """Decay of the averaged weights that are kept."""
    patience: Count = 4
    """Stop after this many held-out losses in a row without a better one."""
    check_every: Count = 100
    """Steps between held-out losses."""
    held_out_clips: Count = 48
    """Clips of a held-out loss."""
    sampling: Literal["uniform", "curriculum"] = "uniform"
    """Which clips are drawn: all alike, or weighted by length, from `curriculum_begin` at the first step to `curriculum_end` at the last (the
    paper's appendix C.1, which gives no weights)."""
    curriculum_begin: tuple[Signed, Signed] = (0.0, -1.0)
    """Powers at the first step: of the number of clips in an episode, in that episode's weight; of 1 + the chunks before a clip, in that
    clip's weight within its episode. Below 0: short episodes, early clips."""
    curriculum_end: tuple[Signed, Signed] = (1.0, 0.0)
    """Powers at the last step; (1, 0) is every clip alike."""
    initial: str = ""
    """Checkpoint to begin from: ours, released EVAC, or DynamiCrafter-512. Its autoencoder is taken as it is. Empty: random weights."""
    clip: str = ""
    """open_clip's file (ViT-H/14), for a released EVAC as `initial` that holds no CLIP image tower. Empty: `initial` has it."""
    frozen: tuple[Literal["vae", "clip", "image_resampler", "action_resampler"], ...] = ("vae",)
    """Parts that the simulator's training leaves as they are (the released model: vae clip action_resampler)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the simulator's forward and backward pass; weights, optimiser and loss are float32 either way."""
    microbatch: Count = 32
    """Clips, or frames of the autoencoder, per forward and backward pass of a process: a step accumulates the gradients of as many as its batch
    needs."""
    gradient_checkpointing: bool = False
    """Keep the U-Net's activations at block borders only and compute the rest again in the backward pass: less memory, the same gradient."""

    def __post_init__(self) -> None:
        _check_numbers(self, "world.")
        if not self.vae_steps and not self.initial:
            raise ValueError("world.vae_steps=0: the autoencoder begins from random weights; give at least 1, or a checkpoint as world.initial")
        if self.clip and not self.initial:
            raise ValueError(f"world.clip={self.clip!r}: is for a released EVAC that lacks its image tower; give that as world.initial, or drop this")
        if "vae" not in self.frozen:
            raise ValueError(f"world.frozen={self.frozen}: vae must be among them, since every episode is encoded once")


@dataclass(frozen=True)
class RewardConfig:
    """Stage reward: the reflector's backbone (where none is pretrained) and its reward head."""

    judge: Literal["llava", "classifier"] = "llava"
    """Who scores: LLaVA with its reward head, or a small network that sees one frame and the task, the baseline of other systems."""
    head: bool = True
    """Use the reward head; else the probability of "Yes" (the paper's second ablation)."""
    start: str = ""
    """Directory of a published LLaVA-OneVision checkpoint: its backbone stays as it is, and a head is fitted to it. Empty: a small one is trained."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of a published backbone; the head is float32."""
    backbone_steps: int = 500
    """Optimiser steps of the backbone, where no pretrained one is given."""
    backbone_batch: Count = 48
    """Videos per step."""
    backbone_lr: float = 1e-3
    """Peak learning rate of the backbone."""
    positives: Share = 0.33
    """Share of successes in a batch, and among the embeddings: fewer make the judge stricter."""
    head_epochs: Count = 50
    """Epochs of the head over precomputed embeddings."""
    head_batch: Count = 8
    """Embeddings per step."""
    head_lr: float = 1e-4
    """Learning rate of the head."""
    embeddings: Count = 2000
    """Embeddings precomputed for the head, at most."""
    classifier_width: Count = 16
    """First channels of the frame classifier; a multiple of 4."""
    classifier_steps: Count = 600
    """Its optimiser steps."""
    classifier_batch: Count = 64
    """Frames per step."""
    classifier_lr: float = 2e-3
    """Its peak learning rate."""

    def __post_init__(self) -> None:
        _check_numbers(self, "reward.")
        if self.judge == "llava" and not self.backbone_steps and not self.start:
            raise ValueError("reward.backbone_steps=0: the backbone begins from random weights; give at least 1, or a checkpoint as reward.start")
        if self.classifier_width % 4:
            raise ValueError(f"reward.classifier_width={self.classifier_width}: want a multiple of 4")
        if self.start and self.judge != "llava":
            raise ValueError(f"reward.start={self.start!r}: of a LLaVA, but reward.judge is {self.judge}; leave one of them away")


Apart = Literal["none", "simulator", "reflector"]
"""A network of rollouts that has GPUs of its own."""


@dataclass(frozen=True)
class LoopConfig:
    """Stage loop: leave-one-out PPO in the imagined world (paper, Algorithm 1)."""

    group: int = 8
    """Rollouts per start state (N); the baseline of each is the mean of the other group - 1."""
    contexts: Count = 12
    """Start states per iteration."""
    context_states: Literal["demos", "train"] = "train"
    """Start states: first observations of the demonstrations, or all training states; never test states."""
    hard_share: Share = 0.0
    """Share of an iteration's start states that are drawn, instead, from those from which an exploration episode with noise no wider than
    scale_factor failed: where a group's outcomes differ there is something to learn. 0 is the paper."""
    iterations: Count = 30
    """Iterations (M)."""
    passes: Count = 1
    """Passes over an iteration's rollouts (K)."""
    batch: Count = 4
    """Rollouts per optimiser step."""
    clip: float = 0.1
    """Ratios count within 1 - clip .. 1 + clip."""
    lora_rank: Count = 32
    """Rank of the LoRA on the backbone."""
    lora_alpha: Count = 16
    """LoRA's alpha; the update is scaled by alpha / rank."""
    lora_lr: float = 1e-4
    """Learning rate of LoRA."""
    head_lr: float = 1e-5
    """Learning rate of both heads."""
    warmup: int = 0
    """Optimiser steps over which both learning rates rise from 0: Adam's first steps are of full length, whatever the gradient says."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    grad_clip: Positive = 1.0
    """Largest gradient norm, for LoRA and for the heads."""
    slots: Count = 16
    """Rollouts in flight at once, on each GPU that has a policy; on a CPU over all workers."""
    bucket: Count = 4
    """Rows of every batch of policy and simulator in rollouts; fewer are padded. Rollouts depend on it in their last bits, on slots they do not."""
    judge_bucket: Count = 1
    """Chunks that the reflector judges at once; above 1, scores may depend on who is judged together, in their last bits."""
    overlap: Literal["off", "auto", "always"] = "auto"
    """Policy and simulator go on to the next chunk while the reflector judges: never, where it pays, wherever nothing certain waits."""
    streams: Count = 1
    """Batches at once on one GPU, of different stages, each on a CUDA stream of its own; a CPU's workers have one."""
    apart: Apart = "none"
    """Which network of rollouts has GPUs of its own, the last `apart_gpus` of the run's; the others then share the rest. none: each GPU has all.
    `worldenv-bench plan` says where it pays. Rollouts do not depend on it."""
    apart_gpus: int = 0
    """How many GPUs that network has [GPUs]."""
    drop_uniform_groups: bool = False
    """Leave groups whose returns are all equal out of the update: their advantages are 0. No other groups are rolled out in their place."""
    scale_factor: Positive = 1.0
    """Factor on the Laplace scale during rollouts and updates, inside the density (1 is the paper)."""
    microbatch: Count = 16
    """Queries per forward and backward pass; the gradient does not depend on it."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, which saves memory and changes no result."""
    control: Literal["none", "shuffle", "frozen", "true-simulator"] = "none"
    """What is taken out of the method to see what it does: shuffle (advantages permuted within each iteration), frozen (learning rates 0),
    true-simulator (rollouts in the true environment, judged by its predicate)."""
    permutation: int = 0
    """Which permutations control=shuffle takes: runs that differ in this alone are independent draws of the control."""
    termination: bool = True
    """The reflector ends a rollout; else all run to the step limit and are judged there."""
    snapshot_every: int = 5
    """Iterations between kept copies of the policy (its LoRA and heads), which stage eval measures; 0 keeps none."""

    def __post_init__(self) -> None:
        _check_numbers(self, "loop.")
        if self.group < 2:
            raise ValueError(f"loop.group={self.group}: leaving one out needs at least 2 rollouts per start state")
        if (self.apart == "none") != (self.apart_gpus == 0):
            raise ValueError(f"loop.apart={self.apart}, loop.apart_gpus={self.apart_gpus}: want none and 0, or a network and at least 1")
        if (self.group * self.contexts) % self.batch:
            raise ValueError(f"loop.batch={self.batch} does not divide group * contexts = {self.group * self.contexts} rollouts")
        if self.permutation and self.control != "shuffle":
            raise ValueError(f"loop.permutation={self.permutation} with loop.control={self.control}: want 0, or loop.control=shuffle")


@dataclass(frozen=True)
class EnginesConfig:
    """What runs the networks of rollouts, in stages loop and eval, and the simulator in stage reward. Learning is always PyTorch's."""

    back_end: Literal["auto", "eager", "onnxruntime", "inductor", "tensorrt", "tensorrt_rtx", "torch_tensorrt"] = "auto"
    """auto: for each network the fastest of this machine's back ends whose engine passed parity here, if 1.1 times as fast as eager. What was taken
    is kept with the run, and a run goes on with it. Rollouts depend on it in their last bits."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU. fp8 quantises the simulator's U-Net, the rest stays bf16 (docs/engines.md). Of a policy that trains in
    float32, fp32 in stage loop whatever is asked."""
    limit_gb: Positive = 20.0
    """Plans in the run's folder are kept up to this; those used longest ago go first, those in use stay [GB]."""


@dataclass(frozen=True)
class EvalConfig:
    """Stage eval: greedy success in the true environment."""

    episodes: Count = 600
    """Paired test episodes per policy, spread over the tasks' test states."""
    curve_episodes: Count = 150
    """Test episodes for each kept copy of the policy: success by iteration."""
    processes: Count = 1
    """Processes with a scene each, among which the episodes of a batch are dealt. What comes out does not depend on it."""


@dataclass(frozen=True)
class ReportConfig:
    """Stage report."""

    replays: int = 48
    """Imagined rollouts replayed in the true environment with the same actions, for fidelity."""
    videos: int = 6
    """Videos in the page, at most."""


@dataclass(frozen=True)
class RunConfig:
    """One run, from demonstrations to report."""

    policy: PolicyConfig
    """The policy."""
    simulator: SimulatorConfig
    """The world simulator."""
    reflector: ReflectorConfig
    """The judge."""
    preset: str = "tiny"
    """Where the defaults came from."""
    fast: bool = False
    """Every stage cut short: the report makes no claim about success."""
    seed: int = 0
    """First half of every noise key; also seeds initial weights and batches. 0 .. 2^32 - 1."""
    device: str = "auto"
    """torch device; auto takes cuda where there is one, else cpu."""
    gpus: int = 0
    """GPUs of a machine that make rollouts, and LOOP's updates, at once where the device is cuda; 0: all. Other training takes one, or torchrun's."""
    env: EnvConfig = field(default_factory=EnvConfig)
    demos: DemosConfig = field(default_factory=DemosConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    explore: ExploreConfig = field(default_factory=ExploreConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    engines: EnginesConfig = field(default_factory=EnginesConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: want 0 .. {2**32 - 1}, one word of the noise key")
        if self.policy.chunk != self.simulator.chunk:
            raise ValueError(f"policy.chunk={self.policy.chunk}, simulator.chunk={self.simulator.chunk}: a query is one chunk; make them equal")
        if self.policy.head == "tokens" and self.sft.start and not self.sft.steps:
            raise ValueError(
                f"policy.head=tokens, sft.start={self.sft.start!r}, sft.steps=0: a directory is taken as it is for its L1 head; fine-tune it "
                "(sft.steps), or set policy.head to laplace"
            )
        if self.sft.prior_steps and not self.sft.start and "tabletop" not in (self.env.name, self.env.robot):
            raise ValueError(f"sft.prior_steps={self.sft.prior_steps}: the prior's scenes are the tabletop's; with {self.env.name} set it to 0")
        _want_multiple("env.steps", self.env.steps, "policy.chunk", self.policy.chunk)
        if not self.env.image == self.simulator.height == self.simulator.width:
            given = f"env.image={self.env.image}, simulator.height={self.simulator.height}, simulator.width={self.simulator.width}"
            raise ValueError(f"{given}: imagined frames go on where the environment's end; make them equal")
        if self.policy.images != 1:
            raise ValueError(f"policy.images={self.policy.images}: a run has one camera; set it to 1")
        if self.env.recorded:
            self._check_recorded()
            return
        if self.explore.source:
            raise ValueError(f"explore.source={self.explore.source!r}: the policy explores {self.env.name} itself; leave it out")
        if self.demos.source and self.loop.context_states == "demos" and self.loop.control == "true-simulator":
            raise ValueError(
                f"loop.context_states=demos, loop.control=true-simulator, demos.source={self.demos.source!r}: the true environment cannot be put "
                "where somebody else's demonstrations began; set loop.context_states=train"
            )
        if not self.demos.source and self.demos.per_task > self.env.train_states:
            raise ValueError(f"demos.per_task={self.demos.per_task}: want at most env.train_states={self.env.train_states}, or raise that")
        if self.eval.episodes > self.env.test_starts:
            more = "; give fewer, or raise env.test_states" if self.env.name == "tabletop" else "; give fewer, or choose more tasks"
            raise ValueError(f"eval.episodes={self.eval.episodes}: there are {self.env.test_starts} test states over all tasks{more}")

    def placed_as(self, other: RunConfig) -> RunConfig:
        """The same run on as many devices and processes, in as much memory and on as much of a disk as `other` has: its results are the same but
        for the order in which numbers are added, and a run that was begun on one machine goes on on another.
        """
        loop = replace(
            self.loop, streams=other.loop.streams, apart=other.loop.apart, apart_gpus=other.loop.apart_gpus, slots=other.loop.slots,
            microbatch=other.loop.microbatch, gradient_checkpointing=other.loop.gradient_checkpointing,
        )  # fmt: skip
        return replace(
            self, gpus=other.gpus, loop=loop,
            sft=replace(self.sft, microbatch=other.sft.microbatch, gradient_checkpointing=other.sft.gradient_checkpointing),
            explore=replace(self.explore, processes=other.explore.processes), eval=replace(self.eval, processes=other.eval.processes),
            world=replace(self.world, microbatch=other.world.microbatch, gradient_checkpointing=other.world.gradient_checkpointing),
            engines=replace(self.engines, limit_gb=other.engines.limit_gb),
        )  # fmt: skip

    def _check_recorded(self) -> None:
        """ValueError for what asks an environment that is not there."""
        if self.demos.source:
            raise ValueError(f"demos.source={self.demos.source!r}: with env.name=recorded the demonstrations are env.recordings; leave it out")
        if self.loop.control == "true-simulator":
            raise ValueError("loop.control=true-simulator: with env.name=recorded there is no true environment; choose another control")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(kind: type[T], values: Any, path: str = "") -> T:
    """The config that `to_dict` wrote, the section at `path` of it.

    Raises ValueError for a field that is unknown or missing (settings of another version) or that holds something else than its type.
    """
    if not isinstance(values, dict):
        raise _damaged(path.removesuffix(".") or "settings", values, "fields by name")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if differing := sorted(known ^ values.keys()):
        names = ", ".join(f"{path}{name}" for name in differing)
        raise ValueError(f"{kind.__name__}: stored settings and this version differ in {names}; use the version that wrote them")
    return kind(**{name: _read(hints[name], value, f"{path}{name}") for name, value in values.items()})


def _read(hint: Any, value: Any, name: str) -> Any:
    """The stored `value` as what the annotation `hint` of the field `name` promises."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{name}.")  # type: ignore[arg-type]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # something, or None
        return None if value is None else _read(next(part for part in parts if part is not types.NoneType), value, name)
    if origin is Literal:
        if value not in parts:
            raise _damaged(name, value, f"one of {', '.join(parts)}")
        return value
    if origin is tuple:
        length = None if parts[-1] is Ellipsis else len(parts)
        if not isinstance(value, list | tuple) or len(value) != (length or len(value)):
            raise _damaged(name, value, f"a list of {length or 'any length'}")
        kinds = parts if length else parts[:1] * len(value)
        return tuple(_read(part, one, f"{name}[{i}]") for i, (part, one) in enumerate(zip(kinds, value, strict=True)))
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, int | float if hint is float else hint):
        raise _damaged(name, value, {int: "a whole number", float: "a number", bool: "true or false", str: "words"}[hint])
    return value


def _damaged(name: str, value: Any, want: str) -> ValueError:
    return ValueError(f"stored {name}={repr(value)[:60]}: want {want}; the file is damaged: restore it, or make it again")


def fingerprint(*parts: Any) -> str:
    """SHA-256 (64 hex digits) of configs and JSON-ready values: two settings are the same where theirs is."""
    plain = [to_dict(part) if dataclasses.is_dataclass(part) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
