"""The vocabulary inside a GGUF file: keys `tokenizer.*`.

Knows the meaning of the keys, not how the file holds them (`llama2/files/gguf.py`).
Source: llama.cpp, gguf-py constants.py and llama-vocab.cpp.
"""

from collections.abc import Mapping
from typing import Any

from llama2.errors import TokenizerError
from llama2.tokenizer.document import check_scores
from llama2.tokenizer.vocabulary import (
    BYTE,
    CONTROL,
    GPT2_SPLIT,
    LLAMA3_SPLIT,
    NORMAL,
    UNKNOWN,
    Vocabulary,
    byte_value,
    guarded,
)

TOKENS = "tokenizer.ggml.tokens"
_KEY = "tokenizer.ggml."
_SPLITS = {"llama-bpe": LLAMA3_SPLIT, "llama3": LLAMA3_SPLIT, "llama-v3": LLAMA3_SPLIT, "gpt-2": GPT2_SPLIT}
_ID_KEYS = {
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
    "unk_id": "unknown_token_id",
    "pad_id": "padding_token_id",
}
_NO_ID = 2**32 - 1


def from_gguf_metadata(metadata: Mapping[str, object], *, name: str) -> Vocabulary:
    """Read the keys of a GGUF file. Raises TokenizerError on a tokenizer that is neither Llama 2's nor Llama 3's."""
    model = metadata.get(_KEY + "model")
    if model not in ("llama", "gpt2"):
        raise TokenizerError(f"{name}: tokenizer.ggml.model is {model!r}; wanted 'llama' or 'gpt2'")
    pieces = _texts(metadata, "tokens", name)
    common: dict[str, Any] = {field: _id(metadata, key, name) for field, key in _ID_KEYS.items()}
    common["stop_ids"] = _stop_ids(metadata, name)
    for flag in ("add_bos", "add_eos"):
        value = metadata.get(f"{_KEY}{flag}_token")
        common[flag] = value if isinstance(value, bool) else None
    template = metadata.get("tokenizer.chat_template")
    common["chat_template"] = template if isinstance(template, str) else None
    if model == "llama":
        return _spm(metadata, pieces, common, name)
    return _byte_level(metadata, pieces, common, name)


def _spm(metadata: Mapping[str, object], pieces: tuple[str, ...], common: dict[str, Any], name: str) -> Vocabulary:
    types = list(_numbers(metadata, "token_type", name) or _guess_types(pieces))
    if common["unk_id"] is None:
        common["unk_id"] = types.index(UNKNOWN) if UNKNOWN in types else 0
    if common["unk_id"] < len(types):
        types[common["unk_id"]] = UNKNOWN
    return Vocabulary(
        kind="spm",
        pieces=pieces,
        types=guarded(types, common["bos_id"], common["eos_id"]),
        scores=tuple(float(score) for score in _numbers(metadata, "scores", name)),
        add_dummy_prefix=metadata.get(_KEY + "add_space_prefix") is not False,
        remove_extra_spaces=metadata.get(_KEY + "remove_extra_whitespaces") is True,
        **common,
    )


def _byte_level(
    metadata: Mapping[str, object], pieces: tuple[str, ...], common: dict[str, Any], name: str
) -> Vocabulary:
    pre = metadata.get(_KEY + "pre", "llama-bpe")
    if pre not in _SPLITS:
        raise TokenizerError(f"{name}: tokenizer.ggml.pre is {pre!r}; read are {', '.join(_SPLITS)}")
    types = _numbers(metadata, "token_type", name) or (NORMAL,) * len(pieces)
    return Vocabulary(
        kind="bytes",
        pieces=pieces,
        types=guarded(types, common["bos_id"], common["eos_id"]),
        merges=_texts(metadata, "merges", name),
        split=_SPLITS[str(pre)],
        ignore_merges=_SPLITS[str(pre)] == LLAMA3_SPLIT,
        **common,
    )


def _guess_types(pieces: tuple[str, ...]) -> tuple[int, ...]:
    types = [NORMAL if byte_value(piece) is None else BYTE for piece in pieces]
    types[:3] = [UNKNOWN, CONTROL, CONTROL][: len(types)]
    return tuple(types)


def _texts(metadata: Mapping[str, object], key: str, name: str) -> tuple[str, ...]:
    value = metadata.get(_KEY + key)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TokenizerError(f"{name}: {_KEY}{key} is missing or not a list of texts; fetch a file that has it")
    return tuple(value)


def _numbers(metadata: Mapping[str, object], key: str, name: str) -> tuple[Any, ...]:
    value: Any = metadata.get(_KEY + key)
    if value is None:
        return ()
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list) or not all(isinstance(number, int | float) for number in value):
        raise TokenizerError(f"{name}: {_KEY}{key} is not a list of numbers; the file is damaged")
    return tuple(value)


def _id(metadata: Mapping[str, object], key: str, name: str) -> int | None:
    value = metadata.get(_KEY + key, _NO_ID)
    if not isinstance(value, int):
        raise TokenizerError(f"{name}: {_KEY}{key} is {value!r}; wanted a token id")
    return None if value in (_NO_ID, -1) else value


def _stop_ids(metadata: Mapping[str, object], name: str) -> tuple[int, ...]:
    found = (_id(metadata, key, name) for key in ("eot_token_id", "eom_token_id"))
    return tuple(token_id for token_id in found if token_id is not None)


def to_gguf_metadata(vocabulary: Vocabulary) -> dict[str, object]:
    """Return the keys that a GGUF writer stores: plain bool, int, str and lists of int, float, str.

    Raises TokenizerError where GGUF could not give the same ids.
    """
    check_scores(vocabulary)
    keys: dict[str, object] = {
        _KEY + "model": "llama" if vocabulary.kind == "spm" else "gpt2",
        _KEY + "pre": "default" if vocabulary.kind == "spm" else _pre(vocabulary),
        TOKENS: list(vocabulary.pieces),
        _KEY + "token_type": list(vocabulary.types),
    }
    if vocabulary.kind == "spm":
        keys[_KEY + "scores"] = [float(score) for score in vocabulary.scores]
        keys[_KEY + "add_space_prefix"] = vocabulary.add_dummy_prefix
        if vocabulary.remove_extra_spaces:
            keys[_KEY + "remove_extra_whitespaces"] = True
    else:
        keys[_KEY + "merges"] = list(vocabulary.merges)
    for field, key in _ID_KEYS.items():
        if getattr(vocabulary, field) is not None:
            keys[_KEY + key] = getattr(vocabulary, field)
    for key, piece in (("eot_token_id", "<|eot_id|>"), ("eom_token_id", "<|eom_id|>")):
        if piece in vocabulary.special_tokens:
            keys[_KEY + key] = vocabulary.special_tokens[piece]
    keys[_KEY + "add_bos_token"] = vocabulary.bos_id is not None and vocabulary.add_bos is not False
    keys[_KEY + "add_eos_token"] = bool(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        keys["tokenizer.chat_template"] = vocabulary.chat_template
    return keys


def _pre(vocabulary: Vocabulary) -> str:
    for name, split in _SPLITS.items():
        if vocabulary.split == split and vocabulary.ignore_merges == (split == LLAMA3_SPLIT):
            return name
    raise TokenizerError(
        f"cannot be written into GGUF: no name is known there for cutting text by {vocabulary.split!r} "
        f"with ignore_merges={vocabulary.ignore_merges}; keep tokenizer.json beside the model"
    )
