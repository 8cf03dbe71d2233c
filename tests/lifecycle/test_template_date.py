"""Chat templates that print the date: one date for a whole run and cache, however many days they take."""

import datetime
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data import PreferencePair
from mrpo_scale.data.tokenization import ModelText
from mrpo_scale.lifecycle import template_date
from mrpo_scale.models.plan import plan_models
from tests.tiny import CHATML, pair_rows, tokenizer, write_models
from tests.tools import require_tool

DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\nToday Date: {{ date_string }}<|im_end|>\n" + CHATML
)
DAYS = [datetime.date(2026, 11, day) for day in (25, 26, 27)]
PAIR = PreferencePair([{"role": "user", "content": "one"}], "two", "three")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The policy and one reference print the date, the other does not."""
    folders = write_models(tmp_path_factory.mktemp("models"))
    for name in ("llama", "qwen2"):
        (Path(folders[name]) / "chat_template.jinja").write_text(DATED)
    return folders


@pytest.fixture
def clock(monkeypatch):
    def turn_to(day):
        monkeypatch.setattr(template_date, "_today", lambda: day)

    turn_to(DAYS[0])
    return turn_to


def config(folder, **keys):
    return MRPOConfig(output_dir=str(folder), **{"use_cpu": True, "report_to": "none", **keys})


def plan(folders, args, run=None):
    template_date.decide_date(args)
    plan = plan_models(folders["llama"], [folders["qwen2"], folders["gpt_neox"]], args, None)
    template_date.record_date(args, plan.dated, run)
    return plan


def view(date, template=DATED):
    return ModelText(tokenizer(template, 300), name="policy", max_context=None, date=date)


def test_a_template_prints_the_date_it_is_given():
    for day, shown in zip(DAYS, ("25 Nov 2026", "26 Nov 2026", "27 Nov 2026"), strict=True):
        assert view(day).render_prompt(PAIR).startswith(f"<|im_start|>system\nToday Date: {shown}<|im_end|>")
    first, second = view(DAYS[0]), view(DAYS[1])
    assert "25 Nov" in first.render_prompt(PAIR), "also after another date was rendered with the same template"
    assert first.fingerprint() != second.fingerprint()
    assert view(DAYS[0], CHATML).fingerprint() == view(DAYS[1], CHATML).fingerprint(), "dates that nobody prints"


def test_a_run_keeps_its_date(folders, tmp_path, clock, caplog):
    with caplog.at_level(logging.INFO, "mrpo_scale"):
        begun = plan(folders, config(tmp_path / "run"), run=tmp_path / "run")
    assert begun.dated == ["policy", "anchor", "qwen2"]
    assert "the chat templates of policy, anchor, qwen2 print the date: it is 2026-11-25" in caplog.text
    clock(DAYS[1])
    later = plan(folders, config(tmp_path / "run"), run=tmp_path / "run")
    assert [text.fingerprint() for text in later.texts] == [text.fingerprint() for text in begun.texts]
    assert "25 Nov 2026" in later.texts[0].render_prompt(PAIR)
    anew = config(tmp_path / "run", resume_from_checkpoint="never")
    assert template_date.decide_date(anew) == DAYS[1], "a run that starts anew begins today"
    typed = config(tmp_path / "run", template_date="2026-11-27")
    assert template_date.decide_date(typed) == DAYS[2], "the key counts most"


def test_a_cache_keeps_its_date_and_says_so(folders, tmp_path, clock, caplog):
    cache = {"ref_cache_dir": str(tmp_path / "cache")}
    plan(folders, config(tmp_path / "scored", **cache))
    assert not (tmp_path / "scored").exists(), "a job that only scores begins no run"
    clock(DAYS[1])
    before = (tmp_path / "cache").stat().st_mtime_ns
    plan(folders, config(tmp_path / "run", **cache), run=tmp_path / "run")
    assert (tmp_path / "cache").stat().st_mtime_ns == before, "a cache that is there to read only is not written"
    assert template_date.recorded_date(tmp_path / "run") == "2026-11-25"
    with caplog.at_level(logging.WARNING, "mrpo_scale"):
        plan(folders, config(tmp_path / "other", template_date="2026-11-27", **cache), run=tmp_path / "other")
    assert "was begun with `template_date: 2026-11-25`; this run has 2026-11-27" in caplog.text
    assert "Set `template_date: 2026-11-25` to read them" in caplog.text
    assert template_date.recorded_date(tmp_path / "cache") == "2026-11-25"


def test_the_run_counts_before_the_cache(folders, tmp_path, clock):
    plan(folders, config(tmp_path / "run"), run=tmp_path / "run")
    clock(DAYS[1])
    plan(folders, config(tmp_path / "scored", ref_cache_dir=str(tmp_path / "cache")))
    both = config(tmp_path / "run", ref_cache_dir=str(tmp_path / "cache"))
    assert template_date.decide_date(both) == DAYS[0]
    main = config(tmp_path / "main")
    assert template_date.decide_date(main, [tmp_path / "none", tmp_path / "run"]) == DAYS[0], (
        "a baseline was begun before"
    )


def test_nothing_is_recorded_where_no_template_prints_a_date(folders, tmp_path, clock, caplog):
    args = config(tmp_path / "run", template_date="2026-11-26", ref_cache_dir=str(tmp_path / "cache"))
    template_date.decide_date(args)
    neox = plan_models(folders["gpt_neox"], [], args, None)
    template_date.record_date(args, neox.dated, tmp_path / "run")
    assert not list(tmp_path.rglob(template_date.RECORD))
    assert "`template_date: 2026-11-26` has no effect" in caplog.text


@pytest.mark.parametrize("value", ["26 Nov 2026", "2026-13-01", "tomorrow"])
def test_a_date_that_is_none(tmp_path, value):
    with pytest.raises(ConfigError, match=f"`template_date: {value}` is no date; write it as 2026-11-26"):
        config(tmp_path, template_date=value)


def test_a_record_that_tells_no_date(tmp_path):
    (tmp_path / template_date.RECORD).write_text('{"template_date": 5}')
    with pytest.raises(
        ConfigError, match=r"template_date\.json does not tell a date .*; delete it and set `template_date`"
    ):
        template_date.decide_date(config(tmp_path))


def mrpo(day, *words):
    """A real command on a day of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [require_tool("faketime"), f"{day} 12:00:00", sys.executable, "-m", "mrpo_scale.cli", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.processes
def test_score_today_train_tomorrow_go_on_the_day_after(folders, tmp_path):
    """All scores are read from the cache, and the run that goes on ends with the bits of the run that was not stopped."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(12)))
    words = [
        *("--model_name_or_path", folders["llama"], "--ref_models", folders["qwen2"]),
        *("--dataset_name", tmp_path / "rows.jsonl", "--ref_cache_dir", tmp_path / "cache"),
        *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--gradient_checkpointing", "false"),
        *("--per_device_train_batch_size", 4, "--max_steps", 4, "--save_steps", 2, "--learning_rate", 1e-3),
    ]
    mrpo(DAYS[0], "score", *words, "--output_dir", tmp_path / "scored")
    said = mrpo(DAYS[1], "train", *words, "--output_dir", tmp_path / "whole")
    for name in ("anchor", "qwen2"):
        assert f"score cache: {name}: 12 of 12 rows" in said
    assert "it is 2026-11-25 in all of this run" in said

    # What a run has that was killed after its second step; and without a cache that would tell the date.
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    alone = ["--ref_cache_dir", tmp_path / "stopped-cache"]
    said = mrpo(DAYS[2], "train", *words, *alone, "--output_dir", tmp_path / "stopped")
    assert "resuming from" in said and "it is 2026-11-25 in all of this run" in said
    whole, stopped = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "stopped"))
    assert all(whole[name].equal(stopped[name]) for name in whole)
