"""`mrpo train` under ZeRO-3 as forked ranks, with a record of what every rank did that outlives it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.distributed.jobs import ROOT
from tests.tiny import pair_rows, write_models

ROWS = 38  # windows of 4 pairs: 9 full ones and one of 2
EPOCHS = 2
WINDOW = 4
STEPS = EPOCHS * -(-ROWS // WINDOW)
#: What `accelerate launch --config_file launch/accelerate/cpu_zero3.yaml` sets besides ranks and addresses.
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "ds_configs" / "zero3_cpu.json"),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
}


def write_recipe(folder: Path, **keys: Any) -> list[str | Path]:
    """The words of `mrpo train` for a K=3 run, without `--output_dir`. The policy has dropout: a lost random state shows."""
    models = write_models(folder)
    config = Path(models["gpt_neox"]) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_dropout": 0.1}))
    for name, rows in (("pairs", pair_rows(ROWS)), ("held-out", pair_rows(6, seed=1))):
        (folder / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "data.jsonl").write_text(lines)
    data = folder / "data"
    data.mkdir()
    for split, name in (("train", "pairs"), ("test", "held-out")):
        shutil.move(folder / name / "data.jsonl", data / f"{split}.jsonl")
    recipe = {
        "model_name_or_path": models["gpt_neox"],
        "ref_models": [models["llama"], models["qwen2"]],
        "dataset_name": str(data),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "disable_dropout": False,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 7,
        "per_device_eval_batch_size": 1,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_timeout": 60,
        "seed": 5,
        **keys,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return ["train", "--config", folder / "recipe.yaml"]


def final_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "model.safetensors")


MEASURED = ("time/", "tokens_per_second", "_runtime", "_per_second")


def final_log(output_dir: Path) -> list[dict[str, Any]]:
    """What the finished run logged, without the stopwatch."""
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if not any(part in k for part in MEASURED)} for entry in log]


def read_lines(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """JSON lines of several files; a kill may have cut the last one of each."""
    rows = []
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


# --- in the ranks


class Recorder:
    """Appends what this rank does to a file of its own."""

    def __init__(self, folder: str) -> None:
        self.folder, self.rank = Path(folder), int(os.environ.get("RANK", "0"))

    def append(self, kind: str, **values: Any) -> None:
        with open(self.folder / f"{kind}-{self.rank}.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")


def record(folder: str) -> Recorder:
    """Every micro-batch: its step, rows and loss; once per life: the state of the optimizer right before the first step."""
    from transformers import TrainerCallback

    from mrpo_scale.training.trainer import MRPOTrainer

    recorder = Recorder(folder)
    compute_loss = MRPOTrainer.compute_loss

    def recorded(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        rows = [row for row, weight in zip(inputs.rows, inputs.weight_P.tolist(), strict=True) if weight]
        recorder.append("trained", step=self.state.global_step, rows=rows, loss=loss.item())
        return loss

    class OptimizerState(TrainerCallback):
        def __init__(self, trainer: Any) -> None:
            self.trainer = trainer

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = self.trainer.deepspeed.optimizer.optimizer
            states = list(optimizer.state.values())
            steps = [found["step"] for found in states]
            squares = {
                key: sum(found[key].double().square().sum().item() for found in states)
                for key in ("exp_avg", "exp_avg_sq")
            }
            shared = len(steps) - len({id(step) for step in steps})
            recorder.append(
                "optimizer", step=state.global_step, steps=list(map(float, steps)), shared=shared, **squares
            )

    made = MRPOTrainer.__init__

    def with_callback(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.add_callback(OptimizerState(self))

    MRPOTrainer.compute_loss, MRPOTrainer.__init__ = recorded, with_callback  # type: ignore[method-assign]
    return recorder


def interrupt(folder: str, output_dir: str, how: str, step: int) -> None:
    """Record, and ask to stop once: `STOP` or SIGTERM while step ``step`` (from 0) runs, STOP amid the evaluation after it."""
    from mrpo_scale.training.trainer import MRPOTrainer

    recorder = record(folder)
    measure, compute_loss, measured = MRPOTrainer.prediction_step, MRPOTrainer.compute_loss, []

    def in_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == step:
            if how == "STOP" and recorder.rank == 0:
                (Path(output_dir) / "STOP").touch()
            if how == "SIGTERM" and recorder.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    def in_evaluation(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step and how == "evaluation":
            measured.append(1)
            if len(measured) == 2 and recorder.rank == 0:
                (Path(output_dir) / "STOP").touch()
        return measure(self, *args, **kwargs)

    MRPOTrainer.compute_loss, MRPOTrainer.prediction_step = in_step, in_evaluation  # type: ignore[method-assign]


class _WhileSaving:
    """Counts what this rank does to the files of checkpoints, and ends the process right before the n-th of it."""

    def __init__(self, recorder: Recorder, die_at: int | None) -> None:
        self.recorder, self.die_at, self.count = recorder, die_at, 0

    def event(self, what: str) -> None:
        self.count += 1
        if self.die_at is None:
            self.recorder.append("saving", what=what)
        elif self.count == self.die_at:
            self.recorder.append("died", what=what)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.link", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        path = str(args[0])
        writes = event != "open" or (isinstance(args[1], str) and set(args[1]) & set("wax+"))
        if "checkpoint-" in path and writes:
            self.event(f"{event} {Path(path).name}")

    def save(self, torch_save: Any) -> Any:
        """torch.save, whose writing no audit event tells of, and the moment when half of the file is written."""

        def saved(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
            if "checkpoint-" not in str(f):
                return torch_save(obj, f, *args, **kwargs)
            self.event(f"torch.save {Path(f).name}")
            torch_save(obj, f, *args, **kwargs)
            if self.die_at == self.count + 1:
                os.truncate(f, Path(f).stat().st_size // 2)
            self.event(f"half of torch.save {Path(f).name}")
            return None

        return saved


def chaos(folder: str, die: tuple[int, int] | None = None) -> None:
    """Record; small parts of the score cache, so that many kills meet a half-stored window; death amid a checkpoint if asked for.

    Args:
        die: (rank, before which of its dealings with checkpoint files).
    """
    from mrpo_scale.references import scores
    from mrpo_scale.training.trainer import MRPOTrainer

    recorder = record(folder)
    part_writer, compute_loss = scores.PartWriter, MRPOTrainer.compute_loss
    scores.PartWriter = lambda store: part_writer(store, rows=3)  # type: ignore[assignment, misc]

    def begun(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not (Path(folder) / "begun").exists():
            (Path(folder) / "begun").touch()
        return compute_loss(self, *args, **kwargs)

    made = MRPOTrainer.__init__

    def starts(self: Any, *args: Any, **kwargs: Any) -> None:
        (Path(folder) / "starts").touch()
        made(self, *args, **kwargs)

    MRPOTrainer.compute_loss, MRPOTrainer.__init__ = begun, starts  # type: ignore[method-assign]
    saving = _WhileSaving(recorder, die[1] if die and die[0] == recorder.rank else None)
    if die is None or die[0] == recorder.rank:
        torch.save = saving.save(torch.save)
        sys.addaudithook(saving.audit)
