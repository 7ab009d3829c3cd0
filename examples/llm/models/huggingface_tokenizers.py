"""The tokenizers in Hugging Face's folders."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer

from examples.llm.errors import UsageError
from examples.llm.models.json_files import read_object

# What files call special tokens, in those of RoBERTa, OPT and LLaMA, and in those of BERT.
_NAMES = {
    "begin": ("<s>", "[CLS]"),
    "end": ("</s>", "[SEP]"),
    "pad": ("<pad>", "[PAD]"),
    "mask": ("<mask>", "[MASK]"),
}


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read `tokenizer.json`; without it, `vocab.txt` of BERT, or `vocab.json` and `merges.txt`.

    Raises:
      UsageError: there are no such files, or they can't be read.
    """
    for names, read in (
        (["tokenizer.json"], lambda path: Tokenizer.from_file(str(path))),
        (["vocab.txt"], _word_pieces),
        (["vocab.json", "merges.txt"], _byte_pairs),
    ):
        paths = [folder / name for name in names]
        if not all(path.is_file() for path in paths):
            continue
        try:
            tokenizer = read(*paths)
        except UsageError:
            raise
        except Exception as error:  # what the library raises is of no narrower type
            raise UsageError(f"--model: cannot read {paths[0]}: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    raise UsageError(
        f"--model: {folder} has no tokenizer.json, nor vocab.txt, nor vocab.json and merges.txt"
    )


def known_token(tokenizer: Tokenizer, role: str) -> int | None:
    """Return the token that has a role by its usual name: begin, end, pad or mask."""
    found = map(tokenizer.token_to_id, _NAMES[role])
    return next((token for token in found if token is not None), None)


def puts_in_front(folder: Path, tokenizer: Tokenizer, token: int | None) -> bool:
    """Return whether the model's own tokenizer puts this token in front of a text."""
    if token is None:
        return False
    return token in tokenizer.encode("a").ids or _settings(folder).get("add_bos_token") is True


def _word_pieces(vocabulary: Path) -> Tokenizer:
    lower = _settings(vocabulary.parent).get("do_lower_case", True) is True
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=lower)
    return Tokenizer.from_str(tokenizer.to_str())


def _byte_pairs(vocabulary: Path, merges: Path) -> Tokenizer:
    made = ByteLevelBPETokenizer(str(vocabulary), str(merges))
    tokenizer = Tokenizer.from_str(made.to_str())
    special = [name for names in _NAMES.values() for name in names]
    tokenizer.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name in special
            if tokenizer.token_to_id(name) is not None
        ]
    )
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    """What is in `tokenizer_config.json`; empty if there is none."""
    path = folder / "tokenizer_config.json"
    return read_object(path) if path.is_file() else {}
