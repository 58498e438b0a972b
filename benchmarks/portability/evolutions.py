"""What a base may become: trained on by all weights or by merged LoRAs, merged with patches, pruned, rounded."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from toy import ROWS, World
from training import Batch, fit

import portllm

from .models import LINEAR

Weights = dict[str, Tensor]


def learn_lora(
    model: nn.Module, batches: Iterator[Batch], steps: int, rate: float, seed: str, name: str
) -> portllm.Patch:
    """Rank 8 on all linear layers, alpha 16 (our choice); ``model`` is left as it was."""
    torch.manual_seed(random.Random(seed).randrange(2**31))
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM"))
    fit(tuned, batches, steps, rate, name)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        patch = portllm.Patch.load(folder)
    tuned.unload()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return patch


def texts(world: World, count: int, kept: float) -> Iterator[tuple[int, Iterator[Batch]]]:
    """(step, batches without end) of ``count`` corpora, each of which keeps the share ``kept`` of the one before."""
    book = world.a
    for step in range(1, count + 1):
        rng = random.Random(f"{world.seed} corpus {step}")
        book = world.revised(book, kept, rng)

        def batches(book=book, rng=rng) -> Iterator[Batch]:
            while True:
                rows = world.prose(book, ROWS, rng)
                yield rows, rows

        yield step, batches()


def pruned(weights: Weights, names: list[str], share: float) -> Weights:
    """The share of smallest magnitude in each of the named matrices becomes 0."""
    result = dict(weights)
    for name in names:
        weight = weights[name]
        bound = weight.abs().flatten().kthvalue(max(1, round(share * weight.numel()))).values
        result[name] = torch.where(weight.abs() <= bound, 0.0, weight)
    return result


def bf16(weights: Weights, names: list[str]) -> Weights:
    """Rounded to bf16 and back."""
    return weights | {name: weights[name].bfloat16().float() for name in names}


def int8(weights: Weights, names: list[str]) -> Weights:
    """Rounded to 255 levels between minus and plus the largest magnitude of each row."""
    result = dict(weights)
    for name in names:
        step = weights[name].abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        result[name] = (weights[name] / step).round() * step
    return result
