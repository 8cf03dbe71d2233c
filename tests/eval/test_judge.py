"""The judge against a real HTTP server: what is repeated, paid for, never shown, and what the verdicts add up to."""

import email.utils
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.eval.config import EvalConfig
from mrpo_scale.eval.judge import Judge, parse_verdict, question
from mrpo_scale.eval.records import RecordFile, read_records
from mrpo_scale.eval.verdicts import Call, Verdicts, confirm, estimate
from mrpo_scale.eval.win_rate import Comparison, wilson, win_rate, win_rate_table
from tests.chat_server import ChatServer, completion

ROOT = Path(__file__).parents[2]
KEY = "sk-test-0123456789abcdef"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class Waits(threading.Event):
    """Notes how long a caller would wait, and does not."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def wait(self, timeout=None):
        self.seconds.append(timeout)
        return False


def judge_at(url, **keys):
    return Judge(url, "judge", **{"options": {"max_tokens": 16}, "first_wait": 0.01, "api_key": KEY, **keys})


def answers(text):
    """Answer A and answer B as the judge reads them."""
    a = text.split("<answer_A>\n")[1].split("\n</answer_A>")[0]
    b = text.split("<answer_B>\n")[1].split("\n</answer_B>")[0]
    return a, b


def prefers_good(text, n):
    a, b = answers(text)
    word = "tie" if ("good" in a) == ("good" in b) else "A" if "good" in a else "B"
    return completion(f"Verdict: {word}")


def comparisons(count, ours="good", theirs="bad"):
    return [Comparison(f"prompt {i}", f"{ours} {i}", f"{theirs} {i}") for i in range(count)]


def calls_of(match):
    return [call for comparison in match for call in comparison.calls]


def judged(server, folder, match, *, concurrency=4, **keys):
    """The win rate after asking whatever is not in ``folder`` yet."""
    with RecordFile(folder / "verdicts.jsonl") as file:
        verdicts = Verdicts(judge_at(server.url, **keys), file)
        verdicts.collect(calls_of(match), concurrency)
        return win_rate(match, verdicts)


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ("Verdict: A", "A"),
        ("verdict: b.", "B"),
        ("**Verdict: tie**", "tie"),
        ("Answer A is longer.\nVerdict: B", "B"),
        ("A", "A"),
        ("[[B]]", "B"),
        ("Tie.", "tie"),
        ("Verdict: A\nVerdict: B", None),  # cannot make up its mind
        ("A is better than B", None),  # nothing but a guess could read this
        ("Verdict: A or B", None),
        ("I cannot judge this.", None),
        ("", None),
    ],
)
def test_verdicts_are_read_and_nothing_is_guessed(words, verdict):
    assert parse_verdict(words) == verdict


def test_the_request_is_one_chat_completion():
    with ChatServer(lambda text, n: completion("A")) as server:
        judge_at(server.url, options={"temperature": 0, "max_tokens": 3}).ask("who?", threading.Event())
        judge_at(f"{server.url}/chat/completions/").ask("who?", threading.Event())
    assert [r["path"] for r in server.requests] == ["/v1/chat/completions"] * 2
    first = server.requests[0]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("judge", 0, 3)
    assert [m["role"] for m in first["messages"]] == ["system", "user"]
    assert server.keys == [f"Bearer {KEY}"] * 2


@pytest.mark.parametrize("status", [408, 429, 500, 503, 529])
def test_a_call_that_failed_for_the_moment_is_repeated(status):
    with ChatServer(lambda text, n: completion("A") if n == 2 else (status, {}, b"busy")) as server:
        waits = Waits()
        assert judge_at(server.url, first_wait=1.0).ask("who?", waits) == "A"
    assert server.asked == {"who?": 3}
    assert len(waits.seconds) == 2 and 0.75 <= waits.seconds[0] <= 1.25 and 1.5 <= waits.seconds[1] <= 2.5


def test_retry_after_is_honoured_as_seconds_and_as_a_date():
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    waiting = [(429, {"Retry-After": "7"}, b""), (503, {"Retry-After": date}, b""), completion("A")]
    with ChatServer(lambda text, n: waiting[n]) as server:
        waits = Waits()
        judge_at(server.url).ask("who?", waits)
    assert waits.seconds[0] == 7 and 60 < waits.seconds[1] <= 100


def test_a_retry_after_of_an_hour_ends_the_run():
    with (
        ChatServer(lambda text, n: (429, {"Retry-After": "3600"}, b"")) as server,
        pytest.raises(ConfigError, match="3600 s"),
    ):
        judge_at(server.url).ask("who?", Waits())
    assert server.asked == {"who?": 1}


def test_an_answer_that_does_not_come_is_asked_for_again():
    def slow_at_first(text, n):
        if n == 0:
            time.sleep(1)
        return completion("A")

    with ChatServer(slow_at_first) as server:
        assert judge_at(server.url, timeout=0.2).ask("who?", threading.Event()) == "A"
    assert server.asked == {"who?": 2}


def test_an_endpoint_that_is_down_is_named_with_the_reason_and_verdicts_are_kept(tmp_path):
    match = comparisons(6)
    with ChatServer(prefers_good) as server:
        judged(server, tmp_path, match[:3])
    with pytest.raises(ConfigError) as stop:  # the same address, nobody listening
        judged(server, tmp_path, match, retries=2)
    message = str(stop.value)
    assert server.url in message and "refused" in message and "3 attempts" in message and "kept" in message
    assert len(read_records(tmp_path / "verdicts.jsonl")) == 6
    with ChatServer(prefers_good) as again:
        assert judged(again, tmp_path, match).wins == 6
    assert again.asked.total() == 6


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_is_not_repeated_and_not_shown(status):
    """The server sends the key back, as some do in their error messages."""
    with (
        ChatServer(lambda text, n: (status, {}, {"error": f"bad key {KEY}"})) as server,
        pytest.raises(ConfigError) as stop,
    ):
        judge_at(server.url).ask("who?", threading.Event())
    assert server.asked == {"who?": 1}
    assert str(status) in str(stop.value) and "bad key [API key]" in str(stop.value) and KEY not in str(stop.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_does_not_take_the_key_along(status):
    """urllib by itself follows the first three, with all headers."""
    with ChatServer(prefers_good) as other:
        with (
            ChatServer(lambda text, n: (status, {"Location": f"{other.url}/chat/completions"}, b"")) as server,
            pytest.raises(ConfigError, match=r"redirects to 127\.0\.0\.1"),
        ):
            judge_at(server.url).ask("who?", threading.Event())
        assert not other.keys


def test_the_key_is_not_in_a_judges_repr_and_the_query_not_in_what_is_shown():
    judge = judge_at("https://host/v1?api-version=1&secret=2")
    assert KEY not in repr(judge)
    assert judge.endpoint == "https://host/v1/chat/completions?api-version=1&secret=2"
    assert judge.shown_url == "https://host/v1/chat/completions"


@pytest.mark.parametrize(
    "url", ["https://user:sesame@host/v1", "user:sesame@host/v1", "ftp://host/v1", "host/v1", "http://[::1/v1"]
)
def test_addresses_that_are_none_or_carry_secrets_are_refused(url):
    with pytest.raises(ConfigError, match="judge_url") as stop:
        judge_at(url)
    assert "sesame" not in str(stop.value)


def config(**keys):
    return EvalConfig(model=["m"], dataset_name="d", judge_model="j", **{"judge_url": "https://host/v1", **keys})


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert config().api_key() is None  # an endpoint of one's own needs none
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")  # as `$(cat file)` or a secret mount leaves it
    assert config().api_key() == KEY
    monkeypatch.setenv("OTHER", "abc")
    assert config(judge_key_env="OTHER").api_key() == "abc"
    assert config(judge_url="http://127.0.0.1:8000/v1").api_key() == KEY
    with pytest.raises(ConfigError, match=r"NOT_THERE.*not set"):
        config(judge_key_env="NOT_THERE")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ({"judge_key_env": KEY}, None),  # the key itself, typed where its name belongs
        ({}, f"{KEY}\nX-Injected: 1"),
        ({}, "clé"),
        ({"judge_url": "http://judge.example/v1"}, KEY),  # readable on the way
    ],
)
def test_keys_that_cannot_be_sent_safely_are_refused_unseen(monkeypatch, keys, value):
    monkeypatch.setenv("OPENAI_API_KEY", value or "")
    with pytest.raises(ConfigError) as stop:
        config(**keys)
    assert KEY not in str(stop.value) and (value or KEY) not in str(stop.value)


def test_every_prompt_is_asked_in_both_orders(tmp_path):
    match = comparisons(5)
    with ChatServer(prefers_good) as server:
        result = judged(server, tmp_path, match)
    assert server.asked == {
        question(c.prompt, a, b): 1 for c in match for a, b in ((c.ours, c.theirs), (c.theirs, c.ours))
    }
    assert (result.wins, result.rate, result.rate_shown_first, result.rate_shown_second) == (5, 1.0, 1.0, 1.0)


def test_a_judge_that_always_says_a_gives_half_and_the_table_says_so(tmp_path):
    match = comparisons(20)
    with ChatServer(lambda text, n: completion("Verdict: A")) as server:
        result = judged(server, tmp_path, match)
    assert (result.rate, result.disagreements, result.followed_position) == (0.5, 20, 20)
    assert (result.wins, result.losses, result.ties) == (0, 0, 0)
    table = win_rate_table({"a against b": result})
    assert "100.0% when shown first, 0.0% when shown second" in table
    assert "contradicts itself on 20 of 20 prompts" in table and "50.0%" in table


def test_ties_disagreements_and_equal_responses_count_half(tmp_path):
    """One prompt of each outcome; a tie in one order against a win in the other is a disagreement that follows no position."""
    match = [
        Comparison("won", "good", "bad"),
        Comparison("lost", "bad", "good"),
        Comparison("tie", "good", "good!"),
        Comparison("half a tie", "x", "y"),
        Comparison("same", "equal ", "equal"),
    ]

    def respond(text, n):
        if "half a tie" in text:
            return completion("Verdict: A" if answers(text) == ("x", "y") else "Verdict: tie")
        return prefers_good(text, n)

    with ChatServer(respond) as server:
        judged(server, tmp_path, match[:4])
        with RecordFile(tmp_path / "verdicts.jsonl") as file:
            result = win_rate(match, Verdicts(judge_at(server.url), file))
    assert (result.wins, result.losses, result.ties, result.identical) == (1, 1, 1, 1)
    assert (result.disagreements, result.followed_position, result.prompts) == (1, 0, 5)
    assert result.rate == 0.5 and result.rate_shown_first == 2.5 / 4 and result.rate_shown_second == 2 / 4


def test_models_that_say_the_same_cost_nothing(tmp_path):
    match = comparisons(3, ours="good", theirs="good")
    with RecordFile(tmp_path / "verdicts.jsonl") as file:
        result = win_rate(match, Verdicts(judge_at("https://host/v1"), file))
    assert (result.rate, result.identical, result.rate_shown_first) == (0.5, 3, None)
    assert "50.0%" in win_rate_table({"x": result})


def nonsense_on(prompts):
    def respond(text, n):
        return completion("As an AI ...") if any(f"\nprompt {i}\n" in text for i in prompts) else prefers_good(text, n)

    return respond


def test_nonsense_is_asked_again_once_then_counted_and_left_out(tmp_path):
    match = comparisons(20)
    with ChatServer(nonsense_on([3, 8])) as server:  # 4 of 40 calls: a tenth is allowed
        result = judged(server, tmp_path, match)
        assert (result.invalid, result.prompts, result.wins) == (2, 18, 18)
        assert sorted(server.asked.values()) == [1] * 36 + [2] * 4
        judged(server, tmp_path, match)
        assert server.asked.total() == 44, "nonsense was paid for as well: it is not asked again in the next run"
    assert "invalid" in win_rate_table({"x": result})


NONSENSE = [
    completion("As an AI ..."),
    completion(None),
    (200, {}, b"<html>"),
    (200, {}, {"choices": []}),
    (400, {}, b"filtered"),
]


@pytest.mark.parametrize("reply", NONSENSE)
def test_a_judge_that_answers_nonsense_is_an_error_long_before_all_is_paid(tmp_path, reply):
    match = comparisons(50)
    with ChatServer(lambda text, n: reply) as server, pytest.raises(ConfigError) as stop:
        judged(server, tmp_path, match, concurrency=2)
    # The eleventh is one too many; the other worker may have had its twelfth in hand.
    assert re.search("gave no verdict in 1[12] of 100 calls", str(stop.value)) and "judge_options" in str(stop.value)
    assert server.asked.total() <= 2 * (11 + 1)  # the other worker had one call under way when the eleventh came
    assert len(read_records(tmp_path / "verdicts.jsonl")) == server.asked.total()


def test_nonsense_and_then_sense_is_a_verdict(tmp_path):
    with ChatServer(lambda text, n: prefers_good(text, n) if n else completion("Hm.")) as server:
        result = judged(server, tmp_path, comparisons(3))
    assert (result.wins, result.invalid) == (3, 0)
    assert set(server.asked.values()) == {2}


def test_what_the_endpoint_says_is_kept_without_the_key(tmp_path):
    with ChatServer(lambda text, n: completion(f"Verdict: A\nYour key is {KEY}")) as server:
        judged(server, tmp_path, comparisons(2))
    assert KEY not in (tmp_path / "verdicts.jsonl").read_text()


def test_another_judge_other_options_or_another_response_are_other_calls():
    call = Call("p", "a", "b")
    judge = judge_at("https://host/v1")
    others = [
        call.key(Judge("https://host/v1", "another", judge.options)),
        call.key(judge_at("https://host/v1", options={"max_tokens": 17})),
        Call("p", "b", "a").key(judge),
        Call("p", "a", "c").key(judge),
        Call("q", "a", "b").key(judge),
    ]
    assert len({call.key(judge), *others}) == 6
    assert call.key(judge_at("http://127.0.0.1:1/v1")) == call.key(judge)  # the same model on another port


CHILD = """
import sys
from pathlib import Path
from tests.eval.test_judge import comparisons, judged
class Server: url = sys.argv[1]
judged(Server, Path(sys.argv[2]), comparisons(20), concurrency=3)
"""


@pytest.mark.processes
def test_a_killed_run_resumes_without_paying_twice(tmp_path):
    """The server stops answering after 17 of 40 calls; once all three workers wait, what it answered is on disk."""
    with ChatServer(prefers_good) as server:
        server.hold_after = 17
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, server.url, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        )
        patience = time.monotonic() + 120  # for the child's imports
        while server.waiting < 3:
            assert child.poll() is None and time.monotonic() < patience
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        paid = server.answered.copy()
        assert 17 <= paid.total() < 20 and set(paid.values()) == {1}
        server.hold_after = None
        server.release.set()
        result = judged(server, tmp_path, comparisons(20))
    assert result.wins == 20
    assert server.answered.total() == 40 and set(server.answered.values()) == {1}
    assert all(server.asked[text] == 1 for text in paid)


def test_half_a_line_of_a_killed_writer_is_dropped(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"key": 1}\n{"key": 2, "ver')
    with RecordFile(path) as file:
        assert file.records == [{"key": 1}]
        file.append({"key": "\ud800"})  # half a surrogate pair has no UTF-8; a judge's JSON may hold one
    assert [r["key"] for r in read_records(path)] == [1, "\ud800"]


def test_two_writers_and_foreign_lines_are_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordFile(path), pytest.raises(ConfigError, match="another process"):
        RecordFile(path)
    path.write_text('{"key": 1}\nno json\n')
    with pytest.raises(ConfigError, match="line 2"):
        RecordFile(path)


def test_the_cost_counts_what_is_left_to_ask(tmp_path, capsys):
    match = comparisons(4)
    with ChatServer(prefers_good) as server:
        judged(server, tmp_path, match[:1])
        with RecordFile(tmp_path / "verdicts.jsonl") as file:
            cost = estimate(Verdicts(judge_at(server.url), file), calls_of(match), [2.0, 8.0])
            settled = estimate(Verdicts(judge_at(server.url), file), calls_of(match[:1]), [2.0, 8.0])
    assert (cost.calls, cost.answered, cost.completion_tokens) == (6, 2, 6 * 16)
    sent = sum(len(m["content"]) for m in server.requests[0]["messages"])
    assert cost.prompt_tokens == 6 * sent // 4  # these prompts and responses are all of one length
    assert cost.price == pytest.approx((cost.prompt_tokens * 2 + 96 * 8) / 1e6)
    with pytest.raises(ConfigError, match="--yes"):  # pytest's stdin is no terminal
        confirm(cost, judge_at(server.url), yes=False)
    confirm(cost, judge_at(server.url), yes=True)
    confirm(settled, judge_at(server.url), yes=False)
    shown = capsys.readouterr().out
    assert "6 calls (2 more are answered already)" in shown and "by --judge_price" in shown and KEY not in shown


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Closed forms: at 0 of n the upper bound is z^2 / (n + z^2); at n/2 of n the half width is z / (2 sqrt(n + z^2)).
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (10, 20, 0.2992980, 0.7007020),
        (50, 100, 0.4038315, 0.5961685),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilsons_interval(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-6)


def test_options_must_be_an_object_of_request_fields():
    assert config(judge_options='{"max_completion_tokens": 2000}').request_options() == {"max_completion_tokens": 2000}
    for options in ("[1]", "{", json.dumps({"model": "x"})):
        with pytest.raises(ConfigError, match="judge_options"):
            config(judge_options=options)
