"""One step of TRL's RLOO with MultiReferenceReward: its gradient is that of the leave-one-out estimator of Eq. 6 with K KL terms.

Needs the extra `rlhf`.
"""

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from mrpo_scale.references.reward import RewardModel
from tests.references.test_multi_reference_reward import (
    BETA,
    end_with_the_turn,
    eq6,
    logp,
    make,
    oracle,
    other_policy,
)
from tests.references.test_reward import write_reward
from tests.tiny import pair_rows, write_models
from tests.tools import module_of_extra

trl = module_of_extra("trl", "rlhf")

PROMPTS = 3  # samples are cut or end, and their advantages have both signs


class Gradients(TrainerCallback):
    """What the optimizer is given."""

    def on_pre_optimizer_step(self, args, state, control, model, **rest):
        self.found = {name: parameter.grad.double() for name, parameter in model.named_parameters()}


def test_a_step_is_the_leave_one_out_gradient_of_equation_6(tmp_path):
    models = write_models(tmp_path)
    end_with_the_turn(models["llama"])
    folders = {**models, "reward": write_reward(tmp_path / "reward", models["qwen2"])}
    scorer = RewardModel.load(folders["reward"], device=torch.device("cpu"))
    samples = {}

    def reward(prompts, completions, completion_ids, trainer_state, **columns):
        samples.update(prompts=prompts, texts=[turn["content"] for (turn,) in completions], ids=completion_ids)
        samples["cut"] = [ids[-1] != trainer.processing_class.eos_token_id for ids in completion_ids]
        return scorer.scores(prompts, samples["texts"], samples["cut"])

    gradients = Gradients()
    trainer = trl.RLOOTrainer(
        model=folders["llama"],
        reward_funcs=make(folders, reward=reward, clip="fixed"),
        args=trl.RLOOConfig(
            output_dir=str(tmp_path / "run"),
            beta=BETA,
            num_generations=2,
            num_iterations=1,
            per_device_train_batch_size=2 * PROMPTS,
            max_completion_length=24,
            max_steps=1,
            max_grad_norm=0.0,
            bf16=False,
            use_cpu=True,
            report_to="none",
            seed=3,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in pair_rows(PROMPTS)]),
        processing_class=AutoTokenizer.from_pretrained(folders["llama"]),
        callbacks=[gradients],
    )
    # The reference is loaded from the folder: from here on the policy is another model, and no KL is zero.
    policy = other_policy(folders["llama"])
    trainer.model.load_state_dict(policy.state_dict())
    trainer.train()

    policy, tokenizer = policy.double(), trainer.processing_class
    cut = samples["cut"]
    heads = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True) for p in samples["prompts"]]
    logps_N = torch.stack(
        [logp(policy, head["input_ids"], ids) for head, ids in zip(heads, samples["ids"], strict=True)]
    )
    rewards_N, ref_logps_KN = oracle(folders, samples["prompts"], samples["texts"], samples["ids"], cut)
    value_N = eq6(rewards_N, logps_N.detach(), ref_logps_KN, "fixed")
    # Leave-one-out of two samples: each has the other as its baseline.
    advantage_P2 = value_N.view(-1, 2) - value_N.view(-1, 2).flip(1)
    (-(advantage_P2 * logps_N.view(-1, 2)).mean()).backward()

    assert set(map(bool, advantage_P2[:, 0] > 0)) == {True, False} and 0 < sum(cut) < len(cut)
    expected = {name: parameter.grad for name, parameter in policy.named_parameters()}
    scale = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    off = torch.stack([(gradients.found[name] - expected[name]).norm() for name in expected]).norm()
    assert scale > 1e-2 and off / scale < 1e-5
