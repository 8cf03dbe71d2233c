"""Every causal type of the installed transformers, as a tiny random model: right as reference and as policy, or refused and why.

    python -m benchmarks.sweep_models --output benchmarks/results/models.json --page docs/models.md     # a minute on one core
    torchrun --nproc_per_node 2 -m benchmarks.sweep_models --ranks 2 --output two-ranks.json            # references only
    python -m benchmarks.sweep_models --types mixtral olmoe                                             # a table of two
    python -m benchmarks.sweep_models --wrappers --output benchmarks/results/wrappers.json --page docs/models.md  # see pictures

As a reference: log-probs of pairs longer than every window, against plain forwards of what ``from_pretrained`` loads; in one
process, and with ``--ranks`` on a shard group. As a policy: its gradients with activation checkpointing, where the type has it,
against those of plain forwards; then an update, and the saved folder: the keys of its source, the numbers of the model. Dropouts
are 0.1 on disk, so whatever survives `disable_dropout` shows. A type that cannot be made tiny is untested, and it is said why.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.attention_choice import choose_end_to_end
from mrpo_scale.logps.flops import expert_modules
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import choose_shared_prompt, enable_pair_scoring, score_pairs
from mrpo_scale.logps.self_check import check_pair_scoring
from mrpo_scale.models.on_disk import Converted
from mrpo_scale.models.plan import disable_dropout, load_policy, original_dropout
from mrpo_scale.models.saving import cast_as_stored, read_source_files
from mrpo_scale.models.source import check_source, weight_files
from mrpo_scale.models.stored import build_on_meta, stored_tensors
from mrpo_scale.references.placement import shard_group
from mrpo_scale.references.sharding import ReferenceSource, ShardedReference
from tests.tiny_types import causal_types, tiny_model, wrapper_types

CPU = torch.device("cpu")
EXACT = 1e-5  #: relative, of log-probs
EXACT_GRADIENTS = 1e-4  #: relative, of all gradients taken as one vector


@dataclass
class Outcome:
    """Of one type. ``reference`` and ``policy`` are exact, wrong, refused, crash or untested; the reason is in the last field."""

    model_type: str
    reference: str = "untested"
    policy: str = "untested"
    shared_prompt: bool = False
    layout: str = ""  #: as stored, converted, or experts read one by one
    experts: int = 0  #: layers that are mixtures
    off: float | None = None  #: relative, of the reference's log-probs
    gradients_off: float | None = None
    why: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", help="default: every one")
    parser.add_argument("--wrappers", action="store_true", help="the types that see pictures too, built as such")
    parser.add_argument(
        "--ranks", type=int, default=1, help="of a shard group; more than 1 under torchrun, references only"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--page", type=Path, help="page whose table is written anew")
    flags = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if flags.ranks > 1:
        dist.init_process_group("gloo")
    main_rank = flags.ranks == 1 or dist.get_rank() == 0
    outcomes = []
    auto: Any = AutoModelForImageTextToText if flags.wrappers else AutoModelForCausalLM
    for model_type in flags.types or (wrapper_types() if flags.wrappers else causal_types()):
        outcomes.append(try_type(model_type, flags.ranks, auto))
        if main_rank:
            print(*_cells(outcomes[-1]), sep="\t", flush=True)
    result = {
        "transformers": transformers.__version__,
        "ranks": flags.ranks,
        "tried": len(outcomes),
        "counts": {kind: dict(Counter(getattr(o, kind) for o in outcomes)) for kind in ("reference", "policy")},
        "shared_prompt": sum(o.shared_prompt for o in outcomes),
        "types": [asdict(o) for o in outcomes],
    }
    if main_rank:
        print(result["counts"])
        if flags.output:
            flags.output.write_text(json.dumps(result, indent=1) + "\n")
        if flags.page:
            _write_page(flags.page, "sweep of wrappers" if flags.wrappers else "sweep", outcomes)
    if flags.ranks > 1:
        dist.destroy_process_group()


def try_type(model_type: str, ranks: int = 1, auto: Any = AutoModelForCausalLM) -> Outcome:
    """``auto`` makes what is compared with. With ``ranks`` above 1, the reference alone. Collective over them."""
    outcome = Outcome(model_type)
    try:
        model = tiny_model(model_type, dropout=0.1, auto=auto)
    except RuntimeError as error:
        outcome.why = f"cannot be made tiny: {one_line(error)[:90]}"
        return outcome
    if (
        type(model.config) not in auto._model_mapping
    ):  # Emu3's text model: the auto class makes it and does not read it again
        auto = type(model)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(_of_rank_0(work, ranks)) / "model"
        model.save_pretrained(folder)  # by rank 0
        _of_rank_0(work, ranks)
        reference = ReferenceSource("ref", str(folder))
        outcome.reference = _tried(outcome, lambda: _as_reference(outcome, reference, ranks, auto))
        if ranks == 1:
            policy = ReferenceSource("policy", str(folder))
            outcome.policy = _tried(outcome, lambda: _as_policy(outcome, policy, Path(work) / "saved", auto))
        _of_rank_0(work, ranks)  # until every rank is done with it
    return outcome


def _of_rank_0(value: str, ranks: int) -> str:
    if ranks == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    dist.barrier()
    return values[0]


def _tried(outcome: Outcome, attempt: Callable[[], str]) -> str:
    try:
        return attempt()
    except ConfigError as error:
        outcome.why = re.sub(r"^(ref|policy)( \(\w+\))?: ", "", str(error))
        assert "\n" not in outcome.why
        return "refused"
    except Exception as error:  # noqa: BLE001 (any: this is the finding)
        outcome.why = f"{type(error).__name__}: {one_line(error)[:120]}"
        return "crash"


# ---- as a reference --------------------------------------------------------------------------------------------------


def _as_reference(outcome: Outcome, source: ReferenceSource, ranks: int, auto: Any) -> str:
    reference = ShardedReference(source, shard_group(ranks) if ranks > 1 else None, CPU)
    outcome.shared_prompt = reference.shared_prompt
    outcome.experts = len(expert_modules(reference.model))
    outcome.layout = _layout(source)
    got_P2 = reference.score(reference.batch(PAIRS))
    plain = auto.from_pretrained(source.path, dtype=torch.float32).eval()
    with torch.no_grad():
        outcome.off = relative(got_P2, plain_logps(plain))
    return _exact(outcome, outcome.off, EXACT, "log-probs")


def _layout(source: ReferenceSource) -> str:
    """How the checkpoint has what the model has in memory."""
    model = build_on_meta(source, check_source(source))
    tensors, state = stored_tensors(model, weight_files(Path(source.path), "ref"), "ref"), model.state_dict()
    converted = [tensor for name, tensor in tensors.items() if isinstance(tensor, Converted) and name in state]
    by_row = [tensor.row_by_row for tensor in converted]
    return "; ".join(["experts one by one"] * any(by_row) + ["converted whole"] * (not all(by_row))) or "as stored"


def _exact(outcome: Outcome, off: float, allowed: float, of: str) -> str:
    if off < allowed:
        return "exact"
    outcome.why = f"{of} are off by {off:.1e}"
    return "wrong"


# ---- as a policy -----------------------------------------------------------------------------------------------------


def _as_policy(outcome: Outcome, source: ReferenceSource, saved: Path, auto: Any) -> str:
    policy, plain = load_policy(source), auto.from_pretrained(source.path, dtype=torch.float32)
    files = read_source_files(policy, source, tokenizer=False, chat_template=None)
    dropouts = disable_dropout(policy)
    disable_dropout(plain)
    enable_pair_scoring(policy, "policy")
    layout = {
        "end_to_end": choose_end_to_end(policy, CPU),
        "shared_prompt": choose_shared_prompt("auto", policy, "policy"),
    }
    check_pair_scoring(policy, "policy", **layout, device=CPU, train_equals_eval=True)
    if policy.supports_gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    _loss(score_pairs(policy.train(), collate_pairs(PAIRS, **layout))).backward()
    _loss(plain_logps(plain.train())).backward()
    outcome.gradients_off = _gradients_apart(policy, plain)
    _update(policy)
    with original_dropout(dropouts):
        policy.save_pretrained(saved, state_dict=cast_as_stored(policy.state_dict(), files.dtypes))
    files.write(saved)
    if gone := _keys(Path(source.path)) ^ _keys(saved):
        outcome.why = f"saved with other keys: {', '.join(sorted(gone)[:3])}"
        return "wrong"
    if why := _saved_otherwise(policy, plain, auto.from_pretrained(saved, dtype=torch.float32)):
        outcome.why = why
        return "wrong"
    return _exact(outcome, outcome.gradients_off, EXACT_GRADIENTS, "gradients")


def _saved_otherwise(policy: PreTrainedModel, plain: PreTrainedModel, again: PreTrainedModel) -> str:
    """What the class of the source finds changed in the saved folder, other than by training: ''; or what."""
    state, names = policy.state_dict(), _names_in(plain, policy)
    expected = {**plain.state_dict(), **{names[name]: tensor for name, tensor in state.items()}}
    loaded = again.state_dict()
    if changed := [name for name, tensor in expected.items() if not torch.equal(loaded[name], tensor)]:
        return f"another {changed[0]} after saving and loading"
    with torch.no_grad():
        off = relative(plain_logps(policy.eval()), plain_logps(again.eval()))
    return "" if off < EXACT else f"log-probs are off by {off:.1e} after saving and loading"


def _names_in(plain: PreTrainedModel, policy: PreTrainedModel) -> dict[str, str]:
    """{name in the policy: name in the source's class}: the same, or of a text model (Qwen3.5's) below that class's own part."""
    known, names = set(plain.state_dict()), list(policy.state_dict())
    for path in ["model", *(path for path, _ in plain.named_modules() if path)]:
        renamed = {name: re.sub(r"^model\.", f"{path}.", name) for name in names}
        if set(renamed.values()) <= known:
            return renamed
    raise RuntimeError(f"{type(policy).__name__} is no part of {type(plain).__name__}")


def _loss(logps_P2: Tensor) -> Tensor:
    margins_P = logps_P2[:, 0] - logps_P2[:, 1]
    return -nn.functional.logsigmoid(0.1 * margins_P).mean()


def _gradients_apart(policy: PreTrainedModel, plain: PreTrainedModel) -> float:
    names, expected = _names_in(plain, policy), dict(plain.named_parameters())
    got = {names[name]: parameter for name, parameter in policy.named_parameters()}
    apart = size = 0.0
    for name, parameter in expected.items():  # of a tower too, which text must not reach
        zero = torch.zeros_like(parameter)
        g, e = (zero if p is None or p.grad is None else p.grad for p in (got.get(name), parameter))
        apart, size = apart + (g - e).double().norm().item() ** 2, size + e.double().norm().item() ** 2
    return (apart / size) ** 0.5


@torch.no_grad()
def _update(policy: PreTrainedModel) -> None:
    for parameter in policy.parameters():
        if parameter.grad is not None:
            parameter -= 0.01 * parameter.grad
        parameter.grad = None


def _keys(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in weight_files(folder, "policy"):
        with safe_open(file, framework="pt") as tensors:
            found |= set(tensors.keys())
    return found


# ---- what is compared with -------------------------------------------------------------------------------------------


def random_pairs(lengths: Sequence[tuple[int, int, int]]) -> list[PairTokens]:
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(10, 90, (count,), generator=generator).tolist()

    return [PairTokens(ids(a), ids(b), ids(c)) for a, b, c in lengths]


# Prompts and responses longer and shorter than the tiny models' windows, and rows that are mostly padding.
PAIRS = random_pairs([(23, 17, 25), (3, 5, 2), (30, 1, 6), (12, 12, 13)])


def plain_logps(model: PreTrainedModel) -> Tensor:
    """[P, 2] of ordinary forwards of single texts without padding."""
    values = []
    for pair in PAIRS:
        for response in (pair.chosen_ids, pair.rejected_ids):
            text = torch.tensor([pair.prompt_ids + response])
            logps_LV = model(input_ids=text, use_cache=False).logits[0].double().log_softmax(-1)
            rows = torch.arange(len(response)) + len(pair.prompt_ids) - 1
            values.append(logps_LV[rows, torch.tensor(response)].sum())
    return torch.stack(values).view(-1, 2)


def relative(got_P2: Tensor, expected_P2: Tensor) -> float:
    return ((got_P2.double() - expected_P2) / expected_P2).abs().max().item()


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _cells(outcome: Outcome) -> list[str]:
    return [
        outcome.model_type,
        outcome.reference,
        outcome.policy,
        outcome.layout or "-",
        "shared" if outcome.shared_prompt else "two sequences" if outcome.layout else "-",
        _shortened(outcome.why.replace("|", "/")),
    ]


def _shortened(text: str, most: int = 170) -> str:
    return text if len(text) <= most else f"{text[:most].rsplit(' ', 1)[0]} ..."


def _write_page(page: Path, table_of: str, outcomes: Sequence[Outcome]) -> None:
    start, end = (f"<!-- {table_of}: {word} -->" for word in ("begin", "end"))
    rows = [["type", "reference", "policy", "on disk", "prompt", "why"], ["---"] * 6, *map(_cells, outcomes)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    before, _, rest = page.read_text().partition(start)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{start}\n\n{table}\n\n{end}{after}")


if __name__ == "__main__":
    main()
