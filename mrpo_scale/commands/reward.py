"""`mrpo reward`: a Bradley-Terry reward model (Eq. 3) of a recipe's pairs. TRL's RewardTrainer is the engine; rows, tokens and
cuts are those of `mrpo train`."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import set_seed

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.heartbeat import heartbeat, set_activity
from mrpo_scale.base.ranks import barrier, get_rank, get_world_size, sum_of_ranks
from mrpo_scale.config.keys import ScriptArguments
from mrpo_scale.config.recipe import parse
from mrpo_scale.config.reward_keys import RewardConfig
from mrpo_scale.data.inputs import EVAL_SET, TRAIN_SET, prepare_sets, read_rows
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.data.tokenization import ModelText, TextReader
from mrpo_scale.data.toy_world import resolve
from mrpo_scale.lifecycle.output_folder import check_output_folder
from mrpo_scale.lifecycle.template_date import decide_date
from mrpo_scale.models.plan import num_embeddings
from mrpo_scale.references.reward import PlannedReward, RewardModel, load_classifier, plan_reward
from mrpo_scale.reports.html_report import RUN_FACTS
from mrpo_scale.training.preflight import check_evaluation, preflight

logger = logging.getLogger(__name__)

OLDEST_TRL = (1, 16)
RESULTS = "reward.json"  #: what was measured, in ``output_dir``


@dataclass(frozen=True)
class _OneText:
    """A reward model as the data see it (:class:`~mrpo_scale.data.inputs.TextPlan`)."""

    texts: Sequence[ModelText]
    readers: Sequence[TextReader]


def reward(argv: Sequence[str]) -> None:
    """Train what the command line asks for, save it and print how often it ranks held-out pairs right.

    Raises:
        ConfigError, TrainingError: see errors.py.
    """
    if not {"-h", "--help"} & set(argv):
        _check_trl()
    script, config = parse(argv, RewardConfig, prog="mrpo reward", suffix="-reward")
    assert isinstance(config, RewardConfig)
    preflight(config)
    check_output_folder(config, script.model_name_or_path, [])
    if (config.folder / RUN_FACTS).exists():
        raise ConfigError(
            f"`output_dir: {config.folder}` holds a policy that `mrpo train` made; name another folder as --output_dir."
        )
    with heartbeat(config.heartbeat_timeout):
        _reward(script, config)


def _check_trl() -> None:
    found = version("trl") if importlib.util.find_spec("trl") is not None else None
    if found is None or tuple(map(int, found.split(".")[:2])) < OLDEST_TRL:
        has = "there is none here" if found is None else f"here is {found}"
        raise ConfigError(
            f"`mrpo reward` trains with TRL's RewardTrainer, of version {'.'.join(map(str, OLDEST_TRL))} or later, and {has}: "
            "`pip install 'mrpo-scale[rlhf]'`."
        )


def _reward(script: ScriptArguments, config: RewardConfig) -> None:
    if unused := config.unused_keys(script):
        logger.info("keys that have no part in a reward model: %s", ", ".join(sorted(unused)))
    set_activity("reading the data")
    train, held_out = read_rows(script, config)
    check_evaluation(config, held_out)
    planned = _plan(script, config)
    rows = num_embeddings(planned.config)
    texts = _OneText([planned.text], [TextReader(planned.text.name, 0, rows)])
    sets = prepare_sets(texts, config, train, held_out)
    set_activity("training")
    folder = _train(planned, config, sets)
    measured = {
        split: measure(RewardModel.load(folder, device=config.device, dtype=planned.source.dtype), pairs)
        for split, pairs in sets.items()
        if split != TRAIN_SET
    }
    if config.process_index == 0:
        results = {"pairs": len(sets[TRAIN_SET]), "learning_rate": config.learning_rate, "held_out": measured}
        (config.folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
        for split, result in measured.items():
            print(
                f"{split}: {result['accuracy']:.1%} of {result['pairs']:.0f} pairs ranked right, r_chosen - r_rejected "
                f"{result['margin']:+.4f} on average",
                flush=True,
            )
        if not measured:
            print("no held-out pairs: name a test split or set `held_out` to measure the model", flush=True)
        print(f"reward model: {config.output_dir}", flush=True)


def _plan(script: ScriptArguments, config: RewardConfig) -> PlannedReward:
    spec = {
        "model": resolve(str(script.model_name_or_path)),
        "revision": config.model_revision,
        "chat_template": config.chat_template,
        "system": config.system,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": config.attn_implementation,
    }
    return plan_reward(
        spec,
        device=config.device,
        dtype=config.policy_dtype,
        plain_template=config.plain_template,
        date=decide_date(config),
        to_train=True,
    )


def _train(planned: PlannedReward, config: RewardConfig, sets: dict[str, PairDataset]) -> str:
    """Train and save in ``output_dir``, which is returned. Collective over the world."""
    import trl  # an extra, and seconds

    set_seed(config.seed)  # of the new head
    model = load_classifier(planned)
    if not planned.has_head:
        logger.info(
            "%s is a causal language model: its head is new, drawn with seed %d", planned.source.path, config.seed
        )
    tokenizer = planned.tokenizer
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(planned.pad_token_id)  # TRL gives the model the tokenizer's
    if config.chat_template:
        tokenizer.chat_template = planned.text.template  # so that the folder reads as it was trained to
    held_out = {split: token_rows(pairs) for split, pairs in sets.items() if split != TRAIN_SET}
    trainer = trl.RewardTrainer(
        model=model,
        args=_arguments(config),
        train_dataset=token_rows(sets[TRAIN_SET]),
        eval_dataset=held_out.get(EVAL_SET, held_out or None),
        processing_class=tokenizer,
    )
    logger.info("%d pairs, learning rate %g, %s", len(sets[TRAIN_SET]), config.learning_rate, model.dtype)
    resume = str(config.resume_from_checkpoint)
    trainer.train(
        resume_from_checkpoint=None if resume in ("never", "auto", "None") else resume.lower() == "true" or resume
    )
    trainer.save_model()
    trainer.save_state()
    if trainer.deepspeed is not None:
        trainer.deepspeed.destroy()
    del trainer, model
    gc.collect()
    barrier()
    return str(config.output_dir)


def _arguments(config: RewardConfig) -> Any:
    """TRL's arguments: what was given, and what differs from its defaults here."""
    import trl

    known = {field.name for field in fields(trl.RewardConfig) if field.init}
    values = {name: value for name, value in config.non_default_keys.items() if name in known}
    here = (
        "output_dir",
        "use_cpu",
        "learning_rate",
        "bf16",
        "report_to",
        "ddp_backend",
        "deepspeed",
        "disable_dropout",
    )
    values |= {name: getattr(config, name) for name in (*here, "center_rewards_coefficient")}
    # Pairs come cut; TRL would leave out longer ones without a word.
    return trl.RewardConfig(**{**values, "max_length": None, "remove_unused_columns": False})


def token_rows(pairs: PairDataset) -> datasets.Dataset:
    """Pairs as RewardTrainer takes them tokenized: `chosen_ids` and `rejected_ids`, each with its prompt."""
    tokens = [pairs.tokens(row)[0] for row in range(len(pairs))]
    columns = {
        side: pa.array([np.array([*t.prompt_ids, *getattr(t, side)], dtype=np.int32) for t in tokens])
        for side in ("chosen_ids", "rejected_ids")
    }
    return datasets.Dataset(pa.table(columns))


def measure(model: RewardModel, pairs: PairDataset) -> dict[str, float]:
    """How often and by how much r(chosen) > r(rejected); a tie is wrong. Every rank scores its share. Collective over the world."""
    mine = range(get_rank(), len(pairs), get_world_size())
    tokens = [pairs.tokens(row)[0] for row in mine]
    ids = [t.prompt_ids + response for t in tokens for response in (t.chosen_ids, t.rejected_ids)]
    margins_N = torch.zeros(0)
    if ids:
        margins_N = -model.scores_of_ids(ids).double().view(-1, 2).diff(dim=1)
    right, margin = sum_of_ranks((margins_N > 0).sum().item()), sum_of_ranks(margins_N.sum().item())
    return {"pairs": len(pairs), "accuracy": right / len(pairs), "margin": margin / len(pairs)}
