"""`llama2 demo`: everything at once, or a chat with a given model."""

from pathlib import Path

from llama2.cli.chat import Session
from llama2.cli.options import LoadOptions
from llama2.errors import RequestError


def demo(model: str | None = None, /, *, out: Path | None = None) -> None:
    """See the package at work.

    Parameters
    ----------
    model
        Folder, file or hub name to chat with; without one, a pocket Llama walks through every format.
    out
        Without a model: a new folder to keep the files in.
    """
    if model is None:
        import llama2.demo

        llama2.demo.demo(out)
    elif out is not None:
        raise RequestError("--out keeps the files of the demo without a model; with one there are none")
    else:
        Session(LoadOptions().load(model), {"max_new_tokens": None}).run()
