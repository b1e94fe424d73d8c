"""Only answers are trained: marks become shifted targets, packed or not, cut or not, alone or mixed."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from llama2.chat import render
from llama2.data.batch import IGNORE
from llama2.data.examples import open_documents, read_examples, set_aside, together
from llama2.data.loader import Loader, in_order
from llama2.data.shards import ShardWriter, token_dtype, tokenizer_digest, write_index
from llama2.errors import DataError
from llama2.model.config import ModelConfig
from llama2.model.losses import next_token_loss
from llama2.model.transformer import build
from llama2.tokenizer.formats import load_tokenizer, save_tokenizer
from llama2.tokenizer.tokenizer import Tokenizer
from tests.pocket import pocket_tokenizer

TOKENIZER = pocket_tokenizer()


def dialogue(*contents, **more):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)], **more}


DIALOGUES = [
    dialogue("Hi", "Hello!"),
    dialogue("One?", "1", "Two?", "It is 2."),
    dialogue("What is a fox?", "An animal."),
    {"messages": [{"role": "system", "content": "Be brief."}, *dialogue("Sing", "La la")["messages"]]},
    *(dialogue(f"Add {i} and {i}", str(2 * i)) for i in range(20)),
]


@pytest.fixture
def read(tmp_path):
    """Return a function that writes records and reads them as Examples."""

    def make(records=DIALOGUES, *, length=64, name="chats.jsonl", **settings):
        path = tmp_path / name
        path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
        return read_examples(path, TOKENIZER, length=length, **settings)

    return make


def targets_in(batches):
    """Return what is trained, row by row."""
    return [[t for t in row.tolist() if t != IGNORE] for batch in batches for row in batch.targets]


def test_marks_are_those_of_the_rendered_chat(read):
    examples = read()
    assert len(examples) == len(DIALOGUES)
    for i, record in enumerate(DIALOGUES):
        expected = render(record["messages"], TOKENIZER)
        assert examples.document(i).tolist() == expected.tokens
        assert examples.trained(i).tolist() == expected.trainable
    assert examples.n_targets == sum(sum(render(each["messages"], TOKENIZER).trainable) for each in DIALOGUES)


def test_targets_are_the_marked_tokens_each_before_its_own_place(read):
    examples = read()
    for i in range(4):
        (batch,) = in_order(examples, [i], sequence_length=64, micro_batch_size=1)
        expected = render(DIALOGUES[i]["messages"], TOKENIZER)
        n = len(expected.tokens)
        assert batch.tokens[0, : n - 1].tolist() == expected.tokens[:-1]
        for at in range(n - 1):
            wanted = expected.tokens[at + 1] if expected.trainable[at + 1] else IGNORE
            assert batch.targets[0, at] == wanted
        assert (batch.targets[0, n - 1 :] == IGNORE).all()


def test_the_last_token_of_the_question_predicts_the_first_of_the_answer(read):
    (batch,) = in_order(read(), [0], sequence_length=64, micro_batch_size=1)
    first = int((batch.targets[0] != IGNORE).nonzero()[0])
    assert TOKENIZER.decode(batch.tokens[0, 1 : first + 1].tolist()) == "[INST] Hi [/INST]"
    trained = batch.targets[0][batch.targets[0] != IGNORE].tolist()
    assert trained[-1] == TOKENIZER.eos_id and TOKENIZER.decode(trained[:-1]).strip() == "Hello!"


def test_an_answer_of_weight_0_is_read_and_not_trained(read):
    record = dialogue("One?", "1", "Two?", "2")
    record["messages"][1]["weight"] = 0
    (batch,) = in_order(read([record]), [0], sequence_length=64, micro_batch_size=1)
    assert TOKENIZER.decode([t for t in batch.targets[0].tolist() if t not in (IGNORE, 2)]).strip() == "2"


def test_bytes_are_those_of_the_answers(read):
    """Of text: the token that ends them counts in the loss and has none."""
    examples = read([dialogue("Hi", "H\u00e9")])
    assert examples.n_bytes.tolist() == [len(" H\u00e9 ".encode())]  # Meta's format has a space on either side


def test_packed_equals_unpacked(read):
    """The loss of each example, and its gradient, are those it has alone in a row."""
    examples = read()
    model = build(ModelConfig(16, 2, 4, 260, 24, n_kv_heads=2, context_length=128), dtype=torch.float64)
    (packed,) = in_order(examples, range(len(examples)), sequence_length=128, micro_batch_size=99)
    assert packed.documents is not None and len(packed.tokens) < len(examples)
    whole, count, _ = next_token_loss(model, packed)
    alone = []
    for i in range(len(examples)):
        (batch,) = in_order(examples, [i], sequence_length=128, micro_batch_size=1)
        alone.append(next_token_loss(model, batch))
    assert count == examples.n_targets == sum(n for _, n, _ in alone)
    total = sum(loss for loss, _, _ in alone)
    torch.testing.assert_close(whole, total, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in (whole, total))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_pass_trains_every_answer_once(read):
    examples = read()
    n = len(examples)
    loader = Loader(
        [examples], sequence_length=64, rows_per_step=n, micro_batch_size=1, packing=False, packing_buffer_rows=n
    )
    expected = sorted(examples.document(i)[examples.trained(i)].tolist() for i in range(n))
    for _ in range(2):
        assert sorted(targets_in(loader.step())) == expected
    packed = targets_in(in_order(examples, range(n), sequence_length=64, micro_batch_size=4))
    assert Counter(t for row in packed for t in row) == Counter(t for row in expected for t in row)


LONG = [dialogue("Hi", "Hello!"), dialogue("Tell me a story", "Once upon a time there was a fox who " * 8)]


def test_too_long_is_refused_with_its_line_and_both_numbers(read):
    n = len(render(LONG[1]["messages"], TOKENIZER).tokens)
    with pytest.raises(DataError, match=rf"chats.jsonl:2 has {n} tokens and a row holds 65.*--too-long split"):
        read(LONG)
    assert len(read(LONG, length=n - 1)) == 2  # it just fits


def test_what_is_split_is_trained_once(read):
    examples = read(LONG, too_long="split")
    rows = targets_in(in_order(examples, [1], sequence_length=64, micro_batch_size=1))
    assert len(rows) > 4
    expected = render(LONG[1]["messages"], TOKENIZER)
    marked = [token for token, mark in zip(expected.tokens, expected.trainable, strict=True) if mark]
    assert [token for row in rows for token in row] == marked


def test_what_is_split_is_trained_once_in_every_pass_wherever_it_is_cut(read):
    examples = read(LONG[1:], too_long="split")
    loader = Loader([examples], sequence_length=64, rows_per_step=1, micro_batch_size=1, packing=False)
    expected = Counter(examples.ids[examples.marks].tolist())
    loader.window = 1  # of one document
    for _ in range(3):
        seen: Counter[int] = Counter()
        while True:
            for row in targets_in(loader.step()):
                seen.update(row)
            if loader._n_taken == len(loader._rows):
                break
        assert seen == expected


def test_what_is_left_out_is_counted(read):
    examples = read([*LONG, dialogue("No", "Yes", label=False)], too_long="drop")
    assert len(examples) == 1
    assert examples.left_out == {"too long": 1, "label is false: a bad answer": 1}
    with pytest.raises(DataError, match="no example to train on: all 1 are longer than 65 tokens"):
        read(LONG[1:], too_long="drop")


def rows_of(examples):
    return [tuple(examples.document(i).tolist()) for i in range(len(examples))]


def test_what_is_set_aside_is_seeded_disjoint_and_complete(read):
    examples = read()
    kept, aside = set_aside(examples, 0.25, seed=1)
    assert len(aside) == round(0.25 * len(examples)) and len(kept) + len(aside) == len(examples)
    assert not {*rows_of(kept)} & {*rows_of(aside)}
    assert sorted(rows_of(kept) + rows_of(aside)) == sorted(rows_of(examples))
    again, other = set_aside(examples, 0.25, seed=1), set_aside(examples, 0.25, seed=2)
    assert rows_of(again[1]) == rows_of(aside) and rows_of(other[1]) != rows_of(aside)
    assert rows_of(kept) == [row for row in rows_of(examples) if row in rows_of(kept)]  # in their order
    assert kept.n_targets + aside.n_targets == examples.n_targets
    with pytest.raises(DataError, match="too few to set 0.999 of them aside"):
        set_aside(examples, 0.999, seed=0)


def test_the_first_of_several_sets_are_of_all_of_them(read):
    """A short evaluation reads the first ones only."""
    many, few = read(), read([dialogue(f"Say {i}", str(i)) for i in range(6)], name="few.jsonl")
    one = together([many, few])
    assert sorted(rows_of(one)) == sorted(rows_of(many) + rows_of(few))
    assert one.n_targets == many.n_targets + few.n_targets and together([few]) is few
    assert [sum(row in rows_of(few) for row in rows_of(one)[at : at + 10]) for at in (0, 10, 20)] == [2, 2, 2]


def test_a_text_is_trained_but_for_its_first_token(read):
    examples = read([{"text": "Once upon a time"}])
    assert examples.trained(0).tolist() == [False] + [True] * (len(examples.document(0)) - 1)


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "earlier"
    folder.mkdir()
    with ShardWriter(folder, "00000", dtype=token_dtype(260)) as writer:
        for i in range(30):
            text = f"Earlier there was a story number {i}."
            writer.add(TOKENIZER.encode(text, bos=True, eos=True), len(text))
    write_index(folder, TOKENIZER, [writer.entry])
    return folder


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_replay_has_its_exact_share(read, shards, share):
    """Of the tokens read, to within one document, at every step; of shards everything is trained."""
    examples, earlier = read(), open_documents(shards, TOKENIZER, length=64)
    loader = Loader(
        [examples, earlier], weights=[1 - share, share], sequence_length=64, rows_per_step=4, micro_batch_size=4
    )
    for _ in range(20):
        loader.step()
    drawn = loader._mixture.state["n_drawn"]
    assert abs(drawn[1] / sum(drawn) - share) <= max(earlier.lengths) / sum(drawn)
    assert earlier.trained(0) is None and earlier.n_targets == earlier.n_tokens - len(earlier)
    (batch,) = in_order(earlier, [0], sequence_length=64, micro_batch_size=1)
    assert targets_in([batch])[0] == earlier.document(0)[1:].tolist()


def test_shards_of_another_tokenizer_are_refused(shards):
    pieces = list(TOKENIZER.vocabulary.pieces)
    pieces[3], pieces[4] = pieces[4], pieces[3]
    other = Tokenizer(replace(TOKENIZER.vocabulary, pieces=tuple(pieces)))
    with pytest.raises(DataError, match="earlier was made with another tokenizer than the model's: id 3 is '<0x00>'"):
        open_documents(shards, other, length=64)


def test_one_tokenizer_in_two_formats_is_one(shards, tmp_path):
    """Scores are other ones in tokenizer.json, which is all that an adapter's folder has."""
    save_tokenizer(TOKENIZER, tmp_path, format="json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer_digest(again) != tokenizer_digest(TOKENIZER)
    assert len(open_documents(shards, again, length=64)) == 30


def test_weights_are_shares_of_what_is_read(read):
    one, two = read(), read(DIALOGUES[:3], name="other.jsonl")
    loader = Loader([one, two], weights=[0.25, 0.75], sequence_length=64, rows_per_step=4, micro_batch_size=2)
    for _ in range(10):
        loader.step()
    drawn = np.array(loader._mixture.state["n_drawn"])
    assert drawn[1] / drawn.sum() == pytest.approx(0.75, abs=0.02)
