"""What holds for every command."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from worldenv import cli
from worldenv.cli import eval as eval_command
from worldenv.cli import files
from worldenv.cli import train as train_command
from worldenv.rollout.collect import RolloutError

PROGRAM = "import os, sys, worldenv.cli; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"


def said(**environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=kept | environment, capture_output=True, text=True, check=True).stdout.strip()


def test_threads_spin_briefly_unless_the_environment_says_otherwise() -> None:
    assert said() == "False 10000"  # once torch is there, it would be too late
    assert said(OMP_WAIT_POLICY="active") == "False None"
    assert said(GOMP_SPINCOUNT="7") == "False 7"


def test_help_may_be_cut_short() -> None:
    """As by `worldenv-eval run --help | head -1`: no traceback, whether the pipe breaks while help is printed or at the end."""
    for arguments in ("worldenv.cli.train", "worldenv.cli.doctor"):
        read, write = os.pipe()
        os.close(read)
        program = f"import sys; from {arguments} import main; sys.exit(main(['--help']))"
        done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
        os.close(write)
        assert (done.returncode, done.stderr) == (0, "")


def test_matplotlib_is_there_for_those_who_draw_alone() -> None:
    """It is slow to import, and complains on stderr where it cannot write its cache: nothing that a command which draws nothing should show."""
    names = sorted(path.stem for path in Path(cli.__file__).parent.glob("*.py") if path.stem != "__init__")
    assert {"eval", "train", "report", "bench", "imagine", "engine", "doctor", "convert"} <= set(names)
    program = f"import sys, {', '.join(f'worldenv.cli.{name}' for name in names)}; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "False"


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
    ],
)
def test_a_disk_is_blamed_for_its_own_place_alone(error: OSError, said: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for name in ("filename", "filename2"):
        if getattr(error, name):
            setattr(error, name, getattr(error, name).format(out=out))
    with pytest.raises(OSError) as raised, files.written(out):
        raise error
    assert str(raised.value) == said.format(out=out)
