"""Whatever is sampled fits the grammar, and what cannot be followed is refused before anything is written."""

import json
import re

import pytest
import torch
from pydantic import BaseModel

from llama2.errors import RequestError
from llama2.llm.grammar import TextGrammar
from llama2.tokenizer.formats import load_tokenizer
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.vocabulary import CONTROL, NORMAL, UNKNOWN, Vocabulary

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["tokenizers/llama2", "checkpoints/stories260K", "tokenizers/llama3"])
def tokenizer(request, assets):
    return load_tokenizer(assets / request.param)


def grammar(tokenizer, kind, value=None, **options):
    options = {"n_vocab": tokenizer.n_vocab + 3, "stop_ids": [tokenizer.eos_id], "at_start": True, **options}
    return TextGrammar(tokenizer, kind, value, **options)


def sample(tokenizer, grammar, seed: int, n: int = 400) -> str:
    """Draw tokens that are allowed, all alike, until the text may end and does; what may end ends at times."""
    matcher, ids, generator = grammar.matcher(), [], torch.Generator().manual_seed(seed)
    for _ in range(n):
        allowed = matcher.allowed()
        assert allowed.shape == (tokenizer.n_vocab + 3,)
        choices = allowed.nonzero()[:, 0]
        if tokenizer.eos_id in choices and torch.rand((), generator=generator) < 0.3:
            break
        token_id = int(choices[torch.randint(len(choices), (), generator=generator)])
        if token_id == tokenizer.eos_id:
            break
        ids.append(token_id)
        matcher.advance(token_id)
    return tokenizer.decode(ids)


@pytest.mark.parametrize("seed", range(4))
def test_json_fits_its_schema(tokenizer, seed):
    short = {**SCHEMA, "properties": {**SCHEMA["properties"], "age": {"enum": [1, 22, 333]}}}
    found = json.loads(sample(tokenizer, grammar(tokenizer, "json_schema", short), seed))
    assert set(found) == {"name", "age", "ok"} and found["age"] in (1, 22, 333) and len(found["name"]) <= 5


def test_a_regular_expression_and_choices_hold(tokenizer):
    for seed in range(5):
        assert re.fullmatch(
            r"[a-c]{1,4}/[0-9]{2}", sample(tokenizer, grammar(tokenizer, "regex", "[a-c]{1,4}/[0-9]{2}"), seed)
        )
        choices = ["yes", "no", 'say "ça"', "可以"]
        assert sample(tokenizer, grammar(tokenizer, "choice", choices), seed).removeprefix(" ") in choices


def test_lark_and_gbnf_are_both_read(tokenizer):
    for text in ('start: "a" /[0-9]{3}/', 'root ::= "a" [0-9] [0-9] [0-9]'):
        assert re.fullmatch(r"a[0-9]{3}", sample(tokenizer, grammar(tokenizer, "grammar", text), 1))


def test_white_space_in_json_comes_to_an_end(tokenizer):
    """A model that wants nothing but white space still has to go on."""
    matcher = grammar(tokenizer, "json_schema", SCHEMA).matcher()
    blanks = torch.tensor(
        [
            not tokenizer.token_bytes(i).strip() and i not in tokenizer.special_tokens.values()
            for i in range(tokenizer.n_vocab)
        ]
    )
    brace = next(i for i in matcher.allowed().nonzero()[:, 0].tolist() if tokenizer.token_bytes(i) == b"{")
    matcher.advance(brace)
    n = 0
    while (blank := (matcher.allowed()[: tokenizer.n_vocab] & blanks).nonzero()[:, 0]).numel():
        matcher.advance(int(blank[0]))
        n += 1
    assert 1 <= n <= 9


def test_a_pydantic_model_is_a_schema(tokenizer):
    class Answer(BaseModel, extra="forbid"):
        ok: bool

    found = Answer.model_validate_json(sample(tokenizer, grammar(tokenizer, "json_schema", Answer), 3))
    assert found.ok in (True, False)


def test_every_stop_id_may_end_the_text(tokenizer):
    other = 5
    matcher = grammar(tokenizer, "choice", ["a"], stop_ids=[tokenizer.eos_id, other]).matcher()
    assert not matcher.allowed()[other]
    matcher.advance(next(i for i in matcher.allowed().nonzero()[:, 0].tolist() if tokenizer.token_bytes(i) == b"a"))
    assert set(matcher.allowed().nonzero()[:, 0].tolist()) == {tokenizer.eos_id, other}


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("regex", "((", "regex cannot be followed: .*regex parse error"),
        ("regex", "", "'' is no text"),
        ("json_schema", {"type": "zzz"}, "Invalid type: zzz"),
        ("json_schema", [1], "this is a list"),
        ("json_schema", "{", "json_schema cannot be read"),
        ("choice", [], "no list of texts"),
        ("choice", ["a", ""], "none of them empty"),
        ("grammar", "root ::= (", "grammar cannot be read"),
        ("grammar", "start: nothing_here", "grammar cannot be followed"),
        ("regex", "a" * 200_000, "200"),
    ],
)
def test_what_cannot_be_followed_is_refused(tokenizer, kind, value, words):
    with pytest.raises(RequestError, match=words):
        grammar(tokenizer, kind, value)


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json_schema", {"$ref": "#"}),
        ("json_schema", {"anyOf": [{"$ref": "#"}]}),
        ("json_schema", {"a": 1, "$ref": "#/a", "definitions": {}}),
        ("regex", r"a[^\s\S]"),
        ("regex", r"(ab|ba)[^\s\S]"),
    ],
)
def test_what_no_text_fits_is_refused(tokenizer, kind, value, at_start):
    """Before anything is written, though a space or a letter might come first."""
    with pytest.raises(RequestError, match=f"{kind} cannot be followed"):
        grammar(tokenizer, kind, value, at_start=at_start)


def test_a_rule_that_a_gbnf_grammar_lacks_is_named(tokenizer):
    with pytest.raises(RequestError, match="foo"):
        grammar(tokenizer, "grammar", 'root ::= "a"+ foo')


@pytest.mark.parametrize(
    ("regex", "text"), [("a/b", "a/b"), (r"a\/b", "a/b"), (r"a\\/b", r"a\/b"), ("[/]b", "/b"), ("a\nb", "a\nb")]
)
def test_a_regular_expression_may_hold_slashes_however_they_are_written(tokenizer, regex, text):
    assert sample(tokenizer, grammar(tokenizer, "regex", regex), seed=0) == text


def test_a_character_that_the_vocabulary_lacks_is_a_dead_end():
    pieces = ("<unk>", "<s>", "</s>", "\u2581", "\n", "a", "b")
    types = (UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 4)
    small = Tokenizer(
        Vocabulary("spm", pieces, types, scores=(0.0,) * 7, bos_id=1, eos_id=2, unk_id=0, add_dummy_prefix=True)
    )
    assert sample(small, grammar(small, "choice", ["ab"]), seed=0) == "ab"
    for at_start in (True, False):
        with pytest.raises(RequestError, match="this vocabulary cannot go on"):
            sample(small, grammar(small, "json_object", at_start=at_start), seed=0)


@pytest.mark.parametrize(("kind", "value"), [("choice", ["x"] * 5000), ("regex", "a{1000000}")])
def test_what_grows_too_large_is_refused_before_anything_is_written(tokenizer, kind, value):
    with pytest.raises(RequestError, match=f"{kind} cannot be followed.*too many|{kind} cannot be followed.*items"):
        grammar(tokenizer, kind, value, at_start=False)
