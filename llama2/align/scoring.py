"""What a reward is: any callable of conversations and answers, reward models among them, and the paper's gate.

    (conversations, answers) -> a number for each answer

A reward model is read in batches of answers of about one length; an answer's score depends neither on the others nor
on padding.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from llama2.align.losses import gated_reward, logit, whiten
from llama2.chat import Conversation
from llama2.checkpoint import hub, store
from llama2.data.examples import Examples, collect
from llama2.data.preferences.batch import lay_out
from llama2.data.preferences.render import render_answer
from llama2.errors import CheckpointError, ConfigError, DataError
from llama2.llm import tokenizer_of
from llama2.model.heads import at_ends, head_names, read_head
from llama2.model.losses import hidden_states
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World
from llama2.tokenizer.tokenizer import Tokenizer

Reward = Callable[[Sequence[Conversation], Sequence[str]], list[float]]
BEYOND = 2
"""Contexts that an answer with its prompt may take: broken bytes, as bad models sample them, are three tokens each when
their text is encoded anew, and rotations have no end. Such an answer must not end a run."""
ASKED_AT_ONCE = 64
"""Answers that a shared reward is asked about at a time, by however many processes: what a model says of an answer
differs in its last bits with the company that it is read in."""
GATE = 0.15
"""Below this probability of being safe an answer counts by its safety (arXiv:2307.09288 sec. 3.2.3)."""


class RewardModel:
    """A loaded reward model; calling it gives the scores of answers, unbounded numbers."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, chat_format: str | None = None, batch_size: int = 32
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.chat_format, self.batch_size = chat_format, batch_size

    @property
    def tells_safety(self) -> bool:
        """Whether it has a head of its own for safety."""
        return "safety" in head_names(self.model)

    def __call__(self, conversations: Sequence[Conversation], answers: Sequence[str]) -> list[float]:
        return self.read("score", conversations, answers).tolist()

    def probabilities(self, conversations: Sequence[Conversation], answers: Sequence[str]) -> Tensor:
        """Return sigmoid of the scores; of a model with a safety head, the probability that an answer is safe, [N]."""
        return self.read("safety" if self.tells_safety else "score", conversations, answers).sigmoid()

    @torch.no_grad()
    def read(self, head: str, conversations: Sequence[Conversation], answers: Sequence[str]) -> Tensor:
        """Return a head's numbers at the last token of each answer, in float32 on the CPU, [N]."""
        if not answers:
            return torch.zeros(0)
        rows = self._rows(conversations, answers)
        # Several answers to one prompt stay together, so that it is read once; else those of about one length.
        repeats = len(conversations) > len({str(each) for each in conversations})
        order = np.arange(len(rows)) if repeats else np.argsort(rows.lengths, kind="stable")
        found = torch.zeros(len(answers))
        device = self.model.norm.weight.device
        for at in range(0, len(order), self.batch_size):
            some = order[at : at + self.batch_size]
            batch, ends = lay_out(rows, some)
            batch = batch.to(device)
            hidden = at_ends(hidden_states(self.model, batch), ends.to(device))
            found[torch.from_numpy(some)] = read_head(self.model, head, hidden).float().cpu()
        return found

    def _rows(self, conversations: Sequence[Conversation], answers: Sequence[str]) -> Examples:
        """Return answers with their prompts as rows. Raises DataError for one that the model cannot read to its end."""
        context, rendered = self.model.config.context_length, []
        for number, (asked, answer) in enumerate(zip(conversations, answers, strict=True)):
            each = render_answer(asked, answer, self.tokenizer, chat_format=self.chat_format)
            if len(each.tokens) > BEYOND * context:
                raise DataError(
                    f"answer {number} has {len(each.tokens)} tokens with its prompt, and the reward model's context "
                    f"holds {context}; take a reward model of a longer context, or shorter answers (max_new_tokens)"
                )
            rendered.append(("", each))
        return collect(rendered, self.tokenizer, name="answers", length=BEYOND * context)


def load_reward(
    path: str | Path, *, device: str = "cpu", dtype: str | None = None, batch_size: int = 32
) -> RewardModel:
    """Load a reward model that `llama2 reward` (or transformers, with one label) wrote."""
    place = hub.resolve(path)
    return RewardModel(store.load_scored(place, device=device, dtype=dtype), tokenizer_of(place), batch_size=batch_size)


class Gate:
    """The paper's two reward models as one: safety where it is at stake, else helpfulness.

    R_c = R_s if the prompt is tagged as unsafe or R_s < threshold, else R_h; calling it gives logit(R_c), which PPO
    whitens over its batch (arXiv:2307.09288 sec. 3.2.3). R_s is the probability of the safety model's second head if
    it has one, else sigmoid of its score; R_h is sigmoid of the helpfulness model's score.
    """

    def __init__(
        self,
        helpfulness: RewardModel,
        safety: RewardModel,
        *,
        is_unsafe: Callable[[Conversation], bool] = lambda conversation: False,
        threshold: float = GATE,
    ):
        self.helpfulness, self.safety = helpfulness, safety
        self.is_unsafe, self.threshold = is_unsafe, threshold

    def __call__(self, conversations: Sequence[Conversation], answers: Sequence[str]) -> list[float]:
        tagged = torch.tensor([self.is_unsafe(each) for each in conversations], dtype=torch.bool)
        safety = self.safety.probabilities(conversations, answers).double()
        helpfulness = self.helpfulness.read("score", conversations, answers).double().sigmoid()
        return logit(gated_reward(safety, helpfulness, tagged, threshold=self.threshold)).tolist()


def whitened(rewards: Sequence[float]) -> list[float]:
    """Return rewards less their mean, over their standard deviation."""
    return whiten(torch.tensor(rewards, dtype=torch.float64)).tolist()


def shared(reward: Reward, world: World) -> Reward:
    """Return a reward whose answers are shared out: each rank is asked about its part, and all get all numbers."""

    def judge(conversations: Sequence[Conversation], answers: Sequence[str]) -> list[float]:
        begins = range(0, len(answers), ASKED_AT_ONCE)
        mine = [slice(begins[i], begins[i] + ASKED_AT_ONCE) for i in world.share(len(begins))]
        return world.gather([number for some in mine for number in reward(conversations[some], answers[some])])

    return judge


def resolve_reward(spec: str, *, safety: str | None = None, tokenizer: Tokenizer | None = None) -> Reward:
    """Return the reward that a setting names: a reward model's folder, or MODULE:FUNCTION of the user's own.

    safety: a second folder; the two then stand behind the gate. tokenizer: the policy's, which a reward model must
    share. Raises ConfigError.
    """
    module, colon, name = spec.partition(":")
    if colon and not Path(spec).exists() and module.replace(".", "").replace("_", "").isalnum():
        if safety is not None:
            raise ConfigError(f"safety_reward={safety} stands beside a reward model, not beside the function {spec}")
        return _imported(module, name)
    models = [_checked(each, tokenizer) for each in (spec, safety) if each is not None]
    return models[0] if len(models) == 1 else Gate(models[0], models[1])


def _imported(module: str, name: str) -> Reward:
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"reward={module}:{name} cannot be imported: {error}; wanted MODULE:FUNCTION on the Python path"
        ) from None
    if not callable(found):
        raise ConfigError(f"reward={module}:{name} is a {type(found).__name__}, not a function")
    return cast(Reward, found)


def _checked(path: str, tokenizer: Tokenizer | None) -> RewardModel:
    model = load_reward(path)
    if tokenizer is not None:
        ours, theirs = tokenizer.vocabulary.pieces, model.tokenizer.vocabulary.pieces
        if ours != theirs:
            differing = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            raise CheckpointError(
                f"reward model {path} has another tokenizer than the model to align (ids differ from {differing} on), "
                "so it was not trained on such answers; train one from the same checkpoint: llama2 reward"
            )
    return model
