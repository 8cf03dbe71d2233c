"""Mixtures of experts as the policy: two steps in one process and under ZeRO-3 on two ranks, saved as their source was."""

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from deepspeed import comm as deepspeed_comm
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.config.recipe import resource
from mrpo_scale.training.trainer import MRPOTrainer
from tests.distributed.test_saved_folder import tensors
from tests.tiny import pair_dataset
from tests.tiny_types import VOCABULARY, tiny_model

# MORE are run by hand, because three trainings of each take ten seconds: docs/models.md says with which result.
TYPES = ["mixtral", "qwen3_5_moe"]
MORE = ["qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss", "olmoe", "minimax_m2", "nemotron_h", "jamba", "lfm2_moe"]
BALANCED = ["mixtral", "qwen3_5_moe"]  #: transformers has an auxiliary loss for them


def letters():
    """A tokenizer of few words, a letter each, for a tiny model's few embeddings."""
    words = ["<pad>", "</s>", "?", *" \n:.,abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"]
    assert len(words) <= VOCABULARY
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", model_max_length=512)


def write_mixture(folder, model_type, **save):
    tiny_model(model_type).save_pretrained(folder, **save)
    letters().save_pretrained(folder)
    return str(folder)


def train_and_save(source, output_dir, learning_rate, deepspeed, **keys):
    """Two steps of four pairs; {what was logged of each}. Runs in a worker of a pool or in this process."""
    if dist.is_initialized():
        deepspeed_comm.init_distributed(dist_backend="gloo")
    args = MRPOConfig(
        output_dir=str(output_dir),
        deepspeed=str(resource("ds_configs") / "zero3_cpu.json") if deepspeed else None,
        per_device_train_batch_size=2 if deepspeed else 4,
        max_steps=2,
        learning_rate=learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **keys,
    )
    trainer = MRPOTrainer(source, args=args, train_dataset=pair_dataset(12))
    try:
        trainer.train()
        trainer.save_model()
    finally:
        if trainer.deepspeed is not None:
            trainer.deepspeed.destroy()
        AcceleratorState._reset_state()
        gc.collect()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MORE if os.environ.get("MRPO_EVERY_MIXTURE") else TYPES)
def test_two_steps(pool2, tmp_path, model_type):
    source = write_mixture(tmp_path / "source", model_type, max_shard_size="100KB")
    coef = {"router_aux_loss_coef": 0.5} if model_type in BALANCED else {}
    still = pool2.run(train_and_save, source, tmp_path / "still", 0.0, deepspeed=True, **coef)[0]
    moved = pool2.run(train_and_save, source, tmp_path / "moved", 1e-3, deepspeed=True, router_aux_loss_coef=0.0)[0]
    alone = train_and_save(source, tmp_path / "alone", 1e-3, deepspeed=False, router_aux_loss_coef=0.0)
    if coef:  # in the loss of a step, and without any weight moved by it
        assert still[0]["loss"] == pytest.approx(alone[0]["loss"] + 0.5 * still[0]["router/loss"], rel=1e-4)
        assert 1 <= still[0]["router/busiest"] <= 4 and 0 <= still[0]["router/idle"] < 1
    assert "router/loss" not in moved[0]
    # Loaded by two loaders, the policy and its anchor are one model.
    assert abs(still[0]["rewards/chosen"]) < 1e-5 and abs(still[1]["rewards/rejected"]) < 1e-5
    for ours, theirs in zip(moved, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert moved[1]["rewards/chosen"] != 0
    before, kept, trained = (tensors(folder) for folder in (source, tmp_path / "still", tmp_path / "moved"))
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {k: (t.dtype, t.shape) for k, t in trained.items()}
    assert before.keys() == kept.keys() and all(torch.equal(kept[key], tensor) for key, tensor in before.items())
    assert not all(torch.equal(trained[key], tensor) for key, tensor in before.items())
    assert (tmp_path / "moved" / "config.json").read_bytes() == (Path(source) / "config.json").read_bytes()
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moved", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert torch.isfinite(again(input_ids=torch.arange(10, 30)[None], use_cache=False).logits).all()
