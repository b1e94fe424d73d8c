"""Every loss against numbers worked out by hand."""

import math

import pytest
import torch

from llama2.align.losses import (
    MARGINS,
    dpo_loss,
    gated_reward,
    generalised_advantages,
    group_advantages,
    hinge_loss,
    ipo_loss,
    kl_estimates,
    kto_loss,
    logit,
    orpo_loss,
    policy_loss,
    ranking_loss,
    simpo_loss,
    value_loss,
    whiten,
)  # fmt: skip


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_ranking_loss_with_margins():
    margins = t(0, 1 / 3, 2 / 3, 1, 2, 3)
    found = ranking_loss(
        torch.full((6,), 1.3, dtype=torch.float64), torch.full((6,), 0.4, dtype=torch.float64), margins
    )
    wanted = [0.341153875, 0.449426916, 0.583270687, 0.744396660, 1.387335325, 2.215519523]
    assert found.tolist() == pytest.approx(wanted, abs=1e-9)
    assert MARGINS["small"] == pytest.approx((1, 2 / 3, 1 / 3, 0)) and MARGINS["large"] == (3, 2, 1, 0)


def test_ranking_loss_of_far_apart_rewards_is_finite():
    found = ranking_loss(t(-1e4, 1e4), t(1e4, -1e4), t(0, 0))
    assert found.tolist() == [2e4, 0.0]


def test_the_gate_and_its_whitening():
    gated = gated_reward(
        t(0.10, 0.20, 0.95, 0.90), t(0.90, 0.90, 0.40, 0.70), torch.tensor([False, False, True, False])
    )
    assert gated.tolist() == pytest.approx([0.10, 0.90, 0.95, 0.70])
    raw = logit(gated)
    assert raw.tolist() == pytest.approx([-2.197224577, 2.197224577, 2.944438979, 0.847297860], abs=1e-9)
    wanted = [-1.600382011, 0.635688678, 1.015901115, -0.051207781]
    assert whiten(raw).tolist() == pytest.approx(wanted, abs=1e-8)
    assert whiten(raw, shift=False).tolist() == pytest.approx([each + float(raw.mean()) for each in wanted], abs=1e-8)


def test_whitening_of_equal_rewards_is_zero():
    assert whiten(t(0.3, 0.3, 0.3)).tolist() == [0, 0, 0]


def test_policy_loss_clips_only_what_gains():
    old = t(0, 0, 0, 0)
    ratios, advantages = t(1.3, 0.7, 1.3, 0.7), t(1, 1, -1, -1)
    found = policy_loss(ratios.log(), old, advantages, clip_ratio=0.2)
    assert found.tolist() == pytest.approx([-1.2, -0.7, 1.3, 0.8])


def test_value_loss_takes_the_worse_of_both():
    found = value_loss(t(1.0, 1.0), t(0.5, 0.5), t(2.0, 0.0), clip=0.2)
    assert found.tolist() == pytest.approx([0.5 * 1.3**2, 0.5 * 1.0])  # v clipped to 0.7: 1.69; else 1


def test_generalised_advantages_by_hand():
    # One answer of three tokens between a prompt and padding: rewards 0, 0, 1; values 0.5, 0.4, 0.2; lam 0.9
    rewards, values = t(9, 0, 0, 1, 9)[None], t(9, 0.5, 0.4, 0.2, 9)[None]
    is_answer = torch.tensor([[False, True, True, True, False]])
    advantages, returns = generalised_advantages(rewards, values, is_answer, gamma=1.0, lam=0.9)
    last = 1 - 0.2
    middle = (0.2 - 0.4) + 0.9 * last
    first = (0.4 - 0.5) + 0.9 * middle
    assert advantages[0].tolist() == pytest.approx([0, first, middle, last, 0])
    assert returns[0].tolist() == pytest.approx([0, first + 0.5, middle + 0.4, 1.0, 0])


def test_with_lambda_one_the_return_is_what_is_still_to_come():
    rewards = torch.randn(3, 6, dtype=torch.float64)
    _, returns = generalised_advantages(rewards, torch.randn(3, 6).double(), torch.ones(3, 6).bool(), lam=1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1))


def test_group_advantages():
    rewards = t(1, 0, 0, 1, 1, 0, 0, 0)[None]
    a, b = 1.290994449, -0.774596669
    assert group_advantages(rewards)[0].tolist() == pytest.approx([a, b, b, a, a, b, b, b], abs=1e-9)
    a, b = 1.207614729, -0.724568837
    assert group_advantages(rewards, unbiased=True)[0].tolist() == pytest.approx([a, b, b, a, a, b, b, b], abs=1e-9)


def test_a_group_of_equal_rewards_teaches_nothing():
    assert group_advantages(t(0.7, 0.7, 0.7)[None]).tolist() == [[0, 0, 0]]


def test_kl_estimates():
    k1, k2, k3 = kl_estimates(t(0, 0), t(0.3, -0.3))
    assert k1.tolist() == pytest.approx([-0.3, 0.3]) and k2.tolist() == pytest.approx([0.045, 0.045])
    assert k3.tolist() == pytest.approx([0.049858808, 0.040818221], abs=1e-9)


def test_dpo_loss():
    h = t((-10 + 11) - (-14 + 12))  # 3
    assert dpo_loss(h, beta=0.1).item() == pytest.approx(0.554355244, abs=1e-9)
    smooth = 0.9 * 0.554355244 + 0.1 * (0.554355244 + 0.3)
    assert dpo_loss(h, beta=0.1, label_smoothing=0.1).item() == pytest.approx(smooth, abs=1e-9)


def test_ipo_and_hinge():
    assert ipo_loss(t(3.0), beta=0.1).item() == pytest.approx(4.0)  # (3 - 5)^2
    assert hinge_loss(t(3.0, 30.0), beta=0.1).tolist() == pytest.approx([0.7, 0.0])


def test_kto_loss_mirrors_good_and_bad():
    good, bad = kto_loss(t(2.0, 2.0), torch.tensor([True, False]), t(0.5)[0], beta=0.4).tolist()
    assert good == pytest.approx(1 - 1 / (1 + math.exp(-0.6))) and bad == pytest.approx(1 - 1 / (1 + math.exp(0.6)))
    negative = kto_loss(t(2.0), torch.tensor([True]), t(-3.0)[0], beta=0.4).item()
    assert negative == pytest.approx(1 - 1 / (1 + math.exp(-0.8)))  # a KL below 0 counts as 0


def test_orpo_loss():
    p_w, p_l = math.log(0.5), math.log(0.25)  # odds 1 and 1/3: log odds ratio ln 3
    wanted = -p_w + 0.2 * math.log(1 + 1 / 3)
    assert orpo_loss(t(p_w), t(p_l), beta=0.2).item() == pytest.approx(wanted)


def test_simpo_loss():
    found = simpo_loss(t(-1.0), t(-1.5), beta=2.0, gamma=0.4).item()
    assert found == pytest.approx(math.log(1 + math.exp(-0.6)))
