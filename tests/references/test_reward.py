"""A reward model's scores against the model called by hand, and what is refused before anything of it loads."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.references.reward import RewardModel, plan_reward, sample_tokens
from tests.tiny import pair_rows, write_models

CPU = torch.device("cpu")


def write_reward(folder, base, labels=1, **config):
    """A classifier with ``base``'s body and tokenizer, and a head of its own."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    with torch.no_grad():
        model.get_submodule("score").weight.normal_(0, 0.3)
    for key, value in config.items():
        setattr(model.config, key, value)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def reward(bases, tmp_path_factory):
    return write_reward(tmp_path_factory.mktemp("reward") / "llama", bases["llama"])


@pytest.fixture(scope="module")
def samples():
    """Seven prompts with responses of every length, one of them empty."""
    rows = pair_rows(7)
    return [row["prompt"] for row in rows], ["", *(row["chosen"][0]["content"] for row in rows[1:])]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_a_score_is_the_classifiers_on_the_text_of_its_own_template(bases, samples, tmp_path, family):
    """Three templates: ChatML, one that writes a BOS, none."""
    folder = write_reward(tmp_path / family, bases[family])
    loaded = RewardModel.load(folder, device=CPU)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert not loaded.model.training and loaded.model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts, responses = samples
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        if tokenizer.chat_template:
            head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            turns = [*prompt, {"role": "assistant", "content": response}]
            whole = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")  # after the end of turn
        else:
            head = f"Human: {prompt[0]['content']}\n\nAssistant: "
            whole = f"{head}{response}</s>"
        # As when a model generates: no token spans the end of the generation prompt.
        pieces = tokenizer([head, whole.removeprefix(head)], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([pieces[0] + pieces[1]])
        expected.append(model(ids).logits.item())
    torch.testing.assert_close(loaded.scores(prompts, responses), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_batches_do_not_change_scores(reward, samples):
    prompts, responses = samples
    together = RewardModel.load(reward, device=CPU)
    alone = RewardModel.load(reward, device=CPU, tokens_per_forward=1)
    scores = together.scores(prompts, responses)
    assert scores.dtype == torch.float32 and scores.std() > 0.01 and not scores.requires_grad
    torch.testing.assert_close(alone.scores(prompts, responses), scores, rtol=1e-6, atol=1e-6)
    backwards = together.scores(prompts[::-1], responses[::-1])
    torch.testing.assert_close(backwards.flip(0), scores, rtol=1e-6, atol=1e-6)
    assert together.scores([], []).shape == (0,)


def test_a_cut_response_has_no_end_of_turn(reward, samples):
    loaded = RewardModel.load(reward, device=CPU)
    prompts, responses = samples
    ids = [ids for prompt, ids in map(partial(sample_tokens, loaded.text), prompts, responses)]
    whole, cut = (loaded.scores(prompts[1:2], responses[1:2], cut=[flag]) for flag in (False, True))
    assert whole != cut
    assert sample_tokens(loaded.text, prompts[1], responses[1], True)[1] == ids[1][:-1]


def test_a_live_zero3_configuration_is_left_alone(reward, samples):
    """It would partition whatever loads over all ranks, and this model is each rank's own."""
    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        loaded = RewardModel.load(reward, device=CPU)
        assert is_deepspeed_zero3_enabled() and alive.is_zero3()
    finally:
        unset_hf_deepspeed_config()
    assert not any(hasattr(parameter, "ds_id") for parameter in loaded.model.parameters())
    torch.testing.assert_close(loaded.scores(*samples), RewardModel.load(reward, device=CPU).scores(*samples))


def test_more_tokens_than_its_context_are_refused(reward, samples):
    with pytest.raises(ConfigError, match=r"reward model: .* tokens, its context is 512"):
        RewardModel.load(reward, device=CPU).scores(samples[0][:1], ["one two " * 400])


# --- refused, in one line, from headers and configs


def refusal(spec):
    with pytest.raises(ConfigError) as error:
        plan_reward(spec, device=CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def change(folder, **keys):
    file = Path(folder) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def test_a_causal_model_is_no_reward_model(bases):
    message = refusal(bases["llama"])
    assert "(LlamaForCausalLM) is not a sequence classifier" in message and "`mrpo reward` trains one" in message


def test_two_labels(bases, tmp_path):
    assert "has 2 labels, and a reward is one number" in refusal(write_reward(tmp_path / "two", bases["llama"], 2))


def test_a_head_that_the_checkpoint_lacks(bases, tmp_path):
    folder = write_reward(tmp_path / "headless", bases["qwen2"])
    file = str(tmp_path / "headless" / "model.safetensors")
    weights = {name: tensor for name, tensor in load_file(file).items() if name != "score.weight"}
    save_file(weights, file, {"format": "pt"})
    assert "lacks score.weight, so its scores would come from random weights" in refusal(folder)


def test_a_tensor_that_the_checkpoint_lacks(bases, tmp_path):
    folder = write_reward(tmp_path / "holes", bases["qwen2"])
    file = str(tmp_path / "holes" / "model.safetensors")
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, {"format": "pt"})
    assert "misses model.norm.weight" in refusal(folder)


def test_no_padding_token(bases, tmp_path):
    folder = write_reward(tmp_path / "unpadded", bases["llama"], pad_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert "has no padding token" in refusal(folder)
    change(folder, pad_token_id=-1)  # Llama 2's first checkpoints
    assert "has no padding token" in refusal(folder)


def test_code_of_its_own_and_keys_of_references(reward, tmp_path):
    assert "safetensors" in refusal(str(_pickled(reward, tmp_path / "pickled")))
    assert "`reward_model.quantize` is for references alone" in refusal({"model": reward, "quantize": "nf4"})
    own = tmp_path / "own"
    _copy(reward, own)
    change(own, model_type="mine", auto_map={"AutoConfig": "code.Mine"})
    (own / "code.py").write_text("raise SystemExit('code was run')")
    assert "set `trust_remote_code: true`" in refusal(str(own))


def _copy(folder, to):
    to.mkdir()
    for file in Path(folder).iterdir():
        (to / file.name).write_bytes(file.read_bytes())


def _pickled(folder, to):
    _copy(folder, to)
    torch.save(load_file(to / "model.safetensors"), to / "pytorch_model.bin")
    (to / "model.safetensors").unlink()
    return to
