"""`llama2 extend-vocabulary`: pieces for another language or domain, in a checkpoint."""

import sys
from pathlib import Path
from typing import Literal

from llama2.cli.train_tokenizer import read_texts
from llama2.errors import CheckpointError, TokenizerError
from llama2.tokenizer.tokenizer import Tokenizer


def extend_vocabulary(
    model: str,
    /,
    *texts: Path,
    out: Path,
    add: int = 1000,
    to: Literal["hf", "meta", "gguf", "llama2c"] = "hf",
    revision: str | None = None,
) -> None:
    """Learn new pieces from text, add them to a checkpoint's tokenizer, and give the model rows for them.

    Each new row is the mean of the rows of the pieces that its text had before, so the model begins near where it
    was; train it on text of the new kind afterwards. Prints tokens per character, before and after.

    Parameters
    ----------
    model
        Checkpoint with a SentencePiece tokenizer (Llama 1, 2, TinyLlama), or hub name.
    texts
        Text files, or .jsonl files with a "text" in each line.
    out
        A new folder (hf, meta) or file (gguf, llama2c).
    add
        Pieces to add; fewer if the text has no more that are new.
    to
        Format to write; hf has tokenizer.model beside tokenizer.json.
    revision
        Branch, tag or commit of a hub repository.
    """
    from llama2.checkpoint import hub, store
    from llama2.model.surgery import resize_vocabulary
    from llama2.tokenizer.extend import extended, find_pieces, old_ids
    from llama2.tokenizer.formats import load_tokenizer, save_tokenizer

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; name a new place, nothing is overwritten")
    if not texts:
        raise TokenizerError("name at least one text file to learn from")
    path = hub.resolve(model, revision=revision)
    tokenizer = load_tokenizer(path)
    pieces = find_pieces(tokenizer, read_texts(texts), n_pieces=add)
    larger = extended(tokenizer, pieces)
    parts = [old_ids(tokenizer.vocabulary, piece) for piece in pieces]
    grown = resize_vocabulary(store.load(path), parts, n_old=tokenizer.n_vocab)
    notes = store.save(grown, out, format=to, tokenizer=larger)
    if to == "hf":
        for format in ("model", "json"):  # tokenizer_config.json is to be the one that goes with tokenizer.json
            save_tokenizer(larger, out, format=format)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"added {len(pieces)} pieces: {tokenizer.n_vocab} -> {larger.n_vocab}; wrote {out}", file=sys.stderr)
    print(f"tokens per character: {_density(texts, tokenizer)} before, {_density(texts, larger)} after")


def _density(texts: tuple[Path, ...], tokenizer: Tokenizer) -> str:
    """Return how many tokens the texts have for each of their characters, and how many of them say nothing."""
    n_tokens = n_characters = n_unknown = 0
    for text in read_texts(texts):
        ids = tokenizer.encode(text)
        n_tokens, n_characters = n_tokens + len(ids), n_characters + len(text)
        n_unknown += ids.count(tokenizer.vocabulary.unk_id) if tokenizer.vocabulary.unk_id is not None else 0
    unknown = f" ({n_unknown / n_tokens:.0%} of them unknown)" if n_unknown else ""
    return f"{n_tokens / n_characters:.4f}{unknown}"
