"""A replay gives the bits of the run, however steps are compiled and wherever leaves lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_lowbit import zo
from optax_lowbit.zo import rows
from optax_lowbit.zo.replay import replaying
from tests.zo.replay.runs import assert_same_bits, logged_run, lozo, momentum, sgd, tree

STEPS = 5


def placed(base, axis_type):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    specs = {"kernel": P("a", "b"), "bias": P(), "ids": P()}
    return jax.device_put(base, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})


def check_replay(opt, base, path):
    """Runs, and replays leaf by leaf, with a digest on the way."""
    params, state = logged_run(path, opt, base, STEPS, digest_every=4)
    log = zo.replay.read(path)
    assert list(log.digests) == [4]
    assert_same_bits(zo.replay.resume(base, opt.init(base, 7), log, opt), (params, state))
    # Control: what was compared is not the base.
    for name in ("kernel", "bias"):
        assert np.mean(np.asarray(params[name] != base[name])) > 0.4
    return log, params, state


@pytest.mark.parametrize(
    ("make", "worth_fusing"),
    [(sgd, STEPS), (momentum, 256), (lozo, STEPS)],
    ids=["sgd", "momentum", "lozo"],
)
def test_any_batching_and_any_mesh_give_the_bits_of_the_run(
    make, worth_fusing, tmp_path, monkeypatch
):
    monkeypatch.setattr(replaying, "FUSED", 2)
    monkeypatch.setattr(rows, "TILE_ELEMENTS", 16)  # on each of 8 devices
    monkeypatch.setattr(replaying, "WORTH_FUSING", worth_fusing)
    opt, base = make(), tree()
    log, params, state = check_replay(opt, base, tmp_path / "log")
    scanned = jax.jit(
        lambda carry, records: jax.lax.scan(
            lambda carry, record: (opt.apply(*carry, record), None), carry, records
        )[0]
    )
    assert_same_bits(scanned((base, opt.init(base, 7)), log.records), (params, state))
    monkeypatch.setattr(replaying, "WORTH_FUSING", 256)
    spread = zo.replay.apply(placed(base, AxisType.Auto), log, opt)
    assert_same_bits(spread, params)
    assert len(spread["kernel"].sharding.device_set) == 8


@pytest.mark.parametrize("make", [sgd, momentum])
def test_bfloat16_is_rounded_as_in_the_run(make, tmp_path):
    check_replay(make(), tree(jnp.bfloat16), tmp_path / "log")
