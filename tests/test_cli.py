"""What holds for every command."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from worldenv import checkpoint, cli
from worldenv.benchmarks import bench_plan
from worldenv.cli import bench, convert, doctor, engine, files, imagine, report
from worldenv.cli import eval as eval_command
from worldenv.cli import train as train_command
from worldenv.nouns import Failed
from worldenv.rollout.collect import RolloutError

PROGRAM = "import os, sys, worldenv.cli; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"


def said(**environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=kept | environment, capture_output=True, text=True, check=True).stdout.strip()


def test_threads_spin_briefly_unless_the_environment_says_otherwise() -> None:
    assert said() == "False 10000"  # once torch is there, it would be too late
    assert said(OMP_WAIT_POLICY="active") == "False None"
    assert said(GOMP_SPINCOUNT="7") == "False 7"


def cut_short(program: str) -> tuple[int, str]:
    """Exit code and stderr where nobody reads what is said."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    return done.returncode, done.stderr


FAILS_LATE = "import sys; from worldenv.cli.ending import Ending\nwith Ending('x') as e:\n    print('y' * 100000)\n    e.code = 1\nsys.exit(e.code)"


def test_what_is_said_may_be_cut_short() -> None:
    """As by `worldenv-bench plan | head -1`: no traceback, whether the pipe breaks on the way or at the end, and the exit code of the work."""
    for name, words in (("train", ["--help"]), ("doctor", ["--help"]), ("bench", ["plan"])):
        assert cut_short(f"import sys; from worldenv.cli.{name} import main; sys.exit(main({words!r}))") == (0, "")
    assert cut_short(FAILS_LATE) == (1, "")


def test_what_is_slow_to_import_is_there_for_those_who_need_it_alone() -> None:
    """transformers takes longer than torch; matplotlib complains on stderr where it cannot write its cache: nothing that a command which draws none
    should show."""
    names = sorted(path.stem for path in Path(cli.__file__).parent.glob("*.py") if path.stem != "__init__")
    assert {"eval", "train", "report", "bench", "imagine", "engine", "doctor", "convert"} <= set(names)
    program = f"import sys, {', '.join(f'worldenv.cli.{name}' for name in names)}; print({{'matplotlib', 'transformers'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "set()"


INTERRUPTED = """
import multiprocessing, sys
if __name__ == "__main__" and sys.argv[1:] == ["child"]:
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    process.join()
else:
    from worldenv.cli import eval
"""


def _heard() -> None:
    """What is started in the background of a script ignores the signal, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("where", ["module", "script", "child"])
def test_a_command_that_is_interrupted_while_it_is_imported_says_so_in_a_line(where: str, tmp_path: Path) -> None:
    """As by Ctrl-C in the first seconds: no traceback, and the exit code that shells expect. Of several processes, one speaks."""
    (tmp_path / "numpy.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    script = tmp_path / "worldenv-eval"
    script.write_text(INTERRUPTED)
    words = {"module": ["-m", "worldenv.cli.convert"], "script": [str(script)], "child": [str(script), "child"]}[where]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60, preexec_fn=_heard)
    assert done.stderr == {"module": "worldenv: stopped\n", "script": "worldenv-eval: stopped\n", "child": ""}[where]
    assert where == "child" or done.returncode == -signal.SIGINT


def test_a_gpu_without_room_is_one_line_with_the_cure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cause = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation")

    def full(*_: object, **__: object) -> None:
        raise cause

    def in_a_rollout(*_: object, **__: object) -> None:
        raise RolloutError(f"rollout 3 of group 0 (seed 0): stage denoise, chunk 1: OutOfMemoryError: {cause}") from cause

    monkeypatch.setattr(eval_command, "_evaluate", full)
    for failure in (in_a_rollout, full):
        monkeypatch.setattr(train_command.train, "train", failure)
        assert train_command.main(["--out", str(tmp_path / "run")]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"Tried to allocate 2 GiB. Go on with less at once: --resume {tmp_path / 'run'} with smaller --sft.microbatch" in said
    with pytest.raises(torch.OutOfMemoryError):
        train_command.main(["--out", str(tmp_path / "run"), "--debug"])
    assert eval_command.main(["run", "--policy", "expert", "--out", str(tmp_path / "eval")]) == 1
    assert re.fullmatch(r"worldenv-eval: CUDA out of memory.*2 GiB\. Another --device.*\n", capsys.readouterr().err)
    for failed in (FloatingPointError("latents of chunk 0 are not finite"), RolloutError("rollout 3 failed")):
        monkeypatch.setattr(eval_command, "audit_run", lambda *_, failed=failed: (_ for _ in ()).throw(failed))
        assert eval_command.main(["audit", "a"]) == 1
        assert capsys.readouterr().err == f"worldenv-eval: {failed}\n"


WORK: dict[str, tuple[Any, str, list[str]]] = {
    "train": (train_command.train, "train", ["--out", "run"]),
    "bench": (bench.cases, "run", ["copy"]),
    "bench plan": (bench_plan, "plan", ["plan"]),
    "engine": (engine.engine_rows, "subject", ["build"]),
    "eval": (eval_command, "_evaluate", ["run", "--policy", "expert"]),
    "imagine": (imagine, "imagine", []),
    "report": (report, "_show", ["run"]),
    "doctor": (doctor.doctor, "examine", []),
    "convert": (convert.convert, "convert", ["a", "--out", "b"]),
}
"""By command: what does its work, and arguments that come to that."""
COMMANDS = {
    "train": train_command, "bench": bench, "engine": engine, "eval": eval_command, "imagine": imagine, "report": report, "doctor": doctor,
    "convert": convert,
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nSee"), 1, "CUDA out of memory. Tried 2 GiB."),
        (MemoryError(), 1, "out of memory"),
        (OSError(errno.EIO, "Input/output error", "/elsewhere"), 1, "[Errno 5] Input/output error: '/elsewhere'"),
        (FloatingPointError("loss is nan"), 1, "loss is nan"),
        (Failed("stage x failed"), 1, "stage x failed"),
        (ValueError("--x 3: want 4"), 2, "--x 3: want 4"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_every_command_ends_in_one_line(
    name: str, raised: BaseException, code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: object, **__: object) -> None:
        raise raised

    module, where, argv = WORK[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, where, work)
    assert COMMANDS[name.split()[0]].main(argv) == code
    (line,) = capsys.readouterr().err.splitlines()
    program = "convert" if name == "convert" else f"worldenv-{name}"
    assert line.startswith(f"{program}: {says}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("train --loop.group 1", 2),
        ("train --out mine", 2),
        ("train --resume nope", 2),
        ("train --out file/x", 1),
        ("bench", 2),
        ("bench plan --gpus 0", 2),
        ("bench copy --device tpu", 2),
        ("engine list --limit-gb 0", 2),
        ("engine build --preset tyni", 2),
        ("eval run --policy nobody --suite tabletop", 2),
        ("eval compare mine mine", 2),
        ("eval audit nope", 2),
        ("imagine", 2),
        ("imagine --episode file", 2),
        ("report nope", 2),
        ("report --episodes mine", 2),
        ("doctor libreo", 2),
        ("convert nope --out new", 2),
        ("convert mine --out file", 2),
    ],
)
def test_a_bad_command_line_or_file_is_exit_code_2_and_a_disk_that_refuses_1(
    command: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for name in ("file", "mine/thesis.tex"):
        Path(name).write_text("precious")
    program, *argv = command.split()
    assert COMMANDS[program].main(argv) == code
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["file", "mine", "mine/thesis.tex"]


def test_what_a_killed_command_had_begun_is_removed_by_the_next(tmp_path: Path) -> None:
    """Of the same name, and of processes that are gone: others may be writing."""
    with subprocess.Popen(["true"]) as gone:
        pass
    mine = checkpoint.part_of(tmp_path / "v.mp4")
    names = (mine.name, mine.name.replace(str(os.getpid()), str(gone.pid)), mine.name.replace(str(os.getpid()), str(gone.pid)).replace("v.", "w."))
    for name in (*names, f".v.mp4.{gone.pid}@another-machine.part"):
        (tmp_path / name).touch()
    files.vacant(tmp_path / "v.mp4", force=False)
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[2], f".v.mp4.{gone.pid}@another-machine.part"}


def test_other_errors_are_shown_as_ever() -> None:
    done = subprocess.run([sys.executable, "-c", "from worldenv import cli; 1 / 0"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left"), "--out {out}: No space left; free space there, or choose another --out"),
        (OSError(errno.ENOSPC, "No space", "/elsewhere/a", None, "{out}/b"), "--out {out}: No space; free space there, or choose another --out"),
        (OSError(errno.EROFS, "Read-only", "{out}/b"), "--out {out}: Read-only; choose another --out, that can be written to"),
        (OSError(errno.ENOSPC, "No space left", "/elsewhere/a"), "[Errno 28] No space left: '/elsewhere/a'"),
        (OSError(errno.ENOENT, "No such file", "{out}/b"), "[Errno 2] No such file: '{out}/b'"),
        (OSError(errno.ENOENT, "No such file", "{out}"), "--out {out}: No such file; choose another --out, that can be written to"),
        (OSError(errno.ENOTDIR, "Not a directory", "{beside}"), "--out {out}: Not a directory; choose another --out, that can be written to"),
    ],
)
def test_a_disk_is_blamed_for_its_own_place_alone(error: OSError, said: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for name in ("filename", "filename2"):
        if getattr(error, name):
            setattr(error, name, getattr(error, name).format(out=out, beside=tmp_path / ".run.7@here.part"))
    with pytest.raises(OSError) as raised, files.written(out):
        raise error
    assert str(raised.value) == said.format(out=out)
