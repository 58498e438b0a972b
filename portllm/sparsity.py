"""Sparse weights (2:4 and others): which they are, what of a patch their zeros lose, and B fitted anew to the rest.

A patch that keeps zeros (``apply(..., keep_zeros=True)``) adds D_i . delta_i to row i of a weight, with D_i the
diagonal mask of the row's elements that are not 0. On an input x = A^T z, within the row space of A, row i should add
s b_i A A^T z, and now adds s b_i A D_i A^T z. ``refit`` finds the rows b'_i of B that give the former back::

    b'_i (A D_i A^T) = b_i (A A^T)

which is r equations for r unknowns, for each row. In coordinates that know no scale of A, with A = T Q^T, Q [n, k]
orthonormal (from the SVD of A, k its rank), c_i = b_i T and H_i = Q^T D_i Q, whose eigenvalues lie in [0, 1], it reads
c'_i H_i = c_i. Where fewer elements are kept than k, or nearly, H_i is singular, so what is solved is the ridge problem
that stays near the old row::

    min over c' of |c' H_i - c_i|^2 + ridge |c' - c_i|^2,  so  c'_i (H_i^2 + ridge I) = c_i (H_i + ridge I)

With nothing masked H_i = I and c'_i = c_i. No direction of c grows by more than about 1 / (2 sqrt(ridge)). All of it is
in fp64, a block of rows at a time; b'_i = b_i + (c'_i - c_i) T^+.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bind import Options, bind
from .errors import PlanError, PortllmError
from .fingerprint import METADATA_KEY, Read, by_source, cached
from .live import Source, as_patches
from .patch import ExpertEntry, LoraEntry, Patch
from .planning import Plan, Update, some
from .readable import Model, ReadableModel
from .reference import row_blocks

_GROUPS = (4, 8)  # lengths of the groups that a pattern is looked for in
_MANY_ZEROS = 0.05
_PRODUCTS = 1 << 21  # numbers in a block of fp64 products: 16 MiB
_RANK_EPS = 1e-7  # singular values of A below this share of the largest are rounding


@dataclass(frozen=True)
class Masked:
    """What the zeros of the weights that one of the patch's modules changes mean for it.

    Attributes:
        source: the module's name in the patch.
        pattern: "2:4" and the like, if all groups of elements in a row are so; None without a pattern.
        zeros: the share of elements that are 0.
        lost: of the delta's squared Frobenius norm, the share on zeros, 1 - ||mask . delta||^2 / ||delta||^2.
    """

    source: str
    pattern: str | None
    zeros: float
    lost: float

    @property
    def is_sparse(self) -> bool:
        """By a pattern, or by more zeros than dense weights come to have."""
        return self.pattern is not None or self.zeros > _MANY_ZEROS


def pattern_of(weight: Tensor) -> str | None:
    """The n:m pattern of a matrix [out, in]: of each m elements of a row, from a multiple of m on, at most n are not 0.

    Looked for are groups of 4 and of 8, at most half of them not 0; None for a matrix without such a pattern, or of
    zeros alone.
    """
    if weight.dim() != 2 or weight.numel() == 0:
        return None
    most = dict.fromkeys((m for m in _GROUPS if weight.shape[1] % m == 0), 0)
    for rows in row_blocks(*weight.shape):
        filled = weight[rows] != 0
        for m in list(most):
            most[m] = max(most[m], int(filled.view(len(filled), -1, m).sum(2, dtype=torch.uint8).max()))
            if most[m] > m // 2:
                del most[m]  # a dense weight is told by its first block
        if not most:
            return None
    m, n = next(iter(most.items()))
    return f"{n}:{m}" if n else None


def masked(plan: Plan, read: Read) -> tuple[Masked, ...]:
    """For each module of a bound patch, what the zeros of its weights would lose if they were kept.

    Exact, in fp64, block by block; each weight is read once. DoRA terms count as plain LoRA.

    Args:
        plan: the patch, bound.
        read: gives the target's tensors by name.
    """
    read = cached(read)
    return tuple(_masked(source, updates, read) for source, updates in by_source(plan).items())


def _masked(source: str, updates: Sequence[Update], read: Read) -> Masked:
    total = lost = 0.0
    zeros = count = 0
    patterns = set()
    for update in updates:
        weight = update.region.view(read(update.name).detach())
        patterns.add(pattern_of(weight))
        total += update.delta_norm() ** 2
        for rows in row_blocks(*weight.shape):
            empty = weight[rows] == 0
            zeros, count = zeros + int(empty.sum()), count + empty.numel()
            with_zeros = empty.any(1)
            if bool(with_zeros.any()):
                delta = _delta(update, rows.start + with_zeros.nonzero().flatten(), weight.device)
                lost += float(delta.square_().mul_(empty[with_zeros]).sum())
    pattern = patterns.pop() if len(patterns) == 1 else None
    return Masked(source, pattern, zeros / count if count else 0.0, lost / total if total else 0.0)


def _delta(update: Update, rows: Tensor, device: torch.device) -> Tensor:
    """These rows of the sum of the terms, in fp64."""
    terms = [
        t.lora_B[rows.to(t.lora_B.device)].to(device).double() @ t.lora_A.to(device).double() * (t.scaling * t.strength)
        for t in update.terms
    ]
    return torch.stack(terms).sum(0)


def explain(found: Sequence[Masked]) -> str | None:
    """One line on sparse weights, for people; None where there are none."""
    sparse = [one for one in found if one.is_sparse]
    if not sparse:
        return None
    worst = max(sparse, key=lambda one: one.lost)
    kinds = sorted({one.pattern or "without a pattern" for one in sparse})
    return (
        f"{len(sparse)} weights are sparse ({', '.join(kinds)}): where zeros stay zeros (keep_zeros, --keep-zeros), up "
        f"to {worst.lost:.0%} of the patch's squared norm is lost ({worst.source}); portllm.refit makes up for it on "
        "the inputs that the patch reads"
    )


def with_losses(plan: Plan, read: Read) -> Plan:
    """A plan that keeps zeros, with warnings of what that loses, and of what is replaced and so keeps none."""
    warnings = [] if (line := explain(masked(plan, read))) is None else [line]
    warnings += [
        f"{assign.name} is sparse, but {assign.sources[0]} replaces values of it by dense ones"
        for assign in plan.assigns
        if pattern_of(read(assign.name).detach()) is not None and pattern_of(assign.value) is None
    ]
    return replace(plan, warnings=(*plan.warnings, *warnings))


# -- refit -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RefitWeight:
    """What became of one module.

    Attributes:
        source: the module's name in the patch.
        lost: as ``Masked``, before.
        before, after: the relative error of what the masked delta does to inputs in the row space of A, all
            directions alike: ||(mask . delta - delta_0) Q|| / ||delta_0||, with delta_0 the patch's own delta.
    """

    source: str
    lost: float
    before: float
    after: float


@dataclass(frozen=True)
class Refitted:
    """A patch whose lora_B is fitted to what sparse weights keep of it; ``weights``: those that have zeros."""

    patch: Patch
    weights: tuple[RefitWeight, ...]


def refit(patch: Source, model: Model, *, ridge: float = 1e-4, strict: bool = True) -> Refitted:
    """Fit lora_B to the elements that the model's weights have not zero; see the module for the equations.

    The refitted patch, applied with ``keep_zeros=True``, does to inputs within the row space of lora_A what the patch
    does to a dense weight, exactly but for the ridge; what it does to other inputs grows, as its rows do. Rows without
    a zero, and modules on dense weights, stay as they are, bit for bit; other lora_B become fp32 at least.

    Args:
        patch: a Patch, an adapter directory or a hub id; plain LoRA on matrices.
        model: the sparse model: a checkpoint, module or state dict; read a weight at a time.
        ridge: holds back rows that keep too few elements; 0.0001 leaves an error of 0.02 % where half are kept.
        strict: as ``portllm.apply``.

    Raises:
        PatchError, PlanError, CheckpointError: as ``portllm.apply``; PlanError for DoRA, stacked experts, and weights
            that are fused or cut apart in another way than the patch, where they have zeros.
        PortllmError: the ridge is not positive.
    """
    if not (0 < ridge < math.inf):
        raise PortllmError(f"ridge={ridge!r} must be positive: rows that keep few elements have no other solution")
    [(loaded, _)] = as_patches(patch)
    opened = ReadableModel.open(model, "sparse")
    plan = bind(opened.target, [(loaded, 1.0)], Options())
    plan.check_complete(strict=strict)
    entries = {entry.module: entry for entry in loaded.entries if isinstance(entry, LoraEntry)}
    keys = {entry.module: _key_of_B(loaded, entry) for entry in entries.values() if entry.kind == "linear"}
    read, tensors, weights = cached(opened.read), dict(loaded.tensors), []
    for source, updates in by_source(plan).items():
        entry = entries.get(source)
        if entry is not None and entry.kind == "embedding":
            continue
        if all(bool((update.region.view(read(update.name)) != 0).all()) for update in updates):
            continue
        if entry is None and not any(isinstance(e, ExpertEntry) and source in e.parameters for e in loaded.entries):
            continue  # a bias
        views = None if entry is None or entry.magnitude is not None else _as_factored(entry, updates, read)
        if entry is None or views is None:
            raise PlanError(
                f"{source} cannot be refitted to the zeros of {some([update.name for update in updates])}: it has "
                "DoRA's magnitudes or stacked experts, or the model stores it in another layout than the patch has"
            )
        lora_B, weight = _refit(entry, views, ridge)
        key = keys[source]
        tensors[key] = lora_B.to(loaded.tensors[key].device).reshape(loaded.tensors[key].shape)
        weights.append(weight)
    metadata = {key: value for key, value in loaded.metadata.items() if key != METADATA_KEY}
    made = Patch.from_tensors(tensors, loaded.config, name=loaded.name, metadata=metadata)
    return Refitted(made, tuple(weights))


def _key_of_B(patch: Patch, entry: LoraEntry) -> str:
    """The file's key of a module's lora_B: the entry's is that tensor, or a view of it."""
    place = entry.lora_B.data_ptr(), entry.lora_B.shape[0]
    return next(key for key, t in patch.tensors.items() if ".lora_B" in key and (t.data_ptr(), t.shape[0]) == place)


def _as_factored(entry: LoraEntry, updates: Sequence[Update], read: Read) -> list[Tensor] | None:
    """The weights as matrices [out, in] of the module, one below the other; None if they lie otherwise.

    A fused weight of the patch may be cut apart in the model, by rows; GPT-2's Conv1D is stored transposed.
    """
    views, rows, lora_A = [], 0, entry.lora_A.flatten(1)
    for update in updates:
        [term] = update.terms  # of one patch alone
        view = update.region.view(read(update.name).detach())
        for B, A, matrix in ((term.lora_B, term.lora_A, view), (term.lora_A.T, term.lora_B.T, view.T)):
            part = entry.lora_B[rows : rows + len(B)]
            if A.shape == lora_A.shape and B.shape == part.shape and torch.equal(A, lora_A) and torch.equal(B, part):
                views.append(matrix)
                rows += len(B)
                break
        else:
            return None
    return views if rows == len(entry.lora_B) else None


def _refit(entry: LoraEntry, views: Sequence[Tensor], ridge: float) -> tuple[Tensor, RefitWeight]:
    """(lora_B [m, r], what became of it)."""
    lora_A, old = entry.lora_A.flatten(1).double(), entry.lora_B
    U, S, Vh = torch.linalg.svd(lora_A, full_matrices=False)
    kept = _RANK_EPS * S[0] < S
    to_c, back = U[:, kept] * S[kept], (U[:, kept] / S[kept]).T  # T [r, k] and its pseudo-inverse [k, r]
    Q = Vh[kept].T.contiguous()  # [n, k]
    lora_B = old.to(torch.promote_types(old.dtype, torch.float32), copy=True)
    identity = torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)
    total = same = before = after = 0.0
    start = 0
    for weight in views:
        for rows, H, dense in _grams(weight.to(Q.device), Q):
            block = slice(start + rows.start, start + rows.stop)
            b = old[block].double()
            c = b @ to_c
            image = (c.unsqueeze(1) @ H).squeeze(1)
            wanted = image + ridge * c
            fitted = torch.linalg.solve(H @ H + ridge * identity, wanted.unsqueeze(2)).squeeze(2)
            fitted = torch.where(dense.unsqueeze(1), c, fitted)
            new = torch.where(dense.unsqueeze(1), b, b + (fitted - c) @ back).to(lora_B.dtype)
            lora_B[block] = new
            written = (new.double() @ to_c).unsqueeze(1)
            total += float(c.square().sum())
            same += float((image * c).sum())
            before += float((image - c).square().sum())
            after += float(((written @ H).squeeze(1) - c).square().sum())
        start += len(weight)
    if not total:
        return lora_B, RefitWeight(entry.module, 0.0, 0.0, 0.0)
    return lora_B, RefitWeight(entry.module, 1 - same / total, math.sqrt(before / total), math.sqrt(after / total))


def _grams(weight: Tensor, Q: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For blocks of rows, (which, Q^T D_i Q [rows, k, k] fp64, which rows have no zero).

    A mask times the products of Q's columns two by two: one matrix product for all rows, in pieces of columns.
    """
    n, k = Q.shape
    step, wide = max(1, _PRODUCTS // max(1, k * k, n)), max(1, _PRODUCTS // max(1, k * k))
    for start in range(0, len(weight), step):
        rows = slice(start, min(start + step, len(weight)))
        filled = weight[rows] != 0
        H = Q.new_zeros(len(filled), k * k)
        for first in range(0, n, wide):
            part = Q[first : first + wide]
            products = (part.unsqueeze(2) * part.unsqueeze(1)).flatten(1)
            H += filled[:, first : first + wide].to(Q.dtype) @ products
        yield rows, H.view(len(filled), k, k), filled.all(1)
