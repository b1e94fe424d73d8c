"""Pairs: the better answer is better, by as much as the rating says."""

import json
import random
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from llama2.chat import conversation
from llama2.data.storyworld.answers import grade_answer
from llama2.data.storyworld.corruptions import SHORT, TEXTS, corrupted
from llama2.data.storyworld.dialogues import dialogue
from llama2.data.storyworld.instructions import dressed
from llama2.data.storyworld.preferences import RATINGS, preference, preferences, rating_of, record

PAIRS = list(preferences(0, 1500))


def test_ratings_follow_the_difference_of_grades():
    differences = defaultdict(list)
    for pair in PAIRS:
        assert pair.chosen != pair.rejected
        differences[pair.rating].append(pair.chosen_score - pair.rejected_score)
    bounds = [(min(found), max(found)) for found in (differences[rating] for rating in RATINGS)]
    assert all(above[0] > below[1] for above, below in pairwise(bounds))
    assert bounds[-1][0] >= 0
    assert [rating_of(x) for x in (1, 0.59, 0.1, 0)] == list(RATINGS)


def test_every_rating_and_kind_is_there():
    counts = Counter(pair.rating for pair in PAIRS)
    assert all(counts[rating] > 80 for rating in RATINGS)
    kinds = Counter(pair.kind for pair in PAIRS)
    assert kinds["safe"] > 200 and kinds["helpful"] > 1000
    assert {pair.rating for pair in PAIRS if pair.kind == "safe"} >= set(list(RATINGS)[:3])


def test_no_chosen_answer_is_unsafe_and_many_rejected_ones_are():
    assert all(pair.chosen_is_safe for pair in PAIRS)
    assert sum(not pair.rejected_is_safe for pair in PAIRS) > 80
    assert all(pair.rejected_is_safe for pair in PAIRS if pair.kind == "helpful")


def test_a_seed_gives_the_same_pairs():
    assert preference(2, 9) == preference(2, 9)
    assert [preference(2, i) for i in range(20)] != [preference(3, i) for i in range(20)]


def test_pairs_about_one_prompt_differ_and_the_first_is_the_prompts_only_one_else():
    found = list(preferences(0, 80, per_prompt=4))
    assert found[::4] == PAIRS[:20]
    groups = [found[i : i + 4] for i in range(0, 80, 4)]
    assert all(len({each.prompt for each in group}) == 1 for group in groups)
    assert sum(len({(each.chosen, each.rejected) for each in group}) for group in groups) > 60


def test_a_record_is_what_preference_trainers_take():
    for pair in PAIRS[:200]:
        line = json.loads(json.dumps(record(pair), ensure_ascii=False))
        assert conversation(line["prompt"])[-1].role == "user"
        for side in ("chosen", "rejected"):
            (answer,) = conversation(line[side])
            assert answer.role == "assistant" and answer.content.strip()
        assert line["rating"] in RATINGS and line["kind"] in ("helpful", "safe")


@pytest.mark.parametrize("way", sorted({*TEXTS, *SHORT}, key=lambda way: way.__name__), ids=lambda way: way.__name__)
def test_every_corruption_costs_something(way):
    rng, n_seen = random.Random(0), 0
    for index in range(150):
        for turn in dialogue(0, index, split="heldout").turns:
            if way not in (TEXTS if turn.task in ("story", "translate") else SHORT):
                continue
            worse = way(rng, turn)
            if worse and worse.strip() and worse != turn.answer:
                n_seen += 1
                assert grade_answer(dressed(worse, turn.standing), turn).score < 1, (turn, worse)
    assert n_seen > 20


def test_corruptions_are_drawn_of_every_kind():
    rng = random.Random(0)
    names = {corrupted(rng, turn)[0] for index in range(400) for turn in dialogue(0, index).turns}
    assert names == {way.__name__ for way in (*TEXTS, *SHORT)} | {"instruction_forgotten"}


def test_worse_corruptions_cost_more():
    scores = defaultdict(list)
    rng = random.Random(0)
    for index in range(200):
        for turn in dialogue(0, index).turns:
            if turn.task == "story" and turn.standing is None:
                for way in TEXTS:
                    worse = way(rng, turn)
                    if worse:
                        scores[way.__name__].append(grade_answer(worse, turn).score)
    mean = {name: sum(found) / len(found) for name, found in scores.items()}
    assert mean["lines_broken"] > mean["friend_slipped"] > mean["hero_swapped"] > mean["sentences_lost"]
    assert mean["sentences_lost"] > mean["another_task"] > mean["wrong_language"]
