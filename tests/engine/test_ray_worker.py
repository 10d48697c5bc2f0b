"""What a Ray worker does before its first message, in this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from bayesfed.engine.ray_worker import Worker


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def fail() -> None:
    raise OSError("no data on this machine")


def test_it_prepares_its_app_and_freezes_what_is_there() -> None:
    prepared: list[str] = []
    before = gc.get_freeze_count()
    worker = Worker(lambda: SimpleNamespace(prepare=lambda: prepared.append("data")), 3, [], "off")
    assert prepared == ["data"]
    assert gc.get_freeze_count() > before
    assert worker.num_clients == 3


@pytest.mark.parametrize("app", [SimpleNamespace(), SimpleNamespace(prepare=fail)])
def test_an_app_that_has_nothing_to_prepare_or_fails_at_it_waits_for_its_messages(app: SimpleNamespace) -> None:
    assert Worker(lambda: app, 3, [], "off").app is app
