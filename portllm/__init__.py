"""portllm: port low-rank patches to evolved models, in place, at the speed of memory.

``import portllm`` is cheap: torch, and the op ``torch.ops.portllm.lowrank_add_``, are loaded when a name below
is first used (or by ``import portllm.ops``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import layouts as layouts
    from .algebra import Combined as Combined
    from .algebra import cast as cast
    from .algebra import combine as combine
    from .algebra import negate as negate
    from .algebra import scale as scale
    from .algebra import truncate as truncate
    from .bank import PatchBank as PatchBank
    from .checkpoint import apply_checkpoint as apply_checkpoint
    from .errors import BackendError as BackendError
    from .errors import CheckpointError as CheckpointError
    from .errors import PatchError as PatchError
    from .errors import PlanError as PlanError
    from .errors import PortllmError as PortllmError
    from .errors import RecordError as RecordError
    from .errors import UnsupportedPatchError as UnsupportedPatchError
    from .extraction import Extraction as Extraction
    from .extraction import extract as extract
    from .fingerprint import stamp as stamp
    from .inplace import CheckpointStatus as CheckpointStatus
    from .inplace import InPlaceReport as InPlaceReport
    from .inplace import checkpoint_status as checkpoint_status
    from .inplace import remove_from_checkpoint as remove_from_checkpoint
    from .live import Applied as Applied
    from .live import apply as apply
    from .live import plan as plan
    from .live import remove as remove
    from .movement import Drift as Drift
    from .movement import drift as drift
    from .ops import lowrank_add_ as lowrank_add_
    from .patch import Patch as Patch
    from .planning import Plan as Plan
    from .rebasing import rebase as rebase
    from .undo import Exact as Exact
    from .undo import applied as applied
    from .undo import swap as swap

# The module of each public name; None: the name is itself a module.
_HOMES: dict[str, str | None] = {
    "Applied": "live",
    "BackendError": "errors",
    "CheckpointError": "errors",
    "CheckpointStatus": "inplace",
    "Combined": "algebra",
    "Drift": "movement",
    "Exact": "undo",
    "Extraction": "extraction",
    "InPlaceReport": "inplace",
    "Patch": "patch",
    "PatchBank": "bank",
    "PatchError": "errors",
    "Plan": "planning",
    "PlanError": "errors",
    "PortllmError": "errors",
    "RecordError": "errors",
    "UnsupportedPatchError": "errors",
    "applied": "undo",
    "apply": "live",
    "apply_checkpoint": "checkpoint",
    "cast": "algebra",
    "checkpoint_status": "inplace",
    "combine": "algebra",
    "drift": "movement",
    "extract": "extraction",
    "layouts": None,
    "lowrank_add_": "ops",
    "negate": "algebra",
    "plan": "live",
    "rebase": "rebasing",
    "remove": "live",
    "remove_from_checkpoint": "inplace",
    "scale": "algebra",
    "stamp": "fingerprint",
    "swap": "undo",
    "truncate": "algebra",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f".{name}", __name__)
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
