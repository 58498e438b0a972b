"""Execute a Plan on tensors in memory: the only place that writes to weights."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import ops, requantise
from .errors import PlanError
from .noise import NEAREST, Mode, store_
from .planning import Assign, Plan, Term, Update, modes_for
from .quantised import Unit, grouped, survival
from .reference import accumulation_dtype, ieee_matmul, row_blocks


def execute(plan: Plan, tensors: Mapping[str, Tensor], *, backend: str = "auto") -> None:
    """``prepare`` and write at once."""
    prepare(plan, tensors, backend=backend)()


def prepare(plan: Plan, tensors: Mapping[str, Tensor], *, backend: str = "auto") -> Callable[[], dict[str, float]]:
    """Do all that can fail, and return the call that writes the plan into ``tensors``.

    Factors are brought to the weights' devices and the backend is chosen here; an interrupt that comes while
    weights are being written waits for the last of them, so nothing is ever half-applied.

    Args:
        tensors: must have every name in ``plan.stored``.

    Returns:
        The call, which may be made more than once and returns the survival of quantised weights (see
        ``portllm.live.Applied``). It finds a weight that has got other memory since, or, where
        DoRA or only a part of the tensor is written, raises PlanError before the first write.

    Raises:
        BackendError, ValueError, torch.OutOfMemoryError: nothing has been written then.
    """
    to_device = Mover()
    # Those that must stay as they are. A whole matrix need not, the op looks at it anew; a view of a tensor would go on
    # writing to its old memory.
    fixed = {a.name: tensors[a.name] for a in plan.assigns}
    assigns = [(a, fixed[a.name].detach(), to_device(a.value, fixed[a.name].device)) for a in plan.assigns]
    weights: list[Tensor] = []
    added: list[Term] = []
    n_terms: list[int] = []
    dora: list[tuple[Tensor, tuple[Term, ...], Mode]] = []
    plain: list[Update] = []
    for update in plan.updates:
        if update.name in plan.quantised:
            continue
        matrix = tensor = tensors[update.name]
        if not update.region.is_whole(tensor):
            matrix = update.region.view(tensor.detach())
        if matrix is not tensor or update.is_dora:
            fixed[update.name] = tensor
        terms = [_on_device(term, tensor.device, to_device) for term in update.terms]
        if update.is_dora:
            dora.append((matrix, tuple(terms), update.mode))
        else:
            plain.append(update)
            weights.append(matrix)
            added += terms
            n_terms.append(len(terms))
    lora_A, lora_B = [term.lora_A for term in added], [term.lora_B for term in added]
    scalings = [term.scaling for term in added]
    add = ops.Prepared(weights, lora_A, lora_B, scalings, n_terms, backend, modes_for(plain))
    requantised = _Requantise(plan, tensors, to_device, backend)
    fixed |= {name: tensors[name] for weight in plan.quantised.values() for name in weight.parts}
    places = {name: _place(tensor) for name, tensor in fixed.items()}
    inference = any(tensors[name].is_inference() for name in plan.stored)

    def write() -> dict[str, float]:
        for name, tensor in fixed.items():
            if _place(tensor) != places[name]:
                raise PlanError(f"{name} has other memory or another shape than when the plan was prepared for it")
        with torch.inference_mode() if inference else torch.no_grad(), hold_interrupts():
            for assign, tensor, value in assigns:
                assign_(assign, tensor, value)
            add()
            for matrix, terms, mode in dora:
                dora_(matrix, terms, mode)
            return requantised()

    return write


class _Requantise:
    """The updates of a plan's quantised weights, and what they write to."""

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], to_device: Mover, backend: str) -> None:
        self._backend = backend
        self._work: list[tuple[Unit, dict[str, Tensor], list[float]]] = []
        factors = {name: weight.global_scales(tensors.__getitem__) for name, weight in plan.quantised.items()}
        for unit in grouped(plan.updates, plan.quantised):
            weight = unit.weight
            device = tensors[weight.codes].device
            requantise.backend_for(tensors[weight.codes], backend)
            parts = {}
            for name, span in weight.spans(unit.start, unit.stop).items():
                if not tensors[name].is_contiguous():
                    raise PlanError(f"{name} is not contiguous; make it so first: tensor.data = tensor.contiguous()")
                parts[name] = tensors[name].detach().view(-1)[slice(*span)]
            if weight.nested is not None:
                parts[weight.nested.table] = tensors[weight.nested.table]
            terms = tuple(_on_device(term, device, to_device) for term in unit.terms)
            self._work.append((replace(unit, terms=terms), parts, factors[weight.name]))

    def __call__(self) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        for unit, parts, factors in self._work:
            made = unit.run(parts, factors, self._backend).cpu()
            name = unit.weight.name
            sums[name] = sums[name] + made if name in sums else made
        return {name: survival(total) for name, total in sums.items()}


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


def dora_(weight: Tensor, terms: tuple[Term, ...], mode: Mode = NEAREST) -> None:
    """DoRA in place (arXiv 2402.09353, eq. 5): ``W <- W + sum_t strength_t (m_t (W + D_t) / ||W + D_t|| - W)``.

    Args:
        weight: [m, n].
        terms: DoRA terms, each with the norm over its own axis; plain terms among them add ``D_t``. Every term
            sees the weight as it was before the call, so that several adapters do not depend on their order.
        mode: how the result is rounded.
    """
    dtype = accumulation_dtype(weight)
    with ieee_matmul():
        norms = [_column_norms(weight, term, dtype) if term.magnitude_axis == 1 else None for term in terms]
        alone = len(terms) == 1 and terms[0].strength == 1.0
        for rows in row_blocks(*weight.shape):
            total = base = weight[rows].to(dtype)
            for term, column_norm in zip(terms, norms, strict=True):
                tuned = base + _delta(term, rows, dtype)
                if term.magnitude is not None:
                    magnitude = term.magnitude.to(dtype)
                    if column_norm is None:
                        norm = torch.linalg.vector_norm(tuned, dim=1, keepdim=True)
                        tuned *= _ratio(magnitude[rows].unsqueeze(1), norm)
                    else:
                        tuned *= _ratio(magnitude, column_norm)
                total = tuned if alone else total + (tuned - base) * term.strength
            store_(weight, total, mode, rows)


def _delta(term: Term, rows: slice, dtype: torch.dtype) -> Tensor:
    return (term.lora_B[rows].to(dtype) @ term.lora_A.to(dtype)) * term.scaling


def _column_norms(weight: Tensor, term: Term, dtype: torch.dtype) -> Tensor | None:
    if term.magnitude is None:
        return None
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in row_blocks(*weight.shape):
        total += (weight[rows].to(dtype) + _delta(term, rows, dtype)).double().square().sum(0)
    return total.sqrt().to(dtype)


def _ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """magnitude / norm; a vector of zeros has no direction and stays zero."""
    return torch.where(norm > 0, magnitude / norm, 0.0)


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
