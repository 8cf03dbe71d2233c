"""References in 4 and 8 bits: the scores of bitsandbytes' own dequantized weights, live and cached, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.model_spec import parse_ref_models
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, score_pairs
from mrpo_scale.models.source import ReferenceSource
from mrpo_scale.references.low_bits import QuantizedLinear, check_low_bits
from mrpo_scale.references.sharding import ShardedReference
from tests.tiny import write_models
from tests.tools import require_module

require_module("bitsandbytes", "pip install bitsandbytes")
from bitsandbytes import functional  # noqa: E402

CPU = torch.device("cpu")
PAIRS = [PairTokens([5, 6, 7, 8], [9, 10, 11], [12, 13]), PairTokens([20] * 11, [4], [3, 2, 1, 60, 61])]
NAMES = ["llama", "qwen2", "gpt_neox"]  # the second ties its head to its embedding, the third's layers have biases


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), hidden_size=64, intermediate_size=128)


def load(folder, quantize="nf4", **options):
    return ShardedReference(ReferenceSource("ref", str(folder), quantize=quantize, **options), None, CPU)


def dequantized(weight, quantize):
    if quantize == "int8":
        int8, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(int8, scales).to(weight.dtype)
    nf4, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    return functional.dequantize_4bit(nf4, state)


@torch.no_grad()
def plain_scores(folder, quantize, dtype):
    """Of an ordinary model whose linear weights bitsandbytes has quantized and dequantized."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.weight.copy_(dequantized(module.weight, quantize))
    enable_pair_scoring(model, "plain")
    return score_pairs(model, collate_pairs(PAIRS, shared_prompt=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_scores_of_the_dequantized_weights(folders, name, quantize, dtype):
    reference = load(folders[name], quantize, dtype=dtype)
    got = reference.score(collate_pairs(PAIRS, shared_prompt=reference.shared_prompt))
    expected = plain_scores(folders[name], quantize, dtype)
    torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)
    whole = load(folders[name], None, dtype=dtype)
    assert not torch.allclose(got, whole.score(whole.batch(PAIRS)), rtol=1e-3), "or nothing was quantized"


def test_a_pair_has_the_same_score_beside_any_other(folders):
    """Which bitsandbytes' own 8-bit products in eval mode do not promise."""
    for quantize in ("nf4", "int8"):
        reference = load(folders["llama"], quantize)
        together = reference.score(reference.batch(PAIRS))
        alone = torch.cat([reference.score(reference.batch([pair])) for pair in PAIRS])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_what_is_held(folders):
    """Half a byte and a scale for 64 weights of the linear layers; head, embedding and norms as they are."""
    whole, reference = load(folders["llama"], None), load(folders["llama"])
    layers = [module for module in reference.model.modules() if isinstance(module, QuantizedLinear)]
    count = sum(layer.in_features * layer.out_features for layer in layers)
    assert len(layers) == 2 * 7 and type(reference.model.get_output_embeddings()) is type(whole.model.get_output_embeddings())
    assert reference.num_parameters == whole.num_parameters
    assert reference.bytes_per_rank == 4 * (whole.num_parameters - count) + count // 2 + 4 * count // 64
    assert not reference.mapped and whole.mapped
    assert all(layer.weight.shape == (layer.out_features, layer.in_features) for layer in layers)
