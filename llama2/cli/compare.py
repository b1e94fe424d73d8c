"""`llama2 compare`: which of two models answers better, as a person or a reward sees it."""

import sys
from pathlib import Path
from typing import Any

from llama2.cli.options import DType, SampleOptions
from llama2.errors import RequestError


def compare(
    model_a: str,
    model_b: str,
    /,
    *,
    prompts: Path,
    n: int = 50,
    reward: str | None = None,
    out: Path | None = None,
    batch_size: int = 32,
    dtype: DType | None = None,
    device: str | None = None,
    sample: SampleOptions = SampleOptions(),
) -> None:
    """Let two models answer the same prompts and say which is better: rate them blindly here, or let a reward do it.

    Ratings are kept as preference pairs, which llama2 reward and llama2 dpo learn from. Stopped with q or Ctrl-C, the
    same command goes on where it was.

    Parameters
    ----------
    model_a
        Folder, file or hub name.
    model_b
        The other one.
    prompts
        Anything that asks: prompts, dialogues, preference pairs (jsonl, json, parquet), a file or a folder.
    n
        So many prompts, drawn by the seed.
    reward
        A reward model's folder; MODULE:FUNCTION of (conversations, answers) that returns a number for each; or grade,
        the exact judge of story-world prompts.
    out
        Where the ratings go; with --reward optional: the pairs that it prefers.
    batch_size
        How many answers to write at once.
    """
    if out is None and reward is None:
        raise RequestError("where do the ratings go? name a file with --out; or let a reward decide with --reward")
    if out is not None and reward is not None and out.exists():
        raise RequestError(f"--out {out} exists; name a new file")
    if batch_size < 1:
        raise RequestError(f"--batch-size {batch_size} must be at least 1")
    import llama2
    from llama2.align.compare import Duel, answers_of, pick
    from llama2.align.ratings import RatingFile
    from llama2.align.task import reward_of

    options = sample.given()
    seed = options.pop("seed", 0)
    models = {"a": model_a, "b": model_b}
    picked = pick(prompts, n=n, seed=seed)
    score = None if reward is None else reward_of(reward, None, [prompt for _, prompt in picked], None)
    file = None
    if out is not None and score is None:
        file = RatingFile(out, models=models, options={"seed": seed, **options})
        if file.rated:
            print(f"{out} holds {len(file.rated)} ratings; going on from there", file=sys.stderr)
        picked = [each for each in picked if not file.holds(each[1].messages)]
    answers: list[list[str]] = []
    for number, model in enumerate(models.values(), 1):
        if picked:
            print(f"answering {len(picked)} prompts ({number} of 2)", file=sys.stderr)
            llm = llama2.load(model, dtype=dtype, device=device, max_batch=batch_size)
            answers.append(answers_of(llm, picked, seed=seed, options=options))
            del llm  # one model at a time
    rows = zip(picked, *answers, strict=True) if picked else ()
    duels = [Duel(number, prompt, a, b) for (number, prompt), a, b in rows]
    if score is None:
        _by_hand(duels, file, seed)
    else:
        _by_reward(duels, score, out, models)


def _by_reward(duels: list[Any], score: Any, out: Path | None, models: dict[str, str]) -> None:
    from llama2.align.compare import by_reward, write_pairs

    scored = by_reward(duels, score)
    print(scored.tally.said(models["a"], models["b"]))
    print("mean reward {:.4f} and {:.4f}".format(*scored.means))
    if out is not None:
        print(f"wrote {write_pairs(out, duels, scored, models)} pairs to {out}", file=sys.stderr)


def _by_hand(duels: list[Any], file: Any, seed: int) -> None:
    from rich.console import Console

    from llama2.align.ratings import rate, summary

    console = Console(stderr=True, highlight=False)
    try:
        rate(duels, file, seed=seed, source=sys.stdin, console=console)
    except KeyboardInterrupt:
        console.print()
    found, table = summary(duels, file)
    Console(highlight=False).print(table)
    print(found.said(f"A ({file.models['a']})", f"B ({file.models['b']})"))
