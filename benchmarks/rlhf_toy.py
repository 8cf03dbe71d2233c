"""RLHF on three tiny models: the reward rises, and the K KL terms of Eq. 6 pull it back as beta grows. A picture and its numbers.

    python -m benchmarks.rlhf_toy [--steps 200] [--output benchmarks/results/rlhf-toy]

The models are those of the tests, and the reward model one of them with a random head: weights far from their initialisation, three
tokenizers. So the reward means nothing; what is shown is that its gradient is followed, and what beta does. Some minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mrpo_scale import MRPOConfig, MRPOTrainer
from tests.tiny import pair_dataset, write_models

BETAS = (0.01, 0.1, 0.3, 1.0)
WINDOW = 64  #: prompts of a step


def write_reward(folder: Path, base: str) -> str:
    """A classifier with ``base``'s body and a random head."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    with torch.no_grad():
        model.get_submodule("score").weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def curve(models: dict[str, str], reward: str, beta: float, steps: int, folder: Path) -> list[dict[str, float]]:
    """Of every step the mean reward of the samples and their KL to each reference."""
    args = MRPOConfig(
        output_dir=str(folder),
        objective="rlhf",
        reward_model=reward,
        beta=beta,
        ref_weights=["0.5", "0.25", "0.25"],
        max_completion_length=2,
        per_device_train_batch_size=WINDOW,
        max_steps=steps,
        learning_rate=1e-3,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = MRPOTrainer(models["llama"], [models["qwen2"], models["gpt_neox"]], args, pair_dataset(WINDOW))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "sampled/reward" in entry]
    return [
        {name: x for name, x in e.items() if name.startswith(("sampled/", "loss"))} | {"step": e["step"]}
        for e in entries
    ]


def smooth(values: Sequence[float], width: int = 10) -> list[float]:
    """Mean of each value and those before it, up to ``width``."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for i, (beta, entries) in enumerate(curves.items()):
        steps = [entry["step"] for entry in entries]
        colour = f"C{i}"
        left.plot(steps, smooth([e["sampled/reward"] for e in entries]), color=colour, label=f"beta {beta}")
        kl = [0.5 * e["sampled/kl/anchor"] + 0.25 * (e["sampled/kl/qwen2"] + e["sampled/kl/gpt_neox"]) for e in entries]
        right.plot(steps, smooth(kl), color=colour)
    left.set(xlabel="step", title="reward of samples")
    right.set(xlabel="step", title="weighted KL to the three references, nats")
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/rlhf-toy"))
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        models = write_models(Path(root) / "models")
        reward = write_reward(Path(root) / "reward", models["qwen2"])
        curves = {str(beta): curve(models, reward, beta, flags.steps, Path(root) / f"{beta}") for beta in BETAS}
    last = {
        beta: {name: sum(e[name] for e in entries[-20:]) / 20 for name in entries[0] if name.startswith("sampled/")}
        for beta, entries in curves.items()
    }
    first = {name: curves[str(BETAS[0])][0][name] for name in last[str(BETAS[0])]}
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    found = {"steps": flags.steps, "window": WINDOW, "first_step": first, "last_20_steps": last, "curves": curves}
    flags.output.with_suffix(".json").write_text(json.dumps(found) + "\n")
    draw(curves, flags.output.with_suffix(".png"))
    for beta, means in last.items():
        kls = ", ".join(f"{name.removeprefix('sampled/kl/')} {x:.1f}" for name, x in means.items() if "/kl/" in name)
        print(f"beta {beta}: reward {first['sampled/reward']:.2f} -> {means['sampled/reward']:.2f}; KL {kls}")


if __name__ == "__main__":
    main()
