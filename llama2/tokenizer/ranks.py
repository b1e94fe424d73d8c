"""tiktoken's rank file, `tokenizer.model` of Llama 3: lines of `base64 rank`.

The file holds no special tokens; their names are said here. Source: meta-llama/llama3
tokenizer.py, meta-llama/llama-models tokenizer.py.
"""

import base64
import binascii

from llama2.errors import TokenizerError
from llama2.tokenizer.vocabulary import (
    CONTROL,
    LLAMA3_SPLIT,
    NORMAL,
    Vocabulary,
    merges_by_id,
    spell_bytes,
    spelled_bytes,
)

N_SPECIAL = 256
_NAMED = {
    "3": {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"},
    "3.1": {
        0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 5: "step_id", 6: "start_header_id",
        7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag", 11: "image",
    },
}  # fmt: skip


def special_names(version: str) -> list[str]:
    """Return the 256 names that follow the ranks, for Llama "3" or "3.1" (and later)."""
    if version not in _NAMED:
        raise TokenizerError(f'llama3_names={version!r} is unknown; wanted "3" or "3.1"')
    named, n_reserved, names = _NAMED[version], 0, []
    for i in range(N_SPECIAL):
        names.append(f"<|{named.get(i, f'reserved_special_token_{n_reserved}')}|>")
        n_reserved += i not in named
    return names


def looks_like_ranks(data: bytes) -> bool:
    """Say whether the first line is `base64 rank`."""
    parts = data[:512].split(b"\n", 1)[0].split()
    return len(parts) == 2 and parts[1].isdigit()


def from_ranks(data: bytes, *, name: str, version: str) -> Vocabulary:
    """Read ranks and add the special tokens. Raises TokenizerError on a damaged line, a hole or a lost byte."""
    ranks = _parse(data, name)
    pieces = [spell_bytes(token) for token, _ in sorted(ranks.items(), key=lambda item: item[1])]
    names, n = special_names(version), len(ranks)
    padding = "<|finetune_right_pad_id|>"
    return Vocabulary(
        kind="bytes",
        pieces=(*pieces, *names),
        types=(NORMAL,) * n + (CONTROL,) * N_SPECIAL,
        merges=merges_by_id({piece: i for i, piece in enumerate(pieces)}),
        split=LLAMA3_SPLIT,
        ignore_merges=True,
        bos_id=n,
        eos_id=n + 1,
        pad_id=n + names.index(padding) if padding in names else None,
        stop_ids=tuple(n + i for i, stop in enumerate(names) if stop in ("<|eom_id|>", "<|eot_id|>")),
        add_bos=True,
    )


def _parse(data: bytes, name: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            key = base64.b64decode(token, validate=True)
            if key in ranks or int(rank) != len(ranks):
                raise ValueError("a token or a rank stands twice, or ranks are out of order")
            ranks[key] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"{name}: line {number} is {line[:40]!r} ({error}); wanted `base64 rank` with ranks 0, 1, 2, ...: "
                "the file is damaged, fetch it again"
            ) from None
    lost = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lost:
        raise TokenizerError(f"{name}: no rank for {len(lost)} of the 256 bytes; the file is cut off, fetch it again")
    return ranks


def to_ranks(vocabulary: Vocabulary) -> bytes:
    """Return the bytes of a rank file. Raises TokenizerError where ranks cannot give the same ids."""
    n = vocabulary.types.index(CONTROL) if CONTROL in vocabulary.types else len(vocabulary.types)
    pieces = {piece: i for i, piece in enumerate(vocabulary.pieces[:n])}
    problem = vocabulary.unportable
    if any(piece_type != NORMAL for piece_type in vocabulary.types[:n]) or NORMAL in vocabulary.types[n:]:
        problem = "its special tokens do not follow all others"
    elif vocabulary.split != LLAMA3_SPLIT or not vocabulary.ignore_merges:
        problem = "it does not cut text as Llama 3 does"
    elif not _same_order(vocabulary.merges, merges_by_id(pieces)):
        problem = "its merges are not in the order of its ids"
    if problem:
        raise TokenizerError(f"cannot be written as tiktoken ranks: {problem}; write it as json")
    lines = (base64.b64encode(spelled_bytes(piece)) + b" %d\n" % i for piece, i in pieces.items())
    return b"".join(lines)


def _same_order(merges: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    made = list(dict.fromkeys(merge.replace(" ", "") for merge in merges))
    return set(merges) == set(wanted) and made == list(dict.fromkeys(merge.replace(" ", "") for merge in wanted))
