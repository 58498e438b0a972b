"""Sparse weights: patterns, what zeros lose, lora_B fitted to what is kept, and torch's compressed format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import portllm
from portllm import Patch, cli, masked, refit
from portllm.errors import PlanError, PortllmError
from portllm.patch import LoraEntry
from portllm.sparsity import pattern_of

from . import families, tiny
from .families import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def pruned_to(weight: Tensor, n: int, m: int) -> Tensor:
    """The n largest of each m elements of a row."""
    groups = weight.reshape(*weight.shape[:-1], -1, m)
    rank = groups.abs().argsort(dim=-1, descending=True).argsort(dim=-1)
    return torch.where(rank < n, groups, 0).reshape(weight.shape)


def sparse_model(named: Mapping[str, Tensor], n: int = 2, m: int = 4) -> dict[str, Tensor]:
    return {name: pruned_to(t, n, m) if name.endswith("_proj.weight") else t for name, t in named.items()}


def patch_for(out: int = tiny.OUT, inner: int = tiny.IN, rank: int = 4, modules: int = 4, **settings: Any) -> Patch:
    tensors = tiny.factors(tiny.MODULES[:modules], out, inner, rank)
    return Patch.from_tensors(tensors, {**tiny.ADAPTER, "r": rank, **settings})


def linear(patch: Patch) -> list[LoraEntry]:
    return [entry for entry in patch.entries if isinstance(entry, LoraEntry)]


def delta(entry: LoraEntry) -> Tensor:
    return entry.scaling * entry.lora_B.double() @ entry.lora_A.double()


# -- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (1, 8), (3, 8), (4, 8)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_patterns_are_found(n: int, m: int, dtype: torch.dtype) -> None:
    weight = pruned_to(torch.rand(9, 48) + 0.5, n, m).to(dtype)
    found = pattern_of(weight)
    assert found is not None
    given, length = map(int, found.split(":"))
    groups = (weight != 0).view(9, -1, length).sum(2)
    assert int(groups.max()) == given <= length // 2
    if m == 4:
        assert found == f"{n}:4"
    weight[4, 8:16] = 1  # groups of their own kind
    assert pattern_of(weight) is None


def test_dense_weights_have_none() -> None:
    assert pattern_of(torch.rand(5, 8) + 1) is None
    assert pattern_of(torch.zeros(5, 8)) is None
    assert pattern_of(torch.zeros(5, 7)) is None
    assert pattern_of(pruned_to(torch.rand(8, 8), 2, 4).T.contiguous()[:, :6]) is None
    assert pattern_of(torch.zeros(3)) is None
    large = pruned_to(torch.rand(300, 16384) + 0.5, 2, 4)  # more than one block of rows
    assert pattern_of(large) == "2:4"
    large[-1, -3:] = 1
    assert pattern_of(large) is None


# -- what is lost ----------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 4), rank=st.integers(1, 6), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_the_share_on_zeros_is_exact(n: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    named = {name: pruned_to(t, n, 4) if "proj" in name else t for name, t in tiny.tensors(FP32).items()}
    patch = patch_for(rank=rank)
    found = {one.source: one for one in masked(portllm.plan(named, patch), named.__getitem__)}
    assert found.keys() == set(tiny.MODULES)
    for entry in linear(patch):
        weight, change = named[f"{entry.module}.weight"], delta(entry)
        kept = torch.where(weight != 0, change, 0)
        one = found[entry.module]
        assert one.lost == pytest.approx(1 - float(kept.square().sum() / change.square().sum()), abs=1e-9)
        assert one.zeros == 1 - n / 4
        assert one.pattern == (f"{n}:4" if n in (1, 2) else None)


def test_fused_weights_count_their_own_rows() -> None:
    """q, k and v in one weight, of which only v is sparse."""
    named = {"model.layers.0.self_attn.qkv_proj.weight": torch.randn(24, 16)}
    named["model.layers.0.self_attn.qkv_proj.weight"][16:] = pruned_to(torch.randn(8, 16), 2, 4)
    modules = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    patch = Patch.from_tensors(
        tiny.factors(modules, 8, 16), {**tiny.ADAPTER, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    )
    found = {one.source[-6:]: one for one in masked(portllm.plan(named, patch), named.__getitem__)}
    assert (found["q_proj"].lost, found["k_proj"].pattern) == (0.0, None)
    assert found["v_proj"].pattern == "2:4"
    assert 0 < found["v_proj"].lost < 1


# -- refit -----------------------------------------------------------------------------------------------------------


def errors(patch: Patch, weights: Mapping[str, Tensor], of: Patch) -> list[float]:
    """Relative output errors of the masked deltas against the deltas of ``of``, on the row space of each lora_A."""
    found = []
    for new, old in zip(linear(patch), linear(of), strict=True):
        directions = torch.linalg.svd(old.lora_A.double(), full_matrices=False)[2].T
        wanted = delta(old) @ directions
        given = torch.where(weights[f"{old.module}.weight"] != 0, delta(new), 0) @ directions
        found.append(float((given - wanted).norm() / wanted.norm()))
    return found


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_refit_keeps_what_the_patch_does_to_its_inputs(rank: int, dtype: torch.dtype) -> None:
    """On 2:4 weights of 128 columns the error on A's row space falls from tens of percent to the ridge's."""
    named = sparse_model({f"{m}.weight": torch.randn(40, 128).to(dtype) for m in tiny.MODULES})
    patch = patch_for(40, 128, rank)
    made = refit(patch, named)
    before, after = errors(patch, named, patch), errors(made.patch, named, patch)
    assert min(before) > 0.3
    assert max(after) < 0.02 * min(before)
    for weight, *truth in zip(made.weights, before, after, strict=True):
        assert weight.before == pytest.approx(truth[0], rel=1e-6)
        assert weight.after == pytest.approx(truth[1], rel=1e-3, abs=1e-6)
        assert 0.3 < weight.lost < 0.7
    for new, old in zip(linear(made.patch), linear(patch), strict=True):
        assert torch.equal(new.lora_A, old.lora_A)


def test_refit_is_the_stated_minimum() -> None:
    """Against the ridge problem solved row by row, written as least squares."""
    named = sparse_model({f"{tiny.MODULES[0]}.weight": torch.randn(6, 24)})
    patch, ridge = patch_for(6, 24, 3, modules=1), 0.01
    [old], [new] = linear(patch), linear(refit(patch, named, ridge=ridge).patch)
    U, S, Vh = torch.linalg.svd(old.lora_A.double(), full_matrices=False)
    T, Q = U * S, Vh.T
    for i, row in enumerate(named[f"{tiny.MODULES[0]}.weight"]):
        H = Q.T @ torch.diag((row != 0).double()) @ Q
        c = old.lora_B[i].double() @ T
        stacked = torch.cat([H, math.sqrt(ridge) * torch.eye(3, dtype=FP64)], dim=1)  # c' @ stacked ~ wanted
        wanted = torch.cat([c, math.sqrt(ridge) * c])
        solved = torch.linalg.lstsq(stacked.T, wanted.unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(new.lora_B[i].double() @ T, solved, rtol=1e-4, atol=1e-4)


def test_refit_changes_nothing_where_nothing_is_masked() -> None:
    named = tiny.tensors(FP32)
    patch = patch_for()
    untouched = refit(patch, named)
    assert untouched.weights == ()
    assert all(tiny.same_bits(untouched.patch.tensors[key], t) for key, t in patch.tensors.items())
    named[f"{tiny.MODULES[1]}.weight"][3, 5] = 0
    made = refit(patch, named)
    assert [weight.source for weight in made.weights] == [tiny.MODULES[1]]
    for new, old in zip(linear(made.patch), linear(patch), strict=True):
        same = [torch.equal(a, b) for a, b in zip(new.lora_B, old.lora_B, strict=True)]
        assert same == [old.module != tiny.MODULES[1] or i != 3 for i in range(len(same))]


@given(seed=st.integers(0, 2**32), share=st.floats(0, 1), rank=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_rows_that_keep_little_stay_bounded(seed: int, share: float, rank: int) -> None:
    """Singular systems, rows of zeros, an A of lower rank: no error grows, no row by more than the ridge allows."""
    torch.manual_seed(seed)
    named = {f"{m}.weight": torch.randn(12, 16) * (torch.rand(12, 16) >= share) for m in tiny.MODULES[:1]}
    tensors = tiny.factors(tiny.MODULES[:1], 12, 16, rank)
    lora_A = tensors[f"base_model.model.{tiny.MODULES[0]}.lora_A.weight"]
    lora_A[-1] = lora_A[0]
    patch = Patch.from_tensors(tensors, {**tiny.ADAPTER, "r": rank})
    made = refit(patch, named)
    for weight in made.weights:
        assert weight.after <= weight.before * (1 + 1e-6) + 1e-4
    [new], [old] = linear(made.patch), linear(patch)
    rows = [delta(entry).norm(dim=1) for entry in (new, old)]
    assert bool((rows[0] <= rows[1] * (0.5 / math.sqrt(1e-4) + 2) + 1e-4).all())


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_refitted_patches_on_whole_models(family: str, tmp_path: Path) -> None:
    """Also where the layer stores its weight transposed (GPT-2), whose pattern then runs down the columns."""
    model = FAMILIES[family].build()
    patch = Patch.load(families.save_adapter(model, FAMILIES[family].config(), tmp_path))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and (".layers." in name or ".h." in name):
                parameter.mul_(torch.rand(parameter.shape) < 0.6)
    before = families.state(model)
    made = refit(patch, model)
    assert len(made.weights) == len(linear(patch))
    assert all(weight.after < 0.5 * weight.before for weight in made.weights)
    named = families.state(model)
    portllm.apply(named, made.patch, keep_zeros=True)
    changed = families.changed(before, named)
    assert len(changed) == len(made.weights)
    for name in changed:
        assert bool((named[name][before[name] == 0] == 0).all())


def test_refit_refuses_what_it_cannot_fit(tmp_path: Path) -> None:
    config = FAMILIES["llama"].config(use_dora=True)
    model = families.llama()
    dora = Patch.load(families.save_adapter(model, config, tmp_path / "dora"))
    with pytest.raises(PlanError, match=r"_proj cannot be refitted to the zeros of .*DoRA's magnitudes"):
        refit(dora, sparse_model(families.state(model)))
    assert refit(dora, model).weights == ()
    experts = families.mixtral()
    stacked = Patch.load(families.save_adapter(experts, FAMILIES["mixtral"].config(), tmp_path / "experts"))
    with torch.no_grad():
        experts.model.layers[0].mlp.experts.down_proj[1, 2, 3] = 0
    with pytest.raises(PlanError, match=r"experts\.down_proj cannot be refitted.*stacked experts"):
        refit(stacked, experts)
    for ridge in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(PortllmError, match="must be positive"):
            refit(patch_for(), tiny.tensors(), ridge=ridge)


def test_biases_and_embeddings_stay_out_of_it(tmp_path: Path) -> None:
    """Zeros in a bias are no mask, nor is a row of padding in an embedding."""
    model = families.bert()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[0] = 0
        for layer in model.bert.encoder.layer:
            layer.attention.self.query.bias.zero_()
    for i, changes in enumerate(({"lora_bias": True}, {"target_modules": ["word_embeddings", "query"]})):
        config = FAMILIES["bert"].config(**changes)
        patch = Patch.load(families.save_adapter(model, config, tmp_path / str(i)))
        assert refit(patch, model).weights == ()


# -- torch's compressed weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_patched_weights_compress_again(dtype: torch.dtype) -> None:
    """torch's own conversion (the part of it that runs without CUDA) takes the result, and loses nothing."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    named = sparse_model({f"{m}.weight": torch.randn(64, 64).to(dtype) for m in tiny.MODULES})
    before = {name: t.clone() for name, t in named.items()}
    portllm.apply(named, patch_for(64, 64), keep_zeros=True)
    for name, weight in named.items():
        assert not torch.equal(weight, before[name])
        assert pattern_of(weight) == "2:4"
        packed, places = sparse_semi_structured_from_dense_cutlass(weight)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, places), weight)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_compressed_weights_are_refused_by_name() -> None:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    dense = pruned_to(torch.randn(64, 64), 2, 4).to(BF16)
    model = nn.ModuleDict({"q_proj": nn.Linear(64, 64, bias=False), "v_proj": nn.Linear(64, 64, bias=False)})
    for layer in model.values():
        packed, places = sparse_semi_structured_from_dense_cutlass(dense)
        compressed = torch.sparse.SparseSemiStructuredTensorCUTLASS(dense.shape, packed, places, None, None, None)
        layer.weight = nn.Parameter(compressed, requires_grad=False)
    patch = Patch.from_tensors(tiny.factors(["q_proj", "v_proj"], 64, 64), tiny.ADAPTER)
    with pytest.raises(
        PlanError, match=r"q_proj\.weight is a SparseSemiStructured.*to_dense\(\), with keep_zeros=True"
    ):
        portllm.apply(model, patch)


# -- the command -----------------------------------------------------------------------------------------------------


def test_check_says_what_zeros_lose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter")
    dense = tiny.write_model(tmp_path / "dense")
    sparse = tiny.write_model(tmp_path / "sparse", sparse_model(tiny.tensors()))
    assert cli.main(["check", str(adapter), str(dense), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparse"] == []
    assert cli.main(["check", str(adapter), str(dense)]) == 0
    assert "sparse" not in capsys.readouterr().out
    assert cli.main(["check", str(adapter), str(sparse), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["sparse"]
    assert [one["source"] for one in facts] == list(tiny.MODULES)
    assert {one["pattern"] for one in facts} == {"2:4"}
    assert all(0.1 < one["lost"] < 0.9 for one in facts)
    assert cli.main(["check", str(adapter), str(sparse)]) == 0
    assert "4 weights are sparse (2:4): where zeros stay zeros" in capsys.readouterr().out


# -- applying --------------------------------------------------------------------------------------------------------


def test_apply_says_what_zeros_lose(tmp_path: Path) -> None:
    """In memory and on disk: the same bits, and the same line."""
    named = sparse_model(tiny.tensors())
    model, adapter = tiny.write_model(tmp_path / "model", named), tiny.write_adapter(tmp_path / "adapter")
    report = portllm.apply_checkpoint(model, adapter, tmp_path / "out", keep_zeros=True)
    before = {name: t.clone() for name, t in named.items()}
    done = portllm.apply(named, adapter, keep_zeros=True)
    lines = [[w for w in warnings if "zeros" in w] for warnings in (done.plan.warnings, report.warnings)]
    assert lines[0] == lines[1]
    assert lines[0][0].startswith("4 weights are sparse (2:4): where zeros stay zeros")
    written = tiny.read_model(tmp_path / "out")
    assert all(tiny.same_bits(written[name], t) for name, t in named.items())
    assert families.changed(before, named) == {f"{module}.weight" for module in tiny.MODULES}
    assert all(pattern_of(named[f"{module}.weight"]) == "2:4" for module in tiny.MODULES)
    assert not any("zeros" in w for w in portllm.apply(before, adapter).plan.warnings)


def test_zeros_of_a_bias_are_no_mask(tmp_path: Path) -> None:
    model = families.bert()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.query.bias.zero_()
    patch = Patch.load(families.save_adapter(model, FAMILIES["bert"].config(lora_bias=True), tmp_path))
    portllm.apply(model, patch, keep_zeros=True)
    assert all(bool(layer.attention.self.query.bias.all()) for layer in model.bert.encoder.layer)


def test_replaced_weights_keep_no_zeros(tmp_path: Path) -> None:
    model = families.llama()
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.mlp.up_proj"]}
    patch = Patch.load(families.save_adapter(model, FAMILIES["llama"].config(**settings), tmp_path))
    named = sparse_model(families.state(model))
    warnings = portllm.apply(named, patch, keep_zeros=True).plan.warnings
    assert any("layers.0.mlp.up_proj.weight is sparse, but" in w for w in warnings)
