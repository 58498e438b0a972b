"""Live targets: nn.Modules and state dicts, patched in place; parameters keep their identity and their memory."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from .bind import ExpertLayout, Options, Target, Tied, bind
from .errors import PlanError
from .execute import execute, hold_interrupts, prepare
from .patch import Patch
from .planning import Plan
from .quantised import find
from .rounding import Kind, Rounding, reader, survivals

if TYPE_CHECKING:
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
        quantised: of each quantised weight what ``survival`` says of it, measured as it was written.
    """

    target: Live
    plan: Plan
    backend: str = "auto"
    active: bool = True
    quantised: Mapping[str, float] = field(default_factory=dict)

    @property
    def survival(self) -> dict[str, float]:
        """For each weight, the share of what was added that is left after rounding: <W' - W, D> / ||D||^2.

        An estimate, computed now, from 16 rows of each weight as it is now, whose steps are those that it had before;
        of quantised weights what was measured.
        """
        live = live_target(self.target)
        return survivals(self.plan, live.weights, reader(live.tensors, live.aliases)) | dict(self.quantised)

    def remove(self) -> None:
        """Subtract what was added: each weight may end one rounding away from where it began (see undo="exact").

        Raises:
            PlanError: values were replaced, the patch has DoRA terms, or it was removed before; nothing has been
                written then.
        """
        if not self.active:
            raise PlanError("this patch has been removed already")
        execute(self.plan.negated(), live_target(self.target).tensors, backend=self.backend)
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
    rounding: Kind = "nearest",
    seed: int = 0,
    keep_zeros: bool = False,
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
    rounding: Kind = "nearest",
    seed: int = 0,
    keep_zeros: bool = False,
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
    rounding: Kind = "nearest",
    seed: int = 0,
    keep_zeros: bool = False,
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
        rounding: how sums become 16-bit weights: "nearest"; "stochastic", by chance, so that on average nothing is
            lost, however small the patch; "auto", for each weight what loses less (see ``portllm.rounding.Rounding``).
        seed: of the random bits. They depend on it and on the place in the model, not on how the model is stored.
        keep_zeros: weights that are 0 stay 0 (2:4 sparsity).
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
    how = Rounding(rounding, seed, keep_zeros)
    live, made = _bound(target, as_patches(patch, scale), Options(tied, expert_layout), strict)
    _check_live(made, live)
    made = _rounded(made, live, how)
    if undo != "subtract":
        return _exact(target, made, live, undo, verify, backend)
    if made.untie and not isinstance(target, nn.Module | MutableMapping):
        raise PlanError("tied='untie' needs a mapping that can be changed")
    clones = {alias: live.tensors[stored].detach().clone() for alias, stored in made.untie.items()}
    write = prepare(made, {**live.tensors, **clones}, backend=backend)
    with hold_interrupts():
        _untie(target, made.untie, clones)
        quantised = write()
    return Applied(target, made, backend, quantised=quantised)


def _exact(target: Live, made: Plan, live: Target, undo: Undo, verify: bool | str, backend: str) -> Exact:
    from .undo import Exact

    if undo not in ("exact", "later"):
        raise PlanError(f"undo={undo!r} must be 'subtract', 'exact' or 'later'")
    handle = Exact(target, made, live.tensors, backend)
    if undo == "exact":
        handle.put_on(verify=verify)
    return handle


def remove(target: Live, patch: Patches, scale: float = 1.0, **options: Any) -> None:
    """Subtract a patch that was applied with the same arguments, to rounding (see ``Applied.remove``).

    Args and errors as ``apply``; a patch that replaces values or has DoRA terms raises PlanError.
    """
    backend = options.pop("backend", "auto")
    strict = options.pop("strict", True)
    how = Rounding(options.pop("rounding", "nearest"), options.pop("seed", 0), options.pop("keep_zeros", False))
    live, made = _bound(target, as_patches(patch, scale), Options(**options), strict)
    if made.untie:
        raise PlanError(f"{min(made.untie)} is still tied, so no patch was applied with tied='untie'; leave it out")
    _check_live(made, live)
    execute(_rounded(made, live, how).negated(), live.tensors, backend=backend)


def plan(
    target: Live,
    patch: Patches,
    scale: float = 1.0,
    *,
    strict: bool = True,
    tied: Tied = "once",
    expert_layout: ExpertLayout | None = None,
    rounding: Kind = "nearest",
    seed: int = 0,
    keep_zeros: bool = False,
) -> Plan:
    """What ``apply`` would do, without doing it. Args and errors as ``apply``.

    Meta tensors are welcome; only rounding="auto" needs the values.
    """
    live, made = _bound(target, as_patches(patch, scale), Options(tied, expert_layout), strict)
    return _rounded(made, live, Rounding(rounding, seed, keep_zeros))


def _rounded(made: Plan, live: Target, how: Rounding) -> Plan:
    return how.settle(made, live.weights, reader(live.tensors, {**live.aliases, **made.untie}))


def _bound(target: Live, patches: list[tuple[Patch, float]], options: Options, strict: bool) -> tuple[Target, Plan]:
    live = live_target(target)
    made = bind(live, patches, options)
    made.check_complete(strict=strict)
    return live, made


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
        named: dict[str, Tensor] = dict(target.named_parameters(remove_duplicate=False))
        named.update(target.named_buffers(remove_duplicate=False))
        named.update(_beside_weights(target))
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
    found = find(tensors, tensors.__getitem__, _quantization_config(target))
    return Target(tensors, aliases, transposed, isinstance(target, nn.Module), found)


def _beside_weights(model: nn.Module) -> dict[str, Tensor]:
    """bitsandbytes keeps scales as attributes; they get the names that they have in its state dicts."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        name = f"{path}.weight" if path else "weight"
        if type(weight).__name__ == "Params4bit" and (state := getattr(weight, "quant_state", None)) is not None:
            found |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        elif type(weight).__name__ == "Int8Params":
            scales = getattr(weight, "SCB", None)
            scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
            if scales is not None:
                found[f"{name.removesuffix('.weight')}.SCB"] = scales
    return found


def _quantization_config(target: Live) -> Mapping[str, Any]:
    config: Any = getattr(getattr(target, "config", None), "quantization_config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return config if isinstance(config, Mapping) else {}


def _unknown(name: str) -> bool | None:
    return None


def _memory(tensor: Tensor) -> Any:
    if tensor.is_meta or tensor.numel() == 0 or _is_sharded(tensor):
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")  # DTensor, known without importing torch.distributed


def _conv1d_names(model: nn.Module) -> Callable[[str], bool | None]:
    """transformers' Conv1D (GPT-2) stores [in, out]; nn.Linear [out, in]. Known by class name, nothing imported."""
    kinds: dict[str, bool] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module).__name__ == "Conv1D":
            kinds[f"{name}.weight"] = True
        elif isinstance(module, nn.Linear):
            kinds[f"{name}.weight"] = False
    return kinds.get


def _check_live(plan: Plan, live: Target) -> None:
    """Raise PlanError for a weight that the plan changes, but that cannot be written in place."""
    for name in plan.stored:
        tensor = live.tensors[live.aliases.get(name, name)]
        if tensor.is_meta:
            raise PlanError(
                f"{name} is a meta tensor without data (offloaded, or never loaded); load it onto a device, "
                "or patch the checkpoint on disk with portllm.apply_checkpoint"
            )
        if _is_sharded(tensor):
            raise PlanError(
                f"{name} is a DTensor; sharded models cannot be patched live yet, patch the checkpoint instead"
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
