"""Samples for the eye: what is trained on stands out, characters stay whole, and text cannot play tricks."""

import io
import re

import pytest
from rich.console import Console

from llama2.chat import Message
from llama2.data.dialogues.render import render_sample
from llama2.data.dialogues.sample import Sample
from llama2.data.dialogues.show import show, stretches
from llama2.tokenizer.formats import load_tokenizer
from tests.pocket import pocket_tokenizer

GREEN, DIM = "\x1b[1;32m", "\x1b[2m"


def sample(question, answer, where="chats.json[3]"):
    return Sample(where, (Message("user", question), Message("assistant", answer)))


def shown(each, tokenizer, *, chat_format="llama2", **settings) -> str:
    out = io.StringIO()
    console = Console(file=out, width=40, **settings)
    show(console, each, render_sample(each, tokenizer, chat_format=chat_format), tokenizer)
    return out.getvalue()


def test_a_pipe_gets_markers():
    text = shown(sample("Hi", "你好 \U0001f600"), pocket_tokenizer())
    assert text == "chats.json[3]  33 tokens, 14 trained\n<s> [INST] Hi [/INST][[ 你好 \U0001f600 </s>]]\n"


def test_a_terminal_gets_colours_and_no_markers():
    each = sample("q\U0001f601", "你好 \U0001f600")
    text = shown(each, pocket_tokenizer(), force_terminal=True, color_system="standard")
    assert f"{DIM}<s> [INST] q\U0001f601 [/INST]\x1b[0m{GREEN} 你好 \U0001f600 </s>\x1b[0m" in text
    assert "[[" not in text
    bare = shown(each, pocket_tokenizer(), force_terminal=True, no_color=True)
    assert "[[ 你好 \U0001f600 </s>]]" in re.sub(r"\x1b\[[0-9;]*m", "", bare)


def test_text_is_no_markup_and_no_emoji_code_and_is_not_wrapped():
    answer = "[bold]x[/bold] [/nothing] :smile: " + "long " * 30
    text = shown(sample("[red]q", answer, where="[red]x[/red].json[0]"), pocket_tokenizer())
    assert text.startswith("[red]x[/red].json[0]  ") and answer.strip() in text and text.count("\n") == 2


def test_control_characters_are_spelled_out():
    text = shown(sample("a\x1b[2Jb", "c\rd\x07\te\nf"), pocket_tokenizer())
    assert "\x1b" not in text and r"a\x1b[2Jb" in text and r"c\rd\x07" in text and "e\nf" in text


def test_characters_split_over_tokens_are_whole_in_real_vocabularies(assets):
    llama2 = load_tokenizer(assets / "tokenizers/llama2/tokenizer.model")
    each = sample("\U0001f600 龘", "\U0001f601 龘龘 é")
    assert any(len(llama2.token_bytes(i)) == 1 for i in llama2.encode("龘"))
    assert "[INST] \U0001f600 龘 [/INST][[ \U0001f601 龘龘 é </s>]]" in shown(each, llama2)
    llama3 = load_tokenizer(assets / "tokenizers/llama3")
    text = shown(each, llama3, chat_format="llama3")
    assert text.endswith("<|end_header_id|>\n\n[[\U0001f601 龘龘 é<|eot_id|>]]\n")
    assert "\ufffd" not in text


@pytest.mark.parametrize("text", ["\U0001f600", "a", "你"])
def test_stretches_are_the_whole_text(text):
    tokenizer = pocket_tokenizer()
    rendered = render_sample(Sample("x.txt", None, text), tokenizer, chat_format=None)
    assert stretches(rendered, tokenizer) == [(False, "<s>"), (True, f" {text}</s>")]
