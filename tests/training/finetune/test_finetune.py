"""A fine-tuning from its config to a model folder."""

from pathlib import Path

import pytest

from tests.training.finetune.synthetic import MAKERS, run_data
from training.finetune.config import FinetuneConfig
from training.finetune.finetune import finetune

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize("name", MAKERS)
def test_a_separable_task_is_learnt_without_a_mistake(name: str, base: Path, tmp_path: Path) -> None:
    data = run_data(tmp_path, name, base)
    data["train"] |= {"max_steps": 120, "evaluate_every": 30, "patience": 2}
    summary = finetune(FinetuneConfig.model_validate(data))
    assert summary is not None
    print(summary["held_out"], summary["seeds"][0]["best_step"])
    best = summary["held_out"][summary["metric"]]["mean"]
    assert best > 0.99
