"""The README.md of a trained model, and the same facts as JSON for the HTML report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from mrpo_scale.reports.pictures import TABLE_HEADER, TABLE_LEGEND, RunSummary, table_cells


@dataclass(frozen=True)
class ModelCard:
    """The README.md of a trained model. It says what it is given and looks nothing up: no environment, no arguments of its own.

    Args:
        base_model: the policy's hub id or folder. Of a folder only the last part is named, and not in the front matter.
        dataset: hub id or path, treated alike; or several of them.
        settings: method settings in the order to show: objective, beta, epsilon_max, clip, ref_weights, aggregate, ...
        references: (name, hub id or path, revision), the anchor first.
        data: split -> {"pairs": pairs used, reason: pairs skipped, ...}.
        remarks: split -> sentences on what models do not see of it, or read as something else.
        results: the last evaluation's metrics, as the trainer logs them.
        versions: package -> version.
        curves: file name of the curves' PNG beside the README.
        recipe: the keys of the run that are not defaults, as a recipe would say them.
        reference_keys: reference -> its key in the score cache, which names weights, tokenizer, template and dtype exactly.
        rows: the comparison, this run's row last.
        metadata: more front matter for the hub: license, language, tags.
    """

    base_model: str
    dataset: str | Sequence[str]
    settings: Mapping[str, Any]
    references: Sequence[tuple[str, str, str | None]]
    data: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    remarks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    curves: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    reference_keys: Mapping[str, str] = field(default_factory=dict)
    rows: Sequence[RunSummary] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What the card says, as JSON values for the HTML report; of a local path the last part only, as on the card."""
        return {
            "base_model": public(self.base_model),
            "datasets": public(self._datasets),
            "recipe": public(self.recipe),
            "settings": public(self.settings),
            "references": [
                {"name": name, "source": public(source), "revision": revision, "key": self.reference_keys.get(name)}
                for name, source, revision in self.references
            ],
            "data": {split: dict(counts) for split, counts in self.data.items()},
            "remarks": {split: list(said) for split, said in self.remarks.items() if said},
            "rows": [asdict(row) for row in self.rows],
            "versions": dict(self.versions),
        }

    def render(self) -> str:
        """Markdown with a YAML front matter as the Hugging Face hub reads it."""
        return "\n\n".join([self._front_matter(), *self._method(), *self._data(), *self._outcome()]) + "\n"

    @property
    def _datasets(self) -> Sequence[str]:
        return [name for name in ([self.dataset] if isinstance(self.dataset, str) else self.dataset) if name]

    @property
    def _is_adapter(self) -> bool:
        return bool(self.recipe.get("use_peft"))

    def _front_matter(self) -> str:
        library = "peft" if self._is_adapter else "transformers"
        values: dict[str, Any] = {"library_name": library, "tags": ["mrpo", "preference-optimization"]}
        if is_hub_id(self.base_model):
            values["base_model"] = self.base_model
        if on_hub := [name for name in self._datasets if is_hub_id(name)]:
            values["datasets"] = on_hub
        tags = self.metadata.get("tags") or []
        values["tags"] += [tags] if isinstance(tags, str) else list(tags)
        values |= {key: value for key, value in self.metadata.items() if key != "tags"}
        return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"

    def _method(self) -> list[str]:
        others = len(self.references) - 1
        against = (
            f"the anchor and {others} more reference model{'s' if others > 1 else ''}"
            if others > 0
            else "one reference model"
        )
        references = [
            (name, _source(source), revision or "-", self.reference_keys.get(name, "-"))
            for name, source, revision in self.references
        ]
        trained = "a LoRA adapter of it trained" if self._is_adapter else "all weights finetuned"
        recipe = yaml.safe_dump(public(self.recipe), sort_keys=False, allow_unicode=True)
        return [
            f"# {Path(self.base_model).name}, preference-optimized",
            f"{_source(self.base_model)}, {trained} on preference pairs against {against} with mrpo_scale "
            "(Multi-Reference Preference Optimization).",
            "## Method",
            _table(("setting", "value"), [(f"`{key}`", _value(value)) for key, value in self.settings.items()]),
            *(["The recipe, without what is a default:", _fenced(recipe, "yaml")] if self.recipe else []),
            "## References",
            _table(("name", "source", "revision", "key in the score cache"), references),
        ]

    def _data(self) -> list[str]:
        rows = []
        for split, counts in self.data.items():
            skipped = [f"{count} {reason}" for reason, count in counts.items() if reason != "pairs" and count]
            rows.append((split, str(counts["pairs"]), ", ".join(skipped) or "none"))
        said = [(split, sentence) for split, sentences in self.remarks.items() for sentence in sentences]
        return [
            "## Data",
            *([f"{', '.join(map(_source, self._datasets))}."] if self._datasets else []),
            *([_table(("split", "pairs used", "skipped"), rows)] if rows else []),
            *([_table(("split", "what models do not see, or read as something else"), said)] if said else []),
        ]

    def _outcome(self) -> list[str]:
        results = [
            (f"`{key.removeprefix('eval_')}`", _value(value))
            for key, value in self.results.items()
            if not _is_timing(key)
        ]
        parts = ["## Results"]
        if self.rows:
            legend = " ".join(TABLE_LEGEND.split("\n"))
            parts += [_table(TABLE_HEADER, table_cells(self.rows)), legend[0].upper() + legend[1:]]
        parts.append(_table(("held-out metric", "value"), results) if results else "No held-out set was measured.")
        if self.curves:
            parts.append(f"![Training curves]({self.curves})")
        if self.versions:
            parts += [
                "## Framework versions",
                "\n".join(f"- {name}: {version}" for name, version in self.versions.items()),
            ]
        return parts


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|[A-Za-z0-9][\w-]*")
_DATA_FILES = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".gz", ".bz2", ".xz", ".zst")


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads as ``owner/name`` (or a legacy ``name``) of the Hugging Face hub and is no local file or folder."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_DATA_FILES) and not Path(name).exists()


def public(value: Any) -> Any:
    """``value`` as YAML and JSON know it, with local paths cut to their last part: a card is published."""
    if isinstance(value, Mapping):
        return {str(key): public(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item) for item in value]
    if isinstance(value, Enum):
        return public(value.value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = str(value)
    is_path = "/" in text and not is_hub_id(text) and not re.search(r"[{\n]", text)  # a chat template is no path
    return Path(text).name if is_path else text


def _source(name: str) -> str:
    """A hub id as it is; of a local path the last part only, because a card is published and the rest is the author's disk."""
    return f"`{name}`" if is_hub_id(name) or name.startswith("toy:") else f"`{Path(name).name}` (local)"


def _is_timing(key: str) -> bool:
    return key in ("epoch", "step") or key.endswith(("_runtime", "_per_second"))


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value)
    return "-" if value is None else str(value)


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any in ``text``."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}{fence}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # A bar or a line break inside a cell would end it.
    lines = [
        [cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in (header, ["---"] * len(header), *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
