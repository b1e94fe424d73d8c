"""The lines that tutorials print, run as they are."""

import warnings

import pytest
import torch

import llama2
from llama2 import LLama2Model, LLama2Tokenizer, LLaMAForCausalLM, LLaMATokenizer, preprocess_text, tutorial
from llama2.errors import RequestError
from llama2.model.transformer import build
from tests.pocket import POCKET, pocket_tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutorial") / "model"
    llama2.save(build(POCKET, seed=0), folder, tokenizer=pocket_tokenizer())
    return folder


@pytest.fixture(autouse=True)
def nothing_said_yet():
    tutorial._said.clear()


def test_text_in_text_out(path):
    model = LLama2Model.from_pretrained(path)
    text = model.generate("Once upon a time", max_length=50, temperature=0)
    assert text.startswith("Once upon a time") and len(text) > 20
    ids = torch.tensor([[1, *model.llm.tokenizer.encode("Once upon a time")]])
    assert model.generate(ids, max_length=50).shape[1] <= 50
    assert model.generate(["a", "b"], max_new_tokens=3)[1].startswith("b")


def test_a_batch_of_texts_becomes_padded_tensors(path):
    tokenizer = LLama2Tokenizer.from_pretrained(path)
    inputs = tokenizer(["Hello", "Hello world"], padding=True, truncation=True, return_tensors="pt")
    assert inputs.input_ids.shape == inputs["attention_mask"].shape == (2, 13)
    assert inputs.attention_mask.sum(1).tolist() == [7, 13]
    assert inputs.input_ids[0, 7:].eq(tokenizer.pad_token_id).all()
    assert tokenizer.decode(inputs.input_ids[1], skip_special_tokens=True) == "Hello world"
    assert tokenizer("x" * 500, truncation=True).input_ids.__len__() == POCKET.context_length
    with pytest.raises(RequestError, match="padding=True"):
        tokenizer(["a", "bcd"], return_tensors="pt")


def test_a_training_step(path):
    model, tokenizer = LLama2Model.from_pretrained(path), LLama2Tokenizer.from_pretrained(path)
    model.to("cpu")
    model.train()
    inputs = tokenizer(["Hello", "Hello world"], padding=True, return_tensors="pt")
    labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        outputs = model(inputs, labels=labels)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        losses.append(outputs.loss.item())
    assert losses[2] < losses[0]
    model.eval()
    assert model(inputs).logits.shape == (2, 13, 260)
    assert model(**inputs)[0].shape == (2, 13, 260)


def test_the_loss_counts_only_what_has_a_label(path):
    model = LLama2Model.from_pretrained(path)
    ids = torch.tensor([[1, 50, 60, 70]])
    logits = model(ids).logits[0].log_softmax(-1)
    loss = model(ids, labels=torch.tensor([[-100, 50, -100, 70]])).loss
    assert loss.item() == pytest.approx(-(logits[0, 50] + logits[2, 70]).item() / 2, rel=1e-5)


def test_padding_does_not_move_the_logits_and_is_refused_on_the_left(path):
    model, tokenizer = LLama2Model.from_pretrained(path), LLama2Tokenizer.from_pretrained(path)
    both = model(tokenizer(["Hi", "Hi there"], padding=True, return_tensors="pt")).logits
    alone = model(tokenizer("Hi", return_tensors="pt")).logits
    torch.testing.assert_close(both[0, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(RequestError, match="left"):
        model(torch.tensor([[0, 1, 50]]), attention_mask=torch.tensor([[0, 1, 1]]))


def test_five_greedy_sequences_are_sampled_and_that_is_said_once(path):
    tokenizer, model = LLaMATokenizer.from_pretrained(path), LLaMAForCausalLM.from_pretrained(path)
    input_ids = tokenizer.encode("Once upon a time, in a land far away", return_tensors="pt")
    with pytest.warns(UserWarning) as said:
        output = model.generate(input_ids, max_length=20, num_return_sequences=5)
    assert sorted(str(each.message).split()[0] for each in said) == ["greedy", "max_length=20"]
    assert output.shape[0] == 5 and output.shape[1] <= input_ids.shape[1] + 20
    assert output[:, : input_ids.shape[1]].eq(input_ids).all()
    assert len({tuple(row.tolist()) for row in output}) > 1
    for row in output:
        assert tokenizer.decode(row, skip_special_tokens=True).startswith("Once upon a time, in a land far away")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(input_ids, max_length=20, num_return_sequences=5)


def test_ids_are_continued_greedily_unless_sampling_is_asked_for(path):
    model = LLaMAForCausalLM.from_pretrained(path)
    ids = torch.tensor([[1, 50, 60]])
    one, same = model.generate(ids, max_new_tokens=6), model.generate(input_ids=ids, max_new_tokens=6)
    assert torch.equal(one, same) and one.shape == (1, 9)
    assert model.generate(ids, max_new_tokens=6, do_sample=True, seed=1).shape[1] <= 9
    with pytest.raises(RequestError, match="input_ids"):
        model.generate()


def test_a_padded_batch_of_ids_is_continued_row_by_row(path):
    model, tokenizer = LLaMAForCausalLM.from_pretrained(path), LLaMATokenizer.from_pretrained(path)
    inputs = tokenizer(["Hi", "Hi there"], padding=True, return_tensors="pt")
    rows = model.generate(**inputs, max_new_tokens=4)
    alone = model.generate(tokenizer("Hi", return_tensors="pt").input_ids, max_new_tokens=4)
    assert rows[0, : alone.shape[1]].tolist() == alone[0].tolist()


def test_decode_shows_or_skips_special_tokens(path):
    tokenizer = LLaMATokenizer.from_pretrained(path)
    ids = tokenizer.encode("Hi")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hi"
    assert tokenizer.decode(ids).startswith("<s>")
    assert tokenizer.batch_decode([ids, ids], skip_special_tokens=True) == ["Hi", "Hi"]
    assert tokenizer.encode("Hi", add_special_tokens=False) == ids[1:]
    assert len(tokenizer) == 260 and len(tokenizer.tokenize("Hi")) == 3


def test_what_stands_beside_the_named_lines(path, tmp_path):
    model, tokenizer = LLama2Model.from_pretrained(path), LLama2Tokenizer.from_pretrained(path)
    assert (tokenizer.vocab_size, tokenizer.bos_token, tokenizer.eos_token) == (260, "<s>", "</s>")
    assert model.config.dim == POCKET.dim and not model.training
    model.save_pretrained(tmp_path / "saved")
    assert LLama2Model.from_pretrained(tmp_path / "saved").generate("a", max_new_tokens=2, seed=1).startswith("a")
    with pytest.raises(RequestError, match="max_length=-5"):
        model.generate("a", max_length=-5)
    with pytest.warns(UserWarning, match="greedy"):
        model.generate("a", max_new_tokens=2, num_return_sequences=2, temperature=0)


def test_sentiment_and_translation(path):
    model = LLama2Model.from_pretrained(path)
    assert model.predict_sentiment("I love this!") in ("positive", "negative")
    text = model.translate("Hola", target_language="en", max_new_tokens=8)
    messages = [{"role": "user", "content": "Translate into English.\nHola"}]
    assert text == model.llm.chat(messages, max_new_tokens=8, temperature=0).strip()


def test_preprocessing_keeps_punctuation_and_small_words():
    assert preprocess_text("  It's the cafe\u0301, isn't it?\n") == "It's the caf\u00e9, isn't it?"
