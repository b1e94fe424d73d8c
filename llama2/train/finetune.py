"""Fine-tuning: examples and a checkpoint in, a model or an adapter out. `finetune` reads from top to bottom.

Llama 2, arXiv:2307.09288 sec. 3.1: only the answers are trained; LoRA arXiv:2106.09685, QLoRA arXiv:2305.14314.
"""

from functools import partial

import torch
from rich.console import Console

from llama2.checkpoint import hub, store
from llama2.data.dialogues.render import PLAIN
from llama2.data.loader import Loader
from llama2.errors import ConfigError
from llama2.llm import tokenizer_of
from llama2.model.config import ModelConfig
from llama2.model.lora_config import LoraConfig
from llama2.model.losses import next_token_loss
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World, start
from llama2.train.adapt import (
    adapt,
    adapter_of,
    check_vocabulary,
    export_of,
    first_weights,
    lr_scale,
)  # fmt: skip
from llama2.train.estimate import estimate, tell, told
from llama2.train.evaluation import judges_of
from llama2.train.finetune_config import LONGEST_ROW, FinetuneConfig
from llama2.train.finetune_data import Plan, open_data, plan_steps, present
from llama2.train.folder import RunFolder
from llama2.train.loop import Trainer
from llama2.train.noise import add_dropout, add_noise
from llama2.train.place import place_model
from llama2.train.pretrain import out_of
from llama2.train.run import Outcome, Run
from llama2.train.samples import as_question, samples_of


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
    add_dropout(model, config.dropout)
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
        judges_of(config, trainer, next_token_loss, data.held_out, micro_batch_size=micro_batch),
        next_token_loss,
        row_tokens=config.sequence_length,
        per_epoch=plan.tokens_per_epoch,
        compares=bool(data.held_out),
        sample=samples_of(config, str if config.chat_format == PLAIN else as_question),
        sample_every=config.sample_every,
        chat_format=None if config.chat_format == PLAIN else config.chat_format,
    )
    run.resume()
    return run.to_the_end()


def row_length(config: FinetuneConfig, shape: ModelConfig) -> int:
    """Return the tokens of a row. Raises ConfigError if the model cannot read so many."""
    length = config.sequence_length or min(shape.context_length, LONGEST_ROW)
    if length > shape.context_length:
        raise ConfigError(
            f"sequence_length={length} is beyond the context of {config.model}, {shape.context_length}; choose a "
            "shorter one, or stretch the model first: llama2 pretrain --init-from MODEL --rope-scaling yarn"
        )
    return length


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
