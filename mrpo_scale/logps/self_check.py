"""The check of a model before it is trained or believed: its log-probs of pairs against its own logits on a few tokens.

It catches what no table of architectures can: logits that are transformed, a prompt that sees what follows, padding that changes
the scores, windows, positions, and dropout that survives. What is compared with is the model itself on one text without any
padding. Three forwards, one more where training must equal evaluation, one where its rows will lie over a sequence group; each
gathers a sharded model once.

R rows of logits that are compared, V words.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mrpo_scale.base.errors import ConfigError, TrainingError, one_line
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.layer_masks import body_of
from mrpo_scale.logps.logit_transform import LogitTransform, candidates, choose, named_numbers
from mrpo_scale.logps.pair_batch import PairBatch, collate_pairs
from mrpo_scale.logps.pair_forward import FusedHead, score_pairs
from mrpo_scale.logps.sequence_parallel import SequenceGroup

logger = logging.getLogger(__name__)

#: Windows and chunks up to this many tokens are exceeded by the probe.
LONGEST_WINDOW = 1100
_PROMPT, _RESPONSE = 128, 9  # tokens at least: enough for a router that is noisy now and then to show it
#: Train-mode log-probs may differ from eval's by this much, relative, in float32: the same products in the same order. In half
#: precision by a quarter of its unit: sums over tokens average roundings out.
_TRAIN_RELATIVE = 1e-5


@dataclass(frozen=True)
class Probe:
    """Two pairs and the two texts that answer for them: ``prompt + chosen`` and ``prompt + rejected`` of the first. The second
    pair is cut out of the first one's prompt, so what a causal model says of it is already there, and in a batch it is the one
    that is padded, or that shares a row."""

    pairs: list[PairTokens]

    @property
    def texts(self) -> list[list[int]]:
        long = self.pairs[0]
        return [long.prompt_ids + long.chosen_ids, long.prompt_ids + long.rejected_ids]

    @property
    def rows(self) -> list[Tensor]:
        """Which rows of each text's logits predict the responses: the first text's own and the second pair's two; the second's."""
        long, short = self.pairs
        p, n = len(long.prompt_ids) - 1, len(short.prompt_ids) - 1
        spans = [(p, long.chosen_ids), (n, short.chosen_ids), (n, short.rejected_ids)]
        first = torch.cat([torch.arange(start, start + len(ids)) for start, ids in spans])
        return [first, torch.arange(p, p + len(long.rejected_ids))]


def make_probe(config: PretrainedConfig, vocabulary: int) -> Probe:
    """Texts longer than every window that the config names, up to a bound, of ids that are no special tokens."""
    text_config = config.get_text_config()
    windows = [int(value) for key, value in named_numbers(config) if _is_window(key) and value >= 1]
    reached = [window for window in windows if window <= LONGEST_WINDOW]
    if beyond := sorted(set(windows) - set(reached)):
        logger.info("the check of %s does not reach its windows of %s tokens", config.model_type, beyond)
    most = getattr(text_config, "max_position_embeddings", None)
    most = most if isinstance(most, int) and most > 0 else LONGEST_WINDOW + 64
    prompt_length = max(10, min(max([_PROMPT, *(window + 16 for window in reached)]), most - _RESPONSE))
    ids = _pseudo_random(_usable_ids(config, vocabulary), prompt_length + 5 + _RESPONSE)
    prompt, chosen, rejected = ids[:prompt_length], ids[prompt_length : prompt_length + 5], ids[prompt_length + 5 :]
    if chosen[0] == rejected[0]:  # or the logits that predict it would not show who sees ahead
        rejected[0] = next(i for i in _usable_ids(config, vocabulary) if i != chosen[0])
    short = PairTokens(prompt_ids=prompt[:4], chosen_ids=prompt[4:7], rejected_ids=prompt[4:9])
    return Probe([PairTokens(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected), short])


def _is_window(key: str) -> bool:
    return any(part in key for part in ("window", "chunk", "topk", "top_k")) and "layer" not in key


def _usable_ids(config: PretrainedConfig, vocabulary: int) -> list[int]:
    """Ids below ``vocabulary`` that the config does not call special; all of them where it leaves too few."""
    special: set[int] = set()
    for one in (config, config.get_text_config()):
        for key, value in one.to_dict().items():
            if key.endswith(("_token_id", "_token_index", "_token_ids")):
                special.update(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
    usable = [i for i in range(min(vocabulary, 1000)) if i not in special]
    return usable if len(usable) > 2 else list(range(vocabulary))


def _pseudo_random(ids: list[int], count: int) -> list[int]:
    """``count`` of ``ids``, the same on every rank, and no draw from a generator that training uses."""
    state, drawn = 1, []
    for _ in range(count):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        drawn.append(ids[(state >> 8) % len(ids)])
    return drawn


def rounding(dtype: torch.dtype, layers: int) -> float:
    """How far two ways to compute the same hidden states may lie apart, relative, in root mean square.

    Each layer adds roundings of its own to the residual stream, so they grow with the root of the depth. Float32 is given more of
    its units: there sums of thousands of products are rounded as coarsely as their result, which half precision adds up in
    float32. Measured in docs/references.md.
    """
    units = 100 if dtype in (torch.float32, torch.float64) else 3
    return units * torch.finfo(dtype).eps * math.sqrt(max(layers, 1))


@dataclass
class _Plain:
    """What the model itself says of the probe's two texts."""

    logits_RV: Tensor  #: float64, of the rows that are compared, in the order of a batch's responses
    hidden_RD: Tensor  #: what the head was given for them
    prompt_apart: float  #: how far the prompt's hidden states of the two texts lie apart, relative
    samples: tuple[Tensor, Tensor] | None  #: what the head was made to say, and what the model made of it
    dtype: torch.dtype  #: of the logits
    between: float  #: how far what the head was given lies from what the body returned, but for a scale, relative; 0 if unknown


@torch.no_grad()
def check_pair_scoring(
    model: nn.Module,
    name: str,
    *,
    shared_prompt: bool,
    end_to_end: bool = False,
    device: torch.device,
    train_equals_eval: bool = False,
    group: SequenceGroup | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    """Compare the pair forward with the model's own logits on a few tokens, and choose what is done to its logits by trial. Every
    rank must call it: each makes the same forwards, and only then decides.

    Args:
        model: after :func:`~mrpo_scale.logps.pair_forward.enable_pair_scoring`; may be wrapped (DeepSpeed, DDP, FSDP2).
        train_equals_eval: also compare with the pair forward in train mode, which dropout or noise would change.
        group: also compare with the pair forward of rows that lie over these ranks.
        dtype: that autocast computes in; default: the coarsest of the parameters.

    Returns:
        The largest difference per token in nats.

    Raises:
        ConfigError: they differ by more than rounding, so the model would be trained or believed on wrong numbers; or a forward
            failed.
    """
    was_training = model.training
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return _checked(model, name, shared_prompt, end_to_end, device, train_equals_eval, group, dtype)
    except (ConfigError, TrainingError, torch.OutOfMemoryError, dist.DistError):  # not the model's fault
        raise
    except Exception as error:
        raise ConfigError(
            f"{name} ({type(_inner(model)).__name__}): it failed on the few tokens that every model is checked on "
            f"({type(error).__name__}: {one_line(error)[:300]}), so it cannot be used here; leave it out."
        ) from error
    finally:
        model.train(was_training)


def _checked(
    model: nn.Module,
    name: str,
    shared_prompt: bool,
    end_to_end: bool,
    device: torch.device,
    train_equals_eval: bool,
    group: SequenceGroup | None,
    dtype: torch.dtype | None,
) -> float:
    inner = _inner(model)
    head = cast(FusedHead, inner.get_output_embeddings())
    config = inner.config
    probe = make_probe(config, head.out_features)
    pad_token_id = getattr(config.get_text_config(), "pad_token_id", None)
    pad = pad_token_id if isinstance(pad_token_id, int) and 0 <= pad_token_id < head.out_features else 0
    layout: Any = {"shared_prompt": shared_prompt, "end_to_end": end_to_end, "pad_token_id": pad}
    pairs = collate_pairs(probe.pairs, **layout).to(device)
    model.eval()
    plain = _plain_forwards(model, head, probe, device)
    transform = None if plain.samples is None else choose(candidates(config), *plain.samples)
    if transform is not None:
        head.softcap, head.logit_scale = transform.softcap, transform.scale
    hidden_RD, got_P2 = _pair_forward(model, head, pairs)
    # Some models scale what goes into their head instead (MiniCPM3).
    scale = _input_scale(hidden_RD, plain.hidden_RD, config)
    if scale != 1.0 and transform is not None and head.bias is None:
        head.logit_scale *= scale
        hidden_RD, got_P2 = _pair_forward(model, head, pairs)
    together_P2 = trained_P2 = None
    if group is not None:
        together_P2 = score_pairs(model, collate_pairs(probe.pairs, group=group, **layout).to(device)).double()
    if train_equals_eval:
        model.train()
        trained_P2 = score_pairs(model, pairs).double()
    # Nothing was decided so far, so no rank has left the others alone in a forward.
    dtype = dtype or _coarsest(inner)
    allowed = rounding(dtype, int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0))
    difference = _nats_per_token(plain.logits_RV, got_P2, pairs)
    apart = _relative(scale * hidden_RD, plain.hidden_RD)
    problem = _problem(plain, transform, apart, difference, allowed, shared_prompt)
    if problem is not None:
        raise ConfigError(f"{name} ({type(inner).__name__}): {problem}")
    if together_P2 is not None:
        _check_together(name, inner, together_P2, got_P2, _tolerated_nats(plain, allowed), pairs)
    if trained_P2 is not None:
        _check_train(name, inner, trained_P2, got_P2, max(_TRAIN_RELATIVE, torch.finfo(dtype).eps / 4))
    return difference


def _problem(
    plain: _Plain,
    transform: LogitTransform | None,
    apart: float,
    difference: float,
    allowed: float,
    shared_prompt: bool,
) -> str | None:
    """Why the model cannot be used, or None."""
    if plain.samples is None:
        return "it does not compute its logits by calling its output head, so its log-probs cannot be checked; leave it out."
    if not plain.prompt_apart <= allowed:
        return (
            f"a prompt's hidden states change with the response after it, by {plain.prompt_apart:.2g} of their size where rounding "
            f"makes {allowed:.1g}, so it is not causal and its log-probs would see the answer; leave it out."
        )
    if transform is None:
        return (
            "its logits differ from its own head's output by more than the softcaps and scales that its config names, which is not "
            "supported here; leave it out."
        )
    if apart <= allowed and difference <= _tolerated_nats(plain, allowed):
        return None
    if not plain.between <= allowed:
        return (
            "it has layers of its own between its body and its output head, as masked language models do (a dense layer, a norm, a "
            "projection), and pairs go from the one to the other without them; leave it out."
        )
    remedy = (
        "Try `attn_implementation: sdpa`, then `shared_prompt: false`; if that fails too, leave this model out."
        if shared_prompt
        else "Leave it out."
    )
    return (
        f"its log-probs differ from its own logits by {difference:.3g} nats per token, and its hidden states by {apart:.2g} of "
        f"their size where rounding makes {allowed:.1g}, so it does something to its logits, padding or attention that is not "
        f"supported here. {remedy}"
    )


def _tolerated_nats(plain: _Plain, allowed: float) -> float:
    """Per token: a logit moves by about its hidden states' relative error times its size, and the model rounds it to its dtype."""
    largest = plain.logits_RV.abs().max().item()
    return allowed * max(1.0, largest) + 2 * torch.finfo(plain.dtype).eps * largest


def _check_together(
    name: str, model: nn.Module, together_P2: Tensor, alone_P2: Tensor, nats: float, pairs: PairBatch
) -> None:
    difference = ((together_P2 - alone_P2).abs() / pairs.response_lengths).max().item()
    if not difference <= nats:
        raise ConfigError(
            f"{name} ({type(model).__name__}): its log-probs over the ranks of a sequence group differ from those on one rank by "
            f"{difference:.3g} nats per token, so something beside its attention mixes tokens; set `sequence_parallel_size: 1`."
        )


def _check_train(name: str, model: nn.Module, trained_P2: Tensor, evaluated_P2: Tensor, allowed: float) -> None:
    relative = ((trained_P2 - evaluated_P2) / evaluated_P2).abs().max().item()
    if not relative <= allowed:
        raise ConfigError(
            f"{name} ({type(model).__name__}): its log-probs in train mode differ from those in eval mode by {relative:.2g} "
            "relative although `disable_dropout: true`, so something random is left in it, a noise of its router for instance; set "
            "that to 0 in its config.json, or train with it by `disable_dropout: false`."
        )


# ---- forwards --------------------------------------------------------------------------------------------------------


class _Tap:
    """What passes the head. It has the first row of a plain forward's logits say numbers from -50 to 50, to see what the model
    makes of them: its own logits may be too small to tell a softcap by."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.said_V: Tensor | None = None

    def scored(self, hidden_TD: Tensor) -> None:
        self.hidden = hidden_TD

    def plain(self, hidden: Tensor, logits: Tensor) -> Tensor:
        self.hidden = hidden
        self.said_V = torch.linspace(-50, 50, logits.shape[-1], dtype=logits.dtype, device=logits.device)
        logits = logits.clone()
        logits[0, 0] = self.said_V
        return logits


@contextmanager
def _tapped(head: FusedHead) -> Iterator[_Tap]:
    head.tap = _Tap()
    try:
        yield head.tap
    finally:
        head.tap = None


@contextmanager
def _body_returns(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Filled with the hidden states [L, D] that the model's body returns inside the block."""
    states: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, outputs: Any) -> None:
        hidden = getattr(outputs, "last_hidden_state", None)
        if hidden is not None:
            states.append(hidden[0])

    handle = body_of(model).register_forward_hook(note)
    try:
        yield states
    finally:
        handle.remove()


def _plain_forwards(model: nn.Module, head: FusedHead, probe: Probe, device: torch.device) -> _Plain:
    """The model's ordinary forward of each text by itself, without a mask."""
    prompt_length, chosen_length = len(probe.pairs[0].prompt_ids), len(probe.pairs[0].chosen_ids)
    logits, hidden, of_prompt, samples = [], [], [], None
    inner, returned = _inner(model), []
    # A compiler would make a graph of these that nothing uses again.
    with torch.compiler.set_stance("force_eager"):
        for text, rows in zip(probe.texts, probe.rows, strict=True):
            with _tapped(head) as tap, _body_returns(inner) as returns:
                said_LV = model(input_ids=torch.tensor([text], device=device), use_cache=False).logits[0]
            given_LD = said_LV[:, :1]
            if tap.hidden is not None and tap.said_V is not None:
                given_LD, samples = tap.hidden.reshape(len(text), -1), (tap.said_V, said_LV[0])
            logits.append(said_LV[rows].double())
            hidden.append(given_LD[rows])
            returned += [states_LD[rows] for states_LD in returns]
            of_prompt.append(given_LD[:prompt_length])

    def in_order(of_texts: list[Tensor]) -> Tensor:
        """The long pair's two responses, then the short pair's, which are cut out of the first text."""
        return torch.cat([of_texts[0][:chosen_length], of_texts[1], of_texts[0][chosen_length:]])

    plain_RD = in_order(hidden)
    between = 0.0
    if len(returned) == len(hidden):
        returned_RD = in_order(returned)
        between = _relative(_input_scale(returned_RD, plain_RD, inner.config) * returned_RD, plain_RD)
    return _Plain(in_order(logits), plain_RD, _relative(*of_prompt), samples, said_LV.dtype, between)


def _pair_forward(model: nn.Module, head: FusedHead, pairs: PairBatch) -> tuple[Tensor, Tensor]:
    """(hidden states [R, D], log-probs [P, 2] in float64)."""
    with _tapped(head) as tap:
        logps_P2 = score_pairs(model, pairs).double()
    assert tap.hidden is not None
    return tap.hidden, logps_P2


# ---- comparisons -----------------------------------------------------------------------------------------------------


def _input_scale(hidden_RD: Tensor, plain_RD: Tensor, config: PretrainedConfig) -> float:
    if hidden_RD.shape != plain_RD.shape:
        return 1.0
    scales = dict.fromkeys(c.scale for c in candidates(config))
    return min(scales, key=lambda scale: _relative(scale * hidden_RD, plain_RD))


def _relative(a_RD: Tensor, b_RD: Tensor) -> float:
    if a_RD.shape != b_RD.shape:
        return math.inf
    return ((a_RD.double() - b_RD.double()).norm() / b_RD.double().norm()).item()


def _nats_per_token(logits_RV: Tensor, got_P2: Tensor, pairs: PairBatch) -> float:
    logps_R = logits_RV.log_softmax(-1).gather(1, pairs.labels_T[:, None]).squeeze(1)
    lengths = pairs.cu_seqlens.diff().long()
    expected_P2 = torch.segment_reduce(logps_R, "sum", lengths=lengths).view(-1, 2)
    return ((got_P2 - expected_P2).abs() / lengths.view(-1, 2)).max().item()


def _coarsest(model: nn.Module) -> torch.dtype:
    return max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda dtype: torch.finfo(dtype).eps)


def _inner(model: Any) -> PreTrainedModel:
    """The model inside DeepSpeed's, DDP's, a compiler's or peft's wrapper."""
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            model = getattr(model, "module", None) or model._orig_mod
    return model
