"""What tests/test_sharded.py runs on each rank: sharded models against the same models whole, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import portllm
from portllm import dora, ops

from .families import FAMILIES

World = Callable[[nn.Module], nn.Module]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, wherever it lies."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(model: nn.Module, truth: nn.Module, *, to_rounding: bool = False) -> None:
    """Every parameter is bit for bit the truth's, or, where the sums depend on the matrices' shapes, to rounding."""
    expected = dict(truth.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        got, wanted = whole(parameter.detach()), expected[name].detach()
        if to_rounding:
            torch.testing.assert_close(got, wanted, rtol=2**-7, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(got, wanted), name


def sums_depend_on_shapes(path: str) -> bool:
    """Plain torch multiplies matrices of other shapes in another order; the compiled library does not."""
    return ops.unavailable("cpu") is not None or ("dora" in path and "cpu" not in dora._BACKENDS)


class Traffic(TorchDispatchMode):
    """Bytes that are handed to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self.bytes += sum(t.nbytes for t in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t))
        return function(*args, **(kwargs or {}))


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Blocks that are sharded on their own."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module


def fsdp(mesh: DeviceMesh, **settings: Any) -> World:
    """FSDP2 over a mesh: blocks, then the rest."""

    def shard(model: nn.Module) -> nn.Module:
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh, **settings)
        return fully_shard(model, mesh=mesh, **settings)

    return shard


def tensor_parallel(mesh: DeviceMesh) -> World:
    """Attention's and the MLP's matrices over a mesh, by rows and by columns."""
    plan = {
        **dict.fromkeys(["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"], ColwiseParallel()),
        **dict.fromkeys(["self_attn.o_proj", "mlp.down_proj"], RowwiseParallel()),
    }

    def shard(model: Any) -> nn.Module:
        for layer in model.model.layers:
            parallelize_module(layer, mesh, plan)
        parallelize_module(model, mesh, {"model.embed_tokens": RowwiseParallel(), "lm_head": ColwiseParallel()})
        return model  # type: ignore[no-any-return]

    return shard


def placed(mesh: DeviceMesh, *placements: Any) -> World:
    """Every matrix a DTensor with these placements, however uneven its parts."""

    def shard(model: nn.Module) -> nn.Module:
        moved: dict[int, nn.Parameter] = {}  # tied weights stay tied
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dim() > max([0, *(p.dim for p in placements if isinstance(p, Shard))]):
                    if id(parameter) not in moved:
                        tensor = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
                        moved[id(parameter)] = nn.Parameter(tensor)
                    setattr(module, name, moved[id(parameter)])
        return model

    return shard


def worlds(size: int) -> dict[str, World]:
    """Ways to lay a model out over so many ranks."""
    line = init_device_mesh("cpu", (size,))
    found = {
        "fsdp": fsdp(line),
        "fsdp, offloaded": fsdp(line, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "tensor parallel": tensor_parallel(line),
        "rows": placed(line, Shard(0)),
        "columns": placed(line, Shard(1)),
        "replicas": placed(line, Replicate()),
    }
    if size == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        split, across = fsdp(grid["dp"]), tensor_parallel(grid["tp"])
        found |= {
            "hsdp": fsdp(grid),
            "fsdp x tensor parallel": lambda model: split(across(model)),
            "rows x columns": placed(grid, Shard(0), Shard(1)),
            "rows x rows": placed(grid, Shard(0), Shard(0)),
            "columns x rows": placed(grid, Shard(1), Shard(0)),
            "replicas x rows": placed(grid, Replicate(), Shard(0)),
        }
    return found


def build(family: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The same model on every rank."""
    torch.manual_seed(seed)
    family = family.removesuffix(", dora")
    return FAMILIES[family].build(vocab_size=97).to(dtype)  # type: ignore[return-value]


def layouts(seed: int, adapters: dict[str, list[str]]) -> None:
    """Every layout, each family's adapters: apply and remove, exactly; what is sent is a few numbers, no weights."""
    for layout, world in worlds(torch.distributed.get_world_size()).items():
        for family, paths in adapters.items():
            if "tensor parallel" in layout and not family.startswith("llama"):
                continue
            base = build(family, seed)
            truth = copy.deepcopy(base)
            portllm.apply(truth, paths)
            model = world(copy.deepcopy(base))
            kept = dict(model.named_parameters())
            memory = {name: _memory(p) for name, p in kept.items()}
            with Traffic() as traffic:
                portllm.apply(model, paths)
            # A number for each mesh dimension before the writes, and for each of DoRA's vectors that is cut, on two.
            vectors = sum(sum(p.shape[:-1]) for p in base.parameters() if p.dim() == 2) if "dora" in paths[0] else 0
            assert traffic.bytes <= 8 * (4 + 2 * vectors), (layout, family, traffic.bytes)
            loose = sums_depend_on_shapes(paths[0])
            assert_same(model, truth, to_rounding=loose)
            for name, parameter in model.named_parameters():
                assert parameter is kept[name]
                assert _memory(parameter) == memory[name]
            model = world(copy.deepcopy(base))
            if "dora" in paths[0] and traffic.bytes > 8 * 4:
                with pytest.raises(portllm.PlanError, match="DoRA needs the norms of whole vectors"):
                    portllm.apply(model, paths[0], undo="exact")
                assert_same(model, base)
                continue
            handle = portllm.apply(model, paths[0], undo="exact")
            other = portllm.apply(model, paths[-1], 0.5, undo="exact")
            handle.remove()
            truth = copy.deepcopy(base)
            portllm.apply(truth, paths[-1], 0.5)
            assert_same(model, truth, to_rounding=loose)
            other.remove()
            assert_same(model, base)


def _memory(tensor: Tensor) -> int:
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.untyped_storage().data_ptr()


def exact(seed: int, adapters: dict[str, list[str]]) -> None:
    """Swaps, banks and subtraction on a sharded model; state dicts of it as targets."""
    paths, loose = adapters["llama"], sums_depend_on_shapes("")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    base = build("llama", seed)
    model = fsdp(mesh)(copy.deepcopy(base))
    truths = [copy.deepcopy(base) for _ in paths]
    for truth, path in zip(truths, paths, strict=True):
        portllm.apply(truth, path)
    bank = portllm.PatchBank(model)
    for name, path in zip("ab", paths, strict=True):
        bank.add(name, path)
    for name, truth in [("a", truths[0]), ("b", truths[1]), ("a", truths[0])]:
        bank.use(name)
        assert_same(model, truth, to_rounding=loose)
    bank.use()
    assert_same(model, base)
    with portllm.applied(model, paths[0]) as handle:
        new = portllm.swap(model, handle, paths[1])
        assert_same(model, truths[1], to_rounding=loose)
        new.swap(handle)
        assert_same(model, truths[0], to_rounding=loose)
    assert_same(model, base)

    state = model.state_dict()
    portllm.apply(state, paths[0])
    assert_same(model, truths[0], to_rounding=loose)
    portllm.remove(model, paths[0])
    portllm.remove(truths[0], paths[0])
    assert_same(model, truths[0], to_rounding=loose)


def gathered(seed: int, adapters: dict[str, list[str]]) -> None:
    """Parameters that FSDP2 has gathered for a forward pass are copies: the patch must reach what they are made of."""
    path = adapters["llama"][0]
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    base = build("llama", seed, torch.float32)
    truth = copy.deepcopy(base)
    portllm.apply(truth, path)
    model = fsdp(mesh, reshard_after_forward=False)(copy.deepcopy(base))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        model(ids)
        assert not any(isinstance(p, DTensor) for p in model.model.layers[0].parameters())  # type: ignore[union-attr]
        portllm.apply(model, path)
        torch.testing.assert_close(model(ids).logits, truth(ids).logits)
        for layer in [*layers_of(model), model]:
            layer.reshard()  # type: ignore[operator]
    assert_same(model, truth, to_rounding=sums_depend_on_shapes(""))


def together(seed: int, adapters: dict[str, list[str]]) -> None:
    """What fails on one rank fails on all, before anything is written."""
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    base = build("llama", seed)
    model = fsdp(mesh)(copy.deepcopy(base))
    path = adapters["llama"][0]
    with pytest.raises(portllm.PortllmError, match="nothing here" if rank == 1 else "rank 1 cannot go on"):
        portllm.apply(model, "./nothing here" if rank == 1 else path)
    assert_same(model, base)
    handle = portllm.apply(model, path, undo="exact")
    weight: Any = model.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr,index]
    before = weight.to_local().detach().clone()
    if rank == 1:
        with torch.no_grad():
            weight.to_local().add_(1)
    with pytest.raises(portllm.PortllmError, match="written to" if rank == 1 else "rank 1 cannot go on"):
        handle.remove()
    with torch.no_grad():
        weight.to_local().copy_(before)
    handle.remove()
    assert_same(model, base)


def refusals(seed: int, adapters: dict[str, list[str]]) -> None:
    """What cannot be patched as it is laid out says so, and what to do."""
    path = adapters["llama"][0]
    base = build("llama", seed)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    partial = copy.deepcopy(base)
    weight = DTensor.from_local(partial.model.layers[0].mlp.up_proj.weight.detach(), mesh, [Partial()])  # type: ignore[union-attr,index]
    partial.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight)  # type: ignore[union-attr,index]
    with pytest.raises(portllm.PlanError, match=r"layers\.0\.mlp\.up_proj\.weight is a partial sum .* redistribute"):
        portllm.apply(partial, path)

    with pytest.raises(portllm.PlanError, match=r"proj\.weight is sharded, so rounding='auto' cannot tell"):
        portllm.apply(fsdp(mesh)(copy.deepcopy(base)), path, rounding="auto")

    tied = fsdp(mesh)(build("qwen3", seed))
    with pytest.raises(portllm.PlanError, match=r"lm_head\.weight is sharded and cannot be untied"):
        portllm.apply(tied, adapters["qwen3"][0], tied="untie")

    truth = copy.deepcopy(base)
    portllm.apply(truth, path)
    for use_orig_params in (False, True):
        flat = FullyShardedDataParallel(
            copy.deepcopy(base), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        with pytest.raises(portllm.PlanError, match=r"FSDP1.*fully_shard.*summon_full_params"):
            portllm.apply(flat, path)
        with FullyShardedDataParallel.summon_full_params(flat):
            portllm.apply(flat, path)
        with FullyShardedDataParallel.summon_full_params(flat):
            found = {name.removeprefix("_fsdp_wrapped_module."): p for name, p in flat.named_parameters()}
            assert all(torch.equal(found[name], p) for name, p in truth.named_parameters())
