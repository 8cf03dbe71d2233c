"""A folder that TRL's SFTTrainer wrote is a policy and a reference like any other (Table 5, setting (i)).

Needs the extra `rlhf`.
"""

import json
from pathlib import Path

from safetensors.torch import load_file

from mrpo_scale.commands.train import run
from mrpo_scale.data.sft_rows import sft_rows
from tests.tiny import pair_rows, write_models
from tests.tools import module_of_extra

trl = module_of_extra("trl", "rlhf")
from trl.scripts import sft  # noqa: E402 (after the skip)

RECIPE = Path(__file__).parents[2] / "recipes" / "sft" / "llama2_alpaca.yaml"


def test_two_steps_of_sft_then_mrpo_on_both_sides(tmp_path):
    """By the shipped recipe, as `trl sft --config` runs it."""
    models = write_models(tmp_path)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(12)))
    sft_rows(str(data)).to_json(tmp_path / "rows" / "train.jsonl")
    words = ["--config", str(RECIPE), "--model_name_or_path", models["qwen2"], "--dataset_name", str(tmp_path / "rows")]
    small = "--max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --learning_rate 1e-2"
    here = "--use_cpu --bf16 false --report_to none --output_dir"
    parser = sft.make_parser()
    arguments = parser.parse_args_and_config([*words, *small.split(), *here.split(), str(tmp_path / "sft")])
    sft.main(*arguments)
    trained_in = tmp_path / "sft", tmp_path / "run"

    run(
        f"--model_name_or_path {tmp_path / 'sft'} --ref_models {models['qwen2']} {tmp_path / 'sft'} --dataset_name {data} "
        f"--output_dir {tmp_path / 'run'} --anchor {models['llama']} --use_cpu --max_steps 1 --report_to none "
        "--per_device_train_batch_size 4 --save_strategy no --ref_weights uniform".split()
    )
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["base_model"], facts["status"]) == ("sft", "finished")
    assert [reference["name"] for reference in facts["references"]] == ["anchor", "qwen2", "sft"]
    base, tuned, trained = (load_file(Path(folder) / "model.safetensors") for folder in (models["qwen2"], *trained_in))
    moved = [(tuned[name] - base[name]).abs().max() for name in base]
    assert max(moved) > 1e-3 and tuned.keys() == trained.keys() == base.keys()
    assert max((trained[name] - tuned[name]).abs().max() for name in base) < 1e-5  # one step at the default 1e-6
