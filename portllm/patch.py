"""Patch: what to add. Reads and writes PEFT adapter directories; every key in one is explained, or it is an error."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .config import CONFIG_NAME, AdapterConfig
from .errors import PatchError, UnsupportedPatchError
from .hub import resolve
from .naming import VOCABULARY_LAYERS
from .reference import FLOAT_DTYPES

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
KEY_PREFIX = "base_model.model."  # what PEFT puts before the names of the model's modules
_LORA_KEY = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?$"
)


Record = TypeVar("Record")


@dataclass(frozen=True)
class LoraEntry:
    """``scaling * lora_B @ lora_A`` for one module.

    Attributes:
        module: dotted name, without ``base_model.model.``.
        kind: "linear" (also Conv1D, convolutions) or "embedding".
        lora_A: [r, in]; for a convolution [r, in, *kernel]; for an embedding lora_embedding_B.T [r, dim].
        lora_B: [out, r]; for an embedding lora_embedding_A.T [vocab, r].
        magnitude: DoRA's magnitude vector [out] (embedding: [dim]), or None.
    """

    module: str
    kind: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class ExpertEntry:
    """Factors of the target_parameters of one module: which is whose is settled against the target's shapes.

    Attributes:
        module: name of the module that holds the parameters.
        parameters: full names of the candidates, sorted.
        factors: (lora_A [E*r, in], lora_B [out, r*E]) from the innermost wrapper to the outermost.
    """

    module: str
    parameters: tuple[str, ...]
    factors: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class BiasEntry:
    """lora_bias: ``scaling * value`` [out] is added to the module's bias."""

    module: str
    value: Tensor
    scaling: float


@dataclass(frozen=True)
class ReplaceEntry:
    """A tensor that takes the place of the target's (modules_to_save, bias, a saved vocabulary layer)."""

    name: str
    value: Tensor
    reason: str


@dataclass(frozen=True)
class RowsEntry:
    """trainable_token_indices: rows ``indices`` of the module's weight become ``values`` [n, dim]."""

    module: str
    indices: tuple[int, ...]
    values: Tensor


Entry = LoraEntry | ExpertEntry | BiasEntry | ReplaceEntry | RowsEntry


@dataclass(frozen=True)
class Patch:
    """A low-rank update, learned once on a base model; PEFT adapter directories are its file format.

    Attributes:
        name: where it came from, for messages.
        config: the adapter's settings.
        tensors: the adapter's state dict as PEFT stores it.
        entries: the same, explained (one for each module or tensor it changes).
        metadata: the safetensors file's own string metadata; ``portllm.base`` is the base's fingerprint.
    """

    name: str
    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, ignore_settings: tuple[str, ...] = ()) -> Patch:
        """Read a PEFT adapter: a directory, a directory with one adapter in a subfolder, or a hub id.

        Args:
            path: holds adapter_config.json and adapter_model.safetensors (or adapter_model.bin, read with
                ``weights_only=True``).
            ignore_settings: names of settings that would be refused, and that you know do not matter.

        Raises:
            PatchError: not an adapter, truncated, of a wrong rank, NaN or Inf, a key that nothing explains.
            UnsupportedPatchError: another method than LoRA, or a setting that cannot be merged.
        """
        directory = adapter_directory(Path(resolve(path, what="patch", allow=("adapter_*", "*/adapter_*"))))
        config = AdapterConfig.load(directory / CONFIG_NAME, ignore_settings=ignore_settings)
        tensors, metadata, file = _read_tensors(directory)
        try:
            return cls.from_tensors(tensors, config, name=str(path), metadata=metadata)
        except PatchError as error:
            raise type(error)(f"{file}: {error}") from None

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        config: AdapterConfig | Mapping[str, object],
        *,
        name: str = "patch",
        metadata: Mapping[str, str] | None = None,
    ) -> Patch:
        """Build a patch from an adapter's state dict (PEFT's key names) and its settings; raises as ``load``."""
        if not isinstance(config, AdapterConfig):
            config = AdapterConfig.from_dict(config)
        if not tensors:
            raise PatchError("the adapter is empty; was it saved under ZeRO-3 or FSDP without gathering the shards?")
        for key, tensor in tensors.items():
            _check_tensor(key, tensor)
        entries = tuple(_explain(dict(tensors), config))
        _check_settings(entries, config)
        return cls(name, config, dict(tensors), entries, dict(metadata or {}))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the patch as an adapter directory that PEFT and vLLM load.

        Each file takes its name only when it is whole. Raises OSError.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        weights, config = (directory / f".{name}.{os.getpid()}" for name in (SAFETENSORS_NAME, CONFIG_NAME))
        try:
            save_file(tensors, weights, metadata={"format": "pt", **self.metadata})
            config.write_text(json.dumps(dict(self.config.raw), indent=2, sort_keys=True) + "\n", encoding="utf-8")
            weights.replace(directory / SAFETENSORS_NAME)
            config.replace(directory / CONFIG_NAME)
        except SafetensorError as error:
            raise OSError(f"{directory / SAFETENSORS_NAME}: cannot be written: {error}") from None
        finally:
            weights.unlink(missing_ok=True)
            config.unlink(missing_ok=True)

    def record(self, key: str, read: Callable[[Any], Record], what: str, fix: str = "") -> Record | None:
        """What ``read`` makes of the JSON object, of version 1, that the metadata hold under ``key``; None without one.

        Raises:
            PatchError: it is garbled; ``what`` names it, ``fix`` ends the message.
        """
        text = self.metadata.get(key)
        if text is None:
            return None
        try:
            raw = json.loads(text)
            if raw["version"] != 1:
                raise ValueError(f"version {raw['version']!r} is unknown here")
            return read(raw)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise PatchError(f"{self.name}: {what} is garbled: {error!r}{fix}") from None

    def with_metadata(self, **metadata: str) -> Patch:
        """The same patch with further entries in the file's metadata."""
        return replace(self, metadata={**self.metadata, **metadata})

    @property
    def num_parameters(self) -> int:
        """How many numbers the adapter holds."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks in the patch, ascending."""
        ranks = {entry.lora_A.shape[0] for entry in self.entries if isinstance(entry, LoraEntry)}
        ranks |= {self.config.rank(p) for e in self.entries if isinstance(e, ExpertEntry) for p in e.parameters}
        return tuple(sorted(ranks))

    def __repr__(self) -> str:
        return (
            f"Patch({self.name!r}, {len(self.entries)} entries, r={list(self.ranks)}, {self.num_parameters:,} numbers)"
        )


def adapter_directory(path: Path) -> Path:
    """The directory that holds adapter_config.json: ``path``, one below it, or that of an adapter's file.

    Raises:
        PatchError: there is none, or several.
    """
    if path.name in (CONFIG_NAME, SAFETENSORS_NAME, BIN_NAME):
        path = path.parent
    if path.is_file():
        raise PatchError(f"{path}: is a file; a patch is a directory with {CONFIG_NAME} and {SAFETENSORS_NAME}")
    if (path / CONFIG_NAME).is_file():
        return path
    if not path.is_dir():
        raise PatchError(f"{path}: no such adapter directory")
    nested = sorted(child for child in path.iterdir() if (child / CONFIG_NAME).is_file())
    if len(nested) == 1:
        return nested[0]
    if nested:
        raise PatchError(f"{path}: holds several adapters, name one: {', '.join(str(n) for n in nested)}")
    raise PatchError(f"{path}: no {CONFIG_NAME} in it; a patch is a PEFT adapter directory")


def _read_tensors(directory: Path) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    file = directory / SAFETENSORS_NAME
    if file.is_file():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as f:
                # Cloned: a mapped file that is overwritten later would change, or kill, the process.
                return {key: f.get_tensor(key).clone() for key in f.keys()}, f.metadata() or {}, file  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise PatchError(f"{file}: not a sound safetensors file: {error}") from None
    file = directory / BIN_NAME
    if not file.is_file():
        raise PatchError(f"{directory}: neither {SAFETENSORS_NAME} nor {BIN_NAME} in it")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a broken or unsafe pickle
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PatchError(f"{file}: cannot be read with weights_only=True: {reason}") from None
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise PatchError(f"{file}: not a state dict of tensors")
    return {str(k): v.detach().clone() for k, v in loaded.items()}, {}, file


def _check_tensor(key: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise PatchError(f"tensor {key} is {tensor.dtype}; adapters are float16, bfloat16, float32 or float64")
    if tensor.numel() == 0:
        raise PatchError(f"tensor {key} is empty; was it saved under ZeRO-3 or FSDP without gathering the shards?")
    if not torch.isfinite(tensor).all():
        raise PatchError(f"tensor {key} holds NaN or Inf; the adapter is broken, nothing can be added")


def _strip_prefix(key: str) -> str:
    for prefix in (KEY_PREFIX, "base_model."):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def factor_key(key: str) -> tuple[str, str] | None:
    """(module with any ``.base_layer``, part such as "lora_A") of a key that is LoRA's own; None of another tensor."""
    match = _LORA_KEY.match(_strip_prefix(key))
    return None if match is None else (match["module"], match["part"])


def _explain(tensors: dict[str, Tensor], config: AdapterConfig) -> Iterator[Entry]:
    """Turn every key of an adapter into entries; a key that nothing explains is a PatchError."""
    groups: dict[str, dict[str, Tensor]] = {}
    matches = {key: _LORA_KEY.match(_strip_prefix(key)) for key in tensors}
    adapters = {match["adapter"] or "" for match in matches.values() if match}
    if len(adapters) > 1:
        raise PatchError(f"the file holds several adapters ({', '.join(sorted(adapters))}); save one at a time")
    for key, tensor in tensors.items():
        match = matches[key]
        if match is None:
            if _is_whole(key, tensors):
                yield _explain_whole(key, tensor, config)
            continue
        part = match["part"] + (".bias" if match["leaf"] == "bias" else "")
        if groups.setdefault(match["module"], {}).setdefault(part, tensor) is not tensor:
            raise PatchError(f"tensor {key} stands twice in the adapter")

    wrappers: dict[str, dict[int, dict[str, Tensor]]] = {}
    for wrapped, parts in groups.items():
        module = re.sub(r"\.base_layer(?=\.|$)", "", wrapped)
        if config.parameters_of(module) and not _targets_by_name(config, module):
            depth = wrapped.count(".base_layer")
            wrappers.setdefault(module, {})[depth] = parts
        else:
            if ".base_layer." in wrapped:
                raise UnsupportedPatchError(
                    f"module {wrapped} lies within a layer that has factors of its own (torch.nn.MultiheadAttention); "
                    "PEFT adds the inner ones twice, in training and in its merge, so what they mean is not settled"
                )
            yield from _explain_module(module, parts, config)
    for module, levels in wrappers.items():
        yield _explain_experts(module, levels, config)


def _is_whole(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is of the patch, and no factor: it replaces something."""
    # A module that was resized and saved comes with its state before the training, which is not the patch.
    trained = key.replace(".original_module.", ".modules_to_save.")
    return not _LORA_KEY.match(_strip_prefix(key)) and (trained == key or trained not in tensors)


def replaced_tensors(patch: Patch) -> dict[str, Tensor]:
    """The tensors, by the file's keys, that replace something in the target: what is no factor."""
    return {key: tensor for key, tensor in patch.tensors.items() if _is_whole(key, patch.tensors)}


def _check_settings(entries: tuple[Entry, ...], config: AdapterConfig) -> None:
    """A setting that promises tensors which the file does not hold: it was cut short, or is not from this training."""
    kinds = {type(entry) for entry in entries}
    saved = any(isinstance(entry, ReplaceEntry) for entry in entries)
    for setting, promised, kept in (
        ("modules_to_save", config.modules_to_save, saved),
        ("trainable_token_indices", config.trainable_token_indices, RowsEntry in kinds),
        ("target_parameters", config.target_parameters, ExpertEntry in kinds),
    ):
        if promised and not kept:
            raise PatchError(f"{setting} is {promised!r}, but the file holds no tensor of it; save the adapter again")


def _targets_by_name(config: AdapterConfig, module: str) -> bool:
    return not config.selects_by_kind and config.target_modules is not None and config.targets_module(module)


def _explain_module(module: str, parts: dict[str, Tensor], config: AdapterConfig) -> Iterator[Entry]:
    parts = dict(parts)
    # With ensure_weight_tying PEFT writes down the embedding only, and finds the layers tied to it in the model.
    is_tied = config.ensure_weight_tying and VOCABULARY_LAYERS.match(module)
    if not config.targets_module(module) and not is_tied:
        raise PatchError(
            f"module {module} has factors, but target_modules/exclude_modules/layers_to_transform do not cover it; "
            f"PEFT would ignore them: mend {CONFIG_NAME}"
        )
    magnitude = parts.pop("lora_magnitude_vector", None)
    if config.use_dora != (magnitude is not None):
        raise PatchError(
            f"module {module}: use_dora is {config.use_dora}, but lora_magnitude_vector is "
            f"{'there' if magnitude is not None else 'missing'}"
        )
    bias = parts.pop("lora_B.bias", None)
    if config.lora_bias != (bias is not None) and "lora_B" in parts:
        raise PatchError(
            f"module {module}: lora_bias is {config.lora_bias}, but lora_B.bias is "
            f"{'there' if bias is not None else 'missing'}"
        )
    names = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else ("lora_A", "lora_B")
    if set(parts) != set(names):
        raise PatchError(f"module {module}: needs {names[0]} and {names[1]}, has {', '.join(sorted(parts))}")
    lora_A, lora_B = parts[names[0]], parts[names[1]]
    rank = config.rank(module)
    if lora_B.dim() > 2 and lora_A.shape[0] == rank and lora_B.shape[1] < rank and rank % lora_B.shape[1] == 0:
        raise UnsupportedPatchError(
            f"module {module}: lora_B {list(lora_B.shape)} of rank {rank} belongs to a convolution in "
            f"{rank // lora_B.shape[1]} groups; grouped convolutions cannot be merged"
        )
    if lora_A.dim() < 2 or lora_B.dim() < 2 or lora_A.shape[0] != rank or lora_B.shape[1] != rank:
        raise PatchError(
            f"module {module}: {names[0]} {list(lora_A.shape)} and {names[1]} {list(lora_B.shape)} "
            f"are not of rank {rank}, which {CONFIG_NAME} gives (r, rank_pattern)"
        )
    scaling = config.scaling(module)
    embedding = names[0] == "lora_embedding_A"
    out = lora_B.shape[0]
    if magnitude is not None and magnitude.numel() != out:
        raise PatchError(f"module {module}: lora_magnitude_vector {list(magnitude.shape)} must hold {out} numbers")
    if bias is not None and tuple(bias.shape) != (out,):
        raise PatchError(f"module {module}: lora_B.bias {list(bias.shape)} must be [{out}]")
    magnitude = None if magnitude is None else magnitude.flatten()
    if embedding:
        yield LoraEntry(module, "embedding", lora_B.T, lora_A.T, scaling, magnitude)
        return
    if lora_B.numel() != lora_B.shape[0] * rank:
        raise PatchError(f"module {module}: lora_B {list(lora_B.shape)} must be [out, {rank}] with a 1-wide kernel")
    yield LoraEntry(module, "linear", lora_A, lora_B.flatten(1), scaling, magnitude)
    if bias is not None:
        yield BiasEntry(module, bias, scaling)


def _explain_experts(module: str, levels: dict[int, dict[str, Tensor]], config: AdapterConfig) -> ExpertEntry:
    if sorted(levels) != list(range(len(levels))):
        raise PatchError(f"module {module}: nested parameter wrappers {sorted(levels)} have a gap")
    factors = []
    for depth in sorted(levels, reverse=True):
        parts = levels[depth]
        if set(parts) != {"lora_A", "lora_B"} or any(t.dim() != 2 for t in parts.values()):
            raise PatchError(f"module {module}: target_parameters need 2-D lora_A and lora_B, have {sorted(parts)}")
        if parts["lora_A"].shape[0] != parts["lora_B"].shape[1]:
            raise PatchError(
                f"module {module}: lora_A {list(parts['lora_A'].shape)} and lora_B {list(parts['lora_B'].shape)} "
                "are of different rank"
            )
        factors.append((parts["lora_A"], parts["lora_B"]))
    parameters = config.parameters_of(module)
    if len(parameters) < len(factors):
        raise PatchError(f"module {module}: {len(factors)} nested factors, but target_parameters name {parameters}")
    return ExpertEntry(module, parameters, tuple(factors))


def _explain_whole(key: str, tensor: Tensor, config: AdapterConfig) -> Entry:
    """A key without LoRA factors: a trained token, a saved module, a bias or a vocabulary layer."""
    name = _strip_prefix(key)
    module, _, leaf = name.rpartition(".")
    if leaf == "trainable_tokens_delta" or ".trainable_tokens_delta." in name:
        module = re.sub(r"\.token_adapter$", "", name.partition(".trainable_tokens_delta")[0])
        indices = config.token_indices(module)
        if tensor.dim() != 2 or indices is None or len(indices) != tensor.shape[0] or len(set(indices)) != len(indices):
            raise PatchError(
                f"tensor {key} {list(tensor.shape)} does not fit trainable_token_indices "
                f"({None if indices is None else len(indices)} distinct rows expected)"
            )
        return RowsEntry(module, indices, tensor)
    name = re.sub(r"\.modules_to_save(\.(?!weight|bias)[^.]+)?(?=\.)", "", name)
    frozen = ".base_layer." in name
    name = name.replace(".base_layer", "").replace(".original_module", "")
    module, _, leaf = name.rpartition(".")
    if config.saves_tensor_of(module):
        return ReplaceEntry(name, tensor, "modules_to_save")
    if leaf == "bias" and config.bias != "none":
        return ReplaceEntry(name, tensor, f"bias={config.bias}")
    if leaf in ("weight", "bias") and (frozen or VOCABULARY_LAYERS.match(module)):
        return ReplaceEntry(name, tensor, "base layer saved with the adapter" if frozen else "vocabulary layer")
    raise PatchError(
        f"tensor {key} is neither a LoRA factor nor explained by modules_to_save, bias or trainable_token_indices; "
        "nothing is skipped in silence: remove it, or mend the settings"
    )
