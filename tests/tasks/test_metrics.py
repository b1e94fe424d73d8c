"""Metrics against numbers worked by hand, and corpus scores against sacrebleu's own."""

import sys

import pytest

from llama2.errors import RequestError
from llama2.tasks import metrics
from llama2.tasks.metrics import corpus_scores, macro_f1, require_sacrebleu, rouge, rouge_l, rouge_n, share, words


def test_rouge_by_hand():
    right, said = words("Police killed the gunman."), words("police kill the gunman")
    assert right == ["police", "killed", "the", "gunman"]
    assert rouge_n(right, said, 1) == pytest.approx(3 / 4)
    assert rouge_n(right, said, 2) == pytest.approx(1 / 3)
    assert rouge_l(right, said) == pytest.approx(3 / 4)
    assert rouge_l(right, words("the gunman kill police")) == pytest.approx(2 / 4)  # Lin 2004, sec. 3.1, S3
    assert rouge_n(words("a a b"), words("a a a a"), 1) == pytest.approx(2 * 2 / 7)  # each counted as often as in both
    assert rouge_n(words("a b c d e"), words("a b"), 2) == pytest.approx(2 * 1 / 5)
    assert rouge_l([], words("a")) == rouge_n(words("a"), [], 1) == rouge_n(["a"], ["a"], 2) == 0


def test_chinese_characters_are_words():
    assert words("\u5c0f\u732b Mia_2 \u00e1rbol") == ["\u5c0f", "\u732b", "mia", "2", "\u00e1rbol"]
    assert rouge_n(words("\u5c0f\u732b\u8dd1"), words("\u5c0f\u72d7\u8dd1"), 1) == pytest.approx(2 / 3)


def test_rouge_is_the_mean_over_items():
    found = {each.name: each for each in rouge(["a b", "c d"], ["a b", "x y"])}
    assert found["ROUGE-1"].value == pytest.approx(50) and (found["ROUGE-1"].low, found["ROUGE-1"].high) == (0, 100)


def test_macro_f1_by_hand():
    # a: tp 2, fp 1, fn 1 -> 2/3;  b: tp 1, fp 1, fn 1 -> 1/2;  c: never right -> 0
    found = macro_f1(["a", "a", "a", "b", "b"], ["a", "a", "b", "b", "a"])
    assert found.value == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    assert macro_f1(["a", "b"], ["a", "c"]).value == pytest.approx(100 / 3)
    assert found.low < found.value < found.high
    assert found == macro_f1(["a", "a", "a", "b", "b"], ["a", "a", "b", "b", "a"])  # seeded


def test_a_share_has_wilsons_interval():
    found = share("accuracy", [True] * 490 + [False] * 10)
    assert (found.value, found.low, found.high) == pytest.approx((98, 96.36, 98.91), abs=0.01)


def test_corpus_scores_are_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    right = ["the cat sat on the mat", "a dog ran far away today", "we went home"]
    said = ["the cat sat on a mat", "a dog ran away", "we went home"]
    chrf, bleu = corpus_scores(right, said, language="en")
    assert chrf.value == pytest.approx(sacrebleu.corpus_chrf(said, [right]).score)
    assert bleu.value == pytest.approx(sacrebleu.corpus_bleu(said, [right]).score)
    assert bleu.low <= bleu.value <= bleu.high and chrf.low <= chrf.value <= chrf.high
    chinese = ["\u5b89\u5a1c\u62b1\u4f4f\u4e86\u753b\u7b14"]
    assert corpus_scores(chinese, chinese, language="zh")[1].value == pytest.approx(100)
    assert corpus_scores(chinese, chinese, language="es")[1].value < 100  # cut at spaces, it is one word


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(RequestError, match=r"pip install 'llama2\[eval\]'"):
        require_sacrebleu()
    assert metrics.is_same("a  b\n", "a b") and not metrics.is_same("a b", "A b")
