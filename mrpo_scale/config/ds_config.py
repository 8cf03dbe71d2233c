"""DeepSpeed's JSON configurations: where one is, by its path or by its name in the package, and what it says."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.untrusted import parse_json, read_json


def resource(kind: str) -> Path:
    """Folder of the recipes, accelerate configs (``launch/accelerate``) or ds_configs: in the clone, or as installed."""
    here = Path(__file__).parents[1]
    return here / kind if (here / kind).is_dir() else here.parent / kind


def find_ds_config(name: str, key: str = "deepspeed:") -> str:
    """``name`` as transformers takes it, the path written out where it is a configuration of the package (zero3, zero2, ...).

    Args:
        name: a path, a name of the package, JSON text, or JSON text in base64.

    Raises:
        ConfigError: none of those, or one that is no JSON mapping.
    """
    found = name
    if not name.lstrip().startswith("{") and _from_base64(name) is None:
        shipped = resource("ds_configs")
        path = next((p for p in (Path(name), shipped / name, shipped / f"{name}.json") if p.is_file()), None)
        if path is None:
            known = ", ".join(sorted(p.stem for p in shipped.glob("*.json")))
            raise ConfigError(f"`{key} {name}` is no file and no ds_config of the package; those are {known}.")
        found = str(path)
    read_ds_config(found)
    return found


def read_ds_config(config: str | dict[str, Any]) -> dict[str, Any]:
    """What a configuration says: a mapping, or what :func:`find_ds_config` returns. Raises ConfigError where it says nothing."""
    try:
        if isinstance(config, dict):
            return _checked(config)
        text = config if config.lstrip().startswith("{") else _from_base64(config)
        return _checked(read_json(Path(config)) if text is None else parse_json(text))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config}, the DeepSpeed config, {error}; correct it or name another.") from None


def check_sharding(settings: dict[str, Any], ranks: int, per_node: int) -> None:
    """How a configuration divides the policy, against the ranks that it is for.

    Args:
        settings: what :func:`read_ds_config` returns.
        per_node: ranks of a node, of which all have equally many.

    Raises:
        ConfigError: MiCS or tensor parallelism, or second copies of the weights (hpZ) in groups that nodes are not made of.
    """
    zero = settings.get("zero_optimization") or {}
    for key in zero:
        if key.startswith("mics_"):
            raise ConfigError(
                f"`zero_optimization.{key}: {zero[key]}`: DeepSpeed 0.19 has no MiCS; remove `{key}` and set "
                "`zero_hpz_partition_size` to the ranks of a node (ds_configs/zero3_hpz.json)."
            )
    if (split := (settings.get("tensor_parallel") or {}).get("autotp_size", 0)) > 1:
        raise ConfigError(
            f"`tensor_parallel.autotp_size: {split}` of the DeepSpeed file is not supported: the output head and attention here "
            "need whole layers (docs/limits.md); remove `tensor_parallel` and take a file of ds_configs/."
        )
    size = zero.get("zero_hpz_partition_size", 1)
    if type(size) is not int or size < 0:
        raise ConfigError(f"`zero_hpz_partition_size: {size}` must be a whole number, the ranks of a node; 1 is none.")
    for what, number in (("the ranks of a node", per_node), ("the ranks of the run", ranks)):
        if size > 1 and number % size:
            divisors = ", ".join(str(n) for n in range(1, number + 1) if number % n == 0 and ranks % n == 0)
            raise ConfigError(
                f"`zero_hpz_partition_size: {size}` does not divide {number}, {what}; set one of {divisors}."
            )


def _checked(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError("is no JSON mapping")
    if not isinstance(values.get("zero_optimization", {}), dict):
        raise ValueError(
            f"has `zero_optimization: {values['zero_optimization']}`, which must be a mapping with `stage`"
        )
    return values


def _from_base64(text: str) -> str | None:
    """JSON text that was given in base64, as transformers takes it; None where ``text`` is none."""
    try:
        decoded = base64.urlsafe_b64decode(text).decode()
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None
