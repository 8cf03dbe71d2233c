"""No secret is in any file that a run leaves, nor in what it prints."""

import pickle

import pytest

from mrpo_scale.cli import run_command

SECRETS = {
    "HF_TOKEN": "hf_SENTINEL0environment",
    "HUGGING_FACE_HUB_TOKEN": "hf_SENTINEL1environment",
    "WANDB_API_KEY": "SENTINEL2" + "0" * 31,
    "OPENAI_API_KEY": "sk-SENTINEL3judge",
    "AWS_SECRET_ACCESS_KEY": "SENTINEL4aws",
}
TOKEN = "hf_SENTINEL5recipe"


def leaks(text):
    return b"SENTINEL" in (text.encode() if isinstance(text, str) else text)


def test_the_sentinel_would_be_found():
    assert leaks(pickle.dumps({"hub_token": TOKEN})) and leaks(f"x{TOKEN}")


@pytest.mark.slow
def test_a_run_with_everything_on(place, monkeypatch, capsys):
    """Checkpoints, evaluation, a dashboard, a baseline, a cache, and a token in the recipe."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    recipe = place.write("recipe.yaml", f"hub_token: {TOKEN}\n")
    change = {"save_strategy": "steps", "save_steps": 1, "report_to": "tensorboard", "eval_strategy": "steps"}
    change |= {"eval_steps": 1, "logging_steps": 1, "baselines": "dpo", "ref_cache_dir": place.root / "cache"}
    run_command("train", ["--config", str(recipe), *place.words(**change)])
    printed = capsys.readouterr()
    assert "MRPO (K=2)" in printed.out and not leaks(printed.out) and not leaks(printed.err)
    files = [path for path in place.root.rglob("*") if path.is_file() and path != recipe]
    names = {path.name for path in files}
    assert names >= {"README.md", "report.html", "run.json", "trainer_state.json", "training_args.bin", "optimizer.pt"}
    assert any(name.startswith("events.out") for name in names) and (place.run / "dpo" / "README.md").is_file()
    assert [path for path in files if leaks(path.read_bytes())] == []


def test_a_mistyped_key_does_not_show_its_value(place):
    for words in ([f"--hub_tokn={TOKEN}"], ["--hub_tokn", TOKEN]):
        assert not leaks(place.refused("train", [*place.words(), *words], "unknown key `hub_tokn`"))
    recipe = place.write("recipe.yaml", f"hub_tokn: {TOKEN}\n")
    assert not leaks(place.refused("train", ["--config", str(recipe), *place.words()], "unknown key `hub_tokn`"))


def test_a_comparison_takes_no_token_into_its_files(place):
    """It keeps the words of every run."""
    recipe = place.write("recipe.yaml", f"hub_token: {TOKEN}\n")
    words = [word for word in place.words() if not word.startswith("--output_dir")]
    output = ["--output", str(place.root / "compare"), "--dry_run"]
    for command in (["--config", str(recipe), *words], [*words, f"--hub_token={TOKEN}"]):
        assert not leaks(place.refused("compare", [*command, *output], "hub_token", "HF_TOKEN"))
    assert not (place.root / "compare").exists()
