"""A checkpoint with an extended vocabulary, opened by transformers: our ids and our logits."""

import pytest
import torch

import llama2
from llama2.cli.extend_vocabulary import extend_vocabulary
from llama2.data.storyworld.stories import stories
from llama2.model.config import ModelConfig
from llama2.model.transformer import build
from llama2.tokenizer.train import train_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:::transformers.*", "ignore::DeprecationWarning", "ignore::FutureWarning"
)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_gives_the_same_ids_and_logits(tmp_path, tied):
    tokenizer = train_tokenizer([each.text("en") for each in stories(0, 100)], vocab_size=500)
    model = build(ModelConfig(32, 2, 4, 500, 64, context_length=256, tied_embeddings=tied), seed=4)
    llama2.save(model, tmp_path / "old", tokenizer=tokenizer)
    texts = [each.text(language) for each in stories(0, 60) for language in ("es", "zh")]
    (tmp_path / "new.txt").write_text("\n".join(texts), "utf-8")
    extend_vocabulary(str(tmp_path / "old"), tmp_path / "new.txt", out=tmp_path / "new", add=150)
    ours = llama2.load(tmp_path / "new")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "new").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert theirs.config.vocab_size == ours.tokenizer.n_vocab == 650
    for text in [*texts[:40], stories(0, 1).__next__().text("en"), " two  spaces", "caf\u00e9 12"]:
        ids = ours.tokenizer.encode(text, bos=True)
        assert their_tokenizer.encode(text) == ids
        tokens = torch.tensor([ids[:200]])
        with torch.no_grad():
            assert torch.allclose(theirs(tokens).logits, ours.model(tokens), atol=1e-5)
