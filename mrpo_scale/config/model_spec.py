"""A model as a recipe names it, before any file of it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mrpo_scale.base.endpoint import check_url, is_variable, read_key
from mrpo_scale.base.errors import ConfigError, check_one_of
from mrpo_scale.base.untrusted import parse_json

DTYPES = ("auto", "float32", "bfloat16", "float16")
SYSTEM_TURNS = ("native", "merge", "error")
QUANTIZATIONS = ("nf4", "int8")
SERVERS = ("auto", "vllm", "sglang")
SERVER_EXAMPLE = "http://host:8000/v1"


@dataclass(frozen=True)
class ModelSpec:
    """One model as a recipe names it. A reference is written as its path or as a mapping of these keys.

    Args:
        adapter: a folder or hub id of a LoRA adapter of ``model``, whose weights are shared with other references on it.
        quantize: nf4 or int8: a reference's linear layers are quantized as they load, by bitsandbytes.
        url: of a server that scores with the model, which then is not loaded here; ``model`` is what the server calls it.
        tokenizer: of a served model, whose folder may not be here: a folder or hub id.
        revision: of the hub; of a served model, the user's own word for the weights that are behind the name.
        server: whose requests the server takes; auto: as its list of models says.
        api_key_env: the environment variable that holds the server's key.
        concurrency: requests to the server at the same time.
    """

    model: str
    name: str = ""
    revision: str | None = None
    dtype: str = "auto"
    chat_template: str | None = None
    system: str = "native"
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    quantize: str | None = None
    adapter: str | None = None
    url: str | None = None
    tokenizer: str | None = None
    server: str = "auto"
    api_key_env: str | None = None
    concurrency: int = 8

    @property
    def tokenizer_from(self) -> str:
        """The folder or hub id of the tokenizer."""
        return self.tokenizer or self.model

    @property
    def short_name(self) -> str:
        """Its own name, or the last part of the path of what sets it apart."""
        return self.name or Path(self.adapter or self.model).name


#: What is wrong with a served reference (its name) that would have to score the window of a step.
LIVE_SERVED = (
    "`ref_scoring: live`: {} is served elsewhere, and no step waits for a server; set `ref_scoring: precompute`, or `follow` "
    "beside `mrpo score`"
)
#: What makes no sense for a model that is served elsewhere, and what for one that is loaded here.
_OF_WEIGHTS = ("dtype", "trust_remote_code", "attn_implementation", "quantize", "adapter")
_OF_SERVERS = ("tokenizer", "server", "api_key_env", "concurrency")
_TYPES = {
    "trust_remote_code": (bool, "true or false, without quotes"),
    "concurrency": (int, "a whole number of 1 or more"),
}


def server_key(url: str, api_key_env: str | None) -> str | None:
    """The API key of a server; None where it wants none. Raises ConfigError where it is missing or cannot be sent safely."""
    parts = check_url(url, "ref_models.url", SERVER_EXAMPLE)
    if api_key_env is None:
        return None
    return read_key(api_key_env, key="ref_models.api_key_env", url_key="ref_models.url", parts=parts, required=True)


def parse_ref_models(ref_models: Sequence[str | Mapping[str, Any]], key: str = "ref_models") -> list[ModelSpec]:
    """Models as typed under ``key``: paths, hub ids, mappings, or mappings as JSON text (how the command line carries them).

    Raises:
        ConfigError: an unknown key of a mapping, or a mapping without ``model``.
    """
    known = {f.name for f in fields(ModelSpec)}
    specs: list[ModelSpec] = []
    for entry in ref_models:
        values: Any = entry
        if isinstance(entry, str):
            try:
                values = parse_json(entry) if entry.lstrip().startswith("{") else {"model": entry}
            except ValueError as error:
                raise ConfigError(f"`{key}: {entry}` is not a model name nor a JSON mapping: {error}.") from None
        if not isinstance(values, Mapping):
            what = type(entry).__name__  # not its text: a loaded model's is a page long
            raise ConfigError(
                f"`{key}` holds a {what}; write a folder, a hub id, or a mapping with `model`. A loaded model goes to a folder "
                "first, with save_pretrained (its tokenizer too)."
            )
        shown = {
            k: v for k, v in values.items() if k in known and k != "api_key_env"
        }  # a key may be typed in any place
        unknown = set(values) - known
        if unknown or "model" not in values:
            problem = f"unknown key `{min(unknown)}`" if unknown else "key `model` is missing"
            raise ConfigError(f"`{key}: {shown}`: {problem}; known keys are {', '.join(sorted(known))}.")
        values = {k: v for k, v in values.items() if v is not None}
        for k, value in values.items():
            # Not the truth of the value: the text "false" is true, and would let the model's code run.
            wanted, what = _TYPES.get(k, (str, "text"))
            if type(value) is not wanted or (type(value) is int and value < 1):
                raise ConfigError(f"`{key}.{k}: {value!r}` must be {what}.")
        _check_served(key, values)
        spec = ModelSpec(**values)
        check_one_of(f"{key}.dtype", spec.dtype, DTYPES)
        check_one_of(f"{key}.system", spec.system, SYSTEM_TURNS)
        check_one_of(f"{key}.server", spec.server, SERVERS)
        if spec.quantize is not None:
            check_one_of(f"{key}.quantize", spec.quantize, QUANTIZATIONS)
        specs.append(spec)
    return specs


def _check_served(key: str, values: Mapping[str, Any]) -> None:
    """Raises ConfigError where the keys of a mapping are not all of a served model, or not all of one that is loaded here."""
    url = values.get("url")
    wrong = sorted(set(values) & set(_OF_WEIGHTS if url else _OF_SERVERS))
    if wrong:
        whose = (
            "is the server's to decide; remove it" if url else "is for a model that is served elsewhere; name its `url`"
        )
        raise ConfigError(f"`{key}.{wrong[0]}` {whose}.")
    if not url:
        return
    check_url(url, f"{key}.url", SERVER_EXAMPLE)
    if "?" in url or "#" in url:
        raise ConfigError(f"`{key}.url` has a query, which may hold a key; name the address alone, and `api_key_env`.")
    for k, why in (
        ("tokenizer", "the folder or hub id of its tokenizer: token ids are sent, not text"),
        (
            "revision",
            "a word of yours for the weights behind that name, which the score cache goes by: another word, other scores",
        ),
    ):
        if not values.get(k):
            raise ConfigError(f"`{key}.{k}` is missing for {values['model']} at {url}; give {why}.")
    if not is_variable(values.get("api_key_env", "_")):
        raise ConfigError(
            f"`{key}.api_key_env` must be the name of an environment variable; what it got is not shown, as it may be the key."
        )
