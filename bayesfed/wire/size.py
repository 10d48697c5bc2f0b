"""Bytes of a message as Flower serialises it, worked out without: it would copy the arrays for each client.

The size is that of the protocol buffer of the message's content (``RecordDict`` in Flower's ``recorddict.proto``), or
of its error: a field is a tag, its length where it has no fixed one, and its value. Flower's metadata around it (node,
message and run ids) is left out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from flwr.app import Array, ArrayRecord, Message

_LARGEST_SIGNED = 2**63 - 1
_REMEMBERED = 100  # characters; longer texts are strangers', not names that come again


def message_bytes(message: Message) -> int:
    """Size of the content of ``message``, or of its error."""
    if message.has_error():
        error = message.error
        return (1 + _varint(_zigzag(error.code)) if error.code else 0) + _text(error.reason or "")
    return sum(record_bytes(name, record) for name, record in message.content.items())


def record_bytes(name: str, record: Any) -> int:
    """What the record (arrays, metrics or configuration) called ``name`` adds to a message."""
    size = _array if isinstance(record, ArrayRecord) else _value
    items = 0
    for key, value in record.items():
        items += _framed(_text(key) + _framed(size(value)))
    return _framed(_text(name) + _framed(items))


def _varint(number: int) -> int:
    """Bytes of a number, 7 bits in each."""
    return (number.bit_length() + 6) // 7 or 1


def _zigzag(number: int) -> int:
    """Signed numbers as unsigned ones: 0, -1, 1, -2 ... are 0, 1, 2, 3 ..."""
    return 2 * number if number >= 0 else -2 * number - 1


def _framed(size: int) -> int:
    """A field of ``size`` bytes: tag, length, bytes."""
    return 1 + _varint(size) + size


def _text(text: str) -> int:
    """A string field; an empty one is not sent."""
    return _short(text) if len(text) <= _REMEMBERED else _framed(len(text.encode()))


@lru_cache(maxsize=4096)
def _short(text: str) -> int:
    return _framed(len(text.encode())) if text else 0


def _array(array: Array) -> int:
    shape = sum(map(_varint, array.shape))
    data = len(array.data)
    return (
        _text(array.dtype)
        + (_framed(shape) if array.shape else 0)
        + _text(array.stype)
        + (_framed(data) if data else 0)
    )


def _value(value: Any) -> int:
    """A value of a configuration or metric record."""
    if isinstance(value, float):
        return 9
    if isinstance(value, int):
        return 1 + _varint(value if value > _LARGEST_SIGNED else _zigzag(value))
    if isinstance(value, str):
        return _framed(len(value.encode()))
    if isinstance(value, bytes):
        return _framed(len(value))
    return 1 + _framed(_list(value))  # the tags of lists take two bytes


def _list(values: list[Any]) -> int:
    """The message that holds a list: numbers packed in one field, strings one field each."""
    if not values:
        return 0
    first = values[0]
    if isinstance(first, str | bytes):
        return sum(_framed(len(v.encode() if isinstance(v, str) else v)) for v in values)
    if isinstance(first, bool):
        return _framed(len(values))
    if isinstance(first, float):
        return _framed(8 * len(values))
    unsigned = any(v > _LARGEST_SIGNED for v in values)
    return _framed(sum(_varint(v if unsigned else _zigzag(v)) for v in values))
