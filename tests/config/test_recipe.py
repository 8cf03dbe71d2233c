"""Recipes and command lines: TRL's keys, precedence, and errors that name the key, the value and the remedy."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.checks import check_world_size
from mrpo_scale.config.data_keys import parse_datasets
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.config.model_spec import parse_ref_models
from mrpo_scale.config.recipe import find_recipe, parse, resource
from mrpo_scale.config.trl_keys import _MADE, DROPPED_KEYS, REMOVED_KEYS, RENAMED_TRL_KEYS, TRL_KEYS

# An ordinary DPO recipe as TRL's documentation writes them.
TRL_RECIPE = """
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
dataset_name: trl-lib/ultrafeedback_binarized
dtype: float32
attn_implementation: sdpa
learning_rate: 5.0e-7
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
beta: 0.05
loss_type: sigmoid
max_length: 512
truncation_mode: keep_start
eval_strategy: steps
eval_steps: 50
logging_steps: 25
use_peft: false
precompute_ref_log_probs: false
report_to: none
"""

# Every key of TRL 1.16's DPOConfig, ModelConfig and ScriptArguments beyond transformers' TrainingArguments.
TRL_OWN_KEYS = [
    "activation_offloading",
    "attn_implementation",
    "beta",
    "bnb_4bit_quant_storage",
    "bnb_4bit_quant_type",
    "dataset_config",
    "dataset_name",
    "dataset_num_proc",
    "dataset_streaming",
    "dataset_test_split",
    "dataset_train_split",
    "disable_dropout",
    "discopop_tau",
    "dtype",
    "f_alpha_divergence_coef",
    "datasets",
    "f_divergence_type",
    "ignore_bias_buffers",
    "label_smoothing",
    "ld_alpha",
    "load_in_4bit",
    "load_in_8bit",
    "lora_alpha",
    "lora_dropout",
    "lora_modules_to_save",
    "lora_r",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_task_type",
    "loss_type",
    "loss_weights",
    "max_length",
    "model_init_kwargs",
    "model_name_or_path",
    "model_revision",
    "pad_to_multiple_of",
    "pad_token",
    "padding_free",
    "precompute_ref_batch_size",
    "precompute_ref_log_probs",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "sync_ref_model",
    "truncation_mode",
    "trust_remote_code",
    "use_bnb_nested_quant",
    "use_dora",
    "use_peft",
    "use_rslora",
    "use_weighting",
]


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_trl_recipe_with_ref_models_added(recipe):
    script, config = parse(["--config", recipe(TRL_RECIPE + "ref_models: [B, {model: C, dtype: bfloat16}]\n")])
    assert script.model_name_or_path == "Qwen/Qwen2-0.5B-Instruct"
    assert [spec.model for spec in parse_ref_models(script.ref_models)] == ["B", "C"]
    assert (config.beta, config.learning_rate, config.max_length) == (0.05, 5e-7, 512)
    assert config.build_objective().loss_type == "sigmoid"
    assert config.output_dir == "runs/run"


def test_every_trl_key_is_ours_or_in_the_table():
    ours = {f.name for kind in (ScriptArguments, MRPOConfig) for f in dataclasses.fields(kind)}
    unmapped = set(TRL_OWN_KEYS) - ours - set(TRL_KEYS) - set(RENAMED_TRL_KEYS) - set(_MADE)
    assert not unmapped
    assert not ours & {*TRL_KEYS, *RENAMED_TRL_KEYS, *DROPPED_KEYS, *_MADE}, "a key cannot be both ours and another"
    documented = (Path(__file__).parents[2] / "docs" / "from_trl.md").read_text()
    keys = {*TRL_OWN_KEYS, *TRL_KEYS, *RENAMED_TRL_KEYS, *DROPPED_KEYS, *REMOVED_KEYS, *_MADE}
    assert not [key for key in sorted(keys) if f"`{key}`" not in documented]


def test_the_command_line_wins_over_the_recipe(recipe):
    _, config = parse(["--config", recipe(TRL_RECIPE), "--beta", "0.3", "--output_dir", "elsewhere"])
    assert (config.beta, config.output_dir) == (0.3, "elsewhere")


def test_what_was_typed_is_what_the_recipe_says(recipe):
    """Of a card's recipe: neither defaults that the parser or __post_init__ rewrites, nor a token."""
    _, config = parse(["--config", recipe(TRL_RECIPE), "--hub_token", "hf_secret", "--use_cpu", "true"])
    said = yaml.safe_load(TRL_RECIPE)
    assert config.non_default_keys.keys() <= {*said, "output_dir", "use_cpu"}
    assert config.non_default_keys["beta"] == 0.05 and config.non_default_keys["report_to"] == "none"
    assert "loss_type" not in config.non_default_keys and "gradient_checkpointing" not in config.non_default_keys, (
        "as the defaults are"
    )


def test_an_empty_key_means_none_where_none_means_something(recipe):
    assert parse(["--config", recipe("max_length: null\nmodel_name_or_path: A\n")])[1].max_length is None


def test_a_no_without_quotes_is_the_word(recipe):
    """YAML 1.1 reads `no` as false: where a key's values are words, it is the one that means no."""
    keys = (
        "eval_strategy",
        "save_strategy",
        "logging_strategy",
        "evaluation_strategy",
        "report_to",
        "clip",
        "shared_prompt",
    )
    text = "".join(f"{key}: no\n" for key in keys if key != "evaluation_strategy")
    _, config = parse(["--config", recipe(text)])
    assert config.eval_strategy == config.save_strategy == config.logging_strategy == "no"
    assert (config.report_to, config.clip, config.shared_prompt) == ([], "none", "false")
    assert parse(["--config", recipe("evaluation_strategy: no\ngradient_checkpointing: no\n")])[1].eval_strategy == "no"
    with pytest.raises(ConfigError, match=r"objective.*'false'"):
        parse(["--config", recipe("objective: no\n")])


def test_an_empty_key_where_none_means_nothing(recipe):
    _, config = parse(["--config", recipe("report_to: null\ntorch_dtype: null\n")])
    assert config.report_to == [] and config.dtype == "auto"
    assert MRPOConfig(report_to=None, use_cpu=True).report_to == []
    with pytest.raises(ConfigError, match=r"`beta` is empty.*`eval_strategy` is empty"):
        parse(["--config", recipe("beta:\neval_strategy: null\n")])


def test_a_list_where_one_word_would_do(recipe):
    text = recipe("report_to: [tensorboard, wandb]\noptim_target_modules: [attn, mlp]\n")
    assert parse(["--config", text])[1].report_to == ["tensorboard", "wandb"]
    assert parse(["--config", text])[1].optim_target_modules == ["attn", "mlp"]
    assert parse(["--config", text, "--report_to", "none"])[1].report_to == []


def test_all_mistakes_in_one_line(recipe):
    text = "betta: 1\nload_in_8bit: true\nreference_free: true\nbeta: high\nref_modles: [B]\nuse_weighting: true\n"
    with pytest.raises(ConfigError) as error:
        parse(["--config", recipe(text), "--sed", "3", "--held_outt", "4"])
    said = str(error.value)
    assert "\n" not in said and "did you mean `beta`?" in said and "did you mean `ref_models`?" in said
    for key in (
        "`betta`",
        "`load_in_8bit: True`",
        "`reference_free: True`",
        "high",
        "`use_weighting: True`",
        "`sed`",
        "`held_outt`",
    ):
        assert key in said, key


# Keys of shared recipes that TRL or transformers had once, or has beside its DPOConfig: {recipe: what it means here}.
TAKEN = {
    "warmup_ratio: 0.1": ("warmup_steps", 0.1),
    "torch_dtype: bfloat16": ("dtype", "bfloat16"),
    "hub_model_revision: v1": ("hub_revision", "v1"),
    "push_to_hub_model_id: a/b": ("hub_model_id", "a/b"),
    "evaluation_strategy: steps": ("eval_strategy", "steps"),
    "no_cuda: true": ("use_cpu", True),
    "preprocessing_num_workers: 12": ("dataset_num_proc", 12),
    "push_to_hub_revision: true": ("push_to_hub", True),
    "rpo_alpha: 0.1": ("loss_weights", [1.0, 0.1]),
    "rpo_alpha: 0.1\nloss_type: [hinge, ipo]\nloss_weights: [1.0, 2.0]": ("loss_type", ["hinge", "ipo", "sft"]),
    "model_init_kwargs: {dtype: bfloat16, use_cache: false}": ("dtype", "bfloat16"),
    "model_init_kwargs: {revision: v2, attn_implementation: eager}": ("attn_implementation", "eager"),
    "model_init_kwargs: {revision: v2}": ("model_revision", "v2"),
    "precompute_ref_log_probs: true": ("ref_scoring", "precompute"),
    "chat_template_path: template.jinja": ("chat_template", "template.jinja"),
    **{
        f"{key}: {value}": ("beta", 0.1)
        for key, value in {
            "overwrite_output_dir": "false",
            "rpo_alpha": "null",
            "model_init_kwargs": "null",
            "group_by_length": "false",
            "max_prompt_length": "null",
            "warmup_ratio": "0.0\nwarmup_steps: 5",
            "reference_free": "false",
            "streaming": "false",
            "generate_during_eval": "false",
            "force_use_ref_model": "true",
            "is_encoder_decoder": "null",
            "label_pad_token_id": "-100",
            "save_safetensors": "true",
            "use_peft": "false",
            "lora_r": "16",
            "pad_to_multiple_of": "auto",
            "padding_free": "true",
        }.items()
    },
}
REFUSED = {
    "dataset_mixer: [a/b]": ["`dataset_mixer`", "map names to fractions", "`dataset_name`"],
    "dataset_mixer: {a: 1.0}\ndataset_name: b": ["`dataset_mixer` and `dataset_name`", "leave `dataset_name`"],
    "dataset_mixture: {datasets: [{id: a}], ratio: 3}": ["`dataset_mixture`", "`ratio`", "test_split_size"],
    "dataset_mixture: {datasets: [{split: a}]}": ["`dataset_mixture`", "no name", "`id`"],
    "datasets: [{path: a, data_files: b.json}]": ["`datasets`", "`data_files: b.json`", "`dataset_name`"],
    "datasets: [{path: a, splitt: b}]": ["`datasets`", "unknown key `splitt`", "split"],
    "dataset_splits: [first, second]": ["`dataset_splits", "dataset_test_split"],
    "dataset_splits: [train_a, train_b]": ["`dataset_splits", "a `split` for each set"],
    "streaming: true": ["`streaming: True`", "memory-mapped"],
    "env: {A: b}": ["`env`", "export"],
    "rpo_alpha: 0.1\nloss_type: [sigmoid, sft]": ["`rpo_alpha: 0.1`", "leave `sft`"],
    "rpo_alpha: high": ["`rpo_alpha: high`", "a number"],
    "reference_free: true": ["`reference_free: True`"],
    "generate_during_eval: true": ["mrpo eval"],
    "label_pad_token_id: 0": ["label_pad_token_id"],
    "use_liger_kernel: true": ["use_liger_kernel"],
    "loss_type: aot": ["aot", "sorts", "sigmoid"],
    "loss_weights: [1.0, 0.1]": ["loss_weights", "2 entries for 1"],
    "model_init_kwargs: {use_kernels: true}": ["model_init_kwargs: use_kernels", "remove it"],
    "model_init_kwargs: {device_map: auto}": ["model_init_kwargs: device_map", "launcher"],
    "model_init_kwargs: {dtypo: auto}": ["model_init_kwargs: dtypo", "`attn_implementation`"],
    "model_init_kwargs: {dtype: float32}\ndtype: bfloat16": ["`model_init_kwargs` and `dtype`", "leave `dtype`"],
    "router_aux_loss_coef: -0.001": ["router_aux_loss_coef"],
    "warmup_ratio: 5": ["`warmup_ratio: 5`", "below 1"],
    "warmup_ratio: 0.1\nwarmup_steps: 5": ["`warmup_ratio` and `warmup_steps`", "leave `warmup_steps`"],
}


@pytest.mark.parametrize("text", TAKEN, ids=lambda text: text.split(":")[0])
def test_keys_of_older_recipes_are_taken(recipe, text, caplog):
    key, value = TAKEN[text]
    with caplog.at_level("INFO"):
        assert getattr(parse(["--config", recipe(text)])[1], key) == value
    assert key == "beta" or ("is taken as" in caplog.text and f"`{key}: {value}`" in caplog.text)
    assert parse(["--config", recipe("test_split_size: 200\n")])[0].held_out == 200


DROPPED = {
    "max_prompt_length: 512": "`max_length` bounds prompt and response together",
    "max_completion_length: 5": "`max_length` bounds prompt and response together",
    "overwrite_output_dir: true": "`resume_from_checkpoint: never` starts anew",
    "group_by_length: true": "grouped by length already",
    "dataset_mixture: {datasets: [{id: a}], seed: 3}": "`seed` decides",
}


@pytest.mark.parametrize("text", DROPPED, ids=lambda text: text.split(":")[0])
def test_keys_that_do_nothing_any_more_say_so(recipe, text, caplog):
    with caplog.at_level("WARNING"):
        parse(["--config", recipe(text)])
    assert text.split(":")[0] in caplog.text and "has no effect" in caplog.text and DROPPED[text] in caplog.text


SETS = {
    # Their weights are parts of each set's own rows, so they are no shares of the pairs here.
    "dataset_mixer: {a/b: 1.0, c: 0.25}\ndataset_splits: [train_prefs, test_prefs]": (
        [{"name": "a/b"}, {"name": "c", "subset": 0.25}],
        {"dataset_train_split": "train_prefs", "dataset_test_split": "test_prefs"},
    ),
    "dataset_mixture: {datasets: [{id: a, config: x, split: s, columns: [chosen, rejected], weight: 1.0}, {id: b, weight: 0.5}],"
    " test_split_size: 20, seed: 0}\nseed: 0": (
        [{"name": "a", "config": "x", "split": "s", "columns": ["chosen", "rejected"]}, {"name": "b", "subset": 0.5}],
        {"held_out": 20},
    ),
    "datasets: [{path: a, name: x, split: s, fraction: 0.1}, {path: b, data_dir: null}]\ntest_split_size: 0.1": (
        [{"name": "a", "config": "x", "split": "s", "subset": 0.1}, {"name": "b"}],
        {"held_out": 0.1},
    ),
}


@pytest.mark.parametrize("text", SETS, ids=lambda text: text.split(":")[0])
def test_data_sets_of_other_recipes(recipe, text, caplog):
    sets, keys = SETS[text]
    with caplog.at_level("INFO"):
        script, _ = parse(["--config", recipe(text)])
    assert script.datasets == parse_datasets(sets)
    assert {key: getattr(script, key) for key in keys} == keys
    assert f"`{text.split(':')[0]}` is taken as `dataset_name: [" in caplog.text


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text.split(":")[0])
def test_keys_of_older_recipes_say_what_to_write(recipe, text):
    with pytest.raises(ConfigError) as error:
        parse(["--config", recipe(text)])
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in REFUSED[text]), said


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("min", "min"),
        ("-1", "harmonic"),
        ("1.0", "arithmetic"),
        ("0.5", 0.5),
        ("-2", -2.0),
        ("-1e-3", -1e-3),
        (".inf", "max"),
    ],
)
def test_a_mean_by_name_or_exponent(recipe, typed, expected):
    """From YAML, the command line and Python; whichever way, a run's description has one word for it."""
    from_yaml = parse(["--config", recipe(f"aggregate: {typed}\n")])[1]
    from_line = parse(["--config", recipe("aggregate: max\n"), f"--aggregate={yaml.safe_load(typed)}"])[1]
    from_python = MRPOConfig(aggregate=yaml.safe_load(typed), use_cpu=True)
    for config in (from_yaml, from_line, from_python):
        assert config.build_objective().aggregate == expected
        assert config.aggregate == str(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("betta: 0.1", ["unknown key `betta`", "did you mean `beta`"]),
        ("beta: -1", ["beta: -1", "above 0"]),
        ("beta: -1e-3", ["beta: -0.001", "above 0"]),
        ("beta: high", ["beta", "high", "float"]),
        ("max_length: true", ["max_length", "true", "int"]),
        ("ref_weights: [0.5, 0.4]", ["ref_weights", "0.9", "summing to 1"]),
        ("ref_weights: [half, half]", ["ref_weights", "half"]),
        ("objective: ppo", ["objective", "ppo", "multi_dpo"]),
        ("aggregate: median", ["`aggregate: median`", "harmonic", "exponent"]),
        ("aggregate: .nan", ["`aggregate: nan`", "harmonic", "exponent"]),
        ("clip: hard", ["`clip: hard`", "adaptive", "none"]),
        ("loss_type: [sigmoid, ip]", ["loss_type", "did you mean `ipo`"]),
        ("load_in_8bit: true", ["load_in_8bit", "load_in_4bit"]),
        ("beta: 0.1\nbeta: 0.2", ["`beta`", "twice"]),
        ("beta: [", ["not valid YAML"]),
        ("- a\n- b", ["must be a mapping"]),
        ("x: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
        ("max_bad_rows: 3", ["max_bad_rows: 3"]),
        ("auto_find_batch_size: true", ["auto_find_batch_size", "per_device_train_batch_size"]),
        ("ref_models: [{name: x}]", ["ref_models", "`model` is missing"]),
        ("ref_models: [{model: x, templat: y}]", ["ref_models", "unknown key `templat`"]),
        ("label_smoothing: 0.1\nloss_type: ipo", ["label_smoothing", "ipo"]),
    ],
)
def test_mistakes_name_key_value_and_remedy(recipe, text, words):
    with pytest.raises(ConfigError) as error:
        script, _ = parse(["--config", recipe(text + "\n")])
        parse_ref_models(script.ref_models)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_mistakes_on_the_command_line():
    for key, remedy in (
        ("--warmup_ratio", "write `warmup_steps`"),
        ("--rpo_alpha", "in a recipe"),
        ("--load_in_8bit", "load_in_4bit"),
    ):
        with pytest.raises(ConfigError, match=remedy):
            parse(["--model_name_or_path", "A", key, "1"])
    with pytest.raises(ConfigError, match=r"unknown key `ref_model`; did you mean `ref_models`"):
        parse(["--model_name_or_path", "A", "--ref_model", "B"])
    with pytest.raises(ConfigError, match=r"no_such.*quickstart"):
        parse(["--config", "no_such"])


def test_a_launcher_whose_processes_do_not_see_each_other_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 .* world of 1.*gloo"):
        check_world_size(1)


@pytest.mark.parametrize("path", sorted(resource("recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_parses(path):
    script, config = parse(["--config", str(path)])
    specs = parse_ref_models(script.ref_models)
    config.build_objective().check_references(1 + len(specs))
    assert script.model_name_or_path and script.dataset_name
    assert find_recipe(path.stem).samefile(path)


@pytest.mark.parametrize("path", sorted(resource("launch/accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_accelerate_config_loads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    values = yaml.safe_load(path.read_text())
    deepspeed = values.get("deepspeed_config")
    if deepspeed is None:
        return
    assert config.deepspeed_config["deepspeed_config_file"] == deepspeed["deepspeed_config_file"]
    assert (Path(__file__).parents[2] / deepspeed["deepspeed_config_file"]).is_file()
    # A key both here and in the JSON is an error at launch.
    assert set(deepspeed) <= {"deepspeed_config_file", "zero3_init_flag", "deepspeed_multinode_launcher"}


@pytest.mark.parametrize("path", sorted(resource("ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_deepspeed_config_is_read_by_deepspeed(path):
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = HfTrainerDeepSpeedConfig(str(path))
    assert config.is_zero3() == path.stem.startswith("zero3")
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert config.get_value(key) == "auto", f"{key} belongs to the recipe"
    if path.stem == "zero3_cpu":
        assert config.get_value("zero_force_ds_cpu_optimizer") is False
        assert config.get_value("zero_allow_untested_optimizer") is True


def test_streaming_is_an_error_that_says_what_happens_instead(recipe):
    with pytest.raises(
        ConfigError, match=r"dataset_streaming: True.*Arrow files once and memory-mapped.*Remove the key"
    ):
        parse(["--config", recipe("dataset_streaming: true\n")])
    parse(["--config", recipe("dataset_streaming: false\n")])
