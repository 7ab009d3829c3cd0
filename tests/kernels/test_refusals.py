"""What kernels refuse: dtypes, shapes and specs that they would read as something else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import optax_lowbit
from optax_lowbit import quantize
from optax_lowbit.kernels.adam import Coefficients
from optax_lowbit.kernels.cpu import library, ops
from optax_lowbit.moments.presets import FIRST_MOMENT_4BIT, SECOND_MOMENT_4BIT

pytestmark = pytest.mark.skipif(
    library.library() is None, reason="the native kernels were not built: no C++ compiler"
)

MAKERS = {
    "adamw4bit": lambda backend: optax_lowbit.adamw4bit(1e-2, backend=backend),
    "factor4bit": lambda backend: optax_lowbit.factor4bit(1e-2, backend=backend),
    "sgd4bit": lambda backend: optax_lowbit.sgd4bit(1e-2, momentum=0.9, backend=backend),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_arrays_of_different_shapes_are_refused(backend):
    tx = MAKERS["adamw4bit"](backend)
    state, long = tx.init(jnp.ones((32, 256))), jnp.ones((64, 256))
    with pytest.raises(ValueError, match=r"of shape \(64, 256\) has mu of shape \(32, 256"):
        tx.update(long, state, long)
    with pytest.raises(ValueError, match=r"has params of shape \(32, 256\)"):
        optax_lowbit.fused_apply(tx, long, tx.init(long), jnp.ones((32, 256)))


@pytest.mark.parametrize(
    "params", [None, {}, {"w": 1.0}, {"v": 1.0, "w": 1.0}, [1.0, 1.0]], ids=str
)
def test_fused_apply_refuses_parameters_of_another_structure(params):
    """Leaf by leaf they would be stepped by one another's gradients, or not at all."""
    tx = MAKERS["adamw4bit"]("auto")
    full = {"b": jnp.ones((64, 256)), "w": jnp.ones((64, 256))}
    state, params = tx.init(full), jax.tree.map(lambda _: full["w"], params)
    with pytest.raises(ValueError, match="grads and params must be trees of one structure, got"):
        optax_lowbit.fused_apply(tx, full, state, params)


def test_impossible_backends_are_refused():
    params = {"w": jnp.ones((64, 128))}
    with pytest.raises(ValueError, match="backend must be one of"):
        optax_lowbit.adamw4bit(1e-3, backend="gpu")
    stochastic = dataclasses.replace(FIRST_MOMENT_4BIT, rounding="stochastic")
    tx = optax_lowbit.adamw4bit(1e-3, mu_spec=stochastic, key=0, backend="cpu")
    with pytest.raises(ValueError, match="backend='cpu' cannot take parameter 'w': stochastic"):
        tx.init(params)


@pytest.mark.parametrize("is_fused", [False, True], ids=["update", "fused_apply"])
@pytest.mark.parametrize("backend", ["cpu", "interpret"])
@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
@pytest.mark.parametrize("name", MAKERS)
def test_gradients_of_a_dtype_that_the_named_kernel_does_not_know_are_refused(
    name, dtype, backend, is_fused
):
    """`init` saw the parameters alone. Read as float32, these would be garbage, or past the end."""
    tx = MAKERS[name](backend)
    params = {"w": jnp.ones((64, 256))}
    state = tx.init(params)
    with jax.enable_x64(dtype == "float64"):
        grads = {"w": jnp.ones((64, 256), dtype)}
        message = (
            f"backend='{backend}' cannot step parameter 'w' by a gradient {dtype}\\[64, 256\\]: "
            f"dtype {dtype}, neither float32 nor bfloat16; where no kernel can, backend='auto'"
        )
        with pytest.raises(ValueError, match=message):
            if is_fused:
                fused = functools.partial(optax_lowbit.fused_apply, tx)
                jax.eval_shape(fused, grads, state, params)
            else:
                jax.eval_shape(tx.update, grads, state, params)


def test_states_that_the_named_kernel_does_not_know_are_refused():
    params = {"w": jnp.ones((64, 256))}
    stochastic = dataclasses.replace(FIRST_MOMENT_4BIT, rounding="stochastic")
    state = optax_lowbit.adamw4bit(1e-3, mu_spec=stochastic, key=0).init(params)
    tx = optax_lowbit.adamw4bit(1e-3, mu_spec=stochastic, key=0, backend="cpu")
    with pytest.raises(ValueError, match=r"cannot step parameter 'w' .*: stochastic"):
        tx.update(params, state, params)


HALF = jnp.ones((4, 128), jnp.float16)
FLOAT32_CODES = quantize(jnp.ones((4, 128)), FIRST_MOMENT_4BIT)
RANK1 = quantize(jnp.ones((4, 128)), SECOND_MOMENT_4BIT)
NO_COEFFICIENTS = Coefficients(*[jnp.float32(0)] * 9)


@pytest.mark.parametrize(
    ("call", "known", "given"),
    [
        (lambda: ops.quantize(HALF, FIRST_MOMENT_4BIT), "F32 or BF16", "F16"),
        (lambda: ops.square_sums(HALF, 1, 1), "F32 or BF16", "F16"),
        (
            lambda: ops.dequantize(dataclasses.replace(FLOAT32_CODES, dtype=jnp.dtype("float16"))),
            "F32 or BF16",
            "F16",
        ),
        (
            lambda: ops.dequantize(
                dataclasses.replace(FLOAT32_CODES, scales=jnp.ones((4, 1), jnp.bfloat16))
            ),
            "F32",
            "BF16",
        ),
        (
            lambda: ops.momentum(HALF, FLOAT32_CODES, jnp.float32(0.9), nesterov=False),
            "F32 or BF16",
            "F16",
        ),
        (
            lambda: ops.momentum(
                jnp.ones((4, 128)),
                dataclasses.replace(FLOAT32_CODES, codes=jnp.ones((4, 64), jnp.int8)),
                jnp.float32(0.9),
                nesterov=False,
            ),
            "U8",
            "S8",
        ),
        (lambda: ops.adam_rank1_maxima(HALF, RANK1, NO_COEFFICIENTS), "F32 or BF16", "F16"),
    ],
    ids=["quantize", "sums", "dequantize", "scales", "momentum", "codes", "maxima"],
)
def test_the_library_refuses_dtypes_that_it_does_not_know(call, known, given):
    """Whoever calls it: memory would be read past its end."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"take {known} here, not {given}"):
        jax.block_until_ready(call())
