"""Adapters beside the matrices: what they add, how they stack, and that they leave everything else alone."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from llama2.errors import ConfigError
from llama2.infer.engine import Engine
from llama2.infer.request import Request, SamplingParams
from llama2.model.arithmetic import Linear
from llama2.model.config import ModelConfig
from llama2.model.lora import (
    LoRALinear,
    adapter_config,
    adapter_names,
    adapter_state,
    add_adapter,
    delta,
    detach,
    fresh_adapter,
    initialise_adapter,
    merge_into,
    set_active,
)  # fmt: skip
from llama2.model.lora_config import ALL_LINEAR, LoraConfig, check, targets, whole_modules
from llama2.model.losses import cross_entropy
from llama2.model.surgery import replace_linears, resize_vocabulary
from llama2.model.transformer import Transformer, build

CONFIG = ModelConfig(32, 2, 4, 50, 48, n_kv_heads=2, context_length=64)
TOKENS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
KINDS = {
    "lora": LoraConfig(r=4),
    "rslora": LoraConfig(r=4, rslora=True),
    "dora": LoraConfig(r=4, dora=True),
    "output": LoraConfig(r=3, target_modules=("wq", "output")),
    "dora output": LoraConfig(r=3, target_modules=("wk", "output"), dora=True),
}


def fill(model, name="default", seed=1):
    """Give an adapter weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for where, parameter in adapter_state(model, name).items():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.copy_(parameter * (1 + 0.3 * noise) if ".magnitude." in where else noise * 0.2)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(kind, dtype):
    model = build(CONFIG, dtype=dtype)
    before, names = logits(model), set(model.state_dict())
    add_adapter(model, KINDS[kind])
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        assert torch.equal(model.train()(TOKENS), before)
    found = set(model.state_dict())
    assert names <= found
    assert {name.split(".")[-2] for name in found - names} <= {"lora_a", "lora_b", "magnitude"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_adapted(kind, bias):
    config = replace(CONFIG, attention_bias=bias, ffn_bias=bias)
    plain = build(config)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.endswith("bias"):
                weight.copy_(torch.linspace(-0.3, 0.3, len(weight)))
    base = logits(plain)
    model = fill(add_adapter(copy.deepcopy(plain), KINDS[kind]))
    adapted = logits(model)
    changes = dict(delta(model))
    merge_into(model)
    merged = logits(model)
    assert (adapted - base).norm() > 0.01 * base.norm()
    assert (merged - adapted).norm() < 1e-5 * adapted.norm()
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, change in changes.items():
        torch.testing.assert_close(model.state_dict()[name], plain.state_dict()[name] + change)


def test_one_layer_by_hand():
    model = add_adapter(build(CONFIG), LoraConfig(r=2, alpha=6, target_modules=("wo",)))
    layer = fill(model).layers[0].attention.wo
    assert isinstance(layer, LoRALinear)
    x = torch.randn(5, 32)
    a, b = layer.lora_a["default"], layer.lora_b["default"]
    torch.testing.assert_close(layer(x), x @ layer.weight.T + 3.0 * (x @ a.T) @ b.T)
    assert LoraConfig(r=4, alpha=6, rslora=True).scale == 3.0


def test_a_stack_is_as_good_as_merging_one_after_the_other():
    for first, second in (
        ("lora", "lora"),
        ("lora", "dora"),
        ("dora", "dora"),
        ("dora", "rslora"),
        ("output", "output"),
    ):
        model = fill(add_adapter(build(CONFIG), KINDS[first]))
        add_adapter(model, KINDS[second], name="second")
        fill(model, "second", seed=2)
        both = logits(model)
        assert adapter_names(model) == ("default", "second")
        merge_into(model, "default")
        torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-5)
        merge_into(model, "second")
        torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-5)


def test_a_new_dora_adapter_upon_another_changes_nothing():
    model = fill(add_adapter(build(CONFIG), KINDS["dora"]))
    before = logits(model)
    add_adapter(model, KINDS["dora"], name="second")
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


def test_order_matters_with_dora():
    model = fill(add_adapter(build(CONFIG), KINDS["lora"]))
    fill(add_adapter(model, KINDS["dora"], name="second"), "second")
    with pytest.raises(ConfigError, match="merge 'default' first"):
        merge_into(model, "second")


def test_adapters_are_switched_and_taken_off():
    model = build(CONFIG)
    base = logits(model)
    fill(add_adapter(model, KINDS["lora"]))
    one = logits(model)
    add_adapter(model, KINDS["dora"], name="other")
    fill(model, "other", seed=3)
    both = logits(model)
    set_active(model, ())
    assert torch.equal(logits(model), base)
    set_active(model, "default")
    assert torch.equal(logits(model), one)
    set_active(model, ["other", "default"])  # the order is the stack's
    assert torch.equal(logits(model), both)
    detach(model, "other")
    assert torch.equal(logits(model), one)
    detach(model)
    assert torch.equal(logits(model), base)
    assert adapter_names(model) == () and all(each.requires_grad for each in model.parameters())
    assert (
        type(model.layers[0].attention.wq) is Linear
        and vars(model.layers[0].attention.wq).keys() == vars(Linear(1, 1)).keys()
    )


@pytest.mark.parametrize("kind", ["lora", "dora", "output"])
def test_gradient_flows_to_the_adapter_alone(kind):
    model = fill(add_adapter(build(CONFIG), KINDS[kind]))
    hidden = model.train().hidden(TOKENS)
    weight = model.output.weight
    cross_entropy(hidden.flatten(0, 1), weight, TOKENS.flatten().roll(-1)).backward()
    own = adapter_state(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in own), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in own), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_effective_weight(kind):
    """The norm in DoRA is a constant: its derivative is left out on both sides."""
    model = fill(add_adapter(build(CONFIG).double(), KINDS[kind]).double())
    plain = build(CONFIG).double()
    state = {k: v for k, v in model.state_dict().items() if k in dict(plain.named_parameters())}
    for where, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            state[f"{where}.weight"] = layer.effective(layer.active)
    found = torch.func.functional_call(plain, state, (TOKENS,)).square().sum()
    own = adapter_state(model)
    wanted = torch.autograd.grad(found, list(own.values()))
    got = torch.autograd.grad(model(TOKENS).square().sum(), list(own.values()))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_adapter_freezes_the_first():
    model = add_adapter(build(CONFIG), LoraConfig(trained_modules=("output",)))
    assert model.output.weight.requires_grad and not model.tok_embeddings.weight.requires_grad
    add_adapter(model, LoraConfig(), name="second")
    assert {name for name, each in model.named_parameters() if each.requires_grad} == set(
        adapter_state(model, "second")
    )


def test_dropout_is_for_training_and_scaled():
    model = fill(add_adapter(build(CONFIG), LoraConfig(r=4, dropout=0.5)))
    assert torch.equal(logits(model), logits(model))
    assert not torch.equal(model.train()(TOKENS), model.train()(TOKENS))
    torch.manual_seed(0)
    layer, x = model.layers[0].attention.wq, torch.ones(1, 32)
    drawn = torch.stack([layer(x) for _ in range(4000)]).detach()
    wanted = layer.eval()(x)
    assert ((drawn.mean(dim=0) - wanted).abs() < 5 * drawn.std(dim=0) / 4000**0.5).all()  # five standard errors


def test_trained_steps_are_seen_after_the_norm_was_kept():
    model = fill(add_adapter(build(CONFIG), KINDS["dora"]))
    before = logits(model)
    with torch.no_grad():
        model.layers[0].attention.wq.lora_b["default"].mul_(3)
    after = logits(model)
    assert not torch.equal(after, before)
    merge_into(model)
    torch.testing.assert_close(logits(model), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_on_the_meta_device_and_filled_later(kind):
    with torch.device("meta"):
        model = Transformer(CONFIG)
    add_adapter(model, KINDS[kind])
    assert all(each.is_meta for each in model.parameters())
    real = build(CONFIG)
    first = dict(fresh_adapter(model, seed=5, weight_of=lambda name: real.state_dict()[name]))
    model.to_empty(device="cpu")
    model.load_state_dict({**real.state_dict(), **first})
    model.rotation = real.rotation
    assert torch.equal(logits(model), logits(real))
    other = initialise_adapter(add_adapter(real, KINDS[kind], seed=None), seed=5)
    assert all(torch.equal(first[name], value) for name, value in adapter_state(other).items())


def test_first_values_are_those_of_loralib():
    model = add_adapter(build(CONFIG), LoraConfig(r=64), seed=3)
    a = model.layers[1].feed_forward.w2.lora_a["default"]
    wanted = nn.init.kaiming_uniform_(torch.empty(64, 48), a=5**0.5)
    assert a.abs().max() <= 48**-0.5 and abs(a.std() / wanted.std() - 1) < 0.05
    again = dict(fresh_adapter(model, seed=3))
    assert torch.equal(again["layers.1.feed_forward.w2.lora_a.default"], a)
    assert not torch.equal(dict(fresh_adapter(model, seed=4))["layers.1.feed_forward.w2.lora_a.default"], a)


class Bare(nn.Module):
    """A quantised layer, as far as an adapter sees it: no `weight`, but a matrix on demand."""

    def __init__(self, weight):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("codes", weight.clone())

    def dense(self):
        return self.codes

    def forward(self, x):
        return x @ self.dense().T


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_another_base_layer_has_adapters_too(kind):
    plain = build(CONFIG)
    wanted = logits(fill(add_adapter(copy.deepcopy(plain), KINDS[kind])))
    bare = replace_linears(plain, lambda name, layer: Bare(layer.weight.detach()), lambda name: "." in name)
    add_adapter(bare, KINDS[kind])
    torch.testing.assert_close(logits(fill(bare)), wanted)
    assert isinstance(bare.layers[0].attention.wq, Bare) and "layers.0.attention.wq.codes" in bare.state_dict()
    with pytest.raises(ConfigError, match="quantised"):
        merge_into(bare)
    detach(bare)
    assert type(bare.layers[0].attention.wq) is Bare


@pytest.mark.parametrize("kind", ["lora", "dora", "output"])
@pytest.mark.parametrize("r", [1, 3, 8])
def test_an_answer_has_the_same_bits_alone_and_in_a_crowd(kind, r):
    model = fill(add_adapter(build(CONFIG), replace(KINDS[kind], r=r))).eval()
    params = SamplingParams(max_new_tokens=12, seed=1, temperature=1.0, top_p=1.0, logprobs=5)
    requests = [Request(str(i), tuple(range(1, 3 + 2 * i)), params) for i in range(13)]
    together = Engine(model, batch_invariant=True).generate(requests)
    assert together == [Engine(model, batch_invariant=True).generate([request])[0] for request in requests]


def test_names_of_layers():
    assert targets("all-linear") == ALL_LINEAR
    assert targets(["v_proj", "q_proj", "lm_head"]) == ("wq", "wv", "output")
    assert whole_modules(["lm_head", "embed_tokens"]) == ("tok_embeddings", "output")
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        targets(["q_prj"])
    with pytest.raises(ConfigError, match="trained_modules"):
        whole_modules(["norm"])


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(r=0), "r=0"), (dict(alpha=0), "alpha=0"), (dict(dropout=1.0), "dropout=1.0"),
        (dict(target_modules=()), "target_modules is empty"), (dict(target_modules=("q_proj",)), "Meta's names"),
        (dict(target_modules=("wx",)), "wx"), (dict(trained_modules=("norm",)), "norm"),
        (dict(target_modules=("output",), dropout=0.1), "dropout=0.1"),
        (dict(target_modules=("output",), trained_modules=("output",)), "take one"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_named(changes, said):
    with pytest.raises(ConfigError, match=said):
        check(LoraConfig(**changes))


def test_a_tied_output_is_no_target():
    tied = build(replace(CONFIG, tied_embeddings=True))
    for changes in (dict(target_modules=("output",)), dict(trained_modules=("output",))):
        with pytest.raises(ConfigError, match="tied_embeddings"):
            add_adapter(tied, LoraConfig(**changes))


def test_what_is_not_there_is_named():
    model = add_adapter(build(CONFIG), LoraConfig())
    with pytest.raises(ConfigError, match="already"):
        add_adapter(model, LoraConfig())
    with pytest.raises(ConfigError, match="'a.b'"):
        add_adapter(model, LoraConfig(), name="a.b")
    for call in (set_active, detach, merge_into, adapter_config, adapter_state):
        with pytest.raises(ConfigError, match="did you mean 'default'"):
            call(model, "defaultt")
    with pytest.raises(ConfigError, match="merge"):
        resize_vocabulary(model, [[1]])
    whole = add_adapter(build(CONFIG), LoraConfig(trained_modules=("output",)))
    with pytest.raises(ConfigError, match="load the base anew"):
        detach(whole)
