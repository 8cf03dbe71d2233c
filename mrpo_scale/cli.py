"""`mrpo train`, `mrpo eval`: the command line. Errors a user can mend are one line on rank 0 and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

USAGE = """usage: mrpo train [--config RECIPE] [--key value ...]
       mrpo eval --model FOLDER [FOLDER ...] [--dataset_name SET] [--tasks NAME,NAME] [--judge_model NAME --judge_url URL] [...]

RECIPE is a YAML file or the name of a recipe of the package; without one the quickstart runs. `mrpo train --help` lists all keys.
Under a launcher: accelerate launch --config_file launch/accelerate/cpu_zero3.yaml launch/train.py --config RECIPE
"""


def train_main(argv: Sequence[str] | None = None) -> None:
    """Parse, train, report. Exits with 2 on a ConfigError, with 1 on a TrainingError."""
    _log_to_stderr()
    words = list(sys.argv[1:] if argv is None else argv)
    if not any(word == "--config" or word.startswith("--config=") for word in words) and not _names_a_model(words):
        words = ["--config", "quickstart", *words]
    # Imports are slow (transformers, torch), so `mrpo` alone answers without them.
    from mrpo_scale.run import run

    _run(run, words)


def eval_main(argv: Sequence[str] | None = None) -> None:
    """Evaluate saved models. Exits with 2 on a ConfigError."""
    _log_to_stderr()
    from mrpo_scale.eval.run import run

    _run(run, list(sys.argv[1:] if argv is None else argv))


def _run(run: Callable[[Sequence[str]], object], words: Sequence[str]) -> None:
    from mrpo_scale.errors import ConfigError, TrainingError

    try:
        run(words)
    except (ConfigError, TrainingError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nerror: {error}\n", file=sys.stderr, flush=True)
        # The other ranks may be waiting in a collective of a rank that failed: leave at once, the launcher ends them.
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def _names_a_model(words: Sequence[str]) -> bool:
    return any(w.startswith("--model_name_or_path") or w in ("-h", "--help") for w in words)


def _log_to_stderr() -> None:
    main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Torch's renaming of a collective that DeepSpeed calls: one line per gather, nothing a user can act on.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use .*_single", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator", category=UserWarning)
    for name in ("mrpo_scale", "mrpo_kernels"):
        logging.getLogger(name).setLevel(logging.INFO if main else logging.ERROR)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"train": train_main, "eval": eval_main}


def main() -> None:
    """The ``mrpo`` console script."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
    elif command in COMMANDS:
        COMMANDS[command](sys.argv[2:])
    else:
        print(f"error: unknown command `{command}`.\n\n{USAGE}", file=sys.stderr)
        sys.exit(2)
