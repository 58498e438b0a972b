"""What `_native` says when there is no library to use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
