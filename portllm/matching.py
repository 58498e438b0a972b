"""Find the map from a base to a pruned or grown model, by looking for the base's rows and columns in the new weights.

Equal bits are looked for, by hashes, a tensor at a time: hidden dimensions by the columns of the embedding, then tokens
by its rows, layers by the rows and norms that they keep, and within each layer heads, neurons and experts. One weight
that was not trained further since the pruning is enough for each of them. An axis that has kept its size counts as it
was; its order is not looked at. A layer (head, token) that is there twice counts as the base's both times, also where
it was copied to begin training from: where such a copy should get nothing of a patch, write null for it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dimensions import EXPERTS, HEADS, KV_HEADS, LAYERS, STACK, Axes, axes_of, is_conv1d
from .errors import PlanError
from .naming import PREFIXES, canonical
from .planning import some
from .readable import Model, ReadableModel
from .reference import FLOAT_DTYPES
from .structure import IndexMap, Selection

# Where the heads and the neurons of one place begin and end: each attention, each expert, else the layer.
_ATTENTION = re.compile(r"^.*?\.\w*(?:attn|attention|Attention)(?=\.)")
_FEED_FORWARD = re.compile(r"^.*\.(?:experts\.\d+|shared_experts?)(?=\.)")
# How configurations call the numbers of heads.
_COUNTS = {
    HEADS: ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    KV_HEADS: ("num_key_value_heads", "num_attention_heads", "n_head"),
}
_GIVE = "give the map yourself (IndexMap.of, --map), or what you know of it (match(..., known=))"


def match(base: Model, pruned: Model, *, known: IndexMap | None = None) -> IndexMap:
    """The map from ``base`` to ``pruned``; both are read a tensor at a time.

    Args:
        base, pruned: checkpoints (directory, file or hub id), modules or state dicts; names may differ in their
            prefix, layers in their numbers. The numbers of heads come from the models' configurations.
        known: dimensions that need not be looked for, and module names outside of the built-in table.

    Raises:
        PlanError: a dimension that differs and of which no weight has the base's rows (all were trained further), or
            has rows that are there several times; it names the tensor.
        CheckpointError: a model cannot be read.
    """
    return _Matcher(_Side.open(base, "base"), _Side.open(pruned, "pruned"), known or IndexMap({})).run()


@dataclass(frozen=True)
class _Side:
    """One of the two models: ``names`` in one spelling, without prefixes -> the tensor's own name."""

    model: ReadableModel
    names: Mapping[str, str]
    counts: Mapping[str, int]

    @classmethod
    def open(cls, model: Model, role: str) -> _Side:
        opened = ReadableModel.open(model, role)
        names: dict[str, str] = {}
        for name, tensor in opened.target.tensors.items():
            if tensor.dtype in FLOAT_DTYPES:
                names.setdefault(_plain(name), name)
        config: Any = getattr(model, "config", None) if opened.checkpoint is None else opened.checkpoint.config
        return cls(opened, names, _head_counts(config))

    def shape(self, name: str) -> tuple[int, ...]:
        """[out, in] of a plain name, in whatever way it is stored."""
        shape = tuple(self.model.target.tensors[self.names[name]].shape)
        return shape[::-1] if self._is_transposed(name) else shape

    def read(self, name: str) -> Tensor:
        tensor = self.model.read(self.names[name])
        return tensor.t() if self._is_transposed(name) else tensor

    def _is_transposed(self, name: str) -> bool:
        known = self.model.target.transposed(self.names[name])
        return is_conv1d(name.removesuffix(".weight")) if known is None else known

    def stacks(self) -> dict[str, int]:
        """Each list of layers, and how many it has."""
        found: dict[str, int] = {}
        for match_ in filter(None, map(STACK.search, self.names)):
            stack = match_.string[: match_.end("stack")]
            found[stack] = max(found.get(stack, 0), int(match_["number"]) + 1)
        return found

    def within(self, stack: str, number: int) -> dict[str, str]:
        """The tensors of one layer by the rest of their names."""
        start = f"{stack}.{number}."
        return {name.removeprefix(start): name for name in self.names if name.startswith(start)}


@dataclass(frozen=True)
class _Weight:
    """A weight of both models: where what it says holds, its names, and which expert it is of a stack."""

    place: str
    old: str
    new: str
    experts: tuple[int, int] | None = None

    @property
    def module(self) -> str:
        """Of the base; one of its own for each expert."""
        if self.experts is None:
            return _module(self.old)
        container, _, leaf = self.old.rpartition(".")
        return f"{container}.{self.experts[0]}.{leaf}"


class _Matcher:
    def __init__(self, old: _Side, new: _Side, known: IndexMap) -> None:
        self._old, self._new, self._known = old, new, known
        self._found: dict[str, dict[str, Selection]] = {kind: dict(s) for kind, s in known.selections.items()}
        embedding = next((old.shape(n) for n in old.names if _kinds(n, known) == ("vocabulary", "hidden")), None)
        self._hidden = None if embedding is None else embedding[1]
        self._refusals: dict[tuple[str, str], list[str]] = {}  # (kind, place) -> why, for each weight that was tried

    def run(self) -> IndexMap:
        shared = [name for name in self._old.names if name in self._new.names and STACK.search(name) is None]
        matrices = [_Weight("", name, name) for name in shared if len(self._old.shape(name)) == 2]
        for kind in ("hidden", "vocabulary"):
            for weight in matrices:
                self._try(kind, weight)
            self._check(kind, "")
        stacks = self._new.stacks()
        for stack, count in self._old.stacks().items():
            if stack in stacks:
                for number, old in enumerate(self._layers(stack, count, stacks[stack])):
                    if old is not None:
                        self._layer(stack, old, number)
        made = self._map()
        made.check_groups()
        self._verify(made)
        return made

    # -- one dimension of one weight -----------------------------------------------------------------------------

    def _try(self, kind: str, weight: _Weight) -> None:
        """Look for a kind of dimension in one weight, if it has it, and if its other axis is known."""
        if kind in self._known.selections:
            return
        try:
            axes = axes_of(weight.module, self._known.dimensions)
        except PlanError:
            return  # outside of the table, where only what is to be cut needs to be known
        for swapped in (False, True) if weight.experts is not None else (False,):
            shapes = [self._old.shape(weight.old)[-2:], self._new.shape(weight.new)[-2:]]
            if swapped:
                shapes = [shape[::-1] for shape in shapes]
            for axis, kinds in enumerate((axes.rows, axes.columns)):
                found = weight.place in self._found.get(kind, {})
                if kind in kinds and axis < len(shapes[0]) == len(shapes[1]) and not found:
                    self._try_axis(kind, weight, axes, axis, shapes, swapped)

    def _try_axis(
        self, kind: str, weight: _Weight, axes: Axes, axis: int, shapes: Sequence[tuple[int, ...]], swapped: bool
    ) -> None:
        """``axes`` and ``shapes`` are [out, in]; ``swapped`` for experts that are stored [in, out]."""
        sides = (axes.rows, axes.columns)
        sizes, others = [shape[axis] for shape in shapes], [shape[1 - axis] for shape in shapes if len(shape) == 2]
        if others and sides[1 - axis] == ("hidden",) and self._hidden not in (None, others[0]):
            return  # experts in the other layout
        counts = self._segments(kind, sides[axis], weight.module, sizes)
        if counts is None:
            return
        if sizes[0] == sizes[1]:
            self._keep(kind, weight.place, Selection(counts[0][kind], tuple(range(counts[0][kind]))))
            return
        index, first = None, None
        if others:
            try:
                index = IndexMap(self._found).indices(sides[1 - axis], weight.module, others[0])
            except PlanError:
                return  # not yet known
            if (others[0] if index is None else len(index)) != others[1]:
                # Where tokens were added behind the others, the first ones still say which columns are which.
                if kind != "hidden" or sides[1 - axis] != ("vocabulary",) or index is not None:
                    return
                first = min(others)
        pair = []
        for i, (side, name) in enumerate(((self._old, weight.old), (self._new, weight.new))):
            tensor = side.read(name)
            tensor = tensor if weight.experts is None else tensor[weight.experts[i]]
            tensor = tensor.T if swapped else tensor
            pair.append(tensor.unsqueeze(1) if tensor.dim() == 1 else tensor.movedim(axis, 0)[:, :first])
        pair = [_of_base(matrix, index, is_new=i == 1) for i, matrix in enumerate(pair)]
        dtype = torch.promote_types(pair[0].dtype, pair[1].dtype)
        hashes = [_hashes(m.to(dtype), sides[axis], kind, count) for m, count in zip(pair, counts, strict=True)]
        keep = _pair(*hashes)
        if isinstance(keep, str):
            self._refusals.setdefault((kind, weight.place), []).append(f"{self._new.names[weight.new]} ({keep})")
        else:
            self._keep(kind, weight.place, Selection(len(hashes[0]), tuple(keep)))

    def _segments(
        self, kind: str, kinds: Sequence[str], module: str, sizes: Sequence[int]
    ) -> tuple[dict[str, int], dict[str, int]] | None:
        """How many of each kind lie on an axis, in the base and in the new model; None if that is not yet known."""
        if not {HEADS, KV_HEADS} & set(kinds):
            counts = [{kind: size // len(kinds)} for size in sizes]
            return counts[0], counts[1]
        try:
            old = {k: self._old.counts[k] for k in kinds}
        except KeyError as error:
            lacks = str(error.args[0])
            if sizes[0] == sizes[1]:
                return None
            raise PlanError(
                f"{module}: the number of {lacks} of {self._old.model.label} is not known; give a model with its "
                f"configuration, or {_GIVE}"
            ) from None
        unit = sizes[0] // sum(old[k] for k in kinds)
        if unit == 0 or sizes[1] % unit:
            return None
        new = {}
        for other in set(kinds) - {kind}:
            selection = IndexMap(self._found).find(other, module)
            if selection is None:
                return None
            new[other] = len(selection.keep)
        left = sizes[1] // unit - sum(new.get(k, 0) for k in kinds)
        new[kind] = left // kinds.count(kind)
        return (old, new) if left > 0 and left % kinds.count(kind) == 0 else None

    def _keep(self, kind: str, place: str, selection: Selection) -> None:
        self._found.setdefault(kind, {})[place] = selection

    def _check(self, kind: str, place: str) -> None:
        tried = self._refusals.get((kind, place), [])
        if tried and place not in self._found.get(kind, {}):
            raise self._refusal(kind, place, tried)

    def _refusal(self, kind: str, place: str, tried: Sequence[str]) -> PlanError:
        return PlanError(
            f"{self._new.model.label}: its {kind}{f' of {place}' if place else ''} cannot be found in "
            f"{self._old.model.label}, tried {some(tried)}; if the model was trained further since it was pruned, "
            f"match it as it was before, or {_GIVE}"
        )

    # -- layers --------------------------------------------------------------------------------------------------

    def _layers(self, stack: str, count: int, new_count: int) -> tuple[int | None, ...]:
        """What is kept of one list of layers."""
        if (selection := IndexMap(self._found).find(LAYERS, stack)) is not None:
            return selection.keep
        identity = tuple(range(count))
        if count == new_count:
            self._keep(LAYERS, stack, Selection(count, identity))
            return identity
        candidates = [set(range(count)) for _ in range(new_count)]
        compared = [False] * new_count
        inside = [[side.within(stack, i) for i in range(n)]
                  for side, n in ((self._old, count), (self._new, new_count))]  # fmt: skip
        for rest in dict.fromkeys(name for layer in inside[1] for name in layer):
            if all(len(c) == 1 for c in candidates):
                break
            sets = [[self._lines(side, layer.get(rest)) for layer in layers]
                    for side, layers in zip((self._old, self._new), inside, strict=True)]  # fmt: skip
            for number, lines in enumerate(sets[1]):
                fitting = {old for old in candidates[number] if lines and sets[0][old] and lines <= sets[0][old]}
                if fitting:  # else this weight was trained further, or the layer is new
                    candidates[number] = fitting
                    # Norms of ones, as models begin with, are those of a new layer too.
                    compared[number] |= len(lines) > 1 or len(fitting) == 1 < count
        hashes = [b"%d" % i for i in range(count)]
        found = [b"?" if not seen else b",".join(b"%d" % i for i in sorted(c))
                 for c, seen in zip(candidates, compared, strict=True)]  # fmt: skip
        several = {tuple(sorted(c)): c for c, seen in zip(candidates, compared, strict=True) if seen and len(c) > 1}
        for group in several:  # layers that are the same in the base
            for i in group:
                hashes[i] = b",".join(b"%d" % j for j in group)
        keep = _pair(hashes, found)
        if isinstance(keep, str):
            raise self._refusal(LAYERS, stack, [f"{stack} ({keep})"])
        self._keep(LAYERS, stack, Selection(count, tuple(keep)))
        return tuple(keep)

    def _lines(self, side: _Side, name: str | None) -> set[bytes]:
        """The hashes of the rows or columns of a weight along which hidden dimensions lie, if there are such."""
        if name is None:
            return set()
        try:
            axes = axes_of(_module(name), self._known.dimensions)
        except PlanError:
            return set()
        shape = side.shape(name)
        sides = (axes.rows, axes.columns)[: len(shape)]
        if len(shape) > 2 or ("hidden",) not in sides:
            return set()
        tensor = side.read(name)
        matrix = tensor.unsqueeze(0) if tensor.dim() == 1 else tensor if sides[1] == ("hidden",) else tensor.T
        # The new model may have renumbered the layer, but hidden dimensions are the same in all of them.
        index = None if self._hidden is None else IndexMap(self._found).indices(("hidden",), "", self._hidden)
        matrix = _of_base(matrix, index, is_new=side is self._new)
        return set(_hashes(matrix.float(), ("line",), "line", {"line": len(matrix)}))

    def _layer(self, stack: str, old: int, new: int) -> None:
        """Heads, experts and neurons of one layer."""
        inside = self._old.within(stack, old), self._new.within(stack, new)
        places: dict[tuple[str, str], None] = {}
        for kind in (EXPERTS, HEADS, KV_HEADS, "intermediate"):
            for _ in range(2):  # a fused weight waits for what another one says
                for weight in self._weights(kind, f"{stack}.{old}", *inside):
                    places[kind, weight.place] = None
                    self._try(kind, weight)
        for kind, place in places:
            self._check(kind, place)

    def _weights(self, kind: str, layer: str, old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[_Weight]:
        """All weights of one layer of the base that could have this kind, in both models."""
        experts = IndexMap({EXPERTS: self._found.get(EXPERTS, {})})
        for rest, name in old.items():
            shape, container = self._old.shape(name), name.rpartition(".")[0]
            if len(shape) == 3 and rest in new and kind == "intermediate":
                selection = experts.find(EXPERTS, container)
                for number, expert in enumerate(range(shape[0]) if selection is None else selection.keep):
                    if expert is not None:
                        yield _Weight(f"{container}.{expert}", name, new[rest], (expert, number))
            elif len(shape) <= 2:
                for renamed in experts.new_names(name):
                    if (found := new.get(renamed.removeprefix(f"{layer}."))) is not None:
                        yield _Weight(_place(kind, layer, name), name, found)

    # -- the result ----------------------------------------------------------------------------------------------

    def _verify(self, made: IndexMap) -> None:
        """Raise PlanError where a weight's new size is not explained by what was found."""
        for name in self._old.names:
            module, shape = _module(name), self._old.shape(name)
            try:
                axes = axes_of(module, self._known.dimensions)
            except PlanError:
                continue
            for new in made.new_names(name):
                if new not in self._new.names and STACK.search(new):
                    raise PlanError(
                        f"{self._new.model.label} has no {new}, which is the base's {self._old.names[name]} by what "
                        "was found; both models must be in one layout (fused or not, experts stacked or not), or "
                        f"{_GIVE}"
                    )
                if new not in self._new.names or len(shape) > 2:
                    continue
                expected = []
                for kinds, size in zip((axes.rows, axes.columns), shape, strict=False):
                    index = made.indices(kinds, module, size)
                    expected.append(size if index is None else len(index))
                if (given := list(self._new.shape(new))) != expected:
                    raise PlanError(
                        f"{self._new.names[new]} is {given} in {self._new.model.label}, where {expected} remain of "
                        f"the base's {list(shape)} by what could be found; {_GIVE}"
                    )

    def _map(self) -> IndexMap:
        """Without what stays as it is, and in one entry where all are alike."""
        made: dict[str, dict[str, Selection]] = {}
        cut = {kind for kind, scopes in self._found.items() if not all(one.is_identity for one in scopes.values())}
        if {HEADS, KV_HEADS} & cut:
            cut |= {HEADS, KV_HEADS} & self._found.keys()
        for kind, scopes in self._found.items():
            if kind in cut:
                made[kind] = {"": next(iter(scopes.values()))} if len(set(scopes.values())) == 1 else scopes
        return IndexMap(made, self._known.dimensions)


def _hashes(matrix: Tensor, kinds: Sequence[str], kind: str, counts: Mapping[str, int]) -> list[bytes]:
    """A hash of each of a kind along the rows of a matrix: of all its rows in all parts of a fused weight."""
    unit = len(matrix) // sum(counts[k] for k in kinds)
    data: Any = matrix.cpu().contiguous().view(-1).view(torch.uint8).view(len(matrix), -1).numpy()
    digests = [hashlib.blake2b(digest_size=16) for _ in range(counts[kind])]
    start = 0
    for k in kinds:
        if k == kind:
            for i, digest in enumerate(digests):
                digest.update(data[start + i * unit : start + (i + 1) * unit])
        start += counts[k] * unit
    return [digest.digest() for digest in digests]


def _of_base(matrix: Tensor, index: Tensor | None, *, is_new: bool) -> Tensor:
    """The columns that both models have, in the order of the new one, which has added the others.

    Args:
        matrix: of the base, or of the new model.
        index: the base's column for each of the new model's, -1 for an added one; None: they are the same.
    """
    if index is None:
        return matrix
    return matrix[:, index >= 0] if is_new else matrix[:, index[index >= 0]]


def _pair(old: Sequence[bytes], new: Sequence[bytes]) -> list[int | None] | str:
    """Which of ``old`` each of ``new`` is; or why that cannot be said.

    What is there several times in both is paired in order, since pruning keeps it. What is in no old one is new, but
    only where all of the old are there: else it was trained further.
    """
    places: dict[bytes, list[int]] = {}
    for i, digest in enumerate(old):
        places.setdefault(digest, []).append(i)
    times, seen = Counter(new), Counter[bytes]()
    keep: list[int | None] = []
    for i, digest in enumerate(new):
        found = places.get(digest, [])
        if len(found) > 1 and times[digest] != len(found):
            return f"its {i} is the base's {' and '.join(map(str, found[:3]))} alike"
        keep.append(None if not found else found[seen[digest] if len(found) > 1 else 0])
        seen[digest] += 1
    lacking = keep.count(None)
    if lacking and set(range(len(old))) - set(keep):
        return f"{lacking} of its {len(new)} are none of the base's {len(old)}"
    return keep


def _plain(name: str) -> str:
    """A tensor's name in one spelling, without the prefix of its model's class."""
    spelled = canonical(name)
    return spelled.removeprefix(max((p for p in PREFIXES if spelled.startswith(p)), key=len))


def _kinds(name: str, known: IndexMap) -> tuple[str, ...]:
    """The kinds of a tensor's rows and columns; none outside of the table."""
    try:
        axes = axes_of(_module(name), known.dimensions)
    except PlanError:
        return ()
    return (*axes.rows, *axes.columns)


def _module(name: str) -> str:
    return re.sub(r"\.(weight|bias)$", "", name)


def _place(kind: str, layer: str, name: str) -> str:
    """Where a selection of this kind holds, of which the tensor ``name`` is a part."""
    pattern = _FEED_FORWARD if kind == "intermediate" else _ATTENTION if kind in (HEADS, KV_HEADS) else None
    found = pattern.match(name) if pattern is not None else None
    return found[0] if found is not None and len(found[0]) > len(layer) else layer


def _head_counts(config: Any) -> dict[str, int]:
    """Numbers of heads by a configuration: an object of transformers', or config.json."""
    raw = config if isinstance(config, Mapping) else vars(config) if hasattr(config, "__dict__") else {}
    text = raw.get("text_config")
    raw = raw if text is None else text if isinstance(text, Mapping) else vars(text)
    counts = {}
    for kind, names in _COUNTS.items():
        found = next((raw[name] for name in names if isinstance(raw.get(name), int)), None)
        if found is not None:
            counts[kind] = found
    return counts
