import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from llama2.checkpoint.pickles import read_pickle, write_pickle
from llama2.errors import CheckpointError


class Trap:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, is_zip):
    trap = tmp_path / "sprung"
    if is_zip:
        torch.save({"norm.weight": Trap(trap)}, tmp_path / "bad.pth")
    else:
        (tmp_path / "bad.pth").write_bytes(pickle.dumps({"norm.weight": Trap(trap)}))
    with pytest.raises(CheckpointError, match="never allowed"):
        read_pickle(tmp_path / "bad.pth")
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"a": 3},
        {"a": {"b": torch.ones(2)}},
        {1: torch.ones(2)},
        {"a": torch.ones(2, device="meta")},
        {"a": torch.ones(2, 2).to_sparse()},
    ],
)
def test_only_dense_tensors_by_name_are_read(tmp_path, content):
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"bad\.pth"):
        read_pickle(tmp_path / "bad.pth")


def test_what_torch_saves_is_read_lazily(tmp_path):
    weights = OrderedDict(a=torch.randn(3, 4), b=torch.nn.Parameter(torch.randn(2).bfloat16()))
    torch.save(weights, tmp_path / "one.pth")
    found = read_pickle(tmp_path / "one.pth")
    assert {name: (stored.shape, stored.dtype) for name, stored in found.items()} == {
        "a": ((3, 4), "float32"),
        "b": ((2,), "bfloat16"),
    }
    for _ in range(200):  # far past the point where the file is mapped anew
        assert torch.equal(found["a"].read(), weights["a"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_torch_loads_mapped_or_not(tmp_path, dtype):
    weights = {f"w{i}": torch.randn(3, i + 1).to(getattr(torch, dtype)) for i in range(5)}
    path = tmp_path / "one.pth"
    write_pickle(path, [(name, tuple(w.shape), lambda w=w: w) for name, w in weights.items()], dtype=dtype)
    for mapped in (True, False):
        found = torch.load(path, weights_only=True, mmap=mapped)
        assert list(found) == list(weights) and all(torch.equal(found[name], weights[name]) for name in weights)
        assert not mapped or all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
