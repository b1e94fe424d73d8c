"""Ghost Attention as the paper has it: where the instruction stands, what is trained, and how recall is told."""

import json
from collections import Counter

import pytest
from rich.console import Console

import llama2
from llama2.align.ghost import examples, ghost, read_all, turns_of
from llama2.align.ghost_config import GhostConfig
from llama2.align.ghost_recall import recall
from llama2.align.instructed import Instructed, check_of
from llama2.align.rollout import Prompts, Sampling, sample
from llama2.align.talk import Talk, carry_on
from llama2.chat import Message
from llama2.data.dialogues.read import read_samples
from llama2.data.dialogues.render import render_sample
from llama2.data.interval import wilson
from llama2.data.storyworld.dialogues import dialogues, record
from llama2.data.storyworld.instructions import instructions, read_instruction
from llama2.errors import ConfigError, DataError, TrainingError
from tests.align.chatty import chatty
from tests.align.conftest import assert_same_files, assert_same_weights, by_one_and_by_two, finish, launch

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chatty(tmp_path_factory.mktemp("ghost") / "model")


def talk(i, n_turns, **more):
    turns = [
        {"role": role, "content": f"{role[0]}{i}.{turn}"} for turn in range(n_turns) for role in ("user", "assistant")
    ]
    return {"messages": turns, **more}


def write(path, records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


@pytest.fixture
def settings(model, tmp_path):
    """Return a function that makes the settings of a tiny run."""
    talks = write(tmp_path / "talks.jsonl", [talk(i, 2 + i % 3) for i in range(16)])
    said = write(tmp_path / "said.jsonl", [{"text": f"say {letter}", "letter": letter} for letter in "abc"])

    def make(**changes):
        usual = dict(
            model=str(model), out=tmp_path / "out", dialogues=talks, instructions=said, max_new_tokens=12, n_eval=8,
            eval_share=0.25, judge="tests.align.chatty:says_its_letter", max_steps=2, batch_size=2, device="cpu",
            method="full", recall_turns=(2, 4, 6),
        )  # fmt: skip
        return GhostConfig(**(usual | changes))

    return make


def test_the_instruction_stands_in_every_question_when_sampled_and_in_the_first_when_learnt(settings):
    config = settings(depths="last", temperature=0.7, eval_share=0)
    learnt, _, check = read_all(config, QUIET)
    found = examples(config, learnt, check, QUIET)
    llm = llama2.load(config.model, device="cpu")
    n_seen = 0
    for line in found:
        users = [each["content"] for each in line["prompt"] if each["role"] == "user"]
        answers = [each["content"] for each in line["prompt"] if each["role"] == "assistant"]
        said = line["standing"]["text"]
        assert users[0].startswith(f"{said} u") and all(each.startswith("u") for each in users[1:])
        assert len(users) == line["turn"] == len(answers) + 1
        # every answer is what the model says with the instruction in all questions, given its own earlier answers
        number = next(i for i, each in enumerate(learnt) if f"{said} {each.questions[0]}" == users[0])
        asked = learnt[number]
        assert asked.in_every == tuple(f"{said} {each}" for each in asked.questions)
        for turn, answer in enumerate([*answers, line["completion"]]):
            going = [i for i, each in enumerate(learnt) if len(each.questions) > turn]
            messages = []
            for question, earlier in zip(asked.in_every, answers[:turn], strict=False):
                messages += [Message("user", question), Message("assistant", earlier)]
            messages.append(Message("user", asked.in_every[turn]))
            position = going.index(number)
            prompts = Prompts([tuple(messages)] * (position + 1), llm.tokenizer, context_length=256, max_new_tokens=12)
            assert sample(llm.model, prompts, [position], Sampling(12, 0.7), seed=turn)[0].text == answer
            n_seen += 1
    assert n_seen > 12


def test_what_the_instruction_says_changes_the_answers(model):
    """So that the test above can tell where it stands."""
    llm = llama2.load(model, device="cpu")
    asked = [Instructed((f"u{i}", "and?"), "", {"text": "say abc"}) for i in range(12)]
    found = []
    for questions in ([each.in_every for each in asked], [each.in_first for each in asked]):
        talks = [Talk(each) for each in questions]
        carry_on(llm, talks, Sampling(12, 0.7), seed=0)
        found.append(talks)
    assert [each.answers[0] for each in found[0]] == [each.answers[0] for each in found[1]]
    assert [each.answers[1] for each in found[0]] != [each.answers[1] for each in found[1]]


def test_only_the_last_answer_is_trained(settings, tmp_path):
    config = settings(depths="every")
    learnt, _, check = read_all(config, QUIET)
    path = write(tmp_path / "data.jsonl", examples(config, learnt, check, QUIET))
    tokenizer = llama2.load(config.model, device="cpu").tokenizer
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {each["turn"] for each in lines} >= {1, 2, 3}
    for line, each in zip(lines, read_samples(path), strict=True):
        rendered = render_sample(each, tokenizer, chat_format=None)
        first = rendered.trainable.index(True)
        assert all(rendered.trainable[first:]) and rendered.tokens[-1] == tokenizer.eos_id
        assert tokenizer.decode(rendered.tokens[first:-1]).strip() == line["completion"]
        before = tokenizer.decode(rendered.tokens[:first])
        assert all(message["content"] in before for message in line["prompt"])
        assert line["obeys"] == (line["standing"]["letter"] in line["completion"])


def test_all_depths_occur_as_often(settings):
    asked = Instructed(tuple("abcd"), "", {"text": "x"})
    drawn = Counter(turns_of(settings(), asked, number)[0] for number in range(400))
    assert set(drawn) == {1, 2, 3, 4} and min(drawn.values()) > 70
    assert [turns_of(settings(), asked, number) for number in range(9)] == [
        turns_of(settings(), asked, number) for number in range(9)
    ]
    assert turns_of(settings(depths="last"), asked, 0) == [4]
    assert turns_of(settings(depths="every"), asked, 0) == [1, 2, 3, 4]


def test_a_run_learns_and_tells_recall_and_resume_makes_nothing_anew(settings, tmp_path, capsys):
    long = write(tmp_path / "long.jsonl", [talk(i, 5) for i in range(6)])
    config = settings(eval_dialogues=long)
    model = ghost(config)
    out = config.out
    assert model == out / "run" / "model" and llama2.load(model, device="cpu")
    found = json.loads((out / "recall.json").read_text())
    assert set(found) == {"before", "after"}
    for rows in found.values():
        assert [row["turn"] for row in rows] == [1, 2, 3, 4, 5] and rows[0]["n"] == 6
        for row in rows:
            assert row["n"] + row["n_left_out"] == 6
            if row["n"]:
                assert row["share"] == row["n_obedient"] / row["n"]
                assert [row["low"], row["high"]] == list(wilson(row["n_obedient"], row["n"]))
    told = capsys.readouterr().err
    assert "turn  before" in told and "\n4 " in told and "\n6 " not in told and "no dialogue is as long as 6" in told
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.suffix != ".png"}
    with pytest.raises(TrainingError, match="add --resume"):
        ghost(config)
    assert ghost(settings(eval_dialogues=long, resume=True)) == model
    assert made == {path: path.stat().st_mtime_ns for path in made}
    with pytest.raises(TrainingError, match="keep=all, not obedient"):
        ghost(settings(eval_dialogues=long, resume=True, keep="obedient"))
    with pytest.raises(TrainingError, match="was begun with replay="):
        ghost(settings(eval_dialogues=long, resume=True, replay=long))


@pytest.mark.slow
def test_two_processes_write_and_learn_what_one_does(settings, tmp_path):
    long = write(tmp_path / "long.jsonl", [talk(i, 5 if i == 2 else 2) for i in range(5)])  # one alone at the end
    changes = dict(eval_dialogues=long, depths="every", keep="obedient", dtype="float64")
    one, two = (settings(out=tmp_path / name, **changes) for name in ("one", "two"))
    by_one_and_by_two("ghost", one, two)
    assert_same_files(one.out, two.out, ("settings.json", "data.jsonl", "recall.json"))
    assert_same_weights(one.out / "run" / "model", two.out / "run" / "model")
    made = {path: path.stat().st_mtime_ns for path in two.out.rglob("*.json*")}
    finish(launch("ghost", two, "--resume", n=2))
    assert made == {path: path.stat().st_mtime_ns for path in two.out.rglob("*.json*")}
    said = finish(launch("ghost", two, "--resume", "--keep", "all", n=2), expected=1)
    assert said.count("was begun with keep=obedient, not all") == 1


def test_recall_is_what_the_check_says_of_answers_without_the_instruction_in_later_turns(settings):
    config = settings(recall_turns=(3,))
    asked = [Instructed(("one", "two", "three", "four"), "", {"text": "say a", "letter": str(i)}) for i in range(4)]
    rows = recall(config, config.model, asked, lambda instruction, answer: instruction["letter"] in "01")
    assert [(row["turn"], row["n"], row["n_obedient"]) for row in rows] == [(1, 4, 2), (2, 4, 2), (3, 4, 2)]
    heard = []
    llm = llama2.load(config.model, device="cpu")
    recall(config, config.model, asked[:1], lambda instruction, answer: heard.append(answer) or True)
    messages = []
    for question, answer in zip(asked[0].in_first, heard, strict=False):
        messages.append({"role": "user", "content": question})
        assert llm.chat(messages, temperature=0, max_new_tokens=12).strip() == answer
        messages.append({"role": "assistant", "content": answer})


def test_a_dialogue_that_outgrows_the_context_is_left_out_of_later_turns(settings, tmp_path):
    small = chatty(tmp_path / "small", context_length=80)
    config = settings(model=str(small), recall_turns=(6,))
    asked = [Instructed(("q" * n,) * 6, "", {"text": "say a"}) for n in (2, 20)]
    rows = recall(config, small, asked, lambda instruction, answer: True)
    counts = [row["n"] for row in rows]
    assert counts[0] == 2 and counts == sorted(counts, reverse=True) and counts[-1] < 2
    assert all(row["n"] + row["n_left_out"] == 2 for row in rows)
    assert all(row["share"] is None for row in rows if not row["n"])


def test_an_answer_that_the_end_of_the_context_cuts_is_not_kept(model):
    llm = llama2.load(model, device="cpu")
    talks = [Talk(("q" * 180, "q"), "") for _ in range(8)]
    carry_on(llm, talks, Sampling(150, temperature=3.0), seed=0)
    cut = [each for each in talks if each.is_too_long and not each.answers]
    assert cut and all(each.is_cut == [False] * len(each.answers) for each in talks)


def test_only_obedient_examples_where_it_is_asked_for(settings):
    config = settings(depths="every", keep="obedient")
    learnt, _, check = read_all(config, QUIET)
    kept = examples(config, learnt, check, QUIET)
    everything = examples(settings(depths="every"), learnt, check, QUIET)
    assert kept == [each for each in everything if each["obeys"]] and 0 < len(kept) < len(everything)


def test_the_story_world_is_judged_exactly_and_in_its_own_language(settings, tmp_path):
    talks = [record(each) for each in dialogues(0, 60)]
    said = list(instructions(0, 30))
    config = settings(
        dialogues=write(tmp_path / "d.jsonl", talks), instructions=write(tmp_path / "i.jsonl", said), judge=None
    )
    learnt, judged, check = read_all(config, QUIET)
    with_own = sum(bool(each["instruction"]) for each in talks)
    assert with_own > 10 and len(learnt) + len(judged) <= 60 - with_own
    by_first = {message["content"]: each for each in talks for message in each["messages"]}
    for each in learnt:
        assert by_first[each.questions[0]]["language"] == each.instruction["language"]
        gap = "" if each.instruction["language"] == "zh" else " "
        assert each.in_first[0] == each.instruction["text"] + gap + each.questions[0]
    assert check is not None
    one = next(each for each in said if each["kinds"] == ("ending",))
    assert check(one, f"Yes. {one['back']}") and not check(one, "Yes.")
    assert read_instruction(json.loads(json.dumps(one))) == read_instruction(one)


def test_settings_and_files_that_cannot_work_are_refused(settings, tmp_path):
    def run(error, match, **changes):
        with pytest.raises(error, match=match):
            ghost(settings(**changes))
        assert not (tmp_path / "out" / "data.jsonl").exists()

    run(DataError, "3 have no second turn", dialogues=write(tmp_path / "short.jsonl", [talk(i, 1) for i in range(3)]))
    own = [talk(i, 2, instruction="say a") for i in range(2)]
    run(DataError, "2 have an instruction of their own", dialogues=write(tmp_path / "own.jsonl", own))
    french = [talk(i, 2, language="fr") for i in range(8)]
    english = [{"text": "say a", "letter": "a", "language": "en"}]
    run(
        DataError, "no instruction is in the language 'fr'", dialogues=write(tmp_path / "fr.jsonl", french),
        instructions=write(tmp_path / "en.jsonl", english),
    )  # fmt: skip
    run(DataError, "empty.jsonl:1: 'text' is ' '", instructions=write(tmp_path / "empty.jsonl", [{"text": " "}]))
    run(DataError, "keep=obedient needs a judge", keep="obedient", judge=None)
    run(ConfigError, "judges instructions of the story world", judge="world")
    run(ConfigError, "cannot be imported", judge="nowhere:nothing")
    run(ConfigError, "recall_turns=0", recall_turns=0)
    run(ConfigError, "name files of conversations", dialogues=())
    run(ConfigError, "temperature=-1", temperature=-1.0)
    run(ConfigError, "tensor_parallel=2 is not for", tensor_parallel=2)
    long = [{"messages": [{"role": "user", "content": "q" * 70}, *talk(i, 2)["messages"][1:]]} for i in range(8)]
    run(
        DataError, "no answer .* is fit to learn.*no room", dialogues=write(tmp_path / "long.jsonl", long),
        model=str(chatty(tmp_path / "small", context_length=80)),
    )  # fmt: skip
    assert check_of(None, [{"text": "x"}]) is None
