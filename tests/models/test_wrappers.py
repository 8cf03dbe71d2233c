"""Models that see pictures too, as references and as policy: their own class's numbers, no tower in memory, all of it on disk."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from benchmarks.sweep_models import try_type
from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.models.plan import load_policy
from mrpo_scale.models.source import ReferenceSource, check_config
from mrpo_scale.references.sharding import ShardedReference
from tests.tiny import pair_dataset, write_models, write_wrapper

TOWERS = {"mistral3": "vision_tower", "qwen2_5_vl": "visual", "gemma3": "vision_tower", "qwen3_5": "visual"}


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.mark.parametrize("model_type", ["llava", "mistral3", "qwen2_vl", "idefics2", "kosmos-2.5"])
def test_exact(model_type):
    """Against the class that sees pictures, which loads all of the folder; saved, that class loads it again. Idefics 2's text model
    is another family's, with a window; Kosmos 2.5 counts positions from its padding token's id."""
    outcome = try_type(model_type, auto=AutoModelForImageTextToText)
    assert (outcome.reference, outcome.policy) == ("exact", "exact"), outcome


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_are_not_built(tmp_path, kind):
    source = ReferenceSource("ref", write_wrapper(tmp_path, kind))
    stored = load_file(tmp_path / "model.safetensors")
    assert any(f"{TOWERS[kind]}." in key for key in stored)
    for model in (ShardedReference(source, None, torch.device("cpu")).model, load_policy(source)):
        assert not any(TOWERS[kind] in name for name in model.state_dict())


@pytest.mark.parametrize("kind", ["mistral3", "qwen2_5_vl"])
def test_a_trained_one_is_its_source_but_for_the_text(tmp_path, kind):
    source, saved = Path(write_wrapper(tmp_path / "source", kind)), tmp_path / "out"
    reference = write_models(tmp_path / "references")["llama"]
    args = MRPOConfig(
        output_dir=str(saved),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = MRPOTrainer(str(source), [reference], args, pair_dataset(8))
    trainer.train()
    trainer.save_model()
    before = load_file(source / "model.safetensors")
    after = {key: tensor for file in saved.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert after.keys() == before.keys()
    changed = {key for key in before if not torch.equal(after[key], before[key])}
    assert changed and not any(TOWERS[kind] in key or "projector" in key for key in changed)
    assert (saved / "config.json").read_bytes() == (source / "config.json").read_bytes()
    loaded, report = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids, use_cache=False).logits for model in (loaded, trainer.policy)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "udop", "is_encoder_decoder": True}))
    with pytest.raises(ConfigError, match="'udop' is an encoder and a decoder") as refused:
        check_config(ReferenceSource("ref", str(tmp_path)))
    assert "\n" not in str(refused.value)
