"""Stacks: the patches on each tensor of live models, changed in one pass, so that they come off bit for bit.

A tensor with patches on it always holds what one pass over the untouched tensor with all of them, in their order,
gives; whatever is put on, taken out from the middle or weakened, is an exchange of one list of terms for another
(``ops.lowrank_exchange_``), through the base's exact bits. So no history is left in the weights: taking a patch out
is, bit for bit, never having applied it.

What is not a sum rounded to nearest (replaced values, DoRA, stochastic rounding, kept zeros), and regions that overlap
in part, have a copy of the tensor instead of records.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import ops
from .errors import RecordError
from .execute import assign_, dora_, hold_interrupts
from .noise import Mode
from .planning import Assign, Plan, Region, Term, Update, some
from .record import Record

_SAMPLES = 512
_SHORT = 32  # bytes of a print of samples

# One at a time: a tensor's stack and its bits change together.
lock = threading.RLock()


@dataclass(frozen=True, eq=False)
class Layer:
    """What one patch does to one tensor; factors and values lie on the tensor's device."""

    assigns: tuple[Assign, ...]
    updates: tuple[Update, ...]

    @property
    def is_sum(self) -> bool:
        """Whether records can take it off: a sum that is rounded to nearest, also where it was 0."""
        return not self.assigns and not any(update.is_dora or update.mode.flags for update in self.updates)

    def scaled(self, factor: float) -> Layer:
        """The same at ``factor`` times its strength."""

        def term(t: Term) -> Term:
            if t.magnitude is None:
                return replace(t, scaling=t.scaling * factor)
            return replace(t, strength=t.strength * factor)

        return Layer(
            tuple(replace(assign, strength=assign.strength * factor) for assign in self.assigns),
            tuple(replace(update, terms=tuple(map(term, update.terms))) for update in self.updates),
        )


# Of one tensor, from the key of the one who put it there, in the order in which they are added up.
Layers = Mapping[Any, Layer]


@dataclass(eq=False)
class Held:
    """A tensor that has patches on it.

    Attributes:
        name: for messages.
        tensor: detached, sharing the memory of the model's.
        layers: the patches.
        records: what takes the terms on each region off, or else
        copy: the tensor as it was.
        print: of the bits that the last change left.
    """

    name: str
    tensor: Tensor
    layers: Layers = field(default_factory=dict)
    records: dict[Region, Record] = field(default_factory=dict)
    copy: Tensor | None = None
    print: bytes = b""

    @property
    def nbytes(self) -> int:
        """Memory that the way back takes."""
        copied = 0 if self.copy is None else self.copy.nbytes
        return copied + sum(record.nbytes for record in self.records.values())


_held: weakref.WeakValueDictionary[tuple[Any, ...], Held] = weakref.WeakValueDictionary()


def held(name: str, tensor: Tensor) -> Held:
    """The stack of this memory; a new one if nobody holds one. Whoever drops all its handles keeps the patch."""
    tensor = tensor.detach()
    key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    found = _held.get(key)
    if found is None:
        found = _held[key] = Held(name, tensor)
    return found


def change(changes: Sequence[tuple[Held, Layers]], *, backend: str = "auto", verify: bool | str = True) -> None:
    """Give each tensor other layers, in one pass over all of them.

    Args:
        changes: the tensors, and what they are to have instead of ``layers``.
        verify: compare the weights with what the last change left: 512 or more of each tensor. "full": take prints
            of every bit from now on.

    Raises:
        RecordError: a tensor has been written to since; nothing has been changed then.
        BackendError, torch.OutOfMemoryError: nothing has been changed.
    """
    with lock:
        changes = [(tensor, layers) for tensor, layers in changes if dict(tensor.layers) != dict(layers)]
        if verify:
            _verify([tensor for tensor, _ in changes])
        summed: list[tuple[Held, Layers]] = []
        others: list[tuple[Held, Layers]] = []
        for tensor, layers in changes:
            (summed if tensor.copy is None and _are_sums(tensor, layers) else others).append((tensor, layers))
        work = _Exchange(summed)
        # What has records and needs a copy from now on is brought back by its records first.
        back = _Exchange([(tensor, {}) for tensor, _ in others if tensor.copy is None])
        for tensor, _ in others:
            ops.backends_for([tensor.tensor], backend)
        copies = [torch.empty_like(t.tensor) if t.copy is None else t.copy for t, _ in others]
        with torch.no_grad(), hold_interrupts():
            work.run(backend)
            back.run(backend)
            for (tensor, layers), copy in zip(others, copies, strict=True):
                _rewrite(tensor, layers, copy, backend)
            for tensor, layers in work.too_large():
                # So far from the base that a copy is smaller.
                _Exchange([(tensor, {})]).run(backend)
                _rewrite(tensor, layers, torch.empty_like(tensor.tensor), backend)
            for tensor, layers in changes:
                tensor.layers = dict(layers)
                tensor.print = _print(tensor.tensor, full=verify == "full")


def _are_sums(tensor: Held, layers: Layers) -> bool:
    """Whether all layers only add, on rectangles that are the same or apart."""
    if not all(layer.is_sum for layer in layers.values()):
        return False
    regions = {update.region for layer in layers.values() for update in layer.updates} | tensor.records.keys()
    return not any(a is not b and a.overlaps(b) for a in regions for b in regions)


class _Exchange:
    """One call of the op for the sums of several tensors."""

    def __init__(self, changes: Sequence[tuple[Held, Layers]]) -> None:
        self._changes = changes
        self._places: list[tuple[Held, Region]] = []
        self._old: list[tuple[Term, ...]] = []
        self._new: list[tuple[Term, ...]] = []
        for tensor, layers in changes:
            before, after = _terms(tensor.layers), _terms(layers)
            for region in {**before, **after}:
                old, new = before.get(region, ()), after.get(region, ())
                if [*map(id, old)] != [*map(id, new)]:
                    self._places.append((tensor, region))
                    self._old.append(old)
                    self._new.append(new)

    def run(self, backend: str) -> None:
        if not self._places:
            return
        terms = [term for old, new in zip(self._old, self._new, strict=True) for term in (*old, *new)]
        made = ops.lowrank_exchange_(
            [region.view(tensor.tensor) for tensor, region in self._places],
            [term.lora_A for term in terms],
            [term.lora_B for term in terms],
            [term.scaling for term in terms],
            [len(old) for old in self._old],
            [len(new) for new in self._new],
            [tensor.records.get(region) for tensor, region in self._places],
            backend,
        )
        for (tensor, region), record in zip(self._places, made, strict=True):
            if record is None:
                tensor.records.pop(region, None)
            else:
                tensor.records[region] = record
        for tensor, layers in self._changes:
            tensor.layers = dict(layers)

    def too_large(self) -> list[tuple[Held, Layers]]:
        return [(tensor, layers) for tensor, layers in self._changes if tensor.nbytes > tensor.tensor.nbytes]


def _terms(layers: Layers) -> dict[Region, tuple[Term, ...]]:
    """All terms on each region, in the order of the layers."""
    terms: dict[Region, tuple[Term, ...]] = {}
    for layer in layers.values():
        for update in layer.updates:
            terms[update.region] = terms.get(update.region, ()) + update.terms
    return terms


def _mode(layers: Layers, region: Region) -> Mode:
    """How the sum of all layers on a region is rounded: once, with the noise of the first that has any."""
    updates = [update for layer in layers.values() for update in layer.updates if update.region == region]
    noise = next((update.noise for update in updates if update.noise is not None), None)
    return replace(updates[0], noise=noise, keep_zeros=any(update.keep_zeros for update in updates)).mode


def _rewrite(tensor: Held, layers: Layers, copy: Tensor, backend: str) -> None:
    """The layers on the tensor as it was, of which ``copy`` is, or becomes, the copy."""
    if tensor.copy is None:
        copy.copy_(tensor.tensor)
    else:
        tensor.tensor.copy_(copy)
    tensor.copy = copy if layers else None
    for layer in layers.values():
        for assign in layer.assigns:
            assign_(assign, tensor.tensor, assign.value)
    for region, terms in _terms(layers).items():
        view = region.view(tensor.tensor)
        if any(term.magnitude is not None for term in terms):
            dora_(view, terms, _mode(layers, region))
        else:
            lora_A, lora_B = [term.lora_A for term in terms], [term.lora_B for term in terms]
            scalings, mode = [term.scaling for term in terms], _mode(layers, region)
            ops.lowrank_add_([view], lora_A, lora_B, scalings, [len(terms)], backend, list(mode) if mode.flags else [])


def _verify(tensors: Sequence[Held]) -> None:
    changed = [t.name for t in tensors if t.layers and t.print != _print(t.tensor, full=len(t.print) > _SHORT)]
    if changed:
        raise RecordError(
            f"{some(changed)} has been written to since the patch was applied, so the old bits cannot be brought "
            "back; portllm.remove(model, patch) subtracts the patch, to rounding"
        )


def _print(tensor: Tensor, *, full: bool) -> bytes:
    """A hash of some of the bits, or of all (which is longer, so that the two cannot be mixed up)."""
    flat = tensor.as_strided((tensor.numel(),), (1,)) if tensor.is_contiguous() else tensor.flatten()
    step = max(1, flat.numel() // _SAMPLES)
    sampled = flat[::step][: 2 * _SAMPLES].cpu().contiguous().view(torch.uint8)
    found = hashlib.sha256(sampled.numpy().tobytes()).digest()
    if full:
        found += hashlib.sha256(flat.cpu().contiguous().view(torch.uint8).numpy().data).digest()
    return found


Part = TypeVar("Part", Layer, Plan)


def map_tensors(part: Part, move: Callable[[Tensor], Tensor]) -> Part:
    """The layer, or plan, with all factors and values moved."""

    def term(t: Term) -> Term:
        magnitude = None if t.magnitude is None else move(t.magnitude)
        return replace(t, lora_A=move(t.lora_A), lora_B=move(t.lora_B), magnitude=magnitude)

    return replace(
        part,
        assigns=tuple(replace(assign, value=move(assign.value)) for assign in part.assigns),
        updates=tuple(replace(update, terms=tuple(map(term, update.terms))) for update in part.updates),
    )
