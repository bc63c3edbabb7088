"""The golden cases, the runner that judges them, and wrong implementations that it must find out."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutation import mutate
from safetensors.torch import load_file, save_file

from tests.golden import __main__ as runner
from tests.golden import evac as golden_evac
from worldenv import action_map
from worldenv.kernels import action_map as map_kernels
from worldenv.kernels import ddim_step, group_norm
from worldenv.simulator import evac, layers, schedule, unet, vae

CASES = Path(__file__).parent / "golden" / "cases"


def case_names() -> list[str]:
    return sorted(path.parent.name for path in CASES.glob("*/case.json"))


@pytest.mark.parametrize("name", case_names())
def test_golden(name: str) -> None:
    rows = runner.judge(CASES / name)
    assert rows
    assert [row.line() for row in rows if not row.passed] == []


def test_every_kind_has_a_case() -> None:
    kinds = {json.loads((CASES / name / "case.json").read_text())["kind"] for name in case_names()}
    assert kinds == runner.KINDS.keys()


WRONG: dict[str, tuple[str, Any, str, str, str]] = {
    "temporal convolution sees the future": (
        "evac_unet", unet, "_over_frames", "[x[:, :1]] * (_TAPS - 1) + [x]", "[x[:, :1], x, x[:, -1:]]"),
    "temporal convolution padded with zeros": ("evac_unet", unet, "_over_frames", "[x[:, :1]] *", "[0 * x[:, :1]] *"),
    "image and action blocks swapped": (
        "evac_unet", unet.SpatialTransformer, "keys_values", "image if self.number % 2 else action", "action if self.number % 2 else image"),
    "GroupNorm over time per frame": (
        "evac_unet", layers.ClipNorm, "forward", "x.flatten(1, -2)", "x.flatten(0, 1).flatten(1, 2)"),
    "GroupNorm epsilons 1e-5 and 1e-6 swapped": ("evac_unet", group_norm, "group_norm", "add_(eps)", "add_(1.1e-5 - eps)"),
    "GroupNorm epsilon 1e-5 for 1e-6 in the autoencoder": ("evac_vae", layers.FrameNorm, "forward", "self.eps", "1e-5"),
    "tanh GELU": ("evac_unet", unet._Gated, "forward", "F.gelu(gate)", 'F.gelu(gate, approximate="tanh")'),
    "sines before cosines": ("evac_unet", unet, "timestep_embedding", "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]"),
    "memory frames at the chunk's noise level": ("evac_unet", unet.UNet, "forward", "torch.zeros_like(timesteps)", "timesteps"),
    "autoencoder pads on the left": ("evac_vae", vae._Downsample, "forward", "(0, 0, 0, 1, 0, 1)", "(0, 0, 1, 0, 1, 0)"),
    "posterior's variance for its deviation": ("evac_chunk_loop", vae.Posterior, "sample", "0.5 * self.logvar", "self.logvar"),
    "memory not put back after a step": (
        "evac_chunk_loop", ddim_step, "ddim_step_ref", "torch.cat([kept, x_prev], dim=2)",
        "torch.cat([x_prev[:, :, :remembered], x_prev], dim=2)"),
    "last alpha is 1": ("evac_chunk_loop", schedule.Sampler, "ddim", "process[:1]", "[1.0]"),
    "no dynamic rescale": ("evac_chunk_loop", ddim_step, "step_ref", "signal * x - rest * v) * rescale", "signal * x - rest * v)"),
    "guidance deviation over the chunk only": (
        "evac_sampler", ddim_step, "rescale_guidance", "conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)",
        "conditional[:, :, 4:].std(axes, keepdim=True) / guided[:, :, 4:].std(axes, keepdim=True)"),
    "memory is the last four frames": (
        "evac_chunk_loop", evac, "memory_indices", "[frames * k // (memory - 1) for k in range(memory - 1)] + [frames - 1]",
        "list(range(frames - memory, frames))"),
    "aligned deltas for the published ones": ("evac_chunk_loop", evac, "chunk_deltas", '"published" and number', '"published" and False'),
    "latents not scaled": ("evac_chunk_loop", evac.Evac, "decode", "latents / self.latent_scale", "latents"),
    "intrinsics not scaled": ("action_maps", action_map, "resized", "camera.intrinsics * stretch", "camera.intrinsics"),
    "depth tested": (
        "action_maps", action_map, "project", "np.ones_like(z)], axis=-1)", "np.ones_like(z)], axis=-1) * np.where(z > 0, 1.0, np.nan)[..., None]"),
    "pixels rounded": ("action_maps", action_map, "pictures", "np.trunc(", "np.round("),
    "rays through pixel corners": ("action_maps", map_kernels, "rays_ref", "np.arange(width) + 0.5", "np.arange(width)"),
    "deltas not wrapped": ("action_maps", action_map, "deltas", "_wrap(np.diff(angles, axis=-3))", "np.diff(angles, axis=-3)"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_implementations_fail(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, owner, name, old, new = WRONG[wrong]
    mutate(monkeypatch, owner, name, old, new)
    for user in (evac, layers, golden_evac):  # who imported the function by its name
        if inspect.ismodule(owner) and hasattr(user, name):
            monkeypatch.setattr(user, name, getattr(owner, name))
    rows = runner.judge(CASES / case)
    assert any(row.error is not None and not row.passed for row in rows), "measured as right"


# The runner itself


def planted(folder: Path, limits: dict[str, Any], tensors: dict[str, torch.Tensor], kind: str = "evac_resamplers") -> Path:
    """A copy of the resampler case in `folder` with other limits and stored outputs."""
    shutil.copytree(CASES / "evac_resamplers", folder)
    case = json.loads((folder / "case.json").read_text())
    (folder / "case.json").write_text(json.dumps({**case, "kind": kind, "limits": limits}))
    save_file({**load_file(folder / "tensors.safetensors"), **tensors}, folder / "tensors.safetensors")
    return folder


def verdict(capsys: pytest.CaptureFixture[str], *folders: Path) -> tuple[int, list[dict[str, Any]]]:
    code = runner.main([str(folder) for folder in folders])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]


def test_runner_passes_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = verdict(capsys, planted(tmp_path / "one", {"image_out": {"max_abs": 3e-5}}, {}).parent)
    assert code == 0
    assert [row["tensor"] for row in rows] == ["image_out"]
    assert rows[0].keys() == {"case", "tensor", "error", "limit", "pass"}


@pytest.mark.parametrize(
    ("limits", "tensors", "kind"),
    [
        ({"image_out": {"max_abs": 3e-5}}, {"image_out": torch.zeros(2, 256, 64)}, "evac_resamplers"),
        ({"image_out": {"max_abs": 3e-5}}, {"image_out": torch.zeros(2, 256, 63)}, "evac_resamplers"),
        ({"image_out": {"max_abs": 3e-5}}, {"image_out": torch.full((2, 256, 64), float("nan"))}, "evac_resamplers"),
        ({"*_out": {"max_abs": 3e-5}}, {"other_out": torch.zeros(1)}, "evac_resamplers"),
        ({"nothing": {"max_abs": 3e-5}, "image_out": {"max_abs": 3e-5}}, {}, "evac_resamplers"),
        ({"image_out": {"max_typo": 3e-5}}, {}, "evac_resamplers"),
        ({"image_out": {}}, {}, "evac_resamplers"),
        ({}, {}, "evac_resamplers"),
        ({"image_out": {"max_abs": 3e-5}}, {}, "evac_of_tomorrow"),
        ({"image_out": {"max_abs": 3e-5}}, {}, "evac_vae"),
    ],
    ids=["wrong", "shape", "nan", "not produced", "names nothing", "unknown limit", "empty limit", "no limit", "unknown kind", "crash"],
)
def test_runner_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limits: dict[str, Any], tensors: dict[str, torch.Tensor], kind: str
) -> None:
    code, rows = verdict(capsys, planted(tmp_path / "one", limits, tensors, kind), CASES / "evac_resamplers")
    assert code == 1
    assert not all(row["pass"] for row in rows)
    assert any(row["pass"] for row in rows), "the sound case beside it is still judged"


def test_runner_fails_without_a_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = verdict(capsys, tmp_path)
    assert code == 1
    assert [row["pass"] for row in rows] == [False]


@pytest.mark.parametrize("missing", ["folder", "case", "case.json"])
def test_a_sound_case_beside_it_does_not_hide_a_missing_one(missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = planted(tmp_path / "all" / "one", {"image_out": {"max_abs": 3e-5}}, {}).parent
    folders = [folder]
    if missing == "case.json":
        shutil.copytree(folder / "one", folder / "two")
        (folder / "two" / "case.json").unlink()
    else:
        folders.append(tmp_path / "none")
        if missing == "case":
            folders[-1].mkdir()
    code, rows = verdict(capsys, *folders)
    assert code == 1
    assert [row["pass"] for row in rows] == [True, False]


def test_samples_of_a_sampler_case_have_their_own_fps_and_domain(tmp_path: Path) -> None:
    shutil.copytree(CASES / "evac_unet", tmp_path / "evac_unet")
    case = json.loads((CASES / "evac_sampler" / "case.json").read_text())
    case["runs"] = {"eta1": {**case["runs"]["eta1"], "steps": 2}}
    one = {key: value for key, value in load_file(CASES / "evac_sampler" / "tensors.safetensors").items() if key[:3] != "eta0"}
    one["eta1.noise.steps"] = one["eta1.noise.steps"][:2]
    other = {**one, "eta1.in.fs": one["eta1.in.fs"] + 22, "eta1.in.domain_id": one["eta1.in.domain_id"] - 4}
    batched = [key for key in one if key.startswith("eta1.") and ".tab." not in key]
    both = {**one, **{key: torch.cat([one[key], other[key]], dim=int(key == "eta1.noise.steps")) for key in batched}}
    made = []
    for i, tensors in enumerate((one, other, both)):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        save_file(tensors, folder / "tensors.safetensors")
        made.append(golden_evac.evac_sampler(folder, case)["eta1.out.latents"])
    assert (made[0] - made[1]).abs().max() > 1e-2, "neither is heard"
    torch.testing.assert_close(made[2], torch.cat(made[:2]), rtol=0.0, atol=2e-5)


def test_first_matching_limit_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = {"action16_out": {"max_abs": 10.0}, "action*_out": {"max_abs": 3e-5}, "image_out": {"max_abs": 3e-5}}
    shifted = load_file(CASES / "evac_resamplers" / "tensors.safetensors")["action16_out"] + 1.0
    code, rows = verdict(capsys, planted(tmp_path / "one", limits, {"action16_out": shifted}))
    assert code == 0
    assert {row["tensor"]: row["limit"] for row in rows}["action16_out"] == "max_abs 10"


def test_fractions_are_of_pixels_per_picture() -> None:
    want = np.zeros((4, 10, 10, 3), np.uint8)
    ours = want.copy()
    ours[2, :5, 0] = [1, 0, 1]  # 5 of 100 pixels of one of four pictures, however many channels differ
    assert runner.measure(ours, want, "max_fraction_different") == pytest.approx(0.05)
    assert runner.measure(ours, want, "mean_fraction_different") == pytest.approx(0.0125)
    with pytest.raises(ValueError, match="unknown limit"):
        runner.measure(ours, want, "median")
