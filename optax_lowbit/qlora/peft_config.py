"""``adapter_config.json`` of PEFT's LoRA."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

# What changes what an adapter computes, and is not read.
REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# In a file they are matched with names in it: what could take a regular expression long is refused.
_NAME = r"(?:[\w.-]|\\[.d-])*"
_PATTERN = re.compile(rf"(?=.)\^?{_NAME}(?:(?:\.|\\d)[*+]{_NAME})?\$?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What PEFT says of LoRA adapters, under its names.

    The product of ``A`` and ``B`` is scaled by ``lora_alpha / r``, under ``use_rslora`` by
    ``lora_alpha / sqrt(r)``.

    Raises:
      ValueError: At construction, if a field is impossible.

    Examples:
      >>> from optax_lowbit import qlora
      >>> config = qlora.AdapterConfig(r=8, lora_alpha=16, rank_pattern={"q_proj": 2})
      >>> config.rank("layers.0.q_proj"), config.scaling("layers.0.q_proj")
      (2, 8.0)

    References:
      `PEFT <https://github.com/huggingface/peft>`_ 0.21, ``LoraConfig``.
    """

    r: int = 8
    lora_alpha: float = 8
    # Modules, or the ends of their names, or a regular expression for all of a name. None, on
    # writing: the modules that have adapters.
    target_modules: str | tuple[str, ...] | None = None
    # Of these, in the same way, those without adapters; and the numbers of the layers, after
    # `layers_pattern` in names, whose modules have some if they are named by their ends.
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    # Ends of the names of modules -> r and lora_alpha in place of those above. A name may have one
    # `.*`, `.+` or `\d+`; other regular expressions are refused.
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bias: str = "none"
    modules_to_save: tuple[str, ...] | None = None
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    # Fields that say nothing of what an adapter computes; "base_model_name_or_path" and such.
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        names = self.modules_to_save
        rules = {
            "r": is_rank(self.r),
            "lora_alpha": is_number(self.lora_alpha),
            "target_modules": _are_modules(self.target_modules),
            "exclude_modules": _are_modules(self.exclude_modules),
            "layers_to_transform": _are_layers(self),
            "layers_pattern": _are_modules(self.layers_pattern)
            and (self.layers_to_transform is not None or not self.layers_pattern),
            "use_rslora": isinstance(self.use_rslora, bool),
            "use_dora": isinstance(self.use_dora, bool),
            "rank_pattern": _is_pattern(self.rank_pattern, is_rank),
            "alpha_pattern": _is_pattern(self.alpha_pattern, is_number),
            "bias": self.bias in ("none", "all", "lora_only"),
            "modules_to_save": names is None or _are_names(names),
            "lora_dropout": is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1,
            "fan_in_fan_out": isinstance(self.fan_in_fan_out, bool),
            "init_lora_weights": isinstance(self.init_lora_weights, bool | str),
            "others": isinstance(self.others, Mapping) and not self.others.keys() & FIELDS,
        }
        for field, is_right in rules.items():
            if not is_right:
                raise ValueError(f"impossible {field}: {getattr(self, field)!r:.200}")
        for field in REFUSED:
            if self.others.get(field):
                raise ValueError(f"{field} must be unset, got {self.others[field]!r:.200}")

    def rank(self, module: str) -> int:
        """``r`` of a module."""
        return _of_module(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """What the product of a module's ``A`` and ``B`` is scaled by."""
        rank = self.rank(module)
        alpha = _of_module(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT has adapters on a linear module, as its ``check_target_module_exists``."""
        targets = self.target_modules
        if _are_named(self.exclude_modules, module):
            return False
        if targets is None or targets == "all-linear" or module in _tuple(targets):
            return True
        return _are_named(targets, module) and self._has_layer(module)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "AdapterConfig":
        """From what is in the file."""
        if fields.get("peft_type") != "LORA":
            raise ValueError(f"peft_type must be 'LORA', got {fields.get('peft_type')!r:.100}")
        known = {field: fields[field] for field in FIELDS & fields.keys() if field != "others"}
        for field, value in known.items():
            if isinstance(value, list):
                known[field] = tuple(value)
        for field in ("rank_pattern", "alpha_pattern"):
            known[field] = known.get(field) or {}
        rest = {field: value for field, value in fields.items() if field not in FIELDS}
        rest.pop("peft_type")
        return cls(**known, others=rest)

    def to_json(self) -> dict[str, Any]:
        """What is in the file."""
        fields = {field: getattr(self, field) for field in FIELDS if field != "others"}
        for field, value in fields.items():
            if isinstance(value, tuple):
                fields[field] = list(value)
        return {"peft_type": "LORA", **self.others, **fields}

    def _has_layer(self, module: str) -> bool:
        """Whether the first number in the name is that of a layer that has adapters."""
        layers = _tuple(self.layers_to_transform)
        # Without a pattern PEFT wants a name before that of the layers.
        starts = [rf"(?:^|.*?\.){each}" for each in _tuple(self.layers_pattern)]
        found = (re.match(rf"{each}\.(\d+)\.", module) for each in starts or [r".*?\.[^.]*"])
        number = next((int(match[1]) for match in found if match), None)
        return not layers or number in layers


FIELDS = frozenset(field.name for field in dataclasses.fields(AdapterConfig))


def is_number(x: Any) -> bool:
    """Whether it is a finite int or float."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 2.0**127


def is_rank(x: Any) -> bool:
    """Whether it is an int that a file may have as a rank."""
    return isinstance(x, int) and not isinstance(x, bool) and 0 < x < 2**31


def _are_names(names: Any) -> bool:
    return isinstance(names, tuple) and all(isinstance(name, str) and name for name in names)


def _are_modules(modules: Any) -> bool:
    return isinstance(modules, str | None) or _are_names(modules)


def _are_layers(config: AdapterConfig) -> bool:
    """Whether there are numbers of layers, and only where PEFT takes them."""
    layers = _tuple(config.layers_to_transform)
    are_numbers = all(type(layer) is int and layer >= 0 for layer in layers)
    return are_numbers and not (layers and isinstance(config.target_modules, str))


def _are_named(modules: str | tuple[str, ...] | None, module: str) -> bool:
    """Whether a module, or the end of its name, or a regular expression for all of it is there."""
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(module == each or module.endswith(f".{each}") for each in modules or ())


def _tuple(x: Any) -> tuple[Any, ...]:
    return () if x is None or x == "" else x if isinstance(x, tuple) else (x,)


def _is_pattern(pattern: Any, is_value: Any) -> bool:
    return isinstance(pattern, Mapping) and all(
        isinstance(key, str) and _PATTERN.fullmatch(key) and is_value(value)
        for key, value in pattern.items()
    )


def _of_module(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that the name ends with, as PEFT's ``get_pattern_key``."""
    for key, value in pattern.items():
        if re.search(rf"(?:^|\.)(?:{key})$", module):
            return value
    return default
