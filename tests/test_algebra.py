"""Algebra of patches: its laws on random patches, PEFT's reading of the results, and all that does not add up."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import portllm
from portllm import Combined, Patch, PatchError, PlanError, UnsupportedPatchError, cli, combine, reference
from portllm.fingerprint import METADATA_KEY, Fingerprint
from portllm.lowrank import leading_blocks, nth_magnitude

from . import families
from .families import FAMILIES, assert_close, changed, peft_merged, save_adapter, state
from .tiny import same_bits, snapshot, write_adapter

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

SHAPES = {"q": (24, 16), "k": (1, 63), "v": (63, 1), "o": (63, 65), "d": (1, 1)}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q": 1, "v|o": 7}, "alpha_pattern": {r"layers\.0\.k": 0.3, "d": -5}},
]
SPARSE: list[dict[str, Any]] = [
    {"method": "ties", "density": 0.3},
    {"method": "ties", "density": 0.5, "majority_sign": "frequency"},
    {"method": "dare", "density": 0.5},
    {"method": "dare_ties", "density": 0.4},
]


def make(
    name: str = "p", rank: int = 4, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES, **settings: Any
) -> Patch:
    """A patch with random factors on one module of each shape."""
    config = portllm.patch.AdapterConfig.from_dict(
        {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": sorted(shapes), **settings}
    )
    tensors = {}
    for module, (rows, columns) in shapes.items():
        r = config.rank(f"layers.0.{module}")
        tensors[f"base_model.model.layers.0.{module}.lora_A.weight"] = torch.randn(r, columns).to(dtype)
        tensors[f"base_model.model.layers.0.{module}.lora_B.weight"] = torch.randn(rows, r).to(dtype)
    return Patch.from_tensors(tensors, config, name=name)


def deltas(patch: Patch, part: Callable[[Tensor], Tensor] = lambda factor: factor) -> dict[str, Tensor]:
    """Each module's delta, fp64; with ``part=torch.abs`` the sum of its products' magnitudes."""
    found = {}
    for entry in patch.entries:
        assert isinstance(entry, portllm.patch.LoraEntry)
        lora_A, lora_B = part(entry.lora_A.double().flatten(1)), part(entry.lora_B.double())
        found[entry.module] = entry.scaling * (lora_B @ lora_A)
    return found


def total(*pairs: tuple[Patch, float]) -> dict[str, Tensor]:
    """The weighted sum of the patches' deltas."""
    summed: dict[str, Tensor] = {}
    for patch, weight in pairs:
        for module, delta in deltas(patch).items():
            summed[module] = summed.get(module, 0) + weight * delta
    return summed


def assert_adds(patch: Patch, expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    """The patch's deltas are these, to a share of what their products add up to: where they cancel, rounding stays."""
    found, sizes = deltas(patch), deltas(patch, torch.abs)
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        assert float((found[module] - delta).norm()) <= tolerance * float(sizes[module].norm()) + 1e-30, module


# -- laws ------------------------------------------------------------------------------------------------------------

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from(DTYPES), st.floats(-4, 4), st.booleans()), min_size=1, max_size=4
    ),
    st.randoms(use_true_random=False),
)
def test_the_sum_is_the_sum(shape: tuple[int, int], parts: list[Any], random: Any) -> None:
    torch.manual_seed(random.randrange(2**31))
    pairs = [
        (make(str(i), rank, dtype, {"q": shape}, use_rslora=rslora), weight)
        for i, (rank, dtype, weight, rslora) in enumerate(parts)
    ]
    expected = total(*pairs)["layers.0.q"]
    # Where terms cancel, the rounding of each stays.
    size = 1e-6 * sum(abs(weight) * float(deltas(patch)["layers.0.q"].norm()) for patch, weight in pairs) + 1e-30
    shuffled = random.sample(pairs, len(pairs))
    for made in (combine(pairs), combine(shuffled), combine(pairs, method="svd")):
        assert float((deltas(made)["layers.0.q"] - expected).norm()) <= size
    assert combine(pairs).ranks == (sum(rank for rank, *_ in parts),)
    assert combine(pairs, method="svd").ranks[0] <= min(*shape, sum(rank for rank, *_ in parts))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("method", ["concat", "svd"])
def test_settings_of_rank_and_scaling_are_folded_in(settings: dict[str, Any], method: Any) -> None:
    p, q, r = make("p", 3), make("q", 5, **settings), make("r", 2, torch.bfloat16, {"q": (24, 16), "x": (2, 3)})
    made = combine([(p, 0.7), (q, -0.4), (r, 3)], method=method)
    assert_adds(made, total((p, 0.7), (q, -0.4), (r, 3)))
    if method == "concat":
        assert [made.config.rank(f"layers.0.{m}") for m in ("q", "x")] == [5 + q.config.rank("layers.0.q"), 2]
    again = Patch.from_tensors(made.tensors, json.loads(json.dumps(made.config.raw)))
    assert_adds(again, deltas(made), 0)


def test_patterns_name_one_module_each() -> None:
    """Neither a longer name that ends the same, nor one that a dot would match."""
    names = ("q", "x.layers.0.q", "xlayers.0.q")
    p, q = make("p", 3, shapes=dict.fromkeys(names, (24, 16))), make("q", 2)
    made = combine([p, (q, 2)])
    assert_adds(made, total((p, 1), (q, 2)))
    assert [made.config.rank(f"layers.0.{name}") for name in (*names, "k")] == [5, 3, 3, 2]


def test_parameters_that_are_trained_make_no_graph() -> None:
    p = make()
    trained = Patch.from_tensors({key: nn.Parameter(tensor) for key, tensor in p.tensors.items()}, p.config)
    for made in (combine([trained, p]), portllm.truncate(trained, rank=1), portllm.cast(trained, torch.float64)):
        assert not any(tensor.requires_grad for tensor in made.tensors.values())


def test_weights_are_linear() -> None:
    p, q = make("p"), make("q", 3)
    assert_adds(combine([(combine([(p, 2), (q, 3)]), 0.5), (q, -1)]), total((p, 1), (q, 0.5)))
    assert_adds(combine([(p, 0.25), (p, 0.5)], method="svd"), total((p, 0.75)))
    assert all(not delta.any() for delta in deltas(combine([(p, 0), (q, 0)])).values())
    assert combine([(p, 0), (q, 0)], method="svd").ranks == (1,)


def test_a_patch_and_its_negative_are_nothing() -> None:
    p = make()
    weights = {f"layers.0.{m}.weight": torch.randn(shape) for m, shape in SHAPES.items()}
    for method in ("concat", "svd"):
        patched = {name: tensor.clone() for name, tensor in weights.items()}
        portllm.apply(patched, combine([p, portllm.negate(p)], method=method))
        assert_close(patched, weights, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_patch_of_several_is_several_applied(dtype: torch.dtype) -> None:
    p, q = make("p", 4, dtype), make("q", 3, dtype, {"q": (24, 16)}, use_rslora=True)
    weights = {f"layers.0.{m}.weight": torch.randn(shape) for m, shape in SHAPES.items()}
    one, together, after = (
        {name: tensor.clone() for name, tensor in weights.items()},
        {name: tensor.clone() for name, tensor in weights.items()},
        {name: tensor.clone() for name, tensor in weights.items()},
    )
    portllm.apply(one, combine([(p, 0.7), (q, -1.5)]))
    portllm.apply(together, [(p, 0.7), (q, -1.5)])
    portllm.apply(after, p, 0.7)
    portllm.apply(after, q, -1.5)
    assert_close(one, together, 1e-5)
    assert_close(one, after, 1e-5)


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        ((1, 1), torch.bfloat16),
        ((0.7, -0.7), torch.float16),
        ((-2, 0.5), torch.bfloat16),  # a quarter of the smallest random numbers would not be exact in float16
    ],
    ids=str,
)
def test_narrow_factors_stay_as_they_are_where_that_is_exact(weights: Any, dtype: torch.dtype) -> None:
    pairs = [(make("p", 2, dtype), weights[0]), (make("q", 3, dtype, alpha_pattern={"q": 1}, lora_alpha=9), weights[1])]
    made = combine(pairs)
    assert {tensor.dtype for key, tensor in made.tensors.items() if ".q." not in key} == {dtype}
    assert {tensor.dtype for key, tensor in made.tensors.items() if ".q." in key} == {torch.float32}
    assert_adds(made, total(*pairs), 1e-7)
    key = "base_model.model.layers.0.o.lora_A.weight"
    assert same_bits(made.tensors[key], torch.cat([patch.tensors[key] for patch, _ in pairs]))
    wide = combine([(pairs[0][0], 0.3), (pairs[1][0], 0.7)])
    # A module whose few weighted numbers all happen to be exact may stay narrow: only those with many are sure.
    many = [tensor for key, tensor in wide.tensors.items() if any(f".{module}." in key for module in "qvo")]
    assert {tensor.dtype for tensor in many} == {torch.float32}
    mixed = combine([make("p", 2, torch.bfloat16), make("q", 2, torch.float16)])
    assert {tensor.dtype for tensor in mixed.tensors.values()} == {torch.float32}


def test_scaling_touches_no_tensor() -> None:
    p = make(dtype=torch.bfloat16, alpha_pattern={"q": 2.5}, use_rslora=True)
    scaled = portllm.scale(p, 0.3)
    assert_adds(scaled, total((p, 0.3)), 1e-15)
    assert_adds(portllm.scale(scaled, -7), deltas(portllm.scale(p, -2.1)), 1e-15)
    assert_adds(combine([(p, 0.3)]), deltas(scaled), 0)
    assert all(same_bits(scaled.tensors[key], tensor) for key, tensor in p.tensors.items())
    twice = portllm.negate(portllm.negate(p))
    assert_adds(twice, deltas(p), 0)
    assert (twice.config.lora_alpha, twice.config.alpha_pattern) == (p.config.lora_alpha, p.config.alpha_pattern)
    assert portllm.scale(p, 1) is p
    assert_adds(portllm.scale(p, 0), total((p, 0)))


def test_scaling_keeps_what_the_file_says(tmp_path: Path) -> None:
    """Also settings that its user chose to ignore, and experts, which cannot be combined."""
    tensors = {
        "base_model.model.layers.0.experts.lora_A.weight": torch.randn(6, 4),
        "base_model.model.layers.0.experts.lora_B.weight": torch.randn(5, 6),
    }
    write_adapter(tmp_path / "a", tensors, r=2, target_modules=[], target_parameters=["experts.down"], novelty=1)
    p = Patch.load(tmp_path / "a", ignore_settings=("novelty",))
    assert combine([(p, -2)]).config.raw == p.config.raw | {"lora_alpha": -12, "alpha_pattern": {}}
    weights = {"layers.0.experts.down": torch.zeros(3, 5, 4)}
    portllm.apply(weights, p)
    portllm.apply(weights, portllm.scale(p, -1))
    assert float(weights["layers.0.experts.down"].abs().max()) < 1e-5


def test_casts() -> None:
    p = make(dtype=torch.bfloat16)
    for wide in (torch.float32, torch.float64):
        back = portllm.cast(portllm.cast(p, wide), torch.bfloat16)
        assert all(same_bits(back.tensors[key], tensor) for key, tensor in p.tensors.items())
        assert_adds(portllm.cast(p, wide), deltas(p), 0)
    assert {t.dtype for t in combine([(p, 0.5), (p, 0.3)], dtype=torch.float16).tensors.values()} == {torch.float16}
    large = Patch.from_tensors({key: tensor * 1e6 for key, tensor in p.tensors.items()}, p.config, name="large")
    with pytest.raises(PatchError, match=r"large: tensor .*lora_[AB].weight overflows torch.float16; bfloat16 reaches"):
        portllm.cast(large, torch.float16)
    with pytest.raises(PatchError, match=r"dtype torch.int8 must be"):
        portllm.cast(p, torch.int8)


# -- the best of a lower rank ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5, 100])
def test_a_truncated_patch_is_the_best_there_is(rank: int) -> None:
    p = combine([make("p", 6), (make("q", 5, torch.float16, use_rslora=True), 0.3)])
    cut = portllm.truncate(p, rank=rank)
    record = Combined.from_patch(cut)
    assert record is not None
    assert record.method == "svd"
    for module, delta in deltas(p).items():
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        found = deltas(cut)[module]
        assert float((found - best).norm()) <= 1e-5 * float(delta.norm())
        lost = float((delta - best).norm() / delta.norm())
        assert record.errors[module] == pytest.approx(lost, abs=1e-6)
        assert float((delta - found).norm() / delta.norm()) == pytest.approx(lost, abs=1e-6)
        assert cut.config.rank(module) <= min(rank, *delta.shape)
    for entry in cut.entries:
        assert isinstance(entry, portllm.patch.LoraEntry)
        torch.testing.assert_close(entry.lora_A.norm(dim=1), entry.lora_B.norm(dim=0), atol=1e-4, rtol=1e-4)
    again = portllm.truncate(cut, rank=rank)
    assert_adds(again, deltas(cut))
    assert again.config.raw == cut.config.raw


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_energy_keeps_the_smallest_rank_that_has_it(energy: float) -> None:
    p = make(rank=8, shapes={"q": (63, 65), "v": (9, 4)})
    cut = portllm.truncate(p, energy=energy)
    for module, delta in deltas(p).items():
        squares = torch.linalg.svdvals(delta)[:8].square()
        shares = squares.cumsum(0) / squares.sum()
        assert cut.config.rank(module) == int((shares < energy - 1e-9).sum()) + 1
    assert max(portllm.truncate(p, energy=energy, rank=2).ranks) <= 2


def test_rank_that_is_not_there_is_dropped() -> None:
    p = make(rank=3, shapes={"q": (63, 65)})
    assert combine([(p, 0.3), (p, 0.5)], method="svd").ranks == (3,)
    assert combine([(p, 0.3), (p, 0.5)]).ranks == (6,)


def test_no_delta_is_formed() -> None:
    """It would have 160 GB."""
    p, q = (make(name, 2, shapes={"q": (200_000, 200_000)}) for name in "pq")
    assert combine([(p, 0.5), q], method="svd", rank=3).ranks == (3,)


# -- TIES and DARE ---------------------------------------------------------------------------------------------------


def dense(pairs: list[tuple[Patch, float]], module: str, density: float, sign: str) -> Tensor:
    """TIES-Merging by its definition, on whole matrices in fp64."""
    kept = []
    for patch, weight in pairs:
        delta = weight * deltas(patch)[module]
        keep = delta.abs().flatten().topk(int(density * delta.numel())).indices
        kept.append(torch.zeros(delta.numel(), dtype=torch.float64).index_put((keep,), delta.flatten()[keep]))
    result = torch.zeros_like(kept[0])
    for i in range(len(result)):
        column = [float(each[i]) for each in kept]
        mass = sum(column) if sign == "total" else sum(math.copysign(1, x) for x in column if x)
        agree = [x for x in column if x * mass > 0]
        result[i] = sum(agree) / len(agree) if agree else 0
    return result.reshape(delta.shape)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.8, 1.0])
@pytest.mark.parametrize("block", [1 << 21, 100])
def test_ties_is_what_the_paper_defines(sign: Any, density: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", block)
    shapes = {"q": (24, 16), "k": (10, 33)}
    pairs = [(make("p", 4, shapes=shapes), 1.0), (make("q", 3, shapes=shapes), -0.6), (make("r", 2, shapes=shapes), 2)]
    made = combine(pairs, method="ties", density=density, majority_sign=sign, rank=1000)
    expected = {module: dense(pairs, module, density, sign) for module in deltas(pairs[0][0])}
    assert_adds(made, expected, 2e-6)


def test_ties_and_dare_are_as_in_peft_on_the_deltas(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(16, 24, bias=False))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    paths = [save_adapter(base, config, tmp_path / name) for name in "ab"]
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), paths[0], adapter_name="a")
    model.load_adapter(paths[1], adapter_name="b")
    for kind, ours in (("ties_svd", {"method": "ties", "density": 0.4}), ("dare_linear_svd", {"method": "dare"})):
        density = ours.setdefault("density", 1.0 - 1e-9)
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], kind, kind, svd_rank=16, density=density)
        theirs = model.base_model.model[0].get_delta_weight(kind)
        made = combine(paths, rank=16, **ours)
        torch.testing.assert_close(deltas(made)["0"].float(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dare_drops_by_its_seed(method: Any) -> None:
    p, q = make("p", 3, shapes={"q": (40, 50)}), make("q", 3, shapes={"q": (40, 50)})
    options: dict[str, Any] = {"method": method, "density": 0.3, "rank": 40}
    one, same, other = (combine([(p, 0.5), q], seed=seed, **options) for seed in (7, 7, 8))
    assert all(same_bits(one.tensors[key], tensor) for key, tensor in same.tensors.items())
    assert not torch.equal(deltas(one)["layers.0.q"], deltas(other)["layers.0.q"])


def test_dare_drops_the_share_and_rescales_the_rest() -> None:
    p = make("p", 3, shapes={"q": (40, 50)})
    before = deltas(p)["layers.0.q"]
    after = deltas(combine([p], method="dare", density=0.3, rank=40))["layers.0.q"]
    assert float((after.abs() > before.abs()).double().mean()) == pytest.approx(0.3, abs=0.06)
    assert float(torch.minimum(after.abs(), (after - before / 0.3).abs()).max()) < 1e-4
    mean = sum(deltas(combine([p], method="dare", density=0.7, rank=40, seed=i))["layers.0.q"] for i in range(30)) / 30
    assert float((mean - before).norm() / before.norm()) < 0.2
    two = combine([p, (p, -1)], method="dare", density=0.3, rank=40)
    assert float(deltas(two)["layers.0.q"].norm()) > 0.1  # each patch has elements of its own


@pytest.mark.parametrize("options", SPARSE, ids=str)
def test_sparse_methods_turn_with_their_sign_and_size(options: dict[str, Any]) -> None:
    p, q = make("p"), make("q", 3)
    made = combine([(p, 1), (q, -0.5)], rank=3, **options)
    turned = combine([(p, -3), (q, 1.5)], rank=3, **options)
    assert_adds(turned, {module: -3 * delta for module, delta in deltas(made).items()}, 1e-3)
    if options["method"] == "ties":
        assert_adds(combine([(q, -0.5), (p, 1)], rank=3, **options), deltas(made), 1e-3)
    record = Combined.from_patch(made)
    assert record is not None
    assert record.errors.keys() == deltas(made).keys()
    assert max(made.ranks) <= 3


@pytest.mark.parametrize("shape", [(1, 63), (63, 1), (1, 1), (30, 200), (200, 30)], ids=str)
def test_the_leading_part_is_nearly_the_best(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    random = torch.Generator().manual_seed(1)
    found = leading_blocks(lambda: iter(matrix.split(7)), shape[1], min(5, *shape), None, random)
    S = torch.linalg.svdvals(matrix.double())
    best = float(S[5:].norm() / S.norm())
    real = float((found.lora_B @ found.lora_A - matrix).norm() / S.norm())
    assert found.error == pytest.approx(real, abs=1e-6)
    assert real <= best * 1.01 + 1e-6


def test_noise_too_is_caught_where_it_is_largest() -> None:
    """The hardest spectrum: no gap at all. One pass would catch 80 % of what can be had, four catch 97 %."""
    matrix = torch.randn(300, 200)
    found = leading_blocks(lambda: iter(matrix.split(70)), 200, 5, None, torch.Generator().manual_seed(1))
    best = torch.linalg.svdvals(matrix.double())[:5].square().sum()
    assert float((found.lora_B @ found.lora_A).square().sum() / best) > 0.94


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60), st.data())
def test_the_nth_magnitude(values: list[float], data: Any) -> None:
    n = data.draw(st.integers(1, len(values)))
    matrix = torch.tensor(values, dtype=torch.float32).unsqueeze(1)
    assert nth_magnitude(lambda: iter(matrix.split(7)), n) == sorted(map(abs, values), reverse=True)[n - 1]


# -- PEFT reads the result -------------------------------------------------------------------------------------------


def check_peft(base: nn.Module, pairs: list[tuple[Path, float]], out: Path, **options: Any) -> Patch:
    """PEFT loads the combined patch and merges it to the base plus the weighted deltas of its own merges."""
    made = combine(pairs, **options)
    made.save(out)
    before = state(copy.deepcopy(base).double())
    expected = {name: tensor.clone() for name, tensor in before.items()}
    for path, weight in pairs:
        for name, tensor in state(peft_merged(base, path, dtype=torch.float64)).items():
            expected[name] += weight * (tensor - before[name])
    assert changed(before, expected)
    assert_close(state(peft_merged(base, out, dtype=torch.float64)), expected, 1e-5)
    live = copy.deepcopy(base)
    portllm.apply(live, out)
    assert_close(state(live), expected, 1e-5)
    return made


@pytest.mark.parametrize("method", ["concat", "svd"])
@pytest.mark.parametrize(
    ("one", "other", "targets"),
    [
        ({}, {"r": 3, "use_rslora": True}, None),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["k_proj", "up_proj"]}, ["k_proj", "q_proj", "up_proj"]),
        (
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.self_attn.k_proj": 11}},
            {"target_modules": ["v_proj", "embed_tokens", "lm_head"]},
            None,
        ),
        (
            {"target_modules": r".*\.1\..*q_proj"},
            {"target_modules": ["v_proj"], "layers_to_transform": [0]},
            ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj"],
        ),
        ({"layers_to_transform": [1]}, {"layers_to_transform": [1]}, None),
        ({}, {"r": 3, "lora_alpha": 1, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]}, None),
    ],
    ids=range(6),
)
def test_peft_loads_and_merges_the_result(one: Any, other: Any, targets: Any, method: str, tmp_path: Path) -> None:
    base, family = families.llama(), FAMILIES["llama"]
    save = {"save_embedding_layers": False}
    a = save_adapter(base, family.config(**one), tmp_path / "a", **save)
    b = save_adapter(base, family.config(**other), tmp_path / "b", **save)
    made = check_peft(base, [(a, 0.7), (b, -0.4)], tmp_path / "out", method=method)
    assert targets is None or made.config.raw["target_modules"] == targets


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
def test_other_families(family: str, tmp_path: Path) -> None:
    chosen = FAMILIES[family]
    base = chosen.build()
    a = save_adapter(base, chosen.config(task_type=None), tmp_path / "a")
    b = save_adapter(base, chosen.config(task_type=None, r=2), tmp_path / "b")
    check_peft(base, [(a, 1), (b, 0.5)], tmp_path / "out", method="svd")


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.point = nn.Conv1d(3, 5, 3), nn.Conv2d(4, 6, (3, 2)), nn.Conv2d(4, 7, 1)
        self.embed = nn.Embedding(10, 6)


@pytest.mark.parametrize("method", ["concat", "svd"])
def test_convolutions_and_embeddings(method: str, tmp_path: Path) -> None:
    base = Convolutions()
    modules = ["one", "two", "point", "embed"]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=modules, init_lora_weights=False)
    a = save_adapter(base, config, tmp_path / "a")
    b = save_adapter(base, peft.LoraConfig(r=3, target_modules=modules[:3]), tmp_path / "b")
    check_peft(base, [(a, 0.7), (b, 2)], tmp_path / "out", method=method)


@pytest.mark.parametrize("options", [{}, {"method": "svd"}, *SPARSE], ids=str)
def test_lora_bias_adds_up_too(options: dict[str, Any], tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], lora_bias=True, init_lora_weights=False)
    a, b = (save_adapter(base, config, tmp_path / name) for name in "ab")
    if options.get("method") in (None, "svd"):
        check_peft(base, [(a, 0.7), (b, 2)], tmp_path / "out", **options)
        return
    made = combine([a, b], rank=7, **options)
    key = "base_model.model.0.lora_B.bias"
    biases = [4 * Patch.load(path).tensors[key] for path in (a, b)]
    if options["method"] == "ties" and options.get("majority_sign", "total") == "total":
        kept = [x * (x.abs() >= x.abs().sort().values[-int(options["density"] * 7)]) for x in biases]
        elected = sum(kept).sign()  # type: ignore[union-attr]
        agree = [torch.where(x.sign() == elected, x, 0) for x in kept]
        expected = sum(agree) / sum((x != 0).int() for x in agree).clamp(min=1)  # type: ignore[union-attr]
        torch.testing.assert_close(made.tensors[key], expected)
    made.save(tmp_path / "out")
    peft_merged(base, tmp_path / "out")


def test_ensure_weight_tying_keeps_its_twins(tmp_path: Path) -> None:
    """The same factors stand under both names of a tied weight, and must stay the same in every bit."""
    base, family = FAMILIES["qwen3"].build(), FAMILIES["qwen3"]
    config = family.config(target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True)
    for name in "ab":
        model = families.train(base, config)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    pairs = [(tmp_path / "a", 0.7), (tmp_path / "b", -0.2)]
    together = copy.deepcopy(base)
    portllm.apply(together, pairs)
    for options in ({}, {"method": "svd"}, {"method": "dare", "density": 0.5}):
        live = copy.deepcopy(base)
        portllm.apply(live, combine(pairs, **options))
        if options.get("method") != "dare":
            assert_close(state(live), state(together), 1e-5)


# -- tensors that replace --------------------------------------------------------------------------------------------


def test_what_one_patch_replaces_is_taken_over(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    base = family.build()
    a = save_adapter(base, family.config(target_modules=["query"], modules_to_save=["classifier"]), tmp_path / "a")
    b = save_adapter(base, family.config(target_modules=["query", "key"], task_type=None), tmp_path / "b")
    made = check_peft(base, [(a, 1), (b, 0.5)], tmp_path / "out")
    assert made.config.modules_to_save == ("classifier", "score")  # PEFT adds the second by itself
    check_peft(base, [(a, 1)], tmp_path / "cut", method="svd")
    with pytest.raises(
        UnsupportedPatchError, match=r"a: classifier.(weight|bias) replaces .*\(modules_to_save\).* 0.5"
    ):
        combine([(a, 0.5), b])
    c = save_adapter(base, family.config(target_modules=["query"], modules_to_save=["classifier"]), tmp_path / "c")
    with pytest.raises(UnsupportedPatchError, match=r"a and .*c both replace classifier.*different values; keep one"):
        combine([a, c])
    d = save_adapter(base, family.config(target_modules=["classifier"], task_type=None), tmp_path / "d")
    with pytest.raises(UnsupportedPatchError, match=r"a replaces classifier.* but .*d has factors for it; apply"):
        combine([a, d])
    settings = {"target_modules": ["value"], "modules_to_save": ["pooler"], "task_type": None}
    e = save_adapter(base, family.config(**settings), tmp_path / "e")
    check_peft(base, [(a, 1), (e, 1)], tmp_path / "both")


def test_biases_vocabularies_and_tokens(tmp_path: Path) -> None:
    base, family = families.llama(), FAMILIES["llama"]
    a = save_adapter(base, family.config(target_modules=["embed_tokens"]), tmp_path / "a")
    b = save_adapter(base, family.config(target_modules=["embed_tokens"], r=2), tmp_path / "b")
    assert len(portllm.patch.replaced_tensors(Patch.load(a))) == 1
    check_peft(base, [(a, 1), (b, 1)], tmp_path / "vocabulary")
    tokens = {"trainable_token_indices": {"embed_tokens": [3, 5]}}
    c = save_adapter(
        base, family.config(target_modules=["q_proj"], **tokens), tmp_path / "c", save_embedding_layers=False
    )
    d = save_adapter(base, family.config(target_modules=["q_proj"], use_rslora=True), tmp_path / "d")
    check_peft(base, [(c, 1), (d, 0.3)], tmp_path / "tokens")
    with pytest.raises(UnsupportedPatchError, match=r"both (replace|have trainable_token_indices)"):
        combine([c, c])
    with pytest.raises(UnsupportedPatchError, match=r"c replaces model.embed_tokens.weight, but .*a has factors"):
        combine([c, a])
    bert = FAMILIES["bert"]
    base = bert.build()
    e = save_adapter(base, bert.config(target_modules=["query"], bias="all", task_type=None), tmp_path / "e")
    f = save_adapter(base, bert.config(target_modules=["query"], task_type=None), tmp_path / "f")
    check_peft(base, [(e, 1), (f, 0.3)], tmp_path / "biases")


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sum"}, "method='sum' must be one of concat, svd, ties, dare, dare_ties"),
        ({"method": "svd", "rank": 0}, "rank=0 must be a positive integer"),
        ({"method": "svd", "rank": 2.0}, "rank=2.0 must be a positive integer"),
        ({"method": "svd", "rank": True}, "rank=True must be a positive integer"),
        ({"method": "svd", "energy": 0}, r"energy=0 must be in \(0, 1\]"),
        ({"method": "svd", "energy": math.nan}, r"energy=nan must be in \(0, 1\]"),
        ({"method": "ties", "density": 1.5}, r"density=1.5 must be in \(0, 1\]"),
        ({"method": "dare", "density": 0.0}, r"density=0.0 must be in \(0, 1\]"),
        ({"method": "ties"}, "needs density"),
        ({"method": "svd", "density": 0.5}, "density is for 'ties' and 'dare'"),
        ({"rank": 3}, "concat keeps every rank"),
        ({"energy": 0.5}, "concat keeps every rank"),
        ({"method": "ties", "density": 0.5, "majority_sign": "most"}, "majority_sign='most' must be"),
        ({"dtype": torch.int8}, "dtype torch.int8 must be"),
    ],
    ids=str,
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchError, match=message):
        combine([make("p"), make("q")], **options)


def test_weights_and_lists_that_are_none() -> None:
    for weight in (math.nan, math.inf):
        with pytest.raises(PlanError, match=r"p: the strength .* must be finite"):
            combine([(make("p"), weight), make("q")])
        with pytest.raises(PlanError, match="must be finite"):
            portllm.scale(make("p"), weight)
    with pytest.raises(PlanError, match="no patch was given"):
        combine([])
    with pytest.raises(PatchError, match="say what to truncate to"):
        portllm.truncate(make())
    with pytest.raises(PatchError, match=r"module layers.0.q: scaling .* overflows fp32"):
        combine([(make("p"), 1e300), make("q")])
    with pytest.raises(PatchError, match=r"p: alpha 6 times 1e\+300 overflows fp32"):
        portllm.scale(make("p"), 1e300)


def test_shapes_and_kinds_that_conflict() -> None:
    with pytest.raises(PatchError, match=r"layers.0.q is linear \[24, 16\] in p, but linear \[16, 24\] in q; are they"):
        combine([make("p"), make("q", shapes={"q": (16, 24)})])
    tensors = {
        "base_model.model.layers.0.q.lora_embedding_A": torch.randn(4, 24),
        "base_model.model.layers.0.q.lora_embedding_B": torch.randn(16, 4),
    }
    embedding = Patch.from_tensors(tensors, {"peft_type": "LORA", "r": 4, "target_modules": ["q"]}, name="e")
    with pytest.raises(PatchError, match=r"is linear \[24, 16\] in p, but embedding \[24, 16\] in e"):
        combine([make("p"), embedding])
    with pytest.raises(PatchError, match="fan_in_fan_out is true in q, but not in p; mend"):
        combine([make("p"), make("q", fan_in_fan_out=True)])
    vocabulary = {"lm_head": (8, 4)}
    with pytest.raises(PatchError, match="ensure_weight_tying is true in q, but not in p"):
        combine([make("p", shapes=vocabulary), make("q", shapes=vocabulary, ensure_weight_tying=True)])


def test_factors_on_what_another_patch_would_replace() -> None:
    """Also where PEFT lists names that it did not find, as it does for classifiers."""
    saved = {"base_model.model.classifier.weight": torch.randn(2, 3)}
    p = make("p")
    saving = {**p.config.raw, "modules_to_save": ["classifier", "score"]}
    a = Patch.from_tensors({**p.tensors, **saved}, saving, name="a")
    assert combine([a, p]).config.modules_to_save == ("classifier", "score")
    with pytest.raises(
        UnsupportedPatchError, match=r"q has factors for module layers.0.score, which modules_to_save of"
    ):
        combine([a, make("q", shapes={"score": (2, 3)})])


def with_extra(patch: Patch, name: str, value: Tensor, **settings: Any) -> Patch:
    tensors = {**patch.tensors, **{f"base_model.model.layers.0.{m}.{name}": value for m in patch_modules(patch)}}
    return Patch.from_tensors(tensors, {**patch.config.raw, **settings}, name=patch.name)


def patch_modules(patch: Patch) -> list[str]:
    return [entry.module.rpartition(".")[2] for entry in patch.entries if isinstance(entry, portllm.patch.LoraEntry)]


def test_dora_experts_and_lonely_biases() -> None:
    p = make("p", shapes={"q": (3, 4)})
    dora = with_extra(make("d", shapes={"q": (3, 4)}), "lora_magnitude_vector", torch.ones(3), use_dora=True)
    for call in (lambda: combine([p, dora]), lambda: portllm.scale(dora, 2), lambda: portllm.truncate(dora, rank=1)):
        with pytest.raises(
            UnsupportedPatchError, match=r"d: module layers.0.q has DoRA magnitudes \(use_dora\).*; apply"
        ):
            call()
    assert portllm.cast(dora, torch.float64).config.use_dora
    biased = with_extra(make("b", shapes={"q": (3, 4)}), "lora_B.bias", torch.ones(3), lora_bias=True)
    assert combine([p, biased]).config.lora_bias
    with pytest.raises(UnsupportedPatchError, match=r"p: module layers.0.k has no lora_bias, but layers.0.q has"):
        combine([make("p", shapes={"q": (3, 4), "k": (3, 4)}), biased])
    tensors = {
        "base_model.model.layers.0.experts.lora_A.weight": torch.randn(6, 4),
        "base_model.model.layers.0.experts.lora_B.weight": torch.randn(5, 6),
    }
    settings = {"peft_type": "LORA", "r": 2, "target_parameters": ["experts.down"], "target_modules": []}
    experts = Patch.from_tensors(tensors, settings, name="x")
    with pytest.raises(UnsupportedPatchError, match=r"x: module layers.0.experts has stacked experts .*; apply"):
        combine([p, experts])


# -- metadata --------------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_the_base_is_kept_where_the_patches_agree() -> None:
    base = {f"layers.0.{module}.weight": torch.randn(shape) for module, shape in SHAPES.items()}
    q, o = {"q": (24, 16)}, {"o": (63, 65)}
    p = portllm.stamp(make("p", shapes=q, base_model_name_or_path="b"), base)
    same = portllm.stamp(make("same", shapes=q, base_model_name_or_path="b"), base)
    beside = portllm.stamp(make("beside", shapes=o, base_model_name_or_path="b"), base)
    for made in (combine([p, same]), combine([(p, 2)]), portllm.truncate(p, rank=1), portllm.cast(p, torch.float64)):
        assert made.metadata[METADATA_KEY] == p.metadata[METADATA_KEY]
        assert made.config.base_model == "b"
    united = Fingerprint.from_patch(combine([p, beside]))
    assert united is not None
    assert united.weights.keys() == {"layers.0.q", "layers.0.o"}
    stranger = portllm.stamp(make("s", base_model_name_or_path="b"), {k: t + 1 for k, t in base.items()})
    for other in (make("bare", base_model_name_or_path="b"), stranger):
        made = combine([p, other])
        assert METADATA_KEY not in made.metadata
        record = Combined.from_patch(made)
        assert record is not None
        assert len(record.warnings) == 1
        assert "fingerprint of the base is left out" in record.warnings[0]


def test_the_record(tmp_path: Path) -> None:
    p, q = make("p", base_model_name_or_path="one", task_type="CAUSAL_LM"), make("q", base_model_name_or_path="two")
    made = combine([(p, 0.5), q], method="svd", rank=2)
    made.save(tmp_path)
    record = Combined.from_patch(Patch.load(tmp_path))
    assert record == Combined.from_patch(made)
    assert record is not None
    assert (record.method, record.patches) == ("svd", (("p", 0.5), ("q", 1.0)))
    assert record.warnings == ("the patches name different bases (one, two); the result names none",)
    assert "base_model_name_or_path" not in made.config.raw
    assert "task_type" not in made.config.raw
    assert Combined.from_patch(p) is None
    for text in ("{", "[]", '{"version": 2}', '{"version": 1, "method": "svd", "patches": 3, "errors": {}}'):
        with pytest.raises(PatchError, match=r"p: portllm.combined in its metadata is garbled"):
            Combined.from_patch(p.with_metadata(**{"portllm.combined": text}))


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_adapter(tmp_path / "a"), write_adapter(tmp_path / "b", base_model_name_or_path="x")
    assert cli.main(["combine", f"{a}@0.7", f"{b}@-1", "-o", str(tmp_path / "new/out")]) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[1] == ["model.layers.*.self_attn.q_proj", "2", "8", "0.00%", "0.00%"]
    assert out.splitlines()[-2:] == ["concat of 2: 1,280 numbers in float32", str(tmp_path / "new/out")]
    assert err == "warning: the patches name different bases (unknown, x); the result names none\n"
    assert snapshot(tmp_path / "new").keys() == {
        "out", "out/adapter_config.json", "out/adapter_model.safetensors"
    }  # fmt: skip
    assert_adds(Patch.load(tmp_path / "new/out"), total((Patch.load(a), 0.7), (Patch.load(b), -1)))

    options = ["--method", "svd", "--rank", "3", "--energy", "0.999", "--dtype", "bfloat16", "--json"]
    assert cli.main(["combine", str(a), str(b), "-o", str(tmp_path / "svd"), *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts.keys() == {
        "out", "method", "patches", "errors", "warnings", "parameters", "bytes", "dtypes", "ranks"
    }  # fmt: skip
    assert (facts["dtypes"], facts["ranks"], facts["patches"]) == (["bfloat16"], [3], [[str(a), 1.0], [str(b), 1.0]])
    assert all(0 < error < 1 for error in facts["errors"].values())

    options = ["--method", "dare_ties", "--density", "0.5", "--seed", "3", "--majority-sign", "frequency", "--all"]
    assert cli.main(["combine", str(a), str(b), "-o", str(tmp_path / "svd"), "--overwrite", *options]) == 0
    assert "model.layers.0.self_attn.q_proj" in capsys.readouterr().out
    expected = combine([a, b], method="dare_ties", density=0.5, seed=3, majority_sign="frequency")
    assert_adds(Patch.load(tmp_path / "svd"), deltas(expected), 0)

    assert cli.main(["combine", f"{a}@-1", "-o", str(tmp_path / "negative")]) == 0
    negative = Patch.load(tmp_path / "negative")
    assert all(same_bits(negative.tensors[key], tensor) for key, tensor in Patch.load(a).tensors.items())
    assert_adds(negative, total((Patch.load(a), -1)), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A", "B", "-o", "A", "--overwrite"], "which it would replace"),
        (["A", "B", "-o", "A/x"], "lies in the input"),
        (["A", "B", "-o", "OLD"], "exists already"),
        (["A", "B@x", "-o", "NEW"], "not a finite number"),
        (["A", "NO", "-o", "NEW"], "no such patch"),
        (["A", "B", "-o", "NEW", "--rank", "0", "--method", "svd"], "rank=0 must be"),
        (["A", "B", "-o", "NEW", "--method", "ties"], "needs density"),
        (["A", "B", "-o", "NEW", "--method", "svd", "--density", "nan"], "density=nan"),
        (["A@1e300", "B", "-o", "NEW"], "overflows fp32"),
        (["HUGE", "-o", "NEW", "--dtype", "float16"], "overflows torch.float16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_the_command_writes_nothing_if_it_fails(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("A", "B", "OLD"):
        write_adapter(Path(name))
    portllm.cast(
        Patch.from_tensors({k: t * 1e9 for k, t in make().tensors.items()}, make().config), torch.float32
    ).save("HUGE")
    before = snapshot(tmp_path)
    assert cli.main(["combine", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("portllm: ")
    assert err.count("\n") == 1
    assert message in err
    assert snapshot(tmp_path) == before


def test_the_command_leaves_nothing_behind_when_the_disk_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = write_adapter(tmp_path / "a")
    before = snapshot(tmp_path)

    def full(self: Patch, path: Path) -> None:
        (path / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Patch, "save", full)
    assert cli.main(["combine", f"{a}@2", "-o", str(tmp_path / "out")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert snapshot(tmp_path) == before
