"""Processes of torch.distributed over gloo, for tests; each function runs in a process of its own on every rank."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

TIMEOUT = timedelta(seconds=60)


def run(function: Callable[..., Any], world: int, place: Path, *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns on each of ``world`` ranks; raises what it raises on the first of them."""
    place.mkdir(parents=True, exist_ok=True)
    multiprocessing.spawn(_rank, (function, world, str(place), arguments), nprocs=world)
    results = [torch.load(place / f"result-{rank}.pt", weights_only=False) for rank in range(world)]
    for failed, value in results:
        if failed:
            raise AssertionError(value)
    return [value for _, value in results]


def _rank(rank: int, function: Callable[..., Any], world: int, place: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{place}/store", TIMEOUT, world, rank)
    try:
        result = False, function(*arguments)
    except BaseException:
        result = True, traceback.format_exc()
    torch.save(result, f"{place}/result-{rank}.pt")
    dist.destroy_process_group()
