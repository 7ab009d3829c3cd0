"""Steps of one block after the other, against steps of an optimizer that trains one block alone."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import zo
from optax_lowbit.moments.storage import Moment
from optax_lowbit.zo.updates import Stepped
from tests.zo.quick_noise import QuickSigns

PARAMS = {
    "a": {"bias": jnp.ones(4), "kernel": jnp.linspace(-1, 1, 40).reshape(2, 20)},
    "b": {"kernel": jnp.linspace(1, 2, 40).reshape(2, 20)},
    "c": jnp.asarray(0.5),
    "frozen": jnp.ones(2),
    "steps": jnp.arange(3),
}
BLOCKS = ["^b", "^a/", "^c"]
TRAINABLE = "^[abc]"


def loss(params, x=1.0):
    kernels = jnp.sum(jnp.sin(params["a"]["kernel"]) * params["b"]["kernel"])
    return (kernels + jnp.sum(params["a"]["bias"]) ** 2) * params["c"] * x


def momentum(num_probes=1):
    """``m <- m / 2 + g``, and a step along it."""

    def step(count):
        del count
        return lambda grad, stored, factors: (
            stored["trace"] / 2 + grad, {"trace": stored["trace"] / 2 + grad},
        )  # fmt: skip

    return dataclasses.replace(
        zo.zo_sgd(0.01, num_probes=num_probes, noise=QuickSigns(), trainable=TRAINABLE),
        rule=Stepped(moments={"trace": Moment(None)}, step=step),
    )


def one_after_the_other(opt, params, state, choices, in_turn):
    """The same by optimizers that each train one block alone."""
    start, losses, coefficients = params, [], []
    for number, choice in enumerate(choices):
        one = dataclasses.replace(opt, trainable=choice)
        paths = ["a/bias", "a/kernel", "b/kernel", "c"]
        mine = [i for i, path in enumerate(paths) if re.search(choice, path)]
        own = state._replace(
            moments={name: tuple(kept[i] for i in mine) for name, kept in state.moments.items()},
            scalars={name: kept[number] for name, kept in state.scalars.items()},
        )
        info = one.estimate(loss, params if in_turn else start, own)
        params, own = one.apply(params, own, info.record)
        scalars = {
            name: kept.at[number].set(own.scalars[name]) for name, kept in state.scalars.items()
        }
        state = state._replace(scalars=scalars)
        for name in state.moments:
            kept = list(state.moments[name])
            for i, moment in zip(mine, own.moments[name]):
                kept[i] = moment
            state = state._replace(moments={**state.moments, name: tuple(kept)})
        losses.append(info.loss)
        coefficients.append(info.coefficients)
    return params, state._replace(count=state.count + 1), losses[0], jnp.stack(coefficients)


@pytest.mark.parametrize("simultaneous", [False, True])
def test_is_what_optimizers_of_one_block_do(simultaneous):
    opt = momentum(num_probes=2)
    blocks = zo.blockwise(opt, BLOCKS, simultaneous=simultaneous)
    params, mine = PARAMS, PARAMS
    with jax.disable_jit():
        state = blocks.init(PARAMS, 5)
        own = state
        for _ in range(2):
            params, state, found, coefficients = one_after_the_other(
                opt, params, state, BLOCKS, not simultaneous
            )
            mine, own, info = blocks.step(loss, mine, own)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), mine, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), own, state)
    np.testing.assert_allclose(info.loss, found, rtol=1e-5)
    np.testing.assert_allclose(info.coefficients, coefficients, rtol=1e-3)
    assert not np.array_equal(mine["a"]["kernel"], PARAMS["a"]["kernel"])
    np.testing.assert_array_equal(mine["frozen"], PARAMS["frozen"])


def test_jitted_step_is_its_two_halves():
    opt = zo.zo_sgd(0.01, noise=QuickSigns(), trainable=TRAINABLE, weight_decay=0.1)
    blocks = zo.blockwise(opt, lambda path: path.split("/")[0])
    state = blocks.init(PARAMS, 5)
    new, after, info = jax.jit(blocks.step, static_argnums=0)(loss, PARAMS, state)
    assert info.record.shape == (3 * 2,) and info.coefficients.shape == (3, 1)
    with jax.disable_jit():
        again, same = blocks.apply(PARAMS, state, info.record)
    jax.tree.map(np.testing.assert_array_equal, again, new)
    jax.tree.map(np.testing.assert_array_equal, same, after)


def test_blocks_of_one_shape_have_directions_of_their_own():
    params = {"first": jnp.zeros((50, 64)), "second": jnp.zeros((50, 64))}
    blocks = zo.blockwise(zo.zo_sgd(1.0), ["first", "second"], simultaneous=True)
    with jax.disable_jit():
        # A slope for each block, as if it had been measured; and then no decay of each.
        new, _ = blocks.apply(params, blocks.init(params, 0), jnp.array([1.0, 1.0, 0.0, 0.0]))
    assert set(np.unique(new["first"])) == {-1.0, 1.0} == set(np.unique(new["second"]))
    # Five standard deviations of a mean of 3200 products of signs.
    assert abs(np.mean(new["first"] * new["second"])) < 5 / 3200**0.5


def test_a_step_is_two_evaluations_a_block_of_the_block_alone():
    evaluated, drawn = [], []

    @dataclasses.dataclass(frozen=True)
    class Counted(QuickSigns):
        def draw(self, probe, rows):
            drawn.append(rows.leaf)
            return super().draw(probe, rows)

    def counted(params):
        evaluated.append(0)
        return loss(params)

    opt = zo.zo_sgd(0.01, noise=Counted(), trainable=TRAINABLE)
    blocks = zo.blockwise(opt, BLOCKS)
    state = blocks.init(PARAMS, 5)
    with jax.disable_jit():  # loops and branches are then run as Python's
        blocks.step(counted, PARAMS, state)
    assert len(evaluated) == 2 * 3
    # b; then a, which has two leaves; then c: in two evaluations and an update.
    assert sorted(drawn) == sorted([2, 2, 2, *[0, 1] * 3, 3, 3, 3])


def test_one_estimate_is_compiled_for_any_number_of_blocks():
    def traces(blocks):
        count = []

        def counted(params):
            count.append(0)
            return loss(params)

        opt = zo.blockwise(zo.zo_sgd(0.01, trainable=TRAINABLE), blocks)
        jax.make_jaxpr(lambda p, s: opt.step(counted, p, s))(PARAMS, opt.init(PARAMS, 0))
        return len(count)

    assert traces(["."]) == traces(BLOCKS) > 0


def test_wrong_blocks():
    opt = zo.zo_sgd(0.01, trainable=TRAINABLE)
    with pytest.raises(ValueError, match=r"in none: \['b/kernel', 'c'\]"):
        zo.blockwise(opt, ["^a/"]).init(PARAMS, 0)
    with pytest.raises(ValueError, match=r"in several: {'b/kernel': \[0, 1\]}"):
        zo.blockwise(opt, ["^b", "kernel|bias|c"]).init(PARAMS, 0)
    with pytest.raises(ValueError, match=r"\[1\] of them have none"):
        zo.blockwise(opt, [".", "frozen"]).init(PARAMS, 0)
    with pytest.raises(ValueError, match=r"in none: \['c'\]"):
        zo.blockwise(opt, lambda path: None if path == "c" else "all").init(PARAMS, 0)
    with pytest.raises(TypeError, match="sequence of choices"):
        zo.blockwise(opt, "kernel")
    with pytest.raises(TypeError, match="sequence of choices"):
        zo.blockwise(opt, [])
    with pytest.raises(ValueError, match=r"blocks\[1\]='\(' is no regular expression"):
        zo.blockwise(opt, ["a", "("])
    with pytest.raises(TypeError, match="ZeroOrderOptimizer"):
        zo.blockwise(zo.blockwise(opt, ["."]), ["."])
