"""The paper's tables: marks, measures and layout by hand; directions swapped; weights that never see what is reported."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.compare.command import compare
from mrpo_scale.compare.paper_cells import fill
from mrpo_scale.compare.paper_plan import TablePlan
from mrpo_scale.compare.paper_results import Cell, mark, measure, untrained
from mrpo_scale.compare.paper_show import Filled, as_html, as_json, as_markdown, as_text, plot
from mrpo_scale.compare.paper_tables import ACCURACY, MARGIN, REWARD_ACCURACY, TABLES, PaperTable, methods_of
from mrpo_scale.compare.plan import read_words
from mrpo_scale.compare.sides import plan_sides, without
from mrpo_scale.compare.weight_choice import validation_keys
from mrpo_scale.config.recipe import parse
from mrpo_scale.objective import Objective
from mrpo_scale.training.held_out import HeldOutScores
from tests.tiny import pair_rows, write_models


def column(**values):
    return mark({name: Cell(some, 2) for name, some in values.items()})


def marks(filled_column):
    return {name: cell.mark for name, cell in filled_column.cells.items() if cell.mark}


def test_bold_is_different_from_every_other_and_italic_second():
    """Means 0.65, 0.61, 0.5; deviations sqrt(2) points twice and none: d = 4 / sqrt(2) and 15 / sqrt((2 + 0) / 2)."""
    found = column(DPO=[0.60, 0.62], KD=[0.5, 0.5], MRPO=[0.64, 0.66])
    assert marks(found) == {"MRPO": "best", "DPO": "second"} and found.best == "MRPO"
    assert found.distances == pytest.approx({"DPO": 4 / 2**0.5, "KD": 15.0})
    # 0.63 and 0.62 with variances of 2 and 8 squared points: d = 1 / sqrt(5) = 0.447, below 0.5.
    close = column(DPO=[0.60, 0.64], KD=[0.5, 0.5], MRPO=[0.62, 0.64])
    assert marks(close) == {"DPO": "second"} and close.best == "MRPO"
    assert close.distances["DPO"] == pytest.approx(5**-0.5)


def test_what_cannot_be_bold():
    assert marks(column(DPO=[0.6], MRPO=[0.7])) == {"DPO": "second"}, "one seed has no deviation"
    assert marks(column(DPO=[0.6, 0.6], MRPO=[0.7, 0.7])) == {"DPO": "second"}, "nothing varies: no effect size"
    assert marks(column(DPO=[0.6, 0.8], MRPO=[0.8, 0.6], KD=[0.1, 0.2])) == {}, "a tie"
    assert marks(column(MRPO=[0.7, 0.8])) == {}, "nothing to differ from"
    hole = column(DPO=[], KD=[0.5, 0.52], MRPO=[0.6, 0.62])
    assert marks(hole) == {"MRPO": "best", "KD": "second"} and set(hole.distances) == {"KD"}
    assert hole.cells["DPO"].mean is None


KEYS = np.array([f"{i:016d}" for i in range(4)], dtype="S16")


def test_what_the_paper_measures_by_hand():
    """Log-ratios to the anchor: chosen and rejected of three pairs. Against the mean of both references others are right."""
    policy = np.array([[-1, -2], [-3, -3], [-5, -2]], dtype=np.float32)
    anchor = np.array([[-2, -2], [-2, -4], [-4, -2]], dtype=np.float32)
    other = np.array([[-4, -2], [-8, -4], [-8, -2]], dtype=np.float32)
    scores = HeldOutScores(["anchor", "B"], KEYS[:3], policy, np.stack([anchor, other]))
    objective = Objective(
        beta=0.5, clip="none", ref_weights=[0.5, 0.5], aggregate="geometric", loss_type="sigmoid_norm"
    )
    # policy - anchor: (1, 0), (-1, 1), (-1, 0): margins 1, -2, -1 times beta. Log-probs: 1, 0, -3: one right.
    plain = measure(scores, objective, virtual=False)
    assert (plain.reward_accuracy, plain.accuracy, plain.pairs) == pytest.approx((1 / 3, 1 / 3, 3))
    assert plain.reward_margin == pytest.approx(0.5 * (1 - 2 - 1) / 3)
    # virtual: (-3, -2), (-5, -4), (-6, -2): policy - virtual (2, 0), (2, 1), (1, 0): margins 2, 1, 1: all right.
    held = measure(scores, objective, virtual=True)
    assert held.reward_accuracy == 1.0 and held.reward_margin == pytest.approx(0.5 * 4 / 3)
    # Untrained, the policy is the anchor: no reward but the virtual reference's. (1, 0), (3, 0), (2, 0).
    start = untrained(scores)
    assert measure(start, objective, virtual=False).reward_margin == 0.0
    assert measure(start, objective, virtual=True).reward_margin == pytest.approx(0.5 * 6 / 3)


def filled(name="paper1", **changes):
    """Three methods in two directions of one set, by hand."""
    table: PaperTable = TABLES[name]
    names = [method.name for method in table.methods][:3]
    cells = [([0.6, 0.62], [], [0.64, 0.66]), ([0.5, 0.7], [0.4], [0.6, 0.6])]
    columns = [mark({name: Cell(values, 2) for name, values in zip(names, some, strict=True)}) for some in cells]
    values = {
        "title": "Table",
        "table": table,
        "methods": names,
        "sides": [("S|1", "a <- b"), ("S|1", "b <- a")],
        "columns": dict.fromkeys(table.blocks, columns),
        "before": {REWARD_ACCURACY: {names[2]: [0.55, None]}},
        "pairs": [10, 11],
        "set_aside": [9, 0],
        "seeds": [7, 8],
        "holes": ["<script>: it failed"],
        **changes,
    }
    return Filled(**values)


def test_the_layout_by_hand(tmp_path):
    lines = as_text(filled(), styled=False).splitlines()
    assert lines[4:10] == [
        "      S|1",
        "      a <- b              b <- a",
        "-----------------------------------------",
        "DPO   *61.0 ± 1.4 (2)*    60.0 ± 14.1 (2)",
        "RLHF  - (0 of 2)          40.0 (1 of 2)",
        "KD    **65.0 ± 1.4 (2)**  60.0 ± 0.0 (2)",
    ]
    shown = as_text(filled(), styled=True).splitlines()
    assert "\033[1m65.0 ± 1.4 (2)" in shown[9] and "\033[3m61.0" in shown[7]
    notes = " ".join(" ".join(lines).split())
    assert "S|1, a <- b: 10 (9 others chose the weights); S|1, b <- a: 11" in notes
    assert "Preference accuracy, S|1, a <- b: best is KD; d to DPO +2.83" in notes
    assert "S|1, b <- a: DPO, KD share the highest mean" in notes
    assert "HOLE: <script>: it failed" in notes
    assert "Preference accuracy of KD before any training: S|1, a <- b: 55.0; S|1, b <- a: -." in notes
    markdown = as_markdown(filled())
    assert "| DPO | *61.0 ± 1.4 (2)* | 60.0 ± 14.1 (2) |" in markdown and "|  | S\\|1, a &lt;- b |" in markdown
    page = as_html(filled())
    assert "<td><b>65.0 ± 1.4 (2)</b></td>" in page and '<th colspan="2">S|1</th>' in page and "<th>a ← b</th>" in page
    assert "<script>" not in page and "&lt;script&gt;: it failed" in page
    plot(filled(), tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads(json.dumps(as_json(filled())))
    assert told["blocks"]["reward_accuracy"]["methods"]["RLHF"][0] == {
        "values": [],
        "planned_seeds": 2,
        "mean": None,
        "standard_deviation": None,
        "mark": None,
    }


def test_table_5_has_its_sizes_across():
    lines = as_text(filled("paper5"), styled=False).splitlines()
    assert lines[4].split() == ["eps", "0", "(DPO)", "eps", "1e6", "(no", "clip)", "eps", "1"]
    assert lines[5].split() == ["(i)", "(ii)"] * 3 and "(i) a <- b; (ii) b <- a." in lines
    assert lines[7].startswith("S|1") and lines[7].count("(2)") == 4


def recipe(root, **more):
    (root / "r.yaml").write_text(
        "model_name_or_path: A\nref_models: [{model: B, dtype: bfloat16, chat_template: t.jinja}, C]\ndataset_name: pairs.json\n"
        "held_out: 4\nmodel_revision: main\nuse_cpu: true\nreport_to: none\n"
    )
    return str(root / "r.yaml")


def sides(root, *argv, sets=(), both_ways=True):
    values, script, config = read_words(recipe(root), list(argv))
    return plan_sides(values, list(argv), script, config, sets=sets, both_ways=both_ways, root=root / "out")


def test_the_other_direction_swaps_models_and_keeps_roles(tmp_path):
    one, other = sides(
        tmp_path, "--max_steps", "3", "--ref_models", '{"model": "B", "dtype": "bfloat16", "quantize": "nf4"}', "D"
    )
    assert (one.direction, other.direction) == ("A <- B", "B <- A")
    assert one.values["ref_models"] == [{"model": "B", "dtype": "bfloat16", "quantize": "nf4"}]
    assert one.values["model_revision"] == "main" and "model_revision" not in other.values
    assert other.values["model_name_or_path"] == "B"
    assert other.values["ref_models"] == [{"model": "A", "revision": "main", "dtype": "bfloat16", "quantize": "nf4"}]
    assert one.argv == other.argv == ("--max_steps", "3"), "the models are in the recipe"
    for side in (one, other):
        side.write_recipe()
        script, _ = parse([f"--config={side.recipe_file}", *side.argv])
        assert script.model_name_or_path == side.direction[0] and script.held_out == 4
    # B's chat template goes with B.
    one, other = sides(tmp_path)
    assert other.values["chat_template"] == "t.jinja" and "chat_template" not in one.values
    # Table 5: the policy with each further reference.
    assert [side.direction for side in sides(tmp_path, both_ways=False)] == ["A <- B", "A <- C"]


def test_sets(tmp_path):
    found = sides(
        tmp_path, "--held_out=3", sets=["x.json", "{name: S2, dataset_name: y, held_out: 0.5, num_train_epochs: 1}"]
    )
    assert [(side.set_name, side.direction[0]) for side in found] == [
        ("x.json", "A"),
        ("x.json", "B"),
        ("S2", "A"),
        ("S2", "B"),
    ]
    assert found[0].values["dataset_name"] == "x.json" and found[0].argv == ("--held_out=3",)
    assert found[2].values["held_out"] == 0.5 and found[2].values["num_train_epochs"] == 1 and found[2].argv == ()
    assert without(["--a", "1", "--b=2", "--c", "x", "y", "--d"], ["b", "c"]) == ["--a", "1", "--d"]
    for words, said in (
        ("{name: S}", "is no set"),
        ("{dataset_name: x, seed: 1}", "`seed` is not a set's to say"),
        ("{dataset_name: [", "is no set"),
    ):
        with pytest.raises(ConfigError, match=said):
            sides(tmp_path, sets=[words])
    with pytest.raises(ConfigError, match="the same folder"):
        sides(tmp_path, sets=["x", "x"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--table", "paper3"], "paper3"),
        (["--table", "paper1", "--objectives", "mrpo"], "`--objectives` has no meaning with `--table paper1`"),
        (["--sets", "x"], "`--sets` needs `--table`"),
        (["--table", "paper1", "--fixed_weights", "1.5"], "`--fixed_weights 1.5`"),
        (["--table", "paper1", "--choose_on", "1"], "`--choose_on 1`"),
        (["--table", "paper2", "--methods", "KD"], "not in the paper's Table 2"),
        (["--table", "paper1", "--anchor", "C"], "`anchor: C`"),
        (["--table", "paper1", "--ref_weights", "validation"], "`ref_weights: validation`"),
        (
            [
                "--table",
                "paper1",
                "--ref_models",
                '{"model": "B", "url": "http://h:1/v1", "tokenizer": "B", "revision": "1"}',
            ],
            "url",
        ),
    ],
)
def test_mistakes_name_key_value_and_remedy(more, said, tmp_path):
    with pytest.raises(ConfigError) as error:
        compare(["--config", recipe(tmp_path), "--output", str(tmp_path / "out"), *more])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_pairs_of_a_prompt_stay_together():
    keys = np.array([f"{i:016d}" for i in range(9)], dtype="S16")
    prompts = np.array([5, 5, 5, 2, 2, 9, 9, 7, 7])
    assert validation_keys(keys, prompts, 0.5).tolist() == keys[[0, 1, 2, 3, 4]].tolist(), "prompts 2 and 5 of four"
    assert len(validation_keys(keys, prompts, 0.01)) == 2 and len(validation_keys(keys, prompts, 0.99)) == 7


N = 8
ROWS = np.array([f"{i:016d}" for i in range(N)], dtype="S16")
ASIDE = np.arange(N) < 4  #: weights are chosen on the first four pairs


def finish(slot, right):
    """A run's folder as training leaves it, whose policy ranks the pairs ``right`` right, by log-probs and by rewards."""
    slot.run.folder.mkdir(parents=True, exist_ok=True)
    policy = np.stack([np.where(right, -1.0, -3.0), np.full(N, -2.0)], -1).astype(np.float32)
    refs = np.full((1 if slot.method.objective == "dpo" else 2, N, 2), -2.0, dtype=np.float32)
    HeldOutScores(["anchor", "B"][: len(refs)], ROWS, policy, refs).save(slot.run.folder / "eval_logps.npz")
    state = {"global_step": 4, "max_steps": 4, "log_history": []}
    (slot.run.folder / "trainer_state.json").write_text(json.dumps(state))
    (slot.run.folder / "compare.json").write_text(json.dumps({"settings": slot.run.settings}))


def hand_plan(root, methods):
    table = TABLES["paper1"]
    plan = TablePlan(
        name="paper1",
        table=table,
        methods=methods_of(table, methods),
        sides=sides(root),
        config=read_words(recipe(root), [])[2],
        seeds=range(7, 9),
        weights=[0.1, 0.5, 0.9],
        folder=root / "out",
        cache=(),
        launch="",
        left_out=[],
    )
    for side in plan.sides:
        side.write_recipe()
        plan.validation[side.folder] = ROWS[ASIDE]
    return plan


def test_weights_are_chosen_on_pairs_that_no_table_reports(tmp_path):
    """0.1 is right on what is set aside and nowhere else, 0.5 on all that is reported, 0.9 failed: 0.1 it is, and reported as 0."""
    plan = hand_plan(tmp_path, ["DPO", "Multi-DPO"])
    side = plan.sides[0]
    multi = plan.methods[1]
    first = plan.first()
    assert len(first) == 2 * (2 + 3) and len(first) + plan.after_choice == 2 * (2 + 3 + 1)
    for slot in first:
        if slot.side is side and slot.weight != 0.9:
            finish(slot, {None: ASIDE | (np.arange(N) > 5), 0.1: ASIDE, 0.5: ~ASIDE}[slot.weight])
    mine, theirs = plan.choose()
    assert mine.weight == 0.1 and mine.failed == [0.9] and mine.tried[0.1].pairs == 4
    assert (mine.tried[0.1].reward_accuracy, mine.tried[0.5].reward_accuracy) == (1.0, 0.0)
    assert theirs.weight is None and "0.1: failed" in theirs.sentence()
    table = fill(plan, [mine, theirs])
    cells = table.columns[ACCURACY][0].cells
    assert cells["Multi-DPO"].values == [0.0] and cells["DPO"].values == [0.5, 0.5] and table.pairs[0] == 4
    assert cells["Multi-DPO"].planned == 2 and table.columns[REWARD_ACCURACY][0].cells["Multi-DPO"].values == [0.0]
    assert table.holes[0].startswith("pairs.json, A <- B, multi_dpo ref_weights=0.1 0.9, seed 8: not started")
    assert any("B <- A, Multi-DPO: no weight could be chosen" in hole for hole in table.holes)
    assert cells["Multi-DPO"].mark == "second" and not table.columns[ACCURACY][1].cells["DPO"].values
    # What is reported may say anything: the choice and its figures stay.
    for slot in plan.candidates(multi, side)[:2]:
        scores = slot.scores
        policy = np.where(ASIDE[:, None], scores.policy_logps_N2, -scores.policy_logps_N2[:, ::-1])
        replace(scores, policy_logps_N2=policy).save(slot.run.folder / "eval_logps.npz")
    assert plan.choose()[0] == mine
    # A method whose reward model is missing is not started, and its hole says so.
    plan.methods = methods_of(TABLES["paper1"], ["DPO", "RLHF"])
    reward, _ = plan.reward_runs()
    rlhf = [slot for slot in plan.first() if slot.method.name == "RLHF"]
    assert len(rlhf) == 6 and not plan.ready(rlhf) and plan.ready(plan.first()), "DPO needs none"
    holes = fill(plan, plan.choose()).holes
    assert "pairs.json, A <- B, RLHF: its reward model is missing: not started" in holes
    (reward.folder).mkdir(parents=True)
    (reward.folder / "log.txt").write_text("$ mrpo reward\nerror: no memory\n")
    assert "pairs.json, A <- B, RLHF: its reward model is missing: error: no memory" in [
        hole.replace("not finished; its log ends: ", "") for hole in fill(plan, plan.choose()).holes
    ]
    state = {"global_step": 1, "max_steps": 1}
    for name, values in (("trainer_state", state), ("compare", {"settings": reward.settings}), ("reward", {})):
        (reward.folder / f"{name}.json").write_text(json.dumps(values))
    assert [slot.side for slot in plan.ready(rlhf)] == [side] * 3
    assert f"--reward_model={reward.folder}" in rlhf[0].run.argv
    plan.methods = methods_of(TABLES["paper1"], ["DPO", "Multi-DPO"])
    # One weight is taken unseen, and then all pairs are reported.
    plan.weights, plan.validation = [0.1], {}
    assert not plan.chooses and fill(plan, []).pairs[0] == N


@pytest.mark.slow
@pytest.mark.processes
def test_two_methods_in_two_directions(tmp_path, capsys):
    """Real runs: what the table says of them is what they logged themselves; the second call has nothing to do."""
    folders = write_models(tmp_path / "models")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(14)))
    (tmp_path / "tiny.yaml").write_text(
        f"model_name_or_path: {folders['llama']}\nref_models: [{{model: {folders['qwen2']}, name: other}}, {folders['gpt_neox']}]\n"
        f"dataset_name: {tmp_path}/pairs.jsonl\nheld_out: 6\nmax_steps: 2\nper_device_train_batch_size: 2\n"
        "gradient_checkpointing: false\nlearning_rate: 1.0e-3\nsave_strategy: 'no'\nreport_to: none\nuse_cpu: true\n"
    )
    words = ["--config", f"{tmp_path}/tiny.yaml", "--output", f"{tmp_path}/out", "--seeds", "1", "--jobs", "2"]
    assert compare([*words, "--table", "paper2"]) == 0
    printed = capsys.readouterr().out
    assert "Table 2: 4 runs" in printed and "left out: gpt_neox" in printed and printed.count(": done in") == 4
    told = json.loads((tmp_path / "out/paper2.json").read_text())
    assert [side["direction"] for side in told["columns"]] == ["llama <- other", "other <- llama"]
    assert [side["pairs"] for side in told["columns"]] == [6, 6]
    for i, folder in enumerate(("llama_from_other", "other_from_llama")):
        for method, arm, key in (("DPO", "dpo", "eval_anchor/rewards"), ("MRPO", "mrpo", "eval_rewards")):
            run = tmp_path / "out/pairs.jsonl" / folder / arm / "seed-42"
            last = [
                e for e in json.loads((run / "trainer_state.json").read_text())["log_history"] if f"{key}/margins" in e
            ][-1]
            for block, name in (
                ("reward_accuracy", f"{key}/accuracies"),
                ("reward_margin", f"{key}/margins"),
                ("accuracy", "eval_logps/accuracies"),
            ):
                (value,) = told["blocks"][block]["methods"][method][i]["values"]
                assert value == pytest.approx(last[name], abs=1e-6), (method, folder, block)
            assert "Loading references" not in (run / "log.txt").read_text(), "scores come from the cache"
    assert told["blocks"][MARGIN.name]["before_training"]["MRPO"][0] != 0
    assert {file.suffix for file in (tmp_path / "out").glob("paper2.*")} == {".txt", ".md", ".html", ".json", ".png"}
    assert compare([*words, "--table", "paper2", "--report"]) == 0
    assert "done in" not in capsys.readouterr().out


def test_every_arm_of_every_table_parses(tmp_path):
    """With two references, as the columns have them."""
    side = sides(tmp_path)[0]
    side.write_recipe()
    for method in {method.name: method for table in TABLES.values() for method in table.methods}.values():
        more = ["--reward_model=R"] if method.needs_reward_model else []
        for weight in (0.1, 0.9) if method.weighed else (None,):
            _, config = parse([f"--config={side.recipe_file}", *method.arm(weight).argv, *more])
            assert config.objective == method.objective
