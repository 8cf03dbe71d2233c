"""From names to models: which folders, tokenizers and tokenizations a run has. Only configs and tokenizers load here, no weights.

Reference 0, the anchor, is the policy's own starting weights unless ``anchor`` names another model.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.base.ranks import barrier
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.config.model_spec import ModelSpec, parse_ref_models
from mrpo_scale.data.tokenization import ModelText, TextReader
from mrpo_scale.logps.routers import has_router_loss
from mrpo_scale.models.adapter import check_adapter
from mrpo_scale.models.adapter_files import resolve_adapter
from mrpo_scale.models.classes import class_beside_auto, class_of
from mrpo_scale.models.quantized import quantization_of
from mrpo_scale.models.saving import unvalidated_generation_config
from mrpo_scale.models.source import ReferenceSource, Server, check_config, check_source, resolve_source, snapshot
from mrpo_scale.models.tensor_check import check_model, check_tensors

logger = logging.getLogger(__name__)

ANCHOR = "anchor"  #: the name of reference 0


@dataclass(frozen=True)
class PlannedReference:
    source: ReferenceSource
    tokenization: int  #: index into RunPlan.texts
    pad_token_id: int
    num_embeddings: int | None = None  #: rows of its embedding, as config.json has them

    @property
    def name(self) -> str:
        return self.source.name


@dataclass(frozen=True)
class RunPlan:
    """Every model of a run before any weights load. ``texts`` are the distinct tokenizations, the policy's first."""

    policy: ReferenceSource
    tokenizer: PreTrainedTokenizerBase
    texts: list[ModelText]
    references: list[PlannedReference]
    num_embeddings: int | None = None  #: of the policy

    @property
    def readers(self) -> list[TextReader]:
        """Every model with the text that it reads, the policy first."""
        policy = TextReader("policy", 0, self.num_embeddings)
        return [policy, *(TextReader(r.name, r.tokenization, r.num_embeddings) for r in self.references)]

    @property
    def names(self) -> list[str]:
        return [reference.name for reference in self.references]

    @property
    def dated(self) -> list[str]:
        """The models whose chat templates print the date."""
        return [reader.name for reader in self.readers if self.texts[reader.tokenization].prints_date]

    def first(self, count: int) -> RunPlan:
        """With the first ``count`` references, the anchor among them, but with all tokenizations: runs that compare train on
        pairs that every model of the recipe can score."""
        return replace(self, references=self.references[:count])


def plan_models(
    model: str | PreTrainedModel,
    ref_models: Sequence[str | Mapping[str, Any]],
    args: MRPOConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    weights_needed: bool = True,
) -> RunPlan:
    """Resolve and check every model of a run.

    Args:
        model: the policy, as a name or loaded. A loaded one's starting weights are written to ``output_dir/anchor``, from where
            the anchor's shards stream: references never share storage with a policy that trains.
        args: what a run must agree on has been decided: `template_date`, see lifecycle/template_date.py. Without, templates print
            today's date.
        weights_needed: False: config and tokenizer suffice, for a plan that nothing will be loaded for.

    Raises:
        ConfigError: a model that is missing, has no safetensors or not all tensors, wants remote code, has no fast tokenizer, or as
            the policy lacks what the arguments ask of it.
    """
    # A reference's headers are read when it is loaded: one whose scores are complete never is.
    check_policy, check = (check_model, check_source) if weights_needed else (check_config, check_config)
    spec = _policy_spec(model, args)
    if not isinstance(model, str):
        if tokenizer is None:
            raise ConfigError("`processing_class` is missing: pass the policy's tokenizer beside a loaded model.")
        if args.checkpoints_activations:
            check_checkpointing(type(model))
        write_weights(model, Path(spec.model), is_main=args.process_index == 0)
    policy = resolve_source(_source(spec, args, args.policy_dtype))
    policy_config = check_policy(policy)
    if isinstance(model, str):
        _check_trainable(policy, policy_config, args)
    if args.use_peft:
        check_adapter(policy, policy_config, args)
    tokenizer = tokenizer or load_tokenizer(replace(spec, model=policy.files))
    texts = [_text(spec, args, tokenizer, policy_config)]

    ref_specs = parse_ref_models(list(ref_models))
    anchor_spec = parse_ref_models([args.anchor], "anchor")[0] if args.anchor else spec
    _warn_of_served_anchor(anchor_spec)
    rows = num_embeddings(policy_config)
    references: list[PlannedReference] = []
    for k, (ref_spec, name) in enumerate(zip([anchor_spec, *ref_specs], _names(ref_specs), strict=True)):
        source = _source(ref_spec, args, args.reference_dtype(ref_spec.dtype), name)
        if k == 0 and not args.anchor:
            source = replace(source, commit=policy.commit, folder=policy.folder)
            references.append(PlannedReference(source, 0, pad_token_id(tokenizer, rows), rows))
        else:
            source = resolve_source(source)
            config = None if source.server else check(source)
            source = source if source.adapter is None or config is None else resolve_adapter(source, config)
            references.append(_planned(ref_spec, source, args, texts, config))
    args.build_objective().check_references(len(references))
    return RunPlan(policy, tokenizer, texts, references, rows)


def _policy_spec(model: str | PreTrainedModel, args: MRPOConfig) -> ModelSpec:
    """A loaded model's is the folder that its weights will be written to."""
    return ModelSpec(
        model=model if isinstance(model, str) else str(args.folder / "anchor"),
        name="policy",
        revision=args.model_revision,
        chat_template=args.chat_template,
        system=args.system,
        trust_remote_code=args.trust_remote_code,
        attn_implementation=args.attn_implementation,
    )


def _planned(
    spec: ModelSpec, source: ReferenceSource, args: MRPOConfig, texts: list[ModelText], config: PretrainedConfig | None
) -> PlannedReference:
    """A reference with a tokenizer of its own, whose tokenization joins ``texts`` unless one of them is the same.

    Args:
        config: None for a model that is served elsewhere, of which only the tokenizer is here.
    """
    # Of a served model the tokenizer alone may come from the hub.
    tokenizer_of = resolve_source(ReferenceSource(source.name, spec.tokenizer_from)) if source.server else source
    tokenizer = load_tokenizer(replace(spec, model=tokenizer_of.files, tokenizer=None), source.name)
    rows = None if config is None else num_embeddings(config)
    tokenization = shared_tokenization(texts, _text(spec, args, tokenizer, config, source.name))
    return PlannedReference(source, tokenization, pad_token_id(tokenizer, rows), rows)


def load_policy(source: ReferenceSource, quantization: Any = None) -> PreTrainedModel:
    """The policy's weights, partitioned on the way in when a ZeRO-3 config is alive.

    Args:
        quantization: transformers' config of frozen weights that are quantized as they load; see models/adapter.py.

    Raises:
        ConfigError: the files do not hold the whole model that config.json speaks of.
    """
    folder = Path(source.path) if Path(source.path).is_dir() else snapshot(source, local_files_only=is_offline_mode())
    config = check_config(source)
    check_tensors(source, folder, config)
    model = (class_beside_auto(config) or AutoModelForCausalLM).from_pretrained(
        folder,
        dtype=source.dtype,
        trust_remote_code=source.trust_remote_code,
        attn_implementation=source.attn_implementation,
        use_safetensors=True,
        **({} if quantization is None else {"quantization_config": quantization}),
    )
    _forget_unused_renamings(model)
    return model


def _forget_unused_renamings(model: Any) -> None:
    """Keep of the table that translated a folder's key names what it was used for, as ``from_pretrained`` does but under ZeRO-3:
    ``save_pretrained`` turns all of it around, and would write ``language_model.model.model`` for names that were in order."""
    table = getattr(model, "_weight_conversions", None)
    if table is not None:
        model._weight_conversions = [renaming for renaming in table if renaming.was_used()]


def _check_trainable(policy: ReferenceSource, config: PretrainedConfig, args: MRPOConfig) -> None:
    """Raises ConfigError where the policy's weights are quantized, or its class lacks what the arguments ask of it."""
    if quantization_of(config) is not None:
        raise ConfigError(
            f"policy: {policy.path} is quantized, and all weights of a policy are trained; name the unquantized model that it was "
            "made from (a reference may be quantized)."
        )
    if args.checkpoints_activations:
        check_checkpointing(class_of(policy, config))
    if args.router_aux_loss_coef and not has_router_loss(class_of(policy, config)):
        raise ConfigError(
            f"`router_aux_loss_coef: {args.router_aux_loss_coef}` has no meaning for the policy: transformers has no such loss "
            f"for {class_of(policy, config).__name__}; leave it out."
        )


def check_checkpointing(policy_class: type[PreTrainedModel]) -> None:
    """Raises ConfigError where a policy's class has no activation checkpointing, which is on unless a recipe says otherwise."""
    if not policy_class.supports_gradient_checkpointing:
        raise ConfigError(
            f"`gradient_checkpointing: true` (the default) does not work for the policy: {policy_class.__name__} has no activation "
            "checkpointing; set `gradient_checkpointing: false`."
        )


def disable_dropout(model: nn.Module) -> list[tuple[PretrainedConfig, str, float]]:
    """Set every dropout probability of ``model`` to 0: of the dropout modules, of the numbers that other modules keep, and of the
    configs that some read in their forward.

    Returns:
        (config, key, value it had) of each value that was set in a config: what is saved gets them back.
    """
    configs: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        is_dropout = "drop" in type(module).__name__.lower()  # nn's, and those that models bring
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (is_dropout and name == "p")):
                setattr(module, name, 0.0)
            elif isinstance(value, PretrainedConfig):
                configs[id(value)] = value
    replaced = []
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, float) and value and "drop" in name:
                setattr(config, name, 0.0)
                replaced.append((config, name, value))
    return replaced


@contextmanager
def original_dropout(replaced: Sequence[tuple[PretrainedConfig, str, float]]) -> Iterator[None]:
    """Inside the block the configs say what they said before :func:`disable_dropout`."""
    for config, name, value in replaced:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in replaced:
            setattr(config, name, 0.0)


def write_weights(model: PreTrainedModel, folder: Path, *, is_main: bool) -> None:
    """Write a loaded model's weights as safetensors; under ZeRO-3 they are gathered one parameter at a time. Collective."""
    _forget_unused_renamings(model)
    weights = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                full = parameter.detach().cpu().clone() if is_main else None
        else:
            full = parameter.detach().cpu()
        if is_main:
            weights[name] = full
    if is_main:
        with unvalidated_generation_config(model):
            model.save_pretrained(folder, state_dict=weights)
    barrier()


def _source(spec: ModelSpec, args: MRPOConfig, dtype: torch.dtype, name: str = "policy") -> ReferenceSource:
    return ReferenceSource(
        name=name,
        path=spec.model,
        revision=spec.revision,
        dtype=dtype,
        trust_remote_code=spec.trust_remote_code,
        attn_implementation=spec.attn_implementation or args.attn_implementation,
        quantize=spec.quantize,
        server=Server(spec.url, spec.server, spec.api_key_env, spec.concurrency) if spec.url else None,
        adapter=ReferenceSource(name, spec.adapter) if spec.adapter else None,
    )


def _warn_of_served_anchor(spec: ModelSpec) -> None:
    if spec.url:
        logger.warning(
            "anchor: %s is scored by a server, whose kernels round otherwise than the policy's: at the start the policy's rewards "
            "against it are not 0, and the trust region has the wrong centre, by the precision that `mrpo inspect` prints, summed "
            "over a response. For the policy's own starting weights leave `anchor` out; other references bear it.",
            spec.model,
        )


def _names(specs: Sequence[ModelSpec]) -> list[str]:
    """``anchor``, then each reference's own name or its path's last part; numbered where two are alike."""
    names = [ANCHOR]
    for spec in specs:
        name = base = spec.short_name
        n = 1
        while name in names:
            n += 1
            name = f"{base}-{n}"
        names.append(name)
    return names


def load_tokenizer(spec: ModelSpec, name: str = "policy") -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(
            spec.model,
            revision=None if spec.url else spec.revision,
            trust_remote_code=spec.trust_remote_code,
        )
    except Exception as error:
        raise ConfigError(f"{name}: no tokenizer could be read from `{spec.model}`: {one_line(error)}") from error


def _text(
    spec: ModelSpec, args: MRPOConfig, tokenizer: PreTrainedTokenizerBase, config: Any, name: str = "policy"
) -> ModelText:
    return ModelText(
        tokenizer,
        name=name,
        max_context=getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None,
        chat_template=spec.chat_template,
        plain_template=args.plain_template,
        system=spec.system,
        date=datetime.date.fromisoformat(args.template_date) if args.template_date else datetime.date.today(),
    )


def shared_tokenization(texts: list[ModelText], text: ModelText) -> int:
    """Index of ``text`` among the distinct tokenizations; models of one family read the same tokens, so they share one."""
    key = (text.fingerprint(), text.max_context)
    for i, known in enumerate(texts):
        if (known.fingerprint(), known.max_context) == key:
            return i
    texts.append(text)
    return len(texts) - 1


def num_embeddings(config: Any) -> int | None:
    """Rows of a model's embedding, of a wrapper's text model; None where its config does not say. A padded vocabulary has more rows
    than the tokenizer has tokens."""
    return getattr(config.get_text_config(), "vocab_size", None)


def pad_token_id(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> int:
    """Any id that the model has a row for does: padding is masked and never scored."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in ids if i is not None and (rows is None or i < rows)), 0)
