import itertools
import struct
from functools import partial

import gguf
import jax
import numpy as np
import pytest

from examples.llm.errors import UsageError
from examples.llm.models.building import abstract_model, build_model
from examples.llm.models.generation import continue_text, generate
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.llama2c_files import Llama2cModel
from examples.llm.models.opening import open_model
from examples.llm.models.sentence_pieces import sentence_piece_tokenizer
from examples.llm.models.tokenizer import SpecialTokens

# dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len
HEADER = (8, 12, 2, 2, 1, 10, 16)
TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    '  "Übermut", said the 日本 cat;\n\tit cost €5 …  ',
    "the theater's heat, eee! aaaaa",
    "",
)


@pytest.fixture(scope="module")
def stories(shared_dir):
    return shared_dir / "data" / "stories260K"


def test_the_known_story(stories):
    stored = open_model(stories / "stories260K.bin")
    parameters = stored.parameters()
    assert sum(x.size for x in jax.tree.leaves(parameters)) == 260_032
    model = build_model(abstract_model(stored.config)[0], parameters)
    run = partial(jax.jit(partial(generate, count=80, end=1)), model)
    story = continue_text(run, stored.tokenizer(), "", stored.special_tokens())
    assert story.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )


def pieces_of(stories):
    """As they are in the file: pieces of bytes, and scores."""
    data, found = (stories / "tok512.bin").read_bytes()[4:], []
    while data:
        score, length = struct.unpack_from("<fi", data)
        found.append((data[8 : 8 + length], score))
        data = data[8 + length :]
    return found


def encoded_as_in_llama2c(text, pieces):
    """Characters, or their bytes, then the pair with the best score, again and again."""
    numbers, tokens = {piece: number for number, (piece, _) in enumerate(pieces)}, []
    for character in (" " if text else "") + text:
        piece = character.encode()
        tokens += [numbers[piece]] if piece in numbers else [3 + byte for byte in piece]
    while True:
        pairs = [pieces[a][0] + pieces[b][0] for a, b in itertools.pairwise(tokens)]
        scores = [pieces[numbers[pair]][1] if pair in numbers else -np.inf for pair in pairs]
        if not scores or max(scores) == -np.inf:
            return tokens
        place = int(np.argmax(scores))
        tokens[place : place + 2] = [numbers[pairs[place]]]


def test_the_tokenizer_is_that_of_llama2c(stories):
    tokenizer, pieces = Llama2cModel(stories / "stories260K.bin").tokenizer(), pieces_of(stories)
    rng = np.random.default_rng(0)
    letters = [piece.decode() for piece, _ in pieces[259:]] + list("xqéß\n\0")
    random = ["".join(rng.choice(letters, size)) for size in rng.integers(1, 80, 200)]
    for text in (*TEXTS, *random):
        tokens = tokenizer.encode(text).ids
        assert tokens == encoded_as_in_llama2c(text, pieces), text
        assert tokenizer.decode(tokens) == text
    assert tokenizer.encode("<s>the").ids[0] == 1


def test_the_same_pieces_in_a_gguf_file(stories, tmp_path):
    stored, path = Llama2cModel(stories / "stories260K.bin"), tmp_path / "model.gguf"
    own = stored.tokenizer()
    tokens = [own.id_to_token(number) for number in range(512)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([score for _, score in pieces_of(stories)])
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (512 - len(kinds))])
    for name in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{name}_to_file")()
    writer.close()
    tokenizer = GGUFModel(path).tokenizer()
    for text in TEXTS:
        assert tokenizer.encode(text).ids == own.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(("in_front", "tokens"), [(True, ["▁", "ab", "▁a"]), (False, ["ab", "▁a"])])
def test_a_space_in_front_of_a_text(in_front, tokens):
    pieces, scores = ["<unk>", "▁", "a", "b", "ab", "▁a"], [0, -5, -6, -7, -1, -2]
    tokenizer = sentence_piece_tokenizer(pieces, scores, special={0}, unknown=0, in_front=in_front)
    assert tokenizer.encode("ab a").tokens == tokens
    assert tokenizer.decode(tokenizer.encode("ab a").ids) == "ab a"
    assert tokenizer.encode("aé").ids[-1] == 0  # without pieces of bytes


def write_model(path, header=HEADER, change=lambda data: data):
    dim, hidden, layers, heads, kv_heads, vocabulary, length = header
    key, size = dim // max(heads, 1) * kv_heads, dim // max(heads, 1)
    numbers = abs(vocabulary) * dim * (2 if vocabulary < 0 else 1) + dim + length * size
    numbers += layers * (2 * dim + 2 * dim * dim + 2 * key * dim + 3 * dim * hidden)
    weights = np.arange(max(numbers, 0), dtype="<f4") / 1000
    path.write_bytes(change(struct.pack("<7i", *header) + weights.tobytes()))
    return path


def test_a_head_of_its_own(tmp_path):
    stored = Llama2cModel(write_model(tmp_path / "a.bin", (*HEADER[:5], -10, 16)))
    parameters = stored.parameters()
    _, expected = abstract_model(stored.config)
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (parameters, expected)]
    assert shapes[0] == shapes[1]
    # The last in the file, and there (out, in).
    assert parameters["head"]["kernel"][-1, -1] == np.asarray(parameters["head"]["kernel"]).max()
    assert stored.special_tokens() == SpecialTokens(1, 1)


@pytest.mark.parametrize(
    ("header", "change", "message"),
    [
        (HEADER, lambda data: b"", "it has 0 bytes, fewer than a header"),
        (HEADER, lambda data: data[:27], "it has 27 bytes, fewer than a header"),
        (HEADER, lambda data: data[:-1], r"it must have 4604 bytes for .*, has 4603"),
        (HEADER, lambda data: data + b"\0", r"it must have 4604 bytes for .*, has 4605"),
        (
            HEADER,
            lambda data: b"24ka" + data[4:],
            "it is of version 1 or 2, and must be of version 0",
        ),
        ((0, *HEADER[1:]), bytes, "dim must be at least 1, is 0"),
        ((*HEADER[:5], 0, 16), bytes, "vocab_size must be at least 1, is 0"),
        ((*HEADER[:2], -1, *HEADER[3:]), bytes, "n_layers must be at least 1, is -1"),
        ((8, 12, 2, 3, 1, 10, 16), bytes, "n_heads must divide dim, 8, is 3"),
        ((8, 12, 2, 2, 3, 10, 16), bytes, "num_heads must be a multiple of num_key_value_heads"),
        ((8, 12, 2, 8, 1, 10, 16), bytes, "head_size must be even, got 1"),
    ],
)
def test_files_that_are_no_models(tmp_path, header, change, message):
    path = write_model(tmp_path / "a.bin", header, change)
    with pytest.raises(UsageError, match=f"--model: cannot read {path}: {message}"):
        open_model(path)


def test_a_header_of_a_size_that_no_file_has(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(struct.pack("<7i", *[2**30, 2, 2**30, 2**20, 1, 2**30, 2**30]))
    with pytest.raises(UsageError, match=r"it must have \d+ bytes for .*, has 28"):
        open_model(path)
    with pytest.raises(UsageError, match="No such file"):
        open_model(tmp_path / "b.bin")


def piece(text, score=0.0):
    return struct.pack("<fi", score, len(text)) + text


PIECES = [piece(text) for text in (b"<unk>", b"\n<s>\n", b"\n</s>\n", *b"a b c d e f g".split())]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (PIECES[:-1], "it ends before piece 9 of 10"),
        ([*PIECES, b"\0"], "it has 1 bytes more than 10 pieces"),
        ([*PIECES[:-1], PIECES[3]], "pieces must differ from each other"),
        ([*PIECES[:-1], piece(b"\xff")], "piece 9 is not UTF-8"),
        ([*PIECES[:-1], piece(b"g", np.nan)], "piece 9 must have a finite score, has nan"),
        ([*PIECES[:-1], struct.pack("<fi", 0, 2**30)], "piece 9 has an impossible length, 10737"),
        ([*PIECES[:-1], struct.pack("<fi", 0, -1)], "piece 9 has an impossible length, -1"),
    ],
)
def test_files_that_are_no_tokenizers(tmp_path, pieces, message):
    stored = Llama2cModel(write_model(tmp_path / "a.bin"))
    with pytest.raises(UsageError, match=r"there is no tok10\.bin or tokenizer\.bin beside it"):
        stored.tokenizer()
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 7) + b"".join(pieces))
    with pytest.raises(UsageError, match=f"cannot read {tmp_path}/tokenizer.bin: {message}"):
        stored.tokenizer()
