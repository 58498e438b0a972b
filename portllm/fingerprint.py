"""Fingerprints: which base a patch was made on, and how far a model has moved from it.

Kept as JSON in the metadata of adapter_model.safetensors under ``portllm.base``, which PEFT and vLLM ignore, and
which a re-save by PEFT drops together with the weights it spoke of. For each weight that the patch changes: dtype,
shape, the SHA-256 of its bytes, and a few sampled values, from which the distance of an evolved model is estimated.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .execute import update_norms
from .live import Live, as_patches, live_target
from .live import plan as plan_live
from .patch import Patch
from .planning import Plan, Update
from .rounding import survival

METADATA_KEY = "portllm.base"
_SAMPLES = 64
_GOLDEN = 0x9E3779B97F4A7C15  # odd, near 2^64 / golden ratio: successive multiples spread evenly
_HASH_BYTES = 1 << 24

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class WeightPrint:
    """One weight of the base: dtype name, shape of the part that the patch changes, hash, sampled values."""

    dtype: str
    numel: int
    sha256: str
    samples: tuple[float, ...]


@dataclass(frozen=True)
class Fingerprint:
    """The base that a patch was made on: its name, and a print of each weight by the patch's own names."""

    name: str | None
    weights: Mapping[str, WeightPrint]

    def to_json(self) -> str:
        """Compact JSON; samples are little-endian fp32 in base64."""
        weights = {
            key: [w.dtype, w.numel, w.sha256, base64.b64encode(_pack(w.samples)).decode()]
            for key, w in self.weights.items()
        }
        return json.dumps({"version": 1, "name": self.name, "weights": weights}, separators=(",", ":"))

    @classmethod
    def from_patch(cls, patch: Patch) -> Fingerprint | None:
        """The fingerprint in a patch's metadata, or None; raises PatchError if it is garbled."""

        def read(raw: Any) -> Fingerprint:
            weights = {
                str(key): WeightPrint(str(dtype), int(numel), str(digest), _unpack(base64.b64decode(samples)))
                for key, (dtype, numel, digest, samples) in raw["weights"].items()
            }
            return cls(raw["name"], weights)

        what = f"the fingerprint of the base ({METADATA_KEY})"
        return patch.record(METADATA_KEY, read, what, "; stamp it again")


@dataclass(frozen=True)
class WeightCheck:
    """One part of the patch against the target.

    Attributes:
        source: the patch's own name.
        tensors: the target's tensors that it lands on.
        ranks: of its terms.
        delta_norm, weight_norm: Frobenius norms of what is added and of what is there.
        same_as_base: whether the bytes are the base's; None without a fingerprint.
        moved: estimated ||W' - W|| / ||W|| against the base; None without a fingerprint.
        cosine: of the sampled values with the base's; None without a fingerprint.
        survival: the share of what is added that is left after rounding (see ``portllm.rounding.survival``); NaN for
            quantised weights, of which ``apply`` says it.
    """

    source: str
    tensors: tuple[str, ...]
    ranks: tuple[int, ...]
    delta_norm: float
    weight_norm: float
    same_as_base: bool | None = None
    moved: float | None = None
    cosine: float | None = None
    survival: float = 1.0

    @property
    def relative(self) -> float:
        """||delta|| / ||W||."""
        return self.delta_norm / self.weight_norm if self.weight_norm else math.inf


@dataclass(frozen=True)
class Check:
    """Will the patch fit, how large is it, and is the target the base, an evolution of it, or a stranger?

    ``verdict``: "base" (the same bytes), "evolved", "unrelated", or "unknown" (no fingerprint in the patch).
    """

    verdict: str
    base: str | None
    weights: tuple[WeightCheck, ...]


def check_weights(patch: Patch, plan: Plan, read: Read) -> Check:
    """Measure a bound patch against its target.

    Args:
        patch: whose fingerprint, if it has one, is compared.
        plan: the patch alone, bound to the target.
        read: gives the target's tensors by name; asked again for each part and each measure (see ``cached``).
    """
    fingerprint = Fingerprint.from_patch(patch)
    results = []
    for source, updates in by_source(plan).items():
        delta = weight = 0.0
        dtype = read(updates[0].name).dtype
        for update in updates:
            d, w = update_norms(update, read(update.name))
            delta, weight = delta + d * d, weight + w * w
        names = tuple(dict.fromkeys(u.name for u in updates))
        ranks = tuple(sorted({t.rank for u in updates for t in u.terms}))
        kept = math.nan  # of quantised weights, which are measured as they are written
        if not any(update.name in plan.quantised for update in updates):
            kept = survival(updates, lambda u, rows: u.region.view(read(u.name).detach())[list(rows)], dtype)
        result = WeightCheck(source, names, ranks, math.sqrt(delta), math.sqrt(weight), survival=kept)
        old = fingerprint.weights.get(source) if fingerprint else None
        if old is not None:
            result = _compare(result, old, _print(updates, read))
        results.append(result)
    base = (fingerprint.name if fingerprint else None) or patch.config.base_model
    return Check(_verdict(results), base, tuple(results))


def fingerprint(plan: Plan, read: Read, name: str | None) -> Fingerprint:
    """The fingerprint of the weights that a plan changes."""
    return Fingerprint(name, {source: _print(updates, read) for source, updates in by_source(plan).items()})


def stamp(patch: Patch | str | os.PathLike[str], base: Live | str | os.PathLike[str]) -> Patch:
    """The patch with the fingerprint of the base it was made on; ``.save()`` keeps it, and PEFT still loads it.

    Args:
        patch: as ``portllm.apply``.
        base: the model that the patch was trained on: live, or a checkpoint's path.

    Raises:
        PatchError, PlanError, CheckpointError: as ``portllm.apply`` and ``portllm.apply_checkpoint``.
    """
    [(loaded, _)] = as_patches(patch)
    if isinstance(base, str | os.PathLike):
        from .checkpoint import plan_checkpoint

        checkpoint, plan = plan_checkpoint(base, loaded)
        name, read = str(base), cached(checkpoint.read)
    else:
        plan = plan_live(base, loaded)
        name = getattr(getattr(base, "config", None), "name_or_path", "") or loaded.config.base_model or ""
        read = live_target(base).read
    return loaded.with_metadata(**{METADATA_KEY: fingerprint(plan, read, name or None).to_json()})


def cached(read: Read) -> Read:
    """Remember the last tensor: parts of one fused weight follow each other."""
    last: dict[str, Tensor] = {}

    def reader(name: str) -> Tensor:
        if name not in last:
            last.clear()
            last[name] = read(name)
        return last[name]

    return reader


def by_source(plan: Plan) -> dict[str, list[Update]]:
    """The updates of each of the patch's modules."""
    groups: dict[str, list[Update]] = {}
    for update in plan.updates:
        groups.setdefault(update.sources[0], []).append(update)
    return groups


def _blocks(updates: list[Update], read: Read) -> Iterator[Tensor]:
    for update in updates:
        view = update.region.view(read(update.name).detach())
        step = max(1, _HASH_BYTES // max(1, view.shape[1] * view.element_size()))
        for start in range(0, view.shape[0], step):
            yield view[start : start + step].cpu().contiguous().view(-1)


def _print(updates: list[Update], read: Read) -> WeightPrint:
    numel = sum(math.prod(u.region.shape) for u in updates)
    positions = sorted((i * _GOLDEN % 2**64) * numel >> 64 for i in range(min(_SAMPLES, numel)))
    digest, samples, seen, dtype = hashlib.sha256(), [], 0, ""
    for block in _blocks(updates, read):
        dtype = str(block.dtype).removeprefix("torch.")
        data: Any = block.view(torch.uint8).numpy()
        digest.update(data)
        inside = [p - seen for p in positions if seen <= p < seen + len(block)]
        samples += block[inside].float().tolist()
        seen += len(block)
    return WeightPrint(dtype, numel, digest.hexdigest()[:32], tuple(samples))


def _compare(result: WeightCheck, old: WeightPrint, new: WeightPrint) -> WeightCheck:
    if old.numel != new.numel or len(old.samples) != len(new.samples):
        return replace(result, same_as_base=False)
    a, b = torch.tensor(old.samples).double(), torch.tensor(new.samples).double()
    norm_a, norm_b = float(a.norm()), float(b.norm())
    moved = float((b - a).norm()) / norm_a if norm_a else math.inf
    cosine = float(a @ b) / (norm_a * norm_b) if norm_a and norm_b else 0.0
    return replace(result, same_as_base=old.sha256 == new.sha256, moved=moved, cosine=cosine)


def _verdict(results: list[WeightCheck]) -> str:
    known = [r for r in results if r.same_as_base is not None]
    if not known:
        return "unknown"
    return kinship(all(r.same_as_base for r in known), [r.cosine or 0.0 for r in known])


def kinship(is_same: bool, cosines: list[float]) -> str:
    """ "base", "evolved" or "unrelated", from the cosine of each weight with the base's."""
    if is_same:
        return "base"
    # Weights of separately trained models are as good as orthogonal (cosine about 1/8 at most on 64 samples).
    return "evolved" if sorted(cosines)[len(cosines) // 2] > 0.5 else "unrelated"


def _pack(samples: tuple[float, ...]) -> bytes:
    return torch.tensor(samples, dtype=torch.float32).numpy().astype("<f4").tobytes()


def _unpack(data: bytes) -> tuple[float, ...]:
    import numpy

    return tuple(numpy.frombuffer(data, dtype="<f4").tolist())
