"""The kernel of the paged cache gives what the definition of attention gives, for any blocks and lengths."""

import shutil

import pytest
import torch

from llama2.infer.blocks import BLOCK
from llama2.infer.paged import PagedQueries, has_kernel
from llama2.infer.request import Request, SamplingParams
from llama2.infer.sequence import Sequence, Span
from llama2.model.attention import attend_plain

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
LENGTHS = (1, 16, 17, 100, 5)


def spans_of(lengths):
    """One new token for each of some sequences, whose blocks lie anywhere."""
    blocks = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for length in lengths:
        sequence = Sequence(Request(str(length), (1,) * length, SamplingParams()), 0, 0, [1] * length)
        sequence.blocks = [blocks.pop() for _ in range(-(-length // BLOCK))]
        found.append(Span(sequence, length - 1, [1]))
    return found


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("shape", [(4, 4, 40), (8, 2, 64), (6, 3, 10), (2, 1, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_attention(dtype, shape, window):
    n_heads, n_kv, dim = shape
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(40 * BLOCK, n_kv, dim, generator=generator).to(dtype) for _ in range(2))
    q = torch.randn(len(LENGTHS) + 2, n_heads, dim, generator=generator).to(dtype)
    assert has_kernel(keys) and not has_kernel(keys.double())
    spans, out = spans_of(LENGTHS), torch.full_like(q, 7.0)
    queries = PagedQueries.of([(span, row + 2) for row, span in enumerate(spans)], window)
    queries.attend(q, keys, values, out)
    assert (out[:2] == 7).all()  # rows of others stay
    for row, span in enumerate(spans, 2):
        first = 0 if window is None else max(0, span.end - window)
        slots = torch.tensor([span.sequence.blocks[at // BLOCK] * BLOCK + at % BLOCK for at in range(first, span.end)])
        seen = torch.ones(1, 1, len(slots), dtype=torch.bool)
        expected = attend_plain(*(each.double()[None] for each in (q[row : row + 1], keys[slots], values[slots])), seen)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[row].double(), expected[0, 0], atol=tolerance, rtol=tolerance)
        alone = torch.zeros_like(q)
        PagedQueries.of([(span, row)], window).attend(q, keys, values, alone)
        assert torch.equal(alone[row], out[row])  # whatever the company
