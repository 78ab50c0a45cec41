"""Work in threads whose results come in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cast_fast.data.progress import ordered_map


@pytest.mark.parametrize(("count", "workers"), [(0, 3), (1, 3), (50, 1), (50, 4)])
def test_results_come_in_order(count: int, workers: int) -> None:
    gate = threading.Event()

    def work(item: int) -> int:
        if item == 0 and workers > 1:
            assert gate.wait(30)  # the first result is the last to be ready
        elif item == 3:
            gate.set()
        return 2 * item

    gate.set() if count <= 3 else None
    assert list(ordered_map(work, range(count), workers)) == [2 * item for item in range(count)]


def test_work_runs_a_bounded_stretch_ahead() -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            begun.append(item)
            yield item

    results = ordered_map(lambda item: item, items(), 2)
    assert next(results) == 0
    assert len(begun) <= 10
    results.close()
    assert len(begun) <= 10


def test_an_exception_comes_in_its_turn() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise KeyError(item)
        return item

    results = ordered_map(work, range(5), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError):
        next(results)
