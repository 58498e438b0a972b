"""DoRA on Triton: against plain torch, interpreted on the CPU, and what it compiles to; this needs no GPU.

Triton decides at its import whether it interprets, so both run in a process of their own (this file, as a script).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Half a unit in the last place, relative to a value.
ROUNDING = {BF16: 2**-8, FP16: 2**-11, FP32: 0.0}


def interpreted() -> None:
    from portllm import dora

    for (m, n), axes in [((65, 129), [0]), ((70, 33), [1]), ((9, 200), [-1, 0, 1, -1]), ((64, 128), [0, 0])]:
        for dtype, factors in ((FP32, FP32), (BF16, FP32), (FP16, FP16)):
            for transposed in (False, True):
                weight = torch.randn(m, n).to(dtype)
                if transposed:
                    weight = torch.randn(n, m).to(dtype).T
                lora_A = [torch.randn(5, n).to(factors) for _ in axes]
                lora_B = [torch.randn(m, 5).to(factors) for _ in axes]
                magnitudes = [torch.rand((m, n)[axis]) + 0.5 for axis in axes if axis >= 0]
                strengths = [1.0] if len(axes) == 1 else [0.5 + 0.25 * i for i in range(len(axes))]
                shared = lora_A, lora_B, [0.4] * len(axes), [len(axes)]
                expected, apart = weight.clone().float(), weight.clone()
                dora.lowrank_dora_([expected], *shared, magnitudes, axes, strengths, backend="torch")
                squares = dora.lowrank_dora_squares([weight], *shared, axes, "triton")
                of_torch = dora.lowrank_dora_squares([weight], *shared, axes, "torch")
                for found, want in zip(squares, of_torch, strict=True):
                    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
                dora.lowrank_dora_([apart], *shared, magnitudes, axes, strengths, squares, "triton")
                dora.lowrank_dora_([weight], *shared, magnitudes, axes, strengths, backend="triton")
                assert torch.equal(weight, apart)
                size = 1 + expected.abs()
                assert ((weight.float() - expected).abs() <= (ROUNDING[dtype] + 1e-5) * size).all()
    for axis in (0, 1):  # zeros have no direction, and what is not finite stays in its vector
        weight = torch.randn(70, 70)
        vectors = weight if axis == 0 else weight.T
        vectors[3] = 0
        vectors[40, 7] = torch.nan
        lora_A, lora_B = torch.randn(2, 70), torch.randn(70, 2)
        (lora_B if axis == 0 else lora_A.T)[[3, 40]] = 0
        dora.lowrank_dora_([weight], [lora_A], [lora_B], [1.0], [1], [torch.ones(70)], [axis], [1.0], backend="triton")
        assert not vectors[3].any()
        assert int(weight.isnan().sum()) == 1


def compiled() -> None:
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from portllm.kernels.lowrank_add import Variant
    from portllm.kernels.lowrank_dora import OPTIONS, dora_squares_kernel, dora_write_kernel

    table = {"p_weight": "*i64", "p_terms": "*i64", "p_scalings": "*fp32"}
    squares = table | {"p_partial": "*fp64", "i_term": "i32", "n_tiles": "i32"}
    write = table | {"p_factors": "*fp32", "p_places": "*i64", "n_norms": "i32", "n_tiles": "i32", "keep": "fp32"}
    variants = [(BF16, FP32, True, True, True), (FP16, FP16, True, True, False), (BF16, None, False, False, False)]
    for architecture in (90, 80):
        for fields in variants:
            constants = Variant(*fields).constants()
            for kernel, arguments, more in [
                (dora_squares_kernel, squares, {"AXIS": 0}),
                (dora_squares_kernel, squares, {"AXIS": 1}),
                (dora_write_kernel, write, {}),
            ]:
                values = more | constants
                source = ASTSource(kernel, arguments | dict.fromkeys(values, "constexpr"), values)
                made = triton_compile(source, target=GPUTarget("cuda", architecture, 32), options=OPTIONS)
                assert made.asm["cubin"]
                assert "mma" in made.asm["ptx"]
                assert "tf32" not in made.asm["ptx"]
                assert "atom" not in made.asm["ptx"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is missing")
@pytest.mark.parametrize("mode", ["interpreted", "compiled"])
def test_in_a_process_of_its_own(mode: str, tmp_path: Path) -> None:
    flag = "1" if mode == "interpreted" else "0"
    environment = {**os.environ, "TRITON_INTERPRET": flag, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, __file__, mode]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr


if __name__ == "__main__":
    {"interpreted": interpreted, "compiled": compiled}[sys.argv[1]]()
