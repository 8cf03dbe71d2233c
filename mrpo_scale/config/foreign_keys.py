"""The trainers whose recipes can be converted, by the names that `mrpo convert --from` takes."""

from __future__ import annotations

from mrpo_scale.config.foreign import Trainer
from mrpo_scale.config.foreign_commands import MS_SWIFT, OPEN_INSTRUCT, OPENRLHF
from mrpo_scale.config.foreign_yaml import AXOLOTL, LLAMA_FACTORY

TRAINERS: dict[str, Trainer] = {
    "axolotl": AXOLOTL,
    "llama_factory": LLAMA_FACTORY,
    "open_instruct": OPEN_INSTRUCT,
    "openrlhf": OPENRLHF,
    "ms_swift": MS_SWIFT,
}
