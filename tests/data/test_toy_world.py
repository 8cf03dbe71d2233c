"""The toy world: made once, the same each time, three different readers of the same text. Made here with two steps per model."""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data import toy_world as toyworld
from mrpo_scale.data.model_text import ModelText
from mrpo_scale.data.pairs import PreferencePair
from mrpo_scale.data.toy_skills import ANTONYMS, SKILLS
from mrpo_scale.data.toy_world import MODELS, ToySettings, ToyWorld, make_world, resolve

SMALL = ToySettings(train_pairs=120, test_pairs=36, batch_size=4, max_steps=2, hidden_size=32)
PAIR = PreferencePair([{"role": "user", "content": "Sort 3 1 2 4."}], "Sorted: 1 2 3 4.", "Sorted: 4 3 2 1.")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ToyWorld:
    return make_world(tmp_path_factory.mktemp("cache"), SMALL)


@pytest.fixture
def never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("the world was made again")

    monkeypatch.setattr(toyworld, "_make", fail)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def contents(world: ToyWorld) -> dict[str, bytes]:
    return {str(file.relative_to(world.root)): file.read_bytes() for file in world.root.rglob("*") if file.is_file()}


def text_of(world: ToyWorld, name: str) -> ModelText:
    return ModelText(AutoTokenizer.from_pretrained(world.models[name]), name=name, max_context=256)


def test_the_same_settings_make_the_same_world_whatever_the_state(world: ToyWorld, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(77)
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    again = make_world(tmp_path, SMALL)
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert again.root.name == world.root.name
    one, two = contents(world), contents(again)
    assert one.keys() == two.keys() and [name for name in one if one[name] != two[name]] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [world.root.name, f"{world.root.name}.lock"]


@pytest.mark.usefixtures("never_made")
def test_a_second_call_reuses_the_world(world: ToyWorld) -> None:
    assert make_world(world.root.parent, SMALL) == world


@pytest.mark.parametrize("change", [{"seed": 1}, {"label_noise": 0.0}, {"max_steps": 3}])
@pytest.mark.usefixtures("never_made")
def test_other_settings_are_another_world(world: ToyWorld, change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="made again"):
        make_world(world.root.parent, ToySettings(**{**SMALL.__dict__, **change}))


@pytest.mark.usefixtures("never_made")
def test_another_version_is_another_world(world: ToyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toyworld, "WORLD_VERSION", -1)
    with pytest.raises(AssertionError, match="made again"):
        make_world(world.root.parent, SMALL)


def _make_and_report(root: Path, made: Any) -> None:
    make = toyworld._make

    def counted(world: ToyWorld, settings: ToySettings) -> None:
        made.put(1)
        make(world, settings)

    toyworld._make = counted
    assert make_world(root, SMALL).train_file.is_file()


@pytest.mark.processes
def test_two_processes_make_one_world(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    made = context.Queue()
    workers = [context.Process(target=_make_and_report, args=(tmp_path, made)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert made.get(timeout=5) == 1 and made.empty()


def test_what_a_killed_process_left_is_cleared_away(world: ToyWorld, tmp_path: Path) -> None:
    left = tmp_path / f"{world.root.name}.making" / "pairs"
    left.mkdir(parents=True)
    (left / "half").touch()
    made = make_world(tmp_path, SMALL)
    assert not (made.data_dir / "half").exists() and not left.exists()


def test_models_are_ordinary_folders_of_three_families(world: ToyWorld) -> None:
    for name, path in world.models.items():
        config = AutoConfig.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert config.model_type == name and config.vocab_size == len(tokenizer)
        assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} == {torch.float32}
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id == config.eos_token_id is not None
        assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
        assert config.max_position_embeddings == tokenizer.model_max_length == 256
    assert AutoConfig.from_pretrained(world.models["qwen2"]).tie_word_embeddings
    assert not AutoConfig.from_pretrained(world.models["llama"]).tie_word_embeddings


def test_every_model_reads_the_text_in_its_own_tokens_and_template(world: ToyWorld) -> None:
    decoded = {}
    lengths = {}
    for name in MODELS:
        text = text_of(world, name)
        prompt, answer = text.prompt_ids(PAIR), text.response_ids(PAIR.chosen, raw=False, cut=False)
        decoded[name] = f"{text.tokenizer.decode(prompt)}|{text.tokenizer.decode(answer)}"
        lengths[name] = len(answer)
    assert decoded == {
        "llama": "<s>[INST]Sort 3 1 2 4.[/INST]|Sorted: 1 2 3 4.</s>",
        "qwen2": "<|im_start|>user\nSort 3 1 2 4.<|im_end|>\n<|im_start|>assistant\n|Sorted: 1 2 3 4.<|im_end|>",
        "gpt_neox": "<|startoftext|>Human: Sort 3 1 2 4.\n\nAssistant: |Sorted: 1 2 3 4.<|endoftext|>",
    }
    assert lengths["gpt_neox"] == len(PAIR.chosen) + 1  # bytes
    assert lengths["llama"] < lengths["gpt_neox"]
    assert len({len(text_of(world, name).tokenizer) for name in MODELS}) == 3
    assert text_of(world, "gpt_neox").is_plain


def test_a_batch_trains_on_answer_and_end_of_turn_only(world: ToyWorld) -> None:
    text = text_of(world, "llama")
    turns = [("Sort 3 1 2 4.", "Sorted: 1 2 3 4."), ("Is 7 odd?", "Yes.")]
    batch = toyworld._batch(text, turns, text.tokenizer.pad_token_id)
    for i, (_, answer) in enumerate(turns):
        labels, ids = batch["labels"][i], batch["input_ids"][i]
        assert text.tokenizer.decode(labels[labels != -100]) == f"{answer}</s>"
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        assert (ids[batch["attention_mask"][i] == 0] == text.tokenizer.pad_token_id).all()
    assert batch["attention_mask"][1].sum() < batch["attention_mask"][0].sum() == batch["input_ids"].shape[1]


def test_pairs_are_conversations_over_all_skills_with_disjoint_prompts(world: ToyWorld) -> None:
    train, test = rows(world.train_file), rows(world.test_file)
    assert (len(train), len(test)) == (120, 36)
    for row in train + test:
        assert [turn["role"] for turn in row["prompt"] + row["chosen"] + row["rejected"]] == [
            "user",
            "assistant",
            "assistant",
        ]
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen != rejected and abs(len(chosen) - len(rejected)) <= 5
    for split in (train, test):
        assert {skill: sum(row["skill"] == skill for row in split) for skill in SKILLS} == dict.fromkeys(
            SKILLS, len(split) // 6
        )
    prompts = [row["prompt"][0]["content"] for row in train + test]
    assert len(set(prompts)) == len(prompts)


def test_models_never_see_a_held_out_prompt(world: ToyWorld) -> None:
    held_out = {row["prompt"][0]["content"] for row in rows(world.test_file)}
    rng = random.Random(0)
    teacher = toyworld._teacher(rng, MODELS["llama"], 0, held_out)
    # Enough that each held-out opposite (180 prompts in all) would come up.
    assert not held_out & {next(teacher)[0] for _ in range(12_000)}


def test_only_training_labels_are_swapped(tmp_path: Path) -> None:
    def wrong(file: Path) -> int:
        ordered = [row for row in rows(file) if row["skill"] == "order"]
        return sum(not right(row["chosen"][0]["content"]) for row in ordered)

    def right(answer: str) -> bool:
        numbers = answer.removeprefix("Sorted: ").rstrip(".").split()
        return numbers == sorted(numbers)

    noisy = ToyWorld(tmp_path / "noisy")
    noisy.data_dir.mkdir(parents=True)
    toyworld._write_pairs(noisy, ToySettings(train_pairs=900, test_pairs=120, label_noise=0.2))
    assert wrong(noisy.test_file) == 0
    assert 15 <= wrong(noisy.train_file) <= 45  # 150 pairs, 20% of them


def test_more_pairs_than_prompts_is_an_error(tmp_path: Path) -> None:
    many = ToyWorld(tmp_path)
    many.data_dir.mkdir()
    with pytest.raises(ConfigError, match="ask for fewer"):
        toyworld._write_pairs(many, ToySettings(train_pairs=1200, test_pairs=120))


def test_answers_are_right() -> None:
    rng = random.Random(3)
    for _ in range(200):
        prompt, right, wrong = SKILLS["compare"](rng)
        a, b = (int(word.strip("?")) for word in prompt.split() if word.strip("?").isdigit())
        best = max(a, b) if "larger" in prompt else min(a, b)
        assert right.startswith(f"{best} is") and not wrong.startswith(f"{best} is")
        prompt, right, wrong = SKILLS["parity"](rng)
        even = int(prompt.split()[1]) % 2 == 0
        assert ("an even" in right, "an even" in wrong) == (even, not even)
        prompt, right, wrong = SKILLS["next"](rng)
        number = int(prompt.split()[-1].strip("?"))
        assert (int(right.split()[0]), int(wrong.split()[0])) == (number + 1, number - 1)
        prompt, right, wrong = SKILLS["reverse"](rng)
        assert (
            right.split()[1:]
            == [x + "." * (i == 3) for i, x in enumerate(prompt.strip(".").split()[:0:-1])]
            != wrong.split()[1:]
        )
        _, right, wrong = SKILLS["opposite"](rng)
        word, answer = right.strip(".").split()[3::2]
        assert ANTONYMS[word] == answer and ANTONYMS[answer] == word and wrong != right


def test_own_teachers_are_right_as_often_as_told_and_only_at_the_end() -> None:
    spec = MODELS["llama"]
    teacher = toyworld._teacher(random.Random(0), spec, 600, set())
    sorts = [
        answer.removeprefix("Sorted: ")
        for _, answer in (next(teacher) for _ in range(6600))
        if answer.startswith("Sorted")
    ]
    right = [answer[0] < answer[2] for answer in sorts]
    assert all(right[:100])
    assert abs(sum(right[100:]) / 1000 - spec.reliability[list(SKILLS).index("order")]) < 0.06


@pytest.mark.usefixtures("never_made")
def test_resolve_leaves_other_names_alone_and_refuses_unknown_parts() -> None:
    assert resolve("meta-llama/Llama-2-7b-chat-hf") == "meta-llama/Llama-2-7b-chat-hf"
    with pytest.raises(ConfigError, match=r"`toy:mistral`.*toy:llama, toy:qwen2, toy:gpt_neox, toy:pairs"):
        resolve("toy:mistral")


def test_resolve_finds_the_parts_in_the_cache_of_the_environment(
    world: ToyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MRPO_CACHE", str(world.root.parent))
    monkeypatch.setattr(toyworld, "ToySettings", lambda: SMALL)
    assert resolve("toy:qwen2") == str(world.models["qwen2"])
    assert json.loads(resolve('{"model": "toy:qwen2", "name": "q"}')) == {
        "model": str(world.models["qwen2"]),
        "name": "q",
    }
    assert sorted(path.name for path in Path(resolve("toy:pairs")).iterdir()) == ["test.jsonl", "train.jsonl"]


def test_the_folder_says_that_it_is_a_toy(world: ToyWorld) -> None:
    text = (world.root / "README.md").read_text()
    assert "Toys" in text and '"label_noise": 0.05' in text
