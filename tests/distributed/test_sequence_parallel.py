"""Rows of tokens over 2 and 4 ranks: loss and gradients of one process, whatever the family, the layout and the references."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import sequence_memory
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.logps.attention_choice import choose_end_to_end
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, score_pairs
from mrpo_scale.logps.self_check import check_pair_scoring
from mrpo_scale.logps.sequence_parallel import make_sequence_group
from mrpo_scale.models.plan import disable_dropout
from mrpo_scale.objective import Objective, preference_loss
from tests.distributed.test_training import train
from tests.logps.test_shared_prompt import random_pairs, tiny_model
from tests.tiny import write_models

#: Longer and shorter than the window of 8, and with a prompt that more than one rank of four holds a part of.
PAIRS = random_pairs([(20, 17, 25), (3, 5, 2), (9, 30, 1), (1, 4, 4)])
#: Two heads of keys: each is repeated for two of four ranks. Gemma 3's and Qwen2's layers have windows, some of them.
FAMILIES = ("llama", "qwen2", "gemma3_text")


def scorer(family, seed=0, attention=None):
    model = tiny_model(family, attention or "sdpa", seed)
    enable_pair_scoring(model, family)
    assert choose_end_to_end(model, torch.device("cpu"), asked=attention)
    return model


def loss_and_gradients(family, shared_prompt, checkpointing, group, attention=None):
    """(loss, gradients, scores of K = 3 references) of MRPO on the pairs; the references are three models of this process, of the
    policy's own type among them, and have plain rows."""
    policy = scorer(family, attention=attention).train()
    disable_dropout(policy)
    if checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    references = [scorer(family, 1, attention), scorer("llama", 2), scorer("gemma3_text", 3)]
    layout = {"shared_prompt": shared_prompt, "end_to_end": True}
    logps_P2 = score_pairs(policy, collate_pairs(PAIRS, group=group, **layout))
    with torch.no_grad():  # while the policy's graph waits for its backward
        ref_logps_KP2 = torch.stack([score_pairs(model, collate_pairs(PAIRS, **layout)) for model in references])
    loss = preference_loss(logps_P2, ref_logps_KP2, Objective(name="mrpo", beta=0.1)).loss
    if (
        group is not None and group.rank
    ):  # the first rank's pairs: it alone has a loss, as the owner of a micro-batch has
        loss = loss * 0
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in policy.named_parameters()}, ref_logps_KP2


def over_ranks(cases):
    """Largest differences to one process, of each case: (loss, gradient relative to the largest of its tensor, references)."""
    found = {}
    group = make_sequence_group(dist.get_world_size(), None)
    for case in cases:
        loss, gradients, references = loss_and_gradients(*case[:3], group, *case[3:])
        for gradient in (loss, *gradients.values()):
            dist.all_reduce(gradient)
        expected_loss, expected, expected_references = loss_and_gradients(*case[:3], None, *case[3:])
        off = max(((gradients[n] - g).abs().max() / g.abs().max()).item() for n, g in expected.items())
        found[case] = (
            abs(loss / expected_loss - 1).item(),
            off,
            (references - expected_references).abs().max().item(),
        )
    return found


CASES = [
    *((family, shared, False) for family in FAMILIES for shared in (True, False)),
    ("gemma3_text", True, True),  # layers are computed again, and exchange again
    ("gemma2", True, False, "reference_spans"),  # soft-capped, by a kernel that is told by index
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_and_every_gradient_are_those_of_one_process(ranks, request):
    for found in request.getfixturevalue(f"pool{ranks}").run(over_ranks, CASES):
        for case, (loss, gradient, references) in found.items():
            assert loss < 1e-5 and gradient < 1e-5, (case, loss, gradient)
            assert references == 0, case  # the same numbers, not nearly the same


def checked():
    """What the check at start says of a model over a group, and of one whose tokens mix outside of attention."""
    group = make_sequence_group(dist.get_world_size(), None)
    model, options = scorer("qwen2"), {"shared_prompt": True, "end_to_end": True, "device": torch.device("cpu")}
    difference = check_pair_scoring(model, "policy", group=group, **options)
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda _module, _args, hidden: hidden - 0.5 * hidden[:, :1])  # of the row's first token
    try:
        check_pair_scoring(model, "policy", group=group, **options)
    except ConfigError as error:
        return difference, str(error)
    return difference, None


def test_the_check_at_start_goes_over_the_group(pool2):
    for difference, refusal in pool2.run(checked):
        assert difference < 1e-3
        assert "something beside its attention mixes tokens" in refusal


def half_and_half(folders, root):
    """Five steps over the group, and once more from the third as two ranks that each compute their own pairs: both logs."""
    keys = {
        "batch_size": 1,
        "accumulation": 1,
        "max_steps": 5,
        "max_length": 512,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    together = train(folders, root / "together", sequence_parallel_size=2, **keys)
    if dist.get_rank() == 0:
        shutil.copytree(root / "together" / "checkpoint-3", root / "apart" / "checkpoint-3")
    dist.barrier()
    apart = train(folders, root / "apart", resume="auto", **keys)
    return together["log"], apart["log"], len(apart["rows"]), together["held_out"], apart["held_out"]


def test_a_checkpoint_goes_on_without_the_group(pool2, tmp_path):
    """Under ZeRO-3: the key is no part of what a run must keep, for the weights are the same."""
    folders = write_models(Path(tmp_path) / "models")
    for together, apart, rows, *held_out in pool2.run(half_and_half, folders, tmp_path, timeout=300):
        assert rows == 2, "the last two steps alone"
        assert [entry["step"] for entry in apart] == [entry["step"] for entry in together] == [1, 2, 3, 4, 5]
        for entry, expected in zip(apart, together, strict=True):
            for key in ("loss", "grad_norm", "references/qwen2/weight"):
                assert entry[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-7), (entry["step"], key)
        assert held_out[0]["eval_loss"] == pytest.approx(held_out[1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["keeps", "recomputes"])
@pytest.mark.parametrize("shared_prompt", [True, False], ids=["shared", "separate"])
def test_four_ranks_keep_a_quarter_of_a_pair_each(pool4, shared_prompt, checkpointing):
    alone, *_ = pool4.run(sequence_memory.measured, 512, shared_prompt, checkpointing, 1)
    together = pool4.run(sequence_memory.measured, 512, shared_prompt, checkpointing, 4)
    assert max(kept for kept, _ in together) <= 0.3 * alone[0]
