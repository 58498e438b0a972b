"""Create a patch: the best low-rank difference of a tuned model and its base, a weight at a time."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .config import AdapterConfig, ranks_and_alphas
from .errors import PlanError, PortllmError
from .fingerprint import stamp as stamp_patch
from .patch import KEY_PREFIX, Patch
from .planning import some
from .progress import Progress
from .readable import Model, ReadableModel
from .reference import FLOAT_DTYPES, row_blocks
from .skinny import frobenius
from .svd import Leading, Workspace, leading, residual

Rest = Literal["error", "ignore", "save"]

# Matrices that are looked up, not multiplied by.
_EMBEDDING = re.compile(r"(^|\.)([^.]*embed[^.]*|wte|wpe|shared|relative_attention_bias)(\.|$)")
# Output layers, which PEFT's "all-linear" leaves out.
_HEAD = re.compile(r"(^|\.)(lm_head|output_layer)$")
_FIRST_COUNT = 16  # singular values to begin with where the rank depends on them


@dataclass(frozen=True)
class ExtractedWeight:
    """What became of the difference D of one weight.

    Attributes:
        name: the weight's tensor.
        rank: of its factors; 0 where a budget had nothing for it.
        relative_size: ||D|| / ||W||, Frobenius, W in the base.
        relative_error: ||D - B A|| / ||D||.
    """

    name: str
    rank: int
    relative_size: float
    relative_error: float


@dataclass(frozen=True)
class Extraction:
    """A patch, and how good it is.

    Attributes:
        patch: ready to apply or to save.
        weights: one for each weight that differs.
        unchanged: weights that could have had factors and are the same in both models.
        saved: tensors that the patch holds whole (``rest="save"``).
        ignored: tensors that changed and are not in the patch (``rest="ignore"``).
    """

    patch: Patch
    weights: tuple[ExtractedWeight, ...]
    unchanged: tuple[str, ...]
    saved: tuple[str, ...]
    ignored: tuple[str, ...]


def extract(
    base: Model,
    tuned: Model,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    max_rank: int = 128,
    target_modules: str | Sequence[str] = "all-linear",
    rest: Rest = "error",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    stamp: bool = True,
    seed: int = 0,
    work: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Extraction:
    """The low-rank patch that turns ``base`` into ``tuned`` as nearly as its ranks allow.

    One pair of weights is held at a time; its difference is taken in fp32, never in the storage dtype.

    Args:
        base, tuned: checkpoints (directory, file or hub id), modules or state dicts, with the same names.
        rank: of every weight. Exactly one of rank, energy and budget must be given.
        energy: the share (0, 1] of each difference's squared norm to keep, with as small a rank as that allows.
        budget: how many numbers the factors may hold; they go where they keep the most of ||D||^2 / ||W||^2.
        max_rank: bounds what energy and budget choose.
        target_modules: as in PEFT: "all-linear", module names or their ends, or a regular expression.
        rest: changed tensors that get no factors (embeddings, norms, biases): "error"; "ignore" them; or "save"
            them whole, as PEFT's modules_to_save and bias do.
        dtype: of the stored factors.
        device: where to compute.
        stamp: keep the base's fingerprint in the patch (``portllm.stamp``); this reads the base once more.
        seed: of the random start: the same seed gives the same patch on the same machine.
        work: a directory that keeps finished weights, from which a call with the same arguments goes on.
        progress: show a bar.

    Raises:
        PlanError: names or shapes differ, nothing differs, or tensors that changed would be lost (see ``rest``).
        CheckpointError, PortllmError: a model cannot be read, or the arguments do not fit together.
    """
    _check_arguments(rank, energy, budget, max_rank, rest, dtype)
    old, new = ReadableModel.open(base, "base"), ReadableModel.open(tuned, "tuned")
    linear, others = _pair(old, new, target_modules)
    changed = [name for name in others if not _same(old, new, name)]
    if changed and rest == "error":
        raise PlanError(
            f"{some(sorted(changed))} changed and cannot have low-rank factors; keep such tensors whole with "
            "rest='save' (--rest save), or leave them out with rest='ignore' (--rest ignore)"
        )
    choice = {"rank": rank, "energy": energy, "max_rank": max_rank, "seed": seed}
    store = None if work is None else _Store(Path(work), {"base": old.files(), "tuned": new.files(), **choice})
    found: dict[str, _Found] = {}
    workspace = Workspace()
    with Progress(sum(old.nbytes(n) + new.nbytes(n) for n in linear), enabled=progress) as bar:
        for name in linear:
            difference = None if store is None else store.load(name)
            if difference is None:
                difference = _decompose(old, new, name, rank, energy, max_rank, torch.device(device), seed, workspace)
                if store is not None:
                    store.save(name, difference)
            found[name] = difference
            bar.update(old.nbytes(name) + new.nbytes(name))
    differing = {name: d for name, d in found.items() if d.leading.norm > 0}
    if not differing:
        raise PlanError(f"no weight of {new.label} that could have factors differs from {old.label}")
    ranks = _spend(differing, budget) if budget is not None else {n: d.rank(rank, energy) for n, d in differing.items()}
    if not any(ranks.values()):
        least = min(sum(d.shape) for d in differing.values())
        raise PortllmError(f"budget={budget} is too small for a single rank, which takes {least} numbers or more")
    patch = _as_patch(old, new, differing, ranks, changed if rest == "save" else [], linear, dtype)
    if stamp:
        patch = stamp_patch(patch, base)
    return Extraction(
        patch,
        tuple(ExtractedWeight(n, ranks[n], d.relative_size, d.relative_error(ranks[n])) for n, d in differing.items()),
        tuple(name for name in linear if name not in differing),
        tuple(changed) if rest == "save" else (),
        tuple(changed) if rest == "ignore" else (),
    )


def _check_arguments(
    rank: int | None, energy: float | None, budget: int | None, max_rank: int, rest: str, dtype: torch.dtype
) -> None:
    given = [name for name, value in (("rank", rank), ("energy", energy), ("budget", budget)) if value is not None]
    if len(given) != 1:
        raise PortllmError(f"give exactly one of rank, energy and budget, not {' and '.join(given) or 'none'}")
    for name, number in (("rank", rank), ("budget", budget), ("max_rank", max_rank)):
        if number is not None and number < 1:
            raise PortllmError(f"{name}={number} must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise PortllmError(f"energy={energy} must be in (0, 1]")
    if rest not in ("error", "ignore", "save"):
        raise PortllmError(f"rest={rest!r} must be 'error', 'ignore' or 'save'")
    if dtype not in FLOAT_DTYPES[:3]:
        raise PortllmError(f"dtype={dtype} must be bfloat16, float16 or float32")


def _pair(old: ReadableModel, new: ReadableModel, target_modules: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the weights that can have factors, and of all other tensors."""
    names = set(old.target.tensors), set(new.target.tensors)
    lacking = [(new, names[0] - names[1]), (old, names[1] - names[0])]
    if what := [f"{model.label} lacks {some(sorted(lacks))}" for model, lacks in lacking if lacks]:
        raise PlanError(f"the models do not have the same tensors: {'; '.join(what)}")
    selected = AdapterConfig.from_dict({"peft_type": "LORA", "target_modules": target_modules})
    linear, others = [], []
    for name, tensor in old.target.tensors.items():
        module, is_matrix = name.removesuffix(".weight"), name.endswith(".weight") and tensor.dim() == 2
        by_kind, is_embedding = selected.selects_by_kind, _EMBEDDING.search(module)
        if not is_matrix or not selected.targets_module(module) or (by_kind and (is_embedding or _HEAD.search(module))):
            others.append(name)
            continue
        if is_embedding:
            raise PlanError(f"{name} is an embedding, which gets no factors here; leave it to rest='save'")
        for model in (old, new):
            other = model.target.tensors[name]
            if other.dtype not in FLOAT_DTYPES or other.shape != tensor.shape:
                raise PlanError(
                    f"{name} is {list(tensor.shape)} in {old.label}, and {other.dtype} {list(other.shape)} in "
                    f"{model.label}; both must be floating point and of one shape"
                )
        linear.append(name)
    if not linear:
        raise PlanError(f"target_modules={target_modules!r} selects no weight matrix of {old.label}")
    return linear, others


def _same(old: ReadableModel, new: ReadableModel, name: str) -> bool:
    a, b = old.target.tensors[name], new.target.tensors[name]
    if a.shape != b.shape:
        return False
    a, b = old.read(name), new.read(name)
    return torch.equal(a, b.to(a.device)) if a.dtype == b.dtype else bool((a.float() == b.to(a.device).float()).all())


@dataclass(frozen=True)
class _Found:
    """The leading part of one difference D [m, n] of a weight with norm ``base_norm``; ``rest`` is what it leaves."""

    leading: Leading
    rest: float
    base_norm: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.leading.left.shape[0], self.leading.right.shape[0]

    @property
    def relative_size(self) -> float:
        return self.leading.norm / self.base_norm if self.base_norm else math.inf

    def relative_error(self, rank: int) -> float:
        cut = float(self.leading.values[rank:].square().sum())
        return math.sqrt(self.rest**2 + cut) / self.leading.norm

    def rank(self, rank: int | None, energy: float | None) -> int:
        count = len(self.leading.values)
        return min(rank, count) if rank is not None else (self.leading.rank_for(energy or 1.0) or count)


def _decompose(
    old: ReadableModel,
    new: ReadableModel,
    name: str,
    rank: int | None,
    energy: float | None,
    max_rank: int,
    device: torch.device,
    seed: int,
    workspace: Workspace,
) -> _Found:
    before, after = old.read(name).to(device), new.read(name).to(device)
    difference = workspace.empty(before.shape, torch.float32, device)
    base_norm = _subtract(after, before, difference)
    del before, after
    if not all(math.isfinite(end) for end in difference.aminmax()):  # isfinite() takes 30 times as long
        raise PlanError(f"{name} differs by numbers that are not finite; is one of the models broken?")
    if old.target.transposed(name):
        difference = difference.T
    generator = torch.Generator().manual_seed(seed)
    count = rank or (_FIRST_COUNT if energy is not None else max_rank)
    result = leading(difference, count, generator=generator, workspace=workspace)
    while energy is not None and result.rank_for(energy) is None and count < min(max_rank, *difference.shape):
        count = min(2 * count, max_rank)
        result = leading(difference, count, generator=generator, workspace=workspace)
    left = residual(difference, result, len(result.values)) if result.norm else 0.0
    kept = Leading(result.left.cpu(), result.right.cpu(), result.values.cpu(), result.norm)
    return _Found(kept, left, base_norm)


def _subtract(after: Tensor, before: Tensor, out: Tensor) -> float:
    """``out <- after - before`` in fp32; returns the Frobenius norm of ``before``.

    By blocks that stay in cache, in one read of the pair: torch is several times slower where dtypes differ.
    """
    squares = 0.0
    for rows in row_blocks(*out.shape):
        block = before[rows].float()
        squares += frobenius(block) ** 2
        torch.sub(after[rows].float(), block, out=out[rows])
    return math.sqrt(squares)


def _spend(found: Mapping[str, _Found], budget: int) -> dict[str, int]:
    """Ranks that keep the most of the sum of ||D||^2 / ||W||^2: singular values by what they keep for their numbers."""
    ranks = dict.fromkeys(found, 0)
    queue: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        d, rank = found[name], ranks[name]
        if rank < len(d.leading.values):
            gain = (float(d.leading.values[rank]) / (d.base_norm or d.leading.norm)) ** 2
            heapq.heappush(queue, (-gain / sum(d.shape), name))

    for name in found:
        offer(name)
    while queue:
        _, name = heapq.heappop(queue)
        if (cost := sum(found[name].shape)) <= budget:
            budget -= cost
            ranks[name] += 1
            offer(name)
    return ranks


def _as_patch(
    old: ReadableModel,
    new: ReadableModel,
    found: Mapping[str, _Found],
    ranks: Mapping[str, int],
    saved: Sequence[str],
    linear: Sequence[str],
    dtype: torch.dtype,
) -> Patch:
    """The PEFT adapter: scaling 1 everywhere, ranks in r and rank_pattern."""
    modules = {name.removesuffix(".weight"): rank for name, rank in ranks.items() if rank}
    tensors: dict[str, Tensor] = {}
    for name, difference in found.items():
        if ranks[name]:
            lora_A, lora_B = difference.leading.factors(ranks[name])
            key = f"{KEY_PREFIX}{name.removesuffix('.weight')}"
            tensors |= {f"{key}.lora_A.weight": lora_A.to(dtype), f"{key}.lora_B.weight": lora_B.to(dtype)}
    to_save, bias = _whole(new, saved, modules, tensors)
    config = {
        "peft_type": "LORA",
        **ranks_and_alphas({module: (rank, 1.0) for module, rank in modules.items()}),
        "target_modules": _target_modules(modules, linear),
        "modules_to_save": to_save or None,
        "bias": "all" if bias else "none",
        "fan_in_fan_out": any(old.target.transposed(name) for name in linear),
        "base_model_name_or_path": old.label if old.checkpoint is not None else None,
        "inference_mode": True,
    }
    return Patch.from_tensors(tensors, config, name=f"{new.label} - {old.label}")


def _whole(
    new: ReadableModel, saved: Sequence[str], modules: Mapping[str, int], tensors: dict[str, Tensor]
) -> tuple[list[str], bool]:
    """Put whole tensors among ``tensors``; returns modules_to_save, and whether there are biases of patched modules."""
    to_save: dict[str, None] = {}
    bias = False
    for name in saved:
        module, _, leaf = name.rpartition(".")
        if module in modules:
            bias = True
            tensors[f"{KEY_PREFIX}{module}.base_layer.{leaf}"] = new.read(name).clone()
        else:
            to_save[module] = None
    for name in new.target.tensors:
        if name.rpartition(".")[0] in to_save:
            tensors[f"{KEY_PREFIX}{name}"] = new.read(name).clone()
    return list(to_save), bias


def _target_modules(modules: Mapping[str, int], linear: Sequence[str]) -> list[str]:
    """The ends of the names where all modules of that end have factors, else the names in full."""
    ends = {name.removesuffix(".weight").rpartition(".")[2] for name in linear}
    without = {n.removesuffix(".weight").rpartition(".")[2] for n in linear if n.removesuffix(".weight") not in modules}
    named = [m for m in modules if m.rpartition(".")[2] in without]
    return sorted(ends - without) + named


class _Store:
    """Finished weights in a directory, so that an interrupted extraction can go on."""

    def __init__(self, directory: Path, arguments: Mapping[str, Any]) -> None:
        self._directory = directory
        self._key = json.dumps(arguments, sort_keys=True)
        directory.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(f"{self._key}\n{name}".encode()).hexdigest()
        return self._directory / f"{digest[:32]}.safetensors"

    def load(self, name: str) -> _Found | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(name), framework="pt") as file:
                left, right, values, norms = (file.get_tensor(key) for key in ("left", "right", "values", "norms"))
        except (OSError, SafetensorError):
            return None
        norm, rest, base_norm = norms.tolist()
        return _Found(Leading(left, right, values, norm), rest, base_norm)

    def save(self, name: str, found: _Found) -> None:
        from safetensors.torch import save_file

        path = self._path(name)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        d = found.leading
        norms = torch.tensor([d.norm, found.rest, found.base_norm], dtype=torch.float64)
        tensors = {"left": d.left, "right": d.right, "values": d.values, "norms": norms}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
        partial.replace(path)
