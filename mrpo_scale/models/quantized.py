"""Quantized checkpoints: transformers' own quantizers dequantize them, tensor by tensor, where they can do so while they load.

A weight of low precision and its scales are cut differently, so a weight is dequantized whole before a rank takes its rows: a part
of the scales with a part of the weight gives other numbers, and nothing complains.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer

from mrpo_scale.base.errors import ConfigError, one_line

# Scales that a quantized model computes its activations with; dequantized, it has no use for them.
OF_ACTIVATIONS = [r"\.(input|output|q|k|v)_(global_scale|scale|zero_point)$", r"\.activation_scale$"]


def quantization_of(config: PretrainedConfig) -> Any:
    """What config.json says of how the weights are quantized, a wrapper's of its text model too; None: they are not."""
    own = getattr(config, "quantization_config", None)
    return own if own is not None else getattr(config.get_text_config(), "quantization_config", None)


def dequantizer(config: PretrainedConfig, name: str) -> HfQuantizer | None:
    """What dequantizes the checkpoint that ``config`` is of; None: nothing is quantized.

    Raises:
        ConfigError: transformers cannot dequantize this kind while it loads, or lacks a package for it.
    """
    settings = quantization_of(config)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method) if isinstance(method, str) else None
    if kind is None or "dequantize" not in inspect.signature(kind).parameters:
        raise ConfigError(
            f"{name}: the model is quantized ({method}), which transformers cannot dequantize while it loads; name the unquantized "
            "model that it was made from."
        )
    try:
        quantization = AutoQuantizationConfig.from_dict(settings)
        quantization.dequantize = True
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=True)
        quantizer.validate_environment()
        operations = quantizer.get_load_operations()
    except ImportError as error:
        raise ConfigError(
            f"{name}: the model is quantized ({method}), and what dequantizes it is not installed ({one_line(error)}); install it, "
            "or name the unquantized model that it was made from."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{name}: `quantization_config` in config.json cannot be read ({one_line(error)[:200]}); get the model again."
        ) from error
    if operations.get("dequantize") is Fp8Dequantize:
        quantizer.get_load_operations = lambda: {"dequantize": _Fp8Dequantize}
    return quantizer


class _Fp8Dequantize(Fp8Dequantize):
    """With blocks of the size that the config names. transformers takes a matrix's size by its number of scales for it, which is
    wrong where the last block is smaller: of 192 rows in blocks of 128 it makes two blocks of 96."""

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        if block is None or scales.ndim < 2 or quantized.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            return super()._dequantize_one(quantized, scales, output_dtype)
        rows, columns = quantized.shape[-2:]
        if tuple(scales.shape[-2:]) != (-(-rows // block[0]), -(-columns // block[1])):
            return super()._dequantize_one(quantized, scales, output_dtype)
        factors = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
        factors = factors.repeat_interleave(block[0], -2)[..., :rows, :]
        factors = factors.repeat_interleave(block[1], -1)[..., :columns]
        return (quantized.float() * factors).to(output_dtype or torch.bfloat16)
