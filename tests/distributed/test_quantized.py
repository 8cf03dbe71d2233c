"""Quantized checkpoints as references: the log-probs of the dequantized model, bit for bit, on one rank and on two."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from benchmarks.sweep_models import PAIRS
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.models.source import check_source
from mrpo_scale.references.placement import shard_group
from mrpo_scale.references.sharding import ReferenceSource, ShardedReference

CPU = torch.device("cpu")
BLOCK = 32
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
TYPES = {
    "divided by the block": ("llama", {}),
    # 112 rows in blocks of 32 are three and a half; half of them are one and three quarters
    "not divided": ("llama", {"intermediate_size": 112, "hidden_size": 48, "head_dim": 12}),
    "experts": ("qwen3_moe", {"num_experts": 3, "moe_intermediate_size": 40, "num_experts_per_tok": 2}),
}


def make_model(kind):
    model_type, options = TYPES[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def quantize(folder, settings, make):
    """Replace, in a folder, the layers' matrices by what ``make`` makes of each: {suffix of its key: tensor}."""
    file = folder / "model.safetensors"
    tensors = {}
    for key, tensor in load_file(file).items():
        made = make(tensor) if "layers" in key and tensor.ndim == 2 and "mlp.gate.weight" not in key else None
        tensors |= {key: tensor} if made is None else {f"{key}{suffix}": t for suffix, t in made.items()}
    save_file(tensors, file, {"format": "pt"})
    add_settings(folder, settings)


def save_dequantized(folder, settings, dense):
    """What transformers makes of a quantized folder, as an ordinary one."""
    plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.load_state_dict(plain.state_dict())
    model.save_pretrained(dense)


def add_settings(folder, settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def per_block(matrix, block=BLOCK):
    """(fp8 [m, n], scales of its blocks, what they stand for), the last blocks smaller where they do not divide the matrix."""
    rows, columns = matrix.shape
    scales = torch.empty(-(-rows // block), -(-columns // block))
    quantized, stands_for = torch.empty_like(matrix, dtype=torch.float8_e4m3fn), torch.empty_like(matrix)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scales[i, j] = matrix[part].abs().max() / 448
            quantized[part] = (matrix[part] / scales[i, j]).to(torch.float8_e4m3fn)
            stands_for[part] = quantized[part].float() * scales[i, j]
    return quantized, scales, stands_for


def per_tensor(matrix):
    scale = matrix.abs().max() / 448
    quantized = (matrix / scale).to(torch.float8_e4m3fn)
    return quantized, scale, quantized.float() * scale


def fp8_folders(kind, root, way):
    """(folder in fp8, folder of the same numbers in float32)."""
    for name in ("fp8", "dense"):
        make_model(kind).save_pretrained(root / name)
    block = [BLOCK, BLOCK] if way is per_block else None
    settings = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
    quantize(root / "fp8", settings, lambda t: dict(zip(("", "_scale_inv"), way(t)[:2], strict=True)))
    tensors = load_file(root / "dense" / "model.safetensors")
    for key, tensor in tensors.items():
        if f"{key}_scale_inv" in load_file(root / "fp8" / "model.safetensors"):
            tensors[key] = way(tensor)[2]
    save_file(tensors, root / "dense" / "model.safetensors", {"format": "pt"})
    return root / "fp8", root / "dense"


@torch.no_grad()
def scores(folder, shard_size, dtype=torch.float32):
    reference = ShardedReference(ReferenceSource("ref", str(folder), dtype=dtype), shard_group(shard_size), CPU)
    assert {p.dtype for p in reference.model.parameters()} == {dtype}
    return reference.score(reference.batch(PAIRS))


def same_scores(folder, dense, dtype=torch.float32):
    """On this rank, whole and sharded."""
    return [torch.equal(scores(folder, size, dtype), scores(dense, size, dtype)) for size in (1, 2)]


@pytest.mark.parametrize("way", [per_block, per_tensor])
@pytest.mark.parametrize("kind", TYPES)
def test_fp8(pool2, tmp_path, kind, way):
    folder, dense = fp8_folders(kind, tmp_path, way)
    assert pool2.run(same_scores, folder, dense) == [[True, True]] * 2


def test_fp8_is_what_transformers_dequantizes(tmp_path):
    """Where blocks divide the matrices; elsewhere it refuses, or takes another size for the block."""
    folder, _ = fp8_folders("divided by the block", tmp_path, per_block)
    settings = FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    mine = ShardedReference(ReferenceSource("ref", str(folder)), None, CPU).model.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in plain.state_dict().items())


# ------------------------------------------------------------------------------------------------------------------ mxfp4


def mxfp4_folder(root):
    """A GPT-OSS with three experts in blocks of 32 four-bit numbers under one exponent each; and the same in float32."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes))
    model.save_pretrained(root / "mxfp4")
    tensors = load_file(root / "mxfp4" / "model.safetensors")
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = tensors.pop(key).shape
        tensors[f"{key}_blocks"] = torch.randint(256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(120, 126, (experts, outer, inner // 32), dtype=torch.uint8)
    save_file(tensors, root / "mxfp4" / "model.safetensors", {"format": "pt"})
    add_settings(root / "mxfp4", {"quant_method": "mxfp4", "modules_to_not_convert": []})
    save_dequantized(root / "mxfp4", Mxfp4Config(dequantize=True), root / "dense")
    return root / "mxfp4", root / "dense"


def test_mxfp4(pool2, tmp_path):
    assert pool2.run(same_scores, *mxfp4_folder(tmp_path)) == [[True, True]] * 2


# ------------------------------------------------------------------------------------------------------ compressed-tensors


def group_of_weights(**weights):
    return {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": None}}


def compressed_folder(root, kind):
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": group_of_weights(num_bits=4, type="int", strategy="group", group_size=8),
    }
    make_model(kind).save_pretrained(root / "packed")
    quantize(root / "packed", settings, packed)
    return root / "packed"


def packed(matrix, group=8):
    """4 bits, eight in an int32, a scale for each 8 columns."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    grouped = matrix.reshape(len(matrix), -1, group)
    scales = grouped.abs().amax(-1, keepdim=True) / 7
    integers = (grouped / scales).round().clamp(-8, 7).reshape(matrix.shape).to(torch.int8)
    return {
        "_packed": pack_to_int32(integers, 4),
        "_scale": scales.squeeze(-1),
        "_shape": torch.tensor(matrix.shape),
    }


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
@pytest.mark.parametrize("kind", TYPES)
def test_compressed_tensors(pool2, tmp_path, kind):
    from transformers import CompressedTensorsConfig

    folder = compressed_folder(tmp_path, kind)
    save_dequantized(folder, CompressedTensorsConfig(dequantize=True), tmp_path / "dense")
    assert pool2.run(same_scores, folder, tmp_path / "dense") == [[True, True]] * 2


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "of tomorrow", None, 4])
def test_what_cannot_be_dequantized_here(tmp_path, method):
    make_model("divided by the block").save_pretrained(tmp_path)
    add_settings(tmp_path, {"quant_method": method})
    with pytest.raises(
        ConfigError, match=rf"ref: the model is quantized \({method}\), which transformers cannot dequantize"
    ):
        check_source(ReferenceSource("ref", str(tmp_path)))


@pytest.mark.parametrize(
    "settings", [{"quant_method": "fp8", "weight_block_size": [1]}, {"quant_method": "fp8", "scale_fmt": 3}]
)
def test_nonsense(tmp_path, settings):
    make_model("divided by the block").save_pretrained(tmp_path)
    add_settings(tmp_path, settings)
    with pytest.raises(ConfigError, match=r"`quantization_config` in config\.json cannot be read"):
        check_source(ReferenceSource("ref", str(tmp_path)))


def test_scales_that_are_gone(tmp_path):
    """An fp8 number without its scale is off by a factor of hundreds."""
    folder, _ = fp8_folders("experts", tmp_path, per_block)
    tensors = load_file(folder / "model.safetensors")
    kept = {key: t for key, t in tensors.items() if "layers.1.self_attn.q_proj.weight_scale_inv" not in key}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"layers\.1\.self_attn\.q_proj\.weight is quantized, and its scales are missing"
    ):
        ShardedReference(ReferenceSource("ref", str(folder)), None, CPU)
