"""The log of a run as JSON lines, for machines to read."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from logging import Handler, LogRecord
from pathlib import Path


class JsonLog(Handler):
    """Appends ``{"time", "level", "logger", "message"}`` for each record to ``path``; a full disk does not end the
    run."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def emit(self, record: LogRecord) -> None:
        """Write one line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        with suppress(OSError), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
