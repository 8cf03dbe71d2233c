"""`accelerate launch launch/eval.py --model FOLDER --dataset_name SET [--key value ...]`."""

from mrpo_scale.cli import eval_main

if __name__ == "__main__":
    eval_main()
