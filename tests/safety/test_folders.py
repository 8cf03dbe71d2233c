"""What a run writes, and over what: models, links, other people's folders. And what `report`, `eval` and `compare` find there."""

import datetime
import json
import os
import pickle
import shutil

import numpy as np
import pytest

from mrpo_scale.cli import run_command
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.lifecycle.template_date import decide_date
from mrpo_scale.training.held_out import HeldOutScores
from tests.safety.hostile import Trap, bounded


def the_policy(place):
    folder = place.model()
    return {"model_name_or_path": folder, "output_dir": folder}


def a_reference(place):
    folder = place.model("qwen2")
    return {"ref_models": folder, "output_dir": folder}


def a_link_to_the_policy(place):
    folder = place.model()
    (place.root / "link").symlink_to(folder)
    return {"model_name_or_path": folder, "output_dir": place.root / "link"}


def a_baseline_that_is_the_policy(place):
    shutil.copytree(place.models["llama"], place.run / "dpo")
    return {"model_name_or_path": place.run / "dpo", "baselines": "dpo"}


def a_checkpoint_that_is_the_policy(place):
    shutil.copytree(place.models["llama"], place.run / "checkpoint-1")
    return {"model_name_or_path": place.run / "checkpoint-1", "save_strategy": "steps", "save_steps": 1}


def a_file(place):
    place.write("run", "mine")
    return {}


def a_link_inside(name, target="victim"):
    def make(place):
        place.write("victim", "mine")
        place.write("run/run.json", "{}")
        (place.run / name).symlink_to(place.root / target)
        return {}

    return make


def another_folder(name):
    def make(place):
        place.write(f"run/{name}", "mine")
        return {}

    return make


def a_checkpoint_from_elsewhere(place):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        place.write(f"theirs/checkpoint-1/{name}", pickle.dumps(Trap(place.executed)))
    place.write("theirs/checkpoint-1/trainer_state.json", json.dumps({"global_step": 1}))
    shutil.copy(place.models["llama"] + "/model.safetensors", place.root / "theirs/checkpoint-1")
    return {"resume_from_checkpoint": place.root / "theirs/checkpoint-1"}


OUTPUTS = {
    "the policy's folder": (the_policy, ["output_dir", "is the folder of the model"]),
    "a reference's folder": (a_reference, ["output_dir", "is the folder of the model"]),
    "a link to the policy's folder": (a_link_to_the_policy, ["output_dir", "is the folder of the model"]),
    "a baseline's folder that is the policy's": (
        a_baseline_that_is_the_policy,
        ["output_dir", "is the folder of the model"],
    ),
    "a checkpoint's folder that is the policy's": (
        a_checkpoint_that_is_the_policy,
        ["output_dir", "among its checkpoints"],
    ),
    "a file": (a_file, ["output_dir", "cannot be made"]),
    "below what is no folder": (lambda place: {"output_dir": place.data / "run"}, ["output_dir", "cannot be made"]),
    "a card that is a link": (a_link_inside("README.md"), ["output_dir", "README.md is a link to", "overwritten"]),
    "weights that are a link": (a_link_inside("model.safetensors"), ["output_dir", "is a link to"]),
    "a link to nothing": (a_link_inside("config.json", "absent"), ["output_dir", "is a link to"]),
    "somebody's repository": (another_folder("README.md"), ["output_dir", "README.md", "no run has written"]),
    "somebody's model": (
        another_folder("model.safetensors"),
        ["output_dir", "model.safetensors", "no run has written"],
    ),
    "a cache that is a file": (lambda place: {"ref_cache_dir": place.data}, ["ref_cache_dir", "is a file"]),
    "a checkpoint from elsewhere": (
        a_checkpoint_from_elsewhere,
        ["resume_from_checkpoint", "is not in `output_dir", "pickles"],
    ),
}


@pytest.mark.parametrize("case", OUTPUTS, ids=lambda name: name.replace(" ", "-"))
def test_where_a_run_writes(case, place):
    make, says = OUTPUTS[case]
    place.refused("train", place.words(**make(place)), *says)


def test_a_cache_in_the_model_and_an_output_in_the_cache_overwrite_nothing(place):
    """Both are odd and harmless: the model stays as it was, and the cache is whole."""
    folder = place.model()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with bounded():
        run_command("score", place.words(model_name_or_path=folder, ref_cache_dir=folder))
        run_command("score", place.words(model_name_or_path=folder, ref_cache_dir=folder, output_dir=folder / "run"))
        run_command("score", [*place.words(model_name_or_path=folder, ref_cache_dir=folder), "--verify"])
    assert {name: (folder / name).read_bytes() for name in before} == before


LOG = {"log_history": [{"step": 1, "epoch": 1.0, "loss": 1.0}]}
REPORTS = {
    "a state that is a list": ("[]", {}, ["trainer_state.json", "not a JSON object"]),
    "a state of brackets": ("[" * 100_000, {}, ["trainer_state.json", "nested too deep"]),
    "a log that is text": ({"log_history": "x"}, {}, ["log_history"]),
    "a log of numbers": ({"log_history": [1, 2]}, {}, ["log_history"]),
    "steps that are text": ({"log_history": [{"step": "x", "loss": "y"}]}, {}, ["log_history"]),
    "facts that are a list": (LOG, [], ["run.json", "not a JSON object"]),
    "facts of brackets": (LOG, '{"recipe": ' + "[" * 100_000, ["run.json", "nested too deep"]),
    "rows of something else": (LOG, {"rows": [{"name": "x", "evil": 1}]}, ["run.json", "`rows`"]),
    "references that are numbers": (LOG, {"references": [5]}, ["run.json", "`references`"]),
    "settings that are a list": (LOG, {"settings": []}, ["run.json", "`settings`"]),
    "rows of text": (LOG, {"rows": [{"name": "x", "ranking_accuracy": "y"}]}, ["run.json", "`rows`"]),
    "a step without end": ('{"log_history": [{"step": Infinity}]}', {}, ["log_history"]),
    "a recipe of 200 levels": (LOG, '{"recipe": ' + '{"a": ' * 200 + "1" + "}" * 201, ["run.json", "levels deep"]),
    "data without pairs": (LOG, {"data": {"train": {}}}, ["run.json", "`data`"]),
}


def theirs(place, state, facts):
    for name, value in (("trainer_state.json", state), ("run.json", facts)):
        place.write(f"theirs/{name}", value if isinstance(value, str) else json.dumps(value))
    return place.root / "theirs"


@pytest.mark.parametrize("case", REPORTS, ids=lambda name: name.replace(" ", "-"))
def test_reports_of_folders_that_others_made(case, place):
    state, facts, says = REPORTS[case]
    place.refused("report", [str(theirs(place, state, facts))], *says)


def test_a_report_replaces_links_and_follows_none(place):
    """A checkpoint folder without a number is none. What runs in the page: tests/reports/test_html_report.py."""
    folder, victim = theirs(place, LOG, {"name": "</script><script>alert(1)</script>"}), place.write("victim", "mine")
    place.write("theirs/checkpoint-evil/trainer_state.json", "{}")
    for name in ("report.html", "report.partial"):
        (folder / name).symlink_to(victim)
    run_command("report", [str(folder)])
    assert victim.read_text() == "mine" and not (folder / "report.html").is_symlink()
    assert "<script>alert" not in (folder / "report.html").read_text()


def test_evaluation_writes_through_no_link_and_names_a_record_that_is_none(place):
    words = [f"--model={place.models['llama']}", f"--dataset_name={place.data}", f"--output_dir={place.run}"]
    words += ["--max_pairs=0", "--judge_model=x", "--judge_url=http://127.0.0.1:9/v1", "--yes=true"]
    records = place.write("run/responses-0.jsonl", '{"a": 1}\n')
    place.refused("eval", words, "responses-0.jsonl, line 1 is not a record")
    records.write_text("[" * 100_000 + "\n")
    place.refused("eval", words, "responses-0.jsonl, line 1 is not a record")
    records.rename(place.root / "victim")
    (place.run / "verdicts.jsonl").symlink_to(place.root / "victim")
    place.refused("eval", words, "output_dir", "verdicts.jsonl is a link to")


def test_a_comparison_writes_through_no_link(place):
    recipe = place.write("recipe.yaml", "beta: 0.1\n")
    words = [word for word in place.words() if not word.startswith("--output_dir")]
    place.write("victim", "mine")
    place.write("compare/here", "")
    (place.root / "compare" / "recipe.yaml").symlink_to(place.root / "victim")
    arguments = ["--config", str(recipe), *words, "--output", str(place.root / "compare"), "--dry_run"]
    place.refused("compare", arguments, "--output", "recipe.yaml is a link to")


def test_held_out_scores_hold_no_pickles(tmp_path):
    np.savez(tmp_path / "eval_logps.npz", names=np.array([Trap(tmp_path / "executed")], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        HeldOutScores.load(tmp_path / "eval_logps.npz")
    assert not (tmp_path / "executed").exists()


def of_text(text):
    return lambda path: path.write_text(text)


#: {what a record of the date is: (how it is made, what is said of it)}
DATES = {
    "no JSON": (of_text("{"), "is not JSON"),
    "a list": (of_text("[]"), "list indices"),
    "null": (of_text("null"), "NoneType"),
    "an empty object": (of_text("{}"), "'template_date'"),
    "a number": (of_text('{"template_date": 20261126}'), "must be str"),
    "a template": (of_text('{"template_date": "{{ 7 * 7 }}"}'), "{{ 7 * 7 }}"),
    "a day that is none": (of_text('{"template_date": "2026-02-30"}'), "day"),
    "brackets": (of_text("[" * 1000), "nested too deep"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe"), "is not UTF-8"),
    "a megabyte": (of_text('{"template_date": "2026-11-26"}' + " " * (1 << 20)), "more than 1024 bytes"),
    "a folder": (lambda path: path.mkdir(), "is no plain file"),
    "a pipe": (os.mkfifo, "is no plain file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is no plain file"),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "which does not exist"),
}


@pytest.mark.parametrize("case", DATES, ids=lambda name: name.replace(" ", "-"))
def test_a_record_of_the_date_that_is_none(case, place):
    """In a cache; in a run's own folder a link is refused before it is read."""
    make, says = DATES[case]
    (place.root / "cache").mkdir()
    make(place.root / "cache" / "template_date.json")
    words = place.words(ref_cache_dir=place.root / "cache")
    for command in ("train", "score"):
        place.refused(command, words, "template_date.json", says, "delete it and set `template_date`")


def test_a_record_of_another_century_is_a_date(place):
    """It is taken, said and kept: nobody knows why a cache is of that day. The key counts more."""
    day = place.write("cache/template_date.json", '{"template_date": "2126-11-26"}')
    args = MRPOConfig(output_dir=str(place.run), ref_cache_dir=str(day.parent), use_cpu=True, report_to="none")
    assert decide_date(args) == datetime.date(2126, 11, 26)
    args.template_date = "2026-11-26"
    assert decide_date(args) == datetime.date(2026, 11, 26)
