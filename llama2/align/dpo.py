"""Direct preference optimisation and its kin: a chat checkpoint and judged answers in, one that prefers the good ones.

    h = (p_w - ref_w) - (p_l - ref_l)      p: ln p of a whole answer      ref: the same under the first weights

    sigmoid  -ln sigmoid(beta h)                       arXiv:2305.18290 eq. 7
    cdpo     the same, less sure of the labels         sec. 3 of https://ericmitchell.ai/cdpo.pdf
    ipo      (h - 1 / (2 beta))^2                      arXiv:2310.12036 eq. 17
    hinge    max(0, 1 - beta h)                        arXiv:2305.10425
    kto      answers one by one, in `kto`              arXiv:2402.01306
    orpo     p per token, no reference                 arXiv:2403.07691
    simpo    p per token, no reference                 arXiv:2405.14734

The equations are in `losses`. `train_dpo` reads from top to bottom.
"""

from functools import partial
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from llama2.align.dpo_config import DpoConfig
from llama2.align.kto import (
    AnswerSource,
    Mismatched,
    answer_loss,
    estimated,
    judged_answers,
    mismatched,
    open_answers,
    right,
)  # fmt: skip
from llama2.align.losses import Numbers, dpo_loss, hinge_loss, ipo_loss, orpo_loss, per_row, simpo_loss
from llama2.align.pair_data import open_pairs, reading_of, steps_of
from llama2.align.reference import answer_lengths, answer_logprobs, reference_logprobs
from llama2.checkpoint import hub, store
from llama2.data.examples import Examples
from llama2.data.preferences.batch import PairBatch
from llama2.data.preferences.loader import PairLoader
from llama2.data.preferences.sets import LabelledSet, PairSet
from llama2.errors import DataError
from llama2.llm import tokenizer_of
from llama2.model.config import ModelConfig
from llama2.model.losses import token_logprobs
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import start
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train.adapt import adapt, adapter_of, check_vocabulary, export_of, first_weights, lr_scale
from llama2.train.evaluation import Evaluation, Judge
from llama2.train.folder import RunFolder
from llama2.train.loop import LossFn, Trainer
from llama2.train.place import place_model
from llama2.train.pretrain import out_of
from llama2.train.run import Outcome, Run, Source

OF_PAIRS = {
    "accuracy": "Pairs in the right order, by what the model gained",
    "margin": "Implicit reward of the chosen less that of the rejected",
    "chosen_logprob": "ln p of the chosen answer",
    "rejected_logprob": "ln p of the rejected answer",
}
OF_ANSWERS = {
    "accuracy": "Answers on the right side of z",
    "margin": "How far on that side, times beta",
    "kl": "z, how far the model went, about",
}
"""What is worth a plot besides the loss, with titles."""


def train_dpo(config: DpoConfig) -> Outcome:
    """Learn from preferences. Raises Llama2Error before any long work for what cannot work."""
    config = config.settled()
    config.check()
    world = start(device=config.device, timeout_s=config.timeout_s)
    base = hub.resolve(config.model)
    shape, tokenizer = store.read_config(base), tokenizer_of(base)
    check_vocabulary(config, shape, tokenizer)
    lora = adapter_of(config, shape)
    console = Console(stderr=True, highlight=False, quiet=not world.is_first)
    data = open_judged(config, shape, tokenizer, console)
    config, n_steps = steps_of(config, len(data.train))
    micro_batch = config.micro_batch(world.dp)
    folder = RunFolder(out_of(config), config, world, tokenizer, export_of(config, shape, tokenizer, lora))
    folder.open()
    weights = partial(first_weights, config, base, lora)
    model = place_model(config, shape, world, weights, adapt=partial(adapt, config, lora))
    reference: dict[str, Tensor] = {}
    if config.has_reference:  # now: once a checkpoint is loaded, the weights have learnt
        reference = reference_logprobs(
            folder.out, model, data.rows, world, batch_size=data.n_rows(micro_batch), console=console
        )
    trainer = Trainer(model, config, n_steps=n_steps, world=world, lr_scale=partial(lr_scale, config))
    source, loss_fn = learning_from(config, data, trainer, reference, micro_batch)
    run = Run(
        config,
        world,
        folder,
        trainer,
        source,
        {"held-out": judge_of(config, data, trainer, reference, micro_batch)} if data.held_out else {},
        loss_fn,
        row_tokens=data.train.n_tokens / len(data.train),
        per_epoch=len(data.train),
        unit=data.train.what,
        compares=data.held_out is not None,
        plots=OF_ANSWERS if config.loss == "kto" else OF_PAIRS,
    )
    run.resume()
    return run.to_the_end()


# Data


class Judgements(NamedTuple):
    """What is learnt from and judged by; of kto mismatched answers to each as well."""

    train: PairSet | LabelledSet
    held_out: PairSet | LabelledSet | None
    others: Mismatched | None = None
    others_held_out: Mismatched | None = None

    @property
    def rows(self) -> dict[str, Examples]:
        """All answers whose log-probabilities under the reference are needed, by name."""
        named = {
            "train": self.train.rows,
            "held-out": self.held_out and self.held_out.rows,
            "mismatched": self.others and self.others.rows,
            "mismatched held-out": self.others_held_out and self.others_held_out.rows,
        }
        return {name: rows for name, rows in named.items() if rows is not None}

    def n_rows(self, micro_batch: int) -> int:
        """Return the rows of a forward pass: a pair has two."""
        return micro_batch * (2 if isinstance(self.train, PairSet) else 1)


def open_judged(config: DpoConfig, shape: ModelConfig, tokenizer: Tokenizer, console: Console) -> Judgements:
    """Read all data and say what was found."""
    if config.loss != "kto":
        return Judgements(*open_pairs(config, shape, tokenizer, console))
    train, held_out = open_answers(config, shape, tokenizer, console)
    length = reading_of(config, shape)["length"]
    others = mismatched(train.rows, length)
    if not others.counts.any():
        raise DataError(
            f"{train.name} holds no answer to another prompt to compare with, which kto does; give more of them, or "
            "choose another loss"
        )
    return Judgements(train, held_out, others, None if held_out is None else mismatched(held_out.rows, length))


# Learning


def learning_from(
    config: DpoConfig, data: Judgements, trainer: Trainer, reference: dict[str, Tensor], micro_batch: int
) -> tuple[Source, LossFn]:
    """Return where the steps come from, and their loss."""
    world = trainer.world
    dealt = dict(
        batch_size=config.batch_size,
        micro_batch_size=micro_batch,
        rank=world.dp_rank,
        n_ranks=world.dp,
        seed=config.seed,
    )
    if isinstance(data.train, PairSet):
        return PairLoader(data.train, **dealt), pair_loss(config, reference.get("train"))
    assert data.others is not None
    loader = PairLoader(data.train, **dealt)
    source = AnswerSource(loader, trainer.model, data.others, reference["mismatched"], world)
    return source, answer_loss(config, reference["train"])


def pair_loss(config: DpoConfig, reference: Tensor | None) -> LossFn:
    """Return the loss of a batch of pairs; reference: ln p_ref of all rows of their set."""

    def loss_fn(model: Transformer, batch: PairBatch) -> tuple[Tensor, int, dict[str, float]]:
        p, n = (each[batch.sides] for each in per_row(token_logprobs(model, batch.rows), batch.rows.targets))
        rows = torch.cat([2 * batch.numbers, 2 * batch.numbers + 1])
        losses, margins = judged_pairs(config, p, n, None if reference is None else reference.to(p.device)[rows])
        chosen, rejected = p.detach().chunk(2)
        metrics = {
            "accuracy": right(margins),
            "margin": float(margins.sum()),
            "chosen_logprob": float(chosen.sum()),
            "rejected_logprob": float(rejected.sum()),
        }
        return losses.sum(), batch.n_pairs, metrics

    return loss_fn


def judged_pairs(config: DpoConfig, p: Numbers, n: Numbers, reference: Numbers | None) -> tuple[Numbers, Numbers]:
    """Return the loss of each of B pairs, and the implicit reward of its chosen answer less that of its rejected one.

    p: ln p of 2B answers, the chosen ones first. n: how many tokens each has. reference: as p, of the first weights.
    """
    assert config.beta is not None
    chosen, rejected = (p / n).chunk(2) if reference is None else (p - reference).chunk(2)
    h = chosen - rejected
    match config.loss:
        case "simpo":
            losses = simpo_loss(chosen, rejected, beta=config.beta, gamma=config.gamma or 0.0)
        case "orpo":
            losses = orpo_loss(chosen, rejected, beta=config.beta)
        case "ipo":
            losses = ipo_loss(h, beta=config.beta)
        case "hinge":
            losses = hinge_loss(h, beta=config.beta)
        case _:
            losses = dpo_loss(h, beta=config.beta, label_smoothing=config.label_smoothing or 0.0)
    if config.nll_weight:
        losses = losses - config.nll_weight * (p / n).chunk(2)[0]
    return losses, config.beta * h.detach()


# Judging


def judge_of(
    config: DpoConfig, data: Judgements, trainer: Trainer, reference: dict[str, Tensor], micro_batch: int
) -> Judge:
    """Return what judges the model by what was set aside: the mean loss, and what else tells how it does."""
    held_out, others = data.held_out, data.others_held_out
    batch_size = data.n_rows(micro_batch)

    def logprobs(rows: Examples) -> Tensor:
        return answer_logprobs(trainer.model, rows, trainer.world, batch_size=batch_size).double()

    def pairs(held_out: PairSet) -> Evaluation:
        p, n = (torch.cat([each[0::2], each[1::2]]) for each in (logprobs(held_out.rows), lengths))
        known = reference.get("held-out")
        losses, margins = judged_pairs(
            config, p, n, None if known is None else torch.cat([known[0::2], known[1::2]]).double()
        )
        return told(losses, margins, *p.chunk(2))

    def answers(held_out: LabelledSet, others: Mismatched) -> Evaluation:
        gain = (logprobs(others.rows) - reference["mismatched held-out"].double())[others.counts]
        kl = torch.tensor(estimated(float(gain.sum()), len(gain)), dtype=torch.float64)
        p, is_good = logprobs(held_out.rows), torch.from_numpy(held_out.is_good)
        losses, margins = judged_answers(config, p - reference["held-out"].double(), is_good, kl)
        return told(losses, margins, p[is_good], p[~is_good])

    def judge() -> Evaluation:
        with trainer.as_published():
            if isinstance(held_out, PairSet):
                return pairs(held_out)
            assert held_out is not None and others is not None
            return answers(held_out, others)

    lengths = answer_lengths(held_out.rows).double() if held_out else torch.zeros(0)
    return judge


def told(losses: Numbers, margins: Numbers, chosen: Numbers, rejected: Numbers) -> Evaluation:
    """Return an evaluation of losses and margins, and of the log-probabilities of good and bad answers."""
    values = {"accuracy": right(margins) / len(margins), "margin": float(margins.mean())}
    for name, each in (("chosen_logprob", chosen), ("rejected_logprob", rejected)):
        if len(each):  # of labelled answers all may be good
            values[name] = float(each.mean())
    return Evaluation(float(losses.mean()), values)
