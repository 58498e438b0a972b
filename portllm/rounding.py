"""How sums become weights: to nearest, by chance, or whichever loses less of the patch; and what survives of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import PlanError
from .naming import canonical
from .noise import STOCHASTIC, key_for, store_
from .planning import Noise, Plan, Update

Kind = Literal["nearest", "stochastic", "auto"]

# Gives some rows of an update's region as they are in the target, [rows, columns]; they count from the region's first.
ReadRows = Callable[[Update, Sequence[int]], Tensor]

# Rows of an update that are looked at.
_SAMPLE_ROWS = 16
# Bits of the mantissa, with the first one; the smallest step.
_GRIDS = {torch.bfloat16: (8, 2.0**-133), torch.float16: (11, 2.0**-24)}
# Below this share of what is added, rounding to nearest is worth a warning.
_RELEVANT = 0.9
# Above this ratio of what is added to the steps of the weights "auto" rounds to nearest (see ``Rounding``).
THRESHOLD = 0.6


class Measure(NamedTuple):
    """What rounding does to an update, on a sample of its rows.

    Attributes:
        ratio: of what is added to the steps of the weights, root mean squares; inf for fp32 and fp64 weights.
        kept: <round(W + D) - W, D>.
        added: ||D||^2.
    """

    ratio: float
    kept: float
    added: float


@dataclass(frozen=True)
class Rounding:
    """How a plan's sums are rounded into 16-bit weights; fp32 and fp64 weights are always rounded to nearest.

    "auto" takes for each update what the ratio of its elements D to the steps of W + D (root mean squares) says. Of W
    ~ N(0, 0.02^2) in bf16, [2048, 4096], and factors of rank 16 (benchmarks/bench_rounding.py, which gives the same
    by ratio for fp16), the relative errors of the output that D adds are, nearest | stochastic:

    ========  =======  ========  ==================  ==================
    ratio     ||D|| / ||W||  survives nearest  inputs that A reads  inputs anywhere
    ========  =======  ========  ==================  ==================
    0.005     0.003 %  2 %       0.98 | 0.69         0.99 | 10.7
    0.017     0.01 %   6 %       0.94 | 0.38         0.98 | 5.8
    0.17      0.1 %    53 %      0.48 | 0.10         0.79 | 1.6
    0.35      0.2 %    82 %      0.20 | 0.06         0.61 | 1.0
    0.52      0.3 %    93 %      0.088 | 0.046       0.48 | 0.73
    0.70      0.4 %    97 %      0.045 | 0.036       0.39 | 0.56
    0.87      0.5 %    99 %      0.027 | 0.029       0.32 | 0.46
    1.7       1 %      100 %     0.010 | 0.015       0.17 | 0.23
    ========  =======  ========  ==================  ==================

    What nearest loses is lost for the inputs that A reads, which are what the patch is for. By chance nothing is lost
    on average, but each element gets noise, of which those inputs see the share r / n. The gain for them outweighs the
    loss for all others, factor against factor, up to a ratio of 0.6. Below a ratio of about r / n the noise that they
    see is as large as what was added. So "auto" is stochastic between r / n and 0.6. A DoRA update is rounded to
    nearest.

    Attributes:
        kind: "nearest" (ties to even), "stochastic", or "auto".
        seed: of the random bits, which are the same however the model is stored, sharded or applied to.
        keep_zeros: elements that are 0 stay 0.

    Raises:
        PlanError: another kind; or "auto" without the weights' values.
    """

    kind: Kind = "nearest"
    seed: int = 0
    keep_zeros: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("nearest", "stochastic", "auto"):
            raise PlanError(f"rounding={self.kind!r} must be 'nearest', 'stochastic' or 'auto'")

    def settle(
        self, plan: Plan, tensors: Mapping[str, Tensor], read: ReadRows, dtype: torch.dtype | None = None
    ) -> Plan:
        """The plan with the noise of each update.

        Args:
            plan: updates of whole regions, not yet cut to shards or pieces.
            tensors: the target's, of their full shapes; their values are not looked at.
            read: asked for "auto" only.
            dtype: of the weights that are written, where it is not that of the target's.
        """
        if self.kind == "nearest" and not self.keep_zeros:
            return plan
        updates = []
        for update in plan.updates:
            tensor = tensors[plan.untie.get(update.name, update.name)]
            written = dtype or tensor.dtype
            noise = None
            if update.name in plan.quantised:
                if self.kind == "auto":
                    raise PlanError(
                        f"{update.name} is quantised: rounding='auto' is for 16-bit weights; choose one of the others"
                    )
                written = torch.uint8
            by_chance = self.kind != "nearest" and written not in (torch.float32, torch.float64)
            if by_chance and (self.kind == "stochastic" or _is_small(update, read, written)):
                noise = self._noise(update, tensor)
            updates.append(replace(update, noise=noise, keep_zeros=self.keep_zeros))
        return replace(plan, updates=tuple(updates))

    def _noise(self, update: Update, tensor: Tensor) -> Noise:
        region = update.region
        above = 0 if region.expert is None else region.expert * tensor.shape[1]
        return Noise(key_for(self.seed, canonical(update.name)), above + region.rows[0], region.columns[0])


def _is_small(update: Update, read: ReadRows, dtype: torch.dtype) -> bool:
    """Whether "auto" rounds this update by chance."""
    if update.is_dora:
        return False
    if dtype not in _GRIDS:
        raise PlanError(f"{update.name} is {dtype}: rounding='auto' knows bf16 and fp16; say 'nearest' or 'stochastic'")
    rank = sum(term.rank for term in update.terms)
    return rank / update.region.shape[1] < measure(update, read, dtype).ratio < THRESHOLD


def measure(update: Update, read: ReadRows, dtype: torch.dtype) -> Measure:
    """What rounding to ``dtype`` does to an update without DoRA terms, as its mode says; on 16 rows of it."""
    count = update.region.shape[0]
    rows = sorted({i * count // _SAMPLE_ROWS for i in range(_SAMPLE_ROWS)})
    found = read(update, rows)
    if found.is_meta:
        raise PlanError(
            f"{update.name} is a meta tensor without data, from which rounding='auto' cannot tell; say 'nearest' or "
            "'stochastic'"
        )
    before = found.float()
    delta = torch.zeros_like(before)
    for term in update.terms:
        lora_A, lora_B = (factor.to(before.device).float() for factor in (term.lora_A, term.lora_B[rows]))
        delta += term.scaling * (lora_B @ lora_A)
    sums = before + delta
    stored = found.to(dtype, copy=True)
    if update.mode.flags & STOCHASTIC:
        for i, row in enumerate(rows):
            store_(stored[i : i + 1], sums[i : i + 1], update.cut(slice(row, row + 1), slice(None)).mode, slice(0, 1))
    else:
        store_(stored, sums, update.mode, slice(0, len(rows)))
    added = float(delta.double().square().sum())
    kept = float(((stored.double() - before.double()) * delta.double()).sum())
    if dtype not in _GRIDS:
        return Measure(math.inf, kept, added)
    steps = float(step(sums, dtype).double().square().sum())
    return Measure(math.sqrt(added / steps) if steps else math.inf, kept, added)


def step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours on the grid of ``dtype``, bf16 or fp16, where each of the values (fp32) is."""
    digits, least = _GRIDS[dtype]
    exponent = torch.frexp(values)[1]
    # Above 2^-149, the least number of fp32, whose square is no number any more.
    return torch.ldexp(torch.ones_like(values), exponent - digits).clamp(min=least)


def survival(updates: Sequence[Update], read: ReadRows, dtype: torch.dtype) -> float:
    """The share of what updates add that is left after rounding, <round(W + D) - W, D> / ||D||^2, on a sample.

    1 if nothing is added; DoRA updates are left out.
    """
    measures = [measure(update, read, dtype) for update in updates if not update.is_dora]
    added = sum(m.added for m in measures)
    return sum(m.kept for m in measures) / added if added else 1.0


def survivals(
    plan: Plan, tensors: Mapping[str, Tensor], read: ReadRows, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """``survival`` of each tensor that a plan adds to; args as ``Rounding.settle``."""
    updates: dict[str, list[Update]] = {}
    for update in plan.updates:
        if not update.is_dora and update.name not in plan.quantised:  # the op measures those
            updates.setdefault(update.name, []).append(update)
    return {
        name: survival(group, read, dtype or tensors[plan.untie.get(name, name)].dtype)
        for name, group in updates.items()
    }


def lost(shares: Mapping[str, float], kind: Kind) -> tuple[str, ...]:
    """A warning, if a relevant part of a patch does not survive."""
    small = sorted((share, name) for name, share in shares.items() if share < _RELEVANT)
    if not small or kind == "stochastic":
        return ()
    least, name = small[0]
    median = small[len(small) // 2][0]
    return (
        f"rounding to nearest loses a part of the patch in {len(small)} of {len(shares)} weights: {median:.0%} of what "
        f"is added survives in the median of these, {least:.0%} in {name}; rounding='stochastic' or 'auto' "
        "(--rounding) keeps it on average",
    )


def reader(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> ReadRows:
    """Reads rows of tensors in memory; ``names``: other names of some of them."""

    def read(update: Update, rows: Sequence[int]) -> Tensor:
        return update.region.view(tensors[names.get(update.name, update.name)].detach())[list(rows)]

    return read
