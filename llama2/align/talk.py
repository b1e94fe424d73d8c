"""Dialogues that a model carries on by itself: of all dialogues one turn at a time, in one pass of the engine.

    u1 -> a1      u1 a1 u2 -> a2      u1 a1 u2 a2 u3 -> a3 ...

Every answer is the model's own, given its own earlier ones. Several processes share the dialogues of each turn, and
all know all answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from llama2 import chat
from llama2.align.rollout import Prompts, Sampling, sample
from llama2.chat import Conversation, Message
from llama2.llm import LLM
from llama2.parallel.mesh import World

ROOM = 48
"""Tokens that the context must have left for a dialogue to go on: most answers late in one are short."""


@dataclass
class Talk:
    """What a user asks, and what was answered so far."""

    questions: tuple[str, ...]
    system: str = ""
    answers: list[str] = field(default_factory=list)
    is_cut: list[bool] = field(default_factory=list)
    """Of each answer, whether it was as long as an answer may be, and not at its end."""
    is_too_long: bool = False
    """There is no room for another answer."""

    @property
    def n_turns(self) -> int:
        return len(self.questions)


def until(questions: Sequence[str], answers: Sequence[str], system: str = "") -> Conversation:
    """Return a dialogue up to the question that follows the last of these answers."""
    found = [Message("system", system)] if system else []
    for question, answer in zip(questions, answers, strict=False):
        found += [Message("user", question), Message("assistant", answer)]
    return (*found, Message("user", questions[len(answers)]))


def carry_on(
    llm: LLM,
    talks: Sequence[Talk],
    sampling: Sampling,
    *,
    seed: int,
    chat_format: str | None = None,
    world: World = World(),
) -> None:
    """Answer every question of every dialogue; one that outgrows the model's context stays as long as it is.

    An answer that the end of the context cuts is not kept.
    """
    least = min(ROOM, sampling.max_new_tokens)
    for turn in range(max((talk.n_turns for talk in talks), default=0)):
        going = [talk for talk in talks if talk.n_turns > turn and not talk.is_too_long]
        asked = [until(talk.questions, talk.answers, talk.system) for talk in going]
        for talk, conversation in zip(going, asked, strict=True):
            rendered = chat.render(conversation, llm.tokenizer, format=chat_format, add_generation_prompt=True)
            talk.is_too_long = len(rendered.tokens) + least > llm.config.context_length
        kept = [i for i, talk in enumerate(going) if not talk.is_too_long]
        if not kept:
            return
        prompts = Prompts(
            [asked[i] for i in kept],
            llm.tokenizer,
            context_length=llm.config.context_length,
            max_new_tokens=least,
            chat_format=chat_format,
        )
        found = sample(llm.model, prompts, range(len(kept)), sampling, seed=1_000 * seed + turn, world=world)
        for i, answer in zip(kept, found, strict=True):
            going[i].is_too_long = answer.is_cut and len(answer.ids) < sampling.max_new_tokens
            if not going[i].is_too_long:
                going[i].answers.append(answer.text)
                going[i].is_cut.append(answer.is_cut)
