"""A cluster in a box: four hosts of two ranks. It equals one host, ends everywhere when a host is lost, and goes on on three.

The ranks are forked (tests/distributed/jobs.py) and moved to their hosts; a start by launchers is what test_two_hosts.py tries.
Takes minutes: make chaos.
"""

import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mrpo_scale.lifecycle.checkpoints import MARKER
from tests.distributed.jobs import Job, Kill
from tests.distributed.train_runs import ZERO3
from tests.multihost.hosts import made_hosts, require_hosts, seats, take_seat
from tests.tiny import pair_rows, write_models

pytestmark = pytest.mark.skipif("MRPO_CHAOS_KILLS" not in os.environ, reason="takes minutes: make chaos")
RANKS = 2  # of a host
PAIRS = 24  # of a step: 8 ranks x 3 micro-batches, 6 ranks x 4
STEPS, SAVE_STEPS, KILLED_AFTER = 8, 2, 4
LIMIT = 60.0  # seconds in which the ranks that are left have ended by themselves
TIMEOUT = 900.0


@pytest.fixture
def hosts():
    require_hosts()
    with made_hosts(4) as four:
        yield four


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four-hosts")
    models = write_models(folder / "models")
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(2 * PAIRS)))
    path = folder / "recipe.yaml"
    keys = {
        "model_name_or_path": models["llama"],
        "ref_models": [models["qwen2"], models["gpt_neox"]],
        "ref_shard_size": RANKS,
        "dataset_name": str(data),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
    }
    path.write_text(json.dumps(keys))
    return path


def train(jobs, recipe, folder, hosts, kill=None, ranks=2 * 4):
    """On ``hosts``; None is one host without a namespace."""
    words = ["train", "--config", recipe, "--output_dir", folder, "--gradient_accumulation_steps", PAIRS // ranks]
    where = {"env": {**ZERO3, "GROUP_RANK": "0"}}
    if hosts is not None:
        where = {"env": ZERO3, "before": take_seat, "args": seats(hosts, RANKS)}
    (ended,) = jobs.run(Job(words, ranks, **where), kill=kill, grace=LIMIT, timeout=TIMEOUT)
    return ended


@pytest.fixture(scope="module")
def alone(jobs, recipe, tmp_path_factory):
    """Eight ranks on one host, never interrupted."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    ended = train(jobs, recipe, folder, None)
    assert [e.status for e in ended] == [0] * 8, ended[0].err
    return folder


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def difference(folder, other):
    """Of the final weights, the tensor that differs most: norm of the difference over its norm."""
    weights, others = (load_file(f / "model.safetensors") for f in (folder, other))
    assert weights.keys() == others.keys()
    return max(
        (
            torch.linalg.vector_norm(w.double() - others[n].double()) / torch.linalg.vector_norm(others[n].double())
        ).item()
        for n, w in weights.items()
    )


def compare(folder, other, tolerance):
    relative = max(abs(x / y - 1) for x, y in zip(losses(folder), losses(other), strict=True))
    print(f"relative difference: losses {relative:.1e}, weights {difference(folder, other):.1e}", file=sys.stderr)
    assert len(losses(folder)) == STEPS
    assert losses(folder) == pytest.approx(losses(other), rel=tolerance)
    assert difference(folder, other) <= tolerance


def message(ended):
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    print(line, file=sys.stderr)
    return line


def all_ended(ended, but=()):
    """Every rank ended by itself and within the limit: nobody had to kill one (``grace``)."""
    for rank, e in enumerate(ended):
        if rank not in but:
            assert (e.status, e.late) == (1, False), (rank, e.err)


def after(marker, act):
    """Call ``act`` as soon as ``marker`` exists, beside the job."""

    def wait():
        deadline = time.monotonic() + TIMEOUT
        while not marker.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def marker(folder):
    return Path(folder) / f"checkpoint-{KILLED_AFTER}" / MARKER


def test_four_hosts_train_as_one_does(jobs, recipe, hosts, alone, tmp_path):
    ended = train(jobs, recipe, tmp_path / "out", hosts)
    assert [e.status for e in ended] == [0] * 8, ended[0].err
    assert re.search(r"anchor +llama +0-1 2-3 4-5 6-7 ", ended[0].out + ended[0].err), "a group of references per host"
    compare(tmp_path / "out", alone, 1e-6)


def test_a_host_is_killed_and_three_go_on(jobs, recipe, hosts, alone, tmp_path):
    folder = tmp_path / "out"
    lost = (2, 3)
    ended = train(jobs, recipe, folder, hosts, Kill(lost, 0.0, since=str(marker(folder))))
    all_ended(ended, but=lost)
    died = max(ended[rank].seconds for rank in lost)
    print(f"the others ended {max(e.seconds for e in ended) - died:.0f} s after host-b", file=sys.stderr)
    for first in (0, 4, 6):
        assert re.search(
            r"no sign of life for 30 s from rank 2 on host-b, last seen .*; rank 3 on host-b, last seen",
            message(ended[first]),
        )
    assert not (folder / "model.safetensors").exists()
    left = [hosts[0], *hosts[2:]]
    ended = train(jobs, recipe, folder, left, ranks=6)
    assert [e.status for e in ended] == [0] * 6, ended[0].err
    assert re.search(r"resuming from .*/checkpoint-\d+, step \d+", ended[0].out + ended[0].err)
    compare(folder, alone, 1e-5)


@pytest.mark.parametrize("cut", [1, 0], ids="ba")
def test_a_cut_link_ends_all_and_is_named(jobs, recipe, hosts, tmp_path, cut):
    """Of host-b, and of host-a, on which the job's store is."""
    folder = tmp_path / "out"
    thread = after(marker(folder), lambda: hosts[cut].link("down"))
    ended = train(jobs, recipe, folder, hosts)
    thread.join()
    all_ended(ended)
    gone = r"the job's store on host-a \(10.77.0.1:29500\), the host of rank 0, is gone: host-a .* the network to it is cut"
    if cut == 1:
        assert re.search(gone, message(ended[2]))
        for first in (0, 4, 6):
            assert re.search(r"from rank 2 on host-b, last seen .*; rank 3 on host-b, last seen", message(ended[first]))
    else:
        assert "rank 7 on host-d" in message(ended[0])
        for first in (2, 4, 6):
            assert re.search(gone, message(ended[first]))
