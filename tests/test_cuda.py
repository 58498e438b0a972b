"""What of the CUDA backend only a GPU can show; ``test_ops.py`` asks it what it asks of every backend."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from portllm import ops

from .test_ops import BF16, FP16, FP32, Case, Term, bits, check, truth, update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ops.unavailable("cuda") is not None, reason=str(ops.unavailable("cuda"))),
]

Job = tuple[Tensor, list[Term]]


def make(shape: tuple[int, int], dtype: torch.dtype, *terms: tuple[int, torch.dtype], device: str = "cuda") -> Job:
    rows = tuple((rank, factors, factors, "plain", "plain", 0.6) for rank, factors in terms)
    weight, _, made = Case(shape, dtype, "plain", rows).make(device)
    return weight, made


def some_jobs(device: str = "cuda") -> list[Job]:
    return [
        make((1024, 4096), BF16, (16, FP32), device=device),
        make((4096, 1024), BF16, (64, BF16), (16, FP32), (3, FP16), device=device),
        make((1000, 1001), FP16, (20, FP32), device=device),
        make((2048, 2048), FP32, (128, FP32), device=device),
    ]


def check_jobs(jobs: list[Job], old: list[Tensor]) -> None:
    for (weight, terms), start in zip(jobs, old, strict=True):
        check(start, terms, weight)


def test_the_same_bits_again_and_again() -> None:
    """A race would show as bits that move."""
    jobs = [*some_jobs(), make((8192, 8192), BF16, (16, FP32))]
    old = [weight.clone() for weight, _ in jobs]
    update(jobs, "cuda")
    check_jobs(jobs[:4], old[:4])
    first = [weight.clone() for weight, _ in jobs]
    for _ in range(20):
        for (weight, _), start in zip(jobs, old, strict=True):
            weight.copy_(start)
        update(jobs, "cuda")
        for (weight, _), expected in zip(jobs, first, strict=True):
            assert torch.equal(bits(weight), bits(expected))


def test_exact_sums_in_a_whole_model() -> None:
    """More weights than one launch takes, of sizes that leave every kind of edge."""
    jobs: list[Job] = []
    for i in range(700):
        m, n, rank = 8 + 37 * i % 200, 8 * (1 + 13 * i % 40) + (i % 7 == 0), 1 + i % 40
        weight = torch.randint(-300, 300, (m, n), device="cuda").to((BF16, FP16, FP32)[i % 3])
        dtype = (FP32, BF16, FP16)[i % 4 % 3]
        a, b = (torch.randint(-3, 4, shape, device="cuda").to(dtype) for shape in ((rank, n), (m, rank)))
        jobs.append((weight, [(a, b, 0.5), (a, b, 2.0)][: 1 + i % 2]))
    expected = [truth(weight, terms).to(weight.dtype) for weight, terms in jobs]
    update(jobs, "cuda")
    for (weight, _), right in zip(jobs, expected, strict=True):
        assert torch.equal(bits(weight), bits(right))


def test_a_graph_takes_the_table_along() -> None:
    jobs = some_jobs()
    old = [weight.clone() for weight, _ in jobs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        update(jobs, "cuda")  # the first call loads the kernels
    torch.cuda.current_stream().wait_stream(stream)
    once = [weight.clone() for weight, _ in jobs]
    update(jobs, "cuda")
    twice = [weight.clone() for weight, _ in jobs]
    for (weight, _), start in zip(jobs, old, strict=True):
        weight.copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update([*jobs], "cuda")
    # What the host had for the launch is gone by now, and its memory is used for something else.
    gc.collect()
    _ = [torch.full((1 << 16,), -1).pin_memory() for _ in range(8)]
    for expected in (once, twice):
        graph.replay()
        for (weight, _), right in zip(jobs, expected, strict=True):
            assert torch.equal(bits(weight), bits(right))


def test_it_runs_on_the_current_stream() -> None:
    weight, terms = make((4096, 4096), BF16, (16, FP32))
    start = weight.clone()
    weight.fill_(float("nan"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        weight.copy_(start)
        update([(weight, terms)], "cuda")
    torch.cuda.current_stream().wait_stream(stream)
    check(start[:64], [(a, b[:64], s) for a, b, s in terms], weight[:64])


def test_nothing_is_allocated_and_nothing_waits() -> None:
    jobs = some_jobs()
    update(jobs, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda._sleep(1_000_000_000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(jobs, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.cuda.current_stream().query(), "it waited for the device"
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_weights_on_several_devices() -> None:
    jobs = [job for i in (1, 0, 1) for job in some_jobs(f"cuda:{i}")]
    old = [weight.clone() for weight, _ in jobs]
    with torch.cuda.device(1):
        update(jobs, "cuda")
        assert torch.cuda.current_device() == 1
    check_jobs(jobs, old)
