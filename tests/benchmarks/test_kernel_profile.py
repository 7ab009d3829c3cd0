"""The parts that are timed are those of a step."""

import jax
import numpy as np
import optax
import pytest

from benchmarks import kernel_profile
from benchmarks.speed.contestants import ADAM, RATE
from benchmarks.speed.workloads import Workload, gradients, initial_parameters
from optax_lowbit import adamw4bit
from optax_lowbit.kernels.cpu import library

pytestmark = pytest.mark.skipif(
    library.library() is None, reason="the native kernels were not built: no C++ compiler"
)


def test_parts_add_up_to_a_step():
    workload = Workload("small", ((48, 128),))
    grads, params = jax.tree.map(
        jax.numpy.asarray, (gradients(workload), initial_parameters(workload))
    )
    parts = kernel_profile.parts(kernel_profile.SECOND_MOMENTS["rank 1"])

    def done(name, grads, state):
        return jax.jit(parts[name].optimizer.apply)(grads, state, params)

    tx = adamw4bit(RATE, **ADAM)
    updates, whole = jax.jit(tx.update)(grads, tx.init(params), params)
    expected = optax.apply_updates(params, updates)
    state = parts["updates alone"].optimizer.init(params)
    updates, state_of_updates = done("updates alone", grads, state)
    new, _ = done("apply_updates alone", updates, ())
    # Where the two cancel, the roundings of steps of the size of the rate are left.
    np.testing.assert_allclose(new[0], expected[0], rtol=2**-22, atol=RATE * 2**-22)
    _, rescaled = done("new maxima alone", grads, state)
    assert jax.tree.leaves(state_of_updates.nu[0].scales)[0].any()
    jax.tree.map(
        np.testing.assert_array_equal, rescaled.nu[0].scales, state_of_updates.nu[0].scales
    )
    jax.tree.map(np.testing.assert_array_equal, state_of_updates.nu, whole[0].nu)
