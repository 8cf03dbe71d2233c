"""`mrpo eval` on tiny models: its numbers against plain forwards, its responses against token-by-token decoding, its mistakes."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mrpo_scale.eval.generation
from mrpo_scale.cli import run_command
from mrpo_scale.data.pairs import PreferencePair
from mrpo_scale.data.tokenization import ModelText
from mrpo_scale.eval.run import run
from tests.chat_server import ChatServer, completion
from tests.tiny import pair_rows, write_models

KEY = "sk-test-0123456789abcdef"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test's responses and verdicts to itself, and no key from outside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def write_pairs(rows, name="pairs.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def text_of(folder):
    return ModelText(AutoTokenizer.from_pretrained(folder), name="m", max_context=None)


def pair_of(row):
    return PreferencePair(row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"])


@torch.no_grad()
def plain_logps(folder, rows):
    """{(row, side): (log-prob of the response, its tokens)} by one ordinary forward per text."""
    model, text, found = AutoModelForCausalLM.from_pretrained(folder), text_of(folder), {}
    for i, row in enumerate(rows):
        pair = pair_of(row)
        prompt = text.prompt_ids(pair)
        for side in ("chosen", "rejected"):
            response = text.response_ids(getattr(pair, side), raw=False, cut=False)
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
            logps = logits.log_softmax(-1)[range(len(response)), response]
            found[i, side] = logps.sum().item(), len(response)
    return found


def test_accuracies_and_margins_are_those_of_plain_forwards(folders, capsys):
    """Three tokenizers, a reference with its own, batches of a few pairs; one pair that no model can score."""
    rows = pair_rows(23)
    bad = {**rows[0], "rejected": rows[0]["chosen"]}
    data = write_pairs([*rows[:9], bad, *rows[9:]])
    names = ("llama", "gpt_neox")
    run(
        [
            *("--model", *(folders[n] for n in names), "--reference", folders["qwen2"], "--dataset_name", data),
            *("--beta", "0.3", "--tokens_per_forward", "200", "--output", "out.json"),
        ]
    )
    results = json.loads(Path("out.json").read_text())
    assert results["data"] == {"dataset_name": data, "pairs": 23, "skipped": {"identical_responses": 1}, "remarks": []}
    reference = plain_logps(folders["qwen2"], rows)
    for name in names:
        logps = plain_logps(folders[name], rows)
        pairs = range(len(rows))
        margins = [logps[i, "chosen"][0] - logps[i, "rejected"][0] for i in pairs]
        per_token = [
            logps[i, "chosen"][0] / logps[i, "chosen"][1] - logps[i, "rejected"][0] / logps[i, "rejected"][1]
            for i in pairs
        ]
        rewards = [0.3 * (m - reference[i, "chosen"][0] + reference[i, "rejected"][0]) for i, m in enumerate(margins)]
        got = results["preference"][name]
        assert got["pairs"] == 23
        for key, values in (("accuracy", margins), ("normalized_accuracy", per_token), ("reward_accuracy", rewards)):
            assert got[key] == sum(v > 0 for v in values) / 23, key
        # Sums of float32 logits' log-probs over up to 100 tokens.
        assert got["margin"] == pytest.approx(sum(margins) / 23, abs=2e-4)
        assert got["reward_margin"] == pytest.approx(sum(rewards) / 23, abs=2e-4)
    printed = capsys.readouterr().out
    assert "llama" in printed and "gpt_neox" in printed and "skipped for all models: 1 identical_responses" in printed


def test_the_rows_are_those_that_training_held_out(folders):
    """The same `held_out` and seed as in `mrpo train`; without them the train split, or the first rows of it."""
    from mrpo_scale.data import load_rows

    data = write_pairs(pair_rows(30))
    words = ["--model", folders["llama"], "--dataset_name", data]
    held_out = load_rows(data, held_out=7, seed=3)[1]
    test = write_pairs(held_out.to_list(), "test.jsonl")
    alone = run(["--model", folders["llama"], "--dataset_name", test])["preference"]["llama"]
    assert run([*words, "--held_out", "7", "--seed", "3"])["preference"]["llama"] == pytest.approx(alone)
    assert run(words)["preference"]["llama"]["pairs"] == 30
    assert run([*words, "--max_pairs", "4"])["preference"]["llama"]["pairs"] == 4


def greedy(folder, rows, count):
    """Token by token, one prompt at a time, without a cache or padding."""
    model, text = AutoModelForCausalLM.from_pretrained(folder), text_of(folder)
    tokenizer, responses = text.tokenizer, []
    for row in rows:
        ids = text.prompt_ids(pair_of(row))
        end, made = text.response_ids("x", raw=False, cut=False)[-1], []
        while len(made) < count:
            token = model(torch.tensor([ids + made])).logits[0, -1].argmax().item()
            if token in (end, tokenizer.eos_token_id):
                break
            made.append(token)
        responses.append(tokenizer.decode(made, skip_special_tokens=True))
    return responses


def win_rate_words(folders, data, server, *names):
    return [
        *("--model", *(folders[n] for n in names), "--dataset_name", data, "--max_pairs", "0", "--max_prompts", "6"),
        *("--max_new_tokens", "8", "--generation_batch_size", "4", "--judge_model", "judge", "--judge_url", server.url),
        *("--output_dir", "kept", "--output", "out.json"),
    ]


def prefers_longer(text, n):
    a = text.split("<answer_A>\n")[1].split("\n</answer_A>")[0]
    b = text.split("<answer_B>\n")[1].split("\n</answer_B>")[0]
    return completion(f"Verdict: {'tie' if len(a) == len(b) else 'A' if len(a) > len(b) else 'B'}")


@torch.no_grad()
def test_a_win_rate_from_prompts_to_table(folders, monkeypatch, capsys):
    """Responses are greedy and left-padding does not change them; nothing is generated or paid for twice; no key anywhere."""
    rows = pair_rows(8)
    rows.insert(1, {**rows[0], "rejected": rows[1]["rejected"]})  # a second pair with the first prompt, asked once
    data, names = write_pairs(rows), ("llama", "gpt_neox")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def echo(text, n):  # an endpoint that says the key back
        status, headers, body = prefers_longer(text, n)
        body["choices"][0]["message"]["content"] += f"\n(key {KEY})"
        return status, headers, body

    with ChatServer(echo) as server:
        words = win_rate_words(folders, data, server, *names)
        with pytest.raises(SystemExit) as stop:
            run_command("eval", words)
        assert stop.value.code == 2 and not server.requests
        captured = capsys.readouterr()
        assert "12 calls" in captured.out and "--yes" in captured.err
        monkeypatch.setattr(mrpo_scale.eval.generation, "load_policy", None)  # from here on nothing may be generated
        run_command("eval", [*words, "--yes"])
        captured_2 = capsys.readouterr()
        assert (
            set(server.keys) == {f"Bearer {KEY}"} and server.asked.total() == 12 and set(server.asked.values()) == {1}
        )
        run_command("eval", words)  # all answered: nothing to confirm
        assert server.asked.total() == 12
    texts = [captured.out, captured.err, captured_2.out, captured_2.err]
    assert not any(KEY in text for text in texts)
    assert not [p for p in Path().rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]

    prompts = [rows[i] for i in (0, 2, 3, 4, 5, 6)]
    kept = [json.loads(line) for line in Path("kept/responses-0.jsonl").read_text().splitlines()]
    expected = {name: greedy(folders[name], prompts, 8) for name in names}
    for name in names:
        got = {r["prompt"][0]["content"]: r["response"] for r in kept if r["model"] == name}
        assert got == {row["prompt"][0]["content"]: text for row, text in zip(prompts, expected[name], strict=True)}
    result = json.loads(Path("out.json").read_text())["win_rate"]["llama against gpt_neox"]
    ours, theirs = ([len(t.strip() or "(empty)") for t in expected[name]] for name in names)
    points = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True))
    assert result["rate"] == points / 6 and result["disagreements"] == 0
    assert "llama against gpt_neox" in captured_2.out


def test_new_weights_are_asked_anew(folders, tmp_path):
    """A folder that was trained again has the same name; its old responses are not its own."""
    data = write_pairs(pair_rows(6))
    with ChatServer(prefers_longer) as server:
        words = [*win_rate_words(folders, data, server, "llama"), "--yes"]
        run(words)
        run(words)
        kept = Path("kept/responses-0.jsonl")
        assert len(kept.read_text().splitlines()) == 6
        os.utime(Path(folders["llama"]) / "model.safetensors")
        run(words)
        assert len(kept.read_text().splitlines()) == 12


def test_one_model_alone_is_judged_against_the_chosen_responses(folders):
    rows = pair_rows(6)
    with ChatServer(prefers_longer) as server:
        run([*win_rate_words(folders, write_pairs(rows), server, "llama"), "--yes"])
    asked = "".join(server.asked)
    assert all(row["chosen"][0]["content"] in asked for row in rows)
    assert "llama against chosen" in json.loads(Path("out.json").read_text())["win_rate"]


def test_a_prompt_near_the_end_of_the_context_gets_what_is_left(folders):
    text, words = text_of(folders["llama"]), 0
    while len(text.prompt_ids(PreferencePair([{"role": "user", "content": "one " * words}], "", ""))) < 506:
        words += 1
    row = {**pair_rows(1)[0], "prompt": [{"role": "user", "content": "one " * words}]}
    row["chosen"][0]["content"], row["rejected"][0]["content"] = "yes", "no"
    with ChatServer(prefers_longer) as server:
        run([*win_rate_words(folders, write_pairs([row]), server, "llama"), "--yes"])
    response = json.loads(Path("kept/responses-0.jsonl").read_text())["response"]
    left = 512 - len(text.prompt_ids(pair_of(row)))
    assert 0 < left < 8 and response in greedy(folders["llama"], [row], left)


def unusable(columns):
    return write_pairs([{columns: "a"}], "unusable.jsonl")


CASES = {
    "no model": (lambda f: [], ["`model` is missing"]),
    "nothing to do": (lambda f: ["--model", f], ["--dataset_name", "--tasks"]),
    "unknown key": (lambda f: ["--model", f, "--datset_name", "x"], ["unknown key `datset_name`", "did you mean `dataset_name`"]),
    "no such folder": (lambda f: ["--model", "./none", "--dataset_name", "pairs.jsonl"], ["./none"]),
    "a layout that fits nothing": (lambda f: ["--model", f, "--dataset_name", unusable("question")], ["Columns found: question"]),
    "too many bad rows": (
        lambda f: ["--model", f, "--dataset_name", write_pairs([{**r, "rejected": r["chosen"]} for r in pair_rows(3)], "b.jsonl")],
        ["max_bad_rows", "identical_responses"],
    ),
    "a judge without an address": (
        lambda f: ["--model", f, "--dataset_name", "d", "--judge_model", "j"],
        ["`judge_url` is missing"],
    ),
    "a judge without prompts": (
        lambda f: ["--model", f, "--tasks", "x", "--judge_model", "j", "--judge_url", "https://h"],
        ["--dataset_name"],
    ),
    "one price": (
        lambda f: ["--model", f, "--dataset_name", "d", "--judge_model", "j", "--judge_url", "https://h", "--judge_price", "1"],
        ["judge_price: 1.0", "two numbers"],
    ),
    "no folder of tasks": (lambda f: ["--model", f, "--tasks", "x", "--include_path", "nowhere"], ["include_path: nowhere"]),
    "an endpoint that is down": (
        lambda f: [
            *("--model", f, "--dataset_name", "pairs.jsonl", "--max_pairs", "0", "--max_new_tokens", "2", "--yes"),
            *("--judge_model", "j", "--judge_url", "http://127.0.0.1:9/v1", "--judge_retries", "0"),
        ],
        ["http://127.0.0.1:9/v1/chat/completions", "refused"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_mistakes_are_one_line(case, folders, capsys):
    words, expected = CASES[case]
    write_pairs(pair_rows(3))
    with pytest.raises(SystemExit) as stop:
        run_command("eval", words(folders["llama"]))
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and all(word in error[0] for word in expected), error


def test_without_the_harness_the_extra_is_named(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SystemExit):
        run_command("eval", ["--model", folders["llama"], "--tasks", "arc_easy"])
    assert "pip install 'mrpo-scale[eval]'" in capsys.readouterr().err
