"""One frozen model on one shard group: each of its ranks holds 1/g of every weight and scores pairs of its own.

Nothing is ever whole on the way in: the model is built on the meta device (its buffers are real, since no checkpoint holds them),
sharded with FSDP2, and each rank reads only its rows of each tensor from the safetensors files. A forward gathers one decoder
layer at a time; afterwards every weight is a shard again, the embedding and the head included.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PretrainedConfig, PreTrainedModel

from mrpo_scale.base.device import map_blocks_from
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.ranks import fail_together
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.attention_choice import choose_end_to_end
from mrpo_scale.logps.flops import expert_modules
from mrpo_scale.logps.layer_masks import decoder_layers
from mrpo_scale.logps.pair_batch import PairBatch, collate_pairs
from mrpo_scale.logps.pair_forward import (
    FusedHead,
    choose_shared_prompt,
    enable_pair_scoring,
    response_hidden,
    score_pairs,
)
from mrpo_scale.logps.self_check import check_pair_scoring
from mrpo_scale.models.adapter import needs_peft
from mrpo_scale.models.adapter_files import read_adapter
from mrpo_scale.models.on_disk import Stored
from mrpo_scale.models.source import (
    ReferenceSource,
    check_source,
    check_weights,
    local_folder,
    some,
)
from mrpo_scale.models.stored import build_on_meta, locate_tensors
from mrpo_scale.references.adapters import AdapterSwitch
from mrpo_scale.references.low_bits import check_low_bits, choose_layers, quantize_loaded, quantized_tensors
from mrpo_scale.references.mapped import MappedFiles, can_be_mapped


class ShardedReference:
    """A frozen causal LM, sharded over ``group``, that turns pairs into log-probs.

    Collective over the group: loading, and every :meth:`score`, in the same order on all its ranks.

    Args:
        group: the shard group of this rank; None or a group of one rank holds the whole model here. On a CPU that is no copy if
            all weights have the dtype of the files.
        device: of the weights and the computation.
        shared_prompt: ``auto``, ``true`` or ``false``; see :func:`~mrpo_scale.logps.pair_forward.choose_shared_prompt`.
        offload: keep the shards in host memory and stream each layer to the device for its forward. Needs a process group, of one
            rank at least.

    Attributes:
        shared_prompt, end_to_end: the layout that :meth:`batch` makes.
        num_parameters: of the model, wherever and in however many bits they lie, its adapter left out.
        weight_bytes: of this rank's shard, parameters only.
        adapter_bytes: of its adapter, whole on every rank.
        shares_with: the name of the reference that holds the weights, where they are another's; see :meth:`sharing`.
        mapped: whether weights are used in their files, shared with whoever else does so on this host.
        gathers: forwards so far, each of which gathers the whole model once.

    Raises:
        ConfigError: on every rank of the group if on any: see :func:`check_source`; or the checkpoint's tensors are not the
            model's, or its scores are not what its own logits say.
    """

    def __init__(
        self,
        source: ReferenceSource,
        group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        shared_prompt: str = "auto",
        offload: bool = False,
    ) -> None:
        if offload and group is None:
            raise ConfigError(
                "`ref_offload: true` needs a process group, which a single process without a launcher does not have: start with "
                "`accelerate launch`, or hold the references on the device."
            )
        if source.quantize is not None:
            check_low_bits(source.quantize, source.name, group_size=group.size() if group else 1, offload=offload)
        self.source, self.name, self.offload = source, source.name, offload
        self.group = group if group is not None and (group.size() > 1 or offload) else None
        # accelerate says cpu:0 on ranks, and a move from cpu to cpu:0 copies.
        self.device = torch.device("cpu") if device.type == "cpu" else device
        if source.adapter is not None:
            needs_peft()
        self.gathers, self.adapter_bytes, self.shares_with = 0, 0, ""
        folder = local_folder(source, self.group)
        with fail_together(self.group):
            config = check_source(source)
            files = check_weights(folder, config, source.name)  # of a download for the first time
            self.model = build_on_meta(source, config)
            self.end_to_end = choose_end_to_end(
                self.model, device, name=source.name, asked=source.attn_implementation, dtype=source.dtype
            )
            self.shared_prompt = choose_shared_prompt(shared_prompt, self.model, source.name)
            self.mapped = self.group is None and device.type == "cpu" and can_be_mapped(source, self.model, files)
            self.num_parameters = sum(p.numel() for p in self.model.parameters())
            self._mapped_files = MappedFiles(files if self.mapped else [], source.name)
            self._load(files)
        held = [*map(_local, self.model.parameters()), *quantized_tensors(self.model)]
        self.weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
        smallest = PairTokens(prompt_ids=[0], chosen_ids=[0], rejected_ids=[0])
        self._smallest = self.batch([smallest])
        self._adapters = AdapterSwitch(self.model)
        self._adapter: str | None = None
        self._check()
        self._add_adapter()

    def sharing(self, source: ReferenceSource) -> ShardedReference:
        """A reference of these same weights with the adapter of ``source``, or with none. Collective over the group.

        Args:
            source: whose ``weights`` are this one's.

        Raises:
            ConfigError: as the constructor, of the adapter.
        """
        other = copy.copy(self)
        other.source, other.name, other.shares_with = source, source.name, self.shares_with or self.name
        other.gathers, other.adapter_bytes, other._adapter = 0, 0, None
        other._add_adapter()
        return other

    def _add_adapter(self) -> None:
        if self.source.adapter is None:
            return
        needs_peft()
        with fail_together(self.group):
            adapter = read_adapter(self.source)
            self._adapter = self._adapters.add(adapter, self.device)
        self.adapter_bytes = 4 * adapter.num_parameters
        self._check()

    def _check(self) -> None:
        self._adapters.use(self._adapter)
        with fail_together(self.group), _gathers_off_the_heap(self.group, self.device):
            check_pair_scoring(
                self.model, self.name, shared_prompt=self.shared_prompt, end_to_end=self.end_to_end, device=self.device
            )

    @property
    def bytes_per_rank(self) -> int:
        """What this rank holds for this reference and no other."""
        return self.adapter_bytes + (0 if self.shares_with else self.weight_bytes)

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def group_size(self) -> int:
        return 1 if self.group is None else self.group.size()

    def batch(self, pairs: Sequence[PairTokens], pad_token_id: int = 0) -> PairBatch:
        """P >= 1 pairs, in their order, laid out as this model takes them, on its device."""
        batch = collate_pairs(
            pairs, shared_prompt=self.shared_prompt, end_to_end=self.end_to_end, pad_token_id=pad_token_id
        )
        return batch.to(self.device)

    @torch.no_grad()
    def score(self, pairs: PairBatch | None) -> Tensor:
        """Log-probs [P, 2] float32 of this rank's pairs; None, from a rank that has none left, keeps step and returns [0, 2]."""
        self._start_forward()
        with _gathers_off_the_heap(self.group, self.device):
            logps_P2 = score_pairs(self.model, self._smallest if pairs is None else pairs.to(self.device))
        return logps_P2[:0] if pairs is None else logps_P2

    @torch.no_grad()
    def response_hidden(self, pairs: PairBatch | None) -> Tensor:
        """Hidden states [T, D] of this rank's response positions, the head left out; None keeps step and returns [0, D].

        With the head's weight from :meth:`gathered_head` they give the same log-probs as :meth:`score`. A head that is tied to the
        embedding was gathered with it, and stays whole until :meth:`gathered_head` ends, instead of being gathered again.
        """
        self._start_forward()
        with _gathers_off_the_heap(self.group, self.device), self._root_stays_gathered():
            hidden_TD = response_hidden(self.model, self._smallest if pairs is None else pairs.to(self.device))
        return hidden_TD[:0] if pairs is None else hidden_TD

    def _start_forward(self) -> None:
        self.gathers += 1
        self._mapped_files.check()
        self._adapters.use(self._adapter)

    @contextmanager
    def gathered_head(self) -> Iterator[FusedHead]:
        """The output head with whole weights inside the block, shards again after it. Collective over the group."""
        head = cast(FusedHead, self.model.get_output_embeddings())
        # A tied head belongs to the root's unit, with the embedding; an untied one is a unit of its own.
        unit = head if isinstance(head, FSDPModule) else self.model
        if isinstance(unit, FSDPModule):
            unit.unshard()
        try:
            yield head
        finally:
            if isinstance(unit, FSDPModule):
                unit.reshard()

    @contextmanager
    def _root_stays_gathered(self) -> Iterator[None]:
        """Inside the block a forward leaves the root's unit whole, if that is where the head is."""
        model, head = self.model, self.model.get_output_embeddings()
        if not isinstance(model, FSDPModule) or isinstance(head, FSDPModule):
            yield
            return
        model.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            model.set_reshard_after_forward(True, recurse=False)

    def _load(self, files: list[Path]) -> None:
        stored, plan = locate_tensors(self.model, files, self.name)
        enable_pair_scoring(self.model, self.name)
        layers = choose_layers(self.model, self.source)
        mesh = None
        if self.group is not None:
            mesh = DeviceMesh.from_group(self.group, self.device.type)
            _shard(self.model, mesh, self.name, offload=self.offload)
        for name, names in plan.items():
            _fill(self.model, names, stored[name], self, mesh)
            quantize_loaded(self.model, names, layers, self.source.quantize)
        for module in self.model.modules():
            for buffer_name, buffer in module._buffers.items():
                module._buffers[buffer_name] = None if buffer is None else buffer.to(self.device)
        state = [*self.model.named_parameters(), *self.model.named_buffers()]
        if on_meta := [name for name, tensor in state if tensor.is_meta]:
            raise RuntimeError(f"{self.name}: after loading, nothing was put in {some(on_meta)}")


@contextmanager
def _gathers_off_the_heap(group: dist.ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """On a shard group of CPUs, let a gathered layer go back to the system when it is freed, as blocks that glibc maps do.

    Seen with SmolLM2-135M on 2 ranks, 1,170 MB after a score instead of 350, and no faster. Afterwards the threshold is what glibc
    itself grows it to, because training on ranks lost a tenth of its speed to page faults under the low one.
    """
    if group is None or device.type != "cpu":
        yield
        return
    map_blocks_from(1 << 20)
    try:
        yield
    finally:
        map_blocks_from(32 << 20, keep=64 << 20)


def _shard(model: PreTrainedModel, mesh: DeviceMesh, name: str, *, offload: bool) -> None:
    """FSDP2 over each decoder layer, in it over its experts, over an untied embedding and head, and over the rest."""
    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(
            f"{name} ({type(model).__name__}) does not say which of its modules are decoder layers (`_no_split_modules`), so it "
            "cannot be sharded; set `ref_shard_size: 1` to hold it whole on every rank."
        )
    # The two large matrices need not be whole at the same time, unless they are one.
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    units = _without_shared(model, [*layers, *expert_modules(model), *ends])
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for unit in [*reversed(units), model]:
        # Set explicitly on the root, which stays gathered after a forward by default, for a backward that never comes here.
        sharded: Any = fully_shard(unit, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
        if mesh.device_type == "cpu":
            sharded.set_custom_all_gather(_BroadcastGather())


def _without_shared(model: PreTrainedModel, units: Sequence[nn.Module]) -> list[nn.Module]:
    """The units whose parameters nobody else has. FSDP2 manages a parameter in one place: what is tied (an embedding and a head) or
    used by several layers (Zamba's block) belongs to the root."""
    users: dict[int, set[str]] = defaultdict(set)
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)].add(parameter_name)
    shared = [names for names in users.values() if len(names) > 1]
    name_of = {id(module): module_name for module_name, module in model.named_modules()}
    alone = []
    for unit in units:
        prefix = f"{name_of[id(unit)]}."
        if not any(0 < sum(n.startswith(prefix) for n in names) < len(names) for names in shared):
            alone.append(unit)
    return alone


class _BroadcastGather:
    """FSDP2's all-gather as one broadcast from each rank: with gloo between two processes 4.6 GB/s instead of 1.2."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """``input_tensor`` lies in its place in ``output_tensor`` already."""
        for rank, part in enumerate(output_tensor.chunk(group.size())):
            dist.broadcast(part, group=group, group_src=rank)


def _fill(
    model: PreTrainedModel,
    names: list[str],
    stored: Stored,
    reference: ShardedReference,
    mesh: DeviceMesh | None,
) -> None:
    """Put this rank's rows of one tensor of the checkpoint wherever the model has it, in the dtype that it has there."""
    owner, _, leaf = names[0].rpartition(".")
    module = model.get_submodule(owner)
    target = getattr(module, leaf)
    shape = list(target.shape)
    if leaf in module._buffers:
        module._buffers[leaf] = stored.read().to(reference.device, target.dtype, copy=True)
        return
    dtype = target.dtype
    # Copies unless the model is used as it lies there: what safetensors hands out is a view of the mapped file.
    if mesh is None:
        weight = stored.read().to(reference.device, dtype, copy=not reference.mapped)
    else:
        rows = -(-shape[0] // mesh.size())  # as torch.chunk cuts, which is how Shard(0) lies
        start = min(mesh.get_local_rank() * rows, shape[0])
        stop = min(start + rows, shape[0])
        local = stored.read(slice(start, stop)) if start < stop else torch.empty(0, *shape[1:])
        if (
            reference.offload
        ):  # a shard in host memory of a parameter that computes on the device: only empty_like makes one
            weight = torch.empty_like(target, dtype=dtype, device="cpu")
            _local(weight).copy_(local)
        else:
            weight = DTensor.from_local(
                local.to(reference.device, dtype, copy=True),
                mesh,
                [Shard(0)],
                run_check=False,
                shape=target.shape,
                stride=target.stride(),
            )
    parameter = nn.Parameter(weight, requires_grad=False)
    for tied_name in names:
        owner, _, leaf = tied_name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = parameter


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
