"""Engines as data: every recipe at every scale, against the networks that it is of; nothing is exported here."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_policy import SMALL, small_policy
from test_reflector import SMALL as SMALL_REFLECTOR
from test_simulator import SMALL as SIMULATOR
from test_simulator import trained

from worldenv import compiled
from worldenv.benchmarks import engine_rows, networks
from worldenv.engines import backend, export, parity, policy_backbone, policy_heads, reflector_llm, reflector_vision, simulator_unet, simulator_vae
from worldenv.engines.eager import Eager
from worldenv.engines.recipe import Binding, EngineError, EngineRecipe, relative_error
from worldenv.kernels import group_norm
from worldenv.presets import EVAC, EVAC_RLINF, LLAVA_ONEVISION, OPENVLA_OFT, TINY
from worldenv.reflector import judge as judge_module
from worldenv.reflector import weights
from worldenv.reflector.contract import scored
from worldenv.reflector.judge import Watching
from worldenv.simulator.evac import Evac
from worldenv.simulator.layers import FrameNorm, UpsampleConv
from worldenv.simulator.unet import CausalConv, FeedForward, ResBlock, SpatialTransformer


def everything(evac=TINY.simulator, oft=TINY.policy, llava=TINY.reflector, precision="fp32"):  # type: ignore[no-untyped-def]
    return [
        simulator_unet.recipe(evac, precision), *simulator_vae.recipes(evac, precision), policy_backbone.recipe(oft, precision),
        policy_heads.recipe(oft), reflector_vision.recipe(llava, precision),
        reflector_llm.recipe(llava, (1, 2, 32), (2, 64, 4096), (0, 32, 8192), precision),
    ]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_every_scale_has_all_recipes(precision: str) -> None:
    for sizes in ((), (EVAC, OPENVLA_OFT, LLAVA_ONEVISION), (engine_rows.NARROW_EVAC, engine_rows.NARROW_OFT, engine_rows.NARROW_LLAVA)):
        recipes = everything(*sizes, precision=precision)
        assert tuple(one.name for one in recipes) == compiled.NAMES
        assert all(one.tolerance > 0 and one.plain() for one in recipes)
    assert {one.name for one in recipes if one.refit} == {"policy_backbone", "policy_heads"}
    assert [one.name for one in recipes if not one.few] == ["reflector_llm"]
    assert [one.name for one in recipes if one.precision == "fp8"] == (["simulator_unet"] if precision == "fp8" else [])


@pytest.mark.parametrize("config", [TINY.simulator, EVAC, SIMULATOR, engine_rows.NARROW_EVAC], ids=["tiny", "published", "small", "narrow"])
def test_a_unet_recipe_has_the_widths_of_the_network(config) -> None:  # type: ignore[no-untyped-def]
    """Time rows and attention blocks in the network's own order; a recipe that swapped two blocks would differ."""
    unet = networks.meta_simulator(config).unet
    residual, attention = simulator_unet.widths(config.unet)
    assert residual == [one.emb_layers[-1].out_features for one in unet.modules() if isinstance(one, ResBlock)]
    assert attention == [one.proj_in.out_features for one in unet.modules() if isinstance(one, SpatialTransformer)]
    given = networks.inputs(config, networks.Setting(torch.device("meta"), torch.float32, "published"))
    pairs = unet.keys_values(given["image"], given["action"])
    recipe = simulator_unet.recipe(config, batch=(1, 1, 2))
    shapes = [recipe.shape(one, 1) for one in recipe.inputs]
    assert shapes[0] == tuple(given["x"].shape)
    assert shapes[3:] == [tuple(tensor.shape) for pair in pairs for tensor in pair]


def test_eager_networks_take_what_their_recipes_say() -> None:
    simulator = Evac.initialised(SIMULATOR, 0).eval()
    judge = weights.initialise(SMALL_REFLECTOR, ("push",), 0)
    policy = small_policy(SMALL)
    for network in compiled.of_rollout(policy, simulator, judge, Watching(["push"], 8, 4)):
        for at in (0, 1):
            given = network.recipe.example(at)
            network.recipe.check(given)
            with torch.no_grad():
                made = network.eager(*given)
            made = made if isinstance(made, tuple) else (made,)
            assert len(made) == len(network.recipe.outputs), network.name
            assert all(bool(torch.isfinite(one).all()) for one in made), network.name


@pytest.mark.parametrize("layer", [CausalConv(6), FeedForward(6), UpsampleConv(6)], ids=lambda one: type(one).__name__)
def test_a_folded_layer_is_the_layer(layer: torch.nn.Module) -> None:
    """Of clips that are no square, with random weights; and it is folded: nothing that could be is left in what is exported."""
    x = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    recipe = EngineRecipe("toy", (Binding("x", {"clip": (1, 2, 4), "frame": 3, "height": 4, "width": 5, "channel": 6}),), ("y",), 1e-5)
    folded = export.prepared(torch.nn.Sequential(layer), recipe)
    assert not any(hasattr(one, "folded") for one in folded.modules())
    with torch.no_grad():
        want = layer(x)
        assert float(want.std()) > 0.1
        torch.testing.assert_close(folded(x), want, rtol=1e-5, atol=1e-5)


def test_a_graph_has_another_name_where_what_it_is_made_of_is_written_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norms of a compiled graph are written in kernels/, where no layer's class is."""
    recipe = EngineRecipe("toy", (Binding("x", {"height": 2, "width": 2, "channel": 6}),), ("y",), 1e-5)
    layer = FrameNorm(3, 6)
    before = export.architecture(layer, recipe)
    assert export.architecture(layer, recipe) == before
    changed = tmp_path / "group_norm.py"
    changed.write_text(Path(str(group_norm.__file__)).read_text() + "# otherwise")
    monkeypatch.setattr(group_norm, "__file__", str(changed))
    assert export.architecture(layer, recipe) != before


def test_a_graphs_name_does_not_depend_on_what_was_imported_before() -> None:
    code = (
        "from torch import nn\nfrom worldenv.engines import export\nfrom worldenv.engines.recipe import Binding, EngineRecipe\n"
        "given = nn.Linear(3, 2), EngineRecipe('toy', (Binding('x', {'batch': (1, 2, 4), 'width': 3}),), ('y',), 1e-5)\n"
        "before = export.architecture(*given)\nimport worldenv.compiled\nassert export.architecture(*given) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_does_not_fit_is_named() -> None:
    recipe = EngineRecipe("toy", (Binding("x", {"batch": (1, 2, 4), "width": 3}), Binding("y", {"batch": (1, 2, 4)}, "int64")), ("z",), 1e-5)
    x, y = recipe.example(1)
    recipe.check((x, y))
    for wrong, said in (
        ((x,), "1 inputs, want 2"),
        ((x.double(), y), "input x"),
        ((x[:, :2], y), "input x"),
        ((x.repeat(3, 1), y.repeat(3)), "input x"),
        ((x, y[:1]), "input y"),
    ):
        with pytest.raises(EngineError, match=said):
            recipe.check(wrong)
    with pytest.raises(ValueError, match="one name, one range"):
        dataclasses.replace(recipe, inputs=(recipe.inputs[0], Binding("y", {"batch": (1, 2, 8)})))
    with pytest.raises(ValueError, match="min <= opt <= max"):
        dataclasses.replace(recipe, inputs=(Binding("x", {"batch": (4, 2, 1)}),))
    assert recipe.shape(recipe.inputs[0], {"batch": 3}) == (3, 3)


def test_a_batch_of_any_bucket_is_in_range() -> None:
    """`loop.bucket` has no limit, and engines are made for it."""
    judge = weights.initialise(SMALL_REFLECTOR, ("push",), 0)
    networks = compiled.of_rollout(small_policy(SMALL), Evac.initialised(SIMULATOR, 0), judge, Watching(["push"], 8, 4), "fp32", 48)
    most = {one.name: next(high for _, _, high in one.recipe.ranges.values()) for one in networks}
    assert most["simulator_unet"] == most["policy_backbone"] == most["policy_heads"] == 48


@pytest.mark.parametrize("sampler", ["uniform", "stable_dyadic"])
@pytest.mark.parametrize(("videos", "steps"), [(3, 32), (40, 8), (2, 4), (2, 30)])
def test_every_pass_of_watched_videos_is_in_range(monkeypatch: pytest.MonkeyPatch, sampler: Any, videos: int, steps: int) -> None:
    """At the published size and 216 steps, rows of the uniform sampler have up to 13704 tokens, and of the other up to 3904."""
    monkeypatch.setattr(judge_module, "ROW_TOKENS", 300)
    monkeypatch.setattr(compiled, "ROW_TOKENS", 300)
    judge = weights.initialise(dataclasses.replace(SMALL_REFLECTOR, sampler=sampler), ("push", "push it there"), 0).freeze()
    judge.head = weights.fresh_head(judge.config, 0)
    texts = ["push", "push it there"]
    recipe = compiled.of_reflector(judge, Watching(texts, steps, 4))[1].recipe
    read, seen = judge.llava.runs[recipe.name], list[dict[str, int]]()

    def checked(*given: torch.Tensor) -> Any:
        wide = [one.expand(len(given[0]), *one.shape[1:]) for one in given[:4]]
        recipe.check([*wide, given[4]])
        seen.append(recipe.lengths([*wide, given[4]]))
        return read(*given)

    judge.llava.runs[recipe.name] = checked
    side = judge.config.image
    frames = torch.zeros(videos, 1 + steps, side, side, 3, dtype=torch.uint8)
    scored(judge, [texts[i % 2] for i in range(videos)], frames[:, 0], frames[:, 1:], 4)
    if steps % 4 == 0:  # and no more than that
        assert max(one["new"] for one in seen) == recipe.ranges["new"][2]
        assert max([2, *(one["old"] for one in seen)]) == recipe.ranges["old"][2]


class Difference(torch.nn.Module):
    """Stands in for a network's own module."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x - y


def test_inputs_that_an_engine_was_not_built_for_run_by_the_module_and_that_is_said_once() -> None:
    recipe = EngineRecipe("toy", (Binding("x", {"batch": (1, 2, 4), "width": 3}), Binding("y", {"batch": (1, 2, 4), "width": 3})), ("z",), 1e-5)
    engine = Eager(lambda x, y: x + y, recipe)
    engine.back_end = "another"
    network = compiled.Network(recipe, Difference(), Difference, {})
    compiled.place([compiled.Choice(network, engine, None, None)])
    other = network.runs["toy"]
    long, fits = torch.ones(5, 3), torch.ones(4, 3)
    assert torch.equal(other(fits, fits[:1]), 2 * fits)
    with pytest.warns(RuntimeWarning, match=r"toy: input x is \(5, 3\).*want \(batch 1..4, width 3\).*eager runs what is outside"):
        assert torch.equal(other(long, long), 0 * long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(other(long, long), 0 * long)
        assert torch.equal(other(torch.ones(6, 3), torch.ones(1, 3)), torch.zeros(6, 3))
        assert torch.equal(other(fits, fits), 2 * fits)


def test_a_batch_that_a_narrow_engine_was_not_built_for_runs_by_the_wide_module() -> None:
    """Keys and values are the engine's bfloat16 by then, the rest is float32."""
    simulator = trained(SIMULATOR)
    network = compiled.of_simulator(simulator, "bf16", batch=(1, 1, 2))[0]
    wide = network.recipe.example({"batch": 3})
    engine = Eager(lambda *given: pytest.fail("it was not built for three"), network.recipe)
    engine.back_end = "another"
    run = compiled.Choice(network, engine, None, None).run
    with pytest.warns(RuntimeWarning, match=r"input x is \(3, .*eager runs what is outside"):
        made = run(*(one.float() for one in wide[:3]), *wide[3:])
    with torch.no_grad():
        assert torch.equal(made, network.eager(*(one.float() for one in wide)))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("config", [TINY.simulator, EVAC, EVAC_RLINF], ids=["tiny", "EVAC", "EVAC of 256 px"])
def test_the_autoencoder_is_given_no_more_pictures_than_its_engines_take(config, kind: str) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        simulator = Evac(config)
    most = simulator._pictures_per_call(torch.device(kind))
    for recipe in simulator_vae.recipes(config):
        assert 1 <= most <= recipe.ranges["picture"][2]


def test_how_a_cpu_calls_a_graph_is_no_part_of_its_name() -> None:
    one = EngineRecipe("toy", (Binding("x", {"batch": (1, 2, 4), "width": 3}),), ("z",), 1e-5)
    assert dataclasses.replace(one, cpu_rows=2).plain() == one.plain()


def test_rows_that_are_cut_are_the_first_axis_of_all_that_varies() -> None:
    one = EngineRecipe("toy", (Binding("x", {"batch": (1, 2, 4), "width": 3}), Binding("w", {"width": 3})), ("z",), 1e-5, cpu_rows=2)
    for wrong in (
        {"cpu_rows": 0},
        {"inputs": (Binding("x", {"width": 3, "batch": (1, 2, 4)}),)},
        {"inputs": (Binding("x", {"batch": (1, 2, 4), "width": (1, 2, 3)}),)},
        {"inputs": (Binding("x", {"width": 3}),)},
    ):
        with pytest.raises(ValueError, match="cpu_rows"):
            dataclasses.replace(one, **wrong)


def test_what_is_not_a_number_is_infinitely_far() -> None:
    want = torch.ones(4)
    assert relative_error(want, want) == 0.0
    for wrong in (torch.tensor([1.0, 1, 1, value]) for value in (float("nan"), float("inf"), -float("inf"))):
        assert relative_error(wrong, want) == relative_error(want, wrong) == relative_error(wrong, wrong) == float("inf")
    assert relative_error(torch.ones(3), want) == float("inf")
    assert relative_error(2 * want, want) == pytest.approx(1.0)


def test_an_engine_does_not_pass_where_eager_is_not_a_number() -> None:
    recipe = EngineRecipe("toy", (Binding("x", {"batch": (1, 2, 4)}),), ("y",), 1e-5)
    given = [recipe.example()]
    for eager in (lambda x: x / 0, lambda x: x * float("nan")):
        assert not parity.compare(recipe, "another", lambda x: x, eager, given).passed
    assert parity.compare(recipe, "another", lambda x: x, lambda x: x, given).passed


def test_the_worst_of_all_inputs_and_outputs_counts() -> None:
    recipe = EngineRecipe("toy", (Binding("x", {"batch": (1, 2, 4), "width": 3}),), ("y", "z"), 1e-5)
    calls = [(torch.full((1, 3), size),) for size in (1.0, 2.0, 3.0)]
    found = parity.compare(recipe, "toy", lambda x: (x * (1.1 if float(x[0, 0]) == 1.0 else 1.0), x), lambda x: (x, x), calls)
    assert found.max_rel_error == pytest.approx(0.1, rel=1e-4)  # of the first input's first output
    assert not found.passed


def test_back_ends_are_named_and_what_they_lack_too() -> None:
    with pytest.raises(ValueError, match="did you mean 'onnxruntime'"):
        backend.back_end("onnxruntim")
    for name in backend.BACK_ENDS:
        missing = backend.back_end(name).requires()
        assert missing is None or name in missing, name
    for name in ("tensorrt", "torch_tensorrt"):
        assert "install" in (backend.back_end(name).requires() or "install")


def test_an_architecture_that_is_not_here_names_the_machine_that_can() -> None:
    with pytest.raises(EngineError, match=r"inductor builds for the machine.*sm_90.*GPU of compute capability 9\.0"):
        backend.only_here("inductor", "sm_90", torch.device("cpu"))
    with pytest.raises(EngineError, match="hopper: no architecture"):
        backend.capability("hopper")
    assert backend.capability("sm_120") == (12, 0)
