"""Fresh random inputs for every test, from a seed that a failing run prints and PORTLLM_TEST_SEED repeats."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import pytest
import torch

SEED = int(os.environ.get("PORTLLM_TEST_SEED") or random.SystemRandom().randrange(2**31))


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a run in the background inherits this, and tests raise SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"PORTLLM_TEST_SEED={SEED}, torch {torch.__version__}, {torch.get_num_threads()} threads"


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    # From the name too, so that a test run alone gets the inputs that it got among the others.
    seed = SEED + sum(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
