"""Adapters beside the weights of one frozen model, of which one at a time is on, or none: K adapters are K references."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mrpo_scale.models.adapter_files import Adapter
from mrpo_scale.models.source import ReferenceSource


def can_share(one: ReferenceSource, other: ReferenceSource) -> bool:
    """Whether two references use the same weights, with an adapter beside them in one case at least. A model that is named twice
    is loaded twice: `mrpo bench` stands in for other models so."""
    return one.weights == other.weights and (one.adapter or other.adapter) is not None


def lenders(sources: Mapping[int, ReferenceSource]) -> dict[int, int]:
    """{reference: the first one whose weights it uses}: itself where they are its own."""
    found: dict[int, int] = {}
    for k, source in sources.items():
        found[k] = next((found[j] for j in found if can_share(sources[j], source)), k)
    return found


def loaded_apart(sources: Mapping[int, ReferenceSource]) -> list[str]:
    """A sentence for each reference with an adapter whose base is a reference too and cannot be the same copy."""
    said = []
    of = lenders(sources)
    for k, source in sources.items():
        others = [j for j in of if j < k and sources[j].path == source.path and of[j] != of[k]]
        apart = [j for j in others if (source.adapter or sources[j].adapter) is not None]
        if of[k] == k and apart:
            other = sources[apart[0]]
            one, two = source.weights, other.weights
            keys = [f.name for f in fields(one) if getattr(one, f.name) != getattr(two, f.name)]
            said.append(
                f"{other.name} and {source.name} are of one model, {source.path}, but differ in {', '.join(keys)}: its weights are "
                "loaded for each of them"
            )
    return said


class AdapterSwitch:
    """The adapters of a model that is loaded, sharded or not; none at first. Its own weights stay where they are."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._layers: list[Any] = []
        self._count = 0
        self._on: str | None = None

    def add(self, adapter: Adapter, device: torch.device) -> str:
        """Load an adapter and switch it on; what it is called here. Its tensors are whole on every rank: they are small."""
        from peft import LoraConfig, inject_adapter_in_model  # seconds, and a package that not everybody has
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._count += 1
        name = f"adapter{self._count}"
        settings: Any = adapter.settings
        config = LoraConfig(target_modules=list(adapter.layers), inference_mode=True, **settings)
        # On meta: nothing is drawn, so the run's random numbers stay what they are.
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Already found a `peft_config`", UserWarning
            )  # several: that is what this is for
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
            inject_adapter_in_model(config, self._model, name, low_cpu_mem_usage=True)
        for layer, parts in adapter.layers.items():
            module: Any = self._model.get_submodule(layer)
            for part, stored in parts.items():
                half, _, leaf = part.partition(".")
                # In float32 as peft does: products of rank r cost nothing, and the sum is rounded once, to the layer's dtype.
                value = stored.read().to(device, torch.float32, copy=True)
                target = getattr(module, f"lora_{half}")[name]
                setattr(target, leaf, nn.Parameter(value, requires_grad=False))
        self._model.eval()
        self._layers = [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]
        self._switch(name)
        return name

    def use(self, name: str | None) -> None:
        """Let the model's next forwards be with that adapter alone; None: with none."""
        if name != self._on:
            self._switch(name)

    def _switch(self, name: str | None) -> None:
        for layer in self._layers:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(name, inference_mode=True)
        self._on = name
