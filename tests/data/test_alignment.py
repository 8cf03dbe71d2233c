"""Settled cuts: nothing that is sampled later moves one, or changes a reference's tokens before it."""

import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mrpo_scale.data.alignment import AlignedResponse, read_pieces, settled_pieces
from mrpo_scale.data.model_text import ModelText
from mrpo_scale.data.pairs import PreferencePair
from tests.tiny import CHATML, NO_SYSTEM, tokenizer


def fast(backend, words):
    backend.add_special_tokens(["</s>"])
    assert len(set(words)) == len(words)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def byte_level(words, merges):
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return fast(backend, words)


def across_words():
    """No pre-tokenizer, and a token that spans the end of a word: what it reads of a word depends on the next one."""
    words = ["a", "b", "é", "z", "▁", "a▁", "▁a", "b▁a", "aa"]
    merges = [("a", "▁"), ("▁", "a"), ("b", "▁a"), ("a", "a")]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges, unk_token="z"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    return fast(backend, words)


E_ACUTE = ("Ã", "©")  # the two bytes of é
POLICY = byte_level(["a", "b", "Ġ", "Ġa", *E_ACUTE, "aĠ"], [("Ġ", "a")])
REFERENCES = {
    "of the same words": byte_level(["a", "b", "Ġ", "Ġa", "aa", "ab", *E_ACUTE, "Ã©", "z"], [("a", "a"), ("Ã", "©")]),
    "across words": across_words(),
}


def decode(ids):
    return POLICY.decode(ids, skip_special_tokens=True)


def ids_of(*tokens):
    return POLICY.convert_tokens_to_ids(list(tokens))


def test_a_cut_stands_before_a_space_that_a_word_follows_and_waits_for_it():
    pieces = settled_pieces(decode, ids_of("a", "b", "Ġa", "Ġ", "b", "Ġ", "Ġa"))
    # Not before the last two: one space more follows the first of them, and white space stands before the second.
    assert pieces.texts == ("ab", " a", " b  a")
    assert pieces.before == (2, 3) and pieces.known == (3, 5)
    assert pieces.reached(8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    aligned = AlignedResponse(8, pieces, ((1, 4),))
    assert aligned.settled(0, every_token=False).tolist() == [0, 0, 0, 2, 2, 3, 3, 3]
    assert aligned.settled(1, every_token=False).tolist() == [0, 0, 0, 1, 1, 4, 4, 4]
    assert aligned.settled(0, every_token=True).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("tokens", "texts", "before"),
    [
        ((), ("",), ()),
        (("a",), ("a",), ()),
        (("Ġa", "Ġa"), (" a", " a"), (1,)),  # white space before the first word is no piece
        (("a", "Ġ"), ("a ",), ()),
        (("aĠ", "a"), ("a a",), ()),  # a token of the policy spans the place
        (("a", "</s>", "Ġa"), ("a", " a"), (2,)),  # a token without text belongs to what stands before it
        ((*E_ACUTE, "Ġa"), ("é", " a"), (2,)),
        (("a", "Ġ", *E_ACUTE), ("a", " é"), (1,)),
        (("Ã", "Ġa"), ("\N{REPLACEMENT CHARACTER}", " a"), (1,)),  # bytes that are no text
    ],
)
def test_what_is_cut(tokens, texts, before):
    pieces = settled_pieces(decode, ids_of(*tokens))
    assert pieces.texts == texts and pieces.before == before
    assert "".join(pieces.texts) == decode(ids_of(*tokens))
    assert all(known > cut for known, cut in zip(pieces.known, pieces.before, strict=True))


@pytest.mark.parametrize("name", REFERENCES)
def test_nothing_sampled_later_changes_what_is_settled(name):
    """Every response of five tokens against every other that begins as it does, for any tokenizer."""
    model = ModelText(REFERENCES[name], name="r", max_context=None)
    settled_at, reread, cuts = {}, 0, 0
    for y in itertools.product(range(7), repeat=4):
        pieces, text = settled_pieces(decode, y), decode(y)
        read = read_pieces(model, PreferencePair("z", text, text), (pieces, pieces), (False, True))
        reread += not read.as_whole
        ids = read.tokens.chosen_ids
        assert read.tokens.rejected_ids == ids[:-1] and read.before[0] == read.before[1]
        for t, count in enumerate(pieces.reached(len(y) + 1)):
            before = read.before[0][:count]
            found = (pieces.before[:count], before, ids[: before[-1]] if count else [])
            assert settled_at.setdefault(y[:t], found) == found, (y, t)
            cuts += int(count > 0)
    assert cuts > 100
    assert (reread > 0) == (name == "across words")


def test_templates_and_ends_are_those_of_the_whole_text():
    """Also where the template trims responses, and of two samples only one has words."""
    trimming = CHATML.replace("m['content']", "m['content'] | trim")
    for template in (CHATML, NO_SYSTEM, trimming, None):
        model = ModelText(tokenizer(template, 290), name="r", max_context=None)
        policy = tokenizer(CHATML, 320)
        for texts in (
            (" one two three\n", "four"),
            ("five", "red  blue green "),
            ("slow", "yes"),
            ("one, two. three!", "x y"),
        ):
            ids = [policy(text)["input_ids"] for text in texts]
            pair = PreferencePair([{"role": "user", "content": "six"}], *texts)
            both = tuple(settled_pieces(policy.decode, one) for one in ids)
            for cut in ((False, True), (True, False)):
                read = read_pieces(model, pair, both, cut)
                whole = model.ids(
                    model.read(pair), tuple(len(t) if c else None for t, c in zip(texts, cut, strict=True))
                )
                assert read.as_whole and read.tokens == whole, (template, texts)
    assert [len(one.before) for one in both] == [2, 1]
    assert np.all(np.diff(both[0].known) > 0)
