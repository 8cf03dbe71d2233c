"""Every causal type of the installed transformers: right, or refused in one line; as policy without dropout and as reference."""

import logging
from collections import Counter

import pytest
import torch

from benchmarks.sweep_models import PAIRS, plain_logps, relative
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.logps.attention_choice import choose_end_to_end
from mrpo_scale.logps.attention_ways import REFERENCE
from mrpo_scale.logps.layer_masks import reaches_attention, why_not_shared
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import choose_shared_prompt, enable_pair_scoring, score_pairs
from mrpo_scale.logps.self_check import check_pair_scoring
from mrpo_scale.models.plan import disable_dropout
from tests.tiny_types import causal_types, tiny_model

CPU = torch.device("cpu")
DROPOUT = 0.1


@torch.no_grad()
def tried(model, name):
    """(outcome, what is said of it, whether its prompt is shared, why not) of one model."""
    expected_P2 = plain_logps(model)
    standing = model.config._attn_implementation
    try:
        enable_pair_scoring(model, name)
        layout = {
            "end_to_end": choose_end_to_end(model, CPU),
            "shared_prompt": choose_shared_prompt("auto", model, name),
        }
        reason = why_not_shared(model)
        disable_dropout(model)
        check_pair_scoring(model, name, **layout, device=CPU, train_equals_eval=True)
    except ConfigError as error:
        assert "\n" not in str(error)
        return "refused", str(error).partition("): ")[2][:110], False, None
    pairs = collate_pairs(PAIRS, **layout)
    evaluated_P2 = score_pairs(model.eval(), pairs)
    trained_P2 = score_pairs(model.train(), pairs)
    off, train_off = relative(evaluated_P2, expected_P2), relative(trained_P2, evaluated_P2.double())
    others = other_ways(model.eval(), standing, layout, expected_P2)
    outcome = "exact" if max([off, *others.values()]) < 1e-5 and train_off <= 1e-5 else "wrong"
    said = ", ".join(f"{name} {error:.0e}" for name, error in others.items())
    return outcome, f"reference {off:.0e}, train mode {train_off:.0e}, {said}", layout["shared_prompt"], reason


def other_ways(model, standing, layout, expected_P2):
    """{layout: error} where the prompt is shared: of separate rows, of rows under a mask, of one call per layer."""
    ways = {}
    if layout["shared_prompt"]:
        ways["separate"] = (standing, {"shared_prompt": False})
        ways["mask"] = (standing, {"shared_prompt": True})
        if reaches_attention(model):
            ways["one call"] = (REFERENCE, {"shared_prompt": True, "end_to_end": True})
    found = {}
    for name, (attention, other) in ways.items():
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        found[name] = relative(score_pairs(model, collate_pairs(PAIRS, **other)), expected_P2)
    return found


@pytest.mark.slow
def test_every_type_is_exact_or_refused():
    logging.getLogger("transformers").setLevel(logging.ERROR)
    outcomes = {}
    for name in causal_types():
        try:
            model = tiny_model(name, dropout=DROPOUT)
        except RuntimeError as error:
            outcomes[name] = "not built", str(error)[:110], False, None
        else:
            outcomes[name] = tried(model, name)
        print(name, *outcomes[name], sep="\t")
    counts = Counter(outcome for outcome, *_ in outcomes.values())
    shared = {name for name, (_, _, shares, _) in outcomes.items() if shares}
    separate = {
        name: why for name, (outcome, _, _, why) in outcomes.items() if outcome == "exact" and name not in shared
    }
    print(dict(counts), f"prompt shared: {len(shared)} of {counts['exact']}", separate, sep="\n")
    assert not [name for name, (outcome, *_) in outcomes.items() if outcome == "wrong"]
    assert counts["exact"] >= 120 and counts["exact"] + counts["refused"] >= 150, counts
    # By what their layers are: eleven types were listed by hand before.
    assert (
        len(shared) >= 90 and {"cohere2", "gemma4_text", "llama4_text", "mixtral", "olmo3", "phi3", "gpt_oss"} <= shared
    )
    assert {"mamba", "falcon_h1", "qwen3_5_text", "zaya", "bloom"} <= set(separate) and None not in separate.values()
