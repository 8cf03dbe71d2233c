"""What a person who comes from TRL passes to MRPOTrainer: taken, or refused in one line with what to do instead."""

import pytest
from transformers import AutoModelForCausalLM, TrainingArguments

import mrpo_scale.training.prepare
from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.training.arguments import TRL_ARGUMENTS, check_arguments
from tests.tiny import pair_dataset, write_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def config(tmp_path):
    return MRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=None, max_steps=1, gradient_checkpointing=False)


@pytest.fixture
def no_weights(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(mrpo_scale.training.prepare, "load_policy", fail)


def refused(model, **keys):
    with pytest.raises(ConfigError) as error:
        MRPOTrainer(model, train_dataset=pair_dataset(8), **keys)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


@pytest.mark.parametrize("key", TRL_ARGUMENTS)
def test_trls_arguments_name_their_counterpart(folders, config, key, no_weights):
    assert f"`{key}`" in refused(folders["llama"], args=config, **{key: object()})


def test_all_of_them_at_once(folders, no_weights):
    said = refused(folders["llama"], args=object(), ref_model=object(), tokenizer=object())
    assert all(word in said for word in ("`args` is a object", "`ref_model`", "`ref_models`", "`processing_class`"))


def test_none_asks_for_nothing(folders, config):
    nothing = dict.fromkeys(TRL_ARGUMENTS)
    trainer = MRPOTrainer(folders["llama"], None, config, pair_dataset(8), **nothing)
    assert trainer.plan.names == ["anchor"]


def test_one_name_is_a_list_of_one(folders, config):
    assert check_arguments(folders["llama"], folders["qwen2"], config, None, {}) == ([folders["qwen2"]], config)


def test_arguments_of_another_class(folders, tmp_path, no_weights):
    class DPOConfig(TrainingArguments):  # TRL's is one as well
        pass

    for kind in (TrainingArguments, DPOConfig):
        said = refused(folders["llama"], args=kind(output_dir=str(tmp_path), use_cpu=True))
        assert f"`args` is a {kind.__name__}" in said and "MRPOConfig" in said


def test_a_loaded_model_among_the_references(folders, config, no_weights):
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2"])
    said = refused(folders["llama"], ref_models=[model], args=config)
    assert "`ref_models` holds a Qwen2ForCausalLM" in said and "save_pretrained" in said
    assert "`ref_models` is a Qwen2ForCausalLM" in refused(folders["llama"], ref_models=model, args=config)


def test_what_the_keys_lack_is_refused_from_python_too(folders, tmp_path, no_weights):
    keys = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    said = refused(folders["llama"], args=MRPOConfig(**keys, lr_scheduler_type="cosine_with_min_lr"))
    assert "`lr_scheduler_type: cosine_with_min_lr`" in said
    assert "no held-out pairs" in refused(folders["llama"], args=MRPOConfig(**keys, eval_strategy="epoch"))
    metric = MRPOConfig(**keys, eval_strategy="epoch", metric_for_best_model="accuracy")
    assert "`metric_for_best_model: accuracy`" in refused(
        folders["llama"], args=metric, eval_dataset=pair_dataset(4, 1)
    )
    with pytest.raises(ConfigError, match="not a valid IntervalStrategy"):
        MRPOConfig(**keys, eval_strategy="often")
