"""References that a server scores with, over real HTTP: the cache that it fills, what is scored again, what can go wrong."""

import copy
import json
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.cli import run_command
from mrpo_scale.config.model_spec import parse_ref_models
from mrpo_scale.data.model_text import ModelText
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.models.plan import PlannedReference
from mrpo_scale.models.source import ReferenceSource, Server
from mrpo_scale.references import served
from mrpo_scale.references.served import KEPT, ServedReference
from mrpo_scale.references.store.cache import ReferenceStore, list_cache
from mrpo_scale.references.store.identity import ReferenceIdentity
from tests.distributed.jobs import Job, Kill
from tests.scoring_server import ScoringServer
from tests.tiny import pair_rows, write_models

ROWS = 96  #: three batches of one sender, whatever their order
KEY = "sk-test-0123456789abcdef"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(served, "FIRST_WAIT", 0.01)


@pytest.fixture(params=["vllm", "sglang"])
def server(request, models):
    with ScoringServer(models["qwen2"], request.param) as running:
        yield running


@pytest.fixture
def vllm(models):
    with ScoringServer(models["qwen2"]) as running:
        yield running


class Recipe:
    def __init__(self, folder, models, *references, **keys):
        self.cache, self.path = folder / "cache", folder / "recipe.yaml"
        data = folder / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(ROWS)))
        base = {"model_name_or_path": models["llama"], "ref_models": list(references), "dataset_name": str(data)}
        base |= {"output_dir": str(folder / "out"), "use_cpu": True, "report_to": "none", "save_strategy": "no"}
        base |= {"per_device_train_batch_size": 4, "max_steps": 1, "ref_cache_dir": str(self.cache)}
        self.path.write_text(json.dumps(base | keys))

    def words(self, *more):
        return ["--config", str(self.path), *more]

    def score(self):
        run_command("score", self.words("--reference", "served"))


def scores(cache, name="served"):
    """{row key: log-probs and counts} of one reference."""
    (entry,) = [entry for entry in list_cache(cache) if entry.description["name"] == name]
    assert not entry.problems
    store = ReferenceStore(cache, ReferenceIdentity(name, entry.description["parts"]))
    store.refresh()
    return {
        key.tobytes(): (*logps, *tokens)
        for run in store._runs
        for key, logps, tokens in zip(run.keys_N.view("V16"), run.logps_N2, run.tokens_N2, strict=True)
    }


def refused(capsys, command, words, *parts):
    with pytest.raises(SystemExit) as stop:
        run_command(command, words)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and all(part in line for part in parts), line
    return line


def canaries(server):
    """Texts that were sent only to compare."""
    return {tuple(ids) for ids in json.loads(kept_of(server).read_text())["ids"]}


def kept_of(folder):
    (file,) = Path(folder).rglob(KEPT)
    return file


# --- the cache


def test_the_cache_is_filled_as_by_the_model_itself(server, models, tmp_path, capsys):
    (tmp_path / "here").mkdir()
    here = Recipe(tmp_path / "here", models, {"model": models["qwen2"], "name": "served"})
    here.score()
    there = Recipe(tmp_path, models, server.spec(models["qwen2"], concurrency=2))
    there.score()
    assert "complete" in capsys.readouterr().out
    ours, theirs = scores(there.cache), scores(here.cache)
    assert len(ours) == ROWS and ours.keys() == theirs.keys()
    for key, values in theirs.items():
        np.testing.assert_allclose(ours[key], values, rtol=2e-5)
    sent = {text: n for text, n in server.texts.items() if text not in canaries(there.cache)}
    assert len(sent) == 2 * ROWS and set(sent.values()) == {1}
    before = server.texts.total()
    there.score()  # complete: only the canaries are looked at
    assert server.texts.total() == before + len(served.CANARIES)


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_job_goes_on_and_scores_no_more_than_a_batch_again(jobs, vllm, models, tmp_path):
    recipe = Recipe(tmp_path, models, vllm.spec(models["qwen2"]))
    words = ["score", *recipe.words("--reference", "served")]
    batch = 16 * served.PAIRS_PER_REQUEST
    vllm.held, vllm.hold_after = tmp_path / "held", 2 * batch + 40  # in the second batch
    ((ended,),) = jobs.run(Job(words, env={"NO_PROXY": "127.0.0.1"}), kill=Kill([0], 0.0, since=str(vllm.held)))
    assert ended.status == -9, ended.err
    assert len(scores(recipe.cache)) == batch
    vllm.hold_after = None
    two = jobs.run(Job(words, ranks=2, env={"NO_PROXY": "127.0.0.1"}))[0]  # of whom one asks
    assert [one.status for one in two] == [0, 0], two[0].err
    assert len(scores(recipe.cache)) == ROWS
    sent = {text: n for text, n in vllm.texts.items() if text not in canaries(recipe.cache)}
    again = [n for n in sent.values() if n > 1]
    assert len(sent) == 2 * ROWS and 0 < len(again) <= 2 * batch and set(again) == {2}


def test_other_weights_behind_the_same_name_are_found_out_at_the_start(server, models, tmp_path, capsys):
    recipe = Recipe(tmp_path, models, server.spec(models["qwen2"]))
    recipe.score()
    old = scores(recipe.cache)
    slightly(server.model)
    run_command("score", recipe.words("--reference", "served"))  # complete: a warning at most
    with recipe.cache.parent.joinpath("pairs.jsonl").open("a") as data:
        data.write("".join(json.dumps(row) + "\n" for row in pair_rows(8, seed=9)))
    refused(capsys, "score", recipe.words("--reference", "served"), "other weights behind `tiny`", "revision")
    assert scores(recipe.cache) == old
    server.load(models["qwen2"])
    recipe.score()
    assert len(scores(recipe.cache)) > ROWS


def test_other_weights_while_it_scores_leave_nothing_in_the_cache(vllm, models, tmp_path, capsys):
    """Exchanged in the second batch of three, as when a server is started again."""
    recipe = Recipe(tmp_path, models, vllm.spec(models["qwen2"]))
    original = copy.deepcopy(vllm.model)

    def exchange(answer, n):
        if vllm.texts.total() > 2 * 32 + 40 and vllm.model is not original:
            slightly(original)
            vllm.model = original

    vllm.spoil = exchange
    refused(capsys, "score", recipe.words("--reference", "served"), "other weights behind `tiny`", "not kept")
    assert len(scores(recipe.cache)) == 32
    vllm.spoil = lambda answer, n: None
    vllm.load(models["qwen2"])
    recipe.score()
    (tmp_path / "here").mkdir()
    here = Recipe(tmp_path / "here", models, {"model": models["qwen2"], "name": "served"})
    here.score()
    for key, values in scores(here.cache).items():
        np.testing.assert_allclose(scores(recipe.cache)[key], values, rtol=2e-5)


def slightly(model):
    """One step of training with a tiny learning rate moves weights as much as this."""
    for parameter in model.parameters():
        parameter.data.mul_(1.002)


def test_another_root_is_another_model(vllm, models, tmp_path, capsys):
    recipe = Recipe(tmp_path, models, vllm.spec(models["qwen2"]))
    recipe.score()
    recipe.cache.parent.joinpath("pairs.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in pair_rows(4, seed=9))
    )
    old, vllm.root = vllm.root, "org/another"
    refused(capsys, "score", recipe.words("--reference", "served"), "stands for org/another", old)


def test_scores_without_their_canaries_are_not_added_to(vllm, models, tmp_path, capsys):
    recipe = Recipe(tmp_path, models, vllm.spec(models["qwen2"]))
    recipe.score()
    kept_of(recipe.cache).unlink()
    recipe.cache.parent.joinpath("pairs.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in pair_rows(4, seed=9))
    )
    refused(capsys, "score", recipe.words("--reference", "served"), f"no {KEPT}")


@pytest.mark.slow
def test_a_run_trains_from_its_scores_and_needs_no_server_for_it(vllm, models, tmp_path, capsys, caplog):
    keys = {"ref_scoring": "precompute", "save_strategy": "steps", "save_steps": 1}  # a checkpoint names its references
    recipe = Recipe(tmp_path, models, vllm.spec(models["qwen2"]), **keys)
    run_command("train", recipe.words())
    run_command("inspect", recipe.words())
    printed = capsys.readouterr().out
    assert "served: served by vllm as" in printed and "nats per token" in printed
    precision = json.loads((tmp_path / "out" / "inspect.json").read_text())["served_precision"]
    assert list(precision) == ["served"] and 0 <= precision["served"] < 1e-5  # float32, one text at a time
    vllm.__exit__()
    with caplog.at_level("INFO", "mrpo_scale"):
        run_command("train", recipe.words("--resume_from_checkpoint", "never"))
    assert "its server was not needed" in caplog.text


def test_a_text_longer_than_the_server_takes_is_known_before_any_is_sent(vllm, models, tmp_path, capsys):
    vllm.max_model_len = 30
    recipe = Recipe(tmp_path, models, vllm.spec(models["qwen2"]))
    refused(capsys, "score", recipe.words("--reference", "served"), "takes texts of 30 tokens", "`max_length`")
    assert not vllm.bodies


# --- one request


def reference(server, models, folder, *, key=None, concurrency=1):
    source = ReferenceSource("served", server.name, "first", server=Server(server.url, "auto", key, concurrency))
    tokenizer = AutoTokenizer.from_pretrained(models["qwen2"])
    text = ModelText(tokenizer, name="served", max_context=None)
    return ServedReference(PlannedReference(source, 0, 0), text, folder)


PAIRS = [PairTokens([5, 6, 7], [8, 9], [10]), PairTokens([5], [11, 12, 13], [14, 15]), PairTokens([5, 9], [8], [9])]


def test_sums_are_over_the_response_alone(server, models, tmp_path):
    logps = reference(server, models, tmp_path, concurrency=3)
    logps.connect()
    got = logps.score(PAIRS)
    for (chosen, rejected), pair in zip(got, PAIRS, strict=True):
        for value, response in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
            by_hand = server.logps([*pair.prompt_ids, *response])[-len(response) :]
            assert value == pytest.approx(sum(by_hand), rel=1e-6)


def test_what_tools_say_is_read_and_not_scored(server, models, tmp_path):
    logps = reference(server, models, tmp_path)
    logps.connect()
    ((chosen, rejected),) = logps.score([PairTokens([5, 6], [8, 9, 10, 11, 12], [13, 14], chosen_context=[1, 3])])
    by_hand = server.logps([5, 6, 8, 9, 10, 11, 12])[-5:]
    assert chosen == pytest.approx(by_hand[0] + by_hand[3] + by_hand[4], rel=1e-6)
    assert rejected == pytest.approx(sum(server.logps([5, 6, 13, 14])[-2:]), rel=1e-6)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_fails_for_the_moment_is_asked_again(server, models, tmp_path, status):
    scorer = reference(server, models, tmp_path)
    scorer.connect()
    server.spoil = lambda answer, n: (status, {"Retry-After": "0.01"}, b"busy") if n % 3 else None
    assert np.isfinite(scorer.score(PAIRS)).all()


def without(answer, kind):
    """Without the last token's log-prob, and without the count that goes with it."""
    answer = copy.deepcopy(answer)
    one = answer["choices"][0] if kind == "vllm" else answer[0]["meta_info"]
    one["prompt_logprobs" if kind == "vllm" else "input_token_logprobs"].pop()
    return answer


def other_token(answer, kind):
    answer = copy.deepcopy(answer)
    if kind == "vllm":
        entry = answer["choices"][0]["prompt_logprobs"][-1]
        entry["299"] = entry.pop(next(iter(entry)))
    else:
        answer[0]["meta_info"]["input_token_logprobs"][-1][1] = 299
    return answer


def with_logp(value):
    def changed(answer, kind):
        answer = copy.deepcopy(answer)
        if kind == "vllm":
            next(iter(answer["choices"][0]["prompt_logprobs"][-1].values()))["logprob"] = value
        else:
            answer[0]["meta_info"]["input_token_logprobs"][-1][0] = value
        return answer

    return changed


def cut(answer, kind):
    """As a server does that is told to keep the last tokens of a long prompt."""
    answer = copy.deepcopy(answer)
    one = answer["choices"][0] if kind == "vllm" else answer[0]["meta_info"]
    if kind == "sglang":
        one["prompt_tokens"] -= 1
    else:
        del one["prompt_logprobs"][1]
    return answer


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        (without, "it cuts prompts"),
        (cut, "it cuts prompts"),
        (other_token, "another token than"),
        (with_logp(float("nan")), "is nan"),
        (with_logp(float("-inf")), "is -inf"),
        (with_logp(0.5), "is 0.5"),
        (with_logp("low"), "is low"),
        (lambda answer, kind: answer["choices"] if kind == "vllm" else {"error": "?"}, "cannot be believed"),
        (lambda answer, kind: answer | {"choices": []} if kind == "vllm" else [], "to 4 texts"),
    ],
)
def test_an_answer_to_something_else_is_not_believed(server, models, tmp_path, spoilt, said):
    scorer = reference(server, models, tmp_path)
    scorer.connect()
    server.spoil = lambda answer, n: (200, {}, spoilt(answer, server.kind))
    with pytest.raises(ConfigError, match=said) as stop:
        scorer.score(PAIRS)
    assert "served: " in str(stop.value) and "\n" not in str(stop.value)


def test_vllm_writes_minus_infinity_as_a_number(vllm, models, tmp_path):
    scorer = reference(vllm, models, tmp_path)
    scorer.connect()
    vllm.spoil = lambda answer, n: (200, {}, with_logp(-9999.0)(answer, "vllm"))
    with pytest.raises(ConfigError, match="is -inf"):
        scorer.score(PAIRS)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((429, {"Retry-After": "0.01"}, b"slow down"), "2 attempts; the last: HTTP 429"),
        ((429, {"Retry-After": "3600"}, b"slow down"), "asks to wait 3600 s"),
        ((500, {}, b"CUDA out of memory"), "2 attempts; the last: HTTP 500 .*CUDA out of memory"),
        ((200, {}, b"<html>sign in</html>"), "what is not JSON .*<html>sign in"),
        ((400, {}, b"context length"), "refuses to score 4 texts of up to 5 tokens: HTTP 400 .*context length"),
        ((401, {}, f"bad key {KEY}".encode()), r"HTTP 401 .*bad key \[API key\]"),
        ((307, {"Location": "http://elsewhere/v1"}, b""), "redirects to elsewhere"),
    ],
)
def test_each_failure_is_named_in_one_line(vllm, models, tmp_path, monkeypatch, reply, said):
    monkeypatch.setattr(served, "RETRIES", 1)
    monkeypatch.setenv("SCORING_KEY", KEY)
    scorer = reference(vllm, models, tmp_path, key="SCORING_KEY", concurrency=4)
    scorer.connect()
    vllm.spoil = lambda answer, n: reply
    with pytest.raises(ConfigError, match=said) as stop:
        scorer.score(PAIRS)
    assert KEY not in str(stop.value) and KEY not in repr(scorer._endpoint) and "\n" not in str(stop.value)
    assert set(vllm.keys) == {f"Bearer {KEY}"}


def test_a_server_that_is_silent_or_gone_is_named(vllm, models, tmp_path, monkeypatch):
    monkeypatch.setattr(served, "RETRIES", 1)
    monkeypatch.setattr(served, "TIMEOUT", 0.2)
    scorer = reference(vllm, models, tmp_path)
    scorer.connect()

    def silent(answer, n):
        time.sleep(0.5)
        return

    vllm.spoil = silent
    with pytest.raises(ConfigError, match=r"2 attempts; the last: TimeoutError.*Scores so far are kept"):
        scorer.score(PAIRS)
    vllm.__exit__()
    with pytest.raises(ConfigError, match="refused"):
        reference(vllm, models, tmp_path).connect()


def test_a_server_without_the_model_or_of_no_known_kind_is_named(vllm, models, tmp_path):
    vllm.owned_by = "somebody"
    with pytest.raises(ConfigError, match="`server: vllm` or `server: sglang`"):
        reference(vllm, models, tmp_path).connect()
    scorer = reference(vllm, models, tmp_path)
    vllm.name = "large"
    with pytest.raises(ConfigError, match="serves no `tiny`; it has large"):
        scorer.connect()


def test_no_more_requests_at_once_than_the_recipe_says(vllm, models, tmp_path):
    scorer = reference(vllm, models, tmp_path, concurrency=3)
    scorer.connect()
    at_once, most = [], []

    def count(answer, n):
        at_once.append(n)
        most.append(len(at_once))
        time.sleep(0.05)
        at_once.remove(n)

    vllm.spoil = count
    scorer.score(PAIRS * 10)
    assert max(most) == 3


# --- the recipe


def test_live_scoring_is_refused(vllm, models, tmp_path, capsys):
    recipe = Recipe(tmp_path, models, vllm.spec(models["qwen2"]))
    refused(
        capsys, "train", recipe.words(), "`ref_scoring: live`: served is served elsewhere", "`ref_scoring: precompute`"
    )
    assert not vllm.keys


@pytest.mark.parametrize("command", ["train", "score"])
def test_a_key_that_is_not_there_is_missed_before_anything_is_read(vllm, models, tmp_path, capsys, command):
    spec = vllm.spec(models["qwen2"], api_key_env="NOT_EXPORTED")
    recipe = Recipe(tmp_path, models, spec, ref_scoring="precompute", dataset_name="not/there")
    refused(capsys, command, recipe.words(), "`ref_models.api_key_env: NOT_EXPORTED`", "not set")


def test_a_server_is_asked_before_another_reference_is_loaded(vllm, models, tmp_path, capsys):
    recipe = Recipe(tmp_path, models, models["gpt_neox"], vllm.spec(models["qwen2"]))
    vllm.name = "large"
    refused(capsys, "score", recipe.words(), "serves no `tiny`")
    assert not list(recipe.cache.rglob("part-*"))


def test_a_served_anchor_is_warned_of(vllm, models, tmp_path, caplog):
    recipe = Recipe(tmp_path, models, anchor=vllm.spec(models["llama"]))
    with caplog.at_level("WARNING", "mrpo_scale"):
        run_command("score", recipe.words("--list"))
    assert "anchor: tiny is scored by a server" in caplog.text


def test_a_dry_run_asks_nothing_of_the_server(vllm, models, tmp_path, capsys):
    recipe = Recipe(tmp_path, models, vllm.spec(models["qwen2"]), ref_scoring="precompute")
    run_command("check", recipe.words("--gpu", "cpu", "--gpus", "1"))
    assert "served is served at http://127.0.0.1" in capsys.readouterr().out and not vllm.keys


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer": None}, "`ref_models.tokenizer` is missing for m at http://h:1/v1"),
        ({"revision": None}, "`ref_models.revision` is missing"),
        ({"dtype": "bfloat16"}, "`ref_models.dtype` is the server's to decide"),
        ({"url": None}, "`ref_models.tokenizer` is for a model that is served elsewhere"),
        ({"url": "h:1"}, "`ref_models.url: h:1` is no http"),
        ({"url": f"http://me:{KEY}@h/v1"}, "carries a user or password"),
        ({"url": f"http://h/v1?key={KEY}"}, "has a query"),
        ({"api_key": KEY}, "unknown key `api_key`"),
        ({"api_key_env": KEY}, "must be the name of an environment variable"),
        ({"concurrency": 0}, "whole number of 1 or more"),
        ({"concurrency": True}, "whole number of 1 or more"),
        ({"server": "ollama"}, "choose one of auto, vllm, sglang"),
    ],
)
def test_mistakes_in_a_recipe_are_named_and_show_no_key(change, said):
    spec = {"url": "http://h:1/v1", "model": "m", "tokenizer": "t", "revision": "r", **change}
    with pytest.raises(ConfigError) as stop:
        parse_ref_models([{k: v for k, v in spec.items() if v is not None}])
    assert said in str(stop.value) and KEY not in str(stop.value)


def test_a_key_is_not_sent_readable_to_all(models, tmp_path, monkeypatch):
    monkeypatch.setenv("SCORING_KEY", KEY)
    source = ReferenceSource("r", "m", "first", server=Server("http://far.example/v1", "auto", "SCORING_KEY", 1))
    tokenizer = AutoTokenizer.from_pretrained(models["qwen2"])
    text = ModelText(tokenizer, name="r", max_context=None)
    with pytest.raises(ConfigError, match="plain http") as stop:
        ServedReference(PlannedReference(source, 0, 0), text, tmp_path)
    assert KEY not in str(stop.value)
