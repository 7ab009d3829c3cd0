"""``adapter_config.json`` of PEFT's LoRA."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from optax_lowbit.qlora import peft_patterns

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
# Patterns that a config may have, each of which is matched with each module.
_MOST_PATTERNS = 2**12
_NAME = re.compile(r"[\w.-]+")
# What PEFT leaves out under "all-linear": output layers, by their names in transformers.
_OUTPUTS = ("lm_head", "embed_out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    r"""What PEFT says of LoRA adapters, under its names.

    The product of ``A`` and ``B`` is scaled by ``lora_alpha / r``, under ``use_rslora`` by
    ``lora_alpha / sqrt(r)``. Regular expressions may have characters, ``.``, ``\d``, groups of
    alternatives, and ``*``, ``+`` and ``?`` after one character.

    Raises:
      ValueError: At construction, if a field is impossible; of ``target_modules`` and
        ``exclude_modules`` with other regular expressions, from :meth:`targets`.

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
    # Patterns of the ends of the names of modules -> r and lora_alpha in place of those above.
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] | None = None
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    # Fields that say nothing of what an adapter computes; "base_model_name_or_path" and such.
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for field in FIELDS - {"others"}:
            object.__setattr__(self, field, _plain(getattr(self, field)))
        names = self.modules_to_save
        rules = {
            "r": is_rank(self.r),
            "lora_alpha": is_number(self.lora_alpha),
            "target_modules": _are_modules(self.target_modules),
            "exclude_modules": _are_modules(self.exclude_modules),
            "layers_to_transform": _are_layers(self),
            "layers_pattern": _are_patterns_of_layers(self),
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
        for field in ("rank_pattern", "alpha_pattern"):
            if (count := len(getattr(self, field))) > _MOST_PATTERNS:
                raise ValueError(f"{field} must have at most {_MOST_PATTERNS} keys, has {count}")
            for key in getattr(self, field):
                _found(field, peft_patterns.matches_end, key, "")
        for field in REFUSED:
            if self.others.get(field):
                raise ValueError(f"{field} must be unset, got {self.others[field]!r:.200}")

    def rank(self, module: str) -> int:
        """``r`` of a module."""
        return _of_module(self, "rank_pattern", module, self.r)

    def scaling(self, module: str) -> float:
        """What the product of a module's ``A`` and ``B`` is scaled by."""
        rank = self.rank(module)
        alpha = _of_module(self, "alpha_pattern", module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT has adapters on a linear module, as its ``check_target_module_exists``."""
        targets = self.target_modules
        saved = any(f".{name}." in f".{module}." for name in self.modules_to_save or ())
        if saved or self._are_named("exclude_modules", module):
            return False
        if targets == "all-linear":
            return module.rpartition(".")[2] not in _OUTPUTS
        if targets is None or module in _tuple(targets):
            return True
        return self._are_named("target_modules", module) and self._has_layer(module)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "AdapterConfig":
        """From what is in the file."""
        if fields.get("peft_type") != "LORA":
            raise ValueError(f"peft_type must be 'LORA', got {fields.get('peft_type')!r:.100}")
        known = {field: fields[field] for field in FIELDS & fields.keys() if field != "others"}
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

    def _are_named(self, field: str, module: str) -> bool:
        """Whether a field has a module, the end of its name, or a pattern for all of it."""
        modules = getattr(self, field)
        if isinstance(modules, str):
            return _found(field, peft_patterns.matches, modules, module)
        return any(module == each or module.endswith(f".{each}") for each in modules or ())

    def _has_layer(self, module: str) -> bool:
        """Whether the first number in the name is that of a layer that has adapters."""
        layers = _tuple(self.layers_to_transform)
        # Without a pattern PEFT wants a name before that of the layers.
        patterns = _tuple(self.layers_pattern)
        number = None
        for pattern in patterns or [""]:
            number = _first_number(pattern, module)
            if number is not None:
                break
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


def _are_patterns_of_layers(config: AdapterConfig) -> bool:
    """Whether they are names, and only where PEFT takes them."""
    patterns = config.layers_pattern
    are_used = config.layers_to_transform is not None or not patterns
    return are_used and _are_modules(patterns) and all(map(_NAME.fullmatch, _tuple(patterns)))


def _tuple(x: Any) -> tuple[Any, ...]:
    return () if x is None or x == "" else x if isinstance(x, tuple) else (x,)


def _is_pattern(pattern: Any, is_value: Any) -> bool:
    return isinstance(pattern, Mapping) and all(
        isinstance(key, str) and key and is_value(value) for key, value in pattern.items()
    )


def _of_module(config: AdapterConfig, field: str, module: str, default: Any) -> Any:
    """The value of the first key that the name ends with, as PEFT's ``get_pattern_key``."""
    for key, value in getattr(config, field).items():
        if _found(field, peft_patterns.matches_end, key, module):
            return value
    return default


def _first_number(pattern: str, module: str) -> int | None:
    """The first number of a layer in the name; with a pattern, the first after a match of it."""
    parts = module.split(".")
    for i in range(1 if pattern else 2, len(parts) - 1):
        if parts[i].isdecimal():
            before = ".".join(parts[:i])
            if not pattern or peft_patterns.matches_end(pattern, before):
                return int(parts[i])
    return None


def _found(field: str, matches: Callable[[str, str], bool], pattern: str, name: str) -> bool:
    """Whether a pattern of a field matches; an error of the pattern names the field."""
    try:
        return matches(pattern, name)
    except ValueError as error:
        raise ValueError(f"{field}: {error}, got {pattern!r:.200}") from error


def _plain(x: Any) -> Any:
    """What JSON and :class:`AdapterConfig` have of it: no lists and no numbers of NumPy's."""
    if isinstance(x, list | tuple):
        return tuple(map(_plain, x))
    if isinstance(x, Mapping):
        return {key: _plain(value) for key, value in x.items()}
    return x.item() if isinstance(x, np.generic) else x
