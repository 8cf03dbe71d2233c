"""A card and a report written from facts alone: no trainer, no model, no configuration."""

import json
from dataclasses import replace

import pytest
import yaml

from mrpo_scale.config.digest import command_digest
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.reports.artifacts import card_of, finished_run, write_artifacts, write_run_report
from mrpo_scale.reports.pictures import RunSummary
from mrpo_scale.reports.run_facts import RunFacts, run_name

LOG = [
    {"step": 1, "epoch": 0.5, "loss": 0.7, "rewards/margins": 0.0, "rewards/accuracies": 0.5},
    {"step": 2, "epoch": 1.0, "loss": 0.6, "rewards/margins": 0.2, "rewards/accuracies": 0.75},
    {"step": 2, "epoch": 1.0, "eval_loss": 0.65, "eval_rewards/margins": 0.1},
]


@pytest.fixture
def facts(tmp_path):
    return RunFacts(
        folder=tmp_path / "run",
        name=run_name("mrpo", 2),
        objective="mrpo",
        step=2,
        base_model="org/base",
        dataset=["org/pairs"],
        settings={"objective": "mrpo", "beta": 0.1},
        references=[("anchor", "org/base", None), ("B", "org/B", "abc")],
        reference_keys={"B": "12ab"},
        data={"train": {"pairs": 2, "empty_response": 1}},
        results=LOG[-1],
        versions={"torch": "2.13.0"},
        recipe={"beta": 0.1},
        command="digest",
        baselines=["dpo"],
        rows=[RunSummary("MRPO (K=2)", 0.75, 0.7, 0.25, 1.5, [0.5])],
        log=LOG,
    )


def test_a_finished_run(facts):
    write_artifacts(facts, {"license": "mit", "dataset": "org/named"})
    card = (facts.folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["datasets"], front["license"]) == ("org/base", ["org/named"], "mit")
    for line in ("| `beta` | 0.1 |", "| B | `org/B` | abc | 12ab |", "| train | 2 | 1 empty_response |"):
        assert line in card.splitlines()
    assert (facts.folder / "curves.png").stat().st_size > 0
    assert {"dpo/", "ref_cache/"} <= set((facts.folder / ".gitignore").read_text().split())
    written = json.loads((facts.folder / "run.json").read_text())
    assert (written["name"], written["status"], written["command"]) == ("MRPO (K=2)", "finished", "digest")
    assert "MRPO (K=2)" in (facts.folder / "report.html").read_text()


def test_a_run_under_way_has_a_report_and_no_card(facts):
    write_run_report(facts, "running, step 2 of 9")
    assert json.loads((facts.folder / "run.json").read_text())["status"] == "running, step 2 of 9"
    assert {p.name for p in facts.folder.iterdir()} == {"run.json", "report.html"}


def test_metadata_names_rows_from_python(facts):
    nameless = replace(facts, dataset="")
    assert card_of(nameless).dataset == "" and card_of(nameless, {"dataset": "org/x"}).dataset == "org/x"


def test_a_finished_run_is_found_by_its_recipe(facts):
    assert finished_run(facts.folder, "digest") is None
    write_artifacts(facts)
    state = {"global_step": 2, "max_steps": 2, "log_history": LOG}
    (facts.folder / "trainer_state.json").write_text(json.dumps(state))
    assert finished_run(facts.folder, "digest") == (list(facts.rows), LOG)
    assert finished_run(facts.folder, "another") is None
    (facts.folder / "trainer_state.json").write_text(json.dumps({**state, "max_steps": 3}))
    assert finished_run(facts.folder, "digest") is None


def test_the_digest_is_of_what_and_not_of_where(tmp_path):
    keys = {"use_cpu": True, "report_to": "none"}
    here = MRPOConfig(output_dir=str(tmp_path / "a"), **keys)
    there = MRPOConfig(output_dir=str(tmp_path / "b"), **keys)
    other = MRPOConfig(output_dir=str(tmp_path / "a"), beta=0.2, **keys)
    assert command_digest(None, here) == command_digest(None, there) != command_digest(None, other)


def test_names():
    assert [run_name(*args) for args in (("dpo", 3), ("mrpo", 3), ("multi_dpo", 2))] == [
        "DPO",
        "MRPO (K=3)",
        "MULTI-DPO (K=2)",
    ]
