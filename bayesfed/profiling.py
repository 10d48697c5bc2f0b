"""Where a process spends its time: named, nested spans; free of charge while nothing records.

    with span("update"):
        optimizer.step()

Marks like this one stay in the code for good. They do nothing (a shared object, 0.2 microseconds) until somebody
records:

    with recording(Profiler()) as profiler:
        ...
    profiler.root  # the tree of what happened

One profiler is current in a process, and one thread at a time may open spans. Spans measure the host's wall time; on a
GPU, where kernels run behind the host's back, a profiler made :meth:`Profiler.on` that device waits for them at both
ends of every span.
"""

from __future__ import annotations

import os
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True)
class Node:
    """A span's total, and those of the spans inside it.

    Attributes:
        seconds: wall time, the children's included.
        calls: how often it was entered.
        children: by name (without "/").
    """

    seconds: float = 0.0
    calls: int = 0
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def own(self) -> float:
        """Seconds that no child accounts for."""
        return self.seconds - sum(child.seconds for child in self.children.values())

    def child(self, name: str) -> Node:
        """The child of that name, made if there is none."""
        node = self.children.get(name)
        if node is None:
            node = self.children[name] = Node()
        return node

    def add(self, seconds: float, calls: int = 1) -> None:
        """Count ``calls`` more, which took ``seconds`` together."""
        self.seconds += seconds
        self.calls += calls

    def paths(self, prefix: str = "") -> Iterator[tuple[str, Node]]:
        """All descendants with their paths: ``solve``, ``solve/update``, ..."""
        for name, child in self.children.items():
            yield prefix + name, child
            yield from child.paths(f"{prefix}{name}/")

    def numbers(self) -> dict[str, float]:
        """The descendants as flat numbers that fit into a message: ``time/PATH`` in seconds, and ``calls/PATH``."""
        numbers: dict[str, float] = {}
        for path, node in self.paths():
            numbers |= {f"time/{path}": node.seconds, f"calls/{path}": node.calls}
        return numbers

    def add_numbers(self, numbers: Mapping[str, float]) -> None:
        """Add what :meth:`numbers` of another tree gave; other keys are passed over."""
        for key, seconds in numbers.items():
            kind, _, path = key.partition("/")
            if kind == "time":
                node = self
                for name in path.split("/"):
                    node = node.child(name)
                node.add(seconds, int(numbers.get(f"calls/{path}", 0)))

    def plain(self) -> dict[str, Any]:
        """As JSON: ``seconds``, ``calls``, ``children`` (left out where there are none)."""
        values: dict[str, Any] = {"seconds": self.seconds, "calls": self.calls}
        if self.children:
            values["children"] = {name: child.plain() for name, child in self.children.items()}
        return values

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Node:
        """Inverse of :meth:`plain`."""
        children = {name: cls.from_plain(child) for name, child in values.get("children", {}).items()}
        return cls(values["seconds"], values["calls"], children)


class Profiler:
    """Records spans while it is the process's current one, see :func:`recording`.

    Attributes:
        root: the tree; its own seconds and calls stay 0.
        occupied: time of workers with messages, by worker and type of message, see :func:`occupied`.

    Args:
        synchronise: called at both ends of every span.
        ago: it began this many seconds before now; use :meth:`settle` to say with what.
    """

    def __init__(self, synchronise: Callable[[], None] | None = None, ago: float = 0.0):
        self.root = Node()
        self.occupied: dict[tuple[int, str], Node] = {}
        self.synchronise = synchronise
        self.stack = [self.root]
        self._began = time.perf_counter() - ago

    @classmethod
    def on(cls, device: torch.device, ago: float = 0.0) -> Profiler:
        """A profiler of work on ``device``."""
        return cls((lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None, ago)

    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self._began

    def settle(self, name: str, part: str) -> None:
        """Charge the time since the beginning that no span covers to ``name/part``."""
        rest = self.elapsed() - sum(child.seconds for child in self.root.children.values())
        for node in (self.root.child(name), self.root.child(name).child(part)):
            node.add(rest)

    def drain(self) -> dict[str, float]:
        """The tree as numbers, and an empty tree from here on; no span may be open."""
        numbers = self.root.numbers()
        self.root.children.clear()
        return numbers


class _Span:
    """A span that is being recorded."""

    __slots__ = ("name", "node", "profiler", "started")

    def __init__(self, profiler: Profiler, name: str):
        self.profiler, self.name = profiler, name

    def __enter__(self) -> Node:
        profiler = self.profiler
        if profiler.synchronise is not None:
            profiler.synchronise()
        self.node = profiler.stack[-1].child(self.name)
        profiler.stack.append(self.node)
        self.started = time.perf_counter()
        return self.node

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        profiler = self.profiler
        if profiler.synchronise is not None:
            profiler.synchronise()
        self.node.add(time.perf_counter() - self.started)
        profiler.stack.pop()


class _Off:
    """A span while nothing records."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        pass


class _Inside(AbstractContextManager):
    """See :func:`inside`."""

    def __init__(self, profiler: Profiler, context: AbstractContextManager, edge: str, body: str):
        self._context, self._profiler, self._edge = context, profiler, edge
        self._body = _Span(profiler, body)

    def __enter__(self) -> Any:
        with _Span(self._profiler, self._edge):
            value = self._context.__enter__()
        self._body.__enter__()
        return value

    def __exit__(self, *error: Any) -> bool | None:
        self._body.__exit__(*error)
        with _Span(self._profiler, self._edge):
            return self._context.__exit__(*error)


_OFF = _Off()
_current: Profiler | None = None


def current() -> Profiler | None:
    """The profiler that records, if one does."""
    return _current


@contextmanager
def recording(profiler: Profiler | None) -> Iterator[Profiler | None]:
    """Make ``profiler`` the process's current one for a while; None leaves things as they are."""
    global _current
    before = _current
    _current = before if profiler is None else profiler
    try:
        yield profiler
    finally:
        _current = before


def span(name: str) -> _Span | _Off:
    """A context whose time counts as ``name``, inside the span that is open."""
    return _OFF if _current is None else _Span(_current, name)


def timed(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: every call is a span."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(name):
                return function(*args, **kwargs)

        return call

    return decorate


def inside(context: AbstractContextManager, edge: str, body: str) -> AbstractContextManager:
    """``context`` with its entry and exit counted as ``edge``, and what happens between them as ``body``."""
    return context if _current is None else _Inside(_current, context, edge, body)


def each(name: str, items: Iterable[T]) -> Iterable[T]:
    """``items``, with the time it takes to get them counted as ``name``."""
    return items if _current is None else _each(_current, name, items)


def _each(profiler: Profiler, name: str, items: Iterable[T]) -> Iterator[T]:
    iterator = iter(items)
    while True:
        with _Span(profiler, name) as node:
            try:
                item = next(iterator)
            except StopIteration:
                node.calls -= 1  # finding the end is not another item
                return
        yield item


def occupied(worker: int, message_type: str, seconds: float, messages: int) -> None:
    """An engine's note that ``worker`` had ``messages`` for ``seconds``, from sending them to having the replies."""
    if _current is not None:
        _current.occupied.setdefault((worker, message_type), Node()).add(seconds, messages)


def worker_number() -> int:
    """A number for this process, the same in all its messages (and another one in other processes, with near
    certainty)."""
    return zlib.crc32(f"{socket.gethostname()}:{os.getpid()}".encode())
