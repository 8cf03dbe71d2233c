"""The model card: what is in it, what is left out, and that nothing private gets in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mrpo_scale.reports import model_card
from mrpo_scale.reports.model_card import ModelCard, public
from mrpo_scale.reports.pictures import RunSummary


def card(**changes: Any) -> ModelCard:
    values: dict[str, Any] = {
        "base_model": "org/base",
        "dataset": "org/pairs",
        "settings": {"objective": "mrpo", "beta": 0.1, "ref_weights": [0.25, 0.75]},
        "references": [("anchor", "org/base", None), ("B", "/home/ann/private/B", "abc123")],
        "data": {"train": {"pairs": 90, "empty_response": 7, "prompt_too_long": 3}, "eval": {"pairs": 10}},
        "results": {
            "eval_rewards/margins": 0.123456,
            "eval_runtime": 12.5,
            "eval_samples_per_second": 3.0,
            "epoch": 1.0,
            "step": 9,
        },
        "versions": {"torch": "2.13.0"},
        "curves": "curves.png",
        "reference_keys": {"B": "12ab"},
        "rows": [RunSummary("MRPO (K=2)", 0.75, 0.7, 0.25, 1.5, [0.5, 2.25])],
    }
    return ModelCard(**{**values, **changes})


def front_matter(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def test_card_says_what_it_is_given() -> None:
    text = card().render()
    assert front_matter(text) == {
        "library_name": "transformers",
        "tags": ["mrpo", "preference-optimization"],
        "base_model": "org/base",
        "datasets": ["org/pairs"],
    }
    for line in (
        "| `ref_weights` | 0.25, 0.75 |",
        "| anchor | `org/base` | - | - |",
        "| B | `B` (local) | abc123 | 12ab |",
        "| MRPO (K=2) | 75.0% | 70.0% | +0.250 | 1.50 | 2.25 GiB |",
        "| train | 90 | 7 empty_response, 3 prompt_too_long |",
        "| eval | 10 | none |",
        "| `rewards/margins` | 0.1235 |",
        "![Training curves](curves.png)",
        "- torch: 2.13.0",
    ):
        assert line in text.splitlines()
    assert "runtime" not in text and "per_second" not in text


def test_what_models_do_not_see_of_the_data_is_on_the_card() -> None:
    said = {"train": ["2 pairs: texts spell out `</s>`, which becomes the control token, for B"], "eval": []}
    assert f"| train | {said['train'][0]} |" in card(remarks=said).render()
    assert card(remarks=said).facts()["remarks"] == {"train": said["train"]}
    assert "do not see" not in card().render()


def test_card_names_no_folder_of_the_authors_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    text = card(
        base_model="models/mine", dataset="/home/ann/data/train.jsonl"
    ).render()  # reads as a hub id, but is a folder
    assert "base_model" not in front_matter(text) and "datasets" not in front_matter(text)
    assert "/home/ann" not in text and "models/mine" not in text and "hf_secret" not in text
    assert "`mine` (local)" in text and "`train.jsonl` (local)" in text


@pytest.mark.parametrize("name", ["toy:llama", "./model", "../model", "~/model", "data/train.jsonl", "a/b/c", "/abs"])
def test_what_is_no_hub_id(name: str) -> None:
    assert not model_card.is_hub_id(name)


def test_card_without_results_or_curves() -> None:
    text = card(results={}, curves=None, versions={}).render()
    assert "No held-out set was measured." in text and "![" not in text and "versions" not in text


def test_a_bar_in_a_value_does_not_end_its_cell() -> None:
    assert r"| `clip` | a\|b c |" in card(settings={"clip": "a|b\nc"}).render()


def test_the_recipe_can_be_read_back(tmp_path: Path) -> None:
    """As YAML, with what is on the author's disk cut to names and a chat template as it is, backticks in it included."""
    (tmp_path / "models").mkdir()
    template = "{% if a/b %}```{{ c }}```{% endif %}"
    recipe = {
        "model_name_or_path": "org/base",
        "ref_models": [str(tmp_path / "models"), {"model": "~/private/B", "dtype": "bfloat16"}, "toy:llama"],
        "dataset_name": "./data/pairs.jsonl",
        "chat_template": template,
        "learning_rate": 5e-7,
        "lr_scheduler_kwargs": {"min_lr": 0.0},
    }
    text = card(recipe=recipe).render()
    block = (
        text.split("```yaml\n")[1].rsplit("````", 1)[0]
        if "````yaml" in text
        else text.split("```yaml\n")[1].split("```")[0]
    )
    assert yaml.safe_load(block) == {
        **recipe,
        "ref_models": ["models", {"model": "B", "dtype": "bfloat16"}, "toy:llama"],
        "dataset_name": "pairs.jsonl",
    }
    assert str(tmp_path) not in text and "private" not in text


def test_facts_are_json_without_the_authors_disk(tmp_path: Path) -> None:
    facts = card(base_model=str(tmp_path), dataset=[f"{tmp_path}/a.jsonl", "org/pairs"]).facts()
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["base_model"], facts["datasets"]) == (tmp_path.name, ["a.jsonl", "org/pairs"])
    assert facts["references"][1] == {"name": "B", "source": "B", "revision": "abc123", "key": "12ab"}
    assert str(tmp_path) not in json.dumps(facts) and "/home/ann" not in json.dumps(facts)


def test_public_keeps_what_is_no_path() -> None:
    for value in ("org/model", "toy:llama", "no", 0.1, None, True, ["confidence"], {"a": 1}):
        assert public(value) == value


def test_more_front_matter() -> None:
    matter = front_matter(card(metadata={"license": "mit", "tags": "mine"}).render())
    assert matter["license"] == "mit" and matter["tags"] == ["mrpo", "preference-optimization", "mine"]
