"""Safety: distilled answers and demonstrations, learnt in amounts, and what that does (arXiv:2307.09288 sec. 4.2).

    unsafe prompts -> context distillation, kept where safer --+
    demonstrations, whose last answer is learnt ---------------+-> a% of them + helpful examples -> a model for each a
                                                                     -> how safe, how helpful, how often it refuses

OUT/ distilled.jsonl                     both answers to each unsafe prompt, both rewards, which is kept
     data.jsonl                          the safety data in a seeded order
     before/answers.jsonl                the model as it came answers the prompts that judge
     amount-25/data.jsonl                the first 25 % of it
               run/model  answers.jsonl
     report.json  curves.json  curves.png

Whatever is there is not made again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from llama2.align.distillation import distil, tell
from llama2.align.lessons import by_first, claim, is_there, read_lines, taught, together, write_lines
from llama2.align.safety_config import SafetyConfig
from llama2.align.safety_prompts import group_of
from llama2.align.safety_report import answer, write_report
from llama2.align.task import aside
from llama2.data.dialogues.prompts import AskedPrompt, read_prompts
from llama2.data.dialogues.read import read_samples
from llama2.errors import DataError
from llama2.parallel.mesh import World


def safety(config: SafetyConfig) -> Path:
    """Do all of it; return the folder of the model of the largest amount. Raises Llama2Error."""
    config.check()
    with together(config) as (world, console):
        learnt, judged = read_all(config, console)
        shown = list(demonstrated(config.demonstrations))
        out = claim(config, world)
        answered = {0.0: answer(config, config.model, judged, out / "before", world, console)} if judged else {}
        data = safety_data(config, learnt, shown, out, world, console)
        model = out
        for amount in sorted(each for each in config.amounts if each > 0):
            folder = out / f"amount-{amount:g}"
            model = learn(config, amount, data, folder, world)
            if judged:
                answered[amount] = answer(config, model, judged, folder, world, console)
        if judged:
            by_first(world, lambda: write_report(config, judged, answered, len(data), out, console))
        console.print(f"wrote {model}")
        return model


def read_all(config: SafetyConfig, console: Console) -> tuple[list[AskedPrompt], list[AskedPrompt]]:
    """Return the unsafe prompts to learn from, and the prompts to judge by."""
    asked = [each for path in config.prompts for each in read_prompts(path)]
    if config.eval_prompts:
        judged = [each for path in config.eval_prompts for each in read_prompts(path)]
    else:
        asked, judged = aside(asked, config.eval_share, seed=config.seed)
    if config.n_eval is not None:
        order = np.random.default_rng((config.seed, 4)).permutation(len(judged))[: config.n_eval]
        judged = [judged[i] for i in sorted(order.tolist())]
    unsafe = [each for each in asked if group_of(each) == "unsafe"]
    names = ", ".join(map(str, config.prompts))
    if not unsafe:
        raise DataError(f'{names} holds no unsafe prompt to learn from; say so in the records, "is_unsafe": true')
    console.print(f"{names}: {len(unsafe):,} unsafe prompts to distil; {len(judged):,} prompts to judge by")
    return unsafe, judged


def safety_data(
    config: SafetyConfig,
    asked: Sequence[AskedPrompt],
    shown: Sequence[dict[str, Any]],
    out: Path,
    world: World,
    console: Console,
) -> list[dict[str, Any]]:
    """Return what is to be learnt in a seeded order: distilled answers without their preprompts, and demonstrations."""
    path, data = out / "distilled.jsonl", out / "data.jsonl"
    if not is_there(path, world):
        both = distil(config, asked, console, world)
        by_first(world, lambda: write_lines(path, both))
    lines = read_lines(path)
    tell(lines, console)
    if not is_there(data, world):
        kept = [each for each in lines if each["is_kept"]]
        found = [{"prompt": each["prompt"], "completion": each["distilled"], "source": "distilled"} for each in kept]
        found += shown
        if not found:
            raise DataError(
                f"of {len(lines)} distilled answers {config.safety_reward} prefers none to the original, and there are "
                "no demonstrations: nothing to learn; try another preprompt, or give --demonstrations"
            )
        order = np.random.default_rng((config.seed, 6)).permutation(len(found))
        by_first(world, lambda: write_lines(data, [found[i] for i in order]))
    return read_lines(data)


def demonstrated(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the conversations of files as lines to learn the last answer of."""
    for path in paths:
        for sample in read_samples(path):
            if sample.messages is None or sample.messages[-1].role != "assistant":
                raise DataError(f"{sample.where}: a demonstration ends with the right answer; add it, or take it out")
            *prompt, last = (asdict(message) for message in sample.messages)
            yield {"prompt": prompt, "completion": last["content"], "source": "demonstration"}


def learn(config: SafetyConfig, amount: float, data: Sequence[dict[str, Any]], folder: Path, world: World) -> Path:
    """Fine-tune the first model on a share of the safety data, with equally many helpful tokens for each share."""
    path, share = folder / "data.jsonl", amount / 100
    if not is_there(path, world):
        by_first(world, lambda: write_lines(path, data[: ceil(share * len(data))]))
    helpful = config.replay_share / (config.replay_share + (1 - config.replay_share) * share)
    return taught(config, [path], folder / "run", world, replay=config.replay, replay_share=helpful)
