"""What bench_update.py measures: weights with patches, and the ways to update them.

pytest benchmarks/cases.py                       # the same calls under pytest-benchmark, for comparing commits
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from portllm import ops

Shape = tuple[int, int]


def linear_shapes(hidden: int, queries: int, keys: int, inner: int, experts: int = 1) -> list[Shape]:
    """(out, in) of a decoder layer's q, k, v, o, and of gate, up, down of each expert."""
    attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    return attention + [(inner, hidden), (inner, hidden), (hidden, inner)] * experts


LAYERS = {
    "Mistral-7B": linear_shapes(4096, 4096, 1024, 14336),
    "Gemma2-9B": linear_shapes(3584, 4096, 2048, 14336),
    "Llama-3.1-8B": linear_shapes(4096, 4096, 1024, 14336),
}
WAYS = ("limit", "portllm", "addmm_", "peft")
SCALING = 2.0
PEFT_WEIGHTS = 1000  # what PEFT's merge of more weights is scaled up from


class Case:
    """Weights with patches, and the ways to update them; each call is one whole pass."""

    def __init__(
        self,
        shapes: list[Shape],
        rank: int,
        patches: int = 1,
        *,
        weight_dtype: torch.dtype = torch.bfloat16,
        factor_dtype: torch.dtype = torch.float32,
        delta: float = 0.01,
    ) -> None:
        self.weights = [torch.empty(shape, dtype=weight_dtype).normal_(0, 0.02) for shape in shapes]
        self.terms = [[_factors(weight, rank, factor_dtype, delta) for _ in range(patches)] for weight in self.weights]
        self.bytes = sum(2 * w.nbytes for w in self.weights)
        self.peft_share = min(1.0, PEFT_WEIGHTS / len(shapes))
        self.multiply_adds = sum(rank * patches * m * n for m, n in shapes)
        # With many small weights the limit would be that of calls, not of the memory.
        many = len(shapes) > PEFT_WEIGHTS
        self._block = [torch.zeros(self.bytes // 2, dtype=torch.int8).view(weight_dtype)] if many else self.weights
        self._narrow = [[(a.to(weight_dtype), b.to(weight_dtype)) for a, b in terms] for terms in self.terms]
        self._calls = {count: self._arguments(count) for count in (1, patches)}
        self._prepared: ops.Prepared | None = None
        self._peft: list[Any] = []

    def _arguments(self, count: int) -> tuple[list[Any], ...]:
        used = [term for terms in self.terms for term in terms[:count]]
        scalings, n_terms = [SCALING] * len(used), [count] * len(self.weights)
        return self.weights, [a for a, _ in used], [b for _, b in used], scalings, n_terms

    def limit(self) -> None:
        """Read and write each weight once, changing nothing; an integer op, so that only the memory is timed.

        For many small weights it is one block of their size.
        """
        for weight in self._block:
            weight.view(torch.int16 if weight.element_size() == 2 else torch.int32).bitwise_or_(0)

    def portllm(self) -> None:
        ops.lowrank_add_(*self._calls[len(self.terms[0])])

    def prepared(self) -> None:
        """As ``portllm``, with the call prepared once, by its first round."""
        if self._prepared is None:
            self._prepared = ops.Prepared(*self._calls[len(self.terms[0])])
        self._prepared()

    def one_patch(self) -> None:
        """As ``portllm``, with the first patch only."""
        ops.lowrank_add_(*self._calls[1])

    def addmm_(self) -> None:
        """The best call in torch; it takes factors of the weight's dtype only, so they lose their last bits."""
        for weight, terms in zip(self.weights, self._narrow, strict=True):
            for a, b in terms:
                weight.addmm_(b, a, alpha=SCALING)

    def peft(self) -> None:
        """PEFT's own merge of the first patch into each weight (the first PEFT_WEIGHTS of them), through PEFT."""
        for layer in self._peft or self._wrap():
            layer.merge()
            layer.merged_adapters.clear()

    def peft_unmerge(self) -> None:
        """What ``peft`` merged, taken off by PEFT."""
        for layer in self._peft:
            layer.merged_adapters.append("default")
            layer.unmerge()

    def _wrap(self) -> list[Any]:
        for weight, terms in zip(self.weights[:PEFT_WEIGHTS], self.terms, strict=False):
            self._peft.append(peft_layer(weight, *terms[0], SCALING))
        return self._peft


def peft_layer(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Any:
    """PEFT's own LoRA layer around a weight."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    rank = len(lora_A)
    with torch.device("meta"):
        base = nn.Linear(1, 1, bias=False, dtype=weight.dtype)
    base.weight = nn.Parameter(weight, requires_grad=False)
    base.out_features, base.in_features = weight.shape
    # Its factors are made on the weight's device, and replaced by ours at once.
    layer = Linear(base, "default", config=LoraConfig(r=rank), r=rank, lora_alpha=rank)
    layer.scaling["default"] = scaling
    layer.lora_A["default"].weight = nn.Parameter(lora_A, requires_grad=False)
    layer.lora_B["default"].weight = nn.Parameter(lora_B, requires_grad=False)
    return layer


def _factors(weight: Tensor, rank: int, dtype: torch.dtype, delta: float) -> tuple[Tensor, Tensor]:
    """A random patch of which ||SCALING B A|| is ``delta`` ||W||; through r x r matrices, as B A is large."""
    a, b = torch.randn(rank, weight.shape[1]), torch.randn(weight.shape[0], rank)
    norm = SCALING * ((b.T @ b) * (a @ a.T)).sum().sqrt()
    b *= delta * torch.linalg.vector_norm(weight, dtype=torch.float32) / norm
    return a.to(dtype), b.to(dtype)


def layer(family: str, rank: int, patches: int = 1, **kinds: Any) -> Case:
    """Enough layers of a family to be several times the last-level cache."""
    shapes = LAYERS[family]
    size = sum(2 * m * n for m, n in shapes)
    return Case(shapes * max(1, -(-4 * last_level_cache() // size)), rank, patches, **kinds)


def last_level_cache() -> int:
    """Bytes in the last-level cache of the first CPU; 32 MiB if the system does not say."""
    sizes = [0]
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = index.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes) or 32 << 20


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("way", WAYS)
    metafunc.parametrize("rank", (8, 16, 64))


def test_update(benchmark: Any, rank: int, way: str) -> None:
    """One Mistral-7B layer under pytest-benchmark; grouped by rank."""
    benchmark.group = f"Mistral-7B, rank {rank}"
    benchmark.pedantic(
        getattr(layer("Mistral-7B", rank), way), rounds=int(os.environ.get("ROUNDS", "5")), warmup_rounds=1
    )
