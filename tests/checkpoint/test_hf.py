import json

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from llama2.checkpoint import hf, store
from llama2.checkpoint.tensors import halves_to_pairs, pairs_to_halves
from llama2.errors import CheckpointError, ConfigError, Llama2Error
from llama2.model.config import RopeScaling

VALUES = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "intermediate_size": 96,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def config_of(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(VALUES | changes))
    return store.read_config(folder)


def change(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_rows_are_permuted_as_published():
    rows = torch.arange(16.0)[:, None]
    wanted = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert pairs_to_halves(rows, 2).flatten().tolist() == wanted
    assert torch.equal(halves_to_pairs(pairs_to_halves(rows, 2), 2), rows)
    bias = torch.arange(16.0)
    assert pairs_to_halves(bias, 2).tolist() == wanted


def test_absent_keys_take_the_defaults_of_transformers(tmp_path):
    config = config_of(tmp_path / "a")
    assert (config.norm_eps, config.rope_theta, config.n_kv_heads, config.context_length) == (1e-6, 10000.0, 4, 2048)
    assert not config.tied_embeddings and not config.attention_bias and config.rope_scaling is None


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, RopeScaling("linear", 2.0)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, RopeScaling("dynamic", 2.0, 2048)),
        ({"rope_scaling": LLAMA3}, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, None),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, RopeScaling("yarn", 4.0, 2048)),
        (
            {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 512}},
            RopeScaling("yarn", 4.0, 512),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
            RopeScaling("yarn", 4.0, 2048, attention_factor=1.0),
        ),
    ],
)
def test_each_form_of_rope_scaling_is_read(tmp_path, changes, wanted):
    assert config_of(tmp_path / "a", **changes).rope_scaling == wanted


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": ["x"], "factor": 1}}, "rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "32"}, "dim"),
        ({"num_attention_heads": -4}, "n_heads"),
        ({"num_attention_heads": 5}, "n_heads=5"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"vocab_size": 10**39}, "vocab_size"),
        ({"rope_theta": 10**100}, "digits"),
        ({"max_position_embeddings": 1.5}, "max_position_embeddings"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused_by_name(tmp_path, changes, said):
    with pytest.raises(Llama2Error, match=said):
        config_of(tmp_path / "a", **changes)


@pytest.mark.parametrize("text", ["", "[]", "{", "nonsense", "\xff", "[" * 100_000])
def test_a_config_that_is_not_json_is_one_error(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError):
        store.read_config(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": True, "head_dim": 16},
        {"attention_bias": True, "ffn_bias": True},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"rope_scaling": RopeScaling("dynamic", 2.0, 128), "context_length": 256},
        {"rope_scaling": RopeScaling("dynamic", 2.0, 128), "context_length": 300},
        {"rope_scaling": RopeScaling("yarn", 4.0, 32, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5)},
        {"rope_scaling": RopeScaling("llama3", 8.0, 64, 1.0, 4.0), "rope_theta": 5e5},
    ],
)
@pytest.mark.parametrize("shard_bytes", [1, 20_000, 10**9])
def test_written_folders_read_back_the_same(model, tmp_path, assert_same, changes, shard_bytes):
    original = model(**changes)
    store.save(original, tmp_path / "one")
    store.convert(tmp_path / "one", tmp_path / "two", to="hf", shard_bytes=shard_bytes)
    found = store.read(tmp_path / "two")
    assert found.config == original.config
    assert_same(found, original)


def test_written_weights_are_what_safetensors_reads_and_transformers_runs(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    scaling = RopeScaling("yarn", 4.0, 32, attention_factor=1.5)
    original = model(rope_scaling=scaling, attention_bias=True, ffn_bias=True)
    store.save(original, tmp_path / "one")
    library = load_file(tmp_path / "one" / "model.safetensors")
    assert torch.equal(library["model.norm.weight"], original.norm.weight)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    tokens = torch.tensor([[1, 5, 2, 9, 3]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, original(tokens), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "two")  # its own newest form, `rope_parameters`
    again = store.load(tmp_path / "two")
    assert again.config == original.config
    with torch.no_grad():
        assert torch.equal(again(tokens), original(tokens))


def test_static_ntk_is_written_as_a_larger_theta(model, tmp_path):
    original = model(rope_scaling=RopeScaling("ntk", 4.0), head_dim=128)
    store.save(original, tmp_path / "one")
    config = store.read_config(tmp_path / "one")
    assert config.rope_scaling is None and config.rope_theta == pytest.approx(40889.9424, rel=1e-7)


def test_a_sliding_window_cannot_be_written(model, tmp_path):
    with pytest.raises(CheckpointError, match="sliding_window=16"):
        store.save(model(sliding_window=16), tmp_path / "one")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("is_sharded", [False, True])
def test_old_pickled_weights_are_read(model, written, assert_same, is_sharded):
    folder = written("hf")
    wanted = model()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # old files hold it
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = [names[:7], names[7:]] if is_sharded else [names]
    files = [f"pytorch_model-{i}.bin" for i in range(2)] if is_sharded else ["pytorch_model.bin"]
    for file, part in zip(files, parts, strict=True):
        torch.save({name: weights[name] for name in part}, folder / file)
    if is_sharded:
        index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(store.read(folder), wanted)


def test_a_tied_head_is_the_embedding_or_stands_in_for_the_embedding(model, written, assert_same):
    folder = written("hf", tied_embeddings=True)
    wanted = model(tied_embeddings=True)
    weights = load((folder / "model.safetensors").read_bytes())
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": torch.zeros_like(embedding)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        store.read(folder)
    save_file(weights | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    assert_same(store.read(folder), wanted)
    del weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    assert_same(store.read(folder), wanted)


def test_missing_unexpected_and_misshapen_tensors_are_named(written):
    folder = written("hf")
    weights = load((folder / "model.safetensors").read_bytes())
    broken = {
        "lm_head.weight": {name: weights[name] for name in weights if name != "lm_head.weight"},
        "score.weight": weights | {"score.weight": torch.ones(2)},
        "q_proj.bias": weights | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
        "qweight": weights | {"model.layers.0.mlp.up_proj.qweight": torch.ones(2)},
        "model.norm.weight": weights | {"model.norm.weight": torch.ones(31)},
        "I64": weights | {"model.norm.weight": torch.ones(32, dtype=torch.int64)},
    }
    for said, tensors in broken.items():
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=said):
            store.read(folder)


def test_a_hostile_layer_count_costs_nothing(written):
    folder = written("hf")
    change(folder, num_hidden_layers=2**40)
    with pytest.raises(CheckpointError, match=r"layers\.2\."):
        store.load(folder)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..", "missing.safetensors", 3, ["x"], "a\\b"]
)
def test_an_index_names_only_files_of_its_own_folder(written, name):
    folder = written("hf")
    (folder.parent / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError):
        store.read(folder)


def test_a_shard_may_be_a_link_as_in_the_hub_cache(model, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    store.save(model(), snapshot)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "abc")
    (snapshot / "shard.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "shard.safetensors"}}))
    store.read(snapshot)
    (blobs / "abc").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        store.read(snapshot)


def test_the_real_checkpoint_of_656k_parameters(assets):
    folder = assets / "checkpoints" / "tinystories-656K"
    found = hf.read(folder)
    assert found.config.n_parameters == 656_000 and found.config.tied_embeddings and found.dtype == "float32"
    assert found.generation["eos_token_id"] == 2
    quantised = store.load(folder / "TinyStories-656K-Q8_0.gguf")
    assert quantised.config == found.config
    exact = store.load(folder)
    for name, weight in quantised.named_parameters():
        wanted = exact.get_parameter(name)
        step = wanted.abs().max() / 127
        assert (weight - wanted).abs().max() <= step * 0.57, name  # half, and the rounding of a float16 scale


def test_shard_bytes_must_be_positive(written, tmp_path):
    folder = written("hf")
    with pytest.raises(ConfigError, match="shard_bytes=0"):
        store.convert(folder, tmp_path / "two", to="hf", shard_bytes=0)
