import json

import pytest
import torch

from llama2.checkpoint import store
from llama2.checkpoint.meta_params import params_json, read_params
from llama2.errors import CheckpointError, Llama2Error
from llama2.model.config import ModelConfig, RopeScaling
from llama2.model.family import FAMILY


def read_values(folder, values, rows=32000):
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(values))
    return read_params(folder / "params.json", count_rows=lambda dim: rows)


@pytest.mark.parametrize(
    "values, name, rows",
    [
        ({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06}, "llama1-7b", 32000),
        ({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05}, "llama2-7b", 32000),
        (
            {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
             "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1}, "llama2-70b", 32000,
        ),
        (
            {"model": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
             "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
             "use_scaled_rope": True}}, "llama3.1-8b", 0,
        ),
        (
            {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
             "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0}, "llama3-8b", 0,
        ),
        (
            {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "rope_theta": 1000000,
             "ffn_dim_multiplier": 1.0}, "codellama-7b", 32016,
        ),
    ],
)  # fmt: skip
def test_published_params_give_the_published_shapes(tmp_path, values, name, rows):
    assert read_values(tmp_path / "a", values, rows) == FAMILY[name]


def test_every_released_shape_can_be_said(tmp_path):
    for name, config in FAMILY.items():
        params, extra = params_json(config)
        (tmp_path / "llama2.json").write_text(json.dumps(extra))
        assert read_values(tmp_path, params) == config, name


def test_the_small_3_2_models_are_stretched_by_32(tmp_path):
    params, _ = params_json(FAMILY["llama3.2-1b"])
    assert read_values(tmp_path, params).rope_scaling == RopeScaling("llama3", 32.0, 8192)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"dim": None}, "dim"), ({"dim": "x"}, "dim"), ({"moe_args": {}}, "moe_args"), ({"n_head": 3}, "n_heads"),
        ({"norm_eps": "x"}, "norm_eps"), ({"multiple_of": 0}, "multiple_of"), ({"ffn_dim_multiplier": -1}, "-1"),
        ({"use_scaled_rope": 1}, "use_scaled_rope"), ({"rope_theta": [1]}, "rope_theta"), ({"model": 3}, "model"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)  # fmt: skip
def test_broken_params_are_one_error(tmp_path, changes, said):
    with pytest.raises(Llama2Error, match=said):
        read_values(tmp_path, {"dim": 64, "n_layers": 1, "n_heads": 4} | changes)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 5e5, "rope_scaling": RopeScaling("llama3", 8.0, 8192), "context_length": 131072},
        {"tied_embeddings": True, "attention_bias": True, "ffn_bias": True, "head_dim": 16, "sliding_window": 9},
        {"rope_scaling": RopeScaling("yarn", 2.0, 64, attention_factor=1.25)},
    ],
)
def test_any_number_of_shards_reads_back_the_same(model, written, tmp_path, assert_same, shards, changes):
    folder = written("meta", **changes)
    store.convert(folder, tmp_path / "two", to="meta", shards=shards)
    assert len(list((tmp_path / "two").glob("consolidated.*.pth"))) == shards
    found = store.read(tmp_path / "two")
    assert found.config == store.read_config(folder)
    assert_same(found, model(**changes))


def test_shards_are_cut_as_meta_cuts_them(written, tmp_path):
    whole = store.load(written("meta"))
    store.convert(tmp_path / "written", tmp_path / "two", to="meta", shards=2)
    second = torch.load(tmp_path / "two" / "consolidated.01.pth", weights_only=True)
    assert torch.equal(second["layers.1.attention.wq.weight"], whole.layers[1].attention.wq.weight[16:])
    assert torch.equal(second["layers.1.attention.wo.weight"], whole.layers[1].attention.wo.weight[:, 16:])
    assert torch.equal(second["tok_embeddings.weight"], whole.tok_embeddings.weight[:, 16:])
    assert torch.equal(second["norm.weight"], whole.norm.weight)


def test_the_embedding_of_llama_3_is_cut_by_rows(written, tmp_path):
    whole = store.load(written("meta", rope_theta=5e5))
    store.convert(tmp_path / "written", tmp_path / "two", to="meta", shards=2)
    second = torch.load(tmp_path / "two" / "consolidated.01.pth", weights_only=True)
    assert torch.equal(second["tok_embeddings.weight"], whole.tok_embeddings.weight[32:])


def test_meta_s_own_files_with_rope_tables_and_no_vocabulary_size(model, written, assert_same):
    folder = written("meta")
    wanted = model()
    weights = dict(wanted.state_dict()) | {
        "rope.freqs": torch.ones(4), "layers.0.attention.inner_attention.rope.freqs": torch.ones(4),
    }  # fmt: skip
    torch.save(weights, folder / "consolidated.00.pth")
    params = json.loads((folder / "params.json").read_text()) | {"vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    assert store.read_config(folder).vocab_size == 64
    assert_same(store.read(folder), wanted)


def test_missing_and_unequal_shards_are_named(written, tmp_path):
    store.convert(written("meta"), tmp_path / "two", to="meta", shards=2)
    second = tmp_path / "two" / "consolidated.01.pth"
    weights = torch.load(second, weights_only=True, mmap=False)
    torch.save(weights | {"norm.weight": torch.ones(3), "output.weight": torch.ones(3, 3)}, second)
    with pytest.raises(CheckpointError, match=r"output\.weight"):
        store.read(tmp_path / "two")
    torch.save({"norm.weight": weights["norm.weight"]}, second)
    with pytest.raises(CheckpointError, match="not in all"):
        store.read(tmp_path / "two")
    (tmp_path / "two" / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match="shard 0 is missing"):
        store.read(tmp_path / "two")


def test_shards_that_do_not_divide_the_heads_are_refused(written, tmp_path):
    folder = written("meta")
    for shards in (3, 4, 0, -1):
        with pytest.raises(CheckpointError, match=f"shards={shards}"):
            store.convert(folder, tmp_path / "two", to="meta", shards=shards)
    assert not (tmp_path / "two").exists()


def test_any_feed_forward_width_can_be_said(tmp_path):
    for ffn_dim in (1, 7, 96, 172, 173, 999, 4097):
        config = ModelConfig(64, 1, 4, 100, ffn_dim)
        params, _ = params_json(config)
        assert read_values(tmp_path, params).ffn_dim == ffn_dim
