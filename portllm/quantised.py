"""Quantised weights in a model: known by the tensors that lie beside them, and updated through ``requantise``.

Everything that is peculiar to a library's format is in the functions ``_known_...`` below. Binding sees a quantised
weight under its own name and in its own shape, whatever its codes are called and however they are packed.

Names and layouts come from the libraries' own documentation and files: DeepSeek-V3's and transformers' fine-grained
fp8 (``weight_scale_inv``), fbgemm and compressed-tensors (``weight_scale``, ``weight_packed``), modelopt
(``weight_scale_2``), bitsandbytes (``SCB``, ``absmax``, ``quant_state``), gpt-oss (``_blocks``, ``_scales``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import PlanError
from .pieces import joined
from .quant import E4M3, SCHEMES, Scheme, Shape, dequantise, nearest_in
from .requantise import lowrank_requantise_

if TYPE_CHECKING:
    from .planning import Noise, Term, Update

_FIX = "apply the patch to the 16-bit weights and quantise the result"
_SCB_LARGEST = 127.0  # bitsandbytes keeps the largest weight of each row instead of the scale


@dataclass(frozen=True)
class Nested:
    """NF4 scales that are themselves codes: ``scale = table[code] * nested scale + offset`` (double quantisation)."""

    scales: str
    table: str
    block: int
    offset: float


@dataclass(frozen=True)
class Quantised:
    """A weight that is stored as codes and scales.

    Attributes:
        name: the weight's own; not that of a tensor, where codes have another name.
        shape: the weight's: [m, n], or [experts, m, n].
        scheme, block: see ``portllm.requantise.lowrank_requantise_``.
        codes, scales: names of the tensors.
        global_scale: name of the tensor with one number (or one for each expert) that multiplies all scales, or None.
        divides: the global scale divides them instead.
        is_scb: the scales are kept times 127.
        nested: how the scales are coded, if they are.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    block: Shape
    codes: str
    scales: str
    global_scale: str | None = None
    divides: bool = False
    is_scb: bool = False
    nested: Nested | None = None

    @property
    def kind(self) -> Scheme:
        return SCHEMES[self.scheme]

    @property
    def matrix(self) -> Shape:
        """Rows and columns, of each expert."""
        return self.shape[-2], self.shape[-1]

    @property
    def rows(self) -> int:
        """Of the weight as a matrix; stacked experts lie one below the other."""
        return math.prod(self.shape[:-1])

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that an update changes."""
        return self.codes, self.scales, *([self.nested.scales] if self.nested else [])

    @property
    def row_unit(self) -> int:
        """The weight may be cut after every so many rows (of each expert)."""
        block = (1, self.block[1] * self.nested.block) if self.nested else self.block
        return self.kind.row_unit(self.matrix[1], block)

    @property
    def tile_rows(self) -> int:
        """The reference sums so many rows at a time; cut elsewhere, the sums may differ in their last bit."""
        tile, unit = self.kind.tile_rows(self.matrix[1], self.block), self.row_unit
        return tile // math.gcd(tile, unit) * unit

    def spans(self, start: int, stop: int) -> dict[str, tuple[int, int]]:
        """Which elements [first, last) of each part, seen flat, belong to rows [start, stop), which cut no block."""
        m, n = self.matrix
        found = {self.codes: (self.kind.code_bytes(start * n), self.kind.code_bytes(stop * n))}
        if self.kind.is_flat:
            width = self.block[1]
            scales = start * n // width, -(-stop * n // width)
            if self.nested is not None:
                found[self.nested.scales] = scales[0] // self.nested.block, -(-scales[1] // self.nested.block)
        else:
            down, across = self.kind.grid((m, n), self.block)
            first, last = (row // m * down + -(-(row % m) // self.block[0]) for row in (start, stop))
            scales = first * across, last * across
        return found | {self.scales: scales}

    def global_scales(self, read: Callable[[str], Tensor]) -> list[float]:
        """The global scale of each expert (or of the one matrix)."""
        count = math.prod(self.shape[:-2])
        if self.global_scale is None:
            return [1.0] * count
        values = read(self.global_scale).float().flatten()
        if self.divides:
            values = 1 / values
        return values.expand(count).tolist() if len(values) == 1 else values.tolist()


class QuantisedPlan:
    """What falls on one quantised weight, cut into pieces of whole blocks: each is read, patched and written alone.

    Attributes:
        weight: the weight.
        units: its updates.
    """

    def __init__(self, weight: Quantised, units: Sequence[Unit]) -> None:
        self.weight, self.units = weight, tuple(units)

    def pieces(self, limit: int) -> Iterator[tuple[int, int]]:
        """[start, stop) of pieces of all rows, each of at most ``limit`` rows if blocks and tiles allow."""
        return joined(self._cuts(), limit)

    def _cuts(self) -> list[int]:
        """Rows where the weight may be cut: where a unit's tiles end, which live are the same, and between units."""
        weight, rows, tile = self.weight, self.weight.rows, self.weight.tile_rows
        cuts = {rows, *(row for first in range(0, rows, weight.matrix[0]) for row in self._steps(first, tile))}
        for unit in self.units:
            cuts = {cut for cut in cuts if not unit.start < cut < unit.stop}
            cuts |= {*range(unit.start, unit.stop, tile), unit.stop}
        return sorted(cuts)

    def _steps(self, first: int, tile: int) -> range:
        return range(first, first + self.weight.matrix[0], tile)

    def run(
        self, parts: Mapping[str, Tensor], start: int, stop: int, global_scales: Sequence[float], backend: str
    ) -> Tensor:
        """Update rows [start, stop), of which ``parts`` are the elements; returns the op's sums."""
        weight = self.weight
        sums = torch.zeros(3, dtype=torch.float64)
        first = {name: span[0] for name, span in weight.spans(start, stop).items()}
        for unit in self.units:
            cut = unit.cut(start, stop)
            if cut is not None:
                spans = weight.spans(cut.start, cut.stop).items()
                own = {name: parts[name][low - first[name] : high - first[name]] for name, (low, high) in spans}
                sums += cut.run({**parts, **own}, global_scales, backend)
        return sums


# -- updates -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """An update of whole blocks: rows [start, stop) of the weight as a matrix, all columns."""

    weight: Quantised
    start: int
    stop: int
    terms: tuple[Term, ...]
    noise: Noise | None
    keep_zeros: bool

    def cut(self, start: int, stop: int) -> Unit | None:
        """What falls on rows [start, stop), or None."""
        low, high = max(start, self.start), min(stop, self.stop)
        if low >= high:
            return None
        rows = slice(low - self.start, high - self.start)
        noise = self.noise and replace(self.noise, row=self.noise.row + rows.start)
        terms = tuple(term.cut(rows, slice(None)) for term in self.terms)
        return replace(self, start=low, stop=high, terms=terms, noise=noise)

    def run(self, parts: Mapping[str, Tensor], global_scales: Sequence[float], backend: str) -> Tensor:
        """Write it; returns the op's three sums (of nested scales: before these are coded).

        Args:
            parts: for each name in ``weight.parts`` the elements that belong to the rows, flat and contiguous.
            global_scales: see ``Quantised.global_scales``.
        """
        weight = self.weight
        codes, stored = parts[weight.codes], parts[weight.scales]
        scales = _opened(weight, parts)
        before = scales if scales is stored else scales.clone()
        sums = lowrank_requantise_(
            codes,
            scales,
            [term.lora_A for term in self.terms],
            [term.lora_B for term in self.terms],
            [term.scaling for term in self.terms],
            weight.scheme,
            *weight.block,
            global_scales[self.start // weight.matrix[0]],
            self._modes,
            backend,
        )
        if weight.is_scb:
            stored.copy_(torch.where(scales == before, stored.float(), scales * _SCB_LARGEST))
        elif weight.nested is not None:
            _close_nested(weight.nested, parts, stored, before, scales)
        return sums

    @property
    def _modes(self) -> list[int]:
        if self.noise is None:
            return [2, 0, 0, 0] if self.keep_zeros else []
        key = self.noise.key - (self.noise.key >> 63 << 64)  # as signed
        return [1 + 2 * self.keep_zeros, key, self.noise.row, self.noise.column]


def units(weight: Quantised, updates: Sequence[Update]) -> list[Unit]:
    """The updates of one weight, each grown to whole blocks, with factors of zeros where it did not reach.

    Those that meet in a block become one, since a block is requantised once.
    """
    m, n = weight.matrix
    unit = weight.row_unit
    groups: list[tuple[int, int, list[Update]]] = []
    for update in sorted(updates, key=lambda u: (u.region.expert or 0, u.region.rows)):
        base = (update.region.expert or 0) * m
        start = base + update.region.rows[0] // unit * unit
        stop = base + min(-(-update.region.rows[1] // unit) * unit, m)
        if groups and start < groups[-1][1]:
            first, last, inside = groups[-1]
            groups[-1] = first, max(last, stop), [*inside, update]
        else:
            groups.append((start, stop, [update]))
    made = []
    for start, stop, inside in groups:
        noise = None
        terms: list[Term] = []
        for update in inside:
            (top, bottom), (left, right) = update.region.rows, update.region.columns
            top, bottom = (row + (update.region.expert or 0) * m - start for row in (top, bottom))
            terms += (_grown(term, slice(top, bottom), stop - start, slice(left, right), n) for term in update.terms)
            if update.noise is not None:
                noise = replace(update.noise, row=update.noise.row - top, column=update.noise.column - left)
        made.append(Unit(weight, start, stop, tuple(terms), noise, any(u.keep_zeros for u in inside)))
    return made


def _grown(term: Term, rows: slice, m: int, columns: slice, n: int) -> Term:
    """The term on an [m, n] matrix of which it covers a rectangle."""
    lora_A, lora_B = term.lora_A, term.lora_B
    if lora_B.shape[0] != m:
        lora_B = lora_B.new_zeros(m, lora_B.shape[1])
        lora_B[rows] = term.lora_B
    if lora_A.shape[1] != n:
        lora_A = lora_A.new_zeros(lora_A.shape[0], n)
        lora_A[:, columns] = term.lora_A
    return replace(term, lora_A=lora_A, lora_B=lora_B)


def survival(sums: Tensor) -> float:
    """The share of a patch that is in the weight: ``<W' - W, D> / ||D||^2``; 1 if it was not lost, also of nothing."""
    squared, projected = float(sums[0]), float(sums[1])
    return projected / squared if squared else 1.0


def _opened(weight: Quantised, parts: Mapping[str, Tensor]) -> Tensor:
    """The scales as the op takes them: the stored ones themselves, or in memory of their own."""
    stored = parts[weight.scales]
    if weight.is_scb:
        return stored.float() / _SCB_LARGEST
    if weight.nested is None:
        return stored
    nested = parts[weight.nested.scales].repeat_interleave(weight.nested.block)[: len(stored)]
    return parts[weight.nested.table][stored.int()] * nested + weight.nested.offset


def _close_nested(nested: Nested, parts: Mapping[str, Tensor], stored: Tensor, before: Tensor, scales: Tensor) -> None:
    """Code the scales that changed; where one is beyond the range of its group, the group gets a new nested scale."""
    table, outer = parts[nested.table], parts[nested.scales]
    groups, count = len(outer), len(stored)
    padding = (0, groups * nested.block - count)
    changed = torch.nn.functional.pad(scales != before, padding).view(groups, -1)
    centred = torch.nn.functional.pad(scales - nested.offset, padding).view(groups, -1)
    renew = (centred.abs() * changed).amax(1) > outer
    outer.copy_(torch.where(renew, centred.abs().amax(1), outer))
    coded = nearest_in(table, centred / outer[:, None]).view(-1)[:count]
    stored.copy_(torch.where((changed | renew[:, None]).view(-1)[:count], coded, stored))


def read_weight(weight: Quantised, read: Callable[[str], Tensor]) -> Tensor:
    """The weight in fp32, of its own shape, from its tensors."""
    parts = {name: read(name).detach().reshape(-1) for name in _needed(weight)}
    factors = weight.global_scales(read)
    m, n = weight.matrix
    made = torch.empty(weight.rows, n, dtype=torch.float32, device=parts[weight.codes].device)
    scales = _opened(weight, parts)
    for expert, factor in enumerate(factors):
        spans = weight.spans(expert * m, (expert + 1) * m)
        codes = parts[weight.codes][slice(*spans[weight.codes])]
        made[expert * m : (expert + 1) * m] = dequantise(
            codes, scales[slice(*spans[weight.scales])], (m, n), weight.scheme, weight.block, factor
        )
    return made.view(weight.shape)


def _needed(weight: Quantised) -> tuple[str, ...]:
    return (*weight.parts, weight.nested.table) if weight.nested else weight.parts


# -- recognition -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The quantised weights among a target's tensors.

    Attributes:
        weights: by their own names.
        problems: why a weight, by the name of its tensor, cannot be updated.
        hidden: tensors that are parts of a weight, and no weights themselves.
    """

    weights: Mapping[str, Quantised] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()


class _Unusable(Exception):
    """Why a weight that was recognised cannot be updated."""


def find(tensors: Mapping[str, Tensor], read: Callable[[str], Tensor], config: Mapping[str, Any]) -> Found:
    """Recognise quantised weights.

    Args:
        tensors: all of the target, by name; only dtypes and shapes are looked at.
        read: gives the values of a small one, such as ``quant_state``; called only where they are needed.
        config: ``quantization_config``, for the size of blocks where the scales leave it open.
    """
    weights: dict[str, Quantised] = {}
    problems: dict[str, str] = {}
    hidden: set[str] = set()
    block = _block_of(config)
    for name, tensor in tensors.items():
        if tensor.dtype not in (E4M3, torch.int8, torch.uint8, torch.int32):
            continue
        try:
            weight = _recognised(name, tensor, tensors, read, block)
        except _Unusable as error:
            problems[name] = str(error)
            continue
        if weight is not None:
            weights[weight.name] = weight
            hidden |= {*weight.parts, *([weight.global_scale] if weight.global_scale else [])}
            hidden |= {f"{name}{suffix}" for suffix in _BNB_SUFFIXES} & tensors.keys()
    return Found(weights, problems, frozenset(hidden))


_BNB_SUFFIXES = (
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4",
)  # fmt: skip


def _recognised(
    name: str, codes: Tensor, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor], block: Shape | None
) -> Quantised | None:
    stem = name.removesuffix(".weight")
    if codes.dtype == E4M3 and codes.dim() in (2, 3) and not _is_scale(name, tensors):
        return _known_8bit(name, "fp8_e4m3", tensors, (f"{name}_scale_inv", f"{name}_scale"), block)
    if codes.dtype == torch.int8 and codes.dim() == 2:
        if f"{stem}.SCB" in tensors:
            return _known_scb(name, tensors, f"{stem}.SCB")
        return _known_8bit(name, "int8", tensors, (f"{name}_scale",), block)
    if codes.dtype == torch.uint8 and f"{name}.absmax" in tensors:
        return _known_nf4(name, tensors, read)
    if codes.dtype == torch.uint8 and name.endswith("_blocks") and codes.dim() == 4:
        return _known_gpt_oss(name, codes, tensors)
    if codes.dtype == torch.uint8 and f"{name}_scale_2" in tensors:
        return _known_fp4(name, name, codes, tensors, f"{name}_scale", f"{name}_scale_2", divides=False)
    if name.endswith("weight_packed"):
        weight = name.removesuffix("_packed")
        if codes.dtype != torch.uint8:
            raise _Unusable(f"{name} holds packed integers (compressed-tensors pack-quantized): {_FIX}")
        outer = f"{weight}_global_scale"
        return _known_fp4(weight, name, codes, tensors, f"{weight}_scale", outer, divides=True)
    return None


def _known_8bit(
    name: str, scheme: str, tensors: Mapping[str, Tensor], scales: Sequence[str], block: Shape | None
) -> Quantised:
    found = next((s for s in scales if s in tensors), None)
    if found is None:
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        raise _Unusable(
            f"{name} is {dtype}, but its scale ({' or '.join(scales)}) is missing: such quantised weights cannot be "
            f"patched; {_FIX}, or add the scale"
        )
    if f"{name}_zero_point" in tensors:
        raise _Unusable(f"{name} has a zero point ({name}_zero_point), which is not supported: {_FIX}")
    shape = tuple(tensors[name].shape)
    _check_scales(name, found, tensors, scheme)
    blocks = _block_from(shape, tuple(tensors[found].shape), block)
    if blocks is None:
        raise _Unusable(
            f"{found} {list(tensors[found].shape)} does not divide {name} {list(shape)} into blocks; "
            "give weight_block_size in config.json's quantization_config"
        )
    return Quantised(name, shape, scheme, blocks, name, found)


def _known_scb(name: str, tensors: Mapping[str, Tensor], scales: str) -> Quantised:
    shape = tuple(tensors[name].shape)
    if tensors[scales].numel() != shape[0]:
        raise _Unusable(f"{scales} {list(tensors[scales].shape)} has not one number for each row of {name}: {_FIX}")
    return Quantised(name, shape, "int8", (1, shape[1]), name, scales, is_scb=True)


def _known_nf4(name: str, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> Quantised:
    key, absmax = f"{name}.quant_state.bitsandbytes__nf4", f"{name}.absmax"
    if key not in tensors:
        raise _Unusable(f"{name} is quantised by bitsandbytes, but {key} is missing (only nf4 is supported): {_FIX}")
    packed = read(key)
    if packed.is_meta:
        raise _Unusable(f"{name} is quantised and {key} is a meta tensor, so its shape is not known; load the model")
    try:
        state = json.loads(bytes(packed.cpu().tolist()))
        shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
        nested = None
        if "nested_blocksize" in state:
            outer, table = f"{name}.nested_absmax", f"{name}.nested_quant_map"
            nested = Nested(outer, table, int(state["nested_blocksize"]), float(state["nested_offset"]))
    except (ValueError, KeyError, TypeError) as error:
        raise _Unusable(f"{key} cannot be read ({error}); save the model again with bitsandbytes") from None
    if nested is not None:
        for part in (nested.scales, nested.table):
            if part not in tensors:
                raise _Unusable(f"{part} is missing, without which the scales of {name} are not known: {_FIX}")
    if len(shape) != 2:
        raise _Unusable(f"{name} has {len(shape)} dimensions; only matrices are supported in nf4: {_FIX}")
    if nested is None:
        _check_scales(name, absmax, tensors, "nf4")
    return Quantised(name, shape, "nf4", (1, block), name, absmax, nested=nested)


def _known_gpt_oss(name: str, codes: Tensor, tensors: Mapping[str, Tensor]) -> Quantised:
    weight = name.removesuffix("_blocks")
    scales = f"{weight}_scales"
    _check_scales(name, scales, tensors, "mxfp4")
    experts, rows, groups, size = codes.shape
    return Quantised(weight, (experts, rows, groups * size * 2), "mxfp4", (1, 2 * size), name, scales)


def _known_fp4(
    weight: str, name: str, codes: Tensor, tensors: Mapping[str, Tensor], scales: str, outer: str, *, divides: bool
) -> Quantised:
    scheme = "nvfp4" if outer in tensors else "mxfp4"
    _check_scales(name, scales, tensors, scheme)
    shape = (*codes.shape[:-1], codes.shape[-1] * 2)
    across = tensors[scales].shape[-1]
    if shape[-1] % across:
        raise _Unusable(f"{scales} {list(tensors[scales].shape)} does not divide {name}, {shape[-1]} columns, evenly")
    block = (1, shape[-1] // across)
    return Quantised(weight, shape, scheme, block, name, scales, outer if scheme == "nvfp4" else None, divides)


def _check_scales(name: str, scales: str, tensors: Mapping[str, Tensor], scheme: str) -> None:
    if scales not in tensors:
        raise _Unusable(f"{name} is quantised, but its scales ({scales}) are missing: {_FIX}, or add them")
    dtype = tensors[scales].dtype
    if dtype not in SCHEMES[scheme].scales:
        raise _Unusable(f"{scales} is {dtype}, which {scheme} weights ({name}) do not have as scales: {_FIX}")


def _is_scale(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an fp8 tensor is the scales of 4-bit codes."""
    weight = name.removesuffix("_scale")
    return weight != name and (weight in tensors or f"{weight}_packed" in tensors)


def _block_of(config: Mapping[str, Any]) -> Shape | None:
    """The size of blocks that a quantization_config names, if it does."""
    groups = config.get("config_groups") or {}
    named = [config.get("weight_block_size")]
    named += [(group.get("weights") or {}).get("block_structure") for group in groups.values() if group]
    for block in named:
        if isinstance(block, list | tuple) and len(block) == 2:
            return int(block[0]), int(block[1])
    return None


def _block_from(shape: tuple[int, ...], scales: tuple[int, ...], named: Shape | None) -> Shape | None:
    """The size of blocks, from the shapes of weight and scales."""
    m, n = shape[-2:]
    if len(shape) == 3:
        if math.prod(scales) == shape[0]:
            return m, n
        if scales[:1] != shape[:1] or len(scales) != 3:
            return None
        scales = scales[1:]
    if math.prod(scales) == 1:
        return m, n
    if len(scales) == 1:
        return (1, n) if scales[0] == m else None
    if len(scales) != 2:
        return None
    if named is not None and all(-(-size // b) == count for size, b, count in zip((m, n), named, scales, strict=True)):
        return named
    sizes = [_size_of_block(size, count) for size, count in zip((m, n), scales, strict=True)]
    return None if sizes[0] is None or sizes[1] is None else (sizes[0], sizes[1])


def _size_of_block(size: int, count: int) -> int | None:
    """How many of ``size`` share each of ``count`` scales: all, one, 128, what divides it, or a power of two."""
    if count in (1, size) or (size % count == 0 and -(-size // 128) != count):
        return size // count
    return next((b for b in (128, 256, 512, 64, 32, 16) if -(-size // b) == count), None)


def refusal(stem: str, tensors: Mapping[str, Tensor], found: Found) -> str | None:
    """Why the weight of a module in another format (GPTQ, AWQ, packed integers) cannot take a patch, or None."""
    if problem := found.problems.get(f"{stem}.weight_packed"):
        return problem
    if f"{stem}.qweight" in tensors:
        what = "GPTQ" if f"{stem}.g_idx" in tensors else "AWQ or GPTQ"
        return f"{stem}.qweight is quantised ({what}): its codes depend on calibration data; {_FIX}"
    return None


def grouped(updates: Sequence[Update], weights: Mapping[str, Quantised]) -> Iterator[Unit]:
    """The updates of quantised weights, as units."""
    by_name: dict[str, list[Update]] = {}
    for update in updates:
        if update.name in weights:
            by_name.setdefault(update.name, []).append(update)
    for name, own in by_name.items():
        yield from units(weights[name], own)


def refuse(weight: Quantised, what: str) -> PlanError:
    """The error for what cannot be done to a quantised weight."""
    return PlanError(f"{weight.name} is quantised ({weight.scheme}), and {what}; {_FIX}")
