"""The products as kernels, interpreted, against float64; and which of them takes a product."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit.kernels import backends, cpu, pallas_gpu, pallas_tpu
from optax_lowbit.kernels.cpu import library
from optax_lowbit.kernels.quantized_dot import quantized_dot
from optax_lowbit.kernels.quantized_matrix import NF4, abstract_matrix, quantize_matrix
from optax_lowbit.quant import QuantSpec

needs_library = pytest.mark.skipif(library.library() is None, reason="no native library")
KERNELS = {
    "tpu": functools.partial(pallas_tpu.quantized_dot, interpret=True),
    "gpu": functools.partial(pallas_gpu.quantized_dot, interpret=True),
    "cpu": cpu.quantized_dot,
}
BFLOAT16 = jnp.bfloat16.dtype
FLOAT32 = jnp.float32.dtype


def spec(codebook="nf4", block_size=64):
    return QuantSpec(codebook=codebook, bits=4, signed=True, scaling="block", block_size=block_size)


def normal(rng, shape, dtype=FLOAT32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def assert_product(actual, x, w):
    """Within what sums in float32, in any order, and the last rounding may be off."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    # Of k products, each rounded once and then added up to k - 1 times: Higham, Accuracy and
    # Stability of Numerical Algorithms, 2002, Section 3.1.
    k = x.shape[-1]
    bound = k * 2.0**-24 / (1 - k * 2.0**-24) * (abs(x) @ abs(w))
    expected = x @ w
    if actual.dtype == BFLOAT16:
        bound = bound + 2.0**-8 * (abs(expected) + bound)
    assert actual.shape == expected.shape
    error = abs(np.asarray(actual, np.float64) - expected)
    assert (error <= bound).all(), (error / bound).max()


# Kernel, batch, n, m, spec, and the dtypes of the matrix and of x.
CASES = {
    "one row": ("tpu", 1, 512, 256, spec(), FLOAT32, BFLOAT16),
    "blocks of 32": ("tpu", 17, 256, 128, spec("fp4", 32), BFLOAT16, FLOAT32),
    # Along every axis; the last tile of the rows of x is not full.
    "many tiles": ("tpu", 515, 768, 384, spec("integer", 128), FLOAT32, FLOAT32),
    "blocks of 256": ("tpu", 5, 512, 256, spec("nf4", 256), BFLOAT16, BFLOAT16),
    "one row, gpu": ("gpu", 1, 256, 64, spec("nf4", 256), BFLOAT16, FLOAT32),
    "many tiles, gpu": ("gpu", 130, 256, 130, spec("fp4", 64), BFLOAT16, BFLOAT16),
    "blocks of 10, gpu": ("gpu", 7, 70, 25, spec("integer", 10), FLOAT32, BFLOAT16),
    "one row, cpu": ("cpu", 1, 320, 512, spec(), FLOAT32, FLOAT32),
    "tiles of 193 rows, cpu": ("cpu", 33, 96, 579, spec("nf4", 32), BFLOAT16, BFLOAT16),
}


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_dequantized_matrix(rng, case):
    kernel, batch, n, m, spec, matrix_dtype, dtype = CASES[case]
    w = quantize_matrix(normal(rng, (n, m), matrix_dtype), spec)
    # As the reference has it, rounded to the dtype of the matrix and then to that of x.
    floats = optax_lowbit.dequantize(w.rows).astype(dtype)
    product = jax.jit(KERNELS[kernel], static_argnames="is_transposed")
    x, g = normal(rng, (batch, n), dtype), normal(rng, (batch, m), dtype)
    y = product(x, w.rows, is_transposed=False)
    dx = product(g, w.rows, is_transposed=True)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    assert_product(y, x, floats.mT)
    assert_product(dx, g, floats)


def test_what_is_not_finite_stays_in_its_row(rng):
    w = quantize_matrix(normal(rng, (256, 128)), spec())
    rows = dataclasses.replace(w.rows, scales=w.rows.scales.at[3, 1].set(jnp.nan))
    x = jnp.ones((8, 256))
    for kernel in KERNELS.values():
        product = functools.partial(kernel, is_transposed=False)
        y = jax.jit(product)(x, rows)
        np.testing.assert_array_equal(np.isnan(y), np.arange(128)[None, :] == [[3]] * 8)


def loss(x, w, backend):
    return jnp.sum(jnp.sin(quantized_dot(x, w.rows, w.shape, backend=backend)))


step = jax.value_and_grad(loss)


@pytest.mark.parametrize("backend", ["interpret", "cpu"])
def test_a_named_backend_gives_value_and_slope_of_the_reference(rng, backend):
    w = quantize_matrix(normal(rng, (512, 256)))
    x = normal(rng, (3, 5, 512)) / 16
    value, slope = jax.jit(step, static_argnums=2)(x, w, backend)
    expected_value, expected_slope = jax.jit(step, static_argnums=2)(x, w, "reference")
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert slope.shape == x.shape
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["pallas_gpu", "reference"])
def test_by_kernels_no_matrix_is_dequantized_in_either_direction(rng, backend):
    w = quantize_matrix(normal(rng, (512, 256)))
    x = normal(rng, (3, 5, 512))
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(step, static_argnums=2).trace(x, w, backend)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = 2 if backend == "pallas_gpu" else 0
    assert text.count("custom_call @__gpu$xla.gpu.triton") == kernels
    assert ("tensor<256x512xf32>" in text) == (not kernels)


def test_layers_of_a_scan_and_examples_of_a_batch(rng):
    stack = quantize_matrix(normal(rng, (2, 256, 256)) / 16)
    x = normal(rng, (2, 3, 256))

    def run(backend):
        def product(x, w):
            return quantized_dot(x, w.rows, w.shape, backend=backend)

        scanned, _ = jax.lax.scan(lambda x, w: (jnp.tanh(product(x, w)), None), x, stack)
        return (
            scanned,
            jax.vmap(product)(x, stack),
            jax.vmap(product, (0, None))(x, jax.tree.map(lambda leaf: leaf[0], stack)),
        )

    for ours, theirs in zip(run("interpret"), run("reference"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_scan_keeps_no_copy_of_its_matrices_and_scales_have_no_slope(rng):
    stack = quantize_matrix(normal(rng, (3, 64, 64)), spec())

    def scanned(x, scales):
        rows = dataclasses.replace(stack.rows, scales=scales)

        def body(x, layer):
            codes, scales = layer
            rows = dataclasses.replace(stack.rows, codes=codes, scales=scales)
            return jnp.tanh(quantized_dot(x, rows, (64, 64))), None

        return jnp.sum(jax.lax.scan(body, x, (rows.codes, rows.scales))[0])

    x, scales = normal(rng, (2, 64)), stack.rows.scales
    assert not jax.grad(scanned, 1)(x, scales).any()
    program = jax.make_jaxpr(jax.grad(scanned))(x, scales)
    scans = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    assert len(scans) == 2
    kept = [v.aval.shape for scan in scans for v in scan.outvars]
    assert (3, 2, 64) in kept and (3, *stack.rows.codes.shape[1:]) not in kept
    assert (3, *scales.shape[1:]) not in kept


@pytest.mark.parametrize("spread", ["x", "matrix"])
def test_inside_shard_map(rng, spread, monkeypatch):
    of_cpus = importlib.import_module("optax_lowbit.kernels.cpu.quantized_dot")
    monkeypatch.setattr(of_cpus, "LEAST_BYTES", 0)
    w = quantize_matrix(normal(rng, (256, 512)), spec())
    x = normal(rng, (4, 256))
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    whole, part = PartitionSpec(), PartitionSpec("d")
    of_x, of_w = (part, whole) if spread == "x" else (whole, part)

    def on_shard(backend, x, rows):
        assert backends.why_not_spread("pallas_tpu", "quantized_dot", x) is None

        def shard_loss(x):
            shape = 256, rows.shape[0]
            return jnp.sum(jnp.sin(quantized_dot(x, rows, shape, backend=backend)))

        value, slope = jax.value_and_grad(shard_loss)(x)
        return jax.lax.psum(value, "d"), slope

    def in_shards(backend, **options):
        f = functools.partial(on_shard, backend)
        out = PartitionSpec(), of_x
        return jax.shard_map(f, mesh=mesh, in_specs=(of_x, of_w), out_specs=out, **options)

    expected = step(x, w, "reference")
    found = [jax.jit(in_shards(backend))(x, w.rows) for backend in ("reference", "cpu")]
    # Types of operands and results fit for kernels, too, but for the interpreter's own.
    assert jax.eval_shape(in_shards("pallas_tpu"), x, w.rows)[1].shape == x.shape
    if spread == "x":
        found.append(jax.jit(in_shards("interpret", check_vma=False))(x, w.rows))
    for value, slope in found:
        np.testing.assert_allclose(value, expected[0], rtol=1e-4)
        np.testing.assert_allclose(slope, expected[1], rtol=1e-4, atol=1e-3)


@needs_library
@pytest.mark.parametrize(
    "backend, batch, parts", [("auto", 512, 5), ("reference", 512, 1), ("auto", 513, 1)]
)
def test_tiles_on_cpus_are_all_that_is_dequantized(backend, batch, parts):
    n, m = 2048, 4096
    w = abstract_matrix((n, m), FLOAT32, spec())
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    whole = PartitionSpec()

    def slope(x, rows):
        return jax.grad(lambda x: quantized_dot(x, rows, (n, m), backend=backend).sum())(x)

    on_device = jax.shard_map(slope, mesh=mesh, in_specs=(whole, whole), out_specs=whole)
    x = jax.ShapeDtypeStruct((batch, n), FLOAT32)
    memory = jax.jit(on_device).lower(x, w.rows).compile().memory_analysis()
    matrix = 4 * n * m
    assert (memory.temp_size_in_bytes > matrix) == (parts == 1), memory.temp_size_in_bytes / matrix
    assert memory.temp_size_in_bytes < 2 * matrix // parts


@pytest.mark.parametrize("backend", ["reference", "pallas_tpu"])
def test_the_precision_of_matmuls_is_that_of_the_context(rng, backend):
    w = quantize_matrix(normal(rng, (256, 128)))
    for precision in (None, "highest", None):
        with jax.default_matmul_precision(precision):
            program = jax.make_jaxpr(lambda x: quantized_dot(x, w.rows, w.shape, backend=backend))(
                normal(rng, (2, 256))
            )
        assert ("HIGHEST" in str(program)) == (precision == "highest")


def test_what_is_spread_without_shard_map_is_left_to_xla(rng):
    for backend in ("pallas_tpu", "pallas_gpu"):
        reason = backends.why_not_spread(backend, "quantized_dot", normal(rng, (4, 256)))
        assert reason == "on several devices a product needs jax.shard_map"


def test_concrete_arrays_tell_that_they_are_on_one_device(rng, monkeypatch):
    of_cpus = importlib.import_module("optax_lowbit.kernels.cpu.quantized_dot")
    monkeypatch.setattr(of_cpus, "LEAST_BYTES", 0)
    taken, kernel = [], cpu.quantized_dot

    def watched(x, rows, **options):
        taken.append(options["is_transposed"])
        return kernel(x, rows, **options)

    monkeypatch.setattr(cpu, "quantized_dot", watched)
    w = quantize_matrix(normal(rng, (256, 512)), spec())
    x, mesh = normal(rng, (4, 256)), jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    assert_product(x @ w, x, w.dequantize())
    assert taken == [False]
    y, transpose = jax.vjp(lambda x: x @ w, x)
    assert_product(transpose(y)[0], y, w.dequantize().T)
    assert taken[-1] is True
    # These may be spread: by their sharding, by that of the matrix, or by jit's.
    taken.clear()
    whole, part = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("d",)))
    on_both = jax.device_put(w, whole)
    assert_product(jax.device_put(x, part) @ on_both, x, w.dequantize())
    assert_product(jax.jit(lambda x: x @ w, in_shardings=part)(x), x, w.dequantize())
    with jax.set_mesh(mesh):
        assert_product(x @ w, x, w.dequantize())
    assert not taken


NF4_FLOAT_SCALES = dataclasses.replace(NF4, double_quant=False)
REFUSED = {
    # Of the kernels for TPUs, of those for GPUs.
    "": ((256, 512), FLOAT32, NF4, None, None),
    "dtype float16": (
        (256, 512),
        jnp.float16,
        NF4,
        "dtype float16, neither float32 nor bfloat16",
        "dtype float16, neither float32 nor bfloat16",
    ),
    "rows one after the other": (
        (256 * 500,),
        FLOAT32,
        NF4,
        "a matrix whose rows are not stored apart",
        "a matrix whose rows are not whole blocks",
    ),
    "few columns": ((256, 128), FLOAT32, NF4, "no whole tiles of 128 rows and 256 columns", None),
    "odd rows": ((100, 512), FLOAT32, NF4, "no whole tiles of 128 rows and 256 columns", None),
    "large blocks": (
        (256, 512),
        FLOAT32,
        dataclasses.replace(NF4, block_size=512),
        "blocks of 512",
        None,
    ),
    "8 bits": (
        (256, 512),
        FLOAT32,
        QuantSpec(codebook="integer", bits=8, signed=True, scaling="block"),
        "8 bits",
        "8 bits",
    ),
    "scales of rows": (
        (256, 512),
        FLOAT32,
        QuantSpec(codebook="nf4", bits=4, signed=True, scaling="row"),
        "row scales",
        "row scales",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_take(case):
    shape, dtype, spec, tpu, gpu = REFUSED[case]
    assert backends.why_not("pallas_tpu", "quantized_dot", shape, dtype, spec) == tpu
    assert backends.why_not("pallas_gpu", "quantized_dot", shape, dtype, spec) == gpu


@needs_library
@pytest.mark.parametrize(
    "shape, dtype, reason",
    [
        ((4096, 2048), FLOAT32, None),
        ((4096, 4096), BFLOAT16, None),
        ((4095, 2048), FLOAT32, "a matrix of less than 32 MiB, which is dequantized whole"),
        ((4096, 2048), BFLOAT16, "a matrix of less than 32 MiB, which is dequantized whole"),
        ((8192 * 2048,), FLOAT32, "a matrix whose rows are not whole blocks"),
        ((4096, 2080), FLOAT32, "a matrix whose rows are not whole blocks"),
        ((4099, 2048), FLOAT32, "no whole tiles of 128 to 256 rows"),
        ((4096, 4096), jnp.float16, "dtype float16, neither float32 nor bfloat16"),
    ],
)
def test_what_is_multiplied_by_tiles_on_cpus(shape, dtype, reason):
    assert backends.why_not("cpu", "quantized_dot", shape, dtype, spec()) == reason


def test_a_kernel_that_is_named_and_cannot_is_an_error(rng):
    x = normal(rng, (2, 100))
    w = quantize_matrix(normal(rng, (100, 128)), spec())
    with pytest.raises(ValueError, match="backend='interpret' cannot multiply by this matrix: a m"):
        quantized_dot(x, w.rows, w.shape, backend="interpret")
    # Rounded to float16, which no kernel does.
    half = quantize_matrix(normal(rng, (256, 128), jnp.float16))
    with pytest.raises(ValueError, match="dtype float16"):
        quantized_dot(normal(rng, (2, 256)), half.rows, half.shape, backend="interpret")
    empty = quantized_dot(normal(rng, (0, 256)), half.rows, half.shape, backend="interpret")
    assert empty.shape == (0, 128)
