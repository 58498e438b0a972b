"""Checkpoints on disk: what changes is what changes live, bit for bit; all else stays as it is, byte for byte."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import portllm
from portllm import CheckpointError, Patch, PlanError, apply_checkpoint, checkpoint, copying, files, ops, reference
from portllm.pieces import TensorPlan
from portllm.shards import Checkpoint

from . import tiny
from .tiny import (
    CONFIG,
    IN,
    INDEX,
    MODULES,
    OUT,
    VOCAB,
    factors,
    read_header,
    read_model,
    same_bits,
    snapshot,
    tensors,
    write_adapter,
    write_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = [name for name in ("torch", "cpu") if ops.unavailable(name) is None]


def live(named: Mapping[str, Tensor], patch: Any, **options: Any) -> dict[str, Tensor]:
    """The same patch on the same tensors in memory."""
    copy = {name: tensor.clone() for name, tensor in named.items()}
    portllm.apply(copy, patch, **options)
    return copy


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    wrong = [name for name in expected if not same_bits(found[name], expected[name])]
    assert not wrong


# -- layouts ---------------------------------------------------------------------------------------------------------


def test_a_single_file_becomes_a_single_file(tmp_path: Path) -> None:
    named = tensors()
    model, adapter = write_model(tmp_path / "model", named, shards=1), write_adapter(tmp_path / "adapter")
    source = model / "model.safetensors"
    report = apply_checkpoint(source, adapter, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").is_file()
    assert_same(read_model(tmp_path / "out.safetensors"), live(named, adapter))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model", "out.safetensors"]
    assert report.out == str(tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["model", "diffusion_pytorch_model", "consolidated", "model.fp16"])
def test_a_directory_with_one_file_of_any_usual_name(tmp_path: Path, name: str) -> None:
    named = tensors()
    model, adapter = write_model(tmp_path / "model", named, shards=1), write_adapter(tmp_path / "adapter")
    (model / "model.safetensors").rename(model / f"{name}.safetensors")
    apply_checkpoint(model, adapter, tmp_path / "out")
    assert snapshot(tmp_path / "out").keys() == {f"{name}.safetensors", "config.json"}
    assert_same(read_model(tmp_path / "out"), live(named, adapter))


@pytest.mark.parametrize("shards", [2, 5])
def test_many_shards(tmp_path: Path, shards: int) -> None:
    named = tensors()
    model, adapter = write_model(tmp_path / "model", named, shards), write_adapter(tmp_path / "adapter")
    apply_checkpoint(model, adapter, tmp_path / "out")
    before, after = snapshot(model), snapshot(tmp_path / "out")
    assert before.keys() == after.keys()
    assert_same(read_model(tmp_path / "out"), live(named, adapter))
    for name in before:
        if name.endswith(".safetensors"):
            assert read_header(model / name)[1] == read_header(tmp_path / "out" / name)[1]
    assert json.loads(after[INDEX]) == json.loads(before[INDEX])
    assert after["config.json"] == before["config.json"]


def test_a_hub_cache_of_links_works_and_gives_plain_files(tmp_path: Path) -> None:
    named = tensors()
    model, adapter = write_model(tmp_path / "blobs", named), write_adapter(tmp_path / "adapter")
    snapshots = tmp_path / "models--x--y" / "snapshots" / "abc"
    snapshots.mkdir(parents=True)
    for i, file in enumerate(sorted(model.iterdir())):
        blob = tmp_path / "models--x--y" / "blobs" / f"{i:064x}"
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        (snapshots / file.name).symlink_to(os.path.relpath(blob, snapshots))
    before = snapshot(tmp_path / "models--x--y")
    apply_checkpoint(snapshots, adapter, tmp_path / "out")
    assert_same(read_model(tmp_path / "out"), live(named, adapter))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert snapshot(tmp_path / "models--x--y") == before


def test_odd_names_of_files_and_tensors(tmp_path: Path) -> None:
    named = tensors() | {"model.a b/c\"'\\é\u2028.😀": torch.randn(3), "": torch.randn(2), "__proto__": torch.randn(1)}
    model, adapter = write_model(tmp_path / "mo del ü", named), write_adapter(tmp_path / "adapter @ 2")
    index = json.loads((model / INDEX).read_text())
    for i, old in enumerate(sorted(model.glob("*.safetensors"))):
        new = f"weights ({i}) ünïcode..' .safetensors"
        index["weight_map"] = {k: new if v == old.name else v for k, v in index["weight_map"].items()}
        old.rename(model / new)
    (model / INDEX).rename(model / "odd.safetensors.index.json")
    (model / "odd.safetensors.index.json").write_text(json.dumps(index))
    apply_checkpoint(model, adapter, tmp_path / "ou t")
    assert snapshot(tmp_path / "ou t").keys() == snapshot(model).keys()
    assert_same(read_model(tmp_path / "ou t"), live(named, adapter))


def test_paths_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = tensors()
    write_model(Path("model"), named)
    write_adapter(Path("adapter"))
    apply_checkpoint("model", "adapter", "new/deep/out")
    assert_same(read_model(tmp_path / "new/deep/out"), live(named, "adapter"))
    monkeypatch.chdir(tmp_path / "model")
    apply_checkpoint(".", "../adapter", "../out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "new/deep/out")


# -- what passes through ---------------------------------------------------------------------------------------------


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _mixed_file(path: Path, named: Mapping[str, Tensor]) -> dict[str, tuple[str, list[int], bytes]]:
    """Tensors of every kind around the ones to patch, in an order of their own, in a header that no tool writes so."""
    noise = torch.randint(0, 256, (64,), dtype=torch.uint8)
    parts = {
        "z.fp8": ("F8_E4M3", [2, 5], _bytes(noise[:10])),
        "a.fp8": ("F8_E5M2", [3], _bytes(noise[10:13])),
        "scale": ("F8_E8M0", [5], _bytes(noise[13:18])),
        "long": ("I64", [2], _bytes(noise[18:34])),
        "empty": ("F32", [0, 3], b""),
        "scalar": ("F32", [], _bytes(torch.tensor([2.7]))),
        "half.scalar": ("BF16", [], _bytes(torch.tensor([1.5], dtype=torch.bfloat16))),
        "flags": ("BOOL", [3], bytes([1, 0, 1])),
        "unsigned": ("U32", [2], _bytes(noise[34:42])),
        "complex": ("C64", [2], _bytes(noise[42:58])),
        "nans": ("F32", [4], struct.pack("<4I", 0x7F800001, 0xFFC12345, 0x7F800000, 0x80000000)),
        "empty.too": ("I8", [4, 0], b""),
    }  # fmt: skip
    for name, tensor in named.items():
        kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
        parts[name] = (kind, list(tensor.shape), _bytes(tensor))
    order = torch.randperm(len(parts)).tolist()
    names = [list(parts)[i] for i in order]
    header, data = {"__metadata__": {"note": 'ä\n"q"', "format": "pt", "empty": ""}}, b""
    for name in names:
        kind, shape, content = parts[name]
        header[name] = {"shape": shape, "data_offsets": [len(data), len(data) + len(content)], "dtype": kind}
        data += content
    shuffled = {name: header[name] for name in sorted(header, reverse=True)}
    text = json.dumps(shuffled, indent=1, ensure_ascii=False)
    tiny.write_raw(path, text + " " * 5 + "\n", data)
    return parts


def _parts(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    header, _, start = read_header(path)
    header.pop("__metadata__", None)
    data = path.read_bytes()[start:]
    return {n: (i["dtype"], i["shape"], data[slice(*i["data_offsets"])]) for n, i in header.items()}


def test_every_other_kind_of_tensor_passes_through_byte_for_byte(tmp_path: Path) -> None:
    named, adapter = tensors(), write_adapter(tmp_path / "adapter")
    source = tmp_path / "mixed.safetensors"
    parts = _mixed_file(source, named)
    apply_checkpoint(source, adapter, tmp_path / "out.safetensors")
    assert read_header(tmp_path / "out.safetensors")[1] == read_header(source)[1]
    found, expected = _parts(tmp_path / "out.safetensors"), live(named, adapter)
    for name, part in parts.items():
        patched = name.removesuffix(".weight") in MODULES
        assert found[name] == (part[0], part[1], _bytes(expected[name])) if patched else found[name] == part
        assert (found[name] == part) != patched


def test_a_cast_leaves_other_kinds_and_the_metadata_alone(tmp_path: Path) -> None:
    named, adapter = tensors(), write_adapter(tmp_path / "adapter")
    source = tmp_path / "mixed.safetensors"
    parts = _mixed_file(source, named)
    apply_checkpoint(source, adapter, tmp_path / "out.safetensors", dtype=torch.float64)
    header = read_header(tmp_path / "out.safetensors")[0]
    assert header["__metadata__"] == read_header(source)[0]["__metadata__"]
    found = _parts(tmp_path / "out.safetensors")
    assert found.keys() == parts.keys()
    wide = live({name: tensor.double() for name, tensor in named.items()}, adapter)
    for name, (kind, shape, content) in parts.items():
        assert found[name][1] == shape
        if kind not in ("F32", "BF16"):
            assert found[name] == (kind, shape, content)
            continue
        assert found[name][0] == "F64"
        if name in wide:
            assert found[name][2] == _bytes(wide[name])
        elif content:
            dtype = torch.float32 if kind == "F32" else torch.bfloat16
            values = torch.frombuffer(bytearray(found[name][2]), dtype=torch.float64)
            original = torch.frombuffer(bytearray(content), dtype=dtype).double()
            torch.testing.assert_close(values, original, rtol=0, atol=0, equal_nan=True)


def test_metadata_and_layout_of_the_bytes_stay(tmp_path: Path) -> None:
    metadata = {"format": "pt", "übung": "ß\t'\"", "n": "1"}
    model = write_model(tmp_path / "model", metadata=metadata)
    apply_checkpoint(model, write_adapter(tmp_path / "adapter"), tmp_path / "out")
    apply_checkpoint(model, tmp_path / "adapter", tmp_path / "wide", dtype=torch.float32)
    for file in model.glob("*.safetensors"):
        for out in (tmp_path / "out", tmp_path / "wide"):
            with safe_open(out / file.name, framework="pt") as new:
                assert new.metadata() == metadata
        old, wide = read_header(file), read_header(tmp_path / "wide" / file.name)
        key = lambda item: item[1]["data_offsets"]  # noqa: E731
        for header in (old[0], wide[0]):
            header.pop("__metadata__")
        assert [n for n, _ in sorted(old[0].items(), key=key)] == [n for n, _ in sorted(wide[0].items(), key=key)]
        assert wide[2] % 8 == 0  # the data are aligned


def test_side_files_come_along_and_weights_in_other_formats_do_not(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    kept = (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "README.md",
        "tokenizer.model", "vocab.txt", "merges.txt", "chat_template.jinja", "additional_chat_templates/tool use.jinja",
        "modeling_custom.py", "deep/er/notes.txt", "LICENSE", "preprocessor_config.json", "original/params.json",
    )  # fmt: skip
    dropped = (
        "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5",
        "flax_model.msgpack", "model.gguf", "onnx/model.onnx", "onnx/model.onnx_data", "consolidated.00.pth",
        "optimizer.pt", "last.ckpt", "model.tflite", "original/model.safetensors", "fp16/x.safetensors.index.json",
        ".gitattributes", ".cache/huggingface/download/a.metadata", "deep/.hidden", ".git/HEAD",
    )  # fmt: skip
    for name in (*kept, *dropped):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(name.encode() + bytes(torch.randint(0, 256, (50,)).tolist()))
    (model / "linked.json").symlink_to(model / "tokenizer.json")
    (model / "dangling.json").symlink_to(model / "nowhere")
    before = snapshot(model)
    apply_checkpoint(model, write_adapter(tmp_path / "adapter"), tmp_path / "out")
    after = snapshot(tmp_path / "out")
    files = {name for name, content in after.items() if content is not None}
    weights = {name for name in before if name.startswith("model-")}
    assert files == {*kept, "config.json", INDEX, "linked.json", *weights}
    assert all(after[name] == before[name] for name in kept)
    assert after["linked.json"] == before["tokenizer.json"]
    assert snapshot(model) == before


# -- pieces ----------------------------------------------------------------------------------------------------------


class Rich:
    """A model with every way to lie: plain, fused, stacked, convolved, 1-D, tied; and patches for all of it."""

    def __init__(self, dtype: torch.dtype) -> None:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape).to(dtype)

        layer = "model.layers.0"
        self.named = {
            "model.embed_tokens.weight": randn(VOCAB, IN),
            f"{layer}.self_attn.qkv_proj.weight": randn(OUT + 8 + 8, IN),
            f"{layer}.self_attn.o_proj.weight": randn(IN, OUT),
            f"{layer}.self_attn.o_proj.bias": randn(IN),
            f"{layer}.mlp.experts.gate_up_proj": randn(3, 2 * 10, IN),
            f"{layer}.mlp.experts.down_proj": randn(3, IN, 10),
            f"{layer}.conv.weight": randn(12, 5, 3, 3),
            f"{layer}.norm.weight": randn(IN),
            "model.norm.weight": randn(IN),
            "lm_head.weight": randn(VOCAB, IN),
        }
        self.layer = layer

    def patches(self) -> list[tuple[Patch, float]]:
        attention = f"{self.layer}.self_attn"
        plain = factors([f"{attention}.o_proj"], IN, OUT)
        for part, rows in (("q_proj", OUT), ("k_proj", 8), ("v_proj", 8)):
            plain |= factors([f"{attention}.{part}"], rows, IN)
        for expert in range(3):
            for part in ("gate_proj", "up_proj"):
                plain |= factors([f"{self.layer}.mlp.experts.{expert}.{part}"], 10, IN, rank=3)
            plain |= factors([f"{self.layer}.mlp.experts.{expert}.down_proj"], IN, 10, rank=3)
        conv = f"base_model.model.{self.layer}.conv"
        plain |= {f"{conv}.lora_A.weight": torch.randn(3, 5, 3, 3), f"{conv}.lora_B.weight": torch.randn(12, 3, 1, 1)}
        plain[f"base_model.model.{self.layer}.norm.weight"] = torch.randn(IN)
        plain["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.randn(4, IN)
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "conv"]
        first = Patch.from_tensors(plain, {
            "peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": modules, "modules_to_save": ["norm"],
            "rank_pattern": {"self_attn.*": 4}, "trainable_token_indices": {"embed_tokens": [1, 19, 0, 7]},
        })  # fmt: skip
        biased = factors([f"{attention}.o_proj"], IN, OUT) | {
            f"base_model.model.{attention}.o_proj.lora_B.bias": torch.randn(IN)
        }
        second = Patch.from_tensors(
            biased, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "lora_bias": True}
        )
        return [(first, 0.7), (second, -1.3)]


def _count_pieces(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    counted = []
    original = TensorPlan.pieces

    def pieces(self: Any, limit: int) -> Any:
        result = list(original(self, limit))
        counted.append(len(result))
        return iter(result)

    monkeypatch.setattr(TensorPlan, "pieces", pieces)
    return lambda: max(counted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk, block", [(1, 1), (1, 100), (200, 48), (500, 33), (1000, 1 << 21), (32 << 20, 64)])
def test_pieces_of_any_size_give_the_bits_of_the_live_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, chunk: int, block: int
) -> None:
    monkeypatch.setattr(copying, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", block)
    most = _count_pieces(monkeypatch)
    rich = Rich(dtype)
    model, patches = write_model(tmp_path / "model", rich.named, shards=3), rich.patches()
    expected = live(rich.named, patches, backend=backend)
    apply_checkpoint(model, patches, tmp_path / "out", backend=backend)
    assert_same(read_model(tmp_path / "out"), expected)
    changed = [name for name in rich.named if not same_bits(expected[name], rich.named[name])]
    assert sorted(set(rich.named) - set(changed)) == ["lm_head.weight", "model.norm.weight"]
    assert most() > 10 if chunk == 1 else True


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{"rounding": "stochastic", "seed": 5}, {"rounding": "auto"}, {"keep_zeros": True, "rounding": "stochastic"}],
)
def test_rounding_gives_the_bits_of_the_live_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(copying, "CHUNK_BYTES", 200)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 48)
    rich = Rich(dtype)
    for tensor in rich.named.values():
        tensor[torch.rand(tensor.shape) < 0.3] = 0
    patches = [(patch, strength * 1e-3) for patch, strength in rich.patches()]
    patches[0] = (_without_replacements(patches[0][0]), patches[0][1])
    model = write_model(tmp_path / "model", rich.named, shards=3)
    expected = live(rich.named, patches, backend=backend, **options)
    report = apply_checkpoint(model, patches, tmp_path / "out", backend=backend, **options)
    found = read_model(tmp_path / "out")
    assert_same(found, expected)
    if options["rounding"] == "stochastic":  # of so few columns and so high ranks auto may leave all to nearest
        assert any(not same_bits(found[name], tensor) for name, tensor in live(rich.named, patches).items())
    changed = [name for name in found if not same_bits(found[name], rich.named[name])]
    assert set(report.survival) >= set(changed)
    if options.get("keep_zeros"):
        for name, tensor in rich.named.items():
            if tensor.dim() > 1:  # a bias is not sparse, it just begins at zero
                assert not found[name][tensor == 0].any()


def _without_replacements(patch: Patch) -> Patch:
    """Replaced values at a small strength are no patch that is lost in rounding."""
    kept = {key: tensor for key, tensor in patch.tensors.items() if ".lora_" in key}
    raw = {k: v for k, v in patch.config.raw.items() if k not in ("modules_to_save", "trainable_token_indices")}
    return Patch.from_tensors(kept, raw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_rounded_by_chance_too(tmp_path: Path, dtype: torch.dtype) -> None:
    """fp32 weights that bf16 holds exactly give what a bf16 checkpoint does."""
    named = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    adapter = write_adapter(tmp_path / "adapter")
    narrow = write_model(tmp_path / "narrow", named)
    wide = write_model(tmp_path / "wide", {name: tensor.float() for name, tensor in named.items()})
    options: dict[str, Any] = {"rounding": "stochastic", "scale": 1e-3}
    apply_checkpoint(narrow, adapter, tmp_path / "a", **options)
    apply_checkpoint(wide, adapter, tmp_path / "b", dtype=dtype, **options)
    assert_same(read_model(tmp_path / "b"), read_model(tmp_path / "a"))
    assert_same(read_model(tmp_path / "a"), live(named, adapter, **options))


@pytest.mark.parametrize("options", [{"rounding": "stochastic"}, {"rounding": "auto"}, {"keep_zeros": True}])
def test_in_place_rounds_to_nearest(tmp_path: Path, options: dict[str, Any]) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    before = read_model(model)
    with pytest.raises(CheckpointError, match=f"{next(iter(options))} cannot be had in place; write a patched copy"):
        apply_checkpoint(model, adapter, in_place=True, **options)
    assert_same(read_model(model), before)
    assert not (model / ".portllm").exists()


def test_a_patch_that_rounding_loses_is_named(tmp_path: Path) -> None:
    """At a 2000th of a step, on average, next to nothing of a patch is left."""
    named = {name: torch.ones_like(tensor).bfloat16() for name, tensor in tensors().items()}
    model, adapter = write_model(tmp_path / "model", named), write_adapter(tmp_path / "adapter")
    report = apply_checkpoint(model, adapter, tmp_path / "a", 1e-6)
    [warning] = [w for w in report.warnings if "rounding to nearest loses" in w]
    assert f"in {len(report.survival)} of {len(report.survival)} weights" in warning
    assert "rounding='stochastic' or 'auto' (--rounding)" in warning
    assert set(report.survival.values()) == {0.0}
    assert not apply_checkpoint(model, adapter, tmp_path / "b", 1e-6, rounding="stochastic").warnings


@pytest.mark.parametrize("chunk", [1, 100, 333, 1 << 20])
def test_rows_that_are_replaced_cross_the_borders_of_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Blocks of rows of a fused weight, single rows, and shares of them, against plain indexing."""
    monkeypatch.setattr(copying, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 20)
    named = {"model.embed_tokens.weight": torch.randn(VOCAB, IN), "a.qkv_proj.weight": torch.randn(32, IN)}
    rows, key = [17, 3, 4, 0], torch.randn(8, IN)
    values = torch.randn(4, IN)
    patch = Patch.from_tensors(
        {
            "base_model.model.a.k_proj.weight": key,
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": values,
        },
        {
            "peft_type": "LORA", "target_modules": ["o_proj"], "modules_to_save": ["k_proj"],
            "trainable_token_indices": {"embed_tokens": rows},
        },
    )  # fmt: skip
    model = write_model(tmp_path / "model", named, config=None)
    apply_checkpoint(model, patch, tmp_path / "out")
    expected = {name: tensor.clone() for name, tensor in named.items()}
    expected["a.qkv_proj.weight"][16:24] = key
    expected["model.embed_tokens.weight"][rows] = values
    assert_same(read_model(tmp_path / "out"), expected)
    apply_checkpoint(model, patch, tmp_path / "half", 0.5)
    found = read_model(tmp_path / "half")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], (named[name] + tensor) / 2)


@pytest.mark.parametrize("chunk", [1, 100, 500, 1 << 20])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_larger_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(copying, "CHUNK_BYTES", chunk)
    named, more = tensors(), VOCAB + 3
    embed, head = torch.randn(more, IN), torch.randn(more, IN)
    adapter = write_adapter(
        tmp_path / "adapter",
        factors()
        | {"base_model.model.model.embed_tokens.weight": embed, "base_model.model.lm_head.weight": head}
        | factors(["lm_head"], more, IN),
        target_modules=["q_proj", "v_proj", "lm_head"],
    )
    model = write_model(tmp_path / "model", named)
    before = snapshot(tmp_path)
    with pytest.raises(PlanError, match="--resize-vocab"):
        apply_checkpoint(model, adapter, tmp_path / "out")
    assert snapshot(tmp_path) == before
    report = apply_checkpoint(model, adapter, tmp_path / "out", resize=True, dtype=dtype)
    kind = dtype or torch.bfloat16
    larger = named | {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    patch = Patch.load(adapter)
    lora = {key: tensor for key, tensor in patch.tensors.items() if ".lora_" in key}
    expected = live({n: t.to(kind) for n, t in larger.items()}, Patch.from_tensors(lora, patch.config))
    found = read_model(tmp_path / "out")
    assert_same(found, expected)
    assert len(found["lm_head.weight"]) == more
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == more
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert any("grows from 20 to 23" in warning for warning in report.warnings)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
@pytest.mark.parametrize("shards", [1, 3])
def test_untied_weights_become_two_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, shards: int
) -> None:
    monkeypatch.setattr(copying, "CHUNK_BYTES", chunk)
    named = tensors(head=False)
    config = CONFIG | {"tie_word_embeddings": True}
    model = write_model(tmp_path / "model", named, shards, config)
    adapter = write_adapter(
        tmp_path / "adapter", factors() | factors(["lm_head"], VOCAB), target_modules=["q_proj", "v_proj", "lm_head"]
    )
    apply_checkpoint(model, adapter, tmp_path / "out", tied="untie")
    expected = live(named | {"lm_head.weight": named["model.embed_tokens.weight"].clone()}, adapter)
    found = read_model(tmp_path / "out")
    assert_same(found, expected)
    assert same_bits(found["model.embed_tokens.weight"], named["model.embed_tokens.weight"])
    assert not same_bits(found["lm_head.weight"], named["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    if shards > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert set(index["weight_map"]) == set(found)
        for name, file in index["weight_map"].items():
            assert name in read_header(tmp_path / "out" / file)[0]
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    # Without it both change together, and nothing is added.
    apply_checkpoint(model, adapter, tmp_path / "tied")
    tied = read_model(tmp_path / "tied")
    assert same_bits(tied["model.embed_tokens.weight"], found["lm_head.weight"])
    assert set(tied) == set(named)


@pytest.mark.parametrize("chunk, block", [(1, 20), (300, 100), (1 << 20, 1 << 21)])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_dora_is_that_of_the_live_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, block: int, strength: float
) -> None:
    monkeypatch.setattr(copying, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", block)
    named = tensors()
    prefix = "base_model.model.model.embed_tokens"
    lora = factors()
    lora |= {f"base_model.model.{m}.lora_magnitude_vector": torch.rand(OUT) + 0.5 for m in MODULES}
    lora |= {f"{prefix}.lora_embedding_A": torch.randn(4, VOCAB), f"{prefix}.lora_embedding_B": torch.randn(IN, 4)}
    lora |= {f"{prefix}.lora_magnitude_vector": torch.rand(IN) + 0.5}
    adapter = write_adapter(
        tmp_path / "adapter", lora, use_dora=True, target_modules=["q_proj", "v_proj", "embed_tokens"]
    )
    plain = write_adapter(tmp_path / "plain")
    patches = [(adapter, strength), (plain, 0.5)]
    apply_checkpoint(write_model(tmp_path / "model", named), patches, tmp_path / "out")
    expected = live(named, patches)
    assert_same(read_model(tmp_path / "out"), expected)
    assert not same_bits(expected["model.embed_tokens.weight"], named["model.embed_tokens.weight"])


# -- casts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_cast_rounds_once(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    named = tensors(stored)
    text = {"dtype": "bfloat16", "torch_dtype": "bfloat16", "x": 1}
    config = CONFIG | {"dtype": "bfloat16", "text_config": text}
    model, adapter = write_model(tmp_path / "model", named, config=config), write_adapter(tmp_path / "adapter")
    apply_checkpoint(model, adapter, tmp_path / "out", dtype=dtype)
    work = torch.promote_types(stored, dtype)
    wide = live({name: tensor.to(work) for name, tensor in named.items()}, adapter)
    assert_same(read_model(tmp_path / "out"), {name: tensor.to(dtype) for name, tensor in wide.items()})
    name = str(dtype).removeprefix("torch.")
    found = json.loads((tmp_path / "out/config.json").read_text())
    new = {"dtype": name, "torch_dtype": name}
    assert found == config | new | {"text_config": text | new}
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() for t in named.values()) * dtype.itemsize
    assert index["weight_map"] == json.loads((model / INDEX).read_text())["weight_map"]


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    before = snapshot(tmp_path)
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(CheckpointError, match=str(dtype)):
            apply_checkpoint(model, adapter, tmp_path / "out", dtype=dtype)
    assert snapshot(tmp_path) == before


# -- the output's place ----------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    named = tensors()
    model, adapter = write_model(tmp_path / "model", named), write_adapter(tmp_path / "adapter")
    out = write_model(tmp_path / "out", shards=3)
    (out / "stale.txt").write_text("from an earlier model")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="exists already; choose another name, or overwrite=True"):
        apply_checkpoint(model, adapter, out)
    assert snapshot(tmp_path) == before
    apply_checkpoint(model, adapter, out, overwrite=True)
    assert snapshot(out).keys() == snapshot(model).keys()
    assert_same(read_model(out), live(named, adapter))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model", "out"]


def test_a_file_that_exists_is_replaced(tmp_path: Path) -> None:
    named = tensors()
    model, adapter = write_model(tmp_path / "model", named, shards=1), write_adapter(tmp_path / "adapter")
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    with pytest.raises(CheckpointError, match="exists already"):
        apply_checkpoint(model / "model.safetensors", adapter, out)
    assert out.read_bytes() == b"old"
    apply_checkpoint(model / "model.safetensors", adapter, out, overwrite=True)
    assert_same(read_model(out), live(named, adapter))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model", "out.safetensors"]


def test_overwrite_without_anything_to_overwrite(tmp_path: Path) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    apply_checkpoint(model, adapter, tmp_path / "a", overwrite=True)
    apply_checkpoint(model, adapter, tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


@pytest.mark.parametrize("out", ["model", "model/patched", "model/sub/deeper", "link", "link/x", "model/../model"])
def test_an_output_inside_the_model_is_refused(tmp_path: Path, out: str) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    (tmp_path / "link").symlink_to(model)
    before = snapshot(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"the input .*; write elsewhere"):
            apply_checkpoint(model, adapter, tmp_path / out, overwrite=overwrite)
    assert snapshot(tmp_path) == before
    single = write_model(tmp_path / "single", shards=1) / "model.safetensors"
    with pytest.raises(CheckpointError, match="the input"):
        apply_checkpoint(single, adapter, single, overwrite=True)


@pytest.mark.parametrize("inside", ["model", "adapter"])
def test_an_output_that_holds_the_model_or_the_patch_is_refused(tmp_path: Path, inside: str) -> None:
    """Replacing it would delete what is being read."""
    home = tmp_path / "home"
    model = write_model((home if inside == "model" else tmp_path) / "model")
    adapter = write_adapter((home if inside == "adapter" else tmp_path) / "adapter")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="write elsewhere"):
        apply_checkpoint(model, adapter, home, overwrite=True)
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_an_output_that_is_a_link_to_another_file_system(tmp_path: Path) -> None:
    named = tensors()
    model, adapter = write_model(tmp_path / "model", named), write_adapter(tmp_path / "adapter")
    other = Path("/dev/shm") / f"portllm-test-{os.getpid()}"
    other.mkdir()
    try:
        (tmp_path / "out").symlink_to(other)
        apply_checkpoint(model, adapter, tmp_path / "out", overwrite=True)
        assert_same(read_model(tmp_path / "out"), live(named, adapter))
    finally:
        shutil.rmtree(other)


def test_it_is_on_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file, and each directory that names it, is synced before the rename, and the parent after it."""
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    (model / "sub").mkdir()
    (model / "sub/notes.txt").write_text("x")
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def spy_fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def spy_rename(self: Path, target: Any) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    apply_checkpoint(model, adapter, tmp_path / "out")
    at = events.index("rename")
    synced = {"/".join(Path(event).relative_to(tmp_path).parts[1:]) for event in events[:at]}
    assert synced == {"", *snapshot(tmp_path / "out")}
    assert events[at + 1 :] == [str(tmp_path)]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("at", [1, 3])
def test_file_systems_that_cannot_copy_in_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, at: int
) -> None:
    """Copying falls back to a buffer, also in the middle of a tensor, and the bytes are the same."""
    monkeypatch.setattr(copying, "CHUNK_BYTES", 50)
    monkeypatch.setattr(files, "COPY_BYTES", 30)
    named, calls = tensors(), []
    copy = os.copy_file_range

    def fails(source: int, out: int, count: int, *rest: Any) -> int:
        calls.append(count)
        if len(calls) >= at:
            raise OSError(code, os.strerror(code))
        return copy(source, out, min(count, 7), *rest)  # the kernel may copy less than it was asked for

    monkeypatch.setattr(os, "copy_file_range", fails)
    adapter = write_adapter(tmp_path / "adapter")
    apply_checkpoint(write_model(tmp_path / "model", named), adapter, tmp_path / "out")
    assert len(calls) >= at
    assert_same(read_model(tmp_path / "out"), live(named, adapter))


def test_hard_links_where_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tensors()
    model = write_model(tmp_path / "model", named, shards=len(named))
    adapter = write_adapter(tmp_path / "adapter")
    apply_checkpoint(model, adapter, tmp_path / "out", link=True)
    assert_same(read_model(tmp_path / "out"), live(named, adapter))
    linked = [path.name for path in model.glob("*.safetensors") if path.samefile(tmp_path / "out" / path.name)]
    assert len(linked) == len(named) - len(MODULES)
    apply_checkpoint(model, adapter, tmp_path / "wide", link=True, dtype=torch.float32)
    assert not any(path.samefile(tmp_path / "wide" / path.name) for path in model.glob("*.safetensors"))

    def no_links(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", no_links)
    apply_checkpoint(model, adapter, tmp_path / "copied", link=True)
    assert snapshot(tmp_path / "copied") == snapshot(tmp_path / "out")


def test_file_systems_that_share_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file can be cloned, only what changes is written; here the clone is a copy."""
    named = tensors()
    model, adapter = write_model(tmp_path / "model", named), write_adapter(tmp_path / "adapter")

    def clone(source: int, out: int) -> bool:
        os.pwrite(out, os.pread(source, os.fstat(source).st_size, 0), 0)
        return True

    def never(*arguments: Any) -> int:
        raise AssertionError("copied what is shared already")

    monkeypatch.setattr(copying, "clone", clone)
    monkeypatch.setattr(os, "copy_file_range", never)
    apply_checkpoint(model, adapter, tmp_path / "out")
    assert_same(read_model(tmp_path / "out"), live(named, adapter))


# -- reports ---------------------------------------------------------------------------------------------------------


def test_the_report_counts(tmp_path: Path) -> None:
    named = tensors()
    model, adapter = write_model(tmp_path / "model", named, shards=3), write_adapter(tmp_path / "adapter")
    report = apply_checkpoint(model, adapter, tmp_path / "out")
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert report.shards == 3
    assert (report.tensors_updated, report.tensors_copied) == (len(MODULES), len(named) - len(MODULES))
    assert (report.bytes_read, report.bytes_written) == (size, size)
    assert 0 < report.seconds < 60
    assert report.gigabytes_per_second == pytest.approx(2 * size / report.seconds / 1e9)
    assert json.loads(json.dumps(report.as_dict()))["gigabytes_per_second"] == report.gigabytes_per_second
    wide = apply_checkpoint(model, adapter, tmp_path / "wide", dtype=torch.float64)
    assert wide.bytes_read == size
    assert wide.bytes_written == sum(file.stat().st_size for file in (tmp_path / "wide").glob("*.safetensors"))
    tied = write_model(tmp_path / "tied", tensors(head=False), config=CONFIG | {"tie_word_embeddings": True})
    patch = write_adapter(tmp_path / "head", factors(["lm_head"], VOCAB), target_modules=["lm_head"])
    untied = apply_checkpoint(tied, patch, tmp_path / "untied", tied="untie")
    assert (untied.tensors_updated, untied.tensors_copied) == (1, len(tensors(head=False)))


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.float64}, {"dtype": torch.float16}, {"tied": "untie"}], ids=str
)
def test_the_progress_bar_ends_at_its_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(copying, "CHUNK_BYTES", 99)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 40)
    bars: list[Any] = []

    class Recorder(checkpoint.Progress):
        def __init__(self, total: int, *, enabled: bool) -> None:
            super().__init__(total, enabled=enabled)
            self.total, self.counts = total, []
            bars.append(self)

        def update(self, count: int) -> None:
            self.counts.append(count)

    monkeypatch.setattr(checkpoint, "Progress", Recorder)
    model = write_model(tmp_path / "model", tensors(head=False), config=CONFIG | {"tie_word_embeddings": True})
    adapter = write_adapter(
        tmp_path / "adapter", factors() | factors(["lm_head"], VOCAB), target_modules=["q_proj", "v_proj", "lm_head"]
    )
    apply_checkpoint(model, adapter, tmp_path / "out", **options)
    [bar] = bars
    assert bar.total == sum(bar.counts)
    assert min(bar.counts) >= 0
    assert len(bar.counts) > 10


def test_reading_a_checkpoint(tmp_path: Path) -> None:
    named = tensors()
    opened = Checkpoint.open(write_model(tmp_path / "model", named, shards=3))
    assert opened.size == sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    for name, tensor in named.items():
        assert same_bits(opened.read(name), tensor)
    target = opened.target()
    assert target.tensors.keys() == named.keys()
    for name, tensor in target.tensors.items():
        assert tensor.is_meta
        assert (tensor.shape, tensor.dtype) == (named[name].shape, named[name].dtype)


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.disk_usage("/tmp").free < 4 << 30, reason="needs 4 GB of disk")
def test_a_large_checkpoint_needs_little_memory(tmp_path: Path) -> None:
    """600 MB through at most 200 MB: the high-water mark of a process, over what it had after its imports."""
    rows, columns = 12_500, 4096
    for shard in range(3):
        size = 2 * rows * columns
        entry = {"dtype": "BF16", "shape": [rows, columns]}
        header = {
            f"model.layers.{shard}.a.weight": entry | {"data_offsets": [0, size]},
            f"model.layers.{shard}.b.weight": entry | {"data_offsets": [size, 2 * size]},
        }
        (tmp_path / "model").mkdir(exist_ok=True)
        file = tiny.write_raw(tmp_path / "model" / f"model-{shard}.safetensors", header)
        os.truncate(file, file.stat().st_size + 2 * size)  # zeros that take no room
    names = {f"model.layers.{s}.{p}.weight": f"model-{s}.safetensors" for s in range(3) for p in "ab"}
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": names}))
    patched = [f"model.layers.{s}.a" for s in range(3)]
    adapter = write_adapter(
        tmp_path / "adapter", factors(patched, rows, columns, dtype=torch.bfloat16), target_modules=["a"]
    )
    code = f"""
import resource, torch, portllm, portllm.checkpoint, portllm.ops
torch.set_num_threads(1)
portllm.ops.unavailable("cpu")
patch = portllm.Patch.load({str(adapter)!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = portllm.apply_checkpoint({str(tmp_path / "model")!r}, patch, {str(tmp_path / "out")!r})
print(report.bytes_written, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    written, peak = map(int, done.stdout.split())
    assert written > 600e6
    assert peak < 200e6, f"{peak / 1e6:.0f} MB"
    shutil.rmtree(tmp_path)
