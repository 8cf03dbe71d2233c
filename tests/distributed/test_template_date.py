"""Ranks on both sides of midnight."""

import datetime

import pytest
import torch.distributed as dist

from mrpo_scale.lifecycle import template_date
from mrpo_scale.models.plan import plan_models
from tests.distributed.test_reference_scores import config
from tests.lifecycle.test_template_date import DATED
from tests.tiny import write_models

BEFORE = datetime.date(2026, 11, 25)


def texts_of_rank(folders, output_dir):
    """What this rank reads, its clock a day ahead of the rank before it, and its date."""
    today = template_date._today
    template_date._today = lambda: BEFORE + datetime.timedelta(days=dist.get_rank())
    try:
        args = config(output_dir)
        template_date.decide_date(args)
        plan = plan_models(folders["llama"], [folders["qwen2"]], args, None)
        template_date.record_date(args, plan.dated, args.folder)
    finally:
        template_date._today = today
    return args.template_date, [text.fingerprint() for text in plan.texts]


@pytest.mark.parametrize("begun", [False, True])
def test_all_ranks_have_the_date_of_the_first(pool2, tmp_path, begun):
    folders = write_models(tmp_path / "models")
    for name in ("llama", "qwen2"):
        with open(f"{folders[name]}/chat_template.jinja", "w") as file:
            file.write(DATED)
    if begun:
        (tmp_path / "run").mkdir()
        template_date.write_record(tmp_path / "run", "2026-11-20", replace=True)
    first, second = pool2.run(texts_of_rank, folders, str(tmp_path / "run"))
    assert first == second
    assert first[0] == ("2026-11-20" if begun else "2026-11-25") == template_date.recorded_date(tmp_path / "run")
