"""Lets `flax.serialization` (msgpack) write and read low-bit arrays, if the user has Flax."""

import dataclasses
import sys
from typing import Any


def ensure_registered(*node_types: type) -> None:
    """Registers dataclass pytree nodes with `flax.serialization`, once it has been imported.

    Called when a state is made, so that Flax may be imported before or after this package and is
    never imported by it.
    """
    serialization = sys.modules.get("flax.serialization")
    if serialization is None:
        return
    for node_type in node_types:
        if not serialization.is_serializable(node_type):
            serialization.register_serialization_state(node_type, _to_dict, _from_dict)


def _array_fields(node: Any) -> list[str]:
    return [
        field.name for field in dataclasses.fields(node) if not field.metadata.get("static", False)
    ]


def _to_dict(node: Any) -> dict[str, Any]:
    to_state_dict = sys.modules["flax.serialization"].to_state_dict
    return {name: to_state_dict(getattr(node, name)) for name in _array_fields(node)}


def _from_dict(target: Any, state: dict[str, Any]) -> Any:
    names = _array_fields(target)
    if set(state) != set(names):
        raise ValueError(
            f"the state of a {type(target).__name__} must have the entries {names}, "
            f"got {sorted(state)}"
        )
    from_state_dict = sys.modules["flax.serialization"].from_state_dict
    return dataclasses.replace(
        target, **{name: from_state_dict(getattr(target, name), state[name]) for name in names}
    )
