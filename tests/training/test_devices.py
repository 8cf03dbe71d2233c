"""A run on a pretended GPU: nothing mixes devices, and a step makes the host wait once, at its end."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base import ranks
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.logps import micro_batches
from mrpo_scale.logps.pair_batch import PairBatch
from mrpo_scale.references import live
from mrpo_scale.training import step
from mrpo_scale.training.callbacks import StepClock
from tests.pretend_gpu import GPU, PretendedGpu, WrongDeviceError, world_of_one
from tests.tiny import pair_dataset, write_models

STEPS = 2
PATHS = {
    "live": {},
    "partition": {"ref_placement": "partition"},
    "cached": {"ref_cache_dir": "cache", "ref_scoring": "precompute"},
    "cached as it goes": {"ref_cache_dir": "cache"},
    "gradients in the forward": {"head_backward": "in_forward"},
    "recomputed logits": {"head_backward": "recompute"},
    "separate prompts": {"shared_prompt": "false"},
    "no clipping": {"max_grad_norm": 0.0, "include_num_input_tokens_seen": "non_padding"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(MRPOConfig, "device", property(lambda args: (args._setup_devices, GPU)[1]))
    monkeypatch.setattr(Accelerator, "device", property(lambda accelerator: GPU))
    with world_of_one(), PretendedGpu() as pretended:
        yield pretended


class WaitsPerStep(StepClock):
    """Of each optimizer step, the log included."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu, self.before, self.of_steps = gpu, Counter(), []

    def start_step(self):
        super().start_step()
        self.before = self.gpu.waits.copy()

    def on_log(self, args, state, control, logs, **kwargs):
        if "learning_rate" in logs:
            self.of_steps.append(self.gpu.waits - self.before)


def trainer_of(folders, folder, gpu, **keys):
    keys = {key: str(folder / value) if value == "cache" else value for key, value in keys.items()}
    args = MRPOConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **keys},
    )
    clock = WaitsPerStep(gpu)
    return MRPOTrainer(folders["llama"], [folders["qwen2"]], args, pair_dataset(20), pair_dataset(6, 1), clock=clock)


@pytest.mark.parametrize("path", PATHS)
def test_a_step_reads_the_device_once(folders, tmp_path, gpu, path):
    trainer = trainer_of(folders, tmp_path, gpu, **PATHS[path])
    trainer.train()
    assert gpu.has(next(trainer.policy.parameters())) and trainer.args.device == GPU
    assert all(gpu.has(p) for r in trainer.scores.references.values() for p in r.model.model.parameters())
    check_waits(trainer.clock.of_steps, of_transformers=4 if path == "separate prompts" else 0)


def check_waits(of_steps, of_transformers=0):
    """``of_transformers``: it looks at the positions of rows without a mask, in each forward of the policy and the references."""
    assert len(of_steps) == STEPS
    for counts in of_steps:
        inside = sum(n for (_, line), n in counts.items() if "body_of(model)(" in line)
        assert inside == of_transformers, counts
        own = Counter({(what, line): n for (what, line), n in counts.items() if "body_of(model)(" not in line})
        assert sum(own.values()) == 1 and all("metrics.py" in line and what == "tolist" for what, line in own), own


def test_evaluating_and_saving_keep_to_the_device(folders, tmp_path, gpu):
    """With a checkpoint after every step, as a run on the CPU does it, to the last digits of float32."""
    keys = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(folders, tmp_path, gpu, **keys)
    trainer.train()
    trainer.save_model()
    metrics, predicted = trainer.evaluate(), trainer.predict(pair_dataset(5, 2))
    check_waits(trainer.clock.of_steps)
    gpu.__exit__(None, None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MRPOConfig, "device", property(lambda args: (args._setup_devices, torch.device("cpu"))[1]))
        patch.setattr(Accelerator, "device", property(lambda accelerator: torch.device("cpu")))
        (tmp_path / "cpu").mkdir()
        plain = trainer_of(folders, tmp_path / "cpu", gpu, **keys)
        plain.train()
        expected = plain.evaluate()
        expected_logps = plain.predict(pair_dataset(5, 2)).predictions
    assert len(expected_logps) == 5
    assert predicted.predictions == pytest.approx(expected_logps, rel=1e-5)
    for name, value in expected.items():
        if "time" not in name and "second" not in name:
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for got, wanted in zip(saved.parameters(), plain.policy.parameters(), strict=True):
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-6)
    gpu.__enter__()


# ---- that these tests see what they are for --------------------------------------------------------------------------


def a_number_read_in_the_step(patch):
    measure = step.measure

    def measure_and_count(run, policy_logps_P2, loss, share, balance, batch, sums):
        measure(run, policy_logps_P2, loss, share, balance, batch, sums)
        sums.tokens += int((batch.pairs.segment_BL >= 0).sum().item()) - batch.pairs.num_tokens

    patch.setattr(step, "measure", measure_and_count)


def a_tensor_made_from_a_list(patch):
    patch.setattr(live, "send", lambda tensor, device: torch.tensor(tensor.tolist(), device=device))


def a_field_that_stays_behind(patch):
    to = PairBatch.to
    patch.setattr(PairBatch, "to", lambda batch, device: replace(to(batch, device), labels_T=batch.labels_T))


def weights_on_the_host(patch):
    def policy_batches(*args, **kwargs):
        return [
            replace(batch, weight_P=torch.tensor(batch.weights))
            for batch in micro_batches.policy_batches(*args, **kwargs)
        ]

    patch.setattr(step, "policy_batches", policy_batches)


def a_sum_of_host_numbers_over_the_devices_group(patch):
    patch.setattr(step, "send", lambda tensor, device: tensor)


def objects_over_the_devices_group(patch):
    patch.setattr(ranks, "control_group", lambda group: group)


@pytest.mark.parametrize("mistake", [a_number_read_in_the_step, a_tensor_made_from_a_list])
def test_a_second_wait_is_seen(folders, tmp_path, gpu, monkeypatch, mistake):
    mistake(monkeypatch)
    trainer = trainer_of(folders, tmp_path, gpu)
    trainer.train()
    with pytest.raises(AssertionError):
        check_waits(trainer.clock.of_steps)


@pytest.mark.parametrize(
    ("mistake", "refused"),
    [
        (a_field_that_stays_behind, "aten::|must be on one device|labels"),
        (weights_on_the_host, "aten::div of cpu|aten::mul"),
        (a_sum_of_host_numbers_over_the_devices_group, "c10d::allreduce_ over a device's group of cpu"),
        (objects_over_the_devices_group, "over a device's group of cpu"),
    ],
)
def test_mixed_devices_are_seen(folders, tmp_path, gpu, monkeypatch, mistake, refused):
    mistake(monkeypatch)
    with pytest.raises((WrongDeviceError, ConfigError), match=refused):
        trainer_of(folders, tmp_path, gpu).train()
