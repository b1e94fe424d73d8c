"""Group relative policy optimisation: answers to one prompt are measured by each other, without a value model.

A_i = (r_i - mean) / std over the group,   loss = mean over answers of the mean over tokens of
      -min(ratio A, clip(ratio) A) + beta k3(policy || reference)               arXiv:2402.03300 sec. 4.1

With per_token the mean is over all tokens of all answers, so that long answers teach as much per token as short ones
(DAPO, arXiv:2503.14476 sec. 3.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama2.align.learn import Learner, learn
from llama2.align.losses import group_advantages, kl_estimates, policy_loss
from llama2.align.online import Collected, told_of
from llama2.align.online_config import GrpoConfig
from llama2.align.policy import POLICY, speaking_as
from llama2.align.rollout import Sampled
from llama2.data.batch import IGNORE, Batch
from llama2.data.preferences.batch import lay_out
from llama2.model.losses import logprobs_and_entropy
from llama2.model.transformer import Transformer
from llama2.train.run import Outcome

PLOTS = {
    "reward": "Reward of sampled answers",
    "kl": "Divergence from the reference, nats per answer",
    "entropy": "Entropy, nats per token",
    "clip_fraction": "Tokens whose step was clipped",
    "idle_groups": "Groups of equal rewards, which teach nothing",
    "answer_tokens": "Tokens per answer",
}


@dataclass(frozen=True)
class GrpoBatch:
    """Answers as rows; old and reference are ln p of each token [B T], advantages of each answer [B]."""

    rows: Batch
    old: Tensor
    reference: Tensor
    advantages: Tensor

    def to(self, device: torch.device | str) -> "GrpoBatch":
        return GrpoBatch(
            self.rows.to(device), self.old.to(device), self.reference.to(device), self.advantages.to(device)
        )


def grpo(config: GrpoConfig) -> Outcome:
    """Align a model by GRPO. Raises Llama2Error before any long work for what cannot work."""
    return learn(config, Grpo, adapters=(POLICY,), n_answers=config.n_generations, plots=PLOTS)


class Grpo(Learner[GrpoConfig]):
    """What of an iteration is GRPO's own."""

    def prepare(self, answers: Sequence[Sampled]) -> Collected:
        rows, known = self.known(answers)
        rewards = torch.tensor([each.reward for each in answers], dtype=torch.float64)
        groups = rewards.view(-1, self.config.n_generations)
        advantages = group_advantages(groups, unbiased=self.config.unbiased_std).flatten().float()
        idle = self.world.gather([float(each) for each in (groups.std(1, unbiased=False) < 1e-6)])

        def batch(numbers: Sequence[int]) -> GrpoBatch:
            laid_out, _ = lay_out(rows, numbers)
            old, reference = (
                self.spread(laid_out, [getattr(known[i], name) for i in numbers]) for name in ("old", "reference")
            )
            return GrpoBatch(laid_out, old, reference, advantages[list(numbers)])

        told = told_of(answers, self.world) | self.diagnosed(answers, known)
        return Collected(answers, batch, told | {"idle_groups": sum(idle) / len(idle)})

    def loss(self, model: Transformer, batch: GrpoBatch) -> tuple[Tensor, int, dict[str, float]]:
        is_answer = batch.rows.targets != IGNORE
        with speaking_as(model, POLICY):
            logprobs, entropy = logprobs_and_entropy(model, batch.rows, temperature=self.config.temperature)
        gain = policy_loss(logprobs, batch.old, batch.advantages[:, None], clip_ratio=self.config.clip_ratio)
        kl = kl_estimates(logprobs, batch.reference)[2]
        n_tokens = is_answer.sum(1).clamp_min(1)

        def total(values: Tensor) -> Tensor:
            """Over tokens, or over the means of answers: what is divided by their count."""
            sums = values.masked_fill(~is_answer, 0).sum(1)
            return sums.sum() if self.config.per_token else (sums / n_tokens).sum()

        clipped = ((logprobs - batch.old).detach().exp() - 1).abs() > self.config.clip_ratio
        metrics = {
            "entropy": float(total(entropy)),
            "clip_fraction": float(total(clipped.to(kl.dtype))),
        }
        count = int(is_answer.sum()) if self.config.per_token else len(is_answer)
        return total(gain + self.config.kl_coef * kl), count, metrics
