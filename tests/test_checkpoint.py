"""Files that are whole or not there."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from worldenv import checkpoint
from worldenv.checkpoint import CheckpointError, Savepoint

TREE = {
    "weights": {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)},
    "array": np.arange(4, dtype=np.uint8),
    "list": [1, 2.5, None, True, "x", torch.zeros(0, 3)],
    7: {"$": "looks like a mark"},
}


def assert_same(got, want):
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, list):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            assert_same(g, w)
    elif isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    elif isinstance(want, np.ndarray):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    else:
        assert got == want
        assert type(got) is type(want)


def test_round_trip_by_file_and_by_bytes(tmp_path):
    checkpoint.save(tmp_path / "x.safetensors", TREE)
    assert_same(checkpoint.load(tmp_path / "x.safetensors"), TREE)
    assert_same(checkpoint.from_bytes(checkpoint.to_bytes(TREE), "x"), TREE)


def test_equal_trees_are_equal_bytes(tmp_path):
    """Or a stage that is done again would send all that follow it after it."""
    first = checkpoint.to_bytes(TREE)
    for n in range(12):
        checkpoint.save(tmp_path / str(n), TREE)
        assert (tmp_path / str(n)).read_bytes() == first == checkpoint.to_bytes(TREE)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain"])
def test_every_truncation_and_flipped_byte_of_a_torch_file_is_named_or_harmless(zipped, tmp_path):
    """The unpickler raises whatever damage makes it stumble over: of bytes it does not check itself, IndexError, TypeError, struct.error, ..."""
    path = tmp_path / "x.pt"
    tensors = {"state_dict": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    assert_same(checkpoint.read_foreign(path), tensors)
    cuts = [whole[:n] for n in range(0, len(whole), 7)]
    flips = [whole[:n] + bytes([whole[n] ^ mask]) + whole[n + 1 :] for n in range(0, len(whole), 9) for mask in (0x01, 0xFF)]
    refused = []
    for damaged in cuts + flips:
        path.write_bytes(damaged)
        try:
            checkpoint.read_foreign(path)
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > len(cuts)
    assert all(said.startswith(f"{path}: ") and "\n" not in said for said in refused)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_foreign_file_is_read_in_place(name, tmp_path):
    """Every process of a stage reads it: each with a copy of its own, eight of them take the memory of a host."""
    from safetensors.torch import save_file

    path, tensors = tmp_path / name, {"a": torch.arange(5000.0)}
    torch.save(tensors, path) if name == "x.pt" else save_file(tensors, path)
    kept = path.read_bytes()
    found = checkpoint.read_foreign(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    found["a"].add_(1.0)
    assert path.read_bytes() == kept, "what is changed then is this process's own"
    assert_same(checkpoint.read_foreign(path), tensors)


def test_every_truncation_and_every_flipped_byte_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {"a": torch.arange(8), "note": "text"})
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            checkpoint.load(path)
    for at in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[at] ^= 0x41
        path.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            checkpoint.load(path)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(tmp_path / "none")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="another program"):
        checkpoint.load(tmp_path / "foreign")


def test_what_cannot_be_stored_is_named_and_the_old_file_stays(tmp_path):
    path = tmp_path / "x"
    checkpoint.save(path, {"a": 1})
    with pytest.raises(TypeError, match=r"tree\.b\[1\]: set"):
        checkpoint.save(path, {"b": [0, {1, 2}]})
    assert checkpoint.load(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["x"]


def test_a_write_that_fails_leaves_the_old_content_and_no_rest(tmp_path):
    path = tmp_path / "x"
    checkpoint.write_text(path, "old")

    def half():
        with checkpoint.atomic(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_is_an_oserror_that_says_so():
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full: Linux only")
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb", buffering=0) as full:
        full.write(checkpoint.to_bytes({"a": torch.zeros(9)}))


def test_a_file_that_cannot_be_written_is_an_oserror_with_its_number_and_name(tmp_path):
    """The writer of tensors raises an error of its own, with the disk's as text."""
    code = (
        "import errno, resource, signal, sys, torch; from pathlib import Path; from worldenv import checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "try: checkpoint.write_tensors(Path(sys.argv[1]), {'a': torch.zeros(99999)})\n"
        "except OSError as error: assert (error.errno, error.filename) == (errno.EFBIG, sys.argv[1]), repr(error)\n"
        "else: raise SystemExit('written')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == []


def test_savepoint_keeps_the_last_tree(tmp_path):
    calls = []
    first = Savepoint(tmp_path / "s", every_s=0.0, saved=lambda: calls.append(1))
    assert first.load() is None
    assert first.due()
    first.save({"step": 2})
    first.save({"step": 3})
    assert len(calls) == 2
    second = Savepoint(tmp_path / "s")
    assert second.load("step") == {"step": 3}
    with pytest.raises(CheckpointError, match="s: of another version, which kept no losses, kl; delete it"):
        second.load("step", "losses", "kl")
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="s: truncated or damaged; delete it, and this part is made anew"):
        second.load("step")
    assert not second.due()
    second.clear()
    assert second.load() is None


def test_a_save_that_takes_long_is_made_seldom(tmp_path, monkeypatch):
    """29 GB of a large simulator took longer to write than the half minute after which they were written again."""
    now = 100.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    savepoint = Savepoint(tmp_path / "s", every_s=30.0)

    def slow(path, tree):
        nonlocal now
        now += 60.0

    monkeypatch.setattr(checkpoint, "save", slow)
    now += 30.0
    assert savepoint.due()
    savepoint.save({})
    for later, due in ((30.0, False), (1000.0, False), (110.0, True)):  # 19 minutes of work to one of writing
        now += later
        assert savepoint.due() == due


def test_a_file_for_which_there_is_no_memory_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "large.pt").write_bytes(b"x")

    def full(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 16 GB")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError, match=r"large.pt: 0.0 GB, for which this machine has no memory"):
        checkpoint.read_foreign(tmp_path / "large.pt")
