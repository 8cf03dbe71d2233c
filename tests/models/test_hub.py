"""Models and data sets by their names on a hub, which here is a process's own: found, downloaded, cut off, offline, pushed."""

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.cli import run_command
from mrpo_scale.references.reward import RewardModel, plan_reward
from mrpo_scale.references.store.cache import list_cache
from tests.distributed.jobs import Job
from tests.hub import TOKEN, Hub, patched, use
from tests.references.test_reward import write_reward
from tests.tiny import pair_rows, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def hub(models, tmp_path):
    made = Hub(tmp_path / "repositories")
    for name in ("llama", "qwen2"):
        made.add(models[name], f"org/{name}")
    (tmp_path / "pairs").mkdir()
    for split, count in (("train", 16), ("test", 4)):
        (tmp_path / "pairs" / f"{split}.jsonl").write_text(lines(count, seed=count))
    made.add(tmp_path / "pairs", "org/pairs", "datasets")
    with made.running():
        yield made


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """This process asks that hub, with empty caches."""
    patched(monkeypatch, hub.url, tmp_path / "home")
    return tmp_path


def lines(count, seed=0):
    return "".join(json.dumps(row) + "\n" for row in pair_rows(count, seed))


def words(folder, **keys):
    recipe = {"model_name_or_path": "org/llama", "ref_models": ["org/qwen2"], "dataset_name": "org/pairs"}
    recipe |= {"output_dir": str(folder / "out"), "ref_cache_dir": str(folder / "cache"), "use_cpu": True}
    recipe |= {"report_to": "none", "save_strategy": "no", "per_device_train_batch_size": 1, "max_steps": 1, **keys}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return ["--config", str(folder / "recipe.yaml")]


def refused(capsys, words, *parts):
    with pytest.raises(SystemExit) as stop:
        run_command("score", words)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and all(part in line for part in parts), line
    return line


@pytest.mark.slow
@pytest.mark.processes
def test_requests_do_not_grow_with_the_ranks_and_offline_there_are_none(jobs, hub, tmp_path):
    counts = []
    for ranks in (1, 2, 4):
        hub.requests.clear()
        folder = tmp_path / f"of{ranks}"
        folder.mkdir()
        command = ["train", *words(folder)]
        job = Job(command, ranks, before=use, args=(hub.url, str(folder)))
        (ended,) = jobs.run(job)
        assert [one.status for one in ended] == [0] * ranks, ended[0].err
        counts.append(sorted(hub.requests))
    assert counts[0] == counts[1] == counts[2]
    assert (
        len(counts[0]) < 50
    )  # 14 for each model, of which 10 are its files; 13 for the data set; one of the client's own
    hub.requests.clear()
    offline = Job([*command, "--resume_from_checkpoint", "never"], 2, before=use, args=(hub.url, str(folder), True))
    (ended,) = jobs.run(offline)
    assert [one.status for one in ended] == [0, 0], ended[0].err
    assert not hub.requests


def test_a_second_start_asks_what_is_newest_and_downloads_nothing(hub, here):
    run_command("score", words(here))
    hub.requests.clear()
    run_command("score", words(here))
    assert [path for method, path, _ in hub.of("org/llama")] == ["/api/models/org/llama/revision/main"]
    assert not [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"model_name_or_path": "org/nothing"}, ["policy: `org/nothing` is neither a folder here nor a model"]),
        ({"ref_models": ["org/nothing"]}, ["nothing: `org/nothing` is neither", "`ref_models`", "HF_TOKEN"]),
        ({"ref_models": ["a/b/c"]}, ["c: `a/b/c` is neither a folder here nor the name of a model"]),
        ({"model_revision": "v9"}, ["policy: `org/llama` has no revision `v9`"]),
        ({"ref_models": ["org/locked"]}, ["locked: `org/locked` is gated", "accept its terms", "HF_TOKEN"]),
        ({"dataset_name": "org/none"}, ["`dataset_name: org/none` cannot be read", "HF_TOKEN"]),
        ({"dataset_name": "org/secrets"}, ["`dataset_name: org/secrets` cannot be read", "HF_TOKEN"]),
    ],
)
def test_what_is_not_to_be_had_is_named_in_one_line(hub, here, models, capsys, keys, parts):
    hub.add(models["qwen2"], "org/locked")
    hub.add(here / "pairs", "org/secrets", "datasets")
    hub.gated |= {"org/locked", "org/secrets"}
    refused(capsys, words(here, **keys), *parts)
    assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]


def test_without_a_network_and_without_a_copy(hub, here, monkeypatch, capsys):
    hub.requests.clear()
    (here / "local.jsonl").write_text(lines(8))
    patched(monkeypatch, hub.url, here / "home", offline=True)
    refused(
        capsys,
        words(here, dataset_name=str(here / "local.jsonl")),
        "cannot be downloaded now",
        "where there is a network",
    )
    assert not hub.requests


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_busy_is_named_with_what_it_says(hub, here, monkeypatch, capsys, status):
    (here / "local.jsonl").write_text(lines(8))
    hub.busy = status
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client tries again
    refused(capsys, words(here, dataset_name=str(here / "local.jsonl")), "cannot be downloaded now", str(status))


def test_a_token_opens_what_is_gated_and_is_in_no_log_and_no_file(hub, here, models, monkeypatch, capsys, caplog):
    hub.gated |= {"org/qwen2", "org/llama"}
    patched(monkeypatch, hub.url, here / "home", token=TOKEN)
    with caplog.at_level(logging.DEBUG):
        run_command("score", words(here))
    assert f"Bearer {TOKEN}" in hub.tokens
    printed = capsys.readouterr()
    assert "complete" in printed.out
    assert "SENTINEL" not in printed.out + printed.err + caplog.text
    assert not [file for file in here.rglob("*") if file.is_file() and b"SENTINEL" in file.read_bytes()]


@pytest.fixture
def sharded(hub, here, models):
    """Name of a model in several files, and one of these files."""
    folder = here / "sharded"
    model = AutoModelForCausalLM.from_pretrained(models["qwen2"])
    model.save_pretrained(folder, max_shard_size="30KB")
    AutoTokenizer.from_pretrained(models["qwen2"]).save_pretrained(folder)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    return hub.add(folder, "org/sharded"), files[1]


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, here, sharded, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # of 10 MB: less is not kept
    name, file = sharded
    hub.cut[file.name] = [4000]
    run_command("score", words(here, ref_models=[name]))
    assert hub.ranges == ["bytes=4000-"] and "complete" in capsys.readouterr().out
    (copy,) = (here / "home").rglob(file.name)
    assert copy.read_bytes() == file.read_bytes()


def test_a_download_that_failed_is_named_and_the_next_start_gets_what_is_missing(
    hub, here, sharded, monkeypatch, capsys
):
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    name, file = sharded
    hub.cut[file.name] = [0] * 6  # the client tries so often
    refused(capsys, words(here, ref_models=[name]), "sharded: `org/sharded` could not be downloaded", "start again")
    hub.requests.clear()
    run_command("score", words(here, ref_models=[name]))
    assert "complete" in capsys.readouterr().out
    got = [path for method, path, _ in hub.of(name) if method == "GET" and path.endswith(".safetensors")]
    assert [path.rpartition("/")[2] for path in got].count(file.name) == 1 and len(got) <= 2


def test_a_data_set_that_breaks_off_is_named(hub, here, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    hub.cut["train.jsonl"] = [0] * 6
    refused(capsys, words(here), "`dataset_name: org/pairs` cannot be read", "check the name, the network")
    run_command("score", words(here))
    assert "complete" in capsys.readouterr().out


def test_revisions_are_models_of_their_own(hub, here, models):
    hub.add(models["gpt_neox"], "org/qwen2", revision="v2")
    for reference in ("org/qwen2", {"model": "org/qwen2", "revision": "v2"}):
        run_command("score", words(here, ref_models=[reference], anchor="org/llama"))
    keys = {entry.key: entry.description for entry in list_cache(here / "cache")}
    assert len(keys) == 3
    assert len({json.dumps(description["parts"]["weights"]) for description in keys.values()}) == 3


def test_configurations_and_splits_of_a_data_set(hub, here, capsys):
    folder = here / "many"
    (folder / "hard").mkdir(parents=True)
    (folder / "hard" / "a.jsonl").write_text(lines(6, seed=1))
    (folder / "hard" / "b.jsonl").write_text(lines(3, seed=2))
    (folder / "easy.jsonl").write_text(lines(5, seed=3))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: hard\n  data_files:\n  - split: first\n    path: hard/a.jsonl\n"
        "  - split: second\n    path: hard/b.jsonl\n- config_name: easy\n  data_files: easy.jsonl\n---\n"
    )
    hub.add(folder, "org/many", "datasets")
    splits = {"dataset_config": "hard", "dataset_train_split": "first", "dataset_test_split": "second"}
    run_command("score", words(here, dataset_name="org/many", **splits))
    assert "9 of 9" in capsys.readouterr().out
    run_command("score", words(here, dataset_name="org/many", dataset_config="easy"))
    assert "5 of 5" in capsys.readouterr().out
    refused(capsys, words(here, dataset_name="org/many", dataset_config="none"), "cannot be read", "none")


@pytest.mark.slow
def test_a_push_arrives_whole(hub, here, monkeypatch, capsys):
    patched(monkeypatch, hub.url, here / "home", token=TOKEN)
    run_command("train", words(here, push_to_hub=True, hub_model_id="me/trained", hub_strategy="end"))
    printed = capsys.readouterr()
    pushed, out = hub.root / "models" / "me" / "trained" / "main", here / "out"
    files = {str(file.relative_to(pushed)) for file in pushed.rglob("*") if file.is_file()}
    assert files >= {"README.md", "report.html", "run.json", "config.json", "model.safetensors", "tokenizer.json"}
    assert not [name for name in files if "cache" in name or name.endswith((".jsonl", ".bin"))]  # as .gitignore says
    for name in files - {".gitattributes"}:
        assert (pushed / name).read_bytes() == (out / name).read_bytes(), name
    for name in files:
        data = (pushed / name).read_bytes()
        assert b"SENTINEL" not in data and str(here).encode() not in data, name
    assert "SENTINEL" not in printed.out + printed.err
    card = (pushed / "README.md").read_text()
    assert "org/llama" in card and "org/qwen2" in card
    trained = load_file(pushed / "model.safetensors")
    base = load_file(hub.root / "models" / "org" / "llama" / "main" / "model.safetensors")
    assert trained.keys() == base.keys() and not all(torch.equal(trained[key], base[key]) for key in base)
    assert Path(AutoModelForCausalLM.from_pretrained("me/trained").config._name_or_path) == Path("me/trained")


def test_a_reward_model_by_its_name(hub, here, models):
    """The weights come after the check of what is small; a head that they lack is found out then."""
    folder = write_reward(here / "reward", models["llama"])
    hub.add(folder, "org/reward")
    weights = load_file(Path(folder) / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})
    hub.add(folder, "org/headless")
    cpu = torch.device("cpu")
    plan_reward("org/reward", device=cpu)
    assert not any("model.safetensors" in path for method, path, _ in hub.of("org/reward") if method == "GET")
    scores = RewardModel.load("org/reward", device=cpu).scores(
        [[{"role": "user", "content": "one"}]] * 2, ["yes", "no"]
    )
    assert scores[0] != scores[1]
    with pytest.raises(ConfigError, match=r"lacks score.weight, so its scores would come from random weights"):
        RewardModel.load("org/headless", device=cpu)
