"""IndexMap: which layers, heads, neurons, hidden dimensions, experts and tokens a pruned or grown model has kept.

A map is JSON: for each kind of dimension a list of the base's indices in the new model's order, null for what is new::

    {"version": 1,
     "layers": {"": {"of": 32, "keep": [0, 1, 5, null]}},
     "heads": {"": {"of": 32, "keep": [0, 1]}, "layers.5": {"of": 32, "keep": [4, 7]}},
     "dimensions": {"\\\\.wq$": ["heads", "hidden"]}}

The keys within a kind say where it holds, in the base's names and numbers: everywhere (""), or wherever these parts
of a dotted name stand ("layers.5", "encoder", "layers.3.mlp.experts.2"); the most parts win.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dimensions import EXPERT, EXPERTS, HEADS, KINDS, KV_HEADS, LAYERS, STACK, WITHIN, Axes, axes_of, parse_axes
from .errors import PlanError
from .naming import canonical

Kept = Sequence["int | None"]


@dataclass(frozen=True)
class Selection:
    """One dimension: of ``of`` in the base, new index i is ``keep[i]``, or new (None)."""

    of: int
    keep: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if not _is_int(self.of) or self.of < 1:
            raise PlanError(f"of={self.of!r} must be how many the base has")
        for index in self.keep:
            if index is not None and not (_is_int(index) and 0 <= index < self.of):
                raise PlanError(f"keep has {index!r}, but the base's indices are 0 to {self.of - 1}")
        if not self.keep:
            raise PlanError("keep is empty: nothing would be left")

    @property
    def is_identity(self) -> bool:
        return self.keep == tuple(range(self.of))

    def places(self, index: int) -> list[int]:
        """Where the base's ``index`` is in the new model: nowhere, once, or several times."""
        return [new for new, old in enumerate(self.keep) if old == index]


@dataclass(frozen=True)
class IndexMap:
    """What a pruned or grown model has of its base.

    Attributes:
        selections: kind (see ``portllm.dimensions``) -> where it holds -> what is kept.
        dimensions: regular expression for module names -> (output rows, input columns), before the built-in table.
    """

    selections: Mapping[str, Mapping[str, Selection]]
    dimensions: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern, (rows, columns) in self.dimensions.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise PlanError(f"dimensions: {pattern!r} is not a regular expression: {error}") from None
            parse_axes(rows, columns, f"dimensions[{pattern!r}]")
        for kind in self.selections:
            if kind not in KINDS:
                raise PlanError(f"there is no dimension {kind!r}; choose from {', '.join(KINDS)}")

    @classmethod
    def of(
        cls,
        *,
        dimensions: Mapping[str, tuple[str, str]] | None = None,
        **kinds: tuple[int, Kept] | Mapping[str, tuple[int, Kept]],
    ) -> IndexMap:
        """From lists: ``IndexMap.of(layers=(32, [0, 2]), intermediate={"layers.0": (11008, [...]), ...})``.

        Args:
            dimensions: see the class.
            kinds: layers, heads, kv_heads, intermediate, hidden, experts, vocabulary: (how many the base has, what
                is kept in the new order, None for what is new), or a mapping of places to such pairs.

        Raises:
            PlanError: a kind that there is not, an index out of range, query heads away from their key/value heads.
        """
        selections = {}
        for kind, given in kinds.items():
            scopes = given if isinstance(given, Mapping) else {"": given}
            selections[kind] = {scope: _selection(kind, scope, *pair) for scope, pair in scopes.items()}
        made = cls(selections, dict(dimensions or {}))
        made.check_groups()
        return made

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> IndexMap:
        """Read a map's JSON file; raises PlanError."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"{path}: cannot be read as JSON: {error}") from None
        try:
            return cls.from_dict(raw)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: Any) -> IndexMap:
        """From the file's JSON value; raises PlanError."""
        if not isinstance(raw, dict) or raw.get("version") != 1:
            raise PlanError('not a map of version 1; it must be an object such as {"version": 1, "layers": ...}')
        try:
            kinds = {
                kind: {str(scope): (one["of"], one["keep"]) for scope, one in scopes.items()}
                for kind, scopes in raw.items()
                if kind not in ("version", "dimensions")
            }
            own = {str(pattern): (str(rows), str(columns)) for pattern, (rows, columns) in _items(raw)}
        except (TypeError, LookupError, ValueError, AttributeError) as error:
            raise PlanError(
                f'garbled ({error!r}); each kind must be {{PLACE: {{"of": 32, "keep": [0, 1]}}}}, and dimensions '
                '{REGEX: ["heads", "hidden"]}'
            ) from None
        return cls.of(dimensions=own, **kinds)

    def as_dict(self) -> dict[str, Any]:
        """The file's JSON value."""
        kinds = {
            kind: {scope: {"of": one.of, "keep": list(one.keep)} for scope, one in scopes.items()}
            for kind, scopes in self.selections.items()
        }
        own = {"dimensions": {pattern: list(pair) for pattern, pair in self.dimensions.items()}}
        return {"version": 1, **kinds, **(own if self.dimensions else {})}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file; raises OSError."""
        temporary = Path(f"{os.fspath(path)}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self.as_dict()) + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    # -- names ---------------------------------------------------------------------------------------------------

    def find(self, kind: str, name: str) -> Selection | None:
        """What is kept of a kind of dimension in a tensor of the base; None: all of it. Raises PlanError for a tie."""
        dotted = f".{canonical(name)}."
        found = {s: one for s, one in self.selections.get(kind, {}).items() if not s or f".{s}." in dotted}
        most = max((_parts(scope) for scope in found), default=0)
        best = {scope: one for scope, one in found.items() if _parts(scope) == most}
        if len(set(best.values())) > 1:
            raise PlanError(f"{name}: the map's {kind} for {' and '.join(map(repr, best))} both hold there; keep one")
        return next(iter(best.values()), None)

    def new_names(self, name: str) -> list[str]:
        """The names in the new model of a tensor (or module, or key of an adapter) of the base; none if it is cut.

        Raises:
            PlanError: a layer or an expert that the map's base does not have.
        """
        names = [name]
        for kind, pattern in ((EXPERTS, EXPERT), (LAYERS, STACK)):
            match = pattern.search(name)
            number = None if match is None else int(match["number"])
            selection = None if match is None else self.find(kind, name[: match.start("number")].rstrip("."))
            if match is None or number is None or selection is None:
                continue
            if number >= selection.of:
                raise PlanError(f"{name}: the map is for a base with {selection.of} {kind}, 0 to {selection.of - 1}")
            start, stop = match.span("number")
            # The layer's number stands before the expert's, where nothing has moved yet.
            names = [f"{n[:start]}{new}{n[stop:]}" for new in selection.places(number) for n in names]
        return names

    @property
    def adds_layers(self) -> bool:
        """Whether the new model has layers that the base has not."""
        return any(None in one.keep for one in self.selections.get(LAYERS, {}).values())

    # -- axes ----------------------------------------------------------------------------------------------------

    def axes(self, module: str) -> Axes:
        """The kinds of a module's rows and columns; none where the map cuts nothing within tensors."""
        if not any(not one.is_identity for kind in WITHIN for one in self.selections.get(kind, {}).values()):
            return Axes((), ())
        return axes_of(canonical(module), self.dimensions)

    def indices(self, kinds: Sequence[str], module: str, size: int, what: str = "rows") -> Tensor | None:
        """The base's indices along one axis, in the new order; -1 for what is new; None where the axis stays as it is.

        Args:
            kinds: of the axis, see ``portllm.dimensions``.
            module: whose axis it is.
            size: of the axis in the base.
            what: the axis' name for messages.

        Raises:
            PlanError: the map is for a base of another size, or does not say enough of a fused axis.
        """
        chosen = [self.find(kind, module) for kind in kinds]
        if KV_HEADS in kinds and HEADS in self.selections and None in chosen:
            raise PlanError(
                f"{module}: the map has heads, but no kv_heads; say them too: the same list where each query head has "
                "its own key and value, all of them where they stay"
            )
        known = [one for one in chosen if one is not None]
        if not known:
            return None
        if len(known) < len(chosen):
            lacks = next(kind for kind, one in zip(kinds, chosen, strict=True) if one is None)
            raise PlanError(f"{module} holds {'+'.join(kinds)}, but the map does not say the {lacks}")
        total = sum(one.of for one in known)
        unit = size // total
        if unit * total != size or (unit != 1 and not {HEADS, KV_HEADS} & set(kinds)):
            raise PlanError(
                f"{module} has {size} {what}, but the map is for a base with {' + '.join(str(s.of) for s in known)} "
                f"({'+'.join(kinds)}); is it the map of another model?"
            )
        parts, start = [], 0
        for one in known:
            kept = torch.tensor([-1 if index is None else index for index in one.keep]).unsqueeze(1)
            parts.append(torch.where(kept < 0, -1, start + kept * unit + torch.arange(unit)).flatten())
            start += one.of * unit
        found = torch.cat(parts)
        return None if torch.equal(found, torch.arange(size)) else found

    def check_groups(self) -> None:
        """Raise PlanError where a kept query head would read another key/value head than it did (grouped queries)."""
        for scope in {*self.selections.get(HEADS, {}), *self.selections.get(KV_HEADS, {})}:
            queries, keys = (self.selections.get(kind, {}).get(scope) for kind in (HEADS, KV_HEADS))
            queries = queries or self.find(HEADS, scope)
            keys = keys or self.find(KV_HEADS, scope)
            if queries is None or keys is None:
                continue
            place = f" for {scope}" if scope else ""
            groups = queries.of / keys.of, len(queries.keep) / len(keys.keep)
            if not all(group.is_integer() for group in groups):
                raise PlanError(
                    f"heads and kv_heads{place}: {queries.of} over {keys.of} in the base, {len(queries.keep)} over "
                    f"{len(keys.keep)} in the new model; each key/value head needs the same number of query heads"
                )
            for new, old in enumerate(queries.keep):
                read = keys.keep[new // int(groups[1])]
                if old is not None and read is not None and old // int(groups[0]) != read:
                    raise PlanError(
                        f"heads and kv_heads{place} do not go together: query head {old} of the base reads key/value "
                        f"head {old // int(groups[0])}, but as head {new} of the new model it would read {read}"
                    )


def take(tensor: Tensor, axis: int, indices: Tensor | None) -> Tensor:
    """The entries along an axis, zeros where an index is -1; the tensor itself where ``indices`` is None."""
    if indices is None:
        return tensor
    indices = indices.to(tensor.device)
    taken = tensor.index_select(axis, indices.clamp(min=0))
    return taken.index_fill_(axis, (indices < 0).nonzero().flatten(), 0) if bool((indices < 0).any()) else taken


def _selection(kind: str, scope: str, count: Any, keep: Any) -> Selection:
    place = f"{kind} for {scope!r}" if scope else kind
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        raise PlanError(f"{place}: keep={keep!r} must be a list of the base's indices")
    try:
        return Selection(count, tuple(keep))
    except PlanError as error:
        raise PlanError(f"{place}: {error}") from None


def _items(raw: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    own = raw.get("dimensions") or {}
    return own.items()


def _parts(scope: str) -> int:
    return len(scope.split(".")) if scope else 0


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
