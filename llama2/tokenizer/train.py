"""Train a vocabulary from text, set as Llama 2's is (arXiv:2307.09288 sec. 2.2, and its own tokenizer.model).

The trainer is SentencePiece's. BPE with byte fallback, digits split one by one, text taken as it is
(identity normalisation, every space kept), unknown 0, beginning 1, end 2. Kind "char" has one piece per
character: it is stored as BPE without merges, which every reader of Llama vocabularies knows.
"""

import io
import os
from collections.abc import Iterable, Iterator
from typing import Literal

from llama2.errors import TokenizerError
from llama2.tokenizer.proto import as_bpe, from_proto
from llama2.tokenizer.tokenizer import Tokenizer, check_text

N_FIXED = 3 + 256
"""<unk>, <s>, </s> and the bytes come before anything learnt."""


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    kind: Literal["bpe", "char"] = "bpe",
    n_threads: int | None = None,
    may_be_smaller: bool = False,
) -> Tokenizer:
    """Learn a vocabulary of vocab_size pieces, of which 259 are fixed. Raises TokenizerError if the texts hold too few.

    With `may_be_smaller` it is then as large as they allow. Texts are read once, line by line, and kept in memory by
    the trainer. The result depends on the texts and not on n_threads.
    """
    import sentencepiece

    if kind not in ("bpe", "char"):
        raise TokenizerError(f"kind {kind!r} of vocabulary is not known; known are bpe and char")
    if not N_FIXED < vocab_size <= 1 << 20:
        raise TokenizerError(f"vocab_size={vocab_size} must be above {N_FIXED} (3 control pieces, 256 bytes) and sane")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            character_coverage=0.99995 if kind == "bpe" else 1.0,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            required_chars="0123456789",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 30,  # the default drops longer lines without a word
            hard_vocab_limit=kind == "bpe" and not may_be_smaller,
            use_all_vocab=False,
            num_threads=n_threads or os.cpu_count() or 1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"no vocabulary of {vocab_size} pieces can be learnt: {_reason(error)}") from None
    return Tokenizer(
        from_proto(model.getvalue() if kind == "bpe" else as_bpe(model.getvalue()), name="the trained vocabulary")
    )


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines of all texts; a line end is a byte piece and never learnt."""
    n_lines = 0
    for text in texts:
        check_text(text)
        for line in text.split("\n"):
            if line and "\0" not in line:
                n_lines += 1
                yield line
    if not n_lines:
        raise TokenizerError("there is no text to learn a vocabulary from")


def _reason(error: Exception) -> str:
    """Return what SentencePiece says, without its source file and line."""
    return str(error).split("] ")[-1].strip() or "the texts are too few or too uniform"
