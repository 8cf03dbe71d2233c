"""The command line. Errors a user can mend are one line on rank 0 and exit code 2."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

USAGE = """usage: mrpo COMMAND [--config RECIPE] [--key value ...]

  train    finetune the policy; without a recipe, the quickstart
  check    the dry run, from configs and data alone: what is read, memory, time, and the cheapest setting that fits:
           [--gpus 64 --gpu h100-80gb --gpus_per_node 8 --network 400gbit] [--ds_config NAME] [--output FOLDER]
  convert  FILE [--from axolotl|llama_factory|open_instruct|openrlhf|ms_swift] [--gpus N] [--output FILE]: another trainer's DPO
           recipe, YAML or command line, in this project's keys, and what could not be carried; takes no recipe
  merge    ADAPTER [--base MODEL] --output FOLDER: the whole model of a LoRA run's folder, as its source was; takes no recipe
  reward   a reward model (Bradley-Terry) of a recipe's pairs, with TRL: --model_name_or_path MODEL --output_dir FOLDER
  score    fill the score cache (ref_cache_dir) of a recipe: [--reference NAME ...] [--job 3/100, of an array];
           --list says what is there, --verify checks it
  inspect  what each reference is worth, from the scores in the cache: [--output FOLDER]
  eval     measure saved models: --model FOLDER ... [--dataset_name SET] [--tasks NAME,NAME] [--judge_model NAME --judge_url URL]
  report   FOLDER [FOLDER ...] [--output FILE]: the HTML report of a run's folder again, or of several side by side; takes no recipe
  compare  objectives, settings and seeds against each other and against DPO on every single reference:
           [--objectives mrpo multi_dpo mrpo:KEY=VALUE,...] [--vary KEY=VALUE,VALUE ...] [--seeds 3] [--output FOLDER]
           [--launch "accelerate launch --config_file X"] [--jobs 1] [--dry_run | --slurm | --report]
           [--table paper1|paper2|paper5 [--sets SET ...] [--methods NAME ...] [--fixed_weights 0.1 0.5 0.9] [--choose_on 0.5]]
  bench    what a training step costs with K references, over DPO's: [--references 1 2 3] [--scoring live cached]
           [--placement spread partition] [--steps 80] [--repeat_references] [--output FOLDER]
           [--random_weights [KEY=NUMBER ...]] [--random_pairs PROMPT_TOKENS RESPONSE_TOKENS]

RECIPE is a YAML file or the name of a recipe of the package. `mrpo train --help` lists all keys; every command that
takes a recipe takes them.
Under a launcher: accelerate launch --config_file launch/accelerate/cpu_zero3.yaml launch/train.py --config RECIPE
"""

#: Command -> the function that runs it. Imports are slow (transformers, torch), so `mrpo` alone answers without them.
COMMANDS = {
    "train": "mrpo_scale.commands.train:run",
    "check": "mrpo_scale.planner.command:check",
    "convert": "mrpo_scale.commands.convert:convert",
    "merge": "mrpo_scale.commands.merge:merge",
    "reward": "mrpo_scale.commands.reward:reward",
    "score": "mrpo_scale.commands.score:score",
    "inspect": "mrpo_scale.commands.inspect_references:inspect",
    "eval": "mrpo_scale.eval.run:run",
    "report": "mrpo_scale.reports.html_report:report",
    "compare": "mrpo_scale.compare.command:compare",
    "bench": "mrpo_scale.bench.command:bench",
}
#: Commands that join no ranks, so a launcher's leavings are not theirs.
_ALONE = ("check", "merge", "report")


def train_main(argv: Sequence[str] | None = None) -> None:
    """`mrpo train`; without a recipe and a model, the quickstart."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not _has_recipe(argv) and not _names_a_model(argv):
        argv = ["--config", "quickstart", *argv]
    run_command("train", argv)


def run_command(command: str, argv: Sequence[str] | None = None) -> None:
    """Run one of COMMANDS. Exits with 2 on a ConfigError, with 1 on a TrainingError, or with the status that it returns."""
    _log_to_stderr()
    from mrpo_scale.base.errors import ConfigError, TrainingError, one_line
    from mrpo_scale.base.untrusted import printable

    argv = list(sys.argv[1:] if argv is None else argv)
    if command in ("score", "inspect", "compare", "bench") and argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    module, _, function = COMMANDS[command].partition(":")
    try:
        if command not in _ALONE:
            from mrpo_scale.config.launcher import prepare_launch

            prepare_launch()
        status = getattr(importlib.import_module(module), function)(argv)
    except (ConfigError, TrainingError) as error:
        if os.environ.get("RANK", "0") == "0":
            # One line of a mistake; of a failed run perhaps the last lines of its log. Either may quote a file of anybody's.
            text = str(error) if isinstance(error, TrainingError) else one_line(error)
            lines = [printable(line) for line in text.splitlines()]
            print("\nerror: " + "\n".join(lines) + "\n", file=sys.stderr, flush=True)
        # The other ranks may be waiting in a collective of a rank that failed: leave at once, the launcher ends them.
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    if isinstance(status, int) and status:
        sys.exit(status)


def _has_recipe(argv: Sequence[str]) -> bool:
    return any(word == "--config" or word.startswith("--config=") for word in argv)


def _names_a_model(argv: Sequence[str]) -> bool:
    return any(w.startswith("--model_name_or_path") or w in ("-h", "--help") for w in argv)


def _log_to_stderr() -> None:
    main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Torch's renaming of a collective that DeepSpeed calls: one line per gather, nothing a user can act on.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use .*_single", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator", category=UserWarning)
    for name in ("mrpo_scale", "mrpo_kernels"):
        logging.getLogger(name).setLevel(logging.INFO if main else logging.ERROR)


def main() -> None:
    """The ``mrpo`` console script."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
    elif command == "train":
        train_main(sys.argv[2:])
    elif command in COMMANDS:
        run_command(command, sys.argv[2:])
    else:
        print(f"error: unknown command `{command}`.\n\n{USAGE}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
