"""Find a tokenizer on disk, read it whatever its format, write it in any format that can hold it.

    tokenizer.model   SentencePiece, or tiktoken ranks (told apart by content)
    tokenizer.json    Hugging Face, with tokenizer_config.json and its relatives beside it
    tokenizer.bin     llama2.c
    *.gguf            the vocabulary inside

Knows names of files and which one goes first; what is in them is known by the modules beside this one.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama2.errors import CheckpointError, TokenizerError, TokenizerMissing
from llama2.files.gguf import MAGIC, read_header
from llama2.files.staging import staged_file
from llama2.tokenizer.document import check_scores, to_config, to_json
from llama2.tokenizer.gguf import TOKENS, from_gguf_metadata
from llama2.tokenizer.hf import from_json, parse_json, read_config
from llama2.tokenizer.llama2c import from_bin, to_bin
from llama2.tokenizer.proto import from_proto, to_proto
from llama2.tokenizer.ranks import from_ranks, looks_like_ranks, to_ranks
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.vocabulary import Vocabulary, check_id, with_added

_NAMES = ("tokenizer.model", "tokenizer.json", "tokenizer.bin")
_PATTERNS = ("tok*.model", "tok*.bin")
_MAX_BYTES = 1 << 28


def load_tokenizer(path: str | Path, *, llama3_names: str | None = None) -> Tokenizer:
    """Load the tokenizer in a file, in a checkpoint folder, in a GGUF file, or beside a checkpoint file.

    `llama3_names` ("3" or "3.1") says how special tokens of tiktoken ranks are called where no file says it.
    Raises TokenizerError where there is none, or more than one could be meant, or it is broken.
    """
    path = Path(path)
    if not path.exists():
        raise TokenizerError(f"{path} does not exist; give a tokenizer file or a checkpoint")
    found = path if path.is_file() and _is_tokenizer(path) else find_tokenizer(path)
    return Tokenizer(_read(found, llama3_names))


def find_tokenizer(path: Path) -> Path:
    """Return the tokenizer file of a folder, or of the folder that a checkpoint file lies in.

    In a folder a GGUF file counts as one, beside a file it does not: it belongs to another checkpoint.
    """
    folder = path if path.is_dir() else path.parent
    patterns = (*_PATTERNS, "*.gguf") if path.is_dir() else _PATTERNS
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    for pattern in patterns:
        found = sorted(found for found in folder.glob(pattern) if found != path and _is_tokenizer(found))
        if len(found) > 1:
            names = ", ".join(each.name for each in found)
            raise TokenizerError(f"{folder} holds several tokenizers: {names}; name one of them")
        if found:
            return found[0]
    raise TokenizerMissing(
        f"no tokenizer in {folder}; looked for {', '.join(_NAMES + patterns)}: put one there, or name a tokenizer file"
    )


def _is_tokenizer(path: Path) -> bool:
    """Tell tokenizer files from the checkpoints and configs they lie beside."""
    match path.suffix:
        case ".model":
            return True
        case ".json":
            return "tokenizer" in path.name and "config" not in path.name
        case ".bin":
            return path.name.startswith("tok") or _head(path)[12:17] == b"<unk>"
    return _head(path).startswith(MAGIC) and TOKENS in _gguf_metadata(path)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _gguf_metadata(path: Path) -> dict[str, object]:
    try:
        return read_header(path).metadata
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None


def _read(path: Path, llama3_names: str | None) -> Vocabulary:
    name = str(path)
    if _head(path).startswith(MAGIC):
        return from_gguf_metadata(_gguf_metadata(path), name=name)
    data = _read_bytes(path)
    if path.suffix == ".json":
        vocabulary = from_json(data, name=name)
    elif path.suffix == ".bin":
        vocabulary = from_bin(data, name=name)
    elif looks_like_ranks(data):
        vocabulary = from_ranks(data, name=name, version=llama3_names or _llama3_names(path.parent))
    else:
        vocabulary = from_proto(data, name=name)
    return _with_siblings(vocabulary, path) if path.stem == "tokenizer" else vocabulary


def _read_bytes(path: Path) -> bytes:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > _MAX_BYTES:
            raise TokenizerError(f"{path} has {size_bytes} bytes; a tokenizer has at most {_MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from error


def _sibling(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return parse_json(_read_bytes(path), name=str(path)) if path.is_file() else {}


def _llama3_names(folder: Path) -> str:
    """Llama 3.1 and later scale their rotary frequencies, Llama 3 does not; the names changed with it."""
    if (folder / "params.json").is_file():
        return "3.1" if _sibling(folder, "params.json").get("use_scaled_rope") else "3"
    if (folder / "config.json").is_file():
        config = _sibling(folder, "config.json")
        scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
        scaled = isinstance(scaling, dict) and "llama3" in (scaling.get("rope_type"), scaling.get("type"))
        return "3.1" if scaled else "3"
    return "3.1"


def _with_siblings(vocabulary: Vocabulary, path: Path) -> Vocabulary:
    """Apply what Hugging Face keeps beside the vocabulary: added tokens, roles, template, stop ids."""
    folder = path.parent
    config = _sibling(folder, "tokenizer_config.json")
    try:
        vocabulary = with_added(vocabulary, _added_tokens(path, config), origin=f"the files beside {path}")
        vocabulary = read_config(vocabulary, _sibling(folder, "special_tokens_map.json"))
        vocabulary = read_config(vocabulary, config)
    except (AttributeError, KeyError, TypeError) as error:
        raise TokenizerError(
            f"the files beside {path} are not a tokenizer's ({type(error).__name__}: {error})"
        ) from None
    if (folder / "chat_template.jinja").is_file():
        template = _read_bytes(folder / "chat_template.jinja").decode("utf-8", errors="replace")
        vocabulary = replace(vocabulary, chat_template=template)
    return _with_stop_ids(vocabulary, folder)


def _added_tokens(path: Path, config: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Collect id -> (name, is special) from all the places it may be written; the later one wins."""
    added: dict[int, tuple[str, bool]] = {}
    for name, token_id in _sibling(path.parent, "added_tokens.json").items():
        added[int(token_id)] = (name, True)
    entries = list((config.get("added_tokens_decoder") or {}).items())
    if path.suffix != ".json":
        beside = _sibling(path.parent, "tokenizer.json").get("added_tokens") or []
        entries = [(token["id"], token) for token in beside] + entries
    roles = [config.get(f"{role}_token") for role in ("bos", "eos", "pad")]
    roles = [role.get("content") if isinstance(role, dict) else role for role in roles]
    for token_id, token in entries:
        if not str(token_id).isdigit():
            raise TokenizerError(f"{path.parent}: an added token has the id {token_id!r}; wanted a number")
        added[int(token_id)] = (token["content"], bool(token.get("special")) or token["content"] in roles)
    return added


def _with_stop_ids(vocabulary: Vocabulary, folder: Path) -> Vocabulary:
    found = _sibling(folder, "generation_config.json").get("eos_token_id")
    stop_ids = found if isinstance(found, list) else [] if found is None else [found]
    if not stop_ids:
        return vocabulary
    for stop_id in stop_ids:
        if not isinstance(stop_id, int):
            raise TokenizerError(f"{folder / 'generation_config.json'}: eos_token_id is {found!r}; wanted ids")
        check_id(stop_id, len(vocabulary.pieces), f"{folder / 'generation_config.json'}: eos_token_id")
    eos_id = stop_ids[0] if vocabulary.eos_id is None else vocabulary.eos_id
    return replace(vocabulary, eos_id=eos_id, stop_ids=tuple(dict.fromkeys([*vocabulary.stop_ids, *stop_ids])))


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, *, format: str) -> Path:
    """Write the tokenizer into a folder and return its file: format "model", "json" or "bin".

    "model" is SentencePiece or tiktoken ranks, after the vocabulary's kind; "model" and "json" bring a
    tokenizer_config.json with names, roles and chat template. Raises TokenizerError where the format
    could not give the same ids again.
    """
    folder, vocabulary = Path(folder), tokenizer.vocabulary
    spm = vocabulary.kind == "spm"
    if format not in ("model", "json", "bin"):
        raise TokenizerError(f"format={format!r} is not a tokenizer's; wanted 'model', 'json' or 'bin'")
    if format == "json":
        data, tokenizer_class = to_json(vocabulary), "PreTrainedTokenizerFast"
    elif format == "model" and not spm:
        data, tokenizer_class = to_ranks(vocabulary), "PreTrainedTokenizerFast"
    elif spm:
        data, tokenizer_class = _spm_bytes(vocabulary, format), "LlamaTokenizer"
    else:
        raise TokenizerError(
            "tokenizer.bin holds SentencePiece vocabularies only, and this one is byte-level; use json"
        )
    if format != "bin":
        _write(folder / "tokenizer_config.json", to_config(vocabulary, tokenizer_class=tokenizer_class))
        _write_stop_ids(vocabulary, folder)
    return _write(folder / f"tokenizer.{format}", data)


def _write_stop_ids(vocabulary: Vocabulary, folder: Path) -> None:
    """Put several stop ids where Hugging Face looks for them, and keep what else stands there."""
    settings = _sibling(folder, "generation_config.json")
    if not settings and not vocabulary.stop_ids:
        return
    ids = list(dict.fromkeys(i for i in (vocabulary.eos_id, *vocabulary.stop_ids) if i is not None))
    settings |= {"bos_token_id": vocabulary.bos_id, "eos_token_id": ids[0] if len(ids) == 1 else ids or None}
    _write(folder / "generation_config.json", json.dumps(settings, indent=2).encode("utf-8"))


def _spm_bytes(vocabulary: Vocabulary, format: str) -> bytes:
    came_as_model = vocabulary.source is not None and vocabulary.source.format == "model"
    if format == "bin" or not came_as_model:
        check_scores(vocabulary)
    return to_bin(vocabulary) if format == "bin" else to_proto(vocabulary)


def _write(path: Path, data: bytes) -> Path:
    with staged_file(path) as temporary:
        temporary.write_bytes(data)
    return path
