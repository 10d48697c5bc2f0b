"""The cache folder, and its files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """``$BAYESFED_CACHE``, else ``~/.cache/bayesfed``.

    Raises:
        RuntimeError: there is no home folder.
    """
    named = os.environ.get("BAYESFED_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "bayesfed"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write ``path`` under a temporary name and rename it: another process sees the whole file or none.

    Raises:
        OSError: it can't be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
