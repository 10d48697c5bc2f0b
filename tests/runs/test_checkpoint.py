"""Server checkpoints: atomic, the two newest kept, an unreadable one skipped."""

from __future__ import annotations

import pytest
import torch

from bayesfed.errors import InputError
from bayesfed.runs import checkpoint as module
from bayesfed.runs.checkpoint import Checkpoint


def make(round: int) -> Checkpoint:
    return Checkpoint(round, {"sum": torch.full((3,), float(round), dtype=torch.float64)}, {"accepted": {"0": round}})


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    make(7).save(tmp_path)
    found = Checkpoint.latest(tmp_path)
    assert found.round == 7
    assert found.state == {"accepted": {"0": 7}}
    assert torch.equal(found.tensors["sum"], make(7).tensors["sum"])


def test_the_two_newest_are_kept(tmp_path):
    for round in (1, 2, 3):
        make(round).save(tmp_path)
    assert names(tmp_path) == ["server-000002.safetensors", "server-000003.safetensors"]


@pytest.mark.parametrize("content", [b"", b"half a file"])
def test_an_unreadable_one_is_skipped(tmp_path, content):
    for round in (1, 2):
        make(round).save(tmp_path)
    (tmp_path / "server-000002.safetensors").write_bytes(content)
    assert Checkpoint.latest(tmp_path).round == 1


def test_crash_while_writing_leaves_the_old_one(tmp_path, monkeypatch):
    make(1).save(tmp_path)
    save = module.save_file

    def torn(tensors, path, metadata):
        save(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        make(2).save(tmp_path)
    assert Checkpoint.latest(tmp_path).round == 1


@pytest.mark.parametrize("made", [True, False])
def test_none_at_all(tmp_path, made):
    folder = tmp_path / "checkpoint"
    if made:
        folder.mkdir()
    with pytest.raises(InputError, match="no readable checkpoint"):
        Checkpoint.latest(folder)


def test_rounds_beyond_six_digits_sort_as_numbers(tmp_path):
    for round in (999_999, 1_000_000):
        make(round).save(tmp_path)
    assert Checkpoint.latest(tmp_path).round == 1_000_000
