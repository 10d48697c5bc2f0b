"""Results that a benchmark keeps in a file, so that it can be measured in parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def kept(path: Path | None) -> dict[str, Any]:
    """What was measured so far."""
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


def keep(path: Path | None, results: dict[str, Any]) -> None:
    """Write the results; nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
