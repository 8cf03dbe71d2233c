"""report.html: one or several runs to look at, in one file that needs no network.

Python decides what stands in which plot; ``templates/report.js`` draws it. All that comes from data is escaped by Jinja, and a
content security policy lets that one script run and nothing else.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mrpo_scale.base.atomic_files import atomic_write
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.tables import number, percent
from mrpo_scale.base.untrusted import read_json
from mrpo_scale.reports.html_curves import Run, labels, sections
from mrpo_scale.reports.pictures import DECIDES_NOTHING, TABLE_HEADER, TABLE_LEGEND, RunSummary, points, table_cells

RUN_FACTS = "run.json"  #: what a run's report says besides curves, in its output folder
_NO_FACTS: dict[str, Any] = {
    **dict.fromkeys(("name", "status", "base_model")),
    **{key: [] for key in ("datasets", "references", "rows")},
    **{key: {} for key in ("recipe", "settings", "data", "versions")},
}
_TEMPLATES = Path(__file__).parent / "templates"


def read_run(folder: Path) -> Run:
    """A run from its output folder; of a run that stopped, the log of its last checkpoint.

    Raises:
        ConfigError: no log there.
    """
    states = [folder / "trainer_state.json"] if (folder / "trainer_state.json").is_file() else []
    checkpoints = [c for c in folder.glob("checkpoint-*/trainer_state.json") if c.parent.name[11:].isdecimal()]
    states += sorted(checkpoints, key=lambda file: int(file.parent.name[11:]))
    if not states:
        raise ConfigError(
            f"{folder} holds no trainer_state.json, nor do checkpoints in it; name the `output_dir` of a run that has logged."
        )
    state = states[0] if states[0].parent == folder else states[-1]
    facts = _read_object(folder / RUN_FACTS) if (folder / RUN_FACTS).is_file() else {}
    log = _read_object(state).get("log_history")
    if not isinstance(log, list) or not all(map(_is_entry, log)):
        raise ConfigError(f"{state}: `log_history` is not a list of entries with a `step`; name a run's own folder.")
    _check_facts(facts, folder / RUN_FACTS)
    return Run(folder.resolve().name, facts, [{k: v for k, v in entry.items() if _is_number(v)} for entry in log])


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = read_json(file)
    except ValueError as error:
        raise ConfigError(f"{file} {error}; name a run's own folder.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is not a JSON object; name a run's own folder.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 60)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and _is_number(entry.get("step")) and math.isfinite(entry["step"])


def _check_facts(facts: Mapping[str, Any], file: Path) -> None:
    """What the page assumes of facts, which may have come from anywhere. Raises ConfigError where they are otherwise."""
    numbers = {f.name for f in fields(RunSummary)} - {"name"}

    def is_row(row: Any) -> bool:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not row.keys() <= {"name", *numbers}:
            return False
        held = [row[key] for key in numbers & row.keys()]
        return all(
            value is None or all(map(_is_number, value if isinstance(value, list) else [value])) for value in held
        )

    def is_reference(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and isinstance(value.get("name"), str)
            and {"source", "revision", "key"} <= value.keys()
        )

    def is_split(value: Any) -> bool:
        return isinstance(value, dict) and "pairs" in value

    members = {"rows": is_row, "references": is_reference, "data": is_split}
    for key, empty in _NO_FACTS.items():
        value = facts.get(key, empty)
        wanted = (str, type(None)) if empty is None else type(empty)
        held = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        if not isinstance(value, wanted) or not all(map(members.get(key, lambda _: True), held)):
            raise ConfigError(
                f"{file}: `{key}` is not what a run writes there; delete the file, and the report does without."
            )


def report(argv: Sequence[str]) -> None:
    """`mrpo report FOLDER [FOLDER ...] [--output FILE]`: the report of one run again, or several runs side by side.

    Raises:
        ConfigError: a folder without a log.
    """
    parser = argparse.ArgumentParser(prog="mrpo report", allow_abbrev=False)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args(list(argv))
    alone = flags.folders[0] / "report.html" if len(flags.folders) == 1 else Path("report.html")
    path = flags.output or alone
    write_report([read_run(folder) for folder in flags.folders], path)
    print(path)


def write_report(runs: Sequence[Run], path: Path) -> None:
    """One run with all it did, or several side by side."""
    runs = [replace(run, facts={**_NO_FACTS, **run.facts}) for run in runs]
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["value"] = _value
    html = environment.get_template("report.html").render(
        **(_one(runs[0]) if len(runs) == 1 else _several(runs)),
        runs=list(zip(labels(runs), runs, strict=True)),
        sections=sections(runs),
        settings=_settings(runs),
        recipes=[yaml.safe_dump(run.facts["recipe"], sort_keys=False, allow_unicode=True) for run in runs],
        legend=TABLE_LEGEND,
        script=script,
        script_digest=digest,
    )
    # Readers of a run that still goes on never see half a page.
    atomic_write(path.parent, lambda: path.name, html.encode(), replace=True)


# ---- words and numbers -----------------------------------------------------------------------------------------------


def _one(run: Run) -> dict[str, Any]:
    rows = [RunSummary(**row) for row in run.facts["rows"]]
    return {
        "title": " · ".join(filter(None, [labels([run])[0], run.facts["base_model"]])),
        "tiles": _tiles(run),
        "sentences": _sentences(run),
        "references": _references(run),
        "comparison": (TABLE_HEADER, table_cells(rows)) if rows else None,
    }


def _several(runs: Sequence[Run]) -> dict[str, Any]:
    rows = [RunSummary(**row) for row in runs[0].facts["rows"] if row["name"] == "base"]
    rows += [
        RunSummary(**{**(run.facts["rows"] or [_row(run)])[-1], "name": label})
        for run, label in zip(runs, labels(runs), strict=True)
    ]
    return {
        "title": f"{len(runs)} runs side by side",
        "tiles": [],
        "sentences": [],
        "references": [],
        "comparison": (TABLE_HEADER, table_cells(rows)),
    }


def _row(run: Run) -> dict[str, Any]:
    """Of a run that wrote no table: as far as its log says."""
    last = run.evals[-1] if run.evals else {}
    return {
        "ranking_accuracy": last.get("eval_logps/accuracies"),
        "reward_accuracy": last.get("eval_rewards/accuracies"),
        "reward_margin": last.get("eval_rewards/margins"),
    }


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(what, value, beside it): the numbers a person asks for first."""
    row = RunSummary(name="", **_row(run))
    steps = max((int(entry["step"]) for entry in run.history if "step" in entry), default=0)
    _, losses = points(run.history, "loss")
    before = [entry for entry in run.evals[:-1] if entry["step"] == 0]
    accuracy = (
        f"{percent(before[0].get('eval_logps/accuracies'))} before training"
        if before
        else "chosen more likely than rejected"
    )
    _, seconds = points(run.history, "time/step")
    tiles = [
        ("held-out accuracy", percent(row.ranking_accuracy), accuracy),
        ("reward accuracy", percent(row.reward_accuracy), "held-out"),
        ("reward margin", number(row.reward_margin, "+.3f"), "held-out"),
        ("training loss", number(losses[-1] if losses else None, ".4f"), f"{losses[0]:.4f} at first" if losses else ""),
        ("references", str(len(run.references) or "-"), "with the anchor"),
        ("optimizer steps", str(steps), f"{sum(seconds) / len(seconds):.2f} s each" if seconds else ""),
    ]
    return [tile for tile in tiles if tile[1] != "-"]


def _sentences(run: Run) -> list[str]:
    if not run.evals:
        return [
            "No held-out pairs were measured, so nothing here says how the model does on text it was not trained on."
        ]
    first, last = run.evals[0], run.evals[-1]
    sentences = []
    if (accuracy := last.get("eval_logps/accuracies")) is not None:
        before = first.get("eval_logps/accuracies") if first is not last and first["step"] == 0 else None
        was = f", {_direction(before, accuracy)} from {before:.1%} before training" if before is not None else ""
        sentences.append(
            f"The model finds the chosen response likelier than the rejected one in {accuracy:.1%} of held-out pairs{was}."
        )
    if {"eval_rewards/margins", "eval_rewards/accuracies"} <= last.keys():
        sentences.append(
            f"Measured against the run's own reference, the chosen response is ahead in {last['eval_rewards/accuracies']:.1%} of "
            f"them, by {last['eval_rewards/margins']:+.3f} on average (beta times a difference of log-probabilities, in nats)."
        )
    best = min(run.evals, key=lambda entry: entry["eval_loss"])
    if best is not last:
        sentences.append(
            f"The held-out loss was lowest at step {best['step']} ({best['eval_loss']:.4f}) and is {last['eval_loss']:.4f} now."
        )
    return sentences


def _direction(before: float, after: float) -> str:
    return "up" if after > before else "down" if after < before else "unchanged"


def _references(run: Run) -> list[dict[str, Any]]:
    """Of each reference where it comes from and what it did: on the held-out pairs, else in the last logged steps."""
    prefix = "eval_" if run.evals else ""
    logged = run.evals or [entry for entry in run.history if "loss" in entry]
    last = logged[-1] if logged else {}
    known = {reference["name"]: reference for reference in run.facts["references"]}
    found = []
    for name in run.references:
        did = {what: last.get(f"{prefix}references/{name}/{what}") for what in ("weight", "decides", "clipped")}
        found.append(
            {
                "source": None,
                "revision": None,
                "key": None,
                **known.get(name, {}),
                "name": name,
                **did,
                "says": _says(name, did),
            }
        )
    return found


def _says(name: str, did: Mapping[str, float | None]) -> str:
    if did["decides"] is None:
        return "not used by this objective" if name != "anchor" else ""
    if did["decides"] < DECIDES_NOTHING:
        return "adds nothing: it hardly ever decides"
    if name != "anchor" and (did["clipped"] or 0) > 0.95:
        return "nearly always at the edge of the anchor's trust region"
    return ""


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """(key, its value in each run, whether these differ)."""
    keys = dict.fromkeys(key for run in runs for key in run.facts["settings"])
    rows = [(key, [_value(run.facts["settings"].get(key)) for run in runs]) for key in keys]
    return [(key, values, len(set(values)) > 1) for key, values in rows]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    if isinstance(value, Mapping):
        return json.dumps(value)
    return "-" if value is None else str(value)
