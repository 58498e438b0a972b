"""Execute a Plan on tensors in memory: the only place that writes to weights."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import dora, ops
from .errors import PlanError
from .planning import Assign, Plan, Term, Update
from .reference import accumulation_dtype, row_blocks

# Takes, for each DoRA update of the plan and each of its terms that has a magnitude, the squares that
# ``dora.lowrank_dora_squares`` sums over what is here of the vectors; returns all of those over whole vectors.
Reduce = Callable[[Sequence[Sequence[Tensor]]], Sequence[Tensor]]


def execute(plan: Plan, tensors: Mapping[str, Tensor], *, backend: str = "auto") -> None:
    """``prepare`` and write at once."""
    prepare(plan, tensors, backend=backend)()


def prepare(
    plan: Plan, tensors: Mapping[str, Tensor], *, backend: str = "auto", reduce: Reduce | None = None
) -> Callable[[], None]:
    """Do all that can fail, and return the call that writes the plan into ``tensors``.

    Factors are brought to the weights' devices and the backend is chosen here; an interrupt that comes while
    weights are being written waits for the last of them, so nothing is ever half-applied.

    Args:
        tensors: must have every name in ``plan.tensors``.
        reduce: where DoRA's vectors are cut: called once by the call that writes, after values are replaced and before
            anything is added, even if there is no DoRA update here. What it is given lies on the updates' tensors'
            devices, and so does what it returns. None: vectors are whole here.

    Returns:
        The call, which may be made more than once. It finds a weight that has got other memory since, or, where
        DoRA or only a part of the tensor is written, raises PlanError before the first write.

    Raises:
        PlanError: DoRA's vectors are cut, and there is no ``reduce``.
        BackendError, ValueError, torch.OutOfMemoryError: nothing has been written then.
    """
    if reduce is None:
        plan.check_vectors()
    to_device = Mover()
    # Those that must stay as they are. A whole matrix need not, the op looks at it anew; a view of a tensor would go on
    # writing to its old memory.
    fixed = {a.name: tensors[a.name] for a in plan.assigns}
    assigns = [(a, fixed[a.name].detach(), to_device(a.value, fixed[a.name].device)) for a in plan.assigns]
    weights: list[Tensor] = []
    added: list[Term] = []
    n_terms: list[int] = []
    dora_weights: list[Tensor] = []
    dora_updates: list[Update] = []
    for update in plan.updates:
        matrix = tensor = tensors[update.name]
        if not update.region.is_whole(tensor):
            matrix = update.region.view(tensor.detach())
        if matrix is not tensor or update.is_dora:
            fixed[update.name] = tensor
        terms = [_on_device(term, tensor.device, to_device) for term in update.terms]
        if update.is_dora:
            dora_weights.append(matrix)
            dora_updates.append(replace(update, terms=tuple(terms)))
        else:
            weights.append(matrix)
            added += terms
            n_terms.append(len(terms))
    lora_A, lora_B = [term.lora_A for term in added], [term.lora_B for term in added]
    add = ops.Prepared(weights, lora_A, lora_B, [term.scaling for term in added], n_terms, backend)
    ops.backends_for(dora_weights, backend)
    dora.check(dora_weights, *_arguments(dora_updates))
    places = {name: _place(tensor) for name, tensor in fixed.items()}
    inference = any(tensors[name].is_inference() for name in plan.tensors)

    def write() -> None:
        for name, tensor in fixed.items():
            if _place(tensor) != places[name]:
                raise PlanError(f"{name} has other memory or another shape than when the plan was prepared for it")
        with torch.inference_mode() if inference else torch.no_grad(), hold_interrupts():
            for assign, tensor, value in assigns:
                assign_(assign, tensor, value)
            if dora_weights or reduce is not None:
                dora_(dora_weights, dora_updates, backend=backend, reduce=reduce)
            add()

    return write


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor moves or is resized."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def assign_(assign: Assign, tensor: Tensor, value: Tensor) -> None:
    if assign.by_index:
        index = torch.tensor(assign.rows, device=tensor.device)
        new = value if assign.strength == 1.0 else _lerp(tensor[index], value, assign.strength)
        tensor.index_copy_(0, index, new.to(tensor.dtype))
        return
    part = tensor if assign.rows is None else tensor[slice(*assign.rows)]
    part.copy_(value if assign.strength == 1.0 else _lerp(part, value, assign.strength))


def _lerp(old: Tensor, new: Tensor, strength: float) -> Tensor:
    dtype = accumulation_dtype(old)
    return torch.lerp(old.to(dtype), new.to(dtype), strength)


def dora_(
    weights: Sequence[Tensor], updates: Sequence[Update], *, backend: str = "auto", reduce: Reduce | None = None
) -> None:
    """DoRA in place (``dora.lowrank_dora_``).

    Args:
        weights: [m, n] each.
        updates: of each weight; its factors and magnitudes lie on the weight's device. Every term sees the weight as
            it was before the call, so that several adapters do not depend on their order.
        reduce: see ``prepare``.
    """
    lora_A, lora_B, scalings, n_terms, magnitudes, axes, strengths = _arguments(updates)
    squares: list[Tensor] = []
    if reduce is not None:
        here = iter(dora.lowrank_dora_squares(weights, lora_A, lora_B, scalings, n_terms, axes, backend))
        squares += reduce([[next(here) for t in update.terms if t.magnitude is not None] for update in updates])
    dora.lowrank_dora_(weights, lora_A, lora_B, scalings, n_terms, magnitudes, axes, strengths, squares, backend)


def _arguments(updates: Sequence[Update]) -> tuple[Any, ...]:
    """(lora_A, lora_B, scalings, n_terms, magnitudes, axes, strengths) of ``dora.lowrank_dora_``."""
    terms = [term for update in updates for term in update.terms]
    return (
        [term.lora_A for term in terms],
        [term.lora_B for term in terms],
        [term.scaling for term in terms],
        [len(update.terms) for update in updates],
        [term.magnitude for term in terms if term.magnitude is not None],
        [-1 if term.magnitude is None else term.magnitude_axis for term in terms],
        [term.strength for term in terms],
    )


def _on_device(term: Term, device: torch.device, to_device: Callable[[Tensor, torch.device], Tensor]) -> Term:
    if term.lora_A.device == device == term.lora_B.device and term.magnitude is None:
        return term
    magnitude = None if term.magnitude is None else to_device(term.magnitude, device)
    lora_A, lora_B = to_device(term.lora_A, device), to_device(term.lora_B, device)
    return Term(lora_A, lora_B, term.scaling, magnitude, term.magnitude_axis, term.strength)


class Mover:
    """Moves each factor to each device once, however many weights use it."""

    def __init__(self) -> None:
        self._moved: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.device == device:
            return tensor
        key = (device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self._moved:
            self._moved[key] = tensor.to(device, non_blocking=True)  # waits all the same, if not pinned
        return self._moved[key]


@contextmanager
def hold_interrupts(*, deliver: bool = True) -> Iterator[None]:
    """Hold SIGINT back until the block is done, then deliver it, or drop it if there is nothing left to interrupt.

    In the main thread only; elsewhere it cannot strike.
    """
    elsewhere = threading.current_thread() is not threading.main_thread()
    if elsewhere or signal.getsignal(signal.SIGINT) is None:  # None: a handler that Python did not install
        yield
        return
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if caught and deliver:
            signal.raise_signal(signal.SIGINT)


def update_norms(update: Update, tensor: Tensor) -> tuple[float, float]:
    """(||delta||, ||W||) of one update, Frobenius, the latter over the region as it is now."""
    view = update.region.view(tensor)
    total = 0.0
    for rows in row_blocks(*view.shape):
        total += float(view[rows].double().square().sum())
    return update.delta_norm(), total**0.5
