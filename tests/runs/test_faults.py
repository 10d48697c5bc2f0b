"""Kill, full disk, corrupt files: what a run loses is never more than the rounds since its last checkpoint."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys

import pytest
import torch

import bayesfed
from bayesfed.errors import InputError, RunFailed
from bayesfed.runs import checkpoint
from bayesfed.runs.checkpoint import Checkpoint

pytestmark = pytest.mark.faults
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.listdir")
POINTS = 50


def in_child(overrides: list[str], kill_at: int | None) -> int:
    """Run in a forked process that kills itself with SIGKILL at its ``kill_at``-th file operation in the run.

    Returns:
        The signal that ended it, or 0; with ``kill_at`` None, minus the number of operations.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            if event in EVENTS:
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(hook)
            bayesfed.run(overrides)
            os.write(writer, str(count).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        text = file.read()
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0
    return -int(text) if kill_at is None else 0


def test_kill_9_at_fifty_points_and_resume_gives_the_same_bits(run, tmp_path, digest) -> None:
    base = ["experiment=linreg", "strategy.family=diagonal", "strategy.damping=0.3", "eval.samples=4", "rounds=6",
            "checkpoint.every=2", "display=false", "figures=false"]  # fmt: skip
    whole = bayesfed.run([*base, f"hydra.run.dir={tmp_path / 'whole'}"])
    operations = -in_child([*base, f"hydra.run.dir={tmp_path / 'counted'}"], None)
    assert digest(tmp_path / "counted") == digest(whole.run_dir)
    assert operations > POINTS
    draw, killed, resumed, lost = random.Random(7), 0, 0, 0
    for number, point in enumerate(sorted(draw.sample(range(1, operations), POINTS))):
        folder = tmp_path / f"run{number}"
        killed += in_child([*base, f"hydra.run.dir={folder}"], point) == signal.SIGKILL
        if number % 3 == 0 and any((folder / "checkpoint").glob("server-*.safetensors")):  # and once more on the way
            in_child([f"resume={folder}"], draw.randrange(1, operations))
        try:
            done = bayesfed.run([f"resume={folder}"])
            resumed += 1
        except InputError:  # killed before its first checkpoint: nothing was done that could be lost
            assert not any((folder / "checkpoint").glob("server-*.safetensors"))
            done = bayesfed.run([*base, f"hydra.run.dir={folder}-again"])
        lost += digest(done.run_dir) != digest(whole.run_dir)
        assert done.summary["status"] == "finished"
        assert [line["round"] for line in done.rounds] == list(range(7))
    assert (killed, lost) == (POINTS, 0)
    assert resumed >= POINTS // 2


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "garbage"])
def test_damaged_checkpoint_is_noticed_and_the_older_one_used(run, digest, damage: str, caplog) -> None:
    part = run("rounds=3", to="part")
    newest = part.run_dir / "checkpoint" / "server-000003.safetensors"
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes({"bit": bytes(data), "cut": bytes(data[:-8]), "empty": b"", "garbage": os.urandom(400)}[damage])
    assert Checkpoint.latest(part.run_dir / "checkpoint").round == 2
    assert "server-000003.safetensors is not used" in caplog.text
    resumed = bayesfed.run([f"resume={part.run_dir}", "rounds=4"])
    assert digest(resumed.run_dir) == digest(run("rounds=4", to="whole").run_dir)


def test_every_flipped_byte_of_a_checkpoint_is_noticed(tmp_path) -> None:
    saved = Checkpoint(4, {"a": torch.arange(6.0), "b": torch.ones(2, 2).double()}, {"accepted": {"0": 4}})
    saved.save(tmp_path)
    path = next(tmp_path.iterdir())
    good = path.read_bytes()
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 0x10
        path.write_bytes(bytes(data))
        try:
            found = Checkpoint.latest(tmp_path)
        except InputError:
            continue
        assert found.state == saved.state  # only where JSON or padding has room for another spelling
        assert found.round == 4
        assert all(torch.equal(found.tensors[name], value) for name, value in saved.tensors.items())


@pytest.mark.parametrize("where", ["save", "rename"])
def test_disk_full_while_writing_a_checkpoint(run, digest, monkeypatch, tmp_path, where: str) -> None:
    real_save, real_rename, full = checkpoint.save_file, os.replace, [True]

    def save_file(tensors, path, metadata=None):
        if full[0] and "server-000003" in str(path):
            path.write_bytes(b"part of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(tensors, path, metadata=metadata)

    def replace(source, target):
        if full[0] and "server-000003" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        real_rename(source, target)

    if where == "save":
        monkeypatch.setattr(checkpoint, "save_file", save_file)
    else:
        monkeypatch.setattr(checkpoint.os, "replace", replace)
    with pytest.raises(RunFailed, match=r"checkpoint of round 3 can't be written.*No space left"):
        run("rounds=5", to="part")
    folder = tmp_path / "part" / "checkpoint"
    assert [p.name for p in sorted(folder.glob("server-*"))] == [
        "server-000001.safetensors",
        "server-000002.safetensors",
    ]
    full[0] = False
    resumed = bayesfed.run([f"resume={tmp_path / 'part'}"])
    assert digest(resumed.run_dir) == digest(run("rounds=5", to="whole").run_dir)
