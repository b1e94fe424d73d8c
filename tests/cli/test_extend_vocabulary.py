"""The command from checkpoint to checkpoint, in every format."""

import pytest
import torch

import llama2
from llama2.checkpoint import store
from llama2.cli.extend_vocabulary import extend_vocabulary
from llama2.data.storyworld.stories import stories
from llama2.errors import CheckpointError, TokenizerError
from llama2.model.config import ModelConfig
from llama2.model.transformer import build
from llama2.tokenizer.formats import load_tokenizer
from llama2.tokenizer.train import train_tokenizer

SPANISH = "\n".join(each.text("es") for each in stories(0, 150))


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extend")
    tokenizer = train_tokenizer([each.text("en") for each in stories(0, 100)], vocab_size=500)
    model = build(ModelConfig(32, 2, 2, tokenizer.n_vocab, 64, context_length=64), seed=2)
    llama2.save(model, folder / "model", tokenizer=tokenizer)
    (folder / "es.txt").write_text(SPANISH, "utf-8")
    return folder


@pytest.mark.parametrize("to", ["hf", "meta", "gguf", "llama2c"])
def test_a_checkpoint_comes_out_that_speaks_more(before, tmp_path, capsys, to):
    out = tmp_path / ("out" + {"gguf": ".gguf", "llama2c": ".bin"}.get(to, ""))
    extend_vocabulary(str(before / "model"), before / "es.txt", out=out, add=100, to=to)
    said = capsys.readouterr().out
    was, now = (float(word) for word in said.replace(",", "").split() if word[0].isdigit())
    assert said.startswith("tokens per character") and now < 0.9 * was
    old, new = store.load(before / "model"), store.load(out)
    old_tokenizer, new_tokenizer = load_tokenizer(before / "model"), load_tokenizer(out)
    assert new.config.vocab_size == new_tokenizer.n_vocab == old_tokenizer.n_vocab + 100
    tokens = torch.tensor([old_tokenizer.encode("Once there was a bear.", bos=True)])
    with torch.no_grad():
        assert torch.equal(new(tokens)[..., : old.config.vocab_size], old(tokens))
    for text in SPANISH.split("\n")[:20]:
        ids = new_tokenizer.encode(text)
        assert new_tokenizer.decode(ids) == text and max(ids) >= old_tokenizer.n_vocab
    (llm := llama2.load(out)).generate("Una", max_new_tokens=2)
    assert llm.tokenizer.n_vocab == new.config.vocab_size


def test_both_tokenizer_files_lie_there_and_agree(before, tmp_path):
    extend_vocabulary(str(before / "model"), before / "es.txt", out=tmp_path / "out", add=50)
    found = [load_tokenizer(tmp_path / "out" / name) for name in ("tokenizer.model", "tokenizer.json")]
    assert all(found[0].encode(text) == found[1].encode(text) for text in SPANISH.split("\n")[:50])


def test_mistakes_are_told_before_the_work(before, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        extend_vocabulary(str(before / "model"), before / "es.txt", out=tmp_path / "used")
    with pytest.raises(TokenizerError, match="at least one text"):
        extend_vocabulary(str(before / "model"), out=tmp_path / "new")
    with pytest.raises(TokenizerError, match="missing.txt"):
        extend_vocabulary(str(before / "model"), tmp_path / "missing.txt", out=tmp_path / "new")
    (tmp_path / "en.txt").write_text("a a", "utf-8")
    with pytest.raises(TokenizerError, match="no new piece"):
        extend_vocabulary(str(before / "model"), tmp_path / "en.txt", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
