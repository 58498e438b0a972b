"""What might help a ported patch without training: rescaling, and taking the movement out of the patch's spaces.

Each takes (patch, base's weights, evolved weights) and gives the patch to apply to the evolved model in its stead.
With Delta = s B A, U and V orthonormal bases of B's columns and A's rows, and the movement D = W' - W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import portllm

from .evolutions import Weights

Remedy = Callable[[portllm.Patch, Weights, Weights], portllm.Patch]
Factors = tuple[Tensor, Tensor]  # (s B [m, r], A [r, n]) in fp64


def _each(patch: portllm.Patch, base: Weights, evolved: Weights, change: Callable[..., Factors]) -> portllm.Patch:
    tensors = dict(patch.tensors)
    for entry in patch.entries:
        name = f"{entry.module}.weight"
        movement = evolved[name].double() - base[name].double()
        b, a = change(entry.module, entry.scaling * entry.lora_B.double(), entry.lora_A.double(), movement)
        key = f"base_model.model.{entry.module}"
        tensors[f"{key}.lora_A.weight"] = a.float().contiguous()
        tensors[f"{key}.lora_B.weight"] = (b / entry.scaling).float().contiguous()
    made = portllm.Patch.from_tensors(tensors, patch.config, name=patch.name)
    return replace(made, metadata=patch.metadata)


def scaled(attention: float, mlp: float) -> Remedy:
    def change(module: str, b: Tensor, a: Tensor, movement: Tensor) -> Factors:
        return b * (attention if ".self_attn." in module else mlp), a

    return lambda patch, base, evolved: _each(patch, base, evolved, change)


def without_core(module: str, b: Tensor, a: Tensor, movement: Tensor) -> Factors:
    """Delta - U U^T D V V^T: between the patch's inputs and its outputs the weight acts as the base's."""
    U, V = torch.linalg.qr(b)[0], torch.linalg.qr(a.T)[0]
    return b @ (a @ V) - U @ (U.T @ (movement @ V)), V.T


def without_inputs(module: str, b: Tensor, a: Tensor, movement: Tensor) -> Factors:
    """Delta - D V V^T: on all that the patch reads the weight acts as the base's."""
    V = torch.linalg.qr(a.T)[0]
    return b @ (a @ V) - movement @ V, V.T


def projected(change: Callable[..., Factors]) -> Remedy:
    return lambda patch, base, evolved: _each(patch, base, evolved, change)


REMEDIES: dict[str, Remedy] = {
    "scale 0.7": scaled(0.7, 0.7),
    "scale 1.2": scaled(1.2, 1.2),
    "scale 1.5": scaled(1.5, 1.5),
    "attention 1.3": scaled(1.3, 1.0),
    "feed-forward 0.7": scaled(1.0, 0.7),
    "feed-forward 1.3": scaled(1.0, 1.3),
    "no movement in both spaces": projected(without_core),
    "no movement in the inputs": projected(without_inputs),
    # Delta - U U^T D: into the outputs that the patch writes goes what went there on the base.
    "no movement in the outputs": lambda patch, base, evolved: portllm.rebase(patch, evolved, base, stamp=False),
}
