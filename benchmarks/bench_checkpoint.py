"""Patch a checkpoint on disk: portllm, as a copy and in place, against PEFT's load, merge and save, and the limits.

    python benchmarks/bench_checkpoint.py --size-gb 4 --shards 8 --json benchmarks/results/checkpoint.json

Each way runs in a fresh process, in turn, ``--repeats`` times after one warm-up, on files in the page cache (warm) or
dropped from it (cold); its time ends when its output is synced to disk. Extra memory is the process's high-water mark
less what it held when the work began (libraries imported, nothing loaded). The limit of a patched copy is a plain copy;
that of a patch in place, and of its removal, is to read the bytes of the tensors that change and to write them back.

With ``--format fp8`` the linear weights are float8 e4m3 with a scale for each 128 x 128 of them, as DeepSeek has; they
are only patched in a copy, and not by PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from samples import resident

WAYS = ("copy", "portllm", "peft", "rewrite", "in place", "remove")
LIMITS = {"in place": "rewrite", "remove": "rewrite", "rewrite": "rewrite"}  # of others: the copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=4.0)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--dir", type=Path, default=None, help="where to make the checkpoint (default: a temporary folder)"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="in this order; in place before remove")
    parser.add_argument("--format", choices=("bf16", "fp8"), default="bf16", help="of the linear weights")
    parser.add_argument("--cold", action="store_true", help="the model is not in the page cache")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(_work(arguments.worker, arguments.cold, *arguments.paths)))
        return
    arguments.ways = arguments.ways or (WAYS if arguments.format == "bf16" else ("copy", "portllm"))
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="portllm-bench-") as folder:
        results = run(Path(folder), arguments)
    _print(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def run(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the checkpoint and the adapter, then measure each way in turn."""
    import machine

    model, adapter = folder / "model", folder / "adapter"
    size = make_checkpoint(model, arguments.size_gb, arguments.shards, arguments.format)
    make_adapter(adapter, model, arguments.rank)
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
    for repeat in range(arguments.repeats + 1):
        for way in arguments.ways:
            out = folder / "out"
            command = [sys.executable, __file__, "--worker", way, "--paths", str(model), str(adapter), str(out)]
            command += ["--cold"] if arguments.cold else []
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            if repeat:  # the first round warms the page cache
                samples[way].append(json.loads(done.stdout.splitlines()[-1]))
            shutil.rmtree(out, ignore_errors=True)
    return {
        "benchmark": "checkpoint",
        "cold": arguments.cold,
        "format": arguments.format,
        "machine": machine.describe(),
        "bytes": size,
        "shards": arguments.shards,
        "rank": arguments.rank,
        "ways": {
            way: {
                "seconds": statistics.median(s["seconds"] for s in runs),
                "seconds_min": min(s["seconds"] for s in runs),
                "seconds_max": max(s["seconds"] for s in runs),
                "unsynced_seconds": statistics.median(s["unsynced_seconds"] for s in runs),
                "extra_mib": max(s["extra_mib"] for s in runs),
            }
            for way, runs in samples.items()
        },
    }


def make_checkpoint(path: Path, size_gb: float, shards: int, form: str) -> int:
    """A Llama-type checkpoint of about the size, made a shard at a time; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, vocabulary, heads, kv_heads = 2048, 8192, 32000, 32, 8
    kv = hidden // heads * kv_heads
    width = 1 if form == "fp8" else 2
    per_layer = width * hidden * (2 * hidden + 2 * kv + 3 * inner) + 4 * hidden
    layers = max(shards, round((size_gb * 1e9 - 4 * vocabulary * hidden) / per_layer))
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {f"{p}self_attn.{x}_proj.weight": (n, hidden) for x, n in (("q", hidden), ("k", kv), ("v", kv))}
        shapes |= {f"{p}self_attn.o_proj.weight": (hidden, hidden)}
        shapes |= {f"{p}mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        shapes |= {f"{p}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{p}{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    path.mkdir()
    bytes_of = {name: torch.Size(s).numel() * (width if "_proj" in name else 2) for name, s in shapes.items()}
    total = sum(bytes_of.values())
    noise = torch.randn(1 << 26)
    pools = {"bf16": (noise * 0.02).to(torch.bfloat16), "fp8": (noise * 100).clamp(-448, 448).to(torch.float8_e4m3fn)}
    weight_map, part, filled, number = {}, {}, 0, 1
    for name, shape in shapes.items():
        pool = pools[form if "_proj" in name else "bf16"]
        count = torch.Size(shape).numel()
        offset = hash(name) % (len(pool) - count) if count < len(pool) else 0
        tensors = {name: pool[offset : offset + count].view(shape).clone() if count < len(pool) else pool.view(shape)}
        if pool is pools["fp8"]:
            grid = tuple(-(-size // 128) for size in shape)
            tensors[f"{name}_scale_inv"] = torch.rand(grid) * 1e-4 + 1e-4
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        part |= tensors
        filled += bytes_of[name]
        if filled >= total * number / shards or name == "lm_head.weight":
            save_file(part, path / file, metadata={"format": "pt"})
            part, number = {}, number + 1
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": vocabulary,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, "dtype": "bfloat16",
        "num_key_value_heads": kv_heads, "tie_word_embeddings": False,
    }  # fmt: skip
    if form == "fp8":
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps(config))
    return total


def make_adapter(path: Path, model: Path, rank: int) -> None:
    """An fp32 LoRA on all linear layers, as PEFT saves it."""
    import torch
    from safetensors.torch import save_file

    from portllm.shards import Checkpoint

    tensors = {}
    for name, (_, stored) in Checkpoint.open(model).locations.items():
        if name.endswith("_proj.weight"):
            key = "base_model.model." + name.removesuffix("weight")
            tensors[f"{key}lora_A.weight"] = torch.randn(rank, stored.shape[1]) / stored.shape[1] ** 0.5
            tensors[f"{key}lora_B.weight"] = torch.randn(stored.shape[0], rank) * 0.01
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    leaves = sorted({key.split(".")[-3] for key in tensors})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": leaves,
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))


def _work(way: str, cold: bool, model: Path, adapter: Path, out: Path) -> dict[str, float]:
    makers = {"copy": _copy, "portllm": _portllm, "peft": _peft}
    makers |= {"rewrite": _rewrite, "in place": _in_place, "remove": _remove}
    work = makers[way](model, adapter, out)
    if cold:
        for file in model.glob("*.safetensors"):
            with open(file, "rb") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    held = resident("VmRSS")
    started = time.perf_counter()
    work()
    unsynced = time.perf_counter() - started
    for file in (out if out.exists() else model).iterdir():
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "unsynced_seconds": unsynced, "extra_mib": (resident("VmHWM") - held) / 1024}


def _copy(model: Path, adapter: Path, out: Path) -> Any:
    return lambda: shutil.copytree(model, out)


def _portllm(model: Path, adapter: Path, out: Path) -> Any:
    import torch  # noqa: F401  (imported before the clock starts, as in every way)

    import portllm

    portllm.apply_checkpoint, portllm.Patch  # noqa: B018  (loads the modules)
    return lambda: portllm.apply_checkpoint(model, adapter, out)


def _in_place(model: Path, adapter: Path, out: Path) -> Any:
    import torch  # noqa: F401

    import portllm

    portllm.apply_checkpoint, portllm.Patch  # noqa: B018
    return lambda: portllm.apply_checkpoint(model, adapter, in_place=True)


def _remove(model: Path, adapter: Path, out: Path) -> Any:
    import torch  # noqa: F401

    import portllm

    portllm.remove_from_checkpoint, portllm.Patch  # noqa: B018
    return lambda: portllm.remove_from_checkpoint(model)


def _rewrite(model: Path, adapter: Path, out: Path) -> Any:
    """Read the tensors that change and write them back as they are: two threads, 32 MB at once, as portllm does it."""
    from portllm.shards import Checkpoint

    size = 32 << 20
    parts = [
        (shard.path, start, min(size, stored.stop - start))
        for shard in Checkpoint.open(model).shards
        for stored in shard.tensors
        if "_proj" in stored.name
        for start in range(stored.start, stored.stop, size)
    ]

    def work() -> None:
        files = {path: os.open(path, os.O_RDWR) for path, _, _ in parts}
        buffers = [memoryview(bytearray(size)) for _ in range(2)]
        with ThreadPoolExecutor(1) as writer:
            going: list[Any] = []
            for i, (path, start, count) in enumerate(parts):
                if i >= 2:
                    going[i - 2].result()
                os.preadv(files[path], [buffers[i % 2][:count]], start)
                going.append(writer.submit(os.pwrite, files[path], buffers[i % 2][:count], start))
        for descriptor in files.values():
            os.close(descriptor)

    return work


def _peft(model: Path, adapter: Path, out: Path) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work() -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
        merged.save_pretrained(out, max_shard_size="500MB")

    return work


def _print(results: dict[str, Any]) -> None:
    ways, size = results["ways"], results["bytes"]
    print("cold" if results["cold"] else "warm")
    print(f"{size / 1e9:.2f} GB in {results['shards']} shards, rank {results['rank']}, {results['machine']['cpu']}")
    print(f"{'way':10}{'seconds':>9}{'(min-max)':>16}{'GB/s r+w':>10}{'extra MiB':>11}{'x peft':>8}{'% limit':>9}")
    for way, r in ways.items():
        spread = f"{r['seconds_min']:.1f}-{r['seconds_max']:.1f}"
        speed = 2 * size / r["seconds"] / 1e9
        faster = ways["peft"]["seconds"] / r["seconds"] if "peft" in ways else float("nan")
        limit = 100 * ways[LIMITS.get(way, "copy")]["seconds"] / r["seconds"]
        print(f"{way:10}{r['seconds']:9.2f}{spread:>16}{speed:10.2f}{r['extra_mib']:11.0f}{faster:8.2f}{limit:9.0f}")


if __name__ == "__main__":
    main()
