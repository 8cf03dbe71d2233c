"""Rules of the house, over the syntax trees: imports point one way, nothing shadows an installed package."""

import ast
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("mrpo_scale/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("launch/*.py")]
BENCHMARKS = ROOT / "benchmarks"
OURS = {"mrpo_scale", "mrpo_kernels", "benchmarks", "tests"}


def imported(path):
    """Top-level modules and dotted project modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def roots(names):
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [p for p in SOURCES if "mrpo_kernels" in p.parts], ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path):
    assert roots(imported(path)) <= {"torch", "triton", "mrpo_kernels"}


def test_the_objective_sees_tensors_only():
    assert roots(imported(ROOT / "mrpo_scale/objective.py")) <= {"torch", "mrpo_kernels", "mrpo_scale"}
    own = {n for n in imported(ROOT / "mrpo_scale/objective.py") if n.startswith("mrpo_scale.")}
    assert {name.removesuffix(".ConfigError").removesuffix(".check_one_of") for name in own} <= {
        "mrpo_scale.base.errors"
    }


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name != "cli.py" and p.parent.name != "launch"], ids=lambda p: p.name
)
def test_nothing_imports_the_command_line(path):
    assert not {n for n in imported(path) if n.startswith(("mrpo_scale.cli", "launch"))}


#: Every module in reading order; `.` is the package's own `__init__`. A module imports only what stands before it.
READING_ORDER = [
    (
        "mrpo_kernels",
        "backend cpu_linear chunked_head partials virtual_reference outer_losses finish sequence_logps fused_reference "
        "linear_preference_loss .",
    ),
    ("mrpo_scale.base", ". hub_kernels"),
    ("mrpo_scale", "."),
    (
        "mrpo_scale.base",
        "errors endpoint atomic_files hash_keys untrusted gpus device host_board heartbeat ranks tables",
    ),
    ("mrpo_scale", "objective"),
    (
        "mrpo_scale.config",
        ". fields data_keys model_spec ds_config launcher hardware checks adapter_keys sampling_keys keys reward_keys digest "
        "elsewhere mixtures trl_keys recipe foreign foreign_yaml foreign_commands foreign_keys",
    ),
    (
        "mrpo_scale.data",
        "pairs messages repeated_prompt turns response_turns prefill chat_template model_text alignment ranking mixing toy_skills "
        "toy_world",
    ),
    ("mrpo_scale.data.layouts", "base"),
    ("mrpo_scale.data", "pair_table"),
    (
        "mrpo_scale.data.layouts",
        "conversational strings hh_strings helpsteer nectar sharegpt orca gpt4_llm swift openai nemo_rl .",
    ),
    (
        "mrpo_scale.data",
        "remarks unread loading . sft_rows tokenization token_table token_files pair_dataset inputs dealing window",
    ),
    (
        "mrpo_scale.logps",
        ". logit_transform varlen_layout masked_attention sequence_parallel attention_ways span_attention layer_masks pair_batch "
        "attention_choice micro_batches routers pair_forward generation self_check flops",
    ),
    (
        "mrpo_scale.models",
        ". hub quantized source classes on_disk stored left_out saving tensor_check weight_sample adapter_files adapter plan "
        "same_weights",
    ),
    (
        "mrpo_scale.references",
        ". placement mapped low_bits adapters sharding live adapter_off loading reward multi_reference_reward",
    ),
    ("mrpo_scale.references.store", ". identity part_files listing cache"),
    ("mrpo_scale.references", "stores prompt_logps served precompute scores validation_weights"),
    (
        "mrpo_scale.lifecycle",
        ". output_folder checkpoints template_date fingerprint preemption universal resume",
    ),
    ("mrpo_scale.reports", ". pictures html_curves html_report model_card run_facts artifacts"),
    (
        "mrpo_scale.training",
        ". sampled_loss aligned_loss metrics preflight arguments sequences whole_policy sampling prepare callbacks step "
        "held_out saver before_first_step facts run_report trainer",
    ),
    ("mrpo_scale.commands", ". train score inspect_references convert merge reward"),
    (
        "mrpo_scale.planner",
        ". cluster activations model_size data zero workload job live estimate search show command",
    ),
    ("mrpo_scale.bench", ". arms clock communication synthetic trainer results show command"),
    (
        "mrpo_scale.compare",
        ". plan forks processes scoring results show paper_tables sides paper_results weight_choice paper_plan paper_show "
        "paper_cells paper_command command",
    ),
    ("mrpo_scale.eval", ". judge config models preference records generation tasks verdicts win_rate run"),
    ("mrpo_scale", "cli"),
    ("launch", "train score eval bench reward"),
]


def listed():
    return [
        package if name == "." else f"{package}.{name}" for package, names in READING_ORDER for name in names.split()
    ]


def module_name(path):
    base = ROOT / "kernels" if "mrpo_kernels" in path.parts else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path, modules):
    """The project's ``modules`` that a file imports, inside functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return found & set(modules)


def test_every_module_has_its_place_and_imports_only_what_stands_before_it():
    """So there are no cycles, neither between modules nor between rooms."""
    modules = listed()
    files = {module_name(path): path for path in SOURCES}
    assert len(set(modules)) == len(modules)
    assert set(files) == set(modules), f"not in READING_ORDER or not there: {set(files) ^ set(modules)}"
    place = {module: i for i, module in enumerate(modules)}
    wrong = [
        f"{module} imports {used}"
        for module in modules
        for used in sorted(imports_of(files[module], place))
        if place[used] >= place[module]
    ]
    assert not wrong


def test_a_room_comes_after_all_rooms_that_it_imports():
    """The packages directly below `mrpo_scale` stand in one piece, in the order of docs/architecture.md."""
    rooms = [module.split(".")[1] for module in listed() if module.startswith("mrpo_scale.")]
    in_order = [room for i, room in enumerate(rooms) if i == 0 or rooms[i - 1] != room]
    assert len(set(in_order)) == len(in_order)
    page = (ROOT / "docs" / "architecture.md").read_text()
    block = page.split("## The rooms")[1].split("```")[1]
    shown = [line.split()[0].strip("/").removesuffix(".py") for line in block.splitlines() if line.startswith("  ")]
    assert shown == in_order


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, node.end_lineno - node.lineno + 1


def test_functions_fit_a_screen():
    """Triton's kernels aside, which are one program each."""
    long = [
        f"{path.relative_to(ROOT)}: {function.name} has {lines} lines"
        for path in SOURCES
        for function, lines in functions(path)
        if lines > 60 and not any("triton.jit" in ast.unparse(mark) for mark in function.decorator_list)
    ]
    assert not long


def test_the_step_and_the_trainer_can_be_read():
    lines = {
        f"{path.stem}.{function.name}": count
        for path in (ROOT / "mrpo_scale" / "training").glob("*.py")
        for function, count in functions(path)
    }
    assert lines["step.optimizer_step"] < 40
    assert lines["trainer.__init__"] <= 40


def test_the_hall_stays_small():
    assert len([p for p in (ROOT / "mrpo_scale").iterdir() if p.name != "__pycache__"]) <= 18


def test_no_script_shadows_an_installed_package():
    """`kernels.py` or a package `kernels` would hide Hugging Face's kernels library from transformers, and the like."""
    installed = set(importlib.metadata.packages_distributions()) - {"mrpo_scale", "mrpo_kernels"}
    folders = [ROOT, ROOT / "launch", ROOT / "benchmarks", ROOT / "tests"]
    scripts = {p.stem: p for folder in folders for p in folder.glob("*.py")}
    packages = {p.parent.name: p for folder in folders for p in folder.glob("*/__init__.py")}
    clashes = {**scripts, **packages}.keys() & installed
    assert not clashes
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_package_on_disk_is_packaged():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(settings["packages"])
    assert "py.typed" in settings["package-data"]["*"]
    assert all((folder / "py.typed").is_file() for folder in (ROOT / "mrpo_scale", ROOT / "kernels" / "mrpo_kernels"))
    on_disk = {".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("mrpo_scale/**/__init__.py")}
    assert on_disk <= listed
    data = {
        "mrpo_scale.recipes",
        "mrpo_scale.ds_configs",
        "mrpo_scale.launch.accelerate",
        "mrpo_scale.reports.templates",
    }
    assert {"mrpo_kernels", *data} <= listed


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.py")), ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_what_a_benchmark_imports_is_there(path):
    """Inside functions too, where an import goes stale unseen: no test calls most of them, and mypy does not read them."""
    missing = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            module = importlib.import_module(node.module)
            missing += [
                f"{node.module}.{name.name}"
                for name in node.names
                if not hasattr(module, name.name) and not importlib.util.find_spec(f"{node.module}.{name.name}")
            ]
    assert missing == []
