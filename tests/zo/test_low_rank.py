"""Matmuls with low-rank perturbations that are never formed, and momentum in their factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from optax_lowbit import zo
from optax_lowbit.zo.directions import outer, probe_keys, split
from optax_lowbit.zo.late_perturbation import call_perturbed
from optax_lowbit.zo.noise import Factors
from optax_lowbit.zo.rows import whole
from tests.zo.cases import moved_by

KEYS = jax.random.split(jax.random.key(3), 8)
X, HEADS = jax.random.normal(KEYS[0], (2, 5, 6)), jax.random.normal(KEYS[1], (5, 3, 4))

# The shape of a leaf, and a program whose matmul with it must not need it perturbed.
PRODUCTS = {
    "kernel": ((6, 7), lambda w: X @ w),
    "kernel first": ((7, 6), lambda w: jnp.einsum("mk,btk->mbt", w, X)),
    "tied": ((11, 6), lambda w: X @ w.T),
    "into heads": ((6, 3, 4), lambda w: jnp.einsum("btd,dhk->bthk", X, w)),
    "out of heads": ((3, 4, 6), lambda w: jnp.einsum("thk,hkd->td", HEADS, w)),
    "of each head": ((3, 4, 6), lambda w: jnp.einsum("thk,hkd->thd", HEADS, w)),
    "half": ((6, 7), lambda w: X.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)),
    "layers": ((3, 6, 6), lambda w: jax.lax.scan(lambda x, v: (jnp.tanh(x @ v), 0), X, w)[0]),
}
# Others must: a reshaped leaf, one whose columns go with those of the other operand, a sum.
OTHERS = {
    "reshaped": ((2, 3, 7), lambda w: X @ w.reshape(6, 7)),
    "columns in a batch": ((5, 6), lambda w: jnp.einsum("btk,tk->bk", X, w)),
    "outer": ((6, 7), lambda w: jnp.einsum("b,mn->bmn", X[:, 0, 0], w)),
    "sum": ((5, 6), lambda w: X + w[None]),
}


def evaluated(shape, fun, has_factors=True):
    """A program of a perturbed leaf, and how often that leaf was made."""
    leaf, left, right = (
        jax.random.normal(key, size)
        for key, size in zip(KEYS[2:], (shape, (*shape[:-1], 2), (shape[-1], 2)))
    )
    made = []

    def perturb(rows, zero):
        made.append(rows.values.shape)
        return rows.values + 0.1 * outer(left.reshape(-1, 2)[rows.numbers[..., 0]], right)

    def factors(rows, zero):
        own = 0.1 * left.reshape(-1, 2)[rows.numbers[..., 0]]
        return Factors(own, right) if has_factors else None

    return call_perturbed(lambda w: fun(w[0]), [leaf], perturb, jnp.ones(1), None, factors), made


def test_products_are_those_with_the_perturbed_leaf():
    made = {}

    @jax.jit
    def results():
        found, expected = {}, {}
        for name, (shape, fun) in (PRODUCTS | OTHERS).items():
            found[name], made[name] = evaluated(shape, fun)
            expected[name], all_made = evaluated(shape, fun, has_factors=False)
            assert all_made
        return found, expected

    found, expected = results()
    assert {name for name, shapes in made.items() if shapes} == set(OTHERS)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        # In bfloat16 the direction is not rounded with the leaf: 2**-8 of values up to 16.
        atol = 0.15 if name == "half" else 5e-5
        value, other = (x.astype(jnp.float32) for x in (value, expected[name]))
        np.testing.assert_allclose(value, other, atol=atol, err_msg=name)


def variables(jaxpr):
    """Of a program and all programs in it: primitive, shapes read, shapes made."""
    for equation in jaxpr.eqns:
        shapes = [[v.aval.shape for v in vs] for vs in (equation.invars, equation.outvars)]
        yield equation.primitive.name, *shapes
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, core.Jaxpr)):
            inner = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
            if isinstance(inner, core.Jaxpr):
                yield from variables(inner)


def two_layers(params, x):
    x = jnp.tanh(x @ params["in"])
    return jnp.mean((x @ params["out"].T) ** 2)


WIDE = {"in": jnp.ones((40, 64)), "out": jnp.ones((40, 64))}


@pytest.mark.parametrize("noise", [zo.LowRank(), zo.Subspace(3, 1)], ids=["low rank", "subspace"])
def test_batched_probes_share_each_matmul_and_form_no_leaf(noise):
    opt = zo.zo_sgd(1.0, num_probes=4, noise=noise, probe_batch=4)
    traced = jax.make_jaxpr(opt.estimate, static_argnums=0)(
        two_layers, WIDE, opt.init(WIDE, 0), jnp.ones((8, 40))
    )
    found = list(variables(traced.jaxpr))
    # A transposed leaf is the one thing of its size that is made.
    made = {name for name, _, shapes in found for shape in shapes if np.prod(shape) >= 40 * 64}
    large = [s for name, _, shapes in found if name != "transpose" for s in shapes]
    assert made <= {"transpose", "jit", "scan", "while", "cond"}
    assert not [s for s in large if s[-2:] in ((40, 64), (64, 40))]
    products = [reads for name, reads, _ in found if name == "dot_general"]
    with_leaf = [reads for reads in products if {(40, 64), (64, 40)} & set(reads)]
    # The first x is that of all probes, the second has one for each of the four.
    assert with_leaf == [[(8, 40), (40, 64)], [(4, 8, 64), (64, 40)]]


def test_matmul_sees_perturbations_far_below_the_precision_of_a_leaf():
    params = {"w": jnp.ones((16, 8), jnp.bfloat16)}
    x = jax.random.normal(KEYS[0], (4, 16)).astype(jnp.bfloat16)

    def total(params):
        return jnp.sum(jnp.matmul(x, params["w"], preferred_element_type=jnp.float32))

    opt = zo.zo_sgd(1.0, eps=2.0**-10, noise=zo.LowRank())  # an ulp of 1 is 2**-7
    slope = jax.jit(opt.estimate, static_argnums=0)(total, params, opt.init(params, 0))
    z, _ = moved_by(opt, {"w": jnp.zeros((16, 8))}, opt.init(params, 0))
    expected = jnp.sum(x.astype(jnp.float32) @ z["w"])
    np.testing.assert_allclose(slope.coefficients[0], expected, rtol=1e-2)


def lozo_by_hand(opt, params, slopes, momentum, interval, rank):
    """Algorithm 2 of the paper in float64, with the factors that the noise gives."""
    w, bias = (np.asarray(params[name], np.float64) for name in ("w", "bias"))
    trace, bias_trace, old = np.zeros((len(w), rank)), np.zeros(len(bias)), None
    for step, (rate, cs) in enumerate(slopes):
        lefts, right, z = drawn_factors(opt, params, step)
        if old is not None and step % interval == 0:
            assert not np.array_equal(old, right)
            trace = trace @ (old.T @ right) / (len(right) / rank**0.5)
        elif old is not None:
            np.testing.assert_array_equal(old, right)
        old = right
        gradient = np.einsum("q,qmr->mr", cs, lefts) / len(cs)
        trace = momentum * trace + (1 - momentum) * gradient
        bias_trace = momentum * bias_trace + (1 - momentum) * (cs @ z) / len(cs)
        w, bias = w - rate * trace @ right.T, bias - rate * bias_trace
    return w, bias


def drawn_factors(opt, params, step):
    """``U`` of two probes, ``V``, and the direction of the bias, in float64."""
    ours = split(params)
    state = opt.init(params, 4)
    run, step = (state.key[0], state.key[1]), jnp.int32(step)
    prepared = opt.noise.prepare((), ours, run, step)
    keys = probe_keys(run, step, 2, ours.paths)
    rows = {path: whole(i, leaf) for i, (path, leaf) in enumerate(zip(ours.paths, ours.leaves))}

    def probe(i, leaf):
        return zo.Probe(tuple(keys[i, leaf]), run, step, prepared)

    found = [opt.noise.factors(probe(i, 1), rows["w"]) for i in range(2)]
    np.testing.assert_array_equal(found[0].right, found[1].right)
    z = [opt.noise.draw(probe(i, 0), rows["bias"]) for i in range(2)]
    return (*(np.asarray(x, np.float64) for x in ([f.left for f in found], found[0].right, z)),)


def test_momentum_in_factors_is_that_of_the_paper():
    momentum, interval, rank = 0.8, 2, 3
    params = {"bias": jnp.array([1.0, 2.0, -1.0]), "w": jax.random.normal(KEYS[0], (5, 4))}
    opt = zo.lozo(0.1, num_probes=2, rank=rank, interval=interval, momentum=momentum)
    state = opt.init(params, 4)
    assert state.moments["trace"][1].shape == (5, 3) and state.moments["trace"][0].shape == (3,)
    slopes = [(0.1 * i, np.array([1.0, -0.5 * i])) for i in range(1, 6)]
    expected = lozo_by_hand(opt, params, slopes, momentum, interval, rank)
    apply = jax.jit(opt.apply)
    for rate, cs in slopes:
        record = opt.rule.record(
            jnp.asarray(cs / 2, jnp.float32), jnp.float32(rate), jnp.float32(0)
        )
        params, state = apply(params, state, record)
    np.testing.assert_allclose(params["w"], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(params["bias"], expected[1], rtol=1e-5, atol=1e-5)


def test_lozo_without_momentum_is_descent_with_low_rank_noise():
    assert zo.lozo(0.1, rank=3, interval=7) == zo.zo_sgd(0.1, noise=zo.LowRank(3, 7))


@pytest.mark.parametrize("momentum", [1.0, -0.1, "0.9"])
def test_impossible_momentum_is_refused(momentum):
    with pytest.raises((TypeError, ValueError), match="momentum must be "):
        zo.lozo(0.1, momentum=momentum)
