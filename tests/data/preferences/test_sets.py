"""Sets of pairs: both sides and what was said of them stay together; what is too long is refused or counted."""

import json

import numpy as np
import pytest

from llama2.chat import Message
from llama2.data.preferences.pair import Labelled, Pair
from llama2.data.preferences.render import render_answer
from llama2.data.preferences.sets import (
    collect_labelled,
    collect_pairs,
    read_labelled_set,
    read_pair_set,
    set_aside,
)
from llama2.errors import DataError
from tests.pocket import pocket_tokenizer

POCKET = pocket_tokenizer()
HI = (Message("user", "Hi"),)
FOUR = [
    Pair("a:1", HI, "Hello!", "No", "better", None, True, True, False),
    Pair("a:2", HI, "Good day", "No" * 30, None, 0.5),
    Pair("a:3", HI, "Hey", "Go", "negligibly better / unsure", None, False),
    Pair("a:4", HI, "Yes", "Nope"),
]


def asking(i):
    return (Message("user", f"Hi {i}"),)


def make(pairs=FOUR, *, length=200, **settings):
    return collect_pairs(pairs, POCKET, name="four", length=length, **settings)


def texts(found):
    """Return both answers of each pair."""
    sides = [POCKET.decode(found.rows.document(i)[found.rows.trained(i)].tolist()[:-1]).strip() for i in range(8)]
    return list(zip(sides[::2], sides[1::2], strict=True))


def test_a_set_holds_what_the_pairs_say():
    found = make()
    assert len(found) == 4 and texts(found) == [(pair.chosen, pair.rejected) for pair in FOUR]
    assert found.ratings.tolist() == [2, -1, 0, -1] and found.ratings.dtype == np.int8
    assert found.margins.tolist() == [0, 0.5, 0, 0] and found.margins.dtype == np.float32
    assert found.flags.tolist() == [[1, 1, 0], [-1, -1, -1], [0, -1, -1], [-1, -1, -1]]
    rendered = [render_answer(pair.prompt, text, POCKET) for pair in FOUR for text in (pair.chosen, pair.rejected)]
    assert [found.rows.document(i).tolist() for i in range(8)] == [each.tokens for each in rendered]
    assert [found.rows.trained(i).tolist() for i in range(8)] == [each.trainable for each in rendered]
    assert found.n_tokens == sum(len(each.tokens) for each in rendered) and found.left_out == {}


def test_a_part_keeps_sides_and_judgements_together():
    whole = make()
    part = whole.part([2, 0])
    assert [part.ratings.tolist(), part.flags[:, 0].tolist(), part.name] == [[0, 2], [0, 1], "four"]
    for row, original in enumerate([4, 5, 0, 1]):
        assert part.rows.document(row).tolist() == whole.rows.document(original).tolist()


def test_a_pair_fits_if_its_longer_side_does():
    longest = len(render_answer(HI, "No" * 30, POCKET).tokens)
    assert len(make(length=longest)) == 4
    with pytest.raises(DataError) as caught:
        make(length=longest - 1)
    assert str(caught.value) == (
        f"a:2 has {longest} tokens with its prompt and a row holds {longest - 1}: choose a longer --sequence-length, "
        "or --too-long drop to leave it out"
    )
    found = make(length=longest - 1, too_long="drop")
    assert found.ratings.tolist() == [2, 0, -1] and len(found.rows) == 6 and found.left_out == {"too long": 1}
    with pytest.raises(DataError, match="four holds nothing to train on: all 4 are longer than 5 tokens"):
        make(length=5, too_long="drop")


def test_a_seeded_share_is_set_aside():
    found = make([Pair(f"a:{i}", asking(i), f"{i}!", "No", None, float(i)) for i in range(20)])
    kept, aside = set_aside(found, 0.2, seed=1)
    assert (len(kept), len(aside)) == (16, 4)
    assert sorted([*kept.margins, *aside.margins]) == list(range(20))
    assert kept.margins.tolist() == sorted(kept.margins) and aside.name == "four (set aside)"
    assert set_aside(found, 0.2, seed=1)[1].margins.tolist() == aside.margins.tolist()
    assert set_aside(found, 0.2, seed=2)[1].margins.tolist() != aside.margins.tolist()
    with pytest.raises(DataError, match="four has 1 pairs about 1 prompts, too few to set 0.1 of them aside"):
        set_aside(found.part([0]), 0.1, seed=0)


def test_pairs_about_one_prompt_are_not_set_aside_from_each_other():
    found = make([Pair(f"a:{i}", asking(i // 3), f"{i}!", "No", None, float(i)) for i in range(21)])
    kept, aside = set_aside(found, 0.2, seed=1)  # four pairs: the second prompt comes whole
    assert len(aside) == 6 and len(kept) == 15
    assert not {int(i) // 3 for i in kept.margins} & {int(i) // 3 for i in aside.margins}


def test_labelled_answers_stay_with_their_labels():
    answers = [Labelled(f"a:{i}", HI, "Hello" * (1 + i), i % 2 == 0) for i in range(4)]
    longest = len(render_answer(HI, answers[2].answer, POCKET).tokens)
    found = collect_labelled(answers, POCKET, name="answers", length=longest, too_long="drop")
    assert found.is_good.tolist() == [True, False, True] and found.left_out == {"too long": 1}
    part = found.part([1, 2])
    assert part.is_good.tolist() == [False, True]
    assert part.rows.document(1).tolist() == render_answer(HI, answers[2].answer, POCKET).tokens


def test_files_become_sets_and_say_what_was_left_out(tmp_path):
    hh = "\n\nHuman: Hi\n\nAssistant: "
    records = [{"chosen": hh + "Hello!", "rejected": hh + answer} for answer in ("No", "", "Go" * 50)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    found = read_pair_set(path, POCKET, length=60, too_long="drop")
    assert len(found) == 1 and found.left_out == {"an answer is empty": 1, "too long": 1}
    path.write_text(json.dumps({"prompt": "Hi", "completion": "Hello!", "label": True}) + "\n[]\n")
    broken = []
    assert read_labelled_set(path, POCKET, length=60, broken=broken.append).is_good.tolist() == [True]
    assert len(broken) == 1


def test_real_files_become_sets(assets):
    found = read_pair_set(assets / "preference/harmless-base-test.jsonl.gz", POCKET, length=1024, too_long="drop")
    assert len(found) + sum(found.left_out.values()) == 2312 and found.left_out["too long"] > 0
    assert found.rows.lengths.max() <= 1024 and found.rows.trained(1)[-1]
