"""Where a client keeps its site: durable, round-tagged, committed only when the server says so.

A site ``eta_k`` must change exactly when the server counted the reply it belongs to, or ``sum_k eta_k`` on the server
and on the clients drift apart for good. A client can't know whether its reply arrived. So it never overwrites: training
in round r writes a *new* record tagged r beside the one it started from, and the next message from the server names the
last round of this client that was ``accepted``, and those that lie in the server's last checkpoint (``durable``) and in
the one before it (``older``, used if the last one is damaged). The client continues from the accepted record and drops
all others of earlier rounds but these two, which a resumed server would ask for.

The same rule covers a lost reply, a duplicate or late message, a crash of either side at any point, and a resumed run;
and as any process that sees the files can serve any client, results don't depend on which worker a client lands on.
Records of later rounds stay: a message that was delayed beyond its successor must not drop what that one saved, and
after going back to a checkpoint they are overwritten before a server can ask for them.
"""

from __future__ import annotations

import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from logging import getLogger
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayesfed.checksum import DIGESTS, XXH3, checksum
from bayesfed.lock import PARTIAL
from bayesfed.profiling import timed

log = getLogger("bayesfed")
Record = dict[str, Tensor]


class SiteLost(RuntimeError):
    """The server counts on a site that this client no longer has; going on would corrupt the server's sum of sites."""


class SiteStore(ABC):
    """Round-tagged records of clients: what a record holds is up to the handler."""

    @abstractmethod
    def save(self, client: int, round: int, record: Record) -> None:
        """Keep ``record`` as what ``client`` has after ``round``, replacing an earlier attempt at that round."""

    @abstractmethod
    def read(self, client: int, round: int) -> Record | None:
        """The record of that round, or None."""

    @abstractmethod
    def rounds(self, client: int) -> list[int]:
        """Rounds of which a record exists, ascending."""

    @abstractmethod
    def drop(self, client: int, round: int) -> None:
        """Forget that record."""

    @timed("sites")
    def open(self, client: int, round: int, accepted: int, durable: int, older: int = 0) -> Record | None:
        """What ``client`` continues from in ``round``: the record of round ``accepted``; None for 0, never.

        Records before ``round`` other than ``accepted``, ``durable`` and ``older`` are dropped.

        Raises:
            SiteLost: the accepted record is missing.
        """
        found = self.rounds(client)
        for old in found:
            if old < round and old not in (accepted, durable, older):
                self.drop(client, old)
        if accepted == 0:
            return None
        record = self.read(client, accepted)
        if record is None:
            raise SiteLost(
                f"client {client} has no site of round {accepted}, which the server accepted "
                f"(it has: {found or 'none'})"
            )
        return record


class MemorySites(SiteStore):
    """Sites in this process: gone when it ends."""

    def __init__(self) -> None:
        self._records: dict[int, dict[int, Record]] = {}

    def save(self, client: int, round: int, record: Record) -> None:
        self._records.setdefault(client, {})[round] = {name: value.clone() for name, value in record.items()}

    def read(self, client: int, round: int) -> Record | None:
        record = self._records.get(client, {}).get(round)
        return None if record is None else {name: value.clone() for name, value in record.items()}

    def rounds(self, client: int) -> list[int]:
        return sorted(self._records.get(client, {}))

    def drop(self, client: int, round: int) -> None:
        del self._records[client][round]


class DiskSites(SiteStore):
    """One safetensors file per client and round under ``root``, written atomically and with a checksum (XXH3).

    A file that is cut off, or was changed, is as good as lost.

    Small records that this process wrote last are also kept in memory, so that a client that comes back to it costs no
    read, unless the file was changed since. (Large ones are read as fast as they can be copied.)

    Args:
        root: folder of one experiment; made when the first site is written.
        cache_bytes: memory for such records.
    """

    small = 1 << 20  # bytes

    _pattern = re.compile(r"round-(\d{6,})\.safetensors")

    def __init__(self, root: Path | str, cache_bytes: int = 1 << 28):
        self.root, self.cache_bytes = Path(root), cache_bytes
        self._cache: OrderedDict[tuple[int, int], tuple[tuple[int, int], Record]] = OrderedDict()
        self._cached = 0

    @timed("sites")
    def save(self, client: int, round: int, record: Record) -> None:
        path = self._path(client, round)
        temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}{PARTIAL}")
        values = {name: value.contiguous() for name, value in record.items()}
        metadata = {"bayesfed": json.dumps({XXH3: checksum(values, digest=XXH3)})}
        try:
            try:
                save_file(values, temporary, metadata=metadata)
            except (OSError, SafetensorError):
                if path.parent.is_dir():
                    raise
                path.parent.mkdir(parents=True, exist_ok=True)  # the client's first record
                save_file(values, temporary, metadata=metadata)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._forget(client, round)
        self._remember(client, round, record)

    def read(self, client: int, round: int) -> Record | None:
        path = self._path(client, round)
        try:
            if (client, round) in self._cache:
                stamp, record = self._cache[client, round]
                if stamp == _stamp(path):
                    return {name: value.clone() for name, value in record.items()}
            return _read(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError) as error:  # a damaged file is a lost one
            log.warning("site %s is not used: %s", path, error)
            return None

    def rounds(self, client: int) -> list[int]:
        try:
            names = os.listdir(self._folder(client))
        except FileNotFoundError:
            return []
        matches = (self._pattern.fullmatch(name) for name in names)
        return sorted(int(match[1]) for match in matches if match)

    def drop(self, client: int, round: int) -> None:
        self._forget(client, round)
        self._path(client, round).unlink(missing_ok=True)

    def _remember(self, client: int, round: int, record: Record) -> None:
        size = sum(value.nbytes for value in record.values())
        if size > min(self.small, self.cache_bytes):
            return
        copy = {name: value.clone() for name, value in record.items()}
        self._cache[client, round] = _stamp(self._path(client, round)), copy
        self._cached += size
        while self._cached > self.cache_bytes:
            self._forget(*next(iter(self._cache)))

    def _forget(self, client: int, round: int) -> None:
        found = self._cache.pop((client, round), None)
        if found is not None:
            self._cached -= sum(value.nbytes for value in found[1].values())

    def _folder(self, client: int) -> Path:
        return self.root / f"client-{client:05d}"

    def _path(self, client: int, round: int) -> Path:
        return self._folder(client) / f"round-{round:06d}.safetensors"


def _read(path: Path) -> Record:
    """The record in a file.

    Raises:
        SafetensorError, ValueError: the file is damaged.
    """
    with safe_open(path, framework="pt") as file:
        stored = (file.metadata() or {}).get("bayesfed")
        record: Record = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if stored is not None:  # the first files had none, later ones SHA-256
        found = json.loads(stored)
        if not isinstance(found, dict) or len(found) != 1:
            raise ValueError("no checksum where one should be")
        ((digest, value),) = found.items()
        if digest not in DIGESTS:
            raise ValueError(f"unknown checksum {digest!r}: the file is damaged, or a newer bayesfed wrote it")
        if value != checksum(record, digest=digest):
            raise ValueError("wrong checksum")
    return record


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is written anew."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ino
