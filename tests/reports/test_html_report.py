"""report.html: what stands in it, that nothing from data runs, and that a real browser draws every metric without a network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.cli import main
from mrpo_scale.reports.html_curves import Run, sections
from mrpo_scale.reports.html_report import read_run, write_report
from tests.browser import Browser

EVIL = "<script>window.pwned = 1</script>"
EVIL_QUOTED = "\"'><img src=x onerror='window.pwned=1'></script>"
NAMES = ["anchor", "qwen2", "org/model-7B"]


def metrics(at: float) -> dict[str, float]:
    """One log entry with every metric of the trainer (MRPOTrainer.log and held_out.py)."""
    values: dict[str, float] = {"loss": 0.7 - at / 50}
    for prefix in ("rewards", "anchor/rewards"):
        values |= {f"{prefix}/chosen": at, f"{prefix}/rejected": -at, f"{prefix}/margins": 2 * at}
        values[f"{prefix}/accuracies"] = 0.5 + at / 100
    values |= {"logps/chosen": -90 + at, "logps/rejected": -95 - at, "logps/accuracies": 0.6}
    for k, name in enumerate(NAMES):
        values |= {f"references/{name}/{what}": k / 4 for what in ("weight", "clipped", "decides")}
        if k:
            values |= {f"references/{name}/rewards/{what}": 0.5 for what in ("accuracies", "margins")}
    return values


def history(**more: float) -> list[dict[str, Any]]:
    speed = {"time/step": 0.5, "time/references": 0.2, "tokens_per_second": 1e5, "mfu": 0.4}
    eval_speed = {"eval_runtime": 2.0, "eval_samples_per_second": 30.0, "eval_steps_per_second": 3.0}
    log = [{"step": 0, "epoch": 0, **{f"eval_{k}": v for k, v in metrics(0).items()}, **eval_speed}]
    for step in range(2, 12, 2):
        optimizer = {"grad_norm": 1.0 / step, "learning_rate": 1e-6 * step}
        log.append({"step": step, "epoch": step / 10, **metrics(step), **speed, **optimizer, **more})
    log.append({"step": 10, "epoch": 1, **{f"eval_{k}": v for k, v in metrics(9).items()}, **eval_speed})
    log.append({"step": 10, "epoch": 1, "train_runtime": 5.0, "train_loss": 0.6, "total_flos": 1e9})
    return log


def facts(**more: Any) -> dict[str, Any]:
    return {
        "name": "MRPO (K=3)",
        "status": "finished",
        "base_model": "org/base",
        "datasets": ["pairs.jsonl"],
        "recipe": {"beta": 0.1, "ref_models": ["org/qwen2"]},
        "settings": {"objective": "mrpo", "beta": 0.1},
        "references": [{"name": n, "source": f"org/{n}", "revision": None, "key": "ab12" * 8} for n in NAMES],
        "data": {"train": {"pairs": 90, "empty_response": 7, "prompt_too_long": 3}, "eval": {"pairs": 10}},
        "rows": [{"name": "base", "ranking_accuracy": 0.5}, {"name": "MRPO (K=3)", "ranking_accuracy": 0.75}],
        "versions": {"torch": "2.13.0"},
        **more,
    }


def curve_keys(log: list[dict[str, Any]]) -> set[str]:
    keys = {key for entry in log for key in entry}
    return {key for key in keys if key not in ("step", "epoch", "total_flos") and not key.startswith("train_")}


def written(runs: list[Run], tmp_path: Path) -> str:
    write_report(runs, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


class Reader(HTMLParser):
    """What a person sees (scripts and styles left out), the tags, and the addresses that they name."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["script"], ["style"]):
            self.seen.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())


def test_every_metric_is_in_one_plot(tmp_path: Path) -> None:
    """A metric that no section knows, as a later version may log, has a plot too."""
    log = history(**{"something/new": 3.0})
    drawn = [
        line["key"] for section in sections([Run("run", facts(), log)]) for p in section.plots for line in p["lines"]
    ]
    assert sorted(drawn) == sorted(curve_keys(log))
    titles = [section.title for section in sections([Run("run", facts(), log)])]
    assert titles == ["Learning", *(f"Reference: {name}" for name in NAMES), "Optimizer", "Speed", "Other metrics"]


def test_training_and_held_out_share_a_plot(tmp_path: Path) -> None:
    plots = {plot["title"]: plot for plot in sections([Run("run", facts(), history())])[0].plots}
    training, held_out = plots["Reward margin"]["lines"]
    assert (training["key"], held_out["key"]) == ("rewards/margins", "eval_rewards/margins")
    assert (training["steps"], training["values"]) == ([2, 4, 6, 8, 10], [4, 8, 12, 16, 20])
    assert (held_out["steps"], held_out["values"], held_out["held_out"]) == ([0, 10], [0, 18], True)


def test_several_held_out_sets_stay_apart() -> None:
    """MRPOTrainer takes a mapping of held-out sets; the Trainer logs eval_<set>_<metric>. A set's name may hold underscores."""
    log = [
        {"step": 1, "loss": 1.0, "rewards/margins": 0.0},
        {"step": 1, "eval_my_set_rewards/margins": 0.1, "eval_b_loss": 2.0},
    ]
    series = Run("run", {}, log).series
    assert series["rewards/margins"] == {
        "training": "rewards/margins",
        "held-out my_set": "eval_my_set_rewards/margins",
    }
    assert series["loss"] == {"training": "loss", "held-out b": "eval_b_loss"}


def test_the_page_says_what_the_run_did(tmp_path: Path) -> None:
    text = Reader(written([Run("run", facts(), history())], tmp_path)).text
    for words in (
        "MRPO (K=3) · org/base",
        "60.0% of held-out pairs, unchanged from 60.0% before training",
        "+18.000",
        "7 empty_response, 3 prompt_too_long",
        "75.0%",
        "ab12ab12",
        "torch 2.13.0",
        "beta: 0.1",
        "adds nothing: it hardly ever decides",  # the anchor, whose shares are 0 here
    ):
        assert words in text, words


def test_nothing_is_fetched_and_nothing_is_marked_up(tmp_path: Path) -> None:
    """No address of another place, and the policy lets only the page's own script run."""
    evil = facts(name=EVIL, base_model=EVIL_QUOTED, datasets=[EVIL], settings={EVIL: EVIL}, status=EVIL)
    evil["references"][1] |= {"name": EVIL_QUOTED, "source": EVIL, "revision": EVIL}
    evil["data"] = {EVIL: {"pairs": 1, EVIL: 2}}
    evil["versions"] = {EVIL: EVIL}
    evil["recipe"] = {"chat_template": EVIL}
    log = history(**{f"references/{EVIL_QUOTED}/weight": 0.5, EVIL: 1.0})
    html = written([Run(EVIL, evil, log)], tmp_path)
    read = Reader(html)
    assert EVIL not in html and "img" not in read.tags
    assert [address for address in read.addresses if not address.startswith("#")] == ["data:,"], "the empty icon"
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in html and "unsafe-eval" not in html
    assert re.findall(r"<script(?! type=\"application/json\")[^>]*>", html) == ["<script>"]


def test_a_run_without_anything(tmp_path: Path) -> None:
    """Stopped before its first log, and made before run.json was written."""
    assert "No metrics were logged." in written([Run("run", {}, [])], tmp_path)
    log = [{"step": 1, "loss": math.nan, "grad_norm": 2.0}]
    html = written([Run("run", {}, log)], tmp_path)
    assert "NaN" not in html and "Gradient norm" in html and "<h3>Loss" not in html


def test_runs_side_by_side(tmp_path: Path) -> None:
    """A line for each run in every plot, the settings that differ marked, runs of one name told apart by their folders."""
    runs = [Run("a", facts(), history()), Run("b", facts(settings={"objective": "mrpo", "beta": 0.2}), history())]
    html = written(runs, tmp_path)
    assert re.search(r'<tr class="differs"><td>beta</td><td>0.1</td><td>0.2</td>', html)
    loss = sections(runs)[0].plots[0]
    assert [line["label"] for line in loss["lines"]] == ["a, training", "a, held-out", "b, training", "b, held-out"]
    assert len({line["colour"] for line in loss["lines"]}) == 2


def save(folder: Path, log: list[dict[str, Any]], **more: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    if more:
        (folder / "run.json").write_text(json.dumps(more))
    return folder


def test_the_command_makes_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    one, two = save(tmp_path / "one", history(), **facts()), save(tmp_path / "two", history())
    monkeypatch.chdir(tmp_path)
    for words, made in (([one], one / "report.html"), ([one, two], tmp_path / "report.html")):
        monkeypatch.setattr("sys.argv", ["mrpo", "report", *map(str, words)])
        main()
        assert made.is_file() and made.name in capsys.readouterr().out
    assert "2 runs side by side" in (tmp_path / "report.html").read_text()


def test_a_run_that_stopped_is_read_from_its_last_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10, 9):  # by number, not by name
        save(tmp_path / f"checkpoint-{step}", [{"step": step, "loss": 1.0}])
    assert read_run(tmp_path).history == [{"step": 10, "loss": 1.0}]
    with pytest.raises(ConfigError, match=r"nothing.*no trainer_state.json.*output_dir"):
        read_run(tmp_path / "nothing")


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report([Run("run", facts(), history(**{"something/new": 3.0}))], path)
    return path


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_it_opens_without_network_and_draws_every_metric(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.complaints == []
    assert browser.requests == [page.as_uri()], "the page itself and nothing else"
    paths = browser.evaluate(
        "[...document.querySelectorAll('path[data-key]')].map(p => [p.dataset.key, p.getBoundingClientRect().width, "
        "getComputedStyle(p).stroke])"
    )
    assert sorted(key for key, _, _ in paths) == sorted(curve_keys(history(**{"something/new": 3.0})))
    assert all(wide > 50 and stroke.startswith("rgb") for _, wide, stroke in paths), "drawn, in a colour"
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 60) == dark
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"


def test_hovering_shows_the_values_of_a_step(browser: Browser, page: Path) -> None:
    browser.open(page)
    x, y, wide = browser.evaluate(
        "(() => { const svg = document.querySelector('svg.plot'); svg.scrollIntoView();"
        " const r = svg.getBoundingClientRect(); return [r.left, r.top, r.width]; })()"
    )
    browser.move_mouse(x + 0.97 * wide, y + 50)  # the last step, 10, where training and held-out were both logged
    tip = browser.evaluate("document.querySelector('.tip').innerText.split('\\n')")
    assert tip == ["step 10", "training", "0.5", "held-out", "0.52"]
    browser.move_mouse(5, 5)
    assert browser.evaluate("document.querySelector('.tip')") is None
    assert browser.complaints == []


def test_a_click_in_the_legend_hides_a_line(browser: Browser, page: Path) -> None:
    browser.open(page)
    count = "document.querySelector('figure').querySelectorAll('path[data-key]').length"
    before = browser.evaluate(count)
    browser.evaluate("document.querySelector('.legend button').click()")
    assert (before, browser.evaluate(count)) == (2, 1)


def test_a_model_named_script_does_not_run(browser: Browser, tmp_path: Path) -> None:
    evil = facts(name=EVIL, base_model=EVIL_QUOTED, status=EVIL)
    evil["references"][1] |= {"name": EVIL_QUOTED, "source": EVIL}
    log = history(**{f"references/{EVIL_QUOTED}/weight": 0.5, EVIL: 1.0})
    write_report([Run(EVIL, evil, log)], tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    assert browser.complaints == []
    assert browser.evaluate("typeof window.pwned") == "undefined"
    assert EVIL in browser.evaluate("document.querySelector('h1').textContent")
    assert EVIL_QUOTED in browser.evaluate("document.body.innerText")
    # And were something to slip through, the page's policy stops it and says so.
    browser.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.pwned = 1'}))"
    )
    assert browser.evaluate("typeof window.pwned") == "undefined"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)
