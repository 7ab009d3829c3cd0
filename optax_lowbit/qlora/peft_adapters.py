"""PEFT's adapters as those of `adapters.LoRA`, and back."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from optax_lowbit.adapters import LoRA
from optax_lowbit.kernels.reference import widened
from optax_lowbit.qlora.peft_config import AdapterConfig
from optax_lowbit.qlora.peft_files import (
    Adapter,
    Matrices,
    Names,
    adapter_leaves,
    adapter_matrices,
    modules_of,
)
from optax_lowbit.qlora.peft_values import is_bias, read_values, written_values

# Starts that leave the base as it is.
_PLAIN = (True, False, "gaussian", "orthogonal", "eva")
# It is found nowhere.
_NONE = r"(?!)"


def from_peft(adapter: Adapter, names: Names) -> tuple[LoRA, dict[str, dict[str, jax.Array]]]:
    """The adapters of a tree, and which they are, from PEFT's files.

    Args:
      adapter: What :func:`read_adapter` gave.
      names: Leaf of the tree, such as ``layers/attention/query/kernel``, -> its PyTorch module, or
        the modules of a stack in their order. Of biases and ``modules_to_save`` it is the module,
        too: a leaf named `bias` has its bias, any other its weight, transposed if it is named
        `kernel`. Their axes are PyTorch's.

    Returns:
      A :class:`~optax_lowbit.adapters.LoRA` and its adapters in float32, for
      ``lora.attach(params, trained)``, ``lora.merge``, or, of a model that ``lora.wrap`` gave,
      ``lora.update(model, trained)``.

    Raises:
      ValueError: If ``names`` do not fit, layers of a stack differ in their scaling, the adapters
        belong to a base that their start has changed, or ``adapter.others`` has a tensor of no leaf
        in ``names``, such as an adapted embedding's own table, which PEFT writes as well.

    Examples:
      >>> import numpy as np
      >>> from optax_lowbit import qlora
      >>> pair = {"a": np.ones((8, 64)), "b": np.ones((8, 32))}
      >>> config = qlora.AdapterConfig(r=8, lora_alpha=16)
      >>> adapter = qlora.Adapter(config=config, matrices={"layers.0.q_proj": pair})
      >>> lora, trained = qlora.from_peft(adapter, {"query/kernel": "layers.0.q_proj"})
      >>> lora.scale_of("query/kernel"), list(trained)
      (2.0, ['query/kernel'])
    """
    config = adapter.config
    if config.init_lora_weights not in _PLAIN:
        raise ValueError(
            f"init_lora_weights must be one of {_PLAIN}, which leave the base alone, got "
            f"{config.init_lora_weights!r}: PEFT converts such adapters to plain ones on saving"
        )
    tensors = {leaf: names[leaf] for leaf in names if not is_bias(leaf)}
    leaves = jax.tree.map(widened, adapter_leaves(adapter.matrices, tensors))
    ranks, alphas = _patterns_of_leaves(config, leaves, names)
    values = read_values(adapter.others, {x: names[x] for x in names if x not in leaves})
    saved = [leaf for leaf in values if config.bias == "none" or not is_bias(leaf)]
    tables = [leaf for leaf in leaves if adapter.embeddings & {*modules_of(names, leaf)}]
    lora = LoRA(
        rank=config.r,
        alpha=float(config.lora_alpha),
        targets=_any_of(leaves),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        dropout=config.lora_dropout,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        bias="none" if len(saved) == len(values) else config.bias,
        modules_to_save=_any_of(saved) if saved else None,
        embeddings=_any_of(tables),
    )
    return lora, leaves | values


def to_peft(
    lora: LoRA, trained: Matrices, names: Names, *, others: Mapping[str, Any] | None = None
) -> Adapter:
    """What :func:`write_adapter` writes, from the adapters of a tree.

    Args:
      lora: Which they are.
      trained: The adapters: ``lora.init(params, key)``, trained, or ``lora.extract(model)``.
      names: As of :func:`from_peft`.
      others: Other fields of PEFT's config, such as ``base_model_name_or_path``.

    Returns:
      An :class:`Adapter`.

    Raises:
      ValueError: If ``names`` do not fit, or the adapters start on another base than the model that
        PEFT would load (:func:`~optax_lowbit.adapters.mix` makes plain ones of them).

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import adapters, qlora
      >>> lora = adapters.LoRA(rank=8, targets="query")
      >>> trained = lora.init({"query": jnp.ones((64, 32))}, key=0)
      >>> adapter = qlora.to_peft(lora, trained, {"query": "layers.0.q_proj"})
      >>> adapter.config.r, list(adapter.matrices)
      (8, ['layers.0.q_proj'])
    """
    if lora.init_lora_weights not in ("default", "gaussian"):
        raise ValueError(
            f"lora.init_lora_weights={lora.init_lora_weights!r} has changed the base; PEFT would "
            "add these adapters to the model before that"
        )
    values = {leaf: arrays for leaf, arrays in trained.items() if "value" in arrays}
    pairs = {leaf: arrays for leaf, arrays in trained.items() if leaf not in values}
    saved = [leaf for leaf in values if lora.bias == "none" or not is_bias(leaf)]
    ranks, alphas = _patterns_of_modules(lora, pairs, names)
    config = AdapterConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        lora_dropout=lora.dropout,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        bias=lora.bias,
        modules_to_save=_modules(names, saved) or None,
        others=others or {},
    )
    matrices = adapter_matrices(pairs, names)
    tables = [leaf for leaf in pairs if re.search(lora.embeddings, leaf)]
    return Adapter(
        config=config,
        matrices=matrices,
        others=written_values(values, names, lora.kernel_axes, matrices),
        embeddings=frozenset(_modules(names, tables)),
    )


def _patterns_of_leaves(
    config: AdapterConfig, leaves: Matrices, names: Names
) -> tuple[dict[str, int], dict[str, float]]:
    """Ranks and alphas of leaves that differ from the config's."""
    ranks, alphas = {}, {}
    for leaf, arrays in leaves.items():
        scalings = {config.scaling(module) for module in modules_of(names, leaf)}
        if len(scalings) > 1:
            raise ValueError(f"{leaf!r} is a stack, whose scalings differ: {sorted(scalings)}")
        rank = arrays["a"].shape[-2]
        alpha = scalings.pop() * (math.sqrt(rank) if config.use_rslora else rank)
        if rank != config.r:
            ranks[_exactly(leaf)] = rank
        if not math.isclose(alpha, config.lora_alpha):
            alphas[_exactly(leaf)] = alpha
    return ranks, alphas


def _patterns_of_modules(
    lora: LoRA, leaves: Matrices, names: Names
) -> tuple[dict[str, int], dict[str, float]]:
    """Ranks and alphas of modules that differ from the adapters'."""
    ranks, alphas = {}, {}
    for leaf in leaves:
        rank = lora.rank_of(leaf)
        alpha = lora.scale_of(leaf) * (math.sqrt(rank) if lora.use_rslora else rank)
        for module in modules_of(names, leaf):
            if rank != lora.rank:
                ranks[_exactly(module)] = rank
            if not math.isclose(alpha, lora.alpha):
                alphas[_exactly(module)] = alpha
    return ranks, alphas


def _modules(names: Names, leaves: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(x for leaf in leaves for x in modules_of(names, leaf)))


def _any_of(paths: Iterable[str]) -> str:
    return "|".join(map(_exactly, paths)) or _NONE


def _exactly(path: str) -> str:
    return f"^{re.escape(path)}$"
