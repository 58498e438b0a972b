"""bind: patches + target -> Plan. Pure names and shapes: the target's tensors may be meta tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, permutations
from typing import Literal

import torch
from torch import Tensor

from .config import fits_fp32
from .errors import PlanError
from .naming import VOCABULARY_LAYERS, Names, Placement, canonical, readings, spellings
from .patch import BiasEntry, ExpertEntry, LoraEntry, Patch, ReplaceEntry, RowsEntry
from .planning import Assign, Plan, Region, Term, Update, check_dtype
from .quantised import Found, read_weight, refusal, refuse

Tied = Literal["once", "untie"]
ExpertLayout = Literal["out_in", "in_out"]


@dataclass(frozen=True)
class Target:
    """Where a patch goes: names and tensors of a module, a state dict, or (as meta tensors) a checkpoint.

    Attributes:
        tensors: name -> tensor, each memory once.
        aliases: other names of the same memory (tied weights) -> name in ``tensors``.
        transposed: for a weight's name, whether its layer stores [in, out] (GPT-2's Conv1D); None if unknown.
        declared: the tensors come in the order in which their modules declare them (files sort them otherwise).
        quantised: the weights that are stored as codes and scales.
    """

    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    transposed: Callable[[str], bool | None] = lambda name: None
    declared: bool = False
    quantised: Found = field(default_factory=Found)

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """``tensors`` as a patch sees them: quantised weights have their own names and shapes, and are on meta."""
        found = self.quantised
        if not found.weights:
            return self.tensors
        own = {weight.codes: weight for weight in found.weights.values()}
        return {
            own[name].name if name in own else name: (
                torch.empty(own[name].shape, dtype=torch.float32, device="meta") if name in own else tensor
            )
            for name, tensor in self.tensors.items()
            if name in own or name not in found.hidden
        }

    def read(self, name: str) -> Tensor:
        """A weight's values, detached; what is quantised in fp32."""
        weight = self.quantised.weights.get(name)
        return self.tensors[name].detach() if weight is None else read_weight(weight, self.tensors.__getitem__)


@dataclass(frozen=True)
class Options:
    """How to bind; see ``portllm.apply``."""

    tied: Tied = "once"
    expert_layout: ExpertLayout | None = None
    resize: bool = False

    def __post_init__(self) -> None:
        if self.tied not in ("once", "untie"):
            raise PlanError(f"tied={self.tied!r} must be 'once' or 'untie'")
        if self.expert_layout not in (None, "out_in", "in_out"):
            raise PlanError(f"expert_layout={self.expert_layout!r} must be 'out_in' or 'in_out'")


_Factors = tuple[Tensor, Tensor]  # lora_A [E*r, in], lora_B [out, r*E] of stacked experts
_Shape = tuple[int, int, int]  # experts, rows and columns of each as the target stores them


@dataclass(frozen=True)
class _Candidate:
    """A term with a place, before its orientation is settled."""

    placement: Placement
    source: str
    lora_A: Tensor  # [r, i]
    lora_B: Tensor  # [o, r]
    scaling: float
    magnitude: Tensor | None
    magnitude_axis: int
    matrix: tuple[int, int]
    direct: bool
    swapped: bool


@dataclass(frozen=True)
class _Piece:
    """A term at its place; ``spoken`` is the (possibly tied) name under which the patch asked for it."""

    name: str
    spoken: str
    region: Region
    term: Term
    source: str


def bind(target: Target, patches: Sequence[tuple[Patch, float]], options: Options | None = None) -> Plan:
    """Find for each part of each patch its place in the target, and check that it fits.

    Args:
        target: names and shapes; nothing is read or written.
        patches: with the strength of each.
        options: see ``portllm.apply``.

    Raises:
        PlanError: a shape that does not fit, a tie that would be patched twice, an ambiguity, a quantised weight.
            A name without a place is no error here: see ``Plan.check_complete``.
    """
    options = options or Options()
    untie = _Untie(target) if options.tied == "untie" else None
    tensors = dict(target.weights)
    pieces: list[list[_Piece]] = []
    assigns: dict[str, list[Assign]] = {}
    unmatched_patch: list[str] = []
    unmatched_target: list[str] = []
    warnings: list[str] = []
    for patch, scale in patches:
        binder = _Binder(target, tensors, patch, scale, options, untie)
        binder.run()
        pieces.append(_without_twins(binder.pieces))
        for assign in _without_twin_assigns(binder.assigns):
            if assign.name in assigns and any(_clash(assign, other) for other in assigns[assign.name]):
                raise PlanError(f"two patches replace {assign.name} ({assign.sources[0]}); apply one of them alone")
            assigns.setdefault(assign.name, []).append(assign)
        unmatched_patch += binder.unmatched
        unmatched_target += [name for name in binder.uncovered() if name not in unmatched_target]
        warnings += [w for w in binder.warnings if w not in warnings]
    updates = tuple(_merge(pieces))
    quantised = {u.name: target.quantised.weights[u.name] for u in updates if u.name in target.quantised.weights}
    if untie and (tied := target.quantised.weights.keys() & set(untie.names.values())):
        raise refuse(target.quantised.weights[min(tied)], "tied; it cannot be given a tensor for each of its names")
    return Plan(
        updates=updates,
        assigns=tuple(a for group in assigns.values() for a in group),
        untie=untie.names if untie else {},
        unmatched_patch=tuple(unmatched_patch),
        unmatched_target=tuple(unmatched_target),
        warnings=tuple(warnings),
        quantised=quantised,
    )


class _Untie:
    """Keeps the books of tied names that are to become tensors of their own."""

    def __init__(self, target: Target) -> None:
        self._aliases = target.aliases
        self.names: dict[str, str] = {}

    def touch(self, stored: str) -> None:
        """Once one name of a tied tensor is patched, each of its other names gets a copy."""
        self.names.update({alias: name for alias, name in self._aliases.items() if name == stored})


class _Binder:
    """Binds one patch."""

    def __init__(
        self,
        target: Target,
        tensors: dict[str, Tensor],
        patch: Patch,
        scale: float,
        options: Options,
        untie: _Untie | None,
    ) -> None:
        self._target, self._tensors, self._patch, self._scale = target, tensors, patch, scale
        self._options, self._untie = options, untie
        self._names = Names(tensors, target.aliases)
        self._candidates: list[_Candidate] = []
        self._covered: set[str] = set()
        self.pieces: list[_Piece] = []
        self.assigns: list[Assign] = []
        self.unmatched: list[str] = []
        self.warnings: list[str] = []

    def run(self) -> None:
        if base := self._patch.config.quantised_base:
            self.warnings.append(
                f"{self._patch.name} was trained on a quantised base ({base}): added to 16-bit weights, it lacks the "
                "quantisation error that it was trained with, and the result differs by that much"
            )
        # Replaced tensors first: they may change a vocabulary's size, which the factors then have to fit.
        for entry in self._patch.entries:
            if isinstance(entry, ReplaceEntry):
                self._replace(entry)
        self._check_vocabulary()
        for entry in self._patch.entries:
            if isinstance(entry, LoraEntry):
                self._lora(entry)
            elif isinstance(entry, BiasEntry):
                self._bias(entry)
            elif isinstance(entry, RowsEntry):
                self._rows(entry)
        self._experts(entry for entry in self._patch.entries if isinstance(entry, ExpertEntry))
        self._orient()

    def uncovered(self) -> list[str]:
        """Modules of the target, beside those that were patched, which the config targets without factors."""
        config = self._patch.config
        if not self._covered or config.selects_by_kind:
            return []
        # Cut at the first layer number: the layers beside those that were patched count as well.
        base = re.sub(r"(^|(?<=\.))\d+\..*$", "", _common_parent(self._covered))
        missing: list[str] = []
        for name, tensor in self._tensors.items():
            spelled = canonical(name)
            if tensor.dim() < 2 or not spelled.startswith(base):
                continue
            if config.targets_parameter(spelled):
                missing += {spelled.removesuffix(".weight")} - self._covered
            elif spelled.endswith(".weight"):
                # One reading of a weight's name holds: that which the patch has factors for, else the first.
                wanted = [
                    (not along & self._covered, {m for m in modules if config.targets_module(m)})
                    for modules, along in readings(spelled)
                ]
                missing += sorted(min(wanted, key=lambda w: (w[0], not w[1]))[1] - self._covered)
        return list(dict.fromkeys(missing))

    # -- the kinds of entries ------------------------------------------------------------------------------------

    def _lora(self, entry: LoraEntry) -> None:
        spelling, placements = self._names.place(f"{entry.module}.weight", entry.lora_B.shape[0])
        if not placements:
            self._refuse_formats(entry.module)
            self.unmatched.append(entry.module)
            return
        self._covered.add(canonical(spelling).removesuffix(".weight"))
        for placement in placements:
            self._candidate(
                placement, entry.module, entry.lora_A, entry.lora_B, entry.scaling, entry.magnitude, entry.kind
            )

    def _experts(self, entries: Iterable[ExpertEntry]) -> None:
        order: dict[str, int] = {}
        for position, name in enumerate(self._tensors):
            order.setdefault(canonical(name), position)
        assigned = [each for entry in entries for each in self._assign_experts(entry, order)]
        swaps = {_swaps(factors, shape) for _, factors, shape in assigned} - {None}
        for parameter, (lora_A, lora_B), shape in assigned:
            count, rows, _ = shape
            rank, scaling = self._patch.config.rank(parameter), self._patch.config.scaling(parameter)
            each_A = lora_A.reshape(count, rank, lora_A.shape[1])  # expert-major
            each_B = lora_B.reshape(lora_B.shape[0], rank, count)  # expert-minor
            swap = _swaps((lora_A, lora_B), shape)
            if swap is None:
                # A plain matrix, such as a router's, is always [out, in].
                swap = count > 1 and self._swap_square_experts(parameter, swaps)
            for expert in range(count):
                factor_A, factor_B = each_A[expert], each_B[:, :, expert]
                if swap:
                    factor_A, factor_B = factor_B.T, factor_A.T
                spelling, placements = self._names.place_expert(parameter, expert, rows)
                self._covered.add(canonical(spelling).removesuffix(".weight"))
                for placement in placements:
                    self._candidate(placement, parameter, factor_A, factor_B, scaling, None, "settled")

    def _assign_experts(self, entry: ExpertEntry, order: Mapping[str, int]) -> list[tuple[str, _Factors, _Shape]]:
        """Settle which factors belong to which parameter: by shape, then by the order of the target's parameters."""
        shapes: dict[str, _Shape] = {}
        for parameter in entry.parameters:
            count = self._names.count_experts(parameter)
            if count:
                placements = self._names.place_expert(parameter, 0, 0)[1]
                matrices = [self._names.shape(p.name)[-2:] for p in placements]
                shapes[parameter] = (count, sum(m[0] for m in matrices), matrices[0][1])
        present = sorted(shapes, key=lambda p: order.get(p, len(self._tensors)))
        if not present:
            self.unmatched.append(entry.module)
            return []
        choices = [
            dict(zip(names, entry.factors, strict=True))
            for names in permutations(present, len(entry.factors))
            if all(self._fits_experts(p, f, shapes[p]) for p, f in zip(names, entry.factors, strict=True))
        ]
        # PEFT wraps the parameters in the order in which the module declares them, innermost first.
        declared = [c for c in choices if list(c) == sorted(c, key=present.index)]
        if len(choices) == 1 or (self._target.declared and len(declared) == 1 and all(p in order for p in present)):
            chosen = (choices if len(choices) == 1 else declared)[0]
            return [(parameter, factors, shapes[parameter]) for parameter, factors in chosen.items()]
        stored = "; ".join(f"lora_A {list(a.shape)}, lora_B {list(b.shape)}" for a, b in entry.factors)
        target = ", ".join(f"{p} {list(s)}" for p, s in shapes.items())
        what = "fit several ways to" if choices else "do not fit"
        raise PlanError(f"{entry.module}: the factors ({stored}) {what} {target}")

    def _fits_experts(self, parameter: str, factors: _Factors, shape: _Shape) -> bool:
        (lora_A, lora_B), (count, rows, columns) = factors, shape
        sides = (lora_B.shape[0], lora_A.shape[1])
        ranks = self._patch.config.rank(parameter) * count
        return lora_A.shape[0] == ranks and sides in ((rows, columns), (columns, rows))

    def _bias(self, entry: BiasEntry) -> None:
        name = f"{entry.module}.bias"
        _, placements = self._names.place(name, entry.value.shape[0])
        if not placements:
            self.unmatched.append(f"{name} (lora_bias, but the target's layer has no bias)")
        for placement in placements:
            self._candidate(
                placement,
                name,
                torch.ones(1, 1, dtype=torch.float32, device=entry.value.device),
                entry.value.unsqueeze(1),
                entry.scaling,
                None,
                "settled",
            )

    def _replace(self, entry: ReplaceEntry) -> None:
        _, placements = self._names.place(entry.name, entry.value.shape[0] if entry.value.dim() else 0)
        if not placements:
            self.unmatched.append(entry.name)
        for placement in placements:
            name = self._stored(placement.name)
            tensor = self._tensors[name]
            self._check_weight(name, tensor)
            if name in self._target.quantised.weights:
                raise refuse(self._target.quantised.weights[name], f"{entry.name} of the patch would replace it")
            value = entry.value if placement.part is None else entry.value[slice(*placement.part)]
            rows = placement.rows
            expected = tensor.shape if rows is None else (rows[1] - rows[0], *tensor.shape[1:])
            resize = False
            if tuple(value.shape) != tuple(expected):
                resize = self._may_resize(entry, name, tensor, value, rows)
            if resize:
                self._tensors[name] = torch.empty(value.shape, dtype=tensor.dtype, device="meta")
            self.assigns.append(Assign(name, value, rows, self._scale, (entry.name,), resize=resize))
            self.warnings.append(f"{entry.name} replaces the target's own values ({entry.reason})")

    def _may_resize(
        self, entry: ReplaceEntry, name: str, tensor: Tensor, value: Tensor, rows: tuple[int, int] | None
    ) -> bool:
        larger = value.dim() == tensor.dim() and value.shape[1:] == tensor.shape[1:] and len(value) > len(tensor)
        if rows is None and larger and self._options.resize and self._scale == 1.0:
            self.warnings.append(f"{name} grows from {len(tensor)} to {len(value)} rows")
            return True
        hint = ""
        if rows is None and larger:
            hint = (
                f"; the patch was trained with a vocabulary of {len(value)}: call "
                f"model.resize_token_embeddings({len(value)}) first, or use --resize-vocab on a checkpoint"
            )
        raise PlanError(f"{entry.name} is {list(value.shape)} in the patch, but {name} is {list(tensor.shape)}{hint}")

    def _check_vocabulary(self) -> None:
        """All layers of a vocabulary grow together, or the model does not load."""
        grown = {
            a.name: self._target.weights[self._target.aliases.get(a.name, a.name)] for a in self.assigns if a.resize
        }
        for name, old in grown.items():
            copies = self._untie.names if self._untie else {}
            others = {alias: self._target.weights[stored] for alias, stored in copies.items()} | self._tensors
            for other, tensor in others.items():
                is_vocabulary = other not in grown and VOCABULARY_LAYERS.match(other.rpartition(".")[0])
                if is_vocabulary and tensor.shape[0] == old.shape[0]:
                    raise PlanError(
                        f"{name} grows to {len(self._tensors[name])} rows, but {other}, which the patch does not hold, "
                        f"keeps {len(old)}; call resize_token_embeddings on the model, save it, and patch that"
                    )

    def _rows(self, entry: RowsEntry) -> None:
        _, placements = self._names.place(f"{entry.module}.weight", 0)
        if not placements:
            self.unmatched.append(entry.module)
            return
        name = self._stored(placements[0].name)
        tensor = self._tensors[name]
        self._check_weight(name, tensor)
        if name in self._target.quantised.weights:
            raise refuse(self._target.quantised.weights[name], f"{entry.module} has trained tokens, which replace rows")
        if tensor.dim() != 2 or entry.values.shape[1:] != tensor.shape[1:] or max(entry.indices) >= len(tensor):
            raise PlanError(
                f"{entry.module}: trained tokens {list(entry.values.shape)} with indices up to {max(entry.indices)} "
                f"do not fit {name} {list(tensor.shape)}; was the vocabulary resized?"
            )
        self.assigns.append(
            Assign(name, entry.values, entry.indices, self._scale, (entry.module,), by_index=True),
        )

    # -- places and orientation ----------------------------------------------------------------------------------

    def _check_weight(self, name: str, tensor: Tensor) -> None:
        """Raise PlanError for a weight that cannot be updated."""
        if problem := self._target.quantised.problems.get(name):
            raise PlanError(problem)
        check_dtype(name, tensor)

    def _refuse_formats(self, module: str) -> None:
        """Raise PlanError for a module whose weight is there, but in a format that cannot be updated."""
        for spelling in spellings(module):
            if problem := refusal(spelling, self._target.tensors, self._target.quantised):
                raise PlanError(problem)

    def _stored(self, spoken: str) -> str:
        """The tensor behind a name; when ties are to be cut, a tied name is a tensor of its own."""
        stored = self._target.aliases.get(spoken, spoken)
        if self._untie is None:
            if stored in self._target.aliases.values():
                others = ", ".join(a for a, s in self._target.aliases.items() if s == stored)
                note = f"{stored} is tied to {others}: patched once, and both change; tied='untie' parts them"
                if note not in self.warnings:
                    self.warnings.append(note)
            return stored
        self._untie.touch(stored)
        if spoken != stored:
            self._tensors.setdefault(spoken, self._tensors[stored])
        return spoken

    def _candidate(
        self,
        placement: Placement,
        source: str,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        magnitude: Tensor | None,
        kind: str,
    ) -> None:
        """Check a term against its place; only "linear" ones may yet turn out to be for the transposed matrix."""
        stored = self._stored(placement.name)
        tensor = self._tensors[stored]
        self._check_weight(stored, tensor)
        if magnitude is not None and stored in self._target.quantised.weights:
            raise refuse(self._target.quantised.weights[stored], f"{source} has DoRA's magnitudes, for norms of it")
        shape = tuple(tensor.shape) if placement.expert is None else tuple(tensor.shape[1:])
        matrix = (shape[0], 1) if len(shape) == 1 else (shape[0], tensor[0].numel() if len(shape) > 2 else shape[1])
        if placement.part is not None:
            lora_B = lora_B[slice(*placement.part)]
            magnitude = magnitude if magnitude is None else magnitude[slice(*placement.part)]
        kernel_fits = lora_A.dim() == 2 or tuple(lora_A.shape[1:]) == shape[1:]
        if len(shape) > 2 and not tensor.is_contiguous():
            raise PlanError(f"{stored}: a convolution's weight must be contiguous, not channels_last")
        lora_A = lora_A.flatten(1)
        o, i = lora_B.shape[0], lora_A.shape[1]
        rows = placement.rows
        direct = kernel_fits and i == matrix[1] and (o == matrix[0] if rows is None else rows[1] <= matrix[0])
        swapped = kind == "linear" and len(shape) == 2 and i == matrix[0]
        swapped = swapped and (o == matrix[1] if rows is None else rows[1] <= matrix[1])
        if placement.expert is None and rows is not None:
            swapped = False  # fused linear weights are [out, in]
        if not direct and not swapped:
            raise PlanError(
                f"{source}: lora_B @ lora_A is [{o}, {i}], but {stored} is {list(shape)}{_hint(o, i, shape)}"
            )
        axis = 1 if kind == "embedding" else 0
        self._candidates.append(
            _Candidate(
                placement, source, lora_A, lora_B, scaling, magnitude, axis, matrix,
                direct, swapped,
            )
        )  # fmt: skip

    def _orient(self) -> None:
        for candidate in self._candidates:
            swap = candidate.swapped and (not candidate.direct or self._swap_square(candidate))
            rows, columns = (0, candidate.matrix[0]), (0, candidate.matrix[1])
            lora_A, lora_B, axis = candidate.lora_A, candidate.lora_B, candidate.magnitude_axis
            if swap:
                lora_A, lora_B, axis = lora_B.T, lora_A.T, 1
                columns = candidate.placement.rows or columns
            else:
                rows = candidate.placement.rows or rows
            dora = candidate.magnitude is not None
            if not fits_fp32(candidate.scaling * self._scale):
                raise PlanError(f"{candidate.source}: scaling {candidate.scaling} x {self._scale} overflows fp32")
            term = Term(
                lora_A,
                lora_B,
                candidate.scaling if dora else candidate.scaling * self._scale,
                candidate.magnitude,
                axis,
                self._scale if dora else 1.0,
            )
            spoken = candidate.placement.name
            region = Region(candidate.placement.expert, rows, columns)
            self.pieces.append(_Piece(self._stored(spoken), spoken, region, term, candidate.source))

    def _swap_square(self, candidate: _Candidate) -> bool:
        """A square matrix fits both ways: the layer's class, then its siblings, then the settings decide."""
        is_stacked = candidate.placement.expert is not None
        siblings = [c for c in self._candidates if (c.placement.expert is not None) == is_stacked]
        seen = {c.swapped for c in siblings if c.direct != c.swapped}
        if is_stacked:
            return self._swap_square_experts(candidate.source, seen)
        known = self._target.transposed(candidate.placement.name)
        if known is not None:
            return known
        return True if seen == {True} else self._patch.config.fan_in_fan_out

    def _swap_square_experts(self, source: str, siblings: Set[bool | None]) -> bool:
        """Square experts fit both ways: what the user says decides, then their siblings in the same patch."""
        if self._options.expert_layout is not None:
            return self._options.expert_layout == "in_out"
        if len(siblings) == 1:
            return siblings == {True}
        raise PlanError(
            f"{source}: the experts' matrices are square, so [out, in] and [in, out] look the same; "
            "say expert_layout='out_in' or 'in_out' (--expert-layout)"
        )


def _common_parent(names: Iterable[str]) -> str:
    """The longest dotted prefix that all names share, with its dot; their last parts do not count."""
    shared: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names)):  # noqa: B905  (to the length of the shortest)
        if len(set(parts)) > 1:
            break
        shared.append(f"{parts[0]}.")
    return "".join(shared)


def _swaps(factors: _Factors, shape: _Shape) -> bool | None:
    """Whether experts' factors are for the transposed matrices; None if they fit both ways."""
    sides = (factors[1].shape[0], factors[0].shape[1])
    return None if sides[0] == sides[1] else sides != shape[1:]


def _hint(out: int, inner: int, shape: tuple[int, ...]) -> str:
    if len(shape) == 2 and inner == shape[1] and out > shape[0]:
        return (
            f"; if the patch was trained with a vocabulary of {out}, call model.resize_token_embeddings({out}) first "
            "(a checkpoint needs the saved embedding in the patch, and --resize-vocab)"
        )
    if len(shape) > 2:
        return "; the patch was made for another architecture, or for a grouped convolution, which cannot be merged"
    return "; the patch was made for another architecture or a pruned model"


def _same_term(a: Term, b: Term) -> bool:
    return (
        a.scaling == b.scaling
        and a.magnitude is None is b.magnitude
        and a.lora_A.shape == b.lora_A.shape
        and torch.equal(a.lora_A, b.lora_A)
        and torch.equal(a.lora_B, b.lora_B)
    )


def _overlap(a: Region, b: Region) -> bool:
    if a.expert != b.expert:
        return False
    return all(p[0] < q[1] and q[0] < p[1] for p, q in ((a.rows, b.rows), (a.columns, b.columns)))


def _without_twins(pieces: list[_Piece]) -> list[_Piece]:
    """One patch must not land twice on a weight: equal twins of a tied weight count once, others are an error."""
    kept: dict[tuple[str, int | None], list[_Piece]] = {}
    for piece in pieces:
        others = kept.setdefault((piece.name, piece.region.expert), [])
        twin = next((other for other in others if _overlap(other.region, piece.region)), None)
        if twin is None:
            others.append(piece)
        elif twin.spoken == piece.spoken:
            raise PlanError(f"{twin.source} and {piece.source} both land on {piece.name}")
        elif not _same_term(twin.term, piece.term):
            raise PlanError(
                f"{twin.source} and {piece.source} have different factors, but are one tied weight ({piece.name}); "
                "tied='untie' (--untie) gives each a weight of its own"
            )
    return [piece for group in kept.values() for piece in group]


def _clash(a: Assign, b: Assign) -> bool:
    if a.rows is None or b.rows is None:
        return True
    rows = [set(x.rows or ()) if x.by_index else set(range(*(x.rows or ()))) for x in (a, b)]
    return bool(rows[0] & rows[1])


def _without_twin_assigns(assigns: list[Assign]) -> list[Assign]:
    kept: list[Assign] = []
    for assign in assigns:
        twin = next((other for other in kept if other.name == assign.name and _clash(other, assign)), None)
        if twin is None:
            kept.append(assign)
        elif twin.rows != assign.rows or not torch.equal(twin.value, assign.value):
            raise PlanError(
                f"{twin.sources[0]} and {assign.sources[0]} hold different values, but are one tied weight "
                f"({assign.name}); tied='untie' (--untie) gives each a weight of its own"
            )
    return kept


def _merge(pieces: list[list[_Piece]]) -> Iterable[Update]:
    """Gather the terms of all patches, so that each part of each weight is read and written once."""
    groups: dict[tuple[str, int | None], list[_Piece]] = {}
    for piece in (p for of_patch in pieces for p in of_patch):
        groups.setdefault((piece.name, piece.region.expert), []).append(piece)
    for (name, expert), group in groups.items():
        cuts = [
            sorted({edge for p in group for edge in getattr(p.region, axis)}) for axis in ("rows", "columns")
        ]  # the grid in which each cell has one list of terms
        for rows in pairwise(cuts[0]):
            for columns in pairwise(cuts[1]):
                cell = Region(expert, rows, columns)
                inside = [p for p in group if _overlap(p.region, cell)]
                if inside:
                    terms = tuple(_cut_to(p, cell) for p in inside)
                    yield Update(name, cell, terms, tuple(dict.fromkeys(p.source for p in inside)))


def _cut_to(piece: _Piece, cell: Region) -> Term:
    region = piece.region
    if region == cell:
        return piece.term
    cut_axes = [region.rows != cell.rows, region.columns != cell.columns]
    if piece.term.magnitude is not None and cut_axes[1 - piece.term.magnitude_axis]:
        raise PlanError(
            f"{piece.source}: DoRA needs whole vectors of {piece.name}, but another patch cuts through them"
        )
    rows = slice(cell.rows[0] - region.rows[0], cell.rows[1] - region.rows[0])
    columns = slice(cell.columns[0] - region.columns[0], cell.columns[1] - region.columns[0])
    return piece.term.cut(rows, columns)
