"""Algebra of patches: several in one (LoRA Recycle), scaled, negated, truncated, cast. Patches in, a Patch out.

The delta of a patch on one module is ``s * lora_B @ lora_A``; all that follows is arithmetic on deltas, not on the
factors, which are not unique: (B T, T^-1 A) is the same patch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .config import AdapterConfig, fits_fp32, ranks_and_alphas, written_alpha
from .errors import PatchError, UnsupportedPatchError
from .fingerprint import METADATA_KEY, Fingerprint
from .live import Source, as_patches
from .lowrank import Blocks, leading_blocks, nth_magnitude, recompress
from .naming import VOCABULARY_LAYERS
from .patch import KEY_PREFIX, BiasEntry, ExpertEntry, LoraEntry, Patch, ReplaceEntry, RowsEntry, replaced_tensors
from .reference import FLOAT_DTYPES, ieee_matmul, row_blocks

Method = Literal["concat", "svd", "ties", "dare", "dare_ties"]
MajoritySign = Literal["total", "frequency"]

COMBINED_KEY = "portllm.combined"
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Combined:
    """How a combined patch was made; kept as JSON in its metadata under ``portllm.combined``.

    Attributes:
        method: as ``combine``.
        patches: name and weight of each.
        errors: for each recompressed module, the share of the delta's Frobenius norm that was left off (before the
            factors are rounded to their dtype); empty for "concat", which leaves nothing off.
        warnings: what a user should know, one line each.
    """

    method: str
    patches: tuple[tuple[str, float], ...]
    errors: Mapping[str, float]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Compact JSON."""
        return json.dumps({"version": 1, **vars(self)}, separators=(",", ":"))

    @classmethod
    def from_patch(cls, patch: Patch) -> Combined | None:
        """The record in a patch's metadata, or None; raises PatchError if it is garbled."""
        return patch.record(
            COMBINED_KEY,
            lambda raw: cls(
                str(raw["method"]),
                tuple((str(name), float(weight)) for name, weight in raw["patches"]),
                {str(module): float(error) for module, error in raw["errors"].items()},
                tuple(str(warning) for warning in raw["warnings"]),
            ),
            f"{COMBINED_KEY} in its metadata",
        )


def combine(
    patches: Source | Sequence[Source | tuple[Source, float]],
    *,
    method: Method = "concat",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign: MajoritySign = "total",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Patch:
    """Make one patch of several, which PEFT and vLLM load as any other.

    The delta of a module [out, in] is made of those of the patches that have it, D_i = w_i s_i B_i A_i:

    - "concat": sum_i D_i, by stacking the factors; the rank is the sum of the ranks. The largest |w_i s_i| becomes
      the module's scaling (through lora_alpha and alpha_pattern), and the others' share of it, at most 1, goes into
      their lora_B: so what need not be multiplied is kept bit for bit, and 16-bit factors stay 16-bit where that is
      exact (equal weights, differences of patches, powers of two); else the module's factors become fp32, where
      the share costs one rounding. One patch alone keeps its factors whatever its weight: only its alphas change.
    - "svd": the best approximation of sum_i D_i of at most ``rank``, from the SVD of the stacked factors' triangular
      parts (QR of lora_B and of lora_A^T) in fp64: O((out + in) R^2), no delta is formed.
    - "ties": TIES-Merging (arXiv 2306.01708, algorithm 1): of each D_i keep the ``density`` largest magnitudes,
      elect for each element the sign with the larger sum, and average what agrees with it.
    - "dare": DARE (arXiv 2311.03099, eq. 3): drop each element of D_i with probability 1 - density, divide the rest
      by density, and add. "dare_ties": the same, then elect and average as "ties".

    "ties" and "dare" work on the deltas, as the papers define them, and as PEFT's ``ties_svd``, ``dare_linear_svd``
    and ``dare_ties_svd`` do. (PEFT's ``ties`` and ``dare_linear`` treat lora_A and lora_B each for itself: the
    product of two such sums has cross terms B_i A_j, and depends on how a patch happens to be factored.) The weight
    is part of D_i, so that the sign is elected among what is added, also with a negative weight; PEFT elects before
    weighting. Where no sign wins, nothing is added; PEFT takes the positive one. The result is no longer of low
    rank: it is recompressed to ``rank``, near the best, in blocks of rows and a few passes of subspace iteration
    (Halko et al., arXiv 0909.4061, section 4.5) in fp32. What that leaves off is mostly what trimming or dropping
    put in, and can be much: see the errors.

    The result's factors are balanced (the root of the singular values on either side) unless stacked, lora_bias is
    combined as one more column, and tensors that replace (modules_to_save, biases, saved vocabularies, trained
    tokens) are taken over if they are of one patch alone, or the same bit for bit in all that have them, and of
    weight 1. ``portllm.base`` in the metadata is kept if the patches agree on the base. ``Combined.from_patch``
    gives the weights, the error of each module and the warnings.

    Args:
        patches: Patches, adapter directories or hub ids, or ``(patch, weight)`` pairs.
        method: "concat", "svd", "ties", "dare" or "dare_ties".
        rank: at most, for each module; by default the sum of the ranks, and "svd" drops what is zero.
        energy: in (0, 1]: the smallest rank that keeps this share of the delta's squared Frobenius norm.
        density: in (0, 1], what "ties" and "dare" keep; needed there (the papers use 0.2 and 0.1).
        majority_sign: "total" weighs the signs by magnitude, "frequency" counts them.
        seed: of "dare"; with it and the order of the patches, the same elements are dropped each time.
        dtype: round every tensor of the result to this one; by default "concat" is as above, the others fp32 (fp64
            where a factor is fp64).

    Raises:
        PatchError: an argument out of its range, patches whose shapes or settings conflict, an overflow.
        UnsupportedPatchError: DoRA, stacked experts, or replaced tensors that cannot be added up.
        PlanError: no patch, or a weight that is not finite.
        All before any work, but for an overflow.
    """
    recipe = _Recipe(method, rank, energy, density, majority_sign, seed)
    _check_dtype(dtype)
    pairs = as_patches(patches)
    errors: dict[str, float] = {}
    warnings: tuple[str, ...] = ()
    if method == "concat" and len(pairs) == 1:
        made = scale(*pairs[0])
    else:
        modules = _modules(pairs)
        replaced = _replaced(pairs, modules)
        settings = _shared_settings(pairs, modules)
        metadata, warnings = _shared_metadata([patch for patch, _ in pairs])
        with torch.no_grad(), ieee_matmul():
            results = {module: recipe.merge(parts) for module, parts in modules.items()}
        errors = {module: r.error for module, r in results.items() if r.error is not None}
        tensors = {key: t for module, r in results.items() for key, t in r.tensors(module, modules[module][0].entry)}
        made = Patch.from_tensors(
            tensors | replaced,
            settings | ranks_and_alphas({module: (r.rank, r.scaling) for module, r in results.items()}),
            name=" + ".join(f"{patch.name}@{weight:g}" for patch, weight in pairs),
            metadata=metadata,
        )
    record = Combined(method, tuple((patch.name, weight) for patch, weight in pairs), errors, warnings)
    made = made.with_metadata(**{COMBINED_KEY: record.to_json()})
    return made if dtype is None else cast(made, dtype)


def scale(patch: Source, factor: float) -> Patch:
    """The patch that adds ``factor`` times as much: only lora_alpha and alpha_pattern change, no tensor does.

    Raises:
        PatchError: the patch cannot be read, or an alpha overflows fp32.
        UnsupportedPatchError: the patch has DoRA or replaces tensors, and the factor is not 1.
        PlanError: the factor is not finite.
    """
    [(loaded, factor)] = as_patches(patch, factor)
    if factor == 1.0:
        return loaded
    for entry in loaded.entries:
        _refuse_dora(loaded, entry)
        _refuse_replacing(loaded, entry, factor)
    config = loaded.config
    for alpha in (config.lora_alpha, *config.alpha_pattern.values()):
        if not fits_fp32(alpha * factor):
            raise PatchError(f"{loaded.name}: alpha {alpha:g} times {factor:g} overflows fp32")
    alpha = written_alpha(config.lora_alpha * factor)
    pattern = {key: written_alpha(value * factor) for key, value in config.alpha_pattern.items()}
    raw = {**config.raw, "lora_alpha": alpha, "alpha_pattern": pattern}
    changed = replace(config, raw=raw, lora_alpha=float(alpha), alpha_pattern=pattern)
    return Patch.from_tensors(loaded.tensors, changed, name=loaded.name, metadata=loaded.metadata)


def negate(patch: Source) -> Patch:
    """The patch that takes off what this one adds: ``scale(patch, -1)``; raises as ``scale``."""
    return scale(patch, -1.0)


def truncate(patch: Source, *, rank: int | None = None, energy: float | None = None) -> Patch:
    """The best approximation of each module's delta of at most ``rank``, or that keeps the share ``energy`` of it.

    The optimum in the Frobenius norm (Eckart and Young, 1936); see ``combine(method="svd")`` for how, for the
    arguments and for the errors raised. PatchError if neither rank nor energy is given.
    """
    if rank is None and energy is None:
        raise PatchError("say what to truncate to: rank=, energy=, or both")
    return combine([patch], method="svd", rank=rank, energy=energy)


def cast(patch: Source, dtype: torch.dtype) -> Patch:
    """The patch with every tensor rounded to nearest in ``dtype``: float16, bfloat16, float32 or float64.

    Raises:
        PatchError: another dtype, or a value that overflows.
    """
    _check_dtype(dtype)
    [(loaded, _)] = as_patches(patch)
    tensors = {key: tensor.detach().to(dtype) for key, tensor in loaded.tensors.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PatchError(f"{loaded.name}: tensor {key} overflows {dtype}; bfloat16 reaches as far as float32")
    return Patch.from_tensors(tensors, loaded.config, name=loaded.name, metadata=loaded.metadata)


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise PatchError(f"dtype {dtype} must be float64, float32, float16 or bfloat16")


# -- one module ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """What one patch adds to one module: ``weight * lora_B @ lora_A``, and ``weight * bias`` to its bias.

    Attributes:
        patch: whose it is, for messages.
        index: of the patch among all, so that each drops elements of its own.
        entry: the factors.
        weight: w_i s_i.
        bias: lora_bias [out], or None.
    """

    patch: Patch
    index: int
    entry: LoraEntry
    weight: float
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in], for a convolution [out, in, *kernel]."""
        return self.entry.lora_B.shape[0], *self.entry.lora_A.shape[1:]

    @property
    def bias_column(self) -> _Part:
        """The bias as factors of a matrix [out, 1]."""
        assert self.bias is not None
        column = self.bias.unsqueeze(1)
        return replace(self, entry=replace(self.entry, lora_A=torch.ones_like(column[:1]), lora_B=column), bias=None)


@dataclass(frozen=True)
class _Result:
    """The combined module: lora_A [r, in...] and lora_B [out, r] of one dtype, lora_bias [out], what was left off."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    bias: Tensor | None
    error: float | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def tensors(self, module: str, like: LoraEntry) -> Iterator[tuple[str, Tensor]]:
        """As PEFT names and shapes them."""
        if like.kind == "embedding":
            yield f"{KEY_PREFIX}{module}.lora_embedding_A", self.lora_B.T
            yield f"{KEY_PREFIX}{module}.lora_embedding_B", self.lora_A.T
            return
        kernel = like.lora_A.shape[2:]
        yield f"{KEY_PREFIX}{module}.lora_A.weight", self.lora_A.reshape(self.rank, *like.lora_A.shape[1:])
        yield f"{KEY_PREFIX}{module}.lora_B.weight", self.lora_B.reshape(*self.lora_B.shape, *(1 for _ in kernel))
        if self.bias is not None:
            yield f"{KEY_PREFIX}{module}.lora_B.bias", self.bias


@dataclass(frozen=True)
class _Recipe:
    """The arguments of ``combine``, checked; PatchError names the one that is out of its range."""

    method: Method
    rank: int | None
    energy: float | None
    density: float | None
    majority_sign: MajoritySign
    seed: int

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise PatchError(f"method={self.method!r} must be one of {', '.join(get_args(Method))}")
        if self.majority_sign not in get_args(MajoritySign):
            raise PatchError(f"majority_sign={self.majority_sign!r} must be 'total' or 'frequency'")
        if self.rank is not None and (not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1):
            raise PatchError(f"rank={self.rank!r} must be a positive integer")
        for name, share in (("energy", self.energy), ("density", self.density)):
            if share is not None and not 0 < share <= 1:
                raise PatchError(f"{name}={share!r} must be in (0, 1]")
        if self.method == "concat" and (self.rank is not None or self.energy is not None):
            raise PatchError("concat keeps every rank; rank and energy need method='svd', 'ties' or 'dare'")
        if self.sparse and self.density is None:
            raise PatchError(f"method={self.method!r} needs density, the share of elements to keep, such as 0.2")
        if self.density is not None and not self.sparse:
            raise PatchError(f"method={self.method!r} keeps every element; density is for 'ties' and 'dare'")

    @property
    def sparse(self) -> bool:
        return self.method in ("ties", "dare", "dare_ties")

    def merge(self, parts: Sequence[_Part]) -> _Result:
        """One module of all patches that have it."""
        biases = [part.bias_column for part in parts if part.bias is not None]
        if self.method == "concat":
            return _concat(parts, biases)
        dtype = _at_least_fp32(parts)
        if self.sparse:
            rows, columns = _matrix(parts[0])
            rank = min(self.rank or sum(part.entry.lora_A.shape[0] for part in parts), rows, columns)
            random = _generator(self.seed, _stream(parts[0]), "subspace")
            factors = leading_blocks(self._blocks(parts), columns, rank, self.energy, random)
            bias = torch.cat(list(self._blocks(biases)())) if biases else None
        else:
            lora_B, lora_A = _stack(parts, lambda part: part.weight)
            factors = recompress(lora_B, lora_A, self.rank, self.energy, torch.finfo(dtype).eps)
            bias = _sum(biases, lambda part: part.weight) if biases else None
        bias = None if bias is None else bias.flatten().to(dtype)
        return _Result(factors.lora_A.to(dtype), factors.lora_B.to(dtype), 1.0, bias, factors.error)

    def _blocks(self, parts: Sequence[_Part]) -> Blocks:
        """The delta that "ties" or "dare" makes of the patches' deltas; fp32, in blocks of rows."""
        density = self.density or 1.0
        rows, columns = _matrix(parts[0])
        factors = [tuple(f.float() for f in _stack([part], lambda part: part.weight)) for part in parts]
        deltas = [
            lambda B=B, A=A: (B[block] @ A for block in row_blocks(rows, columns))
            for B, A in factors
        ]  # fmt: skip
        thresholds = [0.0] * len(parts)
        if self.method == "ties" and density < 1:
            thresholds = [nth_magnitude(delta, max(1, int(density * rows * columns))) for delta in deltas]

        def sparse(delta: Tensor, threshold: float, random: torch.Generator) -> Tensor:
            if density == 1:
                return delta
            if self.method == "ties":
                return delta * (delta.abs() >= threshold)
            # On the CPU, so that a seed means the same on each device.
            return delta * (torch.rand(delta.shape, generator=random) < density).to(delta.device) / density

        def blocks() -> Iterator[Tensor]:
            randoms = [_generator(self.seed, _stream(part), part.index, rows, columns) for part in parts]
            for each in zip(*(delta() for delta in deltas), strict=True):
                kept = torch.stack([sparse(*args) for args in zip(each, thresholds, randoms, strict=True)])
                yield kept.sum(0) if self.method == "dare" else _elect(kept, self.majority_sign)

        return blocks


def _concat(parts: Sequence[_Part], biases: Sequence[_Part]) -> _Result:
    """Stacked factors; the largest scaling is left outside, so that what is multiplied in is at most 1."""
    scaling = max(abs(part.weight) for part in parts)

    def share(part: _Part) -> float:
        return part.weight / scaling if scaling else 1.0

    lora_B, lora_A = _stack(parts, share)
    wide = [lora_A, lora_B]
    if biases:
        wide.append(_sum(biases, share).flatten())
    kept = [*parts, *biases]
    dtype = reduce(torch.promote_types, (t.dtype for p in kept for t in (p.entry.lora_A, p.entry.lora_B)))
    if not all(torch.equal(tensor.to(dtype).double(), tensor) for tensor in wide):
        dtype = _at_least_fp32(kept)
    lora_A, lora_B, *bias = (tensor.to(dtype) for tensor in wide)
    return _Result(lora_A, lora_B, scaling, bias[0] if bias else None)


def _stack(parts: Sequence[_Part], weight: Callable[[_Part], float]) -> tuple[Tensor, Tensor]:
    """lora_B [m, R], each with its weight, and lora_A [R, n] of all parts; fp64."""
    lora_B = [part.entry.lora_B.double() * weight(part) for part in parts]
    lora_A = [part.entry.lora_A.double().flatten(1) for part in parts]
    return torch.cat(lora_B, dim=1), torch.cat(lora_A)


def _sum(columns: Sequence[_Part], weight: Callable[[_Part], float]) -> Tensor:
    """The weighted sum of bias columns, fp64."""
    return _stack(columns, weight)[0].sum(1)


def _matrix(part: _Part) -> tuple[int, int]:
    """The delta's shape, a convolution's kernel flattened."""
    return part.shape[0], math.prod(part.shape[1:])


def _at_least_fp32(parts: Sequence[_Part]) -> torch.dtype:
    dtypes = (t.dtype for part in parts for t in (part.entry.lora_A, part.entry.lora_B))
    return reduce(torch.promote_types, dtypes, torch.float32)


def _elect(deltas: Tensor, majority_sign: MajoritySign) -> Tensor:
    """TIES' election and disjoint mean of [patches, m, n]: the mean of the elements whose sign wins."""
    signs = deltas.sign()
    elected = (deltas if majority_sign == "total" else signs).sum(0).sign()
    agrees = signs == elected
    return (deltas * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _stream(part: _Part) -> str:
    """Whose random numbers a module gets: twins of one tied weight must stay the same in every bit."""
    tied = part.patch.config.ensure_weight_tying and VOCABULARY_LAYERS.match(part.entry.module)
    return "vocabulary" if tied else part.entry.module


# -- all modules: what is refused, settings and metadata -------------------------------------------------------------


def _modules(pairs: Sequence[tuple[Patch, float]]) -> dict[str, list[_Part]]:
    """The parts of each module; refuses what does not add up."""
    modules: dict[str, list[_Part]] = {}
    for index, (patch, weight) in enumerate(pairs):
        biases = {entry.module: entry.value for entry in patch.entries if isinstance(entry, BiasEntry)}
        for entry in patch.entries:
            _refuse_dora(patch, entry)
            _refuse_replacing(patch, entry, weight)
            if isinstance(entry, ExpertEntry):
                raise UnsupportedPatchError(
                    f"{patch.name}: module {entry.module} has stacked experts (target_parameters), whose factors "
                    f"cannot be combined yet; {_TOGETHER}"
                )
            if not isinstance(entry, LoraEntry):
                continue
            parts = modules.setdefault(entry.module, [])
            device = (parts[0].entry if parts else entry).lora_A.device
            entry = replace(entry, lora_A=entry.lora_A.to(device), lora_B=entry.lora_B.to(device))
            bias = biases[entry.module].to(device) if entry.module in biases else None
            part = _Part(patch, index, entry, weight * entry.scaling, bias)
            if not fits_fp32(part.weight):
                raise PatchError(f"{patch.name}: module {entry.module}: scaling {part.weight} overflows fp32")
            parts.append(part)
            first = parts[0]
            if (first.entry.kind, first.shape) != (entry.kind, part.shape):
                raise PatchError(
                    f"module {entry.module} is {first.entry.kind} {list(first.shape)} in {first.patch.name}, but "
                    f"{entry.kind} {list(part.shape)} in {patch.name}; are they patches for one model?"
                )
    with_bias = {module for module, parts in modules.items() if any(part.bias is not None for part in parts)}
    for module in sorted(modules.keys() - with_bias) if with_bias else ():
        raise UnsupportedPatchError(
            f"{modules[module][0].patch.name}: module {module} has no lora_bias, but {min(with_bias)} has, and PEFT "
            f"knows lora_bias for all modules of a patch or none; {_TOGETHER}"
        )
    return modules


_TOGETHER = "apply the patches together instead: portllm.apply(model, [(a, 0.5), (b, 0.5)])"


def _refuse_dora(patch: Patch, entry: object) -> None:
    if isinstance(entry, LoraEntry) and entry.magnitude is not None:
        raise UnsupportedPatchError(
            f"{patch.name}: module {entry.module} has DoRA magnitudes (use_dora), which depend on the weight and do "
            f"not add up; {_TOGETHER}"
        )


def _refuse_replacing(patch: Patch, entry: object, weight: float) -> None:
    if isinstance(entry, ReplaceEntry | RowsEntry) and weight != 1.0:
        why = entry.reason if isinstance(entry, ReplaceEntry) else "trainable_token_indices"
        raise UnsupportedPatchError(
            f"{patch.name}: {_replaces(entry)} replaces the model's own values ({why}), which cannot be multiplied by "
            f"{weight:g}; leave it out of the adapter, or {_TOGETHER}"
        )


def _replaces(entry: ReplaceEntry | RowsEntry) -> str:
    return entry.name if isinstance(entry, ReplaceEntry) else f"{entry.module}.weight"


def _replaced(pairs: Sequence[tuple[Patch, float]], modules: Mapping[str, Sequence[_Part]]) -> dict[str, Tensor]:
    """The tensors that replace, by PEFT's keys; refuses two for one place, and factors of another patch on it."""
    owners: dict[str, tuple[Patch, ReplaceEntry | RowsEntry]] = {}
    tensors: dict[str, Tensor] = {}
    for patch, _ in pairs:
        for entry in patch.entries:
            if not isinstance(entry, ReplaceEntry | RowsEntry):
                continue
            name = _replaces(entry)
            other, twin = owners.setdefault(name, (patch, entry))
            if other is not patch and not _same_replacement(twin, entry):
                raise UnsupportedPatchError(
                    f"{other.name} and {patch.name} both replace {name}, with different values; keep one of them"
                )
            # PEFT names a layer's tensors by whether the layer has factors, and only the patch itself did so rightly.
            parts = modules.get(name.rpartition(".")[0], ())
            if parts and all(part.patch is not patch for part in parts):
                raise UnsupportedPatchError(
                    f"{patch.name} replaces {name}, but {parts[0].patch.name} has factors for it; {_TOGETHER}"
                )
        tensors |= replaced_tensors(patch)
    return tensors


def _same_replacement(a: ReplaceEntry | RowsEntry, b: ReplaceEntry | RowsEntry) -> bool:
    if not isinstance(a, ReplaceEntry) or not isinstance(b, ReplaceEntry):
        return False
    return a.value.dtype == b.value.dtype and torch.equal(a.value, b.value)


def _shared_settings(pairs: Sequence[tuple[Patch, float]], modules: Mapping[str, Sequence[_Part]]) -> dict[str, Any]:
    """The settings but for ranks and alphas; refuses those that conflict."""
    patches = [patch for patch, _ in pairs]
    configs = [patch.config for patch in patches]
    with_vocabulary = [p for p in patches if any(VOCABULARY_LAYERS.match(getattr(e, "module", "")) for e in p.entries)]
    tokens = [p for p in patches if p.config.trainable_token_indices]
    if len(tokens) > 1:
        raise UnsupportedPatchError(
            f"{tokens[0].name} and {tokens[1].name} both have trainable_token_indices; keep one of them"
        )
    biases = sorted({c.bias for c in configs if c.bias != "none"})
    saved = sorted({name for config in configs for name in config.modules_to_save})
    for module in modules:
        if any(config.saves_module(module) for config in configs):
            raise UnsupportedPatchError(
                f"{modules[module][0].patch.name} has factors for module {module}, which modules_to_save of another "
                f"patch replaces; {_TOGETHER}"
            )
    settings = {
        "peft_type": "LORA",
        **{key: _shared_raw(configs, key) for key in ("task_type", "auto_mapping", "revision", "peft_version")},
        "base_model_name_or_path": _shared_raw(configs, "base_model_name_or_path"),
        "inference_mode": True,
        "fan_in_fan_out": _agreed(patches, "fan_in_fan_out"),
        "ensure_weight_tying": _agreed(with_vocabulary, "ensure_weight_tying"),
        "lora_bias": any(part.bias is not None for parts in modules.values() for part in parts),
        "bias": "none" if not biases else biases[0] if len(biases) == 1 else "all",
        "modules_to_save": saved or None,
        "trainable_token_indices": tokens[0].config.raw["trainable_token_indices"] if tokens else None,
        **_selection(configs, modules),
    }
    # Older readers do not know every setting: only what is not the default is written.
    return {key: value for key, value in settings.items() if value not in (None, False)}


def _shared_raw(configs: Sequence[AdapterConfig], key: str) -> Any:
    """A setting that all share, else None."""
    first = configs[0].raw.get(key)
    return first if all(config.raw.get(key) == first for config in configs) else None


def _agreed(patches: Sequence[Patch], setting: str) -> bool:
    values = {getattr(patch.config, setting): patch.name for patch in patches}
    if len(values) > 1:
        raise PatchError(f"{setting} is true in {values[True]}, but not in {values[False]}; mend the one that is wrong")
    return next(iter(values), False)


def _selection(configs: Sequence[AdapterConfig], modules: Iterable[str]) -> dict[str, Any]:
    """Settings that select the modules of the result: those of all patches, their union, or else every full name."""
    first = configs[0]
    if all(_normal_selection(config) == _normal_selection(first) for config in configs):
        return {key: first.raw[key] for key in _SELECTION if key in first.raw}
    if all(isinstance(c.target_modules, tuple) and _normal_selection(c)[1:] == ((), (), ()) for c in configs):
        return {"target_modules": sorted({name for c in configs for name in c.target_modules or ()})}
    return {"target_modules": sorted(modules)}


def _normal_selection(config: AdapterConfig) -> tuple[Any, ...]:
    values = (config.target_modules, config.exclude_modules, config.layers_to_transform, config.layers_pattern)
    return tuple(tuple(sorted(value)) if isinstance(value, tuple) else value or () for value in values)


def _shared_metadata(patches: Sequence[Patch]) -> tuple[dict[str, str], tuple[str, ...]]:
    """What all files' metadata share, with the bases' fingerprint; warnings where the patches do not agree."""
    first = patches[0].metadata
    shared = {k: v for k, v in first.items() if k != COMBINED_KEY and all(p.metadata.get(k) == v for p in patches)}
    warnings = []
    bases = sorted({patch.config.base_model or "unknown" for patch in patches})
    if len(bases) > 1:
        warnings.append(f"the patches name different bases ({', '.join(bases)}); the result names none")
    if METADATA_KEY not in shared and any(METADATA_KEY in patch.metadata for patch in patches):
        united = _united_fingerprint([Fingerprint.from_patch(patch) for patch in patches])
        if united is not None:
            shared[METADATA_KEY] = united.to_json()
        else:
            warnings.append(
                "the fingerprint of the base is left out: not all patches have one, or they were made on different "
                "bases; `portllm stamp PATCH BASE` adds one"
            )
    return shared, tuple(warnings)


def _united_fingerprint(prints: Sequence[Fingerprint | None]) -> Fingerprint | None:
    """Patches on other modules have prints of other weights of the same base: all of them, if none contradicts."""
    known = [each for each in prints if each is not None]
    weights = {key: weight for each in known for key, weight in each.weights.items()}
    agree = all(each.name == known[0].name and each.weights.items() <= weights.items() for each in known)
    return Fingerprint(known[0].name, weights) if agree and len(known) == len(prints) else None
