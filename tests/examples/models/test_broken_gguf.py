"""Broken and hostile GGUF files: a UsageError that names the file and the field, at little cost."""

import random
import re
import resource
import signal
import struct
import tracemalloc
from pathlib import Path

import gguf
import jax
import pytest

from examples.llm.errors import UsageError
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.tokenizer import read_tokenizer

MIB = 2**20
UINT8, INT32, UINT32, FLOAT32, STRING, ARRAY, UINT64 = 0, 5, 4, 6, 8, 9, 10
MODEL, SCORES = "tokenizer.ggml.model", "tokenizer.ggml.scores"
F32, Q4_0, UNKNOWN, I32 = 0, 2, 4, 26  # types of tensors; 4 is no longer one


@pytest.fixture(scope="module")
def whole_size(tiny_gguf):
    """Of the whole file's parameters. JAX then has all the memory that it wants at its start."""
    return read_all(tiny_gguf)


@pytest.fixture(autouse=True)
def limits(whole_size):
    """Half a minute, and a gigabyte beyond what is there; a hang or a huge list can't go on."""

    def out_of_time(*_):
        raise TimeoutError("a broken file took more than half a minute")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, out_of_time)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, hard))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read_all(path):
    """Everything that is read of a file; bytes of the parameters."""
    model = GGUFModel(path)
    parameters = model.parameters()
    read_tokenizer(model)
    return sum(x.nbytes for x in jax.tree.leaves(parameters))


@pytest.fixture
def broken(tmp_path):
    """`broken(content)`: the message with which a file is refused, which must name it."""

    def of(content):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        tracemalloc.start()
        try:
            with pytest.raises(UsageError) as error:
                read_all(path)
            assert tracemalloc.get_traced_memory()[1] < 8 * MIB
        finally:
            tracemalloc.stop()
        message = str(error.value)
        assert message.startswith("--model: ") and str(path) in message
        assert len(message) < 1000 and "\n" not in message
        return message

    return of


@pytest.fixture(scope="module")
def whole(tiny_gguf):
    return tiny_gguf.read_bytes()


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def field(name, kind, value):
    return string(name) + struct.pack("<I", kind) + value


def array(kind, count, values=b""):
    return struct.pack("<IQ", kind, count) + values


def u32(*numbers):
    return struct.pack(f"<{len(numbers)}I", *numbers)


def u64(*numbers):
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def header(*parts, tensors=0, fields=0, version=3):
    return b"GGUF" + u32(version) + u64(tensors, fields) + b"".join(parts)


def tensor(name, shape, kind=F32, offset=0):
    return string(name) + u32(len(shape)) + u64(*shape) + u32(kind) + u64(offset)


def with_field(path, name, content):
    """The file with another field of this name, or with one more field."""
    data, reader = path.read_bytes(), gguf.GGUFReader(path)
    last = reader.tensors[-1].field
    end = last.offset + sum(part.nbytes for part in last.parts)
    old = reader.get_field(name)
    start = stop = 24  # after the counts
    if old is None:
        data = data[:16] + u64(reader.get_field("GGUF.kv_count").contents() + 1) + data[24:]
    else:
        start, stop = old.offset, old.offset + sum(part.nbytes for part in old.parts)
    changed = data[:start] + content + data[stop:end]
    return changed + bytes(-len(changed) % 32) + data[reader.data_offset :]


def test_a_file_with_something_broken(whole, whole_size, tmp_path):
    rng = random.Random(0)
    end = whole.index(b"blk.1.ffn_down.weight") + 100  # of the header, the last name in it
    path = tmp_path / "model.gguf"
    refused = 0
    for turn in range(240):
        content = bytearray(whole)
        at = rng.randrange(end)
        if turn % 4 == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif turn % 4 == 1:
            content[at : at + 8] = rng.choice([0, 2**20, 2**62, 2**64 - 1]).to_bytes(8, "little")
        elif turn % 4 == 2:
            del content[rng.choice([at, rng.randrange(len(whole))]) :]
        else:
            del content[at : at + rng.randrange(1, 9)]
        path.write_bytes(content)
        try:
            assert read_all(path) == whole_size
        except UsageError as error:
            refused += 1
            assert str(path) in str(error) and len(str(error)) < 1000
    assert refused > 150


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "it is empty"),
        (b"GGU", "no GGUF"),
        (b"not a model at all", "no GGUF"),
        (b"GGUF", "the file ends within version: 4 bytes, of which it has 0"),
        (header(version=1), "version must be one of"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "version must be one of"),
        (header(tensors=2**63), "tensor_count must be at most 65536"),
        (header(fields=2**63), "kv_count must be at most 65536"),
        (header(fields=1), "ends within the name of field 1"),
        (header(u64(2**63), fields=1), "ends within the name of field 1"),
        (header(u64(1) + b"\xff", fields=1), "the name of field 1 has bytes that are no UTF-8"),
        (header(field("a", STRING, u64(2**40)), fields=1), "ends within a: 1099511627776 bytes"),
        (header(field("a", STRING, u64(1) + b"\xff"), fields=1), "a has bytes that are no UTF-8"),
        (header(field("a", 99, b""), fields=1), "a has values of type 99"),
        (header(field("a", UINT64, bytes(4)), fields=1), "ends within a: 8 bytes"),
        (header(field("a" * 5000, 99, b""), fields=1), r"a{100}\.\.\. has values"),
        (header(field("a\nb", 99, b""), fields=1), r"'a\\nb' has values of type 99"),
        # What `gguf` goes round for, item by item, though nothing is left of the file.
        (header(field("a", ARRAY, array(UINT8, 2**62)), fields=1), "at most 1048576 items"),
        (header(field("a", ARRAY, array(UINT8, 2**19)), fields=1), "ends within a: 524288"),
        (header(field("a", ARRAY, array(STRING, 2**19)), fields=1), "ends within a: 8 bytes"),
        (header(field("a", ARRAY, array(ARRAY, 1)), fields=1), "a has values of type 9"),
        (
            header(*(field(name, ARRAY, array(UINT8, 2**20, bytes(2**20))) for name in "ab"),
                   fields=2),
            "with b they have 2097152",
        ),
        (header(field("a", UINT32, u32(1)) * 2, fields=2), "a is there twice"),
        (header(field("GGUF.version", UINT32, u32(1)), fields=1), "GGUF.version is there twice"),
        (header(field("general.alignment", UINT32, u32(0)), fields=1), "power of two .* is 0"),
        (header(field("general.alignment", UINT32, u32(24)), fields=1), "power of two .* is 24"),
        (header(field("general.alignment", UINT32, u32(2**31)), fields=1), "power of two up to"),
        (header(field("general.alignment", UINT64, u64(32)), fields=1), "must be of type 4"),
        (header(tensor("t", [1] * 5), tensors=1), "t must have 1 to 4 axes, has 5"),
        (header(string("t") + u32(2**31), tensors=1), "t must have 1 to 4 axes"),
        (header(tensor("t", []), tensors=1), "t must have 1 to 4 axes, has 0"),
        (header(tensor("t", [4], kind=UNKNOWN), tensors=1), "t is of type 4"),
        (header(tensor("t", [33], kind=Q4_0), tensors=1), r"impossible shape \[33\]"),
        (header(tensor("t", [4, 0]), tensors=1), "impossible shape"),
        # 2**64 elements: none, in 64 bits.
        (header(tensor("t", [2**32, 2**32]), tensors=1), f"t ends at byte {2**66}"),
        (header(tensor("t", [8], offset=2**64 - 32), bytes(99), tensors=1), "t ends at byte"),
        (header(tensor("t", [9]), bytes(32), tensors=1), "byte 36 of the data, which has 25"),
        (header(tensor("t", [1]) * 2, bytes(64), tensors=2), "t is there twice"),
        (
            header(tensor("t", [8]), tensor("u", [8], offset=16), bytes(99), tensors=2),
            "u starts at byte 16, within another tensor",
        ),
        (header(), "has no field general.architecture|general.architecture must be llama"),
    ],
)  # fmt: skip
def test_impossible_headers(broken, content, complaint):
    assert re.search(complaint, broken(content))


@pytest.mark.parametrize(
    ("name", "kind", "value", "complaint"),
    [
        ("general.architecture", STRING, string("mamba"), "must be llama.*, is mamba"),
        ("general.architecture", STRING, string("x" * 99999), r"is x{100}\.\.\."),
        ("llama.block_count", UINT32, u32(0), "must be a positive integer, is 0"),
        ("llama.block_count", UINT32, u32(2**31), "must be a positive integer"),
        ("llama.block_count", UINT32, u32(10**9), "must be at most 20, the tensors"),
        ("llama.block_count", UINT32, u32(3), r"has no tensor blk\.2\."),
        ("llama.embedding_length", INT32, struct.pack("<i", -64), "positive integer, is -64"),
        ("llama.embedding_length", UINT32, u32(32), r"token_embd\.weight must be \(264, 32\)"),
        ("llama.embedding_length", STRING, string("64"), "positive integer, is 64"),
        ("llama.feed_forward_length", FLOAT32, struct.pack("<f", 128), "is 128.0"),
        ("llama.feed_forward_length", UINT32, u32(64), r"ffn_down\.weight must be \(64, 64\)"),
        ("llama.attention.head_count", UINT32, u32(2**30), "key_length must be a positive"),
        ("llama.attention.head_count", UINT32, u32(3), "num_heads must be a multiple"),
        ("llama.attention.head_count_kv", ARRAY, array(UINT32, 1, u32(2)), r"is \[2\]"),
        ("llama.attention.head_count_kv", UINT32, u32(1), r"attn_k\.weight must be \(16, 64\)"),
        ("llama.rope.freq_base", FLOAT32, struct.pack("<f", float("nan")), "is nan"),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, struct.pack("<f", -1), "positive"),
        ("tokenizer.ggml.model", STRING, string("bert"), "must be gpt2 or llama"),
        ("tokenizer.ggml.model", STRING, string("llama"), "has no field tokenizer.ggml.scores"),
        ("llama.rope.scaling.type", STRING, string("yarn"), "must be none or linear, is yarn"),
        ("llama.rope.scaling.type", STRING, string("linear"), "no field llama.rope.scaling.factor"),
        ("llama.rope.dimension_count", UINT32, u32(8), "must be 16, the size of a head, is 8"),
        ("llama.attention.value_length", UINT32, u32(8), "must be 16, the size of a head, is 8"),
        ("llama.expert_count", UINT32, u32(8), "must be 0: .*, is 8"),
        ("tokenizer.ggml.pre", UINT8, b"\0", "must be smollm"),
        ("tokenizer.ggml.tokens", ARRAY, array(STRING, 0), "vocabulary_size must be at least 1"),
        ("tokenizer.ggml.tokens", ARRAY, array(UINT8, 2, b"ab"), "must be an array of strings"),
        ("tokenizer.ggml.tokens", STRING, string("tokens"), "must be an array of strings"),
        ("tokenizer.ggml.tokens", ARRAY, array(STRING, 264, string("a") * 264), "that differ"),
        ("tokenizer.ggml.token_type", ARRAY, array(UINT8, 3, b"\1\1\1"), "array of 264, one for"),
        ("tokenizer.ggml.merges", ARRAY, array(STRING, 1, string("a")), "make a token, is a"),
        ("tokenizer.ggml.merges", ARRAY, array(STRING, 1, string("a b")), "make a token, is a b"),
        ("tokenizer.ggml.merges", UINT32, u32(1), "must be an array of strings"),
    ],
)
def test_fields_that_do_not_fit(broken, tiny_gguf, name, kind, value, complaint):
    message = broken(with_field(tiny_gguf, name, field(name, kind, value)))
    assert re.search(complaint, message)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("scores", array(FLOAT32, 2, bytes(8)), "an array of 264 finite floats"),
        ("scores", array(FLOAT32, 264, b"\xff" * 1056), "an array of 264 finite floats"),
        ("scores", array(UINT32, 264, bytes(1056)), "an array of 264 finite floats"),
        (
            "tokens",
            array(STRING, 264, b"".join(string(129 * "x" + str(n)) for n in range(264))),
            "tokens of at most 128 characters, is x{100}",
        ),
    ],
)
def test_sentence_pieces_that_do_not_fit(broken, tiny_gguf, tmp_path, name, content, complaint):
    path = tmp_path / "other.gguf"
    path.write_bytes(with_field(tiny_gguf, MODEL, field(MODEL, STRING, string("llama"))))
    if name != "scores":
        scores = field(SCORES, ARRAY, array(FLOAT32, 264, bytes(1056)))
        path.write_bytes(with_field(path, SCORES, scores))
    name = f"tokenizer.ggml.{name}"
    assert re.search(complaint, broken(with_field(path, name, field(name, ARRAY, content))))


def test_a_tensor_that_is_missing_or_of_numbers_that_are_no_weights(broken, whole):
    name = "output_norm.weight"
    assert re.search(f"has no tensor {name}", broken(whole.replace(name.encode(), b"x" * 18)))
    floats, integers = (tensor(name, [64], kind)[:-8] for kind in (F32, I32))
    assert floats in whole
    complaint = f"{name} is I32, which gguf cannot expand"
    assert re.search(complaint, broken(whole.replace(floats, integers)))


def test_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(UsageError, match=f"cannot read {path}: it is no file"):
            GGUFModel(path)


def test_the_helper_changes_nothing_else(tiny_gguf, whole_size, tmp_path):
    for name in ("llama.block_count", "something.new"):
        path = tmp_path / "model.gguf"
        path.write_bytes(with_field(tiny_gguf, name, field(name, UINT32, u32(2))))
        assert read_all(path) == whole_size
