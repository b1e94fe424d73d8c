"""`llama2 chat`: a conversation in the terminal."""

import contextlib
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from llama2.chat import detect_format
from llama2.cli.options import LoadOptions, SampleOptions, Text
from llama2.errors import Llama2Error

HELP = """\
/system TEXT   set the system message (no TEXT: remove it) and begin anew
/reset         begin anew
/undo          take back the last question and its answer
/edit          change the last question and ask again
/retry         ask the last question again
/stats         show or hide tokens per second
/help          this list
/exit          leave (so does Ctrl-D); Ctrl-C stops an answer"""


def chat(
    model: str,
    /,
    *,
    system: Text | None = None,
    stats: bool = False,
    chat_format: Annotated[Literal["llama2", "llama3", "template"] | None, Parameter(name="--format")] = None,
    sample: SampleOptions = SampleOptions(),
    load: LoadOptions = LoadOptions(),
) -> None:
    """Talk to a model in the terminal. /help lists what can be typed besides messages.

    Parameters
    ----------
    model
        Folder, file or hub name.
    system
        System message, e.g. how to answer.
    stats
        Show tokens per second after each answer.
    chat_format
        How messages become tokens; by the checkpoint's own template if not given.
    """
    Session(load.load(model, chat_format=chat_format), {"max_new_tokens": None, **sample.given()}, system, stats).run()


@dataclass
class Session:
    """The state of one conversation and the loop that advances it."""

    llm: Any
    options: dict[str, Any]
    system: str | None = None
    shows_stats: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def run(self) -> None:
        """Read lines until the end of input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
        if not self.llm.tokenizer.chat_template and self.llm.chat_format is None:
            form = detect_format(self.llm.tokenizer)
            say(f"This checkpoint names no chat format, so {form}'s is used; a model never taught to chat will ramble.")
        say("Type a message; /help lists commands, Ctrl-D leaves.")
        while True:
            try:
                line = input(_prompt()).strip()
            except EOFError:
                say("")
                return
            except KeyboardInterrupt:
                say("  (Ctrl-D leaves)")
                continue
            if line in ("/exit", "/quit"):
                return
            try:
                self.handle(line)
            except Llama2Error as error:
                say(f"! {error}" + (" (/reset, or /undo)" if "leaves no room" in str(error) else ""))

    def handle(self, line: str) -> None:
        """Do what one line asks for."""
        command, _, rest = line.partition(" ")
        match command:
            case "":
                pass
            case "/help":
                say(HELP)
            case "/reset":
                self.messages.clear()
                say("(new conversation)")
            case "/system":
                self.system = rest.strip() or None
                self.messages.clear()
                say(f"(new conversation, {'system message set' if self.system else 'no system message'})")
            case "/stats":
                self.shows_stats = not self.shows_stats
                say(f"(tokens per second {'shown' if self.shows_stats else 'hidden'})")
            case "/undo" | "/retry" | "/edit" if not self.messages:
                say("(nothing was asked yet)")
            case "/undo":
                say(f"(took back: {self.messages[-2]['content']})")
                del self.messages[-2:]
            case "/retry":
                self.ask(self.messages[-2]["content"], after=self.messages[:-2])
            case "/edit":
                self.ask(_edited(self.messages[-2]["content"]), after=self.messages[:-2])
            case _ if command.startswith("/"):
                say(f"! {command} is not a command; /help lists them")
            case _:
                self.ask(line, after=self.messages)

    def ask(self, question: str, *, after: list[dict[str, str]]) -> None:
        """Send a question and print the answer as it comes; what is refused leaves everything as it was."""
        if not question:
            return
        asked = [*after, {"role": "user", "content": question}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        pieces: list[str] = []
        started = time.perf_counter()
        try:
            for piece in self.llm.stream([*system, *asked], **self.options):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            say(" (stopped)", end="")
        print()
        answer = "".join(pieces).strip()
        if not answer:
            say("(no answer)")
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        if self.shows_stats:
            n_tokens = len(self.llm.tokenizer.encode("".join(pieces)))
            seconds = time.perf_counter() - started
            say(
                f"({n_tokens} tokens in {seconds:.1f} s, reading the conversation included: {n_tokens / seconds:.1f}/s)"
            )


def _prompt() -> str:
    return "> " if sys.stdin.isatty() else ""


def _edited(question: str) -> str:
    """Let the user change a line in place where the terminal can; else return it as it was."""
    if not sys.stdin.isatty():
        return question
    try:
        import readline
    except ImportError:
        return question
    readline.set_startup_hook(lambda: readline.insert_text(question))
    try:
        return input("edit> ").strip()
    except (EOFError, KeyboardInterrupt):
        say("(unchanged)")
        return ""
    finally:
        readline.set_startup_hook(None)


def say(text: str, *, end: str = "\n") -> None:
    """Print what is not the model's words, on standard error."""
    print(text, end=end, file=sys.stderr, flush=True)
