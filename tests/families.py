"""Tiny random models of nine families, adapters made with PEFT, and PEFT's own merge in float64 as the truth."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

VOCAB = 96


@dataclass(frozen=True)
class Family:
    """A tiny model of one architecture and the LoRA settings that reach all of its matrices."""

    name: str
    build: Callable[..., transformers.PreTrainedModel]
    lora: Mapping[str, Any]
    rank: int = 4
    fields: tuple[str, ...] = field(default=("input_ids",))

    def config(self, **settings: Any) -> peft.LoraConfig:
        """The family's LoRA settings, changed by ``settings``."""
        return peft.LoraConfig(**{"r": self.rank, "lora_alpha": 6, "init_lora_weights": False, **self.lora, **settings})

    def logits(self, model: nn.Module) -> Tensor:
        """The same token ids always; float64 so that only the weights' differences show."""
        ids = (torch.arange(14).reshape(2, 7) * 5 + 1) % VOCAB
        with torch.no_grad():
            output = model.eval()(**dict.fromkeys(self.fields, ids))
        return output.logits


def _model(cls: Any, config: Any) -> transformers.PreTrainedModel:
    """Random weights of the size of their fan-in, so that logits are of order one and nothing is zero."""
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


_DECODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(**settings: Any) -> transformers.PreTrainedModel:
    """Llama, untied, with grouped query attention."""
    settings = {**_DECODER, "tie_word_embeddings": False, **settings}
    return _model(transformers.LlamaForCausalLM, transformers.LlamaConfig(**settings))


def mistral(**settings: Any) -> transformers.PreTrainedModel:
    """Mistral: heads wider than hidden_size / heads."""
    settings = {**_DECODER, "head_dim": 12, **settings}
    return _model(transformers.MistralForCausalLM, transformers.MistralConfig(**settings))


def gemma2(**settings: Any) -> transformers.PreTrainedModel:
    """Gemma 2: tied embeddings, norms of (1 + weight)."""
    settings = {**_DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, **settings}
    return _model(transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**settings))


def qwen3(**settings: Any) -> transformers.PreTrainedModel:
    """Qwen3: norms on queries and keys, tied embeddings."""
    settings = {**_DECODER, "head_dim": 12, "tie_word_embeddings": True, **settings}
    return _model(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**settings))


def phi3(**settings: Any) -> transformers.PreTrainedModel:
    """Phi-3: query, key and value in one weight, gate and up in another."""
    settings = {**_DECODER, **settings}
    return _model(transformers.Phi3ForCausalLM, transformers.Phi3Config(**settings))


def gpt2(**settings: Any) -> transformers.PreTrainedModel:
    """GPT-2: weights stored [in, out]; attn.c_proj is square."""
    sizes = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return _model(transformers.GPT2LMHeadModel, transformers.GPT2Config(**{**sizes, **tokens, **settings}))


def mixtral(**settings: Any) -> transformers.PreTrainedModel:
    """Mixtral: experts stacked in memory, one by one on disk."""
    settings = {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 20, **settings}
    return _model(transformers.MixtralForCausalLM, transformers.MixtralConfig(**settings))


def bert(**settings: Any) -> transformers.PreTrainedModel:
    """BERT with a classifier."""
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 32, "num_labels": 5,
    }  # fmt: skip
    return _model(transformers.BertForSequenceClassification, transformers.BertConfig(**{**sizes, **settings}))


def t5(**settings: Any) -> transformers.PreTrainedModel:
    """T5: encoder and decoder, one shared embedding."""
    sizes = {
        "vocab_size": VOCAB, "d_model": 32, "d_kv": 6, "d_ff": 44, "num_layers": 2, "num_heads": 4,
        "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    return _model(transformers.T5ForConditionalGeneration, transformers.T5Config(**{**sizes, **settings}))


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", llama, {"target_modules": _PROJECTIONS}),
        Family("mistral", mistral, {"target_modules": _PROJECTIONS}),
        Family("gemma2", gemma2, {"target_modules": _PROJECTIONS}),
        Family("qwen3", qwen3, {"target_modules": _PROJECTIONS}),
        Family("phi3", phi3, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
        Family("gpt2", gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        Family(
            "mixtral",
            mixtral,
            {
                "target_modules": _PROJECTIONS[:4],
                "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
                "rank_pattern": {r".*experts\.down_proj": 3},
            },
        ),
        Family("bert", bert, {"target_modules": ["query", "key", "value", "dense"], "task_type": "SEQ_CLS"}),
        Family(
            "t5",
            t5,
            {"target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]},
            fields=("input_ids", "decoder_input_ids"),
        ),
    )
}


def randomise(model: nn.Module) -> None:
    """Fresh values for all that an adapter saves, so that a merge which forgets some of it cannot pass."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "lora_magnitude_vector" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif ".lora_" in name and not name.endswith(".bias"):
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def train(base: nn.Module, config: peft.LoraConfig, adapter: str = "default") -> Any:
    """A PEFT model on a copy of ``base``, as if trained."""
    model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config), adapter_name=adapter)
    randomise(model)
    return model


def save_adapter(
    base: nn.Module, config: peft.LoraConfig, path: Path, adapter: str = "default", **options: Any
) -> Path:
    """Make an adapter for ``base`` and let PEFT save it; returns its directory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of what is meant here: tied targets, saved embeddings
        train(base, config, adapter).save_pretrained(path, **options)
    return path if adapter == "default" else path / adapter


def peft_merged(base: nn.Module, *adapters: Path, dtype: torch.dtype | None = None) -> Any:
    """``base`` with adapters merged by PEFT, one after the other, in ``dtype``."""
    model = copy.deepcopy(base) if dtype is None else copy.deepcopy(base).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter in adapters:
            model = peft.PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=False).merge_and_unload()
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, under all of their names."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that differ in any value."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))}


def assert_close(got: Mapping[str, Tensor], truth: Mapping[str, Tensor], tolerance: float = 3e-6) -> None:
    """Every tensor within ``tolerance``, absolute and relative, of the truth."""
    assert got.keys() == truth.keys()
    for name, expected in truth.items():
        torch.testing.assert_close(
            got[name].double(), expected.double(), atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
