"""The keys of `mrpo eval`, checked before anything loads."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mrpo_scale.base.endpoint import check_url, read_key
from mrpo_scale.base.errors import ConfigError, refuse
from mrpo_scale.config.checks import iso_date, value_mistakes
from mrpo_scale.config.data_keys import (
    PLAIN_TEMPLATE,
    PairOptions,
    RepeatedPrompt,
    parse_columns,
    parse_template_kwargs,
)
from mrpo_scale.config.fields import AtLeast, OneOf, key
from mrpo_scale.config.model_spec import DTYPES
from mrpo_scale.eval.judge import EXAMPLE, URL_KEY

DEFAULT_KEY_ENV = "OPENAI_API_KEY"


@dataclass
class EvalConfig:
    """What to evaluate and how. Which parts run follows from the keys: ``dataset_name``, ``tasks``, ``judge_model``.

    Raises:
        ConfigError: a value out of range or a combination without meaning; names the key, the value and the remedy.
    """

    model: list[str] = key(
        [],
        "Saved models: folders, hub ids, or mappings {model, revision, dtype, chat_template, system, name, ...}.",
    )
    reference: str | None = key(None, "Reference model for the implicit reward beta * (model - reference).")
    beta: float = key(0.1, "Scale of the implicit reward.")

    # Data: the keys of `mrpo train`
    dataset_name: str | None = key(None, "Hub id, or a local json, jsonl, parquet, arrow or csv file or folder.")
    dataset_config: str | None = key(None, "Configuration name of a hub data set.")
    columns: dict[str, Any] | str | None = key(
        None, "Columns to rename, {prompt: question, ...}, or a list of those that are read."
    )
    dataset_train_split: str = key("train", "Split to score where the data set has no test split.")
    dataset_test_split: str = key("test", "Split to score, where the data set has it.")
    held_out: float | None = key(
        None, "Score what `mrpo train` with this value and the same seed held out of the train split."
    )
    seed: int = key(42, "Of the choice of held-out rows.")
    dataset_layout: str = key("auto", "Layout of the rows, recognised by inspection unless named.")
    dataset_num_proc: int | None = key(None, "Processes for tokenizing.")
    max_length: Annotated[int | None, AtLeast(2)] = key(
        1024, "Most tokens of prompt + response, in the first model's tokens."
    )
    chat_template_kwargs: dict[str, Any] | str | None = key(
        None,
        "Arguments that every chat template gets; a row's own column wins. Those of `mrpo train`, to read what it read.",
    )
    repeated_prompt: RepeatedPrompt = key(
        "error",
        "Where both responses begin with their prompt in more than `max_bad_rows` of the pairs: error, strip it off, or keep it.",
    )
    on_bad_row: Literal["skip", "error"] = key("skip", "What to do with a pair that cannot be scored by every model.")
    max_bad_rows: float = key(0.1, "Largest fraction of such pairs before the run stops.")
    max_pairs: Annotated[int | None, AtLeast(0)] = key(
        None, "Score the first this many pairs; 0 for none, when only a win rate is wanted."
    )

    # Models
    dtype: Annotated[str, OneOf(DTYPES)] = key(
        "auto", "Weights: auto (as saved on a GPU, float32 on a CPU), float32, bfloat16 or float16."
    )
    attn_implementation: str | None = key(None, "sdpa, eager, flash_attention_2, ...: default is the model's.")
    plain_template: str = key(PLAIN_TEMPLATE, "Jinja chat template for models that have none.")
    template_date: str | None = key(
        None,
        "Date, such as 2026-11-26, for chat templates that print it. Default: that of output_dir's last run, else today's.",
    )
    shared_prompt: Literal["auto", "true", "false"] = key("auto", "One forward over prompt, chosen and rejected.")
    shard_size: Annotated[int, AtLeast(1)] = key(1, "Ranks that share one copy of a model while pairs are scored.")
    tokens_per_forward: Annotated[int, AtLeast(1)] = key(16384, "Padded tokens in one scoring forward.")

    # Tasks
    tasks: list[str] = key(
        [], "Tasks of lm-evaluation-harness, e.g. gsm8k,truthfulqa_mc2,hellaswag,mmlu,arc_easy,winogrande."
    )
    include_path: str | None = key(None, "Folder with task files of your own.")
    num_fewshot: Annotated[int | None, AtLeast(0)] = key(None, "Worked examples in the prompt; default is each task's.")
    task_limit: Annotated[int | None, AtLeast(1)] = key(None, "First this many documents of each task, for a trial.")
    task_batch_size: str = key("8", "Batch size of the tasks, or auto.")
    apply_chat_template: bool = key(False, "Put the tasks' prompts into the model's chat template.")

    # Win rate
    judge_model: str | None = key(None, "Model that judges responses; sets the win rate off.")
    judge_url: str | None = key(None, "OpenAI-compatible endpoint, such as https://api.openai.com/v1.")
    judge_key_env: str | None = key(
        None, f"Environment variable that holds the API key; default {DEFAULT_KEY_ENV}, where it is set."
    )
    judge_price: list[float] = key([], "Price of a million prompt tokens and of a million completion tokens.")
    judge_options: str = key(
        '{"temperature": 0, "max_tokens": 16}', "JSON merged into every request to the judge; replaces this default."
    )
    judge_concurrency: Annotated[int, AtLeast(1)] = key(8, "Calls to the judge at the same time.")
    judge_retries: Annotated[int, AtLeast(0)] = key(
        5, "Repetitions of a call that failed with 408, 429, 5xx or no answer."
    )
    judge_timeout: Annotated[float, AtLeast(0.001)] = key(
        120, "Seconds without a byte from the judge after which a call has failed."
    )
    max_prompts: Annotated[int, AtLeast(1)] = key(300, "First this many different prompts of the data set.")
    max_new_tokens: Annotated[int, AtLeast(1)] = key(200, "Most tokens of a response.")
    generation_batch_size: Annotated[int, AtLeast(1)] = key(16, "Prompts in one batch of generation.")
    yes: bool = key(False, "Pay for the judge without asking.")

    # Output
    output: str | None = key(None, "JSON file for the results.")
    output_dir: str = key(
        str(Path("runs") / "eval"), "Folder of responses and verdicts, which the next run reads again."
    )

    def __post_init__(self) -> None:
        self.tasks = [name for word in self.tasks for name in word.split(",") if name]
        self._check()
        if self.judge_model is not None:
            self._check_judge()

    @property
    def pair_options(self) -> PairOptions:
        """How rows become pairs."""
        kwargs = json.dumps(parse_template_kwargs(self.chat_template_kwargs), sort_keys=True)
        return PairOptions(repeated_prompt=self.repeated_prompt, chat_template_kwargs=kwargs)

    def _check(self) -> None:
        parse_columns(self.columns)
        parse_template_kwargs(self.chat_template_kwargs)
        if not self.model:
            raise ConfigError("`model` is missing; name one or more model folders as --model FOLDER.")
        if self.template_date is not None:
            self.template_date = iso_date(self.template_date)
        if not (self.dataset_name or self.tasks):
            raise ConfigError("nothing to evaluate on: name a data set as --dataset_name or tasks as --tasks.")
        refuse(list(value_mistakes(self)))
        if not 0 <= self.max_bad_rows <= 1:
            raise ConfigError(f"`max_bad_rows: {self.max_bad_rows}` must be a fraction from 0 to 1.")
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ConfigError(f"`beta: {self.beta}` must be above 0.")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ConfigError(f"`include_path: {self.include_path}` is not a folder; name the one with the task files.")
        if not (self.task_batch_size == "auto" or self.task_batch_size.isdigit()):
            raise ConfigError(f"`task_batch_size: {self.task_batch_size}` is neither a number nor auto.")

    def _check_judge(self) -> None:
        if not self.dataset_name:
            raise ConfigError("`judge_model` needs prompts: name a data set as --dataset_name.")
        if not self.judge_url:
            raise ConfigError("`judge_url` is missing: name the endpoint, such as https://api.openai.com/v1.")
        if self.judge_price and len(self.judge_price) != 2:
            raise ConfigError(
                f"`judge_price: {' '.join(map(str, self.judge_price))}` must be two numbers: the price of a million prompt "
                "tokens and of a million completion tokens."
            )
        check_url(self.judge_url, URL_KEY, EXAMPLE)
        self.request_options()
        self.api_key()

    def request_options(self) -> dict[str, Any]:
        """What ``judge_options`` adds to a request. Raises ConfigError where it is no JSON object."""
        try:
            options = json.loads(self.judge_options)
        except json.JSONDecodeError as error:
            raise ConfigError(f"`judge_options: {self.judge_options}` is not JSON: {error}.") from None
        if not isinstance(options, dict) or {"model", "messages", "stream"} & set(options):
            raise ConfigError(
                f"`judge_options: {self.judge_options}` must be a JSON object without model, messages or stream."
            )
        return options

    def api_key(self) -> str | None:
        """The key from the environment. No error of it shows a value, which may be a key put in the wrong place."""
        return read_key(
            DEFAULT_KEY_ENV if self.judge_key_env is None else self.judge_key_env,
            key="judge_key_env",
            url_key=URL_KEY,
            parts=check_url(str(self.judge_url), URL_KEY, EXAMPLE),
            required=self.judge_key_env is not None,
        )
