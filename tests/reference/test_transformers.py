"""The same weights, the same numbers: transformers' LlamaForCausalLM beside ours, in both directions."""

import json
import random

import pytest
import torch

import llama2
from llama2.infer.engine import Engine
from llama2.infer.request import Request, SamplingParams
from llama2.model.config import ModelConfig, RopeScaling
from llama2.model.transformer import build

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:::transformers.*", "ignore::DeprecationWarning", "ignore::FutureWarning"
)

FLOAT32_BOUND = 1e-5
"""Both sides round every operation to 2^-24 and add in another order; a handful of layers leaves about 1e-6."""
BFLOAT16_BOUND = 0.05
"""bfloat16 keeps 8 bits: 2^-9 = 0.002 for each of some 10 roundings a layer, which deep, lively layers magnify.

Ours turns queries and keys in float32, theirs in bfloat16, so the two do not even round the same numbers. How far
each is from the float32 model is compared too: over these seeds ours is 0.8 to 1.3 times as far as theirs.
"""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS = {
    "none": {},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_attention": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.8,
        "beta_fast": 16.0, "beta_slow": 2.0,
    },
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
}  # fmt: skip


def shape(seed: int) -> dict:
    """Return one random small Llama as transformers' keyword arguments; six seeds in a row have the six scalings."""
    rng = random.Random(seed)
    heads = rng.choice([2, 4, 6])
    kv_heads = rng.choice({2: [1, 2], 4: [1, 2, 4], 6: [1, 2, 3, 6]}[heads])
    head_dim = rng.choice([4, 8, 16, 20])
    scaling = SCALINGS[list(SCALINGS)[seed % len(SCALINGS)]]
    return dict(
        hidden_size=heads * rng.choice([head_dim, 8, 12]), num_hidden_layers=rng.choice([1, 2, 3]),
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        vocab_size=rng.choice([17, 64, 129, 300]), intermediate_size=rng.choice([24, 40, 96]),
        max_position_embeddings=128 if "yarn" in str(scaling) or "llama3" in str(scaling) else 48,
        rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-3]), tie_word_embeddings=rng.random() < 0.5,
        attention_bias=rng.random() < 0.4, mlp_bias=rng.random() < 0.4,
        rope_parameters={"rope_type": "default", "rope_theta": rng.choice([100.0, 1e4, 5e5]), **scaling},
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def their_model(seed: int, **changes):
    """Return a random model of theirs whose logits differ and whose attention is far from uniform."""
    config = transformers.LlamaConfig(**(shape(seed) | changes))
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise / (parameter.shape[1] ** 0.5 if config.tie_word_embeddings else 1))
            else:
                gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(gain * noise / parameter.shape[1] ** 0.5)
    return model


def tokens_for(vocab_size: int, n_rows: int, n_tokens: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (n_rows, n_tokens), generator=torch.Generator().manual_seed(7))


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def is_lively(logits: torch.Tensor) -> bool:
    """Whether the logits spread enough to betray a mistake."""
    return logits.std(dim=-1).mean().item() > 0.3


@torch.no_grad()
def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def is_dynamic(theirs) -> bool:
    return theirs.config.rope_parameters["rope_type"] == "dynamic"


def lengths(theirs) -> list[int]:
    """Lengths to compare at: within the original context, and for dynamic scaling beyond it too."""
    longest = theirs.config.max_position_embeddings
    return [2, longest - 5, longest + 31] if is_dynamic(theirs) else [2, longest]


@pytest.mark.parametrize("seed", range(24))
def test_what_transformers_saves_gives_its_logits(tmp_path, seed):
    theirs = their_model(seed)
    theirs.save_pretrained(tmp_path)
    ours = llama2.load(tmp_path).model
    for n_tokens in lengths(theirs):  # one row where frequencies depend on the row's length: theirs take the batch's
        tokens = tokens_for(theirs.config.vocab_size, 1 if is_dynamic(theirs) else 2, n_tokens)
        wanted = logits_of(theirs, tokens)
        assert is_lively(wanted)
        assert difference(logits_of(ours, tokens), wanted) < FLOAT32_BOUND


@pytest.mark.parametrize("seed", range(24))
def test_transformers_gives_our_logits_for_what_we_save(tmp_path, seed):
    theirs = their_model(seed)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = llama2.load(tmp_path / "theirs").model
    llama2.save(ours, tmp_path / "ours")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert again.dtype == torch.float32
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    same_fields(again.config, theirs.config)
    tokens = tokens_for(ours.config.vocab_size, 1, lengths(theirs)[-1])
    assert difference(logits_of(again, tokens), logits_of(ours, tokens)) < FLOAT32_BOUND


def same_fields(got, wanted):
    """Whatever a LlamaConfig says about the numbers."""
    for field in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias",
        "mlp_bias", "hidden_act", "model_type", "architectures", "attention_dropout", "pretraining_tp",
    ):  # fmt: skip
        if field != "architectures" or wanted.architectures:
            assert getattr(got, field) == getattr(wanted, field), field
    rope = {key: value for key, value in wanted.rope_parameters.items() if value is not None}
    assert {key: got.rope_parameters.get(key) for key in rope} == rope
    written = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(got)
    original = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(wanted)
    assert torch.equal(written.inv_freq, original.inv_freq)
    assert written.attention_scaling == original.attention_scaling


OURS = {
    "plain": {},
    "linear": dict(rope_scaling=RopeScaling("linear", 2.0)),
    "ntk": dict(rope_scaling=RopeScaling("ntk", 2.0)),
    "dynamic": dict(rope_scaling=RopeScaling("dynamic", 2.0, 32)),
    "yarn": dict(rope_scaling=RopeScaling("yarn", 2.0, 32)),
    "llama3": dict(rope_scaling=RopeScaling("llama3", 2.0, 32)),
}


@pytest.mark.parametrize("kind", OURS)
def test_a_model_of_ours_opens_in_transformers(tmp_path, kind):
    config = ModelConfig(
        48, 2, 6, 80, 64, n_kv_heads=2, context_length=64, tied_embeddings=kind == "yarn", **OURS[kind]
    )
    ours = lively(build(config, seed=3))
    llama2.save(ours, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = tokens_for(80, 1, 64)
    wanted = logits_of(ours, tokens)
    assert is_lively(wanted)
    assert difference(logits_of(theirs, tokens), wanted) < FLOAT32_BOUND


def lively(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def test_sharded_checkpoints_both_ways(tmp_path):
    theirs = their_model(1)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    tokens = tokens_for(theirs.config.vocab_size, 2, 40)
    wanted = logits_of(theirs, tokens)
    assert difference(logits_of(llama2.load(tmp_path / "theirs").model, tokens), wanted) < FLOAT32_BOUND
    llama2.convert(tmp_path / "theirs", tmp_path / "ours", to="hf", shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(logits_of(again, tokens), wanted)


@pytest.mark.parametrize("to", ["meta", "gguf"])
def test_a_round_trip_through_other_formats_keeps_their_logits(tmp_path, to):
    theirs = their_model(0, attention_bias=False, mlp_bias=False)
    theirs.save_pretrained(tmp_path / "a")
    middle = tmp_path / ("b.gguf" if to == "gguf" else "b")
    llama2.convert(tmp_path / "a", middle, to=to)
    llama2.convert(middle, tmp_path / "c", to="hf")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "c").eval()
    tokens = tokens_for(theirs.config.vocab_size, 2, 30)
    assert difference(logits_of(again, tokens), logits_of(theirs, tokens)) < FLOAT32_BOUND


@pytest.mark.parametrize("seed", [0, 3, 4, 5, 6, 7, 9, 11])
def test_greedy_generation_with_a_cache_gives_their_tokens(tmp_path, seed):
    theirs = their_model(seed)
    theirs.save_pretrained(tmp_path)
    ours = llama2.load(tmp_path).model
    n_new = 24
    prompt = tokens_for(theirs.config.vocab_size, 1, 9)
    theirs.generation_config.eos_token_id = None
    options = transformers.GenerationConfig(max_new_tokens=n_new, do_sample=False, pad_token_id=0)
    wanted = theirs.generate(prompt, generation_config=options)[0, 9:].tolist()
    request = Request("r", tuple(prompt[0].tolist()), SamplingParams(max_new_tokens=n_new, temperature=0.0))
    for invariant in (True, False):
        done = Engine(ours, batch_invariant=invariant).generate([request])[0][0]
        assert list(done.tokens) == wanted
    assert len(set(wanted)) > 2


@pytest.mark.parametrize("seed", range(6))
def test_bfloat16_is_as_near_to_float32_as_theirs(tmp_path, seed):
    theirs = their_model(seed, attention_bias=False, mlp_bias=False)
    tokens = tokens_for(theirs.config.vocab_size, 1, 40)
    theirs = theirs.to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = llama2.load(tmp_path).model
    assert ours.tok_embeddings.weight.dtype == torch.bfloat16
    exact = logits_of(llama2.load(tmp_path, dtype="float32").model, tokens)
    got, wanted = logits_of(ours, tokens), logits_of(theirs.eval(), tokens)
    assert difference(got, wanted) < BFLOAT16_BOUND
    assert difference(got, exact) < 1.5 * difference(wanted, exact)


def test_long_positions_are_as_near_to_the_exact_ones_as_theirs(tmp_path):
    """A float32 frequency is off by up to 2^-24, its angle at position 4095 by 2.4e-4 rad: on both sides, differently.

    So the bound is wider than FLOAT32_BOUND, and a float64 model says that ours is not much further off than theirs.
    """
    theirs = their_model(0, max_position_embeddings=4096, num_hidden_layers=2, head_dim=64)
    theirs.save_pretrained(tmp_path)
    ours = llama2.load(tmp_path).model
    tokens = tokens_for(theirs.config.vocab_size, 1, 4096)
    got, wanted = logits_of(ours, tokens), logits_of(theirs, tokens)
    assert difference(got, wanted) < 1e-4
    exact = logits_of(ours.double(), tokens)
    assert difference(got, exact) < 1.5 * difference(wanted, exact)


def test_config_json_says_what_theirs_says(tmp_path):
    theirs = their_model(5)
    theirs.save_pretrained(tmp_path / "theirs")
    llama2.convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    got = json.loads((tmp_path / "ours/config.json").read_text())
    wanted = json.loads((tmp_path / "theirs/config.json").read_text())
    for key in ("architectures", "model_type", "hidden_size", "head_dim", "bos_token_id", "eos_token_id"):
        assert got[key] == wanted[key], key
    opened = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    same_fields(opened, transformers.AutoConfig.from_pretrained(tmp_path / "theirs"))
    assert opened.eos_token_id == 2 and opened.bos_token_id == 1
