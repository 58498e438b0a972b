"""Many patches for one model, resident, switched by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .dtensor import local_tensors, meshes
from .errors import PlanError
from .live import Live, Patches, live_target, plan
from .planning import Plan
from .stack import map_tensors
from .undo import Exact, exchange


@dataclass
class BankStats:
    """What a bank has done.

    Attributes:
        switches: how often other patches were put on.
        seconds: the time of all of them, on the host; of work on a GPU only its launch.
        prefetched: how many patches were on the device before they were asked for.
    """

    switches: int = 0
    seconds: float = 0.0
    prefetched: int = 0


@dataclass
class _Entry:
    plan: Plan
    scale: float
    handle: Exact | None = None  # with the factors on the weights' devices


class PatchBank:
    """Patches for one live model, of which any are on at a time, as ``use`` says; thread-safe.

    Whatever was on before, the bits are those of one pass over the untouched weights with the patches that are on,
    and each switch is one pass. Weights keep their addresses, so compiled models and CUDA graphs go on working.

        bank = portllm.PatchBank(model)
        bank.add("math", "path/to/adapter")
        bank.use("math")        # and off again: bank.use()

    Args:
        model: a module or state dict, as for ``portllm.apply``; nobody else may write to its patched weights.
        resident: where the factors of patches that are off lie: "device" (with the weights: switches start at once),
            or "host" (pinned where there is a GPU: ``prefetch`` copies beside the model's own work).
        backend, verify: as for ``portllm.apply``.
    """

    def __init__(
        self,
        model: Live,
        *,
        resident: Literal["device", "host"] = "device",
        backend: str = "auto",
        verify: bool | str = True,
    ) -> None:
        if resident not in ("device", "host"):
            raise PlanError(f"resident={resident!r} must be 'device' or 'host'")
        self.stats = BankStats()
        self._model = model
        self._resident = resident
        self._backend = backend
        self._verify = verify
        self._entries: dict[str, _Entry] = {}
        self._active: tuple[str, ...] = ()
        self._lock = threading.RLock()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def add(self, name: str, patch: Patches, scale: float = 1.0, **options: Any) -> None:
        """Check a patch against the model, and keep it under a name; nothing is written to the model.

        Args and errors as for ``portllm.plan``; PlanError if the name is taken.
        """
        with self._lock:
            if name in self._entries:
                raise PlanError(f"the bank has a patch {name!r} already; drop it first")
            made = plan(self._model, patch, scale, **options)
            if self._resident == "host" and torch.cuda.is_available():
                made = map_tensors(made, Tensor.pin_memory)
            entry = _Entry(made, 1.0)
            entry.handle = self._handle(made)  # also finds out what cannot be taken off again
            if self._resident == "host":
                entry.handle = None
            self._entries[name] = entry

    def drop(self, name: str) -> None:
        """Forget a patch; PlanError if there is none of the name, or it is on."""
        with self._lock:
            self._entry(name)
            if name in self._active:
                raise PlanError(f"the patch {name!r} is on; use() another first")
            del self._entries[name]

    def use(self, *names: str) -> None:
        """Have exactly these patches on, added up in this order, in one pass; without names the untouched model.

        Raises:
            PlanError: there is no patch of such a name, or one is named twice.
            RecordError: somebody else wrote to patched weights; nothing has been changed then.
        """
        with self._lock:
            if len({*names}) != len(names):
                raise PlanError(f"{', '.join(names)}: each patch can be on once; add it again under another name")
            start = time.perf_counter()
            entries = [self._entry(name) for name in names]
            on = [self._on_device(entry) for entry in entries]
            for stream in self._streams.values():
                torch.cuda.current_stream(stream.device).wait_stream(stream)
            off = [handle for name in self._active if (handle := self._entries[name].handle)]
            if names == self._active:
                return
            for handle in on:
                handle.move_to_the_top()
            exchange(off, on, self._backend, self._verify)
            if self._resident == "host":
                for name in {*self._active} - {*names}:
                    self._entries[name].handle = None
            self._active = names
            self.stats.switches += 1
            self.stats.seconds += time.perf_counter() - start

    @contextmanager
    def using(self, *names: str) -> Iterator[None]:
        """``use`` them inside, and what was on before again after it."""
        before = self._active
        self.use(*names)
        try:
            yield
        finally:
            self.use(*before)

    def prefetch(self, *names: str) -> None:
        """Start copying factors to the weights' devices, on a stream of their own, for the next ``use``."""
        with self._lock:
            for name in names:
                entry = self._entry(name)
                if entry.handle is None:
                    self._on_device(entry)
                    self.stats.prefetched += 1

    @property
    def names(self) -> tuple[str, ...]:
        """All patches, in the order in which they were added."""
        return tuple(self._entries)

    @property
    def active(self) -> tuple[str, ...]:
        """Those that are on, in their order."""
        return self._active

    @property
    def nbytes(self) -> int:
        """Memory of the way back: what the patches that are on need to come off."""
        handles = [self._entries[name].handle for name in self._active]
        tensors = {tensor for handle in handles if handle for tensor in handle.tensors}
        return sum(tensor.nbytes for tensor in tensors)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise PlanError(f"the bank has no patch {name!r}; it has {', '.join(self._entries) or 'none yet'}")
        return self._entries[name]

    def _on_device(self, entry: _Entry) -> Exact:
        if entry.handle is None:
            entry.handle = self._handle(entry.plan)
        return entry.handle

    def _handle(self, made: Plan) -> Exact:
        whole = live_target(self._model).tensors
        tensors, on = local_tensors(whole), meshes(whole.values())
        devices = {tensors[name].device for name in made.tensors if tensors[name].is_cuda}
        if self._resident == "device" or not devices:
            return Exact(self._model, made, tensors, self._backend, on)
        streams = [self._streams.setdefault(device, torch.cuda.Stream(device)) for device in devices]
        with _all(streams):
            handle = Exact(self._model, made, tensors, self._backend, on)
        for device in devices:  # or the memory could be given to others while the model's stream still reads it
            handle.record_stream(torch.cuda.current_stream(device))
        return handle


@contextmanager
def _all(streams: list[torch.cuda.Stream]) -> Iterator[None]:
    """Each device has its stream as the current one."""
    before = [torch.cuda.current_stream(stream.device) for stream in streams]
    for stream in streams:
        torch.cuda.set_stream(stream)
    try:
        yield
    finally:
        for stream in before:
            torch.cuda.set_stream(stream)
