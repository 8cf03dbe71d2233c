"""The check before a model is trained or believed: what it finds out by trial, and what it refuses in one line."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.logit_transform import LogitTransform, candidates, choose
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import choose_shared_prompt, enable_pair_scoring, score_pairs
from mrpo_scale.logps.self_check import LONGEST_WINDOW, check_pair_scoring, make_probe
from mrpo_scale.models.plan import disable_dropout, original_dropout
from tests.tiny_types import tiny_model

CPU = torch.device("cpu")
PAIRS = [PairTokens([20] * 11 + [31], [4, 9], [13, 12, 11, 60, 61]), PairTokens([15, 16, 17], [19, 10, 11], [12])]


def small(model_type, **options):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    sizes |= {"num_key_value_heads": 2, "vocab_size": 97, "pad_token_id": 0, "max_position_embeddings": 512}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model


@torch.no_grad()
def plain_logps(model):
    values = []
    for pair in PAIRS:
        for response in (pair.chosen_ids, pair.rejected_ids):
            logps_LV = model(input_ids=torch.tensor([pair.prompt_ids + response])).logits[0].double().log_softmax(-1)
            rows = torch.arange(len(response)) + len(pair.prompt_ids) - 1
            values.append(logps_LV[rows, torch.tensor(response)].sum())
    return torch.stack(values).view(-1, 2)


def check(model, **options):
    shared = choose_shared_prompt("auto", model, "model")
    return check_pair_scoring(model, "model", shared_prompt=shared, device=CPU, **options)


@torch.no_grad()
def pair_logps(model):
    return score_pairs(model, collate_pairs(PAIRS, shared_prompt=choose_shared_prompt("auto", model, "model")))


# ---- what is done to the head's numbers ------------------------------------------------------------------------------


MLA = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 16, "num_key_value_heads": 4}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
RECURRENT = {"lru_width": 32, "num_key_value_heads": 4, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    [
        ("granite", {"logits_scaling": 4.0}, (None, 0.25)),
        ("hyperclovax", {"logits_scaling": 4.0}, (None, 4.0)),  # the same key, multiplied
        ("cohere", {"logit_scale": 0.3}, (None, 0.3)),
        ("falcon_h1", {"lm_head_multiplier": 0.2, **MAMBA}, (None, 0.2)),
        ("gemma2", {"final_logit_softcapping": 3.0}, (3.0, 1.0)),
        ("recurrent_gemma", {"logits_soft_cap": 3.0, **RECURRENT}, (3.0, 1.0)),
        ("minicpm3", {"dim_model_base": 8, **MLA}, (None, 0.25)),  # scales what goes into the head
        ("llama", {}, (None, 1.0)),
    ],
)
def test_scale_and_softcap_are_found_by_trial(model_type, options, expected):
    model = small(model_type, **options)
    plain = plain_logps(model)
    enable_pair_scoring(model, model_type)
    assert check(model) < 1e-5
    head = model.get_output_embeddings()
    assert (head.softcap, head.logit_scale) == (expected[0], pytest.approx(expected[1]))
    assert ((pair_logps(model) - plain) / plain).abs().max() < 1e-5


@pytest.mark.parametrize("wrong", [{"logit_scale": 1.0}, {"logit_scale": 4.0}, {"softcap": 30.0}])
def test_a_wrong_reading_of_the_config_is_corrected(wrong):
    model = small("granite", logits_scaling=4.0)
    enable_pair_scoring(model, "granite")
    head = model.get_output_embeddings()
    vars(head).update(wrong)
    assert check(model) < 1e-5
    assert (head.softcap, head.logit_scale) == (None, 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_that_small_logits_do_not_show_is_found(dtype):
    """Logits of at most 1 under a cap of 30 change by 4e-4, a tenth of bfloat16's rounding; the ones after training will not."""
    model = small("gemma2", final_logit_softcapping=30.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    model = model.to(dtype)
    enable_pair_scoring(model, "gemma2")
    head = model.get_output_embeddings()
    head.softcap = None
    check(model)
    assert head.softcap == 30.0


@pytest.mark.parametrize("cap", [3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_softcap_of_a_wrappers_text_config(cap, dtype):
    """As Gemma 4's has it; in bfloat16 a cap of 3 that is left out stays within 0.1 nats a token."""
    model = tiny_model("gemma4")
    model.config.text_config.final_logit_softcapping = cap
    model = model.to(dtype)
    enable_pair_scoring(model, "gemma4")
    check(model)
    assert model.get_output_embeddings().softcap == cap
    assert LogitTransform(cap) in candidates(model.config)


def test_no_reading_is_chosen_where_none_fits():
    said_V = torch.linspace(-50, 50, 96)
    readings = [LogitTransform(cap, scale) for cap in (None, 30.0) for scale in (1.0, 0.25)]
    for reading in readings:
        assert choose(readings, said_V, reading(said_V)) == reading
        assert choose(readings, said_V.bfloat16(), reading(said_V.bfloat16())) == reading
    assert choose(readings, said_V, said_V.clamp(max=40)) is None
    assert choose(readings, said_V, said_V + 0.01) is None


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused(monkeypatch):
    model = small("llama")
    plain_forward = type(model).forward

    def forward(self, *args, **kwargs):
        output = plain_forward(self, *args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    enable_pair_scoring(model, "llama")
    with pytest.raises(ConfigError, match=r"model \(LlamaForCausalLM\): its logits differ from its own head's output"):
        check(model)


# ---- who sees what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["cpmant", "xlnet", "xlm"])
def test_a_model_whose_prompt_sees_the_answer_is_refused(model_type):
    model = tiny_model(model_type)
    enable_pair_scoring(model, model_type)
    with pytest.raises(ConfigError, match="not causal and its log-probs would see the answer"):
        check(model)


class PaddingCounts(nn.Module):
    """Positions that depend on how much padding follows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        x = self.inner(ids)
        return x * (1 + 0.3 * (ids == 0).float().mean(1)).to(x.dtype)[:, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whom_padding_changes_is_refused(dtype):
    """Padded rows against padded rows agree."""
    model = small("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=512).to(dtype)
    model.transformer.wte = PaddingCounts(model.transformer.wte)
    enable_pair_scoring(model, "gpt2")
    with pytest.raises(ConfigError, match="differ from its own logits"):
        check(model)


def test_the_probe_is_longer_than_every_window_up_to_a_bound():
    def length(**options):
        return len(make_probe(AutoConfig.for_model("mistral", vocab_size=97, **options), 97).texts[0])

    assert length(sliding_window=700) > 716
    assert length(sliding_window=LONGEST_WINDOW + 1) < 200
    assert length(sliding_window=None) < 200
    assert length(sliding_window=700, max_position_embeddings=40) <= 40


def test_the_probe_uses_no_special_token():
    config = GPT2Config(vocab_size=6, n_positions=64, pad_token_id=1, bos_token_id=2, eos_token_id=[0, 4])
    probe = make_probe(config, 6)
    assert {i for text in probe.texts for i in text} <= set(range(6))
    config = AutoConfig.for_model("llama", vocab_size=32, pad_token_id=7, bos_token_id=8, eos_token_id=9)
    assert not {7, 8, 9} & {i for text in make_probe(config, 32).texts for i in text}


def test_a_crash_in_the_check_is_one_line(monkeypatch):
    model = small("llama")
    enable_pair_scoring(model, "llama")
    monkeypatch.setattr(model.model.layers[0], "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(
        ConfigError, match=r"model \(LlamaForCausalLM\): it failed on the few tokens.*ZeroDivisionError"
    ) as error:
        check(model)
    assert "\n" not in str(error.value)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def train_difference(model):
    evaluated = pair_logps(model.eval())
    trained = pair_logps(model.train())
    model.eval()
    return ((trained - evaluated) / evaluated).abs().max().item()


# A number kept by a module under a name of its own; one read from the config at each forward; a module of the model's own.
@pytest.mark.parametrize(
    "model_type", ["seed_oss", "opt", "gpt_bigcode", "bart", "starcoder2", "gpt_neo", "falcon", "xlnet"]
)
def test_dropout_is_disabled_under_whatever_name(model_type):
    model = tiny_model(model_type, dropout=0.1)
    enable_pair_scoring(model, model_type)
    assert train_difference(model) > 1e-4
    before = model.config.to_dict()
    replaced = disable_dropout(model)
    assert train_difference(model) <= 1e-5
    with original_dropout(replaced):
        assert model.config.to_dict() == before
    assert train_difference(model) <= 1e-5


class Noise(nn.Module):
    """Random in train mode, under no name that speaks of dropout."""

    def forward(self, x):
        return x * (1 + 0.3 * torch.randn_like(x)) if self.training else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_trains_with_noise_is_refused(dtype):
    model = small("llama").to(dtype)
    model.model.layers[1].mlp.act_fn = nn.Sequential(nn.SiLU(), Noise())
    enable_pair_scoring(model, "llama")
    state = torch.random.get_rng_state()
    check(model)  # as a reference it is evaluated only
    with pytest.raises(ConfigError, match=r"log-probs in train mode differ .*`disable_dropout: false`"):
        check(model, train_equals_eval=True)
    assert not model.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bounds_follow_the_parameters_dtype_not_the_logits():
    """Mamba's logits are float32 whatever its weights are; a float32 bound refused it in bfloat16."""
    model = tiny_model("mamba").to(torch.bfloat16)
    enable_pair_scoring(model, "mamba")
    assert model(input_ids=torch.tensor([[10, 11]]), use_cache=False).logits.dtype == torch.float32
    check(model)


def test_messages_are_one_line():
    model = tiny_model("bert")
    enable_pair_scoring(model, "bert")
    with pytest.raises(ConfigError) as error:
        check(model)
    assert re.fullmatch(r"model \(BertLMHeadModel\): [^\n]+", str(error.value))
