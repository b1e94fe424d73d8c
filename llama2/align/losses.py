"""The equations of alignment: pure functions of numbers, each with its source.

    r   a reward                             m   the margin that a rating asks for
    p   ln p of an answer or a token          w, l   the better and the worse answer of a pair
    A   an advantage                         h   (p_w - ref_w) - (p_l - ref_l)

They know no model, no data and no files.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Numbers = Float[Tensor, " N"]

# Reward models


MARGINS = {
    "none": (0.0, 0.0, 0.0, 0.0),
    "small": (1.0, 2 / 3, 1 / 3, 0.0),
    "large": (3.0, 2.0, 1.0, 0.0),
}
"""m for significantly better, better, slightly better, negligibly better / unsure (arXiv:2307.09288 table 27)."""


def ranking_loss(chosen: Numbers, rejected: Numbers, margin: Numbers) -> Numbers:
    """Return -ln sigmoid(r_w - r_l - m) for each pair (arXiv:2307.09288 eq. 2)."""
    return F.softplus(-(chosen - rejected - margin))


def gated_reward(
    safety: Numbers, helpfulness: Numbers, is_safety: Bool[Tensor, " N"], *, threshold: float = 0.15
) -> Numbers:
    """Return R_s where the prompt is tagged as unsafe or R_s < threshold, else R_h (arXiv:2307.09288 sec. 3.2.3).

    Both are probabilities; 0.15 filters unsafe answers with precision 0.89 and recall 0.55 on the paper's test set.
    """
    return torch.where(is_safety | (safety < threshold), safety, helpfulness)


def whiten(values: Numbers, *, shift: bool = True) -> Numbers:
    """Return values less their mean over their standard deviation (of the population); all-equal ones give zeros."""
    mean = values.mean()
    whitened = (values - mean) / (values.var(unbiased=False) + 1e-8).sqrt()
    return whitened if shift else whitened + mean


def logit(probability: Numbers, *, eps: float = 1e-6) -> Numbers:
    """Return ln(p / (1 - p)), the inverse of the sigmoid, for p kept away from 0 and 1."""
    return torch.logit(probability, eps=eps)


# Policy gradients


def policy_loss(
    logprobs: Float[Tensor, "*B"], old: Float[Tensor, "*B"], advantages: Float[Tensor, "*B"], *, clip_ratio: float
) -> Float[Tensor, "*B"]:
    """Return -min(ratio A, clip(ratio, 1 - e, 1 + e) A) for each token, ratio = exp(p - p_old) (arXiv:1707.06347)."""
    ratio = (logprobs - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages)


def value_loss(
    values: Float[Tensor, "*B"], old: Float[Tensor, "*B"], returns: Float[Tensor, "*B"], *, clip: float
) -> Float[Tensor, "*B"]:
    """Return half of the larger of (v - R)^2 and (v clipped to within `clip` of the old one - R)^2, for each token."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)


def generalised_advantages(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    is_answer: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Return advantages and returns of each token of the answers, 0 elsewhere (arXiv:1506.02438).

        delta_t = r_t + gamma v_t+1 - v_t,   A_t = delta_t + gamma lam A_t+1,   R_t = A_t + v_t

    The tokens of an answer stand together; after its last one there is nothing more to gain.
    """
    values, rewards = (each.masked_fill(~is_answer, 0) for each in (values, rewards))
    advantages = torch.zeros_like(values)
    later_value, later = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * later_value - values[:, t]
        later = (delta + gamma * lam * later).masked_fill(~is_answer[:, t], 0)
        advantages[:, t], later_value = later, values[:, t]
    return advantages, advantages + values


def group_advantages(rewards: Float[Tensor, "P G"], *, unbiased: bool = False) -> Float[Tensor, "P G"]:
    """Return (r - mean) / std over the G answers to each prompt (GRPO, arXiv:2402.03300 sec. 4.1).

    A group whose rewards are all equal teaches nothing: zeros. unbiased: divide the squares by G - 1, as some do.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True, unbiased=unbiased)
    return torch.where(std > 1e-6, centred / std.clamp_min(1e-6), torch.zeros_like(centred))


def kl_estimates(
    logprobs: Float[Tensor, "*B"], reference: Float[Tensor, "*B"]
) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """Return three estimates of KL(policy || reference) from tokens that the policy sampled.

    With x = p_ref - p: k1 = -x, unbiased; k2 = x^2 / 2, of low variance; k3 = e^x - 1 - x, both, and never negative
    (http://joschu.net/blog/kl-approx.html; k3 is GRPO's).
    """
    x = reference - logprobs
    return -x, 0.5 * x**2, x.exp() - 1 - x


# Preferences without sampling


def dpo_loss(h: Numbers, *, beta: float, label_smoothing: float = 0.0) -> Numbers:
    """Return -(1 - e) ln sigmoid(beta h) - e ln sigmoid(-beta h) (arXiv:2305.18290 eq. 7; e > 0 is cDPO)."""
    return (1 - label_smoothing) * F.softplus(-beta * h) + label_smoothing * F.softplus(beta * h)


def ipo_loss(h: Numbers, *, beta: float) -> Numbers:
    """Return (h - 1 / (2 beta))^2 (arXiv:2310.12036 eq. 17)."""
    return (h - 1 / (2 * beta)) ** 2


def hinge_loss(h: Numbers, *, beta: float) -> Numbers:
    """Return max(0, 1 - beta h) (SLiC-HF, arXiv:2305.10425)."""
    return F.relu(1 - beta * h)


def kto_loss(gain: Numbers, is_good: Bool[Tensor, " N"], kl: Float[Tensor, ""], *, beta: float) -> Numbers:
    """Return 1 - sigmoid(beta (gain - kl)) for good answers, 1 - sigmoid(beta (kl - gain)) for bad ones.

    gain: p - ref of each answer. kl: the same for answers to other prompts, their mean, at least 0, as a constant
    (arXiv:2402.01306 sec. 4.1).
    """
    sign = is_good.to(gain.dtype) * 2 - 1
    return 1 - torch.sigmoid(beta * sign * (gain - kl.detach().clamp_min(0)))


def orpo_loss(chosen: Numbers, rejected: Numbers, *, beta: float) -> Numbers:
    """Return -p_w - beta ln sigmoid(ln odds_w - ln odds_l), p per token, odds = e^p / (1 - e^p) (arXiv:2403.07691)."""

    def log_odds(p: Tensor) -> Tensor:
        return p - torch.log1p(-p.exp().clamp_max(1 - 1e-6))

    return -chosen + beta * F.softplus(-(log_odds(chosen) - log_odds(rejected)))


def simpo_loss(chosen: Numbers, rejected: Numbers, *, beta: float, gamma: float) -> Numbers:
    """Return -ln sigmoid(beta (p_w - p_l) - gamma), p per token (arXiv:2405.14734 eq. 6)."""
    return F.softplus(-(beta * (chosen - rejected) - gamma))


def per_row(values: Float[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> tuple[Numbers, Numbers]:
    """Return the sums of per-token values over the trained tokens of each row, and how many these are."""
    return values.sum(1), (targets != -100).sum(1).to(values.dtype)
