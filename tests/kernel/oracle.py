"""What kernels are compared with: the definition on full logits, in float64 (exact) and in their own dtype (plain torch)."""

import torch
from torch import Tensor

OPTIONS = [{}, {"softcap": 3.0}, {"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 1.7}]


def plain_logps(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, softcap=None, logit_scale=1.0):
    """[S] in the inputs' dtype."""
    logits_TV = hidden_TD @ weight_VD.T
    logits_TV = (logits_TV if bias_V is None else logits_TV + bias_V) * logit_scale
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    logps_T = logits_TV.log_softmax(-1).gather(1, labels_T[:, None]).squeeze(1)
    return torch.stack([part.sum() for part in logps_T.split(cu_seqlens.diff().tolist())])


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


def assert_no_worse_than_plain(got, plain, exact, dtype, name=""):
    """At most twice plain torch's own error, and one last digit. Lists: the worst of several draws, because which of two sums
    rounds the better is a matter of luck."""
    if isinstance(got, Tensor):
        got, plain, exact = [got], [plain], [exact]
    mine, torchs = (max(error(g, x, dtype) for g, x in zip(values, exact, strict=True)) for values in (got, plain))
    assert mine <= 2 * torchs + 1, (name, mine, torchs)
