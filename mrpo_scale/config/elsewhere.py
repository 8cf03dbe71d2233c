"""A recipe that is read on a machine that will not train it."""

from __future__ import annotations

from dataclasses import dataclass

from mrpo_scale.config.keys import MRPOConfig


@dataclass
class ConfigElsewhere(MRPOConfig):
    """A recipe's keys on a machine that will not train: what it lacks, and who launched it, say nothing of the run's."""

    def _join(self) -> None:
        asked = {key: getattr(self, key) for key in ("use_cpu", "tf32", "deepspeed", "ddp_backend")}
        self.use_cpu, self.tf32, self.deepspeed, self.ddp_backend = True, None, None, None
        self._fill_in()
        for key, value in asked.items():
            setattr(self, key, value)
