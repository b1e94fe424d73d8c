"""Samples as tokens: the reference's own ids and marks, answers kept out, plain text, and what must be refused."""

import random
from dataclasses import replace

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings, strategies as st

from llama2 import chat
from llama2.chat import Message
from llama2.data.dialogues.read import read_samples
from llama2.data.dialogues.render import render_sample
from llama2.data.dialogues.sample import Sample
from llama2.errors import DataError
from llama2.tokenizer.formats import load_tokenizer
from llama2.tokenizer.tokenizer import Tokenizer
from tests.pocket import pocket_tokenizer

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def llama2(assets) -> Tokenizer:
    return load_tokenizer(assets / "tokenizers/llama2/tokenizer.model")


@pytest.fixture(scope="module")
def llama3(assets) -> Tokenizer:
    return load_tokenizer(assets / "tokenizers/llama3")


@pytest.fixture(scope="module")
def pieces(assets) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(assets / "tokenizers/llama2/tokenizer.model"))


def dialogue(*contents, system=None, trained=None, where="chats.jsonl:12") -> Sample:
    before = [Message("system", system)] if system is not None else []
    turns = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return Sample(where, (*before, *turns), trained=trained)


def reference(sample: Sample, pieces) -> tuple[list[int], list[bool]]:
    """The rule of facebookresearch/llama, generation.py, chat_completion, stated once more and without our code."""
    texts = [message.content for message in sample.messages]
    if sample.messages[0].role == "system":
        texts = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}", *texts[2:]]
    ids, marks = [], []
    for i in range(0, len(texts), 2):
        question = f"[INST] {texts[i].strip()} [/INST]"
        if i + 1 == len(texts):
            turn = [BOS, *pieces.encode(question)]
            ids, marks = ids + turn, marks + [False] * len(turn)
            continue
        turn = [BOS, *pieces.encode(f"{question} {texts[i + 1].strip()} "), EOS]
        # "]" never joins what follows it in this vocabulary, so the question is a prefix of the turn
        n_asked = 1 + len(pieces.encode(question))
        assert turn[:n_asked] == [BOS, *pieces.encode(question)]
        ids, marks = ids + turn, marks + [False] * n_asked + [True] * (len(turn) - n_asked)
    return ids, marks


def runs(rendered) -> list[list[int]]:
    found, last = [], False
    for token_id, mark in zip(rendered.tokens, rendered.trainable, strict=True):
        if mark:
            found = found if last else [*found, []]
            found[-1].append(token_id)
        last = mark
    return found


def test_two_turns_of_llama2_by_hand(llama2):
    rendered = render_sample(
        dialogue("Hi", "Hello!", " 1+1? ", "2 \U0001f600", system="Be brief."), llama2, chat_format=None
    )
    asked = [
        1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 3629, 11473, 29889, 13, 29966, 829, 14816, 29903, 6778,
        13, 13, 18567, 518, 29914, 25580, 29962,
    ]  # fmt: skip
    again = [1, 518, 25580, 29962, 29871, 29896, 29974, 29896, 29973, 518, 29914, 25580, 29962]
    answer, other = [15043, 29991, 29871, 2], [29871, 29906, 29871, 243, 162, 155, 131, 29871, 2]
    assert rendered.tokens == [*asked, *answer, *again, *other]
    assert rendered.trainable == [*[False] * 25, *[True] * 4, *[False] * 13, *[True] * 9]


def test_llama2_equals_the_reference_token_for_token(llama2, pieces):
    for contents in (
        ("Hi", "Hello!"),
        ("One", " a  b\u3000c ", "Two", "[d] e"),
        ("你好", "很好。\n\n谢谢", "再见", "\U0001f600 </s> <s>", "and?"),
        ("  spaces ", "\ttab\n", "x", "```py\n  y = 1\n```"),
    ):
        for system in (None, "Be kind.", "你是\n助手"):
            sample = dialogue(*contents, system=system)
            rendered = render_sample(sample, llama2, chat_format="llama2")
            assert (rendered.tokens, rendered.trainable) == reference(sample, pieces)


def test_real_dialogues_equal_the_reference(assets, llama2, pieces):
    skip = lambda *_: None  # noqa: E731
    for name in ("sft/sharegpt_zh_1K_format.jsonl", "sft/en_100_tree.jsonl", "preference/dpo_en_demo.json"):
        samples = list(read_samples(assets / name, broken=skip))
        n_seen = 0
        for sample in random.Random(0).sample(samples, 40):
            if any(tag in message.content for message in sample.messages for tag in ("[INST]", "<<SYS>>")):
                continue
            rendered = render_sample(replace(sample, trained=None), llama2, chat_format="llama2")
            assert (rendered.tokens, rendered.trainable) == reference(sample, pieces), sample.where
            n_seen += 1
        assert n_seen > 30


def test_only_the_answers_asked_for_are_trained(llama2, llama3):
    contents = ("a", "first", "b", "second", "c", "third")
    for tokenizer in (llama2, llama3):
        whole = render_sample(dialogue(*contents, system="s"), tokenizer, chat_format=None)
        for wanted in ((0,), (1,), (2,), (0, 2), (0, 1, 2)):
            trained = (False, *(i % 2 == 1 and i // 2 in wanted for i in range(6)))
            rendered = render_sample(dialogue(*contents, system="s", trained=trained), tokenizer, chat_format=None)
            assert rendered.tokens == whole.tokens
            assert runs(rendered) == [runs(whole)[i] for i in wanted]


def test_plain_is_the_prompt_and_then_the_completion(llama2):
    rendered = render_sample(dialogue("Once upon", " a time"), llama2, chat_format="plain")
    assert rendered.tokens == [1, 9038, 2501, 263, 931, 2]
    assert rendered.trainable == [False, False, False, True, True, True]


def test_plain_gives_a_token_across_the_boundary_to_the_completion(llama2, llama3):
    rendered = render_sample(dialogue("Once upon ", "a time"), llama2, chat_format="plain")
    assert (rendered.tokens, runs(rendered)) == ([1, 9038, 2501, 263, 931, 2], [[263, 931, 2]])
    rendered = render_sample(dialogue("Hel", "lo world"), llama2, chat_format="plain")
    assert (rendered.tokens, runs(rendered)) == ([1, 15043, 3186, 2], [[15043, 3186, 2]])
    rendered = render_sample(dialogue("The ", "cat"), llama3, chat_format="plain")
    assert (rendered.tokens, runs(rendered)) == ([128000, 791, 8415, 128001], [[8415, 128001]])


def test_plain_bears_bytes_and_removed_spaces(llama2, assets):
    rendered = render_sample(dialogue("\U0001f600", "\U0001f601"), llama2, chat_format="plain")
    assert llama2.decode(runs(rendered)[0]) == "\U0001f601"
    stories = load_tokenizer(assets / "checkpoints/stories260K")
    rendered = render_sample(dialogue("One  day ", "  Lily ran"), stories, chat_format="plain")
    assert stories.decode(runs(rendered)[0]).strip() == "Lily ran"


def test_a_text_is_trained_whole_in_every_format(llama2):
    sample = Sample("x.txt", None, "Once upon a time")
    for chat_format in (None, "llama2", "plain"):
        rendered = render_sample(sample, llama2, chat_format=chat_format)
        assert rendered.tokens == [1, 9038, 2501, 263, 931, 2]
        assert rendered.trainable == [False, *[True] * 5]


@pytest.mark.parametrize(
    "sample, chat_format, wanted",
    [
        (dialogue("a", "b", "c", "d"), "plain", "'plain' writes no tags"),
        (dialogue("a", "b", system="s"), "plain", "'plain' writes no tags"),
        (dialogue("a", "b", trained=(False, False)), "llama2", "no answer is to be trained"),
        (dialogue("a", "b", trained=(False, False)), "plain", "no answer is to be trained"),
        (dialogue("a", " "), "llama2", "message 1 (assistant) is empty"),
        (dialogue("a", ""), "plain", "message 1 (assistant) is empty"),
        (dialogue("a"), "llama2", "nothing to train on"),
        (Sample("chats.jsonl:12", None, "  "), None, "the text is empty"),
        (Sample("chats.jsonl:12", None, "\ud800"), None, "lone surrogate"),
        (dialogue("a [INST]", "b"), "llama2", "special tags are not allowed"),
        (dialogue("a", "b"), "llama3", "begin_of_text"),
        (Sample("chats.jsonl:12", (Message("user", "a"), Message("tool", "b"))), "llama2", "the Llama 2 format wants"),
    ],
)
def test_refusals_name_the_place(sample, chat_format, wanted):
    with pytest.raises(DataError) as caught:
        render_sample(sample, pocket_tokenizer(), chat_format=chat_format)
    message = str(caught.value)
    assert message.startswith("chats.jsonl:12: ") and wanted in message and "\n" not in message


def test_an_unknown_format_is_refused():
    with pytest.raises(DataError, match="did you mean 'plain'"):
        render_sample(dialogue("a", "b"), pocket_tokenizer(), chat_format="plane")


def test_answers_that_run_into_each_other_are_refused():
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = Tokenizer(replace(pocket_tokenizer().vocabulary, chat_template=template))
    with pytest.raises(DataError, match="chats.jsonl:12: 1 trained stretches of tokens for 2 answers"):
        render_sample(dialogue("a", "b", "c", "d"), tokenizer, chat_format="template")


def test_calls_of_tools_are_trained_and_their_results_are_not(assets, llama3):
    sample = next(iter(read_samples(assets / "sft/glaive_toolcall_en_demo.json")))
    rendered = render_sample(sample, llama3, chat_format="llama3")
    trained = [llama3.decode(run) for run in runs(rendered)]
    assert trained == [message.content.strip() for message in sample.messages if message.role == "assistant"]


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=20).map(str.strip)
contents = words.filter(lambda text: text and not any(tag in text for tag in chat._LLAMA2_TAGS))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(st.tuples(contents, contents, st.booleans()), min_size=1, max_size=4), system=st.none() | contents
)
def test_the_trained_tokens_are_the_answers(turns, system):
    assert_trained_tokens_are_the_answers(turns, system, pocket_tokenizer(), "llama2")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(st.tuples(contents, contents, st.booleans()), min_size=1, max_size=4), system=st.none() | contents
)
def test_the_trained_tokens_are_the_answers_for_real_vocabularies(llama2, llama3, turns, system):
    assert_trained_tokens_are_the_answers(turns, system, llama2, "llama2")
    assert_trained_tokens_are_the_answers(turns, system, llama3, "llama3")


def assert_trained_tokens_are_the_answers(turns, system, tokenizer, chat_format):
    flags = [flag for _, _, is_trained in turns for flag in (False, is_trained)]
    trained = (*([False] if system else []), *flags)
    sample = dialogue(*(text for turn in turns for text in turn[:2]), system=system, trained=trained)
    if not any(flags):
        with pytest.raises(DataError, match="nothing to train on"):
            render_sample(sample, tokenizer, chat_format=chat_format)
        return
    rendered = render_sample(sample, tokenizer, chat_format=chat_format)
    assert rendered.tokens == chat.render(sample.messages, tokenizer, format=chat_format).tokens
    end = "</s>" if chat_format == "llama2" else "<|eot_id|>"
    answers = [answer for _, answer, is_trained in turns if is_trained]
    found = [b"".join(map(tokenizer.token_bytes, run)).decode() for run in runs(rendered)]
    pad = " " if chat_format == "llama2" else ""
    assert found == [f"{pad}{answer}{pad}{end}" for answer in answers]


@settings(max_examples=150, deadline=None)
@given(prompt=words.filter(bool), answer=words.filter(bool), gap=st.sampled_from(["", " ", "\n"]))
def test_plain_trains_the_completion_and_no_more(prompt, answer, gap):
    tokenizer = pocket_tokenizer()
    rendered = render_sample(dialogue(prompt + gap, answer), tokenizer, chat_format="plain")
    (run,) = runs(rendered)
    assert b"".join(map(tokenizer.token_bytes, run)).decode() == answer + "</s>"
    assert len(run) == sum(rendered.trainable)
