"""Preference rows as rows for supervised finetuning: each prompt and the response that people chose, as TRL reads them."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import datasets

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.data_keys import PairOptions
from mrpo_scale.data.loading import find_layout, load_rows
from mrpo_scale.data.pair_table import as_pairs
from mrpo_scale.data.pairs import BadRow, is_prefilled

logger = logging.getLogger(__name__)


def sft_rows(dataset_name: str, *, split: str = "train", layout: str = "auto") -> datasets.Dataset:
    """Rows ``{prompt, completion}``, of which SFTTrainer learns the completion: messages, or texts where the set has no turns;
    ``tools`` beside them where the set has any. Of ranked answers the best one is taken. What is left out is logged, by reason.

    Args:
        dataset_name: a hub id, a file or a folder, in any layout that `mrpo train` reads.

    Raises:
        ConfigError: it cannot be read, or nothing is left of it.
    """
    options = PairOptions(ranked_pairs="best_vs_worst")
    rows, _ = load_rows(dataset_name, train_split=split, layout=layout, options=options)
    rows, reader = as_pairs(rows, find_layout(rows, layout), options)
    made: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for row in rows:
        try:
            pair = reader.to_pair(row)
        except BadRow as bad:
            left_out[bad.reason] += 1
            continue
        if is_prefilled(pair.prompt):
            left_out["prefilled"] += 1  # SFTTrainer would write a second assistant turn
            continue
        chosen: Any = pair.chosen
        if not isinstance(pair.prompt, str) and isinstance(chosen, str):
            chosen = [{"role": "assistant", "content": chosen}]
        tools = {"tools": pair.tools} if pair.tools else {}
        made.append({"prompt": pair.prompt, "completion": chosen, **tools})
    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.most_common())
    logger.info("%s: %d rows for finetuning%s", dataset_name, len(made), f"; left out: {reasons}" if reasons else "")
    if not made:
        raise ConfigError(f"`{dataset_name}` gives no row for finetuning (left out: {reasons}).")
    return datasets.Dataset.from_list(made)
