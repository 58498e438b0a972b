"""Operations in place that are cut short anywhere: the checkpoint is as before, or as after, never a mixture."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import portllm
from portllm import operation
from portllm.inplace import recover
from portllm.shards import Checkpoint
from portllm.undostore import Store

from .tiny import IN, VOCAB, factors, snapshot, tensors, write_adapter, write_model
from .volatile import Crash, VolatileDisk

pytestmark = pytest.mark.usefixtures("one_thread")
# 50 in CI; 300 or more to be sure: PORTLLM_KILLS=300 python -m pytest tests/test_crash.py -k killed
KILLS = int(os.environ.get("PORTLLM_KILLS", "50"))

Content = dict[str, Any]
Act = Callable[[Path], object]


def content(model: Path) -> Content:
    """All files of the checkpoint itself."""
    return {name: data for name, data in snapshot(model).items() if not name.startswith(".portllm")}


class Case:
    """A checkpoint in three dtypes and shards, and two patches, one of which also replaces a tensor."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Many steps, of several pieces each.
        monkeypatch.setattr(operation, "PIECE_BYTES", 1200)
        monkeypatch.setattr(operation, "STEP_BYTES", 1500)
        self.folder = folder
        dtypes = [torch.bfloat16, torch.float16, torch.float32]
        named = {name: tensor.to(dtypes[i % 3]) for i, (name, tensor) in enumerate(tensors().items())}
        self.pristine = write_model(folder / "pristine", named, shards=3)
        self.first = write_adapter(folder / "first")
        saved = {"base_model.model.lm_head.modules_to_save.weight": torch.randn(VOCAB, IN)}
        self.second = write_adapter(folder / "second", factors() | saved, modules_to_save=["lm_head"])

    def apply(self, *patches: Path) -> Act:
        return lambda model: [portllm.apply_checkpoint(model, patch, in_place=True) for patch in patches]

    def made(self, name: str, *acts: Act) -> Path:
        """The pristine checkpoint after some acts."""
        model = self.folder / name
        shutil.copytree(self.pristine, model)
        for act in acts:
            act(model)
        return model


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(tmp_path, monkeypatch)


def operations(case: Case) -> dict[str, tuple[list[Act], Act]]:
    """What was done before, and what is cut short."""
    return {
        "apply": ([], case.apply(case.second)),
        "stack": ([case.apply(case.first)], case.apply(case.second)),
        "remove": ([case.apply(case.second)], portllm.remove_from_checkpoint),
        "take out": (
            [case.apply(case.first, case.second)],
            lambda model: portllm.remove_from_checkpoint(model, "first"),
        ),
    }


def check(model: Path, case: Case, before: Content, after: Content, patches: tuple[int, int]) -> str:
    """The model has recovered; it is before or after, its books agree, and it comes back to what it was at first."""
    found = content(model)
    assert found in (before, after)
    status = portllm.checkpoint_status(model, verify=True)
    assert not status.pending
    assert not status.changed
    assert len(status.patches) in {patches[i] for i, state in enumerate((before, after)) if found == state}
    if not status.patches:  # the next operation clears away what one that had hardly begun has left
        portllm.apply_checkpoint(model, case.first, in_place=True)
    portllm.remove_from_checkpoint(model)
    assert snapshot(model) == snapshot(case.pristine)
    return "before" if found == before else "after"


RECOVERIES: list[Act] = [
    recover,
    Checkpoint.open,
    lambda model: portllm.checkpoint.plan_checkpoint(model, model.parent / "first"),
]


@pytest.mark.parametrize("what", ["apply", "stack", "remove", "take out"])
def test_a_crash_at_each_single_change(case: Case, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """At the n-th write, sync, renaming or deletion, for every n; and again while recovering."""
    earlier, act = operations(case)[what]
    start = case.made("start", *earlier)
    done = case.made("done", *earlier, act)
    before, after = content(start), content(done)
    counts = tuple(len(portllm.checkpoint_status(path).patches) for path in (start, done))
    outcomes: list[str] = []
    chance = random.Random(random.random())
    for n in range(1, 10_000):
        model = case.folder / "model"
        shutil.copytree(start, model)
        if not _crashes(act, model, n, monkeypatch, chance):
            break
        while _crashes(chance.choice(RECOVERIES), model, chance.randint(1, 60), monkeypatch, chance):
            pass
        outcomes.append(check(model, case, before, after, counts))  # type: ignore[arg-type]
        shutil.rmtree(model)
    assert n > 40
    assert set(outcomes) == {"before", "after"}


def _crashes(act: Act, model: Path, at: int, monkeypatch: pytest.MonkeyPatch, chance: random.Random) -> bool:
    """Run an act on a disk that fails at some change; whether it came to that."""
    disk = VolatileDisk(model, model.with_name("attic"), at)
    with monkeypatch.context() as patched:
        disk.plug_in(patched)
        try:
            act(model)
        except Crash:
            pass
        else:
            if not disk.dead:  # else the crash came where nobody cares for errors any more
                shutil.rmtree(disk._attic)
                return False
    disk.settle(chance)
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_killed_at_any_time(case: Case) -> None:
    """``kill -9`` while it applies or removes, until so many have died of it."""
    model = case.made("model")
    done = case.made("done", case.apply(case.second))
    pristine, patched = content(model), content(done)
    seconds, killed, cut = _kill(case.apply(case.second), case.made("timed"), None)[1], 0, 0
    while killed < KILLS:
        found = content(model)
        assert found in (pristine, patched)
        act = case.apply(case.second) if found == pristine else portllm.remove_from_checkpoint
        was_killed, took = _kill(act, model, random.uniform(0, 1.1 * seconds))
        if not was_killed:
            seconds = (seconds + took) / 2  # the machine is less busy now than it was
            continue
        killed += 1
        if Store(model).pending:
            cut += 1
            random.choice(RECOVERIES)(model)
        status = portllm.checkpoint_status(model, verify=True)
        assert (status.pending, status.changed) == (False, ())
        assert content(model) == (patched if status.patches else pristine)
    print(f"{killed} kills, {cut} of them left an operation to complete")


def _kill(act: Act, model: Path, after: float | None) -> tuple[bool, float]:
    """Run an act in a process of its own, kill it after so many seconds; (whether it died of that, seconds)."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            act(model)
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status), time.perf_counter() - started


@pytest.mark.parametrize("what", ["apply", "stack", "remove", "take out"])
def test_an_error_on_the_way_takes_all_back(case: Case, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A full disk, or an interrupt, at each step: the call raises, and all is as before, times too."""
    earlier, act = operations(case)[what]
    start = case.made("start", *earlier)
    before = snapshot(start)
    times = {path.name: path.stat().st_mtime_ns for path in start.glob("*.safetensors")}
    real, limit = os.pwrite, 0
    errors = iter([OSError(28, "No space left on device"), KeyboardInterrupt()] * 1000)
    while True:
        left = limit

        def fails(descriptor: int, data: Any, offset: int) -> int:
            nonlocal left
            left -= 1
            if left == -1:  # only once: what is deleted then makes room
                raise next(errors)
            return real(descriptor, data, offset)

        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", fails)
            try:
                act(start)
            except (portllm.CheckpointError, KeyboardInterrupt):
                pass
            else:
                break
        assert snapshot(start) == before
        assert {path.name: path.stat().st_mtime_ns for path in start.glob("*.safetensors")} == times
        limit += 1
    assert limit > 8
    assert snapshot(start) != before
