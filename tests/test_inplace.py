"""In place on disk: the bits of one merge into the pristine model, and every byte back, whatever came in between."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import portllm
from portllm import CheckpointError, Patch, PlanError, apply_checkpoint, cli, operation, ops, reference
from portllm.errors import RecordError
from portllm.files import locked
from portllm.undostore import Store

from . import tiny
from .tiny import (
    IN,
    MODULES,
    OUT,
    VOCAB,
    factors,
    read_header,
    same_bits,
    snapshot,
    tensors,
    write_adapter,
    write_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = [name for name in ("torch", "cpu") if ops.unavailable(name) is None]
EMBED = "base_model.model.model.embed_tokens"


def weights(model: Path) -> dict[str, bytes]:
    """The bytes of the safetensors files themselves."""
    return {path.name: path.read_bytes() for path in sorted(model.glob("*.safetensors"))}


def merged(model: Path, patches: Any, out: Path, **options: Any) -> dict[str, bytes]:
    """What a patched copy holds."""
    apply_checkpoint(model, patches, out, **options)
    return weights(out)


def mixed() -> dict[str, Tensor]:
    """Weights of all dtypes that can be patched."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    return {name: tensor.to(dtypes[i % 4]) for i, (name, tensor) in enumerate(tensors().items())}


def adapters(folder: Path) -> list[Path]:
    """Patches of every kind: plain, one weight only, replacing, trained tokens, DoRA, and a huge one."""
    dora = factors() | {f"base_model.model.{m}.lora_magnitude_vector": torch.rand(OUT) + 0.5 for m in MODULES}
    dora |= {f"{EMBED}.lora_embedding_A": torch.randn(4, VOCAB), f"{EMBED}.lora_embedding_B": torch.randn(IN, 4)}
    dora |= {f"{EMBED}.lora_magnitude_vector": torch.rand(IN) + 0.5}
    head = {"base_model.model.lm_head.modules_to_save.weight": torch.randn(VOCAB, IN)}
    tokens = {f"{EMBED}.token_adapter.trainable_tokens_delta": torch.randn(3, IN)}
    huge = {key: tensor * 1e18 for key, tensor in factors().items()}
    return [
        write_adapter(folder / "plain"),
        write_adapter(folder / "one", factors(MODULES[:1]), target_modules=["layers.0.self_attn.q_proj"]),
        write_adapter(folder / "replacing", factors() | head, modules_to_save=["lm_head"]),
        write_adapter(folder / "tokens", factors() | tokens, trainable_token_indices={"embed_tokens": [3, 4, 17]}),
        write_adapter(folder / "dora", dora, use_dora=True, target_modules=["q_proj", "v_proj", "embed_tokens"]),
        write_adapter(folder / "huge", huge),
    ]


def assert_nearly(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """The last bytes of numbers may differ."""
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        assert len(found[name]) == len(data)
        assert sum(a != b for a, b in zip(found[name], data, strict=True)) <= 0.4 * len(data)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("piece, block", [(1, 20), (300, 100), (1 << 20, 1 << 21)])
def test_stacks_are_one_merge_and_come_off_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, piece: int, block: int
) -> None:
    """Patches of all kinds, on and off at random: the files are always those of a copy made of the pristine model."""
    monkeypatch.setattr(operation, "PIECE_BYTES", piece)
    monkeypatch.setattr(operation, "STEP_BYTES", 2 * piece)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", block)
    model = write_model(tmp_path / "model", mixed(), shards=3)
    pristine = shutil.copytree(model, tmp_path / "pristine")
    paths = adapters(tmp_path)
    active: list[tuple[Path, float]] = []
    for turn in range(8):
        free = [path for path in paths if path not in dict(active)]
        if free and (len(active) < 2 or random.random() < 0.6):
            added = (random.choice(free), random.choice([1.0, 0.7, -2.0]))
            report = apply_checkpoint(model, *added[:1], scale=added[1], in_place=True, backend=backend)
            active.append(added)
        else:
            gone = random.choice(active)
            report = portllm.remove_from_checkpoint(model, gone[0].name)
            active.remove(gone)
        expected = merged(pristine, active, tmp_path / f"out{turn}", backend=backend) if active else weights(pristine)
        if backend == "cpu":
            assert weights(model) == expected
        else:  # how torch rounds a sum depends on how many rows it multiplies at once
            assert_nearly(weights(model), expected)
        assert report.patches == tuple(path.name for path, _ in active)
        status = portllm.checkpoint_status(model, verify=True)
        assert not status.changed
        assert [(p.name, p.strength) for p in status.patches] == [(path.name, scale) for path, scale in active]
        assert status.undo_bytes == report.undo_bytes
        assert not {path.name for path in (model / ".portllm").glob("*")} & {
            "log",
            "redo-0",
            "redo-1",
            "state.json.new",
        }
    if active:
        portllm.remove_from_checkpoint(model)
    assert snapshot(model) == snapshot(pristine)


def test_several_patches_at_once(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", mixed())
    pristine = shutil.copytree(model, tmp_path / "pristine")
    plain, one = adapters(tmp_path)[:2]
    apply_checkpoint(model, [(plain, 0.5), one], in_place=True)
    assert weights(model) == merged(pristine, [(plain, 0.5), one], tmp_path / "out")
    apply_checkpoint(model, plain, in_place=True)
    assert [p.name for p in portllm.checkpoint_status(model).patches] == ["plain", "one", "plain-2"]
    portllm.remove_from_checkpoint(model, "plain")
    assert weights(model) == merged(pristine, [one, plain], tmp_path / "other")


def test_times_come_back_too_and_the_header_stays(tmp_path: Path) -> None:
    model, adapter = write_model(tmp_path / "model", shards=3), write_adapter(tmp_path / "adapter")
    files = sorted(model.glob("*.safetensors"))
    for i, file in enumerate(files):
        os.utime(file, ns=(10**18 + i, 10**18 + 7 * i))
    before = [(file.stat().st_mtime_ns, file.stat().st_ino, read_header(file)[1]) for file in files]
    apply_checkpoint(model, adapter, in_place=True)
    touched = {Store(model).file(name).name for name in Store(model).state().files}
    for file, (mtime, inode, header) in zip(files, before, strict=True):
        assert (file.stat().st_ino, read_header(file)[1]) == (inode, header)
        assert (file.stat().st_mtime_ns != mtime) == (file.name in touched)
    portllm.remove_from_checkpoint(model)
    assert [(file.stat().st_mtime_ns, file.stat().st_ino, read_header(file)[1]) for file in files] == before


def test_what_a_stack_does_not_touch_is_not_written_again(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    plain, one = adapters(tmp_path)[:2]
    apply_checkpoint(model, plain, in_place=True)
    report = apply_checkpoint(model, one, in_place=True)
    assert report.tensors_changed == 1
    assert report.bytes_changed == 2 * OUT * IN
    assert portllm.remove_from_checkpoint(model, "one").tensors_changed == 1
    assert portllm.remove_from_checkpoint(model).tensors_changed == len(MODULES)


def test_a_single_file(tmp_path: Path) -> None:
    model, adapter = write_model(tmp_path / "model", shards=1), write_adapter(tmp_path / "adapter")
    file, before = model / "model.safetensors", snapshot(model)
    expected = merged(model, adapter, tmp_path / "out")
    apply_checkpoint(file, adapter, in_place=True)
    assert weights(model) == expected
    with pytest.raises(CheckpointError, match=r"part of .*model\.safetensors; name that"):
        apply_checkpoint(model, adapter, in_place=True)
    portllm.remove_from_checkpoint(file)
    assert snapshot(model) == before
    apply_checkpoint(model, adapter, in_place=True)
    with pytest.raises(CheckpointError, match=r"part of .*; name that instead"):
        apply_checkpoint(file, adapter, in_place=True)
    portllm.remove_from_checkpoint(model)
    assert snapshot(model) == before


def test_experts_and_parts_of_fused_weights(tmp_path: Path) -> None:
    """Only some rows, or some experts, of a tensor change: the others are not rewritten."""
    named = {
        "model.layers.0.self_attn.qkv_proj.weight": torch.randn(3 * 8, 16).to(torch.bfloat16),
        "model.layers.0.mlp.experts.down_proj": torch.randn(3, 6, 5).to(torch.bfloat16),
    }
    model = write_model(tmp_path / "model", named, shards=1, config={"architectures": ["X"], "model_type": "x"})
    pristine = shutil.copytree(model, tmp_path / "pristine")
    part = write_adapter(
        tmp_path / "part", factors(["model.layers.0.self_attn.k_proj"], 8, 16), target_modules=["k_proj"]
    )
    assert apply_checkpoint(model, part, in_place=True).bytes_changed == 2 * 8 * 16
    fused = write_adapter(
        tmp_path / "fused", factors(["model.layers.0.self_attn.qkv_proj"], 24, 16), target_modules=["qkv_proj"]
    )
    apply_checkpoint(model, fused, in_place=True)
    prefix = "base_model.model.model.layers.0.mlp.experts"
    lora = {f"{prefix}.lora_A.weight": torch.randn(6, 5), f"{prefix}.lora_B.weight": torch.randn(6, 6)}
    experts = write_adapter(
        tmp_path / "experts", lora, r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"]
    )
    apply_checkpoint(model, experts, in_place=True)
    assert weights(model) == merged(pristine, [part, fused, experts], tmp_path / "out")
    portllm.remove_from_checkpoint(model)
    assert snapshot(model) == snapshot(pristine)


def test_the_copy_beside_is_a_plain_adapter(tmp_path: Path) -> None:
    """What lies beside the checkpoint is in formats that others read."""
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    patch = Patch.load(adapter)
    apply_checkpoint(model, patch, scale=0.5, in_place=True)
    [active] = portllm.checkpoint_status(model).patches
    kept = Patch.load(model / ".portllm" / active.directory)
    assert kept.tensors.keys() == patch.tensors.keys()
    assert all(same_bits(kept.tensors[key], tensor) for key, tensor in patch.tensors.items())
    assert kept.config == patch.config
    for file in (model / ".portllm" / "records").iterdir():
        assert tiny.read_model(file)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [{"dtype": torch.float32}, {"tied": "untie"}, {"resize": True}, {"out": "x"}], ids=str
)
def test_what_changes_the_files_form_is_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be had in place; write a patched copy"):
        apply_checkpoint(model, adapter, in_place=True, **option)
    with pytest.raises(CheckpointError, match="say where to write"):
        apply_checkpoint(model, adapter)
    assert snapshot(tmp_path) == before


def test_a_larger_vocabulary_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    saved = {"base_model.model.lm_head.weight": torch.randn(VOCAB + 2, IN)}
    adapter = write_adapter(tmp_path / "adapter", factors() | saved)
    before = snapshot(tmp_path)
    with pytest.raises(PlanError, match="--resize-vocab"):
        apply_checkpoint(model, adapter, in_place=True)
    assert snapshot(tmp_path) == before


def test_files_that_are_not_alone_are_refused(tmp_path: Path) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    file = next(model.glob("*.safetensors"))
    os.link(file, tmp_path / "other")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=f"{file.name}: is one file with 2 names"):
        apply_checkpoint(model, adapter, in_place=True)
    file.unlink()
    file.symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match=f"{file.name}: is a link to .*copy the model first"):
        apply_checkpoint(model, adapter, in_place=True)
    file.unlink()
    (tmp_path / "other").rename(file)
    assert snapshot(tmp_path) == {name: data for name, data in before.items() if name != "other"}


def test_another_writer_is_refused_and_named(tmp_path: Path) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    apply_checkpoint(model, adapter, in_place=True)
    before = snapshot(model)
    with locked(model / ".portllm" / "lock"):
        for act in (
            lambda: apply_checkpoint(model, adapter, in_place=True),
            lambda: portllm.remove_from_checkpoint(model),
        ):
            with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on"):
                act()
    assert portllm.checkpoint_status(model).patches
    del before[".portllm/lock"]
    assert {name: data for name, data in snapshot(model).items() if name != ".portllm/lock"} == before


def test_nothing_to_remove(tmp_path: Path) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="no patch was applied to it in place"):
        portllm.remove_from_checkpoint(model)
    assert snapshot(model) == before
    apply_checkpoint(model, adapter, in_place=True)
    with pytest.raises(CheckpointError, match="no patch 'other' is applied, only adapter"):
        portllm.remove_from_checkpoint(model, "other")


def _change(model: Path, name: str) -> None:
    """Another tool adds one to a weight."""
    for file in model.glob("*.safetensors"):
        header, _, start = read_header(file)
        if name in header:
            data = bytearray(file.read_bytes())
            data[start + header[name]["data_offsets"][0]] ^= 1
            file.write_bytes(data)


@pytest.mark.parametrize("keep_times", [False, True])
def test_weights_that_somebody_else_changed(tmp_path: Path, keep_times: bool) -> None:
    """Refused, naming the tensor, as it was; or subtracted on request, the others exactly."""
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    pristine = tiny.read_model(model)
    apply_checkpoint(model, adapter, in_place=True)
    name = f"{MODULES[-1]}.weight"
    times = {file: file.stat().st_mtime_ns for file in model.glob("*.safetensors")}
    _change(model, name)
    if keep_times:  # then only the bytes tell, on the way
        for file, mtime in times.items():
            os.utime(file, ns=(mtime, mtime))
    before = snapshot(model)
    for act in (
        lambda: portllm.remove_from_checkpoint(model),
        lambda: apply_checkpoint(model, write_adapter(tmp_path / "second"), in_place=True),
    ):
        with pytest.raises(RecordError, match=rf"tensor {name} was changed by something else.*--subtract"):
            act()
        assert snapshot(model) == before
    assert portllm.checkpoint_status(model, verify=True).changed == (name,)
    report = portllm.remove_from_checkpoint(model, subtract=True)
    assert report.not_exact == (name,)
    found = tiny.read_model(model)
    assert all(same_bits(found[key], pristine[key]) for key in pristine if key != name)
    limit = pristine[name].float().abs().max() + 100  # of the sum, whose rounding stays
    assert (found[name].float() - pristine[name].float()).abs().max() < limit * 2**-6
    assert not (model / ".portllm").exists()


def test_a_patch_that_fits_only_the_pristine_form_is_refused_before(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    wrong = write_adapter(tmp_path / "wrong", factors(MODULES, OUT + 1))
    before = snapshot(tmp_path)
    with pytest.raises(PlanError):
        apply_checkpoint(model, wrong, in_place=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("broken", ["state", "records", "patch", "log"])
def test_broken_books_are_told_and_nothing_is_written(tmp_path: Path, broken: str) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    apply_checkpoint(model, adapter, in_place=True)
    store = model / ".portllm"
    file = {
        "state": store / "state.json",
        "records": next((store / "records").iterdir()),
        "patch": next((store / "patches").glob("*/adapter_model.safetensors")),
        "log": store / "log",
    }[broken]
    file.write_bytes(file.read_bytes()[:-20] if file.exists() else b"garbage")
    before = weights(model)
    with pytest.raises(portllm.PortllmError, match=str(file)):
        portllm.remove_from_checkpoint(model)
    assert weights(model) == before


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process; what it printed."""

    def run(*arguments: Any, code: int = 0) -> str:
        assert cli.main([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


def test_the_command(tmp_path: Path, command: Any) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    second, pristine = write_adapter(tmp_path / "second"), snapshot(model)
    assert "no patch is applied" in command("status", model)
    said = command("apply", f"{adapter}@0.5", model, "--in-place", "-q")
    assert "changed 4 tensors" in said
    assert "adapter applied" in said
    command("apply", second, model, "--in-place", "-q")
    said = command("status", model, "--verify")
    assert "all bytes are as they were left" in said
    assert "0.5" in said
    told = json.loads(command("status", model, "--json"))
    assert [(p["name"], p["strength"]) for p in told["patches"]] == [("adapter", 0.5), ("second", 1.0)]
    assert (told["pending"], told["recovered"], told["tensors"]) == (False, False, 4)
    assert "second applied" in command("remove", model, "--patch", "adapter", "-q")
    assert "no such patch" not in command("remove", model, "--patch", "adapter", code=2)
    _change(model, f"{MODULES[0]}.weight")
    assert f"changed since: {MODULES[0]}.weight" in command("status", model, "--verify", code=1)
    assert "was changed by something else" in command("remove", model, code=2)
    told = json.loads(command("remove", model, "--subtract", "--json"))
    assert told["not_exact"] == [f"{MODULES[0]}.weight"]
    assert snapshot(model).keys() == pristine.keys()
    assert "cannot be had in place" in command("apply", adapter, model, "--in-place", "-o", tmp_path / "x", code=2)


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.disk_usage("/tmp").free < 2 << 30, reason="needs 2 GB of disk")
def test_a_large_checkpoint_needs_little_memory(tmp_path: Path) -> None:
    """500 MB on and off through at most 220 MB, over what the process had after its imports."""
    rows, columns, size = 30_000, 4096, 2 * 30_000 * 4096
    entry = {"dtype": "BF16", "shape": [rows, columns]}
    names = [f"model.layers.{i}.a.weight" for i in range(2)]
    header = {name: entry | {"data_offsets": [size * i, size * (i + 1)]} for i, name in enumerate(names)}
    (tmp_path / "model").mkdir()
    file = tiny.write_raw(tmp_path / "model" / "model.safetensors", header)
    noise = torch.randn(rows, columns).to(torch.bfloat16).view(torch.uint8).numpy()
    with open(file, "ab") as out:
        for _ in names:
            out.write(noise)
    before = hashlib.sha256(file.read_bytes()).digest()
    modules = [f"model.layers.{i}.a" for i in range(2)]
    adapter = write_adapter(tmp_path / "adapter", factors(modules, rows, columns), target_modules=["a"])
    code = f"""
import resource, torch, portllm, portllm.checkpoint, portllm.ops
torch.set_num_threads(1)
portllm.ops.unavailable("cpu")
patch = portllm.Patch.load({str(adapter)!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = portllm.apply_checkpoint({str(file)!r}, patch, in_place=True)
portllm.remove_from_checkpoint({str(file)!r})
print(report.bytes_changed, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    changed, peak = map(int, done.stdout.split())
    assert changed > 490e6
    assert peak < 220e6, f"{peak / 1e6:.0f} MB"
    assert hashlib.sha256(file.read_bytes()).digest() == before
    shutil.rmtree(tmp_path)
