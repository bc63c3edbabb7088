"""Whole runs, cut short: every stage for real, from nothing to the report, in processes of their own as a person starts them."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from worldenv import audit, checkpoint, report
from worldenv.cli import eval as evaluate
from worldenv.cli import train as command
from worldenv.rollout.store import stored
from worldenv.run import settings_of
from worldenv.stages import evaluate as stage_evaluate
from worldenv.stages.desk import REPLAY_NUMBERS
from worldenv.stages.evaluate import replayed_pairs

FAST = [
    "--preset", "tiny", "--fast", "--sft.prior-steps", "4", "--sft.steps", "8", "--explore.episodes", "18", "--world.vae-steps", "8",
    "--world.vae-batch", "8", "--world.steps", "8", "--world.batch", "2", "--world.held-out-clips", "4", "--world.check-every", "4",
    "--reward.backbone-steps", "8", "--reward.embeddings", "100", "--loop.contexts", "2", "--loop.group", "4", "--loop.batch", "4",
]  # fmt: skip
STAGES = ["demos", "sft", "scale", "explore", "world", "reward", "loop", "eval", "report"]


def train(*arguments, check=True):
    done = subprocess.run([sys.executable, "-m", "worldenv.cli.train", *map(str, arguments)], capture_output=True, text=True, timeout=500)
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = train(*FAST, "--out", out)
    return out, done


def record(out):
    return json.loads((out / "report.json").read_text())


def test_every_stage_runs_and_the_report_is_valid(whole):
    out, done = whole
    assert json.loads(done.stdout.splitlines()[-1])["report"] == str(out / "report.html")
    written = record(out)
    report.validate(written)
    assert list(written["stages"]) == STAGES[:-1] or list(written["stages"]) == STAGES
    assert written["eval"]["sft"]["oracle"]["episodes"] == 30
    assert len(written["loop"]["returns"]) == 2
    assert any("fast" in note for note in written["notes"])
    assert (out / "report.html").stat().st_size > 10_000


def test_progress_is_logged_as_it_is_made(whole):
    rows = [json.loads(line) for line in (whole[0] / "log.jsonl").read_text().splitlines()]
    by = {work: [row for row in rows if row["work"] == work] for work in {row["work"] for row in rows}}
    assert {"sft", "scale", "autoencoder", "simulator", "loop"} <= by.keys()
    history = json.loads((whole[0] / "stages" / "loop" / "stage.json").read_text())["metrics"]["history"]
    assert [(row["step"], row["of"]) for row in by["loop"]] == [(1, 2), (2, 2)]
    for row, want in zip(by["loop"], history, strict=True):
        assert {name: row[name] for name in want} == want
    assert all(one[-1]["step"] == one[-1]["of"] for one in by.values())
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)


def test_the_same_command_again_does_nothing_again(whole):
    out, _ = whole
    before = {p: p.stat().st_mtime_ns for p in (out / "stages").rglob("*") if p.is_file()}
    done = train(*FAST, "--out", out)
    assert done.stderr.count("skipped") == len(STAGES)
    assert {p: p.stat().st_mtime_ns for p in (out / "stages").rglob("*") if p.is_file()} == before


def kill_while_at(stage, out, *arguments):
    """Start the command and kill it, without warning, while `stage` is at work."""
    begun = out / "stages" / stage / "begun.json"
    before = begun.stat().st_mtime_ns if begun.exists() else None
    words = [sys.executable, "-m", "worldenv.cli.train", *map(str, arguments)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        if begun.exists() and begun.stat().st_mtime_ns != before:
            break
        time.sleep(0.02)
    assert process.poll() is None, f"{stage} was over before it could be killed"
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_second_run_of_one_seed_that_is_killed_twice_gives_the_same_report(whole, tmp_path):
    out, _ = whole
    again = tmp_path / "again"
    kill_while_at("explore", again, *FAST, "--out", again)
    kill_while_at("world", again, *FAST, "--out", again)
    train("--resume", again)
    assert not list(report.differences(report.comparable(record(out)), report.comparable(record(again))))
    for stage in STAGES:  # byte for byte: what follows a stage that was done again with the same result is not done again
        ours, theirs = (json.loads((one / "stages" / stage / "stage.json").read_text())["files"] for one in (out, again))
        assert ours == theirs, stage


def test_a_report_that_was_deleted_is_written_again_and_nothing_else_is(whole, tmp_path):
    out, again = whole[0], tmp_path / "again"
    shutil.copytree(out, again)
    page = (again / "report.html").read_bytes()
    (again / "report.html").unlink()
    shutil.rmtree(again / "videos")
    done = train("--resume", again)
    assert done.stderr.count("skipped") == len(STAGES) - 1
    assert (again / "report.html").stat().st_size == pytest.approx(len(page), rel=0.01)
    assert list((again / "videos").glob("*.mp4"))


def test_a_finished_run_is_reused_and_the_new_one_has_its_own_report(whole, tmp_path):
    out, other = whole[0], tmp_path / "other"
    done = train(*FAST, "--out", other, "--reuse", out)
    assert done.stderr.count("taken from another run") == len(STAGES) - 1
    told = json.loads(done.stdout.splitlines()[-1])
    assert (other / "report.html").samefile(told["report"])
    assert (other / "report.json").samefile(told["record"])


def test_a_stored_rollout_is_replayed_alone_bit_for_bit(whole, tmp_path):
    out, _ = whole
    for number in (REPLAY_NUMBERS + 1, REPLAY_NUMBERS + 8):  # of the policy before LOOP, and after it
        said = json.loads(train("--replay", number, "--out", out).stdout.splitlines()[-1])
        assert (said["rollout"], said["steps"], said["bit_equal"], said["differs"]) == (number, 32, True, [])
    pairs = checkpoint.load(out / "stages" / "eval" / "replays-sft.safetensors")
    again = tmp_path / "again"
    shutil.copytree(out, again)
    pairs[1]["imagined_score"] = pairs[1]["imagined_score"] + np.float32(1e-6)
    checkpoint.save(again / "stages" / "eval" / "replays-sft.safetensors", pairs)
    other = train("--replay", REPLAY_NUMBERS + 1, "--out", again, check=False)
    assert (other.returncode, json.loads(other.stdout.splitlines()[-1])["differs"]) == (1, ["score"])
    absent = train("--replay", 5, "--out", out, check=False)
    assert absent.returncode == 2
    assert "rollout 5 is not stored" in absent.stderr


def test_a_rollout_of_the_iteration_under_way_is_replayed(whole, tmp_path):
    out, again = whole[0], tmp_path / "again"
    shutil.copytree(out, again)
    words = [sys.executable, "-m", "worldenv.cli.train", "--resume", str(again), "--from", "loop"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = again / "stages" / "loop" / "iteration-0001.log", time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None and not (log.exists() and log.stat().st_size > 0):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    number = stored(log)[0].number
    said = json.loads(train("--replay", number, "--out", again).stdout.splitlines()[-1])
    assert (said["rollout"], said["bit_equal"]) == (number, True)


def test_a_runs_world_is_audited_with_other_rollouts_than_its_report(whole, tmp_path, capsys, monkeypatch):
    out, kept = whole[0], tmp_path / "pairs.safetensors"
    stored = settings_of(out)
    there = dataclasses.replace(stored, gpus=8, loop=dataclasses.replace(stored.loop, apart="reflector", apart_gpus=2))
    monkeypatch.setattr(stage_evaluate, "settings_of", lambda run: there if run == out else settings_of(run))  # here is one device
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for policy in ("scale", "loop"):
        assert evaluate.main(["audit", str(out), "--policy", policy, "--episodes", "4", "--device", "cpu", "--out", str(kept), "--force"]) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        pairs = replayed_pairs(kept)
        assert len(pairs) == told["episodes"] == sum(one["episodes"] for one in told["by_task"].values()) == 4
        assert told["agree"] == sum((p.imagined_score > 0.5).any() == p.success.any() for p in pairs)
        assert told["psnr_by_chunk"][0] == pytest.approx(np.mean([audit.psnr(p.imagined[:8], p.true[:8]) for p in pairs]))
        first = [audit.psnr(np.broadcast_to(p.context.frame, (8, *p.context.frame.shape)), p.true[-8:]) for p in pairs]
        assert told["psnr_copy_first_by_chunk"][-1] == pytest.approx(np.mean(first))
        reported = replayed_pairs(out / "stages" / "eval" / f"replays-{'sft' if policy == 'scale' else 'loop'}.safetensors")
        assert not np.array_equal(pairs[0].command, reported[0].command)  # from the same start state
        assert np.array_equal(pairs[0].context.frame, reported[0].context.frame)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert evaluate.main(["audit", str(out), "--out", str(kept)]) == 2
    assert evaluate.main(["audit", str(out), "--episodes", "0"]) == 2
    assert evaluate.main(["audit", str(tmp_path)]) == 2
    refused = [line.removeprefix("worldenv-eval: ") for line in capsys.readouterr().err.splitlines()]
    for line, begins in zip(refused, (f"--out {kept} exists", "--episodes 0: want", f"{tmp_path}: no run there"), strict=True):
        assert line.startswith(begins)


def test_only_one_stage_again(whole):
    out, _ = whole
    done = train("--resume", out, "--only", "scale")
    assert "scale:" in done.stderr
    assert "sft:" not in done.stderr


def test_other_settings_are_refused_and_nothing_is_touched(whole):
    out, _ = whole
    before = {p: p.read_bytes() for p in out.glob("*.json")}
    done = train(*FAST, "--seed", "5", "--out", out, check=False)
    assert done.returncode == 2
    assert "seed: 0 there, 5 asked" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert {p: p.read_bytes() for p in out.glob("*.json")} == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "tinny"], "did you mean 'tiny'"),
        (["--fats"], "did you mean '--fast'"),
        (["--loop.group", "1"], "needs at least 2 rollouts"),
        (["--from", "slt"], "--from 'slt': did you mean 'sft'"),
        (["--world.steps", "-3"], "world.steps=-3: want at least 0"),
        (["--replay", "7"], "no run there"),
        (["--resume", "/nowhere/at/all"], "no run there"),
        (["--resume", "/nowhere/at/all", "--fast"], "a run keeps the settings that it was begun with"),
        (["--resume", "/nowhere/at/all", "--replay", "3"], "--replay takes --out and nothing else"),
    ],
)
def test_a_bad_command_line_is_one_line(arguments, says, tmp_path, capsys):
    assert command.main(arguments if "--resume" in arguments else [*arguments, "--out", str(tmp_path / "x")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "x").exists()


def test_a_process_of_its_own_says_the_same(tmp_path):
    done = train("--preset", "tinny", "--out", tmp_path / "x", check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "did you mean 'tiny'" in done.stderr


def test_a_damaged_stage_file_is_one_line_and_is_left_alone(whole):
    out, _ = whole
    path = out / "stages" / "world" / "simulator.safetensors"
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-1000])
        done = train("--resume", out, check=False)
        assert done.returncode == 2
        assert "simulator.safetensors" in done.stderr.splitlines()[-1]
        assert "--from world" in done.stderr.splitlines()[-1]
        assert path.read_bytes() == good[:-1000]
    finally:
        path.write_bytes(good)


def test_a_full_disk_is_one_line(tmp_path):
    """A file size limit stands in for the disk: the kernel refuses the write, as it does on a full one."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000));"
        "from worldenv.cli.train import main; raise SystemExit(main())"
    )
    words = [sys.executable, "-c", code, *FAST, "--out", str(tmp_path / "x")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "File too large; free space there, then give the same command again" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "x").rglob("*.part"))


def test_a_loss_that_is_not_finite_is_one_line_and_the_stage_leaves_no_output(tmp_path):
    done = train(*FAST, "--sft.lr", "1e30", "--out", tmp_path / "x", check=False)
    assert done.returncode == 1
    assert re.search(r"sft: loss is (nan|inf) at step \d+", done.stderr.splitlines()[-1])
    assert not (tmp_path / "x" / "stages" / "sft" / "stage.json").exists()


def test_no_gl_library_is_one_line(tmp_path):
    words = [sys.executable, "-m", "worldenv.cli.train", *FAST, "--out", str(tmp_path / "x")]
    absent = {**os.environ, "MUJOCO_GL": "osmesa", "LD_LIBRARY_PATH": "", "PATH": "/nonexistent"}  # find_library asks programs on PATH
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=absent)
    assert done.returncode == 1
    assert "libosmesa6" in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 1
