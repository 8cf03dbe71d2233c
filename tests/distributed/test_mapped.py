"""On a CPU every rank uses a reference's weights where they lie in the files: one copy per host, and no gathers."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from mrpo_scale.data.window import WeightedPairs
from tests.distributed.test_reference_scores import open_scores
from tests.tiny import write_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def mapped_file(tensor):
    """The file that a tensor's memory is a part of, if any."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        extent, *_, last = line.split()
        start, end = (int(bound, 16) for bound in extent.split("-"))
        if start <= address < end:
            return last if last.startswith("/") else None
    raise AssertionError("a tensor lies nowhere")


def hold(folders, output_dir, **keys):
    """Per reference: (ranks that share it, whether it is mapped, the files that its weights lie in); and some scores."""
    scores, pair_sets = open_scores(folders, output_dir, **keys)
    found = []
    for reference in scores.references.values():
        model = reference.model
        weights = [p.to_local() if hasattr(p, "to_local") else p for p in model.model.parameters()]
        files = {mapped_file(weight) for weight in weights if weight.numel()}
        found.append((model.group_size, model.mapped, files))
    pairs = pair_sets["train"]
    examples = [WeightedPairs(pairs)[row] for row in range(dist.get_rank(), 8, 2)]
    return found, scores.logps(examples, pairs)


def files_of(folders):
    return [{os.path.realpath(folders[name] + "/model.safetensors")} for name in ("llama", "qwen2", "gpt_neox")]


def test_the_ranks_of_a_host_share_the_files(pool2, folders, tmp_path):
    whole = pool2.run(hold, folders, tmp_path / "out")
    shards = pool2.run(hold, folders, tmp_path / "out", ref_shard_size=2)
    for (held, scores), (held_in_shards, scores_of_shards) in zip(whole, shards, strict=True):
        assert held == [(1, True, files) for files in files_of(folders)]
        assert held_in_shards == [(2, False, {None})] * 3, "what `ref_shard_size` says holds"
        torch.testing.assert_close(scores, scores_of_shards, rtol=1e-6, atol=0)


def test_what_must_be_converted_is_sharded(pool2, folders, tmp_path):
    """One of three is stored in bfloat16: a copy of it per rank would cost more than its shards."""
    converted = tmp_path / "qwen2"
    shutil.copytree(folders["qwen2"], converted)
    AutoModelForCausalLM.from_pretrained(folders["qwen2"], dtype=torch.bfloat16).save_pretrained(converted)
    for held, _ in pool2.run(hold, {**folders, "qwen2": str(converted)}, tmp_path / "out"):
        assert held == [(2, False, {None})] * 3
