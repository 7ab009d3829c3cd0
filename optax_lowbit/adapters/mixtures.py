"""Several adapters of one model at once, with weights that may change at run time."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from optax_lowbit.adapters.merging import Adapters


def mix(adapters: Mapping[str, Adapters], weights: Mapping[str, jax.Array | float]) -> Adapters:
    r"""Adapters that add up to a weighted sum of what several add.

    .. math::
      W + \sum_k w_k\, \frac{\alpha}{r} A_k^T B_k

    The result goes wherever the adapters of one go: :meth:`LoRA.attach`, :meth:`LoRA.merge`,
    :meth:`LoRA.update`. Weights of one and zeros choose one, zeros alone none; they are arrays, so
    that a program compiled with them serves all choices. Where only one is ever used at a time, no
    mixture is needed: adapters are an argument, and those of another task have the same shapes.

    **Memory and time.** Those of adapters with the ranks of all of them together.

    Args:
      adapters: By name, trees of one :class:`LoRA`; not all need to have the same leaves.
      weights: By name, numbers. A name that is missing has weight zero.

    Returns:
      A tree for that :class:`LoRA`.

    Raises:
      ValueError: If there are no adapters, a weight has none, their shapes differ, or they have
        DoRA's magnitudes, of which there is no sum.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import adapters
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> lora = adapters.LoRA(rank=4, targets="kernel")
      >>> tasks = {"french": lora.init(params, key=0), "german": lora.init(params, key=1)}
      >>> @jax.jit
      ... def model(weights, x):
      ...     return x @ lora.attach(params, adapters.mix(tasks, weights))["kernel"]
      >>> model({"french": 1.0, "german": 0.0}, jnp.ones((2, 64))).shape
      (2, 32)

    References:
      The "cat" combination of `add_weighted_adapter` in PEFT.
    """
    if not adapters:
        raise ValueError("adapters must have at least one tree, got none")
    unknown = sorted(set(weights) - set(adapters))
    if unknown:
        raise ValueError(f"weights must be of adapters {sorted(adapters)}, got {unknown}")
    mixed = {}
    for path in dict.fromkeys(path for tree in adapters.values() for path in tree):
        names = [name for name, tree in adapters.items() if path in tree]
        entries = [adapters[name][path] for name in names]
        _check_alike(path, names, entries)
        row = jnp.stack([jnp.asarray(weights.get(name, 0.0), jnp.float32) for name in names])
        mixed[path] = _mixed(entries, row)
    return mixed


def _mixed(entries, weights):
    if "value" in entries[0]:
        return {"value": jnp.stack([entry["value"] for entry in entries]), "weights": weights}
    a, b = (jnp.stack([entry[side] for entry in entries], axis=-3) for side in "ab")
    return {"a": a, "b": b, "weights": jnp.broadcast_to(weights, a.shape[:-2])}


def _check_alike(path, names, entries):
    shapes = [{name: jnp.shape(x) for name, x in entry.items()} for entry in entries]
    if any(other != shapes[0] for other in shapes):
        raise ValueError(
            f"adapters must be of one LoRA, and at {path!r} shapes are "
            f"{dict(zip(names, shapes, strict=True))}"
        )
    if not shapes[0].keys() <= {"a", "b", "value"}:
        raise ValueError(f"adapters at {path!r} have {sorted(shapes[0])}, of which there is no sum")
