"""`llama2 info`, `convert`, `pull` and `tokenize`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from llama2.cli.options import Text, read_standard_input
from llama2.errors import RequestError
from llama2.model.config import ModelConfig, config_fields
from llama2.model.family import FAMILY


def info(
    model: str | None = None,
    /,
    *,
    revision: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Show what a model is: its shape, parameters, work and memory per token. Loads no weights.

    Parameters
    ----------
    model
        Folder, file, hub name, or a name of the family such as llama2-7b; without one the family is listed.
    revision
        Branch, tag or commit of a hub repository.
    as_json
        Print JSON.
    """
    if model is None:
        _print_family(as_json)
        return
    facts = _facts(model, revision)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {_readable(value)}")


def _facts(model: str, revision: str | None) -> dict[str, object]:
    facts: dict[str, object] = {"model": model}
    if model.lower() in FAMILY and not Path(model).exists():
        if revision is not None:
            raise RequestError(f"--revision is for hub repositories; {model!r} is a name of the family")
        config = FAMILY[model.lower()]
    else:
        from llama2.checkpoint import hub, store

        path = hub.resolve(model, revision=revision)
        config = store.read_config(path)
        found, place = store.detect(path)
        facts |= {"path": str(place), "format": found.NAME}
    return {**facts, **config_fields(config), **arithmetic(config)}


def arithmetic(config: ModelConfig) -> dict[str, object]:
    """Return what follows from the shape."""
    return {
        "n_parameters": config.n_parameters,
        "n_embedding_parameters": config.n_embedding_parameters,
        "bytes_at_16_bit": 2 * config.n_parameters,
        "training_flops_per_token_at_full_context": config.flops_per_token(config.context_length),
        "kv_bytes_per_token_at_16_bit": config.kv_bytes_per_token(),
        "kv_bytes_of_full_context": config.kv_bytes_per_token() * config.context_length,
    }


def _readable(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(inner)}" for name, inner in value.items() if inner is not None)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _print_family(as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: {**config_fields(c), **arithmetic(c)} for name, c in FAMILY.items()}, indent=2))
        return
    print(
        f"{'name':<24} {'parameters':>15} {'dim':>6} {'layers':>6} {'heads':>6} {'kv':>4} {'vocab':>7} {'context':>8}"
    )
    for name, c in FAMILY.items():
        print(
            f"{name:<24} {c.n_parameters:>15,} {c.dim:>6} {c.n_layers:>6} {c.n_heads:>6} {c.n_kv_heads:>4} "
            f"{c.vocab_size:>7} {c.context_length:>8}"
        )


def convert(
    source: str,
    target: Path,
    /,
    *,
    to: Literal["hf", "meta", "gguf", "llama2c"],
    dtype: Literal["float32", "bfloat16", "float16", "q8_0", "q4_0"] | None = None,
    tokenizer: Path | None = None,
    revision: str | None = None,
    version: Literal[0, 1, 2] | None = None,
    shards: int | None = None,
) -> None:
    """Write a checkpoint, with its tokenizer, in another format.

    Parameters
    ----------
    source
        Folder, file or hub name.
    target
        A new folder (hf, meta) or file (gguf, llama2c).
    to
        Format to write.
    dtype
        Precision to store; the source's if not given. q8_0 and q4_0 are for gguf.
    tokenizer
        Tokenizer file or folder; looked for beside the source if not given.
    revision
        Branch, tag or commit of a hub repository.
    version
        With --to llama2c: 0 legacy, 1, or 2, which is int8 [default: 1].
    shards
        With --to meta: how many files to split the weights over [default: 1].
    """
    from llama2.checkpoint import hub, store
    from llama2.tokenizer.formats import load_tokenizer

    path = hub.resolve(source, revision=revision)
    options = {name: value for name, value in (("version", version), ("shards", shards)) if value is not None}
    vocabulary = load_tokenizer(tokenizer) if tokenizer else None
    for note in store.convert(path, target, to=to, dtype=dtype, tokenizer=vocabulary, **options):
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote {target}", file=sys.stderr)


def pull(name: str, /, *, revision: str | None = None) -> None:
    """Fetch a model from the Hugging Face hub into its usual cache and print where it lies.

    Honours HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE.

    Parameters
    ----------
    name
        Repository, as in NousResearch/Llama-2-7b-chat-hf.
    revision
        Branch, tag or commit.
    """
    from llama2.checkpoint import hub

    print(hub.pull(name, revision=revision))


def tokenize(
    model: str, text: Text, /, *, special: bool = False, ids: bool = False, revision: str | None = None
) -> None:
    """Show the tokens of a text: id and piece, one per line.

    Parameters
    ----------
    model
        Checkpoint, tokenizer file or hub name.
    text
        Text; `-` reads standard input.
    special
        Recognise special tokens such as <s> in the text.
    ids
        Print only the ids, as a JSON list.
    revision
        Branch, tag or commit of a hub repository.
    """
    from llama2.checkpoint import hub
    from llama2.tokenizer.formats import load_tokenizer

    tokenizer = load_tokenizer(hub.resolve(model, revision=revision))
    tokens = tokenizer.encode(read_standard_input() if text == "-" else text, special=special)
    if ids:
        print(tokens)
        return
    for token_id in tokens:
        data = tokenizer.token_bytes(token_id)
        try:
            print(f"{token_id:>7}  {data.decode('utf-8')!r}")
        except UnicodeDecodeError:  # part of a character
            print(f"{token_id:>7}  {data!r}")
