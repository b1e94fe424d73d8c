"""Rejection sampling fine-tuning in rounds: sample, keep the best, learn it, begin again.

    round v   [pairs of the current model, labelled -> reward model trained on]           arXiv:2307.09288 sec. 3.2.3
              temperature chosen anew -> K answers to each prompt -> the best by the reward model, of those that
              came to their end
              the best of this and of all earlier rounds -> fine-tuning, from the first model on

OUT/
  round-1/ temperature.json  samples.jsonl  best.jsonl  contrasts.jsonl  curve.json  curve.png  run/model
  round-2/ ...
  rounds.json                                                       what each round was
  model -> the last round's

Whatever is there is not made again, so a loop that was stopped goes on. Several processes share the prompts of a round.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from llama2.align.curves import curve_of, draw_curve
from llama2.align.label import drawn, retrained
from llama2.align.lessons import (
    by_first,
    claim,
    is_there,
    line,
    model_of,
    read_lines,
    taught,
    together,
    write_lines,
)  # fmt: skip
from llama2.align.rejection_config import RejectConfig
from llama2.align.rollout import Prompts, Sampled, Sampling, rewarded, sample
from llama2.align.scoring import Reward, shared
from llama2.align.task import reward_of
from llama2.data.dialogues.prompts import AskedPrompt, read_prompts
from llama2.errors import TrainingError
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World

AT_ONCE = 64
"""Prompts of one process whose answers are written to the file together."""


def reject(config: RejectConfig) -> Path:
    """Do all rounds; return the folder of the last model. Raises Llama2Error."""
    config.check()
    with together(config) as (world, console):
        out = claim(config, world)
        asked = [each for path in config.prompts for each in read_prompts(path)]
        model, reward = config.model, config.reward
        for number in range(1, config.n_rounds + 1):
            folder = out / f"round-{number}"
            folder.mkdir(exist_ok=True)
            if config.pairs_judge is not None and number > 1:
                reward = retrained(config, asked, model, reward, folder, world, console)
            console.print(f"round {number}: {model} answers, {reward} judges")
            choose(config, number, asked, model, reward, folder, world, console)
            model = str(learnt(config, out, number, world))
        by_first(world, partial(conclude, out, config.n_rounds, model, console))
    return out / "model"


def choose(
    config: RejectConfig,
    number: int,
    asked: Sequence[AskedPrompt],
    model: str,
    reward: str,
    folder: Path,
    world: World,
    console: Console,
) -> None:
    """Write K answers to each prompt of a round, the best of each, and the curve of rewards against K.

    Raises TrainingError where no answer came to its end.
    """
    if is_there(folder / "curve.png", world):
        return
    llm = model_of(config, model, world)
    some = drawn(asked, config.n_prompts, seed=config.seed + number)
    judge = shared(reward_of(reward, config.safety_reward, some, llm.tokenizer), world)
    prompts = Prompts(
        [each.messages for each in some],
        llm.tokenizer,
        context_length=llm.config.context_length,
        max_new_tokens=config.max_new_tokens,
        chat_format=config.chat_format,
        too_long=config.too_long,
    )
    answer = partial(_answers, config, llm.model, prompts, judge, config.seed * 1_000 + number, world)
    temperature = tuned(config, answer, len(prompts), folder, world, console)
    path = folder / "samples.jsonl"
    sampled(config, prompts, partial(answer, temperature=temperature), path, world, console)
    by_first(world, partial(keep_best, config, number, temperature, path, console))


def keep_best(config: RejectConfig, number: int, temperature: float, path: Path, console: Console) -> None:
    """Write what is to be learnt of a file of answers, and the curve, beside it. Raises TrainingError for nothing."""
    folder, records = path.parent, read_lines(path)
    groups = [records[at : at + config.n_samples] for at in range(0, len(records), config.n_samples)]
    chosen = [best_of(group, config.tolerance) for group in groups]
    best = [each for some in chosen for each in some]
    if not best:
        raise TrainingError(
            f"no answer of round {number} came to its end within max_new_tokens={config.max_new_tokens}, so there is "
            "nothing to learn; choose more"
        )
    write_lines(folder / "best.jsonl", best)
    write_lines(folder / "contrasts.jsonl", [pair for group in groups for pair in contrasts(group, config.least_gap)])
    n_left_out = sum(not some for some in chosen)
    curve = curve_of(np.array([[each["reward"] for each in group] for group in groups]))
    about = {"temperature": temperature, "n_left_out": n_left_out, **curve}
    (folder / "curve.json").write_text(json.dumps(about, indent=1) + "\n")
    (folder / "curve.png").write_bytes(draw_curve(curve))
    mean, most = curve["mean"], curve["max"][-1]
    console.print(f"temperature {temperature:g}: mean reward {mean:.3f}, best of {config.n_samples} {most:.3f}")
    if n_left_out:
        console.print(f"{n_left_out:,} of {len(groups):,} prompts left out: all answers cut by their length, or empty")


def sampled(config: RejectConfig, prompts: Prompts, answer, path: Path, world: World, console: Console) -> None:
    """Write answers to all prompts after those that are there, those to one prompt together."""
    kept = world.gather(_whole_groups(path, config.n_samples) if world.is_first else [])
    begin, step = len(kept) // config.n_samples, AT_ONCE * world.dp
    is_silent = console.quiet or not console.is_terminal
    with path.open("w", encoding="utf-8") if world.is_first else nullcontext() as file:
        if file is not None:
            file.writelines(line(each) for each in kept)
        for at in track(range(begin, len(prompts), step), "sampling", console=console, disable=is_silent):
            found = answer(range(at, min(at + step, len(prompts))))
            if file is not None:
                file.writelines(line(record(prompts, each)) for each in found)
                file.flush()


def best_of(group: Sequence[dict[str, Any]], tolerance: float | None = None) -> list[dict[str, Any]]:
    """Return the answer of the highest reward, of those that came to their end; nothing if none did, or says anything.

    One that was cut would be learnt as if it had ended there. With a tolerance all different ones whose rewards are at
    most so much below the highest.
    """
    whole = came_to_their_end(group)
    best = sorted(whole, key=lambda each: -each["reward"])[:1]
    if tolerance is None or not best:
        return best
    good = [each for each in whole if each["reward"] >= best[0]["reward"] - tolerance]
    return list({each["completion"]: each for each in good}.values())


def contrasts(group: Sequence[dict[str, Any]], least_gap: float) -> list[dict[str, Any]]:
    """Return pairs to learn by `llama2 dpo`: the best answer and the worst, the second best and the second worst and so
    on, K / 2 of them, but for those whose rewards differ by less than least_gap or not at all, each pair once.
    """
    whole = sorted(came_to_their_end(group), key=lambda each: each["reward"])
    pairs = zip(whole[::-1], whole[: max(1, len(group) // 2)], strict=False)
    found = {
        (better["completion"], worse["completion"]): better["prompt"]
        for better, worse in pairs
        if better["reward"] > worse["reward"] and better["reward"] - worse["reward"] >= least_gap
    }
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for (chosen, rejected), prompt in found.items()]


def came_to_their_end(group: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in group if each["completion"] and not each["is_cut"]]


def _answers(
    config: RejectConfig,
    model: Transformer,
    prompts: Prompts,
    judge: Reward,
    seed: int,
    world: World,
    numbers: Sequence[int],
    temperature: float,
) -> list[Sampled]:
    sampling = Sampling(config.max_new_tokens, temperature)
    answers = sample(model, prompts, numbers, sampling, n=config.n_samples, seed=seed, world=world)
    return rewarded(answers, prompts, judge)


def tuned(config: RejectConfig, answer, n_prompts: int, folder: Path, world: World, console: Console) -> float:
    """Return the temperature at which the best of K is best, on a few prompts."""
    path = folder / "temperature.json"
    if len(config.temperatures) == 1:
        return config.temperatures[0]
    if not is_there(path, world):
        found = {}
        for temperature in config.temperatures:
            rewards = np.array([each.reward for each in answer(range(min(config.n_tuning, n_prompts)), temperature)])
            found[str(temperature)] = float(rewards.reshape(-1, config.n_samples).max(1).mean())
        text = json.dumps(found) + "\n"
        by_first(world, lambda: path.write_text(text))
    found = json.loads(path.read_text())
    told = ", ".join(f"{temperature} {reward:.3f}" for temperature, reward in found.items())
    console.print(f"reward of the best of {config.n_samples} by temperature: {told}")
    return float(max(found, key=found.__getitem__))


def learnt(config: RejectConfig, out: Path, number: int, world: World) -> Path:
    """Fine-tune the first model on the best answers so far; return the new model's folder."""
    first = 1 if config.keep_earlier else number
    data = [out / f"round-{each}" / "best.jsonl" for each in range(first, number + 1)]
    run = out / f"round-{number}" / "run"
    return taught(config, data, run, world, replay=config.replay, replay_share=config.replay_share)


def conclude(out: Path, n_rounds: int, model: str, console: Console) -> None:
    """Write and print what each round was, and put the last model beside it."""
    rounds = [json.loads((out / f"round-{number}" / "curve.json").read_text()) for number in range(1, n_rounds + 1)]
    (out / "rounds.json").write_text(json.dumps(rounds, indent=1) + "\n")
    for number, each in enumerate(rounds, 1):
        console.print(f"round {number}: mean reward {each['mean']:.3f}, best of {each['k'][-1]} {each['max'][-1]:.3f}")
    target = out / "model"
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(model, target)
    console.print(f"wrote {target}")


def record(prompts: Prompts, each: Sampled) -> dict[str, Any]:
    """Return an answer as a line of a file to fine-tune on."""
    asked = [asdict(message) for message in prompts.conversations[each.number]]
    return {"prompt": asked, "completion": each.text, "reward": each.reward, "is_cut": each.is_cut}


def _whole_groups(path: Path, k: int) -> list[dict[str, Any]]:
    """Return the answers of whole batches of prompts; what a kill cut short is sampled again."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a text may hold other line ends
    found = [json.loads(each) for each in lines]
    return found[: len(found) // (k * AT_ONCE) * k * AT_ONCE]
