"""Exact undo on live models: patches that come off bit for bit, in any order; swaps in one pass."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import PlanError
from .execute import Mover
from .live import Applied, Live, Patches, apply
from .planning import Assign, Plan, Update
from .stack import Held, Layer, change, held, lock, map_tensors


class Exact(Applied):
    """A patch, or several, on a live model, that come off again to the last bit.

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
    def tensors(self) -> tuple[Held, ...]:
        """The tensors that the patch changes, with all patches on them."""
        return tuple(tensor for tensor, _ in self._layers)

    @property
    def nbytes(self) -> int:
        """Memory that the way back takes, for all patches on this one's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def put_on(self, *, verify: bool | str = True) -> None:
        """Apply the patch (again), on top of what is there; errors as ``remove``."""
        if self.active:
            raise PlanError("this patch is on already")
        self.move_to_the_top()
        exchange([], [self], self.backend, verify)

    def move_to_the_top(self) -> None:
        """Let the patch be the last in the order of all, when it is next put on."""
        self._key.place = next(_places)

    def remove(self, *, verify: bool | str = True) -> None:
        """Bring every weight back, bit for bit, to what it is with the other patches on it alone.

        Args:
            verify: see ``portllm.apply``.

        Raises:
            PlanError: it was removed before.
            RecordError: weights were written to since; nothing has been written then. ``portllm.remove`` subtracts.
        """
        self._require_active()
        exchange([self], [], self.backend, verify)

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
            exchange([self], [self], self.backend, verify)
        except BaseException:
            self.strength = before
            raise

    def swap(self, new: Exact, *, verify: bool | str = True) -> None:
        """Take this patch off and put ``new`` in its place in the stack, in one pass; errors as ``remove``."""
        self._require_active()
        if new.active:
            raise PlanError("the patch to put on is on already")
        new._key.place = self._key.place
        exchange([self], [new], self.backend, verify)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the factors' memory until what is on this stream now is done (see ``torch.Tensor.record_stream``)."""

        def record(tensor: Tensor) -> Tensor:
            if tensor.device == stream.device:
                tensor.record_stream(stream)
            return tensor

        for _, layer in self._layers:
            map_tensors(layer, record)

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


def exchange(off: Sequence[Exact], on: Sequence[Exact], backend: str, verify: bool | str) -> None:
    """Take some patches off and put others on, at their strengths and places, in one pass; errors as ``remove``."""
    gone = {handle._key for handle in off}
    with lock:
        stacks: dict[Held, dict[_Key, Layer]] = {}
        for tensor in dict.fromkeys(tensor for handle in (*off, *on) for tensor, _ in handle._layers):
            stacks[tensor] = {key: layer for key, layer in tensor.layers.items() if key not in gone}
        for handle in on:
            for tensor, layer in handle._layers:
                stacks[tensor][handle._key] = layer.scaled(handle.strength)
        changes = [
            (tensor, dict(sorted(stack.items(), key=lambda item: item[0].place))) for tensor, stack in stacks.items()
        ]
        change(changes, backend=backend, verify=verify)
        for handle in off:
            handle.active = False
        for handle in on:
            handle.active = True


_places = itertools.count()


class _Key:
    """Stands for a handle in the stacks of its tensors, which must not keep the handle itself alive."""

    place = 0  # in the order of all patches


def _layers(plan: Plan, tensors: Mapping[str, Tensor]) -> list[tuple[Held, Layer]]:
    """The plan by tensor, with its factors on the tensor's device."""
    if plan.quantised:
        raise PlanError(
            f"{min(plan.quantised)} is quantised, and there is no record that takes a patch off codes and scales: "
            "keep a copy of the model's tensors, and leave undo out"
        )
    if plan.untie:
        raise PlanError(f"untying {min(plan.untie)} cannot be undone; leave tied='untie' out, or undo='exact'")
    assigns: dict[str, list[Assign]] = defaultdict(list)
    updates: dict[str, list[Update]] = defaultdict(list)
    for assign in plan.assigns:
        assigns[assign.name].append(assign)
    for update in plan.updates:
        updates[update.name].append(update)
    move = Mover()
    layers = []
    for name in plan.tensors:
        layer = Layer(tuple(assigns[name]), tuple(updates[name]))
        tensor = tensors[name]
        layers.append((held(name, tensor), map_tensors(layer, partial(move, device=tensor.device))))
    return layers


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
