"""adapter_config.json: which settings decide the result, and PEFT's own rules for matching module names.

Rules as in PEFT 0.21: ``check_target_module_exists`` (target, exclude and layer selection) and
``get_pattern_key`` (rank_pattern, alpha_pattern).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import PatchError, UnsupportedPatchError

CONFIG_NAME = "adapter_config.json"

# Settings that choose the result; each is consumed by AdapterConfig or by the reader of the keys.
_CONSUMED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora",
    "lora_bias", "bias", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "target_parameters", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
    "base_model_name_or_path", "revision", "peft_version", "init_lora_weights",
}  # fmt: skip
# Settings of the training only: a finished adapter means the same whatever they say.
_NEUTRAL = {
    "auto_mapping", "task_type", "inference_mode", "lora_dropout", "runtime_config", "megatron_core",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
# Settings under which B @ A is not, or not alone, what has to be added to the weight.
_UNSUPPORTED = {
    "layer_replication": "the patched model has more layers than the base",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only and cannot be merged",
    "arrow_config": "Arrow routes each token to other experts and cannot be merged",
    "kasa_config": "KaSA truncates the base weights, so the adapter alone is not the whole patch",
    "velora_config": "VeLoRA adapters are untested here",
    "monteclora_config": "MonteCLoRA samples its factors",
    "use_bdlora": "block-diagonal factors are untested here",
    "use_qalora": "QA-LoRA pools the inputs of a quantised base",
    "megatron_config": "Megatron shards the factors",
}
_BASE_CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What the names of quantised models carry.
_QUANTISED = re.compile(
    r"(^|[-_./])(bnb|[2-8]-?bits?|int[48]|nf4|(nv|mx)?fp[48]|gptq|awq|hqq|aqlm|eetq|exl[23]|quip|w[48]a(8|16)|gguf)"
    r"($|[-_./])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of one LoRA adapter that decide its merge.

    Attributes:
        raw: adapter_config.json as read, for writing it back.
        r, lora_alpha, use_rslora, rank_pattern, alpha_pattern: rank and scaling (see ``rank`` and ``scaling``).
        Others: as in ``peft.LoraConfig``.
    """

    raw: Mapping[str, Any]
    r: int
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: Mapping[str, tuple[int, ...]] | tuple[int, ...] | None = None
    ensure_weight_tying: bool = False
    base_model: str | None = None
    revision: str | None = None
    peft_version: str | None = None

    @classmethod
    def load(cls, path: Path, *, ignore_settings: tuple[str, ...] = ()) -> AdapterConfig:
        """Read ``path`` (adapter_config.json).

        Raises:
            PatchError: the file cannot be read, or a value is not of its type.
            UnsupportedPatchError: another method than LoRA, or a setting that changes the result unknown here.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise PatchError(f"{path}: cannot be read as JSON: {error}") from None
        if not isinstance(raw, dict):
            raise PatchError(f"{path}: holds a {type(raw).__name__}, not a JSON object of LoRA settings")
        try:
            return cls.from_dict(raw, ignore_settings=ignore_settings)
        except PatchError as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, ignore_settings: tuple[str, ...] = ()) -> AdapterConfig:
        """Check and take over a mapping of PEFT's LoRA settings; raises as ``load``."""
        _refuse_unsupported(raw, ignore_settings)
        read = _Reader(raw)
        tokens = raw.get("trainable_token_indices")
        return cls(
            raw=dict(raw),
            r=read.positive_int("r", 8),
            lora_alpha=read.number("lora_alpha", 8),
            use_rslora=read.boolean("use_rslora"),
            use_dora=read.boolean("use_dora"),
            lora_bias=read.boolean("lora_bias"),
            bias=read.choice("bias", ("none", "all", "lora_only")),
            fan_in_fan_out=read.boolean("fan_in_fan_out"),
            rank_pattern=read.pattern("rank_pattern"),
            alpha_pattern=read.pattern("alpha_pattern"),
            target_modules=read.names_or_regex("target_modules"),
            exclude_modules=read.names_or_regex("exclude_modules"),
            layers_to_transform=read.ints("layers_to_transform"),
            layers_pattern=read.regexes("layers_pattern"),
            target_parameters=read.names("target_parameters"),
            modules_to_save=read.regexes("modules_to_save"),
            trainable_token_indices=(
                None
                if not tokens
                else {str(k): _ints("trainable_token_indices", v) for k, v in tokens.items()}
                if isinstance(tokens, Mapping)
                else _ints("trainable_token_indices", tokens)
            ),
            ensure_weight_tying=read.boolean("ensure_weight_tying"),
            base_model=read.text("base_model_name_or_path"),
            revision=read.text("revision"),
            peft_version=read.text("peft_version"),
        )

    def rank(self, name: str) -> int:
        """The rank of module (or parameter) ``name``: the first matching key of rank_pattern, else r."""
        key = _pattern_key(self.rank_pattern, name)
        return self.r if key is None else self.rank_pattern[key]

    def alpha(self, name: str) -> float:
        """lora_alpha of module (or parameter) ``name``: the first matching key of alpha_pattern, else lora_alpha."""
        key = _pattern_key(self.alpha_pattern, name)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scaling(self, name: str) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora (rank-stabilised LoRA, arXiv 2312.03732)."""
        alpha, rank = self.alpha(name), self.rank(name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @property
    def quantised_base(self) -> str | None:
        """The base's name if it says that the adapter was trained on quantised weights (QLoRA), else None."""
        return self.base_model if self.base_model and _QUANTISED.search(self.base_model) else None

    @property
    def selects_by_kind(self) -> bool:
        """Whether target_modules names a kind of layer ("all-linear") or nothing, so that names cannot be checked."""
        if self.target_modules is None:
            return not self.target_parameters
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def targets_module(self, name: str) -> bool:
        """Whether PEFT would put a LoRA layer on module ``name`` (always true when layers are chosen by kind)."""
        if _matches(self.exclude_modules, name) or self.saves_module(name):
            return False
        if self.selects_by_kind:
            return True
        if not _matches(self.target_modules, name):
            return False
        # PEFT looks at the layer index only where target_modules is a list and does not name the module in full.
        targets = self.target_modules
        if not self.layers_to_transform or isinstance(targets, str) or (targets and name in targets):
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in self.layers_pattern]
        patterns = patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        found = next((m for m in (re.match(p, name) for p in patterns) if m), None)
        return found is not None and int(found["idx"]) in self.layers_to_transform

    def targets_parameter(self, name: str) -> bool:
        """Whether target_parameters name the parameter ``name``."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_parameters)

    def parameters_of(self, module: str) -> tuple[str, ...]:
        """Full names of the target_parameters that could belong to ``module``, sorted."""
        names = []
        for target in sorted(set(self.target_parameters)):
            owner, _, leaf = target.rpartition(".")
            if not owner or module == owner or module.endswith(f".{owner}"):
                names.append(f"{module}.{leaf}")
        return tuple(names)

    def saves_module(self, name: str) -> bool:
        """Whether ``name`` is, or lies in, one of modules_to_save, so that PEFT puts no factors on it."""
        return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in self.modules_to_save)

    def saves_tensor_of(self, name: str) -> bool:
        """Whether PEFT saves module ``name`` whole: the name, or that of a module around it, ends as one to save."""
        parts = name.split(".")
        around = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        return any(module.endswith(self.modules_to_save) for module in around)

    def token_indices(self, module: str) -> tuple[int, ...] | None:
        """The vocabulary rows that trainable_token_indices trains in ``module``, or None."""
        tokens = self.trainable_token_indices
        if tokens is None or not isinstance(tokens, Mapping):
            return tokens
        return next((v for k, v in tokens.items() if module == k or module.endswith(f".{k}")), None)


def _refuse_unsupported(raw: Mapping[str, Any], ignore: tuple[str, ...]) -> None:
    method = raw.get("peft_type")
    if method != "LORA":
        hint = "" if method else " (is this an adapter directory written by PEFT?)"
        raise UnsupportedPatchError(f"peft_type is {method!r}; only LORA can be ported{hint}")
    init = str(raw.get("init_lora_weights", True)).lower()
    if init.startswith(_BASE_CHANGING_INIT) and "init_lora_weights" not in ignore:
        raise UnsupportedPatchError(
            f"init_lora_weights={raw['init_lora_weights']!r} changes the base weights, so the adapter alone is not "
            "the whole patch; convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key, value in raw.items():
        if key in _CONSUMED or key in _NEUTRAL or key in ignore or not value:
            continue
        why = _UNSUPPORTED.get(key, "unknown here, so it may change the result")
        raise UnsupportedPatchError(
            f"setting {key}={value!r} is not supported: {why}; "
            "if it does not matter, name it in ignore_settings (--ignore-setting)"
        )


class _Reader:
    """Typed access to the raw settings; a wrong type is a PatchError that names the setting."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def _get(self, key: str, default: Any, kinds: type | tuple[type, ...], what: str) -> Any:
        value = self._raw.get(key)
        if value is None:
            return default
        wrong_bool = isinstance(value, bool) and kinds is not bool
        if wrong_bool or not isinstance(value, kinds):
            raise PatchError(f"setting {key}={value!r} must be {what}")
        return value

    def positive_int(self, key: str, default: int) -> int:
        value: int = self._get(key, default, int, "a positive integer")
        if value <= 0:
            raise PatchError(f"setting {key}={value!r} must be a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default, (int, float), "a number")
        if not fits_fp32(value):
            raise PatchError(f"setting {key}={value!r} must be finite in fp32")
        return float(value)

    def boolean(self, key: str) -> bool:
        return bool(self._get(key, False, bool, "true or false"))

    def choice(self, key: str, options: tuple[str, ...]) -> str:
        value = self._get(key, options[0], str, f"one of {', '.join(options)}")
        if value not in options:
            raise PatchError(f"setting {key}={value!r} must be one of {', '.join(options)}")
        return str(value)

    def text(self, key: str) -> str | None:
        value = self._get(key, None, str, "a string")
        return value or None

    def names(self, key: str) -> tuple[str, ...]:
        value = self._get(key, [], (list, str), "a list of strings")
        items = [value] if isinstance(value, str) else value
        if not all(isinstance(item, str) for item in items):
            raise PatchError(f"setting {key}={value!r} must be a list of strings")
        return tuple(items)

    def regexes(self, key: str) -> tuple[str, ...]:
        for name in (names := self.names(key)):
            _compile(key, name)
        return names

    def names_or_regex(self, key: str) -> tuple[str, ...] | str | None:
        value = self._raw.get(key)
        if isinstance(value, str) and value.lower() != "all-linear":
            _compile(key, value)
        return value if value is None or isinstance(value, str) else self.names(key)

    def ints(self, key: str) -> tuple[int, ...]:
        value = self._raw.get(key)
        if value is None:
            return ()
        return _ints(key, [value] if isinstance(value, int) else value)

    def pattern(self, key: str) -> dict[str, Any]:
        value: dict[str, Any] = self._get(key, {}, dict, "an object")
        for name, number in value.items():
            _compile(key, name)
            integer = isinstance(number, int) and not isinstance(number, bool) and number > 0
            if key == "rank_pattern" and not integer:
                raise PatchError(f"setting {key}[{name!r}]={number!r} must be a positive integer")
            if isinstance(number, bool) or not isinstance(number, int | float) or not fits_fp32(number):
                raise PatchError(f"setting {key}[{name!r}]={number!r} must be a finite number")
        return dict(value)


def _compile(key: str, expression: str) -> None:
    try:
        re.compile(expression)
        re.compile(f"(.*)({expression})")  # PEFT sets it into a larger one, where global flags are an error
    except re.error as error:
        raise PatchError(f"setting {key}: {expression!r} is not a regular expression: {error}") from None


def ranks_and_alphas(modules: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Settings that give each module its (rank, scaling): the commonest, and patterns by full names for the others."""
    ranks = {module: rank for module, (rank, _) in modules.items()}
    alphas = {module: written_alpha(scaling * rank) for module, (rank, scaling) in modules.items()}
    rank, alpha = _commonest(ranks.values(), 8), _commonest(alphas.values(), 8)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(module)}": a for module, a in alphas.items() if a != alpha},
    }


def _commonest(values: Iterable[Any], default: int) -> Any:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value), default=default)


def written_alpha(value: float) -> float | int:
    """As PEFT writes it: an integer where it is one."""
    return int(value) if float(value).is_integer() else value


def fits_fp32(number: float) -> bool:
    """Whether a scaling is finite in fp32, in which it is applied; NaN is not."""
    return abs(number) <= 3.4028234663852886e38


def _ints(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(i, int) and i >= 0 for i in value):
        raise PatchError(f"setting {key}={value!r} must be a list of non-negative integers")
    return tuple(value)


def _matches(targets: tuple[str, ...] | str | None, name: str) -> bool:
    if not targets:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or any(name.endswith(f".{target}") for target in targets)


def _pattern_key(patterns: Mapping[str, Any], name: str) -> str | None:
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
