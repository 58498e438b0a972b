"""The command ``portllm``: what it prints for people and for programs, and what it writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import portllm
from portllm import Patch, cli, ops

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
Run = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def command(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse: help, version and usage errors
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base_model_name_or_path="some/base")


def strict_json(text: str) -> Any:
    """Parse JSON as other languages do: without NaN and Infinity."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def applied(model: Path, *patches: tuple[Path, float], **options: Any) -> dict[str, torch.Tensor]:
    named = read_model(model)
    portllm.apply(named, list(patches), **options)
    return named


def assert_is(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = read_model(path)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())


# -- starting --------------------------------------------------------------------------------------------------------


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["apply", "--help"], ["nonsense"], ["apply", "a@b"]])
def test_it_starts_without_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from portllm.cli import main
try:
    code = main({arguments!r})
except SystemExit as stop:
    code = stop.code
print([name for name in ("torch", "numpy", "safetensors", "tqdm") if name in sys.modules], code, file=sys.stderr)
"""
    done = python("-c", code)
    expected = 0 if arguments[-1].startswith("--") else 2
    assert done.stderr.splitlines()[-1] == f"[] {expected}"


def test_as_a_module_and_as_a_script(model: Path, adapter: Path, tmp_path: Path) -> None:
    done = python("-m", "portllm", "apply", str(adapter), str(model), "-o", str(tmp_path / "out"), "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert_is(tmp_path / "out", applied(model, (adapter, 1.0)))
    failed = python("-m", "portllm", "apply", "adapter@x", str(model), "-o", str(tmp_path / "out"))
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "portllm: adapter@x: 'x' after @ is not a finite number; write PATCH@0.7\n"
    from importlib.metadata import entry_points

    [script] = [point for point in entry_points(group="console_scripts") if point.name == "portllm"]
    assert script.load() is cli.main


def test_help_and_version(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    commands = ("apply", "check", "combine", "inspect", "stamp", "info")
    for word in (*commands, "examples:", "portllm apply ./adapter", "exit codes"):
        assert word in out
    assert run("--version") == (0, f"portllm {portllm.__version__}\n", "")
    for command in commands:
        code, out, err = run(command, "--help")
        assert (code, err) == (0, "")
        assert out.startswith(f"usage: portllm {command}")
        assert "--json" in out


def test_the_examples_in_the_help_are_commands(
    run: Run, tmp_path: Path, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "base-model")
    model.rename("evolved-model")
    for name in ("math", "style"):
        write_adapter(Path(name))
    lines = [line.split() for line in cli._EPILOG.splitlines() if line.startswith("  portllm ")]
    assert len(lines) >= 4
    for i, (_, *arguments) in enumerate(lines):
        arguments = [argument.replace("./patched", f"./patched{i}") for argument in arguments]
        assert run(*arguments)[0] == 0, arguments


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nonsense"], ["apply"], ["apply", "one"], ["check", "one"], ["inspect"], ["stamp", "one"],
        ["apply", "a", "b", "-o", "c", "--dtype", "int8"], ["apply", "a", "b", "--expert-layout", "x"],
        ["inspect", "a", "b"], ["info", "a"], ["apply", "a", "b", "--scale", "2"],
    ],
)  # fmt: skip
def test_wrong_usage(run: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: portllm")
    assert list(tmp_path.iterdir()) == []


# -- apply -----------------------------------------------------------------------------------------------------------


def test_apply(run: Run, model: Path, adapter: Path, tmp_path: Path) -> None:
    code, out, err = run("apply", adapter, model, "-o", tmp_path / "out")
    assert code == 0
    assert_is(tmp_path / "out", applied(model, (adapter, 1.0)))
    assert "patched 4 tensors, copied 4, in 2 shards" in out
    assert out.splitlines()[-1] == str(tmp_path / "out")
    assert "B/s" in err  # the bar
    assert "warning" not in err


def test_apply_json_says_the_same(run: Run, model: Path, adapter: Path, tmp_path: Path) -> None:
    code, out, err = run("apply", adapter, model, "-o", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    report = strict_json(out)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert report.pop("seconds") > 0
    assert report.pop("gigabytes_per_second") > 0
    assert set(report.pop("survival")) == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qv"}
    assert report == {
        "out": str(tmp_path / "out"), "shards": 2, "tensors_updated": 4, "tensors_copied": 4, "bytes_read": size,
        "bytes_written": size, "warnings": [],
    }  # fmt: skip


def test_quiet(run: Run, model: Path, adapter: Path, tmp_path: Path) -> None:
    code, out, err = run("apply", adapter, model, "-o", tmp_path / "out", "--quiet")
    assert (code, err) == (0, "")
    assert "patched 4 tensors" in out


def test_several_patches_with_weights(run: Run, model: Path, tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / name) for name in ("one", "two@0.5", "three")]
    arguments = [f"{paths[0]}@0.75", paths[1], f"{paths[2]}@-2e-1"]
    assert run("apply", *arguments, model, "-o", tmp_path / "out")[0] == 0
    # "two@0.5" exists under that name, so that its @0.5 is no weight.
    expected = applied(model, (paths[0], 0.75), (paths[1], 1.0), (paths[2], -0.2))
    assert_is(tmp_path / "out", expected)
    assert run("apply", paths[0], f"{paths[1]}@3", model, "-o", tmp_path / "again")[0] == 0
    assert_is(tmp_path / "again", applied(model, (paths[0], 1.0), (paths[1], 3.0)))


def test_dry_run_writes_nothing(run: Run, model: Path, adapter: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    for more in ([], ["-o", tmp_path / "out"], ["-o", model], ["--json"]):
        code, out, err = run("apply", f"{adapter}@0.5", adapter, model, "--dry-run", *more)
        assert (code, err) == (0, "")
        assert all(f"{module}.weight" in out for module in MODULES)
        assert snapshot(tmp_path) == before
    plan = strict_json(out)
    assert [update["tensor"] for update in plan["updates"]] == [f"{module}.weight" for module in MODULES]
    assert all(u["scalings"] == [0.75, 1.5] and u["ranks"] == [4, 4] for u in plan["updates"])
    assert all(u["rows"] == [0, OUT] and u["columns"] == [0, IN] and not u["dora"] for u in plan["updates"])
    _, table, _ = run("apply", f"{adapter}@0.5", adapter, model, "--dry-run")
    [line] = [line.split() for line in table.splitlines() if MODULES[1] in line]
    assert line == [f"{MODULES[1]}.weight", f"0:{OUT}", f"0:{IN}", "4+4", "0.75+1.5"]
    assert "would change 4 tensors; nothing was written" in table


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtype(run: Run, model: Path, adapter: Path, tmp_path: Path, dtype: str) -> None:
    assert run("apply", adapter, model, "-o", tmp_path / "out", "--dtype", dtype)[0] == 0
    kind = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    found = read_model(tmp_path / "out")
    assert {str(tensor.dtype) for tensor in found.values()} == {f"torch.{dtype}"}
    for file in (tmp_path / "out").glob("*.safetensors"):
        header = read_header(file)[0]
        assert header.pop("__metadata__") == {"format": "pt"}
        assert {info["dtype"] for info in header.values()} == {kind}
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert json.loads((tmp_path / "out/config.json").read_text()) == CONFIG | {"torch_dtype": dtype}
    wide = torch.promote_types(torch.bfloat16, getattr(torch, dtype))
    named = {name: tensor.to(wide) for name, tensor in read_model(model).items()}
    portllm.apply(named, adapter)
    assert_is(tmp_path / "out", {name: tensor.to(getattr(torch, dtype)) for name, tensor in named.items()})


def test_overwrite(run: Run, model: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("x")
    code, _, err = run("apply", adapter, model, "-o", tmp_path / "out")
    assert code == 2
    assert "--overwrite" in err
    assert snapshot(tmp_path / "out") == {"old": b"x"}
    assert run("apply", adapter, model, "-o", tmp_path / "out", "--overwrite")[0] == 0
    assert_is(tmp_path / "out", applied(model, (adapter, 1.0)))
    assert not (tmp_path / "out/old").exists()


def test_untie(run: Run, tmp_path: Path) -> None:
    tied = CONFIG | {"tie_word_embeddings": True}
    model = write_model(tmp_path / "model", tensors(head=False), config=tied)
    head = write_adapter(tmp_path / "head", factors(["lm_head"], VOCAB), target_modules=["lm_head"])
    code, _, err = run("apply", head, model, "-o", tmp_path / "once", "-q")
    assert code == 0
    assert err.startswith("warning: model.embed_tokens.weight is tied to lm_head.weight")
    assert "lm_head.weight" not in read_model(tmp_path / "once")
    code, _, err = run("apply", head, model, "-o", tmp_path / "two", "-q", "--untie")
    assert (code, err) == (0, "")
    found = read_model(tmp_path / "two")
    assert same_bits(found["model.embed_tokens.weight"], read_model(model)["model.embed_tokens.weight"])
    assert same_bits(found["lm_head.weight"], read_model(tmp_path / "once")["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "two/config.json").read_text()) == CONFIG
    code, out, _ = run("apply", head, model, "--untie", "--dry-run", "--json")
    assert strict_json(out)["untie"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_no_strict(run: Run, model: Path, tmp_path: Path) -> None:
    stray = factors([*MODULES, "model.layers.9.self_attn.q_proj"])
    adapter = write_adapter(tmp_path / "adapter", stray)
    before = snapshot(tmp_path)
    for command in (["apply", adapter, model, "-o", tmp_path / "out"], ["check", adapter, model]):
        code, out, err = run(*command)
        assert (code, out) == (2, "")
        assert "model.layers.9.self_attn.q_proj" in err
        assert "--no-strict" in err
        assert err.count("\n") == 1
        assert snapshot(tmp_path) == before
    assert run("apply", adapter, model, "-o", tmp_path / "out", "--no-strict", "-q")[0] == 0
    assert_is(tmp_path / "out", applied(model, (adapter, 1.0), strict=False))
    code, out, _ = run("check", adapter, model, "--no-strict", "--json")
    assert strict_json(out)["plan"]["unmatched_patch"] == ["model.layers.9.self_attn.q_proj"]


def test_resize_vocab(run: Run, model: Path, tmp_path: Path) -> None:
    embed, head = torch.randn(VOCAB + 4, IN), torch.randn(VOCAB + 4, IN)
    vocabulary = {"base_model.model.lm_head.weight": head, "base_model.model.model.embed_tokens.weight": embed}
    adapter = write_adapter(tmp_path / "adapter", factors() | vocabulary)
    code, _, err = run("apply", adapter, model, "-o", tmp_path / "out")
    assert code == 2
    assert "--resize-vocab" in err
    code, out, err = run("apply", adapter, model, "--resize-vocab", "--dry-run")
    assert code == 0
    assert ["lm_head.weight", "replaced"] in [line.split() for line in out.splitlines()]
    assert "warning: lm_head.weight grows from 20 to 24 rows" in err
    assert run("apply", adapter, model, "-o", tmp_path / "out", "--resize-vocab")[0] == 0
    found = read_model(tmp_path / "out")
    assert same_bits(found["lm_head.weight"], head.to(torch.bfloat16))
    assert same_bits(found["model.embed_tokens.weight"], embed.to(torch.bfloat16))


def test_expert_layout(run: Run, tmp_path: Path) -> None:
    experts = torch.randn(3, IN, IN)
    model = write_model(tmp_path / "model", {"a.experts.down_proj": experts}, shards=1)
    lora_A, lora_B = torch.randn(3 * 2, IN), torch.randn(IN, 2 * 3)
    adapter = write_adapter(
        tmp_path / "adapter",
        {"base_model.model.a.experts.lora_A.weight": lora_A, "base_model.model.a.experts.lora_B.weight": lora_B},
        r=2, lora_alpha=2, target_modules=[], target_parameters=["experts.down_proj"],
    )  # fmt: skip
    code, _, err = run("apply", adapter, model, "-o", tmp_path / "out")
    assert code == 2
    assert "--expert-layout" in err
    delta = torch.einsum("ore,eri->eoi", lora_B.reshape(IN, 2, 3), lora_A.reshape(3, 2, IN))
    for layout, expected in (("out_in", experts + delta), ("in_out", experts + delta.transpose(1, 2))):
        assert run("apply", adapter, model, "-o", tmp_path / layout, "--expert-layout", layout)[0] == 0
        torch.testing.assert_close(read_model(tmp_path / layout)["a.experts.down_proj"], expected)


def test_backend(run: Run, model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("apply", adapter, model, "-o", tmp_path / "out", "--backend", "torch")[0] == 0
    assert_is(tmp_path / "out", applied(model, (adapter, 1.0), backend="torch"))
    monkeypatch.setenv("PORTLLM_BACKEND", "abacus")
    code, out, err = run("apply", adapter, model, "-o", tmp_path / "two")
    assert (code, out) == (2, "")
    assert "there is no backend 'abacus'; choose from torch, cpu, triton" in err
    assert not (tmp_path / "two").exists()


def test_ignore_setting(run: Run, model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", new_setting=3, other_setting="x")
    for command in (["apply", adapter, model, "--dry-run"], ["inspect", adapter], ["check", adapter, model]):
        code, _, err = run(*command)
        assert code == 2
        assert "new_setting=3" in err
        assert "--ignore-setting" in err
        assert run(*command, "--ignore-setting", "new_setting")[0] == 2
        assert run(*command, "--ignore-setting", "new_setting", "--ignore-setting", "other_setting")[0] == 0


def test_the_output_must_be_named(run: Run, model: Path, adapter: Path) -> None:
    assert run("apply", adapter, model) == (
        2,
        "",
        "portllm: say where to write with -o OUT (or --dry-run, or --in-place)\n",
    )


def test_hub_ids(run: Run, model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        if name == "no/such":
            raise OSError("404 Client Error.\nRepository Not Found")
        return str({"owner/patch": adapter, "owner/model": model}[name])

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert run("apply", "owner/patch@0.5", "owner/model", "-o", "out", "-q")[0] == 0
    assert_is(tmp_path / "out", applied(model, (adapter, 0.5)))
    assert "*.safetensors" in asked["owner/model"]
    assert not any(pattern.endswith(".bin") for pattern in asked["owner/model"])
    before = snapshot(tmp_path)
    code, out, err = run("inspect", "no/such")
    assert (code, out) == (2, "")
    assert err == "portllm: no/such: no such patch here, and not to be had from the hub: 404 Client Error.\n"
    # A patch from the hub is not written back into the cache, nor beside it.
    code, _, err = run("stamp", "owner/patch", model)
    assert (code, err) == (2, "portllm: owner/patch: comes from the hub; say where to write with -o OUT\n")
    assert snapshot(tmp_path) == before
    assert run("stamp", "owner/patch", "owner/model", "-o", "stamped")[0] == 0
    assert run("check", "stamped", model)[1].endswith("(owner/model), bit for bit\n")


# -- check -----------------------------------------------------------------------------------------------------------

SAYS = {
    "base": "fits; the model is the base that the patch was made on (",
    "evolved": "fits; the model has evolved from the patch's base (",
    "unrelated": "have nothing in common with the patch's base (",
    "unknown": "fits; the patch has no fingerprint of its base (some/base), `portllm stamp PATCH BASE` adds one",
}


@pytest.mark.parametrize("verdict", SAYS)
def test_check(run: Run, model: Path, adapter: Path, tmp_path: Path, verdict: str) -> None:
    base = write_model(tmp_path / "base")
    named = read_model(base)
    if verdict == "evolved":
        named = {n: (t.float() + 0.02 * t.float().std() * torch.randn(t.shape)).to(t.dtype) for n, t in named.items()}
    elif verdict == "unrelated":
        named = tensors()
    target = write_model(tmp_path / "target", named, shards=3)
    if verdict != "unknown":
        assert run("stamp", adapter, base)[0] == 0
    before = snapshot(tmp_path)
    code, out, err = run("check", adapter, target)
    assert (code, err) == (0, "")
    assert SAYS[verdict] in out.splitlines()[-1]
    found = strict_json(run("check", adapter, target, "--json")[1])
    assert found["verdict"] == verdict
    assert found["base"] == ("some/base" if verdict == "unknown" else str(base))
    assert snapshot(tmp_path) == before

    patch, relative = Patch.load(adapter), {}
    for entry, weight in zip(patch.entries, found["weights"], strict=True):
        tensor = named[f"{entry.module}.weight"].double()
        delta = 1.5 * entry.lora_B.double() @ entry.lora_A.double()
        assert weight["source"] == entry.module
        assert weight["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-12)
        assert weight["weight_norm"] == pytest.approx(float(tensor.norm()), rel=1e-12)
        assert weight["relative"] == pytest.approx(float(delta.norm() / tensor.norm()), rel=1e-12)
        relative.setdefault(entry.module.replace(".0.", ".*.").replace(".1.", ".*."), []).append(weight)
    # The table says the same, in percent.
    for kind, weights in relative.items():
        [cells] = [line.split() for line in out.splitlines() if line.startswith(kind)]
        assert cells[1:3] == ["2", "4"]
        sizes = sorted(w["relative"] for w in weights)
        assert cells[3:5] == [f"{sizes[1]:.2%}", f"{sizes[1]:.2%}"]
        moved = sorted(w["moved"] for w in weights) if verdict != "unknown" else []
        assert cells[5] == f"{sorted(w['survival'] for w in weights)[1]:.0%}"
        assert cells[6] == (f"{moved[1]:.2%}" if moved else "?")
    assert len(run("check", adapter, target, "--all")[1].splitlines()) == len(out.splitlines()) + 2


def test_check_names_what_is_replaced(run: Run, model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(
        tmp_path / "adapter", factors() | {"base_model.model.lm_head.weight": torch.randn(VOCAB, IN)}
    )
    code, out, err = run("check", adapter, model)
    assert code == 0
    assert f"replaces lm_head.weight [{VOCAB}, {IN}]" in out
    assert "warning: lm_head.weight replaces" in err
    only = write_adapter(
        tmp_path / "only", {"base_model.model.lm_head.weight": torch.randn(VOCAB, IN)}, modules_to_save=["lm_head"]
    )
    code, out, _ = run("check", only, model, "--no-strict")
    assert code == 0
    assert f"replaces lm_head.weight [{VOCAB}, {IN}]" in out


def test_json_has_no_infinity(run: Run, adapter: Path, tmp_path: Path) -> None:
    zeros = write_model(tmp_path / "zeros", {name: torch.zeros_like(t) for name, t in tensors().items()})
    code, out, _ = run("check", adapter, zeros, "--json")
    assert code == 0
    assert [weight["relative"] for weight in strict_json(out)["weights"]] == [None] * 4
    code, out, _ = run("check", adapter, zeros)
    assert code == 0
    assert "inf%" in out


# -- inspect, stamp, info --------------------------------------------------------------------------------------------


def test_inspect(run: Run, tmp_path: Path, model: Path) -> None:
    named = factors() | factors(["model.layers.0.mlp.up_proj"], 30, 12, rank=2, dtype=torch.float16)
    named["base_model.model.lm_head.weight"] = torch.randn(VOCAB, IN)
    adapter = write_adapter(
        tmp_path / "adapter", named, target_modules=["q_proj", "v_proj", "up_proj"], rank_pattern={"up_proj": 2},
        base_model_name_or_path="some/base", peft_version="0.21.2",
    )  # fmt: skip
    code, out, err = run("inspect", adapter)
    assert (code, err) == (0, "")
    facts = strict_json(run("inspect", adapter, "--json")[1])
    count = sum(tensor.numel() for tensor in named.values())
    assert facts["parameters"] == count
    assert facts["bytes"] == sum(tensor.nbytes for tensor in named.values())
    assert facts["dtypes"] == ["float16", "float32"]
    assert (facts["ranks"], facts["base"], facts["fingerprint"]) == ([2, 4], "some/base", False)
    assert facts["peft_version"] == "0.21.2"
    entries = {entry["name"]: entry for entry in facts["entries"]}
    assert entries["model.layers.0.mlp.up_proj"] == {
        "kind": "LoraEntry", "name": "model.layers.0.mlp.up_proj", "rank": 2, "scaling": 3.0, "dora": False,
        "shape": [30, 12],
    }  # fmt: skip
    assert entries["lm_head.weight"]["kind"] == "ReplaceEntry"
    assert entries.keys() == {*MODULES, "model.layers.0.mlp.up_proj", "lm_head.weight"}
    assert out.splitlines()[0] == "base      some/base"
    assert out.splitlines()[1] == f"numbers   {count:,} in float16, float32"
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[3:]}
    assert rows["model.layers.*.self_attn.q_proj"] == ["2", "4", "1.5", "lora"]
    assert rows["model.layers.*.mlp.up_proj"] == ["1", "2", "3", "lora"]
    assert rows["lm_head.weight"] == ["1", "replace"]
    everything = {line.split()[0] for line in run("inspect", adapter, "--all")[1].splitlines()[3:]}
    assert everything == entries.keys()


def test_stamp_in_place_keeps_all_else(run: Run, model: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "README.md").write_text("about")
    old, settings = read_model(adapter), json.loads((adapter / "adapter_config.json").read_text())
    code, out, err = run("stamp", adapter, model)
    assert (code, out, err) == (0, f"{adapter}: fingerprint of {model} kept\n", "")
    assert snapshot(adapter).keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((adapter / "adapter_config.json").read_text()) == settings
    assert all(same_bits(tensor, old[name]) for name, tensor in read_model(adapter).items())
    assert "(fingerprint kept)" in run("inspect", adapter)[1]
    assert strict_json(run("inspect", adapter, "--json")[1])["fingerprint"] is True


def test_stamp_elsewhere(run: Run, model: Path, adapter: Path, tmp_path: Path) -> None:
    before = snapshot(adapter)
    code, out, _ = run("stamp", adapter, model, "-o", tmp_path / "new/stamped", "--json")
    assert code == 0
    assert strict_json(out) == {"out": str(tmp_path / "new/stamped"), "base": str(model)}
    assert snapshot(adapter) == before
    assert "bit for bit" in run("check", tmp_path / "new/stamped", model)[1]


@pytest.mark.parametrize("spelling", ["adapter", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"])
def test_stamp_writes_where_the_adapter_lies(run: Run, model: Path, tmp_path: Path, spelling: str) -> None:
    """An adapter that is not called "default" lies in a subfolder, or is named by one of its files."""
    write_adapter(tmp_path / "adapter/math" if spelling == "adapter" else tmp_path / "adapter")
    names = snapshot(tmp_path).keys()
    assert run("stamp", tmp_path / spelling, model)[0] == 0
    assert snapshot(tmp_path).keys() == names
    assert "bit for bit" in run("check", tmp_path / spelling, model)[1]


def test_info(run: Run) -> None:
    code, out, err = run("info")
    assert (code, err) == (0, "")
    facts = strict_json(run("info", "--json")[1])
    assert facts["versions"]["portllm"] == portllm.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"] == {name: ops.unavailable(name) for name in ops.BACKENDS}
    assert facts["chosen"]["cpu"] == ops.backend_for(torch.empty(1, 1, dtype=torch.bfloat16))
    assert facts["threads"] == torch.get_num_threads()
    lines = [line.split() for line in out.splitlines()]
    assert ["torch", torch.__version__] in lines
    for name, reason in facts["backends"].items():
        [line] = [line for line in out.splitlines() if line.split()[:2] == ["backend", name]]
        assert line.split(maxsplit=2)[2] == ("ready" if reason is None else f"no: {reason}")
    assert ["cpu", "uses", facts["chosen"]["cpu"]] in lines


# -- terminals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "ADAPTER", "--all"]])
def test_a_reader_who_has_gone_is_no_failure(adapter: Path, arguments: list[str]) -> None:
    """Also where the output waits in a buffer until the end."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "portllm", *(str(adapter) if a == "ADAPTER" else a for a in arguments)],
            stdout=write, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_that_cannot_show_a_name_is_no_failure(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "ädäpter", base_model_name_or_path="basis-\ud800-ü")
    commands = [["inspect", str(adapter)], ["check", str(adapter), str(model)], ["inspect", str(tmp_path / "nö")]]
    code = f"from portllm.cli import main; print([main(command) for command in {commands!r}])"
    done = python("-c", code, PYTHONIOENCODING="ascii")
    assert done.stderr == f"portllm: {tmp_path}/n\\xf6: no such patch\n"
    assert done.stdout.count("basis-\\ud800-\\xfc") == 2
    assert "|\\u0394|/|W|" in done.stdout
    assert done.stdout.splitlines()[-1] == "[0, 0, 2]"
