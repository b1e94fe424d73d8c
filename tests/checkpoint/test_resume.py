"""Sharded state: any split is read by any other."""

import itertools

import pytest
import torch

from llama2.checkpoint.resume import Part, SavedState, write_parts
from llama2.errors import CheckpointError
from llama2.parallel.region import Held, Region

WHOLE = torch.arange(60, dtype=torch.float32).view(10, 6)


def save(folder, boxes):
    """Write WHOLE in boxes (rows, columns), one rank each."""
    for rank, (rows, columns) in enumerate(boxes):
        values = WHOLE[rows, columns].contiguous()
        part = Part(Region((10, 6), (rows.start, columns.start), tuple(values.shape)), values)
        more = {"step": Part(Region((), (), ()), torch.tensor(7.0))} if rank == 0 else {}
        write_parts(folder, {"w": part, **more}, rank)
    return SavedState(folder)


SPLITS = {
    "one": [(slice(0, 10), slice(0, 6))],
    "rows": [(slice(0, 4), slice(0, 6)), (slice(4, 10), slice(0, 6))],
    "grid": [(slice(a, b), slice(c, d)) for (a, b), (c, d) in itertools.product([(0, 3), (3, 10)], [(0, 5), (5, 6)])],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("rows", "columns"), [((0, 10), (0, 6)), ((2, 5), (1, 6)), ((9, 10), (5, 6))])
def test_any_region_of_any_split(tmp_path, split, rows, columns):
    saved = save(tmp_path, SPLITS[split])
    region = Region((10, 6), (rows[0], columns[0]), (rows[1] - rows[0], columns[1] - columns[0]))
    assert torch.equal(saved.read("w", region), WHOLE[slice(*rows), slice(*columns)])
    into = torch.zeros(region.shape)
    saved.load({"w": Held(into, region, True), "step": Held(step := torch.tensor(0.0), Region((), (), ()), True)})
    assert torch.equal(into, WHOLE[slice(*rows), slice(*columns)]) and step == 7


def test_a_missing_rank_is_noticed(tmp_path):
    save(tmp_path, SPLITS["grid"])
    (tmp_path / "00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks part of 'w'"):
        SavedState(tmp_path).read("w")


def test_errors_name_the_file(tmp_path):
    saved = save(tmp_path, SPLITS["one"])
    with pytest.raises(CheckpointError, match="lacks 'v'"):
        saved.read("v")
    with pytest.raises(CheckpointError, match="another model's"):
        saved.read("w", Region((10, 7), (0, 0), (10, 7)))
    (tmp_path / "00000.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"00000.safetensors is broken"):
        SavedState(tmp_path)
    with pytest.raises(CheckpointError, match="holds no training state"):
        SavedState(tmp_path / "nowhere")
