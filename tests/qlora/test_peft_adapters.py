"""PEFT's adapters in a tree, and a tree's adapters for PEFT."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import adapters, qlora

pytest.importorskip("safetensors.numpy", reason="safetensors is missing")

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "lora_qv"
NAMES = {
    f"layers/{leaf}/kernel": [f"model.layers.{i}.self_attn.{module}" for i in range(2)]
    for leaf, module in (("query", "q_proj"), ("value", "v_proj"))
}


def test_an_adapter_of_peft_moves_what_it_moves_there(rng):
    adapter = qlora.read_adapter(GOLDEN)
    lora, trained = qlora.from_peft(adapter, NAMES)
    base = {
        "layers": {
            name: {"kernel": jnp.asarray(rng.normal(size=(2, 64, size)), jnp.float32)}
            for name, size in (("query", 64), ("value", 32))
        }
    }
    merged = lora.merge(base, trained)["layers"]["value"]["kernel"]
    pair = adapter.matrices["model.layers.1.self_attn.v_proj"]
    expected = base["layers"]["value"]["kernel"][1] + 16 / 8 * pair["a"].T @ pair["b"]
    np.testing.assert_allclose(merged[1], expected, rtol=1e-5, atol=1e-5)


def test_what_peft_wrote_comes_back():
    adapter = qlora.read_adapter(GOLDEN)
    again = qlora.to_peft(*qlora.from_peft(adapter, NAMES), NAMES)
    assert again.matrices.keys() == adapter.matrices.keys()
    for module, arrays in adapter.matrices.items():
        for role, x in arrays.items():
            np.testing.assert_array_equal(again.matrices[module][role], x)
        assert again.config.scaling(module) == adapter.config.scaling(module)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scales_of_leaves_survive_files(use_rslora, tmp_path):
    params = {"q": jnp.ones((12, 8)), "v": jnp.ones((12, 4)), "o": jnp.ones((8, 12))}
    lora = adapters.LoRA(
        rank=4, alpha=6, targets="^[qvo]$", use_rslora=use_rslora, dropout=0.25,
        rank_pattern={"v": 2}, alpha_pattern={"o": 10},
    )  # fmt: skip
    names = {leaf: f"m.{leaf}_proj" for leaf in params}
    qlora.write_adapter(tmp_path, qlora.to_peft(lora, lora.init(params, 0), names))
    found, trained = qlora.from_peft(qlora.read_adapter(tmp_path), names)
    assert found.dropout == 0.25 and found.use_rslora == use_rslora
    for leaf in params:
        assert found.rank_of(leaf) == lora.rank_of(leaf)
        assert found.scale_of(leaf) == pytest.approx(lora.scale_of(leaf), rel=1e-12)
    found.attach(params, trained)


def test_what_is_said_of_one_module_is_not_of_those_whose_names_end_so(tmp_path):
    params = {"a": jnp.ones((12, 8)), "b": jnp.ones((12, 8))}
    names = {"a": "q", "b": "enc.q"}
    lora = adapters.LoRA(
        rank=2, alpha=4, targets="^[ab]$", alpha_pattern={"^a$": 10}, rank_pattern={"^a$": 1}
    )
    qlora.write_adapter(tmp_path, qlora.to_peft(lora, lora.init(params, 0), names))
    config = qlora.read_adapter(tmp_path).config
    assert (config.scaling("q"), config.scaling("enc.q")) == (10, 2)


def test_no_adapters_are_no_targets():
    empty = qlora.Adapter(config=qlora.AdapterConfig(r=2), matrices={})
    lora, trained = qlora.from_peft(empty, {})
    assert trained == {}
    with pytest.raises(ValueError, match="must be found in the path of a matrix"):
        lora.init({"x": jnp.ones((8, 8))}, 0)


def test_magnitudes_of_dora_survive(rng):
    params = {"q": jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)}
    lora = adapters.LoRA(rank=2, targets="q", use_dora=True)
    trained = lora.init(params, 0)
    found, again = qlora.from_peft(qlora.to_peft(lora, trained, {"q": "q"}), {"q": "q"})
    assert found.use_dora
    np.testing.assert_array_equal(again["q"]["magnitude"], trained["q"]["magnitude"])


def test_adapters_train_in_float32_whatever_the_file():
    pair = {"a": np.ones((2, 4), jnp.bfloat16), "b": np.ones((2, 4), jnp.bfloat16)}
    adapter = qlora.Adapter(config=qlora.AdapterConfig(r=2), matrices={"q": pair})
    _, trained = qlora.from_peft(adapter, {"q": "q"})
    assert {x.dtype for x in trained["q"].values()} == {np.dtype(np.float32)}


def test_starts_that_change_the_base_are_refused():
    pair = {"a": np.ones((2, 4)), "b": np.ones((2, 4))}
    config = qlora.AdapterConfig(r=2, init_lora_weights="pissa_niter_4")
    with pytest.raises(ValueError, match="got 'pissa_niter_4': PEFT converts"):
        qlora.from_peft(qlora.Adapter(config=config, matrices={"q": pair}), {"q": "q"})
    table = adapters.LoRA(rank=2, targets="embedding")
    params = {"embed": {"embedding": jnp.ones((8, 4))}}
    with pytest.raises(ValueError, match=r"not written: \['embed/embedding'\]"):
        qlora.to_peft(table, table.init(params, 0), {"embed/embedding": "embed"})


def test_what_has_no_place():
    params = {"q": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}}
    names = {"q/kernel": "q"}
    lora = adapters.LoRA(rank=2, targets="kernel", bias="all")
    with pytest.raises(ValueError, match=r"no place here: \['q/bias'\]"):
        qlora.to_peft(lora, lora.init(params, 0), names)
    pissa = adapters.LoRA(rank=2, targets="kernel", init_lora_weights="pissa")
    with pytest.raises(ValueError, match="'pissa' has changed the base"):
        qlora.to_peft(pissa, {}, names)
    with pytest.raises(ValueError, match="names must have all leaves with adapters"):
        plain = adapters.LoRA(rank=2, targets="kernel")
        qlora.to_peft(plain, plain.init(params, 0), {})
    pair = {"a": np.ones((2, 4)), "b": np.ones((2, 4))}
    config = qlora.AdapterConfig(r=2, alpha_pattern={"q.0": 3})
    stack = qlora.Adapter(config=config, matrices={"q.0": pair, "q.1": pair})
    with pytest.raises(ValueError, match="'q' is a stack, whose scalings differ"):
        qlora.from_peft(stack, {"q": ["q.0", "q.1"]})
    others = qlora.Adapter(config=config, matrices={}, others={"head.weight": np.ones(2)})
    with pytest.raises(ValueError, match=r"be empty here: \['head.weight'\]"):
        qlora.from_peft(others, {})
