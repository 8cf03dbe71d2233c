"""Does a saved model give the chosen response the higher log-probability? Scores that no number of processes changes.

The batches are the same whatever the number of ranks, each is scored whole by one rank, and the log-probs of all pairs are brought
together before anything is averaged: one process and two give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.ranks import get_rank, get_world_size, sum_over_ranks
from mrpo_scale.base.tables import aligned_table, number, percent
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.eval.config import EvalConfig
from mrpo_scale.eval.models import EvalModel
from mrpo_scale.references.live import cut_by_tokens, segment_lengths
from mrpo_scale.references.sharding import ShardedReference


@dataclass(frozen=True)
class PairScores:
    """Of N pairs: log-probs of (chosen, rejected), natural, summed over the response's scored tokens; and their numbers."""

    logps_N2: Tensor  #: float64
    lengths_N2: Tensor  #: float64


@dataclass(frozen=True)
class PreferenceResult:
    """What the pairs say of a model.

    Attributes:
        accuracy: share of pairs with log p(chosen) > log p(rejected).
        normalized_accuracy: the same for log-probs per token of the response.
        margin: mean of log p(chosen) - log p(rejected), nats.
        reward_accuracy, reward_margin: of the implicit reward beta * (model - reference); None without a reference.
    """

    pairs: int
    accuracy: float
    normalized_accuracy: float
    margin: float
    reward_accuracy: float | None = None
    reward_margin: float | None = None


def score_model(
    model: EvalModel,
    pairs: PairDataset,
    count: int,
    args: EvalConfig,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> PairScores:
    """Score the first ``count`` pairs. Collective over the world.

    Raises:
        ConfigError: see :class:`ShardedReference`; or a log-prob that is not finite.
    """
    tokens = [pairs.tokens(row)[model.tokenization] for row in range(count)]
    lengths_N2 = torch.tensor([t.scored_lengths for t in tokens], dtype=torch.float64)
    loaded = ShardedReference(model.source, group, device, shared_prompt=args.shared_prompt)
    lengths = segment_lengths(tokens, loaded.shared_prompt)
    order = sorted(range(count), key=lambda i: -lengths[i])
    parts = cut_by_tokens([lengths[i] for i in order], loaded.shared_prompt, args.tokens_per_forward)
    logps_N2 = torch.zeros(count, 2, dtype=torch.float64, device=device)
    for part in tqdm(_of_this_rank(parts), desc=f"Scoring with {model.name}", disable=get_rank() != 0):
        rows = [] if part is None else order[part]
        batch = None
        if rows:
            batch = loaded.batch([tokens[i] for i in rows], model.pad_token_id)
        logps_N2[rows] = loaded.score(batch).double()
    sum_over_ranks(logps_N2)  # every row is zero on all ranks but one, so the sum is exact
    _check_finite(model.name, logps_N2, pairs)
    return PairScores(logps_N2.cpu(), lengths_N2)


def _of_this_rank(parts: Sequence[slice]) -> list[slice | None]:
    """Every n-th batch; all ranks run equally many forwards, since the ranks of a shard group gather weights together."""
    world = get_world_size()
    mine: list[slice | None] = list(parts[get_rank() :: world])
    return mine + [None] * (-(-len(parts) // world) - len(mine))


def _check_finite(name: str, logps_N2: Tensor, pairs: PairDataset) -> None:
    bad = (~logps_N2.isfinite()).any(-1).nonzero().flatten().tolist()
    if bad:
        rows = ", ".join(str(pairs.source_row(row)) for row in bad[:5])
        raise ConfigError(
            f"{name}: log-probs of {len(bad)} pairs are not finite (rows {rows}{', ...' if len(bad) > 5 else ''} of the data "
            "set); its weights are broken, or too large for its `dtype`: try float32."
        )


def summarize(policy: PairScores, reference: PairScores | None, beta: float) -> PreferenceResult:
    """The means over N >= 1 pairs, in float64."""

    def margins(values_N2: Tensor) -> Tensor:
        return values_N2[:, 0] - values_N2[:, 1]

    def share(margins_N: Tensor) -> float:
        return (margins_N > 0).double().mean().item()

    margins_N = margins(policy.logps_N2)
    rewards_N = None if reference is None else beta * margins(policy.logps_N2 - reference.logps_N2)
    return PreferenceResult(
        pairs=len(margins_N),
        accuracy=share(margins_N),
        normalized_accuracy=share(margins(policy.logps_N2 / policy.lengths_N2)),
        margin=margins_N.mean().item(),
        reward_accuracy=None if rewards_N is None else share(rewards_N),
        reward_margin=None if rewards_N is None else rewards_N.mean().item(),
    )


def preference_table(results: dict[str, PreferenceResult], skipped: dict[str, int]) -> str:
    """One line per model, and the pairs that were left out, by reason."""
    header = ("model", "pairs", "accuracy", "per token", "margin (nats)", "reward accuracy", "reward margin")
    rows = [
        (
            name,
            str(r.pairs),
            percent(r.accuracy),
            percent(r.normalized_accuracy),
            number(r.margin, "+.3f"),
            percent(r.reward_accuracy),
            number(r.reward_margin, "+.4f"),
        )
        for name, r in results.items()
    ]
    reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
    return aligned_table(header, rows) + (f"\nskipped for all models: {reasons}" if skipped else "")


def as_json(results: dict[str, PreferenceResult]) -> dict[str, dict[str, float | int | None]]:
    return {name: asdict(result) for name, result in results.items()}
