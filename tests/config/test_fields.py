"""Marks of keys: every key of MRPOConfig's own says what it is to a run, and the lists made of them are those of older releases."""

from dataclasses import dataclass
from typing import Annotated

import pytest
from transformers import HfArgumentParser

from mrpo_scale.config.checks import value_mistakes
from mrpo_scale.config.fields import (
    COMMON,
    INHERITED,
    AtLeast,
    OneOf,
    Other,
    Role,
    key,
    keys_unused_by,
    keys_with,
    marks_of,
)
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments, keys_of_role

#: As in the fingerprints of checkpoints of November 2026. One more is a decision: older checkpoints lack it.
DECIDING = """objective beta epsilon_max clip ref_weights weights_split aggregate loss_type loss_weights label_smoothing
    discopop_tau router_aux_loss_coef reference_margin disable_dropout neftune_noise_alpha
    seed data_seed train_sampling_strategy dataloader_drop_last
    num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args
    use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save
    use_rslora use_dora
    load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
    sampled_fraction max_completion_length temperature kd_level kd_normalize reward_model
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm bf16 fp16 tf32"""


SAMPLING = ("sampled_fraction", "max_completion_length", "temperature")


def test_every_key_of_ours_has_one_role():
    marks = marks_of(MRPOConfig)
    roles = {name: [mark for mark in marks[name] if isinstance(mark, Role)] for name in MRPOConfig.__annotations__}
    assert all(len(of_key) == 1 for of_key in roles.values()), roles


def test_keys_of_transformers_that_have_a_role_exist():
    unknown = set(INHERITED) - set(MRPOConfig.__dataclass_fields__)
    assert unknown <= {"logging_dir", "train_sampling_strategy"}  # of some releases only


def test_fingerprints_keep_their_keys():
    assert set(keys_of_role("decides")) == set(DECIDING.split()) & set(MRPOConfig.__dataclass_fields__)


def test_what_a_report_leaves_out():
    places = {"output_dir", "ref_cache_dir", "resume_from_checkpoint", "max_hours", "dataset_num_proc"}
    assert set(keys_of_role(Role.PLACE)) - {"logging_dir"} == places


def test_what_a_comparison_cannot_vary():
    common = set(keys_with(MRPOConfig, COMMON))
    assert set(keys_of_role(Role.HASHED)) < common
    assert {"objective", "seed", "data_seed", "output_dir", "ref_cache_dir", "ref_scoring", "bf16", "fp16"} < common
    assert not {"beta", "learning_rate", "clip", "max_steps"} & common


@pytest.mark.parametrize(
    ("objective", "unused"),
    [
        (
            "dpo",
            {"epsilon_max", "clip", "ref_weights", "aggregate", *SAMPLING, "kd_level", "kd_normalize", "reward_model"},
        ),
        ("multi_dpo", {"aggregate", *SAMPLING, "kd_level", "kd_normalize", "reward_model"}),
        ("mrpo", {*SAMPLING, "kd_level", "kd_normalize", "reward_model"}),
        ("kd", {"aggregate", "reward_model"}),
        ("rlhf", {"aggregate", "epsilon_max", "clip", "kd_level", "kd_normalize"}),
    ],
)
def test_keys_that_an_objective_does_not_read(objective, unused):
    assert keys_unused_by(MRPOConfig, objective) == unused


def test_a_parser_of_ones_own_reads_the_keys(tmp_path):
    """Marks in field.metadata would end in a TypeError of argparse."""
    parser = HfArgumentParser([ScriptArguments, MRPOConfig])
    script, config = parser.parse_args_into_dataclasses(
        ["--beta", "0.2", "--output_dir", str(tmp_path), "--use_cpu", "true", "--report_to", "none"]
    )
    assert (script.ref_models, config.beta) == ([], 0.2)


def test_values_are_checked_by_their_marks():
    @dataclass
    class Keys:
        size: Annotated[Other[int | None], AtLeast(2)] = key(None, "")
        word: Annotated[str, OneOf(("a", "b"))] = key("a", "")

    assert list(value_mistakes(Keys())) == []
    assert list(value_mistakes(Keys(size=1, word="c"))) == [
        "`size: 1` must be at least 2",
        "`word: c` is not known; choose one of a, b",
    ]
