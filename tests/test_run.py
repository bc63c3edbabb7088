"""The folder of a run: what is skipped, what is refused, and that nothing is overwritten."""

import dataclasses
import json

import pytest

from worldenv import config, train
from worldenv.checkpoint import CheckpointError
from worldenv.run import RECORD, Run, RunError, settings_of


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


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "out", config.TINY)


def test_settings_round_trip(run):
    assert settings_of(run.out) == config.TINY


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
    first = run.fingerprint("sft", [config.TINY.sft], ["demos"])
    assert first == run.fingerprint("sft", [config.TINY.sft], ["demos"])
    assert first != run.fingerprint("sft", [dataclasses.replace(config.TINY.sft, steps=1)], ["demos"])
    work(run, "demos", "g", "two")
    assert first != run.fingerprint("sft", [config.TINY.sft], ["demos"])


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


def test_a_damaged_record_is_named(run):
    work(run, "demos", "f")
    path = run.folder("demos") / RECORD
    path.write_text(path.read_text()[:40])
    with pytest.raises(CheckpointError, match=r"stage\.json: truncated or damaged"):
        run.check("demos", "f")


def test_two_processes_do_not_share_a_folder(run):
    with pytest.raises(RunError, match="another process"):
        Run(run.out, config.TINY)


def test_other_settings_and_other_folders_are_refused(tmp_path):
    Run(tmp_path / "a", config.TINY)._lock.close()
    other = dataclasses.replace(config.TINY, loop=dataclasses.replace(config.TINY.loop, iterations=7))
    with pytest.raises(RunError, match=rf"loop\.iterations: {config.TINY.loop.iterations} there, 7 asked"):
        Run(tmp_path / "a", other)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="no run of ours"):
        Run(tmp_path / "b", config.TINY)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["thesis.tex"]


def test_a_run_goes_on_with_networks_in_other_places(tmp_path):
    Run(tmp_path, config.TINY)._lock.close()
    placed = dataclasses.replace(config.TINY.loop, streams=2, apart="reflector", apart_gpus=1)
    run = Run(tmp_path, dataclasses.replace(config.TINY, loop=placed))
    assert settings_of(tmp_path) == config.TINY  # as long as it is only looked at, as a replay does
    run.keep_settings()
    run._lock.close()
    assert settings_of(tmp_path).loop == placed
    with pytest.raises(RunError, match=r"loop\.slots: 16 there, 3 asked"):
        Run(tmp_path, dataclasses.replace(config.TINY, loop=dataclasses.replace(placed, slots=3)))


def test_what_loop_has_done_is_kept_where_networks_move(tmp_path):
    """A stage with other settings is begun anew; where its rollouts are made is none that counts."""

    def begun(loop):
        settings = dataclasses.replace(config.TINY, loop=loop)
        run = Run(tmp_path, settings)
        return run, run.fingerprint("loop", train.STAGES["loop"].settings(settings), [])

    run, fingerprint = begun(config.TINY.loop)
    fail(run, "loop", fingerprint)
    run._lock.close()
    run, fingerprint = begun(dataclasses.replace(config.TINY.loop, streams=2, apart="reflector", apart_gpus=1))
    with run.at_work("loop", fingerprint) as stage:
        assert stage.savepoint("x").load() == {"step": 5}


@pytest.mark.parametrize("name", ["loop", "eval"])
def test_a_placement_that_cannot_be_had_is_refused_before_any_work(name, tmp_path):
    settings = dataclasses.replace(config.TINY, device="cpu")
    Run(tmp_path, settings)._lock.close()
    placed = dataclasses.replace(config.TINY.loop, apart="reflector", apart_gpus=1)
    with pytest.raises(RunError, match=r"on cpu: reflector on 1 of 1 devices"):
        train.train(tmp_path, dataclasses.replace(settings, loop=placed), until=name)
    assert not (tmp_path / "stages").exists()
    assert settings_of(tmp_path) == settings  # or it would be refused the next time, too


def test_a_run_goes_on_with_another_number_of_gpus(tmp_path):
    Run(tmp_path, config.TINY)._lock.close()
    run = Run(tmp_path, dataclasses.replace(config.TINY, gpus=3))
    run.keep_settings()
    assert settings_of(tmp_path).gpus == 3


def test_a_stage_is_taken_from_another_run_and_neither_can_harm_the_other(run, tmp_path):
    other, stranger = Run(tmp_path / "other", config.TINY), tmp_path / "stranger"
    work(other, "demos", "f", "theirs")
    assert not run.borrow("demos", "g", [other.out])
    assert not run.check("demos", "f")
    assert run.borrow("demos", "f", [stranger, other.out])
    assert run.check("demos", "f")
    assert run.record("demos") == other.record("demos")
    work(run, "demos", "g", "ours")
    assert other.check("demos", "f")
    assert (other.folder("demos") / "data.txt").read_text() == "theirs"


def test_an_unfinished_or_damaged_stage_is_not_taken(run, tmp_path):
    other = Run(tmp_path / "other", config.TINY)
    fail(other, "demos")
    assert not run.borrow("demos", "f", [other.out])
    work(other, "sft", "f")
    (other.folder("sft") / "data.txt").write_text("outpux")
    with pytest.raises(CheckpointError, match="damaged"):
        run.borrow("sft", "f", [other.out])
