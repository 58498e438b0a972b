"""How large the patch, the evolution and the residue are: Frobenius norms over the patched matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

import portllm

Weights = Mapping[str, Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]  # weight name -> scaling * B [out, r], A [r, in], both in fp64


def factors(patch: portllm.Patch) -> Factors:
    return {f"{e.module}.weight": (e.scaling * e.lora_B.double(), e.lora_A.double()) for e in patch.entries}


def residue(refit: Factors, old: Factors) -> Factors:
    """R = refit - old, as one pair of factors of twice the rank."""
    result = {}
    for name, (b, a) in refit.items():
        old_b, old_a = old[name]
        result[name] = torch.cat([b, -old_b], dim=1), torch.cat([a, old_a])
    return result


def product_norm(pairs: Factors) -> float:
    """The norm of all B A together, from r x r matrices: |BA|^2 = sum of (B'B) * (AA')."""
    return math.sqrt(sum(float(((b.T @ b) * (a @ a.T)).sum()) for b, a in pairs.values()))


def norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def residue_to_patch(refit: portllm.Patch, patch: portllm.Patch) -> float:
    old = factors(patch)
    return product_norm(residue(factors(refit), old)) / product_norm(old)


def relative_move(new: Weights, old: Weights, names: Iterable[str]) -> float:
    names = list(names)
    return norm(new[n].double() - old[n].double() for n in names) / norm(old[n] for n in names)


def relative_sizes(
    base: Weights, evolved: Weights, patched: Weights, patch: portllm.Patch, refit: portllm.Patch
) -> dict[str, float]:
    old = factors(patch)
    rest = residue(factors(refit), old)
    moves = {name: evolved[name].double() - base[name].double() for name in old}
    inner = sum(float((b * (moves[name] @ a.T)).sum()) for name, (b, a) in old.items())
    delta, left_out = product_norm(old), product_norm(rest)
    return {
        "evolution_to_base": relative_move(evolved, base, old),
        "patch_to_evolved": delta / norm(evolved[name] for name in old),
        "cosine_patch_evolution": inner / (delta * norm(moves.values())),
        "patched_to_residue": norm(patched[name] for name in old) / left_out,
        "residue_to_patch": left_out / delta,
    }
