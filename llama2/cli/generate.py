"""`llama2 generate`: only the text goes to standard output."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama2.chat import conversation
from llama2.cli.options import LoadOptions, SampleOptions, Text, read_standard_input
from llama2.errors import ChatError, RequestError
from llama2.files.staging import make_parent

ANSWER, MADE_BY = "completion", "made_by"
"""The fields that an answered record gains."""


def generate(
    model: str,
    /,
    *,
    prompt: Text | None = None,
    prompts: Path | None = None,
    out: Path | None = None,
    n: int = 1,
    echo: bool = True,
    batch_size: int | None = None,
    sample: SampleOptions = SampleOptions(),
    load: LoadOptions = LoadOptions(),
) -> None:
    """Continue a text, or every prompt of a file.

    Parameters
    ----------
    model
        Folder, file or hub name.
    prompt
        Text to continue; `-` reads standard input.
    prompts
        JSON-lines file of prompts: `{"prompt": "..."}` or `{"messages": [...]}` per line.
    out
        With --prompts: the same lines in the same order, each with its "completion". Interrupted, the same
        command goes on where it stopped.
    n
        Number of answers.
    echo
        Print the prompt before its continuation.
    batch_size
        With --prompts: how many to answer at once [default: 32].
    """
    if (prompt is None) == (prompts is None):
        raise RequestError("give either --prompt TEXT or --prompts FILE")
    if (prompts is None) != (out is None):
        raise RequestError("--prompts FILE and --out FILE go together")
    options = {**sample.given(), "n": n}
    if prompts is not None and out is not None:
        _answer_file(prompts, out, model, load, options, 32 if batch_size is None else batch_size)
        return
    if batch_size is not None:
        raise RequestError("--batch-size is for --prompts FILE; one prompt has no batch")
    text = read_standard_input() if prompt == "-" else prompt or ""
    llm = load.load(model)
    if n > 1:
        answers = [(text if echo else "") + answer for answer in llm.generate(text, **options)]
        print("\n\n".join(answers))
        return
    pieces = llm.stream(text, **options)
    first = next(pieces, "")  # a refused prompt prints nothing
    print((text if echo else "") + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _answer_file(
    source: Path, out: Path, model: str, load: LoadOptions, options: dict[str, Any], batch_size: int
) -> None:
    """Answer every line of source into out, in order, going on after the lines that out already holds."""
    from rich.console import Console
    from rich.progress import track

    if batch_size < 1:
        raise RequestError(f"--batch-size {batch_size} must be at least 1")
    make_parent(out)
    records = list(_read_prompts(source))
    made_by = {"model": model, "options": json.loads(json.dumps(options)), "dtype": load.dtype}
    n_done = _count_done(out, records, made_by)
    if n_done:
        print(f"{out} holds {n_done} of {len(records)} answers; going on from there", file=sys.stderr)
    if n_done == len(records):
        return
    llm = load.load(model, max_batch=batch_size)
    _check_lengths(llm, records[n_done:], source)
    batches = range(n_done, len(records), batch_size)
    with out.open("a", encoding="utf-8") as file:
        for start in track(batches, description="answering", console=Console(stderr=True)):
            batch = records[start : start + batch_size]
            prompts = [_prompt_of(record) for record in batch]
            for record, completion in zip(batch, llm.complete(prompts, **options), strict=True):
                line = json.dumps({**record, ANSWER: _fields(completion), MADE_BY: made_by}, ensure_ascii=False)
                file.write(line + "\n")
            file.flush()


def _prompt_of(record: dict[str, Any]) -> Any:
    return record["messages"] if "messages" in record else record["prompt"]


def _check_lengths(llm: Any, records: list[dict[str, Any]], source: Path) -> None:
    """Refuse a prompt that leaves no room before any work is done."""
    for record in records:
        n_tokens, room = len(llm.prompt_ids(_prompt_of(record))), llm.config.context_length
        if n_tokens >= room:
            raise RequestError(
                f"{source}: the prompt {str(_prompt_of(record))[:60]!r}... has {n_tokens} tokens and the model's "
                f"context holds {room}, which leaves no room for an answer; shorten it"
            )


def _fields(completion: Any) -> object:
    if isinstance(completion, list):
        return [_fields(each) for each in completion]
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "n_prompt_tokens": completion.n_prompt_tokens,
        "n_new_tokens": completion.n_new_tokens,
    }


def _read_prompts(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each line's record; a bare JSON string counts as a prompt."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prompts {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"{path}, line {number} is not JSON: {error}") from None
        record = {"prompt": record} if isinstance(record, str) else record
        yield _checked(record, f"{path}, line {number}")


def _checked(record: Any, where: str) -> dict[str, Any]:
    """Return the record if it asks for exactly one thing, in a form that can be answered."""
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise RequestError(f'{where} needs either {{"prompt": "..."}} or {{"messages": [...]}}')
    for name in (ANSWER, MADE_BY):
        if name in record:
            raise RequestError(f"{where} has a field {name!r}, where the answer is to be put; rename it")
    if "messages" in record:
        try:
            conversation(record["messages"] if isinstance(record["messages"], list) else [])
        except ChatError as error:
            raise RequestError(f"{where}: {error}") from None
    elif not isinstance(record["prompt"], str):
        raise RequestError(f"{where}: the prompt {record['prompt']!r} is not a text")
    return record


def _count_done(out: Path, records: list[dict[str, Any]], made_by: dict[str, Any]) -> int:
    """Return how many answers `out` holds; a half-written last line is cut off.

    Refuses a file of other prompts, or of other answers: by another model or with other options.
    """
    if not out.exists():
        return 0
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.decode("utf-8", "replace").split("\n")[:-1]
    for number, line in enumerate(lines):
        answered = _parsed(line)
        wanted = records[number] if number < len(records) else None
        if wanted is None or {key: answered.get(key) for key in wanted} != wanted:
            raise RequestError(f"{out}, line {number + 1} answers another prompt; name a new file, or remove this one")
        if answered.get(MADE_BY) != made_by:
            raise RequestError(
                f"{out}, line {number + 1} was made by {answered.get(MADE_BY)}, and this command is {made_by}; "
                "give the same model and options, or name a new file"
            )
    if len(whole) < len(data):
        out.write_bytes(whole)
    return len(lines)


def _parsed(line: str) -> dict[str, Any]:
    """Return the record on a line, or an empty one where there is none."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return record if isinstance(record, dict) else {}
