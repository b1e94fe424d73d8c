"""Fine-tuning: examples and a checkpoint in, a model or an adapter out. `finetune` reads from top to bottom.

Llama 2, arXiv:2307.09288 sec. 3.1: only the answers are trained; LoRA arXiv:2106.09685, QLoRA arXiv:2305.14314.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from llama2.chat import conversation
from llama2.checkpoint import hub, store
from llama2.checkpoint.adapter import is_adapter, write_adapter
from llama2.checkpoint.resume import SavedState
from llama2.data.dialogues.render import PLAIN
from llama2.data.loader import Loader
from llama2.errors import ConfigError
from llama2.llm import Prompt, tokenizer_of
from llama2.model.config import ModelConfig
from llama2.model.lora import adapter_names, add_adapter, fresh_adapter, merge_into
from llama2.model.lora_config import LoraConfig, check, targets, whole_modules
from llama2.model.losses import next_token_loss
from llama2.model.quantized import nf4_like
from llama2.model.surgery import replace_linears
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World, start
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train.estimate import estimate, tell, told
from llama2.train.finetune_config import LONGEST_ROW, FinetuneConfig
from llama2.train.finetune_data import Plan, open_data, plan_steps, present
from llama2.train.folder import Export, RunFolder, export_model
from llama2.train.loop import Trainer
from llama2.train.place import place_model
from llama2.train.pretrain import out_of
from llama2.train.run import Outcome, Run


def finetune(config: FinetuneConfig) -> Outcome:
    """Adapt a checkpoint to examples. Raises Llama2Error before any long work for what cannot work."""
    config = config.settled()
    config.check()
    world = start(device=config.device, tensor_parallel=config.tensor_parallel, timeout_s=config.timeout_s)
    base = hub.resolve(config.model)
    shape, tokenizer = store.read_config(base), tokenizer_of(base)
    check_vocabulary(config, shape, tokenizer)
    config = config.model_copy(update={"sequence_length": row_length(config, shape)})
    lora = adapter_of(config, shape)
    console = Console(stderr=True, highlight=False, quiet=not world.is_first)
    present(config, tokenizer, console)
    data = open_data(config, tokenizer, console)
    plan = plan_steps(config, data)
    micro_batch = config.micro_batch(world.dp)
    if config.dry_run:
        forecast(config, shape, lora, plan, world, micro_batch, console)
        return Outcome(None, 0, None, 0)
    folder = RunFolder(out_of(config), config, world, tokenizer, export_of(config, shape, tokenizer, lora))
    folder.open()
    weights = partial(first_weights, config, base, lora)
    model = place_model(config, shape, world, weights, adapt=partial(adapt, config, lora))
    add_noise(model, config.neftune_alpha)
    trainer = Trainer(model, config, n_steps=plan.n_steps, world=world, lr_scale=partial(lr_scale, config))
    loader = Loader(
        data.sets,
        weights=plan.weights,
        sequence_length=config.sequence_length,
        packing=config.packing,
        packing_buffer_rows=plan.n_rows_packed,
        seed=config.seed,
        rows_per_step=config.batch_size,
        micro_batch_size=micro_batch,
        rank=world.dp_rank,
        n_ranks=world.dp,
    )
    run = Run(
        config,
        world,
        folder,
        trainer,
        loader,
        data.held_out,
        next_token_loss,
        micro_batch=micro_batch,
        tokens_per_epoch=plan.tokens_per_epoch,
        compares=bool(data.held_out),
        as_prompt=str if config.chat_format == PLAIN else as_question,
        chat_format=None if config.chat_format == PLAIN else config.chat_format,
    )
    run.resume()
    return run.to_the_end()


def as_question(text: str) -> Prompt:
    return conversation([{"role": "user", "content": text}])


def check_vocabulary(config: FinetuneConfig, shape: ModelConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.n_vocab > shape.vocab_size:
        raise ConfigError(
            f"the tokenizer of {config.model} has {tokenizer.n_vocab} pieces, the model vocab_size={shape.vocab_size}: "
            "they do not belong together; llama2 extend-vocabulary makes a model larger"
        )


def row_length(config: FinetuneConfig, shape: ModelConfig) -> int:
    """Return the tokens of a row. Raises ConfigError if the model cannot read so many."""
    length = config.sequence_length or min(shape.context_length, LONGEST_ROW)
    if length > shape.context_length:
        raise ConfigError(
            f"sequence_length={length} is beyond the context of {config.model}, {shape.context_length}; choose a "
            "shorter one, or stretch the model first: llama2 pretrain --init-from MODEL --rope-scaling yarn"
        )
    return length


def adapter_of(config: FinetuneConfig, shape: ModelConfig) -> LoraConfig | None:
    """Return what adapter is to be trained, None for all weights. Raises ConfigError."""
    if not config.is_adapter:
        return None
    lora = LoraConfig(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=targets(config.target_modules),
        trained_modules=whole_modules(config.trained_modules),
        rslora=config.rslora,
        dora=config.dora,
    )
    check(lora, tied_embeddings=shape.tied_embeddings)
    return lora


def forecast(
    config: FinetuneConfig,
    shape: ModelConfig,
    lora: LoraConfig | None,
    plan: Plan,
    world: World,
    micro_batch: int,
    console: Console,
) -> None:
    """Say what the run would take."""
    with torch.device("meta"):
        model = Transformer(shape)
        adapt(config, lora, model)
    trained = {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}
    n_trained = sum(trained.values())
    n_extra = sum(n for name, n in trained.items() if not name.endswith((".weight", ".bias")))
    found = estimate(
        config,
        shape,
        n_trained=n_trained,
        n_extra=n_extra,
        micro_batch=micro_batch,
        n_ranks=world.dp,
        is_4bit=config.method == "qlora",
        is_cpu=world.device.type == "cpu",
    )
    n_all = shape.n_parameters + n_extra
    tell(console, told(found, n_steps=plan.n_steps, config=config, n_trained=n_trained, n_all=n_all))


def export_of(config: FinetuneConfig, shape: ModelConfig, tokenizer: Tokenizer, lora: LoraConfig | None) -> Export:
    """Return how the outcome is written: a model's folder, or an adapter's."""
    if lora is None:
        return partial(export_model, config=shape, tokenizer=tokenizer, dtype=config.dtype)
    local = Path(config.model).expanduser()
    base = str(local.resolve()) if local.exists() else config.model
    return partial(export_adapter, lora=lora, base=base, shape=shape, tokenizer=tokenizer)


def export_adapter(
    saved: SavedState, kind: str, to: Path, *, lora: LoraConfig, base: str, shape: ModelConfig, tokenizer: Tokenizer
) -> None:
    """Write saved adapter weights as PEFT does, in float32."""
    names = [name.removeprefix("weights/") for name in saved.shapes if name.startswith("weights/")]
    tensors = {name: partial(saved.read, f"{kind}/{name}") for name in names}
    write_adapter(to, tensors, lora, base=base, model=shape, tokenizer=tokenizer)


def adapt(config: FinetuneConfig, lora: LoraConfig | None, model: Transformer) -> None:
    """Change the empty model: its blocks to 4 bits, an adapter beside them."""
    if config.method == "qlora":
        compute = getattr(torch, config.dtype)
        replace_linears(model, lambda _, layer: nf4_like(layer, dtype=compute), lambda name: name.startswith("layers."))
    if lora is not None:
        add_adapter(model, lora, seed=None)


def first_weights(
    config: FinetuneConfig, base: Path, lora: LoraConfig | None, model: Transformer
) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's weights, then a fresh adapter's."""
    if is_adapter(base):
        weights = {name: partial(torch.Tensor.detach, weight) for name, weight in merged(base).items()}
    else:
        weights = store.read(base).tensors
    for name, read in weights.items():
        yield name, read()
    if lora is not None:
        yield from fresh_adapter(model, seed=config.seed, weight_of=lambda name: weights[name]())


def merged(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a base with the adapters upon it, added up in float32."""
    model = store.load(folder, dtype="float32")
    for name in adapter_names(model):
        merge_into(model, name)
    return model.state_dict()


def lr_scale(config: FinetuneConfig, name: str) -> float:
    """Return by how much the learning rate of a weight differs from learning_rate."""
    if ".lora_b." in name:
        return config.lora_b_lr_ratio
    is_whole = config.is_adapter and name.endswith(".weight")
    return config.trained_modules_lr / config.learning_rate if is_whole and config.trained_modules_lr else 1.0


def add_noise(model: Transformer, alpha: float) -> None:
    """Add uniform noise of size alpha / sqrt(T D) to the embeddings of every training step (arXiv:2310.05914)."""
    if not alpha:
        return

    def noisy(module: torch.nn.Module, args: object, out: Tensor) -> Tensor:
        if not module.training:
            return out
        size = alpha / math.sqrt(out.shape[-2] * out.shape[-1])
        return out + torch.empty_like(out).uniform_(-size, size)

    model.tok_embeddings.register_forward_hook(noisy)
