"""Which leaves are quantized and why not, and what `describe` says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowbit
from optax_lowbit import FactoredMoment, Policy, QuantSpec, describe, is_quantized

EIGHT = QuantSpec(codebook="dynamic_exponent", bits=8, signed=True, scaling="block", block_size=256)
UNSIGNED = QuantSpec(codebook="linear", bits=4, signed=False, scaling="block")
PARAMS = {
    "embed": jnp.ones((128, 256)),
    "layers": [{"kernel": jnp.ones((64, 256)), "norm": jnp.ones(5000)}, {"bias": jnp.ones(256)}],
    "scalar": jnp.ones(()),
    "nothing": None,
}


def stored(tx, moment="mu"):
    """Bits of each moment by path; None where it is a plain array."""
    decisions = describe(tx, PARAMS).decisions
    return {
        d.path: d.spec.bits if isinstance(d.spec, QuantSpec) else d.spec
        for d in decisions
        if d.moment == moment
    }


def test_default_policy_leaves_4096_elements_or_fewer_in_float32():
    assert stored(optax_lowbit.adamw4bit(1e-3)) == {
        "embed": 4,
        "layers/0/kernel": 4,
        "layers/0/norm": 4,
        "layers/1/bias": None,
        "scalar": None,
    }
    sizes = {"small": jnp.ones(4096), "large": jnp.ones(4097)}
    state = optax_lowbit.scale_by_adam4bit().init(sizes)
    assert not is_quantized(state.mu["small"]) and is_quantized(state.mu["large"])


def test_rules_by_pattern_predicate_and_moment():
    policy = Policy(
        rules=[
            ("norm", None),
            (lambda path, leaf: leaf.size == 128 * 256, {"mu": EIGHT, "nu": None}),
            ("kernel", EIGHT),
        ]
    )
    tx = optax_lowbit.adamw4bit(1e-3, policy=policy)
    assert stored(tx) == {
        "embed": 8, "layers/0/kernel": 8, "layers/0/norm": None, "layers/1/bias": None,
        "scalar": None,
    }  # fmt: skip
    assert stored(tx, "nu")["embed"] is None
    nu = tx.init(PARAMS)[0].nu["layers"][0]["kernel"]
    assert nu.spec.signed is False, "non-negative moments use the unsigned form of a rule's spec"


def test_moments_that_a_rule_leaves_out_keep_their_own_spec():
    policy = Policy(rules=[("embed", {"mu": EIGHT})])
    tx = optax_lowbit.adamw4bit(1e-3, policy=policy)
    assert (stored(tx)["embed"], stored(tx, "nu")["embed"]) == (8, 4)


def test_factored_leaves_and_rules():
    state = optax_lowbit.scale_by_factor4bit().init(PARAMS)
    assert isinstance(state.nu["embed"], FactoredMoment)
    assert is_quantized(state.nu["layers"][0]["norm"])
    assert state.nu["layers"][1]["bias"].dtype == jnp.float32
    tx = optax_lowbit.scale_by_factor4bit(policy=Policy(rules=[("embed", {"nu": None})]))
    assert tx.init(PARAMS).nu["embed"].shape == (128, 256)


@pytest.mark.parametrize(
    ("shape", "scaling"),
    [((4, 4096), "block"), ((4096, 16), None), ((40, 104), "block"), ((1024, 1024), "rank1")],
    ids=str,
)
def test_no_layout_costs_more_than_an_eighth_of_a_byte_beyond_its_bits(shape, scaling):
    decisions = describe(
        optax_lowbit.scale_by_adam4bit(), jax.ShapeDtypeStruct(shape, jnp.float32)
    ).decisions
    nu = next(d for d in decisions if d.moment == "nu")
    assert (nu.spec.scaling if nu.spec else None) == scaling
    if nu.spec:
        assert nu.nbytes / np.prod(shape) < nu.spec.bits / 8 + 1 / 8
    if scaling != "rank1":
        assert nu.reason


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.MultiSteps(tx, 4).gradient_transformation(),
        lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        lambda tx: optax.apply_if_finite(tx, 3),
    ],
    ids=["chain", "MultiSteps", "masked", "apply_if_finite"],
)
def test_describe_sees_through_wrappers(wrap):
    plain = describe(optax_lowbit.adamw4bit(1e-3), PARAMS)
    wrapped = describe(wrap(optax_lowbit.adamw4bit(1e-3)), PARAMS)
    assert set(wrapped.decisions) <= set(plain.decisions) and wrapped.decisions
    state = jax.eval_shape(wrap(optax_lowbit.adamw4bit(1e-3)).init, PARAMS)
    assert wrapped.nbytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_description_prints_a_line_a_leaf_and_the_reasons():
    lines = str(describe(optax_lowbit.adamw4bit(1e-3), PARAMS)).splitlines()
    assert len(lines) == 1 + 5 + 1
    assert "256 elements, min_size 4096" in next(x for x in lines if "layers/1/bias" in x)
    assert lines[-1].startswith("total: 54,409 parameters")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Policy(min_size=-1), ValueError, "min_size must be an int of at least 0, got -1"),
        (lambda: Policy(rules=[("[", None)]), ValueError, "no regular expression"),
        (lambda: Policy(rules=[("a",)]), TypeError, "must be a pair"),
        (lambda: Policy(rules=[(3, None)]), TypeError, "regular expression or a predicate"),
        (lambda: Policy(rules=[("a", 4)]), TypeError, "QuantSpec or None, got int"),
        (lambda: Policy(rules="ab"), TypeError, "sequence of"),
        (lambda: Policy(rules=[("a", ("mu",))]), TypeError, "a dict or None|QuantSpec or None"),
        (
            lambda: optax_lowbit.adamw4bit(1e-3, policy=Policy(rules=[("a", {"vu": None})])),
            ValueError,
            "name the moments",
        ),
        (lambda: optax_lowbit.adamw4bit(1e-3, key="a"), TypeError, "key must be"),
        (
            lambda: optax_lowbit.sgd4bit(1, 0.9, trace_spec=UNSIGNED),
            ValueError,
            "trace_spec must be signed",
        ),
        (
            lambda: optax_lowbit.adamw4bit(1e-3, policy=Policy(rules=[("embed", UNSIGNED)])).init(
                PARAMS
            ),
            ValueError,
            "'mu' of 'embed' must be signed",
        ),
        (lambda: optax_lowbit.adamw4bit(1e-3, policy=4096), TypeError, "policy must be a Policy"),
        (lambda: optax_lowbit.adamw4bit(1e-3, mu_spec=4), TypeError, "mu_spec must be a QuantSpec"),
        (lambda: optax_lowbit.sgd4bit(1, 0.9, trace_spec=4), TypeError, "trace_spec must be"),
        (
            lambda: optax_lowbit.adamw4bit(
                1e-3, nu_spec=QuantSpec(
                    codebook="linear", bits=4, signed=False, scaling="block", rounding="stochastic"
                )
            ),
            ValueError,
            "key must be given",
        ),
    ],
)  # fmt: skip
def test_impossible_arguments_are_refused_at_construction(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_scalar_stays_in_float32_whatever_the_least_size():
    tx = optax_lowbit.adamw4bit(1e-3, policy=optax_lowbit.Policy(min_size=0))
    params = {"scale": jnp.float32(1), "w": jnp.ones((64, 256))}
    assert tx.init(params)[0].mu["scale"].dtype == jnp.float32
    assert "a scalar" in str(optax_lowbit.describe(tx, params))


@pytest.mark.parametrize("min_size", [0, 4096])
def test_an_empty_leaf_is_said_to_be_empty(min_size):
    tx = optax_lowbit.adamw4bit(1e-3, policy=Policy(min_size=min_size))
    decisions = describe(tx, {"empty": jnp.zeros((0, 256))}).decisions
    assert [decision.reason for decision in decisions] == ["no elements"] * 2
