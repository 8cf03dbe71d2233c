"""`mrpo check` as a user types it: what it prints and writes, what it never opens, and all errors at once."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer

from mrpo_scale.config.hardware import bf16_instructions
from tests.distributed.jobs import Job
from tests.distributed.test_score_jobs import opened_files
from tests.tiny import pair_rows, write_models


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three models' configs and tokenizers, and pairs; the weights lie in another folder."""
    root = tmp_path_factory.mktemp("check")
    folders = write_models(root)
    for name, folder in folders.items():
        (root / "weights" / name).mkdir(parents=True)
        shutil.move(Path(folder) / "model.safetensors", root / "weights" / name)
    rows = pair_rows(40)
    rows[3]["rejected"] = rows[3]["chosen"]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def check(jobs, world, *words, status=0):
    models = ["--model_name_or_path", world / "llama", "--ref_models", world / "qwen2", world / "gpt_neox"]
    given = [
        "check",
        *models,
        "--dataset_name",
        world / "pairs.jsonl",
        "--max_length",
        60,
        "--output",
        world / "out",
        *words,
    ]
    ((ended,),) = jobs.run(Job(list(map(str, given))))
    assert ended.status == status, ended.err + ended.out
    return ended


def test_config_and_tokenizer_suffice(jobs, world):
    ended = check(jobs, world, "--gpus", 16, "--seed", 1)
    out = ended.out
    assert re.search(r"train +conversational +40 +39 +1 identical_responses", out)
    assert out.count("the weights are not here") == 3, "policy, and two references; the anchor is the policy"
    assert "<|im_start|>assistant↵┃" in out and "<turn>assistant: ┃" in out, (
        "each model's own template, up to the boundary"
    )
    assert "✂" in out and re.search(r"\d+ pairs, [\d,]+ tokens lost", out)
    for kind in (
        "policy weights",
        "gradients",
        "optimizer",
        "references",
        "activations",
        "output head",
        "most at once",
    ):
        assert kind in out
    assert "cheapest with references live" in out and "a roofline, not a measurement" in out
    found = json.loads((world / "out/check.json").read_text())
    assert found["errors"] == [] and found["data"]["train"]["pairs"] == 39 and found["data"]["train"]["tokens_lost"] > 0
    live = found["cost"]["estimates"]["K=3, live"]
    assert live["setting"]["ds_config"] == "zero3_hpz" and live["device_bytes"]["held"]["references"] > 0
    assert found["cost"]["cheapest"]["live"]["tried"] > 50
    for name in ("lengths.png", "memory.png"):
        assert Image.open(world / "out" / name).size[0] > 400


def test_of_weights_the_headers_are_enough(jobs, world, tmp_path):
    """Where weights are, their files are opened, to see that no tensor is missing; what they hold does not matter."""
    folders = {name: tmp_path / name for name in ("llama", "qwen2", "gpt_neox")}
    for name, folder in folders.items():
        shutil.copytree(world / name, folder)
        shutil.copy(world / "weights" / name / "model.safetensors", folder)
        with (folder / "model.safetensors").open("r+b") as file:
            whole, header = file.seek(0, 2), int.from_bytes((file.seek(0), file.read(8))[1], "little")
            file.truncate(8 + header)
            file.truncate(whole)  # a hole, which reads as zeros
    (tmp_path / "pairs.jsonl").write_text((world / "pairs.jsonl").read_text())
    with opened_files(*folders.values()) as opened:
        ended = check(jobs, tmp_path, "--gpus", 8)
    assert "the weights are not here" not in ended.out
    assert any(path.name == "config.json" for path in opened)
    assert len([path for path in opened if path.suffix == ".safetensors"]) == 3


def test_all_errors_at_once(jobs, world, tmp_path):
    """A quantized reference, one without config, and a data file that is not there: three errors in one go."""
    shutil.copytree(world / "qwen2", tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized/config.json").read_text())
    (tmp_path / "quantized/config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    words = ["--ref_models", tmp_path / "quantized", tmp_path / "absent", "--dataset_name", tmp_path / "no.jsonl"]
    ended = check(jobs, world, *words, status=2)
    errors = [line for line in ended.out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and "The run would not start." in ended.out
    assert "quantized (gptq)" in ended.out and "absent" in ended.out and "no.jsonl" in ended.out


def test_what_a_run_refuses_the_check_refuses(jobs, world, tmp_path):
    """Every kind at once, from the functions that the run calls; the data is shown all the same."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    words = [
        *("--report_to", "paper", "--lr_scheduler_type", "cosine_with_min_lr", "--attn_implementation", "fast"),
        *("--eval_strategy", "epoch", "--metric_for_best_model", "accuracy", "--output_dir", tmp_path / "run"),
    ]
    ended = check(jobs, world, *words, status=2)
    errors = [line for line in ended.out.splitlines() if line.startswith("error: ")]
    for key in (
        *("`report_to: paper`", "`lr_scheduler_type: cosine_with_min_lr`", "`attn_implementation: fast`"),
        *(
            "`eval_strategy: epoch`",
            "`metric_for_best_model: accuracy`",
            f"`output_dir: {tmp_path / 'run'}` holds config.json",
        ),
    ):
        assert sum(key in line for line in errors) == 1, (key, errors)
    assert "DATA" in ended.out and json.loads((world / "out/check.json").read_text())["errors"] == [
        line.removeprefix("error: ") for line in errors
    ]
    ended = check(jobs, world, "--use_liger_kernel", "true", "--max_bad_rows", 3, status=2)
    assert "`use_liger_kernel: True`" in ended.err and "`max_bad_rows: 3.0`" in ended.err


def test_hardware_is_the_clusters(jobs, world, tmp_path):
    """Keys for GPUs are right for a cluster that has them, wherever they are checked; and wrong for one of CPUs."""
    assert "COST" in check(jobs, world, "--bf16", "true", "--tf32", "true").out
    assert "COST" in check(jobs, world, "--fp16", "true", "--deepspeed", "zero2").out
    found = json.loads((world / "out/check.json").read_text())["cost"]["estimates"]["DPO, live"]
    assert found["setting"]["ds_config"] == "zero2", "read here, and no process group joined for it"
    words = ["--tf32", "true", "--bf16", "true", "--head_impl", "triton", "--gpu", "cpu"]
    ended = check(jobs, world, *words, status=2)
    errors = [line for line in ended.out.splitlines() if line.startswith("error: ")]
    for key in ("`tf32: True`", "`head_impl: triton`"):
        assert sum(key in line for line in errors) == 1
    assert sum("`bf16: True`" in line for line in errors) == (bf16_instructions() is None)


def test_too_many_bad_rows_are_an_error_and_shown(jobs, world):
    ended = check(jobs, world, "--max_bad_rows", 0.01, status=2)
    assert "error: `max_bad_rows: 0.01`: 1 of 40 pairs" in ended.out and "COST" in ended.out
    errors = [line for line in ended.out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "max_bad_rows: 1.0" not in ended.out, "once, with the value that was typed"
    assert (
        f"row 3: identical_responses (chosen and rejected are the same text). All bad rows are listed in {world}"
        in errors[0]
    )


def test_no_file_is_of_an_earlier_check(jobs, world, tmp_path):
    rows = pair_rows(40)
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = ["--output", tmp_path / "out"]
    assert "bad_rows_train.jsonl" in check(jobs, world, *output).out
    ended = check(jobs, world, *output, "--dataset_name", tmp_path / "good.jsonl")
    assert "bad_rows" not in ended.out.splitlines()[-1] and not list((tmp_path / "out").glob("bad_rows*"))
    ended = check(jobs, world, *output, "--dataset_name", tmp_path / "none.jsonl", status=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["check.json"]


def test_tokens_that_a_model_has_no_row_for(jobs, world, tmp_path):
    shutil.copytree(world / "qwen2", tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "more")
    tokenizer.add_tokens(["<new1>"])
    tokenizer.save_pretrained(tmp_path / "more")
    rows = pair_rows(8)
    rows[2]["chosen"][0]["content"] += " <new1> yes"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--ref_models",
        tmp_path / "more",
        "--dataset_name",
        tmp_path / "pairs.jsonl",
        "--output",
        tmp_path / "out",
    ]
    ended = check(jobs, world, *words, status=2)
    (error,) = [line for line in ended.out.splitlines() if line.startswith("error: ")]
    token = tokenizer.convert_tokens_to_ids("<new1>")
    assert f"error: more: its tokenizer makes token {token} ('<new1>') of row 2 of the train set" in error
    assert "280 rows" in error


def test_a_template_that_prints_the_date_is_a_note(jobs, world, tmp_path):
    shutil.copytree(world / "qwen2", tmp_path / "dated")
    template = "{{ strftime_now('%d %b %Y') }}" + (world / "llama/chat_template.jinja").read_text()
    (tmp_path / "dated/chat_template.jinja").write_text(template)
    words = ["--ref_models", tmp_path / "dated", "--template_date", "2026-11-26", "--output", tmp_path / "out"]
    ended = check(jobs, world, *words)
    assert "note: the chat templates of dated print the date; in all of this run it would be 2026-11-26" in ended.out
    assert "26 Nov 2026<|im_start|>" in (tmp_path / "out/pairs.txt").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h300"], "`--gpu h300` is not known; the known ones are a100-40gb"),
        (["--ds_config", "zero9"], "`--ds_config zero9`"),
        (["--gpus", 8, "--ref_shard_size", 64], "`ref_shard_size: 64` does not fit this run of 8"),
    ],
)
def test_bad_flags(jobs, world, words, message):
    ended = check(jobs, world, *words, status=2)
    assert message in ended.err + ended.out


def test_a_config_without_a_field(jobs, world, tmp_path):
    shutil.copytree(world / "qwen2", tmp_path / "mamba")
    fields = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": 16, "num_hidden_layers": 1}
    (tmp_path / "mamba/config.json").write_text(json.dumps({**fields, "vocab_size": 280}))
    ended = check(jobs, world, "--ref_models", tmp_path / "mamba", status=2)
    assert "mamba" in ended.out and "`num_attention_heads`" in ended.out


def test_what_fills_no_step_is_an_error_with_the_clusters_window(jobs, world):
    """39 pairs: 4 ranks x 8 fill a step, 8 x 8 do not; the run says so in the same words."""
    words = ["--dataloader_drop_last", "true", "--per_device_train_batch_size", 8]
    check(jobs, world, *words, "--gpus", 4)
    ended = check(jobs, world, *words, "--gpus", 8, status=2)
    assert "error: `dataloader_drop_last: true` leaves no step to train: 39 pairs do not fill one of 64" in ended.out


def test_help(jobs):
    ((ended,),) = jobs.run(Job(["check", "--help"]))
    assert ended.status == 0 and "--gpus_per_node" in ended.out
