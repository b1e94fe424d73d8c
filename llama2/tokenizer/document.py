"""Build, run and write a `tokenizer.json`.

`document` gives the JSON of any Vocabulary: the one it was read from, or a new one. It is what the
`tokenizers` engine runs, so what is written is what was used.
"""

import copy
import json
import warnings
from collections.abc import Mapping
from typing import Any

from llama2.errors import TokenizerError
from llama2.tokenizer.hf import BYTE_LEVEL, STRIP, UNESCAPE, Json, normalizer, parse_json
from llama2.tokenizer.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    merges_by_score,
    splits,
)

_NO_TEXT = "\x00unknown\x00"


def check_scores(vocabulary: Vocabulary) -> None:
    """Raise TokenizerError unless the scores read from a tokenizer.json give the same ids as its merges.

    A piece is only ever made from the two parts that it has when its own text is encoded alone: merges
    within its span cannot see what lies outside. So scores and merges agree on every text as soon as no
    piece encoded alone stops at two parts that scores would join.
    """
    if vocabulary.unportable:
        own = vocabulary.source.format if vocabulary.source else "json"
        raise TokenizerError(f"only {own} can hold this tokenizer: {vocabulary.unportable}; write it as {own}")
    if not vocabulary.source or vocabulary.source.format != "json" or vocabulary.kind != "spm":
        return
    whole = document(vocabulary)
    if whole.get("pre_tokenizer") and vocabulary.add_dummy_prefix:
        warnings.warn(
            "this tokenizer.json adds no space before text that begins with one, and SentencePiece does: in the new "
            "file such text gets other ids",
            stacklevel=2,
        )
    bare = {**plain_document(whole, vocabulary), "normalizer": None, "pre_tokenizer": None}
    engine = load_document(bare, name="tokenizer.json")
    normal = [vocabulary.pieces[i] for i in vocabulary.ids_of(NORMAL)]
    for piece, encoding in zip(normal, engine.encode_batch(normal, add_special_tokens=False), strict=True):
        if len(encoding.ids) == 2:
            raise TokenizerError(
                f"only json can hold this tokenizer: its merges never make the piece {piece!r}, and SentencePiece "
                "would make it; write it as json"
            )


def document(vocabulary: Vocabulary) -> Json:
    """Return a whole tokenizer.json as a Python object: the one that was read, or a new one."""
    if vocabulary.source and vocabulary.source.format == "json":
        found = parse_json(vocabulary.source.data, name="tokenizer.json")
        known = {token["content"]: token for token in found.get("added_tokens") or []}
    else:
        found, known = _new_document(vocabulary), {}
    roles = (CONTROL, USER_DEFINED, UNKNOWN) if vocabulary.kind == "spm" else (CONTROL, USER_DEFINED)
    found["added_tokens"] = [
        _added_token(vocabulary, i, known) for i, found_type in enumerate(vocabulary.types) if found_type in roles
    ]
    # ids of added tokens are only obeyed where the model's own vocabulary says the same
    found["model"]["vocab"] = dict(vocabulary.ids)
    found["model"]["dropout"] = None
    found["truncation"] = found["padding"] = None
    return found


def _added_token(vocabulary: Vocabulary, token_id: int, known: Mapping[str, Json]) -> Json:
    piece, special = vocabulary.pieces[token_id], vocabulary.types[token_id] != USER_DEFINED
    flags = {"single_word": False, "lstrip": False, "rstrip": False, **known.get(piece, {})}
    # a normalized special token is found only after a space where the normalizer prepends one
    normalized = False if special else flags.get("normalized", False)
    return {**flags, "id": token_id, "content": piece, "special": special, "normalized": normalized}


def _new_document(vocabulary: Vocabulary) -> Json:
    _check_buildable(vocabulary)
    spm = vocabulary.kind == "spm"
    decoders = [UNESCAPE, {"type": "ByteFallback"}, {"type": "Fuse"}] + [STRIP] * vocabulary.add_dummy_prefix
    split = {"type": "Split", "pattern": {"Regex": vocabulary.split}, "behavior": "Isolated", "invert": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": vocabulary.pieces[vocabulary.unk_id] if spm and vocabulary.unk_id is not None else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": spm,
        "byte_fallback": BYTE in vocabulary.types,
        "ignore_merges": vocabulary.ignore_merges,
        "merges": list(merges_by_score(vocabulary) if spm else vocabulary.merges),
    }
    return {
        "version": "1.0",
        "normalizer": normalizer(
            dummy_prefix=vocabulary.add_dummy_prefix, remove_extra_spaces=vocabulary.remove_extra_spaces
        )
        if spm
        else None,
        "pre_tokenizer": None if spm else {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]},
        "post_processor": _post_processor(vocabulary),
        "decoder": {"type": "Sequence", "decoders": decoders} if spm else BYTE_LEVEL,
        "model": model,
    }


def _check_buildable(vocabulary: Vocabulary) -> None:
    problem = vocabulary.unportable
    if vocabulary.kind == "spm":
        joined = {vocabulary.pieces[i]: i for i in vocabulary.ids_of(NORMAL)}
        if USER_DEFINED in vocabulary.types:
            problem = "tokenizer.json adds a space after a token that is matched in plain text, SentencePiece does not"
        for i in vocabulary.ids_of(UNUSED):
            if splits(vocabulary.pieces[i], joined):
                problem = f"tokenizer.json cannot make and unmake the unused piece {vocabulary.pieces[i]!r}"
    if problem:
        raise TokenizerError(f"cannot be written as tokenizer.json: {problem}; write it as model")


def _post_processor(vocabulary: Vocabulary) -> Json | None:
    if vocabulary.bos_id is None or vocabulary.add_bos is False:
        return None
    bos = vocabulary.pieces[vocabulary.bos_id]
    first, second = ([{"SpecialToken": {"id": bos, "type_id": i}}, {"Sequence": {"id": part, "type_id": i}}]
                     for i, part in enumerate("AB"))  # fmt: skip
    tokens = {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": tokens}


def plain_document(whole: Json, vocabulary: Vocabulary) -> Json:
    """Return the same tokenizer.json without anything by which text could become a special token."""
    hidden = {vocabulary.pieces[i] for kind in (CONTROL, UNKNOWN, UNUSED) for i in vocabulary.ids_of(kind)}
    plain = {**whole, "post_processor": None, "model": copy.copy(whole["model"])}
    plain["added_tokens"] = [token for token in whole["added_tokens"] if not token["special"]]
    plain["model"]["vocab"] = {piece: i for piece, i in vocabulary.ids.items() if piece not in hidden}
    if plain["model"].get("unk_token") is not None:
        # the engine needs a piece for the unknown; a merge table has no way to this name
        plain["model"]["vocab"][_NO_TEXT] = vocabulary.ids[plain["model"]["unk_token"]]
        plain["model"]["unk_token"] = _NO_TEXT
    plain["model"]["merges"] = [merge for merge in whole["model"]["merges"] if not _touches(merge, hidden)]
    return plain


def _touches(merge: Any, hidden: set[str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in hidden or right in hidden or left + right in hidden


def load_document(found: Json, *, name: str) -> Any:
    """Hand a tokenizer.json to the `tokenizers` library. Raises TokenizerError where it will not have it."""
    from tokenizers import Tokenizer as Engine

    try:
        return Engine.from_str(json.dumps(found, ensure_ascii=True))
    except BaseException as error:
        # a panic in the library arrives as a BaseException of its own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{name}: the tokenizers library refuses it ({error}); the file is damaged") from None


def to_json(vocabulary: Vocabulary) -> bytes:
    """Return the bytes of a `tokenizer.json`."""
    return json.dumps(document(vocabulary), ensure_ascii=False, indent=2).encode("utf-8")


def to_config(vocabulary: Vocabulary, *, tokenizer_class: str) -> bytes:
    """Return the bytes of the `tokenizer_config.json` that goes with it."""
    added = {
        str(i): {"content": vocabulary.pieces[i], "special": kind != USER_DEFINED, "normalized": False,
                 "lstrip": False, "rstrip": False, "single_word": False}
        for i, kind in enumerate(vocabulary.types) if kind in (CONTROL, USER_DEFINED)
    }  # fmt: skip
    config: Json = {"tokenizer_class": tokenizer_class, "clean_up_tokenization_spaces": False, "legacy": True}
    config["added_tokens_decoder"] = added
    for role in ("bos", "eos", "unk", "pad"):
        token_id = getattr(vocabulary, f"{role}_id")
        config[f"{role}_token"] = None if token_id is None else vocabulary.pieces[token_id]
    config["add_bos_token"] = vocabulary.bos_id is not None and vocabulary.add_bos is not False
    config["add_eos_token"] = bool(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    return json.dumps(config, ensure_ascii=False, indent=2).encode("utf-8")
