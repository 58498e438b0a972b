"""The compiled kernel for quantised weights: bit for bit what the reference makes of the same sums."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from portllm import _native, ops, quant, requantise  # noqa: F401  (ops and requantise define the schemas)
from portllm.quant import SCHEMES

pytestmark = pytest.mark.skipif(_native.load() is not None, reason=str(_native.load()))

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
E8M0, E4M3, BYTE = torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.uint8
ISAS = ("avx512_bf16", "avx512", "avx2", "portable")  # those that give the same bits

Term = tuple[Tensor, Tensor, float]  # lora_A [r, n], lora_B [m, r], scaling


@dataclass
class Weight:
    """A quantised weight and how it is coded."""

    scheme: str
    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]
    block: tuple[int, int]
    global_scale: float = 1.0

    def clone(self) -> Weight:
        return replace(self, codes=self.codes.clone(), scales=self.scales.clone())

    def float(self) -> Tensor:
        return quant.dequantise(self.codes, self.scales, self.shape, self.scheme, self.block, self.global_scale)


class SameSums(quant.Delta):
    """The terms' sums as the kernel forms them, for a reference whose matrix library sums in another order."""

    def __init__(self, like: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scalings: Sequence[float]):
        self._sums = torch.zeros(like.shape)
        torch.ops.portllm.lowrank_add_cpu_([self._sums], lora_A, lora_B, scalings, [len(lora_A)])

    def rows(self, rows: slice) -> Tensor:
        return self._sums[rows].clone()


@pytest.fixture(autouse=True)
def _same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "Delta", SameSums)


def make(case: tuple[str, int, int, tuple[int, int], torch.dtype], generator: torch.Generator | None = None) -> Weight:
    """Random codes, all but NaNs, and scales that differ by up to a factor of four."""
    scheme, m, n, block, scale_dtype = case
    kind = SCHEMES[scheme]
    grid = kind.grid((m, n), block)

    def integers(low: int, high: int, shape: Sequence[int]) -> Tensor:
        return torch.randint(low, high, tuple(shape), generator=generator, dtype=torch.int16).to(BYTE)

    if kind.packing == "one":
        codes = integers(0, 256, (m, n))
        codes[codes & 127 == 127] = 0x7E
        codes[codes == 128] = 0
        codes = codes.view(kind.codes)
    else:
        codes = integers(0, 256, (kind.code_bytes(m * n),))
    if scale_dtype in (BYTE, E8M0):
        scales = integers(117, 120, grid)
        scales = scales if scale_dtype == BYTE else scales.view(E8M0)
        return Weight(scheme, codes, scales, (m, n), block)
    if scale_dtype == E4M3:
        scales = (torch.rand(grid, generator=generator) * 100 + 30).to(E4M3)
        return Weight(scheme, codes, scales, (m, n), block, global_scale=2e-4)
    scales = (torch.rand(grid, generator=generator) + 0.3) * (0.02 / kind.largest)
    return Weight(scheme, codes, scales.to(scale_dtype), (m, n), block)


def make_terms(
    shape: tuple[int, int], size: float, ranks: Sequence[int] = (16,), dtypes: Sequence[torch.dtype] = (FP32,)
) -> list[Term]:
    """Terms whose products are about so large; A and B alternately plain and transposed, and dtypes in turn."""
    m, n = shape
    terms = []
    for i, rank in enumerate(ranks):
        a, b = torch.randn(rank, n), torch.randn(m, rank) * (size / rank**0.5)
        if i % 2:
            a, b = a.T.contiguous().T, b.T.contiguous().T
        terms.append((a.to(dtypes[i % len(dtypes)]), b.to(dtypes[(i + 1) % len(dtypes)]), 0.5 + i))
    return terms


def update(weight: Weight, terms: Sequence[Term], modes: Sequence[int] = (), backend: str = "cpu") -> Tensor:
    lists = [a for a, _, _ in terms], [b for _, b, _ in terms], [s for _, _, s in terms]
    return requantise.lowrank_requantise_(
        weight.codes, weight.scales, *lists, weight.scheme, *weight.block, weight.global_scale, modes, backend
    )


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BYTE)


def assert_same(got: Weight, want: Weight) -> None:
    wrong = (raw(got.scales) != raw(want.scales)).sum().item()
    assert wrong == 0, f"{wrong} of {raw(want.scales).numel()} bytes of scales differ"
    differs = raw(got.codes) != raw(want.codes)
    if got.scheme == "fp8_e4m3":  # of a NaN the sign says nothing
        differs &= ~((raw(got.codes) & 127 == 127) & (raw(want.codes) & 127 == 127))
    assert not differs.any(), f"{differs.sum().item()} of {differs.numel()} bytes of codes differ"


def assert_like_reference(weight: Weight, terms: Sequence[Term], modes: Sequence[int] = ()) -> Weight:
    got, want = weight.clone(), weight.clone()
    sums, expected = update(got, terms, modes), update(want, terms, modes, "torch")
    assert_same(got, want)
    if expected.isfinite().all():
        size = (expected[0] * expected[2]).sqrt()
        bound = torch.stack([expected[0], torch.maximum(size, expected[1].abs()), expected[2]])
        vanished = weight.shape[0] * weight.shape[1] * 2.0**-126  # products are fp32, their sums fp64
        assert ((sums - expected).abs() <= 1e-6 * bound + vanished).all(), (sums, expected)
    return got


CASES = [
    ("fp8_e4m3", 300, 400, (128, 128), FP32),
    ("fp8_e4m3", 128, 256, (128, 128), BF16),
    ("fp8_e4m3", 37, 333, (128, 128), E8M0),
    ("fp8_e4m3", 37, 130, (16, 32), BYTE),
    ("fp8_e4m3", 100, 300, (1, 128), FP32),
    ("fp8_e4m3", 37, 333, (1, 333), FP16),
    ("fp8_e4m3", 60, 50, (60, 50), FP32),
    ("fp8_e4m3", 400, 333, (400, 333), FP32),  # a large block
    ("fp8_e4m3", 300, 700, (128, 600), FP32),  # several, with odd ends
    ("fp8_e4m3", 5, 70000, (1, 70000), FP32),
    ("fp8_e4m3", 30, 70, (4, 7), FP32),
    ("fp8_e4m3", 9, 40, (1, 1), FP32),
    ("int8", 100, 257, (1, 257), FP32),
    ("int8", 130, 256, (128, 128), FP16),
    ("int8", 3, 66000, (1, 66000), BF16),
    ("nf4", 33, 128, (1, 64), FP32),
    ("nf4", 33, 100, (1, 64), FP32),  # blocks that run on from row to row
    ("nf4", 13, 77, (1, 64), FP32),  # and a last half byte
    ("nf4", 1, 1, (1, 64), FP32),
    ("mxfp4", 33, 128, (1, 32), E8M0),
    ("mxfp4", 33, 100, (1, 32), BYTE),
    ("nvfp4", 33, 128, (1, 16), E4M3),
    ("nvfp4", 7, 90, (1, 16), E4M3),
]
MODES = {"nearest": [], "random": [1, -123456789012345, 2**32 - 3, 7], "zeros": [2, 0, 0, 0], "both": [3, 99, 10**7, 5]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_are_those_of_the_reference(case: tuple[str, int, int, tuple[int, int], torch.dtype], mode: str) -> None:
    for size in (1e-2, 1e-3, 1e-5):
        weight = make(case)
        before = weight.float()
        after = assert_like_reference(weight, make_terms(weight.shape, size), MODES[mode])
        if mode in ("zeros", "both"):
            assert (after.float()[before == 0] == 0).all()


@pytest.mark.parametrize("dtypes", [(BF16,), (FP16,), (FP64,), (FP32, BF16, FP16)], ids=str)
@pytest.mark.parametrize("ranks", [(1,), (16, 16), (300,), (7, 64, 1)], ids=str)
def test_terms(ranks: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    for case in (CASES[0], CASES[3], CASES[7], CASES[12], CASES[16], CASES[21]):
        weight = make(case)
        assert_like_reference(weight, make_terms(weight.shape, 2e-3, ranks, dtypes))


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7], CASES[12], CASES[16], CASES[20], CASES[21]], ids=str)
def test_what_is_no_number(case: tuple[str, int, int, tuple[int, int], torch.dtype]) -> None:
    for value in (float("nan"), float("inf"), 1e30, 1e-30, 0.0):
        for mode in MODES.values():
            weight = make(case)
            ((a, b, scaling),) = make_terms(weight.shape, 1e-3)
            if 0 < value < 1:
                b *= value
            elif value == 0:
                b[::2] = 0
            else:
                b[2, 3] = value
            assert_like_reference(weight, [(a, b, scaling)], mode)


def test_scales_out_of_the_ordinary() -> None:
    values = torch.tensor([0.0, -1e-4, float("nan"), float("inf"), 1e-38, 1e-42, 3e38, 1e20, 1e-20])
    for scheme, n in (("fp8_e4m3", 64), ("int8", 64), ("nf4", 64)):
        for size in (1e-3, 0.0, 1e20):
            weight = make((scheme, len(values), n, (1, n), FP32))
            weight.scales.view(-1)[:] = values
            assert_like_reference(weight, make_terms(weight.shape, size))


def test_codes_out_of_the_ordinary() -> None:
    """NaNs of e4m3, and int8's -128, which stays where nothing is added."""
    for scheme, codes in (("fp8_e4m3", E4M3), ("int8", torch.int8)):
        for block in ((1, 16), (1, 256), (4, 256), (300, 256)):
            weight = make((scheme, 4 if block[0] < 300 else 300, 256, block, FP32))
            weight.codes = torch.arange(256, dtype=torch.int16).to(BYTE).expand(weight.shape).clone().view(codes)
            before = weight.clone()
            ((a, b, scaling),) = make_terms(weight.shape, 1e-4)
            b[: len(b) // 2] = 0
            assert_like_reference(weight, [(a, b, scaling)])
            assert_like_reference(before, [(a, torch.zeros_like(b), scaling)])


@pytest.mark.parametrize("case", [CASES[0], CASES[7], CASES[8], CASES[12], CASES[16], CASES[21]], ids=str)
def test_threads_change_no_bit(case: tuple[str, int, int, tuple[int, int], torch.dtype]) -> None:
    scheme, m, n, block, dtype = case
    weight = make((scheme, 8 * m, n, (8 * m if block[0] == m else block[0], block[1]), dtype))
    terms = make_terms(weight.shape, 1e-3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made = weight.clone()
            results.append((made, update(made, terms)))
    finally:
        torch.set_num_threads(before)
    for made, sums in results[1:]:
        assert_same(made, results[0][0])
        assert torch.equal(sums, results[0][1])


def test_rows_of_codes_may_lie_apart() -> None:
    for case in (CASES[0], CASES[7], CASES[12], CASES[20], CASES[21]):
        weight = make(case)
        plain = weight.clone()
        rows = weight.codes.view(BYTE).view(weight.shape[0], -1)
        around = torch.full((rows.shape[0], rows.shape[1] + 9), 7, dtype=BYTE)
        inside = around[:, 5 : 5 + rows.shape[1]].copy_(rows).view(weight.codes.dtype)
        ((a, b, scaling),) = make_terms(weight.shape, 1e-3)
        update(plain, [(a, b, scaling)])
        scales = weight.scales.view(BYTE) if weight.scales.dtype == E8M0 else weight.scales
        torch.ops.portllm.lowrank_requantise_cpu_(
            inside, scales, [a], [b], [scaling], weight.scheme, *weight.block, weight.global_scale, []
        )
        assert torch.equal(raw(inside).view(-1), raw(plain.codes).view(-1))
        assert (around[:, :5] == 7).all()
        assert (around[:, 5 + rows.shape[1] :] == 7).all()


def test_a_part_draws_the_noise_of_the_whole() -> None:
    weight = make(("fp8_e4m3", 256, 512, (128, 128), FP32))
    ((a, b, scaling),) = make_terms(weight.shape, 1e-3)
    whole = weight.clone()
    update(whole, [(a, b, scaling)], [1, 5, 100, 1000])
    part = Weight(
        "fp8_e4m3", weight.codes[128:, 256:].contiguous(), weight.scales[1:, 2:].contiguous(), (128, 256), (128, 128)
    )
    update(part, [(a[:, 256:], b[128:], scaling)], [1, 5, 228, 1256])
    assert torch.equal(raw(part.codes), raw(whole.codes[128:, 256:]))


def test_what_does_not_fit_is_refused_before_the_first_write() -> None:
    weight = make(("fp8_e4m3", 16, 32, (8, 8), FP32))
    before = weight.clone()
    ((a, b, scaling),) = make_terms(weight.shape, 1e-3)

    def call(**changed: object) -> None:
        given = {"codes": weight.codes, "scales": weight.scales, "a": [a], "b": [b], "s": [scaling]}
        given |= {"scheme": "fp8_e4m3", "rows": 8, "columns": 8, "global": 1.0, "modes": []}
        torch.ops.portllm.lowrank_requantise_cpu_(*(given | changed).values())

    bad: list[dict[str, object]] = [
        {"scheme": "fp7"}, {"codes": weight.codes.view(BYTE)}, {"codes": weight.codes[:, ::2]},
        {"codes": weight.codes[:-1]}, {"scales": weight.scales[:-1]}, {"scales": weight.scales.double()},
        {"scales": weight.scales.repeat(1, 2)[:, ::2]}, {"a": [a[:, 1:]]}, {"b": [b[1:]]}, {"b": [b[:, 1:]]},
        {"s": []}, {"a": [], "b": [], "s": []}, {"rows": 0}, {"columns": -1}, {"columns": 16}, {"modes": [1]},
        {"a": [a, a]}, {"a": [a.long()]}, {"scheme": "nf4", "codes": weight.codes.view(BYTE)},
    ]  # fmt: skip
    for changed in bad:
        with pytest.raises(RuntimeError, match="lowrank_requantise_cpu_"):
            call(**changed)
    assert_same(weight, before)


def digest(seed: int) -> str:
    """A hash over many results, in all schemes and ways to round."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    result = hashlib.sha256()
    for case in CASES:
        for mode in MODES.values():
            weight = make(case, generator)
            sums = update(weight, make_terms(weight.shape, 1e-3), mode)
            for tensor in (weight.codes, weight.scales, sums):
                result.update(raw(tensor).numpy().tobytes())
    return result.hexdigest()


def test_instruction_sets_give_the_same_bits() -> None:
    seed = torch.seed() % 2**31
    digests = {_native.isa(): digest(seed)} if _native.isa() in ISAS else {}
    script = (
        "import runpy, sys; module = runpy.run_path(sys.argv[1]);"
        "print(module['_native'].load() or module['digest'](int(sys.argv[2])))"
    )
    for isa in ISAS:
        out = subprocess.run(
            [sys.executable, "-c", script, __file__, str(seed)],
            env={**os.environ, "PORTLLM_CPU_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if "PORTLLM_CPU_ISA" not in out:  # this CPU may lack it
            digests[isa] = out
    assert "portable" in digests
    assert len(set(digests.values())) == 1, digests
