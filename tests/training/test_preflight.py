"""What a run refuses before anything loads: packages that are not here, hardware, held-out pairs, metrics nobody measures."""

import importlib.util

import pytest
from transformers.utils import is_kernels_available

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.hardware import GPU_ATTENTION, Hardware, missing_hardware
from mrpo_scale.config.recipe import parse
from mrpo_scale.logps.attention_ways import REFERENCE, WAYS
from mrpo_scale.training.metrics import metric_names
from mrpo_scale.training.preflight import check_best_metric, check_evaluation, preflight


@pytest.fixture
def refused(tmp_path):
    """What a recipe of these lines is refused for, in one line; empty where it is not."""

    def refused(text, ref_models=()):
        recipe = tmp_path / "run.yaml"
        recipe.write_text(f"{text}\noutput_dir: {tmp_path / 'run'}\n")
        try:
            script, config = parse(["--config", str(recipe)])
            preflight(config, ref_models or script.ref_models)
        except ConfigError as error:
            assert "\n" not in str(error)
            return str(error)
        return ""

    return refused


def absent(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is not None, reason=f"{module} is installed")


# Not by find_spec: this project's folder of that name looks like a package to it.
NO_KERNELS = pytest.mark.skipif(is_kernels_available(), reason="kernels is installed")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("report_to: wandb", ["`report_to: wandb`", "pip install wandb"], marks=absent("wandb")),
        pytest.param("report_to: [tensorboard, mlflow]", ["`report_to: mlflow`"], marks=absent("mlflow")),
        ("report_to: paper", ["`report_to: paper` is not known", "tensorboard"]),
        pytest.param("optim: adamw_bnb_8bit", ["`optim: adamw_bnb_8bit`", "bitsandbytes"], marks=absent("bitsandbytes")),
        pytest.param("optim: adamw_torch_4bit", ["torchao"], marks=absent("torchao")),
        pytest.param(
            "optim: galore_adamw\noptim_target_modules: all-linear", ["galore_torch"], marks=absent("galore_torch")
        ),
        pytest.param("optim: lomo", ["`optim: lomo`", "lomo"], marks=absent("lomo_optim")),
        pytest.param("optim: grokadamw", ["`optim: grokadamw`", "pip install"], marks=absent("grokadamw")),
        pytest.param("optim: schedule_free_adamw", ["schedulefree"], marks=absent("schedulefree")),
        ("optim: galore_adamw", ["`optim_target_modules`"]),
        ("optim_args: rank", ["`optim_args: rank`"]),
        ("lr_scheduler_type: cosine_with_min_lr", ["`lr_scheduler_type: cosine_with_min_lr`", "min_lr"]),
        ("torch_compile: true\ntorch_compile_backend: fast", ["`torch_compile_backend: fast`"]),
        ("torch_compile_mode: fast", ["`torch_compile_mode: fast`", "max-autotune"]),
        pytest.param(
            "attn_implementation: flash_attention_2", ["`attn_implementation: flash", "flash_attn"], marks=absent("flash_attn")
        ),
        pytest.param(
            "ref_models: [{model: A, attn_implementation: fa3_spans}]",
            ["`ref_models.attn_implementation: fa3_spans`", "flash_attn_interface"],
            marks=absent("flash_attn_interface"),
        ),
        pytest.param("attn_implementation: org/kernel", ["org/kernel", "`kernels`"], marks=NO_KERNELS),
        ("attn_implementation: fast", ["`attn_implementation: fast` is not known", "sdpa"]),
        ("ref_models: [{model: A, attn_implementation: fast}]", ["`ref_models.attn_implementation: fast`"]),
        ("use_liger_kernel: true", ["`use_liger_kernel: True`", "forward"]),
        ("bf16_full_eval: true", ["`bf16_full_eval: True`", "rounded"]),
        ("bf16: true\nfp16: true", ["`bf16: True`", "`fp16: True`"]),
        ("save_strategy: best\neval_strategy: steps", ["`save_strategy: best`", "metric_for_best_model"]),
        ("eval_strategy: epoch\nload_best_model_at_end: true", ["load_best_model_at_end", "save and eval strategy"]),
        ("dataloader_prefetch_factor: 2", ["dataloader_prefetch_factor", "dataloader_num_workers"]),
        ("accelerator_config: /no/such.json", ["/no/such.json"]),
        ("accelerator_config: {split_batches: true}", ["split_batches: true", "dealt over the ranks", "remove it"]),
        ("accelerator_config: {dispatch_batches: true}", ["dispatch_batches: true", "remove it"]),
        ("max_tokens_per_micro_batch: 0", ["`max_tokens_per_micro_batch: 0`", "at least 1"]),
        ("deepspeed: zero9", ["`deepspeed: zero9`", "zero3"]),
        ("deepspeed: {zero_optimization: 3}", ["`zero_optimization: 3`"]),
    ],
)  # fmt: skip
def test_refused_in_one_line(refused, text, words):
    said = refused(text)
    assert said and all(word in said for word in words), said


def test_all_of_it_at_once(refused):
    said = refused("report_to: paper\nlr_scheduler_type: cosine_with_min_lr\nattn_implementation: fast")
    assert all(key in said for key in ("`report_to: paper`", "`lr_scheduler_type:", "`attn_implementation: fast`"))
    said = refused("use_liger_kernel: true\nmax_bad_rows: 3\nseed: -1")
    assert all(key in said for key in ("`use_liger_kernel: True`", "`max_bad_rows: 3.0`", "`seed: -1`"))


def test_what_is_here_is_not_refused(refused):
    assert not refused(
        "report_to: tensorboard\noptim: adamw_torch\nattn_implementation: sdpa\nuse_cpu: true\nbf16: true"
    )
    assert not refused(
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.0e-7}\noptim: adafactor\ntf32: false"
    )


def test_a_deepspeed_config_that_is_none(refused, tmp_path):
    _, config = parse(["--use_cpu", "true", "--output_dir", str(tmp_path)])
    config.deepspeed = {"zero_optimization": {"stage": 9, "reduce_bucket_size": "auto"}}
    with pytest.raises(ConfigError, match=r"`zero_optimization` of the DeepSpeed config: .*stage"):
        preflight(config)
    config.deepspeed = {"sequence_parallel_size": 2}
    with pytest.raises(ConfigError, match=r"`sequence_parallel_size` of the DeepSpeed config .* the recipe's key"):
        preflight(config)
    bad = tmp_path / "bad.json"
    for text, words in (("{", "is not JSON"), ("[]", "is no JSON mapping")):
        bad.write_text(text)
        said = refused(f"deepspeed: {bad}")
        assert str(bad) in said and words in said


@pytest.mark.parametrize(
    "key", ["bf16: true", "fp16: true", "tf32: true", "head_impl: triton", "attn_implementation: flex_spans"]
)
def test_hardware_that_is_not_here(refused, key, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("mrpo_scale.config.hardware.bf16_instructions", lambda: None)
    said = refused(key)
    assert f"`{key.replace('true', 'True')}` needs a" in said and "GPU" in said


def test_attention_that_needs_a_gpu_is_named():
    assert set(GPU_ATTENTION) == set(WAYS) - {REFERENCE}


def test_hardware_is_asked_of_the_machine_of_the_run(tmp_path):
    _, config = parse(["--use_cpu", "true", "--output_dir", str(tmp_path)])
    config.tf32, config.fp16, config.head_impl = True, True, "triton"
    assert len(list(missing_hardware(config, config.head_impl, Hardware(gpu=False, bf16=False, tf32=False)))) == 3
    assert not list(missing_hardware(config, config.head_impl, Hardware(gpu=True, bf16=True, tf32=True)))


@pytest.mark.parametrize(
    "words",
    [
        ["--eval_strategy", "epoch"],
        ["--eval_on_start", "true"],
        ["--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", "--load_best_model_at_end", "true"],
    ],
)
def test_an_evaluation_needs_held_out_pairs(tmp_path, words):
    _, config = parse(["--use_cpu", "true", "--output_dir", str(tmp_path), *words])
    for nothing in (None, {}):
        with pytest.raises(ConfigError, match=rf"`{words[0][2:]}: .*no held-out pairs.*`held_out`"):
            check_evaluation(config, nothing)
    check_evaluation(config, ["a row"])
    _, config = parse(["--use_cpu", "true", "--output_dir", str(tmp_path)])
    check_evaluation(config, None)


def test_the_best_model_is_by_a_metric_that_is_measured(tmp_path):
    words = ["--use_cpu", "true", "--output_dir", str(tmp_path), "--eval_strategy", "steps", "--metric_for_best_model"]
    names = ["anchor", "qwen2"]
    for metric in ("loss", "eval_rewards/accuracies", "references/qwen2/weight"):
        check_best_metric(parse([*words, metric])[1], names, ())
    with pytest.raises(ConfigError, match=r"`metric_for_best_model: accuracy` .*rewards/accuracies"):
        check_best_metric(parse([*words, "accuracy"])[1], names, ())
    check_best_metric(parse([*words, "eval_easy_loss"])[1], names, ["easy", "hard"])
    with pytest.raises(ConfigError, match=r"easy_loss"):
        check_best_metric(parse([*words, "loss"])[1], names, ["easy", "hard"])


def test_metric_names_of_every_objective(tmp_path):
    for words in (["--objective", "dpo"], ["--objective", "multi_dpo"], ["--ref_weights", "validation"]):
        _, config = parse(["--use_cpu", "true", "--output_dir", str(tmp_path), *words])
        assert "rewards/margins" in metric_names(config.build_objective(), ["anchor", "qwen2"])
