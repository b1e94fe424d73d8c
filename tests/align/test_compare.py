"""Two models compared as a user does it: by a reward, and by typed ratings that become training data."""

import io
import json
import sys

import pytest
from rich.console import Console

import llama2
from llama2.align.compare import Duel, answers_of, by_reward, pick, tally
from llama2.align.ratings import RatingFile, rate, summary
from llama2.chat import conversation
from llama2.cli.main import main
from llama2.data.dialogues.prompts import AskedPrompt
from llama2.data.preferences.read import read_pairs
from llama2.data.storyworld.questions import questions
from llama2.errors import ConfigError, RequestError
from llama2.model.transformer import build
from tests.pocket import POCKET, pocket_tokenizer

MODELS = {"a": "the-first-model", "b": "the-second-model"}


def asks(text, **more):
    messages = conversation([{"role": "user", "content": text}])
    return AskedPrompt(f"prompts.jsonl:{text}", messages, {"prompt": text, **more})


def duels(n, **more):
    return [Duel(i, asks(f"Prompt {i}", **more), f"alpha {i}", f"beta {i}") for i in range(n)]


@pytest.fixture
def typed(tmp_path):
    """Return a function that rates duels by typed lines, and returns the file and what was shown."""

    def run(lines, some, name="ratings.jsonl", seed=0, **changes):
        settings = {"models": MODELS, "options": {"seed": seed}} | changes
        file, shown = RatingFile(tmp_path / name, **settings), io.StringIO()
        console = Console(file=shown, width=80, highlight=False)
        rate(some, file, seed=seed, source=io.StringIO("".join(f"{line}\n" for line in lines)), console=console)
        return file, shown.getvalue()

    return run


def first_shown(shown):
    """Which model's answer stood first, for each prompt."""
    order = [word for word in shown.split() if word in ("alpha", "beta")]
    return order[::2]


# By hand


def test_ratings_become_pairs(typed, tmp_path):
    some = duels(4)
    _, shown = typed(["13", "2 2", "11", "20"], some)
    first = first_shown(shown)
    pairs = list(read_pairs(tmp_path / "ratings.jsonl"))
    names = ["significantly better", "better", "slightly better", "negligibly better / unsure"]
    assert [each.rating for each in pairs] == names
    for i, (pair, is_first) in enumerate(zip(pairs, (True, False, True, False), strict=True)):
        wins = first[i] if is_first else {"alpha": "beta", "beta": "alpha"}[first[i]]
        assert pair.chosen == f"{wins} {i}" and pair.prompt == some[i].prompt.messages
    records = [json.loads(line) for line in (tmp_path / "ratings.jsonl").read_text().splitlines()]
    assert all(each["models"] == MODELS for each in records)
    assert [each["chosen"].startswith("alpha") for each in records] == [each["winner"] == "a" for each in records]


def test_no_model_is_named_and_sides_are_shuffled(typed):
    some = duels(40)
    _, shown = typed(["s"] * 40, some)
    assert not any(name in shown for name in MODELS.values())
    first = first_shown(shown)
    assert len(first) == 40 and 8 < first.count("alpha") < 32
    assert first == first_shown(typed(["s"] * 40, some, name="again.jsonl")[1])
    assert first != first_shown(typed(["s"] * 40, some, name="other.jsonl", seed=1)[1])


def test_rating_goes_on_where_it_stopped(typed, tmp_path):
    some = duels(5)
    file, shown = typed(["13", "s", "13", "q", "13"], some)
    assert len(file.rated) == 2 and shown.count("Prompt") == 4
    with (tmp_path / "ratings.jsonl").open("a") as out:
        out.write('{"prompt": [{"role')  # killed while writing
    file, shown = typed(["23", "hm", "3", "14", "22", "21"], some)
    assert len(file.rated) == 5 and [f"Prompt {i}" in shown for i in range(5)] == [False, True, False, True, True]
    assert shown.count("Type 1 or 2") == 1 + 3  # at first, and for each line that says nothing
    assert len(list(read_pairs(tmp_path / "ratings.jsonl"))) == 5
    _, shown = typed([], some)
    assert shown == ""


def test_the_end_of_input_is_the_end(typed):
    file, _ = typed(["13"], duels(3))
    assert len(file.rated) == 1


def test_what_needs_no_rating_is_not_asked(typed):
    some = [
        Duel(0, asks("Same"), "yes", "yes "), Duel(1, asks("Empty"), "", "beta"), Duel(2, asks("Void"), "alpha", " "),
        Duel(3, asks("Both"), "", ""), Duel(4, asks("Real"), "alpha", "beta"),
    ]  # fmt: skip
    file, shown = typed(["13"], some)
    assert "Real" in shown and not any(word in shown for word in ("Same", "Empty", "Void", "Both"))
    found, _ = summary(some, file)
    a_won = next(iter(file.rated.values())).a_wins
    assert (found.n, found.ties, found.wins) == (5, 2, 1 + a_won)


def test_unsure_is_a_tie(typed):
    some = duels(3)
    file, shown = typed(["10", "20", "13"], some)
    found, table = summary(some, file)
    assert (found.n, found.ties) == (3, 2) and found.wins == (first_shown(shown)[2] == "alpha")
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    assert "significantly better" in out.getvalue() and "negligibly better / unsure" in out.getvalue()


def test_what_the_prompt_says_of_safety_goes_along(typed, tmp_path):
    typed(["13"], duels(1, is_unsafe=True, category="fire"))
    (pair,) = read_pairs(tmp_path / "ratings.jsonl")
    assert pair.is_safety is True


def test_answers_cannot_move_the_cursor(typed):
    _, shown = typed(["s"], [Duel(0, asks("Go\x1b[2J"), "one\x1b[31m", "two\rthree [bold]")])
    assert "\x1b" not in shown and "\r" not in shown and "\\x1b[31m" in shown and "[bold]" in shown


REFUSED = [
    (
        {"models": {"a": "the-first-model", "b": "another"}},
        "with the models a the-first-model, b the-second-model, and",
    ),
    ({"options": {"seed": 0, "temperature": 1.0}}, "with the options seed 0, and this command has seed 0, temperature"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_ratings_of_other_answers_are_not_gone_on_with(typed, changes, said):
    typed(["13"], duels(2))
    with pytest.raises(RequestError, match=said):
        typed(["13"], duels(2), **changes)


def test_a_text_may_hold_any_line_end(typed):
    some = [Duel(i, asks(f"P {i}"), "alpha\u2028one", "beta\u0085two") for i in range(2)]
    typed(["13"], some)
    file, _ = typed(["q"], some)
    assert len(file.rated) == 1


def test_a_file_of_something_else_is_refused(typed, tmp_path):
    (tmp_path / "ratings.jsonl").write_text('{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(RequestError, match=r"ratings\.jsonl:1 is no rating of this command"):
        typed(["13"], duels(2))
    assert (tmp_path / "ratings.jsonl").read_text().startswith('{"prompt"')


# By a reward


def longest(conversations, answers):
    return [float(len(each)) for each in answers]


def test_ties_count_half():
    some = [
        Duel(i, asks(f"P{i}"), a, b) for i, (a, b) in enumerate([("aa", "b"), ("a", "bb"), ("a", "b"), ("aaa", "")])
    ]
    found = by_reward(some, longest)
    assert (found.tally.wins, found.tally.ties, found.tally.n) == (2, 1, 4) and found.tally.rate == 0.625
    low, high = found.tally.interval
    assert low < 0.5 < 0.625 < high and found.means == (7 / 4, 4 / 4)
    assert "X wins 62.5 % (" in found.tally.said("X", "Y") and "2 won, 1 tied, 1 lost" in found.tally.said("X", "Y")
    assert tally([]).said("X", "Y") == "X against Y: nothing was compared"


@pytest.mark.parametrize("bad", [lambda c, a: [1.0], lambda c, a: [float("nan")] * len(a), lambda c, a: ["x"] * len(a)])
def test_a_reward_that_gives_no_numbers_is_refused(bad):
    with pytest.raises(ConfigError, match="the reward gave"):
        by_reward(duels(3), bad)


def test_prompts_are_drawn_once_each_and_more_begin_with_the_same(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"P{i % 12}"}) + "\n" for i in range(30)))
    few, many, other = (pick(path, n=n, seed=seed) for n, seed in ((5, 0), (50, 0), (5, 1)))
    assert many[:5] == few != other and len(many) == 12 == len({each.messages for _, each in many})
    assert sorted(each.where for _, each in many)[0] == "prompts.jsonl:1"
    with pytest.raises(RequestError, match="n=0"):
        pick(path, n=0, seed=0)


# The command


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    for name, seed in (("one", 0), ("two", 1)):
        llama2.save(build(POCKET, seed=seed), folder / name, tokenizer=pocket_tokenizer())
    records = [{"prompt": f"Say {i}", "chosen": "yes", "rejected": "no"} for i in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


@pytest.fixture
def command(models, monkeypatch, capsys):
    """Return a function that runs the command in this process: its exit code, its output and what it says."""

    def run(*arguments, stdin="", prompts="prompts.jsonl"):
        flags = ["--prompts", models / prompts, "--max-new-tokens", 8, "--temperature", 1.0, "--device", "cpu"]
        words = ["llama2", "compare", models / "one", models / "two", *flags, *arguments]
        monkeypatch.setattr(sys, "argv", [str(each) for each in words])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_rating_through_the_command(command, models, tmp_path):
    code, out, said = command("--out", tmp_path / "ratings.jsonl", "--n", 4, stdin="13\n20\nq\n")
    assert code == 0 and str(models) not in said
    assert f"A ({models / 'one'}) wins" in out.replace("\n", " ") and "of 4" in said
    assert len(list(read_pairs(tmp_path / "ratings.jsonl"))) == 2
    code, out, said = command("--out", tmp_path / "ratings.jsonl", "--n", 4, stdin="12\n21\n")
    assert code == 0 and "holds 2 ratings; going on from there" in said and "of 2" in said
    assert len(list(read_pairs(tmp_path / "ratings.jsonl"))) == 4
    code, _, said = command("--out", tmp_path / "ratings.jsonl", "--n", 4, "--seed", 1)
    assert code == 2 and "was rated with the options" in said


def test_a_reward_through_the_command(command, models, tmp_path, monkeypatch):
    (tmp_path / "shortest_answer.py").write_text(
        "def reward(conversations, answers):\n    return [-len(a) for a in answers]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "pairs.jsonl"
    code, result, said = command("--reward", "shortest_answer:reward", "--out", out)
    assert code == 0 and f"{models / 'one'} wins" in result and "mean reward -" in result
    again = command("--reward", "shortest_answer:reward")
    assert again[1] == result
    pairs = list(read_pairs(out))
    assert f"wrote {len(pairs)} pairs" in said and all(len(each.chosen) < len(each.rejected) for each in pairs)
    code, _, said = command("--reward", "shortest_answer:reward", "--out", out)
    assert code == 2 and "pairs.jsonl exists; name a new file" in said
    code, _, said = command("--reward", "shortest_answer:prize")
    assert code == 2 and "cannot be imported" in said


def test_the_exact_judge_through_the_command(command, models):
    asked = [each.line for each in questions(0, 40) if len(json.dumps(each.line["prompt"])) < 120][:4]
    (models / "world.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    code, result, _ = command("--reward", "grade", prompts="world.jsonl")
    assert code == 0 and len(asked) == 4 and "mean reward 0." in result
    code, _, said = command("--reward", "grade")
    assert code == 2 and "judges prompts of the story world" in said


def test_the_same_model_ties_with_itself(models):
    llm = llama2.load(models / "one", device="cpu")
    picked = pick(models / "prompts.jsonl", n=4, seed=0)
    options = {"max_new_tokens": 8, "temperature": 1.0}
    one, other = (answers_of(llm, some, seed=0, options=options) for some in (picked, picked[2:]))
    assert one[2:] == other and len(set(one)) == 4  # whatever else is asked


def test_no_file_and_no_reward_is_refused(command):
    code, _, said = command()
    assert code == 2 and "where do the ratings go? name a file with --out" in said


def test_a_prompt_without_room_is_refused(command, models, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 300}) + "\n")
    code, _, said = command("--out", tmp_path / "r.jsonl", prompts=path)
    assert code == 2 and "long.jsonl:1 has" in said and "leaves no room for an answer" in said
