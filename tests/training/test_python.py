"""From Python, as people come from TRL: what they pass works, or is refused in one line that says what to do."""

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback, TrainingArguments

from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base.errors import ConfigError
from tests.tiny import pair_dataset, pair_rows, write_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make(folders, tmp_path):
    def build(train=None, evals=None, model=None, **given):
        keys = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "report_to": "none",
            "max_steps": 3,
            "save_strategy": "no",
        }
        keys |= {"per_device_train_batch_size": 4, "gradient_checkpointing": False, "logging_steps": 1}
        arguments = {name: given.pop(name) for name in list(given) if name not in MRPOConfig.__dataclass_fields__}
        return MRPOTrainer(
            model or folders["llama"],
            args=arguments.pop("args", None) or MRPOConfig(**{**keys, **given}),
            ref_models=arguments.pop("ref_models", [folders["qwen2"]]),
            train_dataset=pair_dataset(12) if train is None else train,
            eval_dataset=evals,
            **arguments,
        )

    return build


class DPOConfig(TrainingArguments):  # TRL's is a TrainingArguments as well
    pass


def iterable(count):
    return datasets.IterableDataset.from_generator(lambda: iter(pair_rows(count)))


SETS = {
    "lists": lambda: (pair_rows(12), pair_rows(4, 1)),
    "Datasets": lambda: (pair_dataset(12), pair_dataset(4, 1)),
    "a DatasetDict": lambda: (datasets.DatasetDict(train=pair_dataset(12), test=pair_dataset(4, 1)), None),
    "sets by name": lambda: (pair_rows(12), {"mine": pair_rows(4, 1)}),
}


@pytest.mark.parametrize("kind", SETS)
def test_sets_of_any_kind_train_and_evaluate_alike(kind, make):
    trainer = make(*SETS[kind](), eval_strategy="steps", eval_steps=3)
    trainer.train()
    losses = [
        value
        for entry in trainer.state.log_history
        for key, value in entry.items()
        if key in ("eval_loss", "eval_mine_loss")
    ]
    reference = make(pair_dataset(12), pair_dataset(4, 1))
    reference.train()
    assert losses == pytest.approx([reference.evaluate()["eval_loss"]], rel=1e-6)
    predicted = reference.predict(pair_dataset(4, 1))
    assert predicted.metrics["test_loss"] == pytest.approx(losses[0], rel=1e-6)


def refusals(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2"])
    return {
        "an IterableDataset": (
            {"train": iterable(12)},
            ["`train_dataset` is an IterableDataset", "Dataset.from_generator"],
        ),
        "one to evaluate on": ({"evals": iterable(4)}, ["`eval_dataset` is an IterableDataset"]),
        "TRL's DPOConfig": (
            {"args": DPOConfig(output_dir=str(tmp_path), use_cpu=True)},
            ["`args` is a DPOConfig", "MRPOConfig"],
        ),
        "ref_model": ({"ref_model": model}, ["`ref_model`", "`ref_models`"]),
        "a loaded reference": ({"ref_models": [model]}, ["`ref_models` holds a Qwen2ForCausalLM", "save_pretrained"]),
        "peft_config": ({"peft_config": object()}, ["`peft_config`", "`use_peft`"]),
    }


@pytest.mark.parametrize(
    "name",
    ["an IterableDataset", "one to evaluate on", "TRL's DPOConfig", "ref_model", "a loaded reference", "peft_config"],
)
def test_what_cannot_be_is_one_line(name, make, folders, tmp_path):
    given, words = refusals(folders, tmp_path)[name]
    with pytest.raises(ConfigError) as error:
        make(**given)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


class Steps(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append((state.global_step, kwargs["model"].training))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.seen.append(sorted(metrics)[0])


def test_early_stopping_callbacks_and_the_best_model(make, tmp_path):
    """A learning rate that ruins the policy: patience ends the run, and the weights of the best evaluation are taken back."""
    steps = Steps()
    trainer = make(
        pair_dataset(40),
        pair_dataset(8, 1),
        callbacks=[steps, EarlyStoppingCallback(early_stopping_patience=2)],
        compute_metrics=lambda found: {"pairs": len(found.label_ids)},
        max_steps=9,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        warmup_steps=0,
        greater_is_better=False,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    losses = [entry["eval_loss"] for entry in evaluated]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 9, "two evaluations after the best one"
    assert [seen for seen in steps.seen if isinstance(seen, tuple)] == [(i + 1, True) for i in range(len(losses))]
    assert all(entry["eval_pairs"] == 8 for entry in evaluated)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best + 1}").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())
