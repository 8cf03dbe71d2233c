"""A run on responses of several turns and tool calls, from the policy's step to the score cache and `mrpo eval`'s preference."""

import datasets
import pytest
import torch

from mrpo_scale import MRPOConfig, MRPOTrainer
from tests.tool_templates import logps_by_hand, rows, write_tool_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_tool_models(tmp_path_factory.mktemp("models"))


def run(folders, folder, count=6, **keys):
    args = MRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
        learning_rate=0.0,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **keys,
    )
    examples = datasets.Dataset.from_list(rows(count))
    trainer = MRPOTrainer(folders["qwen"], [folders["llama"], folders["mistral"]], args, examples)
    trainer.train()
    return trainer, next(entry for entry in trainer.state.log_history if "loss" in entry)


def by_hand(folders, count=6):
    """[K, P, 2] log-probs and [P, 2] tokens of the policy's, both of what the assistant writes."""
    found = torch.tensor(
        [[logps_by_hand(folders[name], row) for row in rows(count)] for name in ("qwen", "llama", "mistral")]
    )
    return found[..., 0].double(), found[0, ..., 1].double()


def loss_by_hand(logps_KP2, lengths_P2, beta=0.1, epsilon_max=0.1):
    """Equations 7 to 10 with the harmonic mean, in float64; the policy is still the anchor."""
    totals_P2 = logps_KP2.sum(0).abs()
    epsilon_P2 = epsilon_max * totals_P2 / totals_P2.sum(-1, keepdim=True)
    anchor_P2 = logps_KP2[0]
    clipped_KP2 = torch.minimum(torch.maximum(logps_KP2, (1 + epsilon_P2) * anchor_P2), (1 - epsilon_P2) * anchor_P2)
    clipped_KP2[0] = anchor_P2
    confidence_KP = (logps_KP2[..., 0] - logps_KP2[..., 1]).abs()
    weights_KP = confidence_KP / confidence_KP.sum(0)
    virtual_P2 = -(weights_KP.log()[..., None] - clipped_KP2).logsumexp(0)
    rewards_P2 = beta * (anchor_P2 - virtual_P2) / lengths_P2
    return -torch.nn.functional.logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1]).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(("loss_type", "head_backward"), [("sigmoid", "in_forward"), ("sigmoid_norm", "recompute")])
def test_a_step_of_three_models_equals_the_loss_by_hand(folders, tmp_path, head_backward, loss_type):
    """The mean over six pairs in two micro-batches; the length-normalised loss divides by the scored tokens. Live and
    cached, by a shared prompt and by two sequences a pair."""
    logps_KP2, lengths_P2 = by_hand(folders)
    expected = loss_by_hand(logps_KP2, lengths_P2 if loss_type == "sigmoid_norm" else torch.ones_like(lengths_P2))
    keys = {"head_backward": head_backward, "loss_type": [loss_type]}
    cache = {"ref_cache_dir": str(tmp_path / "cache"), "ref_scoring": "precompute", "shared_prompt": "false"}
    for name, more in {"live": {}, "cached": cache}.items():
        trainer, logged = run(folders, tmp_path / name, **keys, **more)
        assert trainer.scores.live == ([0, 1, 2] if name == "live" else [])
        assert logged["loss"] == pytest.approx(expected, rel=1e-5)
        assert logged["logps/chosen"] == pytest.approx(logps_KP2[0, :, 0].mean().item(), rel=1e-5)
    stored = [store.lookup(trainer.train_dataset.pairs.row_keys).tokens_N2 for store in trainer.scores.stores]
    assert stored[0].tolist() == lengths_P2.tolist(), "what the cache says each log-prob is the sum of"
