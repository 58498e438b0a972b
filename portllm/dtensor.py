"""DTensor weights (FSDP2, tensor parallel, both at once): which part of each lies on this rank.

Nothing here imports torch.distributed; who has a DTensor has done so.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import PlanError, PortllmError
from .planning import Plan, Region
from .sharding import Piece, localise, matrix_box

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from .execute import Reduce


_NOBODY = 1 << 30


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor that lies here, sharing its memory; of a plain tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    dtensor: Any = tensor
    with torch.no_grad():
        part: Tensor = dtensor.to_local()
    return part


class Here(NamedTuple):
    """What of a plan falls on this process.

    Attributes:
        plan: for what lies here.
        tensors: that.
        reduce: for ``execute.prepare``.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]
    reduce: Reduce | None = None


def here(plan: Plan, tensors: Mapping[str, Tensor]) -> Here:
    """A plan for whole tensors, some of which may be DTensors, cut to what lies on this rank.

    Raises:
        PlanError: a DTensor that is a partial sum, or is laid out in a way that is not known; see ``localise``.
    """
    reduce = None
    if any(map(is_dtensor, tensors.values())):
        reduce = _reduction(plan, tensors)
        plan = localise(plan, {name: _pieces(name, tensors[name]) for name in plan.tensors if name in tensors})
    return Here(plan, local_tensors(tensors), reduce)


def local_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each tensor the part that lies here."""
    return {name: local(tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Vector:
    """The squares of one DoRA term: how many there are in the whole, and [start, stop) of those that are here.

    Attributes:
        over: the mesh and its dimensions over whose ranks parts of each square are spread; None: each is whole here.
        offset: where they begin among all that go the same way.
    """

    start: int
    stop: int
    over: tuple[DeviceMesh, tuple[int, ...]] | None
    offset: int = 0


def _reduction(plan: Plan, tensors: Mapping[str, Tensor]) -> Reduce | None:
    """For a plan for whole tensors: what adds up the squares of DoRA's vectors where these are cut.

    Every rank must call what it returns. A number of 8 bytes for each vector is sent, and of a weight nothing.
    """
    here: list[list[_Vector]] = []  # of each DoRA update that falls on this rank, in the plan's order
    lengths: dict[tuple[DeviceMesh, tuple[int, ...]], int] = {}
    for update in plan.updates:
        if not update.is_dora:
            continue
        tensor = tensors[update.name]
        pieces = _pieces(update.name, tensor)
        vectors = []
        for axis in (term.magnitude_axis for term in update.terms if term.magnitude is not None):
            over = _spread(tensor, update.region, axis)
            start, stop = _on_axis(update.region, axis, pieces[0]) if pieces else (0, 0)
            vectors.append(_Vector(start, stop, over, lengths.get(over, 0) if over else 0))
            if over:
                lengths[over] = lengths.get(over, 0) + update.region.shape[axis]
        if localise(Plan((update,)), {update.name: pieces}).updates:
            here.append(vectors)
    if not lengths:
        return None

    def reduce(squares: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        totals = {
            over: torch.zeros(length, dtype=torch.float64, device=over[0].device_type)
            for over, length in lengths.items()
        }
        pairs = [
            (vector, part)
            for vectors, parts in zip(here, squares, strict=True)
            for vector, part in zip(vectors, parts, strict=True)
        ]
        for vector, part in pairs:
            if vector.over is not None:
                totals[vector.over][vector.offset :][vector.start : vector.stop] = part
        for (mesh, mesh_dims), total in totals.items():
            for mesh_dim in mesh_dims:
                torch.distributed.all_reduce(total, group=mesh.get_group(mesh_dim))
        return [
            part if v.over is None else totals[v.over][v.offset :][v.start : v.stop].to(part.device)
            for v, part in pairs
        ]

    return reduce


def _spread(tensor: Tensor, region: Region, axis: int) -> tuple[DeviceMesh, tuple[int, ...]] | None:
    """Over what the parts of vectors along the other axis are spread."""
    if not is_dtensor(tensor):
        return None
    dtensor: Any = tensor
    first = 0 if region.expert is None else 1
    along = range(first + 1, tensor.dim()) if axis == 0 else (first,)
    sharded = {m: p.dim for m, p in enumerate(dtensor.placements) if getattr(p, "dim", None) is not None}
    sharded = {m: dim for m, dim in sharded.items() if dtensor.device_mesh.size(m) > 1}
    return (dtensor.device_mesh, tuple(sharded)) if set(sharded.values()) & set(along) else None


def _on_axis(region: Region, axis: int, piece: Piece) -> tuple[int, int]:
    """[start, stop) of the region's rows (axis 0) or columns (axis 1) that the piece holds, from the region's first."""
    inner = 0 if region.expert is None else 1
    box = matrix_box(piece.start[inner:], piece.shape[inner:])[axis]
    first, last = (region.rows, region.columns)[axis]
    start, stop = max(box[0], first), min(box[1], last)
    return (start - first, max(start, stop) - first)


def _pieces(name: str, tensor: Tensor) -> list[Piece]:
    """The box of a tensor that lies here; none if it is empty."""
    if not is_dtensor(tensor):
        return [Piece(name, (0,) * tensor.dim(), (0,) * tensor.dim(), tuple(tensor.shape))]
    dtensor: Any = tensor
    box = _box(name, dtensor)
    shape = tuple(stop - start for start, stop in box)
    found = tuple(local(tensor).shape)
    if shape != found:
        raise PlanError(
            f"{name}: rank {_rank()} holds {list(found)} of {list(tensor.shape)}, where {dtensor.placements} on a mesh "
            f"of {list(dtensor.device_mesh.shape)} stand for {list(shape)}; distribute it evenly"
        )
    return [Piece(name, (0,) * len(box), tuple(start for start, _ in box), shape)] if 0 not in shape else []


def _box(name: str, dtensor: DTensor) -> list[tuple[int, int]]:
    """[start, stop) in each dimension of the whole tensor."""
    mesh = dtensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return [(0, 0) for _ in dtensor.shape]
    box = [(0, size) for size in dtensor.shape]
    for dim in range(len(box)):
        for mesh_dim in _cuts(name, dtensor, dim):
            start, stop = box[dim]
            # As torch.chunk cuts: all parts of one size, as long as there is something left.
            size = -(-(stop - start) // mesh.size(mesh_dim))
            first = min(start + coordinate[mesh_dim] * size, stop)
            box[dim] = first, min(first + size, stop)
    return box


def _cuts(name: str, dtensor: DTensor, dim: int) -> list[int]:
    """The mesh dimensions over which a dimension of the tensor is divided, in the order in which it was."""
    order: list[int] = []
    for mesh_dim, placement in reversed(list(enumerate(dtensor.placements))):
        if placement.is_partial():
            raise PlanError(f"{name} is a partial sum ({dtensor.placements}); redistribute it to Shard or Replicate")
        if placement.is_replicate() or getattr(placement, "dim", None) != dim:
            continue
        strides = getattr(placement, "split_factor", None)
        if strides is None:
            order.insert(0, mesh_dim)
        elif strides == math.prod(dtensor.device_mesh.size(m) for m in order):
            order.append(mesh_dim)  # FSDP2 divides what tensor parallelism has divided before
        else:
            raise PlanError(f"{name}: the placements {dtensor.placements} are not known; redistribute it to Shard")
    return order


def _rank() -> int:
    return torch.distributed.get_rank()


def meshes(tensors: Iterable[Tensor]) -> list[DeviceMesh]:
    """The meshes that DTensors lie on, each once."""
    found: list[Any] = []
    for tensor in tensors:
        if is_dtensor(tensor):
            dtensor: Any = tensor
            if dtensor.device_mesh not in found:
                found.append(dtensor.device_mesh)
    return found


@contextmanager
def together(on: Iterable[DeviceMesh]) -> Iterator[None]:
    """What is inside either succeeds on every rank of the meshes, or raises on every one: so no rank writes alone.

    Each rank must come here. One number is exchanged for each dimension of each mesh.
    """
    joined = [mesh for mesh in on if mesh.get_coordinate() is not None and mesh.size() > 1]
    try:
        yield
    except Exception:
        if joined:
            _lowest(joined, _rank())
        raise
    failed = _lowest(joined, _NOBODY)
    if failed != _NOBODY:
        raise PortllmError(f"rank {failed} cannot go on, see its own error; nothing has been written on any rank")


def _lowest(on: Iterable[DeviceMesh], number: int) -> int:
    """The lowest of the numbers that the ranks of the meshes bring."""
    for mesh in on:
        lowest = torch.tensor([number], device=mesh.device_type)
        for mesh_dim in range(mesh.ndim):
            torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, mesh.get_group(mesh_dim))
        number = int(lowest)
    return number


def settle(module: nn.Module) -> None:
    """Bring a module's parameters to where a write to them lasts, or say why that cannot be.

    FSDP2 modules whose parameters are gathered just now are resharded, since the gathered ones are copies.

    Raises:
        PlanError: flat parameters of FSDP1, or parameters that DeepSpeed's ZeRO-3 has partitioned.
    """
    for part in module.modules():
        kinds = {kind.__name__ for kind in type(part).__mro__}
        if "FSDPModule" in kinds:
            fsdp: Any = part
            fsdp.reshard()
        if "FullyShardedDataParallel" in kinds and not _is_summoned(part):
            raise PlanError(
                "the model is wrapped by FSDP1, whose flat parameters hold no matrices; shard it with fully_shard "
                "(FSDP2), or apply the patch inside `with FullyShardedDataParallel.summon_full_params(model):`"
            )
    for name, parameter in module.named_parameters():
        status = getattr(getattr(parameter, "ds_status", None), "name", "AVAILABLE")
        if status != "AVAILABLE":
            raise PlanError(
                f"{name} is partitioned by DeepSpeed ZeRO-3; apply the patch inside `with "
                "deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):`, or to the checkpoint"
            )


def _is_summoned(fsdp: Any) -> bool:
    state = getattr(getattr(fsdp, "_handle", None), "_training_state", None)
    return getattr(state, "name", "SUMMON_FULL_PARAMS") == "SUMMON_FULL_PARAMS"
