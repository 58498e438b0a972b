"""Exchanging updates with the Triton kernel: every weight comes back bit for bit, whatever happens on the way.

As in ``test_triton.py``, the checks run interpreted in a process of their own, and compiled where there is a GPU; and
as in ``test_triton_compile.py`` the kernel is compiled ahead of time.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from portllm.errors import BackendError, RecordError
from portllm.record import Record

from .test_record import Terms, exchange, merged, random_terms, random_weight
from .test_triton import BF16, FP16, FP32, SEED, VIEWS, Laid, needs_triton, run_python
from .test_triton_compile import ARCHITECTURES, _resources, _tools
from .tiny import same_bits

ROOT = Path(__file__).parents[1]
CHECKS: dict[str, Callable[[str], None]] = {}
# Bytes of a thread's registers that may spill, taking off, adding or both, of the variant for bf16 and fp32 factors.
SPILLS = {80: 128, 90: 512}


def check(function: Callable[[str], None]) -> Callable[[str], None]:
    CHECKS[function.__name__] = function
    return function


def terms_on(device: str, *arguments: Any) -> Terms:
    return [(a.to(device), b.to(device), s) for a, b, s in random_terms(*arguments)]


def check_round_trip(weights: list[Tensor], patches: list[list[Terms]]) -> None:
    """Put the first patch on, exchange it for each other and for itself, and take it off."""
    base = [weight.clone() for weight in weights]
    none: list[Terms] = [[] for _ in weights]
    now, records = none, [None] * len(weights)
    kept: list[Record | None] = []
    for patch in [*patches, patches[0]]:
        records = exchange(weights, now, patch, records, "triton")
        now = patch
        for weight, old, terms in zip(weights, base, patch, strict=True):
            assert same_bits(weight, merged(old, terms, "triton")) if terms else same_bits(weight, old)
        kept = kept or records
    for first, last in zip(kept, records, strict=True):
        assert_same_record(first, last)
    assert exchange(weights, now, none, records, "triton") == [None] * len(weights)
    assert all(same_bits(weight, old) for weight, old in zip(weights, base, strict=True))


def assert_same_record(one: Record | None, other: Record | None) -> None:
    assert one is not None
    assert other is not None
    assert torch.equal(one.data, other.data)
    assert torch.equal(one.lengths, other.lengths)
    assert one.by == other.by


@check
def every_bit_comes_back(device: str) -> None:
    """All weights in one call: records, swaps, removal; factors of all dtypes, also mixed."""
    for dtype in (BF16, FP16, FP32):
        size = random.choice([0.0, 0.01, 0.3, 50.0, 1e30])  # one, because the interpreter is slow
        weights = [
            random_weight((1, 1), dtype, True),
            random_weight((70, 40), dtype, True),
            random_weight((7, 72), dtype),
            random_weight((3, 65), dtype, True).T,  # stored the other way round
            random_weight((20, 66), dtype, True)[:, 1::2],  # no column next to the other
            random_weight((0, 5), dtype),
        ]
        weights = [weight.to(device) for weight in weights]
        patches = []
        for count in (1, 2):
            kinds = random.choices([BF16, FP16, FP32, torch.float64], k=len(weights))
            patches.append(
                [
                    terms_on(device, (weight.shape[0], weight.shape[1]), size, kind, count)
                    for weight, kind in zip(weights, kinds, strict=True)
                ]
            )
        check_round_trip(weights, patches)


@check
def old_and_new_terms_in_other_tiles(device: str) -> None:
    """Factors of several dtypes are summed in narrower tiles; both kinds of weights in one call, and one without."""
    shape = (66, 72)
    weights = [random_weight(shape, BF16).to(device) for _ in range(3)]
    wide = terms_on(device, shape, 0.1, FP32, 2)
    narrow = [*terms_on(device, shape, 0.1, FP32), *terms_on(device, shape, 0.1, BF16)]
    first, second = exchange(weights[:2], [[], []], [wide, narrow], [None, None], "triton")
    assert first is not None
    assert second is not None
    assert "64 x 64" in first.by
    assert "64 x 32" in second.by
    exchange(weights[:2], [wide, narrow], [[], []], [first, second], "triton")
    check_round_trip(weights, [[wide, narrow, wide], [narrow, wide, wide]])


@check
def a_record_is_small(device: str) -> None:
    # At least 16 bits for each weight where nothing of it is left in the sum; and the header and length of a tile.
    copy = 16 + (32 + 16) / 4096
    for size, limit in [(0.0, 0.005), (0.01, 0.25), (0.05, 0.6), (1.0, 4.0), (100.0, 16.0), (1e30, copy)]:
        shape = (128, 256)
        weight, terms = random_weight(shape, BF16).to(device), terms_on(device, shape, size, FP32)
        [record] = exchange([weight], [[]], [terms], [None], "triton")
        assert record is not None
        assert record.data.device == weight.device
        assert 8 * record.nbytes / weight.numel() <= limit, f"size {size}"


@check
def views_leave_their_surroundings_alone(device: str) -> None:
    for view in VIEWS:
        for dtype in (BF16, FP32):
            laid = Laid(random_weight((40, 72), dtype), view, dtype, device)
            before = laid.matrix.clone()
            terms = terms_on(device, (40, 72), 0.1, FP32)
            records = exchange([laid.matrix], [[]], [terms], [None], "triton")
            laid.assert_surroundings_untouched()
            exchange([laid.matrix], [terms], [[]], records, "triton")
            laid.assert_surroundings_untouched()
            assert same_bits(laid.matrix, before)


@check
def a_record_depends_on_no_neighbour(device: str) -> None:
    shapes = [(70, 136), (64, 72), (10, 64)]
    weights = [random_weight(shape, BF16).to(device) for shape in shapes]
    base = [weight.clone() for weight in weights]
    patch = [terms_on(device, shape, 0.05, FP32) for shape in shapes]
    together = exchange(weights, [[]] * 3, patch, [None] * 3, "triton")
    for weight, terms, beside in zip(base, patch, together, strict=True):
        [alone] = exchange([weight], [[]], [terms], [None], "triton")
        assert_same_record(alone, beside)


def kernel_module() -> Any:
    from portllm.kernels import lowrank_exchange  # type: ignore[attr-defined]

    return lowrank_exchange


@contextmanager
def scratch(part: float, fails_after: int | None = None) -> Iterator[list[int]]:
    """Let the first scratch be this part of the weights; the words of all, the last of which cannot be had."""
    module = kernel_module()
    before = module.SCRATCH_PART, module.SCRATCH_LEAST, module._Pass._set_heap
    words_had: list[int] = []

    def set_heap(self: Any, words: int) -> None:
        words_had.append(words)
        if fails_after is not None and len(words_had) > fails_after:
            raise torch.OutOfMemoryError("none left")
        before[2](self, words)

    module.SCRATCH_PART, module.SCRATCH_LEAST, module._Pass._set_heap = part, 0, set_heap
    try:
        yield words_had
    finally:
        module.SCRATCH_PART, module.SCRATCH_LEAST, module._Pass._set_heap = before


@check
def tiles_without_room_wait_untouched(device: str) -> None:
    module = kernel_module()
    for dtype in (BF16, FP32):
        weight = random_weight((130, 200), dtype).to(device)
        base, terms = weight.clone(), terms_on(device, (130, 200), 0.5, FP32)
        after = merged(base, terms, "triton")
        lora_A, lora_B, scalings = (list(part) for part in zip(*terms, strict=True))
        job = module._Job(0, weight, None, module._terms(weight, lora_A, lora_B, scalings), None)
        with scratch(1 / 50):
            one = module._Pass([job])
            one.start()
        done = (one._made.starts >= 0).tolist()
        assert True in done
        assert False in done
        columns = module._describe(weight, lora_A, lora_B, scalings)[0].block_n
        for i, is_done in enumerate(done):
            row, column = divmod(i, -(-200 // columns))
            tile = slice(64 * row, 64 * row + 64), slice(columns * column, columns * (column + 1))
            assert same_bits(weight[tile], (after if is_done else base)[tile])
        one.undo()
        assert same_bits(weight, base)


@check
def too_little_scratch_changes_nothing(device: str) -> None:
    dtype = random.choice([BF16, FP32])
    weights = [random_weight((70, 100), dtype, special).to(device) for special in (False, True)]
    base = [weight.clone() for weight in weights]
    patches = [[terms_on(device, (70, 100), size, FP32) for _ in weights] for size in (0.3, 0.01)]
    none: list[Terms] = [[], []]
    expected = exchange([weight.clone() for weight in base], none, patches[0], [None, None], "triton")
    with scratch(1 / 100) as words:
        check_round_trip(weights, patches)
        assert len(words) > 4  # one for each exchange, and more
        records = exchange(weights, none, patches[0], [None, None], "triton")
    for one, other in zip(records, expected, strict=True):
        assert_same_record(one, other)


@check
def no_memory_leaves_every_weight_as_it_was(device: str) -> None:
    shape = (66, 72)
    wide, other = (terms_on(device, shape, 0.3, FP32) for _ in range(2))
    narrow = [*terms_on(device, shape, 0.3, FP32), *terms_on(device, shape, 0.3, BF16)]
    weights = [random_weight(shape, BF16, True).to(device) for _ in range(4)]
    base = [weight.clone() for weight in weights]
    # To be put on; exchanged; exchanged in other tiles; taken off.
    old: list[Terms] = [[], wide, wide, wide]
    new: list[Terms] = [wide, other, narrow, []]
    records = [None, *exchange(weights[1:], [[]] * 3, old[1:], [None] * 3, "triton")]
    before = [weight.clone() for weight in weights]
    passes = 5  # three that add, and two that only take off
    with scratch(1 / 200, fails_after=passes), pytest.raises(torch.OutOfMemoryError):
        exchange(weights, old, new, records, "triton")
    assert all(same_bits(weight, held) for weight, held in zip(weights, before, strict=True))
    records = exchange(weights, old, new, records, "triton")
    exchange(weights[:3], new[:3], [[]] * 3, records[:3], "triton")
    assert all(same_bits(weight, held) for weight, held in zip(weights, base, strict=True))


@check
def changed_weights_are_noticed(device: str) -> None:
    weight = random_weight((70, 200), BF16).to(device)
    terms = terms_on(device, (70, 200), 0.3, FP32)
    records = exchange([weight], [[]], [terms], [None], "triton")
    weight.mul_(1.1)
    with pytest.raises(RecordError, match=r"weights\[0\].* no longer what"):
        exchange([weight], [terms], [terms], records, "triton")


@check
def broken_records_are_refused(device: str) -> None:
    """Whatever the bytes are, nothing beyond them is used: the tile does not fit, or its codes are other ones."""
    shape = (66, 136)
    weight = random_weight(shape, BF16, True).to(device)
    terms = terms_on(device, shape, 0.3, FP32)
    [record] = exchange([weight], [[]], [terms], [None], "triton")
    assert record is not None
    for kind in range(12):
        data, lengths = record.data.clone(), record.lengths.clone()
        if kind < 3:  # shorter or longer than its chunks
            data = data[: int(torch.randint(len(data), ()))] if kind else torch.cat([data, data[:4]])
        elif kind < 6:  # one chunk's words are the next one's
            lengths[0] -= 1
            lengths[1] += 1
        else:
            data[torch.randint(len(data), (5,))] = torch.randint(256, (5,), dtype=torch.uint8).to(device)
        try:
            exchange([weight.clone()], [terms], [[]], [Record(lengths, data, record.by)], "triton")
        except RecordError:
            continue
        assert kind >= 6
    for lengths in (record.lengths[:-1], torch.cat([record.lengths, record.lengths[:1]])):
        with pytest.raises(RecordError, match="no longer what"):
            exchange([weight], [terms], [[]], [Record(lengths, record.data, record.by)], "triton")
    with pytest.raises(BackendError, match="added by another"):
        exchange([weight], [terms], [[]], [Record(record.lengths, record.data, "another")], "triton")
    with pytest.raises(BackendError, match="added by triton"):
        exchange([weight], [terms], [[]], [record], "torch")


@check
def a_record_may_be_kept_elsewhere(device: str) -> None:
    weight = random_weight((66, 136), FP16).to(device)
    before, terms = weight.clone(), terms_on(device, (66, 136), 0.3, FP32)
    [record] = exchange([weight], [[]], [terms], [None], "triton")
    assert record is not None
    # On the host, at an odd address.
    data = torch.empty(len(record.data) + 1, dtype=torch.uint8)[1:].copy_(record.data)
    exchange([weight], [terms], [[]], [Record(record.lengths.cpu(), data, record.by)], "triton")
    assert same_bits(weight, before)


@check
def infinities_and_overflow_come_back(device: str) -> None:
    for dtype in (BF16, FP16, FP32):
        largest = torch.finfo(dtype).max
        numbers = [largest, -largest, torch.inf, -torch.inf, torch.nan, 0.0, -0.0, torch.finfo(dtype).tiny / 4, 1.0]
        weight = torch.tensor(numbers, dtype=dtype).repeat(64, 8).to(device)
        lora_A, lora_B = torch.full((1, 72), largest, dtype=dtype), torch.full((64, 1), 1.0, dtype=dtype)
        lora_B[::3] = -1
        lora_B[::5] = torch.inf  # sums that are NaN, or infinite
        terms = [(lora_A.to(device), lora_B.to(device), 1.0)]
        check_round_trip([weight], [[terms], [terms * 2]])


def main() -> None:
    """Run all checks interpreted; print what went wrong in each, or null, as one line of JSON."""
    torch.set_num_threads(1)
    results: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        torch.manual_seed(SEED)
        random.seed(SEED)
        try:
            function("cpu")
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


def compile_all(folder: Path) -> None:
    """Compile ahead of time, and beside each the kernel that only adds; print what came out as one line of JSON."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from portllm.kernels import lowrank_add

    module = kernel_module()
    sides = ("old", "new")
    table = {"weights": "*i64", "terms": "*i64", "scalings": "*fp32"}
    arguments = {f"p_{side}_{name}": kind for side in sides for name, kind in table.items()}
    arguments |= {"p_old_starts": "*i64", "p_old_lengths": "*i32", "p_starts": "*i64", "p_lengths": "*i32"}
    arguments |= {"p_heap": "*i64", "n_weights": "i32", "n_tiles": "i32"}
    plain = {**{f"p_{name}": kind for name, kind in table.items()}, "n_weights": "i32", "n_tiles": "i32"}
    results = {}

    def built(kernel: Any, signature: dict[str, str], constants: Any, options: Any, architecture: int) -> Any:
        divisible = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, divisible)
        return triton_compile(source, target=GPUTarget("cuda", architecture, 32), options=options)

    for architecture in ARCHITECTURES:
        for name, (variant, has) in compiled_variants().items():
            adding = built(lowrank_add.lowrank_add_kernel, plain, variant.constants(), variant.options(), architecture)
            old, new = (variant if side in has else None for side in sides)
            kernel = built(
                module.lowrank_exchange_kernel,
                arguments,
                module.constants(old, new, recording=new is not None),
                module.options(old, new),
                architecture,
            )
            results[f"{architecture} {name}"] = {
                "ptx": kernel.asm["ptx"],
                "plain": adding.asm["ptx"],
                "resources": _resources(kernel.asm["cubin"], folder),
                "shared": kernel.metadata.shared,
                "sums": len(has),
            }
    print(json.dumps(results))


COMPILED = ("bf16, exchanged", "bf16, put on", "bf16, taken off", "fp32, exchanged", "strided, mixed, exchanged")


def compiled_variants() -> dict[str, Any]:
    from portllm.kernels.lowrank_add import Variant

    fast = Variant(BF16, FP32, True, True, True)
    both = ("old", "new")
    chosen = [
        (fast, both),
        (fast, ("new",)),
        (fast, ("old",)),
        (Variant(FP32, FP16, True, True, False), both),
        (Variant(BF16, None, False, False, False), both),
    ]
    return dict(zip(COMPILED, chosen, strict=True))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    output = run_module(TRITON_INTERPRET="1", PORTLLM_TEST_SEED=str(SEED))
    return json.loads(output.splitlines()[-1])


def run_module(*arguments: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return run_python("-m", "tests.test_triton_record", *arguments, PYTHONPATH=path, **environment)


@needs_triton
@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str, interpreted: dict[str, str | None]) -> None:
    error = interpreted[name]
    if error and "only 0-dimensional arrays can be converted" in error:
        pytest.skip("the interpreter of this Triton is older than this NumPy")
    assert error is None, f"PORTLLM_TEST_SEED={SEED}\n{error}"


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") != "0", reason="Triton interprets in this process")
@pytest.mark.parametrize("name", CHECKS)
def test_compiled(name: str) -> None:
    CHECKS[name]("cuda")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cubin")
    output = run_module(str(folder), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder / "cache"))
    return json.loads(output.splitlines()[-1])


@pytest.mark.skipif(_tools() is None, reason="triton or its ptxas is missing")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", COMPILED)
class TestCompiled:
    def test_sums_are_those_of_the_kernel_that_adds(
        self, compiled: dict[str, Any], name: str, architecture: int
    ) -> None:
        """The same tensor-core instructions, for each side, and nothing contracted or flushed to zero."""
        result = compiled[f"{architecture} {name}"]
        products = re.compile(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.[\w.]+")
        expected = products.findall(result["plain"])
        assert expected
        assert products.findall(result["ptx"]) == expected * result["sums"]
        assert not re.search(r"\bfma\.\w+\.f32|\.ftz", result["ptx"])

    def test_codes_are_put_together_without_fences(
        self, compiled: dict[str, Any], name: str, architecture: int
    ) -> None:
        ptx = compiled[f"{architecture} {name}"]["ptx"]
        assert ("or.b32" in re.findall(r"(?:red|atom)\.global\.gpu\.relaxed\.(or\.b32)", ptx)) == ("off" not in name)
        assert "acq_rel" not in ptx

    def test_registers_nearly_suffice(self, compiled: dict[str, Any], name: str, architecture: int) -> None:
        resources = compiled[f"{architecture} {name}"]["resources"]
        if resources is None:
            pytest.skip("there is no cuobjdump")
        assert resources["stack"] <= SPILLS[architecture]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compile_all(Path(sys.argv[1]))
    else:
        main()
