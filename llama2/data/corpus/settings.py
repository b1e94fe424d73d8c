"""What `llama2 prepare` can be told, each setting with its unit."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from llama2.data.corpus.clean import CHANGES, PII
from llama2.data.corpus.quality import DROPS, known_languages
from llama2.errors import DataError, did_you_mean

RUNTIME = ("raw", "out", "tokenizer", "decontaminate", "workers", "rank", "world_size", "keep_work")
"""Settings that change nothing about the result, or that `inputs_sha256` stands for."""


class PrepareConfig(BaseModel):
    """What `llama2 prepare` can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    raw: tuple[Path, ...] = ()
    """Files or folders of raw text: .txt, .md, .jsonl, .parquet, .html, .warc, each plain or .gz or .zst."""
    out: Path | None = None
    """Folder for the shards; new, or one where the same command was stopped."""
    tokenizer: Path | None = None
    """Tokenizer file, or a folder that holds one."""

    text_field: str = "text"
    """Field of JSON lines, or column of Parquet, that holds the text."""
    document_separator: str | None = None
    r"""What stands between the documents of a text file, as <|endoftext|>; \n\n means blank lines."""
    min_words: int = Field(default=50, ge=0)
    """Shorter documents are dropped; without spaces between words, characters are counted."""
    max_words: int = Field(default=100_000, ge=1)
    """Longer documents are dropped."""
    languages: tuple[str, ...] = ()
    """Languages to keep, as two letters each (en,es,zh); by default all."""
    skip_rules: tuple[str, ...] = ()
    """Names of cleaning and quality rules to leave out; docs/data.md lists them."""
    verbatim: bool = False
    """Take documents as they are: no repairs, no rules, no search for near copies; exact copies still go."""
    decontaminate: tuple[Path, ...] = ()
    """Evaluation files: documents that share decontamination_words in a row with them are dropped."""
    decontamination_words: int = Field(default=13, ge=5)
    """Words in a row; where no spaces are written, twice as many characters."""
    dedup_threshold: float = Field(default=0.8, ge=0.3, le=1.0)
    """Jaccard index of runs of five words from which documents are near-duplicates; 1 drops exact copies only."""
    heldout_share: float = Field(default=0.0, ge=0.0, le=0.5)
    """Share of the documents, chosen by hash, that goes to OUT/heldout instead."""

    @field_validator("languages", "skip_rules", mode="before")
    @classmethod
    def _at_commas(cls, value: object) -> object:
        values = [value] if isinstance(value, str) else value
        return [name for each in values for name in str(each).split(",")] if isinstance(values, list | tuple) else value

    workers: int | None = Field(default=None, ge=1)
    """Processes; by default one per core."""
    rank: int = Field(default=0, ge=0)
    """Number of this machine, of world_size that share OUT."""
    world_size: int = Field(default=1, ge=1)
    """Machines that share the work and the folder OUT."""
    keep_work: bool = False
    """Keep the intermediate files in OUT/work."""


def rules_left_out(config: PrepareConfig) -> frozenset[str]:
    """Return the names of the rules that this run does not follow."""
    return frozenset([*list(CHANGES)[1:], PII, *DROPS] if config.verbatim else config.skip_rules)


def threshold_of(config: PrepareConfig) -> float:
    """Return from which Jaccard index on documents are copies."""
    return 1.0 if config.verbatim else config.dedup_threshold


def check_names(config: PrepareConfig) -> None:
    """Refuse languages and rules that do not exist."""
    known_rules = [*list(CHANGES)[1:], PII, *DROPS]
    for name in config.skip_rules:
        if name not in known_rules:
            raise DataError(
                f"skip_rules: {name!r} is no rule{did_you_mean(name, known_rules)}; known are {', '.join(known_rules)}"
            )
    for code in config.languages:
        if code not in known_languages():
            raise DataError(f"languages: {code!r} is not known; known are {', '.join(known_languages())}")
