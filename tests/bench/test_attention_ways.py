"""benchmarks/attention_ways.py, as far as a CPU goes: every contender right, what is absent named, results written."""

import json

from benchmarks import attention_ways


def test_a_dry_run_checks_and_writes_nothing(capsys, tmp_path):
    assert attention_ways.main(["--device", "cpu", "--dry_run", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| reference_spans | 640 |" in said and "| two sequences (reference_spans) | 880 |" in said
    assert "absent: varlen_spans: it needs an NVIDIA GPU" in said and "WRONG" not in said
    assert not list(tmp_path.iterdir())


def test_results_are_written_and_a_wrong_contender_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        attention_ways.Contenders,
        "_span_by_span",
        lambda self: lambda q, k, v: 0 * (q + k.sum() + v.sum())[0].transpose(0, 1),
    )
    assert attention_ways.main(["--device", "cpu", "--rounds", "2", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "attention-cpu.json").read_text())
    rows = {row["name"]: row for row in report["runs"][0]["rows"]}
    assert not rows["sdpa_spans"]["right"] and rows["mask"]["right"] and rows["mask"]["forward+backward"]["ms"] > 0
    assert "WRONG" in (tmp_path / "attention-cpu.md").read_text()
