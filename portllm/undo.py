"""Exact undo on live models: patches that come off bit for bit, in any order; swaps in one pass."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .errors import PlanError
from .execute import Mover
from .live import Applied, Live, Patches, apply
from .planning import Assign, Plan, Update
from .stack import Held, Layer, change, held, lock, on_device


class Exact(Applied):
    """A patch, or several, on a live model, that come off again to the last bit; as ``Applied``, and:

    Dropping it without ``remove()`` leaves the patch on for good. As a context manager it removes the patch at the end.

    Attributes:
        strength: times the strength that the patches were applied with.
    """

    def __init__(self, target: Live, plan: Plan, tensors: Mapping[str, Tensor], backend: str) -> None:
        super().__init__(target, plan, backend, active=False)
        self.strength = 1.0
        self._key = _Key()
        self._layers = _layers(plan, tensors)

    @property
    def nbytes(self) -> int:
        """Memory that the way back takes, for all patches on this one's tensors."""
        return sum(tensor.nbytes for tensor, _ in self._layers)

    def put_on(self, *, verify: bool | str = True) -> None:
        """Apply the patch (again), on top of what is there; errors as ``remove``."""
        if self.active:
            raise PlanError("this patch is on already")
        self._key.place = next(_places)
        self._change(self, verify)
        self.active = True

    def remove(self, *, verify: bool | str = True) -> None:
        """Bring every weight back, bit for bit, to what it is with the other patches on it alone.

        Args:
            verify: see ``portllm.apply``.

        Raises:
            PlanError: it was removed before.
            RecordError: weights were written to since; nothing has been written then. ``portllm.remove`` subtracts.
        """
        self._require_active()
        self._change(None, verify)
        self.active = False

    def scale(self, strength: float, *, verify: bool | str = True) -> None:
        """Change the strength, in one pass: the bits are those of having applied the patch with it.

        Args:
            strength: times that with which the patch was applied.
            verify: see ``portllm.apply``.

        Raises:
            PlanError: the strength is not finite, or the patch was removed.
            RecordError: as ``remove``.
        """
        self._require_active()
        if not math.isfinite(strength):
            raise PlanError(f"the strength {strength} must be finite")
        before, self.strength = self.strength, float(strength)
        try:
            self._change(self, verify)
        except BaseException:
            self.strength = before
            raise

    def swap(self, new: Exact, *, verify: bool | str = True) -> None:
        """Take this patch off and put ``new`` in its place in the stack, in one pass; errors as ``remove``."""
        self._require_active()
        if new.active:
            raise PlanError("the patch to put on is on already")
        new._key.place = self._key.place
        self._change(new, verify)
        self.active, new.active = False, True

    def _change(self, new: Exact | None, verify: bool | str) -> None:
        """Take this patch off, where it is on, and put ``new`` on, at its strength and its place in the order."""
        with lock:
            changes: dict[Held, dict[_Key, Layer]] = {}
            for tensor, _ in self._layers:
                changes[tensor] = {key: layer for key, layer in tensor.layers.items() if key is not self._key}
            if new is not None:
                for tensor, layer in new._layers:
                    stack = changes.get(tensor, tensor.layers)
                    changes[tensor] = {**stack, new._key: layer.scaled(new.strength)}
            sorted_changes = [
                (tensor, dict(sorted(stack.items(), key=lambda item: item[0].place)))
                for tensor, stack in changes.items()
            ]
            change(sorted_changes, backend=self.backend, verify=verify)

    def _require_active(self) -> None:
        if not self.active:
            raise PlanError("this patch has been removed already")

    def __enter__(self) -> Exact:
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.remove()

    def __repr__(self) -> str:
        state = f"strength {self.strength:g}" if self.active else "off"
        return f"Exact({self.plan!r}, {state}, {self.nbytes:,} bytes to take it off)"


_places = itertools.count()


class _Key:
    """Stands for a handle in the stacks of its tensors, which must not keep the handle itself alive."""

    place = 0  # in the order of all patches


def _layers(plan: Plan, tensors: Mapping[str, Tensor]) -> list[tuple[Held, Layer]]:
    """The plan by tensor, with its factors on the tensor's device."""
    if plan.untie:
        raise PlanError(f"untying {min(plan.untie)} cannot be undone; leave tied='untie' out, or undo='exact'")
    assigns: dict[str, list[Assign]] = defaultdict(list)
    updates: dict[str, list[Update]] = defaultdict(list)
    for assign in plan.assigns:
        assigns[assign.name].append(assign)
    for update in plan.updates:
        updates[update.name].append(update)
    move = Mover()
    return [
        (
            held(name, tensors[name]),
            on_device(Layer(tuple(assigns[name]), tuple(updates[name])), tensors[name].device, move),
        )
        for name in plan.tensors
    ]


@contextmanager
def applied(target: Live, patch: Patches, scale: float = 1.0, **options: Any) -> Iterator[Exact]:
    """``with portllm.applied(model, patch):`` has the patch on inside, and every bit as before after it.

    Args and errors as ``portllm.apply``.
    """
    handle = apply(target, patch, scale, undo="exact", **options)
    with handle:
        yield handle


def swap(target: Live, old: Exact, new: Patches, scale: float = 1.0, **options: Any) -> Exact:
    """Take one patch off and put another in its place in the stack, in one pass over the weights.

    The bits are those of having applied ``new`` instead of ``old``; no copy of the base is needed.

    Args:
        target: what ``old`` was applied to.
        old: what ``apply(target, ..., undo="exact")`` returned; it is not active afterwards, and can be swapped back
            with ``new_handle.swap(old)``.
        new: as ``patch`` of ``portllm.apply``, and so are scale and options.

    Returns:
        The handle of ``new``.

    Raises:
        PlanError: ``new`` does not fit, or ``old`` is not on this target.
        RecordError: weights were written to since; nothing has been written then.
    """
    if old.target is not target:
        raise PlanError("the patch to take off is on another model than the one that was given")
    verify = options.pop("verify", True)
    handle = apply(target, new, scale, undo="later", **{"backend": old.backend, **options})
    old.swap(handle, verify=verify)
    return handle
