"""Proximal policy optimisation: prompts and a reward in, an adapter that answers better out.

    maximise E[ whiten(R(g | p)) - beta KL(policy || reference) ]                 arXiv:2307.09288 sec. 3.2.3

The reward stands at the last token of an answer, the divergence is taken off token by token; advantages are GAE's
(arXiv:1506.02438), the step is clipped (arXiv:1707.06347), and each mini-batch is seen once. The paper says nothing of
the value model: here it is an adapter of its own with a scalar head upon the same frozen weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama2.align.learn import Learner, learn
from llama2.align.losses import generalised_advantages, group_advantages, kl_estimates, policy_loss, value_loss
from llama2.align.online import Collected, told_of
from llama2.align.online_config import PpoConfig
from llama2.align.policy import POLICY, VALUE, speaking_as, values_of
from llama2.align.rollout import Sampled
from llama2.data.batch import IGNORE, Batch
from llama2.data.preferences.batch import lay_out
from llama2.model.losses import hidden_states, logprobs_and_entropy
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World
from llama2.train.run import Outcome

PLOTS = {
    "reward": "Reward of sampled answers",
    "kl": "Divergence from the reference, nats per answer",
    "entropy": "Entropy, nats per token",
    "clip_fraction": "Tokens whose step was clipped",
    "value_error": "Square error of the value model over the variance of returns",
    "answer_tokens": "Tokens per answer",
}


@dataclass(frozen=True)
class PpoBatch:
    """Answers as rows, and what was known of each token when it was sampled; all [B T], 0 outside of answers."""

    rows: Batch
    old: Tensor
    """ln p under the policy that sampled."""
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def to(self, device: torch.device | str) -> "PpoBatch":
        return PpoBatch(
            self.rows.to(device), *(each.to(device) for each in (self.old, self.values, self.advantages, self.returns))
        )


def ppo(config: PpoConfig) -> Outcome:
    """Align a model by PPO. Raises Llama2Error before any long work for what cannot work."""
    return learn(config, Ppo, adapters=(POLICY, VALUE), n_answers=config.n_generations, plots=PLOTS)


class Ppo(Learner[PpoConfig]):
    """What of an iteration is PPO's own: what is learnt from answers, and by which loss."""

    @staticmethod
    def lr_scale(config: PpoConfig, name: str) -> float:
        is_value = name.endswith(f".{VALUE}") or name.startswith("heads.")
        of_value = config.value_lr / config.learning_rate if is_value and config.value_lr else 1.0
        return of_value * Learner.lr_scale(config, name)

    def prepare(self, answers: Sequence[Sampled]) -> Collected:
        rows, known = self.known(answers, with_values=True)
        scores = torch.tensor([each.reward for each in answers], dtype=torch.float64)
        if self.config.whiten_rewards and self.config.whiten_over == "prompt":
            scores = group_advantages(scores.view(-1, self.config.n_generations)).flatten()
        elif self.config.whiten_rewards:
            everyone = torch.tensor(self.world.gather(scores.tolist()), dtype=torch.float64)
            scores = (scores - everyone.mean()) / (everyone.var(unbiased=False) + 1e-8).sqrt()
        learnt = []
        for number, each in enumerate(known):
            kl = kl_estimates(each.old, each.reference)[0]
            rewards = -self.config.kl_coef * kl
            rewards[-1] += scores[number].to(rewards.dtype)
            all_answer = torch.ones(1, len(rewards), dtype=torch.bool)
            advantages, returns = generalised_advantages(
                rewards[None], each.values[None], all_answer, gamma=self.config.gamma, lam=self.config.lam
            )
            learnt.append((each.old, each.values, advantages[0], returns[0]))
        if self.config.whiten_advantages:
            flat = torch.cat([each[2] for each in learnt])
            everyone = torch.tensor(self.world.gather(flat.tolist()), dtype=torch.float64)
            mean, std = everyone.mean(), (everyone.var(unbiased=False) + 1e-8).sqrt()
            learnt = [(old, v, ((a - mean) / std).to(a.dtype), r) for old, v, a, r in learnt]

        def batch(numbers: Sequence[int]) -> PpoBatch:
            laid_out, _ = lay_out(rows, numbers)
            tensors = (self.spread(laid_out, [learnt[i][k] for i in numbers]) for k in range(4))
            return PpoBatch(laid_out, *tensors)

        return Collected(
            answers, batch, told_of(answers, self.world) | self.diagnosed(answers, known) | _fit(learnt, self.world)
        )

    def loss(self, model: Transformer, batch: PpoBatch) -> tuple[Tensor, int, dict[str, float]]:
        is_answer = batch.rows.targets != IGNORE
        with speaking_as(model, POLICY):
            hidden = hidden_states(model, batch.rows)
            logprobs, entropy = logprobs_and_entropy(
                model, batch.rows, temperature=self.config.temperature, hidden=hidden
            )
        values = values_of(model, batch.rows, hidden)
        gain = policy_loss(logprobs, batch.old, batch.advantages, clip_ratio=self.config.clip_ratio)
        error = value_loss(values, batch.values, batch.returns, clip=self.config.value_clip)
        loss = (gain + self.config.vf_coef * error)[is_answer].sum()
        change = (logprobs - batch.old).detach()[is_answer]
        metrics = {
            "entropy": float(entropy[is_answer].sum()),
            "clip_fraction": float(((change.exp() - 1).abs() > self.config.clip_ratio).sum()),
            "kl_of_step": float(kl_estimates(change, torch.zeros_like(change))[2].sum()),
        }
        return loss, int(is_answer.sum()), metrics


def _fit(learnt: Sequence[tuple[Tensor, ...]], world: World) -> dict[str, float]:
    """Return how far the value model's guesses were off before this iteration, 1: no better than a constant."""
    values, returns = (torch.cat([each[k] for each in learnt]).double() for k in (1, 3))
    values, returns = (torch.tensor(world.gather(each.tolist())) for each in (values, returns))
    return {"value_error": float(((returns - values) ** 2).mean() / returns.var(unbiased=False).clamp_min(1e-8))}
