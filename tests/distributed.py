"""Processes of torch.distributed over gloo, for tests; each function runs in a process of its own on every rank."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=120)

# The tests are no package that could be found by its name, for other libraries install one called "tests".
_START = """
import sys, types
package = sys.modules["tests"] = types.ModuleType("tests")
package.__path__ = [sys.argv[1]]
from tests.distributed import start
start(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
"""


def run(function: Callable[..., Any], world: int, place: Path, *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns on each of ``world`` ranks; fails with what all that failed say.

    Args:
        function: of a test module; it finds the default process group.
        place: a directory, in which the processes meet.
    """
    place.mkdir(parents=True, exist_ok=True)
    (place / "call.pkl").write_bytes(pickle.dumps((function, arguments)))
    command = [sys.executable, "-c", _START, str(Path(__file__).parent)]
    logs = [place / f"rank-{rank}.txt" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        with open(log, "w") as out:
            ranks = [str(rank), str(world), str(place)]
            processes.append(subprocess.Popen([*command, *ranks], stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [f"rank {rank}:\n{logs[rank].read_text()[-4000:]}" for rank, code in enumerate(codes) if code]
    assert not failed, "\n".join(failed)
    return [torch.load(place / f"result-{rank}.pt", weights_only=False) for rank in range(world)]


def start(rank: int, world: int, place: str) -> None:
    """In one of the processes."""
    torch.set_num_threads(1)
    code = 1
    try:
        function, arguments = pickle.loads(Path(place, "call.pkl").read_bytes())
        dist.init_process_group("gloo", f"file://{place}/store", TIMEOUT, world, rank)
        torch.save(function(*arguments), f"{place}/result-{rank}.pt")
        dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # gloo's threads can outlive the interpreter, which then ends with an error of its own
