"""What a step can't be made of: losses, trees and states that are refused, or change nothing."""

import jax
import jax.numpy as jnp
import optax
import pytest

from optax_lowbit import zo

CLIPPED = [
    zo.zo_sgd(0.01, clip=1.0),
    zo.zo_sgd_momentum(0.01, clip=1.0),
    zo.zo_sgd_scalar_sign(0.01),
    zo.zo_sgd_sign(0.01),
    zo.fzoo(0.01, clip=1.0),
]


def one_way(params):
    """Finite in some directions from ones."""
    return jnp.where(params["a"][0] > 1, jnp.inf, jnp.sum(params["a"] ** 2))


@pytest.mark.parametrize("opt", CLIPPED, ids=lambda opt: type(opt.rule).__name__)
def test_an_infinite_loss_moves_nothing_though_its_slope_is_clipped(opt):
    params = {"a": jnp.ones(3)}
    new, state, info = opt.step(one_way, params, opt.init(params, 0))
    assert not jnp.isfinite(info.loss) or not jnp.all(jnp.isfinite(info.coefficients))
    assert not info.record.any() and (new["a"] == params["a"]).all()
    assert state.count == 1


def to_zero(count):
    """A schedule that ends at 0, and then goes beyond."""
    return 0.5 - 0.25 * count


PROBED = {
    "sgd": zo.zo_sgd(0.01, to_zero, weight_decay=0.5),
    "adam": zo.zo_adam(0.01, to_zero, weight_decay=0.5),
    "signs": zo.zo_sgd_scalar_sign(0.01, to_zero, noise=zo.Rademacher(), weight_decay=0.5),
    "fzoo": zo.fzoo(0.01, to_zero, 2, weight_decay=0.5),
    "hizoo": zo.hizoo(0.01, to_zero, curvature="difference", weight_decay=0.5),
    "blocks": zo.blockwise(zo.zo_sgd(0.01, to_zero, weight_decay=0.5), ["a", "b"]),
}


@pytest.mark.parametrize("name", PROBED)
def test_a_step_whose_eps_is_not_above_0_is_not_taken_and_says_so(name):
    def loss(params):
        return jnp.sum(params["a"] ** 2) + jnp.sum(params["b"])

    opt, params = PROBED[name], {"a": jnp.array([1.0, 2.0]), "b": jnp.ones(1)}
    step, state = jax.jit(opt.step, static_argnums=0), opt.init(params, 0)
    for count, is_probed in ((0, True), (1, True), (2, False), (3, False)):
        now = state._replace(count=jnp.int32(count))
        new, after, info = step(loss, params, now)
        assert jnp.all(info.is_taken == is_probed) and jnp.isfinite(info.loss)
        assert bool(jnp.all(info.coefficients != 0)) == is_probed
        assert bool(jnp.all(new["a"] != params["a"])) == is_probed
        if not is_probed:
            assert not info.record.any() and not info.coefficients.any()
            kept = after._replace(count=now.count, prepared=now.prepared)
            assert jax.tree.all(jax.tree.map(jnp.array_equal, kept, now))


def test_an_eps_that_is_not_used_may_be_0():
    params = {"a": jnp.array([1.0, 2.0])}
    for opt in (
        zo.hizoo(0.01, lambda count: 0.0 * count),
        zo.zo_sgd(0.01, lambda count: 0.0 * count, estimator=zo.ForwardGradient()),
    ):
        estimate = jax.jit(opt.estimate, static_argnums=0)
        info = estimate(lambda p: jnp.sum(p["a"] ** 2), params, opt.init(params, 0))
        assert info.is_taken and info.coefficients.all()


def test_a_rejected_step_says_so():
    params, opt = {"a": jnp.ones(3)}, zo.zo_sgd_conservative(100.0)
    new, _, info = opt.step(lambda p: jnp.sum(p["a"] ** 2), params, opt.init(params, 0))
    assert not info.is_taken and jnp.array_equal(new["a"], params["a"])


@pytest.mark.parametrize(
    ("loss", "kind"),
    [(lambda p: (p["a"].sum(), {"x": 1}), "tuple"), (lambda p: None, "NoneType"),
     (lambda p: {"loss": p["a"].sum()}, "dict")],
)  # fmt: skip
def test_a_loss_gives_nothing_beside_it(loss, kind):
    params, opt = {"a": jnp.ones(3)}, zo.zo_sgd(0.01)
    with pytest.raises(TypeError, match=f"loss_fn must give a float of shape .* got a {kind}"):
        opt.step(loss, params, opt.init(params, 0))


def test_a_loss_of_16_bits_is_told():
    params, opt = {"a": jnp.ones(3)}, zo.zo_sgd(0.01)
    with pytest.warns(UserWarning, match="loss_fn gives bfloat16"):
        opt.step(lambda p: p["a"].sum().astype(jnp.bfloat16), params, opt.init(params, 0))


def test_two_leaves_of_one_path_are_refused():
    params = {"a/b": jnp.ones(40), "a": {"b": jnp.ones(40)}}
    with pytest.raises(ValueError, match="leaves 'a/b' and 'a/b' must have other paths"):
        zo.zo_sgd(0.01).init(params, 0)


def test_two_leaves_of_one_number_are_refused():
    # CRC-32 of both is 0x4ddb0c25.
    params = {"plumless": jnp.ones(4), "buckeroo": jnp.ones(4)}
    with pytest.raises(ValueError, match="'buckeroo' and 'plumless' must have other paths"):
        zo.zo_sgd(0.01).init(params, 0)


def test_floats_of_8_bits_are_refused():
    params = {"a": jnp.ones(4, jnp.float8_e4m3fn), "b": jnp.ones(4)}
    with pytest.raises(TypeError, match="leaf 'a' must be of floats of 16 bits or more"):
        zo.zo_sgd(0.01).init(params, 0)
    opt = zo.zo_sgd(0.01, trainable="b")
    new, *_ = opt.step(lambda p: p["b"].sum(), params, opt.init(params, 0))
    assert new["a"].dtype == jnp.float8_e4m3fn


def test_a_state_of_another_tree_is_refused():
    opt = zo.zo_sgd_momentum(0.01)
    state = opt.init({"a": jnp.ones(3)}, 0)
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match="state must be that of these params: its trace is of 1"):
        opt.apply(params, state, jnp.ones(6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": jnp.nan}, "learning_rate must be finite, got nan"),
        ({"learning_rate": 0.1, "weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"learning_rate": 0.1, "weight_decay": jnp.nan}, "weight_decay must be at least 0"),
    ],
)
def test_numbers_that_train_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        zo.zo_sgd(**arguments)


def test_several_probes_on_a_stack_are_added_as_on_its_slices():
    """A large stack is updated slice by slice, with the same directions."""
    params = {"a": jnp.zeros((3, 600, 600))}
    opt = zo.zo_sgd(0.5, num_probes=2)
    state = opt.init(params, 0)
    record = jnp.array([0.25, -0.5, 0.0])
    new, _ = jax.jit(opt.apply)(params, state, record)
    expected = opt.combine(params, state, record[:2])
    assert (new["a"] == expected["a"]).all() and new["a"].any()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: zo.zo_adam(1e-3, noise="gaussian"), TypeError, "noise must be a Noise"),
        (lambda: zo.hizoo(1e-3, noise="gaussian"), TypeError, "noise must be a Noise"),
        (lambda: zo.zo_adam(1e-3, adam_eps=-1.0), ValueError, "adam_eps must be at least 0, got"),
        (lambda: zo.zo_sgd(1e-3, clip="a"), TypeError, "clip must be a number above 0 or None"),
        (lambda: zo.zo_sgd(1e-3, clip=-1.0), ValueError, "above 0 or None, got -1.0"),
        (
            lambda: zo.hybrid(
                zo.zo_sgd(1e-3, num_probes=2, active_probes=lambda n: 1), optax.sgd(1), "w"
            ),
            ValueError,
            "opt must have no active_probes",
        ),
    ],
)
def test_impossible_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
