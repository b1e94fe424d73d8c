"""The GGUF container, byte for byte, and what it refuses."""

import struct

import numpy as np
import pytest

from llama2.errors import CheckpointError
from llama2.files.gguf import read_header, write

MINIMAL = bytes.fromhex(
    "474755460300000001000000000000000200000000000000140000000000000067656e6572616c2e617263686974656374757265"
    "080000000500000000000000" "6c6c616d61" "1100000000000000" "6c6c616d612e626c6f636b5f636f756e74" "0400000001000000"
    "1100000000000000746f6b656e5f656d62642e776569676874020000000400000000000000020000000000000000000000"
    "00000000000000000000000000" "0000803f0000004000004040000080400000a0400000c0400000e040"
)  # fmt: skip
KEYS = {"general.architecture": "llama", "llama.block_count": 1}
NUMBERS = np.arange(8, dtype="<f4").reshape(2, 4)


def minimal(path):
    write(path, KEYS, [("token_embd.weight", (2, 4), "F32", lambda: NUMBERS)])
    return path


def test_the_minimal_file_is_written_byte_for_byte(tmp_path):
    data = minimal(tmp_path / "m.gguf").read_bytes()
    assert len(data) == 192
    assert data == MINIMAL


def test_the_minimal_file_is_read(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(MINIMAL)
    header = read_header(path)
    assert header.metadata == KEYS
    tensor = header.tensors["token_embd.weight"]
    assert (tensor.shape, tensor.type_name, tensor.start, tensor.n_bytes) == ((2, 4), "F32", 160, 32)
    assert np.array_equal(np.frombuffer(MINIMAL, "<f4", 8, tensor.start).reshape(2, 4), NUMBERS)


def test_every_kind_of_value_comes_back(tmp_path):
    keys = {
        "yes": True,
        "whole": 7,
        "real": 0.5,
        "text": "caf\u00e9",
        "texts": ["a", ""],
        "wholes": [1, -2],
        "reals": [0.5],
    }
    path = tmp_path / "k.gguf"
    write(path, keys, [])
    found = read_header(path).metadata
    assert {name: list(v) if isinstance(v, np.ndarray) else v for name, v in found.items()} == keys


def test_the_gguf_package_reads_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(minimal(tmp_path / "m.gguf"))
    assert np.array_equal(reader.tensors[0].data, NUMBERS)
    assert reader.fields["llama.block_count"].contents() == 1


def changed(at, data):
    return MINIMAL[:at] + data + MINIMAL[at + len(data) :]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cannot be read"),
        (b"GGU", "3 left"),
        (b"GGML" + MINIMAL[4:], "begin"),
        (changed(4, struct.pack("<I", 9)), "version 9"),
        (changed(8, struct.pack("<Q", 1 << 60)), "tensors announced"),
        (changed(16, struct.pack("<Q", 1 << 60)), "keys announced"),
        (changed(24, struct.pack("<Q", 1 << 62)), "bytes wanted"),
        (changed(52, struct.pack("<I", 77)), "type 77"),
        (changed(32, b"\xff\xfe"), "UTF-8"),
        (MINIMAL[:150], "left"),
        (MINIMAL[:180], "outside the file"),
        (changed(151, struct.pack("<Q", 1 << 40)), "outside the file"),
        (changed(147, struct.pack("<I", 16)), "IQ2_XXS"),
        (changed(147, struct.pack("<I", 8)), "Q8_0 blocks"),
        (changed(127, struct.pack("<I", 9)), "9 axes"),
    ],
)
def test_damage_is_one_error_that_names_the_file(tmp_path, data, said):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=said) as error:
        read_header(path)
    assert "bad.gguf" in str(error.value)


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write(tmp_path / "m.gguf", KEYS, [("x", (2, 4), "F32", fail)])
    assert list(tmp_path.iterdir()) == []
