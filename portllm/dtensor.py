"""DTensor weights (FSDP2, tensor parallel, both at once): which part of each lies on this rank.

Nothing here imports torch.distributed; who has a DTensor has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import PlanError, PortllmError
from .planning import Plan
from .sharding import Piece, localise

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


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


def here(plan: Plan, tensors: Mapping[str, Tensor]) -> tuple[Plan, dict[str, Tensor]]:
    """A plan for whole tensors and these tensors -> the plan for what lies on this rank, and that.

    Raises:
        PlanError: a DTensor that is a partial sum, or is laid out in a way that is not known; see ``localise``.
    """
    if any(map(is_dtensor, tensors.values())):
        plan = localise(plan, {name: _pieces(name, tensors[name]) for name in plan.tensors if name in tensors})
    return plan, local_tensors(tensors)


def local_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each tensor the part that lies here."""
    return {name: local(tensor) for name, tensor in tensors.items()}


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
        elif strides == _product(dtensor.device_mesh.size(m) for m in order):
            order.append(mesh_dim)  # FSDP2 divides what tensor parallelism has divided before
        else:
            raise PlanError(f"{name}: the placements {dtensor.placements} are not known; redistribute it to Shard")
    return order


def _product(numbers: Iterable[int]) -> int:
    product = 1
    for number in numbers:
        product *= number
    return product


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
