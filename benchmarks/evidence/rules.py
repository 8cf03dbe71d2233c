"""Weights and virtual margins that are worked out on validation pairs, before a policy trains and never from test pairs."""

from __future__ import annotations

from dataclasses import replace

import torch
from mrpo_kernels import CombinedReferences
from torch import Tensor

from benchmarks.evidence.study import BETA, Method
from mrpo_scale.objective import combine
from mrpo_scale.references.validation_weights import validation_weights


def margins(logps: Tensor) -> Tensor:
    """[..., N, 2] -> [..., N], chosen minus rejected."""
    return logps[..., 0] - logps[..., 1]


def _minimise(parameters: list[Tensor], loss_of: object) -> None:
    """Minimise a smooth function of a few numbers, deterministically."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()  # type: ignore[operator]
        loss.backward()
        return loss

    optimizer.step(closure)


def fitted_weights(margin_KN: Tensor) -> tuple[float, ...]:
    """The point w of the simplex, and a scale s > 0, that make the mean over pairs of log sigmoid(s * sum_k w_k margin_k) largest,
    with a ridge of 0.001 on the logs of both."""
    logits_K = torch.zeros(len(margin_KN), dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    m_KN = margin_KN.double()

    def loss() -> Tensor:
        mixed_N = log_scale.exp() * (logits_K.softmax(0) @ m_KN)
        return -torch.nn.functional.logsigmoid(mixed_N).mean() + 1e-3 * (logits_K.square().sum() + log_scale.square())

    _minimise([logits_K, log_scale], loss)
    weights = logits_K.detach().softmax(0)
    return tuple((weights / weights.sum()).tolist())


def calibration(features_FN: Tensor) -> Tensor:
    """[F] coefficients of a logistic regression without intercept (swapping the answers negates all), ridge 0.01 on features
    of unit size; for features as they came."""
    x_FN = features_FN.double()
    size_F1 = x_FN.square().mean(1, keepdim=True).sqrt().clamp(min=1e-9)
    coefficients_F = torch.zeros(len(x_FN), dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        fit_N = coefficients_F @ (x_FN / size_F1)
        return -torch.nn.functional.logsigmoid(fit_N).mean() + 0.01 * coefficients_F.square().sum()

    _minimise([coefficients_F], loss)
    return coefficients_F.detach() / size_F1[:, 0]


def weights_of(method: Method, validation_KN2: Tensor) -> tuple[float, ...] | None:
    """The fixed weights [K] that ``method.weights`` asks for; None where it asks for none."""
    if method.weights is None:
        return None
    if method.weights == "validation":
        return validation_weights(validation_KN2, method.references)
    margin_KN = margins(validation_KN2)
    if method.weights == "one-hot":
        best = int((margin_KN > 0).sum(1).argmax())
        return tuple(float(k == best) for k in range(len(margin_KN)))
    assert method.weights == "fitted", method.weights
    return fitted_weights(margin_KN)


def combined(
    method: Method, ref_logps_KN2: Tensor, validation_N: Tensor, length_difference_N: Tensor
) -> CombinedReferences:
    """All N pairs' virtual reference under ``method``.

    Args:
        validation_N: indices of the pairs that weights and rules are worked out on.
        length_difference_N: the policy's tokens, chosen minus rejected.
    """
    objective = method.objective(weights_of(method, ref_logps_KN2[:, validation_N]))
    references = combine(ref_logps_KN2, objective)
    if method.rule is None:
        return references
    margin_KN = margins(ref_logps_KN2)
    if method.rule == "agree":
        agree_N = (margin_KN > 0).all(0) | (margin_KN < 0).all(0)
        wanted_N = torch.where(agree_N, margin_KN.mean(0), margin_KN[0])
    else:
        assert method.rule == "calibrated", method.rule
        features_FN = torch.cat([margin_KN, length_difference_N[None]])
        wanted_N = (calibration(features_FN[:, validation_N]) @ features_FN.double()).float() / BETA
    half_N = wanted_N / 2
    level_N = references.virtual_logps_P2.mean(1)
    return replace(references, virtual_logps_P2=torch.stack([level_N + half_N, level_N - half_N], 1))
