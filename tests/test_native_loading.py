"""What `_native` says when there is no library to use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from portllm import _native


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "libportllm.so"
    monkeypatch.setattr(_native, "LIBRARY", path)
    monkeypatch.delenv("PORTLLM_DISABLE_NATIVE", raising=False)
    _native.load.cache_clear()
    yield path
    _native.load.cache_clear()


def test_not_built(library: Path) -> None:
    assert "was not built" in (_native.load() or "")
    assert _native.isa() is None


def test_not_a_library(library: Path) -> None:
    library.write_bytes(b"not a library")
    reason = _native.load()
    assert reason is not None
    assert reason.startswith("the native library does not load")
    assert "\n" not in reason


def test_switched_off(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTLLM_DISABLE_NATIVE", "1")
    assert _native.load() == "disabled by PORTLLM_DISABLE_NATIVE"
    assert _native.isa() is None


def test_no_such_instruction_set(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native.torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(_native, "_chosen_isa", lambda: None)
    monkeypatch.setenv("PORTLLM_CPU_ISA", "abacus")
    library.touch()
    assert "abacus" in (_native.load() or "")


# -- the library for CUDA --------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "libportllm_cuda.so"
    monkeypatch.setattr(_native, "CUDA_LIBRARY", path)
    monkeypatch.setattr(_native.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("PORTLLM_DISABLE_NATIVE", raising=False)
    _native.load_cuda.cache_clear()
    yield path
    _native.load_cuda.cache_clear()


def test_cuda_is_not_built(cuda_library: Path) -> None:
    assert "was not built: it needs nvcc" in (_native.load_cuda() or "")


def test_cuda_is_not_a_library(cuda_library: Path) -> None:
    cuda_library.write_bytes(b"not a library")
    assert (_native.load_cuda() or "").startswith("the library for CUDA does not load")


def test_cuda_without_a_device(cuda_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native.torch.cuda, "is_available", lambda: False)
    assert _native.load_cuda() == "torch sees no CUDA device"


def test_cuda_is_switched_off(cuda_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTLLM_DISABLE_NATIVE", "1")
    assert _native.load_cuda() == "disabled by PORTLLM_DISABLE_NATIVE"


@pytest.mark.skipif(not _native.CUDA_LIBRARY.exists(), reason="the library for CUDA was not built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_loads_where_there_is_no_gpu_and_says_so() -> None:
    """Also into a torch without CUDA: what it needs of that it looks up when it is called."""
    code = """
import torch
from portllm import _native, ops
torch.cuda.is_available = lambda: True
print(_native.load_cuda())
weight, a, b = torch.ones(2, 2), torch.ones(1, 2), torch.ones(2, 1)
try:
    torch.ops.portllm.lowrank_add_cuda_([weight], [a], [b], [1.0], [1])
except NotImplementedError as error:
    assert "'CPU' backend" in str(error), error
    assert "CUDA: registered" in str(error), error
"""
    environment = os.environ | {"PORTLLM_DISABLE_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CUDA says: ") or "no CUDA device" in done.stdout
