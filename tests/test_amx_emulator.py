"""AMX instructions against their definition: those of the CPU where it has them, else of ``amx_emulator.cpp``.

A program built by the compiler at hand runs with the emulator preloaded. On a CPU with AMX the emulator stands aside,
and these tests then ask the hardware.
"""

from __future__ import annotations

import os
import platform
import random
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
CXX = os.environ.get("CXX", "g++")
AMX = ("-mamx-tile", "-mamx-bf16", "-pthread")
HARDWARE = Path("/proc/cpuinfo").exists() and "amx_bf16" in Path("/proc/cpuinfo").read_text()


def build(source: str, output: Path, *flags: str) -> Path:
    command = [CXX, "-std=c++20", *flags, str(HERE / source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def compiles(source: str, *flags: str) -> bool:
    """Whether there is a compiler and an assembler, with what the flags need."""
    command = [CXX, *flags, "-x", "c++", "-", "-o", os.devnull]
    try:
        return subprocess.run(command, input=source, capture_output=True, text=True).returncode == 0
    except OSError:
        return False


class Programs:
    """The emulator and the program, built once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.emulator = build("amx_emulator.cpp", folder / "emulator.so", "-O3", "-shared", "-fPIC")
        self.program = build("amx_cases.cpp", folder / "cases", "-O2", *AMX)

    def run(self, *arguments: str, program: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program or self.program, *arguments],
            cwd=self.folder,  # for what a crash leaves
            env=os.environ | {"LD_PRELOAD": str(self.emulator)} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("AMX is of x86-64, the emulator for Linux")
    if not compiles("#include <immintrin.h>\nint main() { _tile_release(); }", *AMX):
        pytest.skip(f"{CXX} does not know AMX")
    return Programs(tmp_path_factory.mktemp("amx"))


# -- products --------------------------------------------------------------------------------------------------------

WIDE = np.longdouble  # 80 bits hold a product of two bf16 exactly, and a sum well enough to round it
SMALLEST = WIDE(2) ** -126  # normal fp32


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < SMALLEST, np.copysign(0, x), x)


def rounded(exact: np.ndarray) -> np.ndarray:
    """To fp32; zero if it is too small after a rounding to 24 bits that knows no smallest exponent."""
    tiny = np.abs(exact) < SMALLEST - SMALLEST * WIDE(2) ** -25
    return np.where(tiny, np.copysign(0, exact), exact).astype(np.float32)


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """TDPBF16PS as the SDM has it: a [m, k, 2], b [k, n, 2], c [m, n]."""
    a, b, c = (flushed(x.astype(WIDE)) for x in (a, b, c))
    sums = np.zeros((*c.shape, 2), np.float32)
    for k in range(len(b)):
        sums = rounded(a[:, None, k] * b[k] + sums)
    return rounded(c + rounded(sums[..., 0].astype(WIDE) + sums[..., 1]))


# What amx_cases.cpp reads.
CASE = np.dtype(
    [("shape", "<i4", 3), ("start", "<i4", 3), ("stride", "<i4", 3), ("unused", "<i4", 7)]
    + [(name, "<u4", 1024) for name in "abc"]
)
# Exponents of A, B and C, as stored, from and up to.
EXPONENTS = {
    "near one": ((115, 140), (115, 140), (115, 140)),
    "results near the smallest": ((60, 66), (60, 66), (0, 4)),
    "subnormal factors": ((0, 2), (200, 255), (90, 130)),
    "subnormal everything": ((0, 2), (0, 2), (0, 2)),
    "results near the largest": ((184, 192), (184, 192), (250, 255)),
    "anything": ((0, 256), (90, 130), (0, 256)),
}


def numbers(rng: np.random.Generator, exponents: tuple[int, int], size: int) -> np.ndarray:
    """Bits of fp32 numbers, many with few of them set, so that some sums lie halfway between two."""
    mantissa = rng.integers(2**23, size=size) & rng.choice([0x7FFFFF, 0x7F0000, 0x600000, 0], size=size)
    sign = rng.integers(2, size=size) << 31
    return (sign | rng.integers(*exponents, size=size) << 23 | mantissa).astype(np.uint32)


def layout(rng: np.random.Generator, rows: int, words: int, written: bool) -> tuple[int, int]:
    """Start and stride of a matrix in a buffer, in bytes; rows that are only read may lie on top of each other."""
    stride = 4 * int(rng.integers(words, 49))
    if rng.random() < 0.2 and not written:
        stride = 4 * int(rng.integers(words))
    start = 4 * int(rng.integers(1024 - 48 * 16))
    return (start + stride * (rows - 1), -stride) if rng.random() < 0.3 else (start, stride)


def make_case(rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """One case, and the buffer of C that it should leave."""
    case = np.zeros((), CASE)
    m, k, n = rng.integers(1, 17, size=3) if rng.random() < 0.8 else (16, 16, 16)
    case["shape"] = m, k, n
    matrices, places = [], []
    for i, (name, rows, words) in enumerate((("a", m, k), ("b", k, n), ("c", m, n))):
        start, stride = layout(rng, rows, words, written=name == "c")
        case["start"][i], case["stride"][i] = start, stride
        words_of_rows = (start + stride * np.arange(rows)[:, None]) // 4 + np.arange(words)
        bits = numbers(rng, EXPONENTS[kind][i], 1024)
        if name != "c":
            bits = bits >> 16 | numbers(rng, EXPONENTS[kind][i], 1024) & 0xFFFF0000
        case[name] = bits
        places.append(words_of_rows)
        matrices.append(bits[words_of_rows])
    a, b = (np.stack([x << 16, x & 0xFFFF0000], -1).view(np.float32) for x in matrices[:2])
    want = case["c"].copy()
    want[places[2]] = product(a, b, matrices[2].view(np.float32)).view(np.uint32)
    return case, want


@pytest.mark.parametrize("threads", [1, 3])
def test_products(programs: Programs, threads: int) -> None:
    rng = np.random.default_rng(random.getrandbits(64))
    with np.errstate(all="ignore"):
        made = [make_case(rng, kind) for kind in EXPONENTS for _ in range(60)]
    order = rng.permutation(len(made))
    cases = np.stack([made[i][0] for i in order])
    file = programs.folder / f"cases-{threads}"
    file.write_bytes(cases.tobytes())
    done = programs.run("products", str(file), str(threads))
    assert (done.returncode, done.stderr) == (0, "")
    results = np.fromfile(file, CASE)
    assert (results["a"] == cases["a"]).all()
    assert (results["b"] == cases["b"]).all()
    got, want = results["c"], np.stack([made[i][1] for i in order])
    nan = np.isnan(want.view(np.float32))
    assert (np.isnan(got.view(np.float32)) == nan).all()
    wrong = ((got != want) & ~nan).any(-1)
    assert not wrong.any(), f"{wrong.sum()} of {len(wrong)} cases, the first of shape {cases['shape'][wrong.argmax()]}"


# -- everything else -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["asking", "addressing", "zeroing", "fitting"])
def test_right_uses(programs: Programs, what: str) -> None:
    done = programs.run(what)
    assert (done.returncode, done.stderr) == (0, "")


WRONG = [
    *("another instruction", "without asking", "not configured", "released", "palette 0", "another thread"),
    *("palette", "reserved byte", "ninth tile", "too many rows", "too many columns"),
    *("rows without columns", "columns without rows", "a tile without a shape"),
    *("one tile twice", "half a pair", "inner size", "rows", "columns"),
]


@pytest.mark.parametrize("what", WRONG)
def test_wrong_uses_are_fatal(programs: Programs, what: str) -> None:
    done = programs.run(what)
    # The CPU raises another signal for a configuration.
    assert done.returncode in ((-signal.SIGILL, -signal.SIGSEGV) if HARDWARE else (-signal.SIGILL,)), done.stderr


def test_it_can_refuse(programs: Programs) -> None:
    done = programs.run("asking", AMX_EMULATOR_REFUSE="1")
    assert (done.returncode, done.stdout) == (3, "refused: 22\n")


@pytest.mark.skipif(HARDWARE, reason="AddressSanitizer does not see what the hardware touches")
def test_address_sanitizer_sees_what_tiles_touch(programs: Programs) -> None:
    flags = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address", "-static-libasan")
    if not compiles("int main() {}", *flags):
        pytest.skip("no AddressSanitizer")
    program = build("amx_cases.cpp", programs.folder / "cases-asan", *flags, *AMX)
    for what in ("addressing", "zeroing"):
        done = programs.run(what, program=program)
        assert (done.returncode, done.stderr) == (0, "")
    for what, report in (("load too much", "READ of size 64"), ("store too much", "WRITE of size 64")):
        done = programs.run(what, program=program)
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr
        assert report in done.stderr
        assert " in overflow " in done.stderr, "the program's own frames are in the report"
