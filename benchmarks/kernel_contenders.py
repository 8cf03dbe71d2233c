"""What bench_kernels.py times: ours, torch's own ways, and other people's kernels, all on one task.

The task: T response tokens in P pairs of equally long responses, a DPO loss on the sums of their labels' log-probs with reference
log-probs of zero (Liger's fused DPO knows no others without a reference model), gradients in hidden and weight.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mrpo_kernels import linear_preference_loss, sequence_logps
from torch import Tensor

BETA = 0.1
TRL_CHUNK = 32768


@dataclass(frozen=True)
class Case:
    tokens: int
    hidden: int
    vocabulary: int
    response: int  #: tokens of one response

    @property
    def pairs(self) -> int:
        return self.tokens // (2 * self.response)

    @property
    def name(self) -> str:
        return f"T={self.tokens} D={self.hidden} V={self.vocabulary}"

    @property
    def gemm_flops(self) -> int:
        return 2 * self.tokens * self.hidden * self.vocabulary


@dataclass(frozen=True, eq=False)
class Data:
    case: Case
    hidden_TD: Tensor
    weight_VD: Tensor
    labels_T: Tensor
    cu_seqlens: Tensor

    @staticmethod
    def random(case: Case, device: str, dtype: torch.dtype, seed: int = 0) -> Data:
        """Logits with a standard deviation of two nats, so that neither a flat nor a one-word softmax is timed."""
        g = torch.Generator(device).manual_seed(seed)
        hidden_TD = torch.randn(case.tokens, case.hidden, generator=g, device=device, dtype=dtype)
        weight_VD = torch.randn(case.vocabulary, case.hidden, generator=g, device=device, dtype=dtype)
        labels_T = torch.randint(case.vocabulary, (case.tokens,), generator=g, device=device)
        cu_seqlens = torch.arange(0, case.tokens + 1, case.response, device=device, dtype=torch.int32)
        return Data(case, hidden_TD, weight_VD.mul_(2 * case.hidden**-0.5), labels_T, cu_seqlens)


def dpo_losses(logps_P2: Tensor, _pairs: slice = slice(None)) -> Tensor:
    return -F.logsigmoid(BETA * (logps_P2[:, 0] - logps_P2[:, 1]))


def _dpo_of_tokens(token_logps_T: Tensor, case: Case) -> Tensor:
    return dpo_losses(token_logps_T.view(case.pairs, 2, case.response).sum(-1)).mean()


def full_logits(data: Data, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    logps_TV = (hidden_TD @ weight_VD.t()).float().log_softmax(-1)
    return _dpo_of_tokens(logps_TV.gather(1, data.labels_T[:, None]), data.case)


def _recompute(impl: str) -> LossFunction:
    def loss(data: Data, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        logps_S = sequence_logps(hidden_TD, weight_VD, data.labels_T, data.cu_seqlens, impl=impl)
        return dpo_losses(logps_S.view(-1, 2)).mean()

    return loss


def one_pass(data: Data, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    def share(logps_C2: Tensor, pairs: slice) -> Tensor:
        return dpo_losses(logps_C2, pairs) / data.case.pairs

    return linear_preference_loss(hidden_TD, weight_VD, data.labels_T, data.cu_seqlens, share).loss


def _compiled() -> LossFunction:
    @torch.compile(dynamic=False)
    def loss(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, pairs: int) -> Tensor:
        logps_TV = (hidden_TD @ weight_VD.t()).float().log_softmax(-1)
        return dpo_losses(logps_TV.gather(1, labels_T[:, None]).view(pairs, 2, -1).sum(-1)).mean()

    return lambda data, hidden_TD, weight_VD: loss(hidden_TD, weight_VD, data.labels_T, data.case.pairs)


def _torch_linear_cross_entropy() -> LossFunction:
    function, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()

    def loss(data: Data, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        nll_T = function(hidden_TD, weight_VD, data.labels_T, reduction="none", options=options)
        return _dpo_of_tokens(-nll_T.float(), data.case)

    return loss


def _cut_cross_entropy(impl: str) -> LossFunction:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def loss(data: Data, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        nll_T = function(hidden_TD, weight_VD, data.labels_T, reduction="none", impl=impl)
        return _dpo_of_tokens(-nll_T.float(), data.case)

    return loss


def _liger_dpo() -> LossFunction:
    module = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(
        beta=BETA, use_ref_model=False
    )

    def loss(data: Data, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        """It wants [2P, tokens, D], all chosen responses before all rejected ones."""
        case = data.case
        hidden = hidden_TD.view(case.pairs, 2, case.response, -1).transpose(0, 1).flatten(0, 1)
        labels = data.labels_T.view(case.pairs, 2, case.response).transpose(0, 1).flatten(0, 1)
        result = module(weight_VD, hidden, labels)
        return result[0] if isinstance(result, tuple) else result

    return loss


def _liger_cross_entropy() -> LossFunction:
    module = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda data, hidden_TD, weight_VD: module(weight_VD, hidden_TD, data.labels_T)


def _trl_chunked() -> LossFunction:
    """TRL 1.16's, which its DPOTrainer calls with this chunk of the vocabulary where full logits are not wanted."""
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def loss(data: Data, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        logps_T, *_ = function.apply(hidden_TD, weight_VD, None, data.labels_T, 1.0, TRL_CHUNK, None, 1.0, ())
        return _dpo_of_tokens(logps_T.float(), data.case)

    return loss


def _quack() -> LossFunction:
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda data, hidden_TD, weight_VD: function(hidden_TD, weight_VD, data.labels_T, reduction="sum")


LossFunction = Callable[[Data, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """``make`` imports what it needs and raises where that is missing. ``target``: which function it computes: ``dpo`` or ``nll``
    (cross entropy, summed; the same products, so its times compare)."""

    name: str
    make: Callable[[], LossFunction]
    devices: tuple[str, ...] = ("cpu", "cuda")
    target: str = "dpo"


PLAIN = "full logits"
CONTENDERS = [
    Contender(PLAIN, lambda: full_logits),
    Contender("full logits, torch.compile", _compiled, ("cuda",)),
    # On two busy CPU cores its chunks took 7 to 14 times as long as full logits: minutes a round.
    Contender("F.linear_cross_entropy", _torch_linear_cross_entropy, ("cuda",)),
    Contender("ours: recompute, Triton forward", lambda: _recompute("triton"), ("cuda",)),
    Contender("ours: recompute, torch tiles", lambda: _recompute("torch")),
    Contender("ours: linear_preference_loss", lambda: one_pass),
    Contender("Liger fused linear DPO", _liger_dpo, ("cuda",)),
    Contender("Liger fused linear cross entropy", _liger_cross_entropy, ("cuda",), "nll"),
    Contender("TRL chunked log-probs", _trl_chunked),
    Contender("QuACK chunked linear cross entropy", _quack, ("cuda",), "nll"),
    Contender("Cut Cross Entropy", lambda: _cut_cross_entropy("cce"), ("cuda",)),
    Contender("Cut Cross Entropy, exact", lambda: _cut_cross_entropy("cce_exact"), ("cuda",)),
]


@dataclass(frozen=True)
class Exact:
    """Float64 values: the loss over all tokens, gradients of sampled rows. Keys of ``errors`` say which."""

    loss: Tensor
    rows: Tensor
    d_hidden_RD: Tensor
    words: Tensor
    d_weight_RD: Tensor

    def errors(self, loss: Tensor, d_hidden_TD: Tensor | None, d_weight_VD: Tensor | None) -> dict[str, float]:
        """Relative errors in the 2-norm."""
        pairs = {"loss": (loss.detach(), self.loss)}
        if d_hidden_TD is not None and d_weight_VD is not None:
            pairs["d_hidden"] = (d_hidden_TD[self.rows], self.d_hidden_RD)
            pairs["d_weight"] = (d_weight_VD[self.words], self.d_weight_RD)
        return {name: ((got.double() - exact).norm() / exact.norm()).item() for name, (got, exact) in pairs.items()}


@torch.no_grad()
def exact_values(data: Data, target: str, average: bool = False, samples: int = 256) -> Exact:
    """The task in float64, in blocks, so that it fits where its logits would not.

    Args:
        average: per-token means instead of sums in the margin; some versions of Liger's DPO do that.
    """
    case, device = data.case, data.hidden_TD.device
    hidden_TD = data.hidden_TD.double()
    logsumexp_T = torch.full((case.tokens,), -torch.inf, dtype=torch.float64, device=device)
    for start in range(0, case.vocabulary, 8192):
        weight_BD = data.weight_VD[start : start + 8192].double()
        for block in torch.arange(case.tokens, device=device).split(4096):
            logits_BB = hidden_TD[block] @ weight_BD.t()
            logsumexp_T[block] = torch.logaddexp(logsumexp_T[block], logits_BB.logsumexp(1))
    logps_T = torch.cat(
        [
            (hidden_TD[b] * data.weight_VD[data.labels_T[b]].double()).sum(1)
            for b in torch.arange(case.tokens, device=device).split(4096)
        ]
    )
    logps_T -= logsumexp_T
    with torch.enable_grad():
        leaf_T = logps_T.requires_grad_()
        loss = -leaf_T.sum() if target == "nll" else _dpo_of_tokens(leaf_T / (case.response if average else 1), case)
        (d_token_T,) = torch.autograd.grad(loss, leaf_T)

    g = torch.Generator().manual_seed(1)
    rows = torch.randperm(case.tokens, generator=g)[:samples].to(device)
    # Half of the words are labels, whose gradients have the onehot in them.
    words = torch.cat(
        [data.labels_T[rows[: samples // 2]].cpu(), torch.randint(case.vocabulary, (samples // 2,), generator=g)]
    )
    words = words.unique().to(device)
    d_hidden_RD = data.weight_VD[data.labels_T[rows]].double()
    for start in range(0, case.vocabulary, 8192):
        weight_BD = data.weight_VD[start : start + 8192].double()
        d_hidden_RD -= (hidden_TD[rows] @ weight_BD.t() - logsumexp_T[rows, None]).exp() @ weight_BD
    d_hidden_RD *= d_token_T[rows, None]
    softmax_TR = (hidden_TD @ data.weight_VD[words].double().t() - logsumexp_T[:, None]).exp()
    d_logits_TR = d_token_T[:, None] * ((data.labels_T[:, None] == words).double() - softmax_TR)
    return Exact(loss.detach(), rows, d_hidden_RD, words, d_logits_TR.t() @ hidden_TD)
