"""Triton kernels. Importing this package needs nothing; the first use of a name imports triton.

lowrank_add_(weights, lora_A, lora_B, scalings, n_terms)    add low-rank terms to weights, in place
LaunchTable(weights, lora_A, lora_B, scalings, n_terms)     the same, built once, launched many times
lowrank_exchange_(weights, ..., n_old, n_new, records)      take terms off, to the last bit, and add others
summed_by(weight, lora_A, lora_B)                           whose records can be taken off
lowrank_dora_(weights, ..., magnitudes, axes, strengths)    DoRA, in place; lowrank_dora_squares is its first pass
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lowrank_add import LaunchTable, lowrank_add_
    from .lowrank_dora import lowrank_dora_, lowrank_dora_squares
    from .lowrank_exchange import lowrank_exchange_, summed_by

_HOMES = {
    "LaunchTable": "lowrank_add",
    "lowrank_add_": "lowrank_add",
    "lowrank_dora_": "lowrank_dora",
    "lowrank_dora_squares": "lowrank_dora",
    "lowrank_exchange_": "lowrank_exchange",
    "summed_by": "lowrank_exchange",
}
__all__ = [
    "LaunchTable", "lowrank_add_", "lowrank_dora_", "lowrank_dora_squares", "lowrank_exchange_", "summed_by",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(f".{_HOMES[name]}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise ImportError(f"{__name__}.{name} needs triton: pip install triton") from error
    return getattr(home, name)
