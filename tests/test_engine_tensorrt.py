"""TensorRT's own parser and builder on our graphs, without a GPU: plans for four architectures are built, never run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_engine_refit import Fake as Refitter
from torch import nn

from worldenv import compiled
from worldenv.benchmarks import engine_rows
from worldenv.cli import engine as command
from worldenv.engines import backend, export, tensorrt, torch_tensorrt
from worldenv.engines.recipe import Binding, EngineError, EngineRecipe
from worldenv.engines.refit import RefitError, refit_tensorrt
from worldenv.engines.store import Store

ARCHES = ("sm_80", "sm_86", "sm_89", "sm_120")
NO_DRIVER = "cudaError 35"
"""What the builder says of a machine without a GPU, on its way to a plan."""
rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx, which make check installs")


@pytest.fixture(scope="module")
def tiny() -> dict[str, compiled.Network]:
    """The tiny preset's, as on a GPU: in bfloat16, the policy's in float32, by name."""
    return {one.name: one for one in engine_rows.subject("tiny", "preset", None, torch.device("cpu"), "bf16").networks}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("engines"))


@rtx
@pytest.mark.slow
@pytest.mark.parametrize("name", compiled.NAMES)
def test_a_network_parses_and_builds_for_every_architecture(name: str, tiny: dict[str, compiled.Network], store: Store) -> None:
    """Strongly typed; beside each plan the builder's log and its timing cache."""
    network = tiny[name]
    plans = [backend.planned("tensorrt_rtx", network.plain(), network.recipe, arch, store) for arch in ARCHES]
    assert len({plan.key for plan in plans}) == len(ARCHES)
    for plan in plans:
        assert (plan.folder / tensorrt.PLAN).stat().st_size > 10_000
        said = (plan.folder / tensorrt.LOG).read_text().splitlines()
        assert [line for line in said if line.startswith("ERROR") and NO_DRIVER not in line] == []
        assert (plan.folder / tensorrt.TIMING).is_file()
        assert not (plan.folder / export.WEIGHTS).exists()
        assert store.parity(plan.key) is None  # built, never run


@rtx
@pytest.mark.slow
def test_float32_is_not_rounded_to_tf32() -> None:
    trt = tensorrt.library("tensorrt_rtx")
    builder = trt.Builder(trt.Logger())
    assert builder.create_builder_config().get_flag(trt.BuilderFlag.TF32)
    assert not tensorrt._configured(trt, builder).get_flag(trt.BuilderFlag.TF32)


@rtx
@pytest.mark.slow
@pytest.mark.parametrize("name", ["policy_backbone", "policy_heads"])
def test_the_parser_names_every_weight_that_is_refitted(name: str, tiny: dict[str, compiled.Network], store: Store, tmp_path: Path) -> None:
    """And what it knows no weight by is an error."""
    network, trt = tiny[name], tensorrt.library("tensorrt_rtx")
    module = export.prepared(network.plain(), network.recipe)
    weights = list(export.state(module))
    export.exported(module, network.recipe, store, tmp_path, tensorrt.OPSET)
    logger = tensorrt._logger(trt, [])
    builder = trt.Builder(logger)
    parsed, _parser = tensorrt._parsed(trt, builder, logger, tmp_path / export.GRAPH, network.recipe)
    tensorrt._refittable(trt, parsed, tensorrt._configured(trt, builder), network.recipe, weights)
    with pytest.raises(EngineError, match="knows no weight another"):
        tensorrt._refittable(trt, parsed, tensorrt._configured(trt, builder), network.recipe, [*weights, "another"])


@rtx
@pytest.mark.slow
def test_the_command_builds_for_other_machines_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also that an architecture which no library here builds for names who can; exit code 1 then."""
    store = str(tmp_path / "store")
    assert command.main(["build", "--preset", "tiny", "--only", "policy_heads", "--arch", "sm_89,sm_90", "--store", store]) == 1
    out, err = capsys.readouterr()
    rows = {row["arch"]: row for row in json.loads(out)["rows"]}
    assert rows["sm_89"]["state"] == command.NEVER_RUN
    assert "built, never run" in err
    assert "no target sm_90" in rows["sm_90"]["error"]
    assert "on such a machine" in rows["sm_90"]["error"]
    assert command.main(["list", "--store", store]) == 0
    assert "built, never run" in capsys.readouterr().out


@rtx
@pytest.mark.slow
def test_a_plan_cannot_be_loaded_without_a_gpu_and_says_why(tiny: dict[str, compiled.Network], store: Store) -> None:
    network = tiny["policy_heads"]
    plan = backend.planned("tensorrt_rtx", network.plain(), network.recipe, "sm_89", store)
    with pytest.raises(EngineError, match="runs on an NVIDIA GPU, not on cpu"):
        backend.back_end("tensorrt_rtx").load(plan.folder, network.recipe, torch.device("cpu"))


def test_what_is_not_installed_is_named() -> None:
    for name in ("tensorrt", "torch_tensorrt"):
        if (missing := backend.back_end(name).requires()) is not None:
            assert name in missing
            assert "install" in missing
    if importlib.util.find_spec("tensorrt") is None:
        recipe = EngineRecipe("toy", (Binding("x", {"batch": (1, 2, 4)}),), ("y",), 1e-6)
        with pytest.raises(EngineError, match=r"tensorrt: No module named 'tensorrt'"):
            backend.planned("tensorrt", nn.Identity(), recipe, "sm_90", Store(Path("none")))


class FakeTorchTensorRT:
    """Of torch_tensorrt what refit uses: it may refuse."""

    def __init__(self, refuses: bool = False) -> None:
        self._refuses = refuses
        self.dynamo = SimpleNamespace(refit_module_weights=self._refit)

    def _refit(self, module: Any, program: torch.export.ExportedProgram) -> Any:
        if self._refuses:
            raise AssertionError("the weights do not match")
        return program.module()


def test_torch_tensorrt_is_refitted_from_the_program_that_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A -> B -> A against a fake library whose compiled module is the program itself."""
    recipe = EngineRecipe("toy", (Binding("x", {"batch": (1, 2, 4), "width": 3}),), ("y",), 1e-6, refit=True)
    module, (x,) = nn.Linear(3, 2), recipe.example()
    program = export.traced(export.prepared(module, recipe), recipe)
    for name in ("plan.ep", "program.pt2"):
        torch.export.save(program, tmp_path / name)
    monkeypatch.setattr(torch_tensorrt, "_library", FakeTorchTensorRT)
    engine = torch_tensorrt.TorchTensorRT(tmp_path, recipe)
    first = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    second = {name: tensor + 1 for name, tensor in first.items()}
    before = engine(x)
    with pytest.raises(RefitError, match="missing"):
        engine.refit({"weight": first["weight"]})
    with pytest.raises(RefitError, match=r"weight is \(3, 2\), the engine's \(2, 3\); nothing was changed"):
        engine.refit({**second, "weight": second["weight"].T})
    assert torch.equal(engine(x), before)
    engine.refit(second)
    assert torch.allclose(engine(x), x @ second["weight"].T + second["bias"], atol=1e-6)
    engine.refit(first)
    assert torch.equal(engine(x), before)
    monkeypatch.setattr(torch_tensorrt, "_library", lambda: FakeTorchTensorRT(refuses=True))
    with pytest.raises(RefitError, match="torch_tensorrt refused the weights"):
        engine.refit(second)


@pytest.mark.parametrize("part", ["compile", "save"])
def test_what_torch_tensorrt_does_not_compile_makes_auto_go_on(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*given: Any, **settings: Any) -> Any:
        raise ValueError("Found 1 graph breaks\nno converter for aten.foo")

    parts: dict[str, Any] = {"compile": lambda *given, **settings: None, "save": lambda *given, **settings: None, part: refuses}
    library = SimpleNamespace(dynamo=SimpleNamespace(compile=parts["compile"]), save=parts["save"], Input=dict)
    monkeypatch.setattr(torch_tensorrt, "_library", lambda: library)
    recipe = EngineRecipe("toy", (Binding("x", {"batch": (1, 2, 4), "width": 3}),), ("y",), 1e-6)
    arch = backend.compute_capability(torch.device("cpu"))
    with pytest.raises(EngineError, match=r"toy: torch_tensorrt does not compile it: no converter for aten\.foo"):
        torch_tensorrt.build(nn.Linear(3, 2), recipe, tmp_path, arch, Store(tmp_path))


class FakeConfig:
    """Of a builder's configuration what timings and refits need; it takes those timings that begin as they should."""

    def __init__(self) -> None:
        self.cache: bytes | None = None
        self.flags = set[str]()

    def create_timing_cache(self, held: bytes) -> bytes | None:
        return held if held in (b"", b"whole", b"other") else None

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        if cache is None:
            raise TypeError("incompatible function arguments")
        if cache == b"other" and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"whole")

    def add_optimization_profile(self, profile: Any) -> None: ...
    def set_compute_capability(self, target: Any, number: int) -> None: ...
    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)


@pytest.mark.parametrize("held", [b"whole", b"who", b"other", b"", None], ids=["whole", "half", "another device's", "empty", "none"])
def test_timings_that_tensorrt_refuses_are_said_and_measured_anew(held: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, kept = FakeConfig(), tmp_path / "tensorrt-sm_90.cache"
    if held is not None:
        kept.write_bytes(held)
    tensorrt._begin_with(config, kept)
    refused = held in (b"who", b"other")
    assert config.cache == (b"whole" if held == b"whole" else b"")
    assert capsys.readouterr().err.count("TensorRT refuses these timings") == refused


class FakeNetwork:
    """What the parser makes of a graph: weights and constants have names alike, and either can be marked to be refitted."""

    def __init__(self, weights: Collection[str]) -> None:
        self.named, self.marked = {*weights, "val_rates", "val_eps"}, list[str]()

    def mark_weights_refittable(self, name: str) -> bool:
        self.marked.append(name)
        return name in self.named


class FakeBuilder:
    """Its plans say which weights a refitter of theirs asks for."""

    def create_optimization_profile(self) -> Any:
        return SimpleNamespace(set_shape=lambda *given: None)

    def build_serialized_network(self, network: FakeNetwork, config: FakeConfig) -> bytes:
        asks = network.named if "REFIT" in config.flags else network.marked if "REFIT_INDIVIDUAL" in config.flags else ()
        return json.dumps(sorted(asks)).encode()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNetwork:
    """The library's place is taken; what exports writes nothing."""
    network = FakeNetwork(("weight", "bias"))
    flags = SimpleNamespace(REFIT="REFIT", REFIT_INDIVIDUAL="REFIT_INDIVIDUAL")
    library = SimpleNamespace(
        Builder=lambda logger: FakeBuilder(), ComputeCapability=SimpleNamespace(SM89=0), BuilderFlag=flags, __version__="1", __name__="tensorrt"
    )

    def exported(module: nn.Module, recipe: EngineRecipe, store: Store, folder: Path, opset: int) -> None:
        for name in (export.GRAPH, export.WEIGHTS):
            (folder / name).write_bytes(b"")

    for name, stand_in in (
        ("library", lambda name: library), ("_logger", lambda *given: None), ("_parsed", lambda *given: (network, None)),
        ("_configured", lambda *given: FakeConfig()), ("export.exported", exported), ("only_here", lambda *given: None),
    ):  # fmt: skip
        monkeypatch.setattr(f"worldenv.engines.tensorrt.{name}", stand_in)
    return network


def toy(refit: bool = False) -> EngineRecipe:
    return EngineRecipe("toy", (Binding("x", {"batch": (1, 2, 4), "width": 3}),), ("y",), 1e-6, refit=refit)


@pytest.mark.parametrize("refit", [True, False])
def test_a_plan_asks_for_the_weights_of_its_module_alone(refit: bool, fake: FakeNetwork, tmp_path: Path) -> None:
    """The graph's constants have names too, which no refit gives."""
    tensorrt.build_with("tensorrt", nn.Linear(3, 2), toy(refit), tmp_path, "sm_90", Store(tmp_path))
    engine = dict.fromkeys(json.loads((tmp_path / tensorrt.PLAN).read_bytes()), "A")
    assert engine.keys() == ({"weight", "bias"} if refit else set())
    refit_tensorrt("toy", Refitter(engine), dict.fromkeys(engine, "B"))
    assert set(engine.values()) <= {"B"}


def test_a_weight_that_is_not_in_the_graph_is_named(fake: FakeNetwork, tmp_path: Path) -> None:
    fake.named.remove("bias")
    with pytest.raises(EngineError, match="toy: tensorrt knows no weight bias in the graph"):
        tensorrt.build_with("tensorrt", nn.Linear(3, 2), toy(refit=True), tmp_path, "sm_90", Store(tmp_path))
    assert not (tmp_path / tensorrt.PLAN).exists()


def test_a_build_begins_with_all_memory_that_torch_can_spare(fake: FakeNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the network that was exported there is no copy left, here or on the GPU."""
    module, before = nn.Linear(3, 2), list[str]()
    build = FakeBuilder.build_serialized_network

    def emptied() -> None:
        before.append("emptied" if module.weight.is_meta else "emptied too early")

    def built(builder: FakeBuilder, *given: Any) -> bytes:
        before.append("built")
        return build(builder, *given)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", emptied)
    monkeypatch.setattr(FakeBuilder, "build_serialized_network", built)
    tensorrt.build_with("tensorrt", module, toy(), tmp_path, "sm_90", Store(tmp_path))
    assert before == ["emptied", "built"]


def test_an_architecture_without_a_target_is_refused_before_the_export(
    fake: FakeNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = list[str]()
    monkeypatch.setattr("worldenv.engines.tensorrt.export.exported", lambda *given: exports.append("one"))
    with pytest.raises(EngineError, match="tensorrt_rtx has no target sm_90, only SM89: for sm_90, use tensorrt or inductor"):
        tensorrt.build_with("tensorrt_rtx", nn.Linear(3, 2), toy(), tmp_path, "sm_90", Store(tmp_path))
    assert exports == []
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_is_killed_while_it_keeps_its_timings_leaves_the_old_ones(
    fake: FakeNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next build would begin with half a file."""

    def is_killed(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:3])
        raise KeyboardInterrupt

    folder = tmp_path / "plan"
    folder.mkdir()

    def build() -> None:
        tensorrt.build_with("tensorrt_rtx", nn.Identity(), toy(), folder, "sm_89", Store(tmp_path))

    build()
    (kept,) = (tmp_path / "timing").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", is_killed)
        with pytest.raises(KeyboardInterrupt):
            build()
    assert [path.read_bytes() for path in (tmp_path / "timing").iterdir()] == [kept.read_bytes()] == [b"whole"]
