"""`kd_level: aligned` against autograd of KD's exact loss, over all responses of a tabular policy, beside a reference whose tokens
span its own; in float64."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from mrpo_kernels.virtual_reference import CLIPS, clip_to_anchor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mrpo_scale.data.alignment import AlignedResponse, SettledPieces, read_pieces, settled_pieces
from mrpo_scale.data.model_text import ModelText
from mrpo_scale.data.pairs import PreferencePair
from mrpo_scale.objective import Objective, combine
from mrpo_scale.training.aligned_loss import SettledPlaces, aligned_loss, settled_values
from mrpo_scale.training.sampled_loss import sampled_loss

BETA, WEIGHTS = 0.3, (0.2, 0.5, 0.3)
WORDS, END, MOST = 3, 3, 4
PREFIXES = [ids for n in range(MOST) for ids in itertools.product(range(WORDS), repeat=n)]
PLACE = {ids: i for i, ids in enumerate(PREFIXES)}
RESPONSES = [(*ids, END) for ids in PREFIXES] + list(itertools.product(range(WORDS), repeat=MOST))


def tokenizer(vocabulary, merges):
    """Byte-level BPE, its words apart as GPT-2's; `z` makes prompts."""
    words = [*vocabulary, "</s>", "z"]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


POLICY = tokenizer(["a", "Ġ", "Ġa"], [("Ġ", "a")])
#: `aa` and `Ġaa` are one token here and two of the policy's, so that what they say of the first `a` depends on the second.
SPANNING = tokenizer(["a", "Ġ", "Ġa", "aa", "Ġaa"], [("a", "a"), ("Ġ", "a"), ("Ġa", "a"), ("Ġ", "aa")])


def text_of(y):
    return POLICY.decode([token for token in y if token != END])


def token_logps(seed, responses, words, spread=1.0):
    """Of each response the log-probs of its tokens, by a table over all beginnings."""
    rows = {}
    generator = torch.Generator().manual_seed(seed)
    found = []
    for ids in responses:
        for n in range(len(ids)):
            if ids[:n] not in rows:
                rows[ids[:n]] = torch.randn(words, dtype=torch.float64, generator=generator).mul(spread).log_softmax(-1)
        found.append(torch.stack([rows[ids[:n]][ids[n]] for n in range(len(ids))]))
    return found


def naive_pieces(y, read):
    """The negative control: wherever the tokens of the whole texts happen to meet."""
    ends = [0, *itertools.accumulate(len(POLICY.decode([t])) for t in y if t != END)]
    met = [0, *itertools.accumulate(len(SPANNING.decode([t])) for t in read if t != SPANNING.eos_token_id)]
    common = [n for n in ends[1:-1] if n in met]
    before = tuple(ends.index(n) for n in common)
    return SettledPieces(("",) * (len(before) + 1), before, before), tuple(met.index(n) for n in common)


@pytest.fixture(scope="module")
def world():
    """Anchor and reference 1 in the policy's tokens, reference 2 in its own; every pair of responses, token by token."""
    model = ModelText(SPANNING, name="spanning", max_context=None)
    reads, aligned, naive = [], [], []
    for y in RESPONSES:
        words = [token for token in y if token != END]
        pieces, text, cut = settled_pieces(POLICY.decode, words), text_of(y), y[-1] != END
        read = read_pieces(model, PreferencePair("z", text, text), (pieces, pieces), (cut, cut))
        assert read.as_whole
        reads.append(tuple(read.tokens.chosen_ids))
        aligned.append(AlignedResponse(len(y), pieces, (read.before[0],)))
        met, before = naive_pieces(y, reads[-1])
        naive.append(AlignedResponse(len(y), met, (before,)))
    lengths = torch.tensor([len(y) for y in RESPONSES])
    references = [token_logps(1, RESPONSES, 4), token_logps(2, RESPONSES, 4, 1.4), token_logps(3, reads, 6, 2.5)]
    both = torch.cartesian_prod(torch.arange(len(RESPONSES)), torch.arange(len(RESPONSES)))
    places = {name: SettledPlaces.of(one, (0, 0, 1)) for name, one in (("settled", aligned), ("naive", naive))}
    return SimpleNamespace(lengths=lengths, references=references, both=both, places=places, reads=reads)


def laid_out(lengths, responses):
    """([T] place in the tokens of all responses, [S+1] bounds) of some responses, one after the other."""
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    n = lengths[responses]
    bounds = torch.cat([n.new_zeros(1), n.cumsum(0)])
    within = torch.arange(int(bounds[-1])) - bounds[:-1].repeat_interleave(n)
    return starts[responses].repeat_interleave(n) + within, bounds


def policy():
    return torch.randn(len(PREFIXES), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def places_of_tokens():
    prefix = torch.tensor([PLACE[y[:i]] for y in RESPONSES for i in range(len(y))])
    return prefix, torch.tensor([token for y in RESPONSES for token in y])


def whole_logps(logits):
    prefix, token = places_of_tokens()
    token_logps = logits.log_softmax(-1)[prefix, token]
    return token_logps, torch.stack([x.sum() for x in token_logps.split([len(y) for y in RESPONSES])])


def objective_of(clip):
    return Objective(name="kd", beta=BETA, clip=clip, epsilon_max=0.3, ref_weights=WEIGHTS)


def raw_logps(world):
    return torch.stack([torch.stack([x.sum() for x in of]) for of in world.references])[:, world.both]


def exact(world, clip, normalize):
    logits = policy().requires_grad_()
    _, logps_N = whole_logps(logits)
    ref_KP2, logps_P2 = raw_logps(world), logps_N[world.both]
    clipped_KP2 = clip_to_anchor(ref_KP2, CLIPS[clip](ref_KP2, 0.3))
    values_P2 = BETA * sum(WEIGHTS[k] * (logps_P2 - clipped_KP2[k]) for k in (1, 2))
    if normalize:
        values_P2 = values_P2 / world.lengths[world.both]
    chance_P = logps_P2.sum(-1).exp()
    assert chance_P.sum().item() == pytest.approx(1)
    loss = (chance_P * values_P2.mean(-1)).sum()
    return torch.autograd.grad(loss, logits)[0], loss.item()


def estimated(world, clip, normalize, level):
    """(mean gradient, its variance summed over parameters, mean loss) of one pair of samples, by `settled` pieces, `naive` ones, or
    the `sequence`."""
    objective, logits = objective_of(clip), policy()
    tokens_U, logps_N = whole_logps(logits)
    references = combine(raw_logps(world), objective)
    index_T, cu = laid_out(world.lengths, world.both.flatten())
    leaf_T = tokens_U[index_T].requires_grad_()
    if level == "sequence":
        logps_P2 = torch.stack([x.sum() for x in tokens_U.split(world.lengths.tolist())])[world.both]
        found = sampled_loss(
            logps_P2, references, objective, lengths_P2=world.lengths[world.both] if normalize else None
        )
        losses_P = found.losses_P
        coefficients_T = found.coefficients_P2.flatten().repeat_interleave(cu.diff())
    else:
        own = world.places[level]
        places = SettledPlaces(own.policy_KT[:, index_T], own.reference_KT[:, index_T], own.anchor_KT[:, index_T])
        logps_K, bounds_K = [], []
        for of in world.references:
            index_U, bounds = laid_out(torch.tensor([len(x) for x in of]), world.both.flatten())
            logps_K.append(torch.cat(of)[index_U])
            bounds_K.append(bounds)
        settled = settled_values(logps_K, bounds_K, places, cu, references, objective)
        losses_P = aligned_loss(leaf_T, cu, references, objective, settled, by_tokens=normalize).losses_P
        (coefficients_T,) = torch.autograd.grad(losses_P.sum(), leaf_T)
    chance_P = logps_N[world.both].sum(-1).exp()
    prefix_T, token_T = (x[index_T] for x in places_of_tokens())
    score_T4 = torch.nn.functional.one_hot(token_T, 4).double() - logits.softmax(-1)[prefix_T]
    pair_T = torch.arange(len(chance_P)).repeat_interleave(cu[::2].diff())
    mean, square = torch.zeros_like(logits), 0.0
    for start in range(0, len(chance_P), 8192):
        part = slice(int(cu[2 * start]), int(cu[min(2 * (start + 8192), len(cu) - 1)]))
        chance = chance_P[start : start + 8192]
        gradients = torch.zeros(len(chance) * len(PREFIXES), 4, dtype=torch.float64)
        rows = (pair_T[part] - start) * len(PREFIXES) + prefix_T[part]
        gradients.index_add_(0, rows, coefficients_T[part, None] * score_T4[part])
        gradients = gradients.view(len(chance), -1)
        mean += (chance[:, None] * gradients).sum(0).view_as(mean)
        square += (chance * gradients.square().sum(-1)).sum().item()
    return mean, square - mean.square().sum().item(), (chance_P * losses_P.detach()).sum().item()


#: And the variance of aligned over that of sequence, as docs/baselines.md has it.
CASES = [
    *(("fixed", True, 0.58), ("fixed", False, 0.90)),
    *(("adaptive", True, 0.59), ("adaptive", False, 0.89)),
    *(("none", True, 0.55), ("none", False, 0.93)),
]


@pytest.mark.parametrize(("clip", "normalize", "share"), CASES)
def test_the_expected_gradient_is_that_of_the_expected_loss(world, clip, normalize, share):
    gradient, loss = exact(world, clip, normalize)
    found, variance, mean = estimated(world, clip, normalize, "settled")
    plain, whole_variance, _ = estimated(world, clip, normalize, "sequence")
    biased, _, _ = estimated(world, clip, normalize, "naive")
    error = (biased - gradient).norm() / gradient.norm()
    print(f"{clip} {normalize}: naive off by {error:.4f}, variance {variance:.4g} of {whole_variance:.4g}")
    assert gradient.norm() > 0.005
    assert (found - gradient).abs().max() < 1e-12
    assert (plain - gradient).abs().max() < 1e-12
    assert mean == pytest.approx(loss, rel=1e-12)
    assert error > 0.005, "the negative control"
    assert variance / whole_variance == pytest.approx(share, abs=0.006)
