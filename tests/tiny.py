"""Tiny checkpoints and adapters, written without portllm's own code."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS = 2
OUT, IN, VOCAB = 24, 16, 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": VOCAB, "hidden_size": IN,
}  # fmt: skip
ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
MODULES = tuple(f"model.layers.{i}.self_attn.{p}" for i in range(LAYERS) for p in ("q_proj", "v_proj"))
INDEX = "model.safetensors.index.json"


def tensors(dtype: torch.dtype = torch.bfloat16, head: bool = True) -> dict[str, Tensor]:
    """A model with two layers of two projections, norms, an embedding and an output layer."""
    named = {f"{module}.weight": torch.randn(OUT, IN) for module in MODULES}
    named |= {f"model.layers.{i}.input_layernorm.weight": torch.randn(IN) for i in range(LAYERS)}
    named |= {"model.embed_tokens.weight": torch.randn(VOCAB, IN)}
    if head:
        named |= {"lm_head.weight": torch.randn(VOCAB, IN)}
    return {name: tensor.to(dtype) for name, tensor in named.items()}


def write_model(
    path: Path,
    named: Mapping[str, Tensor] | None = None,
    shards: int = 2,
    config: Mapping[str, Any] | None = CONFIG,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint; with one shard there is no index."""
    named = tensors() if named is None else named
    path.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(named), path / "model.safetensors", metadata=metadata)
        return path
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: named[name] for name in list(named)[i::shards]}
        save_file(part, path / file, metadata=metadata)
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in named.values())
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return path


def factors(
    modules: Sequence[str] = MODULES, out: int = OUT, inner: int = IN, rank: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """An adapter's state dict, with PEFT's names."""
    named = {}
    for module in modules:
        named[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inner).to(dtype)
        named[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank).to(dtype)
    return named


def write_adapter(path: Path, named: Mapping[str, Tensor] | None = None, **settings: Any) -> Path:
    """Write an adapter directory; ``settings`` change adapter_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(dict(factors() if named is None else named), path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(ADAPTER | settings))
    return path


def read_model(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    named: dict[str, Tensor] = {}
    for file in files:
        loaded = load_file(file)
        assert not set(named) & set(loaded)
        named |= loaded
    return named


def read_header(path: Path) -> tuple[dict[str, Any], bytes, int]:
    """A safetensors file's header as JSON and as bytes (with its length), and where the data begin."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[: 8 + length], 8 + length


def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header at all (text, bytes, or JSON), sound or not."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def snapshot(path: Path) -> dict[str, Any]:
    """Everything below a directory, bit for bit, links as links, hidden files too."""
    found: dict[str, Any] = {}
    for root, folders, files in os.walk(path):
        for name in [*folders, *files]:
            entry = Path(root, name)
            content = os.readlink(entry) if entry.is_symlink() else entry.read_bytes() if entry.is_file() else None
            found[str(entry.relative_to(path))] = content
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit (also of NaNs)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b))) if a.numel() else True
