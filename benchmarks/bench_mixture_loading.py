"""Memory of a rank while a mixture of experts loads on a shard group: its share and one layer, nothing more.

    torchrun --nproc_per_node 2 benchmarks/bench_mixture_loading.py --output benchmarks/results/mixture-loading-cpu.json

Writes a random Qwen3-MoE of 1.4 GB (bf16, one matrix for each expert, as they are published) to a temporary folder, loads it as a
reference and scores two pairs. Anonymous memory (RssAnon) is sampled every 2 ms in each rank; files that are mapped do not count.
What a rank has before is subtracted; a small model was loaded by then, so that libraries are in memory. ``--quantized`` writes it
in fp8 with scales per block of 128, dequantized as it loads.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.layer_masks import decoder_layers
from mrpo_scale.references.sharding import ReferenceSource, ShardedReference

BLOCK = 128
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--quantized", action="store_true")
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    dist.init_process_group("gloo")
    folders = [tempfile.mkdtemp(prefix="bench-mixture-") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    folder = Path(str(folders[0]))
    try:
        if dist.get_rank() == 0:
            write_model(folder / "small", 1, flags.quantized)
            write_model(folder / "model", flags.layers, flags.quantized)
        dist.barrier()
        measure(folder / "small")
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, measure(folder / "model"))
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    if dist.get_rank() == 0:
        result = {
            "machine": platform.processor() or platform.machine(),
            "quantized": flags.quantized,
            "ranks": everyone,
        }
        print(json.dumps(result, indent=1))
        if flags.output:
            flags.output.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


def write_model(folder: Path, layers: int, quantized: bool) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **{**SIZES, "num_hidden_layers": layers})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300MB")
    if not quantized:
        return
    for file in folder.glob("*.safetensors"):
        tensors = {}
        for key, tensor in load_file(file).items():
            in_fp8 = "layers" in key and tensor.ndim == 2 and "mlp.gate.weight" not in key
            tensors |= _in_blocks(key, tensor) if in_fp8 else {key: tensor}
        save_file(tensors, file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    weight_map = {key: file.name for file in folder.glob("*.safetensors") for key in load_file(file)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    config_file = folder / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "quantization_config": settings}))


def _in_blocks(key: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = (size // BLOCK for size in matrix.shape)
    blocks = matrix.float().view(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    quantized = (blocks / scales[:, None, :, None]).view(matrix.shape).to(torch.float8_e4m3fn)
    return {key: quantized, f"{key}_scale_inv": scales}


def measure(folder: Path) -> dict[str, float]:
    """MiB and seconds of this rank."""
    gc.collect()  # the small model
    start, before = time.perf_counter(), _anonymous()
    with _Peak() as everything:
        source = ReferenceSource("reference", str(folder), dtype=torch.bfloat16)
        reference = _Watched(source, dist.group.WORLD, torch.device("cpu"))
        loaded = time.perf_counter() - start
        ids = list(range(100, 164))
        reference.score(reference.batch([PairTokens(ids, ids[:32], ids[32:])] * 2))
    layer = max(
        sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in decoder_layers(reference.model)
    )
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "on_disk": on_disk / 2**20,
        "share": reference.bytes_per_rank / 2**20,
        "one_layer": layer / 2**20,
        "peak_while_loading": reference.loading.most - before,
        "peak_with_forwards": everything.most - before,
        "afterwards": _anonymous() - before,
        "seconds_to_load": loaded,
    }


class _Watched(ShardedReference):
    def _load(self, files: list[Path]) -> None:
        with _Peak() as self.loading:
            super()._load(files)


class _Peak:
    """The most anonymous memory, in MiB, that this process had inside the block."""

    most = 0.0

    def __enter__(self) -> _Peak:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, _anonymous())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _anonymous() -> float:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    main()
