"""Patches for pruned and grown models, by a map that is given or found. The truth: pruning written out here."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import portllm
from portllm import IndexMap, Patch, _native, cli, cut, match, ops
from portllm.errors import PatchError, PlanError, UnsupportedPatchError

from . import families, tiny
from .families import FAMILIES, VOCAB
from .tiny import same_bits

pytestmark = pytest.mark.usefixtures("one_thread")
BF16, FP32 = torch.bfloat16, torch.float32
Kept = Sequence["int | None"]

# How the tiny models of tests/families.py store their weights: (first axis, second axis) by the name's end.
_LLAMA = {
    "embed_tokens.weight": "vh", "lm_head.weight": "vh", "q_proj.weight": "qh", "k_proj.weight": "kh",
    "v_proj.weight": "kh", "o_proj.weight": "hq", "gate_proj.weight": "fh", "up_proj.weight": "fh",
    "down_proj.weight": "hf", "layernorm.weight": "h", "model.norm.weight": "h", "q_norm.weight": "-",
    "k_norm.weight": "-",
}  # fmt: skip
STORED = {
    **dict.fromkeys(("llama", "mistral", "gemma2", "qwen3"), _LLAMA),
    "phi3": {**_LLAMA, "qkv_proj.weight": ("qkk", "h"), "gate_up_proj.weight": ("ff", "h")},
    "mixtral": {**_LLAMA, "mlp.gate.weight": "eh", "gate_up_proj": ("e", "ff", "h"), "experts.down_proj": "ehf",
                "block_sparse_moe.gate.weight": "eh", "w1.weight": "fh", "w2.weight": "hf", "w3.weight": "fh"},
    "gpt2": {
        "wte.weight": "vh", "lm_head.weight": "vh", "wpe.weight": "-h", "c_attn.weight": ("h", "qqq"),
        "c_attn.bias": ("qqq",), "attn.c_proj.weight": "qh", "c_fc.weight": "hf", "c_fc.bias": "f",
        "mlp.c_proj.weight": "fh", "c_proj.bias": "h", "ln_1.weight": "h", "ln_2.weight": "h", "ln_f.weight": "h",
        "ln_1.bias": "h", "ln_2.bias": "h", "ln_f.bias": "h",
    },
    "bert": {
        "word_embeddings.weight": "vh", "position_embeddings.weight": "-h", "token_type_embeddings.weight": "-h",
        "query.weight": "qh", "key.weight": "qh", "value.weight": "qh", "query.bias": "q", "key.bias": "q",
        "value.bias": "q", "attention.output.dense.weight": "hq", "intermediate.dense.weight": "fh",
        "intermediate.dense.bias": "f", "output.dense.weight": "hf", "output.dense.bias": "h",
        "LayerNorm.weight": "h", "LayerNorm.bias": "h", "pooler.dense.weight": "hh", "pooler.dense.bias": "h",
        "classifier.weight": "-h", "classifier.bias": "-",
    },
    "t5": {
        "shared.weight": "vh", "embed_tokens.weight": "vh", "lm_head.weight": "vh", "Attention.q.weight": "qh",
        "Attention.k.weight": "qh", "Attention.v.weight": "qh", "Attention.o.weight": "hq",
        "relative_attention_bias.weight": "-q1", "wi_0.weight": "fh", "wi_1.weight": "fh", "wo.weight": "hf",
        "layer_norm.weight": "h",
    },
}  # fmt: skip
SIZES = {"layers": 2, "heads": 4, "kv_heads": 2, "hidden": 32, "intermediate": 44, "vocabulary": VOCAB}
FAMILY_SIZES = {
    **dict.fromkeys(FAMILIES, SIZES),
    "mixtral": {**SIZES, "intermediate": 20, "experts": 4},
    "gpt2": {k: v for k, v in {**SIZES, "intermediate": 128}.items() if k != "kv_heads"},
    "bert": {k: v for k, v in SIZES.items() if k != "kv_heads"},
    "t5": {k: v for k, v in SIZES.items() if k != "kv_heads"},
}
HEAD_DIM = {"llama": 8, "mistral": 12, "gemma2": 8, "qwen3": 12, "phi3": 8, "mixtral": 8, "gpt2": 8, "bert": 8, "t5": 6}
_LETTERS = {"v": "vocabulary", "h": "hidden", "q": "heads", "k": "kv_heads", "f": "intermediate", "e": "experts"}


def axis(family: str, letters: str, kept: Mapping[str, Kept], size: int) -> list[int]:
    """The base's indices along one stored axis; -1 for what is added."""
    if letters == "-":
        return list(range(size))
    found: list[int] = []
    start = 0
    for letter in letters:
        kind = _LETTERS[letter]
        unit = HEAD_DIM[family] if letter in "qk" else 1
        count = FAMILY_SIZES[family][kind]
        for index in kept.get(kind, range(count)):
            found += [-1] * unit if index is None else range(start + index * unit, start + (index + 1) * unit)
        start += count * unit
    assert start == size
    return found


def axes(family: str, name: str, tensor: Tensor, kept: Mapping[str, Kept]) -> list[list[int]]:
    spec = max((s for s in STORED[family].items() if name.endswith(s[0])), key=lambda s: len(s[0]))[1]
    if spec == "-q1":  # one column for each head, not head_dim of them
        return [list(range(tensor.shape[0])), [-1 if i is None else i for i in kept.get("heads", range(4))]]
    assert len(spec) == tensor.dim()
    return [axis(family, letters, kept, tensor.shape[i]) for i, letters in enumerate(spec)]


def prune(
    family: str, state: Mapping[str, Tensor], kept: Mapping[str, Kept], new: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The pruned or grown model's tensors; what is added takes the values of ``new``, or is random."""
    made: dict[str, Tensor] = {}
    layers = kept.get("layers", range(2))
    for name, tensor in state.items():
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        numbers = [None] if place is None else [n for n, old in enumerate(layers) if old == int(parts[place])]
        if place is not None and int(parts[place]) == 0:  # a layer that is new looks like the first one
            numbers += [n for n, old in enumerate(layers) if old is None]
        for number in numbers:
            renamed = ".".join(str(number) if i == place else part for i, part in enumerate(parts))
            added = torch.zeros((), dtype=torch.bool)
            value = tensor
            for i, indices in enumerate(axes(family, name, tensor, kept)):
                index = torch.tensor(indices)
                value = value.index_select(i, index.clamp(min=0))
                added = added | (index < 0).view([-1 if j == i else 1 for j in range(tensor.dim())])
            if number is not None and layers[number] is None:
                added = torch.ones((), dtype=torch.bool)
            fresh = torch.randn(value.shape).to(value) if new is None else new[renamed]
            made[renamed] = torch.where(added, fresh, value)
    return made


def index_map(family: str, kept: Mapping[str, Kept], **more: Any) -> IndexMap:
    kinds = {kind: (FAMILY_SIZES[family][kind], list(keep)) for kind, keep in kept.items()}
    return IndexMap.of(**kinds, **more)


def state_of(family: str, dtype: torch.dtype = FP32) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in families.state(FAMILIES[family].build()).items()}


def adapter(family: str, path: Path, **changes: Any) -> Patch:
    """What PEFT saves of the family's adapter."""
    return Patch.load(families.save_adapter(FAMILIES[family].build(), FAMILIES[family].config(**changes), path))


def exact_backends() -> list[str]:
    """Those that sum each element in the same order wherever it stands; matrix libraries do not."""
    return ["cpu"] if ops.unavailable("cpu") is None and _native.isa() != "amx_bf16" else []


def applied(state: Mapping[str, Tensor], patch: Patch, backend: str, **options: Any) -> dict[str, Tensor]:
    named = {name: tensor.clone() for name, tensor in state.items()}
    portllm.apply(named, patch, backend=backend, **options)
    return named


def assert_commutes(family: str, base: Mapping[str, Tensor], patch: Patch, kept: Mapping[str, Kept], **o: Any) -> Patch:
    """Apply, then prune: the same bits as to prune and then apply the cut patch. Added entries stay as they are."""
    pruned = prune(family, base, kept)
    cut_patch = cut(patch, index_map(family, kept), model=pruned)
    for backend in ("torch", *exact_backends()):
        got = applied(pruned, cut_patch, backend, **o)
        truth = prune(family, applied(base, patch, backend, **o), kept, new=pruned)
        assert got.keys() == truth.keys()
        for name, expected in truth.items():
            if backend == "torch":  # one bf16 rounding, or the rounding of a few fp32 sums of order one
                tolerance = 2**-7 if expected.dtype == BF16 else 1e-5
                torch.testing.assert_close(got[name], expected, rtol=tolerance, atol=1e-5)
            else:
                assert same_bits(got[name], expected), name
        assert any(not torch.equal(got[name], pruned[name]) for name in got)
    return cut_patch


def drawn(count: int, keep: int, rng: random.Random) -> list[int]:
    return sorted(rng.sample(range(count), keep))


def random_kept(family: str, kinds: Sequence[str], rng: random.Random) -> dict[str, Kept]:
    """A random pruning of these kinds, query heads with the key/value heads that they read."""
    kept: dict[str, Kept] = {}
    sizes = FAMILY_SIZES[family]
    for kind in kinds:
        if kind == "heads" and "kv_heads" in sizes:
            keys = drawn(2, rng.choice((1, 2)), rng)
            each = rng.choice((1, 2))
            kept["kv_heads"] = keys
            kept["heads"] = [2 * key + head for key in keys for head in drawn(2, each, rng)]
        elif kind != "kv_heads":
            kept[kind] = drawn(sizes[kind], rng.randint(1, sizes[kind]), rng)
    return kept


KINDS = [
    (name, kind) for name, sizes in FAMILY_SIZES.items() for kind in sizes if kind not in ("kv_heads", "vocabulary")
]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family, kind", KINDS)
def test_pruning_and_applying_commute_in_each_dimension(
    family: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    patch = adapter(family, tmp_path)
    kept = random_kept(family, [kind], random.Random(torch.initial_seed()))
    assert_commutes(family, state_of(family, dtype), patch, kept)


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from((BF16, FP32)))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_all_dimensions_at_once(
    family: str, seed: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(seed)
    kinds = [kind for kind in FAMILY_SIZES[family] if rng.random() < 0.7]
    kept = random_kept(family, kinds, rng)
    patch = adapter(family, tmp_path_factory.mktemp("adapter"))
    assert_commutes(family, state_of(family, dtype), patch, kept)


# -- what else an adapter holds --------------------------------------------------------------------------------------

EVERYWHERE = {"hidden": [*range(3, 30)], "heads": [0, 1], "kv_heads": [0], "intermediate": [*range(1, 44, 2)],
              "vocabulary": [*range(4, 90)], "layers": [1]}  # fmt: skip


def test_embedding_factors_and_saved_layers_are_cut(tmp_path: Path) -> None:
    patch = adapter(
        "llama", tmp_path, target_modules=["embed_tokens", "q_proj", "down_proj"], modules_to_save=["lm_head", "norm"]
    )
    made = assert_commutes("llama", state_of("llama", BF16), patch, EVERYWHERE)
    kinds = {type(entry).__name__ for entry in made.entries}
    assert kinds == {"LoraEntry", "ReplaceEntry"}


def test_biases_are_cut(tmp_path: Path) -> None:
    """lora_bias of the rows of q_proj; PEFT's own bias setting, which saves whole biases."""
    kept = {**EVERYWHERE, "heads": [3, 1], "intermediate": [5, 2, 40]}
    del kept["kv_heads"]
    patch = adapter("bert", tmp_path / "a", lora_bias=True)
    assert_commutes("bert", state_of("bert"), patch, kept)
    patch = adapter("bert", tmp_path / "b", bias="all")
    made = assert_commutes("bert", state_of("bert"), patch, kept)
    assert made.config.bias == "all"


def test_gpt2_saves_layers_transposed(tmp_path: Path) -> None:
    kept = {"hidden": [*range(0, 32, 3)], "heads": [2], "intermediate": [*range(100)]}
    patch = adapter("gpt2", tmp_path, target_modules=["c_attn"], modules_to_save=["c_fc", "attn.c_proj"])
    assert_commutes("gpt2", state_of("gpt2"), patch, kept)


def test_trained_tokens_move_with_their_rows(tmp_path: Path) -> None:
    settings = {"trainable_token_indices": {"embed_tokens": [5, 9, 60]}}
    patch = adapter("llama", tmp_path / "a", **settings)
    made = assert_commutes("llama", state_of("llama"), patch, {"vocabulary": [60, 1, 2, 9], "hidden": [4, 7]})
    assert made.config.trainable_token_indices == {"embed_tokens": (3, 0)}
    gone = cut(patch, index_map("llama", {"vocabulary": [1, 2]}))
    assert gone.config.trainable_token_indices is None
    assert not any(isinstance(entry, portllm.patch.RowsEntry) for entry in gone.entries)
    listed = Patch.from_tensors(patch.tensors, {**patch.config.raw, "trainable_token_indices": [5, 9, 60]})
    assert cut(listed, index_map("llama", {"vocabulary": [9, 8]})).config.trainable_token_indices == (0,)
    with pytest.raises(PlanError, match="trained token 60, but the map is for a vocabulary of 50"):
        cut(patch, IndexMap.of(vocabulary=(50, range(40))))


def test_dora_magnitudes_are_cut_with_whole_rows_only(tmp_path: Path) -> None:
    patch = adapter("llama", tmp_path, use_dora=True, target_modules=["q_proj", "gate_proj"])
    kept = {"heads": [0, 3], "kv_heads": [0, 1], "intermediate": [7, 3, 20], "layers": [1]}
    cut_patch, base = cut(patch, index_map("llama", kept)), state_of("llama")
    pruned = prune("llama", base, kept)
    got, truth = applied(pruned, cut_patch, "torch"), prune("llama", applied(base, patch, "torch"), kept)
    families.assert_close(got, truth, 1e-5)
    with pytest.raises(UnsupportedPatchError, match=r"layers\.0\..*_proj has DoRA magnitudes.*extract"):
        cut(patch, index_map("llama", {"hidden": [1, 2, 3]}))
    with pytest.raises(UnsupportedPatchError, match="DoRA magnitudes, the norms of whole rows"):
        cut(patch, index_map("llama", {"intermediate": [1, None]}))


def test_dora_of_an_embedding_is_cut_with_whole_columns_only(tmp_path: Path) -> None:
    patch = adapter("llama", tmp_path, use_dora=True, target_modules=["embed_tokens"])
    kept, base = {"hidden": [30, 2, 5]}, state_of("llama")
    got = applied(prune("llama", base, kept), cut(patch, index_map("llama", kept)), "torch")
    families.assert_close(got, prune("llama", applied(base, patch, "torch"), kept), 1e-5)
    with pytest.raises(UnsupportedPatchError, match="the norms of whole columns"):
        cut(patch, index_map("llama", {"vocabulary": [1, 2, 3]}))


def test_experts_of_their_own_are_cut_and_renumbered() -> None:
    """Adapters on one module for each expert, in the layout of checkpoints, with other neurons in each expert."""
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["w1", "w2", "w3"],
        "alpha_pattern": {r"experts\.2\.w1": 3},
    }
    tensors: dict[str, Tensor] = {}
    for expert in range(3):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}"
        tensors |= tiny.factors([f"{name}.w1", f"{name}.w3"], 6, 4, 2) | tiny.factors([f"{name}.w2"], 4, 6, 2)
    patch = Patch.from_tensors(tensors, settings)
    own = {"layers.0.mlp.experts.2": (6, [5, 0]), "layers.0.mlp.experts.0": (6, [1, 2])}
    made = cut(patch, IndexMap.of(experts=(3, [2, 0]), intermediate=own))
    prefix = "base_model.model.model.layers.0.block_sparse_moe.experts."
    assert len(made.tensors) == 12
    for new, old, rows in ((0, 2, [5, 0]), (1, 0, [1, 2])):
        assert torch.equal(
            made.tensors[f"{prefix}{new}.w1.lora_B.weight"], tensors[f"{prefix}{old}.w1.lora_B.weight"][rows]
        )
        assert torch.equal(
            made.tensors[f"{prefix}{new}.w2.lora_A.weight"], tensors[f"{prefix}{old}.w2.lora_A.weight"][:, rows]
        )
        assert torch.equal(made.tensors[f"{prefix}{new}.w3.lora_A.weight"], tensors[f"{prefix}{old}.w3.lora_A.weight"])
    scalings = {entry.module.split("experts.")[1]: entry.scaling for entry in made.entries}
    assert scalings == {"0.w1": 1.5, **dict.fromkeys(("0.w2", "0.w3", "1.w1", "1.w2", "1.w3"), 4.0)}


def test_square_experts_need_the_layout(tmp_path: Path) -> None:
    """Where 2 x intermediate is hidden, the factors of gate_up_proj fit both ways."""
    base = families.mixtral(intermediate_size=16)
    settings = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"], "rank_pattern": {}}
    patch = Patch.load(families.save_adapter(base, FAMILIES["mixtral"].config(**settings), tmp_path))
    pruning = IndexMap.of(intermediate=(16, [1, 2]), hidden=(32, range(32)))
    with pytest.raises(PlanError, match=r"in several ways.*--expert-layout"):
        cut(patch, pruning)
    assert cut(patch, pruning, expert_layout="out_in").num_parameters < patch.num_parameters


# -- names and settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers_to_transform": [0, 2, 3]},
        {"target_modules": r"model\.layers\.[023]\.self_attn\.(q|v)_proj"},
        {"target_modules": ["layers.0.self_attn.q_proj", "layers.3.self_attn.v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.2\..*"},
        {"target_modules": ["q_proj", "v_proj", "lm_head"]},
        {"rank_pattern": {r"layers\.3\.self_attn\.q_proj": 2, "v_proj": 3}, "alpha_pattern": {r"layers\.[03]\..*": 11}},
        {"rank_pattern": {"v_proj": 3}, "use_rslora": True, "alpha_pattern": {"q_proj": 5}},
        {"modules_to_save": ["layers.3.mlp", "layers.1.mlp"]},
    ],
)
@pytest.mark.parametrize("keep", [[0, 3], [3, 2, 0], [0, None, 3], [None, 0, 1, 2, 3, None], [0, 1, 1, 3]])
def test_layers_keep_their_ranks_and_scalings_under_new_numbers(
    settings: dict[str, Any], keep: list[int | None], tmp_path: Path
) -> None:
    """Whatever the settings, the cut patch is PEFT's: it reloads, covers its layers and no others, and lands right."""
    base = families.llama(num_hidden_layers=4)
    settings = {"target_modules": ["q_proj", "v_proj"], **settings}
    config = FAMILIES["llama"].config(**settings)
    patch = Patch.load(families.save_adapter(base, config, tmp_path / "old"))
    cut(patch, IndexMap.of(layers=(4, keep))).save(tmp_path / "new")
    made = Patch.load(tmp_path / "new")
    target = families.llama(num_hidden_layers=len(keep))
    before, whole = families.state(target), families.state(base)
    for name in before:
        if ".layers." in name:
            new = int(name.split(".")[2])
            if keep[new] is not None:
                before[name] = whole[name.replace(f"layers.{new}.", f"layers.{keep[new]}.")]
        else:
            before[name] = whole[name]
    got, full = applied(before, made, "torch"), applied(whole, patch, "torch")
    for name in before:
        if ".layers." not in name:
            assert torch.equal(got[name], full[name])
            continue
        old = keep[int(name.split(".")[2])]
        expected = (
            before[name] if old is None else full[".".join([*name.split(".")[:2], str(old), *name.split(".")[3:]])]
        )
        assert torch.equal(got[name], expected), name
    target.load_state_dict(before)
    merged = families.peft_merged(target.double(), tmp_path / "new")
    families.assert_close(got, {name: merged.state_dict()[name] for name in got}, 1e-5)


def test_stacks_of_one_model_are_cut_apart(tmp_path: Path) -> None:
    patch = adapter("t5", tmp_path)
    made = cut(patch, IndexMap.of(layers={"encoder.block": (2, [1]), "decoder.block": (2, [0, None, 1])}))
    numbers = {(m.split(".")[0], int(m.split(".")[2])) for m in (e.module for e in made.entries)}
    assert numbers == {("encoder", 0), ("decoder", 0), ("decoder", 2)}
    target = families.t5(num_layers=1, num_decoder_layers=3)
    portllm.apply(target, made)


# -- grown models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_grown_models_keep_what_is_new(family: str, tmp_path: Path) -> None:
    """Rows, columns, heads, experts and layers added at random places: they get nothing, all else what it got."""
    rng = random.Random(torch.initial_seed())
    kept: dict[str, Kept] = {}
    for kind, count in FAMILY_SIZES[family].items():
        keep: list[int | None] = list(range(count))
        if kind in ("heads", "kv_heads") and "kv_heads" in FAMILY_SIZES[family]:
            keep += [None] * (count // 2)  # one more group
        else:
            for _ in range(rng.randint(1, 2)):
                keep.insert(rng.randint(0, len(keep)), None)
        kept[kind] = keep
    assert_commutes(family, state_of(family, BF16), adapter(family, tmp_path), kept)


def test_a_larger_vocabulary_keeps_its_new_rows(tmp_path: Path) -> None:
    """Factors of an embedding are padded; saved rows are filled up with the new model's, which must be given."""
    grown: dict[str, Kept] = {"vocabulary": [*range(VOCAB), None, None, None]}
    factors = adapter("llama", tmp_path / "a", target_modules=["embed_tokens", "lm_head", "q_proj"])
    assert_commutes("llama", state_of("llama"), factors, grown)
    saved = adapter("llama", tmp_path / "b", modules_to_save=["embed_tokens", "lm_head"])
    base = state_of("llama", BF16)
    new = prune("llama", base, grown)
    with pytest.raises(PlanError, match=r"\.weight replaces .*give the new model.*--pruned"):
        cut(saved, index_map("llama", grown))
    with pytest.raises(PlanError, match=r"is \[99, 32\] by the map, but is \[96, 32\]"):
        cut(saved, index_map("llama", grown), model=base)
    got = applied(new, cut(saved, index_map("llama", grown), model=new), "torch")
    truth = prune("llama", applied(base, saved, "torch"), grown, new=new)
    for name in truth:
        assert same_bits(got[name], truth[name])


def test_strict_checks_stay_strict(tmp_path: Path) -> None:
    """The uncut patch does not fit the grown model, and the cut one must still find all of its own layers."""
    patch = adapter("llama", tmp_path)
    grown = families.llama(num_hidden_layers=3)
    with pytest.raises(PlanError, match="no factors for 7 modules"):
        portllm.apply(grown, patch)
    made = cut(patch, IndexMap.of(layers=(2, [0, None, 1])))
    portllm.apply(grown, made)
    with pytest.raises(PlanError, match="7 names of the patch are not in the target"):
        portllm.apply(families.llama(), made)


# -- maps ------------------------------------------------------------------------------------------------------------


def test_maps_are_json(tmp_path: Path) -> None:
    made = IndexMap.of(
        layers=(4, [0, None, 3]),
        heads={"": (4, [0, 1]), "layers.3": (4, [2, 3])},
        kv_heads={"": (2, [0]), "layers.3": (2, [1])},
        dimensions={r"\.wq$": ("heads", "hidden")},
    )
    made.save(tmp_path / "map.json")
    assert IndexMap.load(tmp_path / "map.json") == made
    assert json.loads((tmp_path / "map.json").read_text())["layers"] == {"": {"of": 4, "keep": [0, None, 3]}}
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]


@pytest.mark.parametrize(
    "kinds, message",
    [
        ({"neurons": (3, [0])}, "there is no dimension 'neurons'; choose from layers, hidden"),
        ({"hidden": (3, [0, 3])}, "hidden: keep has 3, but the base's indices are 0 to 2"),
        ({"hidden": (3, [True])}, "keep has True"),
        ({"hidden": (0, [0])}, "of=0 must be how many the base has"),
        ({"hidden": {"layers.1": (3, [])}}, "hidden for 'layers.1': keep is empty"),
        ({"hidden": (3, "012")}, "must be a list of the base's indices"),
        (
            {"heads": (4, [0, 2]), "kv_heads": (2, [0])},
            "query head 2 of the base reads key/value head 1, but as head 1",
        ),
        ({"heads": (4, [0, 1, 2]), "kv_heads": (2, [0, 1])}, "4 over 2 in the base, 3 over 2 in the new model"),
        ({"hidden": (3, [0]), "dimensions": {"(": ("heads", "-")}}, "is not a regular expression"),
        ({"hidden": (3, [0]), "dimensions": {"x": ("head", "-")}}, "there is no dimension 'head'; choose from hidden"),
    ],
)
def test_maps_that_cannot_be(kinds: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        IndexMap.of(**kinds)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", "not a map of version 1"),
        ('{"version": 2}', "not a map of version 1"),
        ('{"version": 1, "heads": [0, 1]}', 'each kind must be {PLACE: {"of": 32'),
        ('{"version": 1, "heads": {"": {"keep": [0]}}}', "garbled"),
        ('{"version": 1, "heads": {"": {"of": 4, "keep": 3}}}', "heads: keep=3 must be a list"),
        ('{"version": 1, "dimensions": {"x": "heads"}}', "garbled"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_files_that_are_no_maps(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(text)
    with pytest.raises(PlanError, match=message) as error:
        IndexMap.load(file)
    assert str(error.value).startswith(str(file))


def one_module(name: str, out: int, inner: int) -> Patch:
    return Patch.from_tensors(
        tiny.factors([name], out, inner), {**tiny.ADAPTER, "target_modules": [name.split(".")[-1]]}
    )


def test_what_a_map_does_not_say() -> None:
    q_proj = one_module("model.layers.0.self_attn.q_proj", 24, 16)
    with pytest.raises(PlanError, match=r"q_proj has 16 columns, but the map is for a base with 20 \(hidden\)"):
        cut(q_proj, IndexMap.of(hidden=(20, [0])))
    with pytest.raises(PlanError, match=r"q_proj has 16 columns, but the map is for a base with 8"):
        cut(q_proj, IndexMap.of(hidden=(8, [0])))  # a multiple of it is no fit
    with pytest.raises(PlanError, match=r"layers\.0\.self_attn\.q_proj.* has 24 rows, but .* with 5 \(heads\)"):
        cut(q_proj, IndexMap.of(heads=(5, [0]), kv_heads=(5, [0])))
    with pytest.raises(PatchError, match="nothing of it is left"):
        cut(q_proj, IndexMap.of(layers=(2, [1])))
    layer_7 = one_module("model.layers.7.self_attn.k_proj", 24, 16)
    with pytest.raises(PlanError, match="a base with 4 layers, 0 to 3"):
        cut(layer_7, IndexMap.of(layers=(4, [1])))
    with pytest.raises(PlanError, match="the map has heads, but no kv_heads"):
        cut(layer_7, IndexMap.of(heads=(4, [1])))
    qkv = one_module("model.layers.0.self_attn.qkv_proj", 32, 16)
    with pytest.raises(PlanError, match=r"holds heads\+kv_heads\+kv_heads, but the map does not say the heads"):
        cut(qkv, IndexMap.of(kv_heads=(4, [1])))
    with pytest.raises(PlanError, match=r"'layers\.0' and 'self_attn\.q_proj' both hold there"):
        cut(q_proj, IndexMap.of(hidden={"layers.0": (16, [0]), "self_attn.q_proj": (16, [1])}))


def test_families_outside_of_the_table() -> None:
    """An error that says how to name the axes; layers alone need no table."""
    patch = one_module("net.layers.1.mixer.wq", 24, 16)
    with pytest.raises(PlanError, match=r'net\.layers\.1\.mixer\.wq: its dimensions are not known.*"wq\$": \["heads"'):
        cut(patch, IndexMap.of(hidden=(16, [3, 4])))
    assert all(".net.layers.0.mixer" in key for key in cut(patch, IndexMap.of(layers=(2, [1]))).tensors)
    made = cut(patch, IndexMap.of(hidden=(16, [3, 4]), heads=(4, [1]), dimensions={r"\.wq$": ("heads", "hidden")}))
    [entry] = made.entries
    [old] = patch.entries
    assert torch.equal(entry.lora_A, old.lora_A[:, [3, 4]])
    assert torch.equal(entry.lora_B, old.lora_B[6:12])


def test_the_bases_fingerprint_does_not_stay(tmp_path: Path) -> None:
    patch = portllm.stamp(adapter("llama", tmp_path), state_of("llama")).with_metadata(note="kept")
    made = cut(patch, index_map("llama", {"hidden": [1, 2]}))
    assert dict(made.metadata) == {**{k: v for k, v in patch.metadata.items() if k != "portllm.base"}, "note": "kept"}


# -- maps that are found ---------------------------------------------------------------------------------------------


def as_model(family: str, state: Mapping[str, Tensor]) -> Any:
    """The tensors with the configuration that tells the number of heads."""
    return Configured(state, FAMILIES[family].build().config)


class Configured(dict):  # type: ignore[type-arg]
    """A state dict with a configuration, as a model has."""

    def __init__(self, state: Mapping[str, Tensor], config: Any) -> None:
        super().__init__(state)
        self.config = config


def assert_found(family: str, base: Mapping[str, Tensor], kept: Mapping[str, Kept], **known: Any) -> IndexMap:
    found = match(as_model(family, base), as_model(family, prune(family, base, kept)), **known)
    wanted = index_map(family, kept)
    sizes = FAMILY_SIZES[family]
    for kind, count in sizes.items():
        keep = tuple(kept.get(kind, range(count)))
        places = found.selections.get(kind, {})
        assert all(one.of == count and one.keep == keep for one in places.values()), kind
        assert places or keep == tuple(range(count)), kind
    assert wanted.selections.keys() >= {
        k for k, s in found.selections.items() if not all(o.is_identity for o in s.values())
    }
    return found


@pytest.mark.parametrize("family, kind", [*KINDS, *((name, "vocabulary") for name in FAMILIES)])
def test_each_dimension_is_found(family: str, kind: str) -> None:
    kept = random_kept(family, [kind], random.Random(torch.initial_seed()))
    assert_found(family, state_of(family, BF16), kept)


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_all_dimensions_are_found_at_once(family: str, seed: int) -> None:
    rng = random.Random(seed)
    kinds = [kind for kind in FAMILY_SIZES[family] if kind != "vocabulary" and rng.random() < 0.7]
    assert_found(family, state_of(family, BF16), random_kept(family, kinds, rng))


def test_layers_may_have_heads_and_neurons_of_their_own() -> None:
    """As pruning by importance leaves them; the same number in each layer, as configurations want it, or not."""
    base = state_of("llama", BF16)
    kept = [{"intermediate": [1, 5, 40], "heads": [0, 3], "kv_heads": [0, 1]},
            {"intermediate": [7, 9], "heads": [2, 3], "kv_heads": [1]}]  # fmt: skip
    parts = [prune("llama", base, one) for one in kept]
    pruned = {name: parts[1 if "layers.1." in name else 0][name] for name in base}
    found = match(as_model("llama", base), as_model("llama", pruned))
    for layer, one in enumerate(kept):
        for kind, place in (("intermediate", ""), ("heads", ".self_attn"), ("kv_heads", ".self_attn")):
            assert found.selections[kind][f"layers.{layer}{place}"].keep == tuple(one[kind])
    patch = Patch.from_tensors(
        tiny.factors(["model.layers.1.mlp.down_proj"], 32, 44),
        {**tiny.ADAPTER, "target_modules": ["down_proj"], "layers_to_transform": [1]},
    )
    portllm.apply(pruned, cut(patch, found))


def test_one_weight_that_was_not_trained_further_is_enough(tmp_path: Path) -> None:
    """And where all were, the error says which were tried, and what to do."""
    base, kept = state_of("llama"), {"hidden": [*range(20)], "intermediate": [*range(0, 44, 3)], "layers": [1]}
    pruned = prune("llama", base, kept)
    frozen = ("lm_head.weight", "layers.0.mlp.up_proj.weight", "layers.0.self_attn.q_proj.weight")
    trained = {n: t if n.endswith(frozen) else t + 1e-3 * torch.randn_like(t) for n, t in pruned.items()}
    whole, partly = (match(as_model("llama", base), as_model("llama", state)) for state in (pruned, trained))
    assert whole == partly
    trained["lm_head.weight"] = trained["lm_head.weight"] + 1e-3
    message = (
        r"the pruned model: its hidden cannot be found in the base model, tried model\.embed_tokens\.weight "
        r"\(20 of its 20 are none of the base's 32\).*trained further.*--map"
    )
    with pytest.raises(PlanError, match=message):
        match(as_model("llama", base), as_model("llama", trained))
    given = match(as_model("llama", base), as_model("llama", trained), known=index_map("llama", {"hidden": range(20)}))
    assert given == whole
    trained["model.layers.0.mlp.up_proj.weight"] = -trained["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(PlanError, match=r"its intermediate of layers\.1 cannot.*gate_proj.weight.*up_proj"):
        match(as_model("llama", base), as_model("llama", trained), known=index_map("llama", {"hidden": range(20)}))


def test_rows_that_are_there_twice() -> None:
    """All kept: they are paired in order. Some kept: nothing tells which."""
    base = state_of("llama")
    base["model.embed_tokens.weight"][[7, 8]] = base["lm_head.weight"][[7, 8]] = 0.5
    both = {"vocabulary": [1, 7, 8, 50]}
    assert_found("llama", base, both)
    with pytest.raises(PlanError, match=r"vocabulary cannot be found.*\(its 1 is the base's 7 and 8 alike\)"):
        match(base, prune("llama", base, {"vocabulary": [1, 8, 50]}))
    for name in [n for n in base if "layers.1." in n]:
        base[name] = base[name.replace("layers.1.", "layers.0.")].clone()
    with pytest.raises(PlanError, match=r"layers of layers cannot be found.*its 0 is the base's 0 and 1 alike"):
        match(base, prune("llama", base, {"layers": [1]}))


def test_grown_models_are_found() -> None:
    base = state_of("llama", BF16)
    assert_found("llama", base, {"vocabulary": [*range(VOCAB), None, None], "layers": [0, None, 1]})
    assert_found("llama", base, {"layers": [0, 1, 0, 1]})
    assert_found("llama", base, {"intermediate": [0, None, *range(1, 44)], "hidden": [*range(32), None]})
    assert_found("llama", base, {"heads": [0, 1, 0, 1, 2, 3, 2, 3], "kv_heads": [0, 0, 1, 1]})
    # New rows where others are gone could as well be old ones that were trained.
    with pytest.raises(PlanError, match=r"vocabulary cannot be found.*1 of its 3 are none of the base's 96"):
        match(base, prune("llama", base, {"vocabulary": [3, None, 5]}))


def test_new_layers_may_have_the_norms_of_old_ones() -> None:
    base = state_of("llama", BF16)
    for name in [name for name in base if "layernorm" in name]:
        base[name] = torch.ones_like(base[name])
    grown = prune("llama", base, {"layers": [0, None, 1]})
    for name in [name for name in grown if "layers.1." in name and "layernorm" in name]:
        grown[name] = torch.ones_like(grown[name])
    assert match(base, grown) == index_map("llama", {"layers": [0, None, 1]})


def test_larger_vocabularies_of_fewer_dimensions() -> None:
    """Tokens behind the others leave the columns comparable; tokens in between do not."""
    base = state_of("llama")
    assert_found("llama", base, {"vocabulary": [*range(VOCAB), None], "hidden": [3, 4, 31]})
    pruned = prune("llama", base, {"vocabulary": [4, 2], "hidden": [3, 4, 31]})
    with pytest.raises(PlanError, match="its hidden cannot be found"):
        match(base, pruned)
    found = match(base, pruned, known=index_map("llama", {"vocabulary": [4, 2]}))
    assert found == index_map("llama", {"vocabulary": [4, 2], "hidden": [3, 4, 31]})


def test_heads_need_their_number() -> None:
    base, kept = state_of("llama"), {"heads": [0, 1], "kv_heads": [0]}
    with pytest.raises(PlanError, match=r"q_proj: the number of heads of the base model is not known; give a model"):
        match(base, prune("llama", base, kept))
    assert match(base, prune("llama", base, {"intermediate": [4]})) == index_map("llama", {"intermediate": [4]})


def test_what_is_not_explained_is_an_error() -> None:
    base = state_of("llama")
    pruned = dict(base)
    for name in base:  # no weight is left that could say which dimensions these are
        if "embed" in name or "lm_head" in name:
            pruned.pop(name)
        elif base[name].dim() == 2 and "q_proj" in name:
            pruned[name] = base[name][:, :5].contiguous()
    with pytest.raises(
        PlanError, match=r"layers\.0\.self_attn\.q_proj\.weight is \[32, 5\] .* where \[32, 32\] remain"
    ):
        match(base, pruned)


def test_models_on_disk_under_other_names(tmp_path: Path) -> None:
    """Checkpoints with config.json; the pruned one without its head, as AutoModel saves it; GPT-2 stores [in, out]."""
    for family in ("llama", "gpt2", "phi3", "mixtral"):
        model = FAMILIES[family].build()
        model.save_pretrained(tmp_path / family)
        kept = random_kept(family, ["hidden", "heads", "intermediate"], random.Random(torch.initial_seed()))
        made = prune(family, tiny.read_model(tmp_path / family), kept)
        pruned = {
            name.removeprefix("model.").removeprefix("transformer."): tensor.clone()
            for name, tensor in made.items()
            if "lm_head" not in name
        }
        tiny.write_model(tmp_path / f"{family}-pruned", pruned, config=model.config.to_dict())
        found = match(tmp_path / family, tmp_path / f"{family}-pruned")
        for kind, keep in kept.items():
            if len(keep) < FAMILY_SIZES[family][kind]:
                assert set(found.selections[kind].values()) == set(index_map(family, kept).selections[kind].values())
    with pytest.raises(PlanError, match=r"the pruned model has no layers\.0.*both models must be in one layout"):
        match(tmp_path / "mixtral", families.mixtral())


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A base, a pruned model with a larger vocabulary, and an adapter that saves the embedding."""
    model = FAMILIES["llama"].build()
    model.save_pretrained(tmp_path / "base")
    kept: dict[str, Kept] = {"layers": [1], "intermediate": [*range(0, 44, 2)], "vocabulary": [*range(VOCAB), None]}
    base = families.state(model)
    pruned = prune("llama", base, kept)
    tiny.write_model(tmp_path / "pruned", pruned, config=model.config.to_dict())
    config = FAMILIES["llama"].config(modules_to_save=["embed_tokens"])
    families.save_adapter(model, config, tmp_path / "adapter")
    truth = prune("llama", applied(base, Patch.load(tmp_path / "adapter"), "torch"), kept, new=pruned)
    return {"root": tmp_path, "kept": kept, "pruned": pruned, "truth": truth}


def test_the_command_cuts(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    root = files["root"]
    arguments = ["cut", root / "adapter", "-o", root / "out", "--base", root / "base", "--pruned", root / "pruned"]
    assert cli.main([str(a) for a in [*arguments, "--save-map", root / "map.json"]]) == 0
    out = capsys.readouterr().out
    assert "layers" in out
    assert "1 of 2" in out
    assert IndexMap.load(root / "map.json") == index_map("llama", files["kept"])
    got = applied(files["pruned"], Patch.load(root / "out"), "torch")
    families.assert_close(got, files["truth"], 1e-5)
    arguments = [
        "cut",
        root / "adapter",
        "-o",
        root / "two",
        "--map",
        root / "map.json",
        "--pruned",
        root / "pruned",
        "--json",
    ]
    assert cli.main([str(a) for a in arguments]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["out"] == str(root / "two")
    assert facts["map"]["layers"] == {"": {"of": 2, "keep": [1]}}
    one, two = (Patch.load(root / name) for name in ("out", "two"))
    assert all(same_bits(one.tensors[key], two.tensors[key]) for key in one.tensors)
    assert facts["parameters"] == one.num_parameters == two.num_parameters


def test_the_command_refuses(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    root = files["root"]
    index_map("llama", {**files["kept"], "intermediate": [1, 2, 3]}).save(root / "other.json")
    index_map("llama", files["kept"]).save(root / "map.json")
    for more, message in (
        ([], "say what is kept: --map MAP, or --base BASE and --pruned PRUNED"),
        (["--base", root / "base"], "say what is kept"),
        (["--map", root / "map.json", "--base", root / "base"], "--map and --base both say what is kept"),
        (["--map", root / "map.json", "--save-map", root / "x.json"], "--save-map is for a map that is found"),
        (["--map", root / "none.json"], "none.json: cannot be read as JSON"),
        (["--map", root / "map.json"], "give the new model"),
        (["--map", root / "other.json", "--pruned", root / "pruned"], "lora_B @ lora_A is [32, 3]"),
    ):
        before = tiny.snapshot(root)
        assert cli.main([str(a) for a in ["cut", root / "adapter", "-o", root / "out", *more]]) == 2
        assert message in capsys.readouterr().err
        assert tiny.snapshot(root) == before
