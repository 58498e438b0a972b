"""Plans: patches that overlap are refined into a grid that covers each cell once; a term cut is the whole term."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from portllm import Patch, PlanError
from portllm.bind import Options, Target, _merge, _Piece, bind
from portllm.execute import execute
from portllm.planning import Assign, Noise, Plan, Region, Term, Update

ROWS, COLUMNS = 12, 10


def _term(rows: int, columns: int, rank: int = 2, **settings: Any) -> Term:
    options = {"dtype": torch.float64}
    return Term(torch.randn(rank, columns, **options), torch.randn(rows, rank, **options), 0.7, **settings)


@st.composite
def rectangles(draw: st.DrawFn) -> list[tuple[int | None, tuple[int, int], tuple[int, int]]]:
    """Rectangles of two experts' matrices, overlapping as they will."""

    def interval(size: int) -> tuple[int, int]:
        start = draw(st.integers(0, size - 1))
        return start, draw(st.integers(start + 1, size))

    count = draw(st.integers(1, 6))
    return [(draw(st.integers(0, 1)), interval(ROWS), interval(COLUMNS)) for _ in range(count)]


@settings(max_examples=200, deadline=None)
@given(rectangles(), st.integers(0, 2**31))
def test_the_grid_covers_each_cell_once_and_sums_all_terms(
    places: list[tuple[int | None, tuple[int, int], tuple[int, int]]], seed: int
) -> None:
    torch.manual_seed(seed)
    pieces = []
    truth = torch.randn(2, ROWS, COLUMNS, dtype=torch.float64)
    weight = truth.clone()
    count = torch.zeros(2, ROWS, COLUMNS)
    for number, (expert, rows, columns) in enumerate(places):
        region = Region(expert, rows, columns)
        term = _term(*region.shape)
        pieces.append([_Piece("w", "w", region, term, f"patch {number}")])
        region.view(truth).add_(term.lora_B @ term.lora_A, alpha=term.scaling)
        region.view(count).add_(1)
    updates = tuple(_merge(pieces))
    seen = torch.zeros(2, ROWS, COLUMNS)
    for update in updates:
        cell = update.region.view(seen)
        assert not cell.any()
        cell.fill_(len(update.terms))
        assert len(update.sources) == len(update.terms)
    assert torch.equal(seen, count)
    execute(Plan(updates), {"w": weight})
    torch.testing.assert_close(weight, truth, atol=1e-12, rtol=1e-12)


def test_pieces_of_one_place_become_one_update_and_keep_their_factors() -> None:
    region = Region(None, (0, 4), (0, 3))
    terms = [_term(4, 3, rank) for rank in (1, 2, 3)]
    (update,) = _merge([[_Piece("w", "w", region, term, "x")] for term in terms])
    assert update.terms == tuple(terms)
    assert update.sources == ("x",)


def test_a_cut_through_dora_s_vectors_is_refused() -> None:
    whole = Region(None, (0, 4), (0, 6))
    dora = _Piece("w", "w", whole, _term(4, 6, magnitude=torch.ones(4, dtype=torch.float64)), "dora")
    across = _Piece("w", "w", Region(None, (0, 2), (0, 6)), _term(2, 6), "rows")
    along = _Piece("w", "w", Region(None, (0, 4), (0, 3)), _term(4, 3), "columns")
    assert len(tuple(_merge([[dora], [across]]))) == 2
    with pytest.raises(PlanError, match="dora: DoRA needs whole vectors of w"):
        tuple(_merge([[dora], [along]]))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_term_cut_is_a_part_of_the_whole(rows: int, columns: int, data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from([None, 0, 1]))
    magnitude = None if axis is None else torch.randn((rows, columns)[axis], dtype=torch.float64)
    term = _term(rows, columns, 3, magnitude=magnitude, magnitude_axis=axis or 0, strength=0.5)
    r = slice(*sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows)))))
    c = slice(*sorted(data.draw(st.tuples(st.integers(0, columns), st.integers(0, columns)))))
    part = term.cut(r, c)
    whole = term.lora_B @ term.lora_A * term.scaling
    torch.testing.assert_close(part.lora_B @ part.lora_A * part.scaling, whole[r, c], atol=1e-12, rtol=1e-12)
    assert part.lora_A.untyped_storage().data_ptr() == term.lora_A.untyped_storage().data_ptr()
    assert (part.rank, part.strength, part.magnitude_axis) == (3, 0.5, axis or 0)
    if magnitude is not None:
        assert torch.equal(part.magnitude, magnitude[(r, c)[axis]])


@pytest.mark.parametrize(
    "shape, region, expected",
    [
        ((5,), Region(None, (1, 4), (0, 1)), lambda t: t[1:4, None]),
        ((5, 6), Region(None, (1, 4), (2, 6)), lambda t: t[1:4, 2:6]),
        ((3, 5, 6), Region(2, (1, 4), (2, 6)), lambda t: t[2, 1:4, 2:6]),
        ((5, 2, 3, 3), Region(None, (1, 4), (0, 18)), lambda t: t.reshape(5, 18)[1:4]),
        ((5, 4, 3), Region(None, (0, 5), (0, 12)), lambda t: t.reshape(5, 12)),
    ],
)
def test_a_region_is_a_matrix_in_the_tensor_s_memory(shape: tuple[int, ...], region: Region, expected: Any) -> None:
    tensor = torch.randn(shape)
    view = region.view(tensor)
    assert torch.equal(view, expected(tensor))
    assert view.shape == region.shape
    view.zero_()
    assert not expected(tensor).any()


def test_delta_norm_is_that_of_the_sum() -> None:
    terms = tuple(_term(40, 30, rank) for rank in (1, 4, 7))
    update = Update("w", Region(None, (0, 40), (0, 30)), terms, ("x",))
    delta = sum(t.scaling * (t.lora_B @ t.lora_A) for t in terms)
    assert isinstance(delta, Tensor)
    assert update.delta_norm() == pytest.approx(float(delta.norm()), rel=1e-9)
    opposite = Term(terms[0].lora_A, terms[0].lora_B, -terms[0].scaling)
    gone = Update("w", Region(None, (0, 40), (0, 30)), (terms[0], opposite), ("x",))
    assert gone.delta_norm() == pytest.approx(0, abs=1e-5)


def _plan(**settings: Any) -> Plan:
    update = Update("w", Region(None, (0, 4), (0, 3)), (_term(4, 3),), ("m",))
    return Plan((update,), **settings)


def test_a_negated_plan_takes_off_what_the_plan_adds() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    before = weight.clone()
    plan = _plan()
    execute(plan, {"w": weight})
    assert not torch.allclose(weight, before)
    execute(plan.negated(), {"w": weight})
    torch.testing.assert_close(weight, before, atol=1e-12, rtol=1e-12)


def test_what_cannot_be_subtracted_is_named() -> None:
    assign = Assign("b", torch.zeros(2), None, 1.0, ("b",))
    with pytest.raises(PlanError, match="b cannot be subtracted"):
        _plan(assigns=(assign,)).negated()
    dora = Update("w", Region(None, (0, 4), (0, 3)), (_term(4, 3, magnitude=torch.ones(4)),), ("m",))
    assert dora.is_dora
    assert not Plan((dora,)).is_linear
    with pytest.raises(PlanError, match="w cannot be subtracted"):
        Plan((dora,)).negated()


def test_completeness() -> None:
    _plan().check_complete()
    for settings_, message in (
        ({"unmatched_patch": tuple("abcd")}, "a, b, c and 1 more"),
        ({"unmatched_target": ("t",)}, "t;"),
    ):
        with pytest.raises(PlanError, match=message):
            _plan(**settings_).check_complete()
        _plan(**settings_).check_complete(strict=False)
    with pytest.raises(PlanError, match=r"matches nothing in the target.* x"):
        Plan((), unmatched_patch=("x",)).check_complete(strict=False)


def test_a_plan_is_described_as_plain_data() -> None:
    assign = Assign("b", torch.zeros(2, 3), (1, 0), 1.0, ("b",), by_index=True)
    plan = _plan(assigns=(assign,), warnings=("careful",), untie={"head": "w"})
    told = json.loads(json.dumps(plan.describe()))
    assert told["updates"] == [
        {
            "tensor": "w", "expert": None, "rows": [0, 4], "columns": [0, 3], "ranks": [2], "scalings": [0.7],
            "dora": False, "sources": ["m"],
        }
    ]  # fmt: skip
    assert told["assigns"] == [{"tensor": "b", "rows": [1, 0], "shape": [2, 3], "resize": False, "sources": ["b"]}]
    assert told["warnings"] == ["careful"]
    assert plan.tensors == ("b", "w")
    assert "1 updates, 1 assigns" in repr(plan)


# -- bind ------------------------------------------------------------------------------------------------------------


def patch(modules: dict[str, tuple[int, int]], rank: int = 2, **settings: Any) -> Patch:
    """A patch with random factors for modules of the given [out, in]."""
    tensors = {}
    for module, (rows, columns) in modules.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns)
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank)
    leaves = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": leaves, **settings}
    return Patch.from_tensors(tensors, config)


def _delta(made: Patch, module: str) -> Tensor:
    factors = [made.tensors[f"{module}.lora_{factor}.weight"].double() for factor in "BA"]
    return (factors[0] @ factors[1]) * made.config.scaling(module)


def test_binding_reads_and_writes_nothing() -> None:
    target = {"m.q_proj.weight": torch.empty(6, 4, device="meta")}
    plan = bind(Target(target), [(patch({"m.q_proj": (6, 4)}), 1.0)])
    assert plan.tensors == ("m.q_proj.weight",)
    assert plan.updates[0].region == Region(None, (0, 6), (0, 4))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 5), st.data())
def test_fused_and_unfused_patches_meet_on_one_weight(kv: int, groups: int, columns: int, data: st.DataObject) -> None:
    """Any mixture of patches made on q, k, v and on qkv, onto either layout: each weight is the float64 sum."""
    rows = {"q_proj": kv * groups, "k_proj": kv, "v_proj": kv}
    total = sum(rows.values())
    kinds = data.draw(st.lists(st.sampled_from(["qkv", "q", "k", "qv", "kv"]), min_size=1, max_size=4))
    weights = [data.draw(st.floats(-2, 2, allow_subnormal=False)) for _ in kinds]
    patches = []
    base = torch.randn(total, columns, dtype=torch.float64)
    truth = base.clone()
    bounds = {"q_proj": (0, rows["q_proj"]), "k_proj": (rows["q_proj"], total - kv), "v_proj": (total - kv, total)}
    for kind, weight in zip(kinds, weights, strict=True):
        if kind == "qkv":
            made = patch({"m.qkv_proj": (total, columns)})
            truth += weight * _delta(made, "m.qkv_proj")
        else:
            made = patch({f"m.{letter}_proj": (rows[f"{letter}_proj"], columns) for letter in kind})
            for letter in kind:
                truth[slice(*bounds[f"{letter}_proj"])] += weight * _delta(made, f"m.{letter}_proj")
        patches.append((made, weight))

    fused = {"m.qkv_proj.weight": base.clone()}
    plan = bind(Target(fused), patches)
    assert plan.unmatched_patch == ()
    execute(plan, fused)
    torch.testing.assert_close(fused["m.qkv_proj.weight"], truth, atol=1e-6, rtol=1e-6)

    unfused = {f"m.{part}.weight": base[slice(*cut)].clone() for part, cut in bounds.items()}
    plan = bind(Target(unfused), patches)
    execute(plan, unfused)
    torch.testing.assert_close(torch.cat(list(unfused.values())), truth, atol=1e-6, rtol=1e-6)
    cells = [(u.name, u.region.rows) for u in plan.updates]
    assert len(cells) == len(set(cells)) <= 3


def test_what_a_patch_leaves_out_is_told() -> None:
    target = {f"m.{i}.{p}_proj.weight": torch.zeros(4, 4) for i in range(3) for p in "qkv"}
    made = patch({"m.0.q_proj": (4, 4), "m.1.q_proj": (4, 4), "m.1.v_proj": (4, 4), "m.9.q_proj": (4, 4)})
    plan = bind(Target(target), [(made, 1.0)])
    assert plan.unmatched_patch == ("m.9.q_proj",)
    assert set(plan.unmatched_target) == {"m.0.v_proj", "m.2.q_proj", "m.2.v_proj"}


def test_what_a_fused_weight_stands_for_is_told_once() -> None:
    """q and k of three parts have factors: v is missing, qkv is not; and the reverse."""
    fused = {f"m.{i}.qkv_proj.weight": torch.zeros(12, 4) for i in range(2)}
    parts = {f"m.{i}.{p}": (4, 4) for i in range(2) for p in ("q_proj", "k_proj")}
    regex = {"target_modules": r".*(q|k|v)_proj"}
    assert bind(Target(fused), [(patch(parts, **regex), 1.0)]).unmatched_target == ("m.0.v_proj", "m.1.v_proj")
    unfused = {f"m.{i}.{p}_proj.weight": torch.zeros(4, 4) for i in range(2) for p in "qkv"}
    made = patch({f"m.{i}.qkv_proj": (12, 4) for i in range(2)}, **regex)
    assert bind(Target(unfused), [(made, 1.0)]).unmatched_target == ()
    assert bind(Target(fused), [(made, 1.0)]).unmatched_target == ()


def test_one_weight_twice_under_one_name_is_refused() -> None:
    made = patch({"m.q_proj": (4, 4), "m.qkv_proj": (12, 4)})
    with pytest.raises(PlanError, match=r"m\.q_proj and m\.qkv_proj both land on m\.qkv_proj\.weight"):
        bind(Target({"m.qkv_proj.weight": torch.zeros(12, 4)}), [(made, 1.0)])


def test_two_patches_that_replace_one_tensor_are_refused() -> None:
    target = Target({"score.weight": torch.zeros(3, 4), "m.q_proj.weight": torch.zeros(4, 4)})
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "modules_to_save": ["score"]}
    made = [Patch.from_tensors({"score.weight": torch.randn(3, 4)}, config) for _ in range(2)]
    with pytest.raises(PlanError, match=r"two patches replace score.weight"):
        bind(target, [(p, 1.0) for p in made])
    rows = [
        Patch.from_tensors(
            {"score.token_adapter.trainable_tokens_delta": torch.randn(1, 4)},
            {"peft_type": "LORA", "trainable_token_indices": {"score": [i]}},
        )
        for i in (0, 2)
    ]
    assert len(bind(target, [(p, 1.0) for p in rows]).assigns) == 2
    with pytest.raises(PlanError, match=r"two patches replace score.weight"):
        bind(target, [(rows[0], 1.0), (rows[0], 1.0)])


def test_a_cut_update_is_that_part_of_the_whole_one() -> None:
    region = Region(3, (20, 20 + ROWS), (7, 7 + COLUMNS))
    terms = (_term(ROWS, COLUMNS), _term(ROWS, COLUMNS, magnitude=torch.randn(ROWS, dtype=torch.float64)))
    whole = Update("w", region, terms, ("a", "b"), Noise(1 << 63, row=100, column=7), keep_zeros=True)
    rows, columns = slice(2, 9), slice(3, None)
    part = whole.cut(rows, columns)
    assert part.region == Region(3, (22, 29), (10, 7 + COLUMNS))
    assert part.noise == Noise(1 << 63, row=102, column=10)
    assert (part.name, part.sources, part.keep_zeros) == ("w", ("a", "b"), True)
    for cut, term in zip(part.terms, terms, strict=True):
        assert torch.equal(cut.lora_A, term.lora_A[:, columns])
        assert torch.equal(cut.lora_B, term.lora_B[rows])
    assert part.terms[1].magnitude is not None
    assert len(part.terms[1].magnitude) == 7
    again = part.cut(slice(1, 3), slice(0, 2))
    assert (again.region, again.noise) == (Region(3, (23, 25), (10, 12)), Noise(1 << 63, row=103, column=10))
    assert whole.cut(slice(None), slice(None)).region == region


def test_a_negated_update_has_the_opposite_noise() -> None:
    update = Update("w", Region(None, (0, ROWS), (0, COLUMNS)), (_term(ROWS, COLUMNS),), (), Noise(5, 1, 2))
    negated = update.negated()
    assert negated.terms[0].scaling == -update.terms[0].scaling
    assert negated.noise == Noise(5, 1, 2, flipped=True)
    assert negated.negated().noise == update.noise


@pytest.mark.parametrize("known", [True, False, None])
@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_a_square_weight_is_told_by_its_layer_then_by_the_settings(known: bool | None, fan_in_fan_out: bool) -> None:
    weight = torch.zeros(5, 5, dtype=torch.float64)
    made = patch({"m.c_proj": (5, 5)}, fan_in_fan_out=fan_in_fan_out)
    plan = bind(Target({"m.c_proj.weight": weight}, transposed=lambda name: known), [(made, 1.0)])
    execute(plan, {"m.c_proj.weight": weight})
    delta = _delta(made, "m.c_proj")
    expected = delta.T if (fan_in_fan_out if known is None else known) else delta
    torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-6)


def test_a_square_weight_follows_its_siblings_before_the_settings() -> None:
    """On disk nothing tells Conv1D apart: a sibling stored [in, out] does."""
    target = {"m.c_proj.weight": torch.zeros(5, 5, dtype=torch.float64), "m.c_fc.weight": torch.zeros(5, 7)}
    made = patch({"m.c_proj": (5, 5), "m.c_fc": (7, 5)}, fan_in_fan_out=False)
    execute(bind(Target(target), [(made, 1.0)]), target)
    torch.testing.assert_close(target["m.c_proj.weight"], _delta(made, "m.c_proj").T, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bad", [{"tied": "twice"}, {"expert_layout": "out"}])
def test_options_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=f"{next(iter(bad))}="):
        Options(**bad)
