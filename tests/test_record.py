"""Exchanging updates: every weight comes back bit for bit, and what is added is what plain adding gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from portllm import _native, ops
from portllm.errors import BackendError, RecordError
from portllm.record import Record
from portllm.reference import FLOAT_DTYPES

from .tiny import same_bits

BACKENDS = ["torch", *(["cpu"] if _native.load() is None else [])]
SHAPES = [(1, 1), (1, 1000), (1000, 1), (63, 65), (7, 64), (33, 1024), (5, 2049), (20, 3000), (0, 5), (4, 0)]
Terms = list[tuple[Tensor, Tensor, float]]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def random_weight(shape: tuple[int, int], dtype: torch.dtype, special: bool = False) -> Tensor:
    weight = (torch.randn(shape) * 0.02).to(dtype)
    if special and weight.numel():
        # Any bits at all: subnormals, both zeros, infinities, NaNs with payloads.
        info = torch.iinfo(bits(weight).dtype)
        wild = torch.randint(info.min, info.max, shape, dtype=bits(weight).dtype).view(dtype)
        zeros = torch.where(torch.rand(shape) < 0.5, 0.0, -0.0).to(dtype)
        choice = torch.rand(shape)
        weight = torch.where(choice < 0.3, wild, torch.where(choice < 0.4, zeros, weight))
    return weight


def random_terms(shape: tuple[int, int], size: float, dtype: torch.dtype, count: int = 1) -> Terms:
    """Terms whose sum has about the given size relative to a weight of 0.02."""
    terms = []
    for _ in range(count):
        rank = int(torch.randint(1, 20, ()))
        lora_A, lora_B = torch.randn(rank, shape[1]).to(dtype), torch.randn(shape[0], rank).to(dtype)
        terms.append((lora_A, lora_B, 0.02 * size / rank**0.5))
    return terms


def exchange(
    weights: list[Tensor], old: list[Terms], new: list[Terms], records: list[Record | None], backend: str
) -> list[Record | None]:
    both = [[*before, *after] for before, after in zip(old, new, strict=True)]
    flat = [term for terms in both for term in terms]
    lora_A, lora_B, scalings = ([term[i] for term in flat] for i in range(3))
    counts = [len(terms) for terms in old], [len(terms) for terms in new]
    return ops.lowrank_exchange_(weights, lora_A, lora_B, scalings, *counts, records, backend)  # type: ignore[arg-type]


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """The same bits, but for those of NaNs, which torch does not define."""
    return same_bits(a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0)) and torch.equal(a.isnan(), b.isnan())


def merged(weight: Tensor, terms: Terms, backend: str) -> Tensor:
    out = weight.clone()
    lora_A, lora_B, scalings = ([term[i] for term in terms] for i in range(3))
    ops.lowrank_add_([out], lora_A, lora_B, scalings, [len(terms)], backend)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-4, 0.01, 0.3, 1.0, 50.0, 1e30])
@pytest.mark.parametrize("special", [False, True], ids=["normal", "special"])
def test_every_bit_comes_back(backend: str, dtype: torch.dtype, size: float, special: bool) -> None:
    """Several weights in one call: record, swap twice, remove."""
    weights = [random_weight(shape, dtype, special) for shape in SHAPES]
    weights.append(random_weight((65, 63), dtype, special).T)  # stored the other way round
    weights.append(random_weight((40, 130), dtype, special)[:, 1::2])  # no column next to the other
    base = [weight.clone() for weight in weights]
    factors = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    none: list[Terms] = [[] for _ in weights]

    def patch() -> list[Terms]:
        kind = factors[int(torch.randint(4, ()))]
        return [random_terms((w.shape[0], w.shape[1]), size, kind, int(torch.randint(1, 4, ()))) for w in weights]

    first, second = patch(), patch()
    records = exchange(weights, none, first, [None] * len(weights), backend)
    for weight, old, terms in zip(weights, base, first, strict=True):
        assert (same_bits if backend == "cpu" else same_numbers)(weight, merged(old, terms, backend))
    again = exchange(weights, first, second, records, backend)
    for weight, old, terms in zip(weights, base, second, strict=True):
        assert (same_bits if backend == "cpu" else same_numbers)(weight, merged(old, terms, backend))
    back = exchange(weights, second, first, again, backend)
    for now, before in zip(back, records, strict=True):
        assert now is not None
        assert before is not None
        assert torch.equal(now.data, before.data)
        assert torch.equal(now.lengths, before.lengths)
    nothing = exchange(weights, first, none, back, backend)
    assert nothing == [None] * len(weights)
    assert all(same_bits(weight, old) for weight, old in zip(weights, base, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "limit"), [(0.01, 0.25), (0.05, 0.6), (1.0, 16.0), (100.0, 16.0)])
def test_a_record_is_small(backend: str, size: float, limit: float) -> None:
    weight, terms = random_weight((512, 2048), torch.bfloat16), random_terms((512, 2048), size, torch.float32)
    [record] = exchange([weight], [[]], [terms], [None], backend)
    assert record is not None
    assert 8 * record.nbytes / weight.numel() <= limit


@pytest.mark.skipif("cpu" not in BACKENDS, reason=str(_native.load()))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_records_depend_on_neither_threads_nor_neighbours(dtype: torch.dtype) -> None:
    weights = [random_weight((300, 5000), dtype), random_weight((64, 64), dtype)]
    terms = [random_terms((w.shape[0], w.shape[1]), 0.02, torch.float32, 2) for w in weights]
    base, threads = [w.clone() for w in weights], torch.get_num_threads()
    together = exchange(weights, [[], []], terms, [None, None], "cpu")
    torch.set_num_threads(1)
    try:
        for i in range(2):
            [alone] = exchange([base[i]], [[]], [terms[i]], [None], "cpu")
            beside = together[i]
            assert alone is not None
            assert beside is not None
            assert torch.equal(alone.data, beside.data)
            assert torch.equal(alone.lengths, beside.lengths)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_changed_weights_are_noticed(backend: str) -> None:
    weight = random_weight((64, 3000), torch.bfloat16)
    terms = random_terms((64, 3000), 0.05, torch.float32)
    records = exchange([weight], [[]], [terms], [None], backend)
    weight.mul_(1.1)
    with pytest.raises(RecordError, match="no longer what"):
        exchange([weight], [terms], [[]], records, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_records_are_refused(backend: str) -> None:
    """Whatever the bytes are, nothing is read or written out of bounds."""
    weight = random_weight((64, 3000), torch.bfloat16)
    terms = random_terms((64, 3000), 0.05, torch.float32)
    [record] = exchange([weight], [[]], [terms], [None], backend)
    assert record is not None
    for _ in range(20):
        data, lengths = record.data.clone(), record.lengths.clone()
        if torch.rand(()) < 0.5:
            data[torch.randint(len(data), (5,))] = torch.randint(256, (5,), dtype=torch.uint8)
            if torch.equal(data, record.data):
                continue
        else:
            data = data[: int(torch.randint(len(data), ()))]
        try:
            exchange([weight.clone()], [terms], [[]], [Record(lengths, data, record.by)], backend)
        except RecordError:
            continue
        assert len(data) == len(record.data) or backend == "torch"  # codes that are wrong, but could be
    with pytest.raises(ValueError, match="has 1 old terms and None"):
        exchange([weight], [terms], [[]], [None], backend)
    other = Record(record.lengths, record.data, "another")
    with pytest.raises(BackendError, match="added by another"):
        exchange([weight], [terms], [[]], [other], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_weights_between_small_ones(backend: str) -> None:
    """Small weights share a piece of work, empty ones have none."""
    weights = [
        random_weight(shape, torch.float32) for shape in [(0, 3), (3, 4), (0, 4), (5, 0), (6, 2), (2, 0), (9, 9)]
    ]
    terms = [random_terms((w.shape[0], w.shape[1]), 1.0, torch.float32) for w in weights]
    base = [weight.clone() for weight in weights]
    expected = [merged(weight, each, backend) for weight, each in zip(weights, terms, strict=True)]
    records = exchange(weights, [[] for _ in weights], terms, [None] * len(weights), backend)
    assert all(same_bits(weight, wanted) for weight, wanted in zip(weights, expected, strict=True))
    exchange(weights, terms, [[] for _ in weights], records, backend)
    assert all(same_bits(weight, old) for weight, old in zip(weights, base, strict=True))
    both = [term for each in terms for term in each]
    ops.lowrank_add_(
        weights, [a for a, _, _ in both], [b for _, b, _ in both], [s for _, _, s in both], [1] * len(weights), backend
    )
    assert all(same_bits(weight, wanted) for weight, wanted in zip(weights, expected, strict=True))
