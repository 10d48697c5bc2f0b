"""What the loop of rounds tells the run it belongs to."""

from __future__ import annotations

from typing import Protocol


class Callbacks(Protocol):
    """What a run wants to know while a strategy works (log, checkpoint, display)."""

    def begin_round(self, round: int, sampled: list[int]) -> None:
        """Messages to the clients ``sampled`` are about to go out."""

    def client_done(self, round: int, client: int, metrics: dict[str, float] | None, reason: str) -> None:
        """A reply was accepted (``metrics``) or refused (None, with the ``reason``)."""

    def end_round(self, round: int, metrics: dict[str, float]) -> None:
        """The server's posterior is the new one."""
