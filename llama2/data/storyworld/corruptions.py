"""Ways in which a right answer goes wrong, from a slip to nonsense: what weak models do, made on purpose.

Each corruption takes a turn and gives an answer that is worse, or None where it does not apply. How much worse is
for `answers.grade_answer` to say.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from llama2.data.storyworld.instructions import STOPS, dressed
from llama2.data.storyworld.stories import Story, choices, order_of_beats, other_facts, separator
from llama2.data.storyworld.tasks import outcome
from llama2.data.storyworld.turns import Turn, questions_about
from llama2.data.storyworld.words import others, table

Corruption = Callable[[random.Random, Turn], str | None]

# Texts: stories and translations


def hero_swapped(rng: random.Random, turn: Turn) -> str | None:
    """From the middle on the hero is called by another name."""
    name = other_facts(rng, turn.story.facts).hero[0]
    other = replace(turn.story, facts=replace(turn.story.facts, hero=(name, turn.story.facts.hero[1])))
    sentences = turn.story.sentences(turn.language)
    middle = len(sentences) // 2
    return _joined(turn, sentences[:middle] + other.sentences(turn.language)[middle:])


def quality_slipped(rng: random.Random, turn: Turn) -> str | None:
    """In one sentence the thing is, say, blue and not red."""
    quality = other_facts(rng, turn.story.facts).thing[1]
    return _one_sentence_of(rng, turn, thing=(turn.story.facts.thing[0], quality))


def friend_slipped(rng: random.Random, turn: Turn) -> str | None:
    """In one sentence the friend is somebody else."""
    return _one_sentence_of(rng, turn, friend=other_facts(rng, turn.story.facts).friend)


def wrong_ending(rng: random.Random, turn: Turn) -> str | None:
    """The end belongs to another plot."""
    facts = turn.story.facts
    plot = rng.choice([n for n in range(len(table("sentences")["plots"])) if n != facts.plot])
    at = [beat for beat, _ in turn.story.beats].index("help") + 1
    end = [beat for beat in order_of_beats(facts.is_good)[7:] if beat != "thank"]
    beats = tuple((beat, rng.randrange(len(choices(beat, plot)))) for beat in end)
    other = Story(replace(facts, plot=plot), beats)
    return _joined(turn, turn.story.sentences(turn.language)[:at] + other.sentences(turn.language))


def sentences_lost(rng: random.Random, turn: Turn) -> str | None:
    """The text breaks off after a few sentences, or before the last."""
    sentences = turn.story.sentences(turn.language)
    return _joined(turn, sentences[: rng.choice([2, len(sentences) // 2, len(sentences) - 1])])


def order_lost(rng: random.Random, turn: Turn) -> str | None:
    """Two sentences have changed places."""
    sentences = turn.story.sentences(turn.language)
    at = rng.randrange(2, len(sentences) - 1)
    sentences[at - 1], sentences[at] = sentences[at], sentences[at - 1]
    return _joined(turn, sentences)


def repeated(rng: random.Random, turn: Turn) -> str | None:
    """One sentence is said again and again."""
    sentences = turn.story.sentences(turn.language)
    at = rng.randrange(1, len(sentences))
    return _joined(turn, sentences[:at] + [sentences[at]] * 3 + sentences[at + 1 :])


def lines_broken(rng: random.Random, turn: Turn) -> str | None:
    """Only the looks differ: a line for each sentence."""
    return "\n".join(turn.story.sentences(turn.language))


# Short answers


def all_wrong(rng: random.Random, turn: Turn) -> str | None:
    """The right kind of answer, about everybody and everything else."""
    return _said_of(Story(other_facts(rng, turn.story.facts), turn.story.beats), turn)


def half_wrong(rng: random.Random, turn: Turn) -> str | None:
    """One of the names or things is another."""
    facts, other = turn.story.facts, other_facts(rng, turn.story.facts)
    slot = rng.choice(["hero", "friend", "thing", "place"])
    return _said_of(replace(turn.story, facts=replace(facts, **{slot: getattr(other, slot)})), turn)


def wrong_outcome(rng: random.Random, turn: Turn) -> str | None:
    """Well instead of badly, yes instead of no."""
    facts = turn.story.facts
    if turn.task == "check":
        words = [word[turn.language] for word in table("dialogues")["yes_no"].values()]
        return next(word for word in words if word != turn.answer)
    return _said_of(replace(turn.story, facts=replace(facts, is_good=not facts.is_good)), turn)


def another_plot(rng: random.Random, turn: Turn) -> str | None:
    """Something else happened."""
    plots = [n for n in range(len(table("sentences")["plots"])) if n != turn.story.facts.plot]
    return _said_of(replace(turn.story, facts=replace(turn.story.facts, plot=rng.choice(plots))), turn)


def _said_of(story: Story, turn: Turn) -> str | None:
    """Return the answer to a turn, had the story been this."""
    if turn.task == "answer":
        return next(said for about, _, said in questions_about(story, turn.language) if about == turn.about)
    return outcome(story, turn.language, turn.task) if turn.task in ("title", "summarise", "sentiment") else None


def lower_case(rng: random.Random, turn: Turn) -> str | None:
    """Only the looks differ: capitals are missing."""
    return turn.answer.lower()


# Everything


def wrong_language(rng: random.Random, turn: Turn) -> str | None:
    """The right answer in another language."""
    language = rng.choice(others(turn.language))
    if turn.task in ("story", "translate"):
        return turn.story.text(language)
    return _said_of(turn.story, replace(turn, language=language))


def another_task(rng: random.Random, turn: Turn) -> str | None:
    """A right answer to something that was not asked."""
    tasks = [task for task in ("title", "summarise", "sentiment") if task != turn.task]
    return outcome(turn.story, turn.language, rng.choice(tasks))


def broken_off(rng: random.Random, turn: Turn) -> str | None:
    """The answer stops in the middle of a word."""
    text = turn.answer.rstrip("".join(STOPS))
    return text[: rng.randint(len(text) // 4, 3 * len(text) // 4)]


def rambling(rng: random.Random, turn: Turn) -> str | None:
    """The right answer, and then a sentence of no use."""
    gap = separator(turn.language)
    return turn.answer + gap + rng.choice(turn.story.sentences(turn.language))


def _joined(turn: Turn, sentences: list[str]) -> str:
    return separator(turn.language).join(sentences)


def _one_sentence_of(rng: random.Random, turn: Turn, **changes: object) -> str | None:
    """Take one sentence, not the first, from the story as it would be with other facts."""
    other = replace(turn.story, facts=replace(turn.story.facts, **changes))
    sentences = turn.story.sentences(turn.language)
    told = zip(sentences, other.sentences(turn.language), strict=True)
    differing = [(i, new) for i, (old, new) in enumerate(told) if i and new != old]
    if not differing:
        return None
    at, new = rng.choice(differing)
    return _joined(turn, [*sentences[:at], new, *sentences[at + 1 :]])


TEXTS: tuple[Corruption, ...] = (
    *(hero_swapped, quality_slipped, friend_slipped, wrong_ending, sentences_lost, order_lost, repeated, lines_broken),
    *(wrong_language, another_task, broken_off, rambling),
)
SHORT: tuple[Corruption, ...] = (
    *(all_wrong, half_wrong, wrong_outcome, another_plot, lower_case),
    *(wrong_language, another_task, broken_off, rambling),
)


def corrupted(rng: random.Random, turn: Turn) -> tuple[str, str]:
    """Return the name of a corruption and what it makes of the right answer.

    A standing instruction is obeyed, but every third time the answer is right and the instruction forgotten.
    """
    if turn.standing and turn.reply != turn.answer and rng.random() < 1 / 3:
        return "instruction_forgotten", turn.answer
    ways = [*(TEXTS if turn.task in ("story", "translate") else SHORT)]
    rng.shuffle(ways)
    for way in ways:
        found = way(rng, turn)
        if found is not None and found.strip() and found != turn.answer:
            return way.__name__, dressed(found, turn.standing)
    raise AssertionError(turn)
