"""What the Triton kernel compiles to on sm_80 and sm_90, read from its PTX and cubin: this needs no GPU.

Compiled in a process of its own (this file, run as a script), because another test may have told Triton to
interpret.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = (90, 80)
# Shared memory that the blocks of one multiprocessor may take together.
SHARED_MEMORY = {90: 227 * 1024, 80: 163 * 1024}
# Bytes that a thread may spill: none where it matters, next to nothing where ptxas is a register short.
SPILLS = {90: 0, 80: 16}
# Name: weight dtype, factor dtype, W aligned, factors aligned, one term.
VARIANTS: dict[str, tuple[torch.dtype, torch.dtype | None, bool, bool, bool]] = {
    "bf16, fp32 factors": (BF16, FP32, True, True, True),
    "bf16, fp32 factors, terms": (BF16, FP32, True, True, False),
    "bf16, bf16 factors": (BF16, BF16, True, True, True),
    "fp16, fp16 factors": (FP16, FP16, True, True, True),
    "fp32, fp32 factors": (FP32, FP32, True, True, True),
    "bf16, strided fp32 factors": (BF16, FP32, True, False, True),
    "strided bf16, mixed factors, terms": (BF16, None, False, False, False),
}


def _tools() -> Path | None:
    """Triton's folder of CUDA tools, found without importing Triton."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    return folder if (folder / "ptxas").exists() else None


def _resources(cubin: bytes, folder: Path) -> dict[str, int] | None:
    """Registers and stack of a thread, in registers and bytes; None without a cuobjdump."""
    tools = _tools()
    tool = shutil.which("cuobjdump", path=tools) or shutil.which("cuobjdump")
    if tool is None:
        return None
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [tool, "--dump-resource-usage", str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", output)
    assert found, output
    return {"registers": int(found[1]), "stack": int(found[2])}


def main(folder: Path) -> None:
    """Compile every variant for every architecture; print what came out as one line of JSON."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from portllm.kernels.lowrank_add import Variant, lowrank_add_kernel

    arguments = {"p_weights": "*i64", "p_terms": "*i64", "p_scalings": "*fp32", "n_weights": "i32", "n_tiles": "i32"}
    divisible = {(index,): [["tt.divisibility", 16]] for index in range(3)}
    results: dict[str, dict[str, Any]] = {}
    for architecture in ARCHITECTURES:
        for name, fields in VARIANTS.items():
            variant = Variant(*fields)
            constants = variant.constants()
            signature = arguments | dict.fromkeys(constants, "constexpr")
            source = ASTSource(lowrank_add_kernel, signature, constants, divisible)
            kernel = triton_compile(source, target=GPUTarget("cuda", architecture, 32), options=variant.options())
            results[f"{architecture} {name}"] = {
                "ptx": kernel.asm["ptx"],
                "cubin": len(kernel.asm["cubin"]),
                "shared": kernel.metadata.shared,
                "resources": _resources(kernel.asm["cubin"], folder),
                "allowed_registers": variant.registers,
                "blocks": variant.blocks_per_sm,
            }
    print(json.dumps(results))


pytestmark = pytest.mark.skipif(_tools() is None, reason="triton or its ptxas is missing")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cubin")
    # A cache of its own: what is looked at must come from this compiler.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, __file__, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def _is_aligned(name: str) -> bool:
    return VARIANTS[name][2] and VARIANTS[name][3]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", VARIANTS)
class TestCompiled:
    def test_gives_a_cubin(self, compiled: dict[str, Any], name: str, architecture: int) -> None:
        result = compiled[f"{architecture} {name}"]
        assert result["cubin"] > 0
        assert re.search(rf"\.target\s+sm_{architecture}", result["ptx"])

    def test_blocks_stay_resident(self, compiled: dict[str, Any], name: str, architecture: int) -> None:
        result = compiled[f"{architecture} {name}"]
        assert result["blocks"] * result["shared"] <= SHARED_MEMORY[architecture]
        if result["resources"] is None:
            pytest.skip("there is no cuobjdump")
        assert result["resources"]["registers"] <= result["allowed_registers"]

    def test_registers_suffice(self, compiled: dict[str, Any], name: str, architecture: int) -> None:
        resources = compiled[f"{architecture} {name}"]["resources"]
        if resources is None:
            pytest.skip("there is no cuobjdump")
        assert resources["stack"] <= (SPILLS[architecture] if _is_aligned(name) else 64)

    def test_tensor_cores_multiply_the_stored_bits(
        self, compiled: dict[str, Any], name: str, architecture: int
    ) -> None:
        ptx = compiled[f"{architecture} {name}"]["ptx"]
        kind = "f16" if VARIANTS[name][1] == FP16 else "bf16"
        shapes = {
            90: rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.{kind}\.{kind}",
            80: rf"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.{kind}\.{kind}\.f32",
        }
        products = len(re.findall(shapes[architecture], ptx))
        parts = 1 if VARIANTS[name][1] in (BF16, FP16) else 6
        assert products > 0
        assert products % parts == 0
        assert "tf32" not in ptx

    def test_sums_are_not_fused(self, compiled: dict[str, Any], name: str, architecture: int) -> None:
        assert not re.search(r"\bfma\.\w+\.f32", compiled[f"{architecture} {name}"]["ptx"])

    def test_aligned_weights_move_in_16_byte_vectors(
        self, compiled: dict[str, Any], name: str, architecture: int
    ) -> None:
        ptx = compiled[f"{architecture} {name}"]["ptx"]
        # 64 rows of 128 bytes: four vectors for each of 128 threads. Only W carries evict_first.
        loads = re.findall(r"ld\.global[.\w:]*evict_first[.\w:]*", ptx)
        stores = re.findall(r"st\.global[.\w:]*evict_first[.\w:]*", ptx)
        vectors = [access for access in loads + stores if access.endswith("v4.b32")]
        assert loads
        assert stores
        if VARIANTS[name][2]:
            assert len(loads) == len(stores) == 4
            assert len(vectors) == 8
        else:
            assert not vectors


if __name__ == "__main__":
    main(Path(sys.argv[1]))
