"""`llama2 generate`: only the text goes to standard output."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama2.chat import conversation
from llama2.cli.options import LoadOptions, SampleOptions, Text
from llama2.errors import ChatError, RequestError
from llama2.files.staging import make_parent

ANSWER = "completion"
"""The field that an answered record gains."""


def generate(
    model: str,
    /,
    *,
    prompt: Text | None = None,
    prompts: Path | None = None,
    out: Path | None = None,
    n: int = 1,
    echo: bool = True,
    batch_size: int = 32,
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
        With --prompts: how many to answer at once.
    """
    if (prompt is None) == (prompts is None):
        raise RequestError("give either --prompt TEXT or --prompts FILE")
    if (prompts is None) != (out is None):
        raise RequestError("--prompts FILE and --out FILE go together")
    if prompts is not None and out is not None:
        _answer_file(prompts, out, model, load, {**sample.given(), "n": n}, batch_size)
        return
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    llm = load.load(model)
    if n > 1:
        for answer in llm.generate(text, n=n, **sample.given()):
            print((text if echo else "") + answer)
        return
    pieces = llm.stream(text, **sample.given())
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
    n_done = _count_done(out, records)
    if n_done:
        print(f"{out} holds {n_done} of {len(records)} answers; going on from there", file=sys.stderr)
    if n_done == len(records):
        return
    llm = load.load(model, max_batch=batch_size)
    batches = range(n_done, len(records), batch_size)
    with out.open("a", encoding="utf-8") as file:
        for start in track(batches, description="answering", console=Console(stderr=True)):
            batch = records[start : start + batch_size]
            prompts = [record["messages"] if "messages" in record else record["prompt"] for record in batch]
            for record, completion in zip(batch, llm.complete(prompts, **options), strict=True):
                line = json.dumps({**record, ANSWER: _fields(completion)}, ensure_ascii=False)
                file.write(line + "\n")
            file.flush()


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
    if ANSWER in record:
        raise RequestError(f"{where} has a field {ANSWER!r}, where the answer is to be put; rename it")
    if "messages" in record:
        try:
            conversation(record["messages"] if isinstance(record["messages"], list) else [])
        except ChatError as error:
            raise RequestError(f"{where}: {error}") from None
    elif not isinstance(record["prompt"], str):
        raise RequestError(f"{where}: the prompt {record['prompt']!r} is not a text")
    return record


def _count_done(out: Path, records: list[dict[str, Any]]) -> int:
    """Return how many answers `out` holds; a half-written last line is cut off. Refuses a file of other prompts."""
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
