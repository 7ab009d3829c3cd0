"""PEFT's adapters in a tree, and a tree's adapters for PEFT."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import adapters, qlora

load_file = pytest.importorskip("safetensors.numpy", reason="safetensors is missing").load_file

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


def test_what_has_no_place():
    params = {"q": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}}
    names = {"q/kernel": "q"}
    lora = adapters.LoRA(rank=2, targets="kernel", bias="all")
    with pytest.raises(ValueError, match="all leaves that train, and not 'q/bias'"):
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
    with pytest.raises(ValueError, match=r"take them out: \['head.weight'\]"):
        qlora.from_peft(others, {})
    part = qlora.Adapter(config=config, matrices={}, others={"n.0.weight": np.ones(2)})
    with pytest.raises(ValueError, match=r"of which \['n.1'\] have no tensors"):
        qlora.from_peft(part, {"norm/scale": ["n.0", "n.1"]})


# What PEFT 0.21 writes of a Llama of width 16 and 20 tokens, with biases: names and shapes.
WRITTEN = {
    "model.embed_tokens.lora_embedding_A": (2, 20),
    "model.embed_tokens.lora_embedding_B": (16, 2),
    "model.layers.0.self_attn.q_proj.base_layer.bias": (16,),
    "model.layers.0.self_attn.q_proj.lora_A.weight": (2, 16),
    "model.layers.0.self_attn.q_proj.lora_B.weight": (16, 2),
    "model.layers.0.self_attn.k_proj.bias": (16,),
    "model.norm.weight": (16,),
    "lm_head.weight": (20, 16),
}
WHOLE = {
    "embed/embedding": "model.embed_tokens",
    "query/kernel": "model.layers.0.self_attn.q_proj",
    "query/bias": "model.layers.0.self_attn.q_proj",
    "key/bias": "model.layers.0.self_attn.k_proj",
    "norm/scale": "model.norm",
    "out/kernel": "lm_head",
}
PARAMS = {
    "embed": {"embedding": jnp.ones((20, 16))},
    "query": {"kernel": jnp.ones((16, 2, 8)), "bias": jnp.ones((2, 8))},
    "key": {"kernel": jnp.ones((16, 16)), "bias": jnp.ones(16)},
    "norm": {"scale": jnp.ones(16)},
    "out": {"kernel": jnp.ones((16, 20))},
}


def test_embeddings_biases_and_saved_modules_are_tensors_of_peft(tmp_path):
    lora = adapters.LoRA(
        rank=2, targets="embedding|query/kernel", bias="all", modules_to_save="norm|out",
        kernel_axes={"query": (1, 2)},
    )  # fmt: skip
    trained = lora.init(PARAMS, 0)
    trained["out/kernel"] = {"value": jnp.arange(320.0).reshape(16, 20)}
    qlora.write_adapter(tmp_path, qlora.to_peft(lora, trained, WHOLE))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model."
    assert {name.removeprefix(prefix): x.shape for name, x in tensors.items()} == WRITTEN
    np.testing.assert_array_equal(
        tensors[f"{prefix}lm_head.weight"], trained["out/kernel"]["value"].T
    )
    table = trained["embed/embedding"]
    np.testing.assert_array_equal(
        tensors[f"{prefix}model.embed_tokens.lora_embedding_B"], table["b"].T
    )

    adapter = qlora.read_adapter(tmp_path)
    assert adapter.config.bias == "all"
    assert adapter.config.modules_to_save == ("model.norm", "lm_head")
    found, again = qlora.from_peft(adapter, WHOLE)
    assert again.keys() == trained.keys()
    again["query/bias"]["value"] = again["query/bias"]["value"].reshape(2, 8)
    for leaf, arrays in trained.items():
        for role, x in arrays.items():
            np.testing.assert_array_equal(again[leaf][role], x)
    # The same leaves would be adapted, and train, anew.
    assert found.init(PARAMS, 0).keys() == trained.keys()
    assert not np.asarray(found.init(PARAMS, 0)["embed/embedding"]["a"]).any()


def test_embeddings_are_not_among_all_linear(tmp_path):
    lora = adapters.LoRA(rank=2, targets="embedding")
    adapter = qlora.to_peft(lora, lora.init(PARAMS, 0), WHOLE)
    config = dataclasses.replace(adapter.config, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"must name 'model\.embed_tokens'"):
        qlora.write_adapter(tmp_path, dataclasses.replace(adapter, config=config))


def test_values_of_stacks_are_tensors_of_their_modules():
    params = {"q": jnp.ones((2, 4, 4)), "norm": {"scale": jnp.arange(6.0).reshape(2, 3)}}
    names = {"q": ["l.0.q", "l.1.q"], "norm/scale": ["l.0.norm", "l.1.norm"]}
    lora = adapters.LoRA(rank=2, targets="q", modules_to_save="norm")
    adapter = qlora.to_peft(lora, lora.init(params, 0), names)
    assert {name: [*x] for name, x in adapter.others.items()} == {
        "l.0.norm.weight": [0, 1, 2], "l.1.norm.weight": [3, 4, 5],
    }  # fmt: skip
    _, again = qlora.from_peft(adapter, names)
    np.testing.assert_array_equal(again["norm/scale"]["value"], params["norm"]["scale"])
