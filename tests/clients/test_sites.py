"""The site store: what survives lost replies, repeated messages, crashes and going back to a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from bayesfed.checksum import checksum
from bayesfed.federation.client import sites
from bayesfed.federation.client.sites import DiskSites, MemorySites, SiteLost, SiteStore


def record(value: float) -> dict[str, torch.Tensor]:
    return {"site.first": torch.full((3,), value, dtype=torch.float64), "step": torch.tensor(int(value))}


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path) -> SiteStore:
    return MemorySites() if request.param == "memory" else DiskSites(tmp_path / "sites")


def value_of(found: dict[str, torch.Tensor] | None) -> float | None:
    return None if found is None else float(found["site.first"][0])


def test_a_new_client_has_no_record(store):
    assert store.open(0, round=1, accepted=0, durable=0) is None
    assert store.rounds(0) == []


def test_a_record_comes_back_with_its_values_and_types(store):
    store.save(4, 1, record(7.0))
    found = store.open(4, round=2, accepted=1, durable=0)
    assert found["site.first"].dtype == torch.float64
    assert found["step"].dtype == torch.int64
    assert value_of(found) == 7.0


def test_what_is_read_or_saved_is_a_copy(store):
    saved = record(1.0)
    store.save(0, 1, saved)
    saved["site.first"].fill_(9)
    store.read(0, 1)["site.first"].fill_(9)
    assert value_of(store.read(0, 1)) == 1.0


def test_lost_reply_the_client_goes_on_from_what_was_accepted(store):
    store.save(0, 1, record(1.0))
    assert value_of(store.open(0, round=2, accepted=1, durable=0)) == 1.0
    store.save(0, 2, record(2.0))  # the reply is lost: the server still says accepted = 1
    assert value_of(store.open(0, round=3, accepted=1, durable=1)) == 1.0
    assert store.rounds(0) == [1]


def test_lost_first_reply_means_no_record(store):
    store.save(0, 1, record(1.0))
    assert store.open(0, round=2, accepted=0, durable=0) is None
    assert store.rounds(0) == []


def test_duplicate_message_starts_from_the_same_record_and_replaces_the_attempt(store):
    store.save(0, 1, record(1.0))
    for attempt in (2.0, 2.5):
        assert value_of(store.open(0, round=2, accepted=1, durable=1)) == 1.0
        store.save(0, 2, record(attempt))
    assert value_of(store.read(0, 2)) == 2.5


def test_duplicate_message_that_comes_late_leaves_newer_records_alone(store):
    for round in (1, 2, 3):
        store.open(0, round, accepted=round - 1, durable=max(round - 2, 0))
        store.save(0, round, record(float(round)))
    store.open(0, round=2, accepted=1, durable=0)  # round 2's message once more, after round 3's
    assert value_of(store.open(0, round=4, accepted=3, durable=2)) == 3.0


def test_late_message_whose_record_is_gone_says_so_and_breaks_nothing(store):
    for round in (1, 2, 3, 4):
        store.open(0, round, accepted=round - 1, durable=max(round - 1, 0))
        store.save(0, round, record(float(round)))
    with pytest.raises(SiteLost, match="no site of round 1"):
        store.open(0, round=2, accepted=1, durable=1)
    assert value_of(store.open(0, round=5, accepted=4, durable=4)) == 4.0


def test_crash_before_saving_changes_nothing(store):
    store.save(0, 1, record(1.0))
    store.open(0, round=2, accepted=1, durable=1)  # and then the process dies
    assert value_of(store.open(0, round=2, accepted=1, durable=1)) == 1.0


def test_accepted_and_durable_are_kept_and_older_ones_dropped(store):
    for round in (1, 2, 3, 4):
        store.save(0, round, record(float(round)))
    store.open(0, round=5, accepted=4, durable=2)
    assert store.rounds(0) == [2, 4]


def test_the_record_of_the_checkpoint_before_the_last_is_kept_too(store):
    """The last one may turn out to be damaged."""
    for round in (1, 2, 3, 4):
        store.save(0, round, record(float(round)))
    assert value_of(store.open(0, round=6, accepted=4, durable=3, older=2)) == 4.0
    assert store.rounds(0) == [2, 3, 4]
    assert value_of(store.open(0, round=3, accepted=2, durable=2, older=1)) == 2.0


def test_resume_from_an_older_checkpoint_gives_the_record_of_that_time(store):
    """Checkpoint at 2, rounds 3 and 4 accepted, then the server dies and goes back to 2."""
    for round, durable in ((1, 0), (2, 0), (3, 2), (4, 2)):
        store.open(0, round, accepted=round - 1, durable=durable)
        store.save(0, round, record(float(round)))
    assert value_of(store.open(0, round=3, accepted=2, durable=2)) == 2.0
    store.save(0, 3, record(3.5))
    assert value_of(store.open(0, round=4, accepted=3, durable=2)) == 3.5  # not the record 3 of the first life


def test_records_of_a_former_life_are_not_left_behind(store):
    for round in (1, 2, 3, 4):
        store.save(0, round, record(float(round)))
    for round in (3, 4, 5, 6):  # gone back to 2
        store.open(0, round, accepted=round - 1, durable=round - 1)
        store.save(0, round, record(float(round)))
    store.open(0, round=7, accepted=6, durable=6)
    assert store.rounds(0) == [6]


def test_a_site_the_server_counts_on_but_nobody_has(store):
    with pytest.raises(SiteLost, match=r"client 3 has no site of round 2.*none"):
        store.open(3, round=3, accepted=2, durable=2)


def test_clients_do_not_share_records(store):
    store.save(0, 1, record(1.0))
    store.save(1, 1, record(2.0))
    store.open(0, round=2, accepted=0, durable=0)
    assert value_of(store.open(1, round=2, accepted=1, durable=0)) == 2.0


# -- files ------------------------------------------------------------------------------------------------------------


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def test_another_process_sees_the_same_records(tmp_path):
    DiskSites(tmp_path).save(2, 1, record(5.0))
    assert value_of(DiskSites(tmp_path).open(2, round=2, accepted=1, durable=1)) == 5.0


def test_crash_while_writing_leaves_the_old_record(tmp_path, monkeypatch):
    store = DiskSites(tmp_path)
    store.save(0, 1, record(1.0))

    def torn(tensors, path, metadata=None):
        Path(path).write_bytes(b"half a fi")
        raise OSError("no space left on device")

    monkeypatch.setattr(sites, "save_file", torn)
    with pytest.raises(OSError, match="no space"):
        store.save(0, 1, record(2.0))
    assert value_of(store.open(0, round=2, accepted=1, durable=0)) == 1.0
    assert files(tmp_path) == ["round-000001.safetensors"]


def test_temporary_file_of_a_killed_process_is_not_a_record(tmp_path):
    store = DiskSites(tmp_path)
    store.save(0, 1, record(1.0))
    (tmp_path / "client-00000" / "tmpabc.partial").write_bytes(b"half")
    (tmp_path / "client-00000" / "round-000002.safetensors.partial").write_bytes(b"half")
    assert store.rounds(0) == [1]
    assert value_of(store.open(0, round=2, accepted=1, durable=1)) == 1.0


@pytest.mark.parametrize("content", [b"", b"half a file"])
def test_torn_record_is_a_lost_one(tmp_path, content):
    store = DiskSites(tmp_path)
    store.save(0, 1, record(1.0))
    (tmp_path / "client-00000" / "round-000001.safetensors").write_bytes(content)
    with pytest.raises(SiteLost):
        store.open(0, round=2, accepted=1, durable=1)
    assert not issubclass(SiteLost, SafetensorError)


def test_every_flipped_byte_of_a_record_is_noticed(tmp_path, caplog):
    DiskSites(tmp_path).save(0, 1, record(1.0))
    path = tmp_path / "client-00000" / "round-000001.safetensors"
    good = path.read_bytes()
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 0x10
        path.write_bytes(bytes(data))
        found = DiskSites(tmp_path).read(0, 1)
        assert found is None or (value_of(found) == 1.0 and int(found["step"]) == 1 and len(found) == 2)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    caplog.clear()
    with pytest.raises(SiteLost):
        DiskSites(tmp_path).open(0, round=2, accepted=1, durable=1)
    assert "wrong checksum" in caplog.text


def write(root: Path, metadata: dict[str, str] | None) -> None:
    """Client 0's record of round 1 with the value 4, as another version of bayesfed wrote it."""
    (root / "client-00000").mkdir()
    sites.save_file(record(4.0), root / "client-00000" / "round-000001.safetensors", metadata=metadata)


@pytest.mark.parametrize("digest", [None, "sha256", "xxh3"])
def test_records_of_earlier_versions_are_read(tmp_path, digest):
    """Without a checksum, with SHA-256, and as they are now."""
    made = {"bayesfed": json.dumps({digest: checksum(record(4.0), digest=digest)})} if digest else None
    write(tmp_path, made)
    assert value_of(DiskSites(tmp_path).open(0, round=2, accepted=1, durable=1)) == 4.0


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ('{"sha256": "00"}', "wrong checksum"),
        ('{"xxh3": "00"}', "wrong checksum"),
        ('{"xxh3": 1}', "wrong checksum"),
        ('{"sha3": "00"}', "unknown checksum 'sha3'"),
        ("{}", "no checksum"),
        ("[1]", "no checksum"),
        ("{", "Expecting"),
    ],
)
def test_records_with_another_checksum_are_not_read(tmp_path, caplog, metadata, reason):
    write(tmp_path, {"bayesfed": metadata})
    with pytest.raises(SiteLost):
        DiskSites(tmp_path).open(0, round=2, accepted=1, durable=1)
    assert reason in caplog.text


def test_the_checksum_of_a_record_is_xxh3(tmp_path):
    """The number itself, so that a change of what is summed up, which would orphan the sites of running experiments, is
    noticed.
    """
    DiskSites(tmp_path).save(0, 1, record(1.0))
    with safe_open(tmp_path / "client-00000" / "round-000001.safetensors", framework="pt") as file:
        assert file.metadata() == {"bayesfed": '{"xxh3": "5797e16288f80f85"}'}


def test_rounds_beyond_six_digits_sort_as_numbers(tmp_path):
    store = DiskSites(tmp_path)
    for round in (999_999, 1_000_000):
        store.save(0, round, record(1.0))
    assert store.rounds(0) == [999_999, 1_000_000]
