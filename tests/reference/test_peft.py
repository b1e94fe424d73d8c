"""Adapters in both directions: what PEFT writes we read, what we write PEFT reads, and the logits are the same."""

import warnings

import pytest
import torch

import llama2
from llama2.checkpoint import store
from llama2.checkpoint.adapter import read_adapter, write_adapter
from llama2.model.config import ModelConfig
from llama2.model.lora import adapter_state, add_adapter, merge_into
from llama2.model.lora_config import LoraConfig
from llama2.model.transformer import build

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

BOUND = 1e-5
"""As in test_transformers.py: float32 on both sides, added in another order."""
TOKENS = torch.randint(0, 60, (2, 20), generator=torch.Generator().manual_seed(0))
BASE = ModelConfig(48, 2, 6, 60, 40, n_kv_heads=2, head_dim=10, context_length=64)
BOTH = [("lora", {}), ("rslora", {}), ("dora", {}), ("whole", {}), ("output", {}), ("lora", {"attention_bias": True})]
OURS = {
    "lora": LoraConfig(r=4, alpha=6, target_modules=("wq", "wk", "w2")),
    "rslora": LoraConfig(r=4, rslora=True),
    "dora": LoraConfig(r=4, dora=True),
    "whole": LoraConfig(r=4, trained_modules=("tok_embeddings", "output")),
    "output": LoraConfig(r=4, target_modules=("wk", "output")),
}
THEIRS = {
    "lora": dict(target_modules=["q_proj", "k_proj", "down_proj"], lora_alpha=6),
    "rslora": dict(target_modules="all-linear", use_rslora=True),
    "dora": dict(target_modules="all-linear", use_dora=True),
    "whole": dict(target_modules=r".*\.(q|k|v)_proj", modules_to_save=["embed_tokens", "lm_head"]),
    "output": dict(target_modules=["k_proj", "lm_head"]),
}


def difference(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.fixture
def base(tmp_path):
    """Writes a base whose queries and keys matter."""

    def write(**changes):
        model = build(ModelConfig(**{**vars(BASE), **changes}), seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 2:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 / weight.shape[1] ** 0.5)
        store.save(model, tmp_path / "base")
        return model

    return write


@torch.no_grad()
def shaken(parameters):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(parameter + (0.1 if "magnitude" in name else 0.2) * noise)


@torch.no_grad()
@pytest.mark.parametrize("kind, changes", BOTH)
def test_peft_reads_what_we_write(base, tmp_path, kind, changes):
    model = add_adapter(base(**changes), OURS[kind])
    before = model(TOKENS)
    shaken(adapter_state(model).items())
    tensors = {name: (lambda value=value: value) for name, value in adapter_state(model).items()}
    write_adapter(tmp_path / "adapter", tensors, OURS[kind], base=str(tmp_path / "base"), model=model.config)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert difference(model.eval()(TOKENS), theirs(TOKENS).logits) < BOUND
    assert difference(model(TOKENS), before) > 0.05
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert difference(automatic(TOKENS).logits, theirs(TOKENS).logits) < BOUND
    again = store.load(tmp_path / "adapter")
    assert torch.equal(again(TOKENS), model(TOKENS))
    merge_into(model)
    assert difference(model(TOKENS), theirs.merge_and_unload()(TOKENS).logits) < BOUND


@torch.no_grad()
@pytest.mark.parametrize("kind, changes", BOTH)
def test_we_read_what_peft_writes(base, tmp_path, kind, changes):
    base(**changes)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=5, **THEIRS[kind])
    theirs = peft.get_peft_model(theirs, settings).eval()
    before = theirs(TOKENS).logits
    own = [(name, each) for name, each in theirs.named_parameters() if each.requires_grad]
    shaken(own)
    theirs.save_pretrained(tmp_path / "adapter")
    wanted = theirs(TOKENS).logits
    assert difference(wanted, before) > 0.05
    model = store.load(tmp_path / "adapter")
    assert difference(model(TOKENS), wanted) < BOUND
    read = read_adapter(tmp_path / "adapter", model=model.config)
    assert len(read.tensors) == len(own) and read.base == str(tmp_path / "base")
    llm = llama2.load(tmp_path / "adapter", device="cpu")
    assert torch.equal(llm.model(TOKENS), model(TOKENS))
    wide = theirs.train()(TOKENS).logits  # no dropout: training and answering are one
    assert difference(model.train()(TOKENS), wide) < BOUND


@torch.no_grad()
def test_a_tied_embedding_trained_whole(base, tmp_path):
    config = LoraConfig(r=2, target_modules=("wv",), trained_modules=("tok_embeddings",))
    model = add_adapter(base(tied_embeddings=True), config)
    shaken(adapter_state(model).items())
    tensors = {name: (lambda value=value: value) for name, value in adapter_state(model).items()}
    write_adapter(tmp_path / "adapter", tensors, config, base="../base", model=model.config)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert difference(model.eval()(TOKENS), theirs(TOKENS).logits) < BOUND
    assert torch.equal(store.load(tmp_path / "adapter")(TOKENS), model(TOKENS))


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_peft_resized(base, tmp_path, tied):
    base(tied_embeddings=tied)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs.resize_token_embeddings(64)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    theirs = peft.get_peft_model(theirs, settings).eval()
    shaken([(name, each) for name, each in theirs.named_parameters() if each.requires_grad])
    theirs.save_pretrained(tmp_path / "adapter")
    model = store.load(tmp_path / "adapter")
    assert model.config.vocab_size == store.read_config(tmp_path / "adapter").vocab_size == 64
    assert difference(model(TOKENS + 4), theirs(TOKENS + 4).logits) < BOUND


def test_the_gradients_of_dora_are_pefts(base, tmp_path):
    model = add_adapter(base(), OURS["dora"])
    shaken(adapter_state(model).items())
    tensors = {name: (lambda value=value: value) for name, value in adapter_state(model).items()}
    write_adapter(tmp_path / "adapter", tensors, OURS["dora"], base=str(tmp_path / "base"), model=model.config)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).train()
    (model.train()(TOKENS) ** 2).mean().backward()
    (theirs(TOKENS).logits ** 2).mean().backward()
    pairs = {"attention.wv": "self_attn.v_proj", "feed_forward.w2": "mlp.down_proj"}
    for ours, name in pairs.items():
        mine, other = model.layers[0].get_submodule(ours), theirs.base_model.model.model.layers[0].get_submodule(name)
        assert difference(mine.lora_a["default"].grad, other.lora_A["default"].weight.grad) < BOUND
        assert difference(mine.lora_b["default"].grad, other.lora_B["default"].weight.grad) < BOUND
        assert difference(mine.magnitude["default"].grad, other.lora_magnitude_vector["default"].weight.grad) < BOUND
