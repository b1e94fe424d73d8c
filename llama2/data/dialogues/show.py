"""A rendered sample for a person's eyes: what is trained on stands out, by colour or else between [[ and ]].

chats.jsonl:12  15 tokens, 4 trained
<s> [INST] Hi [/INST][[ Hello! </s>]]
"""

from itertools import groupby
from unicodedata import category

from rich.console import Console
from rich.text import Text

from llama2.chat import Rendered
from llama2.data.dialogues.sample import Sample
from llama2.tokenizer.tokenizer import StreamDecoder, Tokenizer

TRAINED, MASKED = "bold green", "dim"


def show(console: Console, sample: Sample, rendered: Rendered, tokenizer: Tokenizer) -> None:
    """Print where a sample comes from, how much of it is trained on, and its text with special tokens visible."""
    is_coloured = console.is_terminal and not console.no_color
    page = Text(f"{sample.where}  {len(rendered.tokens)} tokens, {sum(rendered.trainable)} trained\n")
    for mark, text in stretches(rendered, tokenizer):
        text = "".join(_visible(char) for char in text)
        if is_coloured:
            page.append(text, style=TRAINED if mark else MASKED)
        else:
            page.append(f"[[{text}]]" if mark else text)
    # a Text is printed as it is: no markup, no highlighting
    console.print(page, soft_wrap=True)


def stretches(rendered: Rendered, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """Return the text in stretches, each trained on or not; a character belongs to the token that completes it."""
    decoder = StreamDecoder(tokenizer, special=True)
    pieces = [(mark, decoder.push(i)) for i, mark in zip(rendered.tokens, rendered.trainable, strict=True)]
    pieces.append((bool(pieces) and pieces[-1][0], decoder.flush()))
    shown = [piece for piece in pieces if piece[1]]
    return [(mark, "".join(text for _, text in group)) for mark, group in groupby(shown, key=lambda piece: piece[0])]


def _visible(char: str) -> str:
    """Control characters would move the cursor, or worse: they are spelled out."""
    return char if char in "\n\t" or category(char) != "Cc" else repr(char)[1:-1]
