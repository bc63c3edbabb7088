"""Published checkpoint directories at small sizes: what is written is read back, what is wrong is named; and the published counts."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from published_directories import shapes, write_policy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_policy import LIKE, observation, uniform
from small_policy import published_policy as policy

from worldenv.checkpoint import CheckpointError
from worldenv.config import PolicyConfig
from worldenv.policy import lora
from worldenv.policy.openvla_oft import Network
from worldenv.policy.processing import Statistics
from worldenv.policy.published import open_base, open_directory
from worldenv.policy.weights import never_read
from worldenv.presets import OPENVLA_OFT


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published")
    write_policy(directory, policy(), 150000)
    return directory


def copied(source: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


# Counts


LISTED = {
    "patch_embed.proj": 107_264, "vision_backbone.fused_featurizer.attn_pool": 607_232, "vision_backbone.featurizer": 12_582_912,
    "vision_backbone.fused_featurizer.blocks": 15_399_936, "projector": 1_019_904, "language_model.lm_head": 1_157_120,
    "language_model.model": 79_953_920,
}  # fmt: skip
"""Parameters of the published LoRA in each part of the model."""


def adapted(config: PolicyConfig) -> list[str]:
    """The layers that the published fine-tuning puts LoRA on: all that multiply by a matrix, patch convolutions and output layer included."""
    wide = {name: shape for name, shape in shapes(config).items() if name.endswith(".weight") and len(shape) > 1}
    return [name.removesuffix(".weight") for name in wide if not name.endswith("embed_tokens.weight")]


def test_published_counts() -> None:
    """What the published fine-tuning prints: 110,828,288 trainable of 7,652,065,472, on no memory at all."""
    sizes = shapes(OPENVLA_OFT)
    base = sum(math.prod(shape) for shape in sizes.values())
    added = sum(32 * (math.prod(sizes[f"{name}.weight"][1:]) + sizes[f"{name}.weight"][0]) for name in adapted(OPENVLA_OFT))
    assert (base, added, base + added, len(adapted(OPENVLA_OFT))) == (7_541_237_184, 110_828_288, 7_652_065_472, 439)
    rank_32 = Counter[str]()
    for name in adapted(OPENVLA_OFT):
        part = next(part for part in LISTED if name.startswith(part) or name.endswith(part))
        rank_32[part] += 32 * (math.prod(sizes[f"{name}.weight"][1:]) + sizes[f"{name}.weight"][0])
    assert rank_32 == LISTED
    with torch.device("meta"):
        network = Network(OPENVLA_OFT)
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    heads = {part: sum(math.prod(shape) for name, shape in own.items() if name.startswith(part)) for part in ("action_head", "scale_head")}
    assert heads == {"action_head": 151_117_831, "scale_head": 151_117_831}
    read = {name for name in sizes if not never_read(name, OPENVLA_OFT)}
    assert read == {name for name in own if not name.startswith(("action_head", "scale_head", "proprio_projector"))}
    ours = lora.targets(network)
    left_out = set(adapted(OPENVLA_OFT)) - set(ours)
    assert set(ours) < set(adapted(OPENVLA_OFT))
    assert (len(ours), sum(32 * sum(sizes[f"{name}.weight"]) for name in ours)) == (423, 107_862_016)
    assert all(never_read(f"{name}.weight", OPENVLA_OFT) or name.endswith("patch_embed.proj") for name in left_out)


def test_ripts_scale_head_is_larger() -> None:
    with torch.device("meta"):
        network = Network(dataclasses.replace(OPENVLA_OFT, scale_form="trunk"))
    assert sum(p.numel() for p in network.scale_head.parameters()) == pytest.approx(167.9e6, rel=1e-3)


# There and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_directory_comes_back(written: Path, dtype: torch.dtype) -> None:
    again, seen = open_directory(written, dtype=dtype), observation(4)
    assert again.config == LIKE
    assert again.statistics.source == "drawn numbers"
    types = {name.split(".")[0]: p.dtype for name, p in again.network.named_parameters()}
    assert types == {name: torch.float32 if name.endswith(("_head", "proprio_projector")) else dtype for name in types}
    want, got = policy().act(seen, uniform(4)), again.act(seen, uniform(4))
    if dtype == torch.float32:
        assert torch.equal(got.action, want.action)
        assert torch.equal(got.command, want.command)
    else:
        assert got.mu.dtype == got.log_prob.dtype == torch.float32
        assert float((got.mu - want.mu).norm() / want.mu.norm()) < 0.1  # 8 bits through some ten layers


def test_a_start_is_of_the_demonstrations_proprio(written: Path) -> None:
    draw = np.random.default_rng(0)
    of_another = Statistics.of([draw.uniform(-1, 1, (50, 7)).astype(np.float32)], [draw.uniform(-1, 1, (50, 9)).astype(np.float32)], "another robot")
    made = open_base(written, of_another, torch.float32)
    assert (made.config.proprio, made.network.proprio_projector.fc1.in_features) == (9, 9)


def test_the_same_directory_may_be_of_two_views(written: Path) -> None:
    """It does not say; heads and backbone are the same."""
    again, one = open_directory(written, dtype=torch.float32, images=2), observation(2)
    assert again.config == dataclasses.replace(LIKE, images=2)
    assert again.act(dataclasses.replace(one, wrist=one.frame)).mu.shape == (2, 8, 7)


def test_shards_are_read_whole(written: Path, tmp_path: Path) -> None:
    write_policy(tmp_path, policy(), 50000, shard_bytes=600_000)
    files = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, other = open_directory(written, dtype=torch.float32), open_directory(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(one.network.state_dict().values(), other.network.state_dict().values(), strict=True))


def test_what_is_written_holds_every_published_tensor(written: Path) -> None:
    found: dict[str, torch.Size] = {}
    for path in written.glob("model-*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            found |= {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    assert found == shapes(LIKE)
    assert any(name.startswith("language_model.lm_head") for name in found)
    head = torch.load(written / "action_head--150000_checkpoint.pt", weights_only=True)
    assert {name.split(".")[0] for name in head} == {"module"}


def test_an_unstated_norm_is_transformers_default(written: Path, tmp_path: Path) -> None:
    """The published config.json states hardly anything of the language model: rms_norm_eps is 1e-6 then, not Llama-2's 1e-5."""
    directory = copied(written, tmp_path)
    stated = json.loads((directory / "config.json").read_text())
    stated["text_config"].pop("rms_norm_eps")
    (directory / "config.json").write_text(json.dumps(stated))
    assert open_directory(directory).config.llama.rms_eps == 1e-6
    assert open_directory(written).config.llama.rms_eps == 1e-5


def test_scale_heads_ours_theirs_and_none(written: Path, tmp_path: Path) -> None:
    directory = copied(written, tmp_path / "d")
    (directory / "scale_head--150000_checkpoint.pt").unlink()
    fresh, same = open_directory(directory, seed=3), open_directory(directory, seed=3)
    assert float((fresh.act(observation(3)).log_scale + 3.0).abs().max()) < 0.1  # the paper's start
    assert torch.equal(fresh.network.scale_head.last.weight, same.network.scale_head.last.weight)
    theirs = policy(dataclasses.replace(LIKE, scale_form="trunk")).network.scale_head
    torch.save({"scale_trunk": theirs.trunk.state_dict(), "log_b_head": theirs.log_b_head.state_dict()}, tmp_path / "goal_scale_header.pth")
    opened = open_directory(directory, scale_head=tmp_path / "goal_scale_header.pth")
    hidden = torch.randn(2, 56, LIKE.llama.width)
    assert torch.equal(opened.network.scale_head(hidden), theirs(hidden))
    shutil.copy(tmp_path / "goal_scale_header.pth", directory)
    assert torch.equal(open_directory(directory, seed=3).network.scale_head.last.weight, fresh.network.scale_head.last.weight)  # by its own name: not
    (directory / "goal_scale_header.pth").rename(directory / "scale_head--150000_checkpoint.pt")
    assert torch.equal(open_directory(directory).network.scale_head(hidden), theirs(hidden))


# LoRA


def adapter(config: PolicyConfig = LIKE, rank: int = 4) -> lora.Adapter:
    """As the published fine-tuning would write one: on all of its layers, convolutions and never-read ones among them."""
    generator, sizes, factors = torch.Generator().manual_seed(1), shapes(config), {}
    for name in adapted(config):
        shape = sizes[f"{name}.weight"]
        a, b = (rank, *shape[1:]), (shape[0], rank, *([1] * (len(shape) - 2)))
        factors[name] = (0.1 * torch.randn(a, generator=generator), 0.1 * torch.randn(b, generator=generator))
    return lora.Adapter(rank, 2 * rank, factors)


def whole(config: PolicyConfig = LIKE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes(config).items()}


def merge(base: Mapping[str, torch.Tensor], added: lora.Adapter) -> dict[str, torch.Tensor]:
    changed = {f"{name}.weight": base[f"{name}.weight"].float() + added.delta(name) for name in added.factors}
    return {**base, **{name: tensor.to(base[name].dtype) for name, tensor in changed.items()}}


def test_merging_is_pefts(tmp_path: Path) -> None:
    """Against PEFT's own merge, on linear layers and a convolution; the base stays as it was."""
    plain = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Conv2d(3, 4, 2))
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"], init_lora_weights=False))
    model.save_pretrained(str(tmp_path))
    base = {name.replace(".base_layer", ""): tensor.clone() for name, tensor in plain.state_dict().items() if "lora" not in name}
    kept = {name: tensor.clone() for name, tensor in base.items()}
    ours = merge(base, lora.Adapter.read(tmp_path))
    theirs = model.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)
        assert torch.equal(base[name], kept[name])
    assert float((ours["1.weight"] - base["1.weight"]).abs().max()) > 1e-2


def test_the_output_layer_that_peft_writes_beside_its_lora_is_passed_over(tmp_path: Path) -> None:
    """As in the published fine-tuning: the output layer is adapted, and PEFT then writes its weight too."""
    model = torch.nn.Module()
    model.language_model = language = torch.nn.Module()
    language.embed_tokens, language.lm_head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9, bias=False)
    model.get_input_embeddings, model.get_output_embeddings = lambda: language.embed_tokens, lambda: language.lm_head
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).save_pretrained(str(tmp_path))
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.language_model.lm_head.base_layer.weight" in written
    factors = lora.Adapter.read(tmp_path).factors
    assert factors.keys() == {"language_model.lm_head"}
    assert torch.equal(factors["language_model.lm_head"][1], written["base_model.model.language_model.lm_head.lora_B.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmerging_gives_the_base_back_to_rounding(dtype: torch.dtype) -> None:
    """One rounding of the merged weight, one of the difference: an ulp of the larger of the two each."""
    base, added = {name: tensor.to(dtype) for name, tensor in whole().items()}, adapter()
    back, merged = lora.unmerge(merge(base, added), added), merge(base, added)
    for name, tensor in base.items():
        bound = torch.finfo(dtype).eps * (merged[name].double().abs() + tensor.double().abs() + 1e-6)
        assert bool(((back[name].double() - tensor.double()).abs() <= bound).all()), name
    touched = {name for name in base if not torch.equal(merged[name], base[name])}
    assert touched == {f"{name}.weight" for name in adapted(LIKE)}


def test_fresh_lora_is_a_function_of_its_seed_alone() -> None:
    made = []
    for drawn_before, seed in ((0, 5), (9, 5), (0, 6)):
        torch.manual_seed(drawn_before)
        made.append(lora.attach(policy().network, 4, 8, seed))
    one, again, other = ({name: p.detach() for name, p in found.items() if ".lora_A" in name} for found in made)
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_sum_with_lora_is_rounded_once() -> None:
    """In float32, then to the weight's type: what is rounded before it is added moves a third of the weights by an ulp."""
    base, made = {name: tensor.bfloat16() for name, tensor in whole().items()}, adapter()
    want = merge(base, made)
    assert all(torch.equal(tensor, want[name]) for name, tensor in lora.added(base, made).items())


def test_twice_merged_is_once_merged_from_the_pristine_base() -> None:
    made = policy()
    lora.attach(made.network, 4, 8, 0)
    generator = torch.Generator().manual_seed(4)
    for change in range(3):  # weights move on, as LoRA does from update to update; merged weights come from the base each time
        with torch.no_grad():
            for name, parameter in made.network.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        state = lora.merged(made.network)
        want = merge(policy().network.state_dict(), lora.Adapter.of(made.network))
        assert all(torch.equal(state[name], want[name]) for name in want), change


def test_a_directory_with_its_adapter_gives_the_base(written: Path, tmp_path: Path) -> None:
    """Published weights are merged already: opened as they are, the adapter beside them is not added a second time."""
    made, added = policy(), adapter()
    base = {**dict.fromkeys(shapes(LIKE), torch.zeros(())), **made.network.state_dict()}
    base |= {name: torch.zeros(shape) for name, shape in shapes(LIKE).items() if never_read(name, LIKE)}
    merged = merge(base, added)
    with torch.no_grad():
        for name, tensor in made.network.state_dict().items():
            tensor.copy_(merged[name])
    write_policy(tmp_path, made, 7, added)
    as_it_is, before = open_directory(tmp_path, dtype=torch.float32), open_directory(tmp_path, dtype=torch.float32, base=True)
    original = open_directory(written, dtype=torch.float32)
    assert torch.equal(as_it_is.act(observation(2)).mu, made.act(observation(2)).mu)
    torch.testing.assert_close(before.act(observation(2)).mu, original.act(observation(2)).mu, rtol=0, atol=1e-4)
    assert float((as_it_is.act(observation(2)).mu - original.act(observation(2)).mu).abs().max()) > 1e-2


def test_adapters_that_are_no_plain_lora_are_refused(tmp_path: Path) -> None:
    added = adapter()
    added.write(tmp_path)
    assert lora.Adapter.read(tmp_path).factors.keys() == added.factors.keys()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(CheckpointError, match=r"adapter_config.json: use_dora=True: only plain LoRA is read"):
        lora.Adapter.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights.pop("base_model.model.projector.fc1.lora_B.weight")
    save_file({**weights, "stray": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"unknown \['stray'\], not whole or not of rank 4 \['projector.fc1'\]"):
        lora.Adapter.read(tmp_path)
    with pytest.raises(ValueError, match=r"projector.fc1: is \(96, 24\), the adapter \(96, 25\)"):
        lora.unmerge(whole(), lora.Adapter(4, 4, {"projector.fc1": (torch.zeros(4, 25), torch.zeros(96, 4))}))
    with pytest.raises(ValueError, match=r"projector.fc9: there is no such layer"):
        lora.unmerge(whole(), lora.Adapter(4, 4, {"projector.fc9": (torch.zeros(4, 25), torch.zeros(96, 4))}))


# What is wrong


def _edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return edit


def _shard(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "model-00001-of-00001.safetensors"
        content = load_file(path)
        change(content)
        save_file(content, path)

    return edit


def _head(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "action_head--150000_checkpoint.pt"
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return edit


class _Harm:
    """What a pickle could do on being read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.target), "w")


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda d: (d / "config.json").unlink(), r"config\.json: .*No such file"),
        (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer\.json: no such file"),
        (lambda d: (d / "preprocessor_config.json").unlink(), r"preprocessor_config\.json: .*No such file"),
        (lambda d: (d / "dataset_statistics.json").unlink(), r"dataset_statistics\.json: .*No such file"),
        (lambda d: (d / "action_head--150000_checkpoint.pt").unlink(), r"action_head--N_checkpoint\.pt: no such file; there are none"),
        (lambda d: (d / "proprio_projector--150000_checkpoint.pt").unlink(), r"proprio_projector--150000_checkpoint\.pt: no such file"),
        (lambda d: (d / "proprio_projector--150000_checkpoint.pt").write_bytes(b"PK\x03\x04short"), r"proprio_projector.*truncated, damaged"),
        (lambda d: (d / "model-00001-of-00001.safetensors").unlink(), r"model-00001-of-00001\.safetensors: no such file; the index names it"),
        (lambda d: (d / "model-00001-of-00001.safetensors").write_bytes(b"short"), r"model-00001-of-00001\.safetensors: truncated or damaged"),
        (lambda d: (d / "model.safetensors.index.json").unlink(), r"model\.safetensors: no such file; the weights are there"),
        (lambda d: (d / "vision_backbone--150000_checkpoint.pt").touch(), r"vision_backbone--150000_checkpoint\.pt: this policy has FiLM"),
        (lambda d: (d / "action_head--50000_checkpoint.pt").touch(), r"action heads of steps 150000, 50000: say which"),
        (_edit("config.json", lambda c: c.update(model_type="llava")), r"config\.json: model_type 'llava', want 'openvla'"),
        (_edit("config.json", lambda c: c.pop("worldenv_towers")), r"timm_model_ids None, want .*DINOv2 first"),
        (_edit("config.json", lambda c: c["worldenv_towers"].reverse()), r"missing vision_backbone.fused_featurizer"),
        (_edit("config.json", lambda c: c["text_config"].update(rope_scaling={"factor": 2})), r"want a plain llama"),
        (_edit("config.json", lambda c: c["text_config"].update(intermediate_size=48)), r"wrong shape language_model.model.layers.0.mlp.down_proj"),
        (_edit("preprocessor_config.json", lambda c: c["tvf_normalize_params"].reverse()), r"preprocessor_config\.json: .*0.5 throughout for SigLIP"),
        (_edit("dataset_statistics.json", lambda c: c.update(other={})), r"statistics of drawn numbers, other: say which data set"),
        (_edit("dataset_statistics.json", lambda c: c["drawn numbers"]["proprio"].pop("q99")), r"drawn numbers.proprio lacks q99"),
        (_edit("model.safetensors.index.json", lambda c: c["weight_map"].update({"a": "../b"})), r"\.\./b: no such file"),
        (_shard(lambda t: t.pop("projector.fc2.bias")), r"1 tensors that the index promises are not there: \['projector.fc2.bias'\]"),
        (_shard(lambda t: t.update(stray=torch.zeros(1))), r"unknown stray"),
        (_head(lambda t: t.update({"module.model.fc3.weight": torch.zeros(1)})), r"unknown action_head.model.fc3.weight"),
        (_head(lambda t: t.pop("module.model.fc2.bias")), r"missing action_head.model.fc2.bias"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(written: Path, tmp_path: Path, break_it: Callable[[Path], object], says: str) -> None:
    directory = copied(written, tmp_path)
    break_it(directory)
    with pytest.raises(ValueError, match=says) as caught:
        open_directory(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_statistics_of_another_data_set_are_named(written: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset_statistics\.json: no statistics of 'libero_goal_no_noops'; there are drawn numbers"):
        open_directory(written, dataset="libero_goal_no_noops")
    with pytest.raises(CheckpointError, match=r"no such directory"):
        open_directory(written / "nowhere")


def test_nothing_is_executed(written: Path, tmp_path: Path) -> None:
    directory, mark = copied(written, tmp_path / "d"), tmp_path / "executed"
    torch.save({"module.model.fc1.weight": _Harm(mark)}, directory / "action_head--150000_checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"action_head--150000_checkpoint\.pt: holds more than tensors"):
        open_directory(directory)
    assert not mark.exists()
