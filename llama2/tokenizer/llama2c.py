"""llama2.c's `tokenizer.bin`: for every id a score and the bytes of its piece, no types, no names.

    u32 longest piece in bytes | per id: f32 score, u32 length, bytes     (little-endian)

Ids 0, 1, 2 are unknown, begin and end by convention. Source: karpathy/llama2.c tokenizer.py.
"""

import struct
import warnings

from llama2.errors import TokenizerError
from llama2.tokenizer.vocabulary import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, Vocabulary, byte_value


def from_bin(data: bytes, *, name: str) -> Vocabulary:
    """Read the bytes of a `tokenizer.bin`. Raises TokenizerError where entries do not fill the file exactly."""
    entries = list(_entries(data, name))
    if len(entries) < 3:
        raise TokenizerError(f"{name}: {len(entries)} pieces; wanted at least <unk>, <s> and </s>")
    pieces = [piece.strip("\n") if i in (1, 2) else piece.replace(" ", SPACE) for i, (_, piece) in enumerate(entries)]
    all_bytes = sum(byte_value(piece) is not None for piece in pieces) == 256
    types = [BYTE if all_bytes and byte_value(piece) is not None else NORMAL for piece in pieces]
    types[:3] = UNKNOWN, CONTROL, CONTROL
    scores = tuple(score for score, _ in entries)
    return Vocabulary("spm", tuple(pieces), tuple(types), scores, bos_id=1, eos_id=2, unk_id=0)


def _entries(data: bytes, name: str):
    at, longest = 4, int.from_bytes(data[:4], "little")
    while at < len(data):
        try:
            score, length = struct.unpack_from("<fI", data, at)
            if length > longest or at + 8 + length > len(data):
                raise ValueError(f"a piece of {length} bytes, longest announced {longest}")
            yield score, data[at + 8 : at + 8 + length].decode("utf-8")
        except (struct.error, ValueError) as error:
            raise TokenizerError(
                f"{name}: not a llama2.c tokenizer ({error}, at byte {at}); the file is damaged or of another kind"
            ) from None
        at += 8 + length


def to_bin(vocabulary: Vocabulary) -> bytes:
    """Return the bytes of a `tokenizer.bin`. Raises TokenizerError where the format cannot say what must be said."""
    _check(vocabulary)
    if vocabulary.remove_extra_spaces or not vocabulary.add_dummy_prefix:
        warnings.warn(
            "tokenizer.bin cannot say how spaces at the ends and in rows are treated: llama2.c adds one in front and "
            "keeps them all, so text with such spaces gets other ids",
            stacklevel=2,
        )
    texts = []
    for i, piece in enumerate(vocabulary.pieces):
        texts.append((f"\n{piece}\n" if i in (1, 2) else piece.replace(SPACE, " ")).encode("utf-8"))
    scored = zip(vocabulary.scores, texts, strict=True)
    entries = (struct.pack("<fI", score, len(text)) + text for score, text in scored)
    return struct.pack("<I", max(map(len, texts))) + b"".join(entries)


def _check(vocabulary: Vocabulary) -> None:
    wanted = [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (len(vocabulary.pieces) - 3)
    if BYTE in vocabulary.types:
        wanted[3:259] = [BYTE] * 256
    for i, (found, want) in enumerate(zip(vocabulary.types, wanted, strict=False)):
        if found != want:
            raise TokenizerError(
                f"cannot be written as tokenizer.bin: {vocabulary.pieces[i]!r} (id {i}) has type {found}, and the "
                f"format takes it for type {want}; write it as model or json"
            )
    if (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id) != (0, 1, 2):
        raise TokenizerError("cannot be written as tokenizer.bin: its unk, bos, eos are not 0, 1, 2; write it as model")
