"""Written answers equal those of LLM.chat, and titles are ranked."""

import math

import pytest

from llama2.errors import RequestError
from llama2.tasks import answer, summarise, title, translate
from llama2.tasks.texts import TITLE_TOKENS

FEW = {"max_new_tokens": 12}


def chat(llm, question, **options):
    return llm.chat([{"role": "user", "content": question}], **{"temperature": 0, **FEW, **options}).strip()


def test_tasks_are_greedy_chat(llm):
    assert translate(llm, "Hi", target_language="es", **FEW).text == chat(llm, "Translate into Spanish.\nHi")
    assert summarise(llm, "Hi", **FEW).text == chat(llm, "Tell the story in one sentence.\nHi")
    assert answer(llm, "Hi there", "Who?", **FEW).text == chat(llm, "Who?\nHi there")
    assert answer(llm, "Hi", "Who?", instruction="Be brief.", **FEW).text == chat(llm, "Be brief.\nWho?\nHi")


def test_the_source_language_gives_the_instruction_its_language(llm):
    said = "Traduce al ingl\u00e9s.\nHola"
    assert translate(llm, "Hola", target_language="en", source_language="es", **FEW).text == chat(llm, said)
    german = translate(llm, "Hallo", target_language="en", source_language="de", **FEW)
    assert german.text == chat(llm, "Translate into English.\nHallo")


def test_sampling_is_as_it_is_told(llm):
    options = {"temperature": 1.0, "seed": 3}
    said = translate(llm, "Hi", target_language="es", **FEW, **options)
    assert said.text == chat(llm, "Translate into Spanish.\nHi", **options)
    assert said.text != translate(llm, "Hi", target_language="es", **FEW).text


def test_the_log_probability_is_the_mean_of_the_tokens(llm):
    found = summarise(llm, "Hi", **FEW)
    messages = [{"role": "user", "content": "Tell the story in one sentence.\nHi"}]
    whole = llm.complete(messages, temperature=0, logprobs=0, **FEW)
    assert found.logprob == pytest.approx(math.fsum(whole.logprobs) / len(whole.logprobs))
    assert (found.n_tokens, found.finish_reason) == (whole.n_new_tokens, whole.finish_reason)


def test_few_shot_examples_of_questions(llm):
    found = answer(llm, "p", "q?", examples=[("p1", "q1?", "a1")], **FEW)
    messages = [
        {"role": "user", "content": "q1?\np1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q?\np"},
    ]
    assert found.text == llm.chat(messages, temperature=0, **FEW).strip()


def test_titles_are_ranked_by_mean_log_probability(llm):
    found = title(llm, "A cat sat.", n=6, seed=1, max_new_tokens=6)
    assert [each.logprob for each in found] == sorted((each.logprob for each in found), reverse=True)
    assert len({each.text for each in found}) == len(found) > 2
    greedy = chat(llm, "Give the story a title.\nA cat sat.", max_new_tokens=6)
    assert greedy in [each.text for each in found]
    same = title(llm, "A cat sat.", n=6, seed=1, max_new_tokens=6)
    assert [(each.text, each.n_tokens) for each in found] == [(each.text, each.n_tokens) for each in same]
    assert all(each.n_tokens <= TITLE_TOKENS for each in title(llm, "A cat sat.", n=1, seed=1))


def test_plain_style_ends_at_a_blank_line(llm):
    found = summarise(llm, "x", style="plain", **FEW)
    wanted = llm.generate("Tell the story in one sentence.\nx\n", temperature=0, stop="\n\n", **FEW)
    assert found.text == wanted.strip()


def test_mistakes_are_named(llm):
    with pytest.raises(RequestError, match="the question is empty"):
        answer(llm, "p", " ")
    with pytest.raises(RequestError, match="ask your question in that one"):
        answer(llm, "p", "q", language="es")
    with pytest.raises(RequestError, match="example 0"):
        answer(llm, "p", "q", examples=[("p", "a")])
    with pytest.raises(RequestError, match="n=2"):
        summarise(llm, "x", n=2)
    with pytest.raises(RequestError, match="'tempersture' is not a sampling option"):
        summarise(llm, "x", tempersture=1)
    with pytest.raises(RequestError, match=r"has 7\d\d tokens and the model's context holds 640"):
        summarise(llm, "x" * 700)
    with pytest.raises(RequestError, match="target_language='tlh'"):
        translate(llm, "x", target_language="tlh")
