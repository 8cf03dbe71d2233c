"""One frozen model on one shard group: each of its ranks holds 1/g of every weight and scores pairs of its own.

Nothing is ever whole on the way in: the model is built on the meta device (its buffers are real, since no checkpoint holds them),
sharded with FSDP2, and each rank reads only its rows of each tensor from the safetensors files. A forward gathers one decoder
layer at a time; afterwards every weight is a shard again, the embedding and the head included.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.big_modeling import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)
from transformers.integrations import deepspeed as hf_deepspeed

from mrpo_scale.device import map_blocks_from
from mrpo_scale.errors import ConfigError, one_line
from mrpo_scale.flops import decoder_layers
from mrpo_scale.pair_batch import PairBatch, collate_pairs
from mrpo_scale.ranks import fail_together
from mrpo_scale.references.mapped import MappedFiles, can_be_mapped
from mrpo_scale.references.source import (
    ReferenceSource,
    check_source,
    check_weights,
    local_folder,
    open_weights,
    some,
)
from mrpo_scale.self_check import check_pair_scoring
from mrpo_scale.sequence_logps import (
    FusedHead,
    choose_end_to_end,
    choose_shared_prompt,
    enable_pair_scoring,
    response_hidden,
    score_pairs,
)
from mrpo_scale.tokenization import PairTokens

# Buffers that old checkpoints hold and that today's models compute; `PreTrainedModel` ignores the same two for every model.
COMPUTED_BUFFERS = [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]


class ShardedReference:
    """A frozen causal LM, sharded over ``group``, that turns pairs into log-probs.

    Collective over the group: loading, and every :meth:`score`, in the same order on all its ranks.

    Args:
        group: the shard group of this rank; None or a group of one rank holds the whole model here. On a CPU that is no copy if
            all weights have the dtype of the files.
        device: of the weights and the computation.
        shared_prompt: ``auto``, ``true`` or ``false``; see :func:`~mrpo_scale.sequence_logps.choose_shared_prompt`.
        offload: keep the shards in host memory and stream each layer to the device for its forward. Needs a process group, of one
            rank at least.

    Attributes:
        shared_prompt, end_to_end: the layout that :meth:`batch` makes.
        bytes_per_rank: of this rank's shard, parameters only.
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
        self.source, self.name, self.offload = source, source.name, offload
        self.group = group if group is not None and (group.size() > 1 or offload) else None
        # accelerate says cpu:0 on ranks, and a move from cpu to cpu:0 copies.
        self.device = torch.device("cpu") if device.type == "cpu" else device
        self.gathers = 0
        folder = local_folder(source, self.group)
        with fail_together(self.group):
            config = check_source(source)
            files = check_weights(folder, config, source.name)  # of a download for the first time
            self.model = build_on_meta(source, config)
            self.shared_prompt = choose_shared_prompt(shared_prompt, self.config, source.name)
            self.end_to_end = choose_end_to_end(self.model, device)
            self.mapped = self.group is None and device.type == "cpu" and can_be_mapped(source, files)
            self._mapped_files = MappedFiles(files if self.mapped else [], source.name)
            self._load(files)
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self.bytes_per_rank = sum(_local(p).numel() * p.element_size() for p in self.model.parameters())
        smallest = PairTokens(prompt_ids=[0], chosen_ids=[0], rejected_ids=[0])
        self._smallest = self.batch([smallest])
        with fail_together(self.group), _gathers_off_the_heap(self.group, device):
            check_pair_scoring(
                self.model, self.name, shared_prompt=self.shared_prompt, end_to_end=self.end_to_end, device=device
            )

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def group_size(self) -> int:
        return 1 if self.group is None else self.group.size()

    def batch(self, pairs: Sequence[PairTokens], pad_token_id: int = 0) -> PairBatch:
        """P >= 1 pairs, in their order, laid out as this model takes them, on its device."""
        layout = {"shared_prompt": self.shared_prompt, "end_to_end": self.end_to_end}
        return collate_pairs(pairs, **layout, pad_token_id=pad_token_id).to(self.device)

    @torch.no_grad()
    def score(self, pairs: PairBatch | None) -> Tensor:
        """Log-probs [P, 2] float32 of this rank's pairs; None, from a rank that has none left, keeps step and returns [0, 2]."""
        self.gathers += 1
        self._mapped_files.check()
        with _gathers_off_the_heap(self.group, self.device):
            logps_P2 = score_pairs(self.model, self._smallest if pairs is None else pairs.to(self.device))
        return logps_P2[:0] if pairs is None else logps_P2

    @torch.no_grad()
    def response_hidden(self, pairs: PairBatch | None) -> Tensor:
        """Hidden states [T, D] of this rank's response positions, the head left out; None keeps step and returns [0, D].

        With the head's weight from :meth:`gathered_head` they give the same log-probs as :meth:`score`. A head that is tied to the
        embedding was gathered with it, and stays whole until :meth:`gathered_head` ends, instead of being gathered again.
        """
        self.gathers += 1
        self._mapped_files.check()
        with _gathers_off_the_heap(self.group, self.device), self._root_stays_gathered():
            hidden_TD = response_hidden(self.model, self._smallest if pairs is None else pairs.to(self.device))
        return hidden_TD[:0] if pairs is None else hidden_TD

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
        mesh = None
        if self.group is not None:
            mesh = DeviceMesh.from_group(self.group, self.device.type)
            _shard(self.model, mesh, self.name, offload=self.offload)
        for file in files:
            with open_weights(file, self.name) as tensors:
                for name, names in plan.items():
                    if stored[name].file == file:
                        _fill(self.model, names, tensors.get_slice(stored[name].key), self, mesh)
        for module in self.model.modules():
            for buffer_name, buffer in module._buffers.items():
                module._buffers[buffer_name] = None if buffer is None else buffer.to(self.device)
        state = [*self.model.named_parameters(), *self.model.named_buffers()]
        if on_meta := [name for name, tensor in state if tensor.is_meta]:
            raise RuntimeError(f"{self.name}: after loading, nothing was put in {some(on_meta)}")


@contextmanager
def _zero3_unset() -> Iterator[None]:
    """Hide transformers' ZeRO-3 config object: alive, it partitions every model that is built over the whole world."""
    weak = hf_deepspeed._hf_deepspeed_config_weak_ref
    alive = None if weak is None else weak()
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if alive is not None:
            hf_deepspeed.set_hf_deepspeed_config(alive)


def build_on_meta(source: ReferenceSource, config: PretrainedConfig) -> PreTrainedModel:
    """The model with its parameters on meta and its buffers real, frozen and in eval mode."""
    options: dict[str, Any] = {"dtype": source.dtype, "trust_remote_code": source.trust_remote_code}
    if source.attn_implementation is not None:
        options["attn_implementation"] = source.attn_implementation
    # Not `to_empty` after a build on meta: it leaves the rotary buffers garbage, and nothing complains.
    try:
        with _zero3_unset(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, **options)
    except (ImportError, ValueError) as error:  # an attention that is not installed, or that the model does not have
        raise ConfigError(
            f"{source.name}: {source.path} cannot be built here ({one_line(error)}); see `attn_implementation`."
        ) from error
    model.tie_weights()  # the move to meta has parted what the constructor tied
    _keep_float32(model, source.dtype)
    return model.requires_grad_(False).eval()


def _keep_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters on meta the dtypes that ``from_pretrained(dtype=dtype)`` gives them: some models keep some of theirs in
    float32 (``_keep_in_fp32_modules``, ``_keep_in_fp32_modules_strict``), a router's bias for instance."""
    plan = model._get_dtype_plan(dtype)
    kept, pattern_of, _ = build_glob_alternation(list(plan))
    for name, parameter in model.named_parameters():
        match = kept.search(name) if plan else None
        if match is not None:
            parameter.data = parameter.data.to(plan[pattern_of[str(match.lastgroup)]])


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
    """FSDP2 over each decoder layer, over an untied embedding and head, and over the rest."""
    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(
            f"{name} ({type(model).__name__}) does not say which of its modules are decoder layers (`_no_split_modules`), so it "
            "cannot be sharded; set `ref_shard_size: 1` to hold it whole on every rank."
        )
    # The two large matrices need not be whole at the same time, unless they are one.
    units = _without_shared(model, [*layers, model.get_input_embeddings(), model.get_output_embeddings()])
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for unit in [*reversed(units), model]:
        # Said for the root too: by default it stays gathered after a forward, in the belief that a backward follows.
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


@dataclass(frozen=True)
class _Stored:
    file: Path
    key: str

    def read(self, name: str) -> Tensor:
        with open_weights(self.file, name) as tensors:
            return tensors.get_tensor(self.key)


def locate_tensors(
    model: PreTrainedModel, files: list[Path], name: str
) -> tuple[dict[str, _Stored], dict[str, list[str]]]:
    """(:func:`stored_tensors`, :func:`match_names`) of files that hold the whole model.

    Raises:
        ConfigError: they do not: see :func:`match_names`; or a tensor has another shape.
    """
    stored = stored_tensors(model, files, name)
    plan = match_names(model, stored, name)
    state = model.state_dict()
    for file in files:
        with open_weights(file, name) as tensors:
            for target in (target for target in plan if stored[target].file == file):
                shape, found = list(state[target].shape), tensors.get_slice(stored[target].key).get_shape()
                if found != shape:
                    raise ConfigError(
                        f"{name}: {target} is {found} in the checkpoint but {shape} by its config.json; the two do not belong "
                        "together."
                    )
    return stored, plan


def stored_tensors(model: PreTrainedModel, files: list[Path], name: str) -> dict[str, _Stored]:
    """{name in the model: where it is on disk}. Checkpoints keep the names of their first days (GPT-NeoX: embed_out for
    lm_head), which transformers' own table and rule translate."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    stored = {}
    for file in files:
        with open_weights(file, name) as tensors:
            keys = sorted(tensors.keys())
        for key in keys:
            target, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if target not in state and key in state:
                target, converter = key, None
            if converter is not None:
                raise ConfigError(
                    f"{name}: {key} is stored in a layout that cannot be read in shards; choose another model."
                )
            stored[target] = _Stored(file, key)
    return stored


def match_names(model: PreTrainedModel, stored: Mapping[str, _Stored], name: str) -> dict[str, list[str]]:
    """{a name that is on disk: all names that the model has for that tensor}, several if tied.

    Raises:
        ConfigError: a tensor is missing, or unknown to the model; or tied tensors differ on disk.
    """
    names_of: dict[int, list[str]] = defaultdict(list)
    for tensor_name, tensor in model.state_dict(keep_vars=True).items():
        names_of[id(tensor)].append(tensor_name)
    plan: dict[str, list[str]] = {}
    missing: list[str] = []
    for names in names_of.values():
        present = [n for n in names if n in stored]
        if not present:
            missing.append(names[0])
            continue
        plan[present[0]] = names
        for other in present[1:]:
            if not torch.equal(stored[present[0]].read(name), stored[other].read(name)):
                raise ConfigError(
                    f"{name}: its config ties {present[0]} to {other}, but the checkpoint holds two different tensors; say "
                    "`tie_word_embeddings: false` in its config.json if they are meant to differ."
                )
    known = {n for names in names_of.values() for n in names}
    ignorable = re.compile("|".join([*COMPUTED_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or [])]))
    unknown = sorted(n for n in stored if n not in known and not ignorable.search(n))
    if missing or unknown:
        problems = [f"misses {some(missing)}"] * bool(missing) + [f"has unknown {some(unknown)}"] * bool(unknown)
        # Written again by transformers, a folder that lacks a tensor has a random one and looks whole.
        remedy = (
            "Get the model again, or name the language model that it was made from."
            if missing
            else "A head or adapter of another task must go first: load it as a causal language model and write it again with "
            "`save_pretrained`."
        )
        raise ConfigError(
            f"{name}: the checkpoint {' and '.join(problems)}, so it is not a whole {type(model).__name__}. {remedy}"
        )
    return plan


def _fill(
    model: PreTrainedModel,
    names: list[str],
    on_disk: Any,
    reference: ShardedReference,
    mesh: DeviceMesh | None,
) -> None:
    """Put this rank's rows of one tensor of the checkpoint wherever the model has it, in the dtype that it has there."""
    owner, _, leaf = names[0].rpartition(".")
    module = model.get_submodule(owner)
    target = getattr(module, leaf)
    shape = list(target.shape)
    if leaf in module._buffers:
        module._buffers[leaf] = on_disk[...].to(reference.device, target.dtype, copy=True)
        return
    dtype = target.dtype
    # Copies unless the model is used as it lies there: what safetensors hands out is a view of the mapped file.
    if mesh is None:
        weight = on_disk[...].to(reference.device, dtype, copy=not reference.mapped)
    else:
        rows = -(-shape[0] // mesh.size())  # as torch.chunk cuts, which is how Shard(0) lies
        start = min(mesh.get_local_rank() * rows, shape[0])
        stop = min(start + rows, shape[0])
        local = on_disk[start:stop] if start < stop else torch.empty(0, *shape[1:])
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
