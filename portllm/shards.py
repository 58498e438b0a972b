"""Safetensors checkpoints on disk: what lies where. Reads headers only; refuses what is broken or climbs out."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from .bind import Target
from .errors import CheckpointError
from .files import read_exactly, undo_directory
from .hub import resolve
from .naming import split, tied_names
from .quantised import Found, find, read_weight

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SINGLE_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
# Architectures whose output layer may be tied to the embedding and then is not stored.
_HAS_VOCABULARY_HEAD = re.compile(
    r"LMHead|CausalLM|MaskedLM|ConditionalGeneration|PreTraining|Seq2Seq|EncoderModel|^T5"
)
_CONVERT = "convert it first: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
# What to download of a model that is named by its hub id.
_MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.py")
# What is read from config.json, and must not be of another type.
_CONFIG_TYPES = {"architectures": list, "model_type": str, "text_config": dict, "tie_word_embeddings": bool}
_CONV1D_FAMILIES = {"gpt2", "openai-gpt", "decision_transformer", "imagegpt"}
_CONV1D_LAYERS = {"c_attn", "c_proj", "c_fc", "q_attn"}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: ``kind`` is safetensors' dtype name; [start, stop) are absolute byte offsets."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype; None for kinds that torch does not know, whose bytes can still be copied."""
        return DTYPES.get(self.kind)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: ``tensors`` in the order of their bytes; data begins at ``data_start``."""

    path: Path
    metadata: Mapping[str, str] | None
    tensors: tuple[Stored, ...]
    data_start: int
    size: int

    @property
    def name(self) -> str:
        return self.path.name


def read_shard(path: Path) -> Shard:
    """Read and check the header of one safetensors file; raises CheckpointError if the file is not sound."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass  # checks lengths, offsets, holes and overlaps
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
        size = path.stat().st_size
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        fix = _CONVERT if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf") else "copy or download it again"
        raise CheckpointError(f"{path}: not a sound safetensors file: {error}; {fix}") from None
    metadata = header.pop("__metadata__", None)
    tensors = [
        Stored(name, info["dtype"], tuple(info["shape"]), *(8 + length + offset for offset in info["data_offsets"]))
        for name, info in header.items()
    ]
    return Shard(path, metadata, tuple(sorted(tensors, key=lambda t: (t.start, t.stop))), 8 + length, size)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return result


@dataclass(frozen=True)
class Checkpoint:
    """A model's safetensors files.

    Attributes:
        path: the directory, or the single file.
        shards: in the order of the index.
        index: the index file, if there is one.
        config: config.json ({} if there is none).
    """

    path: Path
    shards: tuple[Shard, ...]
    index: Path | None
    config: Mapping[str, Any]

    @classmethod
    def find(cls, model: str | os.PathLike[str]) -> Checkpoint:
        """``open`` what a user named: a path, or a hub id, which is downloaded; raises PortllmError."""
        return cls.open(resolve(model, what="model", allow=_MODEL_FILES))

    @classmethod
    def open(cls, path: Path, *, recover: bool = True) -> Checkpoint:
        """Find the files of a checkpoint and read their headers.

        Args:
            recover: first complete an operation in place that a crash has cut short (``portllm.inplace``).

        Raises:
            CheckpointError: no safetensors files, a broken one, an index that names a missing file or tensor,
                a path outside the directory, or another process that changes it just now.
        """
        if recover:
            _recover(path)
        if path.is_file():
            return cls(path, (read_shard(path),), None, {})
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such model directory or file")
        config = _read_config(path / "config.json") if (path / "config.json").is_file() else {}
        single = next((path / name for name in SINGLE_NAMES if (path / name).is_file()), None)
        indices = sorted(path.glob("*.safetensors.index.json"))
        if single is not None:
            return cls(path, (read_shard(single),), None, config)
        if len(indices) == 1:
            return cls(path, _read_indexed(path, indices[0]), indices[0], config)
        files = sorted(path.glob("*.safetensors"))
        if len(files) == 1 and files[0].name != "adapter_model.safetensors":
            return cls(path, (read_shard(files[0]),), None, config)
        raise CheckpointError(f"{path}: {_why_no_weights(path, files, indices)}")

    @cached_property
    def locations(self) -> dict[str, tuple[Shard, Stored]]:
        """Where each tensor lies."""
        return {stored.name: (shard, stored) for shard in self.shards for stored in shard.tensors}

    @property
    def size(self) -> int:
        """Bytes in all shards."""
        return sum(shard.size for shard in self.shards)

    def target(self) -> Target:
        """The checkpoint as a target to bind to: meta tensors, ties from config.json."""
        tensors = {
            name: torch.empty(stored.shape, dtype=stored.dtype or torch.uint8, device="meta")
            for name, (_, stored) in self.locations.items()
        }
        return Target(tensors, self._aliases(), self._transposed, quantised=self.quantised)

    @cached_property
    def quantised(self) -> Found:
        """The weights that are stored as codes and scales."""
        tensors = {
            name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
            for name, (_, stored) in self.locations.items()
            if stored.dtype is not None
        }
        config = self.config.get("quantization_config")
        return find(tensors, self.read_stored, config if isinstance(config, dict) else {})

    def read(self, name: str) -> Tensor:
        """One whole weight, read from disk; what is quantised in fp32."""
        weight = self.quantised.weights.get(name)
        return self.read_stored(name) if weight is None else read_weight(weight, self.read_stored)

    def read_stored(self, name: str) -> Tensor:
        """One whole tensor as it is stored, read from disk."""
        shard, stored = self.locations[name]
        return read_tensor(shard, stored)

    def _aliases(self) -> dict[str, str]:
        architectures = self.config.get("architectures") or []
        text = self.config.get("text_config")
        tie = self.config.get(
            "tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None
        )
        has_head = any(_HAS_VOCABULARY_HEAD.search(str(a)) for a in architectures)
        aliases = tied_names(self.locations)
        if tie is False or not has_head:
            # An encoder-decoder's input embeddings are one tensor, whatever its output layer is.
            return {alias: stored for alias, stored in aliases.items() if alias.endswith("embed_tokens.weight")}
        return aliases

    def _transposed(self, name: str) -> bool | None:
        family = self.config.get("model_type")
        if family is None:
            return None
        return family in _CONV1D_FAMILIES and split(name)[1] in _CONV1D_LAYERS


def _recover(path: Path) -> None:
    owners = [path, *path.glob("*.safetensors")] if path.is_dir() else [path, path.parent]
    for owner in owners:
        if undo_directory(owner).exists():
            from .inplace import recover

            recover(owner)


def read_tensor(shard: Shard, stored: Stored) -> Tensor:
    """Read one tensor into memory of its own; raises CheckpointError."""
    if stored.dtype is None:
        raise CheckpointError(f"{shard.path}: tensor {stored.name} is of kind {stored.kind}, which torch does not have")
    data = torch.empty(stored.stop - stored.start, dtype=torch.uint8)
    buffer: Any = data.numpy()
    try:
        with open(shard.path, "rb", buffering=0) as file:
            read_exactly(file.fileno(), memoryview(buffer), stored.start)
    except OSError as error:
        raise CheckpointError(f"{shard.path}: cannot be read: {error}") from None
    return data.view(stored.dtype).view(stored.shape)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    for key, kind in _CONFIG_TYPES.items():
        if not isinstance(config.get(key), kind | None):
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; it must be a {kind.__name__}")
    return config


def _read_indexed(directory: Path, index: Path) -> tuple[Shard, ...]:
    content = _read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    if not isinstance(content.get("metadata"), dict | None):
        raise CheckpointError(f"{index}: metadata is {content['metadata']!r}; it must be an object")
    names: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        names.setdefault(file, []).append(tensor)
    shards = []
    for file, tensors in names.items():
        # Only the name is checked, not where a link leads: hub caches link every file to a store elsewhere.
        if PurePosixPath(file).name != file or file in (".", "..") or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: file name {file!r} is not a safetensors file in the model's own directory")
        if not os.path.isfile(directory / file):
            raise CheckpointError(f"{index}: names {file}, which is missing from {directory}; download it again")
        shard = read_shard(directory / file)
        missing = set(tensors) - {stored.name for stored in shard.tensors}
        if missing:
            raise CheckpointError(f"{index}: tensor {min(missing)} is not in {file}, where the index says it is")
        kept = tuple(t for t in shard.tensors if weight_map.get(t.name) == file)
        if len(kept) != len(shard.tensors):
            extra = next(t.name for t in shard.tensors if weight_map.get(t.name) != file)
            raise CheckpointError(f"{directory / file}: tensor {extra} is not in {index.name}; mend the index")
        shards.append(shard)
    return tuple(shards)


def _why_no_weights(path: Path, files: list[Path], indices: list[Path]) -> str:
    if len(indices) > 1:
        return f"several indices ({', '.join(i.name for i in indices)}); keep one"
    if (path / "adapter_config.json").is_file():
        return "holds an adapter, not a model; is the order of PATCH and MODEL right?"
    if len(files) > 1:
        return f"{len(files)} safetensors files but no index; a sharded checkpoint needs model.safetensors.index.json"
    if next(path.glob("*.bin"), None) is not None:
        return f"weights are .bin only; {_CONVERT}"
    return "no safetensors files in it"
