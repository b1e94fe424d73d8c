"""How much of everything the demo makes: all of it in minutes on two cores, or a trace of it in one."""

from dataclasses import dataclass
from typing import Any

from llama2.data.storyworld.raw import Dirt

DIRT = Dirt(
    near_duplicates=0.003, exact_duplicates=0.02, foreign=0.02, boilerplate=0.1, personal=0.002, mojibake=0.003,
    contamination=0.005,
)  # fmt: skip
"""Enough to see every rule at work; what no rule takes away, as edited words, is learnt like the rest."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    n_stories: int
    vocab_size: int
    pretraining: dict[str, Any]
    finetuning: dict[str, Any]
    reward: dict[str, Any]
    aligning: dict[str, Any]
    n_graded: int
    """Held-out stories begun and judged, per language."""
    n_tasks: int
    """Held-out tasks done and judged."""
    n_asked: int
    """Held-out questions answered before and after alignment."""


FULL = Size(
    n_stories=12_000,
    vocab_size=2048,
    pretraining=dict(
        weights=(0.72, 0.28), dim=160, n_layers=3, n_heads=4, ffn_dim=448, tied_embeddings=True, rope_theta=1000.0,
        context_length=512, sequence_length=400, batch_size=10, max_steps=2700, optimizer="muon", learning_rate=5e-3,
        lr_scheduler="wsd", decay_share=0.6, min_lr_share=0.02, warmup_steps=20, dtype="bfloat16", eval_every=900,
        save_every=900, eval_tokens=30_000,
    ),
    finetuning=dict(
        weights=(0.95, 0.05), replay_share=0.15, too_long="drop", lora_r=8, optimizer="muon", learning_rate=5e-3,
        min_lr_share=0.02, sequence_length=400, batch_size=10, max_steps=1150, warmup_steps=20, dtype="bfloat16",
        eval_every=250, save_every=250, eval_tokens=20_000,
    ),
    reward=dict(
        batch_size=32, max_steps=80, learning_rate=2e-3, dtype="bfloat16", too_long="drop", eval_share=0.02,
    ),
    aligning=dict(
        method="full", loss="orpo", optimizer="muon", batch_size=16, max_steps=600, learning_rate=5e-3, beta=0.2,
        dtype="bfloat16", too_long="drop", eval_share=0.02,
    ),
    n_graded=100,
    n_tasks=300,
    n_asked=300,
)  # fmt: skip
QUICK = Size(
    n_stories=300,
    vocab_size=1024,
    pretraining={
        **FULL.pretraining,
        "dim": 64,
        "n_layers": 2,
        "ffn_dim": 192,
        "max_steps": 40,
        "eval_every": 0,
        "save_every": 0,
    },
    finetuning={**FULL.finetuning, "max_steps": 21, "eval_every": 0, "save_every": 0},
    reward={**FULL.reward, "batch_size": 4, "max_steps": 6},
    aligning={**FULL.aligning, "batch_size": 4, "max_steps": 6},
    n_graded=4,
    n_tasks=10,
    n_asked=6,
)
