"""A tiny model of any causal type that the installed transformers knows, made by the names of its config's attributes.

No list of families: a type that a new version brings is tried like the others. What cannot be built says why.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY, WINDOW, DROPOUT = 96, 8, 0.1

# First match wins; matched against whole names. None leaves the default.
_SIZES: list[tuple[str, Any]] = [
    (r".*(token_id|token_index|_id|_idx)|qk_head_dim", None),
    (r"(.*_)?vocab_size(_.*)?|n_words|unpadded_vocab_size", VOCABULARY),
    (r"num_kv_shared_layers", 0),
    (r"index_n_heads", 32),  # of few, all can be silent for some keys: equal scores, of which topk takes any
    (
        r"(n|num|mamba_n|mamba_num|ssm_n)_?groups?|n_group|num_group|topk_group|n_shared_experts|first_k_dense_replace",
        1,
    ),
    (r"rotary_dim|qk_rope_dim|qk_rope_head_dim|qk_pos_emb_head_dim", "rope"),
    (r"attention_hidden_size", "double"),
    (r"(.*_)?(head_dim|head_size|d_kv|key_dim|value_dim)", "head"),
    (r"(.*_)?(num|n)_?(key_value|kv)_?(heads?|groups).*", "kv"),
    (r"(.*_)?(num|n)_?(attention_|attn_|query_)?heads?|(encoder|decoder)_attention_heads", "heads"),
    (
        r"(.*_)?(num|n)_(hidden_)?layers?|(encoder|decoder)_layers|layers|num_(encoder|decoder)_layers|num_blocks",
        "layers",
    ),
    (r"(.*_)?(hidden_size|n_embd|d_model|hidden_dim|embed_dim|emb_dim|dim|embedding_size|dim_model)", "hidden"),
    (r"word_embed_proj_dim|rnn_width|lru_width|hidden_size_per_layer_input", "hidden"),
    (r"(.*_)?(intermediate_size|d_ff|ffn_dim|n_inner|d_inner|dim_ff|ffn_size|intermediate_dim)(_.*)?", "ffn"),
    (r"(.*_)?(shared_expert_size|expert_dim|ffn_hidden_size)(_.*)?", "ffn"),
    (r"(.*_)?(sliding_window|window_size|attention_window|attention_chunk_size|attn_chunk_length)(_.*)?", WINDOW),
    (r"index_topk(_.*)?", WINDOW),
    (r"(?!chunk_size_feed)(.*_)?chunk_size(_.*)?", WINDOW),
    (r"(.*_)?(lora_rank|_rank|low_rank_dim|rank|state_size|d_state|ssm_state)", 8),
    (r"(.*_)?(num_experts_per_tok(en)?|moe_topk|moe_k|top_k|num_selected_experts|top_k_experts)", "top"),
    (r"(.*_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)", 4),
    (r"(.*_)?(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|max_target_positions)", 512),
]
_LAYER_LIST = r"(.*_)?(layers?_types?|layers_block_type|block_types|layers?|attn_layers)(_.*)?"
# Tried in this order until one builds and runs.
_SHAPES: list[dict[str, int]] = [
    {"hidden": 32, "heads": 4, "kv": 2, "head": 8, "rope": 8, "ffn": 48, "layers": 2, "top": 2},
    {"hidden": 32, "heads": 4, "kv": 4, "head": 8, "rope": 8, "ffn": 64, "layers": 4, "top": 1},
    {"hidden": 32, "heads": 4, "kv": 4, "head": 16, "rope": 8, "ffn": 64, "layers": 4, "top": 2},
    {"hidden": 64, "heads": 4, "kv": 4, "head": 16, "rope": 8, "ffn": 64, "layers": 6, "top": 2},
]
# What a type's constructor leaves unset, or sizes that must fit each other.
_NEEDS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_key_value_heads": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    **{  # thirds of a head's rotary half, which have to fit its size
        f"{kind}_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
        for kind in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "glm4v", "glm_ocr")
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        }
    },
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "num_hidden_layers": 8,
        "layers_block_type": ["mamba", "hybrid"] * 4,
        "hybrid_layer_ids": [1, 3, 5, 7],
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "num_mem_blocks": 2,
        "adapter_rank": 4,
        "num_key_value_heads": 4,
    },
}


def causal_types() -> list[str]:
    """Model types that ``AutoModelForCausalLM`` builds."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def wrapper_types() -> list[str]:
    """Model types that ``AutoModelForImageTextToText`` builds."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def tiny_model(
    model_type: str, dropout: float = 0.0, seed: int = 0, auto: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """A random model in eval mode, its windows of ``WINDOW`` tokens and every dropout of its config at ``dropout``.

    Raises:
        RuntimeError: none could be built that runs, with the first reason.
    """
    reasons = []
    for shape in _SHAPES:
        try:
            model = _build(model_type, shape, dropout, seed, auto)
            ids = torch.arange(10, 30)[None]
            logits = model(input_ids=ids, use_cache=False).logits
            if logits.shape[:2] != ids.shape or not torch.isfinite(logits).all():
                raise RuntimeError(f"gives logits of shape {list(logits.shape)}, or not finite ones")
        except Exception as error:  # noqa: BLE001 (any: it is reported)
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")
        else:
            return model
    raise RuntimeError(reasons[0])


@torch.no_grad()
def _build(model_type: str, shape: dict[str, int], dropout: float, seed: int, auto: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = shrunken(CONFIG_MAPPING[model_type], shape, dropout)
    text_config = config.get_text_config()
    for one in {id(config): config, id(text_config): text_config}.values():
        if hasattr(one, "is_decoder"):
            one.is_decoder = True  # BERT's kin are causal only then
    with torch.device("meta"):
        meta = auto.from_config(config)
    size = sum(p.numel() for p in meta.parameters())
    if size > 8_000_000:
        raise RuntimeError(f"has {size:,} parameters after shrinking")
    model = auto.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:  # far from the initialisation, so that attention is not uniform
            parameter.normal_(0, 0.15)
    return model


def shrunken(config_class: type[PretrainedConfig], shape: dict[str, int], dropout: float) -> PretrainedConfig:
    """``config_class`` with every size made small that its constructor or its defaults name."""
    default = config_class()
    changes: dict[str, Any] = {}
    for key, value in _own_values(default):
        if isinstance(value, PretrainedConfig):
            changes[key] = shrunken(type(value), shape, dropout).to_dict()
            continue
        new = _smaller(key, value, shape)
        if new is not None:
            changes[key] = new
        elif isinstance(value, float) and "drop" in key:
            changes[key] = dropout
        elif re.fullmatch(r".*_token_(id|index)", key) and isinstance(value, int) and value >= VOCABULARY:
            changes[key] = VOCABULARY - 1
    return config_class(**{**changes, **_NEEDS.get(default.model_type, {})})


def _own_values(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    hidden = {"transformers_version", "architectures", "model_type", "dtype", "id2label", "label2id", "problem_type"}
    named = set(inspect.signature(type(config).__init__).parameters) | set(vars(config))
    for key in sorted(named - hidden):
        key = config.attribute_map.get(key, key)
        try:
            value = getattr(config, key)
        except AttributeError:  # an argument that is not kept
            continue
        except Exception:  # noqa: BLE001 (one for each layer: any number of the kind does)
            value = 0
        if not key.startswith("_"):
            yield key, value


def _smaller(key: str, value: Any, shape: dict[str, int]) -> Any:
    if value and isinstance(value, (list, tuple)) and re.fullmatch(_LAYER_LIST, key):
        kinds = list(dict.fromkeys(value))  # each kind at least once, where there are layers enough
        return [kinds[i % len(kinds)] for i in range(shape["layers"])]
    unset = value is None and key in ("head_dim", "num_key_value_heads", "num_experts_per_tok")
    if isinstance(value, bool) or not (isinstance(value, int) or unset):
        return None
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, key):
            return (
                None
                if size is None
                else {**shape, "double": 2 * shape["hidden"]}[size]
                if isinstance(size, str)
                else size
            )
    return None
