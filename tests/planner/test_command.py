"""`mrpo check` as a whole."""

import json

from mrpo_scale.cli import run_command
from tests.tiny import pair_rows, write_models


def test_dpo_with_several_references_is_planned_with_the_anchor_alone(tmp_path, capsys):
    models = write_models(tmp_path / "models")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(16)))
    words = ["--model_name_or_path", models["llama"], "--ref_models", models["qwen2"], "--dataset_name", str(data)]
    words += [
        "--output_dir",
        str(tmp_path / "out"),
        "--objective",
        "dpo",
        "--gpu",
        "cpu",
        "--gpus",
        "1",
        "--use_cpu",
        "true",
        "--ddp_backend",  # of the ranks that will train, which are not here
        "gloo",
    ]
    run_command("check", words)
    cost = capsys.readouterr().out.partition("COST on")[2]
    assert "anchor" in cost and "qwen2" not in cost.partition("pairs per optimizer step")[0]
