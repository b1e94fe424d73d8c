"""Base and adapter become one model; what the rounding costs is said, and too much of it refused."""

import json

import pytest
import torch

import llama2
from llama2.checkpoint import store
from llama2.checkpoint.adapter import write_adapter
from llama2.checkpoint.hf_config import read_generation
from llama2.checkpoint.weights import write_json
from llama2.compress import merge as merging
from llama2.compress.merge import MAX_TOKENS, merge
from llama2.errors import CheckpointError
from llama2.model.config import ModelConfig
from llama2.model.lora import adapter_state, add_adapter
from llama2.model.lora_config import LoraConfig
from llama2.model.transformer import build
from llama2.tokenizer.formats import load_tokenizer
from tests.pocket import POCKET, pocket_tokenizer

TOKENS = torch.randint(0, 260, (2, 30), generator=torch.Generator().manual_seed(0))
LORA = LoraConfig(r=4)
KINDS = [
    LORA, LoraConfig(r=4, rslora=True), LoraConfig(r=4, dora=True),
    LoraConfig(r=2, target_modules=("wk", "output")),
    LoraConfig(r=2, trained_modules=("tok_embeddings", "output")),
]  # fmt: skip


def write(folder, model, config, base, name="default"):
    tensors = {key: (lambda value=value: value) for key, value in adapter_state(model, name).items()}
    write_adapter(folder, tensors, config, base=str(base), model=model.config, name=name)


@pytest.fixture
def make(tmp_path):
    """Writes a base and an adapter of a given strength."""

    def make(config=LORA, strength=0.1, dtype="float32", tokenizer=True):
        vocabulary = pocket_tokenizer() if tokenizer else None
        llama2.save(build(POCKET, seed=0), tmp_path / "base", dtype=dtype, tokenizer=vocabulary)
        model = add_adapter(store.load(tmp_path / "base", dtype="float32"), config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapter_state(model).values():
                parameter.add_(strength * torch.randn(parameter.shape, generator=generator))
        write(tmp_path / "adapter", model, config, "../base")
        return model.eval()

    return make


@torch.no_grad()
@pytest.mark.parametrize("config", KINDS)
def test_in_float32_merged_equals_adapted(make, tmp_path, config):
    adapted = make(config)(TOKENS)
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = store.load(tmp_path / "out")(TOKENS)
    assert (merged - adapted).norm() < 1e-5 * adapted.norm()
    assert report.dtype == "float32" and report.largest_logit_difference < 1e-4 and report.lost < 1e-4
    assert report.perplexity_merged == pytest.approx(report.perplexity_adapted, rel=1e-5)
    assert report.perplexity_base != pytest.approx(report.perplexity_adapted, rel=1e-3)
    assert "built-in sample" in report.compared and report.notes == ()
    text = "Once upon a time"
    assert load_tokenizer(tmp_path / "out").encode(text) == pocket_tokenizer().encode(text)


def test_the_sum_is_rounded_once(make, tmp_path):
    model = make(dtype="bfloat16")
    layer = model.layers[0].attention.wq
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = store.load(tmp_path / "out")
    assert report.dtype == "bfloat16" and 1e-4 < report.largest_logit_difference < 0.1 and 0 < report.lost < 0.2
    assert torch.equal(found.layers[0].attention.wq.weight, layer.effective(("default",)).bfloat16())
    base = store.load(tmp_path / "base")
    assert torch.equal(found.norm.weight, base.norm.weight)


def test_the_report_says_what_was_written(make, tmp_path):
    model = make(dtype="bfloat16")
    text = "the cat sat on the mat"
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", text=[text])
    row = torch.tensor([pocket_tokenizer().encode(text, bos=True)])
    with torch.no_grad():
        adapted, merged = model(row), store.load(tmp_path / "out", dtype="float32")(row)
    assert report.n_tokens == row.numel() and report.compared == "the text"
    assert report.largest_logit_difference == pytest.approx((adapted - merged).abs().max().item(), rel=1e-3)
    loss = torch.nn.functional.cross_entropy(merged[0, :-1], row[0, 1:])
    assert report.perplexity_merged == pytest.approx(loss.exp().item(), rel=1e-4)


def test_a_change_below_the_last_bit_is_refused(make, tmp_path):
    make(strength=2e-5, dtype="bfloat16")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"lose \d+%.*--dtype float32.*--accept-loss"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "full", dtype="float32").lost < 0.01
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", accept_loss=True)
    assert report.lost > 0.5 and store.read(tmp_path / "out").dtype == "bfloat16"


def test_a_logit_far_off_is_refused(make, tmp_path, monkeypatch):
    make(dtype="bfloat16")
    monkeypatch.setattr(merging, "MAX_DIFFERENCE", 1e-6)
    with pytest.raises(CheckpointError, match="off by up to"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_adapters_upon_adapters_are_all_merged(make, tmp_path):
    model = make()
    second = LoraConfig(r=2, dora=True)
    add_adapter(model, second, name="default2")
    for parameter in adapter_state(model, "default2").values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    write(tmp_path / "two", model, second, "../adapter", name="default2")
    merge(tmp_path / "adapter", tmp_path / "two", tmp_path / "out")
    torch.testing.assert_close(store.load(tmp_path / "out")(TOKENS), model.eval()(TOKENS), rtol=1e-5, atol=1e-5)


def test_a_text_is_compared_up_to_a_limit(make, tmp_path):
    make()
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", text=["lorem ipsum " * 1000] * 3)
    assert report.n_tokens == MAX_TOKENS


def test_without_a_tokenizer(make, tmp_path):
    make(tokenizer=False)
    with pytest.raises(CheckpointError, match="needs a tokenizer"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", text=["abc"])
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "random tokens" in report.compared and "no tokenizer was written" in report.notes[0]


def test_other_formats_and_what_lies_beside_are_kept(make, tmp_path):
    make()
    write_json(tmp_path / "base/generation_config.json", {"temperature": 0.5, "eos_token_id": 2})
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert read_generation(tmp_path / "out").items() >= {"temperature": 0.5, "eos_token_id": 2}.items()
    store.convert(tmp_path / "base", tmp_path / "base.gguf", to="gguf")
    merge(tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "out2")
    wanted = store.load(tmp_path / "out").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in store.load(tmp_path / "out2").state_dict().items())


def test_what_does_not_belong_together_is_named(make, tmp_path):
    make()
    llama2.save(build(ModelConfig(48, 2, 4, 260, 172), seed=0), tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    for arguments, said in (
        (("other", "adapter", "out"), r"q_proj.lora_A.weight.*\(4, 64\).*\(4, 48\).*adapter of another base"),
        (("base", "other", "out"), "is not an adapter's folder"),
        (("base", "adapter", "full"), "not empty"),
        (("gone", "adapter", "out"), "gone"),
    ):
        with pytest.raises(CheckpointError, match=said):
            merge(*(tmp_path / each for each in arguments))
    with pytest.raises(CheckpointError, match="no two tokens"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", text=[])
    assert not (tmp_path / "out").exists()


def test_the_commands(here, make, tmp_path):
    make(strength=2e-5, dtype="bfloat16")
    base, adapter, out, text = (tmp_path / name for name in ("base", "adapter", "out", "text.txt"))
    text.write_text("One day a cat\nsat on a mat.\n")
    refused = here("merge", base, adapter, out, "--text", text)
    assert refused.returncode == 2 and refused.stdout == "" and not out.exists()
    assert refused.stderr.startswith("llama2: error: rounded to bfloat16") and "--accept-loss" in refused.stderr
    done = here("merge", base, adapter, out, "--text", text, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("float32: logits differ") and f"on {30} tokens of the text" in done.stdout
    assert here("merge", base, adapter, tmp_path / "lossy", "--accept-loss").returncode == 0
    greedy = ("--prompt", "Once", "--temperature", 0, "--max-new-tokens", 8, "--dtype", "float32")
    merged, adapted = here("generate", out, *greedy), here("generate", adapter, *greedy)
    assert merged.returncode == adapted.returncode == 0, adapted.stderr
    assert merged.stdout == adapted.stdout and merged.stdout.startswith("Once")
    facts = json.loads(here("info", adapter, "--json").stdout)
    assert facts["format"] == "adapter" and facts["n_parameters"] == POCKET.n_parameters
    converted = here("convert", adapter, tmp_path / "x.gguf", "--to", "gguf")
    assert converted.returncode == 2 and "llama2 merge" in converted.stderr
