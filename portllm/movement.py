"""How far a model has moved from a patch's base, and how much of the movement lies where the patch works.

For each weight W of the base, W' of the evolved model and patch Delta = U S V^T (U [m, k], V [n, k] orthonormal, k the
rank), with the movement D = W' - W: the norms of D, of D V (what happens to the inputs that the patch reads), of U^T D
(to the outputs that it writes) and of U^T D V, and the inner product <D, Delta> = sum_i S_i (U^T D V)_ii. All of it
comes from skinny products in one read of the pair; no full matrix is decomposed, and Delta is never formed.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from .bind import ExpertLayout, Options, Tied, bind
from .errors import PlanError
from .fingerprint import by_source, cached, kinship
from .live import Source, as_patches
from .lowrank import recompress
from .planning import Plan, Update
from .progress import Progress
from .readable import Model, ReadableModel
from .reference import accumulation_dtype, ieee_matmul, row_blocks

_RATIOS = (
    "score", "outlook", "distance", "relative_distance", "base_cosine", "cosine", "input_share", "output_share",
    "interference",
)  # fmt: skip
# Scores from which on a part, or most, of the skill was lost in benchmarks/portability (means; tasks differ much).
_BOUNDS = (0.1, 0.3)
_OUTLOOKS = ("likely to carry", "partly at risk", "likely lost")
_PROBES = 16  # random vectors for the estimate of fourth powers: within about 10 % of the root for one direction


@dataclass(frozen=True)
class Movement:
    """Sums over one weight, or over several; squared Frobenius norms unless said otherwise.

    Attributes:
        base, evolved, delta, moved: of W, W', Delta and D.
        inputs: of D V: D within the patch's row space.
        outputs: of U^T D: D within the patch's column space.
        core: of U^T D V: D within both.
        read: of W V: what the base does with the inputs that the patch reads.
        inner: <D, Delta>.
        similarity: <W, W'>.
        moved_fourth, delta_fourth, base_fourth: sums of the singular values' fourth powers, of D, Delta and W: the
            larger for the same norm, the fewer directions the matrix has. Those of D and W are estimates.
    """

    base: float = 0.0
    evolved: float = 0.0
    delta: float = 0.0
    moved: float = 0.0
    inputs: float = 0.0
    outputs: float = 0.0
    core: float = 0.0
    read: float = 0.0
    inner: float = 0.0
    similarity: float = 0.0
    moved_fourth: float = 0.0
    delta_fourth: float = 0.0
    base_fourth: float = 0.0

    @classmethod
    def total(cls, movements: Iterable[Movement]) -> Movement:
        """Of several weights together."""
        return cls(*(math.fsum(column) for column in zip(*map(astuple, movements), strict=True)))

    @property
    def distance(self) -> float:
        """||D|| / ||W||; near sqrt(2) for models that have nothing in common."""
        return _root(self.moved, self.base)

    @property
    def base_cosine(self) -> float:
        """Of W and W'."""
        return _cosine(self.similarity, self.base, self.evolved)

    @property
    def cosine(self) -> float:
        """Of D and Delta; near 0 where the two do not touch."""
        return _cosine(self.inner, self.moved, self.delta)

    @property
    def input_share(self) -> float:
        """||D V||^2 / ||D||^2; a movement without direction has k / n."""
        return self.inputs / self.moved if self.moved else 0.0

    @property
    def output_share(self) -> float:
        """||U^T D||^2 / ||D||^2; a movement without direction has k / m."""
        return self.outputs / self.moved if self.moved else 0.0

    @property
    def relative_distance(self) -> float:
        """||D|| / ||Delta||."""
        return _root(self.moved, self.delta)

    @property
    def interference(self) -> float:
        """||D within either of the patch's spaces|| / ||Delta||."""
        return _root(max(self.inputs + self.outputs - self.core, 0.0), self.delta)

    @property
    def score(self) -> float:
        """||D V|| / ||W V||: by how much the weight now treats the inputs that the patch reads otherwise.

        Of the data-free scores tried in benchmarks/portability, this one ranked best by the skill lost.
        """
        return _root(self.inputs, self.read)

    @property
    def outlook(self) -> str:
        """What the score meant for tiny models: "likely to carry", "partly at risk" or "likely lost"."""
        return _OUTLOOKS[bisect.bisect_right(_BOUNDS, self.score)]

    def as_dict(self) -> dict[str, float | str]:
        """The ratios, for programs."""
        return {name: getattr(self, name) for name in _RATIOS}


@dataclass(frozen=True)
class WeightDrift:
    """One of the patch's modules: ``source`` is its name in the patch, ``tensors`` the evolved model's."""

    source: str
    tensors: tuple[str, ...]
    movement: Movement


@dataclass(frozen=True)
class Drift:
    """What lies between a patch's base and an evolved model.

    Attributes:
        verdict: "base" (the same values), "evolved", or "unrelated" (the weights have nothing in common).
        weights: one for each of the patch's modules.
        total: over all of them.
    """

    verdict: str
    weights: tuple[WeightDrift, ...]
    total: Movement

    def as_dict(self) -> dict[str, Any]:
        """The verdict and all ratios, for programs."""
        weights = [{"source": w.source, "tensors": w.tensors, **w.movement.as_dict()} for w in self.weights]
        return {"verdict": self.verdict, "total": self.total.as_dict(), "weights": weights}


def drift(
    patch: Source,
    evolved: Model,
    base: Model,
    *,
    strict: bool = True,
    tied: Tied = "once",
    expert_layout: ExpertLayout | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Drift:
    """Measure how an evolved model has moved from a patch's base, and against the patch; a weight at a time.

    DoRA terms count as plain LoRA, replaced tensors do not count. Sums are in fp32 within a row of a weight (fp64
    for fp64 weights) and in fp64 from there.

    Args:
        patch: a Patch, an adapter directory or a hub id.
        evolved, base: checkpoints (directory, file or hub id), modules or state dicts.
        strict, tied, expert_layout: as ``portllm.apply``.
        device: where to compute.
        progress: show a bar.

    Raises:
        PatchError, PlanError, CheckpointError: as ``portllm.apply``; or the two models' weights differ in shape, or
            hold numbers that are not finite, or the patch has no factors that could be measured.
    """
    weights = []
    for pair in compared(patch, evolved, base, Options(tied, expert_layout), strict, progress):
        where = torch.device(device)
        parts = [
            _measure(pair.source, *part, where) for part in zip(pair.before, pair.after, pair.updates, strict=True)
        ]
        names = tuple(dict.fromkeys(update.name for update in pair.updates))
        weights.append(WeightDrift(pair.source, names, Movement.total(parts)))
    total = Movement.total(weight.movement for weight in weights)
    verdict = kinship(total.moved == 0, [weight.movement.base_cosine for weight in weights])
    return Drift(verdict, tuple(weights), total)


@dataclass(frozen=True)
class Pair:
    """One of the patch's modules in both models: ``before`` and ``after`` are the parts that ``updates`` change."""

    source: str
    updates: tuple[Update, ...]
    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...]


def compared(
    patch: Source, evolved: Model, base: Model, options: Options, strict: bool, progress: bool
) -> Iterator[Pair]:
    """The patch's modules, one at a time, read from both models. Args and errors as ``drift``."""
    [(loaded, strength)] = as_patches(patch)
    old, new = ReadableModel.open(base, "base"), ReadableModel.open(evolved, "evolved")
    plans: list[Plan] = []
    for model in (old, new):
        plan = bind(model.target, [(loaded, strength)], options)
        try:
            plan.check_complete(strict=strict)
        except PlanError as error:
            raise PlanError(f"{model.label}: {error}") from None
        plans.append(plan)
    before, after = (by_source(plan) for plan in plans)
    shared = [source for source in after if source in before]
    if not shared:
        raise PlanError(f"{loaded.name}: has no low-rank factors for a weight that both models have")
    sizes = {source: _bytes(after[source], new) + _bytes(before[source], old) for source in shared}
    read_old, read_new = cached(old.read), cached(new.read)
    with Progress(sum(sizes.values()), enabled=progress) as bar:
        for source in shared:
            parts = _aligned(source, before[source], after[source], read_old, read_new)
            yield Pair(source, tuple(after[source]), *map(tuple, parts))
            bar.update(sizes[source])


def _aligned(
    source: str, before: Sequence[Update], after: Sequence[Update], read_old: Any, read_new: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """The parts of the base's weight and of the evolved one's, cut alike, whether fused or apart on either side."""
    old, new = ([u.region.view(read(u.name)) for u in us] for us, read in ((before, read_old), (after, read_new)))
    rows = [len(part) for part in new]
    if [part.shape for part in old] != [part.shape for part in new]:
        same = len({part.shape[1] for part in (*old, *new)}) == 1 and sum(map(len, old)) == sum(rows)
        if not same:
            shapes = [" + ".join(str(list(part.shape)) for part in parts) for parts in (old, new)]
            raise PlanError(
                f"{source} is {shapes[0]} in the base and {shapes[1]} in the evolved model: weights of other shapes "
                "have no distance; is BASE the model that the patch was made on?"
            )
        old = list(torch.cat(old).split(rows))
    return old, new


def _measure(source: str, before: Tensor, after: Tensor, update: Update, device: torch.device) -> Movement:
    """One rectangle: ``before`` and ``after`` [m, n]."""
    U, S, V = directions(update, device)
    dtype = torch.promote_types(accumulation_dtype(before), accumulation_dtype(after))
    left, right = U.to(dtype), V.to(dtype)
    within = torch.zeros(U.shape[1], before.shape[1], dtype=torch.float64, device=device)  # U^T D
    core = torch.zeros(U.shape[1], U.shape[1], dtype=torch.float64, device=device)
    # E |D^T D g|^2 over Gaussian g is the sum of D's singular values' fourth powers, and needs one read of D.
    probes = torch.randn(before.shape[1], _PROBES, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    powers = torch.zeros(2, before.shape[1], _PROBES, dtype=torch.float64, device=device)
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    with ieee_matmul():
        for rows in row_blocks(*before.shape):
            w, v = (part[rows].to(device, dtype) for part in (before, after))
            difference = v - w
            image = difference @ right
            products = ((w, w), (v, v), (difference, difference), (image, image), (w, v))
            sums[:5] += torch.stack([(a * b).sum(1).double().sum() for a, b in products])
            sums[5] += (w @ right).double().square().sum()
            within += (left[rows].T @ difference).double()
            core += (left[rows].T @ image).double()
            powers += torch.stack([part.T @ (part @ probes) for part in (difference, w)]).double()
    w2, v2, moved, inputs, similarity, read = sums.tolist()
    moved_fourth, base_fourth = (powers.square().sum((1, 2)) / _PROBES).tolist()
    if not math.isfinite(w2 + v2):
        raise PlanError(f"{source}: {update.name} holds numbers that are not finite, or did in the base")
    return Movement(
        base=w2,
        evolved=v2,
        delta=float(S.square().sum()),
        moved=moved,
        inputs=inputs,
        outputs=float(within.square().sum()),
        core=float(core.square().sum()),
        read=read,
        inner=float(S @ core.diagonal()),
        similarity=similarity,
        moved_fourth=moved_fourth,
        delta_fourth=float(S.square().square().sum()),
        base_fourth=base_fourth,
    )


def directions(update: Update, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(U [m, k], S [k], V [n, k]) in fp64 of the update's sum of terms; k = 0 where it is zero."""
    lora_B = torch.cat([t.scaling * t.strength * t.lora_B.to(device).double() for t in update.terms], 1)
    lora_A = torch.cat([t.lora_A.to(device).double() for t in update.terms])
    found = recompress(lora_B, lora_A, None, None, torch.finfo(torch.float32).eps)
    roots = found.lora_B.norm(dim=0)
    kept = roots > 0
    roots = roots[kept]
    return found.lora_B[:, kept] / roots, roots.square(), found.lora_A[kept].T / roots


def _bytes(updates: Sequence[Update], model: ReadableModel) -> int:
    sizes = (math.prod(u.region.shape) * model.target.tensors[u.name].element_size() for u in updates)
    return sum(sizes)


def _root(square: float, reference: float) -> float:
    return math.sqrt(square / reference) if reference else math.inf if square else 0.0


def _cosine(inner: float, square: float, other: float) -> float:
    return inner / math.sqrt(square * other) if square and other else 0.0
