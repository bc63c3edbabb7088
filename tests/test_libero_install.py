"""Setting LIBERO up without LIBERO: where assets are found and put, what is refused, what the doctor says. Needs neither LIBERO nor its assets."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from worldenv import doctor
from worldenv.benchmarks import controller, libero_steps
from worldenv.cli import doctor as command_line
from worldenv.doctor import Finding
from worldenv.envs import libero_install
from worldenv.envs.libero_install import ASSETS_VARIABLE, LiberoMissing

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed LIBERO without assets, and a home of its own."""
    package = tmp_path / "site-packages" / "libero" / "libero"
    package.mkdir(parents=True)
    monkeypatch.setattr(libero_install, "package", lambda: package)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CACHE_HOME", ASSETS_VARIABLE, "LIBERO_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    return package


def assets(folder: Path, note: str = "") -> Path:
    for part in libero_install.PARTS:
        (folder / part).mkdir(parents=True)
        (folder / part / "file.xml").write_text(part + note)
    return folder


def archive(path: Path, note: str = "") -> Path:
    source = assets(path.parent / f"source-{path.name}", note)
    with tarfile.open(path, "w:xz") as opened:
        for part in libero_install.PARTS:
            opened.add(source / part, arcname=part)
    return path


def test_an_archive_is_unpacked_once(installed, tmp_path, monkeypatch):
    monkeypatch.setenv(ASSETS_VARIABLE, str(archive(tmp_path / "a.tar.xz")))
    place = libero_install.install_assets()
    assert place == installed / "assets"
    (place / "scenes" / "mine").touch()
    assert libero_install.install_assets() == place
    assert (place / "scenes" / "mine").exists()  # not unpacked again
    monkeypatch.delenv(ASSETS_VARIABLE)
    assert libero_install.assets() == place
    monkeypatch.setenv(ASSETS_VARIABLE, str(archive(tmp_path / "b.tar.xz", "!")))
    libero_install.install_assets()
    assert (place / "scenes" / "file.xml").read_text() == "scenes!"
    assert not (place / "scenes" / "mine").exists()
    assert [path.name for path in installed.iterdir()] == ["assets"]


def test_a_folder_is_linked_and_comes_first(installed, tmp_path, monkeypatch):
    first, second = assets(tmp_path / "first"), assets(tmp_path / "second")
    monkeypatch.setenv(ASSETS_VARIABLE, str(first))
    assert libero_install.install_assets() == first
    monkeypatch.delenv(ASSETS_VARIABLE)
    assert libero_install.assets().samefile(first)
    monkeypatch.setenv(ASSETS_VARIABLE, str(second))
    assert libero_install.assets() == second
    libero_install.install_assets()
    assert (installed / "assets").samefile(second)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_package_that_cannot_be_written_to_gets_them_in_the_cache(installed, tmp_path, monkeypatch):
    installed.chmod(0o555)
    monkeypatch.setenv(ASSETS_VARIABLE, str(archive(tmp_path / "a.tar.xz")))
    assert libero_install.install_assets() == libero_install.cache() / "assets"


@pytest.mark.parametrize("kind", ["damaged", "empty", "nowhere", "half"])
def test_what_is_no_archive_of_assets_changes_nothing(kind, installed, tmp_path, monkeypatch):
    place = assets(installed / "assets")
    path = tmp_path / "x.tar.xz"
    if kind == "damaged":
        path.write_bytes(archive(tmp_path / "y.tar.xz").read_bytes()[:100])
    elif kind == "empty":
        with tarfile.open(path, "w:xz"):
            pass
    elif kind == "half":
        path = tmp_path / "folder"
        (path / "scenes").mkdir(parents=True)
    monkeypatch.setenv(ASSETS_VARIABLE, str(path))
    with pytest.raises(LiberoMissing, match=re.escape(str(path))) as said:
        libero_install.install_assets()
    assert "\n" not in str(said.value)
    assert [one.name for one in installed.iterdir()] == ["assets"]
    assert (place / "scenes" / "file.xml").read_text() == "scenes"


@pytest.mark.parametrize("name", ["../../outside", "scenes/../../../outside", "{tmp_path}/outside", "link", "hard", "pipe"])
def test_no_member_of_an_archive_leaves_the_folder(name, installed, tmp_path, monkeypatch):
    """Nor is anything but a file or folder: a link may point anywhere, and the next member be written through it."""
    path = tmp_path / "x.tar"
    member = tarfile.TarInfo(name.format(tmp_path=tmp_path))
    member.type = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE}.get(name, tarfile.REGTYPE)
    member.linkname = str(tmp_path / "outside")
    with tarfile.open(path, "w") as opened:
        opened.addfile(member)
        opened.addfile(tarfile.TarInfo(f"{name}/outside" if name == "link" else "scenes/file.xml"))
    monkeypatch.setenv(ASSETS_VARIABLE, str(path))
    with pytest.raises(LiberoMissing, match=r"cannot be unpacked .*is no file or folder below"):
        libero_install.install_assets()
    assert not list(tmp_path.rglob("outside"))
    assert not list(installed.iterdir())


def test_without_assets_the_cure_is_said(installed):
    with pytest.raises(LiberoMissing, match=f"set {ASSETS_VARIABLE} and run `make libero`"):
        libero_install.assets()


def test_without_libero_the_cure_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LiberoMissing, match=r"--no-deps robosuite==1.4.0 bddl==1.0.1 hf-libero"):
        libero_install.package()


@pytest.mark.parametrize(("benchmark", "words"), [(libero_steps, []), (controller, ["--record", "paths"])], ids=["steps", "controller"])
def test_a_benchmark_without_libero_says_the_cure_in_one_line(benchmark, words, monkeypatch, capsys, tmp_path):
    def missing():
        raise LiberoMissing("LIBERO is not here; run `make libero`")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(libero_install, "load", missing)
    assert benchmark.main(words) == 2
    name = benchmark.__name__.removeprefix("worldenv.")
    assert capsys.readouterr().err == f"{name}: LIBERO is not here; run `make libero`\n"
    if benchmark is libero_steps:
        assert benchmark.main(["libero_90"]) == 2
        assert "'libero_90': want some of libero_spatial" in capsys.readouterr().err


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub's client asks of the hub for a data set of one commit: its files, then each of them."""

    commit, files = "c0ffee" * 6 + "c0ff", {f"{part}/file.xml": part.encode() for part in libero_install.PARTS}

    def do_GET(self) -> None:
        """A file, the list of all, or what the commit is."""
        what, _, name = self.path.partition("?")[0].partition(f"/{self.commit}/")
        listed = [{"type": "file", "path": one, "size": len(body), "oid": hashlib.sha1(body).hexdigest()} for one, body in self.files.items()]
        if what.endswith("/resolve"):
            body = self.files[name]
        elif "/tree/" in what:
            body = json.dumps(listed).encode()
        elif what.startswith("/api/datasets/"):
            body = json.dumps({"id": "x", "sha": self.commit, "siblings": [{"rfilename": one} for one in self.files]}).encode()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for header, value in {"Content-Length": len(body), "ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": self.commit}.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing."""


_INSTALL = """
import pathlib, sys
from worldenv.envs import libero_install
libero_install.package = lambda: pathlib.Path(sys.argv[1])
print(libero_install.install_assets())
"""


@pytest.mark.parametrize("whole", [True, False])
def test_without_the_variable_they_are_downloaded(whole, installed, tmp_path, monkeypatch):
    """By the hub's real client, from a stand-in of the hub."""
    monkeypatch.setattr(Hub, "files", Hub.files if whole else {"README.md": b"moved"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        for name in [name for name in os.environ if name.startswith("HF_")]:
            monkeypatch.delenv(name)
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", _INSTALL, str(installed)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        server.shutdown()
    if whole:
        assert done.stdout.strip() == str(installed / "assets")
        assert (installed / "assets" / "scenes" / "file.xml").read_text() == "scenes"
        again = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert again.stdout == done.stdout, "the hub is not asked again"
    else:
        assert "holds no assets of LIBERO" in done.stderr
        assert not (installed / "assets").exists()


def test_the_configuration_is_ours_unless_it_is_yours(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "")  # put back after the test
    libero_install.prepare.__wrapped__()
    written = libero_install.cache() / "config.yaml"
    assert f"bddl_files: {installed / 'bddl_files'}" in written.read_text()
    assert not (tmp_path / "home" / ".libero").exists()
    yours = tmp_path / "yours"
    yours.mkdir()
    (yours / "config.yaml").write_text("mine: 1\n")
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(yours))
    libero_install.prepare.__wrapped__()
    assert (yours / "config.yaml").read_text() == "mine: 1\n"


def test_pins_are_those_of_the_constraints():
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(libero_install.WITHOUT_DEPENDENCIES) <= set(pinned)
    assert not [line for line in pinned if line.startswith(("opencv-python==", "torchvision=="))]


# The doctor


def _examined(monkeypatch, *findings: Finding) -> None:
    monkeypatch.setattr(doctor, "examine", lambda asked: iter(findings))


@pytest.mark.parametrize(
    ("topics", "code", "failed"),
    [((), 0, []), (("gpu",), 1, ["device"]), (("libero", "gpu"), 1, ["assets", "device"]), (("tensorrt",), 0, [])],
)
def test_only_what_was_asked_fails(topics, code, failed, monkeypatch, capsys):
    _examined(
        monkeypatch, Finding("core", "torch", "ok", "2.13"), Finding("libero", "assets", "missing", "not here", "fetch them"),
        Finding("gpu", "device", "broken", "on fire", "put it out"),
    )  # fmt: skip
    assert command_line.main([*topics]) == code
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["failed"] == failed
    assert any("cure: put it out" in line for line in lines) == ("gpu" in topics)


def _fails() -> str:
    raise RuntimeError("no\nway")


def _is_missing() -> str:
    raise LiberoMissing("not here")


@pytest.mark.parametrize(("check", "state", "detail"), [(_fails, "broken", "RuntimeError: no way"), (_is_missing, "missing", "not here")])
def test_what_a_check_raises_is_the_finding(check, state, detail):
    found = doctor._try("core", "it", check, "cure")
    assert (found.state, found.detail, found.cure) == (state, detail, "cure")


def test_what_engines_for_a_gpu_are_built_with_is_looked_for(tmp_path, monkeypatch):
    from worldenv.engines import inductor

    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(ModuleNotFoundError, match="torch was built without CUDA"):
        doctor._compilers()
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(inductor.importlib.util, "find_spec", lambda name: None)
    found = doctor._try("gpu", "engines", doctor._compilers, "cure")
    assert (found.state, found.cure) == ("missing", "cure")
    assert "needs CUDA's headers" in found.detail
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda.h").touch()
    assert str(tmp_path) in doctor._compilers()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModuleNotFoundError, match=r"no C\+\+ compiler"):
        doctor._compilers()


def test_two_distributions_of_opencv_are_found(monkeypatch):
    class Distribution:
        def __init__(self, name):
            self.metadata = {"Name": name}

    monkeypatch.setattr(doctor.metadata, "distributions", lambda: [Distribution("opencv-python-headless"), Distribution("opencv-python")])
    assert "overwrite each other" in doctor._try("core", "opencv", doctor._opencv, "").detail


@pytest.mark.slow
def test_a_crash_is_a_finding_and_the_next_check_runs():
    with doctor._Apart() as apart:
        found = doctor._try("core", "it", lambda: apart.call(os._exit, 3), "cure")  # type: ignore[arg-type]
        assert (found.state, found.cure) == ("broken", "cure")
        assert "crashed" in found.detail
        assert "Python" in apart.call(doctor._python)


@pytest.mark.slow
def test_this_machine_is_well(capsys):
    assert command_line.main([]) == 0
    found = {one["name"]: one["state"] for one in json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]}
    assert {found[name] for name in ("python", "torch", "extension", "networks", "opencv", "drawing")} == {"ok"}


def test_a_wrong_topic_is_one_line(capsys):
    assert command_line.main(["libreo"]) == 2
    assert "libreo" in capsys.readouterr().err
