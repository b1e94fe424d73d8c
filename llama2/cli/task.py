"""`llama2 task`: what `llama2.tasks` does, one command each."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from llama2.cli.main import COMMANDS, epilogue
from llama2.cli.options import LoadOptions, Text, read_standard_input
from llama2.errors import RequestError

app = App(name="task", help=COMMANDS["task"][1], help_epilogue=epilogue("task"), help_format="plaintext")

Model = Annotated[str, Parameter(help="Folder, file or hub name.")]
Given = Annotated[str, Parameter(allow_leading_hyphen=True, help="Text; `-` reads standard input, `@FILE` a file.")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]
Names = Annotated[tuple[str, ...], Parameter(name="--label", consume_multiple=False, negative="", show_default=False)]


@Parameter(name="*")
@dataclass(frozen=True)
class AskOptions:
    """How to ask."""

    language: str | None = None
    """Language of the instruction: en, es or zh."""
    instruction: Text | None = None
    """Your own instruction, instead of the one in that language."""
    examples: Path | None = None
    """File of solved examples to show first: lines of text TAB answer, or JSON lines of input and output."""
    style: Literal["chat", "plain"] = "chat"
    """plain writes no chat tags, for a model that knows none; give it examples."""

    def given(self, task: str) -> dict[str, Any]:
        """Return keyword arguments for the functions of `llama2.tasks`."""
        found: dict[str, Any] = {"language": self.language, "instruction": self.instruction, "style": self.style}
        if self.examples is not None:
            from llama2.tasks.items import read_items

            items = read_items(self.examples, task=task)
            answering = task == "answer"
            found["examples"] = [
                (item.input, *([item.instruction or ""] if answering else []), item.output) for item in items
            ]
        return found


@Parameter(name="*")
@dataclass(frozen=True)
class ChooseOptions:
    """How to weigh labels."""

    by: Literal["total", "mean"] = "total"
    """Weigh a label by all of its tokens, or by their mean."""
    calibrate: bool = False
    """Take away what the model prefers when the text says nothing."""


@Parameter(name="*")
@dataclass(frozen=True)
class WriteOptions:
    """How to choose the tokens of an answer."""

    max_new_tokens: int | None = None
    """At most this many tokens [default: 256; of a title 32]."""
    temperature: float | None = None
    """0 always takes the likeliest token [default: 0; for further titles 0.8]."""
    top_p: float | None = None
    """Keep the likeliest tokens up to this probability [default: 0.9]."""
    repetition_penalty: float | None = None
    """Above 1 discourages tokens seen in prompt or answer."""
    seed: int | None = None
    """Makes the random choices repeatable."""

    def given(self) -> dict[str, Any]:
        """Return only what the user set."""
        return {name: value for name, value in vars(self).items() if value is not None}


def _example(line: str) -> str:
    return f"Examples:\n  llama2 task {line}"


@app.command(help_epilogue=_example('sentiment ./my-model "What a lovely day!" --json'))
def sentiment(
    model: Model,
    text: Given,
    /,
    *,
    as_json: AsJson = False,
    choose: ChooseOptions = ChooseOptions(),
    ask: AskOptions = AskOptions(),
    load: LoadOptions = LoadOptions(),
) -> None:
    """Tell whether a text is positive or negative."""
    from llama2.tasks.labels import sentiment as judge

    options = {**vars(choose), **ask.given("sentiment")}
    said = _text_of(text)
    _print_label(judge(load.load(model), said, **options), as_json)


@app.command(help_epilogue=_example("classify ./my-model @mail.txt --label question --label complaint --label spam"))
def classify(
    model: Model,
    text: Given,
    /,
    *,
    labels: Names = (),
    as_json: AsJson = False,
    choose: ChooseOptions = ChooseOptions(),
    ask: AskOptions = AskOptions(),
    load: LoadOptions = LoadOptions(),
) -> None:
    """Choose the label that fits a text best.

    Parameters
    ----------
    labels
        A label; give the flag once for each, twice at least.
    """
    from llama2.tasks.labels import check_labels, classify as choose_label

    check_labels(labels)
    options = {**vars(choose), **ask.given("classify")}
    said = _text_of(text)
    _print_label(choose_label(load.load(model), said, labels, **options), as_json)


@app.command(help_epilogue=_example('translate ./my-model "Good morning" --to es'))
def translate(
    model: Model,
    text: Given,
    /,
    *,
    to: str,
    source: Annotated[str | None, Parameter(name="--from")] = None,
    as_json: AsJson = False,
    sample: WriteOptions = WriteOptions(),
    ask: AskOptions = AskOptions(),
    load: LoadOptions = LoadOptions(),
) -> None:
    """Translate a text.

    Parameters
    ----------
    to
        Language to translate into, such as es or Spanish.
    source
        Language of the text; the instruction is in it where there is one.
    """
    from llama2.tasks.texts import translate as run

    options = {**ask.given("translate"), **sample.given(), "target_language": to, "source_language": source}
    said = _text_of(text)
    _print_texts([run(load.load(model), said, **options)], as_json)


@app.command(help_epilogue=_example("summarise ./my-model @story.txt"))
def summarise(
    model: Model,
    text: Given,
    /,
    *,
    as_json: AsJson = False,
    sample: WriteOptions = WriteOptions(),
    ask: AskOptions = AskOptions(),
    load: LoadOptions = LoadOptions(),
) -> None:
    """Tell a text in one sentence."""
    from llama2.tasks.texts import summarise as run

    options = {**ask.given("summarise"), **sample.given()}
    said = _text_of(text)
    _print_texts([run(load.load(model), said, **options)], as_json)


@app.command(help_epilogue=_example('answer ./my-model @story.txt --question "Who is the story about?"'))
def answer(
    model: Model,
    passage: Given,
    /,
    *,
    question: Text,
    as_json: AsJson = False,
    sample: WriteOptions = WriteOptions(),
    ask: AskOptions = AskOptions(),
    load: LoadOptions = LoadOptions(),
) -> None:
    """Answer a question about a passage.

    Parameters
    ----------
    question
        What to answer.
    """
    from llama2.tasks.texts import answer as run

    options = {**ask.given("answer"), **sample.given()}
    said = _text_of(passage)
    _print_texts([run(load.load(model), said, question, **options)], as_json)


@app.command(help_epilogue=_example("title ./my-model @story.txt --n 8 --seed 1"))
def title(
    model: Model,
    text: Given,
    /,
    *,
    n: int = 4,
    as_json: AsJson = False,
    sample: WriteOptions = WriteOptions(),
    ask: AskOptions = AskOptions(),
    load: LoadOptions = LoadOptions(),
) -> None:
    """Give a text titles, the likeliest first.

    Parameters
    ----------
    n
        Titles to sample besides the likeliest; equal ones are printed once.
    """
    from llama2.tasks.texts import title as run

    options = {**ask.given("title"), **sample.given(), "n": n}
    said = _text_of(text)
    _print_texts(run(load.load(model), said, **options), as_json, with_score=True)


app.command(
    "llama2.cli.task_evaluate:evaluate",
    name="evaluate",
    help="Score a model on a labelled file.",
    help_epilogue=_example("evaluate ./my-model dev.tsv --task sentiment --label 1=positive --label 0=negative"),
)


def _text_of(text: str) -> str:
    if text == "-":
        return read_standard_input()
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{text} cannot be read as UTF-8 text: {error}") from None


def _print_label(label: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(label), ensure_ascii=False))
        return
    for name, probability in sorted(label.probabilities.items(), key=lambda pair: -pair[1]):
        print(f"{probability:.3f}  {name}")


def _print_texts(texts: Any, as_json: bool, *, with_score: bool = False) -> None:
    if as_json:
        found = [asdict(each) for each in texts]
        print(json.dumps(found if with_score else found[0], ensure_ascii=False))
        return
    for each in texts:
        print(f"{each.logprob:7.3f}  {each.text}" if with_score else each.text)
        if each.finish_reason == "length":
            print("note: cut off; raise --max-new-tokens for the rest", file=sys.stderr)
