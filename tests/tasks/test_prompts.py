"""What the model reads, to the id."""

import pytest

from llama2.chat import Message, render
from llama2.data.dialogues.formats import parse
from llama2.data.dialogues.render import render_sample
from llama2.data.storyworld.words import table as world_table
from llama2.errors import RequestError
from llama2.tasks.prompts import ask, default_instruction, language_code, table, translations


def test_the_default_instructions_are_the_story_worlds():
    world = world_table("tasks")
    for task in ("title", "summarise", "sentiment"):
        assert table()["instructions"][task] == world["instructions"][task]
    for language, targets in world["instructions"]["translate"].items():
        for target, said in targets.items():
            assert default_instruction("translate", language, target=target) == said
            assert translations()[said] == (language, target)
    for language, pair in table()["sentiments"].items():
        assert pair == [world["sentiments"][mood][language] for mood in ("good", "bad")]
    assert len(translations()) == 3 * 15


def test_zero_shot_reads_as_the_alpaca_record_that_trains_it(llm):
    record = {"instruction": "Give the story a title.", "input": "A cat sat.", "output": "Cat"}
    trained = render_sample(parse(record, "alpaca", "x"), llm.tokenizer, chat_format=None)
    prompt = ask("title", "A cat sat.")
    assert prompt.answered(llm, "Cat") == trained
    asked = llm.prompt_ids(prompt.asked())
    assert trained.tokens[: len(asked)] == asked == trained.tokens[: trained.trainable.index(True)]


def test_plain_without_a_cue_reads_as_plain_fine_tuning(llm):
    record = {"instruction": "Give the story a title.", "input": "A cat sat.", "output": "Cat"}
    trained = render_sample(parse(record, "alpaca", "x"), llm.tokenizer, chat_format="plain")
    assert ask("title", "A cat sat.", style="plain", cue="").answered(llm, "Cat") == trained


def test_examples_are_earlier_turns(llm):
    prompt = ask("title", "c", examples=[("a", "A"), ("b", "B")], instruction="Do.")
    turns = ["Do.\na", "A", "Do.\nb", "B", "Do.\nc"]
    messages = [Message(("user", "assistant")[i % 2], said) for i, said in enumerate(turns)]
    wanted = render(messages, llm.tokenizer, add_generation_prompt=True).tokens
    assert llm.prompt_ids(prompt.asked()) == wanted
    bytes_of = [3 + byte for byte in b"[INST] Do.\nc [/INST]"]
    space = 259
    tail = [space if i == 3 + 32 else i for i in bytes_of]
    assert wanted[-len(tail) - 2 :] == [1, space, *tail]
    marked = prompt.answered(llm, "C")
    assert [i for i, mark in zip(marked.tokens, marked.trainable, strict=True) if mark] == [space, 3 + 67, space, 2]


def test_plain_examples_stand_before_and_end_with_a_blank_line(llm):
    prompt = ask("title", "c", examples=[("a", "A")], instruction="Do.", style="plain")
    assert prompt.asked() == "Do.\na\nA\n\nDo.\nc\n"
    rendered = prompt.answered(llm, "C")
    assert llm.tokenizer.decode(rendered.tokens) == "Do.\na\nA\n\nDo.\nc\nC\n\n"
    answer = [i for i, mark in zip(rendered.tokens, rendered.trainable, strict=True) if mark]
    assert answer == [3 + byte for byte in b"C\n\n"]


def test_an_empty_instruction_leaves_the_text_alone():
    assert ask("title", "c", instruction="").asked() == (Message("user", "c"),)


@pytest.mark.parametrize(
    ("task", "arguments", "said"),
    [
        ("title", dict(text=" \n"), "the text is empty"),
        ("title", dict(text="a", language="eng"), "language='eng' has no instructions, did you mean 'en'"),
        ("title", dict(text="a", style="chatty"), "style='chatty'"),
        ("title", dict(text="a", examples=["ab"]), "example 0 is 'ab'"),
        ("title", dict(text="a", examples=[("a", " ")]), "example 0 has an empty"),
        ("translate", dict(text="a"), "the language to translate into"),
        ("translate", dict(text="a", target="Germn"), "did you mean 'German'"),
    ],
)
def test_a_mistake_is_named(task, arguments, said):
    with pytest.raises(RequestError, match=said):
        ask(task, **arguments)


def test_languages_go_by_code_or_name():
    assert [language_code(name) for name in ("es", "Spanish", "espa\u00f1ol")] == ["es", "es", "es"]
    assert default_instruction("classify", "zh", labels=["a", "b"]).count("a\u3001b") == 1
