"""Jobs of an array: each begins with rows of its own, all rows are visited by each, and the folder is looked at seldom."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.commands.score import _share
from mrpo_scale.references import precompute
from mrpo_scale.references.precompute import Share
from tests.scored_rows import keys, new_store, opened, scores

CHUNKS, SIZE, JOBS = 40, 5, 8


def test_shares_part_the_chunks_and_helpers_come_from_the_other_end():
    orders = [Share(number, JOBS).order(CHUNKS, random.Random(number)) for number in range(JOBS)]
    assert all(sorted(order) == list(range(CHUNKS)) for order in orders)
    own = [order[: CHUNKS // JOBS] for order in orders]
    assert sorted(chunk for order in own for chunk in order) == list(range(CHUNKS))
    assert orders[3][:5] == [3, 11, 19, 27, 35]
    helped = orders[3][5:10]
    assert helped == sorted(helped, reverse=True) and len({chunk % JOBS for chunk in helped}) == 1
    assert len({tuple(order[5:10]) for order in orders}) > 2, "not all help the same job"
    assert [len(Share(9, 100).order(chunks, random.Random(0))) for chunks in (3, 0)] == [3, 0], "more jobs than chunks"


def test_parts_are_rarer_the_more_jobs_there_are():
    assert [Share(0, jobs).seconds_per_part for jobs in (1, 10, 20, 100, 1000)] == [60, 60, 120, 600, 600]


def run_job(root, share, monkeypatch, *, meanwhile=lambda: None):
    """The rows that a job scores, in order, and how often it looked at the folder."""
    store, scored, looks = new_store(root), [], []
    real = store.refresh
    monkeypatch.setattr(store, "refresh", lambda: (looks.append(1), real())[1])
    store.refresh()
    chunks = np.split(np.arange(CHUNKS * SIZE), CHUNKS)

    def score(todo, writer, bar):
        scored.extend(todo.tolist())
        logps, tokens = scores(0, CHUNKS * SIZE)
        writer.add(keys(0, CHUNKS * SIZE)[todo], logps[todo], tokens[todo])
        meanwhile()

    rows = SimpleNamespace(key_N=keys(0, CHUNKS * SIZE))
    precompute._fill("calm", rows, chunks, score, store, SimpleNamespace(disable_tqdm=True, process_index=0), share)
    return scored, len(looks)


def test_a_job_of_an_array_scores_what_is_left_and_seldom_looks(tmp_path, monkeypatch):
    """The second job finds all that the first has written before it began; a third, begun at once with it, is met at the end."""
    scored, looks = run_job(tmp_path, Share(1, JOBS), monkeypatch)
    assert len(scored) == CHUNKS * SIZE and looks == 3, "when it was opened, before the first chunk, and at the end"
    assert scored[:SIZE] == list(range(SIZE, 2 * SIZE)) and len(opened(tmp_path)) == CHUNKS * SIZE
    assert run_job(tmp_path, Share(2, JOBS), monkeypatch)[0] == []
    assert run_job(tmp_path / "other", None, monkeypatch)[1] == CHUNKS + 2, "alone it looks before each chunk"


def test_what_others_write_is_seen_when_it_is_time_to_look(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(precompute.time, "monotonic", lambda: now[0])
    other = new_store(tmp_path)

    def write_the_rest():
        now[0] += 6
        if len(other) == 0:
            logps, tokens = scores(0, CHUNKS * SIZE)
            other.write_part(keys(0, CHUNKS * SIZE), logps, tokens)

    scored, _ = run_job(tmp_path, Share(0, JOBS), monkeypatch, meanwhile=write_the_rest)
    assert len(scored) == 2 * SIZE, "6 seconds after the first look it does not know yet"


@pytest.mark.parametrize("job", ["3", "3/", "a/4", "4/4", "-1/4", "1/2/3", "1.0/4"])
def test_a_number_that_is_none_is_one_line(job):
    with pytest.raises(ConfigError, match=f"`--job {job}` .* write 3/100"):
        _share(job)


def test_a_number_of_a_job_is_read():
    assert _share("3/100") == Share(3, 100)
