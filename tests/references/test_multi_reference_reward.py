"""The bracket of MultiReferenceReward and a library's own KL make Eq. 6; oracles are transformers' models in float64."""

import pytest
import torch
from mrpo_kernels.virtual_reference import CLIPS, clip_to_anchor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import mrpo_scale
from mrpo_scale import MultiReferenceReward
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.references.multi_reference_reward import multi_reference_term
from tests.references.test_reward import write_reward
from tests.tiny import pair_rows, write_models

BETA, WEIGHTS, EPSILON = 0.3, [0.2, 0.5, 0.3], 0.05
NAMES = ("llama", "qwen2", "gpt_neox")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three models of three tokenizers, the first is the anchor and speaks ChatML to its end; and a reward model."""
    root = tmp_path_factory.mktemp("world")
    models = write_models(root)
    end_with_the_turn(models["llama"])
    return {**models, "reward": write_reward(root / "reward", models["qwen2"])}


def end_with_the_turn(folder):
    """Generation stops where the template ends turns."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)


def other_policy(folder):
    """The anchor after some training: its weights moved."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return model


def tokens(folder, prompt, response, cut=False):
    """(prompt, response) in a model's tokens, by its tokenizer and template alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template:
        head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        end = "<|im_end|>" if "<|im_end|>" in head else "</turn>"
    else:
        head, end = f"Human: {prompt[0]['content']}\n\nAssistant: ", "</s>"
    return tokenizer([head, response + ("" if cut else end)], add_special_tokens=False)["input_ids"]


def logp(model, prompt_ids, response_ids):
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    logps_LV = model(ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    return logps_LV.gather(1, ids[0, len(prompt_ids) :, None]).sum()


@torch.no_grad()
def oracle(folders, prompts, texts, ids, cut):
    """(r [N], log pi_k [K, N]) in float64."""
    model = AutoModelForSequenceClassification.from_pretrained(folders["reward"]).double()
    samples = list(zip(prompts, texts, cut, strict=True))
    read = [tokens(folders["reward"], *sample) for sample in samples]
    rewards_N = torch.stack([model(torch.tensor([prompt + response])).logits[0, 0] for prompt, response in read])
    logps_K = []
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(folders[name]).double()
        read = [tokens(folders[name], *sample) for sample in samples]
        if name == "llama":
            read = [(prompt, own) for (prompt, _), own in zip(read, ids, strict=True)]
        logps_K.append(torch.stack([logp(model, *sample) for sample in read]))
    return rewards_N, torch.stack(logps_K)


def eq6(rewards_N, policy_logps_N, ref_logps_KN, clip):
    """r - beta sum_k alpha_k (log pi - log pi_k), written out."""
    clipped_KN = clip_to_anchor(ref_logps_KN, CLIPS[clip](ref_logps_KN, EPSILON))
    kl_N = sum(weight * (policy_logps_N - logps_N) for weight, logps_N in zip(WEIGHTS, clipped_KN, strict=True))
    return rewards_N - BETA * kl_N


def make(folders, **options):
    keys = {"beta": BETA, "ref_weights": WEIGHTS, "epsilon_max": EPSILON, "device": "cpu", **options}
    return MultiReferenceReward(folders["llama"], [folders["qwen2"], folders["gpt_neox"]], **keys)


@pytest.fixture(scope="module")
def samples(folders):
    """Five samples of three prompts, so that one has no partner; the ids of the last two do not end, and those of the first
    are not what its text tokenizes to."""
    rows = [pair_rows(3)[i] for i in (0, 1, 0, 2, 1)]
    prompts = [row["prompt"] for row in rows]
    texts = ["one two", "yes", "", "three four five", "no maybe slow"]
    cut = [False, False, False, True, True]
    read = [tokens(folders["llama"], *sample) for sample in zip(prompts, texts, cut, strict=True)]
    ids = [response for _, response in read]
    letters = AutoTokenizer.from_pretrained(folders["llama"])(list("one two"), add_special_tokens=False)["input_ids"]
    assert len(letters) > len(ids[0]) - 1
    ids[0] = [token for letter in letters for token in letter] + ids[0][-1:]
    return prompts, texts, ids, cut


@pytest.mark.parametrize("clip", ["none", "fixed"])
def test_with_the_librarys_kl_it_is_equation_6(folders, samples, clip):
    prompts, texts, ids, cut = samples
    rewards_N, ref_logps_KN = oracle(folders, prompts, texts, ids, cut)
    policy = other_policy(folders["llama"]).double()
    with torch.no_grad():
        policy_N = torch.stack(
            [logp(policy, tokens(folders["llama"], p, t)[0], y) for p, t, y in zip(prompts, texts, ids, strict=True)]
        )
    expected_N = eq6(rewards_N, policy_N, ref_logps_KN, clip)
    bracket_N = rewards_N + BETA * multi_reference_term(ref_logps_KN, WEIGHTS, clip, EPSILON)
    torch.testing.assert_close(bracket_N - BETA * (policy_N - ref_logps_KN[0]), expected_N, rtol=1e-14, atol=0)

    term = make(folders, reward=folders["reward"], clip=clip)
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    given = term(prompts=prompts, completions=messages, completion_ids=ids, trainer_state=None)
    assert all(type(reward) is float for reward in given)
    torch.testing.assert_close(torch.tensor(given).double(), bracket_N, rtol=1e-6, atol=1e-5)


def test_rewards_of_others_are_added_and_texts_alone_are_whole(folders, samples):
    prompts, texts, _, _ = samples
    seen = {}

    def length(prompts, completions, completion_ids, answer):
        seen.update(prompts=prompts, answer=answer)
        return [len(text) for text in completions]

    with_reward = make(folders, reward=length)(prompts, texts, answer=[1] * 5)
    without = make(folders)(prompts, texts)
    assert seen == {"prompts": prompts, "answer": [1] * 5}
    assert [a - b for a, b in zip(with_reward, without, strict=True)] == pytest.approx(list(map(len, texts)), abs=1e-5)
    whole = [tokens(folders["llama"], prompt, text)[1] for prompt, text in zip(prompts, texts, strict=True)]
    assert without == pytest.approx(make(folders)(prompts, texts, whole), abs=1e-6)
    assert make(folders)([], []) == []


def test_forwards_do_not_change_it(folders, samples):
    prompts, texts, ids, _ = samples
    one_by_one = make(folders, tokens_per_forward=1, shared_prompt="false")(prompts, texts, ids)
    assert make(folders, ref_weights="uniform")(prompts, texts, ids) != one_by_one
    assert make(folders)(prompts, texts, ids) == pytest.approx(one_by_one, abs=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ref_weights": "confidence"}, "`ref_weights: confidence` comes from pairs whose better response is known"),
        ({"ref_weights": [0.5, 0.5]}, "has 2 entries but there are 3 references"),
        ({"clip": "adaptive"}, "`clip: adaptive` makes the epsilon of a sample depend on the samples beside it"),
        ({"reward": "{llama}"}, "is not a sequence classifier"),
    ],
)
def test_refused_before_any_weights_load(folders, monkeypatch, options, message):
    monkeypatch.setattr("mrpo_scale.references.multi_reference_reward.ShardedReference", None)
    options = {key: value.format(**folders) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(ConfigError, match=message):
        make(folders, **options)


def test_tool_calls_are_refused(folders, samples):
    turns = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]
    with pytest.raises(ConfigError, match="a completion of 2 messages"):
        make(folders)(samples[0][:1], [turns])


def test_it_is_exported():
    assert "MultiReferenceReward" in mrpo_scale.__all__ and set(mrpo_scale.__all__) == set(mrpo_scale._WHERE)
