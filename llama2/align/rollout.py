"""Answers that the model in training samples itself: prompts in, tokens and their rewards out.

    prompt ids -> Engine, live weights -> answer ids -> text -> reward
                                       -> rows: prompt, answer, end of turn; the answer is marked

What is trained is what was sampled, id by id: the text is only for the reward. An answer that was cut by its length has
no end of turn, and none is taught; an empty one is its end of turn alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llama2 import chat
from llama2.align.scoring import Reward
from llama2.chat import Conversation
from llama2.data.examples import Examples, collect
from llama2.data.preferences.render import render_answer
from llama2.errors import DataError
from llama2.infer.engine import Engine
from llama2.infer.request import Completion, Request, SamplingParams
from llama2.model.lora import adapter_names
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World
from llama2.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled for training: from the model's own distribution, whole."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    max_batch: int = 256
    """Answers written at a time: of a small model 256 are written at 1.4 times the rate of 64 (docs/log.md)."""


@dataclass(frozen=True)
class Sampled:
    """One answer to a prompt."""

    number: int
    """Of the prompt in its list."""
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    """Of the answer, the end of turn included unless it was cut."""
    logprobs: tuple[float, ...]
    """ln p of each id of the answer but the end of turn, under the model itself at temperature 1."""
    text: str
    is_cut: bool
    reward: float = 0.0


class Prompts:
    """Conversations to answer, ready for one model."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        tokenizer: Tokenizer,
        *,
        context_length: int,
        max_new_tokens: int,
        chat_format: str | None = None,
        too_long: Literal["refuse", "drop"] = "refuse",
        name: str = "prompts",
    ):
        """Raises DataError where a prompt leaves no room for an answer of max_new_tokens, unless it is left out."""
        self.conversations: list[Conversation] = []
        self.tokenizer, self.name = tokenizer, name
        self.ids: list[tuple[int, ...]] = []
        self.n_left_out = 0
        for number, each in enumerate(conversations):
            ids = chat.render(each, tokenizer, format=chat_format, add_generation_prompt=True).tokens
            if len(ids) + max_new_tokens <= context_length:
                self.conversations.append(each)
                self.ids.append(tuple(ids))
            elif too_long == "drop":
                self.n_left_out += 1
            else:
                raise DataError(
                    f"{name}: prompt {number} has {len(ids)} tokens and an answer may have {max_new_tokens}, more than "
                    f"the context of {context_length}: --too-long drop leaves it out, or choose fewer --max-new-tokens"
                )
        if not self.ids:
            raise DataError(f"{name} holds no prompt that leaves room for an answer of {max_new_tokens} tokens")
        self.end_id = render_answer(self.conversations[0], "a", tokenizer, chat_format=chat_format).tokens[-1]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.ids))


def sample(
    model: Transformer,
    prompts: Prompts,
    numbers: Sequence[int],
    sampling: Sampling,
    *,
    n: int = 1,
    seed: int,
    adapter: str | None = None,
    world: World = World(),
) -> list[Sampled]:
    """Return n answers to each of these prompts, those of one prompt together.

    They follow from the weights, the seed and the number of the prompt alone (in float32; see `Engine`), and end where
    the context does. adapter: the one that takes part, of a model that has some. world: those who share the prompts and
    have the same weights; each answers its part, perhaps none, and all get all answers, in the order of one process.
    """
    numbers = [numbers[i] for i in world.share(len(numbers))]
    was_training = model.training
    engine = Engine(model.eval(), max_batch=sampling.max_batch)
    params = dict(temperature=sampling.temperature, top_p=1.0, n=n)
    context = model.config.context_length
    with_adapter = adapter if adapter in adapter_names(model) else None
    requests = [
        Request(
            str(at),
            prompts.ids[number],
            SamplingParams(
                **params,  # pyright: ignore[reportArgumentType]
                max_new_tokens=min(sampling.max_new_tokens, context - len(prompts.ids[number])),
                stop_ids=(prompts.end_id,),
                logprobs=0,
                seed=seed_of(seed, number),
            ),
            with_adapter,
        )
        for at, number in enumerate(numbers)
    ]
    found = engine.generate(requests)
    model.train(was_training)
    return world.gather(
        [_sampled(prompts, number, each) for number, some in zip(numbers, found, strict=True) for each in some]
    )


def seed_of(seed: int, number: int) -> int:
    """Return a seed of its own for each prompt of each round."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1)


def _sampled(prompts: Prompts, number: int, answer: Completion) -> Sampled:
    is_cut = answer.finish_reason == "length"
    ids = answer.tokens if is_cut else (*answer.tokens, prompts.end_id)
    text = prompts.tokenizer.decode(list(answer.tokens)).strip()
    return Sampled(number, prompts.ids[number], ids, answer.logprobs or (), text, is_cut)


def rewarded(answers: Sequence[Sampled], prompts: Prompts, reward: Reward) -> list[Sampled]:
    """Return the answers with their rewards. Raises DataError for a reward that gives something else."""
    found = reward([prompts.conversations[each.number] for each in answers], [each.text for each in answers])
    numbers = [float(each) for each in found]
    if len(numbers) != len(answers) or not np.isfinite(numbers).all():
        raise DataError(
            f"the reward gave {len(numbers)} numbers for {len(answers)} answers, "
            f"{int(np.isfinite(numbers).sum())} of them finite; wanted a finite number for each"
        )
    return [
        Sampled(each.number, each.prompt, each.ids, each.logprobs, each.text, each.is_cut, number)
        for each, number in zip(answers, numbers, strict=True)
    ]


def rows_of(answers: Sequence[Sampled], tokenizer: Tokenizer, *, length: int) -> Examples:
    """Return prompt and answer of each as one row of ids, the answer marked."""
    rendered = (
        ("", chat.Rendered([*each.prompt, *each.ids], [False] * len(each.prompt) + [True] * len(each.ids)))
        for each in answers
    )
    return collect(rendered, tokenizer, name="sampled answers", length=length)
