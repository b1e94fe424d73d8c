"""Each row gets the same bits in any company."""

import pytest
import torch
import torch.nn.functional as F

from llama2.infer.engine import Engine
from llama2.infer.invariant import ROW_INVARIANT, onednn_linear, tiled_linear
from llama2.infer.request import Request, SamplingParams
from llama2.model.arithmetic import computing, linear, silu
from llama2.model.config import ModelConfig
from llama2.model.transformer import build

SHAPES = [(64, 64), (172, 64), (64, 172), (288, 768), (2048, 512), (48, 32), (7, 10)]


def data(shape, n, dtype):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, shape[1], generator=generator).to(dtype), torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_rows_do_not_depend_on_their_company(shape, dtype):
    x, weight = data(shape, 70, dtype)
    with computing(ROW_INVARIANT):
        together = linear(x, weight)
        for n in (1, 2, 3, 8, 16, 17, 33, 64):
            assert torch.equal(linear(x[5 : 5 + n].clone(), weight), together[5 : 5 + n])


@pytest.mark.parametrize("linear", [tiled_linear, onednn_linear])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_fast_and_the_plain_way_agree(linear, with_bias):
    x, weight = data((48, 32), 19, torch.float32)
    bias = torch.arange(48.0) if with_bias else None
    for n in (1, 2, 19):
        torch.testing.assert_close(linear(x[:n], weight, bias), F.linear(x[:n], weight, bias), atol=1e-5, rtol=1e-5)


def test_silu_does_not_depend_on_where_a_number_stands():
    x = torch.randn(31 * 400, generator=torch.Generator().manual_seed(0)) * 3
    with computing(ROW_INVARIANT):
        assert torch.equal(silu(x), torch.cat([silu(part.clone()) for part in x.split(31)]))
        torch.testing.assert_close(silu(x), x * torch.sigmoid(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_gives_each_answer_the_same_bits_alone_and_in_a_crowd(dtype):
    config = ModelConfig(64, 2, 4, 100, 172, n_kv_heads=2, context_length=128)
    model = build(config, seed=0, dtype=dtype)
    params = SamplingParams(max_new_tokens=8, seed=1, temperature=1.0, top_p=1.0, logprobs=5)
    requests = [Request(str(i), tuple(range(1, 3 + 2 * i)), params) for i in range(21)]
    together = Engine(model, batch_invariant=True).generate(requests)
    alone = [Engine(model, batch_invariant=True).generate([request])[0] for request in requests]
    assert together == alone  # tokens, and every log-probability, exactly
