"""The optimizer state of lpmm, torchao and bitsandbytes, as the state of a transform."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import optax

from optax_lowbit.checkpoint import peer_layouts
from optax_lowbit.checkpoint.leaves import Leaf, leaves_of, shape_of, structure_of
from optax_lowbit.checkpoint.states import filled

Source = Literal["lpmm", "torchao", "bitsandbytes"]

_READERS = {
    "lpmm": peer_layouts.read_lpmm,
    "torchao": peer_layouts.read_torchao,
    "bitsandbytes": peer_layouts.read_bitsandbytes,
}
_FIELDS = {"exp_avg": "mu", "exp_avg_sq": "nu", "momentum_buffer": "trace"}
_ENTRY = re.compile(
    r"(?:(?P<parameter>.*)\.)?(?P<entry>step|(?:exp_avg(?:_sq(?:_row|_col)?)?|momentum_buffer)"
    r"(?:_qstate)?|(?:state|absmax|qmap)[12])(?:\.(?P<rest>.+))?"
)


def import_state(
    source: Source,
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    *,
    to: optax.GradientTransformation,
    params: Any,
) -> optax.OptState:
    """The optimizer state of a PyTorch system as the state of a transform, to go on with a run.

    Where both store a moment alike (the same table, and blocks that end with rows) codes and scales
    are taken over bit by bit. Otherwise it is dequantized, to the numbers that the peer computes
    with, and stored as ``to`` does. The step becomes every count.

    Blocks of the peers run over the flattened tensor, so its shape must be that of the parameter.
    The weight of a PyTorch linear layer is the transpose of a Flax kernel: import it with
    ``to=optax.adamw(...)`` for parameters of PyTorch's shapes, transpose, and
    :func:`convert_state`.

    Args:
      source: ``"lpmm"``, ``"torchao"`` or ``"bitsandbytes"``.
      state_dict: For each parameter's path, as :func:`~optax_lowbit.describe` prints it, the dict
        that the peer's ``optimizer.state_dict()["state"]`` has for it, of NumPy arrays: lpmm's
        ``exp_avg``, ``exp_avg_qstate``, ...; torchao's ``exp_avg`` as a float array or a dict of
        ``codes``, ``scale`` and ``qmap``; bitsandbytes' ``state1``, ``absmax1``, ``qmap1``, ... Or
        the same in one flat dict with keys such as ``layers/0/kernel.exp_avg.codes``, or the name
        of a safetensors file of such keys.
      to: The transform to go on with: an Adam or, for a momentum, ``sgd4bit`` and such.
      params: The parameters: ``to.init(params)`` says how the new state is stored, and where.

    Returns:
      The state for ``to``.

    Raises:
      ValueError: If a parameter has no state, a state has no parameter, or another number of
        elements; if the steps of parameters differ; or if moments have no counterpart.
      ImportError: For a file, without safetensors.

    Examples:
      >>> import jax.numpy as jnp, numpy as np, optax_lowbit
      >>> table = optax_lowbit.codebook("dynamic_exponent", 8, True)
      >>> saved = {"w": {"state1": np.full((64, 256), 255, np.uint8), "qmap1": table,
      ...                "absmax1": np.full(64, 2, np.float32)}}
      >>> tx = optax_lowbit.sgd8bit(0.1, momentum=0.9)
      >>> state = optax_lowbit.import_state(
      ...     "bitsandbytes", saved, to=tx, params={"w": jnp.ones((64, 256))})
      >>> float(optax_lowbit.dequantize(state[0].trace["w"])[0, 0])
      2.0
    """
    if source not in _READERS:
        raise ValueError(f"source must be one of {tuple(_READERS)}, got {source!r}")
    fresh = to.init(params)
    treedef, targets = structure_of(fresh), leaves_of(fresh)
    del fresh
    by_parameter = _by_parameter(state_dict)
    return filled(
        treedef, targets, [*_steps(by_parameter), *_moments(source, by_parameter, targets)]
    )


def _by_parameter(state_dict: Any) -> Mapping[str, Mapping[str, Any]]:
    if isinstance(state_dict, str | os.PathLike):
        from safetensors.numpy import load_file

        state_dict = load_file(state_dict)
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict must be a dict or a file name, got {type(state_dict).__name__}"
        )
    if all(isinstance(entries, Mapping) for entries in state_dict.values()):
        return state_dict
    nested: dict[str, Any] = {}
    for key, array in state_dict.items():
        match = _ENTRY.fullmatch(str(key))
        if not match:
            raise ValueError(f"state_dict has {key!r}, which ends with no entry of an optimizer")
        names = [match["entry"], *(match["rest"] or "").split(".")]
        *parents, last = [match["parameter"] or "", *filter(None, names)]
        folder = nested
        for parent in parents:
            folder = folder.setdefault(parent, {})
        folder[last] = array
    return nested


def _steps(by_parameter: Mapping[str, Mapping[str, Any]]) -> list[Leaf]:
    steps = set()
    for parameter, entries in by_parameter.items():
        step = np.asarray(entries.get("step", 0))
        if step.size != 1:
            raise ValueError(f"the step of {parameter!r} must be one number, got {step}")
        if "step" in entries:
            steps.add(int(step.item()))
    if len(steps) > 1:
        raise ValueError(f"the parameters are at different steps: {sorted(steps)}")
    return [Leaf(("step",), "", "count", "", np.int32(step)) for step in steps]


def _moments(
    source: Source, by_parameter: Mapping[str, Mapping[str, Any]], targets: list[Leaf]
) -> Iterator[Leaf]:
    wanted = {}
    for target in targets:
        if not (target.is_count or target.is_hyperparameter):
            wanted.setdefault(target.parameter, []).append(target)
    for parameter, entries in by_parameter.items():
        if parameter not in wanted:
            raise ValueError(
                f"state_dict has {parameter!r}, and the parameters with a state are "
                f"{sorted(wanted)}"
            )
        fields = [target.field for target in wanted[parameter]]
        shape = shape_of(wanted[parameter][0].value)
        try:
            moments = _READERS[source](entries, shape)
        except KeyError as error:
            raise ValueError(f"{source} state of {parameter!r} lacks {error}") from error
        except ValueError as error:
            raise ValueError(f"{source} state of {parameter!r}: {error}") from error
        for name, value in moments.items():
            field = _field(name, moments, fields)
            yield Leaf((f"{parameter}.{name}",), "", field, parameter, value)


def _field(name: str, moments: Mapping[str, Any], fields: list[str]) -> str:
    """The field of an optax state that a moment of a peer belongs to."""
    if name == "state1" and "state2" not in moments and len(fields) == 1:
        return fields[0]  # bitsandbytes does not tell of which kind it is
    return {**_FIELDS, "state1": "mu", "state2": "nu"}.get(name, name)
