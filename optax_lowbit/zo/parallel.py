"""Probes of one step on several devices: each evaluates its own, and only numbers are exchanged."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Optimizer = TypeVar("Optimizer", bound=Any)


def probe_parallel(opt: Optimizer, axis_name: str) -> Optimizer:
    """The optimizer, each device along a mesh axis evaluating its share of the probes.

    For steps inside `jax.shard_map`. The devices exchange ``num_probes`` coefficients and the loss,
    and all make the same update from them, which is that of one device with as many probes. Other
    axes may divide the batch: take the mean of the loss over these with `jax.lax.pmean`.

    **Memory.** On each device what a step needs with its share of the probes.

    Args:
      opt: An optimizer whose probes are estimated one by one, so neither :func:`fzoo` nor
        :func:`hizoo`; the number of devices divides its ``num_probes``.
      axis_name: The mesh axis.

    Returns:
      An optimizer with the same state. A log of the one is a log of the other.

    Raises:
      TypeError: If ``opt`` is no :class:`ZeroOrderOptimizer`.
      ValueError: If its probes are estimated together.

    Examples:
      Probes over one axis, examples over another:

      >>> import functools, jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from optax_lowbit import zo
      >>> mesh = jax.make_mesh((1, 1), ("probe", "data"))
      >>> opt = zo.probe_parallel(zo.zo_sgd(1e-2, num_probes=4), "probe")
      >>> def loss_fn(params, batch):
      ...     return jax.lax.pmean(jnp.mean((batch @ params["w"]) ** 2), "data")
      >>> step = jax.jit(jax.shard_map(
      ...     functools.partial(opt.step, loss_fn), mesh=mesh,
      ...     in_specs=(P(), P(), P("data")), out_specs=P()))
      >>> params = {"w": jnp.ones((3, 2))}
      >>> batch = jnp.ones((8, 3), device=NamedSharding(mesh, P("data")))
      >>> params, state, info = step(params, opt.init(params, key=0), batch)
      >>> info.coefficients.shape
      (4,)
    """
    if not hasattr(opt, "probe_axis"):
        raise TypeError(f"opt must be a ZeroOrderOptimizer, got {type(opt).__name__}")
    return dataclasses.replace(opt, probe_axis=axis_name)


def spread_probes(
    measured: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    keys: jax.Array,
    axis: str | None,
) -> tuple[jax.Array, jax.Array]:
    """The loss and all coefficients, of which each device along an axis evaluates its share.

    Args:
      measured: The loss and the coefficients of some probes, from their keys.
      keys: uint32 ``(probes, leaves, 2)``.
      axis: A mesh axis of the `jax.shard_map` around; None: all probes are evaluated here.

    Raises:
      ValueError: If the axis does not divide the number of probes.
    """
    if axis is None:
        return measured(keys)
    devices = jax.lax.axis_size(axis)
    if len(keys) % devices:
        raise ValueError(
            f"num_probes must be a multiple of {devices}, the devices along probe_axis={axis!r}, "
            f"got {len(keys)}"
        )
    share = len(keys) // devices
    first = jax.lax.axis_index(axis) * share
    loss, own = measured(jax.lax.dynamic_slice_in_dim(keys, first, share))
    # A sum, unlike what is gathered, is known to be the same everywhere.
    mine = jnp.zeros(len(keys), own.dtype)
    everyone = jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(mine, own, first, 0), axis)
    return jax.lax.pmean(loss, axis), everyone
