"""The folder of a run: what is skipped, what is refused, and that nothing is overwritten."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from published_directories import write_policy, write_reflector
from small_policy import INSTRUCTIONS, published_policy

from worldenv import checkpoint, config, presets, train
from worldenv.checkpoint import CheckpointError
from worldenv.reflector import weights as reflectors
from worldenv.run import RECORD, Run, RunError, settings_of
from worldenv.simulator import weights as simulators
from worldenv.simulator.evac import Evac
from worldenv.simulator.weights import PREFIXES
from worldenv.stages import desk as desk_module
from worldenv.stages.desk import Desk

SMALLER = dataclasses.replace(presets.TINY.simulator, action_resampler=dataclasses.replace(presets.TINY.simulator.action_resampler, queries=8))


def work(run, stage, fingerprint, text="output"):
    with run.at_work(stage, fingerprint) as current:
        (current.folder / "data.txt").write_text(text)
        current.metrics["n"] = 3


def fail(run, stage, fingerprint="f"):
    def die():
        with run.at_work(stage, fingerprint) as current:
            current.savepoint("x").save({"step": 5})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        die()


def changed(settings, path, value):
    section, _, rest = path.partition(".")
    return dataclasses.replace(settings, **{section: changed(getattr(settings, section), rest, value) if rest else value})


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "out", presets.TINY)


def test_settings_round_trip(run):
    assert settings_of(run.out) == presets.TINY


def test_settings_of_another_version_are_named(run):
    path = run.out / "run.json"
    stored = json.loads(path.read_text())
    stored["settings"]["loop"]["magic"] = 1
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"LoopConfig: .*magic"):
        settings_of(run.out)


def test_a_stage_is_done_when_its_record_matches(run):
    assert not run.check("demos", "f")
    work(run, "demos", "f")
    assert run.check("demos", "f")
    assert not run.check("demos", "g")
    assert run.record("demos")["metrics"] == {"n": 3}


def test_the_fingerprint_follows_settings_and_inputs(run):
    work(run, "demos", "f", "one")
    first = run.fingerprint("sft", [presets.TINY.sft], ["demos"])
    assert first == run.fingerprint("sft", [presets.TINY.sft], ["demos"])
    assert first != run.fingerprint("sft", [dataclasses.replace(presets.TINY.sft, steps=1)], ["demos"])
    work(run, "demos", "g", "two")
    assert first != run.fingerprint("sft", [presets.TINY.sft], ["demos"])


def test_an_input_without_output_is_named(run):
    with pytest.raises(RunError, match="stage demos has no output"):
        run.fingerprint("sft", [], ["demos"])


def test_a_stage_that_fails_leaves_no_record_and_goes_on_with_the_same_fingerprint(run):
    fail(run, "demos")
    assert not run.check("demos", "f")
    with run.at_work("demos", "f") as current:
        assert current.savepoint("x").load() == {"step": 5}
    fail(run, "sft")
    with run.at_work("sft", "another") as current:
        assert current.savepoint("x").load() is None


def test_a_folder_that_a_run_came_no_further_in_is_begun_again(tmp_path):
    """A disk that was full, or a kill, before the settings were whole: the same command goes on."""
    for name in (".lock", ".run.json.4711.part"):
        (tmp_path / name).write_text("half")
    assert Run(tmp_path, presets.TINY).settings == settings_of(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / ".lock").touch()
    (other / "thesis.txt").touch()
    with pytest.raises(RunError, match="is no run of ours"):
        Run(other, presets.TINY)


def test_a_damaged_controller_is_named(run):
    path = run.folder("world") / "controller.json"
    path.parent.mkdir(parents=True)
    desk = SimpleNamespace(run=run)
    for left in (None, "", '{"gain": [1', "[]", "{}", '{"gain": 3}'):
        if left is not None:
            path.write_text(left)
        with pytest.raises(CheckpointError, match=r"controller\.json: .*--from world"):
            Desk.controller.func(desk)


def test_what_a_killed_process_had_half_written_is_no_output(run):
    """Else the stage's output would be another than that of a run that nobody killed, and what follows it would be done again."""
    work(run, "demos", "f")
    killed = """
import os, signal, sys
from pathlib import Path
from worldenv import checkpoint
with checkpoint.atomic(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with run.at_work("sft", "f") as current:
        (current.folder / "data.txt").write_text("output")
        for name in ("000029.npz", "deeper/000030.npz"):
            assert subprocess.run([sys.executable, "-c", killed, str(current.folder / name)]).returncode == -signal.SIGKILL
        assert len(list(current.folder.rglob("*.part"))) == 2
    records = [json.loads((run.folder(stage) / RECORD).read_text()) for stage in ("demos", "sft")]
    assert records[0]["output"] == records[1]["output"]
    assert not list(run.folder("sft").rglob("*.part"))
    assert run.check("sft", "f")


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damaged_output_is_named_and_left_alone(run, damage):
    work(run, "demos", "f")
    path = run.folder("demos") / "data.txt"
    if damage == "delete":
        path.unlink()
    else:
        path.write_text("outp" if damage == "truncate" else "outpux")
    before = path.read_text() if path.exists() else None
    with pytest.raises(CheckpointError, match=r"data\.txt: .*--from demos"):
        run.check("demos", "f")
    assert (path.read_text() if path.exists() else None) == before


@pytest.mark.parametrize("left", ['{"stage": "demos", "fing', "{}", "[]", '{"fingerprint": "f", "output": 3}', "\x00"])
def test_a_damaged_record_is_named(run, left):
    work(run, "demos", "f")
    (run.folder("demos") / RECORD).write_text(left)
    for look in (lambda: run.check("demos", "f"), lambda: run.record("demos"), lambda: run.fingerprint("sft", [], ["demos"])):
        with pytest.raises(CheckpointError, match=r"stage\.json: (truncated|damaged|not a record).*--from demos"):
            look()


@pytest.mark.parametrize("field", ["stage", "fingerprint", "output", "seconds", "peak_rss_mb", "metrics", "timings", "files", "beside"])
def test_a_record_without_a_field_is_named(run, field):
    work(run, "demos", "f")
    path = run.folder("demos") / RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), field: None}))
    with pytest.raises(CheckpointError, match=rf"stage\.json: damaged, or of another version \({field} is None\)"):
        run.record("demos")


@pytest.mark.parametrize("left", ['{"settings', "{}", '{"settings": []}', '{"settings": {}}', "null"])
def test_damaged_settings_are_named(run, left):
    (run.out / "run.json").write_text(left)
    with pytest.raises(CheckpointError, match=r"run\.json: "):
        settings_of(run.out)


@pytest.mark.parametrize("left", ["{", "{}", '{"fingerprint": "f"}'])
def test_half_a_stage_that_does_not_say_whose_it_is_is_named(run, left):
    fail(run, "demos")
    (run.folder("demos") / "begun.json").write_text(left)
    with pytest.raises(CheckpointError, match=r"begun\.json: .*delete it"):
        fail(run, "demos")


def test_what_lies_beside_a_stage_is_made_again_where_it_is_gone(run):
    with run.at_work("report", "f") as current:
        (run.out / "report.html").write_text("page")
        current.beside.append("report.html")
    assert run.check("report", "f")
    (run.out / "report.html").unlink()
    assert not run.check("report", "f")


PLACED = (
    ("gpus", 2), ("sft.microbatch", 4), ("sft.gradient_checkpointing", True), ("explore.processes", 2), ("eval.processes", 2),
    ("world.microbatch", 4), ("world.gradient_checkpointing", True), ("loop.slots", 8), ("loop.streams", 2), ("loop.microbatch", 4),
    ("loop.gradient_checkpointing", True), ("engines.limit_gb", 1.0),
)  # fmt: skip
"""Where a run happens and in how much memory, not what it is."""


@pytest.mark.parametrize(
    ("path", "value", "made_again"),
    [
        ("seed", 1, {"demos", "sft", "scale", "explore", "world", "reward", "loop", "eval", "report"}),
        ("env.jitter_m", 0.01, {"demos", "sft", "scale", "explore", "world", "reward", "loop", "eval", "report"}),
        ("explore.held_out", 0.2, {"explore", "world", "reward", "loop", "eval", "report"}),  # who is held out is chosen when they are read
        ("loop.scale_factor", 2.0, {"loop", "eval", "report"}),
        ("report.replays", 12, {"eval", "report"}),
        ("report.videos", 1, {"report"}),
        ("engines.back_end", "inductor", {"reward", "loop", "eval", "report"}),
        *((name, value, set()) for name, value in PLACED),
    ],
)
def test_a_stage_is_done_again_where_a_setting_that_it_reads_is_another(path, value, made_again):
    """Of its own settings; what comes by its inputs comes by theirs."""
    other = changed(presets.TINY, path, value)

    def reads(name, settings):
        return config.fingerprint(*train.deciding(name, settings))

    assert {name for name in train.STAGES if reads(name, presets.TINY) != reads(name, other)} == made_again


@pytest.mark.parametrize(
    ("there", "changes", "taken"),
    [
        (8, {}, 8), (8, {"gpus": 4}, 4), (6, {}, 4), (8, {"world.batch": 12}, 4),
        (8, {"gpus": 1}, None), (1, {}, None), (8, {"device": "cuda:0"}, None),
    ],
)  # fmt: skip
def test_gpus_that_would_idle_are_said_once_with_the_command_that_takes_them(there, changes, taken, tmp_path, monkeypatch, capsys):
    settings = dataclasses.replace(presets.TINY, device="cuda")
    for name, value in changes.items():
        settings = changed(settings, name, value)
    made = []

    def work(desk, stage):
        made.append(stage.folder.name)
        (stage.folder / "x").write_text("x")

    for name, plan in train.STAGES.items():
        monkeypatch.setitem(train.STAGES, name, dataclasses.replace(plan, work=work))
    monkeypatch.setattr(train, "device_of", torch.device)
    monkeypatch.setattr(desk_module, "device_of", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    train.train(tmp_path / "my run", settings, until="world")
    assert made == ["demos", "sft", "scale", "explore", "world"]
    said = [line.strip() for line in capsys.readouterr().err.splitlines() if "torchrun" in line]
    command = f"torchrun --nproc-per-node {taken} -m worldenv.cli.train --resume '{tmp_path / 'my run'}' --until world"
    most = min(there, settings.gpus or there)
    assert said == ([f"sft: trains on one GPU, {most - 1} idle. Stop it (Ctrl-C) and give, for {taken}: {command}"] if taken else [])


def test_a_run_goes_on_in_less_memory(tmp_path):
    """What a GPU has no room for is asked for anew in smaller parts; the stage that was begun goes on, too."""
    Run(tmp_path, presets.TINY)._lock.close()
    less = presets.TINY
    for name, value in PLACED:
        less = changed(less, name, value)
    run = Run(tmp_path, less)
    run.keep_settings()
    run._lock.close()
    assert settings_of(tmp_path) == less


def test_two_processes_do_not_share_a_folder(run):
    with pytest.raises(RunError, match="another process"):
        Run(run.out, presets.TINY)


def test_other_settings_and_other_folders_are_refused(tmp_path):
    first = Run(tmp_path / "a", presets.TINY)
    work(first, "demos", "f")
    first._lock.close()
    other = dataclasses.replace(presets.TINY, loop=dataclasses.replace(presets.TINY.loop, iterations=7))
    with pytest.raises(RunError, match=rf"loop\.iterations: {presets.TINY.loop.iterations} there, 7 asked"):
        Run(tmp_path / "a", other)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="no run of ours"):
        Run(tmp_path / "b", presets.TINY)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["thesis.tex"]


def test_a_command_that_was_refused_claims_no_folder(tmp_path):
    """A wrong name of a folder, or settings that cannot be had here: the same folder is there for others."""
    settings = dataclasses.replace(presets.TINY, device="cpu")
    for refused, what in ((settings, {"only": "loop"}), (settings, {"only": "report"}), (dataclasses.replace(settings, gpus=8), {})):
        with pytest.raises(RunError, match=r"no run there|^gpus=8: the device is cpu"):
            train.train(tmp_path / "x9", refused, **what)
        assert not (tmp_path / "x9").exists()


def test_a_stage_that_fails_before_it_has_anything_claims_no_folder(run):
    """As stage demos does where LIBERO is not installed."""
    with pytest.raises(ZeroDivisionError), run.at_work("demos", "f"):
        raise ZeroDivisionError
    run._lock.close()
    other = dataclasses.replace(presets.TINY, seed=1)
    again = Run(run.out, other)
    assert settings_of(run.out) == other
    fail(again, "demos")
    again._lock.close()
    with pytest.raises(RunError, match="seed: 1 there, 0 asked"):
        Run(run.out, presets.TINY)


def test_a_run_goes_on_with_networks_in_other_places(tmp_path):
    first = Run(tmp_path, presets.TINY)
    work(first, "demos", "f")
    first._lock.close()
    placed = dataclasses.replace(presets.TINY.loop, streams=2, apart="reflector", apart_gpus=1)
    run = Run(tmp_path, dataclasses.replace(presets.TINY, loop=placed))
    assert settings_of(tmp_path) == presets.TINY  # as long as it is only looked at, as a replay does
    run.keep_settings()
    run._lock.close()
    assert settings_of(tmp_path).loop == placed
    with pytest.raises(RunError, match=r"loop\.bucket: 4 there, 3 asked"):
        Run(tmp_path, dataclasses.replace(presets.TINY, loop=dataclasses.replace(placed, bucket=3)))


def test_what_loop_has_done_is_kept_where_networks_move(tmp_path):
    """A stage with other settings is begun anew; where its rollouts are made is none that counts."""

    def begun(loop):
        settings = dataclasses.replace(presets.TINY, loop=loop)
        run = Run(tmp_path, settings)
        return run, run.fingerprint("loop", train.deciding("loop", settings), [])

    run, fingerprint = begun(presets.TINY.loop)
    fail(run, "loop", fingerprint)
    run._lock.close()
    run, fingerprint = begun(dataclasses.replace(presets.TINY.loop, streams=2, apart="reflector", apart_gpus=1))
    with run.at_work("loop", fingerprint) as stage:
        assert stage.savepoint("x").load() == {"step": 5}


@pytest.mark.parametrize("name", ["reward", "loop", "eval"])
def test_a_placement_that_cannot_be_had_is_refused_before_any_work(name, tmp_path):
    settings = dataclasses.replace(presets.TINY, device="cpu")
    Run(tmp_path, settings)._lock.close()
    placed = dataclasses.replace(presets.TINY.loop, apart="reflector", apart_gpus=1)
    with pytest.raises(RunError, match=r"on cpu: reflector on 1 of 1 devices"):
        train.train(tmp_path, dataclasses.replace(settings, loop=placed), until=name)
    assert not (tmp_path / "stages").exists()
    assert settings_of(tmp_path) == settings  # or it would be refused the next time, too
    (tmp_path / "stages" / name).mkdir(parents=True)
    for again in ({"first": name}, {"only": name}):
        with pytest.raises(RunError, match=r"reflector on 1 of 1 devices"):
            train.train(tmp_path, dataclasses.replace(settings, loop=placed), **again)
        assert (tmp_path / "stages" / name).is_dir()  # nor is anything of it lost


@pytest.mark.parametrize(
    ("stage", "section", "field"),
    [("demos", "demos", "source"), ("sft", "sft", "start"), ("world", "world", "initial"), ("world", "world", "clip"), ("reward", "reward", "start")],
)
def test_what_the_user_brings_and_is_not_there_is_named_before_any_work(stage, section, field, tmp_path):
    settings = dataclasses.replace(presets.TINY, device="cpu")
    if field == "clip":
        settings = changed(settings, "world.initial", str(tmp_path))
    settings = changed(settings, f"{section}.{field}", str(tmp_path / "nowhere"))
    with pytest.raises(RunError, match=rf"{section}\.{field}=.*nowhere.*stage {stage} begins from it.*--{section}\.{field}"):
        train.train(tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()
    finished = Run(tmp_path / "run", settings)
    work(finished, stage, "f")  # and are not wanted any more once it is done
    finished._lock.close()
    with pytest.raises(RunError, match="nowhere"):
        train.train(tmp_path / "run", settings, first=stage)
    assert finished.check(stage, "f")
    train._want_brought(settings, [name for name in train.STAGES if name != stage])


def released(simulator):
    """Its tensors by the names of a published file."""
    return {prefix + key: tensor for part, prefix in PREFIXES.items() for key, tensor in getattr(simulator, part).state_dict().items()}


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    """Weights as users bring them, of small networks."""
    folder = tmp_path_factory.mktemp("brought")
    write_policy(folder / "openvla", published_policy(), 1, shard_bytes=50_000)
    write_reflector(folder / "llava", reflectors.initialise(presets.TINY.reflector, INSTRUCTIONS, 0))
    torch.save({"state_dict": released(Evac.initialised(presets.TINY.simulator, 0))}, folder / "evac.pt")
    return folder


def with_brought(folder):
    settings = dataclasses.replace(presets.TINY, device="cpu")
    for path, name in (("sft.start", "openvla"), ("world.initial", "evac.pt"), ("reward.start", "llava")):
        settings = changed(settings, path, str(folder / name))
    return settings


def test_weights_that_can_be_begun_from_are_found_good_without_being_read(brought, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("weights were copied")

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", loaded)
    settings = with_brought(brought)
    train._want_brought(settings, ("world",))
    monkeypatch.undo()
    train._want_brought(settings, tuple(train.STAGES))
    train._want_brought(changed(settings, "sft", dataclasses.replace(settings.sft, steps=0, views=1)), ("sft",))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda d: (d / "openvla/config.json").unlink(), r"sft\.start: .*/openvla/config\.json: .*No such file"),
        (lambda d: cut(sorted((d / "openvla").glob("model-*"))[-1]), r"sft\.start: .*/model-000\d\d-of-000\d\d\.safetensors: truncated or damaged"),
        (lambda d: sorted((d / "openvla").glob("model-*"))[1].unlink(), r"sft\.start: .*safetensors: no such file; the index names it"),
        (lambda d: (d / "openvla/tokenizer.json").unlink(), r"sft\.start: .*tokenizer\.json: no such file"),
        (lambda d: (d / "llava/config.json").unlink(), r"reward\.start: .*/llava/config\.json: .*No such file"),
        (lambda d: cut(d / "llava/model.safetensors"), r"reward\.start: .*/llava/model\.safetensors: truncated or damaged"),
        (lambda d: cut(d / "evac.pt"), r"world\.initial: .*evac\.pt: truncated, damaged"),
        (lambda d: torch.save({}, d / "evac.pt"), r"world\.initial: .*evac\.pt: holds no tensors"),
        (lambda d: ((d / "evac.pt").unlink(), (d / "evac.pt").mkdir()), r"world\.initial: .*evac\.pt: a folder, want a file: give the one in it"),
        (
            lambda d: torch.save({k: t for k, t in torch.load(d / "evac.pt")["state_dict"].items() if not k.startswith("embedder.")}, d / "evac.pt"),
            r"world\.initial: .*evac\.pt: clip: missing: .*It holds no image tower of CLIP",
        ),
        (
            lambda d: checkpoint.save(d / "evac.pt", simulators.to_tree(Evac.initialised(SMALLER, 0))),
            r"world\.initial: .*evac\.pt: .*mis-shaped: action_resampler",
        ),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_weights_that_cannot_be_begun_from_are_named_before_any_work(break_it, says, brought, tmp_path):
    shutil.copytree(brought, tmp_path / "w")
    break_it(tmp_path / "w")
    with pytest.raises(RunError, match=says) as caught:
        train.train(tmp_path / "run", with_brought(tmp_path / "w"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_are_named_before_any_work(brought, tmp_path):
    settings = with_brought(brought)
    resampler = dataclasses.replace(settings.simulator.image_resampler, queries=8)
    for path, value, says, until in (
        ("simulator.image_resampler", resampler, r"world\.initial: .*16 image tokens, these settings 8", None),
        ("policy.head", "tokens", r"sft\.start: .*lm_head\.weight is missing or zero", "sft"),
    ):
        with pytest.raises(RunError, match=says):
            train.train(tmp_path / "run", changed(settings, path, value), until=until)


def test_a_run_goes_on_with_another_number_of_gpus(tmp_path):
    Run(tmp_path, presets.TINY)._lock.close()
    run = Run(tmp_path, dataclasses.replace(presets.TINY, gpus=3))
    run.keep_settings()
    assert settings_of(tmp_path).gpus == 3


def test_a_stage_is_taken_from_another_run_and_neither_can_harm_the_other(run, tmp_path):
    other, stranger = Run(tmp_path / "other", presets.TINY), tmp_path / "stranger"
    work(other, "demos", "f", "theirs")
    assert not run.borrow("demos", "g", [other.out])
    assert not run.check("demos", "f")
    assert run.borrow("demos", "f", [stranger, other.out])
    assert run.check("demos", "f")
    assert run.record("demos") == other.record("demos")
    work(run, "demos", "g", "ours")
    assert other.check("demos", "f")
    assert (other.folder("demos") / "data.txt").read_text() == "theirs"


def test_a_stage_is_taken_from_a_run_that_may_only_be_read(run, tmp_path):
    other = Run(tmp_path / "other", presets.TINY)
    work(other, "demos", "f")
    other.folder("demos").chmod(0o555)
    assert run.borrow("demos", "f", [other.out])
    assert run.folder("demos").stat().st_mode & 0o200
    other.folder("demos").chmod(0o755)


def test_a_report_is_not_taken_since_it_lies_in_the_other_run(run, tmp_path):
    other = Run(tmp_path / "other", presets.TINY)
    with other.at_work("report", "f") as current:
        current.beside.append("report.html")
    assert not run.borrow("report", "f", [other.out])


def test_a_disk_that_is_full_while_a_stage_is_taken_says_so(run, tmp_path, monkeypatch):
    other = Run(tmp_path / "other", presets.TINY)
    work(other, "demos", "f")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="No space left") as raised:
        run.borrow("demos", "f", [other.out])
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert not run.check("demos", "f")
    assert run.borrow("demos", "f", [other.out])


def test_an_unfinished_or_damaged_stage_is_not_taken(run, tmp_path):
    other = Run(tmp_path / "other", presets.TINY)
    fail(other, "demos")
    assert not run.borrow("demos", "f", [other.out])
    work(other, "sft", "f")
    (other.folder("sft") / "data.txt").write_text("outpux")
    with pytest.raises(CheckpointError, match="damaged"):
        run.borrow("sft", "f", [other.out])
    (other.folder("sft") / "data.txt").unlink()
    with pytest.raises(CheckpointError, match=r"other/stages/sft/data\.txt: missing .* leave --reuse"):
        run.borrow("sft", "f", [other.out])


def test_a_stage_that_is_done_again_and_stopped_goes_on_and_a_finished_one_begins_anew(tmp_path, monkeypatch):
    settings, found = dataclasses.replace(presets.TINY, device="cpu"), []

    def work(_, stage):
        found.append(stage.savepoint("fit").load())
        stage.savepoint("fit").save({"step": 5})
        if len(found) == 1:
            raise KeyboardInterrupt

    monkeypatch.setitem(train.STAGES, "demos", dataclasses.replace(train.STAGES["demos"], work=work))
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path, settings, only="demos")
    for _ in range(2):
        train.train(tmp_path, settings, only="demos")
    assert found == [None, {"step": 5}, None]
