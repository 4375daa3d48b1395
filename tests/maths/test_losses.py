"""Losses against unevaluated arithmetic, their gradients, and what must carry none."""

import math

import pytest
import torch

from rlbook.maths import losses

LOGITS = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # probabilities ¼, ¾ and ½, ½
ACTIONS = torch.tensor([1, 0])
VALID = torch.tensor([True, False])


def close(found: torch.Tensor, expected: object) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype))


def test_masked_mean_divides_by_the_valid_rows() -> None:
    x = torch.tensor([1.0, 2.0, math.nan])
    assert losses.masked_mean(x, torch.tensor([True, True, False])).item() == (1 + 2) / 2
    assert losses.masked_mean(x[:2]).item() == (1 + 2) / 2
    assert losses.masked_mean(x, torch.tensor([False] * 3)).item() == 0.0


def test_log_prob_and_entropy() -> None:
    close(losses.log_prob(LOGITS, ACTIONS), [math.log(3 / 4), math.log(1 / 2)])
    close(losses.log_prob(LOGITS, ACTIONS.int()), [math.log(3 / 4), math.log(1 / 2)])
    first = -(1 / 4 * math.log(1 / 4) + 3 / 4 * math.log(3 / 4))
    close(losses.entropy(LOGITS), [first, math.log(2)])
    close(losses.entropy_loss(logits=LOGITS), -(first + math.log(2)) / 2)
    close(losses.entropy_loss(logits=LOGITS, valid=VALID), -first)


def test_policy_gradient_loss_and_its_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    advantages = torch.tensor([2.0, -1.0], requires_grad=True)
    loss = losses.policy_gradient_loss(logits=logits, actions=ACTIONS, advantages=advantages)
    close(loss, -(2 * math.log(3 / 4) - 1 * math.log(1 / 2)) / 2)
    loss.backward()
    # ∂(-A log π(a)) / ∂ logits = A (π - one_hot(a)), and the mean of two rows
    close(logits.grad, [[2 * (1 / 4) / 2, 2 * (3 / 4 - 1) / 2], [-(1 / 2 - 1) / 2, -(1 / 2) / 2]])
    assert advantages.grad is None
    masked = losses.policy_gradient_loss(
        logits=LOGITS, actions=ACTIONS, advantages=advantages, valid=VALID
    )
    close(masked, -2 * math.log(3 / 4))


def test_value_loss() -> None:
    values = torch.tensor([1.0, 5.0], requires_grad=True)
    targets = torch.tensor([3.0, 2.0], requires_grad=True)
    loss = losses.value_loss(values=values, targets=targets)
    assert loss.item() == 0.5 * (2**2 + 3**2) / 2
    loss.backward()
    close(values.grad, [(1 - 3) / 2, (5 - 2) / 2])
    assert targets.grad is None
    assert losses.value_loss(values=values, targets=targets, valid=VALID).item() == 0.5 * 2**2


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "moves"),
    [
        (1.1, 1.0, 1.1, True),  # inside: the plain objective
        (1.5, 1.0, 1.2, False),  # good and already much likelier: no reason to go on
        (1.5, -1.0, -1.5, True),  # bad and likelier: must be undone
        (0.5, 1.0, 0.5, True),  # good and less likely: must be undone
        (0.5, -1.0, -0.8, False),  # bad and already much less likely
    ],
)
def test_the_clipping_cases_of_ppo(
    ratio: float, advantage: float, expected: float, moves: bool
) -> None:
    log_probs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss, metrics = losses.clipped_surrogate_loss(
        log_probs=log_probs,
        behaviour_log_probs=old,
        advantages=torch.tensor([advantage], dtype=torch.float64),
        clip=0.2,
    )
    close(loss, -expected)
    loss.backward()
    close(log_probs.grad, [-ratio * advantage if moves else 0.0])
    assert old.grad is None
    assert metrics["clip_fraction"].item() == float(abs(ratio - 1) > 0.2)
    close(metrics["approx_kl"], ratio - 1 - math.log(ratio))
    assert not any(metric.requires_grad for metric in metrics.values())


def test_clipped_surrogate_counts_valid_rows_only() -> None:
    loss, metrics = losses.clipped_surrogate_loss(
        log_probs=torch.tensor([0.0, 5.0]),
        behaviour_log_probs=torch.zeros(2),
        advantages=torch.tensor([3.0, 7.0]),
        clip=0.2,
        valid=VALID,
    )
    assert loss.item() == -3.0
    assert [m.item() for m in metrics.values()] == [0.0, 0.0]


def test_clipped_value_loss_takes_the_larger_error() -> None:
    values = torch.tensor([2.0, 2.0, 0.1], requires_grad=True)
    loss = losses.clipped_value_loss(
        values=values,
        behaviour_values=torch.zeros(3),
        targets=torch.tensor([3.0, 1.8, 1.0]),
        clip=0.5,
    )
    # V_clip = 0.5, 0.5, 0.1
    close(loss, 0.5 * ((0.5 - 3) ** 2 + (0.5 - 1.8) ** 2 + (0.1 - 1) ** 2) / 3)
    loss.backward()
    close(values.grad, [0.0, 0.0, (0.1 - 1) / 3])


Q_TM1 = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
Q_T = torch.tensor([[7.0, 9.0, 8.0], [1.0, 0.0, 2.0]])
STEP = {
    "a_tm1": torch.tensor([2, 0]),
    "r_t": torch.tensor([0.5, -1.0]),
    "discount_t": torch.tensor([0.9, 0.0]),
}


def test_q_td_errors() -> None:
    q_tm1, q_t = Q_TM1.clone().requires_grad_(), Q_T.clone().requires_grad_()
    errors = losses.q_td_errors(q_tm1=q_tm1, q_t=q_t, **STEP)
    close(errors, [0.5 + 0.9 * 9 - 3, -1.0 - 4])
    errors.sum().backward()
    close(q_tm1.grad, [[0, 0, -1.0], [-1.0, 0, 0]])
    assert q_t.grad is None


def test_double_q_td_errors_choose_with_one_and_judge_with_the_other() -> None:
    q_tm1 = Q_TM1.clone().requires_grad_()
    selector = torch.tensor([[5.0, 0.0, 1.0], [0.0, 1.0, 0.0]], requires_grad=True)
    errors = losses.double_q_td_errors(q_tm1=q_tm1, q_t_selector=selector, q_t_value=Q_T, **STEP)
    close(errors, [0.5 + 0.9 * 7 - 3, -1.0 - 4])
    errors.sum().backward()
    assert selector.grad is None and q_tm1.grad is not None
    same = losses.double_q_td_errors(q_tm1=Q_TM1, q_t_selector=Q_T, q_t_value=Q_T, **STEP)
    close(same, losses.q_td_errors(q_tm1=Q_TM1, q_t=Q_T, **STEP))


def test_huber_is_a_parabola_and_then_a_line() -> None:
    x = torch.tensor([-3.0, -0.5, 0.0, 1.0, 4.0], requires_grad=True)
    close(losses.huber(x), [3 - 0.5, 0.5 * 0.25, 0.0, 0.5, 4 - 0.5])
    close(losses.huber(x, delta=2.0), [2 * (3 - 1), 0.5 * 0.25, 0.0, 0.5, 2 * (4 - 1)])
    losses.huber(x).sum().backward()
    close(x.grad, [-1.0, -0.5, 0.0, 1.0, 1.0])


def test_normalize_advantages_over_valid_rows() -> None:
    valid = torch.tensor([True, True, True, False])
    x = torch.tensor([1.0, 2.0, 6.0, 1e6], dtype=torch.float64)
    std = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 3)
    close(losses.normalize_advantages(x, valid), [(1 - 3) / std, (2 - 3) / std, (6 - 3) / std, 0.0])
    close(losses.normalize_advantages(x[:3]), [(1 - 3) / std, (2 - 3) / std, (6 - 3) / std])
    assert losses.normalize_advantages(x[:1]).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_in_is_dtype_out(dtype: torch.dtype) -> None:
    logits, x = LOGITS.to(dtype), torch.ones(2, dtype=dtype)
    clipped, metrics = losses.clipped_surrogate_loss(
        log_probs=x, behaviour_log_probs=x, advantages=x, clip=0.1, valid=VALID
    )
    step = {name: t.to(dtype) if t.is_floating_point() else t for name, t in STEP.items()}
    found = [
        losses.policy_gradient_loss(logits=logits, actions=ACTIONS, advantages=x, valid=VALID),
        losses.entropy_loss(logits=logits, valid=VALID),
        losses.value_loss(values=x, targets=x, valid=VALID),
        clipped,
        *metrics.values(),
        losses.clipped_value_loss(values=x, behaviour_values=x, targets=x, clip=0.1),
        losses.q_td_errors(q_tm1=Q_TM1.to(dtype), q_t=Q_T.to(dtype), **step),
        losses.huber(x),
        losses.normalize_advantages(x, VALID),
    ]
    assert {tensor.dtype for tensor in found} == {dtype}


def test_shapes_that_would_broadcast_are_refused() -> None:
    column, row = torch.zeros(2, 1), torch.zeros(2)
    for match, call in (
        ("targets has shape", lambda: losses.value_loss(values=row, targets=column)),
        ("actions has shape", lambda: losses.log_prob(LOGITS, ACTIONS[:, None])),
        ("actions must be an int64", lambda: losses.log_prob(LOGITS, row)),
        ("q_t has shape", lambda: losses.q_td_errors(q_tm1=Q_TM1, q_t=Q_T[:, :2], **STEP)),
        (
            "r_t has shape",
            lambda: losses.q_td_errors(q_tm1=Q_TM1, q_t=Q_T, **{**STEP, "r_t": column}),
        ),
        ("valid is", lambda: losses.masked_mean(row, VALID[:1])),
        ("delta must be greater than", lambda: losses.huber(row, delta=0.0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
