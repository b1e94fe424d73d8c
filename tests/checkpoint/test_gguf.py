import struct

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from llama2.checkpoint import gguf, store
from llama2.checkpoint.gguf_keys import llama3_divisors, scaling_from_divisors
from llama2.errors import CheckpointError, Llama2Error
from llama2.files.gguf import BLOCKS as SIZES, read_header, write as write_file
from llama2.model.config import RopeScaling
from llama2.model.family import FAMILY
from llama2.model.rope import inverse_frequencies

RAMP = (np.arange(32, dtype=np.float32) - 16) / 8
BLOCKS = {
    "Q4_0": "0034809191a2a2b3b3c4c4d5d5e6e6f7f7f8",
    "Q4_1": "223400c080809191a2a2b3b3c4c4d5d5e6e6f7f7",
    "Q5_0": "00300000ffff00112233445566778899aabbccddeeff",
    "Q5_1": "003000c00000ffff00112233445566778899aabbccddeeff",
    "Q8_0": "082481899199a1a9b1b9c0c8d0d8e0e8f0f8000810182028303840474f575f676f77",
}
K_BLOCKS = {  # name: (bytes, offset of d, offset of dmin, {index: value}, sum)
    "Q2_K": (84, 80, 82, {0: 4.5, 1: 3, 2: 1.5, 3: 0, 4: 4.5, 5: 3, 128: 15.75, 255: -1.5}, 1294),
    "Q3_K": (110, 108, None, {0: 28.5, 1: -19, 2: 9.5, 3: -38, 4: 28.5, 5: -19, 128: 3, 255: 29}, -1056),
    "Q4_K": (144, 0, 2, {0: 31.75, 1: 140.25, 2: 0.75, 3: 109.25, 4: 217.75, 5: 78.25, 128: 9.25, 255: 78.5}, 24176),
    "Q5_K": (176, 0, 2, {0: 279.75, 1: 140.25, 2: 248.75, 3: 109.25, 4: 465.75, 128: 65.25, 255: 66.5}, 50496),
    "Q6_K": (210, 208, None, {0: 636.5, 1: 335, 2: -502.5, 3: -804, 4: 1038.5, 5: 201, 128: 1168.5, 255: 1050}, -15552),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_published_blocks_decode(name):
    found = gguf.dequantise(np.frombuffer(bytes.fromhex(BLOCKS[name]), np.uint8)[None], name)[0]
    step = {"Q4_0": 0.25, "Q4_1": 0.26, "Q5_0": 0.125, "Q5_1": 0.125, "Q8_0": 1 / 64}[name]
    assert np.abs(found - RAMP).max() <= step * 0.51 + (0.25 if name == "Q4_0" else 0.0)  # +2 does not fit Q4_0


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_published_blocks_are_written(name):
    assert gguf.quantise(RAMP[None], name).tobytes().hex() == BLOCKS[name]


@pytest.mark.parametrize("name", K_BLOCKS)
def test_published_k_quants_decode(name):
    size, d_at, min_at, wanted, total = K_BLOCKS[name]
    block = bytearray((7 * i + 3) & 255 for i in range(size))
    block[d_at : d_at + 2] = np.float16(0.5).tobytes()
    if min_at is not None:
        block[min_at : min_at + 2] = np.float16(0.25).tobytes()
    found = gguf.dequantise(np.frombuffer(bytes(block), np.uint8)[None], name)[0]
    assert {i: found[i] for i in wanted} == wanted and found.sum() == total


def test_published_bfloat16_bytes(written, tmp_path):
    values = torch.tensor([1, 1.00390625, 1.01171875, -2.5, np.pi, 65504, 1e-40, 0.1])
    raw = gguf._raw("x", lambda: values, "BF16")()
    assert raw.tobytes().hex() == "803f803f823f20c0494080470100cd3d"


def test_every_block_type_is_read_within_a_file(tmp_path):
    """All types in one file, against the gguf package's own reader."""
    rng = np.random.default_rng(0)
    rows = {}
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        _, per_block, block_bytes = SIZES[name]
        n_bytes = 256 // per_block * block_bytes
        rows[name] = rng.integers(0, 60, (3, n_bytes), dtype=np.uint8)
    path = tmp_path / "all.gguf"
    write_file(path, {"x": 1}, [(name, (3, 256), name, lambda name=name: rows[name]) for name in rows])
    header = read_header(path)
    for tensor in GGUFReader(path).tensors:
        found = gguf._reader(path, header.tensors[tensor.name])()
        kind = GGMLQuantizationType[tensor.name]
        np.testing.assert_array_equal(found.numpy(), dequantize(tensor.data, kind))


@pytest.mark.parametrize("hd, factor", [(128, 8.0), (64, 32.0), (128, 32.0)])
def test_published_rope_divisors(hd, factor):
    found = llama3_divisors(RopeScaling("llama3", factor, 8192), 5e5, hd)
    published = {
        (128, 8.0): [1.20748387, 1.55341463, 2.02631321, 2.69452969, 3.68425253, 5.25732659],
        (64, 32.0): [1.65132925, 3.2922621, 9.66672898],
        (128, 32.0): [1.23493703, 1.65132925, 2.27665954, 3.2922621, 5.17159558, 9.66672898],
    }[hd, factor]
    first = 29 if hd == 128 else 15
    np.testing.assert_allclose(found[first : first + len(published)], published, rtol=1e-8)
    assert (found[:first] == 1).all() and (found[first + len(published) :] == factor).all()
    assert scaling_from_divisors("x", found.astype("f4").astype("f8"), 5e5, hd) == RopeScaling("llama3", factor, 8192)


def test_rope_divisors_are_the_model_s():
    config = FAMILY["llama3.1-8b"]
    assert config.rope_scaling is not None
    plain = config.rope_theta ** (-np.arange(0, 128, 2) / 128)
    found = llama3_divisors(config.rope_scaling, config.rope_theta, config.head_dim)
    np.testing.assert_allclose(plain / inverse_frequencies(config).numpy(), found, rtol=1e-12)


@pytest.mark.parametrize("divisors", [[1, 2, 3, 4.0], [0, 0, 0, 0.0], [1, 1, 1, np.nan], [1, 1, 8.0], [-1, 1, 1, 8.0]])
def test_other_rope_divisors_are_refused(divisors):
    with pytest.raises(CheckpointError, match="rope_freqs"):
        scaling_from_divisors("x", np.array(divisors), 1e4, 8)


CHANGES = [
    {},
    {"tied_embeddings": True, "head_dim": 16},
    {"attention_bias": True, "ffn_bias": True},
    {"norm_eps": 1e-6, "rope_theta": 5e5, "rope_scaling": RopeScaling("llama3", 8.0, 8192), "context_length": 131072},
    {"rope_scaling": RopeScaling("linear", 2.5)},
    {"rope_scaling": RopeScaling("yarn", 4.0, 32, beta_fast=16.0, beta_slow=2.0)},
]


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_plain_types_read_back_the_same(model, written, dtype, changes):
    path = written("gguf", dtype=dtype, **changes)
    original, found = model(**changes), store.read(path)
    assert found.config == original.config and found.dtype == dtype and not found.quantised
    for name, weight in original.state_dict().items():
        stored = found.tensors[name]()
        kept = weight if weight.ndim == 1 else weight.to(getattr(torch, dtype))
        assert torch.equal(stored, kept), name


def test_a_yarn_attention_factor_survives(written):
    scaling = RopeScaling("yarn", 4.0, 32, attention_factor=1.5)
    found = store.read_config(written("gguf", rope_scaling=scaling)).rope_scaling
    assert found is not None and found.attention_factor == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0", "q4_0"])
def test_the_gguf_package_reads_what_is_written(model, written, dtype):
    original = model(ffn_dim=80)
    reader = GGUFReader(written("gguf", dtype=dtype, ffn_dim=80))
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["general.file_type"].contents() == {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}.get(
        dtype, 2
    )
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["token_embd.weight"].shape.tolist() == [32, 64]  # GGUF counts axes from the contiguous one
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    if dtype.startswith("q"):
        assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"  # rows of 80 do not fill blocks
        assert tensors["output.weight"].tensor_type.name == "Q8_0"
        assert tensors["blk.0.attn_q.weight"].tensor_type.name == dtype.upper()
    tolerance = {"float32": 0, "float16": 1e-3, "bfloat16": 1e-2, "q8_0": 1e-2, "q4_0": 0.13}[dtype]
    for name, weight in original.state_dict().items():
        tensor = tensors[gguf.gguf_name(name)]
        theirs = dequantize(tensor.data, tensor.tensor_type)
        assert theirs.shape == tuple(weight.shape)
        np.testing.assert_allclose(theirs, weight.numpy(), rtol=0, atol=tolerance * weight.abs().max().item())


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_blocks_are_read_back_as_the_package_decodes_them(written, dtype):
    path = written("gguf", dtype=dtype)
    found = store.read(path)
    assert found.quantised and found.dtype == "float32"
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, tensor in found.tensors.items():
        theirs = tensors[gguf.gguf_name(name)]
        np.testing.assert_array_equal(tensor().float().numpy(), dequantize(theirs.data, theirs.tensor_type))


def rewrite(path, *, keys=None, drop=(), tensors=()):
    """Write a GGUF file again with other keys or tensors."""
    header = read_header(path)
    data = path.read_bytes()
    kept = [
        (
            info.name,
            info.shape,
            info.type_name,
            lambda info=info: np.frombuffer(data, np.uint8, info.n_bytes, info.start),
        )
        for info in header.tensors.values()
        if info.name not in drop
    ]
    metadata = {key: value for key, value in (header.metadata | (keys or {})).items() if key not in drop}
    write_file(path, metadata, [*kept, *tensors])


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"general.architecture": "qwen2"}, "qwen2"), ({"llama.block_count": "2"}, "block_count"),
        ({"llama.expert_count": 8}, "expert"), ({"split.count": 2}, "merge"),
        ({"llama.attention.sliding_window": 4}, "sliding_window"),
        ({"llama.rope.dimension_count": 4}, "dimension_count"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"), ({"llama.attention.head_count": [4, 4]}, "head_count"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "norm_eps"), ({"llama.rope.freq_base": "x"}, "rope_theta"),
        ({"llama.attention.head_count": 0}, "head_count"), ({"llama.embedding_length": 64}, "token_embd"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 0.0}, "factor"),
    ],
)  # fmt: skip
def test_what_is_not_a_plain_llama_is_refused_by_name(written, keys, said):
    path = written("gguf")
    rewrite(path, keys=keys)
    with pytest.raises(Llama2Error, match=said):
        store.read(path)


@pytest.mark.parametrize(
    "drop", ["llama.block_count", "llama.attention.layer_norm_rms_epsilon", "token_embd.weight", "blk.1.ffn_up.weight"]
)
def test_missing_keys_and_tensors_are_named(written, drop):
    path = written("gguf")
    rewrite(path, drop=[drop])
    with pytest.raises(CheckpointError, match=drop):
        store.read(path)


def test_parts_of_a_split_file_are_refused(written):
    path = written("gguf")
    part = path.rename(path.with_name("model-00002-of-00003.gguf"))
    with pytest.raises(CheckpointError, match="3 parts"):
        store.read(part)


def test_an_output_equal_to_the_embedding_is_tied(written):
    path = written("gguf", tied_embeddings=True)
    header, data = read_header(path), path.read_bytes()
    info = header.tensors["token_embd.weight"]
    raw = np.frombuffer(data, np.uint8, info.n_bytes, info.start)
    rewrite(path, tensors=[("output.weight", info.shape, "F32", lambda: raw)])
    assert store.read(path).config.tied_embeddings
    other = raw.copy()
    other[-1] ^= 1
    rewrite(path, drop=["output.weight"], tensors=[("output.weight", info.shape, "F32", lambda: other)])
    assert not store.read(path).config.tied_embeddings


def test_counts_may_be_64_bits_wide(written):
    path = written("gguf")
    keys = read_header(path).metadata
    rewrite(path, keys={"filler": "xxxx"})
    data, key, filler = path.read_bytes(), b"llama.block_count", struct.pack("<Q", 6) + b"filler"
    at = data.index(key) + len(key)
    wide = data[:at] + struct.pack("<IQ", 10, 2) + data[at + 8 :]
    short = wide.replace(filler + struct.pack("<IQ", 8, 4) + b"xxxx", filler + struct.pack("<IQ", 8, 0))
    assert len(short) == len(data)
    path.write_bytes(short)
    assert read_header(path).metadata == keys | {"filler": ""}
    assert store.read(path).config.n_layers == 2


@pytest.mark.parametrize(
    "changes, said",
    [({"sliding_window": 4}, "sliding_window"), ({"rope_scaling": RopeScaling("dynamic", 2.0, 64)}, "dynamic")],
)
def test_what_gguf_cannot_hold_is_refused(model, tmp_path, changes, said):
    with pytest.raises(CheckpointError, match=said):
        store.save(model(**changes), tmp_path / "model.gguf", format="gguf")
    assert not any(tmp_path.iterdir())


def test_the_real_file_names_its_shape(assets):
    config = store.read_config(assets / "checkpoints" / "stories260K" / "stories260K.gguf")
    assert config.tied_embeddings and config.context_length == 2048 and config.n_parameters == 260_032


@pytest.mark.parametrize("scaling", [(8.0, 32, 1.0, 4.0), (5.5, 6000, 2.0, 9.0), (32.0, 8192, 1.0, 4.0)])
def test_any_llama3_scaling_comes_back(model, tmp_path, scaling):
    factor, original, low, high = scaling
    wanted = RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    store.save(model(rope_scaling=wanted), tmp_path / "m.gguf", format="gguf")
    assert store.read_config(tmp_path / "m.gguf").rope_scaling == wanted
