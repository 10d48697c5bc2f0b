"""Reading the files of a run directory, which a crash, another version or a stranger may have left as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bayesfed.errors import InputError
from bayesfed.foreign import plain_text
from bayesfed.lock import reason

MALFORMED = (ValueError, TypeError, AttributeError, KeyError, RecursionError)  # what parsers raise besides their own


def read_text(path: Path) -> str | None:
    """The text of a file of a run directory; None if nothing is there.

    Raises:
        InputError: it is no file, can't be read or is not UTF-8.
    """
    if not os.path.lexists(path):
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, "it is not UTF-8 text") from error
    except OSError as error:
        raise damaged(path, reason(error)) from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; [] if there is none. A last line that was cut off in writing is left out.

    Raises:
        InputError: another line is not a JSON object.
    """
    lines = (read_text(path) or "").split("\n")
    records = []
    for position, line in enumerate(lines[:-1] if not lines[-1] else lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if position < len(lines) - 1:
                raise damaged(path, f"line {position + 1} is not JSON") from error
            continue
        if not isinstance(record, dict):
            raise damaged(path, f"line {position + 1} is no object")
        records.append(record)
    return records


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is none.

    Raises:
        InputError: it is damaged.
    """
    text = read_text(path)
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, "it is not JSON") from error
    if not isinstance(value, dict) or (text is not None and not value):
        raise damaged(path, "it holds no object")
    return value


def damaged(path: Path, fault: str) -> InputError:
    """The error for the file ``path`` of a run directory that can't be used, with what can be saved."""
    needed = path.name in ("config.yaml", "rounds.jsonl")
    saved = "bayesfed.load needs posterior.safetensors only" if needed else "the run goes on without it: move it away"
    return InputError("run_dir", plain_text(path.parent), f"{path.name} is damaged: {fault}; {saved}")


def is_a(value: object, kind: Any) -> bool:
    """Whether a value from JSON is of that type; a bool is no int."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def no_number(record: dict[str, Any]) -> str:
    """A key of metrics or seconds whose value is neither a number nor null, or nothing."""
    metrics = (key for key in record if "/" in key or key in ("seconds", "wall_clock"))
    return next((k for k in metrics if record[k] is not None and not is_a(record[k], int | float)), "")
