"""Tokenizers of SentencePiece: pairs are merged by the scores of what they make."""

from collections.abc import Collection, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

# What stands for a space in a piece.
SPACE = "▁"
# Longer pieces are none of SentencePiece's, and each of their parts is looked up.
LONGEST_PIECE = 128


def sentence_piece_tokenizer(
    pieces: Sequence[str],
    scores: Sequence[float],
    *,
    special: Collection[int],
    unknown: int | None = None,
    in_front: bool = True,
) -> Tokenizer:
    """Build a tokenizer; what no piece is made for becomes the bytes `<0x00>` to `<0xFF>`.

    Of two pairs that make the same piece and share a token, as in "aaa", SentencePiece merges the
    first, and this tokenizer the one whose first part is shorter.

    Args:
      pieces: different from each other, with `SPACE` for spaces, none above `LONGEST_PIECE`.
      scores: of the pieces; of pairs, the one whose piece has the highest is merged first.
      special: numbers of the pieces that are not made of text.
      unknown: number of the piece for what has no bytes either.
      in_front: whether a space is put in front of a text.
    """
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    plain = [number for number in range(len(pieces)) if number not in special]
    plain.sort(key=lambda number: -scores[number])
    merges = [
        (piece[:place], piece[place:])
        for piece in map(pieces.__getitem__, plain)
        for place in range(1, len(piece))
        if piece[:place] in vocabulary and piece[place:] in vocabulary
    ]
    unknown_piece = None if unknown is None else pieces[unknown]
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token=unknown_piece, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if in_front else spaces
    )
    to_text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if in_front:
        to_text.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(to_text)
    tokenizer.add_special_tokens(
        [AddedToken(pieces[number], special=True, normalized=False) for number in sorted(special)]
    )
    return tokenizer
