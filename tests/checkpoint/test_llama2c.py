import struct

import pytest
import torch

from llama2.checkpoint import llama2c, store
from llama2.errors import CheckpointError, Llama2Error
from llama2.model.config import RopeScaling
from llama2.model.family import FAMILY


def test_the_real_files_of_all_formats_agree(assets, assert_same):
    folder = assets / "checkpoints" / "stories260K"
    legacy = store.read(folder / "stories260K.bin")
    assert legacy.config == FAMILY["stories260k"]
    for name in ("stories260K_v1.bin", "stories260K.gguf"):
        assert_same(store.read(folder / name), legacy)


def test_real_files_are_written_byte_for_byte(assets, tmp_path):
    folder = assets / "checkpoints" / "stories260K"
    store.convert(folder / "stories260K.bin", tmp_path / "v1.bin", to="llama2c")
    assert (tmp_path / "v1.bin").read_bytes() == (folder / "stories260K_v1.bin").read_bytes()
    store.convert(tmp_path / "v1.bin", tmp_path / "v0.bin", to="llama2c", version=0)
    wanted, found = (folder / "stories260K.bin").read_bytes(), (tmp_path / "v0.bin").read_bytes()
    tables = 4 * 512 * 8
    assert len(found) == 1_056_540 and found[:-tables] == wanted[:-tables]
    ours = torch.frombuffer(bytearray(found[-tables:]), dtype=torch.float32)
    torch.testing.assert_close(
        ours, torch.frombuffer(bytearray(wanted[-tables:]), dtype=torch.float32), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize(
    "name, size",
    [("stories260k", 1_056_540), ("stories15m", 60_816_028), ("stories42m", 167_020_572), ("stories110m", 438_381_596)],
)
def test_published_sizes_follow_from_the_header(tmp_path, name, size):
    config = FAMILY[name]
    with (tmp_path / "model.bin").open("wb") as file:
        file.write(llama2c._header(config, 0, 0))
        file.truncate(size)  # a hole: nothing is stored
    assert store.read_config(tmp_path) == config


def test_published_headers_are_written():
    legacy = "40000000ac0000000500000008000000040000000002000000020000"
    assert llama2c._header(FAMILY["stories260k"], 0, 0).hex() == legacy
    grouped = "32346b61020000002001000000030000060000000600000006000000007d0000000100000120000000"
    config = FAMILY["stories15m"]
    group_size = llama2c._fitting_group_size(config, 64)
    assert llama2c._header(config, 2, group_size)[:41].hex() == grouped


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("version", [0, 1])
def test_float_versions_read_back_the_same(written, tmp_path, assert_same, version, is_tied):
    folder = written("hf", tied_embeddings=is_tied)
    store.convert(folder, tmp_path / "model.bin", to="llama2c", version=version)
    found = store.read(tmp_path / "model.bin")
    assert found.config == store.read_config(folder)
    assert_same(found, store.read(folder))


def test_int8_groups_are_within_half_a_step(written, tmp_path):
    folder = written("hf")
    store.convert(folder, tmp_path / "model.bin", to="llama2c", version=2)
    found, wanted = store.load(tmp_path / "model.bin"), store.load(folder)
    assert store.read(tmp_path / "model.bin").quantised
    for name, weight in wanted.named_parameters():
        groups = weight.reshape(-1, 32).abs().amax(dim=1, keepdim=True).expand(-1, 32).reshape(weight.shape)
        assert ((found.get_parameter(name) - weight).abs() <= groups / 127 * 0.5001).all(), name


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"norm_eps": 1e-6}, "norm_eps"), ({"rope_theta": 5e5}, "rope_theta"),
        ({"attention_bias": True}, "attention_bias"),
        ({"ffn_bias": True}, "ffn_bias"), ({"rope_scaling": RopeScaling("linear", 2.0)}, "rope_scaling"),
        ({"rope_scaling": RopeScaling("ntk", 2.0)}, "rope_theta"), ({"head_dim": 16}, "head_dim"),
        ({"sliding_window": 4}, "sliding_window"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused(model, tmp_path, changes, said):
    with pytest.raises(CheckpointError, match=said):
        store.save(model(**changes), tmp_path / "model.bin", format="llama2c")
    assert not any(tmp_path.iterdir())


def test_other_dtypes_and_versions_are_refused(model, written, tmp_path):
    with pytest.raises(CheckpointError, match="bfloat16"):
        store.save(model(), tmp_path / "model.bin", format="llama2c", dtype="bf16")
    folder = written("hf")
    for options, said in (({"version": 3}, "version=3"), ({"version": 2, "group_size": 0}, "group_size=0")):
        with pytest.raises(CheckpointError, match=said):
            store.convert(folder, tmp_path / "model.bin", to="llama2c", **options)


def test_a_file_of_the_wrong_size_is_refused(written):
    path = written("llama2c")
    data = path.read_bytes()
    for broken in (data[:-1], data + b"\0", data[:200], data[:10], b"", struct.pack("<7i", *[2**31 - 1] * 7)):
        path.write_bytes(broken)
        with pytest.raises(Llama2Error):
            store.read(path)
