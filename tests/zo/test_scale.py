"""Steps over several devices: what they exchange, and that they are the steps of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_lowbit import checkpoint, zo
from optax_lowbit.zo import rows
from tests.optimizers.test_sharding import elements_of_collectives
from tests.sharding.cases import mesh_of, place
from tests.zo.exact import OPT, exact_case, loss
from tests.zo.replay.runs import assert_same_bits, momentum


@functools.cache
def step_of_one_device():
    params, x = exact_case()
    params = jax.tree.map(jnp.asarray, params)
    return jax.jit(OPT.step, static_argnums=0)(loss, params, OPT.init(params, 3), x)


def sharded_step(opt, mesh, loss_fn, batch_spec):
    """A step in `jax.shard_map`, compiled, and what it gives."""
    params, x = exact_case()
    params = jax.device_put(params, NamedSharding(mesh, P()))
    x = jax.device_put(x, NamedSharding(mesh, batch_spec))
    step = jax.shard_map(
        functools.partial(opt.step, loss_fn),
        mesh=mesh, in_specs=(P(), P(), batch_spec), out_specs=P(),
    )  # fmt: skip
    args = params, jax.device_put(opt.init(params, 3), NamedSharding(mesh, P())), x
    compiled = jax.jit(step).lower(*args).compile()
    return elements_of_collectives(compiled.as_text()), compiled(*args)


def mean_over_data(params, x):
    return jax.lax.pmean(loss(params, x), "data")


def check_step(found, expected):
    (params, state, info), (params_1, state_1, info_1) = found, expected
    assert_same_bits(params, params_1)
    assert_same_bits(info.record, info_1.record)
    assert int(state.count) == int(state_1.count) == 1
    np.testing.assert_allclose(info.loss, info_1.loss, rtol=1e-6)


def test_data_parallel_step_exchanges_the_loss_alone():
    exchanged, found = sharded_step(OPT, mesh_of(AxisType.Auto, (8,), ("data",)), mean_over_data,
                                    P("data"))  # fmt: skip
    assert set(exchanged) == {1}
    check_step(found, step_of_one_device())


def test_probe_parallel_step_exchanges_coefficients():
    opt = zo.probe_parallel(OPT, "probe")
    mesh = mesh_of(AxisType.Auto, (4, 2), ("probe", "data"))
    exchanged, found = sharded_step(opt, mesh, mean_over_data, P("data"))
    assert set(exchanged) <= {1, OPT.num_probes}
    check_step(found, step_of_one_device())
    with pytest.raises(ValueError, match=r"num_probes must be a multiple of 8, .* got 4"):
        mesh = mesh_of(AxisType.Auto, (8,), ("probe",))
        sharded_step(opt, mesh, loss, P())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("specs", [
    {"kernel": P(), "bias": P()},
    {"kernel": P("a", "b"), "bias": P("b")},
], ids=["replicated", "sharded"])  # fmt: skip
def test_step_of_sharded_parameters_exchanges_what_the_loss_does(axis_type, specs):
    params, x = exact_case()
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        params = place(params, mesh, specs)
        batch = jax.device_put(x, NamedSharding(mesh, P("a")))
        state = OPT.init(params, 3)
        step = jax.jit(OPT.step, static_argnums=0).lower(loss, params, state, batch).compile()
        alone = jax.jit(loss).lower(params, batch).compile()
        found = step(params, state, batch)
    more = sorted(elements_of_collectives(step.as_text()))
    for elements in elements_of_collectives(alone.as_text()):
        if elements > 1:
            more.remove(elements)
    assert set(more) <= {1}
    check_step(found, step_of_one_device())
    for name, x in found[0].items():
        assert x.sharding.is_equivalent_to(params[name].sharding, x.ndim)


@pytest.mark.parametrize(("opt", "spec"), [
    (zo.zo_sgd(2**-6, num_probes=2), P("a", None, "b")),
    (zo.zo_sgd(2**-6, num_probes=2), P(None, "a", "b")),
    (zo.zo_sgd_momentum(2**-6), P("a")),
    (zo.lozo(2**-6, momentum=0.9), P("a")),
], ids=["sgd", "sgd-rows", "momentum", "lozo"])  # fmt: skip
def test_an_update_in_tiles_exchanges_no_tile(opt, spec, monkeypatch):
    monkeypatch.setattr(rows, "TILE_ELEMENTS", 2**10)
    mesh = mesh_of(AxisType.Auto)
    stack = jax.device_put(jnp.ones((4, 64, 512)), NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        state = opt.init(stack, 3)
        record = jnp.ones(opt.num_probes + opt.rule.settings)
        apply = jax.jit(opt.apply, donate_argnums=(0, 1)).lower(stack, state, record).compile()
    # Low rank: the momentum's space, 2x2.
    assert max(elements_of_collectives(apply.as_text()), default=0) <= 4
    # Tiles have an eighth of a device's rows at most. The sum over the probes of all of them would
    # be as large as the shard.
    shard = stack.addressable_shards[0].data
    assert apply.memory_analysis().temp_size_in_bytes < shard.nbytes / 2


def test_state_is_saved_and_restored(tmp_path):
    opt, params = momentum(), {"w": jnp.ones((64, 128)), "b": jnp.ones(3)}
    state = opt.init(params, 3)
    bias, kernel = state.moments["trace"]
    codes = jax.random.bits(jax.random.key(0), kernel.codes.shape, jnp.uint8)
    state.moments["trace"] = bias + 1, dataclasses.replace(kernel, codes=codes)
    checkpoint.save(tmp_path / "0", {"params": params, "state": state})
    like = {"params": params, "state": opt.init(params, 4)}
    assert_same_bits(checkpoint.restore(tmp_path / "0", like)["state"], state)
