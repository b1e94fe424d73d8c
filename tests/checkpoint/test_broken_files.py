"""Files with flipped and missing bytes: each loads or is one Llama2Error; nothing else, and little memory."""

import random
import resource

import pytest
import torch

from llama2.checkpoint import store
from llama2.errors import Llama2Error
from llama2.model.transformer import Transformer

N_EACH = 40


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip bits near the start, where headers are, or anywhere; cut the end off; put noise in the middle."""
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    broken = bytearray(data)
    reach = min(len(data), rng.choice((64, 512, 4096, len(data))))
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(reach)
        if kind == 1:
            broken[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            broken[at : at + 8] = rng.randbytes(8)
        else:
            broken[at] = rng.choice((0, 255, 127, 128))
    return bytes(broken)


def try_to_load(path) -> bool:
    try:
        model = store.load(path)
    except Llama2Error:
        return False
    assert isinstance(model, Transformer)
    for weight in model.parameters():
        weight.float().sum()  # every byte is read
    return True


@pytest.mark.parametrize(
    "format, file",
    [
        ("hf", "config.json"), ("hf", "model.safetensors"), ("meta", "params.json"), ("meta", "consolidated.00.pth"),
        ("gguf", ""), ("llama2c", ""), ("q8_0", ""), ("v0", ""), ("v2", ""), ("pickled", "pytorch_model.bin"),
        ("index", "model.safetensors.index.json"),
    ],
)  # fmt: skip
def test_damage_is_one_error_or_none(written, tmp_path, format, file):
    if format in ("v0", "v2"):
        path = tmp_path / "other.bin"
        store.convert(written("hf"), path, to="llama2c", version=int(format[1]))
    elif format == "index":
        path = tmp_path / "other"
        store.convert(written("hf"), path, to="hf", shard_bytes=20_000)
    elif format == "q8_0":
        path = written("gguf", dtype="q8_0")
    else:
        path = written("hf" if format == "pickled" else format)
    if format == "pickled":
        from safetensors.torch import load

        torch.save(load((path / "model.safetensors").read_bytes()), path / file)
        (path / "model.safetensors").unlink()
    target = path / file if file else path
    whole = target.read_bytes()
    rng = random.Random(f"{format}/{file}")
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n_loaded = 0
    for _ in range(N_EACH):
        target.unlink()  # a new file: the old one may still be mapped
        target.write_bytes(damaged(whole, rng))
        n_loaded += try_to_load(path)
    assert n_loaded < N_EACH
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 300_000
    target.unlink()
    target.write_bytes(whole)
    assert try_to_load(path)
