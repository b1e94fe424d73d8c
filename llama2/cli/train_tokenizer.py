"""`llama2 train-tokenizer`: a vocabulary from text."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from llama2.errors import TokenizerError


def train_tokenizer(
    *texts: Path,
    out: Path,
    vocab_size: int = 32_000,
    kind: Annotated[Literal["bpe", "char"], Parameter(name="--type")] = "bpe",
) -> None:
    """Train a vocabulary, set as Llama 2's is, and write tokenizer.model and tokenizer.json.

    Parameters
    ----------
    texts
        Text files, or .jsonl files with a "text" in each line.
    out
        Folder for the two files; it must not hold a tokenizer yet.
    vocab_size
        Pieces in all; 259 of them are fixed.
    kind
        bpe learns pieces of words, char has one piece per character.
    """
    from llama2.tokenizer.formats import save_tokenizer
    from llama2.tokenizer.train import train_tokenizer as train

    existing = [out / name for name in ("tokenizer.model", "tokenizer.json") if (out / name).exists()]
    if existing:
        raise TokenizerError(f"{existing[0]} exists; name a new folder, nothing is overwritten")
    if not texts:
        raise TokenizerError("name at least one text file to learn from")
    tokenizer = train(read_texts(texts), vocab_size=vocab_size, kind=kind)
    for format in ("model", "json"):
        save_tokenizer(tokenizer, out, format=format)
    print(f"wrote {out / 'tokenizer.model'} and tokenizer.json, {tokenizer.n_vocab} pieces", file=sys.stderr)


def read_texts(paths: tuple[Path, ...]) -> Iterator[str]:
    """Yield the lines of text files, and the "text" of each line of .jsonl files. Raises TokenizerError."""
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    yield _text_of(line, path, number) if path.suffix == ".jsonl" else line
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line) if line.strip() else {"text": ""}
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path}, line {number} is not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise TokenizerError(f'{path}, line {number} has no "text"')
    return record["text"]
