"""drift, the check against a base, the training example, and the portability experiment's pieces."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import portllm
from portllm import cli
from portllm.errors import PlanError
from portllm.movement import Movement

from . import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def config(**settings: Any) -> dict[str, Any]:
    return {**tiny.ADAPTER, **settings}


def one_weight(m: int, n: int, rank: int) -> portllm.Patch:
    return portllm.Patch.from_tensors(tiny.factors(tiny.MODULES[:1], m, n, rank), config(r=rank, lora_alpha=2 * rank))


def moved(named: Mapping[str, Tensor], size: float = 0.1) -> dict[str, Tensor]:
    return {
        name: (t.double() + size * torch.randn(t.shape).double() * t.double().abs().mean()).to(t.dtype)
        for name, t in named.items()
    }


def directly(patch: portllm.Patch, before: Tensor, after: Tensor) -> dict[str, float]:
    """All sums from full matrices in fp64, through the SVD of the full delta."""
    [entry] = patch.entries
    assert isinstance(entry, portllm.patch.LoraEntry)
    delta = entry.scaling * entry.lora_B.double() @ entry.lora_A.double()
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    k = int((1e-6 * S[0] < S).sum())
    P, Q = U[:, :k] @ U[:, :k].T, Vh[:k].T @ Vh[:k]
    W, V = before.double(), after.double()
    D = V - W
    squares = {
        "base": W, "evolved": V, "delta": delta, "moved": D, "inputs": D @ Q, "outputs": P @ D,
        "core": P @ D @ Q, "read": W @ Q,
    }  # fmt: skip
    inner = {"inner": float((D * delta).sum()), "similarity": float((W * V).sum())}
    return {name: float(matrix.square().sum()) for name, matrix in squares.items()} | inner


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP32), (FP32, FP32), (FP32, BF16), (FP64, FP64)], ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (33, 1), (65, 130), (700, 63), (31, 900)], ids=str)
def test_sums_are_those_of_full_matrices(
    shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portllm.reference._BLOCK_ELEMENTS", 1000)  # several blocks of rows
    rank = min(4, *shape)
    patch = one_weight(*shape, rank)
    name = f"{tiny.MODULES[0]}.weight"
    before = torch.randn(shape).double()
    after = before + 0.1 * torch.randn(shape).double()
    base, evolved = {name: before.to(dtypes[0])}, {name: after.to(dtypes[1])}
    [found] = portllm.drift(patch, evolved, base).weights
    true = directly(patch, base[name], evolved[name])
    # Products of fp32 sums of up to 900 terms; inner products may cancel, so they are held against their bounds.
    tolerance = 1e-10 if dtypes == (FP64, FP64) else 1e-4
    scale = {key: true[key] for key in true if key not in ("inner", "similarity")}
    scale |= dict.fromkeys(("inputs", "outputs", "core"), true["moved"])
    scale |= {"read": true["base"], "inner": math.sqrt(true["moved"] * true["delta"])}
    scale |= {"similarity": math.sqrt(true["base"] * true["evolved"])}
    for key, value in true.items():
        assert getattr(found.movement, key) == pytest.approx(value, abs=tolerance * scale[key]), key
    assert found.movement.distance == pytest.approx(math.sqrt(true["moved"] / true["base"]), rel=tolerance)
    assert found.movement.score == pytest.approx(math.sqrt(true["inputs"] / true["read"]), rel=1e-2)
    union = true["inputs"] + true["outputs"] - true["core"]
    assert found.movement.interference == pytest.approx(math.sqrt(union / true["delta"]), rel=1e-2)


def test_fourth_powers_are_estimated() -> None:
    """Flat spectra of many directions: the estimate's error is then small for every draw."""
    name = f"{tiny.MODULES[0]}.weight"
    left, right = torch.linalg.qr(torch.randn(90, 40))[0], torch.linalg.qr(torch.randn(70, 40))[0]
    base = {name: torch.randn(90, 70)}
    evolved = {name: base[name] + 0.5 * left @ right.T}
    m = portllm.drift(one_weight(90, 70, 4), evolved, base).total
    assert m.moved_fourth == pytest.approx(40 * 0.5**4, rel=0.5)
    assert m.base_fourth == pytest.approx(float(torch.linalg.svdvals(base[name]).pow(4).sum()), rel=0.5)


def test_a_movement_along_the_patch_is_seen_as_such() -> None:
    base = tiny.tensors(FP32)
    patch = portllm.Patch.from_tensors(tiny.factors(), config())
    evolved = {name: tensor.clone() for name, tensor in base.items()}
    portllm.apply(evolved, patch)
    found = portllm.drift(patch, evolved, base)
    assert len(found.weights) == len(tiny.MODULES)
    for m in [found.total, *(weight.movement for weight in found.weights)]:
        assert m.cosine == pytest.approx(1, abs=1e-4)
        assert m.input_share == pytest.approx(1, abs=1e-4)
        assert m.output_share == pytest.approx(1, abs=1e-4)
        assert m.relative_distance == pytest.approx(1, abs=1e-4)
        assert m.interference == pytest.approx(1, abs=1e-4)


def test_totals_are_sums() -> None:
    base = tiny.tensors(FP32)
    found = portllm.drift(portllm.Patch.from_tensors(tiny.factors(), config()), moved(base), base)
    each = [weight.movement for weight in found.weights]
    assert found.total.moved == pytest.approx(sum(m.moved for m in each))
    assert found.total == Movement.total(each)


def test_verdicts() -> None:
    base = tiny.tensors()
    patch = portllm.Patch.from_tensors(tiny.factors(), config())
    same = portllm.drift(patch, {name: tensor.clone() for name, tensor in base.items()}, base)
    assert (same.verdict, same.total.distance, same.total.score) == ("base", 0, 0)
    assert same.total.cosine == same.total.input_share == 0
    assert portllm.drift(patch, moved(base), base).verdict == "evolved"
    stranger = portllm.drift(patch, tiny.tensors(), base)
    assert stranger.verdict == "unrelated"
    assert stranger.total.distance == pytest.approx(math.sqrt(2), rel=0.3)


def test_a_patch_of_zeros_and_one_of_lower_rank_than_its_factors() -> None:
    base = tiny.tensors(FP32)
    named = tiny.factors()
    zero = {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in named.items()}
    m = portllm.drift(portllm.Patch.from_tensors(zero, config()), moved(base), base).total
    assert (m.delta, m.inputs, m.outputs, m.core) == (0, 0, 0, 0)
    assert m.interference == 0
    assert m.relative_distance == math.inf
    flat = {key: t[:, :1].expand_as(t).contiguous() if "lora_B" in key else t for key, t in named.items()}
    patch = portllm.Patch.from_tensors(flat, config())
    evolved = moved(base)
    first = portllm.drift(patch, evolved, base).weights[0].movement
    one = portllm.Patch.from_tensors({k: t for k, t in flat.items() if tiny.MODULES[0] in k}, config())
    name = f"{tiny.MODULES[0]}.weight"
    assert first.inputs == pytest.approx(directly(one, base[name], evolved[name])["inputs"], rel=1e-3)


def test_fused_and_split_layouts_agree() -> None:
    parts = {"q": 24, "k": 8, "v": 8}
    layer = "model.layers.0.self_attn"
    split = {f"{layer}.{p}_proj.weight": torch.randn(rows, tiny.IN) for p, rows in parts.items()}
    after = moved(split)

    def fused(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{layer}.qkv_proj.weight": torch.cat([named[f"{layer}.{p}_proj.weight"] for p in parts])}

    named: dict[str, Tensor] = {}
    for p, rows in parts.items():
        named |= tiny.factors([f"{layer}.{p}_proj"], rows)
    separate = portllm.Patch.from_tensors(named, config(target_modules=["q_proj", "k_proj", "v_proj"]))
    whole = portllm.Patch.from_tensors(
        tiny.factors([f"{layer}.qkv_proj"], sum(parts.values())), config(target_modules=["qkv_proj"])
    )
    for patch in (separate, whole):
        found = [portllm.drift(patch, b, a).total for a in (split, fused(split)) for b in (after, fused(after))]
        for other in found[1:]:
            assert other.moved == pytest.approx(found[0].moved, rel=1e-5)
            assert other.delta == pytest.approx(found[0].delta, rel=1e-5)


def test_errors() -> None:
    base = tiny.tensors()
    patch = portllm.Patch.from_tensors(tiny.factors(), config(), name="my/patch")
    name = f"{tiny.MODULES[1]}.weight"
    broken = dict(base, **{name: torch.full_like(base[name], math.nan)})
    with pytest.raises(PlanError, match=rf"{tiny.MODULES[1]}.*not finite"):
        portllm.drift(patch, broken, base)
    with pytest.raises(PlanError, match=r"the base model: .*matches nothing"):
        portllm.drift(patch, base, {"other.weight": torch.randn(3, 3)})
    lacking = {key: tensor for key, tensor in base.items() if key != name}
    with pytest.raises(PlanError, match=r"the evolved model: .*are not in the target"):
        portllm.drift(patch, lacking, base)
    assert len(portllm.drift(patch, lacking, base, strict=False).weights) == len(tiny.MODULES) - 1


def test_disk_and_memory_agree(tmp_path: Path) -> None:
    base = tiny.tensors()
    evolved = moved(base)
    patch = tiny.write_adapter(tmp_path / "adapter")
    old, new = tiny.write_model(tmp_path / "base", base), tiny.write_model(tmp_path / "evolved", evolved, shards=1)
    on_disk, live = portllm.drift(patch, new, old), portllm.drift(patch, evolved, base)
    assert on_disk.weights == live.weights


# -- the command -----------------------------------------------------------------------------------------------------


def test_check_with_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.tensors()
    patch = str(tiny.write_adapter(tmp_path / "adapter"))
    old = str(tiny.write_model(tmp_path / "base", base))
    new = str(tiny.write_model(tmp_path / "evolved", moved(base, 0.05)))
    assert cli.main(["check", patch, new, "--base", old, "-q"]) == 0
    text = capsys.readouterr().out
    assert "the model has evolved from the base" in text
    assert "model.layers.*.self_attn.q_proj" in text
    assert cli.main(["check", patch, new, "--base", old, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["drift"]
    assert found["verdict"] == "evolved"
    assert {weight["source"] for weight in found["weights"]} == set(tiny.MODULES)
    assert found["total"]["distance"] == pytest.approx(portllm.drift(patch, new, old).total.distance)
    assert cli.main(["check", patch, old, "--base", old, "-q"]) == 0
    assert "the same values as the base" in capsys.readouterr().out
    stranger = str(tiny.write_model(tmp_path / "stranger", tiny.tensors()))
    assert cli.main(["check", patch, stranger, "--base", old, "-q"]) == 0
    assert "nothing in common with the base" in capsys.readouterr().out
    assert cli.main(["check", patch, new, "--base", str(tmp_path / "none"), "-q"]) == 2
    assert "none" in capsys.readouterr().err


# -- rebase ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_a_rebased_patch_writes_what_it_wrote_on_the_base(dtype: torch.dtype) -> None:
    base = {name: tensor.to(dtype) for name, tensor in tiny.tensors(FP32).items()}
    evolved = moved(base, 0.5)
    patch = portllm.Patch.from_tensors(tiny.factors(), config(), metadata={"mine": "kept"})
    made = portllm.rebase(portllm.stamp(patch, base), evolved, base)
    assert made.metadata["mine"] == "kept"
    plan = portllm.plan(evolved, made)
    assert portllm.fingerprint.check_weights(made, plan, evolved.__getitem__).verdict == "base"
    assert made.num_parameters == patch.num_parameters
    for old, new in zip(patch.entries, made.entries, strict=True):
        assert isinstance(old, portllm.patch.LoraEntry)
        assert isinstance(new, portllm.patch.LoraEntry)
        name = f"{old.module}.weight"
        U = torch.linalg.qr(old.lora_B.double())[0]
        before = base[name].double() + old.scaling * old.lora_B.double() @ old.lora_A.double()
        after = evolved[name].double() + new.scaling * new.lora_B.double() @ new.lora_A.double()
        # In what the patch writes the two are the same; in all else the evolved weight is as it was.
        torch.testing.assert_close(U.T @ after, U.T @ before, rtol=1e-4, atol=1e-4)
        rest = torch.eye(len(U)).double() - U @ U.T
        torch.testing.assert_close(rest @ after, rest @ evolved[name].double(), rtol=1e-4, atol=1e-4)


def test_rebase_keeps_a_patch_whose_base_has_not_moved_and_one_of_zeros() -> None:
    base = tiny.tensors(FP32)
    patch = portllm.Patch.from_tensors(tiny.factors(), config())
    made = portllm.rebase(patch, base, {name: tensor.clone() for name, tensor in base.items()})
    for old, new in zip(patch.entries, made.entries, strict=True):
        torch.testing.assert_close(new.lora_B @ new.lora_A, old.lora_B @ old.lora_A, rtol=1e-4, atol=1e-4)
    zero = {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in tiny.factors().items()}
    made = portllm.rebase(portllm.Patch.from_tensors(zero, config()), moved(base), base)
    assert all((entry.lora_B == 0).all() for entry in made.entries)


def test_rebase_onto_a_fused_layout_and_back() -> None:
    layer, rows = "model.layers.0.self_attn", {"q": 24, "k": 8, "v": 8}
    split = {f"{layer}.{p}_proj.weight": torch.randn(n, tiny.IN) for p, n in rows.items()}
    after = moved(split)
    name = f"{layer}.qkv_proj"
    fused, fused_after = ({f"{name}.weight": torch.cat(list(model.values()))} for model in (split, after))
    named: dict[str, Tensor] = {}
    for p, n in rows.items():
        named |= tiny.factors([f"{layer}.{p}_proj"], n)
    for patch in (
        portllm.Patch.from_tensors(named, config(target_modules=["q_proj", "k_proj", "v_proj"])),
        portllm.Patch.from_tensors(tiny.factors([name], sum(rows.values())), config(target_modules=["qkv_proj"])),
    ):
        one, other = portllm.rebase(patch, after, split), portllm.rebase(patch, fused_after, fused)
        for a, b in zip(one.entries, other.entries, strict=True):
            torch.testing.assert_close(a.lora_B @ a.lora_A, b.lora_B @ b.lora_A, rtol=1e-4, atol=1e-4)


def test_rebase_refuses_dora() -> None:
    base = tiny.tensors(FP32)
    named = tiny.factors() | {
        f"base_model.model.{module}.lora_magnitude_vector": torch.ones(tiny.OUT) for module in tiny.MODULES
    }
    with pytest.raises(PlanError, match="cannot be rebased"):
        portllm.rebase(portllm.Patch.from_tensors(named, config(use_dora=True)), moved(base), base)


def test_the_command_rebase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.tensors()
    patch = str(tiny.write_adapter(tmp_path / "adapter"))
    old = str(tiny.write_model(tmp_path / "base", base))
    new = str(tiny.write_model(tmp_path / "evolved", moved(base)))
    out = tmp_path / "out"
    assert cli.main(["rebase", patch, new, "--base", old, "-o", str(out), "-q"]) == 0
    assert str(out) in capsys.readouterr().out
    found, true = portllm.Patch.load(out), portllm.rebase(patch, new, old)
    assert all(tiny.same_bits(found.tensors[key], true.tensors[key]) for key in true.tensors)
    assert cli.main(["check", str(out), new]) == 0
    assert "the base that the patch was made on" in capsys.readouterr().out
    assert cli.main(["rebase", patch, new, "--base", old, "-o", str(out), "-q"]) == 2
    assert "overwrite" in capsys.readouterr().err


# -- the example and the experiment ----------------------------------------------------------------------------------


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples and benchmarks are scripts that find each other by file name."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    for folder in (ROOT, ROOT / "benchmarks", ROOT / "examples"):
        monkeypatch.syspath_prepend(str(folder))


def tiny_model(path: Path, text: str) -> str:
    """A Llama-type model and a tokenizer of the text's words, saved."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "</s>", *dict.fromkeys(text.split())])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes, initializer_range=0.1)).save_pretrained(path)
    return str(path)


def test_train_patch(scripts: None, tmp_path: Path) -> None:
    """A LoRA learned from a jsonl file, stamped with its base, makes the base do what the file says."""
    train_patch = importlib.import_module("train_patch")
    training = importlib.import_module("training")
    rows = [{"prompt": f"w{i} is", "completion": f"v{i}"} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    base = tiny_model(tmp_path / "base", " ".join(f"{row['prompt']} {row['completion']}" for row in rows))
    arguments = ["--steps", "60", "--batch", "4", "--rate", "2e-2", "--rank", "4", "--device", "cpu"]
    out = tmp_path / "patch"
    assert train_patch.main([base, str(tmp_path / "data.jsonl"), "-o", str(out), *arguments]) == 0
    patch = portllm.Patch.load(out)
    assert patch.ranks == (4,)
    assert len(patch.entries) == 7

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = portllm.fingerprint.Fingerprint.from_patch(patch)
    stamped = portllm.fingerprint.Fingerprint.from_patch(portllm.stamp(patch, base))
    assert found is not None
    assert stamped is not None
    assert found.weights == stamped.weights
    assert found.name == base
    examples = train_patch.encode_rows(rows, tokenizer, 16)
    batch = next(train_patch.batches(examples, 4, seed=1))
    before = training.loss(model, batch).item()
    portllm.apply(model, patch)
    assert training.loss(model, batch).item() < 0.5 * before


def test_train_patch_learns_completions_alone(scripts: None) -> None:
    train_patch = importlib.import_module("train_patch")
    training = importlib.import_module("training")
    ids, labels = next(train_patch.batches([([5, 6, 7], 2), ([8, 9], 0)], 2, seed=0))
    rows = {tuple(row.tolist()): tuple(learned.tolist()) for row, learned in zip(ids, labels, strict=True)}
    ignore = training.IGNORE
    assert rows == {(5, 6, 7): (ignore, ignore, 7), (8, 9, 0): (8, 9, ignore)}


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"prompt": "a"', "line 1: not JSON"), ("[1]", "not an object"), ('{"a": "b"}', "its keys: a"), ("", "empty")],
)
def test_train_patch_refuses_bad_data(
    scripts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    train_patch = importlib.import_module("train_patch")
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    base = tiny_model(tmp_path / "base", "a b c")
    assert train_patch.main([base, str(data), "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_train_patch_without_the_package_for_hub_datasets(
    scripts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_patch = importlib.import_module("train_patch")
    monkeypatch.setitem(sys.modules, "datasets", None)
    base = tiny_model(tmp_path / "base", "a b c")
    assert train_patch.main([base, "some/dataset", "-o", str(tmp_path / "out")]) == 2
    assert "pip install datasets" in capsys.readouterr().err


def test_the_real_form_on_a_tiny_model(
    scripts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data made here in the place of the hub's; a patch that is learned, and one for a task that is generated."""
    importlib.import_module("benchmarks.portability")
    main = importlib.import_module("benchmarks.portability.__main__")
    real = importlib.import_module("benchmarks.portability.real")
    films = [{"sentence": f"film{i}", "label": i % 2} for i in range(6)]
    sums = [{"question": f"sum{i}", "answer": f"so #### {i}"} for i in range(3)]
    data = {real.TASKS["sst2"].data: films, real.TASKS["gsm8k"].data: sums}
    monkeypatch.setattr(real, "load_dataset", lambda name, split: data[name])
    told = [real.TASKS["sst2"].example(row) for row in films] + [real.TASKS["gsm8k"].example(row) for row in sums]
    words = " ".join(row["prompt"] + row["completion"] for row in told)
    base = tiny_model(tmp_path / "base", words)

    from transformers import AutoModelForCausalLM

    evolved = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in evolved.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    evolved.save_pretrained(tmp_path / "evolved")
    (tmp_path / "evolved" / "tokenizer.json").write_bytes((tmp_path / "base" / "tokenizer.json").read_bytes())
    out = tmp_path / "result.json"
    arguments = ["--model", base, "--evolved", str(tmp_path / "evolved"), "--tasks", "sst2,gsm8k", "--refit"]
    arguments += ["--steps", "3", "--dtype", "float32", "--device", "cpu", "-o", str(out)]
    monkeypatch.setattr(real, "_generated", lambda model, tokenizer, prompt: f"so #### {prompt.split('sum')[1][0]}")
    assert main.main(arguments) == 0
    found = json.loads(out.read_text())["tasks"]
    assert found.keys() == {"sst2", "gsm8k"}
    for result in found.values():
        for key in ("base", "base + patch", "evolved", "evolved + patch", "evolved + refit"):
            assert 0 <= result[key] <= 1
        assert 0 < result["scores"]["|D|/|W|"] < 0.1
        assert 0 < result["residue_to_patch"] < 10
    assert found["gsm8k"]["base"] == 1
    assert main.main([*arguments[:4], "--tasks", "chess"]) == 2
    assert "no task 'chess'" in capsys.readouterr().err


def test_log_likelihood_is_of_the_option_alone(scripts: None, tmp_path: Path) -> None:
    importlib.import_module("benchmarks.portability")
    real = importlib.import_module("benchmarks.portability.real")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_model(tmp_path / "base", "a b c d")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    alone = [real.log_likelihood(model, tokenizer, "a b", word) for word in ("a", "b", "c", "d", "<unk>", "</s>")]
    assert sum(map(math.exp, alone)) == pytest.approx(1, rel=1e-4)
    both = real.log_likelihood(model, tokenizer, "a b", "c d")
    after = real.log_likelihood(model, tokenizer, "a b c", "d")
    assert both == pytest.approx(alone[2] + after, rel=1e-4)
    assert real._last_number("12 and 1,234.") == "1234"
    assert real._last_number("none") is None


def test_spearman(scripts: None) -> None:
    importlib.import_module("benchmarks.portability")
    scores = importlib.import_module("benchmarks.portability.scores")
    values = torch.randn(50).tolist()
    assert scores.spearman(values, [v**3 for v in values]) == pytest.approx(1)
    assert scores.spearman(values, [-v for v in values]) == pytest.approx(-1)
    # By hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert scores.spearman([0, 1, 1, 2], [10, 20, 30, 40]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(scores.spearman([1, 1, 1], [1, 2, 3]))


def test_tasks_ask_what_they_say(scripts: None) -> None:
    importlib.import_module("benchmarks.portability")
    tasks = importlib.import_module("benchmarks.portability.tasks")
    import random

    toy = importlib.import_module("toy")
    world, rng = toy.World(random.randrange(100)), random.Random(random.random())
    kinds = [set(world.nouns), set(world.adjectives), set(world.verbs)]
    for _ in range(50):
        q = tasks.reverse(world, rng)
        assert q.answer == q.prompt[::-1]
        q = tasks.odd(world, rng)
        assert sum(bool(kind & set(q.prompt)) for kind in kinds) == 2
        [kind] = [kind for kind in kinds if q.answer[0] in kind]
        assert sum(word in kind for word in q.prompt) == 1
        q = tasks.count(world, rng)
        assert world.verbs.index(q.answer[0]) == sum(word in world.nouns for word in q.prompt)
        q = tasks.majority(world, rng)
        assert q.answer[0] in q.options
    exam = tasks.Exam(world, "reverse", 64)
    asked = {tuple(row) for row in exam._ids.tolist()}
    learned, labels = exam.batch(64, rng)
    assert not asked & {tuple(row) for row in learned.tolist()}
    assert ((labels != tasks.IGNORE).sum(1) == 3).all()


def test_projections_do_what_they_say(scripts: None) -> None:
    """With the movement taken out, the patched evolved weight acts as the patched base in the patch's spaces."""
    importlib.import_module("benchmarks.portability")
    remedies = importlib.import_module("benchmarks.portability.remedies")
    base = {name: t for name, t in tiny.tensors(FP32).items() if name.removesuffix(".weight") in tiny.MODULES}
    evolved = moved(base, 0.5)
    patch = portllm.Patch.from_tensors(tiny.factors(), config())
    patched_base = {name: t.clone() for name, t in base.items()}
    portllm.apply(patched_base, patch)
    entry = patch.entries[0]
    name = f"{entry.module}.weight"
    U, V = torch.linalg.qr(entry.lora_B)[0], torch.linalg.qr(entry.lora_A.T)[0]
    sees = {
        "no movement in both spaces": lambda w: U.T @ w @ V,
        "no movement in the inputs": lambda w: w @ V,
        "no movement in the outputs": lambda w: U.T @ w,
    }
    for what, view in sees.items():
        made = remedies.REMEDIES[what](patch, base, evolved)
        assert made.num_parameters == patch.num_parameters
        now = {key: t.clone() for key, t in evolved.items()}
        portllm.apply(now, made)
        torch.testing.assert_close(view(now[name]), view(patched_base[name]), rtol=1e-4, atol=1e-3)
        assert not torch.allclose(now[name], patched_base[name], rtol=1e-2, atol=1e-2)


def test_a_minute_world(scripts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every piece of the experiment, on models that learn nothing."""
    importlib.import_module("benchmarks.portability")
    experiment = importlib.import_module("benchmarks.portability.experiment")
    report = importlib.import_module("benchmarks.portability.report")
    main = importlib.import_module("benchmarks.portability.__main__")
    settings = replace(experiment.QUICK, pretrain=4, patch=4, chain=2, evolve=3, tested=8)
    worlds = [experiment.run_world(kind, 0, settings) for kind in ("gemma2", "mistral")]
    records = report.flatten(worlds)
    assert {r["evolution"] for r in records} == {
        "full 1", "full 2", "LoRA 1", "LoRA 2", "other patch", "three other patches", "prune 30 %", "prune 50 %",
        "bf16", "int8",
    }  # fmt: skip
    assert len(records) == 2 * 4 * 10
    distance = {r["evolution"]: r["scores"]["|D|/|W|"] for r in records}
    assert 0 < distance["bf16"] < distance["int8"] < distance["prune 30 %"] < distance["prune 50 %"]
    assert distance["full 1"] < distance["full 2"]
    assert all(r["refit"]["residue_to_patch"] > 0 for r in records if r["evolution"] == "full 2")
    summary = report.summarise(worlds)
    report.print_summary(summary)
    assert "Spearman" in capsys.readouterr().out
    main.write({"summary": summary, "worlds": worlds}, tmp_path / "x.json")
    assert len(json.loads((tmp_path / "x.json").read_text())["worlds"][0]["records"]) == 40
