"""The CUDA kernel, compiled by g++ and run on the CPU in place of a GPU: see ``cuda_emulator``.

The source is the one that nvcc compiles, all but ``ptx.cuh``, which holds each instruction that only a GPU has.
What the tests of the op ask of every backend is asked here of the kernel.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from portllm import ops  # noqa: F401  (defines the schema)

from .test_ops import BF16, FP16, FP32, FP64, Case, Term, bits, check, truth
from .test_ops import _case as case_strategy

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
CXX = os.environ.get("CXX", "g++")
CODES = {BF16: 0, FP16: 1, FP32: 2, FP64: 3}
DTYPES = (BF16, FP16, FP32)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"there is no {CXX}"),
    pytest.mark.skipif(platform.system() != "Linux", reason="the emulator's fibers are tried on Linux only"),
]


def build(folder: Path, csrc: Path = CSRC, optimize: str = "-O2") -> Path:
    library = folder / "emulator.so"
    flags = ["-std=c++20", optimize, "-Wall", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-ffp-contract=off"]
    include = [f"-I{TESTS / 'cuda_emulator'}", f"-I{csrc}"]
    sources = [TESTS / "cuda_emulator" / "emulator.cpp", csrc / "cuda" / "plan.cpp"]
    command = [CXX, *flags, "-shared", "-fPIC", *include, *sources, "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def build_op(folder: Path) -> Path:
    """The binding as well: `lowrank_add_cuda_` for tensors on the CPU."""
    library = folder / "emulated_op.so"
    root = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O2", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-ffp-contract=off"]
    flags += ["-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    include = [f"-I{folder}" for folder in (TESTS / "cuda_emulator", CSRC, root / "include")]
    sources = [TESTS / "cuda_emulator" / "emulator.cpp", *(CSRC / "cuda").glob("*.cpp")]
    link = [f"-L{root / 'lib'}", "-ltorch_cpu"]
    command = [CXX, *flags, "-shared", "-fPIC", *include, *sources, *link, "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("dtype", "rows", "cols", "row_stride", "col_stride")
    ]

    @staticmethod
    def of(tensor: Tensor) -> Matrix:
        return Matrix(tensor.data_ptr(), CODES[tensor.dtype], *tensor.shape, *tensor.stride())


class Emulator:
    def __init__(self, library: Path) -> None:
        self._emulate = ctypes.CDLL(str(library)).emulate
        self._emulate.restype = ctypes.c_char_p

    def update(
        self,
        jobs: Sequence[tuple[Tensor, Sequence[Term]]],
        blocks: int = 3,
        stages: int = 3,
        seed: int | None = None,
    ) -> int:
        """As the op does; the number of launches."""
        terms = [term for _, terms in jobs for term in terms]
        factors = [Matrix.of(factor) for a, b, _ in terms for factor in (a, b)]
        launches = ctypes.c_int64()
        message = self._emulate(
            (Matrix * len(jobs))(*(Matrix.of(weight) for weight, _ in jobs)),
            ctypes.c_int64(len(jobs)),
            (Matrix * len(factors))(*factors),
            (ctypes.c_double * len(terms))(*(scaling for _, _, scaling in terms)),
            (ctypes.c_int64 * len(jobs))(*(len(terms) for _, terms in jobs)),
            blocks,
            stages,
            ctypes.c_uint64(random.getrandbits(64) if seed is None else seed),
            ctypes.byref(launches),
        )
        if message:
            raise RuntimeError(message.decode())
        return launches.value


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(build(tmp_path_factory.mktemp("emulator")))


def plain(shape: tuple[int, int], dtype: torch.dtype, *terms: tuple[int, torch.dtype]) -> tuple[Tensor, list[Term]]:
    """A weight and terms, given by rank and dtype, without gaps in memory."""
    rows = tuple((rank, factors, factors, "plain", "plain", 0.6) for rank, factors in terms)
    weight, _, made = Case(shape, dtype, "plain", rows).make()
    return weight, made


quick = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))


@quick
@given(
    cases=st.lists(case_strategy, min_size=1, max_size=3),
    blocks=st.integers(1, 5),
    stages=st.integers(2, 4),
    seed=st.integers(0, 2**64 - 1),
)
@example(
    cases=[Case((129, 392), BF16, "plain", ((48, FP32, FP32, "plain", "plain", 0.5),))], blocks=1, stages=2, seed=0
)
def test_within_the_bound_of_float64_whatever_the_shape_dtype_and_strides(
    emulator: Emulator, cases: list[Case], blocks: int, stages: int, seed: int
) -> None:
    made = [case.make() for case in cases if case.dtype != FP64]
    before = [(weight.clone(), whole.clone()) for weight, whole, _ in made]
    emulator.update([(weight, terms) for weight, _, terms in made], blocks, stages, seed)
    for (weight, whole, terms), (old, old_whole) in zip(made, before, strict=True):
        check(old, terms, weight)
        weight.copy_(old)
        assert torch.equal(bits(whole), bits(old_whole))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, rank", [((1000, 63), 16), ((63, 1000), 1), ((5, 1000), 1024), ((1000, 7), 333), ((192, 1000), 100)]
)
def test_large_and_odd(emulator: Emulator, dtype: torch.dtype, shape: tuple[int, int], rank: int) -> None:
    for factors in (FP32, BF16, FP16):
        weight, terms = plain(shape, dtype, (rank, factors))
        old = weight.clone()
        emulator.update([(weight, terms)])
        check(old, terms, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_sums_give_the_bits_of_the_one_rounding(emulator: Emulator, dtype: torch.dtype) -> None:
    kinds = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16), (FP64, FP16)]
    for shape, ranks in [((1, 1), (1,)), ((63, 130), (4, 9)), ((129, 1000), (32,)), ((72, 264), (1, 2, 64, 16, 5))]:
        for dtype_a, dtype_b in kinds:
            weight = torch.randint(-300, 300, shape).to(dtype)
            terms = [
                (
                    torch.randint(-3, 4, (rank, shape[1])).to(dtype_a),
                    torch.randint(-3, 4, (shape[0], rank)).to(dtype_b),
                    0.5 * (i + 1),
                )
                for i, rank in enumerate(ranks)
            ]
            expected = truth(weight, terms).to(dtype)
            emulator.update([(weight, terms)])
            assert torch.equal(bits(weight), bits(expected))


@pytest.mark.parametrize("dtype_a, dtype_b", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, BF16)])
def test_factors_in_every_layout(emulator: Emulator, dtype_a: torch.dtype, dtype_b: torch.dtype) -> None:
    """Each way to load them: along the rank, along the columns, and one by one; on and off the tile's edges."""
    layouts = ("plain", "rows", "columns", "transposed", "corner", "strided")
    for shape in ((64, 128), (68, 140), (65, 129)):
        for rank in (16, 20, 7):
            for layout in layouts:
                case = Case(shape, BF16, "plain", ((rank, dtype_a, dtype_b, layout, layout, 0.7),))
                weight, _, terms = case.make()
                old = weight.clone()
                emulator.update([(weight, terms)])
                check(old, terms, weight)


def test_one_rounding_to_nearest_even(emulator: Emulator) -> None:
    for columns in (8, 4):  # with and without 16-byte vectors
        weight = torch.tensor([[1.0, 1.0 + 2**-7, -1.0, -1.0 - 2**-7]], dtype=BF16).repeat(1, columns // 4)
        a = torch.tensor([[1.0, 1.0, -1.0, -1.0]]).repeat(1, columns // 4)
        emulator.update([(weight, [(a, torch.tensor([[2.0**-8]]), 1.0)])])
        assert weight[0, :4].tolist() == [1.0, 1.0 + 2**-6, -1.0, -1.0 - 2**-6]
        weight = torch.ones(1, columns, dtype=BF16)
        third = (torch.ones(1, columns), torch.full((1, 1), 2.0**-9 * 1.5), 1.0)
        emulator.update([(weight, [third, third])])
        assert weight.tolist() == [[1.0 + 2**-7] * columns]


def test_the_same_bits_whatever_the_blocks_stages_and_turns(emulator: Emulator) -> None:
    jobs = [
        plain((200, 520), BF16, (20, FP32), (40, BF16)),
        plain((100, 136), BF16, (16, FP16)),
        plain((65, 200), FP32, (33, FP32)),
        plain((65, 201), FP16, (33, FP32), (1, FP32)),
    ]
    results = []
    for blocks, stages in [(1, 2), (1, 3), (1, 4), (2, 2), (5, 4), (1000, 3)]:
        copies = [(weight.clone(), terms) for weight, terms in jobs]
        emulator.update(copies, blocks, stages)
        results.append([bits(weight) for weight, _ in copies])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    for (weight, terms), result in zip(jobs, results[0], strict=True):
        check(weight, terms, result.view(weight.dtype))


def test_fp32_copies_of_bf16_give_the_bits_of_bf16(emulator: Emulator) -> None:
    """For which the kernel leaves out the products with parts that are zero."""
    weight, terms = plain((70, 136), FP32, (40, BF16))
    wide = weight.clone()
    emulator.update([(weight, terms)])
    emulator.update([(wide, [(a.float(), b.float(), s) for a, b, s in terms])])
    assert torch.equal(bits(weight), bits(wide))


def test_more_weights_and_terms_than_one_table_holds(emulator: Emulator) -> None:
    jobs = [plain((8, 8 * (1 + i % 3)), BF16, (1 + i % 5, FP32)) for i in range(400)]
    jobs += [plain((3, 5), FP32, *[(1, FP32)] * 300), plain((3, 5), FP32, *[(2, BF16)] * 300)]
    old = [weight.clone() for weight, _ in jobs]
    assert emulator.update(jobs) == 2 + 2
    for (weight, terms), start in zip(jobs, old, strict=True):
        check(start, terms, weight)
    weight, terms = plain((3, 5), FP32, *[(1, FP32)] * 511)
    with pytest.raises(RuntimeError, match=r"weights\[0\] has 511 terms; 510 fit into a launch"):
        emulator.update([(weight, terms)])


def test_launches_and_what_is_left_out(emulator: Emulator) -> None:
    """One launch for each dtype and alignment; transposed weights are as good as others."""
    jobs = [plain((64, 64), BF16, (4, FP32)), plain((8, 128), BF16, (2, BF16)), plain((9, 128), FP32, (2, BF16))]
    transposed, terms = plain((64, 64), BF16, (4, FP32))
    jobs.append((transposed.T, [(b.T, a.T, s) for a, b, s in terms]))
    old = [weight.clone() for weight, _ in jobs]
    assert emulator.update(jobs) == 2
    for (weight, terms), start in zip(jobs, old, strict=True):
        check(start, terms, weight)
    assert emulator.update([plain((8, 9), BF16, (4, FP32))]) == 1
    for shape in ((0, 5), (5, 0), (0, 0)):
        assert emulator.update([plain(shape, BF16, (2, FP32))]) == 0
    assert emulator.update([(torch.ones(4, 4), [(torch.ones(0, 4), torch.ones(4, 0), 1.0)] * 0)]) == 0
    with pytest.raises(RuntimeError, match=r"weights\[1\] has elements that share memory"):
        emulator.update([jobs[0], (torch.ones(1, 8).expand(4, 8), plain((4, 8), FP32, (1, FP32))[1])])


def test_rows_that_lie_far_apart(emulator: Emulator) -> None:
    """Offsets of more than 32 bits, in every matrix and on both ways through W."""
    stride, rows = 2**31 + 16, 3
    no_reserve = 0x4000  # only the pages that are touched take memory
    far = []
    for _ in range(3):
        try:
            memory = mmap.mmap(-1, 2 * rows * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        except OSError:
            pytest.skip("there is too little address space")
        far.append(torch.frombuffer(memory, dtype=BF16).as_strided((rows, 16), (stride, 1)))
        far[-1].copy_(torch.randn(rows, 16))
    weight, b, a = far[0], far[1][:, :rows], far[2]
    for view in (weight, weight[:, 1:]):
        terms = [(a[:, 16 - view.shape[1] :], b, 0.5)]
        old = view.clone()
        emulator.update([(view, terms)])
        check(old, terms, view)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number(emulator: Emulator, dtype: torch.dtype) -> None:
    """NaN and infinities stay where they belong; a finite sum that is too large becomes an infinity."""
    for columns in (136, 135):
        weight, terms = plain((66, columns), dtype, (4, FP32))
        largest = torch.finfo(dtype).max
        weight[0, 0], weight[1, 1], weight[2, 2] = float("nan"), float("inf"), -float("inf")
        weight[3, 3] = largest
        a, b, _ = terms[0]
        b[3], a[:, 3] = 0, 0
        b[3, 0], a[0, 3] = largest / 2**10, 2**10  # 0.6 of the largest goes onto the largest
        b[5, 1], a[2, 7] = float("nan"), float("nan")
        emulator.update([(weight, terms)])
        nan = torch.zeros(weight.shape, dtype=torch.bool)
        nan[0, 0] = nan[5, :] = nan[:, 7] = True
        assert torch.equal(weight.isnan(), nan)
        assert len(bits(weight)[nan].unique()) == 1, "every NaN is the same one"
        assert weight[1, 1] == weight[3, 3] == float("inf")
        assert weight[2, 2] == -float("inf")


# -- the op ----------------------------------------------------------------------------------------------------------

Op = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[float], Sequence[int]], None]


@pytest.fixture(scope="module")
def op(tmp_path_factory: pytest.TempPathFactory) -> Op:
    torch.ops.load_library(str(build_op(tmp_path_factory.mktemp("op"))))
    return torch.ops.portllm.lowrank_add_cuda_


@settings(quick, max_examples=20)
@given(cases=st.lists(case_strategy, min_size=1, max_size=3))
def test_the_op(op: Op, cases: list[Case]) -> None:
    made = [case.make() for case in cases if case.dtype != FP64]
    old = [weight.clone() for weight, _, _ in made]
    terms = [term for _, _, terms in made for term in terms]
    lists = [[term[i] for term in terms] for i in range(3)]
    if made:
        op([weight for weight, _, _ in made], *lists, [len(terms) for _, _, terms in made])
    for (weight, _, its_terms), start in zip(made, old, strict=True):
        check(start, its_terms, weight)


BROKEN: dict[str, tuple[int, int, object, str]] = {
    "a vector": (0, 1, torch.ones(4), r"weights\[1\] must be a 2-D tensor"),
    "fp64": (0, 1, torch.ones(4, 3, dtype=FP64), r"weights\[1\] is fp64"),
    "integers": (0, 1, torch.ones(4, 3, dtype=torch.int32), "tensors must be bf16"),
    "shared memory": (0, 1, torch.ones(1, 3).expand(4, 3), r"weights\[1\] has elements that share memory"),
    "A is too wide": (1, 1, torch.ones(2, 4), r"lora_A\[1\] is \[2, 4\], which does not fit"),
    "B is too tall": (2, 1, torch.ones(5, 2), r"lora_B\[1\] is \[5, 2\], which does not fit"),
    "the ranks differ": (2, 1, torch.ones(4, 1), r"lora_B\[1\] is \[4, 1\], which does not fit"),
    "too many terms": (4, 1, 2, r"n_terms\[1\] does not fit"),
    "too few terms": (4, 1, 0, "more factors than n_terms says"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_op_checks_all_before_the_first_write(op: Op, case: str) -> None:
    first = torch.ones(6, 5)
    lists: list[list] = [
        [first, torch.ones(4, 3)],
        [torch.ones(2, 5), torch.ones(2, 3)],
        [torch.ones(6, 2), torch.ones(4, 2)],
        [1.0, 1.0],
        [1, 1],
    ]
    key, index, value, message = BROKEN[case]
    lists[key][index] = value
    with pytest.raises((RuntimeError, ValueError), match=message):
        op(*lists)
    assert torch.equal(first, torch.ones(6, 5))


# -- the emulator sees what a GPU might not show ---------------------------------------------------------------------

MISTAKES = {
    "a wait is missing": ("    wait(table.stages);\n", ""),
    "a wait is too short": ("cp_async_wait<1>()", "cp_async_wait<2>()"),
    "the barrier is missing": (
        "barrier_any(store_factors(half, raw, table.terms[now.term]))",
        "store_factors(half, raw, table.terms[now.term]) | true",
    ),
    "one buffer for two": ("second = !second;", ""),
    "a row too many": ("row + 8 < w.m ? left : 0", "left"),
    "the ring is too short": ("slot + ahead - table.stages", "slot + ahead - table.stages + 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_kernel_is_noticed(tmp_path: Path, mistake: str) -> None:
    shutil.copytree(CSRC, tmp_path / "csrc")
    right, wrong = MISTAKES[mistake]
    sources = {path: path.read_text() for path in (tmp_path / "csrc" / "cuda").glob("*.cuh")}
    assert sum(source.count(right) for source in sources.values()) == 1
    for path, source in sources.items():
        path.write_text(source.replace(right, wrong))
    emulator = Emulator(build(tmp_path, tmp_path / "csrc", "-O1"))
    with pytest.raises((RuntimeError, AssertionError)):  # noqa: PT012
        for _ in range(3):
            weight, terms = plain((300, 392), BF16, (40, FP32))
            old = weight.clone()
            emulator.update([(weight, terms)], blocks=2, stages=2)
            check(old, terms, weight)
