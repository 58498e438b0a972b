"""Serving layouts: patches on the weights of engines that fuse and shard them by themselves (vLLM, SGLang).

The call for other tools: each rank gives the tensors that it holds, by the engine's names, and says which rank it is.

    def patch_worker(worker, adapter):                    # runs in each worker, e.g. by vLLM's collective_rpc
        model = worker.model_runner.model
        layout = portllm.layouts.vllm(
            model.config, tp_rank=get_tensor_model_parallel_rank(), tp_size=get_tensor_model_parallel_world_size()
        )
        return portllm.apply(dict(model.named_parameters()), adapter, layout=layout, undo="exact")

The patch is bound against the whole model, whose tensors and shapes follow from the engine's names and the config, and
the plan is cut to what lies here: every rank updates its own slices, in place, and no weight moves. The result has the
bits of patching the whole model and sharding it afterwards. Which tensor lies where is a row in
``portllm.layout_tables``; rows of your own, for a model that is not there, go before those of the table:

    from portllm.layout_tables import Rule
    mine = Rule(r"(.+\\.)wqkv\\.weight", ((r"\\1wq.weight", "heads"), (r"\\1wkv.weight", "kv_heads")), "hidden", "rows")
    portllm.layouts.vllm("model/", tp_rank=0, tp_size=2, rules=[mine])

Not covered, and refused by name: quantised weights, experts in blocks that only one kernel reads, tensors that no row
speaks of. Not to be seen from outside, and therefore up to the caller: experts that a load balancer has moved since the
model was loaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .bind import Options, Target, bind
from .errors import PlanError
from .layout_tables import (
    DIMENSIONS,
    ENDS,
    KEYS,
    RULES,
    SGLANG_EXPERTS,
    TOWERS,
    VLLM_EXPERTS,
    Dimension,
    ExpertForm,
    Group,
    Rule,
)
from .naming import canonical, tied_names
from .patch import Patch
from .planning import Plan, check_dtype, some
from .reference import FLOAT_DTYPES
from .sharding import Piece, localise

_Run = tuple[int, int, int] | tuple[None, None, None]  # place here, first expert, how many; None without experts
_Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # where here, where in the whole, size

Config = str | os.PathLike[str] | Mapping[str, Any] | Any  # the last: a transformers config


@dataclass(frozen=True)
class Ranks:
    """A group of ranks that share a weight, and which of them this one is."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise PlanError(f"rank {self.rank} of {self.size} ranks does not exist; ranks count from 0")


@dataclass(frozen=True)
class Layout:
    """How one rank of an engine holds a model; made by ``vllm`` and ``sglang``.

    Attributes:
        engine: its name, for messages.
        config: the model's settings, by the names of transformers.
        ranks: for each kind of weight who shares it.
        experts: for each expert that this rank holds, in its order, the number that the model gives it; None: all.
        pipeline: the number of pipeline stages; with more than one, layers that are not here are no error.
        moe_backend, backends: the kernel for experts, and what is known of each.
        vocab_padding: the vocabulary is padded to a multiple of this many rows, then shared.
        extra_vocab: rows that the engine keeps free for tokens added by LoRA adapters, padded as well.
        derived_follow: the caller has the engine compute again what it derives from a patched tensor.
        rules: see ``layout_tables.Rule``.
    """

    engine: str
    config: Mapping[str, Any]
    ranks: Mapping[Group, Ranks]
    experts: tuple[int, ...] | None = None
    pipeline: int = 1
    moe_backend: str | None = None
    backends: Mapping[str, ExpertForm | str] = field(default_factory=dict)
    vocab_padding: int = 64
    extra_vocab: int = 0
    derived_follow: bool = False
    rules: tuple[Rule, ...] = RULES

    def bind(
        self, target: Target, patches: Sequence[tuple[Patch, float]], options: Options, *, strict: bool = True
    ) -> Plan:
        """The plan for this rank's tensors.

        Args:
            target: this rank's tensors, under the engine's names.
            patches, options, strict: as for ``portllm.plan``.

        Raises:
            PlanError: as ``portllm.plan``; or a tensor that the patch changes has another shape than config and ranks
                imply, is quantised, or is of a kind that the layout has no row for.
        """
        if options.tied == "untie":
            raise PlanError(f"tied='untie': {self.engine} has tied its weights already; untie the model on disk")
        view = _View(self, target)
        try:
            plan = bind(Target(view.whole, view.aliases, lambda name: False, declared=True), patches, options)
        except PlanError as error:
            # A patch that does not fit, and a config that does not fit the tensors: the latter may be why.
            raise PlanError("; ".join([str(error), *list(view.misshapen.values())[:1]])) from None
        here = tuple(name for name in plan.unmatched_patch if not view.is_elsewhere(name))
        everything_elsewhere = not here and bool(plan.unmatched_patch)
        plan = replace(plan, unmatched_patch=here)
        if strict and here and view.unknown:
            named = [f"{name} ({reason})" for name, reason in view.unknown.items()]
            raise PlanError(
                f"{len(here)} names of the patch are in no tensor here that the layout knows: {some(here)}; "
                f"it leaves alone {some(named)}; give rules= for these, or strict=False to apply the rest"
            )
        if plan.updates or plan.assigns or not everything_elsewhere:
            plan.check_complete(strict=strict)
        _check_dora(plan, view)
        local = localise(plan, view.pieces)
        for name in local.tensors:
            if name in view.problems:
                raise PlanError(view.problems[name])
        return local

    def dimension(self, name: str | Dimension) -> Dimension:
        return name if isinstance(name, Dimension) else DIMENSIONS[name]

    def setting(self, key: str, layer: int | None) -> int:
        """A number of the config; PlanError if it has none."""
        for spelling in KEYS.get(key, (key,)):
            value = self.config.get(spelling)
            if isinstance(value, list | tuple) and layer is not None and layer < len(value):
                value = value[layer]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        if key == "num_key_value_heads":
            return self.setting("num_attention_heads", layer)
        if key == "head_dim":
            return self.setting("hidden_size", layer) // self.setting("num_attention_heads", layer)
        raise PlanError(f"the model's config has no number {key!r}")


@dataclass(frozen=True)
class _Share:
    """A rank's part of one dimension: [start, start + length) of ``whole``, in ``room`` indices of its tensor."""

    whole: int
    start: int
    length: int
    room: int


class _View:
    """What a rank's tensors are parts of.

    Attributes:
        whole: the model's own tensors of which anything is known to lie here, as meta tensors.
        aliases: names of tied ones -> name in ``whole``.
        pieces: for each whole tensor its boxes here.
        misshapen: tensors here that have another shape than they should, in words.
        problems: tensors here that must not be patched, and why; those as well.
        unknown: tensors here that no rule explains, and why.
    """

    def __init__(self, layout: Layout, target: Target) -> None:
        self._layout = layout
        self.whole: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.pieces: dict[str, list[Piece]] = {}
        self.misshapen: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        self.unknown: dict[str, str] = {}
        spoken: dict[str, list[str]] = {name: [name] for name in target.tensors}
        for alias, name in target.aliases.items():
            spoken[name].append(alias)
        self._tied = _is_tied(layout, spoken)
        for name, tensor in target.tensors.items():
            found = [(alias, match) for alias in spoken[name] if (match := self._rule(alias))]
            if found:
                self._explain(name, tensor, *found[0][1])
            elif TOWERS.fullmatch(name):
                self.unknown[name] = "of another tower than the language model"
            elif tensor.dim() > 1:
                self.unknown[name] = "no rule speaks of it"
        if self._tied:
            self.aliases = tied_names(self.whole)
        self._layers = {layer for name in self.whole if (layer := _layer(name)) is not None}

    def is_elsewhere(self, name: str) -> bool:
        """Whether something that the patch speaks of lies on another pipeline stage."""
        if self._layout.pipeline == 1:
            return False
        layer = _layer(name)
        if layer is None:
            return ENDS.fullmatch(name) is not None
        return layer not in self._layers and layer < self._layout.setting("num_hidden_layers", None)

    def _rule(self, name: str) -> tuple[Rule, re.Match[str]] | None:
        # With LoRA switched on, engines wrap each layer, and keep its weight as base_layer.
        spelled = canonical(name).replace(".base_layer.", ".")
        if TOWERS.fullmatch(spelled):
            return None
        for rule in self._layout.rules:
            if rule.models and self._layout.config.get("model_type") not in rule.models:
                continue
            if rule.needs and not self._layout.config.get(rule.needs):
                continue
            if match := re.fullmatch(rule.name, spelled):
                return rule, match
        return None

    def _explain(self, name: str, tensor: Tensor, rule: Rule, match: re.Match[str]) -> None:
        """Say of which whole tensors this one holds boxes, and note why it must not be patched, if so."""
        layout, form = self._layout, ExpertForm()
        problem = ""
        if tensor.dtype not in FLOAT_DTYPES:
            problem = _refusal(name, tensor)
        if rule.derived and not layout.derived_follow:
            problem = problem or (
                f"{layout.engine} has computed {rule.derived} from {name}, and would go on with the old ones; have it "
                "compute them again after the patch (process_weights_after_loading), and say derived_follow=True"
            )
        if rule.stacked:
            form, reason = _expert_form(layout, name)
            problem = problem or reason
        try:
            expected, boxes = self._boxes(tensor, rule, match, form)
        except PlanError as error:
            self.unknown[name] = str(error)
            return
        if tuple(tensor.shape) != expected and not problem:
            ranks = layout.ranks[rule.group]
            problem = self.misshapen[name] = (
                f"{name} is {list(tensor.shape)}, but by the config and rank {ranks.rank} of {ranks.size} "
                f"({rule.group}) it should be {list(expected)}; give the ranks and sizes that {layout.engine} runs "
                "with, and the config of this model"
            )
        if problem:
            self.problems[name] = problem
        # A quantised tensor never gets as far as being written: its stand-in only has to bind.
        dtype = tensor.dtype if tensor.dtype in FLOAT_DTYPES else torch.bfloat16
        for whole, shape, pieces in boxes:
            stored = self._stored(whole)
            known = self.whole.setdefault(stored, torch.empty(shape, dtype=dtype, device="meta"))
            if tuple(known.shape) != shape:
                raise PlanError(f"{stored} is {list(known.shape)} by one tensor here, and {list(shape)} by {name}")
            self.pieces.setdefault(stored, []).extend(replace(piece, local=name) for piece in pieces)

    def _boxes(
        self, tensor: Tensor, rule: Rule, match: re.Match[str], form: ExpertForm
    ) -> tuple[tuple[int, ...], list[tuple[str, tuple[int, ...], list[Piece]]]]:
        """The shape that the tensor should have, and for each whole tensor in it: name, shape, pieces."""
        layer, flat = _layer(match[0]), tensor.dim() == 1
        row_axis, column_axis = (-1, -2) if form.transposed else (-2, -1)
        columns = _Share(1, 0, 1, 1) if flat else self._share(rule, "columns", rule.columns, tensor, column_axis, layer)
        parts: list[tuple[str, int, _Share]] = []  # whole tensor, row of it where the part begins, share of the part
        sizes: dict[str, int] = {}
        for template, dimension in rule.holds:
            whole = match.expand(template)
            share = self._share(rule, "rows", dimension, tensor, 0 if flat else row_axis, layer)
            parts.append((whole, sizes.get(whole, 0), share))
            sizes[whole] = sizes.get(whole, 0) + share.whole
        if form.up_first and len(parts) == 2:
            parts.reverse()
        count = self._layout.setting("num_experts", layer) if rule.stacked else 0
        runs: list[_Run] = list(_runs(self._experts(count))) if rule.stacked else [(None, None, None)]
        pieces: dict[str, list[Piece]] = {whole: [] for whole in sizes}
        row = 0
        for whole, offset, share in parts:
            corner: _Box = ((row, 0), (offset + share.start, columns.start), (share.length, columns.length))
            for run in runs if share.length and columns.length else ():
                at, start, shape = (_spread(i, flat, form, e) for i, e in zip(corner, run, strict=True))
                pieces[whole].append(Piece("", at, start, shape))
            row += share.room
        here = len(self._experts(count)) if rule.stacked else None
        expected = _spread((row, columns.room), flat, form, here)
        everything = count if rule.stacked else None
        return expected, [(w, _spread((n, columns.whole), flat, form, everything), pieces[w]) for w, n in sizes.items()]

    def _share(
        self, rule: Rule, side: str, dimension: str | Dimension, tensor: Tensor, axis: int, layer: int | None
    ) -> _Share:
        ranks = self._layout.ranks[rule.group] if rule.cut == side else Ranks()
        if dimension == "any":
            size = tensor.shape[axis]
            return _Share(size * ranks.size, size * ranks.rank, size, size)
        dim = self._layout.dimension(dimension)
        count = self._layout.setting(dim.count, layer) if dim.count else 1
        each = sum(self._layout.setting(key, layer) for key in dim.sizes)
        if rule.cut != side:
            return _Share(count * each, 0, count * each, count * each)
        if dim.shared == "padded":
            return self._padded(count * each, ranks)
        if dim.shared == "repeated" and count < ranks.size and ranks.size % count == 0:
            return _Share(count * each, ranks.rank // (ranks.size // count) * each, each, each)
        units, size = (count * each, 1) if dim.shared == "even" else (count, each)
        if units % ranks.size:
            what = " + ".join(dim.sizes) if dim.shared == "even" else dim.count
            raise PlanError(f"{what} = {units} cannot be divided over {ranks.size} ranks")
        length = units // ranks.size * size
        return _Share(units * size, ranks.rank * length, length, length)

    def _padded(self, size: int, ranks: Ranks) -> _Share:
        padding = self._layout.vocab_padding
        if _up(size, padding) % ranks.size:
            padding *= ranks.size  # as SGLang does; vLLM has no such layout
        padded = _up(size, padding)
        each = padded // ranks.size
        extra = (_up(padded + self._layout.extra_vocab, padding) - padded) // ranks.size
        start = min(ranks.rank * each, size)
        return _Share(size, start, min(each, size - start), each + extra)

    def _experts(self, count: int) -> tuple[int, ...]:
        if self._layout.experts is None:
            return tuple(range(count))
        if max(self._layout.experts, default=-1) >= count:
            raise PlanError(f"the layout has an expert {max(self._layout.experts)}, the config only {count}")
        return self._layout.experts

    def _stored(self, whole: str) -> str:
        """The name under which the model itself keeps a weight that may be tied."""
        if self._tied and whole.endswith("lm_head.weight"):
            for embedding in ("model.embed_tokens.weight", "transformer.wte.weight"):
                other = whole.replace("lm_head.weight", embedding)
                if other in self.whole and tied_names([other]).get(whole) == other:
                    return other
            return whole.replace("lm_head.weight", "model.embed_tokens.weight")
        return whole


def _check_dora(plan: Plan, view: _View) -> None:
    """DoRA divides by the norm of whole vectors of the weight, which must then lie here as a whole."""
    for update in plan.updates:
        axes = {1 - term.magnitude_axis for term in update.terms if term.magnitude is not None}
        whole = view.whole[update.name].shape[-2:]
        for piece in view.pieces[update.name]:
            if any(piece.shape[-2:][axis] != whole[axis] for axis in axes):
                raise PlanError(
                    f"{update.sources[0]}: DoRA needs the norms of whole vectors of {update.name}, which are divided "
                    f"over ranks in {piece.local}; apply the patch to the checkpoint, and let the engine load that"
                )


def vllm(
    config: Config,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    ep_rank: int = 0,
    ep_size: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    pp_size: int = 1,
    expert_map: Sequence[int] | Tensor | None = None,
    expert_placement: Literal["linear", "round_robin"] = "linear",
    moe_backend: str | None = None,
    vocab_padding: int = 64,
    extra_vocab: int = 0,
    derived_follow: bool = False,
    rules: Sequence[Rule] = (),
) -> Layout:
    """How vLLM (0.6 to 0.33) holds a model on one rank.

    Args:
        config: a directory with config.json, its contents, or a transformers config.
        tp_rank, tp_size: tensor parallelism.
        ep_rank, ep_size: expert parallelism (``enable_expert_parallel``): experts are divided instead of cut; vLLM's
            group has tp_size x dp_size ranks.
        dp_rank, dp_size: data parallelism; without expert parallelism experts are cut over all of its ranks.
        pp_size: pipeline stages; with more than one, layers that are not here are no error.
        expert_map: the layer's own: for each expert its place on this rank, -1 where it is elsewhere. None: by
            ``expert_placement``.
        moe_backend: the kernel that vLLM logs for unquantised experts ("triton", "flashinfer_cutlass", ...), which
            decides how they are stored; needed only where a patch changes experts.
        vocab_padding, extra_vocab, derived_follow: see ``Layout``; versions with ``--lora-extra-vocab-size`` keep as
            many extra rows, and pad to 64 or, with LoRA on, 256.
        rules: rows of your own, which come before the table's.

    Raises:
        PlanError: the config cannot be read, a rank is out of range, or the expert map is not one.
    """
    tensor = Ranks(tp_rank, tp_size)
    experts = Ranks(ep_rank, ep_size)
    cut = Ranks() if ep_size > 1 else Ranks(dp_rank * tp_size + tp_rank, dp_size * tp_size)
    settings = read_config(config)
    return Layout(
        "vLLM",
        settings,
        {"attention": tensor, "dense": tensor, "embedding": tensor, "head": tensor, "experts": cut},
        _experts_here(settings, experts, expert_map, expert_placement),
        pp_size,
        moe_backend,
        VLLM_EXPERTS,
        vocab_padding,
        extra_vocab,
        derived_follow,
        (*rules, *RULES),
    )


def sglang(
    config: Config,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    ep_size: int = 1,
    dp_size: int = 1,
    dp_lm_head: bool = False,
    pp_size: int = 1,
    moe_backend: str | None = None,
    vocab_padding: int = 64,
    derived_follow: bool = False,
    rules: Sequence[Rule] = (),
) -> Layout:
    """How SGLang (0.5) holds a model on one rank.

    Args:
        config: as for ``vllm``.
        tp_rank, tp_size: SGLang's tensor parallel group, which the groups below divide.
        ep_size: of its ranks so many share the experts; each of these parts cuts its experts over the rest.
        dp_size: with ``--enable-dp-attention``, so many groups have the attention and the embedding each.
        dp_lm_head: with ``--enable-dp-lm-head``, the head as well.
        pp_size, moe_backend, vocab_padding, derived_follow, rules: as for ``vllm``; the backend is
            ``--moe-runner-backend``.

    Raises:
        PlanError: as ``vllm``; or the sizes do not divide one another.
    """
    tensor = Ranks(tp_rank, tp_size)
    if tp_size % ep_size or tp_size % dp_size:
        raise PlanError(f"ep_size={ep_size} and dp_size={dp_size} must divide tp_size={tp_size}")
    each = tp_size // ep_size
    attention = Ranks(tp_rank % (tp_size // dp_size), tp_size // dp_size)
    settings = read_config(config)
    return Layout(
        "SGLang",
        settings,
        {
            "attention": attention,
            "embedding": attention,
            "head": attention if dp_lm_head else tensor,
            "dense": tensor,
            "experts": Ranks(tp_rank % each, each),
        },
        _experts_here(settings, Ranks(tp_rank // each, ep_size), None, "linear"),
        pp_size,
        moe_backend,
        SGLANG_EXPERTS,
        vocab_padding,
        0,
        derived_follow,
        (*rules, *RULES),
    )


def read_config(config: Config) -> dict[str, Any]:
    """A model's settings with the defaults of its class, if transformers is installed and knows it.

    Args:
        config: a directory with config.json, its contents, or a transformers config. Of a multimodal model the
            settings of its language model.

    Raises:
        PlanError: it is none of these, or cannot be read.
    """
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"{path}: no model's config can be read from it: {error}") from None
    if isinstance(config, Mapping):
        raw = dict(config)
        try:
            from transformers import CONFIG_MAPPING

            config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        except (ImportError, KeyError):
            nested = raw.get("text_config") or {}
            return {**raw, **{key: value for key, value in nested.items() if value is not None}}
    if not hasattr(config, "to_dict"):
        raise PlanError(f"a {type(config).__name__} is no config; give a directory, a dict or a transformers config")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    settings = {**config.to_dict(), **text.to_dict()}
    for spelling, key in getattr(type(text), "attribute_map", {}).items():
        settings.setdefault(spelling, settings.get(key))
    return settings


def _experts_here(
    config: Mapping[str, Any], ranks: Ranks, expert_map: Sequence[int] | Tensor | None, placement: str
) -> tuple[int, ...] | None:
    """The experts on this rank, in its order; None for all."""
    if expert_map is not None:
        places = [int(place) for place in expert_map]
        here = sorted((place, expert) for expert, place in enumerate(places) if place >= 0)
        if [place for place, _ in here] != list(range(len(here))):
            raise PlanError("expert_map must give each expert its place on this rank, from 0 without gaps, or -1")
        return tuple(expert for _, expert in here)
    if placement not in ("linear", "round_robin"):
        raise PlanError(f"expert_placement={placement!r} must be 'linear' or 'round_robin'")
    if ranks.size == 1:
        return None
    count = next((config[key] for key in KEYS["num_experts"] if isinstance(config.get(key), int)), None)
    if count is None:
        raise PlanError(f"{ranks.size} ranks are to share experts, but the model's config has no number of experts")
    if placement == "round_robin":
        return tuple(range(ranks.rank, count, ranks.size))
    # The first ranks have one more each of what cannot be divided.
    bounds = [i * (count // ranks.size) + min(i, count % ranks.size) for i in range(ranks.size + 1)]
    return tuple(range(*list(pairwise(bounds))[ranks.rank]))


def _expert_form(layout: Layout, name: str) -> tuple[ExpertForm, str]:
    """How the experts lie in memory, and why they cannot be patched, if so."""
    known = [backend for backend, form in layout.backends.items() if isinstance(form, ExpertForm)]
    form = layout.backends.get(layout.moe_backend or "")
    if isinstance(form, ExpertForm):
        return form, ""
    if layout.moe_backend is None:
        reason = f"{name}: how experts are stored depends on their kernel; say moe_backend= one of {', '.join(known)}"
    else:
        why = f", which {form}" if form else ""
        reason = (
            f"{name} cannot be patched for moe_backend={layout.moe_backend!r}{why}; "
            f"run {layout.engine} with one of {', '.join(known)}"
        )
    return ExpertForm(), reason


def _refusal(name: str, tensor: Tensor) -> str:
    try:
        check_dtype(name, tensor)
    except PlanError as error:
        return str(error)
    return ""


def _is_tied(layout: Layout, spoken: Mapping[str, list[str]]) -> bool:
    """Whether embedding and head are one weight: they share memory, or the config says so, or there is no head."""
    heads = [names for names in spoken.values() if any(name.endswith("lm_head.weight") for name in names)]
    if any(len(names) > 1 for names in heads):
        return True
    return bool(layout.config.get("tie_word_embeddings", not heads and layout.pipeline == 1))


def _layer(name: str) -> int | None:
    """The number of the layer, which is the first in the name."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match[1]) if match else None


def _runs(experts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(place here, first expert, length) of each run of experts that follow one another."""
    start = 0
    for place in range(1, len(experts) + 1):
        if place == len(experts) or experts[place] != experts[place - 1] + 1:
            yield start, experts[start], place - start
            start = place


def _spread(matrix: tuple[int, int], flat: bool, form: ExpertForm, expert: int | None) -> tuple[int, ...]:
    """(row, column) as the indices, or sizes, of the tensor's own dimensions."""
    if flat:
        return matrix[:1]
    own = matrix[::-1] if form.transposed else matrix
    return own if expert is None else (expert, *own)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
