"""Which labelled examples a task has, and where in a row of them its texts and labels stand."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from moe.tasks.config import Pooling, TaskConfig
from routing.config import Config

Files = Annotated[list[str], Field(min_length=1)]
Labels = Annotated[tuple[str, ...], Field(min_length=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


class ExampleFiles(Config):
    """Local files with an example in each row, or patterns of them.

    The name's ending says how to read one: `.jsonl` and `.json` (an object on each line), `.csv` (with a header),
    `.tsv` (the same between tabs, where quotes are ordinary characters) or `.parquet`. Columns of CSV and TSV are text.
    """

    kind: Literal["files"] = "files"
    files: Files


class ExampleHub(Config):
    """A dataset of the Hugging Face Hub, or a local folder that `datasets.load_dataset` understands.

    Of a dataset all files count, or those that `files` names (patterns within it).
    """

    kind: Literal["hub"] = "hub"
    name: str
    config: str | None = None
    split: str = "train"
    files: Files | None = None


def _kind_of(value: Any) -> str:
    """A tag that is no key, as `files` would be: an error's path stays clear. Files are meant if nothing is said."""
    return f"kind {value.get('kind', 'files') if isinstance(value, dict) else getattr(value, 'kind', value)}"


def _share_or_examples(value: Any) -> str:
    return "share" if isinstance(value, int | float) else "examples"


ExamplesConfig = Annotated[
    Annotated[ExampleFiles, Tag("kind files")] | Annotated[ExampleHub, Tag("kind hub")],
    Discriminator(
        _kind_of,
        custom_error_type="examples",
        custom_error_message="examples are {kind: files, files: [train.jsonl]} or {kind: hub, name: DATASET}",
    ),
]
# Told apart by hand: an error then speaks of what was meant, not of both.
HeldOut = Annotated[
    Annotated[Annotated[float, Field(gt=0, lt=1)], Tag("share")] | Annotated[ExamplesConfig, Tag("examples")],
    Discriminator(_share_or_examples),
]


class _Texts(Config):
    """`text`, and for pairs `text2`, are the columns of the texts."""

    text: str = "text"
    text2: str | None = None


class ClassificationSpec(_Texts):
    """One label for each row, in the column `label`: text, a whole number or a truth value.

    `labels` names all labels in the order of the outputs; left out, they are those of the training set, sorted.
    """

    kind: Literal["classification"] = "classification"
    label: str = "label"
    labels: Labels | None = None
    pooling: Pooling = "mean"
    dropout: Dropout = 0.1


class MultiLabelSpec(_Texts):
    """Any number of labels for each row: a list in the column `label`, or text that `separator` divides."""

    kind: Literal["multi_label"] = "multi_label"
    label: str = "labels"
    labels: Labels | None = None
    separator: Annotated[str, Field(min_length=1)] | None = None
    pooling: Pooling = "mean"
    dropout: Dropout = 0.1


class RegressionSpec(_Texts):
    """A number for each row, in the column `label`."""

    kind: Literal["regression"] = "regression"
    label: str = "label"
    pooling: Pooling = "mean"
    dropout: Dropout = 0.1


class TokenClassificationSpec(Config):
    """Words and equally many labels: lists in `tokens` and `label`, or text that `separator` divides."""

    kind: Literal["token_classification"] = "token_classification"
    tokens: str = "tokens"
    label: str = "labels"
    labels: Labels | None = None
    separator: Annotated[str, Field(min_length=1)] | None = None
    dropout: Dropout = 0.1


class QuestionAnsweringSpec(Config):
    """SQuAD's form: `answers` holds {"text": [...], "answer_start": [...]}, both empty where there is no answer.

    A context that doesn't fit is cut into windows which share `stride` tokens. An answer has at most
    `max_answer_length` tokens. "No answer" is predicted where the best answer doesn't score more than
    `no_answer_threshold` above it; without a threshold there always is an answer.
    """

    kind: Literal["question_answering"] = "question_answering"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    stride: Annotated[int, Field(ge=0)] = 32
    max_question_length: Annotated[int, Field(ge=1)] = 64
    max_answer_length: Annotated[int, Field(ge=1)] = 30
    no_answer_threshold: float | None = 0.0
    dropout: Dropout = 0.1


class EmbeddingSpec(Config):
    """Pairs of texts that are near one another.

    With a column `label` of scores, similarities are fitted to the scores, `score_range` mapped to 0 .. 1. Without,
    each text's partner is told from the partners of `group` - 1 other pairs. To embed single texts, leave `text2` out.
    """

    kind: Literal["embedding"] = "embedding"
    text: str = "text"
    text2: str | None = "text2"
    label: str | None = None
    score_range: tuple[float, float] = (0.0, 1.0)
    group: Annotated[int, Field(ge=2)] = 32
    pooling: Pooling = "mean"

    @model_validator(mode="after")
    def _range_rises(self) -> Self:
        low, high = self.score_range
        if low >= high:
            raise ValueError(f"score_range ({low:g}, {high:g}) is empty; give the lowest score, then the highest")
        return self


TaskSpec = Annotated[
    ClassificationSpec
    | MultiLabelSpec
    | RegressionSpec
    | TokenClassificationSpec
    | QuestionAnsweringSpec
    | EmbeddingSpec,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[TaskSpec] = TypeAdapter(TaskSpec)


class TaskDataConfig(Config):
    """The examples to learn from, those to choose a checkpoint by, and those that only the end is measured on.

    `held_out` is a share of the training rows, chosen by their text alone, or examples of their own. `cache_dir` is as
    in the `data` section of a pre-training.
    """

    train: ExamplesConfig
    held_out: HeldOut = 0.1
    test: ExamplesConfig | None = None
    task: TaskSpec = ClassificationSpec()
    max_length: Annotated[int, Field(ge=8)] = 128
    cache_dir: str | None = None
    num_proc: Annotated[int, Field(ge=1)] = 1


def default_spec(task: TaskConfig) -> TaskSpec:
    """How to read rows to predict if nothing else is said: every column under its usual name, one text to a row."""
    alone = {"text2": None} if task.kind == "embedding" else {}
    return _ADAPTER.validate_python({"kind": task.kind, **alone})
