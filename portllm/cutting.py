"""Cut a patch to a pruned or grown model: the same adapter for the layers, heads, neurons and rows that are kept.

Each element of ``lora_B @ lora_A`` depends on one row of lora_B and one column of lora_A alone, so that cutting them is
cutting the delta: to apply and then prune is to prune and then apply the cut patch, to the last bit wherever a
backend sums each element in the same order (the compiled library does, except for AMX).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from .bind import ExpertLayout
from .config import written_alpha
from .dimensions import EXPERTS, LAYERS, STACK, is_conv1d
from .errors import PatchError, PlanError, UnsupportedPatchError
from .fingerprint import METADATA_KEY
from .live import Source, as_patches
from .naming import Names
from .patch import ExpertEntry, LoraEntry, Patch, ReplaceEntry, RowsEntry, factor_key, replaced_tensors
from .readable import Model, ReadableModel
from .structure import IndexMap, Selection, take

Cuts = list[tuple[Tensor, Tensor]]  # lora_A and lora_B of each stacked parameter

_OF_ROWS = ("lora_B", "lora_embedding_A")
_AXES = {"lora_A": 1, "lora_B": 0, "lora_embedding_A": 1, "lora_embedding_B": 0}


def cut(
    patch: Source, index_map: IndexMap, *, model: Model | None = None, expert_layout: ExpertLayout | None = None
) -> Patch:
    """The patch for a model that keeps, of the patch's base, what the map says; an adapter as any other.

    Layers that are cut take their factors with them, added ones get none; rows and columns that are added are zero.
    Settings that speak of layers (layers_to_transform, rank_pattern, alpha_pattern, names with numbers) are renumbered,
    trained tokens as well. The fingerprint of the base is left out: ``portllm.stamp`` the pruned base instead.

    Args:
        patch: a Patch, an adapter directory or a hub id.
        index_map: what is kept.
        model: the new model, only where the patch replaces tensors whole (modules_to_save, biases, a saved
            vocabulary) that have added rows: those take this model's values.
        expert_layout: as ``portllm.apply``.

    Raises:
        PatchError: the patch cannot be read, or nothing of it is left.
        PlanError: the map is for another model, or does not know a module's dimensions; values for added rows lack.
        UnsupportedPatchError: DoRA where a magnitude's vector would be cut, which changes its norm.
    """
    [(loaded, _)] = as_patches(patch)
    cutter = _Cutter(loaded, index_map, None if model is None else ReadableModel.open(model, "new"), expert_layout)
    tensors = cutter.tensors()
    if not tensors:
        raise PatchError(f"{loaded.name}: nothing of it is left: all that it changes is cut")
    metadata = {key: value for key, value in loaded.metadata.items() if key != METADATA_KEY}
    return Patch.from_tensors(tensors, cutter.settings(), name=loaded.name, metadata=metadata)


@dataclass(frozen=True)
class _Place:
    """How one matrix is cut: indices along its rows and columns, None for all (see ``IndexMap.indices``)."""

    rows: Tensor | None
    columns: Tensor | None


class _Cutter:
    """Cuts one patch; ``settings`` come after ``tensors``, whose new names they need."""

    def __init__(
        self, patch: Patch, index_map: IndexMap, model: ReadableModel | None, expert_layout: ExpertLayout | None
    ) -> None:
        self._patch, self._map, self._model, self._layout = patch, index_map, model, expert_layout
        self._renamed: dict[str, list[str]] = {}  # modules and parameters with factors -> their new names
        self._tokens: dict[str, tuple[int, ...]] = {}  # modules with trained tokens -> the new indices

    def tensors(self) -> dict[str, Tensor]:
        """The new adapter's state dict."""
        made: dict[str, Tensor] = {}
        loras = {entry.module: entry for entry in self._patch.entries if isinstance(entry, LoraEntry)}
        experts = {entry.module: entry for entry in self._patch.entries if isinstance(entry, ExpertEntry)}
        stacked: dict[str, dict[str, dict[str, Tensor]]] = {}
        for key, tensor in self._patch.tensors.items():
            found = factor_key(key)
            if found is None:
                continue
            wrapped, part = found
            module = re.sub(r"\.base_layer(?=\.|$)", "", wrapped)
            if module in experts:
                # By the wrapper that holds them: each more base_layer is one further in.
                stacked.setdefault(module, {}).setdefault(wrapped, {})[key] = tensor
                continue
            self._renamed[module] = self._map.new_names(module)
            value = self._factor(loras[module], part, tensor)
            made |= _copies(self._map.new_names(key), value)
        for module, wrappers in stacked.items():
            made |= self._experts(experts[module], wrappers)
        return made | self._replaced()

    # -- factors -------------------------------------------------------------------------------------------------

    def _place(self, module: str, rows: int, columns: int) -> _Place:
        axes = self._map.axes(module)
        return _Place(
            self._map.indices(axes.rows, module, rows), self._map.indices(axes.columns, module, columns, "columns")
        )

    def _factor(self, entry: LoraEntry, part: str, tensor: Tensor) -> Tensor:
        place = self._place(entry.module, entry.lora_B.shape[0], entry.lora_A.shape[1])
        if part == "lora_magnitude_vector":
            return self._magnitude(entry, place, tensor)
        return take(tensor, _AXES[part], place.rows if part in _OF_ROWS else place.columns)

    def _magnitude(self, entry: LoraEntry, place: _Place, tensor: Tensor) -> Tensor:
        """DoRA's norms run along the columns of a weight, along the rows of an embedding: those must stay whole."""
        along, across = (place.rows, place.columns) if entry.kind == "embedding" else (place.columns, place.rows)
        if along is not None or (across is not None and bool((across < 0).any())):
            raise UnsupportedPatchError(
                f"{self._patch.name}: module {entry.module} has DoRA magnitudes, the norms of whole "
                f"{'columns' if entry.kind == 'embedding' else 'rows'}, which the map cuts or adds to, so they would "
                "mean something else; apply the patch to its base, prune the result, and make a plain patch of the "
                "difference (portllm.extract)"
            )
        return take(tensor.flatten(), 0, across)

    def _experts(self, entry: ExpertEntry, wrappers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Which factors are whose, and how they lie, the map's sizes must tell, as far as it makes a difference."""
        keys = sorted(wrappers, key=lambda wrapped: -wrapped.count(".base_layer"))  # innermost first, as entry.factors
        choices: list[Cuts] = []
        refusal: PlanError | None = None
        layouts = (False, True) if self._layout is None else (self._layout == "in_out",)
        for parameters in permutations(entry.parameters, len(entry.factors)):
            for swapped in layouts:
                try:
                    cuts = [
                        self._stack(name, *factors, swapped)
                        for name, factors in zip(parameters, entry.factors, strict=True)
                    ]
                except PlanError as error:
                    refusal = refusal or error
                    continue
                if not any(_same(cuts, others) for others in choices):
                    choices.append(cuts)
        if len(choices) != 1:
            if refusal is not None and not choices:
                raise refusal
            raise PlanError(
                f"{entry.module}: its factors fit {' and '.join(entry.parameters)} in several ways; say the sizes of "
                "all dimensions in the map, and expert_layout='out_in' or 'in_out' (--expert-layout)"
            )
        self._renamed |= {name: self._map.new_names(name) for name in entry.parameters}
        made: dict[str, Tensor] = {}
        for wrapped, pair in zip(keys, choices[0], strict=True):
            for key in wrappers[wrapped]:
                value = pair[1 if ".lora_B" in key else 0]
                made |= _copies(self._map.new_names(key), value)
        return made

    def _stack(self, parameter: str, lora_A: Tensor, lora_B: Tensor, swapped: bool) -> tuple[Tensor, Tensor]:
        """lora_A [E*r, in] and lora_B [out, r*E] of one parameter, expert by expert; PlanError if they do not fit."""
        rank = self._patch.config.rank(parameter)
        count = lora_A.shape[0] // rank
        if count * rank != lora_A.shape[0]:
            raise PlanError(f"{parameter}: lora_A {list(lora_A.shape)} is not of rank {rank} for each expert")
        each_A, each_B = lora_A.reshape(count, rank, -1), lora_B.reshape(-1, rank, count)
        container, _, leaf = parameter.rpartition(".")
        selection = self._map.find(EXPERTS, container) if count > 1 else None
        if selection is not None and selection.of != count:
            raise PlanError(f"{parameter} has {count} experts, but the map is for a base with {selection.of}")
        made_A, made_B = [], []
        for expert in range(count) if selection is None else selection.keep:
            name = parameter if count == 1 else f"{container}.{expert or 0}.{leaf}"
            sides = lora_B.shape[0], lora_A.shape[1]
            place = self._place(name.removesuffix(".weight"), *(sides[::-1] if swapped and count > 1 else sides))
            along = (place.columns, place.rows) if swapped and count > 1 else (place.rows, place.columns)
            factor_A, factor_B = take(each_A[expert or 0], 1, along[1]), take(each_B[:, :, expert or 0], 0, along[0])
            made_A.append(torch.zeros_like(factor_A) if expert is None else factor_A)
            made_B.append(torch.zeros_like(factor_B) if expert is None else factor_B)
        if len({(a.shape, b.shape) for a, b in zip(made_A, made_B, strict=True)}) > 1:
            raise PlanError(f"{parameter}: the map keeps another number of rows in each expert; stacked ones are alike")
        return torch.cat(made_A), torch.stack(made_B, dim=2).flatten(1)

    # -- tensors that replace ------------------------------------------------------------------------------------

    def _replaced(self) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        entries = [entry for entry in self._patch.entries if isinstance(entry, ReplaceEntry | RowsEntry)]
        for (key, tensor), entry in zip(replaced_tensors(self._patch).items(), entries, strict=True):
            if isinstance(entry, RowsEntry):
                value = self._trained_tokens(entry)
                made |= {} if value is None else _copies(self._map.new_names(key), value)
                continue
            for name, new_key in zip(self._map.new_names(entry.name), self._map.new_names(key), strict=True):
                value = self._whole(entry.name, name, tensor)
                made[new_key] = value.clone() if value is tensor else value  # a file needs memory for each
        return made

    def _trained_tokens(self, entry: RowsEntry) -> Tensor | None:
        """The rows that are kept, at their new places; None if no one is."""
        axes = self._map.axes(entry.module)
        columns = self._map.indices(axes.columns, entry.module, entry.values.shape[1], "columns")
        kept = next((one for kind in axes.rows if (one := self._map.find(kind, entry.module)) is not None), None)
        if kept is not None and max(entry.indices) >= kept.of:
            raise PlanError(
                f"{entry.module}: trained token {max(entry.indices)}, but the map is for a vocabulary of {kept.of}"
            )
        # A token's rows are often many: one look-up for each, not a search.
        places: dict[int, list[int]] = {}
        for new, old in enumerate(kept.keep if kept is not None else ()):
            places.setdefault(-1 if old is None else old, []).append(new)
        moved = [(row, new) for row, old in enumerate(entry.indices)
                 for new in ([old] if kept is None else places.get(old, []))]  # fmt: skip
        if not moved:
            return None
        self._tokens[entry.module] = tuple(new for _, new in moved)
        return take(entry.values[[row for row, _ in moved]], 1, columns)

    def _whole(self, old: str, new: str, tensor: Tensor) -> Tensor:
        """A tensor that replaces the model's ``new``, of the base's ``old``; added entries are the model's own."""
        if tensor.dim() == 3:
            return self._whole_stack(old, new, tensor)
        module = re.sub(r"\.(weight|bias)$", "", old)
        axes = self._map.axes(module)
        kinds = [axes.rows, axes.columns][: tensor.dim()]
        if tensor.dim() == 2 and self._patch.config.fan_in_fan_out and is_conv1d(module):
            kinds.reverse()  # stored [in, out]
        indices = [self._map.indices(kind, module, tensor.shape[axis]) for axis, kind in enumerate(kinds)]
        return self._filled(old, new, tensor, indices)

    def _whole_stack(self, old: str, new: str, tensor: Tensor) -> Tensor:
        container, _, leaf = old.rpartition(".")
        selection = self._map.find(EXPERTS, container)
        if selection is not None and selection.of != len(tensor):
            raise PlanError(f"{old} has {len(tensor)} experts, but the map is for a base with {selection.of}")
        if self._layout is None and self._map.axes(f"{container}.0.{leaf}").rows:
            raise PlanError(
                f"{old} is stacked experts, saved whole; say how they lie with expert_layout='out_in' or 'in_out' "
                "(--expert-layout)"
            )
        parts = []
        for expert in range(len(tensor)) if selection is None else selection.keep:
            if expert is None:
                raise PlanError(f"{old} replaces all experts, but the new model has added ones; leave it out")
            axes = self._map.axes(f"{container}.{expert}.{leaf}")
            kinds = (axes.rows, axes.columns) if self._layout == "out_in" else (axes.columns, axes.rows)
            part = tensor[expert]
            indices = [self._map.indices(k, container, part.shape[i]) for i, k in enumerate(kinds)]
            parts.append(self._filled(old, new, part, indices))
        return torch.stack(parts)

    def _filled(self, old: str, new: str, tensor: Tensor, indices: Iterable[Tensor | None]) -> Tensor:
        added = torch.zeros((), dtype=torch.bool)
        for axis, index in enumerate(indices):
            tensor = take(tensor, axis, index)
            if index is not None:
                added = added | (index < 0).view([-1 if i == axis else 1 for i in range(tensor.dim())])
        if not bool(added.any()):
            return tensor
        if self._model is None:
            raise PlanError(
                f"{old} replaces the model's values ({self._patch.name} holds it whole), but the new model has rows "
                "that it has not; give the new model, whose own values they keep: cut(..., model=) (--pruned)"
            )
        target = self._model.target
        _, placements = Names(target.tensors, target.aliases).place(new, 0)
        stored = target.aliases.get(placements[0].name, placements[0].name) if placements else new
        own = self._model.read(stored) if stored in target.tensors else None
        if own is None or own.shape != tensor.shape:
            found = "is not there" if own is None else f"is {list(own.shape)}"
            raise PlanError(f"{new} is {list(tensor.shape)} by the map, but {found} in {self._model.label}")
        return torch.where(added.to(tensor.device), own.to(tensor), tensor)

    # -- settings ------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """adapter_config.json of the new patch."""
        config, raw = self._patch.config, dict(self._patch.config.raw)
        if raw.get("trainable_token_indices"):
            raw["trainable_token_indices"] = self._token_settings()
        moved = any(new != [old] for old, new in self._renamed.items()) or self._map.adds_layers
        if not moved:
            return raw
        if config.rank_pattern or config.alpha_pattern:
            raw |= self._patterns()
        raw |= self._selection()
        for key in ("modules_to_save", "target_parameters"):
            if raw.get(key):
                raw[key] = list(dict.fromkeys(new for name in raw[key] for new in self._map.new_names(name)))
        if config.target_parameters and self._map.adds_layers:
            # PEFT looks for a name's end in every layer, the added ones too.
            raw["target_parameters"] = sorted(
                new for old, names in self._renamed.items() if config.targets_parameter(old) for new in names
            )
        return raw

    def _token_settings(self) -> Any:
        tokens = self._patch.config.trainable_token_indices
        if isinstance(tokens, Mapping):
            kept = {
                key: next((n for m, n in self._tokens.items() if m == key or m.endswith(f".{key}")), ())
                for key in tokens
            }
            return {key: list(new) for key, new in kept.items() if new} or None
        if len(set(self._tokens.values())) > 1:
            raise PlanError(
                "trainable_token_indices is one list for several layers, which the map cuts in different ways; "
                "write it for each layer in adapter_config.json"
            )
        return list(next(iter(self._tokens.values()), ())) or None

    def _patterns(self) -> dict[str, Any]:
        """Ranks and alphas by the full new names: an expression for old numbers may mean other layers now."""
        config = self._patch.config
        modules = {new: old for old, names in self._renamed.items() for new in names}
        ranks = {f"^{re.escape(new)}": config.rank(old) for new, old in modules.items()}
        alphas = {f"^{re.escape(new)}": written_alpha(config.alpha(old)) for new, old in modules.items()}
        return {
            "rank_pattern": {key: rank for key, rank in ranks.items() if rank != config.r},
            "alpha_pattern": {key: alpha for key, alpha in alphas.items() if alpha != config.lora_alpha},
        }

    def _selection(self) -> dict[str, Any]:
        """target_modules and layers_to_transform for the new numbers; names in full where they could mean more."""
        config, targets = self._patch.config, self._patch.config.target_modules
        adds = self._map.adds_layers
        if targets is None or (config.selects_by_kind and not adds):
            return {}
        if isinstance(targets, tuple) and not _has_numbers((*targets, *(config.exclude_modules or ()))):
            scopes = self._map.selections.get(LAYERS, {})
            if not config.layers_to_transform and not adds:
                return {}
            if scopes.keys() <= {""} and all(STACK.search(module) for module in self._renamed):
                return {"layers_to_transform": self._new_numbers(scopes.get(""))}
        modules = sorted(new for old, names in self._renamed.items() if config.targets_module(old) for new in names)
        return {"target_modules": modules, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}

    def _new_numbers(self, selection: Selection | None) -> list[int]:
        """The new numbers of the layers that have factors, as layers_to_transform names them."""
        chosen = self._patch.config.layers_to_transform
        if selection is None:
            return list(chosen)
        return [n for n, old in enumerate(selection.keep) if old is not None and (not chosen or old in chosen)]


def _copies(names: Iterable[str], tensor: Tensor) -> dict[str, Tensor]:
    """The tensor under each name; a layer that is there twice has memory of its own, which a file needs."""
    return {name: tensor if i == 0 else tensor.clone() for i, name in enumerate(names)}


def _same(one: Cuts, other: Cuts) -> bool:
    return all(torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True))


def _has_numbers(names: Iterable[str]) -> bool:
    return any(part.isdigit() for name in names for part in name.split("."))
