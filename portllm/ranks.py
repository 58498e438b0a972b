"""Several processes that write one checkpoint together: what rank 0 knows all know, and one's error is everybody's.

Only small things go from one to the other, pickled over the process group: the patch, a path, errors. Weights never do.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from .errors import CheckpointError, PortllmError

Value = TypeVar("Value")


@contextlib.contextmanager
def torchrun() -> Iterator[Any]:
    """The group of all processes that torchrun has started, over gloo; None if it started none but this one.

    The group has torch's usual timeout, of half an hour. torchrun ends the others with SIGTERM when one has failed; it
    counts as an interrupt, so that what they have begun to write is taken away.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    import torch.distributed as dist

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


class Ranks:
    """The processes of a group; used with ``with``, which no process leaves before all have done their cleaning up.

    All of them must go through the same ``stage`` and ``share`` calls, and what can fail must lie in one.

    Args:
        group: of torch.distributed; None: this process alone, and torch.distributed is not even imported.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._is_broken = False
        self.rank, self.size = 0, 1
        if group is not None:
            import torch.distributed as dist

            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise CheckpointError("this process is not in the group; call apply_checkpoint only where it is")

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None or issubclass(kind, Exception):  # an interrupt waits for nobody
            with contextlib.suppress(CheckpointError):
                self._gather(None)

    @contextlib.contextmanager
    def stage(self) -> Iterator[None]:
        """A part of the work: if it fails on any rank, it ends with an error on all of them.

        Raises:
            PortllmError: of the type of the first rank's that failed, and with its message.
            CheckpointError: a process has died, or has not answered within the group's timeout.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        errors = self._gather(None if error is None else _portable(error))
        if any(errors):
            raise self._common(errors) from error

    def share(self, make: Callable[[], Value]) -> Value:
        """What ``make`` returns on rank 0, on all of them; raises what ``stage`` does."""
        made: list[Any] = [None]
        with self.stage():
            if self.rank == 0:
                made = [make()]
        if self.size > 1:
            import torch.distributed as dist

            with self._talk():
                dist.broadcast_object_list(made, group=self._group, group_src=0)
        value: Value = made[0]
        return value

    def mine(self, sizes: Sequence[int]) -> list[int]:
        """Which of some files, of these sizes, are this rank's: the largest first, each to who has the least so far."""
        load = [(0, rank) for rank in range(self.size)]
        chosen = []
        for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            least, rank = heapq.heappop(load)
            heapq.heappush(load, (least + sizes[i], rank))
            if rank == self.rank:
                chosen.append(i)
        return sorted(chosen)

    def _gather(self, mine: PortllmError | None) -> list[PortllmError | None]:
        if self.size == 1 or self._is_broken:
            return [mine]
        import torch.distributed as dist

        errors: list[PortllmError | None] = [None] * self.size
        with self._talk():
            dist.all_gather_object(errors, mine, group=self._group)
        return errors

    @contextlib.contextmanager
    def _talk(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what every backend of torch.distributed raises
            self._is_broken = True
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"rank {self.rank} of {self.size}: another process has died, or has not answered in time, so nothing "
                f"was written; see its own message ({reason[:200]})"
            ) from None

    def _common(self, errors: Sequence[PortllmError | None]) -> PortllmError:
        """The first error; says whose it is, unless all have the same, or rank 0, which checks for all of them."""
        rank, error = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        if rank == 0:
            return error
        return type(error)(f"rank {rank} of {self.size}: {error}")


def _portable(error: Exception) -> PortllmError:
    """An error that can go to other processes: all of ours are made of one string."""
    if isinstance(error, PortllmError):
        return type(error)(str(error))
    return CheckpointError(f"{type(error).__name__}: {error}")
