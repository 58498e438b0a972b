"""Where a patch's weight lies in a target: prefixes, renamings, fused and stacked weights, tied names.

Everything that is peculiar to a model family is a row in one of the tables below, never code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from .errors import PlanError

# What wrappers put into names at run time: anywhere, and (DistributedDataParallel's) at the front.
_WRAPPERS = re.compile(
    r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
    r"|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)

# A patch made on one class of a family fits the others: one of these may be exchanged for another.
PREFIXES = (
    "", "model.", "language_model.", "model.language_model.", "language_model.model.", "model.text_model.",
    "transformer.", "gpt_neox.", "bert.", "roberta.", "distilbert.", "deberta.", "electra.",
)  # fmt: skip

# Old and new transformers layouts, brought to one spelling on both sides.
RENAMES = (
    (re.compile(r"\.block_sparse_moe\.input_linear\.weight$"), ".mlp.experts.gate_up_proj"),
    (re.compile(r"\.block_sparse_moe\.output_linear\.weight$"), ".mlp.experts.down_proj"),
    (re.compile(r"\.block_sparse_moe(?=\.|$)"), ".mlp"),
    (re.compile(r"\.experts\.(\d+)\.w1(?=\.|$)"), r".experts.\1.gate_proj"),
    (re.compile(r"\.experts\.(\d+)\.w3(?=\.|$)"), r".experts.\1.up_proj"),
    (re.compile(r"\.experts\.(\d+)\.w2(?=\.|$)"), r".experts.\1.down_proj"),
    (re.compile(r"^embed_out(?=\.|$)"), "lm_head"),
    (re.compile(r"\.LayerNorm\.gamma$"), ".LayerNorm.weight"),
    (re.compile(r"\.LayerNorm\.beta$"), ".LayerNorm.bias"),
)

# One weight that holds several, one below the other in its output rows.
FUSIONS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "W_pack": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

# Layers as large as the vocabulary, which PEFT saves whole when they were resized.
VOCABULARY_LAYERS = re.compile(
    r"(^|.*\.)(embed_tokens|lm_head|wte|shared|word_embeddings|embed_in|embed_out|tok_embeddings|output_embeddings)$"
)

# Stored vocabulary weights, and the names that a model ties to them and leaves out of its checkpoint.
TIES = (
    (re.compile(r"^(.*)shared\.weight$"),
     ("lm_head.weight", r"\1encoder.embed_tokens.weight", r"\1decoder.embed_tokens.weight")),
    (re.compile(r"^language_model\.model\.embed_tokens\.weight$"), ("language_model.lm_head.weight",)),
    (re.compile(r"^(?!language_model\.model\.)(.*)embed_tokens\.weight$"), ("lm_head.weight",)),
    (re.compile(r"^(.*)wte\.weight$"), ("lm_head.weight",)),
    (re.compile(r"^(.*)embed_in\.weight$"), ("embed_out.weight",)),
    (re.compile(r"^backbone\.embeddings\.weight$"), ("lm_head.weight",)),
    (re.compile(r"^(bert|deberta)\.embeddings\.word_embeddings\.weight$"), ("cls.predictions.decoder.weight",)),
    (re.compile(r"^electra\.embeddings\.word_embeddings\.weight$"), ("generator_lm_head.weight",)),
    (re.compile(r"^distilbert\.embeddings\.word_embeddings\.weight$"), ("vocab_projector.weight",)),
    (re.compile(r"^albert\.embeddings\.word_embeddings\.weight$"), ("predictions.decoder.weight",)),
    (re.compile(r"^model\.embeddings\.tok_embeddings\.weight$"), ("decoder.weight",)),
    (re.compile(r"^\w*roberta\.embeddings\.word_embeddings\.weight$"), ("lm_head.decoder.weight",)),
    (re.compile(r"^(?:transformer\.)?word_embeddings\.weight$"), ("lm_head.weight",)),
    (re.compile(r"^(cls\.)?predictions\.bias$"), (r"\1predictions.decoder.bias",)),
    (re.compile(r"^lm_head\.bias$"), ("lm_head.decoder.bias",)),
)  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """Where (a part of) a patch's matrix lands.

    Attributes:
        name: the target's tensor.
        expert: index into the first dimension of a stacked weight, or None.
        rows: output rows [start, stop) of the target's matrix, or None for all of them.
        part: output rows [start, stop) of the patch's matrix that land here, or None for all of them.
    """

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    part: tuple[int, int] | None = None


@lru_cache(maxsize=1 << 16)
def canonical(name: str) -> str:
    """One spelling for the names of old and new layouts, without what wrappers add."""
    name = _WRAPPERS.sub("", name)
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def split(name: str) -> tuple[str, str, str]:
    """``"a.b.q_proj.weight"`` -> ``("a.b.", "q_proj", ".weight")``; a stacked parameter has no ``.weight``."""
    attribute = ""
    for suffix in (".weight", ".bias"):
        if name.endswith(suffix):
            name, attribute = name.removesuffix(suffix), suffix
    parent, dot, leaf = name.rpartition(".")
    return parent + dot, leaf, attribute


def readings(name: str) -> list[tuple[set[str], set[str]]]:
    """The modules a target's weight can stand for: itself, its fused parts, or the fused weight it is a part of.

    Returns:
        For each reading the modules, and all modules that are read in this way along with them: for ``k_proj``
        (k_proj; q_proj, k_proj, v_proj) and (qkv_proj; qkv_proj).
    """
    parent, leaf, _ = split(name)
    itself = {parent + leaf}
    fusions = [({parent + part for part in parts}, parent + fused) for fused, parts in FUSIONS.items()]
    found = [(itself, set().union(itself, *(parts for parts, _ in fusions if parts & itself)))]
    for parts, fused in fusions:
        if itself == {fused}:
            found.append((parts, parts))
        if parts & itself:
            found.append(({fused}, {fused}))
    return found


class Names:
    """An index of a target's tensors that finds the weights a patch speaks of.

    Args:
        tensors: the target, name -> tensor (only shapes are looked at).
        aliases: further names of tensors (tied weights) -> the name in ``tensors``.
    """

    def __init__(self, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._index: dict[str, str] = {}
        for name in [*tensors, *aliases]:
            self._index.setdefault(name, name)
        for name in [*tensors, *aliases]:
            self._index.setdefault(canonical(name), name)
        self._aliases = aliases

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, under any of its names."""
        return tuple(self._tensors[self._aliases.get(name, name)].shape)

    def place(self, name: str, rows: int) -> tuple[str, list[Placement]]:
        """Find the ``rows`` output rows of weight ``name``.

        Returns:
            The spelling under which it was found (in the target's own name space) and its placements; no
            placements if the target has no such weight.

        Raises:
            PlanError: the name fits two places equally well.
        """
        found: dict[str, list[Placement]] = {}
        for spelling in spellings(name):
            placements = self._direct(spelling) or self._in_fused(spelling, rows) or self._in_parts(spelling, rows)
            placements = placements or self._in_stack(spelling, rows)
            if placements and spelling in (name, canonical(name)):
                return spelling, placements
            if placements and placements not in found.values():
                found[spelling] = placements
        if len(found) > 1:
            raise PlanError(
                f"{name} could be {' or '.join(p[0].name for p in found.values())}; rename the patch's keys"
            )
        return next(iter(found.items()), (name, []))

    def place_expert(self, parameter: str, expert: int, rows: int) -> tuple[str, list[Placement]]:
        """As ``place`` for one expert of a stacked parameter ``....experts.gate_up_proj``."""
        for spelling in spellings(parameter):
            for name in (spelling, f"{spelling}.weight"):
                if name in self._index and len(self.shape(self._index[name])) == 3:
                    return spelling, [Placement(self._index[name], expert)]
            # target_parameters may also name a plain matrix, such as a router's.
            if expert == 0 and spelling in self._index and len(self.shape(self._index[spelling])) == 2:
                return spelling, [Placement(self._index[spelling])]
        parent, leaf, _ = split(parameter)
        return self.place(f"{parent}{expert}.{leaf}.weight", rows)

    def count_experts(self, parameter: str) -> int:
        """How many experts the target has for a stacked parameter; 0 if it has no such parameter."""
        _, placements = self.place_expert(parameter, 0, 0)
        if placements and placements[0].expert is not None:
            return self.shape(placements[0].name)[0]
        count = 0
        while placements and self.place_expert(parameter, count, 0)[1]:
            count += 1
        return count

    def _direct(self, name: str) -> list[Placement]:
        return [Placement(self._index[name])] if name in self._index else []

    def _in_fused(self, name: str, rows: int) -> list[Placement]:
        parent, leaf, attribute = split(name)
        for fused, parts in FUSIONS.items():
            target = self._index.get(f"{parent}{fused}{attribute}")
            if leaf in parts and target is not None:
                return [Placement(target, rows=_rows_of_part(parts, leaf, rows, self.shape(target)[0], name, target))]
        return []

    def _in_parts(self, name: str, rows: int) -> list[Placement]:
        parent, leaf, attribute = split(name)
        targets = [self._index.get(f"{parent}{part}{attribute}") for part in FUSIONS.get(leaf, ())]
        if not targets:
            return []
        placements, start = [], 0
        for target in targets:
            if target is None:
                return []
            stop = start + self.shape(target)[0]
            placements.append(Placement(target, part=(start, stop)))
            start = stop
        if rows and start != rows:
            raise PlanError(f"{name} has {rows} rows in the patch, but its parts in the target have {start} together")
        return placements

    def _in_stack(self, name: str, rows: int) -> list[Placement]:
        match = re.match(r"^(.*\.experts\.)(\d+)\.(\w+)\.weight$", name)
        if match is None:
            return []
        container, expert, leaf = match[1], int(match[2]), match[3]
        for stacked in (leaf, *(fused for fused, parts in FUSIONS.items() if leaf in parts)):
            target = self._index.get(container + stacked)
            if target is None or len(self.shape(target)) != 3 or expert >= self.shape(target)[0]:
                continue
            if stacked == leaf:
                return [Placement(target, expert)]
            # The parts of a stacked fused weight are of equal size; which axis they lie on, the shapes tell later.
            start = FUSIONS[stacked].index(leaf) * rows
            return [Placement(target, expert, rows=(start, start + rows))]
        return []


def _rows_of_part(parts: tuple[str, ...], leaf: str, rows: int, total: int, name: str, target: str) -> tuple[int, int]:
    """Rows of one part of a fused weight: two parts are of one size; query heads are a multiple of key and value."""
    if rows == 0:
        return 0, 0  # the caller only asks whether the weight is there
    last = rows if leaf != parts[0] or len(parts) == 2 else (total - rows) // 2
    first = total - last * (len(parts) - 1)
    bounds = [0, first]
    for _ in parts[1:]:
        bounds.append(bounds[-1] + last)
    start, stop = bounds[parts.index(leaf)], bounds[parts.index(leaf) + 1]
    fits = last > 0 and first > 0 and (first == last if len(parts) == 2 else first % last == 0)
    if not fits or bounds[-1] != total or stop - start != rows:
        raise PlanError(f"{name} has {rows} rows in the patch, which does not fit into the {total} rows of {target}")
    return start, stop


def spellings(name: str) -> Iterator[str]:
    """The name as it stands, in one spelling, then under each other prefix; longest prefix taken off first."""
    yield name
    base = canonical(name)
    if base != name:
        yield base
    for old in sorted(PREFIXES, key=len, reverse=True):
        if base.startswith(old):
            for new in PREFIXES:
                if new != old:
                    yield new + base.removeprefix(old)


def tied_names(names: Iterable[str]) -> dict[str, str]:
    """Names that a checkpoint with tied embeddings leaves out -> the stored name, by the table ``TIES``."""
    stored = set(names)
    aliases: dict[str, str] = {}
    for pattern, targets in TIES:
        for source in sorted(stored):
            if match := pattern.match(source):
                for target in targets:
                    alias = match.expand(target)
                    if alias not in stored:
                        aliases.setdefault(alias, source)
    return aliases
