"""Locks between processes: one holder, no file left, none passed by."""

from __future__ import annotations

import multiprocessing
import threading
import time

import pytest

from bayesfed.lock import locked


def test_one_holder_and_no_file_left(tmp_path) -> None:
    path = tmp_path / ".lock"
    with locked(path):
        with pytest.raises(BlockingIOError), locked(path):
            pass
        assert path.exists()
    assert not path.exists()
    path.touch()  # of a process that was killed
    with locked(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_who_waits_gets_it(tmp_path) -> None:
    path, got = tmp_path / ".lock", []

    def wait() -> None:
        with locked(path, patience=20):
            got.append(path.exists())

    with locked(path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.5)
        assert got == []
    thread.join(20)
    assert got == [True]


def _count(path, number, turns) -> None:
    for _ in range(turns):
        with locked(path, patience=60):
            value = int(number.read_text())
            time.sleep(0.001)
            number.write_text(str(value + 1))


def test_many_that_remove_the_file_never_hold_it_together(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("bayesfed.lock.POLL", 0.0005)
    number = tmp_path / "number"
    number.write_text("0")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_count, args=(tmp_path / ".lock", number, 40)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert number.read_text() == "160"
