"""Kill, full disk, corrupt files: what a run loses is never more than the rounds since its last checkpoint."""

from __future__ import annotations

import copy
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, read_write

from bayesfed.config import compose_config
from bayesfed.errors import InputError, RunFailed
from bayesfed.runs import checkpoint
from bayesfed.runs.checkpoint import Checkpoint
from bayesfed.runs.launch import RunResult, run_config

pytestmark = pytest.mark.faults
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.listdir")
KILLS, POINTS = 50, 20  # by the clock, at file operations
BASE = (
    "experiment=linreg",
    "strategy.family=diagonal",
    "strategy.damping=0.3",
    "eval.samples=4",
    "display=false",
    "figures=false",
)
KILLED = (*BASE, "rounds=6", "checkpoint.every=2")
ROOMY = (*BASE[:2], "strategy.damping=0", *BASE[3:], "rounds=60")  # no sites: clients have disks of their own
EACH_ROUND = (*BASE, "rounds=5")


@lru_cache
def composed(*overrides: str) -> DictConfig:
    """The configuration, before anything is written: half of such a short run's time, and nothing that a kill could
    harm.
    """
    return compose_config(overrides)


def begin(folder: Path, settings: tuple[str, ...] = KILLED) -> RunResult:
    """``bayesfed.run`` in ``folder``."""
    cfg = copy.deepcopy(composed(*settings))
    with read_write(cfg.hydra):
        cfg.hydra.run.dir = str(folder)
    return run_config(cfg, settings, time.perf_counter())


def resume(folder: Path) -> RunResult:
    """``bayesfed.run(["resume=FOLDER"])``."""
    cfg = copy.deepcopy(composed("resume=folder"))
    cfg.resume = str(folder)
    return run_config(cfg, [f"resume={folder}"], time.perf_counter())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[tuple[str, ...]], Path]:
    """``whole(settings)``: the directory of a run that nothing happened to."""

    @lru_cache
    def made(settings: tuple[str, ...]) -> Path:
        return begin(tmp_path_factory.mktemp("whole") / "run", settings).run_dir

    return made


def start(
    work: Callable[..., object], *arguments: object, kill_at: int | None = None, file_size: int | None = None
) -> tuple[int, int]:
    """``work(*arguments)`` in a child process, which kills itself with SIGKILL at its ``kill_at``-th file operation.

    Args:
        work: a run.
        arguments: of ``work``.
        kill_at: None = never.
        file_size: no file may grow beyond it (bytes).

    Returns:
        Process id, and a pipe on which the child says how many file operations it did, or how it failed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
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
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        work(*arguments)
        os.write(writer, str(count).encode())
        code = 0
    except RunFailed as error:
        os.write(writer, str(error).encode())
    finally:
        os._exit(code)


def end(child: int, reader: int) -> tuple[int, str]:
    """Exit code of a child (minus the signal that ended it), and what it said."""
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return os.waitstatus_to_exitcode(status), file.read()


def has_checkpoint(folder) -> bool:
    return any((folder / "checkpoint").glob("server-*.safetensors"))


def test_kill_9_at_file_operations_and_resume_gives_the_same_bits(tmp_path, whole, digest) -> None:
    """Where it hurts: between a checkpoint and the posterior, before a rename, ..."""
    right = digest(whole(KILLED))
    composed("resume=folder")  # not in each child
    code, said = end(*start(begin, tmp_path / "counted"))
    operations = int(said)
    assert code == 0
    assert digest(tmp_path / "counted") == right
    assert operations > 2 * POINTS
    draw, killed, resumed, lost = random.Random(7), 0, 0, 0
    for number, point in enumerate(sorted(draw.sample(range(1, operations), POINTS))):
        folder = tmp_path / f"run{number}"
        killed += end(*start(begin, folder, kill_at=point))[0] == -signal.SIGKILL
        if number % 3 == 0 and has_checkpoint(folder):  # and once more on the way
            end(*start(resume, folder, kill_at=draw.randrange(1, operations)))
        try:
            done = resume(folder)
            resumed += 1
        except InputError:  # killed before its first checkpoint: nothing was done that could be lost
            assert not has_checkpoint(folder)
            done = begin(folder.with_name(f"{folder.name}-again"))
        lost += digest(done.run_dir) != right
        assert done.summary["status"] == "finished"
        assert [line["round"] for line in done.rounds] == list(range(7))
    assert (killed, lost) == (POINTS, 0)
    assert resumed >= POINTS // 2


def test_kill_9_fifty_times_at_any_moment_gives_the_same_bits(tmp_path, whole, digest) -> None:
    """From outside, by the clock, again and again while a run is resumed, until it comes to its end."""
    right = digest(whole(KILLED))
    composed("resume=folder")
    began = time.monotonic()
    assert end(*start(begin, tmp_path / "timed"))[0] == 0
    duration = time.monotonic() - began
    draw, kills, lost = random.Random(11), [], 0
    while sum(kills) < KILLS:
        folder = tmp_path / f"run{len(kills)}-0"
        kills.append(0)
        while True:
            if has_checkpoint(folder):
                child, reader = start(resume, folder)
            else:  # nothing to go on with
                folder = tmp_path / f"run{len(kills)}-{kills[-1]}"
                child, reader = start(begin, folder)
            time.sleep(draw.uniform(0.1, 1.0 + 0.2 * kills[-1]) * duration)  # in the end it is faster
            os.kill(child, signal.SIGKILL)
            if end(child, reader)[0] == 0:  # it was faster
                break
            kills[-1] += 1
        lost += digest(folder) != right
    assert lost == 0
    assert max(kills) >= 3


@pytest.fixture(scope="module")
def third(tmp_path_factory) -> Path:
    """A run of five rounds that the disk stopped after its fourth, so that its last checkpoint is of the third."""
    folder = tmp_path_factory.mktemp("third") / "run"
    with pytest.MonkeyPatch.context() as patches:
        fill_the_disk(patches, "save", "server-000004")
        with pytest.raises(RunFailed, match="round 4"):
            begin(folder, EACH_ROUND)
    return folder


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "garbage"])
def test_damaged_checkpoint_is_noticed_and_the_older_one_used(third, whole, digest, damage, tmp_path, caplog) -> None:
    part = shutil.copytree(third, tmp_path / "part")
    newest = part / "checkpoint" / "server-000003.safetensors"
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes({"bit": bytes(data), "cut": bytes(data[:-8]), "empty": b"", "garbage": os.urandom(400)}[damage])
    assert Checkpoint.latest(part / "checkpoint").round == 2
    assert "server-000003.safetensors is not used" in caplog.text
    assert digest(resume(part).run_dir) == digest(whole(EACH_ROUND))


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


def fill_the_disk(patches: pytest.MonkeyPatch, where: str, name: str) -> None:
    """No room to write (``where`` = "save") or to rename the file ``name``."""
    real_save, real_rename = checkpoint.save_file, os.replace

    def save_file(tensors, path, metadata=None):
        if name in str(path):
            path.write_bytes(b"part of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(tensors, path, metadata=metadata)

    def replace(source, target):
        if name in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        real_rename(source, target)

    if where == "save":
        patches.setattr(checkpoint, "save_file", save_file)
    else:
        patches.setattr(checkpoint.os, "replace", replace)


@pytest.mark.parametrize("where", ["save", "rename"])
def test_disk_full_while_writing_a_checkpoint(whole, digest, monkeypatch, tmp_path, where: str) -> None:
    fill_the_disk(monkeypatch, where, "server-000003")
    with pytest.raises(RunFailed, match=r"checkpoint of round 3 can't be written.*No space left"):
        begin(tmp_path / "part", EACH_ROUND)
    folder = tmp_path / "part" / "checkpoint"
    assert [p.name for p in sorted(folder.glob("server-*"))] == [
        "server-000001.safetensors",
        "server-000002.safetensors",
    ]
    monkeypatch.undo()
    assert digest(resume(tmp_path / "part").run_dir) == digest(whole(EACH_ROUND))


def test_a_disk_that_is_really_full(tmp_path, whole, digest) -> None:
    """A small file system (tmpfs) fills up during the run; with more room the run goes on to the same bits."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with pytest.raises(RunFailed, match=r"No space left|os error 28"):
            begin(disk / "part", ROOMY)
        reached = Checkpoint.latest(disk / "part" / "checkpoint").round
        assert 2 <= reached < 60
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        done = resume(disk / "part")
        assert digest(done.run_dir) == digest(whole(ROOMY))
        assert [line["round"] for line in done.rounds] == list(range(61))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_files_that_may_not_grow(tmp_path, whole, digest) -> None:
    """The system refuses to write on beyond 9000 bytes (EFBIG)."""
    folder = tmp_path / "part"
    code, said = end(*start(begin, folder, ROOMY, file_size=9000))
    assert code == 1
    assert "File too large" in said
    assert 1 <= Checkpoint.latest(folder / "checkpoint").round < 60
    assert digest(resume(folder).run_dir) == digest(whole(ROOMY))
