"""MultiReferenceReward with references that two ranks share: ranks with other samples, or none, get what one process gets."""

import pytest
import torch.distributed as dist

from tests.references.test_multi_reference_reward import make
from tests.references.test_reward import write_reward
from tests.tiny import pair_rows, write_models

SHARES = [slice(0, 5), slice(5, 7)], [slice(0, 7), slice(7, 7)]


def samples():
    rows = pair_rows(7)
    return [row["prompt"] for row in rows], [row["chosen"][0]["content"] for row in rows]


def rewards(folders):
    """Of each way to share the samples, this rank's; 64 tokens a forward, so that ranks need different numbers of them."""
    term = make(folders, reward=folders["reward"], group=dist.group.WORLD, tokens_per_forward=64)
    assert all(reference.model.group_size == 2 for reference in term.references)
    prompts, texts = samples()
    return [term(prompts[mine], texts[mine]) for mine in (shares[dist.get_rank()] for shares in SHARES)]


def test_shared_references_give_the_same_rewards(pool2, tmp_path):
    models = write_models(tmp_path)
    folders = {**models, "reward": write_reward(tmp_path / "reward", models["qwen2"])}
    alone = make(folders, reward=folders["reward"])(*samples())
    first, second = pool2.run(rewards, folders)
    for one, other in zip(first, second, strict=True):
        assert one + other == pytest.approx(alone, abs=1e-5)
