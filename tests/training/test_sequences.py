"""What `sequence_parallel_size` does not take: one line each, from the config alone."""

import json

import pytest
import torch
from transformers import AutoConfig

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.models.source import ReferenceSource
from mrpo_scale.planner.command import check as check_command
from mrpo_scale.training.sequences import check_sequences
from tests.tiny import pair_rows, write_models

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 99,
}


def check(folder, model_type, ranks=4, size=2, keys=(), **sizes):
    """As a run on so many ranks would, of a policy of which only config.json is there."""
    AutoConfig.for_model(model_type, **{**SIZES, **sizes}).save_pretrained(folder / "policy")
    args = MRPOConfig(str(folder / "out"), sequence_parallel_size=size, use_cpu=True, report_to="none", **dict(keys))
    policy = ReferenceSource("policy", str(folder / "policy"), attn_implementation=args.attn_implementation)
    plan = RunPlan(policy, None, [], [])  # tokenizers are not asked
    check_sequences(plan, args, ranks, torch.device("cpu"))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "mistral"])
def test_families_with_attention_over_spans_are_taken(tmp_path, model_type):
    check(tmp_path, model_type)
    check(tmp_path, model_type, size=4)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"ranks": 6, "size": 4}, r"`sequence_parallel_size: 4` does not divide the 6 ranks .* choose 1 or 2, or start"),
        ({"ranks": 1}, r"does not divide the 1 rank of the run; choose 1, or start"),
        ({"ranks": 6, "size": 3}, r"`sequence_parallel_size: 3` does not divide the policy's 4 attention heads.*choose 1 or 2\."),
        ({"keys": {"max_length": 4096}}, r"`max_length: 4096` with `sequence_parallel_size: 2`: .* context is 2048 tokens"),
        ({"keys": {"attn_implementation": "eager"}}, r"the policy \(llama under eager attention\): .*attention over spans"),
        ({"model_type": "gemma2"}, r"the policy \(gemma2 under eager attention\)"),  # soft-capped scores, on a CPU
        ({"model_type": "mamba", "state_size": 4}, r"policy \(mamba .*"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, r"policy \(lfm2 .* its layers are conv"),
        ({"model_type": "bloom"}, r"policy \(bloom .* its attention is its own"),
        ({"model_type": "mixtral", "router_aux_loss_coef": 0.1}, r"loss of the policy's routers \(mixtral\).*_coef: 0`"),
    ],
)  # fmt: skip
def test_what_a_sequence_group_cannot_take_is_named(tmp_path, case, message):
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, case.pop("model_type", "llama"), **case)


def test_a_mixture_without_that_loss_is_taken(tmp_path):
    check(tmp_path, "mixtral", keys={"router_aux_loss_coef": 0.0})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"head_backward": "in_forward"}, "`head_backward: in_forward` with `sequence_parallel_size: 2`: no rank has"),
        ({"objective": "kd"}, "`objective: kd` with `sequence_parallel_size: 2`: responses are sampled without it"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha: 5.0` with `sequence_parallel_size: 2`"),
        ({"torch_compile": True}, "`torch_compile: True` with `sequence_parallel_size: 2`"),
        ({"sequence_parallel_size": 0}, "`sequence_parallel_size: 0` must be at least 1"),
        (
            {"activation_offloading": True, "gradient_checkpointing": False},
            "`activation_offloading: true` needs `gradient_checkpointing: true`",
        ),
    ],
)
def test_keys_that_do_not_go_with_it(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        MRPOConfig(str(tmp_path), **{"sequence_parallel_size": 2, "use_cpu": True, "report_to": "none", **keys})


def test_the_head_waits_for_the_whole_response(tmp_path):
    options = {"use_cpu": True, "report_to": "none"}
    assert MRPOConfig(str(tmp_path), **options).gradients_in_forward
    assert not MRPOConfig(str(tmp_path), sequence_parallel_size=2, **options).gradients_in_forward


def test_mrpo_check_says_it_and_counts_with_it(tmp_path, capsys):
    models = write_models(tmp_path / "models")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(16)))
    words = ["--model_name_or_path", models["llama"], "--dataset_name", str(data), "--gpu", "cpu", "--use_cpu", "true"]
    words += ["--ddp_backend", "gloo", "--output_dir", str(tmp_path / "out"), "--max_length", "256"]

    def checked(gpus, size):
        status = check_command([*words, "--gpus", str(gpus), "--sequence_parallel_size", str(size)])
        return status, json.loads((tmp_path / "out" / "check" / "check.json").read_text()), capsys.readouterr().out

    status, _, said = checked(6, 3)
    assert status == 2 and "error: `sequence_parallel_size: 3` does not divide the policy's 4 attention heads" in said
    status, found, _ = checked(6, 4)
    assert status == 2 and "does not divide the 6 ranks" in found["errors"][0]
    kept = {}
    for size in (1, 4):
        status, found, _ = checked(4, size)
        assert status == 0 and not found["errors"]
        of_step = found["cost"]["estimates"].popitem()[1]["device_bytes"]["forward and backward"]
        kept[size] = of_step["activations"]
    assert kept[4] < 0.4 * kept[1], "a quarter, and the whole mask of a CPU's attention"
