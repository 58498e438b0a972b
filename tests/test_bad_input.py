"""Bad input and bad luck: one clear line, a typed exception, and everything bit for bit as it was before."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import io
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import portllm
from portllm import (
    BackendError,
    CheckpointError,
    Patch,
    PatchError,
    PlanError,
    PortllmError,
    UnsupportedPatchError,
    apply_checkpoint,
    cli,
    copying,
)

from .tiny import (
    ADAPTER,
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
    write_raw,
)

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = int(os.environ.get("PORTLLM_FUZZ_EXAMPLES") or 50)
fuzz = settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
FIRST = f"base_model.model.{MODULES[0]}"
EMBED = "base_model.model.model.embed_tokens"


def command(*arguments: Any) -> tuple[int, str, str]:
    """Run the command in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


class World:
    """A directory with a model and a patch in it, to be spoilt."""

    def __init__(self, path: Path) -> None:
        self.path, self.out = path, path / "out"
        self.model, self.adapter = write_model(path / "model"), write_adapter(path / "adapter")
        self.weights = self.adapter / "adapter_model.safetensors"
        self.shard = sorted(self.model.glob("*.safetensors"))[0]

    def refuses(self, *words: str, before: Any = None, apply: tuple[Any, ...] | None = None) -> str:
        """The command says one line with these words, exits with 2, and nothing has changed; returns the line."""
        before = snapshot(self.path) if before is None else before
        arguments = (self.adapter, self.model, "-o", self.out) if apply is None else apply
        code, out, err = command("apply", *arguments, "-q")
        assert (code, out) == (2, ""), (code, out, err)
        assert err.startswith("portllm: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        missing = [word for word in words if word.lower() not in err.lower()]
        assert not missing, f"{missing} not in {err!r}"
        assert snapshot(self.path) == before
        return err

    def raises(self, kind: type[PortllmError]) -> None:
        """The same as an exception of this very type, in Python."""
        before = snapshot(self.path)
        with pytest.raises(PortllmError) as caught:
            apply_checkpoint(self.model, self.adapter, self.out)
        assert type(caught.value) is kind
        assert "\n" not in str(caught.value)
        assert snapshot(self.path) == before


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    raw = json.loads(path.read_text())
    result = change(raw)
    path.write_text(json.dumps(raw if result is None else result))


# -- patches ---------------------------------------------------------------------------------------------------------


def settings_of(**changes: Any) -> Callable[[World], None]:
    return lambda world: change_json(world.adapter / "adapter_config.json", lambda raw: raw.update(changes))


def factors_of(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        named = load_file(world.weights)
        result = change(named)
        save_file(result if isinstance(result, dict) else named, world.weights, {"format": "pt"})

    return spoil


def both(*changes: Callable[[World], None]) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        for change in changes:
            change(world)

    return spoil


def only_first(extra: Mapping[str, Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda named: {k: v for k, v in named.items() if k.startswith(f"{FIRST}.")} | dict(extra)


def value_of(value: float, key: str = f"{FIRST}.lora_A.weight") -> Callable[[dict[str, Tensor]], None]:
    def change(named: dict[str, Tensor]) -> None:
        named[key].view(-1)[random.randrange(named[key].numel())] = value

    return change


def written(name: str, content: str | bytes) -> Callable[[World], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda world: (world.adapter / name).write_bytes(data) and None


def as_bin(content: Any) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        world.weights.unlink()
        torch.save(content, world.adapter / "adapter_model.bin")

    return spoil


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/portllm-was-here",)


NAN, INF = math.nan, math.inf
BAD_PATCHES: dict[str, tuple[Callable[[World], Any], type[PortllmError], tuple[str, ...]]] = {
    "missing": (lambda w: shutil.rmtree(w.adapter), PortllmError, ("adapter", "no such patch")),
    "empty directory": (
        lambda w: [p.unlink() for p in w.adapter.iterdir()], PatchError, ("no adapter_config.json", "PEFT adapter")),
    "no config": (
        lambda w: (w.adapter / "adapter_config.json").unlink(), PatchError, ("no adapter_config.json", "PEFT adapter")),
    "no weights": (lambda w: w.weights.unlink(), PatchError, ("neither adapter_model.safetensors nor",)),
    "a file that is no adapter": (
        lambda w: [shutil.rmtree(w.adapter), w.adapter.write_text("x")], PatchError, ("is a file",)),
    "two adapters": (
        lambda w: [shutil.copytree(w.adapter, w.path / "t"), shutil.rmtree(w.adapter),
                   [shutil.copytree(w.path / "t", w.adapter / n) for n in "ab"]],
        PatchError, ("several adapters", "name one", "adapter/a", "adapter/b")),
    "config is not JSON": (written("adapter_config.json", "{"), PatchError, ("adapter_config.json", "as JSON")),
    "config is empty": (written("adapter_config.json", ""), PatchError, ("adapter_config.json", "as JSON")),
    "config is binary": (written("adapter_config.json", b"\xff\xfe\x00"), PatchError, ("adapter_config.json", "JSON")),
    "config is a list": (written("adapter_config.json", "[1]"), PatchError, ("adapter_config.json", "a list")),
    "config is too deep": (written("adapter_config.json", "[" * 10**5), PatchError, ("adapter_config.json", "JSON")),
    "LoHa": (settings_of(peft_type="LOHA"), UnsupportedPatchError, ("peft_type is 'LOHA'", "only LORA")),
    "IA3": (settings_of(peft_type="IA3"), UnsupportedPatchError, ("peft_type is 'IA3'", "only LORA")),
    "no method": (settings_of(peft_type=None), UnsupportedPatchError, ("peft_type is None", "written by PEFT?")),
    "PiSSA": (
        settings_of(init_lora_weights="pissa_niter_4"), UnsupportedPatchError, ("pissa", "path_initial_model")),
    "an unknown setting": (settings_of(brand_new={"x": 1}), UnsupportedPatchError, ("brand_new", "--ignore-setting")),
    "a setting that cannot be merged": (settings_of(alora_invocation_tokens=[1]), UnsupportedPatchError, ("alora",)),
    "r is wrong": (settings_of(r=8), PatchError, ("adapter_model", MODULES[0], "rank 8", "adapter_config.json")),
    "rank_pattern is wrong": (settings_of(rank_pattern={"v_proj": 2}), PatchError, (MODULES[1], "rank 2")),
    "r is text": (settings_of(r="4"), PatchError, ("adapter_config.json", "setting r='4'", "positive integer")),
    "r is zero": (settings_of(r=0), PatchError, ("setting r=0", "positive")),
    "r is negative": (settings_of(r=-4), PatchError, ("setting r=-4", "positive")),
    "r is true": (settings_of(r=True), PatchError, ("setting r=True", "positive")),
    "alpha is NaN": (settings_of(lora_alpha=NAN), PatchError, ("lora_alpha=nan", "finite")),
    "alpha is text": (settings_of(lora_alpha="16"), PatchError, ("lora_alpha='16'", "number")),
    "target_modules is no expression": (
        settings_of(target_modules="(q_proj"), PatchError, ("target_modules", "(q_proj")),
    "target_modules is a number": (settings_of(target_modules=7), PatchError, ("target_modules=7",)),
    "target_modules leave one out": (
        settings_of(target_modules=["q_proj"]), PatchError, (MODULES[1], "target_modules", "mend")),
    "NaN in lora_A": (factors_of(value_of(NAN)), PatchError, (f"{FIRST}.lora_A.weight", "NaN or Inf")),
    "NaN in lora_B": (
        factors_of(value_of(NAN, f"{FIRST}.lora_B.weight")), PatchError, (f"{FIRST}.lora_B.weight", "NaN or Inf")),
    "Inf": (factors_of(value_of(INF)), PatchError, (f"{FIRST}.lora_A.weight", "NaN or Inf")),
    "-Inf": (factors_of(value_of(-INF)), PatchError, (f"{FIRST}.lora_A.weight", "NaN or Inf")),
    "no tensors": (factors_of(lambda named: {}), PatchError, ("adapter_model", "empty", "gathering")),
    "empty tensors": (
        factors_of(lambda named: {k: v[:0] for k, v in named.items()}), PatchError, ("is empty", "gathering")),
    "no lora_B": (factors_of(lambda n: n.pop(f"{FIRST}.lora_B.weight") is None), PatchError, (MODULES[0], "lora_B")),
    "no lora_A": (factors_of(lambda n: n.pop(f"{FIRST}.lora_A.weight") is None), PatchError, (MODULES[0], "lora_A")),
    "a stray tensor": (
        factors_of(lambda n: n.update({"base_model.model.model.norm.weight": torch.ones(3)})), PatchError,
        ("base_model.model.model.norm.weight", "nothing is skipped in silence")),
    "integers": (
        factors_of(lambda n: n.update({f"{FIRST}.lora_A.weight": torch.ones(4, IN, dtype=torch.int32)})), PatchError,
        (f"{FIRST}.lora_A.weight", "int32", "float16, bfloat16, float32 or float64")),
    "fp8": (
        factors_of(lambda n: n.update({f"{FIRST}.lora_A.weight": torch.ones(4, IN).to(torch.float8_e4m3fn)})),
        PatchError, (f"{FIRST}.lora_A.weight", "float8_e4m3fn")),
    "the ranks of the factors differ": (
        factors_of(lambda n: n.update({f"{FIRST}.lora_B.weight": torch.ones(OUT, 3)})), PatchError,
        (MODULES[0], f"[{OUT}, 3]", "rank 4")),
    "a vector": (
        factors_of(lambda n: n.update({f"{FIRST}.lora_A.weight": torch.ones(4)})), PatchError, (MODULES[0], "[4]")),
    "two names in one file": (
        factors_of(lambda n: n.update({k.replace("_A.", "_A.other."): v.clone() for k, v in n.items() if "_A" in k})),
        PatchError, ("several adapters",)),
    "DoRA without magnitudes": (settings_of(use_dora=True), PatchError, (MODULES[0], "use_dora is True", "missing")),
    "magnitudes without DoRA": (
        factors_of(lambda n: n.update({f"{FIRST}.lora_magnitude_vector": torch.ones(OUT)})), PatchError,
        (MODULES[0], "use_dora is False")),
    "lora_bias without a bias": (settings_of(lora_bias=True), PatchError, (MODULES[0], "lora_B.bias", "missing")),
    "a broken pickle": (
        both(as_bin({}), written("adapter_model.bin", b"\x80\x02garbage")), PatchError,
        ("adapter_model.bin", "weights_only=True")),
    "a pickle that runs code": (as_bin({"a": Evil()}), PatchError, ("adapter_model.bin", "weights_only=True")),
    "a pickle of something else": (as_bin([1, 2]), PatchError, ("adapter_model.bin", "not a state dict")),
    "rows for other inputs": (
        factors_of(lambda n: n.update({f"{FIRST}.lora_A.weight": torch.ones(4, IN + 1)})), PlanError,
        (MODULES[0], f"[{OUT}, {IN + 1}]", f"[{OUT}, {IN}]", "another architecture")),
    "columns for other outputs": (
        factors_of(lambda n: n.update({f"{FIRST}.lora_B.weight": torch.ones(OUT - 2, 4)})), PlanError,
        (MODULES[0], f"[{OUT - 2}, {IN}]", f"[{OUT}, {IN}]")),
    "for another model": (
        factors_of(lambda n: {k.replace("model.layers", "transformer.blocks"): v for k, v in n.items()}), PlanError,
        ("matches nothing", "transformer.blocks.0.self_attn.q_proj", "another model?")),
    "for a deeper model": (
        factors_of(lambda n: n.update({k.replace(".0.", ".7."): v.clone() for k, v in n.items() if ".0." in k})),
        PlanError, ("model.layers.7.self_attn.q_proj", "--no-strict")),
    "for fewer modules than it says": (
        factors_of(lambda n: {k: v for k, v in n.items() if MODULES[2] not in k}), PlanError,
        (MODULES[2], "target_modules", "--no-strict")),
    "tokens that do not exist": (
        both(settings_of(trainable_token_indices={"embed_tokens": [2, VOCAB]}),
             factors_of(lambda n: n.update({f"{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(2, IN)}))),
        PlanError, ("embed_tokens", f"indices up to {VOCAB}", "vocabulary resized?")),
    "a larger vocabulary": (
        factors_of(lambda n: n.update({"base_model.model.lm_head.weight": torch.ones(VOCAB + 8, IN)})), PlanError,
        ("lm_head.weight", f"[{VOCAB + 8}, {IN}]", f"[{VOCAB}, {IN}]", "--resize-vocab")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PATCHES)
def test_bad_patches(world: World, case: str) -> None:
    spoil, kind, words = BAD_PATCHES[case]
    spoil(world)
    world.refuses(*words)
    world.raises(kind)
    # A live model too is as it was before.
    named = read_model(world.model)
    old = {name: tensor.clone() for name, tensor in named.items()}
    with pytest.raises(PortllmError) as caught:
        portllm.apply(named, world.adapter)
    assert type(caught.value) is kind
    assert named.keys() == old.keys()
    assert all(same_bits(named[name], old[name]) for name in old)
    for name in ("check", "inspect") if kind in (PatchError, UnsupportedPatchError) else ("check",):
        code, out, err = command(name, world.adapter, *([world.model] if name == "check" else []))
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
    assert not Path("/tmp/portllm-was-here").exists()


def test_the_unspoilt_patch_is_taken(world: World) -> None:
    before = snapshot(world.model)
    assert command("apply", world.adapter, world.model, "-o", world.out, "-q")[0] == 0
    assert snapshot(world.model) == before
    changed = {name for name, t in read_model(world.out).items() if not same_bits(t, read_model(world.model)[name])}
    assert changed == {f"{module}.weight" for module in MODULES}


HUGE = 10**400
UGLY_PATCHES = [
    ("a bias without rows", both(
        settings_of(lora_bias=True), factors_of(only_first({f"{FIRST}.lora_B.bias": torch.tensor(1.0)})))),
    ("a bias with columns", both(
        settings_of(lora_bias=True), factors_of(only_first({f"{FIRST}.lora_B.bias": torch.ones(OUT, 2)})))),
    ("a magnitude that is too short", both(
        settings_of(use_dora=True), factors_of(only_first({f"{FIRST}.lora_magnitude_vector": torch.ones(OUT - 1)})))),
    ("a trained token without rows", both(
        settings_of(trainable_token_indices={"embed_tokens": [1]}),
        factors_of(lambda n: n.update({f"{EMBED}.token_adapter.trainable_tokens_delta": torch.tensor(1.0)})))),
    ("alpha is huge", settings_of(lora_alpha=HUGE)),
    ("alpha is beyond fp32", settings_of(lora_alpha=1e300)),
    ("alpha_pattern is huge", settings_of(alpha_pattern={"q_proj": HUGE})),
    ("rank_pattern with flags", settings_of(rank_pattern={"(?i)q_proj": 4})),
    ("modules_to_save with flags", settings_of(modules_to_save=["(?i)norm"])),
]  # fmt: skip


@pytest.mark.parametrize("case, spoil", UGLY_PATCHES)
def test_ugly_patches(world: World, case: str, spoil: Callable[[World], None]) -> None:
    """As above, for inputs that fuzzing found."""
    spoil(world)
    named = read_model(world.model)
    old = {name: tensor.clone() for name, tensor in named.items()}
    with pytest.raises(PortllmError):
        portllm.apply(named, world.adapter, strict=False)
    assert all(same_bits(named[name], old[name]) for name in old)
    world.refuses(apply=(world.adapter, world.model, "-o", world.out, "--no-strict"))
    world.raises(PatchError)


def test_a_patch_that_is_cut_anywhere(world: World) -> None:
    data = world.weights.read_bytes()
    start = read_header(world.weights)[2]
    edges = {0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(data) - 1}
    cuts = sorted(edges | set(random.sample(range(len(data)), 30)))
    named = read_model(world.model)
    for cut in cuts:
        world.weights.write_bytes(data[:cut])
        with pytest.raises(PatchError, match=r"adapter_model\.safetensors: not a sound safetensors file"):
            portllm.apply(named, world.adapter)
    for cut in sorted(edges):
        world.weights.write_bytes(data[:cut])
        world.refuses(str(world.weights), "not a sound safetensors file")
    world.raises(PatchError)
    assert all(same_bits(tensor, named[name]) for name, tensor in read_model(world.model).items())
    world.weights.write_bytes(data + b"\0")
    world.refuses(str(world.weights), "not a sound safetensors file")


@pytest.mark.parametrize("scale", ["abc", "", "nan", "inf", "-Infinity", "1e999", "0.5x", "@"])
def test_a_weight_that_is_no_number(world: World, scale: str) -> None:
    arguments = (f"{world.adapter}@{scale}", world.model, "-o", world.out)
    world.refuses(f"{world.adapter}@{scale}", "after @ is not a finite number", "PATCH@0.7", apply=arguments)


def test_a_weight_without_a_patch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.adapter)
    world.refuses("@0.5: no such patch", apply=("@0.5", world.model, "-o", world.out))


@pytest.mark.parametrize("scale", [NAN, INF, -INF])
def test_a_scale_that_is_not_finite(world: World, scale: float) -> None:
    named, patch = read_model(world.model), Patch.load(world.adapter)
    for patches, outer in ((patch, scale), ([(patch, scale)], 1.0)):
        with pytest.raises(PlanError, match="finite"):
            portllm.apply(named, patches, outer)
    assert all(torch.isfinite(tensor).all() for tensor in named.values())


def test_patch_and_model_swapped(world: World) -> None:
    world.refuses(str(world.model), "no adapter_config.json", apply=(world.model, world.adapter, "-o", world.out))
    code, out, err = command("check", world.model, world.adapter)
    assert (code, out) == (2, "")
    assert "a patch is a PEFT adapter directory" in err
    # And the model's place taken by a patch.
    world.refuses(
        str(world.adapter), "holds an adapter, not a model", "PATCH and MODEL",
        apply=(world.adapter, world.adapter, "-o", world.out),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="is the order of PATCH and MODEL right"):
        apply_checkpoint(world.adapter, world.adapter, world.out)


def test_an_unknown_backend(world: World) -> None:
    world.refuses(
        "no backend 'gpu'", "torch, cpu, triton",
        apply=(world.adapter, world.model, "-o", world.out, "--backend", "gpu"),
    )  # fmt: skip
    before = snapshot(world.path)
    with pytest.raises(BackendError):
        apply_checkpoint(world.model, world.adapter, world.out, backend="gpu")
    assert snapshot(world.path) == before
    named = read_model(world.model)
    with pytest.raises(BackendError):
        portllm.apply(named, world.adapter, backend="gpu")
    assert all(same_bits(named[name], tensor) for name, tensor in read_model(world.model).items())


# -- models ----------------------------------------------------------------------------------------------------------


def indexed(change: Callable[[Any], Any]) -> Callable[[World], None]:
    return lambda world: change_json(world.model / INDEX, change)


def named_in_index(file: str) -> Callable[[World], None]:
    """The index gives this name for the first shard."""

    def change(raw: Any) -> None:
        first = min(raw["weight_map"].values())
        raw["weight_map"] = {k: file if v == first else v for k, v in raw["weight_map"].items()}

    return indexed(change)


def raw_shard(change: Callable[[dict[str, Any]], Any], cut: int | None = None) -> Callable[[World], None]:
    """Another header over the first shard's own data."""

    def spoil(world: World) -> None:
        header, _, start = read_header(world.shard)
        data = world.shard.read_bytes()[start:]
        result = change(header)
        write_raw(world.shard, header if result is None else result, data[:cut])

    return spoil


def first_entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        name = min((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        header[name].update(changes)

    return change


def overlap(header: dict[str, Any]) -> None:
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def doubled(header: dict[str, Any]) -> str:
    """One name twice, with the same place, which a JSON reader takes in silence."""
    name = next(n for n in header if n != "__metadata__")
    text = json.dumps(header)
    return f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}"


def to_bin(world: World) -> None:
    for file in world.model.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, world.model / "pytorch_model.bin")


def quantised(world: World) -> None:
    shutil.rmtree(world.model)
    named = {n: torch.randint(0, 256, (t.numel() // 2, 1), dtype=torch.uint8) for n, t in tensors().items()}
    write_model(world.model, named, config=CONFIG | {"quantization_config": {"load_in_4bit": True}})


def gptq(world: World) -> None:
    shutil.rmtree(world.model)
    named = {n.replace(".weight", ".qweight"): torch.ones(t.shape, dtype=torch.int32) for n, t in tensors().items()}
    write_model(world.model, named, config=CONFIG | {"quantization_config": {"quant_method": "gptq"}})


def of_dtype(dtype: torch.dtype) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        shutil.rmtree(world.model)
        write_model(world.model, {n: t.to(dtype) for n, t in tensors().items()})

    return spoil


SHARD, MISSING = "model-00001-of-00002.safetensors", "model-00003-of-00002.safetensors"
BAD_MODELS: dict[str, tuple[Callable[[World], Any], type[PortllmError], tuple[str, ...]]] = {
    "missing": (lambda w: shutil.rmtree(w.model), PortllmError, ("model", "no such model")),
    "empty": (lambda w: [p.unlink() for p in w.model.iterdir()], CheckpointError, ("no safetensors files",)),
    "only .bin": (to_bin, CheckpointError, (".bin only", "convert", "save_pretrained")),
    "no index": (lambda w: (w.model / INDEX).unlink(), CheckpointError, ("2 safetensors files but no index", INDEX)),
    "two indices": (
        lambda w: shutil.copy(w.model / INDEX, w.model / "x.safetensors.index.json"), CheckpointError,
        ("several indices", INDEX, "keep one")),
    "a shard is missing": (lambda w: w.shard.unlink(), CheckpointError, (INDEX, SHARD, "missing", "download")),
    "a shard is a directory": (
        lambda w: [w.shard.unlink(), w.shard.mkdir()], CheckpointError, (INDEX, SHARD, "missing")),
    "a link to nowhere": (
        lambda w: [w.shard.unlink(), w.shard.symlink_to("nowhere")], CheckpointError, (INDEX, SHARD, "missing")),
    "a tensor is missing": (
        indexed(lambda raw: raw["weight_map"].update({"not.there": SHARD})), CheckpointError,
        (INDEX, "not.there", SHARD)),
    "a tensor is in another shard": (
        indexed(lambda raw: raw["weight_map"].update({f"{MODULES[0]}.weight": "model-00002-of-00002.safetensors"})),
        CheckpointError, (INDEX, f"{MODULES[0]}.weight", "model-00002-of-00002.safetensors")),
    "a tensor is not in the index": (
        indexed(lambda raw: raw["weight_map"].pop(f"{MODULES[0]}.weight") and None), CheckpointError,
        (SHARD, f"{MODULES[0]}.weight", "mend the index")),
    "a shard is not in the index": (
        indexed(lambda raw: raw.update(weight_map={k: v for k, v in raw["weight_map"].items() if v != SHARD})),
        PlanError, (MODULES[0],)),
    "the index is not JSON": (lambda w: (w.model / INDEX).write_text("{'a': 1}"), CheckpointError, (INDEX, "as JSON")),
    "the index is cut": (
        lambda w: (w.model / INDEX).write_bytes((w.model / INDEX).read_bytes()[:-9]), CheckpointError, (INDEX, "JSON")),
    "the index is binary": (lambda w: (w.model / INDEX).write_bytes(b"\xff\x00"), CheckpointError, (INDEX, "JSON")),
    "the index is too deep": (lambda w: (w.model / INDEX).write_text("[" * 10**5), CheckpointError, (INDEX, "JSON")),
    "the index is a list": (indexed(lambda raw: [raw]), CheckpointError, (INDEX, "a list")),
    "no weight_map": (indexed(lambda raw: raw.pop("weight_map") and None), CheckpointError, (INDEX, "weight_map")),
    "weight_map is a list": (
        indexed(lambda raw: raw.update(weight_map=[SHARD])), CheckpointError, (INDEX, "weight_map")),
    "weight_map is empty": (indexed(lambda raw: raw.update(weight_map={})), CheckpointError, (INDEX, "weight_map")),
    "weight_map holds numbers": (
        indexed(lambda raw: raw["weight_map"].update(x=1)), CheckpointError, (INDEX, "weight_map", "file names")),
    "weight_map holds null": (indexed(lambda raw: raw["weight_map"].update(x=None)), CheckpointError, (INDEX,)),
    "metadata is a number": (indexed(lambda raw: raw.update(metadata=5)), CheckpointError, (INDEX, "metadata is 5")),
    "metadata is text": (
        indexed(lambda raw: raw.update(metadata="total_size")), CheckpointError, (INDEX, "metadata", "object")),
    "a name that climbs out": (
        both(lambda w: shutil.copy(w.shard, w.path), named_in_index(f"../{SHARD}")), CheckpointError,
        (INDEX, f"../{SHARD}", "own directory")),
    "an absolute name": (
        lambda w: named_in_index(str(w.shard))(w), CheckpointError, (INDEX, SHARD, "own directory")),
    "a name with a backslash": (
        named_in_index("..\\x.safetensors"), CheckpointError, (INDEX, "x.safetensors", "own directory")),
    "a name in a subfolder": (
        both(lambda w: [(w.model / "sub").mkdir(), shutil.copy(w.shard, w.model / "sub")],
             named_in_index(f"sub/{SHARD}")), CheckpointError, (INDEX, "sub/", "own directory")),
    "a name that is a dot": (named_in_index("."), CheckpointError, (INDEX, "'.'")),
    "a name that is two dots": (named_in_index(".."), CheckpointError, (INDEX, "'..'")),
    "an empty name": (named_in_index(""), CheckpointError, (INDEX, "''")),
    "a name with a null": (named_in_index("a\0.safetensors"), CheckpointError, (INDEX, "missing")),
    "a name that is too long": (named_in_index("a" * 5000 + ".safetensors"), CheckpointError, (INDEX, "missing")),
    "a name of another format": (
        both(lambda w: w.shard.rename(w.model / "x.bin"), named_in_index("x.bin")), CheckpointError, (INDEX, "x.bin")),
    "config.json is not JSON": (
        lambda w: (w.model / "config.json").write_text("?"), CheckpointError, ("config.json", "as JSON")),
    "config.json is a list": (
        lambda w: (w.model / "config.json").write_text("[]"), CheckpointError, ("config.json", "a list")),
    "config.json says 5": (
        lambda w: (w.model / "config.json").write_text('{"architectures": 5}'), CheckpointError,
        ("config.json", "architectures is 5")),
    "config.json says {}": (
        lambda w: (w.model / "config.json").write_text('{"model_type": {}}'), CheckpointError,
        ("config.json", "model_type is {}")),
    "config.json says no": (
        lambda w: (w.model / "config.json").write_text('{"tie_word_embeddings": "no"}'), CheckpointError,
        ("config.json", "tie_word_embeddings is 'no'")),
    "a shard is empty": (lambda w: w.shard.write_bytes(b""), CheckpointError, (SHARD, "sound", "download it again")),
    "a shard is a pointer of git lfs": (
        lambda w: w.shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 5\n"),
        CheckpointError, (SHARD, "not a sound safetensors file")),
    "a header of endless length": (
        lambda w: w.shard.write_bytes(struct.pack("<Q", 2**63) + w.shard.read_bytes()[8:]), CheckpointError, (SHARD,)),
    "a header longer than the file": (
        lambda w: w.shard.write_bytes(struct.pack("<Q", 90_000) + w.shard.read_bytes()[8:]), CheckpointError, (SHARD,)),
    "a header of length 0": (
        lambda w: w.shard.write_bytes(struct.pack("<Q", 0) + w.shard.read_bytes()[8:]), CheckpointError, (SHARD,)),
    "a header that is no JSON": (raw_shard(lambda h: "{" + "x" * 50 + "}"), CheckpointError, (SHARD, "sound")),
    "a header that is no UTF-8": (raw_shard(lambda h: b'{"\xff\xfe": 1}'), CheckpointError, (SHARD, "sound")),
    "a header that is a list": (raw_shard(lambda h: [h]), CheckpointError, (SHARD, "sound")),
    "a header that is too deep": (raw_shard(lambda h: '{"a":' + "[" * 10**5), CheckpointError, (SHARD, "sound")),
    "a name twice": (raw_shard(doubled), CheckpointError, (SHARD, "twice")),
    "offsets that overlap": (raw_shard(overlap), CheckpointError, (SHARD, "sound")),
    "offsets beyond the end": (
        raw_shard(first_entry(data_offsets=[0, 10**9], shape=[10**9 // 2])), CheckpointError, (SHARD, "sound")),
    "offsets backwards": (raw_shard(first_entry(data_offsets=[64, 0])), CheckpointError, (SHARD, "sound")),
    "offsets below zero": (raw_shard(first_entry(data_offsets=[-8, 0])), CheckpointError, (SHARD, "sound")),
    "three offsets": (raw_shard(first_entry(data_offsets=[0, 1, 2])), CheckpointError, (SHARD, "sound")),
    "a shape of another size": (raw_shard(first_entry(shape=[2, 2])), CheckpointError, (SHARD, "sound")),
    "a shape below zero": (raw_shard(first_entry(shape=[-1, 2])), CheckpointError, (SHARD, "sound")),
    "a shape that overflows": (raw_shard(first_entry(shape=[2**40, 2**40])), CheckpointError, (SHARD, "sound")),
    "a shape of fractions": (raw_shard(first_entry(shape=[1.5])), CheckpointError, (SHARD, "sound")),
    "a dtype that does not exist": (raw_shard(first_entry(dtype="BF17")), CheckpointError, (SHARD, "sound")),
    "a dtype of another size": (raw_shard(first_entry(dtype="F64")), CheckpointError, (SHARD, "sound")),
    "metadata that is not text": (
        raw_shard(lambda h: h.update(__metadata__={"a": 1})), CheckpointError, (SHARD, "sound")),
    "bytes too many": (lambda w: w.shard.write_bytes(w.shard.read_bytes() + b"\0"), CheckpointError, (SHARD, "sound")),
    "4-bit": (quantised, PlanError, (f"{MODULES[0]}.weight", "uint8", "quantised", "16-bit")),
    "GPTQ": (gptq, PlanError, (MODULES[0], "is quantised", "16-bit")),
    "fp8": (of_dtype(torch.float8_e4m3fn), PlanError, (f"{MODULES[0]}.weight", "float8_e4m3fn", "16-bit")),
    "integers": (of_dtype(torch.int32), PlanError, (f"{MODULES[0]}.weight", "int32")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(world: World, case: str) -> None:
    spoil, kind, words = BAD_MODELS[case]
    spoil(world)
    world.refuses(*words)
    world.raises(kind)
    for name in ("check", "stamp"):
        before = snapshot(world.path)
        code, out, err = command(name, world.adapter, world.model)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert snapshot(world.path) == before


def test_a_shard_that_is_cut_anywhere(world: World) -> None:
    data = world.shard.read_bytes()
    start = read_header(world.shard)[2]
    edges = {0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(data) - 1}
    for cut in sorted(edges | set(random.sample(range(len(data)), 15))):
        world.shard.write_bytes(data[:cut])
        world.refuses(str(world.shard), "not a sound safetensors file", "download it again")
    world.raises(CheckpointError)


@pytest.mark.parametrize("name", ["weights.bin", "model.pt", "x.gguf", "config.json", "README.md"])
def test_a_model_that_is_a_file_of_another_kind(world: World, name: str) -> None:
    file = world.path / name
    file.write_bytes(b"PK\x03\x04 whatever it is, it is no safetensors file")
    fix = "convert" if name.rpartition(".")[2] in ("bin", "pt", "gguf") else "download"
    world.refuses(str(file), "not a sound safetensors file", fix, apply=(world.adapter, file, "-o", world.out))
    with pytest.raises(CheckpointError):
        apply_checkpoint(file, world.adapter, world.out)


@pytest.mark.parametrize("which", [0, 1])
def test_names_that_no_file_can_have(world: World, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("n" * 300, "d/" * 3000, "", "a b", "~", "..."):
        arguments: list[Any] = [world.adapter, world.model, "-o", world.out]
        arguments[which] = name
        if name:  # "" is the working directory
            world.refuses("no such", ("patch", "model")[which], apply=tuple(arguments))


# -- the disk --------------------------------------------------------------------------------------------------------


class Failing:
    """Stands in for a function, and fails or is interrupted at its n-th call."""

    def __init__(self, original: Callable[..., Any], at: int, error: BaseException) -> None:
        self.original, self.at, self.error, self.calls = original, at, error, 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.original(*arguments, **keywords)

    def __get__(self, instance: Any, owner: Any) -> Any:  # as a method
        return lambda *arguments, **keywords: self(instance, *arguments, **keywords)


def full(code: int = errno.ENOSPC, path: Path = Path("somewhere")) -> OSError:
    return OSError(code, os.strerror(code), str(path))


CALLS: dict[str, tuple[Any, str]] = {
    "os.pwrite": (os, "pwrite"),
    "os.copy_file_range": (os, "copy_file_range"),
    "os.preadv": (os, "preadv"),
    "os.fsync": (os, "fsync"),
    "shutil.copyfile": (shutil, "copyfile"),
    "shutil.disk_usage": (shutil, "disk_usage"),
    "Path.mkdir": (Path, "mkdir"),
    "Path.rename": (Path, "rename"),
    "Path.write_text": (Path, "write_text"),
    "execute": (copying, "execute"),
}
ENVIRONMENT = [
    ("os.pwrite", errno.ENOSPC, "free some space"),
    ("os.pwrite", errno.EIO, "Input/output error"),
    ("os.pwrite", errno.EDQUOT, "quota"),
    ("os.copy_file_range", errno.ENOSPC, "free some space"),
    ("os.copy_file_range", errno.EIO, "Input/output error"),
    ("os.preadv", errno.EIO, "Input/output error"),
    ("os.fsync", errno.EIO, "Input/output error"),
    ("shutil.copyfile", errno.ENOSPC, "free some space"),
    ("Path.mkdir", errno.EROFS, "write elsewhere"),
    ("Path.mkdir", errno.EACCES, "choose an output that may be written"),
    ("Path.mkdir", errno.ENOSPC, "free some space"),
    ("Path.rename", errno.EACCES, "choose an output that may be written"),
    ("Path.write_text", errno.ENOSPC, "free some space"),
    ("shutil.disk_usage", errno.EACCES, "choose an output"),
]


def lively(world: World) -> tuple[Any, ...]:
    """A run in which every call happens: copied and patched tensors, side files in a subfolder, a new index."""
    (world.model / "sub").mkdir()
    (world.model / "sub/notes.txt").write_text("hello")
    (world.model / "tokenizer.json").write_text("{}")
    named = factors() | {"base_model.model.model.embed_tokens.weight": torch.randn(VOCAB + 1, IN)}
    named |= {"base_model.model.lm_head.weight": torch.randn(VOCAB + 1, IN)}
    write_adapter(world.adapter, named)
    return world.adapter, world.model, "-o", world.out, "--resize-vocab"


@pytest.mark.parametrize("name, code, words", ENVIRONMENT)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "overwrite"])
def test_a_disk_that_fails_at_any_moment(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, code: int, words: str, exists: bool
) -> None:
    """Each call in turn fails: full, read-only, broken. The old output stays, and no temporary does."""
    home, attribute = CALLS[name]
    arguments = lively(world)
    if exists:
        write_model(world.out, shards=3)
        arguments += ("--overwrite",)
    before = snapshot(world.path)
    original = getattr(home, attribute)
    for at in range(1, 100):
        failing = Failing(original, at, full(code, world.path))
        monkeypatch.setattr(home, attribute, failing)
        result = command("apply", *arguments, "-q")
        monkeypatch.setattr(home, attribute, original)
        if failing.calls < at or has_its_name(world, name, before):
            break  # what comes after the rename has tests of its own
        assert result[0] == 2, result
        assert words in result[2]
        assert str(world.path) in result[2]
        assert result[2].count("\n") == 1
        assert snapshot(world.path) == before
    assert at > 1
    assert_whole(world)


def has_its_name(world: World, name: str, before: Mapping[str, Any]) -> bool:
    """Whether the new output is there already: only its parent's fsync comes after the rename."""
    return name == "os.fsync" and (world.out / "sub").exists() and "out/sub" not in before


def assert_whole(world: World) -> None:
    """The output is complete, right, and alone."""
    assert {p.name for p in world.path.iterdir()} == {"model", "adapter", "out"}
    assert snapshot(world.out).keys() == snapshot(world.model).keys()
    index = json.loads((world.out / INDEX).read_text())
    found = read_model(world.out)
    assert index["weight_map"].keys() == found.keys()
    assert len(found["lm_head.weight"]) == VOCAB + 1
    named = read_model(world.model)
    lora = {k: v for k, v in load_file(world.weights).items() if ".lora_" in k}
    portllm.apply(named, Patch.from_tensors(lora, ADAPTER))
    assert all(same_bits(found[f"{module}.weight"], named[f"{module}.weight"]) for module in MODULES)


@pytest.mark.parametrize(
    "name, code",
    [
        ("Path.mkdir", errno.ENOSPC),
        ("os.pwrite", errno.ENOSPC),
        ("os.fsync", errno.EIO),
        ("shutil.copyfile", errno.EACCES),
    ],
)
def test_a_failing_disk_is_a_checkpoint_error_at_any_moment(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    lively(world)
    home, attribute = CALLS[name]
    original = getattr(home, attribute)
    kinds = set()
    for at in range(1, 100):
        failing = Failing(original, at, full(code))
        monkeypatch.setattr(home, attribute, failing)
        try:
            apply_checkpoint(world.model, world.adapter, world.out, resize=True)
        except (PortllmError, OSError) as error:
            kinds.add(type(error))
        monkeypatch.setattr(home, attribute, original)
        shutil.rmtree(world.out, ignore_errors=True)
        if failing.calls < at:
            break
    assert kinds == {CheckpointError}


def test_a_disk_that_is_too_small(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    need = sum(file.stat().st_size for file in world.model.glob("*.safetensors"))
    usage = shutil.disk_usage(world.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    world.refuses(str(world.path), "GB needed", "free", "write elsewhere")
    world.raises(CheckpointError)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    assert command("apply", world.adapter, world.model, "-o", world.out, "-q")[0] == 0
    shutil.rmtree(world.out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need + 10))
    world.refuses("GB needed", apply=(world.adapter, world.model, "-o", world.out, "--dtype", "float64"))


def test_a_disk_that_is_really_full(world: World) -> None:
    """A limit on the size of files stands in for the end of the disk: the kernel itself refuses to write on."""
    before = snapshot(world.path)
    size = max(file.stat().st_size for file in world.model.glob("*.safetensors"))
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2},) * 2)\n"
        "from portllm.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["apply", str(world.adapter), str(world.model), "-o", str(world.out), "-q"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "File too large" in done.stderr
    assert str(world.path) in done.stderr
    assert done.stderr.count("\n") == 1
    assert snapshot(world.path) == before


def test_a_model_that_shrinks_while_it_is_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("preadv", "copy_file_range"):
        before = snapshot(world.path)
        monkeypatch.setattr(os, name, lambda *arguments: 0)
        world.refuses("ends before the tensor does", before=before)
        monkeypatch.undo()


def test_a_parent_that_is_a_file(world: World) -> None:
    (world.path / "file").write_text("x")
    for out in ("file/out", "file/deep/out"):
        world.refuses(str(world.path / "file"), apply=(world.adapter, world.model, "-o", world.path / out))
        with pytest.raises(CheckpointError):
            apply_checkpoint(world.model, world.adapter, world.path / out)


def test_an_output_with_a_name_that_is_too_long(world: World) -> None:
    name = "n" * 300
    world.refuses("too long", apply=(world.adapter, world.model, "-o", world.path / name))
    before = snapshot(world.path)
    with pytest.raises(CheckpointError):
        apply_checkpoint(world.model, world.adapter, world.path / name)
    assert snapshot(world.path) == before


def test_an_output_with_the_longest_name(world: World) -> None:
    """What the temporary's name adds must not make it too long."""
    apply_checkpoint(world.model, world.adapter, world.path / ("n" * 255))
    assert len(list((world.path / ("n" * 255)).glob("*.safetensors"))) == len(list(world.model.glob("*.safetensors")))


def test_an_output_that_exists_or_lies_in_the_model(world: World) -> None:
    world.out.mkdir()
    world.refuses(str(world.out), "exists already", "--overwrite")
    for out in (world.model, world.model / "new", world.model / "a/b"):
        for more in ((), ("--overwrite",)):
            arguments = (world.adapter, world.model, "-o", out, *more)
            world.refuses(str(out), "the input", "write elsewhere", apply=arguments)


def test_no_parents_are_left_behind(world: World) -> None:
    world.shard.unlink()
    world.refuses(apply=(world.adapter, world.model, "-o", world.path / "a/b/out"))


def test_no_parents_are_left_behind_by_a_full_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", Failing(os.pwrite, 2, full()))
    world.refuses(apply=(world.adapter, world.model, "-o", world.path / "a/b/out"))


# -- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "overwrite"])
def test_an_interrupt_at_any_moment(world: World, monkeypatch: pytest.MonkeyPatch, name: str, exists: bool) -> None:
    home, attribute = CALLS[name]
    arguments = lively(world)
    if exists:
        write_model(world.out, shards=3)
        arguments += ("--overwrite",)
    before = snapshot(world.path)
    original = getattr(home, attribute)
    for at in range(1, 100):
        failing = Failing(original, at, KeyboardInterrupt())
        monkeypatch.setattr(home, attribute, failing)
        result = command("apply", *arguments, "-q")
        monkeypatch.setattr(home, attribute, original)
        if failing.calls < at or has_its_name(world, name, before):
            break  # what comes after the rename has tests of its own
        assert result == (130, "", "portllm: interrupted; nothing was written\n")
        assert snapshot(world.path) == before
    assert at > 1
    assert_whole(world)


@pytest.mark.parametrize("error", [None, full(errno.EIO)], ids=["interrupt", "EIO"])
def test_after_the_rename_it_is_done(world: World, monkeypatch: pytest.MonkeyPatch, error: OSError | None) -> None:
    """What is said is true: done, and the output is there; or an error, and it is not."""
    arguments = lively(world)
    fsync, renamed = os.fsync, []

    def fail_after_rename(descriptor: int) -> None:
        if world.out.exists():
            renamed.append(True)
            if error is not None:
                raise error
            signal.raise_signal(signal.SIGINT)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_after_rename)
    before = snapshot(world.path)
    code, _, _ = command("apply", *arguments, "-q")
    assert renamed
    if code:
        assert snapshot(world.path) == before
    else:
        assert_whole(world)


def test_an_interrupt_while_the_old_output_is_deleted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*lively(world), "--overwrite")
    write_model(world.out, shards=3)
    rmtree, interrupted = shutil.rmtree, []

    def interrupt(path: Any, *rest: Any, **options: Any) -> None:
        if not interrupted and world.out.exists():
            interrupted.append(path)
            signal.raise_signal(signal.SIGINT)
        rmtree(path, *rest, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupt)
    command("apply", *arguments, "-q")
    assert interrupted
    assert_whole(world)


@contextlib.contextmanager
def interrupt_after(delay: float) -> Iterator[dict[str, bool]]:
    """A real SIGINT, from a thread, ``delay`` seconds from now; it interrupts only while the state is "inside"."""
    state = {"inside": False, "arrived": False, "raised": False}

    def handler(number: int, frame: Any) -> None:
        state["arrived"] = True
        if state["inside"]:
            state["raised"] = True
            raise KeyboardInterrupt

    def send() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGINT, handler)
    # What the garbage collector calls back (hypothesis has something there) would swallow it.
    callbacks = gc.callbacks[:]
    gc.callbacks.clear()
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield state
    finally:
        gc.callbacks[:] = callbacks
        state["inside"] = False
        thread.join()
        for _ in range(100):  # after the rename it is dropped, and never arrives
            if state["arrived"]:
                break
            time.sleep(0.001)
        signal.signal(signal.SIGINT, previous)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tqdm's, if it was half made
def test_real_interrupts_of_the_command(world: World) -> None:
    """SIGINT at random moments: the output is whole or absent, and nothing else has changed."""
    if sys.gettrace() is not None and sys.version_info < (3, 12):
        pytest.skip("CPython 3.11 spins for ever in a traced thread while a signal waits for the main thread")
    arguments = ("apply", *lively(world), "-q")
    before = snapshot(world.path)
    start = time.perf_counter()
    assert command(*arguments)[0] == 0
    took = time.perf_counter() - start
    whole = snapshot(world.path)
    codes = []
    for _ in range(60):
        shutil.rmtree(world.out, ignore_errors=True)
        with interrupt_after(random.uniform(0, 1.2 * took)) as state:
            code: int | None = None
            try:
                state["inside"] = True
                code = command(*arguments)[0]
                state["inside"] = False
            except KeyboardInterrupt:  # in the moments before and after the command's own
                state["inside"] = False
        assert snapshot(world.path) in (before, whole)
        assert code in (0, 130, None)
        if code == 0:
            assert snapshot(world.path) == whole
        codes.append(code)
    gc.collect()
    assert 130 in codes


class Live(nn.Module):
    """Enough work that an interrupt hits the middle of it: plain, DoRA and replaced weights, of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a_proj, self.b_proj = nn.Linear(200, 300), nn.Linear(300, 200)
        self.norm = nn.LayerNorm(300)
        self.blocks = nn.ModuleList(nn.Linear(100, 100) for _ in range(20))


def live_patches() -> list[Patch]:
    plain = {}
    for name, out, inner in [("a_proj", 300, 200), *((f"blocks.{i}", 100, 100) for i in range(20))]:
        plain |= factors([name], out, inner)
    plain["base_model.model.norm.weight"] = torch.randn(300)
    dora = factors(["b_proj"], 200, 300) | {"base_model.model.b_proj.lora_magnitude_vector": torch.rand(200) + 1}
    base = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    return [
        Patch.from_tensors(plain, base | {"target_modules": r"a_proj|blocks\.\d+", "modules_to_save": ["norm"]}),
        Patch.from_tensors(dora, base | {"target_modules": ["b_proj"], "use_dora": True}),
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it may strike in a finalizer
def test_real_interrupts_of_a_live_model() -> None:
    """SIGINT at random moments: wholly as before, or wholly patched."""
    model, patches = Live(), live_patches()
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = time.perf_counter()
    portllm.apply(model, patches)
    took = time.perf_counter() - start
    new = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert len(changed) == 23
    seen = set()
    for _ in range(150):
        model.load_state_dict(old)
        with interrupt_after(random.uniform(0, 1.2 * took)) as state:
            try:
                state["inside"] = True
                portllm.apply(model, patches)
                state["inside"] = False
            except KeyboardInterrupt:
                state["inside"] = False
        patched = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, new[name])}
        as_before = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, old[name])}
        assert patched == set(new) or as_before == set(old)
        seen.add((bool(patched >= set(changed)), state["raised"]))
    assert (False, True) in seen or (True, True) in seen


@pytest.mark.parametrize("at", range(1, 5))
def test_an_interrupt_between_the_writes_waits_for_the_last(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The signal comes exactly between two writes: the apply is finished, then KeyboardInterrupt is raised."""
    from portllm import execute

    model, patches = Live(), live_patches()
    reference = copy.deepcopy(model)
    portllm.apply(reference, patches)
    calls = []

    def signalled(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.append(original)
            if len(calls) == at:
                signal.raise_signal(signal.SIGINT)
            result = original(*arguments, **keywords)
            if len(calls) == at - 1 == 3:
                signal.raise_signal(signal.SIGINT)
            return result

        return call

    monkeypatch.setattr(execute, "assign_", signalled(execute.assign_))
    monkeypatch.setattr(execute, "dora_", signalled(execute.dora_))
    monkeypatch.setattr(execute.ops.Prepared, "__call__", signalled(execute.ops.Prepared.__call__))
    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        portllm.apply(model, patches)
    assert len(calls) == 3
    assert signal.getsignal(signal.SIGINT) is previous
    expected = reference.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_interrupts_elsewhere_than_in_the_main_thread() -> None:
    """A thread cannot hold signals back, and need not: they strike the main thread only."""
    model, patches = Live(), live_patches()
    reference = copy.deepcopy(model)
    portllm.apply(reference, patches)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            portllm.apply(model, patches)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert all(torch.equal(tensor, reference.state_dict()[name]) for name, tensor in model.state_dict().items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(VOCAB, IN), nn.Linear(IN, VOCAB, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def test_a_backend_that_is_missing_leaves_ties_alone() -> None:
    model = Tied()
    patch = Patch.from_tensors(factors(["lm_head"], VOCAB), ADAPTER | {"target_modules": ["lm_head"]})
    old = model.embed_tokens.weight.detach().clone()
    with pytest.raises(BackendError):
        portllm.apply(model, patch, tied="untie", backend="nonsense")
    assert torch.equal(model.embed_tokens.weight, old)
    assert model.lm_head.weight is model.embed_tokens.weight


# -- the patch's own file --------------------------------------------------------------------------------------------


def test_stamping_on_a_full_disk_keeps_the_patch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(self: Path, text: str, *rest: Any, **options: Any) -> int:
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        raise full()

    before = snapshot(world.path)
    monkeypatch.setattr(Path, "write_text", write_half)
    code, out, err = command("stamp", world.adapter, world.model)
    assert (code, out) == (2, "")
    assert "No space left" in err
    assert snapshot(world.path) == before


def test_stamping_where_the_tensors_cannot_be_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def fail(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    before = snapshot(world.path)
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    code, out, err = command("stamp", world.adapter, world.model)
    assert (code, out) == (2, "")
    assert "No space left" in err
    assert snapshot(world.path) == before


def test_stamping_into_a_file(world: World) -> None:
    (world.path / "file").write_text("x")
    before = snapshot(world.path)
    for out in ("file", "file/deep"):
        code, stdout, err = command("stamp", world.adapter, world.model, "-o", world.path / out)
        assert (code, stdout) == (2, "")
        assert str(world.path / "file") in err
        assert err.count("\n") == 1
        assert snapshot(world.path) == before


# -- fuzzing ---------------------------------------------------------------------------------------------------------


class Arena:
    """A model and a patch of which one file is changed again and again."""

    def __init__(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        self.world = World(path)
        self.pristine = snapshot(path)

    def play(self, file: Path, content: bytes, *more: str) -> int:
        """Put the content there, run commands, see that they behave; the exit code of apply."""
        world = self.world
        old = file.read_bytes()
        file.write_bytes(content)
        before = snapshot(world.path)
        try:
            codes = []
            for arguments in (
                ("inspect", world.adapter), ("check", world.adapter, world.model),
                ("apply", world.adapter, world.model, "-o", world.out, "-q", *more),
            ):  # fmt: skip
                code, out, err = command(*arguments)
                assert code in (0, 2)
                if code == 2:
                    assert out == ""
                    assert err.startswith("portllm: ")
                    assert err.count("\n") == 1
                    assert snapshot(world.path) == before
                codes.append(code)
            if codes[-1] == 0:
                assert codes == [0, 0, 0] or more
                assert snapshot(world.out).keys() == snapshot(world.model).keys()
            return codes[-1]
        finally:
            shutil.rmtree(world.out, ignore_errors=True)
            file.write_bytes(old)
            assert snapshot(world.path) == self.pristine


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    return Arena(tmp_path_factory.mktemp("arena") / "world")


KNOWN_SETTINGS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora",
    "lora_bias", "bias", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "target_parameters", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
    "base_model_name_or_path", "revision", "peft_version", "init_lora_weights", "layer_replication", "megatron_config",
    "use_qalora", "auto_mapping", "inference_mode",
)  # fmt: skip
WORDS = (
    "", "q_proj", "v_proj", "LORA", "IA3", "none", "all", "lora_only", "all-linear", "ALL-LINEAR", ".*", "(", "[", "\\",
    "*", "layers", "(layers)", "model.layers.0.self_attn.q_proj", "embed_tokens", "lm_head", "(a|b)*", "é\n\ud800",
    "pissa", "gaussian", "false", "../..", "norm", "x" * 300, "(?P<q>q)_proj", "a{2", "^q_proj$",
)  # fmt: skip
_scalars = (
    st.sampled_from((None, True, False, 0, 1, -1, 4, 8, 2**31, 2**63, 0.0, 0.5, -2.5, 1e30, NAN, INF))
    | st.sampled_from(WORDS)
    | st.text(max_size=6)
)
_values = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@fuzz
@given(changes=st.dictionaries(st.sampled_from(KNOWN_SETTINGS), _values, min_size=1, max_size=3))
@example(changes={"layers_pattern": "(layers)", "layers_to_transform": [0, 1]})
@example(changes={"trainable_token_indices": {"embed_tokens": [0]}})
@example(changes={"layers_to_transform": True})
def test_fuzzed_settings(arena: Arena, changes: dict[str, Any]) -> None:
    arena.play(arena.world.adapter / "adapter_config.json", json.dumps(ADAPTER | changes).encode())


@fuzz
@given(data=st.data())
def test_fuzzed_bytes_of_settings(arena: Arena, data: st.DataObject) -> None:
    arena.play(arena.world.adapter / "adapter_config.json", mutate(data, json.dumps(ADAPTER).encode()))


def mutate(data: st.DataObject, content: bytes, upto: int | None = None) -> bytes:
    """Flip, cut out or double a few bytes among the first ``upto``."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        limit = min(len(changed), len(content) if upto is None else upto)
        at = data.draw(st.integers(0, max(limit - 1, 0)))
        kind = data.draw(st.sampled_from(("flip", "set", "delete", "double")))
        if kind == "flip":
            changed[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            changed[at] = data.draw(st.sampled_from(b'0159-{}[]",:eE. \x00\xff\\'))
        else:
            stop = at + data.draw(st.integers(1, 20))
            changed[at:stop] = b"" if kind == "delete" else changed[at:stop] * 2
    return bytes(changed)


@fuzz
@given(data=st.data())
def test_fuzzed_bytes_of_headers(arena: Arena, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from((arena.world.weights, arena.world.shard)))
    arena.play(file, mutate(data, file.read_bytes(), read_header(file)[2]), "--no-strict")


HEADER_CHANGES = ("dtype", "shape", "reshape", "offsets", "rename", "drop", "swap", "metadata")
KINDS = ("F64", "F32", "F16", "BF16", "I16", "U8", "BOOL", "F8_E5M2", "C64", "F4", "?")
KEYS = (
    "", "x", "__metadata__", f"{MODULES[0]}.weight", f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.bias",
    f"{FIRST}.lora_magnitude_vector", f"{FIRST}.lora_embedding_A", f"{EMBED}.lora_embedding_B",
    "base_model.model.lm_head.weight", "lora_A.weight", f"{FIRST}.base_layer.lora_A.weight", f"{FIRST}.lora_A",
    f"{FIRST}.modules_to_save.default.weight",
)  # fmt: skip


@fuzz
@given(data=st.data())
def test_fuzzed_entries_of_headers(arena: Arena, data: st.DataObject) -> None:
    """Headers that are sound JSON, and mostly sound files, but say something else."""
    file = data.draw(st.sampled_from((arena.world.weights, arena.world.shard)))
    header, _, start = read_header(file)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names))
        info = header.get(name, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
        kind = data.draw(st.sampled_from(HEADER_CHANGES))
        if kind == "dtype":
            info["dtype"] = data.draw(st.sampled_from(KINDS))
        elif kind == "shape":
            info["shape"] = data.draw(st.lists(st.sampled_from((0, 1, 2, 4, IN, OUT, 2**40, -1)), max_size=4))
        elif kind == "reshape":
            shape, total = info["shape"], math.prod(info["shape"])
            same = [total], [1, total], [total, 1], [2, total // 2], shape[::-1], [*shape, 1], [1, *shape]
            info["shape"] = data.draw(st.sampled_from(same))
        elif kind == "offsets":
            info["data_offsets"] = data.draw(st.lists(st.sampled_from((0, 4, 64, 256, 2**40, -1, 0.5)), max_size=3))
        elif kind == "rename":
            header[data.draw(st.sampled_from(KEYS))] = header.pop(name, info)
        elif kind == "drop":
            header.pop(name, None)
        elif kind == "swap":
            other = data.draw(st.sampled_from(names))
            if name in header and other in header:
                header[name], header[other] = header[other], header[name]
        else:
            odd = {}, {"portllm.base": "{"}, {"a": "\ud800"}, {"a": 1}, None, 5
            header["__metadata__"] = data.draw(st.sampled_from(odd))
    scratch = write_raw(arena.world.path / "scratch", header, file.read_bytes()[start:])
    content = scratch.read_bytes()
    scratch.unlink()
    arena.play(file, content, "--no-strict")


@fuzz
@given(data=st.data())
def test_fuzzed_index(arena: Arena, data: st.DataObject) -> None:
    index = arena.world.model / INDEX
    raw = json.loads(index.read_text())
    names = [*raw["weight_map"], "x", ""]
    files = SHARD, SHARD.replace("1-", "2-"), f"../model/{SHARD}", "config.json", "", ".", "a\\b.safetensors", "\0"
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(("map", "drop", "value", "top", "bytes")))
        if kind == "bytes":
            arena.play(index, mutate(data, json.dumps(raw).encode()))
        elif kind == "top":
            raw[data.draw(st.sampled_from(("metadata", "weight_map", "other")))] = data.draw(_values)
        elif isinstance(raw["weight_map"], dict):
            name = data.draw(st.sampled_from(names))
            if kind == "drop":
                raw["weight_map"].pop(name, None)
            else:
                raw["weight_map"][name] = data.draw(st.sampled_from(files) if kind == "map" else _values)
    arena.play(index, json.dumps(raw).encode())


@fuzz
@given(changes=st.dictionaries(
    st.sampled_from(("architectures", "model_type", "text_config", "tie_word_embeddings", "torch_dtype", "dtype",
                     "vocab_size", "quantization_config", "x")), _values, min_size=1, max_size=3))  # fmt: skip
def test_fuzzed_config_of_the_model(arena: Arena, changes: dict[str, Any]) -> None:
    arena.play(arena.world.model / "config.json", json.dumps(CONFIG | changes).encode(), "--dtype", "float32")
