"""One checkpoint written by several processes: the same bytes as one writes, and whole or absent whatever happens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from portllm import CheckpointError, PlanError, PortllmError, apply_checkpoint, copying
from portllm.ranks import Ranks

from . import distributed
from .tiny import INDEX, factors, snapshot, tensors, write_adapter, write_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


# -- who writes what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shards_are_divided_by_size(world: int) -> None:
    sizes = [random.choice([0, 1, random.randrange(1, 1000)]) for _ in range(random.randrange(12))]
    shares = []
    for rank in range(world):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, world
        shares.append(ranks.mine(sizes))
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in share) for share in shares]
    # Each shard went to whoever had the least, and the last one to come is the smallest of them.
    for load, share in zip(loads, shares, strict=True):
        if share:
            assert load - min(sizes[i] for i in share) <= min(loads)


def test_alone_nothing_of_torch_distributed_is_used(tmp_path: Path) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    code = (
        "import sys, portllm\n"
        f"portllm.apply_checkpoint({str(model)!r}, {str(adapter)!r}, {str(tmp_path / 'out')!r})\n"
        "assert 'torch.distributed.checkpoint' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- in a group of processes -----------------------------------------------------------------------------------------


def _outcome(*arguments: Any, **options: Any) -> Any:
    """What a call in the group gave: its report as a dict, or its error as (type, text)."""
    import torch.distributed as dist

    try:
        report = apply_checkpoint(*arguments, **options, group=dist.group.WORLD).as_dict()
    except Exception as error:
        return type(error).__name__, str(error)
    return {key: value for key, value in report.items() if "second" not in key}


def _together(place: str) -> dict[str, Any]:
    """Calls that succeed and calls that fail, in turn; what each gave on this rank."""
    import torch.distributed as dist

    root, rank, last = Path(place), dist.get_rank(), dist.get_world_size() - 1
    patch: Any = root / "adapter" if rank == 0 else None  # only rank 0 has to have it
    write_shards, write_side_files = copying.Job.write_shards, copying.Job.write_side_files
    found = {}
    found["safetensors"] = _outcome(root / "model", patch, root / "new" / "out")
    found["options"] = _outcome(root / "model", [patch], root / "cast", dtype=torch.float32, progress=True)
    found["dcp"] = _outcome(root / "dcp", patch, root / "dcp-out")
    found["file"] = _outcome(root / "one" / "model.safetensors", patch, root / "out.safetensors")
    found["exists"] = _outcome(root / "model", patch, root / "old")
    found["no patch"] = _outcome(root / "model", root / "nothing", root / "absent")
    found["no fit"] = _outcome(root / "model", root / "other", root / "absent")
    found["in place"] = _outcome(root / "model", patch, in_place=True)

    def failing(error: Exception) -> Any:
        def fail(*arguments: Any) -> None:
            raise error

        return fail

    for name, error in (("full", CheckpointError("disk full")), ("broken", ZeroDivisionError("by zero"))):
        if rank == last:
            copying.Job.write_shards = failing(error)  # type: ignore[method-assign]
        found[name] = _outcome(root / "model", patch, root / "old", overwrite=True)
        copying.Job.write_shards = write_shards  # type: ignore[method-assign]
    if rank == 0:
        copying.Job.write_side_files = failing(CheckpointError("side files"))  # type: ignore[method-assign]
    found["late"] = _outcome(root / "model", patch, root / "old", overwrite=True)
    copying.Job.write_side_files = write_side_files  # type: ignore[method-assign]
    found["left over"] = sorted(path.name for path in root.iterdir() if path.name.startswith("."))
    found["old"] = snapshot(root / "old")
    dist.barrier()
    found["again"] = _outcome(root / "model", patch, root / "old", overwrite=True)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_all_processes_write_what_one_does_or_all_fail(tmp_path: Path, world: int) -> None:
    named = tensors()
    model, adapter = write_model(tmp_path / "model", named, shards=5), write_adapter(tmp_path / "adapter")
    (model / "tokenizer").mkdir()
    (model / "tokenizer" / "vocabulary.txt").write_text("a b c")
    write_model(tmp_path / "one", named, shards=1)
    write_adapter(tmp_path / "other", factors(["model.layers.9.q_proj"]))
    writer = dcp.FileSystemWriter(tmp_path / "dcp", single_file_per_rank=False)
    dcp.save({"model": named, "step": 3}, storage_writer=writer)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("of before")
    before = {name: snapshot(tmp_path / name) for name in ("model", "old", "dcp", "one", "adapter")}
    alone = {
        "safetensors": apply_checkpoint(model, adapter, tmp_path / "1" / "safetensors"),
        "options": apply_checkpoint(model, adapter, tmp_path / "1" / "options", dtype=torch.float32),
        "dcp": apply_checkpoint(tmp_path / "dcp", adapter, tmp_path / "1" / "dcp"),
        "file": apply_checkpoint(tmp_path / "one" / "model.safetensors", adapter, tmp_path / "1" / "file"),
    }
    found = distributed.run(_together, world, tmp_path / "processes", str(tmp_path))
    written = {"safetensors": "new/out", "options": "cast", "dcp": "dcp-out", "file": "out.safetensors"}
    for name, place in written.items():
        report = {key: value for key, value in alone[name].as_dict().items() if "second" not in key}
        assert all(each[name] == report | {"out": str(tmp_path / place)} for each in found), found[0][name]
        if name == "file":
            assert (tmp_path / place).read_bytes() == (tmp_path / "1" / name).read_bytes()
        else:
            assert snapshot(tmp_path / place) == snapshot(tmp_path / "1" / name)
    last = f"rank {world - 1} of {world}: "
    old = tmp_path / "old"
    expected = {
        "exists": (CheckpointError, f"{old}: exists already; choose another name, or overwrite=True (--overwrite)"),
        "no patch": (PortllmError, f"{tmp_path / 'nothing'}: no such patch"),
        "in place": (CheckpointError, "one process alone patches in place; run it without torchrun (or group)"),
        "full": (CheckpointError, f"{last}disk full"),
        "broken": (CheckpointError, f"{last}ZeroDivisionError: by zero"),
        "late": (CheckpointError, "side files"),
        "no fit": (PlanError, "the patch matches nothing in the target"),
    }
    for name, (kind, text) in expected.items():
        assert all(each[name][0] == kind.__name__ and text in each[name][1] for each in found), (name, found)
    assert all(each["left over"] == [] and each["old"] == before["old"] for each in found)
    assert not (tmp_path / "absent").exists()
    assert snapshot(tmp_path / "old") == snapshot(tmp_path / "1" / "safetensors")
    del before["old"]
    assert {name: snapshot(tmp_path / name) for name in before} == before


# -- torchrun --------------------------------------------------------------------------------------------------------


def torchrun(*arguments: str | Path, module: str = "portllm") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``torchrun --nproc-per-node 2 -m portllm``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment, cwd=root
    )
    return done.returncode, done.stdout, done.stderr


def test_torchrun_writes_one_copy_and_reports_once(tmp_path: Path) -> None:
    named = tensors()
    dcp.save({"model": named, "step": 3}, checkpoint_id=tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter")
    code, out, err = torchrun("apply", f"{adapter}@0.5", tmp_path / "model", "-o", tmp_path / "out")
    assert code == 0, err
    assert out.count("patched 4 tensors, copied 5, in 1 shards") == out.count("patched") == 1
    assert err.count("100%") <= 1
    apply_checkpoint(tmp_path / "model", adapter, tmp_path / "alone", 0.5)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "alone")


def test_torchrun_ends_with_one_message_of_each_rank_that_gets_to_speak(tmp_path: Path) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    (model / INDEX).write_text("{")
    code, out, err = torchrun("apply", adapter, model, "-o", tmp_path / "out")
    assert code != 0
    assert out == ""
    messages = [line for line in err.splitlines() if line.startswith("portllm: ")]
    assert 1 <= len(messages) <= 2  # torchrun ends the others once one has failed
    assert all(f"{INDEX}: cannot be read as JSON" in message for message in messages)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def killed() -> None:
    """``portllm`` in which rank 1 is killed as it begins to write."""
    from portllm import cli

    write_shards = copying.Job.write_shards

    def write(*arguments: Any) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        write_shards(*arguments)

    copying.Job.write_shards = write  # type: ignore[method-assign]
    sys.exit(cli.main())


def test_torchrun_survives_the_death_of_a_rank(tmp_path: Path) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("of before")
    before = snapshot(tmp_path)
    code, out, err = torchrun(
        "apply", adapter, model, "-o", tmp_path / "out", "--overwrite", "-q", module="tests.test_torchrun"
    )
    assert code != 0
    assert out == ""
    assert "another process has died" in err or "interrupted; nothing was written" in err
    assert snapshot(tmp_path) == before


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    killed()
