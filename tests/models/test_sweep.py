"""A few types of the sweep over all (benchmarks/sweep_models.py): exact as reference and policy, or refused for what they are."""

import json
import logging
from pathlib import Path

import pytest

from benchmarks.sweep_models import try_type

# Dense, recurrent; experts stacked on disk, or one by one, beside dense layers, in a wrapper; converted whole; another decoder; an
# indexer; the text of a model that transformers builds as a whole only.
EXACT = {
    "llama": "as stored",
    "gemma3_text": "as stored",
    "falcon_h1": "as stored",
    "gpt_oss": "as stored",
    "granitemoe": "as stored",
    "mixtral": "experts one by one",
    "qwen3_moe": "experts one by one",
    "qwen3_5_moe": "experts one by one",
    "deepseek_v3": "experts one by one",
    "lfm2_moe": "experts one by one",
    "kimi_linear": "experts one by one; converted whole",
    "olmo_hybrid": "converted whole",
    "bart": "as stored",
    "glm_moe_dsa": "experts one by one",
    "mllama": "as stored",
}
REFUSED = {
    **dict.fromkeys(("bert", "electra", "rembert"), "layers of its own between its body and its output head"),
    "doge": "it is not causal",  # of keys of equal tokens, which score alike, it keeps one or another by the text's length
}


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.mark.parametrize("model_type", EXACT)
def test_exact(model_type):
    outcome = try_type(model_type)
    assert (outcome.reference, outcome.policy) == ("exact", "exact"), outcome
    assert outcome.layout == EXACT[model_type]
    assert bool(outcome.experts) == any(word in model_type for word in ("moe", "mix", "oss", "deepseek", "kimi"))


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused(model_type):
    outcome = try_type(model_type)
    assert (outcome.reference, outcome.policy) == ("refused", "refused")
    assert REFUSED[model_type] in outcome.why


def test_the_page_is_of_the_results():
    """Both are written by one run."""
    root = Path(__file__).parents[2]
    page = (root / "docs/models.md").read_text()
    results = json.loads((root / "benchmarks/results/models.json").read_text())
    for entry in results["types"]:
        assert f"| {entry['model_type']} | {entry['reference']} | {entry['policy']} |" in page
    assert not [entry for entry in results["types"] if entry["reference"] in ("wrong", "crash")]
