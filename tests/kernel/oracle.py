"""What kernels are compared with: the definition on full logits, in float64 (exact) and in their own dtype (plain torch)."""

import torch
from torch import Tensor

OPTIONS = [{}, {"softcap": 3.0}, {"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 1.7}]


def plain_logits(hidden_TD, weight_VD, bias_V, softcap=None, logit_scale=1.0):
    """[T, V] in the inputs' dtype."""
    logits_TV = hidden_TD @ weight_VD.T
    logits_TV = (logits_TV if bias_V is None else logits_TV + bias_V) * logit_scale
    return logits_TV if softcap is None else softcap * torch.tanh(logits_TV / softcap)


def plain_logps(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, softcap=None, logit_scale=1.0):
    """[S] in the inputs' dtype."""
    logits_TV = plain_logits(hidden_TD, weight_VD, bias_V, softcap, logit_scale)
    logps_T = logits_TV.log_softmax(-1).gather(1, labels_T[:, None]).squeeze(1)
    return torch.stack([part.sum() for part in logps_T.split(cu_seqlens.diff().tolist())])


def float32_rounding(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, **options):
    """[S] float64: what each log-prob is off by once the two terms of its tokens, the label's logit and the logsumexp, are rounded
    to float32, at worst. The least that can be promised by whoever forms them in float32."""
    logits_TV = plain_logits(*doubled([hidden_TD, weight_VD, bias_V]), **options)
    terms_T = logits_TV.gather(1, labels_T[:, None]).squeeze(1).abs() + logits_TV.logsumexp(1).abs()
    sums_S = torch.stack([part.sum() for part in terms_T.split(cu_seqlens.diff().tolist())])
    return torch.finfo(torch.float32).eps / 2 * sums_S


def with_gradients(function, tensors, upstream):
    """[function(*tensors), its gradient in each tensor], given the gradient of its value; None stays None."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    value.backward(torch.as_tensor(upstream).to(value))
    return [value.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def doubled(tensors):
    return [None if t is None else t.double() for t in tensors]


def error(got: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The largest, in units of ``dtype``'s last digit of the largest exact value; never less than infinite for a NaN."""
    worst = (got.double() - exact).abs().max() / (torch.finfo(dtype).eps * exact.abs().max().clamp(min=1e-300))
    return worst.item() if worst.isfinite() else torch.inf


def assert_no_worse_than_plain(got, plain, exact, dtype, name="", conditioning=None):
    """At most twice plain torch's own error, and one last digit; and, where what is computed magnifies the rounding of log-probs,
    ``conditioning``: how far that moves the exact value."""
    mine, torchs = error(got, exact, dtype), error(plain, exact, dtype)
    slack = 1.0 if conditioning is None else 1.0 + error(exact + conditioning, exact, dtype)
    assert mine <= 2 * torchs + slack, (name, mine, torchs, slack)
