"""PEFT's modules as leaves of a tree, whose layers are stacked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import adapters, qlora
from tests.qlora.peft_cases import pair, write

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is missing")

NAMES = {
    "layers/query/kernel": ["layers.0.q", "layers.1.q", "layers.2.q"],
    "layers/value/kernel": ["layers.0.v", "layers.1.v", "layers.2.v"],
    "head/kernel": "head",
}


def test_leaves_of_stacks_and_back(tmp_path):
    params = {
        "layers": {
            "query": {"kernel": jnp.ones((3, 6, 4))},
            "value": {"kernel": jnp.ones((3, 6, 4))},
        },
        "head": {"kernel": jnp.ones((6, 5))},
    }
    lora = adapters.LoRA(rank=2, alpha=4, targets="query|head")
    rng = np.random.default_rng(0)
    leaves = {
        "layers/query/kernel": {
            "a": rng.random((3, 2, 6), np.float32),
            "b": rng.random((3, 2, 4), np.float32),
        },
        "head/kernel": pair(m=5),
    }
    matrices = qlora.adapter_matrices(leaves, NAMES)
    write(tmp_path, matrices, lora_alpha=4)
    read = qlora.adapter_leaves(qlora.read_adapter(tmp_path).matrices, NAMES)
    assert jax.tree.structure(read) == jax.tree.structure(leaves)
    for x, y in zip(jax.tree.leaves(leaves), jax.tree.leaves(read)):
        np.testing.assert_array_equal(x, y)
    tensors = safetensors_numpy.load_file(tmp_path / "adapter_model.safetensors")
    b = leaves["layers/query/kernel"]["b"]
    np.testing.assert_array_equal(tensors["base_model.model.layers.2.q.lora_B.weight"], b[2].T)
    lora.attach(params, read)


@pytest.mark.parametrize(
    ("matrices", "complaint"),
    [
        ({"layers.0.q": pair(), "layers.2.q": pair()}, r"\['layers.1.q'\] have no adapters"),
        ({f"layers.{i}.q": pair(rank=1 + i // 2) for i in range(3)}, "differ in their ranks"),
        ({"head": pair(), "tail": pair()}, r"and not \['tail'\]"),
    ],
)
def test_adapters_that_are_no_leaves(matrices, complaint):
    with pytest.raises(ValueError, match=complaint):
        qlora.adapter_leaves(matrices, NAMES)


@pytest.mark.parametrize(
    ("leaves", "complaint"),
    [
        ({"body/kernel": pair()}, "and not 'body/kernel'"),
        (
            {"layers/query/kernel": {"a": np.ones((2, 2, 6))}},
            r"'a' must be a stack of 3, got",
        ),
    ],
)
def test_leaves_that_are_no_modules(leaves, complaint):
    with pytest.raises(ValueError, match=complaint):
        qlora.adapter_matrices(leaves, NAMES)


def test_no_adapters_at_all(tmp_path):
    write(tmp_path, {})
    assert qlora.read_adapter(tmp_path).matrices == {}
    assert qlora.adapter_leaves({}, NAMES) == {}
