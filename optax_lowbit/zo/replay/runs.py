"""What a log says of its run: enough to refuse a replay that would give something else."""

import dataclasses
import functools
import importlib.metadata
import struct
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.kernels.checksums import checksum
from optax_lowbit.moments.policy import path_name
from optax_lowbit.zo.blocks import BlockwiseOptimizer
from optax_lowbit.zo.hyperparameters import InjectedOptimizer, InjectedState
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.replay.files import VERSION, Log
from optax_lowbit.zo.state import ZeroOrderState

# Optimizers whose steps follow from their records.
Optimizer = ZeroOrderOptimizer | BlockwiseOptimizer | InjectedOptimizer
State = ZeroOrderState | InjectedState

# What the numbers of a record already have in them; and what the facts of each leaf say.
_IN_RECORDS = frozenset(
    {"clip", "eps", "estimator", "learning_rate", "probe_axis", "probe_batch", "simultaneous"}
)
_IN_LEAVES = frozenset({"blocks", "trainable", "weight_decay", "weight_decay_mask"})


def facts(opt: Optimizer, params: Any, state: State) -> dict[str, Any]:
    """The run that ``opt`` begins with these parameters and state, or is in the middle of."""
    return {
        "version": VERSION,
        "library": importlib.metadata.version("optax-lowbit"),
        "prng": "threefry2x32",
        "key": [int(word) for word in np.asarray(state.key)],
        "optimizer": described(opt),
        "leaves": _leaves(opt, params),
        "settings": opt.num_settings(params),
    }


def plain(opt: Any) -> ZeroOrderOptimizer:
    """The optimizer, without what is around it.

    Raises:
      TypeError: If it is none whose runs can be logged.
    """
    found = _first(opt)
    found = found.opt if isinstance(found, BlockwiseOptimizer) else found
    if not isinstance(found, ZeroOrderOptimizer):
        raise TypeError(
            "opt must be a ZeroOrderOptimizer, such as zo_sgd gives, alone or in blockwise or "
            f"inject_hyperparams: steps of others do not follow from records; got "
            f"{type(found).__name__}"
        )
    return found


def _first(opt: Any) -> Any:
    return opt.first if isinstance(opt, InjectedOptimizer) else opt


def _leaves(opt: Optimizer, params: Any) -> dict[str, Any]:
    pairs = _named(params)
    inner, outer = plain(opt), _first(opt)
    trained = inner.split(params).paths
    numbers = outer.numbers(params) if isinstance(outer, BlockwiseOptimizer) else ()
    blocks = {path: {"block": number} for path, number in zip(trained, numbers)}
    # All are computed before the first is waited for.
    sums = jax.device_get([checksum(leaf) for _, leaf in pairs])
    return {
        path: {
            **_form(leaf),
            "trains": path in trained,
            "decays": path in trained and inner.decays(path, leaf),
            "checksum": int(total),
            **blocks.get(path, {}),
        }
        for (path, leaf), total in zip(pairs, sums, strict=True)
    }


def _named(params: Any) -> list[tuple[str, jax.Array]]:
    return [
        (path_name(path), jnp.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]


def _form(leaf: jax.Array) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def digest(opt: Optimizer, params: Any) -> int:
    """A checksum of all leaves that train: the same on every mesh."""
    sums = jax.device_get([checksum(leaf) for leaf in plain(opt).split(params).leaves])
    return zlib.crc32(struct.pack(f"<{len(sums)}I", *map(int, sums)))


def check_leaves(log: Log, params: Any) -> None:
    """Raises unless a log is of leaves with these paths, shapes and dtypes: before all the rest.

    Raises:
      ValueError: Names all that differs.
    """
    ours = {path: _form(leaf) for path, leaf in _named(params)}
    theirs = {
        path: {name: leaf[name] for name in ("shape", "dtype")}
        for path, leaf in log.run["leaves"].items()
    }
    _refuse(_differences("leaves", theirs, ours))


def check_same(log: Log, run: dict[str, Any], *, is_base: bool) -> None:
    """Raises unless a log is of the run.

    Args:
      log: The log.
      run: From :func:`facts`.
      is_base: Whether the parameters are those that the run began with.

    Raises:
      ValueError: Names all that differs.
    """

    def compared(run):
        leaves = run["leaves"]
        if not is_base:
            leaves = {
                path: {name: x for name, x in leaf.items() if name != "checksum"}
                for path, leaf in leaves.items()
            }
        return {**{name: run[name] for name in ("prng", "key", "optimizer")}, "leaves": leaves}

    _refuse(_differences("", compared(log.run), compared(run)))


def _refuse(differences: Iterator[str]) -> None:
    found = list(differences)
    if found:
        shown = [*found[:8], *([f"and {len(found) - 8} more"] if len(found) > 8 else [])]
        raise ValueError("the log is of another run: " + "; ".join(shown))


def _differences(name: str, theirs: Any, ours: Any) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in {**theirs, **ours}:
            place = f"{name}.{key}" if name else str(key)
            if key not in ours or key not in theirs:
                yield f"{place} is only {'in the log' if key in theirs else 'here'}"
            else:
                yield from _differences(place, theirs[key], ours[key])
    elif theirs != ours:
        yield f"{name} is {theirs!r} in the log and {ours!r} here"


def described(x: Any) -> Any:
    """What a replay depends on, in the types of JSON, so that equal ones are equal.

    A dataclass is its type and its fields; a function its name and what it closes over.
    """
    if isinstance(x, InjectedOptimizer):
        return {"hyperparams": list(x.hyperparams), "first": described(x.first)}
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        names = [field.name for field in dataclasses.fields(x)]
        if isinstance(x, ZeroOrderOptimizer | BlockwiseOptimizer):
            names = [name for name in names if name not in _IN_RECORDS | _IN_LEAVES]
        return {"type": _name(type(x)), **{name: described(getattr(x, name)) for name in names}}
    if isinstance(x, functools.partial):
        return {"partial": described(x.func), "args": described([*x.args, x.keywords])}
    if isinstance(x, types.FunctionType):
        cells = zip(x.__code__.co_freevars, x.__closure__ or ())
        return {
            "function": _name(x),
            **{name: described(cell.cell_contents) for name, cell in cells},
        }
    if isinstance(x, Mapping):
        return {str(key): described(value) for key, value in x.items()}
    if isinstance(x, tuple | list):
        return [described(value) for value in x]
    if isinstance(x, set | frozenset):
        return sorted(map(str, x))
    if isinstance(x, np.ndarray | np.generic | jax.Array):
        return {"array": str(x.dtype), "values": np.asarray(x).tolist()}
    if isinstance(x, np.dtype):
        return {"dtype": str(x)}
    return {"class": _name(x if isinstance(x, type) else type(x))}


def _name(x: Any) -> str:
    return f"{x.__module__}.{x.__qualname__}"
