"""What a tokenizer knows, apart from any file and any engine.

A Vocabulary is plain data: pieces by id, how they merge, which are special. Every format is read
into one and written from one. It encodes nothing and opens nothing.

    kind "spm"    SentencePiece BPE (Llama 1, 2, llama2.c): pieces are text with U+2581 for the
                  space; the adjacent pair whose union has the best score merges first
    kind "bytes"  byte-level BPE (Llama 3): pieces are bytes, each written as one printable
                  character (GPT-2's alphabet); the earliest merge in a list goes first
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from llama2.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces, numbered as in SentencePiece and GGUF."""

SPACE = "\u2581"

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Source:
    """The file a vocabulary was read from, kept where it says more than a Vocabulary can."""

    format: Literal["model", "json"]
    data: bytes


@dataclass(frozen=True)
class Vocabulary:
    """Pieces and rules; ids are positions, so they cannot have holes. Raises TokenizerError when inconsistent."""

    kind: Literal["spm", "bytes"]
    pieces: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    """One per piece, for "spm"; higher merges first."""
    merges: tuple[str, ...] = ()
    """`left right`, for "bytes"; earlier merges first."""
    split: str = ""
    """For "bytes": the regular expression that cuts text into the chunks that merges stay within."""
    ignore_merges: bool = False
    """For "bytes": a chunk that is itself a piece is taken whole, as tiktoken does."""
    add_dummy_prefix: bool = True
    remove_extra_spaces: bool = False
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer besides `eos_id`, where the files name some."""
    add_bos: bool | None = None
    add_eos: bool | None = None
    chat_template: str | None = None
    source: Source | None = None
    unportable: str = ""
    """Why this can be written only in the format it came in; empty where it can be written in others."""

    def __post_init__(self):
        n = len(self.pieces)
        if not n or len(self.types) != n or (self.kind == "spm" and len(self.scores) != n):
            raise TokenizerError(
                f"vocabulary of {n} pieces with {len(self.types)} types and {len(self.scores)} scores; "
                "one of each per piece is wanted: the file is damaged, fetch it again"
            )
        if len(set(self.pieces)) != n:
            first = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}
            again = next(i for i, piece in enumerate(self.pieces) if first[piece] != i)
            raise TokenizerError(
                f"piece {self.pieces[again]!r} stands twice in the vocabulary, at ids {first[self.pieces[again]]} "
                f"and {again}; every id needs a piece of its own"
            )
        if "" in self.pieces:
            raise TokenizerError(f"piece {self.pieces.index('')} of the vocabulary is empty; the file is damaged")
        for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
            check_id(getattr(self, name), n, name)
        for stop_id in self.stop_ids:
            check_id(stop_id, n, "a stop id")
        if self.kind == "spm":
            self._check_spm()

    def _check_spm(self) -> None:
        if self.types.count(UNKNOWN) != 1 or self.unk_id is None or self.types[self.unk_id] != UNKNOWN:
            raise TokenizerError("a SentencePiece vocabulary has exactly one unknown piece, usually <unk> at id 0")
        if not all(-3e38 < score < 3e38 for score in self.scores):
            raise TokenizerError("a score of the vocabulary is not a finite number; the file is damaged")
        n_bytes = self.types.count(BYTE)
        if n_bytes not in (0, 256) or any(byte_value(self.pieces[i]) is None for i in self.ids_of(BYTE)):
            raise TokenizerError(f"{n_bytes} byte pieces; wanted all 256 of <0x00>..<0xFF>, or none")

    def ids_of(self, piece_type: int) -> Iterator[int]:
        return (i for i, found in enumerate(self.types) if found == piece_type)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Names that text never becomes unless it is asked to."""
        return {self.pieces[i]: i for i in self.ids_of(CONTROL)}

    @cached_property
    def ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}


def check_id(token_id: int | None, n_vocab: int, name: str) -> None:
    """Raise TokenizerError unless the id is None or inside the vocabulary."""
    if token_id is not None and not 0 <= token_id < n_vocab:
        raise TokenizerError(f"{name}={token_id} is outside the vocabulary of {n_vocab}; wanted 0..{n_vocab - 1}")


def byte_value(piece: str) -> int | None:
    """Return 65 for `<0x41>`, None for anything else."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        digits = piece[3:5]
        if all(digit in "0123456789ABCDEF" for digit in digits):
            return int(digits, 16)
    return None


def _printable_bytes() -> dict[int, str]:
    """GPT-2's alphabet: a printable byte stands for itself, the others for U+0100 and on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


CHAR_OF_BYTE = _printable_bytes()
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}


def spell_bytes(data: bytes) -> str:
    """Write bytes in GPT-2's alphabet, as pieces of kind "bytes" are written."""
    return "".join(CHAR_OF_BYTE[byte] for byte in data)


def spelled_bytes(piece: str) -> bytes:
    """Read a piece of kind "bytes"; one with a foreign character stands for its own UTF-8."""
    if all(char in BYTE_OF_CHAR for char in piece):
        return bytes(BYTE_OF_CHAR[char] for char in piece)
    return piece.encode("utf-8")


def splits(piece: str, known: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return all ways to make a piece of two known ones, in the order of the parts' ids."""
    pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
    pairs = [(left, right) for left, right in pairs if left in known and right in known]
    return sorted(pairs, key=lambda pair: (known[pair[0]], known[pair[1]]))


def merges_by_id(pieces: Mapping[str, int]) -> tuple[str, ...]:
    """Return the merges of byte-level ranks: a piece with a lower id is made earlier."""
    ordered = sorted(pieces, key=pieces.__getitem__)
    return tuple(f"{left} {right}" for piece in ordered for left, right in splits(piece, pieces))


def merges_by_score(vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return the merges of a SentencePiece vocabulary: a piece with a higher score is made earlier."""
    known = {vocabulary.pieces[i]: i for i in vocabulary.ids_of(NORMAL)}
    ordered = sorted(known, key=lambda piece: -vocabulary.scores[known[piece]])
    return tuple(f"{left} {right}" for piece in ordered for left, right in splits(piece, known))


def guarded(types: Sequence[int], *role_ids: int | None) -> tuple[int, ...]:
    """Return the types with BOS and EOS made special: some files list them as ordinary pieces."""
    found = list(types)
    for token_id in role_ids:
        if token_id is not None and 0 <= token_id < len(found) and found[token_id] in (NORMAL, USER_DEFINED):
            found[token_id] = CONTROL
    return tuple(found)


def with_added(vocabulary: Vocabulary, added: Mapping[int, tuple[str, bool]], *, origin: str) -> Vocabulary:
    """Return the vocabulary with tokens that other files add or rename: id -> (name, is special)."""
    pieces, types, scores = list(vocabulary.pieces), list(vocabulary.types), list(vocabulary.scores)
    for token_id, (name, special) in sorted(added.items()):
        if token_id == len(pieces):
            pieces.append(name)
            types.append(CONTROL if special else USER_DEFINED)
            scores += [0.0] * (vocabulary.kind == "spm")
        elif not 0 <= token_id < len(pieces):
            raise TokenizerError(
                f"{origin}: {name!r} has id {token_id}, but the next free id is {len(pieces)}; ids may not have holes"
            )
        elif pieces[token_id] != name and types[token_id] in (NORMAL, BYTE):
            raise TokenizerError(
                f"{origin}: id {token_id} is called {name!r}, but the vocabulary has {pieces[token_id]!r} there; "
                "the two files are not of the same tokenizer"
            )
        else:
            pieces[token_id] = name
            if special and types[token_id] not in (UNKNOWN, BYTE):
                types[token_id] = CONTROL
    return replace(vocabulary, pieces=tuple(pieces), types=tuple(types), scores=tuple(scores))
