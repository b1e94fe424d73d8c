"""What a model is aligned to: prompts to answer, some set aside, and the reward of answers to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from llama2.align.online_config import OnlineConfig
from llama2.align.rollout import Prompts
from llama2.align.scoring import Gate, Reward, resolve_reward
from llama2.data.dialogues.prompts import AskedPrompt, read_prompts
from llama2.data.storyworld.questions import judge, read_question
from llama2.errors import ConfigError
from llama2.tokenizer.tokenizer import Tokenizer

GRADE = "grade"


@dataclass(frozen=True)
class Task:
    """Prompts to learn from, prompts to judge by, and the reward for both."""

    prompts: Prompts
    held_out: Prompts | None
    reward: Reward


def open_task(config: OnlineConfig, context_length: int, tokenizer: Tokenizer, console: Console) -> Task:
    """Read the prompts and the reward. Raises Llama2Error."""
    asked = [each for path in config.prompts for each in read_prompts(path)]
    console.print(f"{', '.join(map(str, config.prompts))}: {len(asked):,} prompts", markup=False, soft_wrap=True)
    if config.eval_prompts is not None:
        held_out = list(read_prompts(config.eval_prompts))[: config.n_eval]
    else:
        asked, held_out = aside(asked, config.eval_share, seed=config.seed)
        held_out = held_out[: config.n_eval]
    reward = reward_of(config.reward, config.safety_reward, [*asked, *held_out], tokenizer)

    def ready(some: Sequence[AskedPrompt], name: str) -> Prompts:
        return Prompts(
            [each.messages for each in some],
            tokenizer,
            context_length=context_length,
            max_new_tokens=config.max_new_tokens,
            chat_format=config.chat_format,
            too_long=config.too_long,
            name=name,
        )

    names = ", ".join(map(str, config.prompts))
    return Task(ready(asked, names), ready(held_out, "held-out prompts") if held_out else None, reward)


def aside(asked: list[AskedPrompt], share: float, *, seed: int) -> tuple[list[AskedPrompt], list[AskedPrompt]]:
    """Return the prompts without a seeded share of them, and that share."""
    n = round(share * len(asked))
    order = np.random.default_rng((seed, 3)).permutation(len(asked)).tolist()
    return [asked[i] for i in sorted(order[n:])], [asked[i] for i in order[:n]]


def reward_of(spec: str, safety: str | None, asked: Sequence[AskedPrompt], tokenizer: Tokenizer | None) -> Reward:
    """Return the reward that the settings name; prompts that say so themselves are unsafe to the gate.

    tokenizer: the policy's, which a reward model must share.
    """
    if spec == GRADE and not Path(spec).exists():
        return exact(asked)
    reward = resolve_reward(spec, safety=safety, tokenizer=tokenizer)
    if isinstance(reward, Gate):
        unsafe = {each.messages for each in asked if is_unsafe(each)}
        reward.is_unsafe = lambda conversation: conversation in unsafe
    return reward


def is_unsafe(asked: AskedPrompt) -> bool:
    """Say whether a prompt's record tags it as unsafe: `is_unsafe`, `is_safety`, or `kind` safe."""
    record = asked.record
    return bool(record.get("is_unsafe") or record.get("is_safety") or record.get("kind") == "safe")


def exact(asked: Sequence[AskedPrompt]) -> Reward:
    """Return the exact judge of story-world prompts. Raises ConfigError for others."""
    try:
        return judge([read_question(each.record) for each in asked])
    except (KeyError, TypeError, IndexError, AttributeError):
        raise ConfigError(
            f"reward={GRADE} judges prompts of the story world (questions.jsonl of llama2 world) only; for others name "
            "a reward model's folder, or MODULE:FUNCTION"
        ) from None
