"""The story world: parallel, varied, held apart, and graded exactly."""

import json
import re

import pytest

from llama2.data.storyworld.files import write_world
from llama2.data.storyworld.grade import grade
from llama2.data.storyworld.stories import Story, cast, phrases, split_of, stories, story
from llama2.data.storyworld.tasks import FROM_ENGLISH, SHARES, TASKS, a_task, lesson, questions, record, tasks
from llama2.data.storyworld.words import LANGUAGES, table
from llama2.errors import Llama2Error


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_story_passes_its_own_grade(language, split):
    for each in stories(0, 300, split=split):
        found = grade(each.text(language), language, facts=each.facts)
        assert found.is_well_formed and found.is_consistent and not found.problem, each.text(language)
        assert found.n_sentences == len(each.beats)


def test_a_seed_tells_the_same_story_and_another_seed_another():
    assert story(3, 7) == story(3, 7)
    assert len({story(seed, index).text("en") for seed in range(5) for index in range(50)}) == 250


def test_worlds_never_share_a_hero_thing_and_place():
    def keys(split):
        return {(s.facts.hero[0], s.facts.thing[0], s.facts.place) for s in stories(0, 3000, split=split)}

    assert not keys("train") & keys("heldout")
    assert all(split_of(s.facts) == "heldout" for s in stories(1, 100, split="heldout"))


def test_the_prose_is_varied():
    trigrams = set()
    for each in stories(0, 2000):
        words = each.text("en").split()
        trigrams |= set(zip(words, words[1:], words[2:], strict=False))
    assert len(trigrams) > 15_000
    said = {sentence for each in stories(0, 2000) for sentence in each.sentences("en")}
    assert len(said) > 12_000


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_left_unfilled(language):
    for each in stories(2, 300):
        text = each.text(language) + each.title(language) + each.summary(language)
        assert not re.search(r"[{}]|  ", text)
        if language == "en":
            assert not re.search(r"\ba [aeiou]", text) and text.isascii()
        if language == "es":
            assert not re.search(r"\b(de|a) el\b", text), text


def test_titles_and_summaries_name_who_and_what():
    each = story(0, 0, split="heldout")
    for language in LANGUAGES:
        words = cast(each.facts, language)
        assert str(words["h"]) in each.title(language) and str(words["t"]) in each.title(language)
        assert str(words["h"]) in each.summary(language) and str(words["f"]) in each.summary(language)


def changed(each: Story, language, old, new, *, nth):
    """Replace the nth mention of a word."""
    parts = each.text(language).split(old)
    assert len(parts) > nth + 1
    return old.join(parts[: nth + 1]) + new + old.join(parts[nth + 1 :])


@pytest.mark.parametrize("slot", ["h", "f", "t"])
def test_another_name_or_thing_in_the_middle_is_inconsistent(slot):
    others = {"h": "Zzz", "f": "Zzz", "t": "zzz"}
    for index in range(60):
        each = story(5, index)
        words = cast(each.facts, "en")
        used = {each.facts.hero[0], each.facts.friend[0]}
        name = next(name[0] for n, name in enumerate(table("words")["names"]) if n not in used)
        others |= {"h": name, "f": name, "t": "red kite" if str(words["t"]) != "red kite" else "blue kite"}
        old = str(words[slot])
        if each.text("en").count(old) < 2:
            continue
        found = grade(changed(each, "en", old, others[slot], nth=1), "en")
        assert not (found.is_well_formed and found.is_consistent)


def test_what_the_grade_says():
    each = next(s for s in stories(0, 100) if s.facts.is_good and len(s.beats) == 11)
    text = each.text("en")
    assert grade(text, "en").problem == ""
    assert not grade(text[: len(text) // 2], "en").is_well_formed
    assert "goes on" in grade(text + " The end.", "en").problem
    assert not grade("Hello there.", "en").is_well_formed
    assert not grade("", "en").is_well_formed
    assert not grade(text, "es").is_well_formed
    other = grade(text, "en", facts=story(0, 101).facts)
    assert other.is_well_formed and not other.is_consistent
    sentences = each.sentences("en")
    assert not grade(" ".join([sentences[1], sentences[0], *sentences[2:]]), "en").is_well_formed


def test_a_friend_cannot_be_the_hero():
    each = next(s for s in stories(0, 50) if s.facts.is_good)
    words = cast(each.facts, "en")
    text = each.text("en").replace(str(words["f"]), str(words["h"]))
    found = grade(text, "en")
    assert found.is_well_formed and not found.is_consistent


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_stand_in_the_story(language):
    for each in stories(4, 100):
        text = each.text(language)
        answers = [answer for _, answer in questions(each, language)]
        words = cast(each.facts, language)
        bare = [str(words["h"]), words["h"].kind, str(words["p"]), str(words["t"]), str(words["f"])]
        assert len(answers) == 7
        for answer, word in zip(answers[:5], bare, strict=True):
            assert word in answer and word in text, (answer, text)


def test_tasks_are_of_every_kind_and_translations_are_the_parallel_phrases():
    places = []
    for each in stories(0, 30):
        found = list(tasks(each, "en"))
        assert {task.task for task in found} == set(TASKS)
        translated = [task for task in found if task.task == "translate"]
        for task, language in zip(translated, ("es", "zh"), strict=True):
            at = phrases(each, "en").index(task.input)
            assert task.output == phrases(each, language)[at]
            places.append(at)
    assert {*places} >= {0, 1, 2, 3, 4, 5}
    assert sum(at > 1 for at in places) >= 20  # neither titles nor summaries
    each = story(0, 1)
    drawn = [lesson(each, "es", seed=seed) for seed in range(2_000)]
    kinds = [task.task for task in drawn]
    expected = [2_000 * share / sum(SHARES) for share in SHARES]
    assert all(0.7 * n < kinds.count(kind) < 1.3 * n for kind, n in zip(TASKS, expected, strict=True))
    from_english = [task for task in drawn if task.language == "en"]
    assert {task.instruction for task in from_english} == {"Translate into Spanish."}
    assert len(from_english) == pytest.approx(FROM_ENGLISH["es"] * kinds.count("translate"), rel=0.15)


def test_a_story_is_read_once_for_several_tasks():
    told = story(0, 1)
    alone = {task.instruction: task for task in tasks(told, "zh")}
    drawn = [lesson(told, "zh", seed=seed) for seed in range(500)]
    for task in drawn:
        if task.task == "translate":
            assert not task.history and "history" not in record(task)
            continue
        (first, right), (second, right_again) = task.history
        instruction, text = first.split("\n", 1)
        assert (text, task.input) == (told.text("zh"), "")
        asked = {instruction: right, second: right_again, task.instruction: task.output}
        assert len(asked) == 3 and all(alone[each].output == output for each, output in asked.items())
    assert {task.history[0][0].split("\n")[0] for task in drawn if task.history} == {
        each.instruction for each in alone.values() if each.task != "translate"
    }
    judged_by = [a_task(told, "zh", seed=seed) for seed in range(500)]
    assert not any(task.history for task in judged_by)
    assert all(80 <= sum(task.task == kind for task in judged_by) <= 120 for kind in TASKS)


def test_what_is_translated_says_whom_it_is_about_in_every_language():
    told = next(each for each in stories(0, 50) if ("have", 0) in each.beats)
    for language in LANGUAGES:
        found, all_of_it = phrases(told, language), told.sentences(language)
        assert found[:2] == [told.title(language), told.summary(language)]
        assert all_of_it[0] in found and all_of_it[1] not in found  # "Llevaba una cometa roja": she, or he?
    assert len({len(phrases(told, language)) for language in LANGUAGES}) == 1


def test_a_world_is_plain_files_that_do_not_change(tmp_path):
    for name, n_workers in (("a", 1), ("b", 2)):
        write_world(tmp_path / name, n_stories=20, n_heldout=5, seed=1, raw=False, n_workers=n_workers)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert {path.parts[0] for path in files} == {"train", "heldout"}
    assert [str(path) for path in files if "train" in str(path)] == [
        "train/dialogues.jsonl",
        "train/guarded.jsonl",
        "train/instructions.jsonl",
        "train/preferences.jsonl",
        "train/questions.jsonl",
        "train/readers.txt",
        "train/safety.jsonl",
        "train/stories.en.txt",
        "train/stories.es.txt",
        "train/stories.jsonl",
        "train/stories.zh.txt",
        "train/tasks.jsonl",
    ]
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)
    records = [json.loads(line) for line in (tmp_path / "a/train/stories.jsonl").read_text("utf-8").splitlines()]
    assert len(records) == 60 and all(grade(each["text"], each["language"]).is_consistent for each in records)
    assert (tmp_path / "a/train/stories.en.txt").read_text().count("\n\n") == 20
    with pytest.raises(Llama2Error, match="heldout=0"):
        write_world(tmp_path / "c", n_stories=1, n_heldout=0)
    with pytest.raises(Llama2Error, match="not an empty folder"):
        write_world(tmp_path / "a", n_stories=1, n_heldout=1)


def test_spanish_contracts_its_article(tmp_path):
    """A el and de el are al and del, whoever and whatever is spoken of."""
    write_world(tmp_path / "world", n_stories=300, n_heldout=300, raw=False)
    texts = {path: path.read_text(encoding="utf-8") for path in (tmp_path / "world").rglob("*.*")}
    assert {
        str(path): found for path, text in texts.items() if (found := re.findall(r"\b(?:[Aa]|[Dd]e) el .{20}", text))
    } == {}
    assert sum(text.count(" al ") for text in texts.values()) > 300
