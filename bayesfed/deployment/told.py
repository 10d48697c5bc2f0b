"""What a node tells the server of an exception, and what only its own log says."""

from __future__ import annotations

import traceback
from dataclasses import fields
from logging import getLogger

from bayesfed.config import GROUPS, RunSchema
from bayesfed.errors import InputError
from bayesfed.foreign import plain_text
from bayesfed.wire import BadMessage, Diverged

log = getLogger("bayesfed")
LOGGED = 1000  # characters of a line in the node's own log: it is for people
ARRAYS = ("x", "y", "x_test", "y_test")  # of a data file, whatever its columns are called
NODE_OPTIONS = ("partition-id", "data-path", "overrides")
FIELDS = {*GROUPS, *ARRAYS, *NODE_OPTIONS, *(field.name for field in fields(RunSchema))}


def told(error: Exception) -> str:
    """The reason that leaves the node: an exception's text may hold paths, names, rows and labels of the node's data.

    Told are the text of a ``BadMessage``, which is about what the *server* sent or the client's own answer, the field
    of an ``InputError``, without its value, if it is a key of ours, and otherwise the exception's class.
    """
    kind = type(error).__name__
    if type(error) in (BadMessage, Diverged):
        return f"{kind}: {error}"
    if isinstance(error, InputError):
        top = error.field.partition(".")[0]
        field = error.field if top in FIELDS else "a setting"
        return f"{kind}: {field} can't be used as it is on this node; the node's own log says why"
    return f"{kind}; the node's own log says more"


def log_whole(doing: str, error: Exception) -> None:
    """The exception in the node's own log: one line if the user can mend it, else with its traceback."""
    if isinstance(error, InputError | BadMessage):
        lines = [f"{type(error).__name__}: {error}"]
    else:
        lines = "".join(traceback.format_exception(error)).splitlines()
    log.error("%s message: %s", doing, "\n".join(plain_text(line, LOGGED) for line in lines))
