"""A model folder's config as transformers has it."""

from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import PretrainedConfig

from moe.config import EncoderConfig
from moe.pretrained import FORMAT, MODEL_TYPE, parse_config
from moe.tasks.config import (
    ClassificationConfig,
    EmbeddingConfig,
    MultiLabelConfig,
    QuestionAnsweringConfig,
    RegressionConfig,
    TaskConfig,
    TokenClassificationConfig,
)
from routing.errors import UserError

_PROBLEMS = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_KINDS = {problem: kind for kind, problem in _PROBLEMS.items()}


class RoutedEncoderConfig(PretrainedConfig):
    """The same `config.json` that `moe.save_pretrained` writes, with transformers' keys beside ours.

    Args:
        encoder: `EncoderConfig` as a dict; default: that class's.
        task: `TaskConfig` as a dict, or None for a masked language model. Where `id2label` or `problem_type` aren't
            given, they come from it.
        format: of the folder.
        kwargs: transformers' own, such as `num_labels`, `id2label`, `problem_type`.

    Raises:
        UserError: for an invalid encoder or task.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["router_stats", "aux_loss", "hidden_states"]  # noqa: RUF012  (as transformers has it)

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        task: dict[str, Any] | None = None,
        format: int = FORMAT,
        **kwargs: Any,
    ) -> None:
        given = {"model_type": MODEL_TYPE, "format": format, "encoder": encoder or {}, "task": task}
        encoder_config, task_config = parse_config(given, "the config")
        self.format = format
        self.encoder = encoder_config.model_dump(mode="json")
        self.task = None if task_config is None else task_config.model_dump(mode="json")
        if task_config is not None:
            _tell_labels(task_config, kwargs)
        super().__init__(**kwargs)

    def encoder_config(self) -> EncoderConfig:
        """Ours, without exits: transformers has no way to leave a model early, so its classes have none."""
        return EncoderConfig.model_validate({**self.encoder, "exits": None})

    def settle(self, task: TaskConfig | None) -> None:
        """Make it the config of a model with that task and without exits."""
        self.encoder = self.encoder_config().model_dump(mode="json")
        self.task = None if task is None else task.model_dump(mode="json")

    @property
    def vocab_size(self) -> int:
        return int(self.encoder["vocab_size"])

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.encoder = {**self.encoder, "vocab_size": size}

    @property
    def hidden_size(self) -> int:
        return int(self.encoder["width"])

    @property
    def num_hidden_layers(self) -> int:
        return int(self.encoder["depth"])

    @property
    def max_position_embeddings(self) -> int:
        """Where positions are learned, how many; without them there is no bound, and no such attribute."""
        if self.encoder["positions"] is None:
            raise AttributeError("max_position_embeddings")
        return int(self.encoder["positions"]["max_length"])

    def sequence_task(self) -> ClassificationConfig | MultiLabelConfig | RegressionConfig:
        """What `...ForSequenceClassification` predicts, from `problem_type` and `id2label` as transformers reads them.

        Raises:
            UserError: for a regression of several numbers.
        """
        problem = self.problem_type or ("regression" if self.num_labels == 1 else "single_label_classification")
        if problem == "regression" and self.num_labels != 1:
            raise UserError(
                f"problem_type is regression and num_labels {self.num_labels}; a model predicts one number here: set "
                "num_labels=1"
            )
        labels = {} if problem == "regression" else {"labels": self.labels()}
        task = self._task({"kind": _KINDS[problem], **labels})
        assert isinstance(task, ClassificationConfig | MultiLabelConfig | RegressionConfig)
        return task

    def token_task(self) -> TokenClassificationConfig:
        task = self._task({"kind": "token_classification", "labels": self.labels()})
        assert isinstance(task, TokenClassificationConfig)
        return task

    def answer_task(self) -> QuestionAnsweringConfig:
        task = self._task({"kind": "question_answering"})
        assert isinstance(task, QuestionAnsweringConfig)
        return task

    def embedding_task(self) -> EmbeddingConfig:
        """How a model without a head pools: as the folder's embedding says, or the mean."""
        task = self._task({"kind": "embedding"})
        assert isinstance(task, EmbeddingConfig)
        return task

    def labels(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        names = self.id2label or {}
        return tuple(str(names[i]) for i in sorted(names))

    def _task(self, wanted: dict[str, Any]) -> TaskConfig:
        """What is wanted, with the folder's pooling, dropout and scale if it is of that kind already."""
        before = self.task if self.task is not None and self.task["kind"] == wanted["kind"] else {}
        try:
            task: TaskConfig = TypeAdapter(TaskConfig).validate_python({**before, **wanted})
        except ValidationError as error:
            raise UserError(f"these labels can't be a model's: {error}") from error
        return task


def _tell_labels(task: TaskConfig, kwargs: dict[str, Any]) -> None:
    """Say in transformers' words what the task predicts, unless the caller has said otherwise."""
    if task.kind in _PROBLEMS:
        kwargs.setdefault("problem_type", _PROBLEMS[task.kind])
    if kwargs.get("id2label") is not None or kwargs.get("num_labels") is not None:
        return
    if isinstance(task, ClassificationConfig | MultiLabelConfig | TokenClassificationConfig):
        kwargs["id2label"] = dict(enumerate(task.labels))
        kwargs["label2id"] = {label: i for i, label in enumerate(task.labels)}
    elif isinstance(task, RegressionConfig):
        kwargs["num_labels"] = 1
