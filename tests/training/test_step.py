"""A run prepared without a trainer, one step of it taken by hand, and the phases that a step reports."""

from contextlib import contextmanager
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from benchmarks.dealing import as_drawn
from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base.errors import TrainingError
from mrpo_scale.data.dealing import WindowShape, deal
from mrpo_scale.data.inputs import TRAIN_SET
from mrpo_scale.objective import loss_against
from mrpo_scale.training import step
from mrpo_scale.training.callbacks import StepClock
from mrpo_scale.training.prepare import prepare_run, window_sampler
from mrpo_scale.training.step import StepSums, finish_window, micro_batches, optimizer_step, policy_loss
from tests.tiny import pair_dataset, write_models

ROWS, WINDOW = 12, 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def config(folder, **keys):
    return MRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **keys,
    )


class Phases(StepClock):
    """Which phases begin and end, in order."""

    def __init__(self):
        super().__init__()
        self.passed = []

    def start_step(self):
        super().start_step()
        self.passed.append("step")

    @contextmanager
    def phase(self, name):
        self.passed.append(name)
        with super().phase(name):
            yield
        self.passed.append(f"/{name}")


def loader_of(run):
    """Micro-batches as the Trainer's data loader makes them."""
    order = list(window_sampler(run.args, run.pair_sets[TRAIN_SET], run.shared_prompt, run.end_to_end))
    return iter([[run.train[i] for i in order[start : start + 4]] for start in range(0, len(order), 4)])


def test_a_step_is_taken_without_a_trainer(folders, tmp_path):
    """Its loss and gradients are those of the trainer's first step."""
    evals = pair_dataset(5, 1)
    run = prepare_run(folders["llama"], [folders["qwen2"]], config(tmp_path / "a"), pair_dataset(ROWS), evals, None, {})
    assert run.plan.names == ["anchor", "qwen2"] and len(run.train) == ROWS
    assert run.held_out == [run.evals]
    with pytest.raises(FrozenInstanceError):
        run.objective = None
    sums, clock = StepSums(), Phases()
    batches, num_pairs, loss_of_batch = optimizer_step(run, loader_of(run), 2, 1, sums, clock)
    assert num_pairs == WINDOW and sum(len(batch.rows) for batch in batches) == WINDOW
    run.policy.train()
    losses = [loss_of_batch(run.policy, batch) for batch in batches]
    sum(losses).backward()
    norm = torch.stack([p.grad.norm() for p in run.policy.parameters()]).norm().item()
    trainer = MRPOTrainer(folders["llama"], [folders["qwen2"]], config(tmp_path / "b"), pair_dataset(ROWS))
    trainer.train()
    first = trainer.state.log_history[0]
    assert sum(losses).item() == pytest.approx(first["loss"], rel=1e-6)
    assert norm == pytest.approx(first["grad_norm"], rel=1e-5)
    assert sums.metrics.means()["rewards/margins"] == pytest.approx(first["rewards/margins"], rel=1e-6)
    assert sums.tokens == sum(batch.pairs.num_tokens for batch in batches)
    batch = ["head and loss", "/head and loss"]
    assert clock.passed == ["step", "data", "references", "/references", "/data", *batch, *batch]


def window_of(run, shape, dealt_by):
    """Loss and gradients of the first window as ``shape.ranks`` ranks compute them, one after the other in this process."""
    sampler = window_sampler(run.args, run.pair_sets[TRAIN_SET], run.shared_prompt, run.end_to_end)
    sampler.shape = shape
    window = next(sampler.windows())
    dealt = dealt_by(sampler.lengths_N[[draw.row for draw in window]], shape)
    order = sampler.arranged(window, dealt)
    batches_BP = [order[i : i + shape.pairs] for i in range(0, len(order), shape.pairs)]
    run.policy.zero_grad()
    loss, rows = torch.zeros(()), []
    for rank in range(shape.ranks):
        examples = [run.train[draw] for batch in batches_BP[rank :: shape.ranks] for draw in batch]
        references = run.scores.score(examples, run.pair_sets[TRAIN_SET], run.objective)
        batches = micro_batches(run, examples, references)
        assert len(batches) == len(dealt.micro_batches)
        for batch in batches:
            _, _, share, _ = policy_loss(run, run.policy, batch, torch.tensor(float(len(window))))
            share.backward()
            loss += share.detach()
            rows += batch.rows
    assert sorted(rows) == sorted(draw.row for draw in window)
    return loss.item(), torch.stack([p.grad.double().norm() for p in run.policy.parameters()])


@pytest.mark.parametrize("max_tokens", [None, 150])
def test_who_computes_a_pair_changes_nothing(folders, tmp_path, max_tokens):
    """Dealt by chance or by length, in micro-batches of 2 pairs or of so many tokens, live references included."""
    run = prepare_run(folders["llama"], [folders["qwen2"]], config(tmp_path), pair_dataset(40), None, None, {})
    run.policy.train()
    old_loss, old_norms = window_of(run, WindowShape(4, 2, 2), as_drawn)
    new_loss, new_norms = window_of(run, WindowShape(4, 2, 2, max_tokens), deal)
    assert new_loss == pytest.approx(old_loss, rel=1e-6)
    torch.testing.assert_close(new_norms.norm(), old_norms.norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(new_norms, old_norms, rtol=1e-5, atol=1e-8)


def test_the_trainer_reports_every_phase_to_its_timer(folders, tmp_path):
    clock = Phases()
    trainer = MRPOTrainer(folders["llama"], [], config(tmp_path), pair_dataset(2 * WINDOW), clock=clock)
    trainer.train()
    batch = ["head and loss", "/head and loss"]
    step = ["step", "data", "references", "/references", "/data", *batch, *batch, "optimizer", "/optimizer"]
    step += ["logging", "/logging"]
    assert clock.passed[: 2 * len(step)] == 2 * step
    assert len(clock.steps) == len(clock.references) == 2
    assert all(0 < references < seconds for references, seconds in zip(clock.references, clock.steps, strict=True))


def test_a_prepared_run_takes_the_pairs_and_scores_that_it_is_given(folders, tmp_path):
    """What `mrpo bench` replaces."""
    opened = []

    def open_scores(plan, args, pair_sets):
        opened.append((plan.names, {split: len(pairs) for split, pairs in pair_sets.items()}))
        return prepare_run.__kwdefaults__["open_scores"](plan, args, pair_sets)

    run = prepare_run(
        folders["llama"],
        [folders["qwen2"]],
        config(tmp_path),
        pair_dataset(ROWS),
        None,
        None,
        {},
        select_pairs=lambda args, sets: {TRAIN_SET: sets[TRAIN_SET].select(range(5))},
        open_scores=open_scores,
    )
    assert opened == [(["anchor", "qwen2"], {TRAIN_SET: 5})]
    assert len(run.train) == 5 and run.evals is None and run.held_out == []


def test_a_loss_that_is_not_finite_names_its_rows(folders, tmp_path):
    run = prepare_run(folders["llama"], [], config(tmp_path), pair_dataset(ROWS), None, None, {})
    sums = StepSums()
    batches, _, loss_of_batch = optimizer_step(run, loader_of(run), 2, 7, sums, StepClock())
    with torch.no_grad():
        run.policy.get_output_embeddings().weight.fill_(torch.nan)
    for batch in batches:
        loss_of_batch(run.policy, batch)
    with pytest.raises(TrainingError, match=r"step 7 is not finite for training pairs of rank 0: .*All ranks stop"):
        finish_window(run, sums)


def test_the_optimizer_does_not_move_where_a_loss_is_not_finite(folders, tmp_path, monkeypatch):
    """One pair of the second micro-batch of the second step: its row is named, and the weights are those after the first step."""
    trainer = MRPOTrainer(folders["llama"], [], config(tmp_path), pair_dataset(2 * WINDOW))
    seen, weights = [], []

    def spoiled(logps_P2, references, objective, lengths_P2):
        loss = loss_against(logps_P2, references, objective, lengths_P2)
        seen.append(loss)
        if len(seen) == 4:
            weights.extend(p.detach().clone() for p in trainer.policy.parameters())
            spoil_P = torch.tensor([0.0, 0.0, torch.inf, 0.0])
            return replace(loss, losses_P=loss.losses_P + spoil_P)
        return loss

    monkeypatch.setattr(step, "loss_against", spoiled)
    trainer.args.head_backward = "recompute"
    with pytest.raises(TrainingError, match=r"step 2 is not finite for training pairs of rank 0: [^,;]* \(row numbers"):
        trainer.train()
    assert len(seen) == 4 and trainer.state.global_step == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.policy.parameters(), strict=True))
