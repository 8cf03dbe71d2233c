"""KD and RLHF on one process: samples are the policy's own, any split of them gives the same step, and what is refused."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data.inputs import TRAIN_SET
from mrpo_scale.logps.generation import sample_responses
from mrpo_scale.logps.pair_forward import enable_pair_scoring
from mrpo_scale.training.prepare import prepare_run
from mrpo_scale.training.sampling import PolicySampler
from tests.references.test_reward import write_reward
from tests.tiny import pair_dataset, write_models
from tests.tools import require_module

CPU = torch.device("cpu")
ROWS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """With a reward model in `reward`; the policy's generation_config.json asks for everything that is no sample of it."""
    root = tmp_path_factory.mktemp("models")
    folders = write_models(root)
    wanted = {
        "do_sample": True,
        "top_k": 1,
        "top_p": 0.1,
        "temperature": 0.2,
        "repetition_penalty": 3.0,
        "min_new_tokens": 9,
    }
    (Path(folders["llama"]) / "generation_config.json").write_text(json.dumps(wanted))
    return {**folders, "reward": write_reward(root / "reward", folders["qwen2"])}


def config(folder, objective, **keys):
    keys = {
        "ref_weights": ["0.2", "0.5", "0.3"],
        "clip": "adaptive",
        "max_completion_length": 10,
        "max_steps": 3,
        **keys,
    }
    return MRPOConfig(
        output_dir=str(folder),
        objective=objective,
        gradient_checkpointing=keys.pop("gradient_checkpointing", False),
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"per_device_train_batch_size": 8, **keys},
    )


def trained(folders, folder, objective, rows=ROWS, **keys):
    if objective == "rlhf":
        keys |= {"reward_model": folders["reward"]}
    references = [folders["qwen2"], folders["gpt_neox"]]
    trainer = MRPOTrainer(folders["llama"], references, config(folder, objective, **keys), pair_dataset(rows))
    trainer.train()
    return trainer


def test_samples_are_the_policys_own_whatever_its_files_say(folders):
    """Frequencies of first tokens beside a longer prompt, against the softmax of the prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    assert model.generation_config.top_k == 1
    enable_pair_scoring(model, "policy")
    short, count = list(range(30, 36)), 3000
    with torch.no_grad():
        probabilities = model(torch.tensor([short])).logits[0, -1].softmax(-1)
    state = torch.get_rng_state()
    options = {"ends": {2}, "pad_token_id": 0, "device": CPU}
    rows = sample_responses(model, [[7] * 20, *[short] * count], max_new_tokens=1, seed=3, **options)[1:]
    assert torch.equal(torch.get_rng_state(), state) and model.generation_config.top_k == 1 and "forward" in vars(model)
    counts = Counter(row[0] for row in rows)
    for token in probabilities.topk(5).indices.tolist():
        p = probabilities[token].item()
        assert abs(counts[token] / count - p) < 4 * math.sqrt(p * (1 - p) / count), token
    again, other = (sample_responses(model, [short] * 4, max_new_tokens=6, seed=seed, **options) for seed in (3, 4))
    assert again == sample_responses(model, [short] * 4, max_new_tokens=6, seed=3, **options) != other
    assert all(len(row) == 6 or row[-1] == 2 for row in again)


def fixed_responses(self, prompts, rows, step):
    """The same samples of a row on any rank and in any batch: of every length, now and then empty, cut, repeated or no text."""
    end = sorted(self.ends)[-1]
    responses = []
    for row in rows:
        rng = np.random.default_rng([row, step])
        both = [[*rng.integers(8, 250, rng.integers(0, 12)).tolist(), end] for _ in range(2)]
        if row % 4 == 0:
            both[0] = both[0][:-1] or [9]  # no end of turn
        if row % 5 == 0:
            both[1] = list(both[0])
        if row % 3 == 0:
            both[1] = [end] if row % 2 else [1]  # empty, and cut without any text
        responses.append((both[0], both[1]))
    return responses


SPLITS = [
    {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "shared_prompt": "false",
        "head_backward": "recompute",
    },
    {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_tokens_per_micro_batch": 200,
        "gradient_checkpointing": True,
    },
]


def wordy_responses(self, prompts, rows, step):
    """The same after words: pieces that settle."""
    words = self.plan.texts[0].tokenizer(" red green two one")["input_ids"]
    return [
        tuple(words * (row % 3) + words[: row % 2] + one for one in both)
        for row, both in zip(rows, fixed_responses(self, prompts, rows, step), strict=True)
    ]


@pytest.mark.parametrize(("objective", "level"), [("kd", "aligned"), ("rlhf", "sequence")])
def test_no_split_of_a_window_changes_a_step(folders, tmp_path, monkeypatch, objective, level):
    monkeypatch.setattr(PolicySampler, "_responses", fixed_responses if objective == "rlhf" else wordy_responses)
    # Of the second window four rows are fillers.
    keys = {"sampled_fraction": 0.8, "kd_level": level}
    whole = trained(folders, tmp_path / "whole", objective, **keys).state.log_history
    assert whole[0]["sampled/identical"] > 0 and whole[0]["sampled/cut"] > 0
    assert whole[0]["sampled/kl/anchor"] == pytest.approx(0, abs=1e-3) and whole[0]["sampled/kl/qwen2"] > 5
    assert ("sampled/reward" in whole[0]) == (objective == "rlhf") != ("rewards/margins" in whole[0])
    assert (whole[0].get("sampled/pieces", 0) > 1.5) == (level == "aligned")
    for i, split in enumerate(SPLITS):
        log = trained(folders, tmp_path / str(i), objective, **keys, **split).state.log_history
        for entry, expected in zip(log[:2], whole, strict=False):
            for key in ("loss", "grad_norm", "sampled/kl/gpt_neox", "sampled/length", "sampled/cut"):
                assert entry[key] == pytest.approx(expected[key], rel=1e-5), (split, expected["step"], key)


def test_the_first_loss_of_kd_by_hand(folders, tmp_path, monkeypatch):
    """DPO's at the anchor, log 2, and the mean of the log-ratios that whole models give of the samples' texts."""
    monkeypatch.setattr(PolicySampler, "_responses", fixed_responses)
    keys = {"clip": "none", "max_steps": 1}
    first = trained(folders, tmp_path / "kd", "kd", rows=8, **keys).state.log_history[0]
    rlhf = trained(folders, tmp_path / "rlhf", "rlhf", rows=8, **keys).state.log_history[0]
    run = prepare_run(
        folders["llama"],
        [],
        config(tmp_path / "a", "dpo", ref_weights=["uniform"], max_completion_length=256),
        pair_dataset(8),
        None,
        None,
        {},
    )
    sampler_ends = {run.plan.texts[0].response_ids("a", raw=raw, cut=False)[-1] for raw in (False, True)}
    models = {n: AutoModelForCausalLM.from_pretrained(folders[n]) for n in ("llama", "qwen2", "gpt_neox")}
    tokenizers = {n: AutoTokenizer.from_pretrained(folders[n]) for n in models}

    def logp(name, head, response):
        if not response:
            return 0.0
        with torch.no_grad():
            logits = models[name](torch.tensor([head + response])).logits[0].log_softmax(-1)
        return sum(logits[len(head) + i - 1, token].item() for i, token in enumerate(response))

    def of_text(name, prompt, text, ended):
        tokenizer = tokenizers[name]
        if tokenizer.chat_template:
            head, end = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True), "</turn>"
        else:
            head, end = f"Human: {prompt[0]['content']}\n\nAssistant: ", "</s>"
        both = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in (head, text + (end if ended else ""))]
        bos = [] if tokenizer.chat_template else tokenizer("a")["input_ids"][: len(tokenizer("a")["input_ids"]) - 1]
        return logp(name, [*bos, *both[0]], both[1])

    class Ends:
        ends = sampler_ends

    kl, plain, kls = [], [], {name: [] for name in models}
    pairs = run.pair_sets[TRAIN_SET]
    for row in range(8):
        prompt = pairs.pair(row).prompt
        own_head = run.plan.texts[0].prompt_ids(pairs.pair(row))
        (both,) = fixed_responses(Ends, None, [row], 1)
        for ids in both:
            ended = ids[-1] in sampler_ends
            text = tokenizers["llama"].decode(ids[:-1] if ended else ids, skip_special_tokens=True)
            own = logp("llama", own_head, ids)
            for name in ("qwen2", "gpt_neox"):
                kls[name].append(own - of_text(name, prompt, text, ended))
            kl.append((0.5 * kls["qwen2"][-1] + 0.3 * kls["gpt_neox"][-1]) / len(ids))
            plain.append(0.5 * kls["qwen2"][-1] + 0.3 * kls["gpt_neox"][-1])
    for name in ("qwen2", "gpt_neox"):
        assert first[f"sampled/kl/{name}"] == pytest.approx(np.mean(kls[name]), rel=1e-5)
    assert first["loss"] == pytest.approx(math.log(2) + 0.1 * np.mean(kl), rel=1e-5)
    assert rlhf["loss"] == pytest.approx(0.1 * np.mean(plain) - rlhf["sampled/reward"], rel=1e-5)


def test_a_run_samples_what_its_seed_and_step_say(folders, tmp_path):
    """Also in parts of one prompt, of some prompts only, and the random state of the run stays as it was."""
    one, two = (trained(folders, tmp_path / name, "kd").state.log_history for name in "ab")
    assert [e.get("sampled/kl/qwen2") for e in one] == [e.get("sampled/kl/qwen2") for e in two]
    other = trained(folders, tmp_path / "c", "kd", seed=3, data_seed=42).state.log_history
    assert other[0]["sampled/kl/qwen2"] != one[0]["sampled/kl/qwen2"]
    some = trained(folders, tmp_path / "d", "kd", sampled_fraction=0.3, generation_batch_size=1, kd_normalize="none")
    assert math.isfinite(some.state.log_history[0]["loss"])


def test_an_adapter_is_on_while_the_policy_writes_and_off_for_the_anchor(folders, tmp_path, monkeypatch):
    require_module("peft", "pip install peft")
    drawn = []
    draw = PolicySampler._responses
    monkeypatch.setattr(PolicySampler, "_responses", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    keys = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "gradient_checkpointing": True}
    log = trained(folders, tmp_path / "lora", "kd", **keys, kd_level="aligned", max_steps=3).state.log_history
    assert log[0]["sampled/kl/anchor"] == 0 and abs(log[2]["sampled/kl/anchor"]) > 1e-4
    trained(folders, tmp_path / "full", "kd", max_steps=1)
    assert drawn[0] == drawn[3], "an adapter of zeros is the policy"


REFUSED = [
    (
        {"objective": "rlhf", "reward_model": "r", "ref_weights": ["confidence"]},
        ["`ref_weights: confidence`", "uniform"],
    ),
    ({"objective": "kd", "ref_weights": ["confidence"]}, ["`ref_weights: confidence`", "labelled pair"]),
    ({"objective": "kd", "ref_scoring": "precompute"}, ["`ref_scoring: precompute`", "`objective: kd`", "use `live`"]),
    (
        {"objective": "rlhf", "reward_model": "r", "ref_scoring": "follow", "ref_cache_dir": "x"},
        ["`ref_scoring: follow`"],
    ),
    ({"objective": "kd", "temperature": 0}, ["`temperature: 0`", "only 1"]),
    ({"objective": "kd", "sampled_fraction": 0}, ["`sampled_fraction: 0`"]),
    ({"objective": "kd", "max_completion_length": 0}, ["`max_completion_length: 0`"]),
    ({"objective": "kd", "kd_level": "words"}, ["`kd_level: words`", "aligned"]),
    (
        {"objective": "kd", "kd_level": "aligned", "ref_scoring": "precompute"},
        ["`ref_scoring: precompute`", "use `live`"],
    ),
    ({"objective": "kd", "kd_normalize": "words"}, ["`kd_normalize: words`", "tokens"]),
    ({"objective": "kd", "ref_placement": "partition"}, ["`ref_placement: partition`", "`spread`"]),
    ({"objective": "rlhf"}, ["`objective: rlhf`", "`reward_model`"]),
]


@pytest.mark.parametrize(("keys", "words"), REFUSED, ids=lambda x: " ".join(map(str, x))[:60])
def test_values_that_make_no_run_are_refused_in_one_line(tmp_path, keys, words):
    with pytest.raises(ConfigError) as refused:
        MRPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "ref_weights": ["uniform"], **keys})
    said = str(refused.value)
    assert "\n" not in said and all(word in said for word in words), said


def test_objectives_that_are_compared_share_a_recipe(tmp_path):
    keys = {"reward_model": "r", "sampled_fraction": 0.5, "max_completion_length": 8, "ref_weights": ["uniform"]}
    for objective in ("mrpo", "dpo", "multi_dpo", "kd", "rlhf"):
        assert MRPOConfig(output_dir=str(tmp_path), use_cpu=True, objective=objective, **keys).objective == objective


def test_models_that_make_no_run_are_refused_before_weights_load(folders, tmp_path):
    with pytest.raises(ConfigError, match="`objective: kd` learns from the references beside the anchor"):
        prepare_run(
            folders["llama"], [], config(tmp_path, "kd", ref_weights=["uniform"]), pair_dataset(8), None, None, {}
        )
    args = config(tmp_path, "rlhf", reward_model=folders["qwen2"])
    with pytest.raises(ConfigError, match="is not a sequence classifier"):
        prepare_run(folders["llama"], [folders["qwen2"]] * 2, args, pair_dataset(8), None, None, {})
