"""Which leaves are kept in few bits, and how; decided once, on global shapes, at init."""

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.quant import QuantSpec
from optax_lowbit.quant.array import abstract_quantized

# Bytes an element may cost beyond its bits; a layout that needs more is not worth its name.
MAX_OVERHEAD = 1 / 8


@dataclasses.dataclass(frozen=True)
class Factored:
    """In place of a spec: the second moment of a matrix is kept as its row and column means."""


Predicate = Callable[[str, Any], bool]
Rule = tuple[str | Predicate, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Which leaves of the parameters have their state in few bits. Hashable, never callable.

    A leaf's path is its keys joined by ``/``, such as ``layers/0/attention/kernel``. The first rule
    that matches decides; leaves without one get the optimizer's own specs.

    Raises:
      ValueError, TypeError: At construction, if a field is impossible.

    Examples:
      Embeddings with an 8-bit state, norms and biases in float32:

      >>> from optax_lowbit import Policy, QuantSpec, adamw4bit
      >>> eight = QuantSpec(codebook="dynamic_exponent", bits=8, signed=True, scaling="block",
      ...                   block_size=256)
      >>> policy = Policy(rules=[("embed", eight), (r"norm|bias$", None)])
      >>> tx = adamw4bit(1e-3, policy=policy)

    References:
      Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
      2023, Appendix D.1: leaves of 4096 elements or fewer stay in float32.
    """

    # Leaves of this many elements or fewer keep their state in float32.
    min_size: int = 4096
    # (pattern, choice) pairs. A pattern is a regular expression, searched for in the path, or a
    # predicate of (path, leaf). A choice is None (float32); a spec for all of a leaf's moments, of
    # which non-negative ones use the unsigned form; or a dict of these by moment ("mu", "nu",
    # "trace"), the moments it leaves out keeping the optimizer's own.
    rules: tuple[Rule, ...] = ()

    def __post_init__(self):
        if not isinstance(self.min_size, int) or self.min_size < 0:
            raise ValueError(f"min_size must be an int of at least 0, got {self.min_size!r}")
        if isinstance(self.rules, str) or not hasattr(self.rules, "__iter__"):
            raise TypeError(f"rules must be a sequence of (pattern, choice), got {self.rules!r}")
        object.__setattr__(self, "rules", tuple(_checked_rule(rule) for rule in self.rules))

    def choose(
        self,
        moment: str,
        path: str,
        leaf: Any,
        default: QuantSpec | Factored | np.dtype | None,
        nonnegative: bool,
    ) -> tuple[QuantSpec | Factored | np.dtype | None, str]:
        """The spec of one moment of one leaf, or None and why it stays in float32."""
        spec, reason = self._from_rules(moment, path, leaf, default, nonnegative)
        if spec is None:
            return None, reason
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return None, f"dtype {leaf.dtype}"
        size = math.prod(leaf.shape)
        if not size:
            return None, "no elements"
        if size <= self.min_size:
            return None, f"{size} elements, min_size {self.min_size}"
        if isinstance(spec, Factored):
            rows_and_columns = sum(leaf.shape[-2:]) / math.prod(leaf.shape[-2:])
            if rows_and_columns > MAX_OVERHEAD:
                return None, "too few rows or columns for their means to pay"
            return spec, ""
        if isinstance(spec, np.dtype):
            return spec, ""
        if not nonnegative and not spec.signed:
            raise ValueError(
                f"the spec of {moment!r} of {path!r} must be signed, as it has values of both "
                f"signs; got {spec}"
            )
        return _within_overhead(spec, leaf.shape)

    def _from_rules(self, moment, path, leaf, default, nonnegative) -> tuple[Any, str]:
        for index, (pattern, choice) in enumerate(self.rules):
            if not _matches(pattern, path, leaf):
                continue
            if isinstance(choice, tuple):
                by_moment = dict(choice)
                if moment not in by_moment:
                    break
                choice = by_moment[moment]
            elif isinstance(choice, QuantSpec) and nonnegative and _has_unsigned_form(choice):
                choice = dataclasses.replace(choice, signed=False, signed_scale=False)
            return choice, f"rule {index}" if choice is None else ""
        return default, "no spec" if default is None else ""


@dataclasses.dataclass(frozen=True)
class Decision:
    """How one moment of one leaf is stored."""

    path: str
    shape: tuple[int, ...]
    moment: str
    spec: QuantSpec | Factored | np.dtype | None
    dtype: str
    nbytes: int
    # Why it is not quantized, or differs from its spec; empty if neither.
    reason: str


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """Which backend steps a leaf with low-bit moments."""

    path: str
    shape: tuple[int, ...]
    backend: str
    # Why it is the reference; empty where it was asked for, or where it is not.
    reason: str


Record = Decision | KernelChoice

_records: contextvars.ContextVar[list[Record] | None] = contextvars.ContextVar(
    "records", default=None
)


@contextlib.contextmanager
def recorded_decisions() -> Iterator[list[Record]]:
    """Collects the decisions that any transform takes while the context is open."""
    records: list[Record] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def record(decision: Record) -> None:
    """Notes a decision for whoever listens."""
    records = _records.get()
    if records is not None:
        records.append(decision)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as ``a/b/0``, without the field that holds a Flax variable's value."""
    return "/".join(path_names(path))


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a tree path, without the field that holds a Flax variable's value."""
    names = tuple(_key_name(key) for key in path)
    is_field = bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey)
    return names[:-1] if is_field and names[-1] in ("value", "raw_value") else names


def compiled_pattern(name: str, pattern: Any) -> re.Pattern[str]:
    """What an argument means that is searched for in paths; raises if it is no pattern."""
    if not isinstance(pattern, str):
        raise TypeError(f"{name} must be a regular expression, got {pattern!r}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}={pattern!r} is no regular expression: {error}") from error


def _key_name(key: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def _matches(pattern: str | Predicate, path: str, leaf: Any) -> bool:
    return bool(re.search(pattern, path) if isinstance(pattern, str) else pattern(path, leaf))


def _has_unsigned_form(spec: QuantSpec) -> bool:
    """Whether the spec's table is one of a family, and not made for both signs (NF4, a user's)."""
    return spec.signed and spec.codebook not in ("nf4", "fp4") and isinstance(spec.codebook, str)


def _within_overhead(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[QuantSpec | None, str]:
    """The spec, or the nearest layout whose scales cost little enough, or None."""
    if not shape:
        return None, "a scalar"
    if _overhead(spec, shape) < MAX_OVERHEAD:
        return spec, ""
    blocks = dataclasses.replace(spec, scaling="block")
    if _overhead(blocks, shape) < MAX_OVERHEAD:
        return blocks, f"{spec.scaling} scales cost too much for this shape"
    return None, f"last axis of {shape[-1]} is too short for scales to pay"


def _overhead(spec: QuantSpec, shape: tuple[int, ...]) -> float:
    nbytes = abstract_quantized(shape, jnp.dtype(jnp.float32), spec).nbytes
    return nbytes / math.prod(shape) - spec.bits / 8


def _checked_rule(rule: Any) -> Any:
    if not isinstance(rule, tuple | list) or len(rule) != 2:
        raise TypeError(f"each of rules must be a pair (pattern, choice), got {rule!r}")
    pattern, choice = rule
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"rules has {pattern!r}, which is no regular expression: {error}"
            ) from error
    elif not callable(pattern):
        raise TypeError(
            f"a rule's pattern must be a regular expression or a predicate, got {pattern!r}"
        )
    if isinstance(choice, tuple):
        # Sorted items, as they are kept; here again through dataclasses.replace.
        try:
            choice = dict(choice)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"a rule's choice must be a QuantSpec, a dict or None, got {choice!r}"
            ) from error
    if isinstance(choice, Mapping):
        for moment, spec in choice.items():
            _check_spec(f"the rule's {moment!r}", spec)
        choice = tuple(sorted(choice.items()))  # hashable
    else:
        _check_spec("a rule's choice", choice)
    return (pattern, choice)


def _check_spec(name: str, spec: Any) -> None:
    if spec is not None and not isinstance(spec, QuantSpec):
        raise TypeError(f"{name} must be a QuantSpec or None, got {type(spec).__name__}")
