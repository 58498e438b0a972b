"""How serving engines lay a model's weights out: which of its tensors lie in which of theirs, and how ranks share them.

Everything that is peculiar to an engine or a model family is a row in one of the tables below, never code. Facts from
the weight loaders of vLLM 0.33 (model_executor/layers: linear.py, vocab_parallel_embedding.py, fused_moe/) and SGLang
0.5.23 (srt/layers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Dimension:
    """One dimension of a whole weight: its size by the model's config, and how ranks share it where it is cut.

    Attributes:
        sizes: keys of the config, summed; see ``KEYS`` for their other spellings. A list there has a value a layer.
        count: a key that the sum is multiplied by; empty for once.
        shared: "even": equal parts. "units": each rank has as many of the ``count`` units as any other. "repeated": as
            "units", but where there are fewer units than ranks, neighbouring ranks hold the same one. "padded": equal
            parts of the size rounded up to ``Layout.vocab_padding``; what is beyond the size is padding.
    """

    sizes: tuple[str, ...]
    count: str = ""
    shared: Literal["even", "units", "repeated", "padded"] = "even"


DIMENSIONS: Mapping[str, Dimension] = {
    "hidden": Dimension(("hidden_size",)),
    "heads": Dimension(("head_dim",), "num_attention_heads", "units"),
    "kv_heads": Dimension(("head_dim",), "num_key_value_heads", "repeated"),
    "intermediate": Dimension(("intermediate_size",)),
    "vocabulary": Dimension(("vocab_size",), shared="padded"),
    "expert": Dimension(("moe_intermediate_size",)),
    "shared_expert": Dimension(("shared_expert_intermediate_size",)),
    "shared_experts": Dimension(("moe_intermediate_size",), "n_shared_experts"),
    "q_latent": Dimension(("q_lora_rank",)),
    "kv_latent": Dimension(("kv_lora_rank",)),
    "kv_latent_rope": Dimension(("kv_lora_rank", "qk_rope_head_dim")),
    "mla_q": Dimension(("qk_nope_head_dim", "qk_rope_head_dim"), "num_attention_heads", "units"),
    "mla_kv": Dimension(("qk_nope_head_dim", "v_head_dim"), "num_attention_heads", "units"),
    "mla_v": Dimension(("v_head_dim",), "num_attention_heads", "units"),
}

# Other spellings of a config's key; the first that the config has counts.
KEYS: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "moe_intermediate_size": ("moe_intermediate_size", "intermediate_size"),
}

Group = Literal["attention", "dense", "embedding", "head", "experts"]


@dataclass(frozen=True)
class Rule:
    r"""One kind of tensor of an engine; of all rules the first that fits counts.

    Attributes:
        name: regular expression for all of the engine's name, in the spelling of ``naming.canonical``.
        holds: what lies in it, one below the other: (name of the model's own tensor, its rows). The name may use the
            expression's groups (``\1``). A tensor may stand here several times: its parts are shared one by one. Rows
            (and ``columns``) are a Dimension, a name of one in ``DIMENSIONS``, or "any": whatever the tensor here says.
        columns: the other dimension; tensors with one dimension do not have it.
        cut: which of the two is divided over ranks; None for a tensor that each rank has whole.
        group: the ranks that share it.
        stacked: the first of three dimensions counts experts.
        models: model types (of the config) that the rule is for; empty for all.
        needs: a key that the config must have.
        derived: what the engine computes from the tensor when it loads it, and goes on using.
    """

    name: str
    holds: tuple[tuple[str, str | Dimension], ...]
    columns: str | Dimension = "any"
    cut: Literal["rows", "columns"] | None = None
    group: Group = "dense"
    stacked: bool = False
    models: tuple[str, ...] = ()
    needs: str = ""
    derived: str = ""


def _same(*rows: str) -> tuple[tuple[str, str], ...]:
    """All of the rows are of the tensor that has the engine's own name."""
    return tuple((r"\g<0>", row) for row in rows)


_QKV = r"(.+\.)qkv_proj\.(weight|bias)"
_MLP = r"(?:mlp|feed_forward)\."
_GATE_UP = rf"(.+\.{_MLP})gate_up_proj\.(weight|bias)"
_GATE_AND_UP = (r"\1gate_proj.\2", r"\1up_proj.\2")
_MLA_COPIES = "the two halves of it that decoding multiplies with (W_UK_T and W_UV, or w_kc and w_vc)"
_GPT2 = ("gpt2",)
_FUSED_MLP = ("phi3", "glm", "glm4")  # model types whose own gate and up lie in one weight

RULES: tuple[Rule, ...] = (
    # Attention
    Rule(_QKV, _same("heads", "kv_heads", "kv_heads"), "hidden", "rows", "attention", models=("phi3",)),
    Rule(
        _QKV,
        ((r"\1q_proj.\2", "heads"), (r"\1k_proj.\2", "kv_heads"), (r"\1v_proj.\2", "kv_heads")),
        "hidden",
        "rows",
        "attention",
    ),
    Rule(r".+\.c_attn\.(weight|bias)", _same("heads", "heads", "heads"), "hidden", "rows", "attention", models=_GPT2),
    Rule(r".+\.attn\.c_proj\.(weight|bias)", _same("hidden"), "heads", "columns", "attention", models=_GPT2),
    Rule(r".+\.q_proj\.weight", _same("mla_q"), "hidden", "rows", "attention", needs="kv_lora_rank"),
    Rule(r".+\.q_b_proj\.weight", _same("mla_q"), "q_latent", "rows", "attention", needs="kv_lora_rank"),
    Rule(
        r".+\.kv_b_proj\.weight",
        _same("mla_kv"),
        "kv_latent",
        "rows",
        "attention",
        needs="kv_lora_rank",
        derived=_MLA_COPIES,
    ),
    Rule(r".+\.q_a_proj\.(weight|bias)", _same("q_latent"), "hidden", group="attention", needs="kv_lora_rank"),
    Rule(
        r".+\.kv_a_proj_with_mqa\.(weight|bias)",
        _same("kv_latent_rope"),
        "hidden",
        group="attention",
        needs="kv_lora_rank",
    ),
    Rule(
        r"(.+\.)fused_qkv_a_proj(?:_with_mqa)?\.(weight|bias)",
        ((r"\1q_a_proj.\2", "q_latent"), (r"\1kv_a_proj_with_mqa.\2", "kv_latent_rope")),
        "hidden",
        group="attention",
        needs="kv_lora_rank",
    ),
    Rule(r".+\.o_proj\.(weight|bias)", _same("hidden"), "mla_v", "columns", "attention", needs="kv_lora_rank"),
    Rule(r".+\.(?:o_proj|(?:self_)?attn\.out_proj)\.(weight|bias)", _same("hidden"), "heads", "columns", "attention"),
    # Experts: the first half of w13 is the gate, unless the backend has them the other way round.
    Rule(
        r"(.+\.)experts\.(?:routed_experts\.)?w13_weight",
        ((r"\1experts.gate_up_proj", "expert"), (r"\1experts.gate_up_proj", "expert")),
        "hidden",
        "rows",
        "experts",
        stacked=True,
    ),
    Rule(
        r"(.+\.)experts\.(?:routed_experts\.)?w2_weight",
        ((r"\1experts.down_proj", "hidden"),),
        "expert",
        "columns",
        "experts",
        stacked=True,
    ),
    Rule(rf".+\.{_MLP}(?:gate|router|shared_expert_gate)\.(?:weight|bias|e_score_correction_bias)", _same("any")),
    # MLPs
    Rule(
        rf"(.+\.{_MLP}shared_expert\.)gate_up_proj\.(weight|bias)",
        tuple((part, "shared_expert") for part in _GATE_AND_UP),
        "hidden",
        "rows",
        needs="shared_expert_intermediate_size",
    ),
    Rule(
        rf".+\.{_MLP}shared_expert\.down_proj\.(weight|bias)",
        _same("hidden"),
        "shared_expert",
        "columns",
        needs="shared_expert_intermediate_size",
    ),
    Rule(
        rf"(.+\.{_MLP}shared_experts\.)gate_up_proj\.(weight|bias)",
        tuple((part, "shared_experts") for part in _GATE_AND_UP),
        "hidden",
        "rows",
        needs="n_shared_experts",
    ),
    Rule(
        rf".+\.{_MLP}shared_experts\.down_proj\.(weight|bias)",
        _same("hidden"),
        "shared_experts",
        "columns",
        needs="n_shared_experts",
    ),
    Rule(_GATE_UP, _same("intermediate", "intermediate"), "hidden", "rows", models=_FUSED_MLP),
    Rule(_GATE_UP, tuple((part, "intermediate") for part in _GATE_AND_UP), "hidden", "rows"),
    Rule(rf".+\.{_MLP}down_proj\.(weight|bias)", _same("hidden"), "intermediate", "columns"),
    Rule(r".+\.(?:up_proj|fc1|c_fc)\.(weight|bias)", _same("any"), "hidden", "rows"),
    Rule(r".+\.(?:fc2|mlp\.c_proj)\.(weight|bias)", _same("hidden"), "any", "columns"),
    # Vocabulary and the rest
    Rule(r"(?:.+\.)?(?:embed_tokens|wte)\.weight", _same("vocabulary"), "hidden", "rows", "embedding"),
    Rule(r"(?:.+\.)?lm_head\.(weight|bias)", _same("vocabulary"), "hidden", "rows", "head"),
    Rule(r"(?:.+\.)?(?:wpe|score)\.(weight|bias)", _same("any")),
    Rule(r"(?:.+\.)?(?:\w*norm\d?|ln_\w+)\.(weight|bias)", _same("any")),
)

# Parts of multimodal models whose sizes stand elsewhere in the config; their tensors are left alone.
TOWERS = re.compile(r"(?:^|.*\.)(?:visual|vision_\w+|audio_\w+|image_\w+|multi_modal_projector|mm_projector)\..*")

# What stands before and after the layers, which pipeline stages in between do not have.
ENDS = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|wpe|lm_head|score|norm|ln_f|final_layernorm)(?:\.weight|\.bias)?")


@dataclass(frozen=True)
class ExpertForm:
    """How a kernel wants stacked experts: [E, out, in], gate before up, unless it says otherwise."""

    up_first: bool = False
    transposed: bool = False


# Backends of unquantised experts, by the engine's names for them; a sentence says why one cannot be patched.
_SHUFFLED = "stores them in blocks whose order only its kernel knows"
VLLM_EXPERTS: Mapping[str, ExpertForm | str] = {
    "triton": ExpertForm(),
    "batched_triton": ExpertForm(),
    "flashinfer_cutlass": ExpertForm(up_first=True),
    "xpu": ExpertForm(transposed=True),
    "flashinfer_trtllm": _SHUFFLED,
    "aiter": _SHUFFLED,
    "cpu": _SHUFFLED,
    "moonep": "keeps the up projection outside of the named tensors",
}
SGLANG_EXPERTS: Mapping[str, ExpertForm | str] = {
    "triton": ExpertForm(),
    "deep_gemm": ExpertForm(),
    "triton_kernel": ExpertForm(transposed=True),
    "flashinfer_cutlass": ExpertForm(up_first=True),
    "flashinfer_trtllm": _SHUFFLED,
    "aiter": _SHUFFLED,
    "cpu": _SHUFFLED,
}
