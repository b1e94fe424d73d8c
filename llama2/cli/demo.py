"""`llama2 demo`: everything at once, or a chat with a given model."""

from pathlib import Path

from llama2.cli.chat import Session
from llama2.cli.options import LoadOptions
from llama2.errors import RequestError


def demo(model: str | None = None, /, *, out: Path | None = None, quick: bool = False) -> None:
    """See the package at work.

    Parameters
    ----------
    model
        Folder, file or hub name to chat with; without one, a small Llama is trained on stories, in minutes.
    out
        Without a model: folder for everything that is made [default: llama2-demo]. A demo that was stopped goes on.
    quick
        Every stage at a hundredth of its size, in a minute; the stories are then not worth reading.
    """
    if model is None:
        from llama2.demo.run import demo as show
        from llama2.demo.size import FULL, QUICK

        show(out or Path("llama2-demo"), size=QUICK if quick else FULL)
    elif out is not None or quick:
        raise RequestError("--out and --quick belong to the demo without a model; with one it is a chat")
    else:
        Session(LoadOptions().load(model), {"max_new_tokens": None}).run()
