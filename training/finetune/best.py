"""Which of a seed's states is kept, and when there is no more hope for a better one."""

from math import inf
from typing import NamedTuple

from moe.tasks.config import TaskConfig
from routing.errors import UserError
from training.tasks.entities import marks_entities
from training.tasks.metrics import Metric, primary_metric

LOSS = Metric("loss", higher_is_better=False)
_LOWER = {"rmse", "loss"}


class Best(NamedTuple):
    """The best of the states that were evaluated so far; the first of equals."""

    step: int = 0  # 0: none yet
    score: float = -inf  # the metric, or where lower is better its opposite
    waited: int = 0  # evaluations since

    def after(self, step: int, value: float, metric: Metric) -> "Best":
        """With one more state."""
        score = value if metric.higher_is_better else -value
        better = score > self.score or not self.step
        return Best(step, score) if better else self._replace(waited=self.waited + 1)


def metric_names(task: TaskConfig, scored: bool) -> tuple[str, ...]:
    """The metrics that `task_metrics` gives of a task."""
    match task.kind:
        case "classification":
            return "accuracy", "f1_macro", "f1_micro", "matthews"
        case "multi_label":
            return "accuracy", "f1_macro", "f1_micro"
        case "regression":
            return "pearson", "spearman", "rmse"
        case "token_classification":
            entities = ("precision", "recall", "f1") if marks_entities(task.labels) else ()
            return "accuracy", "f1_macro", *entities
        case "question_answering":
            return "exact_match", "f1"
        case "embedding":
            return ("pearson", "spearman") if scored else ("retrieval_accuracy",)


def chosen_metric(name: str | None, task: TaskConfig, scored: bool) -> Metric:
    """What `train.metric` means.

    Raises:
        UserError: for a metric that the task doesn't have.
    """
    if name is None:
        return primary_metric(task, scored)
    valid = (*metric_names(task, scored), LOSS.name)
    if name not in valid:
        raise UserError(
            f"train.metric is {name}, but {task.kind} is measured by {', '.join(valid)}; choose one of them"
        )
    return Metric(name, higher_is_better=name not in _LOWER)
