"""The paper's recipes say what the paper says, and docs/paper.md shows its tables right."""

import re
from pathlib import Path

import pytest
import torch
from mrpo_kernels.virtual_reference import adaptive_epsilon

from mrpo_scale.config.model_spec import parse_ref_models
from mrpo_scale.config.recipe import parse

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text()
HUB = {"L": "meta-llama/Llama-2-7b-chat-hf", "M": "teknium/OpenHermes-2.5-Mistral-7B", "Q": "Qwen/Qwen1.5-7B-Chat"}
RECIPES = [*sorted((ROOT / "recipes").glob("paper_*.yaml")), ROOT / "recipes" / "llama2_mistral_qwen.yaml"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_has_the_papers_settings(path):
    """Section "Experimental Results": 1e-5, batch 8, beta and epsilon_max 0.1; one epoch and the own split for UltraFeedback."""
    script, config = parse(["--config", str(path), "--bf16", "false"])
    assert (config.learning_rate, config.num_train_epochs, config.beta, config.epsilon_max) == (1e-5, 1, 0.1, 0.1)
    assert (config.objective, config.clip, config.ref_weights, config.aggregate) == (
        "mrpo", "adaptive", ["confidence"], "harmonic",
    )  # fmt: skip
    assert 8 * config.per_device_train_batch_size * config.gradient_accumulation_steps == 8, "on eight GPUs"
    assert (script.dataset_train_split, script.dataset_test_split, script.held_out) == (
        "train_prefs",
        "test_prefs",
        None,
    )


@pytest.mark.parametrize("path", RECIPES[:-1], ids=lambda p: p.stem)
def test_a_recipe_has_the_models_of_its_name(path):
    policy, references = re.fullmatch(r"paper_(.)_from_(.+)", path.stem).groups()
    script, _ = parse(["--config", str(path), "--bf16", "false"])
    assert script.model_name_or_path == HUB[policy.upper()]
    assert [spec.model for spec in parse_ref_models(script.ref_models)] == [
        HUB[letter.upper()] for letter in references
    ]


def test_table_4_adds_up_as_the_page_says():
    """The averages are those of the row, but for the one that the page calls wrong."""
    rows = re.findall(r"^\| (\S.*?) \| ([\d. |]+) \|$", PAGE.split("### Table 4")[1].split("###")[0], re.MULTILINE)
    assert len(rows) == 9
    off = []
    for name, numbers in rows:
        *tasks, average = map(float, numbers.split("|"))
        assert len(tasks) == 6
        if abs(sum(tasks) / 6 - average) > 0.1:
            off.append((name, round(sum(tasks) / 6, 2), average))
    assert off == [("L: base", 48.85, 51.0)]
    assert "48.85" in PAGE


def test_two_adaptive_epsilons_share_epsilon_max():
    """What the page says of the paper's comparison with a fixed epsilon: Eq. 9's two values sum to epsilon_max."""
    logps_KP2 = -100 * torch.rand(3, 50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    epsilon_P2 = adaptive_epsilon(logps_KP2, 0.1)
    torch.testing.assert_close(epsilon_P2.sum(-1), torch.full((50,), 0.1, dtype=torch.float64))
