import json
import pathlib
import random
import re
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import qlora
from optax_lowbit.qlora import peft_patterns
from tests.qlora.peft_cases import pair, write

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is missing")

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "lora_qv"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_what_peft_wrote_is_read_and_written_again(tmp_path):
    adapter = qlora.read_adapter(GOLDEN)
    assert (adapter.config.r, adapter.config.lora_alpha) == (8, 16)
    assert adapter.config.target_modules == ("q_proj", "v_proj")
    assert adapter.config.lora_dropout == 0.05
    assert adapter.config.others["base_model_name_or_path"] == "llama"
    assert sorted(adapter.matrices) == [
        f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")
    ]
    tensors = safetensors_numpy.load_file(GOLDEN / "adapter_model.safetensors")
    for module, arrays in adapter.matrices.items():
        key = f"base_model.model.{module}"
        np.testing.assert_array_equal(arrays["a"], tensors[f"{key}.lora_A.weight"])
        np.testing.assert_array_equal(arrays["b"].T, tensors[f"{key}.lora_B.weight"])
    qlora.write_adapter(tmp_path, adapter)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("name", ["lora_qv", "lora_all_linear", "rslora_qv", "dora_all_linear"])
def test_every_real_adapter_is_written_again(shared_dir, tmp_path, name):
    folder = shared_dir / "golden" / "models" / name
    adapter = qlora.read_adapter(folder)
    qlora.write_adapter(tmp_path, adapter)
    for file in FILES:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
    assert adapter.config.use_dora == name.startswith("dora")
    module = "model.layers.0.self_attn.q_proj"
    assert adapter.config.scaling(module) == (16 / 8**0.5 if name == "rslora_qv" else 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_dtypes_and_tensors_of_their_own(tmp_path, dtype):
    matrices = {"x.q": jax.tree.map(lambda x: x.astype(dtype), pair())}
    others = {"head.weight": jnp.ones((3, 2), dtype), "x.q.bias": np.zeros(4, np.float32)}
    write(tmp_path, matrices, others, bias="all", modules_to_save=("head",), target_modules=("q",))
    adapter = qlora.read_adapter(tmp_path)
    assert adapter.config.modules_to_save == ("head",)
    assert adapter.config.target_modules == ("q",)
    for tree, read in ((matrices, adapter.matrices), (others, adapter.others)):
        assert jax.tree.structure(tree) == jax.tree.structure(dict(read))
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(dict(read))):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def test_ranks_and_scalings_follow_patterns_as_in_peft():
    config = qlora.AdapterConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={"q_proj": 4, r"^model\.layers\.1\.mlp": 2, r"layers\.\d+\.k_proj": 16},
        alpha_pattern={"0.q_proj": 1},
    )
    assert config.rank("model.layers.0.q_proj") == 4
    assert config.rank("model.layers.0.xq_proj") == 8
    assert config.rank("model.layers.1.mlp") == 2
    assert config.rank("big.model.layers.1.mlp") == 8
    assert config.rank("model.layers.11.k_proj") == 16
    assert config.scaling("model.layers.0.q_proj") == 1 / 4
    assert config.scaling("model.layers.1.q_proj") == 16 / 4


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"r": 0}, "impossible r: 0"),
        ({"r": True}, "impossible r: True"),
        ({"lora_alpha": float("inf")}, "impossible lora_alpha: inf"),
        ({"lora_alpha": "16"}, "impossible lora_alpha: '16'"),
        ({"use_rslora": 1}, "impossible use_rslora"),
        ({"use_dora": None}, "impossible use_dora"),
        ({"bias": "some"}, "impossible bias: 'some'"),
        ({"lora_dropout": 1.0}, "impossible lora_dropout: 1.0"),
        ({"target_modules": 5}, "impossible target_modules: 5"),
        ({"target_modules": ("",)}, "impossible target_modules"),
        ({"exclude_modules": 5}, "impossible exclude_modules: 5"),
        ({"layers_to_transform": "0"}, "impossible layers_to_transform: .0."),
        ({"layers_to_transform": (0, -1)}, "impossible layers_to_transform"),
        ({"layers_to_transform": 0, "target_modules": "q"}, "impossible layers_to_transform: 0"),
        ({"layers_pattern": "h"}, "impossible layers_pattern: .h."),
        ({"layers_pattern": (1,), "layers_to_transform": 0}, "impossible layers_pattern"),
        ({"modules_to_save": "head"}, "impossible modules_to_save"),
        ({"rank_pattern": {"(a+)+": 2}}, "rank_pattern: a regular expression here may .*, got .*a"),
        ({"rank_pattern": {str(i): 2 for i in range(4097)}}, "at most 4096 keys, has 4097"),
        ({"layers_pattern": "h+", "layers_to_transform": 0}, "impossible layers_pattern: 'h.'"),
        ({"rank_pattern": {"a": 0}}, "impossible rank_pattern"),
        ({"alpha_pattern": {"": 2}}, "impossible alpha_pattern"),
        ({"alpha_pattern": ["a"]}, "impossible alpha_pattern"),
        ({"others": {"r": 2}}, "impossible others"),
        ({"others": {"use_qalora": True}}, "use_qalora must be unset, got True"),
    ],
)
def test_impossible_configs(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        qlora.AdapterConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"r": 3}, r"'x.q' must have shapes a \(3, n\)"),
        ({"use_dora": True}, r"'x.q' must have \['a', 'b', 'magnitude'\] for use_dora=True"),
        ({"rank_pattern": {"q": 1}}, r"'x.q' must have shapes a \(1, n\)"),
        ({"layer_replication": [[0, 1]]}, "layer_replication must be unset"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices must be unset"),
        ({"target_modules": [1]}, "impossible target_modules"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path, fields, complaint):
    write(tmp_path, {"x.q": pair()})
    edit(tmp_path, **fields)
    with pytest.raises(ValueError, match=complaint) as error:
        qlora.read_adapter(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda t: t.pop("base_model.model.x.q.lora_A.weight"),
            r"must have \['a', 'b'\] .* \['b'\]",
        ),
        (
            lambda t: t.update({"x.lora_A.weight": np.ones(1)}),
            "names must begin with",
        ),
        (
            lambda t: t.update({"base_model.model.e.lora_E": np.ones((2, 9))}),
            "'base_model.model.e.lora_E' is none of",
        ),
        (
            lambda t: t.update({"base_model.model.x.q.lora_embedding_A": np.ones((2, 9))}),
            "'x.q' must be linear or an embedding, not both",
        ),
        (
            lambda t: t.update({"base_model.model.x.q.lora_B.weight": np.ones((2, 4, 1, 1))}),
            "must have shapes",
        ),
        (
            lambda t: t.update({"base_model.model.x.q.lora_magnitude_vector": np.ones(4)}),
            "for use_dora=False",
        ),
        (lambda t: t.update({"base_model.model." + "x" * 600: np.ones(4)}), "at most 512 letters"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, complaint):
    write(tmp_path, {"x.q": pair()})
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors_numpy.load_file(path)
    change(tensors)
    safetensors_numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match=complaint) as error:
        qlora.read_adapter(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("matrices", "others", "config", "complaint"),
    [
        ({"x.q": pair(rank=3)}, {}, {}, r"'x.q' must have shapes a \(2, n\)"),
        ({"x.q": pair(magnitude=np.ones(3))}, {}, {"use_dora": True}, "'x.q' must have shapes"),
        ({"x.q": {"a": np.ones((2, 6))}}, {}, {}, r"'x.q' must have \['a', 'b'\]"),
        ({"x.q": pair()}, {}, {"target_modules": ("v",)}, "target_modules must name 'x.q'"),
        ({"x.q": pair()}, {}, {"target_modules": r".*\.v"}, "target_modules must name 'x.q'"),
        (
            {"x.q": pair()},
            {},
            {"exclude_modules": ("q",)},
            "must name .x.q., got .*exclude_modules",
        ),
        (
            {"m.h.0.q": pair(), "m.h.1.q": pair()},
            {},
            {"target_modules": ("q",), "layers_to_transform": 1},
            "must name .m.h.0.q., got .*layers_to_transform",
        ),
        ({"x.q": pair()}, {"y.lora_A.weight": np.ones(1)}, {}, "which is an adapter's"),
    ],
)
def test_what_peft_would_not_find_is_not_written(tmp_path, matrices, others, config, complaint):
    with pytest.raises(ValueError, match=complaint):
        write(tmp_path, matrices, others, **config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, "m.h.0.q m.h.1.q m.h.1.mlp.0.q h.1.q head"),
        ({"target_modules": "all-linear"}, "m.h.0.q m.h.1.q m.h.1.mlp.0.q h.1.q head"),
        ({"target_modules": ("q",)}, "m.h.0.q m.h.1.q m.h.1.mlp.0.q h.1.q"),
        ({"exclude_modules": ("h.1.q",)}, "m.h.0.q m.h.1.mlp.0.q head"),
        ({"exclude_modules": r"m\.h\.1.*"}, "m.h.0.q h.1.q head"),
        # The first number counts, after two names, and not that of an expert.
        ({"target_modules": ("q",), "layers_to_transform": 1}, "m.h.1.q m.h.1.mlp.0.q"),
        ({"target_modules": ("q",), "layers_to_transform": (0,)}, "m.h.0.q"),
        (
            {"target_modules": ("q",), "layers_to_transform": (), "layers_pattern": "h"},
            "m.h.0.q m.h.1.q m.h.1.mlp.0.q h.1.q",
        ),
        (
            {"target_modules": ("q",), "layers_to_transform": (0, 2), "layers_pattern": ("mlp",)},
            "m.h.1.mlp.0.q",
        ),
        (
            {"target_modules": ("q",), "layers_to_transform": 1, "layers_pattern": "h"},
            "m.h.1.q m.h.1.mlp.0.q h.1.q",
        ),
        # A whole name is found in every layer.
        (
            {"target_modules": ("q", "m.h.0.q", "head"), "layers_to_transform": 1},
            "m.h.0.q m.h.1.q m.h.1.mlp.0.q head",
        ),
    ],
)
def test_modules_that_have_adapters_in_peft(fields, found):
    config = qlora.AdapterConfig(**fields)
    modules = "m.h.0.q m.h.1.q m.h.1.mlp.0.q h.1.q head".split()
    assert [module for module in modules if config.targets(module)] == found.split()


def test_what_says_which_modules_have_adapters_comes_back(tmp_path):
    fields = {
        "target_modules": ("q", "v"),
        "exclude_modules": ("h.0.v",),
        "layers_to_transform": (1, 3),
        "layers_pattern": ("h",),
    }
    matrices = {"m.h.1.q": pair(), "m.h.3.v": pair()}
    write(tmp_path, matrices, **fields)
    config = qlora.read_adapter(tmp_path).config
    assert {name: getattr(config, name) for name in fields} == fields
    # The adapters themselves say it of a tree, and their whole names of a file.
    lora, trained = qlora.from_peft(
        qlora.read_adapter(tmp_path), {"1/q/kernel": "m.h.1.q", "3/v/kernel": "m.h.3.v"}
    )
    assert trained.keys() == {"1/q/kernel", "3/v/kernel"}
    again = qlora.to_peft(lora, trained, {"1/q/kernel": "m.h.1.q", "3/v/kernel": "m.h.3.v"})
    assert again.config.layers_to_transform is again.config.exclude_modules is None
    qlora.write_adapter(tmp_path / "again", again)
    assert qlora.read_adapter(tmp_path / "again").config.target_modules == tuple(matrices)


@pytest.mark.parametrize("targets", [("q",), ("x.q",), r"x\..", "all-linear"])
def test_targets_that_peft_finds(tmp_path, targets):
    write(tmp_path, {"x.q": pair()}, target_modules=targets)
    assert qlora.read_adapter(tmp_path).config.target_modules == targets


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    "pattern", ["(", r"x\.(a+)+b", "[", "a{2}", "(" * 99 + ")" * 99, "a" * 9999]
)
def test_patterns_that_may_take_long_are_read_but_not_matched(tmp_path, field, pattern):
    write(tmp_path, {"x." + "a" * 30: pair()})
    edit(tmp_path, **{field: pattern})
    adapter = qlora.read_adapter(tmp_path)
    with pytest.raises(ValueError, match=f"{field}: a regular expression here may have names"):
        qlora.write_adapter(tmp_path / "again", adapter)


def test_patterns_are_those_of_python():
    rng = random.Random(0)
    atoms = ["a", "b", "1", "-", "_", ".", r"\.", r"\d", r"\-"]
    signs = ["", "", "", "*", "+", "?", "*?", "+?"]

    def pattern(depth=0):
        parts = []
        for _ in range(rng.randrange(5)):
            kind = rng.random()
            if kind < 0.2 and depth < 2:
                choices = "|".join(pattern(depth + 1) for _ in range(rng.randrange(1, 4)))
                parts.append(rng.choice(["(", "(?:"]) + choices + ")")
            elif kind < 0.25:
                parts.append(rng.choice("^$"))
            else:
                parts.append(rng.choice(atoms) + rng.choice(signs))
        return "".join(parts)

    found = 0
    for _ in range(2000):
        text, name = pattern(), "".join(rng.choice("ab.1-_") for _ in range(rng.randrange(7)))
        expected = re.fullmatch(text, name), re.match(rf"(.*\.)?({text})$", name)
        assert peft_patterns.matches(text, name) == (expected[0] is not None), (text, name)
        assert peft_patterns.matches_end(text, name) == (expected[1] is not None), (text, name)
        found += expected[1] is not None
    assert found > 200


def test_hostile_patterns_take_no_time(tmp_path):
    write(tmp_path, {f"x.{'a' * 400}{i}": pair() for i in range(5)})
    edit(
        tmp_path,
        target_modules=r"x\..*a*a*a*a*a*a*.*b",
        rank_pattern={f".*k{i}": 2 for i in range(4096)},
    )
    start = time.process_time()
    adapter = qlora.read_adapter(tmp_path)
    with pytest.raises(ValueError, match="target_modules must name"):
        qlora.write_adapter(tmp_path / "again", adapter)
    assert time.process_time() - start < 2


def test_a_config_without_json_leaves_nothing_behind(tmp_path):
    config = qlora.AdapterConfig(r=2, others={"n": np.int64(3)})
    with pytest.raises(TypeError, match=r"config can't be written as JSON: .*int64"):
        qlora.write_adapter(tmp_path, qlora.Adapter(config=config, matrices={"x.q": pair()}))
    assert list(tmp_path.iterdir()) == []


def test_lists_and_numbers_of_numpy(tmp_path):
    fields = {"r": np.int64(2), "lora_alpha": np.float32(3), "rank_pattern": {"v": np.int32(2)}}
    write(tmp_path, {"x.q": pair()}, target_modules=["q", "v"], **fields)
    config = qlora.read_adapter(tmp_path).config
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 3, ("q", "v"))


def test_what_peft_leaves_out_is_no_target():
    config = qlora.AdapterConfig(target_modules="all-linear", modules_to_save=("score",))
    assert config.targets("model.q_proj")
    assert not any(map(config.targets, ["lm_head", "gpt.embed_out", "score", "score.dense"]))


def test_an_adapter_that_is_there_stays(tmp_path):
    write(tmp_path, {"x.q": pair()})
    with pytest.raises(ValueError, match=r"must have no adapter_config\.json yet"):
        write(tmp_path, {"x.v": pair()})
    assert [*qlora.read_adapter(tmp_path).matrices] == ["x.q"]
    with pytest.raises(ValueError, match=r"adapter_config\.json: is no file"):
        qlora.read_adapter(tmp_path / "missing")


def test_a_file_that_cannot_be_written_is_the_systems_error(tmp_path):
    adapter = qlora.Adapter(config=qlora.AdapterConfig(r=2), matrices={"x.q": pair()})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            qlora.write_adapter(tmp_path, adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(tmp_path / "adapter_model.safetensors")
