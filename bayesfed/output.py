"""Standard output and error as they must be for work that takes hours: channels that never end it."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# what bayesfed itself prints beyond ASCII; anything else that an encoding lacks becomes an escape such as \u4e2d
ASCII = str.maketrans({"·": "-", "–": "-", "±": "+-", "×": "x", "…": "...", "°": " deg", "µ": "u", "─": "-"})


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding lacks."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end].translate(ASCII)
    return lacking.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error("bayesfed", _spelled)


class Output:
    """A text stream that writes what it can: once its reader is gone, its disk full or its file closed, the rest goes
    nowhere.

    Args:
        stream: takes the text; None (a process without standard output) takes nothing.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream
        self.lost = stream is None

    def write(self, text: str) -> int:
        """Write ``text``, in ASCII where the encoding can't; its length, whatever happened."""
        if self._stream is None or self.lost:
            return len(text)
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "bayesfed").decode(encoding))
        except (OSError, ValueError):  # ValueError: closed
            self.lost = True
        return len(text)

    def flush(self) -> None:
        """Hand over what is buffered."""
        if self._stream is not None and not self.lost:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self.lost = True

    def isatty(self) -> bool:
        """Whether somebody can look at it."""
        try:
            return self._stream is not None and not self.lost and self._stream.isatty()
        except (AttributeError, ValueError):
            return False

    def writable(self) -> bool:
        """Always."""
        return True

    def writelines(self, lines: list[str]) -> None:
        """Write one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:  # encoding, fileno, buffer, ...
        return getattr(self._stream, name)


@contextmanager
def steady() -> Iterator[None]:
    """For a command: standard output and error are :class:`Output`, and losing them doesn't change its exit code
    either."""
    before = sys.stdout, sys.stderr
    for number in (1, 2):  # without them (`>&-`) the next file opened, a checkpoint perhaps, would be standard output
        try:
            os.fstat(number)
        except OSError:
            _to_nowhere(number)
    wrapped: list[Any] = [Output(stream) for stream in before]
    sys.stdout, sys.stderr = wrapped
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for output in wrapped:
            output.flush()
            if output.lost:  # Python flushes once more at exit: what is left in the buffer must find a place
                with suppress(AttributeError, OSError, ValueError):
                    _to_nowhere(output.fileno())


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
