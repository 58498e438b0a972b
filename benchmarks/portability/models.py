"""The small form's models: three architectures of transformers, narrow enough to be pretrained in seconds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from toy import ROW, World
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _common(world: World, hidden: int, layers: int) -> dict[str, object]:
    return {
        "vocab_size": len(world.vocabulary),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 2 * ROW,
        # With the usual 0.02 attention in so narrow a model hardly starts to learn in the time there is.
        "initializer_range": 0.06,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def mistral(world: World, hidden: int, layers: int) -> PreTrainedModel:
    """Grouped queries, a sliding window."""
    config = MistralConfig(**_common(world, hidden, layers), num_key_value_heads=2, sliding_window=ROW // 2)
    return MistralForCausalLM(config)


def llama(world: World, hidden: int, layers: int) -> PreTrainedModel:
    """As many keys as queries, full attention."""
    return LlamaForCausalLM(LlamaConfig(**_common(world, hidden, layers), num_key_value_heads=4))


def gemma2(world: World, hidden: int, layers: int) -> PreTrainedModel:
    """Tied embeddings, norms before and after, capped logits, every other layer with a sliding window."""
    heads = {"num_key_value_heads": 2, "head_dim": hidden // 4, "query_pre_attn_scalar": hidden // 4}
    return Gemma2ForCausalLM(Gemma2Config(**_common(world, hidden, layers), **heads, sliding_window=ROW // 2))


MODELS: dict[str, Callable[[World, int, int], PreTrainedModel]] = {
    "mistral": mistral,
    "llama": llama,
    "gemma2": gemma2,
}


def new_model(kind: str, world: World, hidden: int, layers: int) -> PreTrainedModel:
    """Fresh weights from the world's seed."""
    torch.manual_seed(world.seed)
    return MODELS[kind](world, hidden, layers)
