"""Prompt and answer as tokens: the ids of the whole conversation, and marks on its last answer only."""

from dataclasses import replace

import pytest

from llama2.chat import Message, render
from llama2.data.dialogues.render import render_sample
from llama2.data.dialogues.sample import Sample
from llama2.data.preferences.read import read_pairs
from llama2.data.preferences.render import render_answer
from llama2.data.storyworld.preferences import preferences
from llama2.errors import DataError
from llama2.tokenizer.formats import load_tokenizer
from llama2.tokenizer.tokenizer import Tokenizer
from tests.pocket import pocket_tokenizer

POCKET = pocket_tokenizer()
EOS = 2
HI = (Message("user", "Hi"),)
LONG = (Message("system", "Be brief."), *HI, Message("assistant", "Hello!"), Message("user", "Bye"))


def check(prompt, answer, tokenizer, format):
    """The ids are those of the whole; the marks are its marks, where the prompt's own are no more."""
    whole = render((*prompt, Message("assistant", answer)), tokenizer, format=format)
    asked = render(prompt, tokenizer, format=format, add_generation_prompt=True)
    rendered = render_answer(prompt, answer, tokenizer, chat_format=format)
    assert rendered.tokens == whole.tokens
    n_asked = rendered.trainable.index(True)
    assert rendered.tokens[:n_asked] == asked.tokens
    assert rendered.trainable == [False] * n_asked + whole.trainable[n_asked:]
    return rendered


@pytest.mark.parametrize("prompt", [HI, LONG])
def test_the_answer_alone_is_marked(prompt):
    rendered = check(prompt, "See you.", POCKET, "llama2")
    marked = [i for i, mark in zip(rendered.tokens, rendered.trainable, strict=True) if mark]
    assert POCKET.decode(marked[:-1]).strip() == "See you." and marked[-1] == EOS


def test_storyworlds_pairs_equal_their_conversations():
    for pair in preferences(0, 40):
        for answer in (pair.chosen, pair.rejected):
            check(pair.prompt, answer, POCKET, "llama2")


@pytest.mark.parametrize(("name", "format"), [("llama2/tokenizer.model", "llama2"), ("llama3", "llama3")])
def test_real_pairs_equal_their_conversations(assets, name, format):
    tokenizer = load_tokenizer(assets / "tokenizers" / name)
    for path in ("preference/dpo_zh_demo.json", "preference/dpo_en_demo.json"):
        for pair in list(read_pairs(assets / path))[:20]:
            check(pair.prompt, pair.chosen, tokenizer, format)


def test_a_checkpoints_own_template_is_followed():
    asked = "{% if m.role != 'assistant' %}<{{ m.role }}>{{ m.content }}"
    answered = "{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    template = f"{{% for m in messages %}}{asked}{answered}{{% endfor %}}"
    tokenizer = Tokenizer(replace(POCKET.vocabulary, chat_template=template))
    for prompt in (HI, LONG):
        assert sum(check(prompt, "See you.", tokenizer, "template").trainable) == len("See you.") + 1


def test_plain_joins_one_question_and_its_answer():
    rendered = render_answer(HI, " there", POCKET, chat_format="plain")
    sample = Sample("", (*HI, Message("assistant", " there")))
    assert rendered == render_sample(sample, POCKET, chat_format="plain")
    assert POCKET.decode(rendered.tokens) == "Hi there" and sum(rendered.trainable) == len(" there") + 1
    with pytest.raises(DataError, match=r"^pairs:3: the roles are system, user, assistant, user, assistant; 'plain'"):
        render_answer(LONG, "See you.", POCKET, chat_format="plain", where="pairs:3")


@pytest.mark.parametrize("format", ["llama2", "plain"])
def test_an_empty_answer_is_its_end(format):
    rendered = render_answer(HI, "", POCKET, chat_format=format)
    marked = [i for i, mark in zip(rendered.tokens, rendered.trainable, strict=True) if mark]
    assert marked[-1] == EOS and POCKET.decode(marked).strip() == "" and len(marked) <= 3


def test_what_cannot_be_rendered_names_its_place():
    with pytest.raises(DataError, match=r"^pairs:3: message 0 contains '\[INST\]'"):
        render_answer((Message("user", "[INST]"),), "Hm", POCKET, where="pairs:3")
