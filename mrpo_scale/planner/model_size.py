"""The sizes of one model, from its config alone: it is built on the meta device, where a weight has a shape and no memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.logps.attention_choice import choose_end_to_end, head_size
from mrpo_scale.logps.flops import UnitCosts, active_parameters, unit_costs
from mrpo_scale.logps.layer_masks import decoder_layers, supports_shared_prompt
from mrpo_scale.models.adapter import wrapped
from mrpo_scale.models.source import ReferenceSource, check_config
from mrpo_scale.models.stored import build_on_meta
from mrpo_scale.planner.activations import Activations, activations_of
from mrpo_scale.references.low_bits import bytes_of, layers_to_quantize

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelSize:
    """What the cost of a model is made of. Tied weights count once."""

    name: str
    model_type: str
    shapes: tuple[Shape, ...]  #: of every parameter
    hidden: int
    layer: int  #: parameters of the largest decoder layer
    widest_mlp: int
    embedding: int  #: parameters of the input embedding
    head: int  #: parameters of the output head
    tied: bool
    itemsize: int  #: bytes of one weight
    shared_prompt: bool
    end_to_end: bool
    costs: UnitCosts
    activations: Activations
    active: int  #: parameters that a token meets: of a mixture of experts not all
    heads: int  #: of attention
    key_heads: int
    head_size: int
    trained: tuple[Shape, ...] | None = None  #: of the parameters that train, an adapter's; None: all do
    quantize: str | None = None  #: how a reference's linear layers are kept
    quantized: tuple[Shape, ...] = ()  #: of their weights

    @cached_property
    def _alike(self) -> Counter[Shape]:
        """How many parameters there are of each shape: layers repeat, and a search asks hundreds of times."""
        return Counter(self.shapes)

    @cached_property
    def _trained_alike(self) -> Counter[Shape]:
        return self._alike if self.trained is None else Counter(self.trained)

    @cached_property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes))

    def fsdp_shard(self, ranks: int) -> int:
        """Elements on the rank that holds most: FSDP2 cuts each parameter along its first axis, as ``torch.chunk`` does."""
        return sum(-(-shape[0] // ranks) * math.prod(shape[1:]) * count for shape, count in self._alike.items())

    def held_bytes(self, ranks: int) -> int:
        """On the rank of a shard group that holds most. What is quantized is whole, in a group of one."""
        whole = sum(map(math.prod, self.quantized)) * self.itemsize
        return (
            self.fsdp_shard(ranks) * self.itemsize
            - whole
            + (bytes_of(self.quantize, self.quantized) if self.quantize else 0)
        )

    @property
    def dequantized_bytes(self) -> int:
        """Of the largest weight that is whole for the time of its product."""
        return max(map(math.prod, self.quantized), default=0) * self.itemsize

    def zero_shard(self, ranks: int) -> int:
        """Elements on each rank: ZeRO flattens each parameter and pads it to a multiple of the ranks."""
        return sum(-(-math.prod(shape) // ranks) * count for shape, count in self._alike.items())

    def secondary_shard(self, group: int, ranks: int, threshold: int) -> int:
        """Elements of the second copy that hpZ puts on each rank of a group: of weights that are cut, padded as for all ranks."""
        cut = [(n, count) for shape, count in self._alike.items() if (n := math.prod(shape)) > threshold]
        return sum(-(-n // ranks) * (ranks // group) * count for n, count in cut)

    @cached_property
    def trained_parameters(self) -> int:
        return sum(map(math.prod, self.shapes if self.trained is None else self.trained))

    def trained_shard(self, ranks: int) -> int:
        """:meth:`zero_shard` of the parameters that train."""
        return sum(-(-math.prod(shape) // ranks) * count for shape, count in self._trained_alike.items())

    def persistent(self, threshold: int) -> int:
        """Elements of the parameters that ZeRO-3 keeps whole on every rank."""
        return sum(n * count for shape, count in self._alike.items() if (n := math.prod(shape)) <= threshold)

    def gathered_weights(self, threshold: int) -> int:
        """How many parameters ZeRO-3 cuts and gathers."""
        return sum(count for shape, count in self._alike.items() if math.prod(shape) > threshold)

    @lru_cache(maxsize=16)  # noqa: B019 (sizes are few and live as long as the process)
    def gradient_buckets(self, limit: int) -> int:
        """Collectives that send the gradients: a bucket goes when it has no room for the next gradient; a larger one goes alone."""
        count, filled = 0, 0
        for n in map(math.prod, reversed(self.shapes if self.trained is None else self.trained)):
            if filled and filled + n > limit:
                count, filled = count + 1, 0
            filled += n
        return count + bool(filled)


def model_size(
    source: ReferenceSource,
    *,
    itemsize: int,
    shared_prompt: str = "auto",
    device_type: str = "cuda",
    compiled: bool = False,
    adapter: MRPOConfig | None = None,
) -> ModelSize:
    """Of a causal LM. Reads config.json; opens no weights.

    Args:
        itemsize: bytes of one weight where it runs.
        shared_prompt: the recipe's key.
        adapter: of the policy, where `use_peft` puts one on it.
        device_type, compiled: where it runs, and whether through ``torch.compile``; they decide which attention it has.

    Raises:
        ConfigError: what :func:`~mrpo_scale.models.source.check_config` refuses, or a config without a field that the estimate
            needs; names the field.
    """
    config = check_config(source)
    model = build_on_meta(source, config)
    end_to_end = choose_end_to_end(
        model,
        torch.device(device_type),
        name=source.name,
        asked=source.attn_implementation,
        dtype=torch.bfloat16 if itemsize == 2 else source.dtype,
        compiled=compiled,
        tried=False,
    )
    shared = supports_shared_prompt(model) and shared_prompt != "false"
    layers, text = decoder_layers(model), model.config.get_text_config()
    costs = unit_costs(model)  # first: it complains of what a config lacks
    embedding, head = (cast(Tensor, m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    size = ModelSize(
        name=source.name,
        model_type=model.config.model_type,
        shapes=tuple(tuple(parameter.shape) for parameter in model.parameters()),
        hidden=text.hidden_size,
        layer=max(map(_count, layers)),
        widest_mlp=max(max(p.shape) for p in layers[0].parameters() if p.ndim == 2),
        embedding=embedding.numel(),
        head=head.numel(),
        tied=embedding is head,
        itemsize=itemsize,
        shared_prompt=shared,
        end_to_end=end_to_end,
        costs=costs,
        activations=activations_of(model),
        active=active_parameters(model),
        heads=text.num_attention_heads,
        key_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_size=head_size(text),
        quantize=source.quantize,
        quantized=_quantized(source, model),
    )
    return size if adapter is None else _with_adapter(size, model, adapter)


def _with_adapter(size: ModelSize, model: PreTrainedModel, adapter: MRPOConfig) -> ModelSize:
    parameters = list(wrapped(model, adapter).parameters())
    shapes = [tuple(tuple(p.shape) for p in some) for some in (parameters, [p for p in parameters if p.requires_grad])]
    return replace(size, shapes=shapes[0], trained=shapes[1])


def _quantized(source: ReferenceSource, model: PreTrainedModel) -> tuple[Shape, ...]:
    return (
        tuple(tuple(layer.weight.shape) for layer in layers_to_quantize(model, source.dtype)) if source.quantize else ()
    )


def assumed_fields(source: ReferenceSource) -> list[str]:
    """``name: value`` of sizes that config.json leaves to the defaults of transformers' class, as loading it does."""
    raw, _ = PretrainedConfig.get_config_dict(source.files, revision=source.revision)
    config = check_config(source).get_text_config()
    said = {**raw, **raw.get("text_config", {})}
    aliases = config.attribute_map
    return [
        f"{name}: {getattr(config, name)}"
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        if name not in said and aliases.get(name) not in said and getattr(config, name, None) is not None
    ]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
