"""What a fine-tuned model predicts."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from routing.config import Config

Pooling = Literal["first", "mean"]  # of a sequence's states: its first token's, or their mean


class _Labelled(Config):
    """Its names of labels are those of the outputs, in order."""

    labels: tuple[str, ...] = Field(min_length=1)

    @field_validator("labels")
    @classmethod
    def _differ(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"labels repeat {', '.join(twice)}; each is one output: give it once")
        return labels

    @property
    def outputs(self) -> int:
        return len(self.labels)


class ClassificationConfig(_Labelled):
    """One label for a sequence, or a pair of texts in one sequence."""

    kind: Literal["classification"] = "classification"
    pooling: Pooling = "mean"
    dropout: float = Field(default=0.1, ge=0, lt=1)


class MultiLabelConfig(_Labelled):
    """Any number of labels for a sequence: each output is a yes or no of its own."""

    kind: Literal["multi_label"] = "multi_label"
    pooling: Pooling = "mean"
    dropout: float = Field(default=0.1, ge=0, lt=1)


class RegressionConfig(Config):
    """A number for a sequence. Outputs are standardised scores: `mean + std * output` is the number itself."""

    kind: Literal["regression"] = "regression"
    mean: float = 0.0  # of the training set's numbers
    std: float = Field(default=1.0, gt=0)
    pooling: Pooling = "mean"
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @property
    def outputs(self) -> int:
        return 1


class TokenClassificationConfig(_Labelled):
    """One label for each token, of which a word's first one counts."""

    kind: Literal["token_classification"] = "token_classification"
    dropout: float = Field(default=0.1, ge=0, lt=1)


class QuestionAnsweringConfig(Config):
    """Where in the second text the answer to the first begins and ends: two scores for each token.

    The first token, which belongs to no text, stands for "no answer here".
    """

    kind: Literal["question_answering"] = "question_answering"
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @property
    def outputs(self) -> int:
        return 2


class EmbeddingConfig(Config):
    """A sequence's pooled states, of unit length: similarity is their product."""

    kind: Literal["embedding"] = "embedding"
    pooling: Pooling = "mean"


TaskConfig = Annotated[
    ClassificationConfig
    | MultiLabelConfig
    | RegressionConfig
    | TokenClassificationConfig
    | QuestionAnsweringConfig
    | EmbeddingConfig,
    Field(discriminator="kind"),
]
