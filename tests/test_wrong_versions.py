"""Wrong versions of policy, density and reflector, made by changing their source in one place: each is found by a test or a golden case, named here.

Those of the world model are in test_golden.py.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_policy
import test_policy_golden
import test_policy_processing
import test_reflector
from mutation import mutate
from test_golden import CASES

from tests.golden import __main__ as runner
from tests.golden import oft as golden_oft
from worldenv.kernels import frames as frame_kernels
from worldenv.kernels import laplace as laplace_kernels
from worldenv.learning.loop import advantage, loss, update
from worldenv.policy import heads, jpeg, llama, openvla_oft, processing, vision
from worldenv.reflector import cache, frames, judge

USERS = (golden_oft, heads, processing, openvla_oft, update, judge, cache)
"""Who imports functions by their names."""


def golden(case: str) -> Callable[[], None]:
    """The golden case as a test."""

    def check() -> None:
        rows = runner.judge(CASES / case)
        if any(row.error is None for row in rows):
            raise RuntimeError(f"{case}: not measured")  # a crash is no wrong number
        assert all(row.passed for row in rows)

    return check


def both_samplers(test: Callable[..., None], *given: Any) -> Callable[[], None]:
    def check() -> None:
        for sampler in ("uniform", "stable_dyadic"):
            test(sampler, *given)

    return check


def transformers() -> None:
    with tempfile.TemporaryDirectory() as folder:
        test_reflector.test_equals_transformers_on_a_saved_directory(Path(folder), 24, 5)


MODEL, HEAD, PICTURE = golden("oft_model"), golden("oft_head"), golden("preprocess")
GROWING = both_samplers(test_reflector.test_judging_a_growing_video_equals_reading_it_anew, "last", 12)
GROWING_MEAN = both_samplers(test_reflector.test_judging_a_growing_video_equals_reading_it_anew, "mean", 12)
CHANGED_FRAMES = both_samplers(test_reflector.test_a_watch_is_never_changed_and_frames_count_as_they_are_now)

WRONG: dict[str, tuple[Any, str, str, str, Callable[[], None]]] = {
    # the network
    "causal attention": (llama._Attention, "forward", "attn_mask=mask, ", "attn_mask=None, is_causal=True, ", MODEL),
    "padding is seen": (llama._Attention, "forward", "mask = None if visible is None else visible[:, None, None, :]", "mask = None", MODEL),
    "SigLIP's features before DINOv2's": (
        vision.VisionBackbone, "forward", "[self.featurizer(views[:, :3]), self.fused_featurizer(views[:, 3:])]",
        "[self.fused_featurizer(views[:, 3:]), self.featurizer(views[:, :3])]", MODEL),
    "SigLIP's pixels to DINOv2": (
        vision.VisionBackbone, "forward", "self.featurizer(views[:, :3]), self.fused_featurizer(views[:, 3:])",
        "self.featurizer(views[:, 3:]), self.fused_featurizer(views[:, :3])", MODEL),
    "registers are read as patches": (vision.VisionTower, "forward", "x[:, self._prefix :]", "x[:, : self.patches]", MODEL),
    "no LayerScale": (vision.LayerScale, "forward", "x * self.scale_factor", "x", MODEL),
    "slice one later": (openvla_oft.Network, "forward", "[:, :slots])", "[:, 1 : slots + 1])", MODEL),
    "slots hold an embedding": (
        openvla_oft.Network, "forward", "text.new_zeros(batch, slots, text.shape[2])", "stop.expand(-1, slots, -1)", MODEL),
    "no stop token": (openvla_oft.Network, "forward", "text.shape[2]), stop]", "text.shape[2]), 0 * stop]", MODEL),
    "proprio before the patches": (
        openvla_oft.Network, "forward", "first.append(projector(proprio.to(projector.fc1.weight.dtype)).to(text.dtype)[:, None])",
        "first.insert(1, projector(proprio.to(projector.fc1.weight.dtype)).to(text.dtype)[:, None])", MODEL),
    "hiddens before the last norm": (llama.LlamaModel, "forward", "self.norm(x)", "x", MODEL),
    "rotary pairs side by side": (llama, "_rotate", "torch.cat([-high, low], dim=-1)", "torch.stack([-high, low], dim=-1).flatten(-2)", MODEL),
    "slots of a dimension in a row": (
        heads, "by_step", "hidden.float().reshape(batch, slots // ACTION_DIM, ACTION_DIM * width)",
        "hidden.float().reshape(batch, ACTION_DIM, slots // ACTION_DIM, width).transpose(1, 2).flatten(2)", MODEL),
    # what goes in and comes out
    "unclipped proprio": (processing.Bounds, "normalise", ".clamp(-1.0, 1.0)", "", test_policy.test_proprio_is_clipped_at_inference_too),
    "gripper's sign": (processing.Statistics, "to_command", "-1.0, 1.0)\n", "1.0, -1.0)\n", test_policy_processing.test_gripper_conventions),
    "crop by side": (frame_kernels, "centre_crop", "float(np.sqrt(np.float32(area)))", "area", PICTURE),
    "crop rounds": (frame_kernels, "centre_crop", "255.5", "255.0 + 0.5", PICTURE),
    "resize without antialias": (frame_kernels, "_lanczos3_matrix", "max(step, 1.0)", "1.0", PICTURE),
    "chroma of the nearest sample": (jpeg, "_enlarge", "3 * tall + left", "4 * tall", test_policy_golden.test_jpeg_is_exact),
    "no 29871": (
        processing.PromptTokenizer, "_encode", "ids if ids[-1] == self.empty else [*ids, self.empty]", "ids",
        test_policy_processing.test_built_tokenizer_keeps_llamas_ids_and_ends_with_the_empty_token),
    # density and LOOP
    "draws with another factor than scores": (
        openvla_oft.OpenVLAOFT, "act", "laplace.draw(mu, log_scale", "laplace.draw(mu, log_scale + 0.7",
        lambda: test_policy.test_greedy_is_mu_and_a_draw_is_the_inverse_cdf()),
    "scores with another factor than draws": (
        openvla_oft.OpenVLAOFT, "evaluate_actions", "laplace.log_prob(action.to(mu.device), mu, log_scale)",
        "laplace.log_prob(action.to(mu.device), mu, log_scale - torch.tensor(self.scale_factor).log())",
        lambda: test_policy.test_score_is_that_of_the_density_that_drew(3.0)),
    "scores with a clamp that draws do not know": (
        openvla_oft.OpenVLAOFT, "evaluate_actions", "laplace.log_prob(action.to(mu.device), mu, log_scale)",
        "laplace.log_prob(action.to(mu.device), mu, log_scale.clamp(-2.0, 0.5))",
        lambda: test_policy.test_score_is_that_of_the_density_that_drew(1.0)),
    "factor only in draws": (
        openvla_oft.OpenVLAOFT, "density", "self.scale_factor, self", "1.0, self",
        lambda: test_policy.test_score_is_that_of_the_density_that_drew(3.0)),
    "normal density": (laplace_kernels, "log_density", "(action - mu).abs()", "(action - mu) ** 2", HEAD),
    "its own return in the baseline": (advantage, "baseline", "(total[index] - value) / (size[index] - 1)", "total[index] / size[index]", HEAD),
    "no clipping": (laplace_kernels, "clipped_ref", "ratio.clamp(1.0 - clip, 1.0 + clip)", "ratio", HEAD),
    "steps that were not executed count": (loss, "surrogate", "float(live.sum())", "live.numel()", HEAD),
    # the reflector
    "features of another video's frames kept by number": (
        judge.LlavaReflector, "judge", "features = self.llava.encode(frames.flatten(0, 1))",
        'features = self.__dict__.setdefault(f"{watch[0].length}", self.llava.encode(frames.flatten(0, 1)))', CHANGED_FRAMES),
    "keys and values kept by the numbers of frames": (
        judge.LlavaReflector, "_remember", "past=torch.cat(pieces, dim=-2)",
        'past=self.__dict__.setdefault(f"{trunk}", torch.cat(pieces, dim=-2))', CHANGED_FRAMES),
    "one old frame too many is reused": (
        cache, "_row", "reused = max(shared_length(known, path) for path in lists)",
        "reused = len(known)\n    lists = [known + p[len(known) :] for p in lists]", GROWING),
    "sums of frames that left": (judge.LlavaReflector, "_pool", "watch.total[:known].sum(0)", "watch.total.sum(0)", GROWING_MEAN),
    "a mean over one frame less": (
        judge.LlavaReflector, "_pool", "(row.depth[end] + 1) * geometry.frame", "row.depth[end] * geometry.frame", transformers),
    "a position is skipped before each frame": (
        cache, "_layout", "geometry.before + row.depth[i] * geometry.frame", "geometry.before + row.depth[i] * (geometry.frame + 1)", transformers),
    "stride doubles one frame late": (frames, "_stride", "t > stride * (limit - 1)", "t > stride * limit", test_reflector.test_shown_frames),
    "CLIP's pixels": (
        frame_kernels, "for_reflector_ref", "pixels / 127.5 - 1", "(pixels / 255 - 0.45) / 0.27",
        test_reflector.test_pixels_run_from_minus_one_to_one),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    """Neither of the right version in a wrong one, nor the other way round."""
    remembered = (cache.plan, frames.shown, frame_kernels._lanczos3_matrix, frame_kernels._crop_matrix)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_versions_are_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, old, new, check = WRONG[wrong]
    right = getattr(owner, name)
    mutate(monkeypatch, owner, name, old, new)
    if inspect.ismodule(owner):
        for user in USERS:
            if getattr(user, name, None) is right:
                monkeypatch.setattr(user, name, getattr(owner, name))
    monkeypatch.setattr(cache, "_remembered_layout", cache._layout)  # which holds the right one
    with pytest.raises(AssertionError):
        check()


def test_right_versions_pass() -> None:
    """Else every wrong one would count as found."""
    for check in {id(row[-1]): row[-1] for row in WRONG.values()}.values():
        check()
