"""`accelerate launch launch/score.py --config RECIPE [--reference NAME ...]`: fill the score cache. Plain `python` works too."""

from mrpo_scale.cli import run_command

if __name__ == "__main__":
    run_command("score")
