"""PatchBank: patches by name; the bits are those of the ones that are on, whoever switches them."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

import portllm
from portllm import PatchBank, PlanError, RecordError

from .test_undo import assert_same, copied, make_model, make_patch, patched

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("resident", ["device", "host"])
def test_any_of_them(resident: Any) -> None:
    model = make_model()
    base, bank = copied(model), PatchBank(model, resident=resident)
    patches = {name: make_patch(name) for name in "abcd"}
    patches["e"] = make_patch("e", use_dora=True)
    for name, patch in patches.items():
        bank.add(name, patch, 0.5)
    assert bank.names == tuple("abcde")
    assert_same(model, base)
    for _ in range(20):
        names = tuple(random.sample("abcd", random.randint(0, 4))) if random.random() < 0.8 else ("e",)
        bank.prefetch(*random.sample("abcde", 2))
        bank.use(*names)
        assert bank.active == names
        assert_same(model, patched(base, [(patches[name], 0.5) for name in names]))
        assert (bank.nbytes > 0) == bool(names)
    with bank.using("a"):
        with bank.using():
            assert_same(model, base)
        assert_same(model, patched(base, [(patches["a"], 0.5)]))
    assert_same(model, patched(base, [(patches[name], 0.5) for name in names]))
    bank.use()
    assert_same(model, base)
    assert bank.stats.switches >= 2
    assert bank.stats.seconds > 0
    assert (bank.stats.prefetched > 0) == (resident == "host")


def test_beside_other_patches() -> None:
    model = make_model()
    base, bank, p, q = copied(model), PatchBank(model), make_patch(), make_patch()
    first = portllm.apply(model, p, undo="exact")
    bank.add("q", q)
    bank.use("q")
    first.remove()
    assert_same(model, patched(base, [(q, 1.0)]))
    bank.use()
    assert_same(model, base)


def test_several_threads() -> None:
    model = make_model()
    base, bank = copied(model), PatchBank(model)
    for name in "abc":
        bank.add(name, make_patch(name))
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        try:
            for _ in range(30):
                bank.use(*choose.sample("abc", choose.randint(0, 3)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    bank.use()
    assert_same(model, base)


def test_a_compiled_model_sees_the_switch() -> None:
    linear = torch.nn.Linear(16, 24, bias=False)
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"q": linear})])})
    compiled = torch.compile(linear, backend="aot_eager")
    bank, x = PatchBank(model), torch.randn(3, 16)
    bank.add("p", make_patch(size=10.0, shapes={"q": (24, 16)}))
    before = compiled(x)
    bank.use("p")
    assert torch.equal(compiled(x), torch.nn.functional.linear(x, linear.weight))
    assert not torch.equal(compiled(x), before)
    bank.use()
    assert torch.equal(compiled(x), before)


def test_mistakes() -> None:
    model = make_model()
    base, bank = copied(model), PatchBank(model)
    bank.add("p", make_patch())
    with pytest.raises(PlanError, match="has a patch 'p' already"):
        bank.add("p", make_patch())
    with pytest.raises(PlanError, match="has no patch 'q'; it has p"):
        bank.use("q")
    with pytest.raises(PlanError, match="can be on once"):
        bank.use("p", "p")
    with pytest.raises(PlanError, match="must be 'device' or 'host'"):
        PatchBank(model, resident="disk")  # type: ignore[arg-type]
    bank.use("p")
    with pytest.raises(PlanError, match="'p' is on"):
        bank.drop("p")
    now = copied(model)
    for tensor in model.values():
        tensor.add_(1)
    with pytest.raises(RecordError, match="written to"):
        bank.use()
    assert bank.active == ("p",)
    for name, tensor in model.items():
        tensor.copy_(now[name])
    bank.use()
    bank.drop("p")
    assert bank.names == ()
    assert_same(model, base)
