"""Models that are only read, wherever they are: a checkpoint on disk, a module, a state dict."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import Tensor

from .bind import Target
from .errors import PortllmError
from .live import Live, live_target
from .shards import Checkpoint

Model = Live | str | os.PathLike[str]


@dataclass(frozen=True)
class ReadableModel:
    """A model to read from, on disk or in memory; ``label`` names it in messages."""

    label: str
    target: Target
    checkpoint: Checkpoint | None

    @classmethod
    def open(cls, model: Model, role: str) -> ReadableModel:
        if isinstance(model, str | os.PathLike):
            checkpoint = Checkpoint.find(model)
            return cls(str(model), checkpoint.target(), checkpoint)
        name = getattr(getattr(model, "config", None), "name_or_path", None)
        return cls(str(name or f"the {role} model"), live_target(model), None)

    def read(self, name: str) -> Tensor:
        return self.target.read(name) if self.checkpoint is None else self.checkpoint.read(name)

    def files(self) -> list[tuple[str, int, int]]:
        """What tells these files from others, and from what they were before."""
        if self.checkpoint is None:
            raise PortllmError(f"work is for models on disk; {self.label} is in memory, and could have changed since")
        stats = [(shard.path, shard.path.stat()) for shard in self.checkpoint.shards]
        return [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]

    def nbytes(self, name: str) -> int:
        return self.target.weights[name].nbytes
