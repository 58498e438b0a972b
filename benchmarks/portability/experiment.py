"""The small form: one world (an architecture and a seed), from pretraining to the figures of every evolution."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from measure import forget_peak, give_back_freed, memory_now, memory_peak
from sizes import residue_to_patch
from torch import nn
from toy import ROWS, World, parameter_count, quieten
from training import fit

import portllm

from .evolutions import Weights, bf16, int8, learn_lora, pruned, texts
from .models import LINEAR, new_model
from .remedies import REMEDIES
from .scores import candidates
from .tasks import TASKS, Exam


@dataclass(frozen=True)
class Settings:
    """Sizes, steps and peak rates; ``refits`` and ``remedied`` name evolutions."""

    hidden: int = 96
    layers: int = 3
    pretrain: int = 250
    pretrain_rate: float = 3e-3
    patch: int = 120
    patch_rate: float = 4e-3
    chain: int = 10
    evolve: int = 20
    full_rate: float = 1e-3
    lora_rate: float = 3e-3
    kept: float = 0.85
    tested: int = 512
    refits: tuple[str, ...] = ("full 3", "full 10", "LoRA 10")
    remedied: tuple[str, ...] = (
        "full 2", "full 4", "full 7", "full 10", "LoRA 4", "LoRA 7", "LoRA 10", "three other patches", "prune 50 %",
    )  # fmt: skip


QUICK = Settings(
    hidden=32, layers=1, pretrain=10, patch=10, chain=2, evolve=4, tested=32, refits=("full 2",), remedied=("full 2",)
)


@dataclass(frozen=True)
class _Base:
    """What every evolution of one world is compared with."""

    model: nn.Module
    weights: Weights
    names: list[str]  # of the linear layers' weights
    exams: dict[str, Exam]
    patches: dict[str, portllm.Patch]
    accuracy: dict[str, float]
    patched: dict[str, float]


def run_world(kind: str, seed: int, settings: Settings) -> dict[str, Any]:
    """All figures of one architecture and one seed, as plain data."""
    quieten()
    torch.set_num_threads(1)  # fastest for so small a model, and the same result on any number of cores
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()
    world = World(seed)
    base = _learn_base(kind, world, settings)
    records: list[dict[str, Any]] = []
    for name, task, model in _evolutions(base, world, settings):
        records += [
            {"evolution": name, "task": each, **_look(base, model, name, each, settings)}
            for each in ([task] if task else TASKS)
        ]
    return {
        "model": kind,
        "seed": seed,
        "parameters": parameter_count(base.model),
        "base": base.accuracy,
        "patched": base.patched,
        "records": records,
        "seconds": time.perf_counter() - start,
    }


def _learn_base(kind: str, world: World, settings: Settings) -> _Base:
    model = new_model(kind, world, settings.hidden, settings.layers)
    rng = random.Random(f"{world.seed} base")
    rows = (world.prose(world.a, ROWS, rng) for _ in range(settings.pretrain))
    fit(model, ((ids, ids) for ids in rows), settings.pretrain, settings.pretrain_rate, f"{kind} {world.seed}")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exams = {task: Exam(world, task, settings.tested) for task in TASKS}
    patches = {task: _learn(model, exam, settings) for task, exam in exams.items()}
    return _Base(
        model=model,
        weights=weights,
        names=[name for name in weights if name.removesuffix(".weight").rpartition(".")[2] in LINEAR],
        exams=exams,
        patches=patches,
        accuracy={task: exam.accuracy(model) for task, exam in exams.items()},
        patched={task: exams[task].accuracy(_ported(model, patch)) for task, patch in patches.items()},
    )


def _learn(model: nn.Module, exam: Exam, settings: Settings) -> portllm.Patch:
    """A patch of ``model``; its start and its questions depend on world and task alone."""
    seed = f"{exam.world.seed} {exam.task}"
    rng = random.Random(seed)
    batches = (exam.batch(ROWS, rng) for _ in range(settings.patch))
    return learn_lora(model, batches, settings.patch, settings.patch_rate, seed, f"patch: {exam.task}")


def _ported(model: nn.Module, patch: portllm.Patch) -> nn.Module:
    result = copy.deepcopy(model)
    portllm.apply(result, patch)
    return result


def _evolutions(base: _Base, world: World, settings: Settings) -> Iterator[tuple[str, str | None, nn.Module]]:
    """(name, the one task that it is for or None, the evolved model, which is changed once the next is asked for)."""
    model = copy.deepcopy(base.model)
    for step, batches in texts(world, settings.chain, settings.kept):
        fit(model, _first(batches, settings.evolve), settings.evolve, settings.full_rate, f"full {step}")
        yield f"full {step}", None, model
    model = copy.deepcopy(base.model)
    for step, batches in texts(world, settings.chain, settings.kept):
        name = f"LoRA {step}"
        few = _first(batches, settings.evolve)
        portllm.apply(model, learn_lora(model, few, settings.evolve, settings.lora_rate, f"{world.seed} {name}", name))
        yield name, None, model
    tasks = list(TASKS)
    for i, task in enumerate(tasks):
        yield "other patch", task, _ported(base.model, base.patches[tasks[(i + 1) % len(tasks)]])
        model = copy.deepcopy(base.model)
        portllm.apply(model, [base.patches[other] for other in tasks if other != task])
        yield "three other patches", task, model
    makers: dict[str, Callable[[], Weights]] = {
        "prune 30 %": lambda: pruned(base.weights, base.names, 0.3),
        "prune 50 %": lambda: pruned(base.weights, base.names, 0.5),
        "bf16": lambda: bf16(base.weights, base.names),
        "int8": lambda: int8(base.weights, base.names),
    }
    for name, make in makers.items():
        model.load_state_dict(make())
        yield name, None, model


def _first(batches: Iterator[Any], count: int) -> Iterator[Any]:
    return (next(batches) for _ in range(count))


def _look(base: _Base, model: nn.Module, name: str, task: str, settings: Settings) -> dict[str, Any]:
    """The figures of one patch on one evolved model."""
    exam, patch = base.exams[task], base.patches[task]
    evolved = model.state_dict()
    gained = base.patched[task] - base.accuracy[task]
    before = exam.accuracy(model)

    def kept(tuned: nn.Module) -> float:
        """The skill kept: what the patch gains on the evolved model for what it gained on the base."""
        return (exam.accuracy(tuned) - before) / gained if gained else 0.0

    ported = _ported(model, patch)
    result: dict[str, Any] = {
        "evolved": before,
        "ported": exam.accuracy(ported),
        "kept": kept(ported),
        "scores": candidates(portllm.drift(patch, evolved, base.weights)),
    }
    if name in settings.refits:
        again = copy.deepcopy(model)
        result["port"] = _cost(lambda: portllm.apply(again, patch))
        found: list[portllm.Patch] = []
        result["refit"] = _cost(lambda: found.append(_learn(model, exam, settings)))
        tuned = _ported(model, found[0])
        result["refit"] |= {
            "accuracy": exam.accuracy(tuned),
            "kept": kept(tuned),
            "residue_to_patch": residue_to_patch(found[0], patch),
        }
    if name in settings.remedied:
        result["remedies"] = {
            what: kept(_ported(model, remedy(patch, base.weights, evolved))) for what, remedy in REMEDIES.items()
        }
    return result


def _cost(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds, and by how much the memory's peak exceeds what was there before."""
    give_back_freed()
    forget_peak()
    before, start = memory_now(), time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - start, "extra_bytes": max(0, memory_peak() - before)}
