"""``import portllm`` is cheap, and stays cheap: what it brings into the process, and how long that takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import portllm

HEAVY = ("transformers", "peft", "triton", "sympy", "torch._dynamo", "torch._inductor", "kernels", "huggingface_hub")


def python(code: str, **environment: str) -> Any:
    """Run code in a fresh process; the JSON that it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_import_alone_loads_nothing_heavy() -> None:
    found = python(
        "import sys; before = set(sys.modules); import json, portllm; portllm.__version__; dir(portllm); "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    assert "portllm" in found
    assert not {"torch", "numpy", "safetensors", *HEAVY} & set(found)
    assert [name for name in found if name.startswith("portllm.")] == ["portllm._version"]


def test_the_whole_api_loads_torch_and_nothing_heavier() -> None:
    before, after, heavy = python(
        "import sys, json, torch; before = sorted(sys.modules); import portllm\n"
        "for name in portllm.__all__: getattr(portllm, name)\n"
        f"print(json.dumps([before, sorted(sys.modules), [n for n in {HEAVY} if n in sys.modules]]))"
    )
    assert heavy == []
    # Whatever else came in is small: our own modules, and the standard library's.
    new = {name.partition(".")[0] for name in set(after) - set(before)}
    assert new - {"portllm"} <= {*sys.stdlib_module_names, "safetensors", "tqdm"}
    assert "portllm.ops" in after
    assert "portllm.cli" not in after


def test_the_top_level_name_kernels_is_not_ours() -> None:
    found = python(
        "import json, sys, importlib.util, portllm.kernels, portllm\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(json.dumps(['kernels' in sys.modules, None if spec is None else spec.origin]))"
    )
    assert found[0] is False
    assert found[1] is None or "portllm" not in Path(found[1]).read_text()


def test_import_time_on_top_of_torch(tmp_path: Path) -> None:
    """All public names, from compiled bytecode, in CPU time, beside torch's own import on the same machine.

    The best of several forks of a process that has torch; 3 to 5 % was usual.
    """
    code = f"""
import gc, json, os, sys, time
start = time.process_time()
import torch
torch_time = time.process_time() - start
sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path)!r}
gc.collect(); gc.freeze()
times = []
for _ in range(6):
    read, write = os.pipe()
    if os.fork() == 0:
        start = time.process_time()
        import portllm
        for name in portllm.__all__: getattr(portllm, name)
        os.write(write, str(time.process_time() - start).encode())
        os._exit(0)
    os.wait()
    times.append(float(os.read(read, 100)))
print(json.dumps([torch_time, times]))
"""
    torch_time, times = python(code)
    assert min(times) < torch_time / 10, (torch_time, times)


def test_public_names() -> None:
    assert len(set(portllm.__all__)) == len(portllm.__all__)
    assert {"Patch", "apply", "apply_checkpoint", "plan", "remove", "stamp", "__version__"} <= set(portllm.__all__)
    assert {"Combined", "cast", "combine", "negate", "scale", "truncate"} <= set(portllm.__all__)
    assert set(portllm.__all__) <= set(dir(portllm))
    assert dir(portllm) == sorted(dir(portllm))
    for name in portllm.__all__:
        value = getattr(portllm, name)
        assert value is not None
        assert getattr(portllm, name) is value
        if isinstance(value, type):
            assert value.__name__ == name


def test_star_import_gives_the_public_names() -> None:
    space: dict[str, Any] = {}
    exec("from portllm import *", space)
    assert set(portllm.__all__) <= set(space)


def test_type_checkers_see_the_same_names() -> None:
    """The lazy table and the imports under TYPE_CHECKING must not drift apart."""
    import ast

    tree = ast.parse(Path(portllm.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.asname: node.module for node in imports for alias in node.names}
    assert homes == portllm._HOMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'portllm' has no attribute 'aply'"):
        portllm.aply  # noqa: B018
    assert not hasattr(portllm, "_nothing")
