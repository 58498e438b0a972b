"""What nvcc makes of the CUDA kernel for sm_80 and sm_90: this needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
# Shared memory of a multiprocessor, all but what is kept of it for each block; and its registers.
SHARED_MEMORY = {80: 164 << 10, 90: 228 << 10}
REGISTERS = 65536
# As in csrc/cuda/table.h, which a test compares.
THREADS, BLOCKS, MIN_STAGES, FACTOR_BYTES, TILE = 256, 2, 2, 36864, 64 * 128
DTYPES = ("bf16", "fp16", "fp32")  # in the order of the enum

pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


class Compiled:
    def __init__(self, architecture: int, folder: Path) -> None:
        command = [NVCC, "-std=c++20", f"-arch=sm_{architecture}", "-Xptxas", "-v", "--keep", "--keep-dir", folder]
        source = CSRC / "cuda" / "launch.cu"
        done = subprocess.run(
            [*command, f"-I{CSRC}", "-cubin", source, "-o", folder / "launch.cubin"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        self.ptx = next(folder.glob("*.ptx")).read_text()
        # Registers, and bytes of stack and of spills, of each kernel by dtype and alignment.
        self.kernels: dict[tuple[str, bool], tuple[int, int, int]] = {}
        for part in done.stderr.split("Compiling entry function")[1:]:
            name = re.search(r"DTypeE(\d)ELb([01])", part)
            stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", part)
            registers = re.search(r"Used (\d+) registers", part)
            assert name
            assert stack
            assert registers
            key = DTYPES[int(name[1])], name[2] == "1"
            self.kernels[key] = int(registers[1]), int(stack[1]), int(stack[2])

    def body(self, dtype: str, aligned: bool) -> str:
        """The PTX of one kernel."""
        mangled = f"DTypeE{DTYPES.index(dtype)}ELb{int(aligned)}"
        return next(part for part in self.ptx.split(".entry")[1:] if mangled in part.split("(")[0])


@pytest.fixture(scope="module", params=[80, 90])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Compiled]:
    return request.param, Compiled(request.param, tmp_path_factory.mktemp("nvcc"))


def test_nothing_is_spilled_and_the_blocks_fit(compiled: tuple[int, Compiled]) -> None:
    architecture, result = compiled
    assert set(result.kernels) == {(dtype, aligned) for dtype in DTYPES for aligned in (True, False)}
    for (dtype, aligned), (registers, stack, spills) in result.kernels.items():
        print(f"sm_{architecture} {dtype} {'aligned' if aligned else 'strided'}: {registers} registers")
        assert (stack, spills) == (0, 0)
        assert registers * THREADS * BLOCKS <= REGISTERS
        element = 4 if dtype == "fp32" else 2
        bytes_of_block = FACTOR_BYTES + (MIN_STAGES * TILE * element if aligned else 0) + 1024
        blocks = 1 if (architecture, dtype) == (80, "fp32") else BLOCKS
        assert blocks * bytes_of_block <= SHARED_MEMORY[architecture]


def test_the_numbers_above_are_those_of_the_source() -> None:
    source = (CSRC / "cuda" / "table.h").read_text()
    values = dict(re.findall(r"constexpr int (k\w+) = (\d+);", source))
    assert int(values["kThreads"]) == THREADS
    assert int(values["kBlocksPerSm"]) == BLOCKS
    assert int(values["kMinStages"]) == MIN_STAGES
    assert int(values["kTileRows"]) * int(values["kTileCols"]) == TILE
    rows_and_columns = int(values["kTileRows"]) + int(values["kTileCols"])
    assert 2 * 3 * rows_and_columns * int(values["kTileRank"]) * 2 == FACTOR_BYTES


@pytest.mark.parametrize("dtype", DTYPES)
def test_instructions(compiled: tuple[int, Compiled], dtype: str) -> None:
    """W moves in 16-byte vectors past the caches, products are those of the tensor cores, sums are not fused."""
    body = compiled[1].body(dtype, aligned=True)
    vectors = 8 if dtype == "fp32" else 4
    copies = len(re.findall(r"cp\.async\.cg\.shared\.global\.L2::cache_hint \[.*\], 16, ", body))
    assert copies % vectors == 0
    assert copies > 0
    assert len(re.findall(r"st\.global\.L1::no_allocate\.L2::cache_hint\.v4\.b32", body)) == vectors
    assert not re.search(r"st\.global\.[ubf]", body)
    # Of 2 x 4 results: six products of three parts, one of bf16, and one of fp16.
    assert len(re.findall(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16", body)) == 8 * 7
    assert len(re.findall(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16", body)) == 8
    # Only where a term is scaled.
    assert len(re.findall(r"fma\.rn\.f32", body)) == 32
    assert not re.search(r"\.local", body), "the table is copied, or an array lies in memory"
