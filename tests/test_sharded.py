"""Sharded models: the bits of the whole model's patch, on every layout, with no weight sent anywhere."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import portllm

from . import distributed, sharded
from .families import FAMILIES, llama, save_adapter

_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {},
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "r": 3},
    ],
    "qwen3": [{"target_modules": ["q_proj", "k_proj", "embed_tokens", "down_proj"]}],
    "gpt2": [{}, {"bias": "lora_only"}],
    "mixtral": [{}],
    "llama, dora": [{"use_dora": True}],
    "gpt2, dora": [{"use_dora": True, "target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}],
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Adapters of four families, for a vocabulary that no number of ranks divides."""
    folder = tmp_path_factory.mktemp("adapters")
    made: dict[str, list[str]] = {}
    for name, several in _SETTINGS.items():
        family = FAMILIES[name.removesuffix(", dora")]
        for i, settings in enumerate(several):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                path = save_adapter(family.build(vocab_size=97), family.config(**settings), folder / f"{name}{i}")
            made.setdefault(name, []).append(str(path))
    return made


def _seed() -> int:
    return int(torch.randint(1 << 30, ()))


def test_every_layout_over_two_ranks(adapters: dict[str, list[str]], tmp_path: Path) -> None:
    distributed.run(sharded.layouts, 2, tmp_path, _seed(), adapters)


def test_every_layout_over_four_ranks(adapters: dict[str, list[str]], tmp_path: Path) -> None:
    distributed.run(sharded.layouts, 4, tmp_path, _seed(), adapters)


@pytest.mark.parametrize("what", ["exact", "gathered", "together", "refusals"])
def test_two_ranks(what: str, adapters: dict[str, list[str]], tmp_path: Path) -> None:
    distributed.run(getattr(sharded, what), 2, tmp_path, _seed(), adapters)


def test_a_partitioned_parameter_of_deepspeed_is_refused(adapters: dict[str, list[str]]) -> None:
    model = llama(vocab_size=97)
    parameter = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.empty(0))
    model.model.layers[1].mlp.up_proj.weight.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
    with pytest.raises(portllm.PlanError, match=r"layers\.1\.mlp\.up_proj\.weight.*ZeRO-3.*GatheredParameters"):
        portllm.apply(model, adapters["llama"][0])
    model.model.layers[1].mlp.up_proj.weight = parameter
    portllm.apply(model, adapters["llama"][0])
