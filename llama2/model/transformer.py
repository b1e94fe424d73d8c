"""The Llama, for one device: RMSNorm, rotary attention, SwiGLU, and nothing that trains, saves or samples.

    h   = x + wo(attention(attention_norm(x)))
    out = h + w2(silu(w1(n)) * w3(n)),  n = ffn_norm(h)

Names and the order of query and key rows are Meta's (facebookresearch/llama model.py), so a
`consolidated.00.pth` is this model's state dict. LLaMA: arXiv:2302.13971 sec. 2.2.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama2.model import fused
from llama2.model.arithmetic import Linear, linear, silu
from llama2.model.attention import Cache, attend, visible
from llama2.model.config import ModelConfig
from llama2.model.rope import Rotation, rotate


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the statistics in float32 and rounded back before the weight, as Meta does."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        if fused.applies(x, self.weight):
            return fused.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer_id: int):
        super().__init__()
        self.layer_id = layer_id
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = Linear(config.dim, q_dim, bias=config.attention_bias)
        self.wk = Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.wv = Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.wo = Linear(q_dim, config.dim, bias=config.attention_bias)

    def forward(
        self, x: Float[Tensor, "B T D"], turns: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> Float[Tensor, "B T D"]:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # [B T H|K Dh]
        if cache is None and fused.attends(q, k, v, mask):
            return self.wo(fused.attend(q, k, v, turns, mask).flatten(-2))
        q, k = rotate(q, turns), rotate(k, turns)
        out = attend(q, k, v, mask) if cache is None else cache.attend(self.layer_id, q, k, v)
        return self.wo(out.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): w1 gates w3, w2 brings the product back."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim, bias=config.ffn_bias)
        self.w2 = Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)
        self.w3 = Linear(config.dim, config.ffn_dim, bias=config.ffn_bias)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        a, b = self.w1(x), self.w3(x)
        return self.w2(fused.swiglu(a, b) if fused.applies(a, b) else silu(a) * b)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normed copy of the stream it adds to."""

    def __init__(self, config: ModelConfig, layer_id: int):
        super().__init__()
        self.attention = Attention(config, layer_id)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Float[Tensor, "B T D"], turns: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> Float[Tensor, "B T D"]:
        x = x + self.attention(self.attention_norm(x), turns, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Token ids to next-token logits.

    A fresh one holds PyTorch's default values: call `initialise` to train it, or load weights.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer_id) for layer_id in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tied_embeddings else Linear(config.dim, config.vocab_size, bias=False)
        self.rotation = Rotation(config)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "#B T"] | None = None,
        documents: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Return the logits of the token after each position, in float32 (float64 for a float64 model).

        positions: where each token stands in its sequence; 0, 1, 2... if not given.
        documents: an id per token; tokens of different documents do not see each other.
        cache: supplies what came before these tokens; then positions must be given.
        """
        return self.project(self.hidden(tokens, positions, documents, cache))

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "#B T"] | None = None,
        documents: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        branches: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the final, normed hidden states; arguments as in `forward`.

        branches: rows are several texts that begin alike; a token sees those before it of branch 0 and of its own.
        """
        assert cache is None or (positions is not None and documents is None and branches is None)
        assert branches is None or self.can_branch
        in_order = torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask, window = None, self.config.sliding_window
        if cache is None and not (documents is None and branches is None and window is None):
            mask = visible(in_order, in_order, window=window, documents=documents, branches=branches)
        x = self.tok_embeddings(tokens)  # [B T D]
        turns = self.rotation(in_order if positions is None else positions, x.dtype)
        for layer in self.layers:
            x = layer(x, turns, mask, cache)
        return self.norm(x)

    @property
    def can_branch(self) -> bool:
        """Whether rows may branch: not where distances or lengths are counted along the whole row."""
        return self.config.sliding_window is None and not self.rotation.is_dynamic

    def project(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Return the logits of hidden states."""
        weight = self.tok_embeddings.weight if self.output is None else self.output.weight
        return linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))


def fresh_weights(model: Transformer, *, seed: int, std: float = 0.02) -> Iterator[tuple[str, Tensor]]:
    """Yield name and random value (float32, on the CPU) of every weight, the same for the same seed everywhere.

    Matrices are normal(0, std); the two that write into the residual stream of each block (wo, w2) are
    normal(0, std / sqrt(2 L)), so that its variance does not grow with depth (GPT-2, sec. 2.3); norms
    are one, biases zero. Llama 2 publishes no initialisation; 0.02 is the usual one. The model's own weights are
    not looked at: they may be on the meta device.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    narrow = std / (2 * model.config.n_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            yield name, torch.zeros(parameter.shape)
        elif parameter.ndim == 1:
            yield name, torch.ones(parameter.shape)
        else:
            scale = narrow if name.endswith(("wo.weight", "w2.weight")) else std
            yield name, torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * scale


def initialise(model: Transformer, *, seed: int, std: float = 0.02) -> Transformer:
    """Fill the model with `fresh_weights` and return it."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in fresh_weights(model, seed=seed, std=std):
            parameters[name].copy_(values)
    return model


def build(
    config: ModelConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """Return a freshly initialised model (see `initialise`)."""
    with torch.device("meta"):
        model = Transformer(config)
    return initialise(model.to(dtype).to_empty(device=device), seed=seed)
