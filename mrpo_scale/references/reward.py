"""A reward model r(x, y), a sequence classifier with one label (Eq. 3), as a scorer of responses: a whole copy on every rank.

Not a :class:`~mrpo_scale.references.sharding.ShardedReference`: samples are scored by whoever drew them, so that no rank
waits for another.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from mrpo_scale.base.device import send
from mrpo_scale.base.errors import ConfigError, TrainingError, refuse
from mrpo_scale.base.ranks import world_group
from mrpo_scale.config.data_keys import PLAIN_TEMPLATE
from mrpo_scale.config.model_spec import ModelSpec, parse_ref_models
from mrpo_scale.data.dealing import cut_by_tokens
from mrpo_scale.data.pairs import BadRow, Message, PreferencePair
from mrpo_scale.data.tokenization import ModelText
from mrpo_scale.models.plan import load_tokenizer, num_embeddings
from mrpo_scale.models.source import (
    ReferenceSource,
    check_weights,
    folder_at_hand,
    local_folder,
    read_config,
    resolve_source,
    some,
)
from mrpo_scale.models.stored import build_on_meta, locate_tensors, stored_tensors, zero3_unset
from mrpo_scale.models.tensor_check import check_model

KEY = "reward_model"  #: what messages call it


@dataclass(frozen=True)
class PlannedReward:
    """A reward model that was found in order, before its weights load."""

    source: ReferenceSource
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    text: ModelText
    pad_token_id: int
    has_head: bool = True  #: False: a causal language model, to start from


def plan_reward(
    spec: str | Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    plain_template: str = PLAIN_TEMPLATE,
    date: datetime.date | None = None,
    to_train: bool = False,
) -> PlannedReward:
    """Check a reward model; of its weights only headers are read. Collective over the world where ``spec`` is a hub id.

    Args:
        dtype, plain_template, date: see :meth:`RewardModel.load`.
        to_train: a causal language model will do, too, and where there is no padding token the end of text stands for it.

    Raises:
        ConfigError: not a sequence classifier, another number of labels than one, no padding token, a tensor (the head first of
            all) that its files lack, no safetensors, code of its own without consent, or a key that only references have.
    """
    (named,) = parse_ref_models([spec], KEY)
    refuse([f"`{KEY}.{key}` is for references alone; remove it" for key in ("url", "quantize") if getattr(named, key)])
    name = named.name or "reward model"
    source = ReferenceSource(
        name=name,
        path=named.model,
        revision=named.revision,
        trust_remote_code=named.trust_remote_code,
        attn_implementation=named.attn_implementation,
    )
    source = resolve_source(source)
    config = read_config(source)
    has_head = _is_classifier(source, config)
    if has_head or not to_train:
        _check_labels(source, config, has_head)
    elif type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ConfigError(
            f"{name}: transformers has no sequence classifier of type {config.model_type!r}; choose another model."
        )
    source = replace(source, dtype=loading_dtype(named, config, device, dtype))
    if not has_head:
        check_model(source)
    elif folder_at_hand(source) is not None:
        _check_tensors(source, config)
    tokenizer = load_tokenizer(replace(named, model=source.files), name)
    pad_token_id = _pad_token_id(
        source, config, [tokenizer.pad_token_id, *([tokenizer.eos_token_id] if to_train else [])]
    )
    text = ModelText(
        tokenizer,
        name=name,
        max_context=getattr(config.get_text_config(), "max_position_embeddings", None),
        chat_template=named.chat_template,
        plain_template=plain_template,
        system=named.system,
        date=date,
    )
    return PlannedReward(source, config, tokenizer, text, pad_token_id, has_head)


class RewardModel:
    """Scores of responses by a reward model, frozen and in evaluation mode.

    Every rank holds a whole copy, and :meth:`scores` is not collective: each rank scores as many responses as it has. A live ZeRO-3
    configuration is hidden while it loads, which would partition it over ranks that do not score together.

    Attributes:
        text: how it reads prompts and responses.
    """

    def __init__(self, model: PreTrainedModel, text: ModelText, pad_token_id: int, tokens_per_forward: int) -> None:
        self.model, self.text = model, text
        self.pad_token_id, self.tokens_per_forward = pad_token_id, tokens_per_forward

    @classmethod
    def load(
        cls,
        spec: str | Mapping[str, Any],
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        tokens_per_forward: int = 16384,
        plain_template: str = PLAIN_TEMPLATE,
        date: datetime.date | None = None,
    ) -> RewardModel:
        """Load a folder or hub id, or a mapping of the keys that `ref_models` has. Collective over the world for a hub id only.

        Args:
            dtype: of the weights; None: float32 on a CPU, elsewhere what its config.json says.
            tokens_per_forward: most positions of a forward, padding among them.
            plain_template, date: see :class:`~mrpo_scale.data.model_text.ModelText`.

        Raises:
            ConfigError: see :func:`plan_reward`.
        """
        planned = plan_reward(spec, device=device, dtype=dtype, plain_template=plain_template, date=date)
        with zero3_unset():
            model = load_classifier(planned)
        return cls(
            model.requires_grad_(False).eval().to(device), planned.text, planned.pad_token_id, tokens_per_forward
        )

    @torch.no_grad()
    def scores(
        self,
        prompts: Sequence[list[Message] | str],
        responses: Sequence[str],
        cut: Sequence[bool] | None = None,
    ) -> Tensor:
        """r(x, y) [N], float32, of N prompts and a response to each, rendered by the model's own template, end of turn included.

        In float32 a score does not depend on what is scored beside it but for rounding (1e-6 of its size).

        Args:
            cut: which responses were cut, and so have no end of turn; None: none was.

        Raises:
            ConfigError: a conversation that its template rejects, or that is longer than its context.
            TrainingError: a score that is not finite.
        """
        cut = [False] * len(responses) if cut is None else cut
        samples = [sample_tokens(self.text, *sample) for sample in zip(prompts, responses, cut, strict=True)]
        return self.scores_of_ids([prompt + response for prompt, response in samples])

    @torch.no_grad()
    def scores_of_ids(self, ids: Sequence[list[int]]) -> Tensor:
        """:meth:`scores` of N whole texts in the model's tokens, prompt and response together. Raises TrainingError."""
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        device = self.model.device
        scores_N = torch.zeros(len(ids), device=device)
        for part in cut_by_tokens([len(ids[i]) for i in order], self.tokens_per_forward, padded=True):
            rows = [torch.tensor(ids[i]) for i in order[part]]
            ids_BL = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
            mask_BL = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            logits_B1 = self.model(input_ids=send(ids_BL, device), attention_mask=send(mask_BL, device)).logits
            scores_N[order[part]] = logits_B1[:, 0].float()
        if not scores_N.isfinite().all():
            bad = int((~scores_N.isfinite()).sum())
            raise TrainingError(
                f"{self.text.name}: {bad} of {len(ids)} scores are not finite; its weights are broken, or too large for its "
                "`dtype`: try float32."
            )
        return scores_N


def load_classifier(planned: PlannedReward) -> PreTrainedModel:
    """The model with one label; a head that ``planned`` lacks is drawn from torch's generator. Collective over the world for a hub
    id. Raises ConfigError where a download turns out to lack a tensor."""
    source, config = planned.source, planned.config
    folder = local_folder(source, world_group())
    if folder_at_hand(source) is None:
        downloaded = replace(source, path=str(folder))
        _check_tensors(downloaded, config) if planned.has_head else check_model(downloaded)
    config.num_labels = 1
    # The model reads the score off the last token that is not padding.
    config.get_text_config().pad_token_id, config.get_text_config().use_cache = planned.pad_token_id, False
    return AutoModelForSequenceClassification.from_pretrained(
        folder,
        config=config,
        dtype=source.dtype,
        trust_remote_code=source.trust_remote_code,
        attn_implementation=source.attn_implementation,
        use_safetensors=True,
    )


def sample_tokens(
    text: ModelText, prompt: list[Message] | str, response: str, cut: bool = False
) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of a response to it, as one model reads them; the response's end of turn included unless it was cut.

    Raises:
        ConfigError: the template rejects the conversation, or it is longer than the model's context.
    """
    try:
        reading = text.read(PreferencePair(prompt, response, response))
        tokens = text.ids(reading, (len(response) if cut else None,) * 2)
    except BadRow as error:
        raise ConfigError(f"{text.name}: a prompt cannot be rendered: {error}; give it a `chat_template`.") from error
    length = len(tokens.prompt_ids) + len(tokens.chosen_ids)
    if text.max_context is not None and length > text.max_context:
        raise ConfigError(
            f"{text.name}: a prompt and its response have {length} tokens, its context is {text.max_context}; generate fewer "
            "tokens, or name a model with a longer context."
        )
    return tokens.prompt_ids, tokens.chosen_ids


def loading_dtype(
    spec: ModelSpec, config: PretrainedConfig, device: torch.device, dtype: torch.dtype | None
) -> torch.dtype:
    """``dtype``, else what ``spec`` says, else float32 on a CPU and elsewhere what config.json says."""
    if dtype is None and spec.dtype != "auto":
        dtype = getattr(torch, spec.dtype)
    elif dtype is None and device.type != "cpu":
        dtype = getattr(config, "dtype", None)
    return dtype or torch.float32


def _is_classifier(source: ReferenceSource, config: PretrainedConfig) -> bool:
    """Whether config.json speaks of a sequence classifier that can be built here."""
    own_class = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if own_class and source.trust_remote_code:
        return True
    named = any(kind.endswith("ForSequenceClassification") for kind in _classes(config))
    return named and type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def _check_labels(source: ReferenceSource, config: PretrainedConfig, has_head: bool) -> None:
    remedy = "`mrpo reward` trains one, from a causal language model too"
    if not has_head:
        kind = some(_classes(config)) or f"model type {config.model_type!r}"
        raise ConfigError(
            f"{source.name}: {source.path} ({kind}) is not a sequence classifier, so it gives no reward; {remedy}."
        )
    if config.num_labels != 1:
        raise ConfigError(
            f"{source.name}: {source.path} has {config.num_labels} labels, and a reward is one number; name a model with one "
            f"label: {remedy}."
        )


def _classes(config: PretrainedConfig) -> list[str]:
    return [str(kind) for kind in getattr(config, "architectures", None) or []]


def _check_tensors(source: ReferenceSource, config: PretrainedConfig) -> None:
    """Raises ConfigError where a tensor is missing: ``from_pretrained`` would fill it with random numbers."""
    folder = folder_at_hand(source)
    assert folder is not None
    files = check_weights(folder, config, source.name)
    model = build_on_meta(source, config, AutoModelForSequenceClassification)
    stored = stored_tensors(model, files, source.name)
    body = f"{model.base_model_prefix}."
    absent = [name for name, _ in model.named_parameters() if not name.startswith(body) and name not in stored]
    if absent:
        raise ConfigError(
            f"{source.name}: {folder} lacks {some(absent)}, so its scores would come from random weights; train it with `mrpo "
            "reward`, or get the model again."
        )
    locate_tensors(model, files, source.name)


def _pad_token_id(source: ReferenceSource, config: PretrainedConfig, of_tokenizer: Sequence[int | None]) -> int:
    rows = num_embeddings(config)
    for token in (config.get_text_config().pad_token_id, *of_tokenizer):
        if token is not None and token >= 0 and (rows is None or token < rows):
            return token
    raise ConfigError(
        f"{source.name}: {source.path} has no padding token, which says where a response ends; set `pad_token_id` in its "
        "config.json as it was trained."
    )
