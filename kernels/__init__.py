"""Triton kernels. Importing this package needs nothing; the first use of a name imports triton.

lowrank_add_(weights, lora_A, lora_B, scalings, n_terms)    add low-rank terms to weights, in place
LaunchTable(weights, lora_A, lora_B, scalings, n_terms)     the same, built once, launched many times
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lowrank_add import LaunchTable, lowrank_add_

__all__ = ["LaunchTable", "lowrank_add_"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import lowrank_add
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise ImportError(f"{__name__}.{name} needs triton: pip install triton") from error
    return getattr(lowrank_add, name)
