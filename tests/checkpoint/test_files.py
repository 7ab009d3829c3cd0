"""What is saved comes back to the bit; what is not what was saved is refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_lowbit
from optax_lowbit import QuantSpec, checkpoint
from optax_lowbit.checkpoint import manifest
from tests.optimizers.cases import assert_bit_equal, each_family, jitted_update, trained

TABLE = (-1.0, -0.3, -0.1, 0.1, 0.3, 1.0)
USERS_TABLE = QuantSpec(codebook=TABLE, bits=3, signed=True, scaling="row")


def abstract(tree):
    return jax.eval_shape(lambda: tree)


@each_family
def test_training_state_comes_back_to_the_bit(case, tmp_path):
    params, grads, opt_state = trained(case)
    tx, update = jitted_update(case)
    state = {"params": params, "opt_state": opt_state, "step": 7}
    checkpoint.save(tmp_path / "7", state)
    restored = checkpoint.restore(str(tmp_path / "7"), {**state, "opt_state": tx.init(params)})
    assert_bit_equal(restored, state)
    assert type(restored["step"]) is int
    updates = update(grads, restored["opt_state"], restored["params"])
    assert_bit_equal(updates, update(grads, opt_state, params))
    assert_bit_equal(checkpoint.restore(tmp_path / "7", {**abstract(state), "step": 0}), state)


def odd_leaves():
    w = jnp.linspace(-1, 1, 3 * 37).reshape(3, 37)
    mu = {"w": optax_lowbit.quantize(w, USERS_TABLE), "s": jnp.float32(2)}
    nu = {"w": optax_lowbit.FactoredMoment(w[:, :1], w[:1]), "s": None}
    opt_state = optax.ScaleByAdamState(jnp.int32(5), mu, nu)
    return {
        "a/b.c['d']": opt_state,
        "key": jax.random.key(3),
        "keys": jax.random.wrap_key_data(np.arange(12, dtype=np.uint32).reshape(3, 4), impl="rbg"),
        "none": None,
        "nothing": {},
        "empty": jnp.zeros((0, 5)),
        "bool": jnp.array([True, False]),
        "half": jnp.array([1.5, jnp.nan], jnp.bfloat16),
        "complex": jnp.array([1 + 2j]),
        "int64": np.int64(2**40),
        "float64": np.linspace(0, 1, 3),
        "number": (2**40, 0.1, True, 1 - 1j),
    }


def test_odd_leaves_come_back(tmp_path):
    state = odd_leaves()
    checkpoint.save(tmp_path / "0", state)
    restored = checkpoint.restore(tmp_path / "0", state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for actual, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state)):
        assert type(actual) is type(expected)
        if jax.dtypes.issubdtype(getattr(expected, "dtype", float), jax.dtypes.prng_key):
            assert jax.random.key_impl(actual) == jax.random.key_impl(expected)
            actual, expected = jax.random.key_data(actual), jax.random.key_data(expected)
        assert np.asarray(actual).dtype == np.asarray(expected).dtype
        assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("state", [{}, {"a": None}, jnp.zeros((0,)), 3, jnp.arange(3.0)], ids=str)
def test_tiny_states_come_back(state, tmp_path):
    checkpoint.save(tmp_path / "0", state)
    assert_bit_equal(checkpoint.restore(tmp_path / "0", state), state)


def test_a_table_of_the_users_own_is_kept_by_value(tmp_path):
    """Codes under one table are never read under another: they are requantized."""
    state = {"w": odd_leaves()["a/b.c['d']"].mu["w"]}
    checkpoint.save(tmp_path / "0", state)
    (entry,) = written_manifest(tmp_path / "0")["leaves"]
    assert entry["spec"]["codebook"] == list(TABLE)
    other = dataclasses.replace(USERS_TABLE, codebook=(-1.0, -0.5, 0.5, 1.0))
    like = {"w": optax_lowbit.quantize(jnp.zeros((3, 37)), other)}
    restored = checkpoint.restore(tmp_path / "0", like)
    expected = optax_lowbit.quantize(optax_lowbit.dequantize(state["w"]), other)
    assert_bit_equal(restored, {"w": expected})


def test_orbax_managers_save_asynchronously_and_find_the_latest(tmp_path):
    tx = optax_lowbit.adamw4bit(1e-2)
    params = {"w": jnp.ones((64, 128))}
    state = tx.init(params)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step in range(3):
            _, state = tx.update(params, state, params)
            manager.save(step, args=checkpoint.save_args(state))
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 2]
        restored = checkpoint.restore(tmp_path / str(manager.latest_step()), tx.init(params))
    assert_bit_equal(restored, state)


# What is refused.


def written_manifest(path):
    return json.loads((path / "manifest" / "metadata").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, and the state that it is of."""
    tx = optax_lowbit.adamw4bit(1e-2)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(64, 128)), jnp.float32), "b": jnp.ones(64)}
    _, state = tx.update(params, tx.init(params), params)
    path = tmp_path_factory.mktemp("saved") / "0"
    checkpoint.save(path, state)
    return path, state


@pytest.fixture
def copy(saved, tmp_path):
    path, state = saved
    shutil.copytree(path, tmp_path / "copy")
    return tmp_path / "copy", state


def test_nothing_is_written_over(copy):
    path, state = copy
    with pytest.raises(ValueError, match="already exists"):
        checkpoint.save(path, jax.tree.map(jnp.zeros_like, state))
    assert_bit_equal(checkpoint.restore(path, state), state)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.restore(tmp_path / "nowhere", {})


def test_a_checkpoint_of_orbax_alone(tmp_path):
    state = {"w": jnp.ones(3)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "foreign", state)
    with pytest.raises(ValueError, match=r"foreign: it has no 'manifest'"):
        checkpoint.restore(tmp_path / "foreign", state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "else"}, "does not say that it is an optax_lowbit checkpoint"),
        ({"version": 2}, "has version 2 of the format, and .* reads version 1"),
        ({"crc32": 0}, "manifest is damaged"),
    ],
)
def test_manifest_of_another_kind(copy, change, message):
    path, state = copy
    content = {**written_manifest(path), **change}
    (path / "manifest" / "metadata").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(path, state)


def test_a_changed_spec_and_cut_off_manifest_are_noticed(copy):
    path, state = copy
    file = path / "manifest" / "metadata"
    text = file.read_text()
    assert '"block_size": 128' in text
    file.write_text(text.replace('"block_size": 128', '"block_size": 256'))
    with pytest.raises(ValueError, match="manifest is damaged"):
        checkpoint.restore(path, state)
    file.write_text(text[:-10])
    with pytest.raises(ValueError, match="manifest cannot be read"):
        checkpoint.restore(path, state)


def test_a_named_table_that_has_changed_is_noticed(saved, monkeypatch):
    path, state = saved
    table_crc32 = manifest._table_crc32
    monkeypatch.setattr(manifest, "_table_crc32", lambda spec: table_crc32(spec) ^ 1)
    with pytest.raises(ValueError, match="another table 'dynamic_exponent'"):
        checkpoint.restore(path, state)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"w": (64, 256), "b": (64,)}, r"\[0\].mu\['w'\] has shape \(64, 128\), .* \(64, 256\)"),
        ({"w": (64, 128)}, r"no place for \[0\].mu\['b'\], \[0\].nu\['b'\]$"),
        ({"w": (64, 128), "b": (64,), "c": (2,)}, r"make \[0\].mu\['c'\], .*\['c'\] from$"),
        ({"w": (64, 128), "c": (64,)}, r"to make \[0\].mu\['c'\].*no place for \[0\].mu\['b'\]"),
    ],
)
def test_other_leaves(saved, shapes, message):
    path, _ = saved
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(path, optax_lowbit.adamw4bit(1e-2).init(params))


def test_another_kind_of_dtype(saved):
    path, state = saved
    like = (state[0]._replace(count=jnp.zeros(())), *state[1:])
    with pytest.raises(ValueError, match=r"\[0\].count has dtype int32, .* float32"):
        checkpoint.restore(path, like)


def test_too_many_names_are_cut_short(tmp_path):
    checkpoint.save(tmp_path / "0", [jnp.ones(1)] * 20)
    with pytest.raises(ValueError, match=r"place for \[0\], \[1\], .*\[7\] and 12 more"):
        checkpoint.restore(tmp_path / "0", [])


def array_files(path: pathlib.Path) -> list[pathlib.Path]:
    return [file for file in path.rglob("state/**/d/*") if file.stat().st_size > 300]


def test_other_numbers_in_whole_files_are_noticed(copy, tmp_path):
    path, state = copy
    mu = state[0].mu["w"]
    codes = mu.codes.at[3, 5].add(1)
    other = (state[0]._replace(mu={**state[0].mu, "w": dataclasses.replace(mu, codes=codes)}),)
    checkpoint.save(tmp_path / "other", (*other, *state[1:]))
    shutil.rmtree(path / "state")
    (tmp_path / "other" / "state").rename(path / "state")
    with pytest.raises(ValueError, match=r"mu.w.codes' is damaged: its checksum is \d+, and was"):
        checkpoint.restore(path, state)


# Where reading fails Orbax leaves coroutines and threads behind that complain.
unawaited = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@unawaited
def test_truncated_files_are_noticed(copy):
    path, state = copy
    for file in array_files(path):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=r"copy: its array"):
        checkpoint.restore(path, state)
    shutil.rmtree(path / "state")
    with pytest.raises(ValueError, match=r"copy: its arrays cannot be read"):
        checkpoint.restore(path, state)


@unawaited
def test_changed_bytes_never_give_another_state(copy):
    """Where a byte matters it is noticed; elsewhere the state is what it was."""
    path, state = copy
    rng = np.random.default_rng(0)
    files = array_files(path)
    damaged = 0
    for _ in range(12):
        file = files[rng.integers(len(files))]
        content = file.read_bytes()
        at = int(rng.integers(len(content)))
        file.write_bytes(
            content[:at] + bytes([content[at] ^ 1 << rng.integers(8)]) + content[at + 1 :]
        )
        try:
            assert_bit_equal(checkpoint.restore(path, state), state)
        except ValueError as error:
            assert "its array" in str(error)
            damaged += 1
        file.write_bytes(content)
    assert damaged
    assert_bit_equal(checkpoint.restore(path, state), state)


def test_lazy_optional_dependency(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError):
        checkpoint.save(tmp_path / "0", {})


def test_like_without_values_for_new_hyperparameters(tmp_path):
    tx = optax.inject_hyperparams(optax_lowbit.sgd4bit)(learning_rate=0.1, momentum=0.9)
    params = {"w": jnp.ones((64, 128))}
    checkpoint.save(tmp_path / "0", optax_lowbit.sgd4bit(0.1, momentum=0.9).init(params))
    restored = checkpoint.restore(tmp_path / "0", tx.init(params))
    assert float(restored.hyperparams["momentum"]) == np.float32(0.9)
    with pytest.raises(ValueError, match=r"make .hyperparams\['learning_rate'\]"):
        checkpoint.restore(tmp_path / "0", jax.eval_shape(tx.init, params))
