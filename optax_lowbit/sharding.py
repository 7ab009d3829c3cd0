"""Where an optimizer's state lies on a mesh of devices: beside its parameters, shard by shard."""

import warnings
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optax_lowbit.moments.flax_variables import is_variable, unwrapped
from optax_lowbit.moments.placement import divisible, misalignment
from optax_lowbit.moments.policy import path_name
from optax_lowbit.optimizers.ownership import is_state_leaf, owners
from optax_lowbit.optimizers.state_layout import array_shardings
from optax_lowbit.quant import is_quantized


def state_shardings(
    tx: optax.GradientTransformation,
    params: optax.Params,
    param_shardings: Any = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> Any:
    """The sharding of every array of ``tx.init(params)``, for `jax.jit`, `jax.device_put` or Orbax.

    An array of the state lies as its parameter does. Axis by axis, it is spread over the mesh axes
    of the parameter's axis that it belongs to, if these divide it:

    - codes, scales and moments, and whatever else has the parameter's rank: the same axis, where
      the sizes agree (for codes and block scales, those of the array that they stand for);
    - what has more axes, such as a history: the last ones, after axes that are not spread;
    - what has fewer, such as Adafactor's ``v_row``: axes of the same sizes in the same order. Where
      that leaves a choice, as for a square matrix, arrays of one size take their turns.

    All else is on every device: counters, hyperparameters, keys, what belongs to no parameter.

    Nothing is computed and no array is made. The cost is one trace of ``tx.init``.

    Args:
      tx: Any optax transform, of this library or not; wrapped, chained, masked, partitioned.
      params: The parameters, arrays or `jax.ShapeDtypeStruct`.
      param_shardings: A `jax.sharding.NamedSharding` or `jax.sharding.PartitionSpec` for each
        parameter, in a tree like ``params`` or a prefix of it; None: the parameters' own.
      mesh: The mesh of partition specs, and of a state without parameters.

    Returns:
      A tree like ``tx.init(params)`` of `jax.sharding.NamedSharding`.

    Raises:
      ValueError: If a parameter has no sharding, a sharding does not fit its parameter, or ``mesh``
        is missing; or, on an Explicit mesh, if shards are not aligned: see
        :func:`check_alignment`.
      TypeError: If ``param_shardings`` has other leaves.

    Warns:
      UserWarning: If shards on an Auto mesh are not aligned. Updates are right, but exchange what
        they need of the gradient and the codes in every step.

    Examples:
      A state that is sharded from the start:

      >>> import jax, jax.numpy as jnp, optax_lowbit
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> params = {"w": jnp.ones((512, 1024), device=NamedSharding(mesh, P("data")))}
      >>> tx = optax_lowbit.adamw4bit(1e-3)
      >>> shardings = optax_lowbit.state_shardings(tx, params)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> shardings[0].mu["w"].codes.spec, state[0].mu["w"].codes.sharding.spec
      (P('data',), P('data',))

    .. seealso:: :func:`check_alignment`
    """
    placed = _placed(params, param_shardings, mesh)
    state = _abstract_state(tx, params)
    leaves = jax.tree.leaves(state, is_leaf=is_state_leaf)
    _complain(_misaligned(leaves, owners(state, params), placed))
    rest = _replicated(placed, mesh) if leaves else None
    shardings = array_shardings(state, params, [param.sharding for param in placed], rest)
    return jax.tree.unflatten(jax.tree.structure(state), shardings)


def check_alignment(
    tx: optax.GradientTransformation,
    params: optax.Params,
    param_shardings: Any = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> None:
    """Raises if a step of ``tx`` would have to exchange codes between devices.

    Codes are packed, and have scales, in groups along the last axis: 128 elements by default. Where
    the last axis is sharded, each shard must hold whole groups. Other axes can be sharded anyhow,
    but for the last but one under ``double_quant``, whose scales have groups of 256 rows.

    Args:
      tx: Any optax transform.
      params, param_shardings, mesh: As in :func:`state_shardings`.

    Returns:
      None, if all is aligned.

    Raises:
      ValueError: If there is such a parameter: for each one its path, the length of the axis, how
        many ways it is sharded, and of what the length should be a multiple. And, as
        :func:`state_shardings` does, if the arguments do not fit together.
      TypeError: If ``param_shardings`` has leaves of other types.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_lowbit
      >>> from jax.sharding import AbstractMesh, PartitionSpec as P
      >>> mesh = AbstractMesh((8,), ("model",))
      >>> params = {"w": jnp.ones((576, 1536))}
      >>> tx = optax_lowbit.adamw4bit(1e-3)
      >>> optax_lowbit.check_alignment(tx, params, P("model"), mesh=mesh)
      >>> try:
      ...     optax_lowbit.check_alignment(tx, params, P(None, "model"), mesh=mesh)
      ... except ValueError as error:
      ...     print(error)
      the last axis of parameter 'w', of 1536 elements, is sharded 8 ways over 'model', so it must
      be a multiple of 8 x 128 for its state to be kept in groups of 128; shard another axis, or
      give this parameter a smaller block_size or None in policy.rules
    """
    placed = _placed(params, param_shardings, mesh)
    state = _abstract_state(tx, params)
    leaves = jax.tree.leaves(state, is_leaf=is_state_leaf)
    messages = _misaligned(leaves, owners(state, params), placed)
    if messages:
        raise ValueError("\n".join(messages))


class _Placed(NamedTuple):
    """A parameter, as far as its state is concerned."""

    path: str
    shape: tuple[int, ...]
    sharding: NamedSharding


def _placed(params: Any, param_shardings: Any, mesh: Any) -> list[_Placed]:
    """The parameters with their shardings, checked."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable)
    values = [(path_name(path), unwrapped(leaf)) for path, leaf in leaves]
    if param_shardings is None:
        shardings = [getattr(value, "sharding", None) for _, value in values]
        hint = "place it with jax.device_put, or give param_shardings"
    else:
        shardings = _broadcast(param_shardings, params)
        hint = "param_shardings must be NamedSharding, or PartitionSpec and mesh="
    placed = []
    for (path, value), sharding in zip(values, shardings):
        if isinstance(sharding, PartitionSpec):
            if mesh is None:
                raise ValueError(
                    "mesh must be given with partition specs in param_shardings, got None"
                )
            sharding = NamedSharding(mesh, sharding)
        if not isinstance(sharding, NamedSharding):
            error = ValueError if param_shardings is None else TypeError
            raise error(f"parameter {path!r} has no NamedSharding but {sharding!r}: {hint}")
        if not _fits(sharding, value.shape):
            raise ValueError(
                f"parameter {path!r} of shape {value.shape} cannot be sharded by {sharding.spec} "
                f"over {dict(sharding.mesh.shape)}"
            )
        placed.append(_Placed(path, tuple(value.shape), sharding))
    return placed


def _fits(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    return len(sharding.spec) <= len(shape) and divisible(sharding, shape).is_equivalent_to(
        sharding, len(shape)
    )


def _broadcast(param_shardings: Any, params: Any) -> list[Any]:
    """What ``param_shardings``, like ``params`` or a prefix of it, has for each parameter."""

    def is_sharding(x):
        return isinstance(x, jax.sharding.Sharding | PartitionSpec)

    prefix = jax.tree.map(unwrapped, param_shardings, is_leaf=is_variable)
    full = jax.tree.map(lambda _: 0, params, is_leaf=is_variable)
    try:
        return jax.tree.leaves(jax.tree.broadcast(prefix, full, is_leaf=is_sharding))
    except ValueError as error:
        raise ValueError(
            "param_shardings must have the structure of params or a prefix of it, got "
            f"{jax.tree.structure(prefix)} for {jax.tree.structure(full)}"
        ) from error


def _abstract_state(tx: optax.GradientTransformation, params: Any) -> Any:
    """What ``tx.init`` gives, as shapes and dtypes."""
    # Of types without shardings, by which init would complain of one parameter at a time.
    plain = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x, params
    )
    return jax.eval_shape(tx.init, plain)


def _misaligned(leaves: list[Any], owner_of: list[int | None], placed: list[_Placed]) -> dict:
    """A message, and the mesh, for each parameter whose shards do not hold whole groups."""
    messages = {}
    for leaf, owner in zip(leaves, owner_of):
        if owner is None or not is_quantized(leaf) or leaf.shape != placed[owner].shape:
            continue
        if message := misalignment(*placed[owner], leaf.spec):
            messages[message] = placed[owner].sharding.mesh
    return messages


def _complain(messages: dict) -> None:
    if not messages:
        return
    text = "\n".join(messages)
    if any(AxisType.Explicit in mesh.axis_types for mesh in messages.values()):
        raise ValueError(text)
    warnings.warn(f"every step will exchange codes: {text}", UserWarning, stacklevel=3)


def _replicated(placed: list[_Placed], mesh: Any) -> NamedSharding:
    """For what belongs to no parameter."""
    if placed:
        mesh = placed[0].sharding.mesh
    if mesh is None:
        raise ValueError("mesh must be given where there are no parameters, got None")
    return NamedSharding(mesh, PartitionSpec())
