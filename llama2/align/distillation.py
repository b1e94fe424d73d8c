"""Context distillation: an answer under a preprompt is learnt without it, where it is safer.

    original    prompt             -> answer
    distilled   preprompt, prompt  -> answer'       kept if the safety reward of answer' is above that of answer

arXiv:2307.09288 sec. 4.2.4. Both answers are judged as answers to the prompt alone. Unsafe prompts only: on others the
paper saw answers grow vague, and refusals where none was due.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llama2.align.lessons import model_of, read_records
from llama2.align.rollout import Prompts, Sampled, Sampling, rewarded, sample
from llama2.align.safety_config import SafetyConfig
from llama2.align.safety_prompts import reward_of, tag_of
from llama2.align.scoring import shared
from llama2.chat import Conversation, Message
from llama2.data.dialogues.prompts import AskedPrompt
from llama2.errors import DataError
from llama2.parallel.mesh import World

Templates = Mapping[tuple[str, str], str]
"""(category, language) -> preprompt; an empty name stands for any."""


def distil(
    config: SafetyConfig, asked: Sequence[AskedPrompt], console: Console, world: World = World()
) -> list[dict[str, Any]]:
    """Return a line for each unsafe prompt: both answers, both rewards, and whether the distilled one is kept."""
    preprompts = read_templates(config.templates)
    guarded = [with_preprompt(each.messages, preprompt_of(config, preprompts, each)) for each in asked]
    llm = model_of(config, config.model, world)
    room: dict[str, Any] = dict(
        context_length=llm.config.context_length, max_new_tokens=config.max_new_tokens, chat_format=config.chat_format
    )
    under = Prompts(guarded, llm.tokenizer, **room, too_long=config.too_long, name="prompts with their preprompts")
    if under.n_left_out:
        console.print(f"{under.n_left_out:,} prompts left out (too long with their preprompts)")
    fitting = iter(under.conversations)
    wanted, some = next(fitting), []
    for each, conversation in zip(asked, guarded, strict=True):
        if conversation is wanted:
            some.append(each)
            wanted = next(fitting, None)
    bare = Prompts([each.messages for each in some], llm.tokenizer, **room)
    judge = shared(reward_of("safety_reward", config.safety_reward, some, llm.tokenizer), world)
    sampling, sides = Sampling(config.max_new_tokens, config.temperature), []
    for which, prompts in enumerate((bare, under)):
        seed = 2 * config.seed + which
        sides.append(
            rewarded(sample(llm.model, prompts, range(len(some)), sampling, seed=seed, world=world), bare, judge)
        )
    original, distilled = sides
    return [_line(*each) for each in zip(some, original, distilled, strict=True)]


def _line(asked: AskedPrompt, original: Sampled, distilled: Sampled) -> dict[str, Any]:
    return {
        "prompt": [asdict(message) for message in asked.messages],
        "category": tag_of(asked, "category"),
        "vector": tag_of(asked, "vector"),
        "original": original.text,
        "distilled": distilled.text,
        "original_reward": original.reward,
        "distilled_reward": distilled.reward,
        "is_kept": distilled.reward > original.reward and bool(distilled.text) and not distilled.is_cut,
    }


def with_preprompt(messages: Conversation, preprompt: str) -> Conversation:
    """Return a conversation under a preprompt: as its system message, or before the one that it has."""
    if messages[0].role == "system":
        return (Message("system", f"{preprompt}\n\n{messages[0].content}"), *messages[1:])
    return (Message("system", preprompt), *messages)


def read_templates(path: Path | None) -> Templates:
    """Return the preprompts of a file. Raises DataError for an empty one, and for two of one kind."""
    found: dict[tuple[str, str], str] = {}
    for where, record in read_records(path) if path is not None else ():
        text, key = record.get("preprompt"), (str(record.get("category") or ""), str(record.get("language") or ""))
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: 'preprompt' is {text!r}, wanted a text that asks for care: write it")
        if key in found:
            raise DataError(f"{where}: a second preprompt for category {key[0]!r}, language {key[1]!r}; keep one")
        found[key] = text.strip()
    return found


def preprompt_of(config: SafetyConfig, templates: Templates, asked: AskedPrompt) -> str:
    """Return what stands before a prompt: what is said of its category and language, of one of them, or of all."""
    category, language = tag_of(asked, "category"), tag_of(asked, "language")
    keys = ((category, language), (category, ""), ("", language), ("", ""))
    return next((templates[key] for key in keys if key in templates), config.preprompt.strip())


def tell(lines: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print for each category how many prompts were answered twice, and how many answers are kept."""
    table = Table("category", "asked", "kept", box=None, header_style="bold", pad_edge=False)
    for category in sorted({line["category"] for line in lines}):
        some = [line["is_kept"] for line in lines if line["category"] == category]
        table.add_row(category or "-", f"{len(some):,}", f"{sum(some):,}")
    console.print(table)
