"""Ghost Attention: an instruction that was given once is kept in mind to the end (arXiv:2307.09288 sec. 3.3, A.3.5).

    sampled   [inst u1] a1 [inst u2] a2 [inst u3] a3       the instruction stands in every question
    learnt    [inst u1] a1 [u2]      a2 [u3]      a3       in the first alone
                                                  ^^       and only the last answer is trained

The paper leaves open whether the earlier answers are the dialogue's own or sampled too. Here all are sampled, turn by
turn, each given the sampled ones before it, so that the history of an example obeys as far as the model does. It does
not say either at what depth an example ends; here it is drawn evenly for each dialogue.

OUT/ data.jsonl              the examples; with "turn", "obeys" and the instruction's record as "standing"
     run/model               fine-tuned on them
     recall.json  .png       how often an instruction is obeyed at each turn, before and after

Whatever is there is not made again.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from llama2.align.ghost_config import GhostConfig
from llama2.align.ghost_recall import write_recall
from llama2.align.instructed import Check, Instructed, check_of, instructed, read_dialogues, read_instructions
from llama2.align.lessons import by_first, claim, is_there, model_of, taught, together, write_lines
from llama2.align.rollout import Sampling
from llama2.align.talk import Talk, carry_on, until
from llama2.errors import DataError
from llama2.parallel.mesh import World


def ghost(config: GhostConfig) -> Path:
    """Write the examples, learn them, judge before and after; return the new model's folder. Raises Llama2Error."""
    config.check()
    with together(config) as (world, console):
        learnt, judged, check = read_all(config, console)
        out = claim(config, world)
        data = out / "data.jsonl"
        if not is_there(data, world):
            found = examples(config, learnt, check, console, world)
            by_first(world, lambda: write_lines(data, found))
        model = taught(config, [data], out / "run", world, replay=config.replay, replay_share=config.replay_share)
        if judged and check is not None:
            write_recall(config, {"before": config.model, "after": model}, judged, check, out, world, console)
        elif check is None:
            console.print("recall is not judged: say with --judge MODULE:FUNCTION what obeys")
        console.print(f"wrote {model}")
        return model


def read_all(config: GhostConfig, console: Console) -> tuple[list[Instructed], list[Instructed], Check | None]:
    """Return the dialogues to learn from and those to judge by, each under its instruction, and the judge."""
    assert config.instructions is not None
    said = read_instructions(config.instructions)
    talks = read_dialogues(config.dialogues, console)
    if config.eval_dialogues is not None:
        aside = read_dialogues((config.eval_dialogues,), console)
    else:
        order = np.random.default_rng((config.seed, 3)).permutation(len(talks)).tolist()
        n = round(config.eval_share * len(talks))
        talks, aside = [talks[i] for i in sorted(order[n:])], [talks[i] for i in sorted(order[:n])]
    others = said if config.eval_instructions is None else read_instructions(config.eval_instructions)
    check = check_of(config.judge, [*said, *others])
    if check is None and config.keep == "obedient":
        raise DataError(f"keep=obedient needs a judge of {config.instructions}; name one with --judge MODULE:FUNCTION")
    learnt = instructed(talks[: config.n_dialogues], said, seed=2 * config.seed)
    return learnt, instructed(aside[: config.n_eval], others, seed=2 * config.seed + 1), check


@dataclass(frozen=True)
class Example:
    """A dialogue under an instruction, to be learnt up to one of its turns."""

    talk: Talk
    asked: Instructed
    turn: int
    """Whose answer is learnt, counted from 1."""


def examples(
    config: GhostConfig,
    dialogues: Sequence[Instructed],
    check: Check | None,
    console: Console,
    world: World = World(),
) -> list[dict[str, Any]]:
    """Sample the answers under the instruction in every question; return what is to be learnt, and say what is not."""
    turns = [turns_of(config, each, number) for number, each in enumerate(dialogues)]
    talks = [
        Talk(each.in_every[: max(some)], each.system) for each, some in zip(dialogues, turns, strict=True)
    ]  # what comes after the last that is learnt need not be sampled
    sampling = Sampling(config.max_new_tokens, config.temperature)
    llm = model_of(config, config.model, world)
    carry_on(llm, talks, sampling, seed=config.seed, chat_format=config.chat_format, world=world)
    ends = [(talk, each, turn) for talk, each, some in zip(talks, dialogues, turns, strict=True) for turn in some]
    records = world.gather([example(*ends[i], check) for i in world.share(len(ends))])
    found, why = [], Counter()
    for (talk, _, turn), record in zip(ends, records, strict=True):
        reason = unfit(talk, turn)
        if not reason and config.keep == "obedient" and not record["obeys"]:
            reason = "does not obey"
        if reason:
            why[reason] += 1
        else:
            found.append(record)
    n_obedient = sum(bool(each["obeys"]) for each in found)
    obedient = f", {n_obedient:,} of them obedient" if check is not None else ""
    left_out = "".join(f", {n:,} left out (the answer {reason})" for reason, n in why.most_common())
    console.print(f"{len(found):,} examples from {len(dialogues):,} dialogues{obedient}{left_out}")
    if not found:
        raise DataError(
            f"no answer of {config.model} is fit to learn{left_out}; give answers and dialogues more room "
            f"(max_new_tokens={config.max_new_tokens}, shorter dialogues), or a model that knows more"
        )
    return found


def turns_of(config: GhostConfig, asked: Instructed, number: int) -> list[int]:
    """Return the turns of a dialogue whose answers are learnt, counted from 1."""
    n = len(asked.questions)
    if config.depths == "random":
        return [int(np.random.default_rng((config.seed, 11, number)).integers(1, n + 1))]
    return [n] if config.depths == "last" else list(range(1, n + 1))


def unfit(talk: Talk, turn: int) -> str:
    """Return why the answer of a turn is not to be learnt, or nothing."""
    if turn > len(talk.answers):
        return "has no room in the context"
    if not all(talk.answers[:turn]):
        return "is empty, or follows an empty one"
    return "is cut by its length" if talk.is_cut[turn - 1] else ""


def example(talk: Talk, asked: Instructed, turn: int, check: Check | None) -> dict[str, Any]:
    """Return a line to fine-tune on: the instruction in the first question, the last answer apart."""
    answers = talk.answers[:turn]
    prompt = until(asked.in_first, answers[:-1], asked.system)
    obeys = check(asked.instruction, answers[-1]) if check is not None and answers else None
    completion = answers[-1] if answers else ""
    return {
        "prompt": [asdict(message) for message in prompt], "completion": completion, "turn": turn, "obeys": obeys,
        "standing": dict(asked.instruction),
    }  # fmt: skip
