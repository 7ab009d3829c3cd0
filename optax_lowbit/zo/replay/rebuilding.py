"""The optimizer of a run, from what its log says of it."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_lowbit.zo.blocks import BlockwiseOptimizer
from optax_lowbit.zo.estimators import ForwardGradient
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.replay import runs
from optax_lowbit.zo.replay.files import Log

_PACKAGE = __name__.partition(".")[0]


def optimizer_of(log: Log) -> runs.Optimizer:
    """An optimizer whose updates are those of the run; it knows nothing of estimates.

    Only dataclasses of this library are made from what a file says, and nothing else is called.

    Raises:
      ValueError: If the log does not say all of it.
    """
    description = log.run["optimizer"]
    strange = _incomplete("what this release does not know")
    try:
        opt = _rebuilt(description, _chosen(log.run["leaves"]))
    except (ImportError, TypeError) as error:
        raise strange from error
    if runs.described(opt) != description:
        raise strange
    return opt


def _chosen(leaves: Mapping[str, Mapping[str, Any]]) -> dict[type, dict[str, Any]]:
    """The fields of optimizers that a log has in its records and leaves."""
    blocks: dict[int, list[str]] = {}
    for path, leaf in leaves.items():
        if "block" in leaf:
            blocks.setdefault(leaf["block"], []).append(path)
    decaying = [path for path, leaf in leaves.items() if leaf["decays"]]
    return {
        BlockwiseOptimizer: {"blocks": tuple(_among(blocks[i]) for i in sorted(blocks))},
        ZeroOrderOptimizer: {
            # Records have what these made of the loss. Any decay will do that is not 0.
            "learning_rate": 0.0,
            "estimator": ForwardGradient(),
            "weight_decay": float(bool(decaying)),
            "weight_decay_mask": _among(decaying),
            "trainable": _among(path for path, leaf in leaves.items() if leaf["trains"]),
        },
    }


def _among(paths: Iterable[str]) -> Callable[[str, Any], bool]:
    names = frozenset(paths)
    return lambda path, leaf: path in names


def _rebuilt(x: Any, more: Mapping[type, Mapping[str, Any]]) -> Any:
    """The inverse of `described`; ``more`` has fields that it leaves out, by type."""
    rebuilt = functools.partial(_rebuilt, more=more)
    if isinstance(x, list):
        return tuple(map(rebuilt, x))
    if not isinstance(x, dict):
        return x
    if "type" in x:
        kind = _dataclass(x["type"])
        names = {field.name for field in dataclasses.fields(kind) if field.init}
        fields = {name: rebuilt(value) for name, value in x.items() if name in names}
        for base in more:
            if issubclass(kind, base):
                fields.update(more[base])
        return kind(**fields)
    if "array" in x:
        return np.asarray(x["values"], jnp.dtype(x["array"]))
    if "dtype" in x:
        return jnp.dtype(x["dtype"])
    for word in ("function", "class", "partial"):
        if word in x:
            raise _incomplete(f"the {word} {x[word]}")
    if "hyperparams" in x:
        raise _incomplete("hyperparameters in its state")
    return {name: rebuilt(value) for name, value in x.items()}


def _dataclass(name: str) -> type:
    module, _, label = name.rpartition(".")
    if module.partition(".")[0] == _PACKAGE:
        kind = getattr(importlib.import_module(module), label, None)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
    raise _incomplete(name)


def _incomplete(what: str) -> ValueError:
    return ValueError(f"opt must be given: the log says that it has {what}, and no more of that")
