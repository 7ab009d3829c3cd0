"""States that lpmm, torchao and bitsandbytes really had, taken over number by number.

The golden runs have the first 8192 codes of a tensor, 4096 of some: a tensor that is larger is
taken to end there, with whole rows. What moments stand for is recorded by the peers themselves.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowbit
from optax_lowbit import QuantSpec, dequantize, import_state, is_quantized
from optax_lowbit.quant import packing
from tests.optimizers.test_golden import STRIDES

SHAPES = {"w_b": (64, 384), "w_c": (40, 104), "conv": (3, 3, 16, 32), "vec": (8192,)}
MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu", "momentum_buffer": "trace"}


def part_of(name, codes):
    """The shape of the part of a tensor that a number of codes covers, in whole rows."""
    *_, n = shape = SHAPES[name]
    rows = min(codes, int(np.prod(shape))) // n
    if len(shape) == 1:
        return (min(codes, n),)
    return shape if rows * n == np.prod(shape) else (rows, n)


def blocks_of(scales, size, block):
    return scales.reshape(-1)[: -(-size // block)]


def lpmm_bytes(codes, bits=4):
    """As lpmm packs: padded to a multiple of 2048, even elements in the low nibble, a byte more."""
    padded = np.zeros(-(-codes.size // 2048) * 2048, np.uint8)
    padded[: codes.size] = codes
    packed = padded[0::2] | padded[1::2] << 4 if bits == 4 else padded
    return np.append(packed, np.uint8(0)).view(np.int8)


def lpmm_moment(run, codebooks, name, moment):
    key = f"final/{name}/{moment}"
    kind = "power-1/unsigned/4bit" if moment == "exp_avg_sq" else "nonlinear/signed/4bit"
    shape = part_of(name, run[f"{key}_codes"].size)
    size = int(np.prod(shape))
    qstate = {"enable": True, "qmap": codebooks[f"lpmm/{kind}"]}
    if f"{key}_scale_axis0" in run:
        maxima = [run[f"{key}_scale_axis{i}"] for i in range(len(SHAPES[name]))]
        maxima[0] = maxima[0][: shape[0]]
        qstate["overhead"] = {"max1": None, "max_dims": maxima, "dim": len(maxima)}
    else:
        scales = blocks_of(run[f"{key}_scale"], size, 128)[:, None]
        qstate["overhead"] = {"max1": scales, "scaled_shape": (len(scales), 128)}
    return {moment: lpmm_bytes(run[f"{key}_codes"][:size]), f"{moment}_qstate": qstate}, shape


def torchao_moment(run, _, name, moment):
    key, qmap = f"final/{name}/{moment}", run[f"qmap/{moment}"]
    per_byte = 2 if qmap.size == 16 else 1
    block = 128 if qmap.size == 16 else 256
    shape = part_of(name, run[f"{key}_codes"].size * per_byte)
    size = int(np.prod(shape)) // block * block  # whole blocks, or torchao would not quantize
    shape = shape if size == np.prod(shape) else (size // SHAPES[name][-1], SHAPES[name][-1])
    size = int(np.prod(shape))
    codes, scale = run[f"{key}_codes"][: size // per_byte], run[f"{key}_scale"][: size // block]
    return {moment: {"codes": codes, "scale": scale, "qmap": qmap}}, shape


def bitsandbytes_moment(run, codebooks, name, moment):
    number = {"exp_avg": 1, "exp_avg_sq": 2}[moment]
    key, sign = f"final/{name}/{moment}", ("signed", "unsigned")[number - 1]
    shape = part_of(name, run[f"{key}_codes"].size)
    size = int(np.prod(shape))
    return {
        f"state{number}": run[f"{key}_codes"][:size].reshape(shape),
        f"absmax{number}": blocks_of(run[f"{key}_absmax"], size, 256),
        f"qmap{number}": codebooks[f"bitsandbytes/dynamic/{sign}"],
    }, shape


RUNS = {
    "lpmm_adamw_block_block": ("lpmm", lpmm_moment, ("w_b", "w_c", "conv", "vec")),
    "lpmm_adamw_block_rank1": ("lpmm", lpmm_moment, ("w_b", "w_c", "conv", "vec")),
    "torchao_adamw4bit": ("torchao", torchao_moment, ("w_b", "vec")),
    "torchao_adamw8bit": ("torchao", torchao_moment, ("w_b", "vec")),
    "bnb_adamw8bit_exact_quantizer": (
        "bitsandbytes", bitsandbytes_moment, ("w_b", "w_c", "conv", "vec"),
    ),
}  # fmt: skip


def saved_state(golden, file):
    """(the peer, its state after step 20, shapes of the parts of parameters that it is of)."""
    peer, read, names = RUNS[file]
    run, codebooks = golden(file), golden("codebooks")
    state, shapes = {}, {}
    for name in names:
        (mu, shape), (nu, _) = (read(run, codebooks, name, m) for m in ("exp_avg", "exp_avg_sq"))
        state[name], shapes[name] = {"step": 20.0, **mu, **nu}, shape
    return peer, state, shapes


def recorded(golden, file, name, moment, size):
    """What the peer dequantized its last state to: the first of the recorded samples."""
    samples = golden(file)[f"{name}/{moment}"][-1].reshape(-1)
    stride = STRIDES[name]
    return samples[: -(-size // stride)], slice(None, size, stride)


@pytest.mark.parametrize("file", RUNS)
def test_moments_are_the_peers_own_to_the_bit(golden, file):
    peer, saved, shapes = saved_state(golden, file)
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    state = import_state(peer, saved, to=optax.adamw(1e-3), params=params)
    assert int(state[0].count) == 20
    for name, shape in shapes.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            theirs, sampled = recorded(golden, file, name, moment, int(np.prod(shape)))
            ours = np.asarray(getattr(state[0], MOMENTS[moment])[name]).reshape(-1)[sampled]
            assert ours.tobytes() == theirs.tobytes(), (name, moment)
            assert np.count_nonzero(theirs) > theirs.size / 2


NU_BLOCK = QuantSpec(codebook="linear", bits=4, signed=False, scaling="block")
SAME_LAYOUT = {
    "lpmm_adamw_block_block": optax_lowbit.adamw4bit(1e-3, nu_spec=NU_BLOCK),
    "lpmm_adamw_block_rank1": optax_lowbit.adamw4bit(1e-3),
    "torchao_adamw4bit": optax_lowbit.adamw4bit(1e-3, nu_spec=NU_BLOCK),
    "torchao_adamw8bit": optax_lowbit.adamw8bit(1e-3),
    "bnb_adamw8bit_exact_quantizer": optax_lowbit.adamw8bit(1e-3),
}


@jax.jit
def unpacked(q):
    return packing.unpack(q.codes, q.spec.bits, q.spec.group_size, q.last_dim)


def their_codes(file, state, moment, size):
    if file.startswith("bnb"):
        return state["state1" if moment == "exp_avg" else "state2"].reshape(-1)
    if file.startswith("torchao"):
        codes = state[moment]["codes"]
        return codes if "8bit" in file else np.stack([codes >> 4, codes & 15], -1).reshape(-1)
    packed = state[moment].view(np.uint8)[:-1]
    return np.stack([packed & 15, packed >> 4], -1).reshape(-1)[:size]


@pytest.mark.parametrize("file", RUNS)
def test_codes_and_scales_are_taken_over_where_layouts_agree(golden, file):
    peer, saved, shapes = saved_state(golden, file)
    block = 256 if "8bit" in file else 128
    names = [n for n, shape in shapes.items() if len(shape) == 1 or shape[-1] % block == 0]
    if "rank1" in file:
        names = ["vec"]  # of the part of w_b that there is, our rank-1 scales would cost too much
    else:
        assert "vec" in names and ("w_b" in names or block == 256)
    params = {name: jnp.zeros(shapes[name]) for name in names}
    tx = SAME_LAYOUT[file]
    if block == 256:
        tx = optax_lowbit.adamw8bit(1e-3, policy=optax_lowbit.Policy(min_size=4095))
    state = import_state(peer, {name: saved[name] for name in names}, to=tx, params=params)
    fresh = tx.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    for name in names:
        for moment in ("exp_avg", "exp_avg_sq"):
            q = getattr(state[0], MOMENTS[moment])[name]
            assert is_quantized(q)
            codes = unpacked(q)
            theirs = their_codes(file, saved[name], moment, q.size)
            np.testing.assert_array_equal(np.asarray(codes).reshape(-1), theirs)
            values, sampled = recorded(golden, file, name, moment, q.size)
            ours = np.asarray(dequantize(q)).reshape(-1)[sampled]
            assert ours.tobytes() == values.tobytes()


def test_rank1_scales_of_a_small_convolution(golden):
    """All its axes have maxima, as in lpmm; so do ours where blocks would cost more."""
    peer, saved, shapes = saved_state(golden, "lpmm_adamw_block_rank1")
    params = {"conv": jnp.zeros(shapes["conv"])}
    tx = optax_lowbit.adamw4bit(1e-3, mu_spec=None)
    state = import_state(peer, {"conv": saved["conv"]}, to=tx, params=params)
    scales = state[0].nu["conv"].scales
    theirs = saved["conv"]["exp_avg_sq_qstate"]["overhead"]["max_dims"]
    assert len(scales) == len(theirs)
    for ours, maxima in zip(scales, theirs):
        np.testing.assert_array_equal(ours, maxima)
    nu = state[0].nu["conv"]
    codes = unpacked(nu)
    theirs = their_codes("lpmm", saved["conv"], "exp_avg_sq", nu.size)
    np.testing.assert_array_equal(np.asarray(codes).reshape(-1), theirs)


def test_factored_second_moments(golden):
    run, codebooks = golden("lpmm_adamw_factored"), golden("codebooks")
    saved, params = {}, {}
    for name in ("w_c", "conv"):
        moment, shape = lpmm_moment(run, codebooks, name, "exp_avg")
        factors = {f"exp_avg_sq_{x}": run[f"{name}/exp_avg_sq_{x}"][-1] for x in ("row", "col")}
        saved[name] = {"step": np.float32(20), **moment, **factors}
        params[name] = jnp.zeros(shape)
    tx = optax_lowbit.factor4bit(1e-3, policy=optax_lowbit.Policy(min_size=4000))
    state = import_state("lpmm", saved, to=tx, params=params)
    for name in saved:
        nu = state[0].nu[name]
        np.testing.assert_array_equal(nu.rows[..., 0], saved[name]["exp_avg_sq_row"])
        np.testing.assert_array_equal(nu.columns[..., 0, :], saved[name]["exp_avg_sq_col"])


def test_momentum(golden):
    run, codebooks = golden("lpmm_sgd_momentum"), golden("codebooks")
    moment, shape = lpmm_moment(run, codebooks, "vec", "momentum_buffer")
    tx = optax_lowbit.sgd4bit(0.05, momentum=0.9)
    state = import_state("lpmm", {"vec": moment}, to=tx, params={"vec": jnp.zeros(shape)})
    trace = state[0].trace["vec"]
    table = codebooks["lpmm/nonlinear/signed/4bit"]
    codes, scale = run["final/vec/momentum_buffer_codes"], run["final/vec/momentum_buffer_scale"]
    expected = table[codes].reshape(-1, 128) * scale
    np.testing.assert_array_equal(dequantize(trace).reshape(-1, 128), expected)


def test_bytes_as_the_kernel_of_lpmm_packs_them(golden):
    """From its own bytes to its own numbers, in every width."""
    recorded_runs = golden("lpmm_quant")
    for key in [k for k in recorded_runs if k.endswith("|gp128/real_nearest_packed")]:
        check_packed(recorded_runs, golden("codebooks"), key.rsplit("/", 1)[0])


def check_packed(runs, codebooks, key):
    name, _, kind, sign, bits, _ = key.split("|")
    table = codebooks[f"lpmm/{kind}/{sign}/{bits}"]
    values = runs[f"input/{name}"].astype(np.float32)
    overhead = {"max1": runs.get(f"{key}/max1")}
    if f"{key}/max_dims0" in runs:
        overhead["max_dims"] = {str(i): runs[f"{key}/max_dims{i}"] for i in range(values.ndim)}
    saved = {
        "exp_avg": runs[f"{key}/real_nearest_packed"].view(np.int8),
        "exp_avg_qstate": {"overhead": overhead, "qmap": table},
    }
    tx, params = optax.scale_by_lion(), {"w": jnp.zeros(values.shape)}
    ours = np.asarray(import_state("lpmm", {"w": saved}, to=tx, params=params).mu["w"])
    theirs = runs[f"{key}/dequant"].reshape(values.shape)
    flips = runs.get(f"{key}/real_nearest_diff_pos", np.zeros(0, int))
    same = np.ones(values.size, bool)
    same[flips] = False
    np.testing.assert_array_equal(ours.reshape(-1)[same], theirs.reshape(-1)[same])


def test_flat_dicts_and_files(golden, tmp_path):
    from safetensors.numpy import save_file

    peer, saved, shapes = saved_state(golden, "torchao_adamw4bit")
    params = {"layers": [{"w": jnp.zeros(shapes["w_b"])}]}
    entries = saved["w_b"]
    flat = {"layers/0/w.step": np.float32(20)} | {
        f"layers/0/w.{moment}.{key}": np.ascontiguousarray(x)
        for moment in ("exp_avg", "exp_avg_sq")
        for key, x in entries[moment].items()
    }
    tx = optax.adamw(1e-3)
    expected = import_state(peer, {"layers/0/w": entries}, to=tx, params=params)
    save_file({k: np.asarray(x) for k, x in flat.items()}, tmp_path / "state.safetensors")
    for source in (flat, tmp_path / "state.safetensors", str(tmp_path / "state.safetensors")):
        state = import_state(peer, source, to=tx, params=params)
        jax.tree.map(np.testing.assert_array_equal, state, expected)
    bare = import_state(peer, {"": entries}, to=tx, params=params["layers"][0]["w"])
    np.testing.assert_array_equal(bare[0].mu, expected[0].mu["layers"][0]["w"])


def test_small_tensors_are_in_float32_everywhere():
    bias = np.linspace(-1, 1, 6, dtype=np.float32)
    params, tx = {"b": jnp.zeros(6)}, optax_lowbit.adamw4bit(1e-3)
    for peer, names in (
        ("lpmm", ("exp_avg", "exp_avg_sq")),
        ("torchao", ("exp_avg", "exp_avg_sq")),
        ("bitsandbytes", ("state1", "state2")),
    ):
        saved = {"b": {"step": 3, names[0]: bias, names[1]: bias**2}}
        state = import_state(peer, saved, to=tx, params=params)[0]
        np.testing.assert_array_equal(state.mu["b"], bias)
        np.testing.assert_array_equal(state.nu["b"], bias**2)
        assert int(state.count) == 3
    nested = {"b": {"state1": bias, "__bnb_optimizer_quant_state__": {"state2": bias**2}}}
    nested["b"]["step"] = 3
    state = import_state("bitsandbytes", nested, to=tx, params=params)[0]
    np.testing.assert_array_equal(state.nu["b"], bias**2)


def adam_entries(shape=(2,), **more):
    return {"exp_avg": np.zeros(shape, np.float32), "exp_avg_sq": np.zeros(shape, np.float32),
            "step": 1, **more}  # fmt: skip


BAD_CODES = {"codes": np.zeros(3, np.uint8), "scale": np.zeros(1), "qmap": np.zeros(16)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x": adam_entries()}, r"state_dict has 'x', and the parameters with a state are \['w'\]"),
        ({}, r"nothing to make \[0\].count, \[0\].mu\['w'\], \[0\].nu\['w'\] from"),
        ({"w": adam_entries((3,))}, r"w.exp_avg has shape \(3,\), and .* must have \(2,\)"),
        ({"w": adam_entries(exp_avg=BAD_CODES)}, r"torchao state of 'w': 6 codes, .* shape \(2,\)"),
        ({"w": adam_entries(max_exp_avg_sq=np.zeros(2))}, r"no place for w.max_exp_avg_sq"),
        ({"w": {"step": 1, "exp_avg": np.zeros(2)}}, r"nothing to make \[0\].nu\['w'\] from"),
        ({"w.nonsense": np.zeros(2)}, "'w.nonsense', which ends with no entry"),
        ({3: np.zeros(2)}, "3, which ends with no entry"),
        ({"w": adam_entries(step=np.zeros(2))}, "the step of 'w' must be one number"),
        ({"w": adam_entries(exp_avg={"codes": np.zeros(1, np.uint8)})}, "'w' lacks 'qmap'"),
        (
            {
                "w": adam_entries(
                    exp_avg={**BAD_CODES, "codes": np.zeros(1, np.uint8), "scale": np.zeros(0)}
                )
            },
            "0 scales of blocks",
        ),
    ],
)
def test_states_that_do_not_fit_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        import_state("torchao", state, to=optax_lowbit.adamw4bit(1e-3), params={"w": jnp.ones(2)})


def test_wrong_arguments():
    tx, params = optax_lowbit.adamw4bit(1e-3), {"w": jnp.ones(2), "v": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"source must be one of .*'lpmm'.* got 'apex'"):
        import_state("apex", {}, to=tx, params=params)
    with pytest.raises(TypeError, match="state_dict must be a dict or a file name, got int"):
        import_state("lpmm", 3, to=tx, params=params)
    uneven = {"w": adam_entries(), "v": adam_entries(step=2)}
    with pytest.raises(ValueError, match=r"different steps: \[1, 2\]"):
        import_state("torchao", uneven, to=tx, params=params)
    packed = {"w": {"exp_avg": np.zeros(7, np.int8),
                    "exp_avg_qstate": {"qmap": np.zeros(16), "overhead": {}}}}  # fmt: skip
    with pytest.raises(ValueError, match="lpmm state of 'w': 7 bytes of 4-bit codes"):
        import_state("lpmm", packed, to=tx, params=params)
    beyond = {"state1": np.full(2, 200, np.uint8), "absmax1": np.ones(1), "qmap1": np.ones(16)}
    with pytest.raises(ValueError, match="code 200, beyond a table of 16 values"):
        import_state("bitsandbytes", {"w": beyond}, to=tx, params=params)
    rank1 = {"qmap": np.ones(16), "overhead": {"max_dims": [np.ones((63, 1)), np.ones((1, 256))]}}
    packed = {"w": {"exp_avg": np.zeros(64 * 128 + 1, np.int8), "exp_avg_qstate": rank1}}
    with pytest.raises(ValueError, match=r"maxima of shapes \[\(63, 1\), .* must be \[\(64, 1\)"):
        import_state("lpmm", packed, to=tx, params={"w": jnp.ones((64, 256))})
    absmax = {"w": {"state1": np.zeros(2, np.uint8), "absmax1": np.zeros(5), "qmap1": np.ones(256)}}
    with pytest.raises(ValueError, match="5 scales of blocks of 256 for 2 elements"):
        import_state("bitsandbytes", absmax, to=tx, params=params)
