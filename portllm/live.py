"""Live targets: nn.Modules and state dicts, sharded or not, patched in place: parameters keep identity and memory."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from . import dtensor
from .bind import ExpertLayout, Options, Target, Tied, bind
from .dtensor import Here, together
from .errors import PlanError
from .execute import hold_interrupts, prepare
from .patch import Patch
from .planning import Plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .layouts import Layout
    from .undo import Exact

Source = Patch | str | os.PathLike[str]
Patches = Source | Sequence[Source | tuple[Source, float]]
Live = nn.Module | Mapping[str, Tensor]
Undo = Literal["subtract", "exact", "later"]


@dataclass
class Applied:
    """A patch, or several, on a live target.

    Attributes:
        target: the module or state dict that was patched.
        plan: what was written.
        backend: as asked for.
        active: false once removed.
    """

    target: Live
    plan: Plan
    backend: str = "auto"
    active: bool = True

    def remove(self) -> None:
        """Subtract what was added: each weight may end one rounding away from where it began (see undo="exact").

        Raises:
            PlanError: values were replaced, the patch has DoRA terms, or it was removed before; nothing has been
                written then.
        """
        if not self.active:
            raise PlanError("this patch has been removed already")
        tensors = live_target(self.target).tensors
        with together(dtensor.meshes(tensors.values())):
            write = prepare(self.plan.negated(), dtensor.local_tensors(tensors), backend=self.backend)
        write()
        self.active = False


@overload
def apply(
    target: Live,
    patch: Patches,
    scale: float = 1.0,
    *,
    undo: Literal["exact", "later"],
    verify: bool | str = True,
    strict: bool = True,
    tied: Tied = "once",
    expert_layout: ExpertLayout | None = None,
    layout: Layout | None = None,
    backend: str = "auto",
) -> Exact: ...


@overload
def apply(
    target: Live,
    patch: Patches,
    scale: float = 1.0,
    *,
    undo: Literal["subtract"] = "subtract",
    verify: bool | str = True,
    strict: bool = True,
    tied: Tied = "once",
    expert_layout: ExpertLayout | None = None,
    layout: Layout | None = None,
    backend: str = "auto",
) -> Applied: ...


def apply(
    target: Live,
    patch: Patches,
    scale: float = 1.0,
    *,
    undo: Undo = "subtract",
    verify: bool | str = True,
    strict: bool = True,
    tied: Tied = "once",
    expert_layout: ExpertLayout | None = None,
    layout: Layout | None = None,
    backend: str = "auto",
) -> Applied:
    """Add a patch, or several in one pass, to a live model, in place: ``W <- round(W + sum_i s_i B_i A_i)``.

    Args:
        target: a module (also spread over devices), or a mapping of names to tensors.
        patch: a Patch, an adapter directory or hub id, or a list of them or of ``(patch, weight)`` pairs.
        scale: strength, times each pair's own weight. For DoRA and for replaced tensors it is the share of the
            way from the old values to the new ones.
        undo: how ``remove()`` works. "subtract" takes off what was added, to rounding, and needs no memory; "exact"
            brings back every bit, with about 0.1 bits a weight for a patch of 1 % of the weights (more for larger
            ones; a copy for replaced values and DoRA), and stacks: see ``portllm.undo.Exact``. "later" is "exact"
            without applying the patch yet: see ``Exact.put_on`` and ``Exact.swap``.
        verify: with undo="exact", compare samples of each weight with what the last patch left, before anything is
            written; "full": all of each weight from now on, which takes a hash of every bit.
        strict: a patch that matches only partly is an error (one that matches nothing always is).
        tied: "once" patches a tied weight once, under whichever name the patch speaks of it; "untie" gives each
            of its names a tensor of its own first.
        expert_layout: "out_in" or "in_out", only where stacked experts' matrices are square.
        layout: the target is one rank's part of a model, as a serving engine fuses and shards it: see
            ``portllm.layouts``.
        backend: see ``portllm.ops.backend_for``.

    Returns:
        A handle with the plan, and ``remove()``.

    Raises:
        PatchError: the patch cannot be read.
        PlanError: it does not fit: names, shapes, ties, meta or quantised weights.
        BackendError: the backend is not available.
        RecordError: with undo="exact", weights that have patches on them were written to since.
        All before the first weight is touched. An interrupt during the writes is delivered after the last one.
    """
    live = live_target(target)
    on = dtensor.meshes(live.tensors.values())
    with together(on):
        made = _bound(live, as_patches(patch, scale), Options(tied, expert_layout), strict, layout)
        _check_live(made)
        if undo != "subtract":
            handle = _exact(target, made, undo, backend, on)
        else:
            untie = made.plan.untie
            if untie and not isinstance(target, nn.Module | MutableMapping):
                raise PlanError("tied='untie' needs a mapping that can be changed")
            clones = {alias: made.tensors[stored].detach().clone() for alias, stored in untie.items()}
            write = prepare(made.plan, {**made.tensors, **clones}, backend=backend, reduce=made.reduce)
    if undo == "exact":
        handle.put_on(verify=verify)
    if undo != "subtract":
        return handle
    with hold_interrupts():
        _untie(target, untie, clones)
        write()
    return Applied(target, made.plan, backend)


def _exact(target: Live, made: Here, undo: Undo, backend: str, on: Sequence[DeviceMesh]) -> Exact:
    from .undo import Exact

    if undo not in ("exact", "later"):
        raise PlanError(f"undo={undo!r} must be 'subtract', 'exact' or 'later'")
    return Exact(target, made.plan, made.tensors, backend, on)


def remove(target: Live, patch: Patches, scale: float = 1.0, **options: Any) -> None:
    """Subtract a patch that was applied with the same arguments, to rounding (see ``Applied.remove``).

    Args and errors as ``apply``; a patch that replaces values or has DoRA terms raises PlanError.
    """
    backend = options.pop("backend", "auto")
    strict, layout = options.pop("strict", True), options.pop("layout", None)
    live = live_target(target)
    with together(dtensor.meshes(live.tensors.values())):
        made = _bound(live, as_patches(patch, scale), Options(**options), strict, layout)
        if untie := made.plan.untie:
            raise PlanError(f"{min(untie)} is still tied, so no patch was applied with tied='untie'; leave it out")
        _check_live(made)
        write = prepare(made.plan.negated(), made.tensors, backend=backend)
    write()


def plan(
    target: Live,
    patch: Patches,
    scale: float = 1.0,
    *,
    strict: bool = True,
    tied: Tied = "once",
    expert_layout: ExpertLayout | None = None,
    layout: Layout | None = None,
) -> Plan:
    """What ``apply`` would do, without doing it; meta tensors are welcome. Args and errors as ``apply``."""
    return _bound(live_target(target), as_patches(patch, scale), Options(tied, expert_layout), strict, layout).plan


def _bound(
    live: Target, patches: list[tuple[Patch, float]], options: Options, strict: bool, layout: Layout | None
) -> Here:
    if layout is not None:
        made = layout.bind(live, patches, options, strict=strict)
    else:
        made = bind(live, patches, options)
        made.check_complete(strict=strict)
    return dtensor.here(made, live.tensors)


def as_patches(patch: Patches, scale: float = 1.0) -> list[tuple[Patch, float]]:
    """Bring what ``apply`` takes to a list of (Patch, strength); reads directories. Raises PatchError."""
    items = [patch] if isinstance(patch, Patch | str | os.PathLike) else list(patch)
    pairs = []
    for item in items:
        source, weight = item if isinstance(item, tuple) else (item, 1.0)
        loaded = source if isinstance(source, Patch) else Patch.load(source)
        strength = float(weight) * float(scale)
        if not math.isfinite(strength):
            raise PlanError(f"{loaded.name}: the strength {strength} must be finite")
        pairs.append((loaded, strength))
    if not pairs:
        raise PlanError("no patch was given")
    return pairs


def live_target(target: Live) -> Target:
    """Look at a module or mapping: its tensors, each memory once, the other names of tied ones."""
    if isinstance(target, nn.Module):
        dtensor.settle(target)
        named: dict[str, Tensor] = dict(target.named_parameters(remove_duplicate=False))
        named.update(target.named_buffers(remove_duplicate=False))
        transposed = _conv1d_names(target)
    elif isinstance(target, Mapping):
        named = {str(name): tensor for name, tensor in target.items() if isinstance(tensor, Tensor)}
        transposed = _unknown
    else:
        raise PlanError(f"cannot patch a {type(target).__name__}; give an nn.Module or a mapping of names to tensors")
    if any(".lora_A." in name for name in named):
        raise PlanError("the model still carries PEFT adapter layers; unload them first: model = model.unload()")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in named.items():
        first = seen.setdefault(_memory(tensor), name)
        if first == name:
            tensors[name] = tensor
        else:
            aliases[name] = first
    return Target(tensors, aliases, transposed, declared=isinstance(target, nn.Module))


def _unknown(name: str) -> bool | None:
    return None


def _memory(tensor: Tensor) -> Any:
    here = dtensor.local(tensor)
    if here.is_meta or here.numel() == 0:
        return id(tensor)
    return here.device, here.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _conv1d_names(model: nn.Module) -> Callable[[str], bool | None]:
    """transformers' Conv1D (GPT-2) stores [in, out]; nn.Linear [out, in]. Known by class name, nothing imported."""
    kinds: dict[str, bool] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module).__name__ == "Conv1D":
            kinds[f"{name}.weight"] = True
        elif isinstance(module, nn.Linear):
            kinds[f"{name}.weight"] = False
    return kinds.get


def _check_live(made: Here) -> None:
    """Raise PlanError for a weight that the plan changes, but that cannot be written in place."""
    for name in made.plan.tensors:
        tensor = made.tensors[made.plan.untie.get(name, name)]
        if tensor.is_meta:
            raise PlanError(
                f"{name} is a meta tensor without data (offloaded, or never loaded); load it onto a device, "
                "or patch the checkpoint on disk with portllm.apply_checkpoint"
            )
        if 0 in tensor.stride() and tensor.numel() > 1:
            raise PlanError(f"{name} is an expanded tensor whose elements share memory; make it contiguous first")


def _untie(target: Live, names: Mapping[str, str], clones: Mapping[str, Tensor]) -> None:
    """Give each tied name its clone as a tensor of its own; the stored name keeps its memory."""
    if isinstance(target, MutableMapping):
        target.update(clones)
    if not isinstance(target, nn.Module) or not names:
        return
    for alias, stored in names.items():
        path, _, attribute = alias.rpartition(".")
        owner, tensor = target.get_submodule(path), target.get_parameter(stored)
        if owner is target.get_submodule(stored.rpartition(".")[0]):
            # The module itself is shared, not only its weight: part the modules first.
            owner = copy.copy(owner)
            owner._parameters = dict(owner._parameters)
            parent, _, child = path.rpartition(".")
            setattr(target.get_submodule(parent), child, owner)
        owner.register_parameter(attribute, nn.Parameter(clones[alias], requires_grad=tensor.requires_grad))
    config = getattr(target, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
