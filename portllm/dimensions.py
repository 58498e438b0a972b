"""Which dimension of the model each axis of a weight is. Everything peculiar to a family is a row of the table below.

An axis is written as its kinds, one below the other where one weight holds several: ``heads+kv_heads+kv_heads`` are
the output rows of a fused qkv_proj, ``-`` is an axis that no pruning cuts (positions, head_dim, labels). ``heads`` and
``kv_heads`` count heads, each of as many rows as the weight has for it; the others count single rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from .errors import PlanError

# Kinds of dimensions. Layers and experts are numbers in names; experts are the rows of a router as well.
LAYERS, EXPERTS = "layers", "experts"
HEADS, KV_HEADS = "heads", "kv_heads"
WITHIN = ("hidden", HEADS, KV_HEADS, "intermediate", EXPERTS, "vocabulary")
KINDS = (LAYERS, *WITHIN)
FIXED = "-"

# What modules call their list of layers.
STACK = re.compile(r"(?:^|(?<=\.))(?P<stack>layers|h|block|blocks|layer)\.(?P<number>\d+)(?=\.|$)")
EXPERT = re.compile(r"(?<=\.experts\.)(?P<number>\d+)(?=\.|$)")

# End of a module's name (in the spelling of portllm.naming.canonical), its output rows and its input columns.
# The first row that fits holds.
TABLE = (
    (r"(embed_tokens|wte|shared|word_embeddings|embed_in|tok_embeddings)", "vocabulary", "hidden"),
    (r"(lm_head|embed_out|output_embeddings|predictions\.decoder|lm_head\.decoder)", "vocabulary", "hidden"),
    (r"(position_embeddings|token_type_embeddings|wpe)", FIXED, "hidden"),
    (r"relative_attention_bias", FIXED, HEADS),
    (r"(score|classifier|classification_head\.out_proj)", FIXED, "hidden"),
    (r"pooler\.dense|predictions\.transform\.dense", "hidden", "hidden"),
    # Attention: Llama, Mistral, Gemma, Qwen; Phi-3; BERT; T5; GPT-NeoX (rows by head: query, key, value); GPT-2.
    (r"self_attn\.q_proj", HEADS, "hidden"),
    (r"self_attn\.(k_proj|v_proj)", KV_HEADS, "hidden"),
    (r"self_attn\.(o_proj|out_proj)", "hidden", HEADS),
    (r"self_attn\.(qkv_proj|W_pack)", f"{HEADS}+{KV_HEADS}+{KV_HEADS}", "hidden"),
    (r"attention\.self\.(query|key|value)", HEADS, "hidden"),
    (r"attention\.output\.dense", "hidden", HEADS),
    (r"(Self|EncDec)Attention\.(q|k|v)", HEADS, "hidden"),
    (r"(Self|EncDec)Attention\.o", "hidden", HEADS),
    (r"\.attention\.query_key_value", HEADS, "hidden"),
    (r"\.attention\.dense", "hidden", HEADS),
    (r"\.attn\.c_attn", f"{HEADS}+{HEADS}+{HEADS}", "hidden"),
    (r"\.attn\.c_proj", "hidden", HEADS),
    # Multi-head latent attention (DeepSeek): its inner ranks are not pruned.
    (r"self_attn\.(q_a_proj|kv_a_proj_with_mqa)", FIXED, "hidden"),
    (r"self_attn\.(q_b_proj|kv_b_proj)", HEADS, FIXED),
    (r"(q_norm|k_norm|q_a_layernorm|kv_a_layernorm)", FIXED, FIXED),
    # Feed-forward layers, dense, shared and of experts.
    (r"(gate_proj|up_proj)", "intermediate", "hidden"),
    (r"gate_up_proj", "intermediate+intermediate", "hidden"),
    (r"down_proj", "hidden", "intermediate"),
    (r"\.mlp\.(gate|router)", EXPERTS, "hidden"),
    (r"shared_expert_gate", FIXED, "hidden"),
    (r"intermediate\.dense|DenseReluDense\.(wi|wi_0|wi_1)", "intermediate", "hidden"),
    (r"output\.dense|DenseReluDense\.wo", "hidden", "intermediate"),
    (r"\.mlp\.(dense_h_to_4h|c_fc)", "intermediate", "hidden"),
    (r"\.mlp\.(dense_4h_to_h|c_proj)", "hidden", "intermediate"),
    # Norms of hidden states.
    (r"(\w*norm|\w*layernorm|\w*layer_norm|LayerNorm|ln_\w+)", "hidden", FIXED),
)  # fmt: skip


# Modules that GPT-2 stores [in, out] (transformers' Conv1D), where nothing else tells.
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True)
class Axes:
    """The kinds of a weight's output rows and of its input columns; empty for an axis that is never cut."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]


def parse_axes(rows: str, columns: str, where: str) -> Axes:
    """``("heads", "hidden")`` as ``Axes``; raises PlanError for a kind that there is not."""
    parts = [tuple(part for part in text.split("+") if part != FIXED) for text in (rows, columns)]
    for kind in (kind for part in parts for kind in part):
        if kind not in WITHIN:
            raise PlanError(f"{where}: there is no dimension {kind!r}; choose from {', '.join(WITHIN)}, or '-'")
    return Axes(*parts)


def is_conv1d(module: str) -> bool:
    """Whether GPT-2 has such a module, and stores its weight [in, out]; other families may store it [out, in]."""
    return module.rpartition(".")[2] in _CONV1D


@lru_cache(maxsize=1 << 16)
def _known(module: str) -> Axes | None:
    for pattern, rows, columns in TABLE:
        if re.search(rf"(?:^|(?<=\.)|(?=\.))(?:{pattern})$", module):
            return parse_axes(rows, columns, pattern)
    return None


def axes_of(module: str, own: Mapping[str, tuple[str, str]]) -> Axes:
    """The axes of a module's weight, [out, in] whatever way it is stored.

    Args:
        module: canonical name, without ``.weight``.
        own: the user's rows before the table: regular expression for a part of the name -> (rows, columns).

    Raises:
        PlanError: neither has the module.
    """
    for pattern, (rows, columns) in own.items():
        if re.search(pattern, module):
            return parse_axes(rows, columns, f"dimensions[{pattern!r}]")
    found = _known(module)
    if found is None:
        raise PlanError(
            f"{module}: its dimensions are not known here; say them in the map, such as "
            f'"dimensions": {{"{re.escape(module.rpartition(".")[2])}$": ["heads", "hidden"]}} (output rows, input '
            "columns, '-' for an axis that is not cut)"
        )
    return found
