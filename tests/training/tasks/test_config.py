import pytest
from pydantic import ValidationError

from moe.tasks.config import ClassificationConfig, EmbeddingConfig, QuestionAnsweringConfig, RegressionConfig
from training.tasks.config import (
    ClassificationSpec,
    EmbeddingSpec,
    ExampleFiles,
    ExampleHub,
    QuestionAnsweringSpec,
    RegressionSpec,
    TaskDataConfig,
    default_spec,
)


def test_sections_are_told_by_their_kinds() -> None:
    config = TaskDataConfig.model_validate(
        {
            "train": {"kind": "hub", "name": "glue", "config": "sst2"},
            "held_out": {"kind": "files", "files": ["dev.csv"]},
            "task": {"kind": "embedding", "label": "similarity", "score_range": [0, 5]},
        }
    )
    assert config.train == ExampleHub(name="glue", config="sst2")
    assert config.held_out == ExampleFiles(files=["dev.csv"])
    assert config.task == EmbeddingSpec(label="similarity", score_range=(0, 5))


def test_examples_of_no_kind_are_files() -> None:
    config = TaskDataConfig.model_validate({"train": {"files": ["a.csv"]}, "test": {"files": ["b.csv"]}})
    assert (config.train, config.held_out, config.test) == (
        ExampleFiles(files=["a.csv"]),
        0.1,
        ExampleFiles(files=["b.csv"]),
    )
    assert TaskDataConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"held_out": 1.0}, "held_out"),
        ({"held_out": {"kind": "file", "files": ["a.csv"]}}, "examples are {kind: files,"),
        ({"task": {"kind": "classification", "labels": []}}, "labels"),
        ({"task": {"kind": "embedding", "score_range": [5, 0]}}, r"score_range \(5, 0\) is empty; give the lowest"),
        ({"task": {"kind": "embedding", "group": 1}}, "group"),
        ({"task": {"kind": "classification", "txt": "x"}}, "did you mean 'text'"),
    ],
)
def test_what_makes_no_sense_is_refused(section: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskDataConfig.model_validate({"train": {"kind": "files", "files": ["a.csv"]}, **section})


def test_the_default_of_a_task() -> None:
    assert default_spec(ClassificationConfig(labels=("a", "b"))) == ClassificationSpec()
    assert default_spec(RegressionConfig(mean=3)) == RegressionSpec()
    assert default_spec(QuestionAnsweringConfig()) == QuestionAnsweringSpec()
    assert default_spec(EmbeddingConfig()) == EmbeddingSpec(text2=None)
