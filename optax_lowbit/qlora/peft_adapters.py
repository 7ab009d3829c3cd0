"""PEFT's adapters as those of `adapters.LoRA`, and back."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from optax_lowbit.adapters import LoRA
from optax_lowbit.kernels.reference import widened
from optax_lowbit.qlora.peft_config import AdapterConfig
from optax_lowbit.qlora.peft_files import Adapter, Matrices, Names, adapter_leaves, adapter_matrices

# Starts that leave the base as it is.
_PLAIN = (True, False, "gaussian", "orthogonal", "eva")
# It is found nowhere.
_NONE = r"(?!)"


def from_peft(adapter: Adapter, names: Names) -> tuple[LoRA, dict[str, dict[str, jax.Array]]]:
    """The adapters of a tree, and which they are, from PEFT's files.

    Args:
      adapter: What :func:`read_adapter` gave.
      names: Leaf of the tree, such as ``layers/attention/query/kernel``, -> its PyTorch module, or
        the modules of a stack in their order.

    Returns:
      A :class:`~optax_lowbit.adapters.LoRA` and its adapters in float32, for
      ``lora.attach(params, trained)``, ``lora.merge``, or, of a model that ``lora.wrap`` gave,
      ``lora.update(model, trained)``.

    Raises:
      ValueError: If ``names`` do not fit, layers of a stack differ in their scaling, the adapters
        belong to a base that their start has changed, or the file has tensors of other kinds, under
        names of PyTorch's: ``modules_to_save``, biases.

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
    if adapter.others:
        raise ValueError(
            f"adapter.others must be put into the model by the caller, and be empty here: "
            f"{sorted(adapter.others)}"
        )
    config = adapter.config
    if config.init_lora_weights not in _PLAIN:
        raise ValueError(
            f"init_lora_weights must be one of {_PLAIN}, which leave the base alone, got "
            f"{config.init_lora_weights!r}: PEFT converts such adapters to plain ones on saving"
        )
    leaves = jax.tree.map(widened, adapter_leaves(adapter.matrices, names))
    ranks, alphas = {}, {}
    for leaf, arrays in leaves.items():
        scalings = {config.scaling(module) for module in _modules(names, leaf)}
        if len(scalings) > 1:
            raise ValueError(f"{leaf!r} is a stack, whose scalings differ: {sorted(scalings)}")
        rank = arrays["a"].shape[-2]
        alpha = scalings.pop() * (math.sqrt(rank) if config.use_rslora else rank)
        if rank != config.r:
            ranks[_exactly(leaf)] = rank
        if not math.isclose(alpha, config.lora_alpha):
            alphas[_exactly(leaf)] = alpha
    lora = LoRA(
        rank=config.r,
        alpha=float(config.lora_alpha),
        targets="|".join(map(_exactly, leaves)) or _NONE,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        dropout=config.lora_dropout,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    return lora, leaves


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
      ValueError: If ``names`` do not fit, leaves train themselves or are embeddings; or the
        adapters start on another base than the model that PEFT would load
        (:func:`~optax_lowbit.adapters.mix` makes plain ones of them).

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import adapters, qlora
      >>> lora = adapters.LoRA(rank=8, targets="query")
      >>> trained = lora.init({"query": jnp.ones((64, 32))}, key=0)
      >>> adapter = qlora.to_peft(lora, trained, {"query": "layers.0.q_proj"})
      >>> adapter.config.r, list(adapter.matrices)
      (8, ['layers.0.q_proj'])
    """
    whole = sorted(leaf for leaf, arrays in trained.items() if "value" in arrays)
    if whole:
        raise ValueError(f"leaves that train themselves have no place here: {whole}")
    tables = sorted(leaf for leaf in trained if re.search(lora.embeddings, leaf))
    if tables:
        raise ValueError(f"adapters of embeddings are not written: {tables}")
    if lora.init_lora_weights not in ("default", "gaussian"):
        raise ValueError(
            f"lora.init_lora_weights={lora.init_lora_weights!r} has changed the base; PEFT would "
            "add these adapters to the model before that"
        )
    ranks, alphas = {}, {}
    for leaf in trained:
        rank = lora.rank_of(leaf)
        alpha = lora.scale_of(leaf) * (math.sqrt(rank) if lora.use_rslora else rank)
        for module in _modules(names, leaf):
            if rank != lora.rank:
                ranks[_exactly(module)] = rank
            if not math.isclose(alpha, lora.alpha):
                alphas[_exactly(module)] = alpha
    config = AdapterConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        lora_dropout=lora.dropout,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        others=others or {},
    )
    return Adapter(config=config, matrices=adapter_matrices(trained, names))


def _modules(names: Names, leaf: str) -> list[str]:
    modules = names.get(leaf, ())
    return [modules] if isinstance(modules, str) else [*modules]


def _exactly(path: str) -> str:
    return f"^{re.escape(path)}$"
