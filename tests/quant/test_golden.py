"""Code tables and quantizers against vectors made by lpmm, torchao and bitsandbytes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import quant
from optax_lowbit.quant import QuantSpec, codebooks, packing, rounding, scaling

TINY = np.finfo(np.float32).tiny
LPMM_TABLES = {
    "nonlinear": "dynamic_exponent",
    "nonlinear-nozero": "dynamic_exponent_nozero",
    "power-1": "linear",
    "power-2": "power2",
    "power-3": "power3",
}
LPMM_SCALINGS = {
    "group": "block",
    "rank1": "rank1",
    "tensor": "tensor",
    "dim0": "row",
    "dim1": "column",
}


def bits_of(x):
    return np.asarray(x, np.float32).view(np.uint32)


def unpacked_codes(q):
    if q.spec.bits == 8:
        return np.asarray(q.codes)
    return np.asarray(packing.unpack(q.codes, q.spec.bits, q.spec.group_size, q.last_dim))


def test_codebooks_equal_lpmm_to_the_last_bit(golden):
    tables = golden("codebooks")
    checked = 0
    for key, expected in tables.items():
        if not key.startswith("lpmm/"):
            continue
        _, kind, sign, bits = key.split("/")
        table = quant.codebook(LPMM_TABLES[kind], int(bits[0]), sign == "signed")
        np.testing.assert_array_equal(bits_of(table), bits_of(expected), err_msg=key)
        checked += 1
    assert checked == 5 * 2 * 4


@pytest.mark.parametrize("signed", [True, False])
def test_codebooks_equal_torchao_and_bitsandbytes(golden, signed):
    tables = golden("codebooks")
    sign = "signed" if signed else "unsigned"
    eight = quant.codebook("dynamic_exponent", 8, signed)
    np.testing.assert_array_equal(bits_of(eight), bits_of(tables[f"bitsandbytes/dynamic/{sign}"]))
    np.testing.assert_array_equal(bits_of(eight), bits_of(tables[f"torchao/8bit/{sign}"]))
    four = quant.codebook("dynamic_exponent" if signed else "linear", 4, signed)
    np.testing.assert_array_equal(bits_of(four), bits_of(tables[f"torchao/4bit/{sign}"]))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codebooks_equal_bitsandbytes_4bit(golden, name):
    expected = golden("codebooks")[f"bitsandbytes/{name}"]
    np.testing.assert_array_equal(bits_of(quant.codebook(name, 4, True)), bits_of(expected))


def lpmm_cases():
    path = __file__.rsplit("/", 2)[0] + "/golden/lpmm_quant.npz"
    with np.load(path) as archive:
        cases = {key.split("/")[0] for key in archive.files if "|" in key}
    # On arrays of more than two axes lpmm's dim0 and dim1 are other axes than row and column.
    return sorted(case for case in cases if not case.startswith(("conv_moment2|dim", "table")))


def lpmm_spec(case):
    _, scaling, kind, sign, bits, group = case.split("|")
    return QuantSpec(
        codebook=LPMM_TABLES[kind],
        bits=int(bits[0]),
        signed=sign == "signed",
        scaling=LPMM_SCALINGS[scaling],
        block_size=int(group[2:]),
    )


def lpmm_input(vectors, case):
    """The input in a shape on which blocks along the last axis are lpmm's flattened blocks."""
    x = vectors["input/" + case.split("|")[0]].astype(np.float32)
    scaling, group = case.split("|")[1], int(case.split("|")[5][2:])
    return x.reshape(-1) if scaling == "group" and x.shape[-1] % group else x


@pytest.mark.parametrize("case", lpmm_cases())
def test_quantizer_equals_lpmm(golden, case):
    vectors = golden("lpmm_quant")
    spec = lpmm_spec(case)
    x = lpmm_input(vectors, case)
    if spec.scaling == "rank1" and x.ndim == 1:
        # lpmm falls back to blocks of 128 whatever the group size; we keep the spec's own.
        spec = dataclasses.replace(spec, block_size=128)
    q = quant.quantize(jnp.asarray(x), spec)
    ours = unpacked_codes(q).reshape(-1)
    dequantized = np.asarray(quant.dequantize(q)).reshape(-1)
    assert np.isfinite(dequantized).all()

    by_argmin = vectors[f"{case}/codes"].reshape(-1)
    expected = by_argmin.copy()
    if f"{case}/real_nearest_diff_pos" in vectors:
        # Their CUDA kernel compares with float32 midpoints, as we do; argmin differs in near-ties.
        positions = vectors[f"{case}/real_nearest_diff_pos"]
        expected[positions] = vectors[f"{case}/real_nearest_diff_code"]
    by_argmin, expected = by_argmin[: ours.size], expected[: ours.size]

    values = np.asarray(spec.values, np.float32)
    scale = scaling.expand_scales(q.scales, spec.scaling, spec.block_size, x.shape)
    scale = np.broadcast_to(np.asarray(scale), x.shape).reshape(-1)
    # XLA takes subnormal numbers for zero.
    normal = (np.abs(x.reshape(-1)) >= TINY) | (x.reshape(-1) == 0)
    same = (values[ours] == values[expected]) | (scale == 0) | ~normal
    assert same.all(), f"{(~same).sum()} codes of {ours.size} differ"

    stride = 1
    if f"{case}/dequant" not in vectors:
        stride = 173 if ours.size >= 40000 else 61
    recorded = vectors.get(f"{case}/dequant", vectors.get(f"{case}/dequant_sample")).reshape(-1)
    comparable = (normal & (values[by_argmin] == values[expected]))[::stride]
    comparable &= (np.abs(recorded) >= TINY) | (recorded == 0)
    np.testing.assert_array_equal(dequantized[::stride][comparable], recorded[comparable])
    assert comparable.mean() > 0.9 or case.startswith(("denormal", "ties"))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantizer_equals_torchao_but_for_ties(golden, bits, signed):
    """torchao rounds ties up; on everything else the two agree."""
    vectors, lpmm = golden("torchao_quant"), golden("lpmm_quant")
    block = 128 if bits == 4 else 256
    sign = "signed" if signed else "unsigned"
    spec = QuantSpec(
        codebook="linear" if bits == 4 and not signed else "dynamic_exponent",
        bits=bits,
        signed=signed,
        scaling="block",
        block_size=block,
    )
    boundaries = codebooks.decision_table(spec.values).boundaries
    checked = 0
    for key, packed in vectors.items():
        if not key.endswith(f"|{sign}|{bits}bit|block{block}/codes"):
            continue
        name = key.split("|")[0]
        x = vectors.get(f"input/{name}", lpmm.get(f"input/{name}")).astype(np.float32)
        x = x.reshape(-1)
        q = quant.quantize(jnp.asarray(x), spec)
        codes = unpacked_codes(q)
        theirs = packed
        if bits == 4:
            theirs = np.stack([packed >> 4, packed & 15], axis=-1)
        theirs = theirs.reshape(-1)
        scale = np.repeat(np.asarray(q.scales), block)
        recorded = vectors[key.replace("/codes", "/scale")]
        np.testing.assert_array_equal(np.maximum(np.asarray(q.scales), 1e-12), recorded)
        # An input within one float32 rounding of a boundary may be a tie in torchao's arithmetic.
        normalized = np.where(scale > 0, x / np.where(scale > 0, scale, 1), 0)
        gap = np.abs(normalized[:, None] - boundaries).min(-1)
        tie = gap <= 1e-7
        live = recorded.repeat(block) > 1e-12
        np.testing.assert_array_equal(codes[live & ~tie], theirs[live & ~tie], err_msg=key)
        assert np.isin(theirs[tie & live].astype(int) - codes[tie & live], [0, 1]).all()
        checked += 1
    assert checked >= 1


def check_equal_but_for_reciprocal(x, q, ours, theirs):
    """bitsandbytes multiplies by 1 / absmax, we divide: codes differ only where that matters."""
    values = np.asarray(q.spec.values, np.float32)
    same = values[ours] == values[theirs]
    scale = np.repeat(np.asarray(q.scales), q.spec.block_size)[: x.size]
    product = np.clip(x * (np.float32(1) / np.maximum(scale, np.float32(1e-38))), -1, 1)
    quotient = np.where(scale > 0, x / np.where(scale > 0, scale, np.float32(1)), np.float32(0))
    assert (product != quotient)[~same].all()
    by_product = rounding.nearest_codes(jnp.asarray(product), q.spec.values)
    np.testing.assert_array_equal(values[np.asarray(by_product)], values[theirs])
    return same


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_quantizer_equals_bitsandbytes_4bit(golden, name):
    vectors = golden("bnb_quant")
    checked = 0
    for key, packed in vectors.items():
        if not key.endswith(f"|{name}|bs64/packed"):
            continue
        case = key.rsplit("/", 1)[0]
        x = vectors["input/" + key.split("|")[0]].astype(np.float32).reshape(-1)
        spec = QuantSpec(codebook=name, bits=4, signed=True, scaling="block", block_size=64)
        q = quant.quantize(jnp.asarray(x), spec)
        np.testing.assert_array_equal(np.asarray(q.scales), vectors[f"{case}/absmax"])
        theirs = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: x.size]
        check_equal_but_for_reciprocal(x, q, unpacked_codes(q), theirs)
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("sign", ["signed", "unsigned"])
def test_quantizer_equals_bitsandbytes_8bit(golden, sign):
    vectors = golden("bnb_quant")
    checked = 0
    for key, expected in vectors.items():
        if not (key.startswith("8bit|") and key.endswith(f"|{sign}|bs256/codes")):
            continue
        name = key.split("|")[1]
        x = (
            vectors["input/" + name.removesuffix("_abs")]
            if ("input/" + name not in vectors)
            else vectors["input/" + name]
        )
        x = x.astype(np.float32).reshape(-1)
        if name.endswith("_abs"):
            x = np.abs(x)
        spec = QuantSpec(
            codebook="dynamic_exponent",
            bits=8,
            signed=sign == "signed",
            scaling="block",
            block_size=256,
        )
        q = quant.quantize(jnp.asarray(x), spec)
        np.testing.assert_array_equal(
            np.asarray(q.scales), vectors[key.replace("/codes", "/absmax")]
        )
        ours, theirs = unpacked_codes(q), expected.reshape(-1)
        same = check_equal_but_for_reciprocal(x, q, ours, theirs)[::13]
        sample = vectors[key.replace("/codes", "/dequant_sample")]
        np.testing.assert_array_equal(np.asarray(quant.dequantize(q))[::13][same], sample[same])
        checked += 1
    assert checked >= 3
