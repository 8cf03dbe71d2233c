"""Linear layers of a reference in 4 or 8 bits: bitsandbytes quantizes them as they load and dequantizes them for each product.

Not bitsandbytes' own layers. Its 8-bit products in eval mode round the activations too and leave out columns by what else is in the
batch (outliers), so that a pair's score would depend on its neighbours. Its 4-bit layers pack weights on CPUs with AVX512-BF16 and
then compute in bfloat16 whatever the dtype. A product with the dequantized weight is the same function on every device and in every
batch; what it costs is that weight, whole, for the time of one product.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence

import torch
from mrpo_kernels.cpu_linear import CpuLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.models.source import ReferenceSource

logger = logging.getLogger(__name__)

#: Weights that share a scale in nf4; bitsandbytes' default, which on some devices is another.
BLOCK = 64


def check_low_bits(quantize: str, name: str, *, group_size: int, offload: bool, loads: bool = True) -> None:
    """Refuse what a quantized reference cannot be; nothing is read.

    Args:
        group_size: ranks of its shard group.
        loads: False: it is only planned here, and bitsandbytes need not be.

    Raises:
        ConfigError: bitsandbytes is missing, the group has several ranks, or its shards are to lie in host memory.
    """
    if loads and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"`quantize: {quantize}` of {name} needs the package bitsandbytes; `pip install 'mrpo-scale[peft]'`, or remove the key."
        )
    if offload:
        raise ConfigError(
            f"`quantize: {quantize}` of {name} with `ref_offload: true`: quantized weights are not streamed; remove one of the two."
        )
    if group_size > 1:
        raise ConfigError(
            f"`quantize: {quantize}` of {name} on a shard group of {group_size} ranks: quantized weights are not sharded; set "
            "`ref_shard_size: 1`, or remove the key."
        )


def layers_to_quantize(model: PreTrainedModel, dtype: torch.dtype) -> list[nn.Linear]:
    """Its linear layers but the output head and what it keeps in float32, whatever its ``dtype``. Embeddings, norms, convolutions
    and stacked experts are none."""
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return [layer for layer in layers if type(layer) in (nn.Linear, CpuLinear) and layer.weight.dtype == dtype]


def choose_layers(model: PreTrainedModel, source: ReferenceSource) -> set[nn.Linear]:
    """:func:`layers_to_quantize` of a reference whose weights are on meta, logged; none where it is not to be quantized.

    Raises:
        ConfigError: it has no such layers.
    """
    if source.quantize is None:
        return set()
    layers = layers_to_quantize(model, source.dtype)
    if not layers:
        raise ConfigError(
            f"`quantize: {source.quantize}` of {source.name}: {type(model).__name__} has no linear layers of torch's kind beside "
            "its head; remove the key."
        )
    count, total = sum(layer.weight.numel() for layer in layers), sum(p.numel() for p in model.parameters())
    logger.info(
        "%s: %s of its %s weights (%.0f%%) in %s, the others in %s",
        *(source.name, f"{count:,}", f"{total:,}", 100 * count / total),
        *(source.quantize, str(source.dtype).removeprefix("torch.")),
    )
    return set(layers)


def quantize_loaded(model: PreTrainedModel, names: Sequence[str], layers: set[nn.Linear], quantize: str | None) -> None:
    """Quantize those of ``layers`` whose weight has just been loaded under ``names``."""
    for owner, _, leaf in (name.rpartition(".") for name in names):
        module = model.get_submodule(owner)
        if quantize is not None and leaf == "weight" and isinstance(module, nn.Linear) and module in layers:
            layers.remove(module)  # one that the model has under several names is quantized once
            quantize_layer(module, quantize)


def quantized_tensors(model: nn.Module) -> list[Tensor]:
    """What :class:`QuantizedLinear` layers hold in place of their weights."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return [tensor for layer in layers for tensor in (layer.quantized, layer.scales)]


def bytes_of(quantize: str, shapes: Sequence[tuple[int, ...]]) -> int:
    """Of quantized weights [out, in]: half a byte and a float32 scale for 64, or a byte and a scale for a row."""
    if quantize == "int8":
        return sum(rows * columns + 4 * rows for rows, columns in shapes)
    return sum(-(-rows * columns // 2) + 4 * -(-rows * columns // BLOCK) for rows, columns in shapes)


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight [out, in] is dequantized whenever it is read, in the dtype that it was quantized from."""

    quantized: Tensor
    scales: Tensor
    _dequantize: Callable[[], Tensor]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._dequantize()


@torch.no_grad()
def quantize_layer(layer: nn.Linear, quantize: str) -> None:
    """Make a loaded linear layer a :class:`QuantizedLinear`, in place. Its whole weight is freed."""
    weight = layer._parameters.pop("weight")
    assert weight is not None
    quantized, scales, dequantize = _QUANTIZERS[quantize](weight.data)
    layer.__class__ = QuantizedLinear
    layer.register_buffer("quantized", quantized, persistent=False)
    layer.register_buffer("scales", scales, persistent=False)
    layer._dequantize = dequantize  # type: ignore[assignment]


def _nf4(weight: Tensor) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    from bitsandbytes import functional  # seconds, and a package that not everybody has

    quantized, state = functional.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    return quantized, state.absmax, lambda: functional.dequantize_4bit(quantized, state)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    from bitsandbytes import functional

    dtype = weight.dtype
    quantized, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    return quantized, scales, lambda: functional.int8_vectorwise_dequant(quantized, scales).to(dtype)


_QUANTIZERS = {"nf4": _nf4, "int8": _int8}
