"""Two real models with two tokenizers on real pairs, over two ZeRO-3 ranks, through the launcher.

Needs the folders `smollm2` and `gemma3` that shared/tools/real_models.py makes: MRPO_REAL_MODELS=FOLDER; about ten minutes.
"""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data import find_layout, load_rows
from mrpo_scale.data.dealing import WindowShape
from mrpo_scale.data.pair_dataset import prepare_pairs
from mrpo_scale.data.window import WindowSampler
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.models.plan import plan_models
from mrpo_scale.references.placement import shard_group
from mrpo_scale.references.sharding import ShardedReference
from tests.distributed.pool import Pool

ROOT = Path(__file__).parents[2]
MODELS = Path(os.environ.get("MRPO_REAL_MODELS", "/nowhere"))
PAIRS = Path(os.environ.get("MRPO_SHARED", ROOT.parent / "shared")) / "data" / "preferences-en-300.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MODELS / "gemma3").is_dir(), reason="set MRPO_REAL_MODELS to the folder with smollm2 and gemma3"
    ),
    pytest.mark.skipif(not PAIRS.exists(), reason=f"no real pairs at {PAIRS}"),
]


def first_window(tmp_path):
    """The four pairs of the first optimizer step, as the recipe draws them."""
    args = MRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=512)
    plan = plan_models(str(MODELS / "smollm2"), [str(MODELS / "gemma3")], args, None)
    rows, _ = load_rows(str(PAIRS))
    pairs = prepare_pairs(rows, find_layout(rows), plan.texts, max_length=512, max_bad_rows=0.4)
    sampler = WindowSampler(pairs.lengths[:, 0].sum(-1), WindowShape(1, 4), shuffle=True, seed=args.seed)
    return plan, pairs, [draw.row for draw in next(sampler.windows())]


def plain_logps(folder, prompt, response, end):
    """One forward of plain transformers over one text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    values = []
    for p, r, e in zip(prompt, response, end, strict=True):
        start = tokenizer(p, add_special_tokens=False).input_ids
        ids = tokenizer(r, add_special_tokens=False).input_ids + e
        with torch.no_grad():
            logits = model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1]
        values.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).double().sum().item())
    return values


def sharded_scores(tmp_path):
    """Both references on a group of two ranks: log-probs [K, 4, 2] of the first window."""
    plan, pairs, rows = first_window(tmp_path)
    group = shard_group(dist.get_world_size())
    scores = []
    for reference in plan.references:
        model = ShardedReference(reference.source, group, torch.device("cpu"))
        batch = collate_pairs(
            [pairs.tokens(r)[reference.tokenization] for r in rows], shared_prompt=model.shared_prompt
        )
        scores.append(model.score(batch).tolist())
    return scores


def test_references_equal_plain_transformers(tmp_path, pool2):
    _, pairs, rows = first_window(tmp_path)
    scores = pool2.run(sharded_scores, tmp_path, timeout=590)[0]
    for k, name in enumerate(("smollm2", "gemma3")):
        tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
        prompts, responses, ends = [], [], []
        for row in rows:
            pair = pairs.pair(row)
            if name == "smollm2":
                prompt = tokenizer.apply_chat_template(pair.prompt, add_generation_prompt=True, tokenize=False)
                end = tokenizer.convert_tokens_to_ids("<|im_end|>")
            else:  # no chat template: the plain one, after the tokenizer's BOS
                said = {"system": "", "user": "Human: ", "assistant": "Assistant: "}
                turns = [said[m["role"]] + m["content"] + "\n\n" for m in pair.prompt]
                prompt = tokenizer.bos_token + "".join(turns) + "Assistant: "
                end = tokenizer.eos_token_id
            for text, cut in zip((pair.chosen, pair.rejected), pairs.cut(row), strict=True):
                prompts.append(prompt)
                responses.append(text)
                ends.append([] if cut else [end])
        expected = torch.tensor(plain_logps(MODELS / name, prompts, responses, ends)).view(4, 2)
        relative = ((torch.tensor(scores[k]) - expected) / expected).abs().max().item()
        print(f"{name}: largest relative difference to plain transformers {relative:.1e}")
        assert relative < 1e-4


def test_the_recipe_runs_through_the_launcher(tmp_path):
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", "launch/accelerate/cpu_zero3.yaml", "launch/train.py"),
        *("--config", "recipes/smollm2_gemma3.yaml"),
        *("--model_name_or_path", str(MODELS / "smollm2"), "--ref_models", str(MODELS / "gemma3")),
        *("--dataset_name", str(PAIRS), "--output_dir", str(tmp_path)),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "world size 2, DeepSpeed ZeRO stage 3" in done.stderr
    relative = float(re.search(r"differ from the anchor's by at most (\S+) relative", done.stderr)[1])
    assert relative < 1e-4
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    with (
        safe_open(MODELS / "smollm2" / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "model.safetensors", "pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :])
    print(text)
    assert "Paris" in text


def rss_anon():
    """Resident anonymous bytes of this process: what it holds itself, mapped files left out."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


def memory_of_gemma(tmp_path):
    """Growth of RssAnon by loading, and by loading and one pass; the shard, the largest layer and the tokens of the pass."""
    plan, pairs, rows = first_window(tmp_path)
    planned = plan.references[1]
    group = shard_group(dist.get_world_size())
    tiny_matmul = torch.ones(8, 8) @ torch.ones(
        8, 8
    )  # thread pools and buffers of the first product are not the model's
    assert tiny_matmul.sum() == 512
    gc.collect()
    before = rss_anon()
    model = ShardedReference(planned.source, group, torch.device("cpu"))
    loaded = rss_anon() - before
    batch = collate_pairs([pairs.tokens(r)[planned.tokenization] for r in rows], shared_prompt=model.shared_prompt)
    model.score(batch)
    scored = rss_anon() - before
    layer = max(sum(p.numel() for p in m.parameters()) * 4 for m in model.model.model.layers)
    return {
        "loaded": loaded,
        "scored": scored,
        "shard": model.bytes_per_rank,
        "layer": layer,
        "tokens": batch.num_tokens,
    }


def test_memory_of_a_sharded_reference(tmp_path):
    """Gemma 3 270M in float32 on two ranks, fresh processes: the half of each and little else, before and after a pass.

    Issue 4: at most half + 150 MB after loading; half + one layer + activations after the first scoring pass and reshard. The
    activations of a layer: a few [tokens, intermediate] and [tokens, hidden] float32 tensors, which the allocator may keep.
    """
    pool = Pool(2)
    try:
        ranks = pool.run(memory_of_gemma, tmp_path, timeout=590)
    finally:
        pool.close()
    for rank in ranks:
        print({key: f"{value / 1e6:.1f} MB" if key != "tokens" else value for key, value in rank.items()})
        activations = 4 * rank["tokens"] * (3 * 2048 + 6 * 640)
        assert rank["loaded"] <= rank["shard"] + 150e6
        assert rank["scored"] <= rank["shard"] + rank["layer"] + activations
