"""`accelerate launch launch/bench.py --config RECIPE [--references 1 2 3] [--scoring live cached]`. Plain `python` works too."""

from mrpo_scale.cli import run_command

if __name__ == "__main__":
    run_command("bench")
