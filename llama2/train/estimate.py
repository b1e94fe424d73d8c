"""What a run will take, said before it starts: steps, tokens, trained weights, memory."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from llama2.model.config import ModelConfig
from llama2.model.losses import CHUNK_BYTES
from llama2.train.config import TrainConfig

NUMBER_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of one weight: its code, its share of a scale of one byte, of that scale's scale."""
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "muon": 4.0}
"""Optimizer state per trained weight; Muon's is that of the blocks."""
PROGRAM_BYTES = 350 << 20
"""Python, PyTorch and the rest of a process."""
HOLES = 0.75
"""On a CPU an adapter's products, freed among activations that are kept, leave holes in the heap: so much of these
again (measured at dim 512 with 8 layers: LoRA 0.74, of 512 tokens as of 2,048, QLoRA 0.88; without an adapter none)."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that one process needs at its peak, by what they are for."""

    weights: float
    training: float
    """Gradients, float32 masters, optimizer state, averages."""
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.training + self.activations + self.logits + PROGRAM_BYTES


def estimate(
    config: TrainConfig,
    shape: ModelConfig,
    *,
    n_trained: int,
    n_extra: int,
    micro_batch: int,
    n_ranks: int,
    is_4bit: bool,
    is_cpu: bool = True,
) -> Estimate:
    """Return what a process will need. n_trained: weights that are trained; n_extra: weights of an adapter."""
    number = NUMBER_BYTES[config.dtype]
    in_blocks = shape.n_parameters - shape.n_embedding_parameters
    has_masters = config.dtype == "bfloat16" and config.master_weights
    wide = 4 if has_masters and n_ranks > 1 else number  # sharded weights are the float32 masters themselves
    weights = (shape.n_parameters + n_extra) * wide / n_ranks
    if is_4bit:
        weights = in_blocks * NF4_BYTES + (shape.n_embedding_parameters + n_extra) * wide / n_ranks
    masters = 4 if has_masters and n_ranks == 1 else 0
    gradient = 4 if has_masters else number
    each = gradient + masters + STATE_BYTES[config.optimizer] + (max(4, number) if config.ema_decay else 0)
    tokens = micro_batch * config.sequence_length
    kept = 8 * shape.dim + 2 * shape.n_kv_heads * shape.head_dim + 4 * shape.ffn_dim
    per_layer = {"none": kept, "selective": 0.75 * kept, "full": shape.dim}[config.activation_checkpointing]
    one_more = kept if config.activation_checkpointing != "none" else 0
    activations = tokens * number * (shape.n_layers * per_layer + one_more + 4 * shape.dim)
    activations *= 1 + (HOLES if n_extra and is_cpu else 0)
    logits = min(3 * CHUNK_BYTES, 3 * 4 * tokens * shape.vocab_size)
    return Estimate(weights, n_trained * each / n_ranks, activations, logits)


def tell(console: Console, rows: Iterator[tuple[str, str]]) -> None:
    """Print names and values."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def told(
    found: Estimate, *, n_steps: int, config: TrainConfig, n_trained: int, n_all: int
) -> Iterator[tuple[str, str]]:
    """Yield what a dry run says."""
    per_step = config.batch_size * config.sequence_length
    yield "steps", f"{n_steps:,}"
    yield "tokens", f"{n_steps * per_step:,} positions, {per_step:,} per step"
    yield "trained", f"{n_trained:,} of {n_all:,} weights ({n_trained / n_all:.2%})"
    yield "memory", f"about {found.total / 2**30:.2f} GiB per process at its peak, of it"
    for name in ("weights", "training", "activations", "logits"):
        yield f"  {name}", f"{getattr(found, name) / 2**30:.2f} GiB"
