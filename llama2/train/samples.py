"""What a model in training writes when it is asked to show what it can."""

from collections.abc import Callable, Iterator

from llama2.chat import conversation
from llama2.llm import LLM, Prompt, SamplingOptions
from llama2.train.config import TrainConfig

Sample = Callable[[LLM], Iterator[tuple[str, str]]]
"""Yields beginnings and what the model made of them."""


def samples_of(config: TrainConfig, as_prompt: Callable[[str], Prompt] = str) -> Sample | None:
    """Return what lets a model go on from each of the sample prompts; None where there are none.

    as_prompt: what a prompt is for the model, a text to continue or a conversation to answer.
    """
    if not config.sample_prompts:
        return None

    def sample(llm: LLM) -> Iterator[tuple[str, str]]:
        for prompt in config.sample_prompts:
            asked = as_prompt(prompt)
            n = min(config.sample_tokens, llm.config.context_length - len(llm.prompt_ids(asked)))
            options = SamplingOptions(max_new_tokens=max(1, n), temperature=0.8, top_p=1.0, seed=config.seed)
            yield prompt, ("" if isinstance(asked, str) else " ") + llm.complete(asked, **options).text

    return sample


def as_question(text: str) -> Prompt:
    return conversation([{"role": "user", "content": text}])
