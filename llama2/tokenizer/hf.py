"""Hugging Face's `tokenizer.json`: two families of it, byte-fallback (Llama 2) and byte-level (Llama 3).

Reads one into a Vocabulary, keeping the JSON itself, because only the `tokenizers` library can run
every normalizer a JSON may hold. Writing is done in `document.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llama2.errors import TokenizerError
from llama2.tokenizer.vocabulary import (
    BYTE,
    CONTROL,
    GPT2_SPLIT,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Source,
    Vocabulary,
    byte_value,
    guarded,
)

Json = dict[str, Any]

_CONVENTIONS = {"bos_id": ("<s>", "<|begin_of_text|>"), "eos_id": ("</s>", "<|end_of_text|>")}
PREPEND = {"type": "Prepend", "prepend": SPACE}
ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
TRIM: tuple[Json, ...] = (
    {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
)
UNESCAPE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def parse_json(data: bytes, *, name: str) -> Json:
    """Return the JSON object in a file's bytes. Raises TokenizerError where there is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{name}: not JSON ({error}); the file is damaged, fetch it again") from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{name}: holds a {type(found).__name__}; wanted a JSON object")
    return found


def from_json(data: bytes, *, name: str) -> Vocabulary:
    """Read the bytes of a `tokenizer.json`. Raises TokenizerError on a family that is not Llama's."""
    document = parse_json(data, name=name)
    try:
        return _read(document, data, name)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise TokenizerError(f"{name}: not a tokenizer.json ({type(error).__name__}: {error})") from None


def _read(document: Json, data: bytes, name: str) -> Vocabulary:
    model = document["model"]
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"{name}: a model of type {model['type']!r}; Llama's vocabularies are of type 'BPE'")
    kind, strips = _family(document.get("decoder"), name)
    added = document.get("added_tokens") or []
    pieces = _pieces(model["vocab"], added, name)
    # transformers 5 writes no unk_token where bytes stand in for every unknown character
    unk_id = model["vocab"].get(model.get("unk_token") or ("<unk>" if kind == "spm" else None))
    types = _types(pieces, added, kind == "spm" and bool(model.get("byte_fallback")), unk_id)
    common: Json = {"pieces": pieces, "types": types, "unk_id": unk_id, "source": Source("json", data)}
    common |= {role: _by_convention(pieces, types, names) for role, names in _CONVENTIONS.items()}
    merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    if kind == "bytes":
        split = _split_of(document.get("pre_tokenizer"))
        odd = document.get("normalizer") or split is None or _odd_model(model)
        return Vocabulary(
            kind="bytes",
            merges=merges,
            split=split or "",
            ignore_merges=bool(model.get("ignore_merges")),
            unportable="its tokenizer.json cuts or normalises text in a way of its own" if odd else "",
            **common,
        )
    if unk_id is None:
        raise TokenizerError(f"{name}: no unk_token; a byte-fallback tokenizer.json has one, usually <unk>")
    scores, problem = _scores(pieces, types, merges)
    trims = document.get("normalizer") == normalizer(dummy_prefix=strips, remove_extra_spaces=True)
    problem = problem or _foreign_rules(document, strips, trims, pieces, types)
    return Vocabulary(
        kind="spm", scores=scores, add_dummy_prefix=strips, remove_extra_spaces=trims, unportable=problem, **common
    )


def _family(decoder: Json | None, name: str) -> tuple[Any, bool]:
    """Return the kind and whether decoding strips the first space; the decoder tells the families apart."""
    steps = [decoder] if decoder and decoder["type"] != "Sequence" else (decoder or {}).get("decoders", [])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "bytes", False
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == UNESCAPE and steps[3:] in ([], [STRIP]):
        return "spm", bool(steps[3:])
    raise TokenizerError(
        f"{name}: decoder {' + '.join(kinds) or None} is not Llama's; read are ByteLevel and "
        "Replace + ByteFallback + Fuse [+ Strip]"
    )


def _pieces(vocab: Mapping[str, int], added: Sequence[Json], name: str) -> tuple[str, ...]:
    by_id: dict[int, str] = {}
    for piece, token_id in [*vocab.items(), *((token["content"], token["id"]) for token in added)]:
        if by_id.setdefault(token_id, piece) != piece:
            raise TokenizerError(f"{name}: id {token_id} has two pieces, {by_id[token_id]!r} and {piece!r}")
    if sorted(by_id) != list(range(len(by_id))):
        hole = next(i for i in range(len(by_id)) if i not in by_id)
        raise TokenizerError(f"{name}: id {hole} has no piece; ids may not have holes")
    return tuple(by_id[i] for i in range(len(by_id)))


def _types(pieces: tuple[str, ...], added: Sequence[Json], byte_fallback: bool, unk_id: int | None) -> tuple[int, ...]:
    types = [NORMAL] * len(pieces)
    if byte_fallback and sum(byte_value(piece) is not None for piece in pieces) == 256:
        types = [NORMAL if byte_value(piece) is None else BYTE for piece in pieces]
    for token in added:
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    if unk_id is not None:
        types[unk_id] = UNKNOWN
    return tuple(types)


def _by_convention(pieces: tuple[str, ...], types: tuple[int, ...], names: tuple[str, ...]) -> int | None:
    """A tokenizer.json does not say which token is BOS or EOS; tokenizer_config.json may correct this."""
    found = (pieces.index(name) for name in names if name in pieces)
    return next((token_id for token_id in found if types[token_id] == CONTROL), None)


def _split_of(pre_tokenizer: Json | None) -> str | None:
    """Return the regular expression of a plain byte-level pre-tokenizer, None for another."""
    if not pre_tokenizer:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1 and last.get("use_regex", True):
        return GPT2_SPLIT
    if len(steps) != 2 or last.get("use_regex", True) or steps[0]["type"] != "Split":
        return None
    plain = steps[0]["behavior"] == "Isolated" and not steps[0].get("invert")
    return steps[0]["pattern"].get("Regex") if plain else None


def _odd_model(model: Json) -> bool:
    return bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))


def normalizer(*, dummy_prefix: bool, remove_extra_spaces: bool) -> Json:
    """Return the normalizer that treats spaces as a SentencePiece vocabulary with these flags does."""
    steps = [*TRIM] * remove_extra_spaces + [PREPEND] * dummy_prefix + [ESCAPE]
    return {"type": "Sequence", "normalizers": steps} if len(steps) > 1 else ESCAPE


def _foreign_rules(
    document: Json, dummy_prefix: bool, trims: bool, pieces: tuple[str, ...], types: tuple[int, ...]
) -> str:
    """Say what SentencePiece would do otherwise, or nothing."""
    wanted = normalizer(dummy_prefix=dummy_prefix, remove_extra_spaces=trims)
    normalised = document.get("normalizer") == wanted and not document.get("pre_tokenizer")
    if not normalised and not is_metaspace(document, dummy_prefix=dummy_prefix):
        return "its tokenizer.json prepares text in a way SentencePiece does not"
    if _odd_model(document["model"]) or document["model"].get("ignore_merges"):
        return "its tokenizer.json merges in a way SentencePiece does not"
    spelled = any(byte_value(piece) is not None for piece in pieces)
    if BYTE not in types and (spelled or not document["model"].get("fuse_unk")):
        return "its tokenizer.json treats unknown characters in a way SentencePiece does not"
    if USER_DEFINED in types:
        return "SentencePiece adds no space after a token that is matched in plain text, and tokenizer.json does"
    return ""


def is_metaspace(document: Json, *, dummy_prefix: bool) -> bool:
    """Say whether spaces are written as transformers 5 does: as SentencePiece, but for text that begins with one."""
    step = document.get("pre_tokenizer") or {}
    scheme = step.get("prepend_scheme", "always") in (("first", "always") if dummy_prefix else ("never",))
    plain = step.get("replacement") == SPACE and step.get("split") is False and not document.get("normalizer")
    return step.get("type") == "Metaspace" and scheme and plain


def _scores(pieces: tuple[str, ...], types: tuple[int, ...], merges: tuple[str, ...]) -> tuple[tuple[float, ...], str]:
    """Turn the order of merges into scores, one for each piece."""
    order: dict[str, int] = {}
    last, problem = "", ""
    for merge in merges:
        piece = merge.replace(" ", "")
        if piece != last and piece in order:
            problem = f"merges into {piece!r} stand in several places of its tokenizer.json"
        order.setdefault(piece, len(order))
        last = piece
    scored = zip(pieces, types, strict=True)
    return tuple(-float(order.get(piece, len(order))) if kind == NORMAL else 0.0 for piece, kind in scored), problem


def read_config(vocabulary: Vocabulary, config: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary with roles, flags and template of a tokenizer_config.json or special_tokens_map.json."""
    changes: Json = {}
    for role in ("bos", "eos", "pad"):
        token = config.get(f"{role}_token")
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str) and name in vocabulary.ids:
            changes[f"{role}_id"] = vocabulary.ids[name]
        elif isinstance(name, str) and role != "pad":
            raise TokenizerError(
                f"{role}_token is {name!r}, which the vocabulary does not have; mend the files beside it"
            )
    for flag in ("add_bos", "add_eos"):
        if isinstance(config.get(f"{flag}_token"), bool):
            changes[flag] = config[f"{flag}_token"]
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if isinstance(template, str):
        changes["chat_template"] = template
    changed = replace(vocabulary, **changes)
    return replace(changed, types=guarded(changed.types, changed.bos_id, changed.eos_id))
