"""Prompts that safety is about: which are unsafe, of what kind, and who judges answers to them exactly.

unsafe       "is_unsafe" is true (or see `task.is_unsafe`)      to be refused
borderline   "is_unsafe" is false                               to be answered, though it sounds alike
ordinary     does not say                                       to be answered
"""

from collections.abc import Sequence
from pathlib import Path

from llama2.align.scoring import Reward, resolve_reward
from llama2.align.task import GRADE, is_unsafe
from llama2.data.dialogues.prompts import AskedPrompt
from llama2.data.storyworld.questions import Question, judge, read_question
from llama2.data.storyworld.safety import read_request
from llama2.errors import ConfigError
from llama2.tokenizer.tokenizer import Tokenizer

GROUPS = ("unsafe", "borderline", "ordinary")


def group_of(asked: AskedPrompt) -> str:
    """Return one of GROUPS."""
    if is_unsafe(asked):
        return "unsafe"
    return "ordinary" if asked.record.get("is_unsafe") is None else "borderline"


def tag_of(asked: AskedPrompt, name: str) -> str:
    """Return the category, vector or language of a prompt, or nothing."""
    request = (asked.record.get("grading") or {}).get("request") or {}
    return str(asked.record.get(name) or request.get(name) or "")


def question_of(asked: AskedPrompt) -> Question | None:
    """Return a story-world prompt with its judge; None for one from elsewhere."""
    record = asked.record
    try:
        if "prompt" in record:
            return read_question(record)
        return Question(asked.messages, read_request(record, asked.messages), dict(record))
    except (KeyError, TypeError, IndexError, AttributeError):
        return None


def reward_of(setting: str, spec: str, asked: Sequence[AskedPrompt], tokenizer: Tokenizer) -> Reward:
    """Return the reward that a setting names. Raises Llama2Error."""
    if spec != GRADE or Path(spec).exists():
        return resolve_reward(spec, tokenizer=tokenizer)
    found = [question_of(each) for each in asked]
    if not all(found):
        raise ConfigError(
            f"{setting}={GRADE} judges prompts of the story world (safety.jsonl and questions.jsonl of llama2 world) "
            "only; for others name a reward model's folder, or MODULE:FUNCTION"
        )
    return judge([each for each in found if each is not None])
