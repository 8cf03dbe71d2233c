"""The models to evaluate, before any weights load: where they lie, how they read text, which of them share a tokenization."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mrpo_scale.base.errors import refuse
from mrpo_scale.base.ranks import broadcast_from_rank0, world_group
from mrpo_scale.config.model_spec import ModelSpec, parse_ref_models
from mrpo_scale.data.tokenization import ModelText, TextReader
from mrpo_scale.data.toy_world import resolve
from mrpo_scale.eval.config import EvalConfig
from mrpo_scale.lifecycle.template_date import first_recorded
from mrpo_scale.models.plan import load_tokenizer, num_embeddings, pad_token_id, shared_tokenization
from mrpo_scale.models.source import ReferenceSource, resolve_source
from mrpo_scale.models.tensor_check import check_model


@dataclass(frozen=True)
class EvalModel:
    """One model to evaluate. ``tokenization`` is its place among the distinct texts of the run."""

    source: ReferenceSource
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    text: ModelText
    tokenization: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def pad_token_id(self) -> int:
        return pad_token_id(self.tokenizer, self.reader.num_embeddings)

    @property
    def reader(self) -> TextReader:
        return TextReader(self.name, self.tokenization, num_embeddings(self.config))

    def fingerprint(self) -> str:
        """Hex digest of what decides a response of this model: its weights (a local folder's by size and time of change, a hub
        snapshot's by commit), its text and its dtype."""
        folder = Path(self.source.path)
        if folder.is_dir():
            files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
            weights = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        else:
            weights = [[self.source.path, self.source.commit]]
        parts = [weights, self.text.fingerprint(), str(self.source.dtype), self.source.attn_implementation]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def plan_models(args: EvalConfig, device: torch.device) -> tuple[list[EvalModel], EvalModel | None, list[ModelText]]:
    """(the models, the reference, the distinct tokenizations, the first model's first).

    Raises:
        ConfigError: a model that is missing, has no safetensors, wants remote code, or has no fast tokenizer.
    """
    if args.template_date is None:
        args.template_date = broadcast_from_rank0(first_recorded([Path(args.output_dir)]), world_group())
    specs = parse_ref_models(list(args.model), "model")
    reference = parse_ref_models([args.reference], "reference") if args.reference else []
    served = [spec for spec in [*specs, *reference] if spec.url]
    refuse([f"`{spec.model}` at {spec.url}: a served model is not evaluated; name its folder" for spec in served])
    parts = [(spec, key, getattr(spec, key)) for spec in [*specs, *reference] for key in ("quantize", "adapter")]
    remedies = {"quantize": "remove it", "adapter": "make one of it with `mrpo merge`"}
    refuse(
        [
            f"`{spec.model}` with `{key}: {value}`: whole models are evaluated; {remedies[key]}"
            for spec, key, value in parts
            if value
        ]
    )
    texts: list[ModelText] = []
    models = [
        _plan(spec, name, args, device, texts)
        for spec, name in zip([*specs, *reference], [*_names(specs), *["reference"] * len(reference)], strict=True)
    ]
    return models[: len(specs)], models[-1] if reference else None, texts


def _plan(spec: ModelSpec, name: str, args: EvalConfig, device: torch.device, texts: list[ModelText]) -> EvalModel:
    dtype = spec.dtype if spec.dtype != "auto" else args.dtype
    source = resolve_source(
        ReferenceSource(
            name=name,
            path=resolve(spec.model),
            revision=spec.revision,
            dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=spec.trust_remote_code,
            attn_implementation=spec.attn_implementation or args.attn_implementation,
        )
    )
    config = check_model(source)
    if dtype == "auto" and device.type != "cpu":
        source = replace(source, dtype=getattr(config, "dtype", None) or torch.float32)
    tokenizer = load_tokenizer(replace(spec, model=source.files), name)
    text = ModelText(
        tokenizer,
        name=name,
        max_context=getattr(config.get_text_config(), "max_position_embeddings", None),
        chat_template=spec.chat_template,
        plain_template=args.plain_template,
        system=spec.system,
        date=datetime.date.fromisoformat(str(args.template_date)),
    )
    return EvalModel(source, config, tokenizer, text, shared_tokenization(texts, text))


def _names(specs: Sequence[ModelSpec]) -> list[str]:
    """Each model's own name or its path's last part; where two are alike the whole path, and a number at the last."""
    short = [spec.short_name for spec in specs]
    names: list[str] = []
    for spec, name in zip(specs, short, strict=True):
        base = name if short.count(name) == 1 else spec.name or spec.model
        n, name = 1, base
        while name in names:
            n += 1
            name = f"{base}-{n}"
        names.append(name)
    return names
