"""A ladder of techniques for a large model on a small machine: one row each, tokens per second beside memory.

    python -m benchmarks.finetune_memory [--model tinyllama-1.1b] [--rows lora,qlora,...]

One sequence of 512 tokens a step, bfloat16, adapters of rank 8 on all linear layers, random weights. Every row has a
fresh process; memory is the most that it holds while it trains, read from the kernel after the model is made. Rows
named peft are PEFT's adapter on transformers' model (and, in 4 bits, bitsandbytes' layers) in the same settings.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Company, report, their_model
from llama2.data.batch import Batch
from llama2.kernels.memory import keep_freed_memory
from llama2.model.config import ModelConfig
from llama2.model.family import family_config
from llama2.model.lora import add_adapter
from llama2.model.lora_config import LoraConfig
from llama2.model.losses import next_token_loss
from llama2.model.quantized import nf4_like
from llama2.model.surgery import replace_linears
from llama2.model.transformer import Transformer, build
from llama2.parallel.mesh import World
from llama2.train.finetune_config import FinetuneConfig
from llama2.train.loop import Trainer
from llama2.train.place import place_model

T = 512
ADAM8 = dict(optimizer="adamw8bit")
FULL = dict(activation_checkpointing="full")
ROWS: dict[str, dict] = {
    "full, AdamW": dict(method="full", master_weights=False),
    "full, AdamW in 8 bits": dict(method="full", master_weights=False, **ADAM8),
    "full, 8 bits, checkpointing": dict(method="full", master_weights=False, **ADAM8, **FULL),
    "LoRA": dict(method="lora"),
    "LoRA, checkpointing": dict(method="lora", **FULL),
    "QLoRA": dict(method="qlora", **ADAM8),
    "QLoRA, checkpointing": dict(method="qlora", **ADAM8, **FULL),
}
PEFT = ("peft LoRA", "peft LoRA, checkpointing", "peft QLoRA", "peft QLoRA, checkpointing")
LORA = LoraConfig(r=8, alpha=16.0)


def batch_of(config: ModelConfig) -> Batch:
    tokens = torch.randint(3, config.vocab_size, (1, T + 1))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.arange(T)[None].contiguous(), None)


def ours(config: ModelConfig, settings: dict) -> Callable[[Batch], None]:
    run = FinetuneConfig(dtype="bfloat16", learning_rate=1e-4, sequence_length=T, **settings)

    def adapt(model: Transformer) -> None:
        if run.method == "qlora":
            replace_linears(model, lambda _, layer: nf4_like(layer), lambda name: name.startswith("layers."))
        if run.is_adapter:
            add_adapter(model, LORA, seed=None)

    def weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
        with torch.device("meta"):
            plain = dict(Transformer(config).named_parameters())
        for name, like in (dict(model.named_parameters()) | plain).items():
            values = torch.randn(like.shape, dtype=torch.float32)
            yield name, torch.ones(like.shape) if like.ndim == 1 else 0.02 * values

    trainer = Trainer(place_model(run, config, World(), weights, adapt=adapt), run, n_steps=1_000_000)
    return lambda batch: trainer.step([batch], next_token_loss) and None


def theirs(config: ModelConfig, row: str) -> Callable[[Batch], None]:
    import peft

    model = their_model(build(config, dtype=torch.bfloat16)).train()
    model.config.use_cache = False
    if "QLoRA" in row:
        in_four_bits(model)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = peft.LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapter, autocast_adapter_dtype=False)
    if "checkpointing" in row:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(batch: Batch) -> None:
        logits = model(batch.tokens, use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def in_four_bits(model: nn.Module) -> None:
    """Put bitsandbytes' NF4 layers, with double quantisation, in the place of the blocks' linear layers."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and ".layers." in name:
            options = dict(bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4")
            made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, **options)
            made.weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made.to("cpu"))


def measure(model: str, row: str, n_steps: int) -> dict[str, object]:
    """Train a few steps in this process; return seconds of each and the most memory held."""
    warnings.simplefilter("ignore")
    keep_freed_memory()  # as our commands do; of advantage to either side
    config = family_config(model)
    step = theirs(config, row) if row.startswith("peft") else ours(config, ROWS[row])
    batch = batch_of(config)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: making the model is not training it
    company, seconds = Company(), []
    for _ in range(n_steps):
        start = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) / 2**20 for line in status.splitlines() if line.startswith("VmHWM"))
    return {
        "tokens_per_s": round(T / statistics.median(seconds[1:]), 1),
        "peak_gib": round(peak, 3),
        "others": company.share(),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinyllama-1.1b")
    parser.add_argument("--rows", default=";".join([*ROWS, *PEFT]), help="separated by semicolons")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--row")
    options = parser.parse_args(arguments)
    if options.row:
        print(json.dumps(measure(options.model, options.row, options.steps)))
        return
    found: dict[str, dict] = {}
    for row in options.rows.split(";"):
        words = ["--model", options.model, "--steps", str(options.steps), "--row", row]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.finetune_memory", *words], check=True, stdout=subprocess.PIPE, text=True
        )
        found[row] = json.loads(done.stdout.splitlines()[-1])
        print(f"{row:32} {found[row]}", file=sys.stderr, flush=True)
    ratios = {
        f"{name}: ours/peft": round(found[name]["tokens_per_s"] / found[f"peft {name}"]["tokens_per_s"], 3)
        for name in ROWS
        if name in found and f"peft {name}" in found
    }
    values = {f"{row}: {name}": value for row, each in found.items() for name, value in each.items()}
    others = max(values.pop(f"{row}: others") for row in found)
    facts = {"model": options.model, "dtype": "bfloat16", "tokens": T}
    report("finetune_memory", {**facts, **values, **ratios, "others_cpu": others})


if __name__ == "__main__":
    main(sys.argv[1:])
