"""Reading, computing and writing at the same time, in order, with a bounded number of items in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")


def stream(
    items: Sequence[Item],
    read: Callable[[Item, int], Read],
    compute: Callable[[Read], Made],
    write: Callable[[Made], Future[Any] | None],
    in_flight: int,
) -> None:
    """``write(compute(read(item, turn)))`` of each, each kind of step on one thread; computing is on the caller's.

    Args:
        read: gets the item and a number below ``in_flight``, which no other item has until this one is written:
            that of a buffer, say.
        write: may return what is still going on when it returns.

    Raises:
        What a step raises; the others that have begun are finished first.
    """
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        coming: Future[Read] | None = None
        going: list[Future[Future[Any] | None]] = []
        for i in range(len(items) + 1):
            arrived = coming
            if coming is not None:
                coming.result()
            if i >= in_flight:
                _finish(going[i - in_flight])
            coming = reader.submit(read, items[i], i % in_flight) if i < len(items) else None
            if arrived is not None:
                going.append(writer.submit(write, compute(arrived.result())))
        for written in going[-in_flight:]:
            _finish(written)


def _finish(written: Future[Future[Any] | None]) -> None:
    rest = written.result()
    if rest is not None:
        rest.result()
