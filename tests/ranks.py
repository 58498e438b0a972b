"""Runs a function of a test module in several processes that talk through gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

# The tests are no package that could be found by its name, for other libraries install one called "tests".
_START = """
import json, sys, types
package = sys.modules["tests"] = types.ModuleType("tests")
package.__path__ = [sys.argv[1]]
from tests.ranks import start
start(sys.argv[2], *json.loads(sys.argv[3]))
"""


def run(world: int, function: str, folder: Path, *arguments: Any, timeout: float = 240) -> None:
    """Call ``module.function(*arguments)`` in ``world`` processes; fails with the output of all that failed.

    Args:
        function: "module.function", of a module beside this one; has the default process group.
        folder: an empty one, where the processes meet.
        arguments: what JSON can hold.
    """
    here = str(Path(__file__).parent)
    common = {**os.environ, "WORLD_SIZE": str(world), "MEET": str(folder / "meet"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _START, here, function, json.dumps(arguments)]
    logs = [folder / f"rank{rank}.txt" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        with open(log, "w") as out:
            environment = {**common, "RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [f"rank {rank}:\n{logs[rank].read_text()[-4000:]}" for rank, code in enumerate(codes) if code]
    assert not failed, "\n".join(failed)


def start(function: str, *arguments: Any) -> None:
    """In one of the processes."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", f"file://{os.environ['MEET']}", rank=rank, world_size=world)
    module, _, name = function.rpartition(".")
    getattr(import_module(f"tests.{module}"), name)(*arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can outlive the interpreter, which then ends with an error of its own
