"""Typed errors. Each message is one line that names the tensor, the file and the fix."""

from __future__ import annotations


class PortllmError(Exception):
    """Base of every error that portllm raises on purpose."""


class PatchError(PortllmError, ValueError):
    """The patch itself is broken: a bad file, a wrong rank, a NaN, a key that nothing explains."""


class UnsupportedPatchError(PatchError):
    """The patch is sound, but uses a method or a setting that cannot be added to a weight."""


class PlanError(PortllmError, ValueError):
    """Patch and target do not fit each other: a name, a shape, a tie, a device."""


class CheckpointError(PortllmError, ValueError):
    """A checkpoint on disk cannot be read, or its successor cannot be written."""


class BackendError(PortllmError, RuntimeError):
    """The backend that was asked for is not available here, or does not take this weight."""


class RecordError(PortllmError, RuntimeError):
    """A patch cannot be taken off exactly: the weights are not what they were, or its record is not for them."""
