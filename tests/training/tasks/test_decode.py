import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer

from moe.tasks.config import (
    ClassificationConfig,
    EmbeddingConfig,
    MultiLabelConfig,
    QuestionAnsweringConfig,
    RegressionConfig,
    TaskConfig,
    TokenClassificationConfig,
)
from tests.training.tasks.test_encode import encoded
from training.tasks.batches import evaluation_batches
from training.tasks.config import (
    ClassificationSpec,
    EmbeddingSpec,
    MultiLabelSpec,
    QuestionAnsweringSpec,
    RegressionSpec,
    TaskSpec,
    TokenClassificationSpec,
)
from training.tasks.decode import Outputs, item_outputs, label_scores, predictions, references
from training.tasks.encode import Encoded, Truncation

LABELS = ("x", "y", "z")
TEXTS = ({"text": "a b c d"}, {"text": "a"}, {"text": "a b"})


def test_outputs_find_their_items(tokenizer: Tokenizer) -> None:
    rows = [row | {"label": "x"} for row in TEXTS]
    task = ClassificationConfig(labels=LABELS)
    found = encoded(tokenizer, ClassificationSpec(), task, *rows)
    outputs: Outputs = {}
    for batch in evaluation_batches(found.items, task, micro_batch_tokens=8):
        outputs |= item_outputs(batch, batch.batch.cu_seqlens.diff()[:, None].double(), task)
    assert {item: logits.tolist() for item, logits in outputs.items()} == {0: [6], 1: [3], 2: [4]}
    assert all(logits.dtype == np.float32 for logits in outputs.values())
    words = TokenClassificationConfig(labels=LABELS)
    for batch in evaluation_batches(found.items.remove_columns("target"), words, micro_batch_tokens=99):
        tokens = item_outputs(batch, batch.input_ids[:, None], words)
    assert {item: logits[:, 0].tolist() for item, logits in tokens.items()} == dict(enumerate(found.items["input_ids"]))


def test_pairs_of_vectors_stay_together(tokenizer: Tokenizer) -> None:
    rows = {"text": "a b c d", "text2": "a"}, {"text": "a", "text2": "b"}
    found = encoded(tokenizer, EmbeddingSpec(), EmbeddingConfig(), *rows)
    (batch,) = evaluation_batches(found.items, EmbeddingConfig(), micro_batch_tokens=99)
    assert batch.items.tolist() == [1, 1, 0, 0]
    outputs = item_outputs(batch, torch.arange(8.0).view(4, 2), EmbeddingConfig())
    vectors = predictions(EmbeddingConfig(), EmbeddingSpec(), found, outputs)
    assert [pair.tolist() for pair in vectors] == [[[4, 5], [6, 7]], [[0, 1], [2, 3]]]
    assert references(EmbeddingConfig(), found) == []


@pytest.mark.parametrize(
    ("spec", "task", "targets", "logits", "expected"),
    [
        (ClassificationSpec(), ClassificationConfig(labels=LABELS), ["x", "z"], [[1, 3, 2], [0, 0, 5]], ["y", "z"]),
        (
            MultiLabelSpec(label="label"),
            MultiLabelConfig(labels=LABELS),
            [["x"], []],
            [[1, -1, 0.5], [-1, -2, 0]],
            [["x", "z"], []],
        ),
        (RegressionSpec(), RegressionConfig(mean=3, std=2), [4.0, 5.0], [[0.5], [-1]], [4.0, 1.0]),
    ],
)
def test_answers_to_texts(
    tokenizer: Tokenizer, spec: TaskSpec, task: TaskConfig, targets: list, logits: list, expected: list
) -> None:
    rows = [{"text": "a", "label": target} for target in targets]
    found = encoded(tokenizer, spec, task, *rows)
    outputs = {item: np.array(own, dtype=np.float32) for item, own in reversed(list(enumerate(logits)))}
    assert predictions(task, spec, found, outputs) == expected
    assert references(task, found) == targets


def test_answers_to_words(tokenizer: Tokenizer) -> None:
    spec, task = TokenClassificationSpec(), TokenClassificationConfig(labels=("B-x", "O"))
    row = {"tokens": ["\x07", "routers", "a", "b"], "labels": ["O", "B-x", "O", "O"]}
    found = encoded(tokenizer, spec, task, row, max_length=6)  # [CLS] rout ##er ##s a [SEP]
    logits = np.array([[9, 0], [1, 0], [0, 9], [0, 9], [2, 1], [9, 0]], dtype=np.float32)
    assert predictions(task, spec, found, {0: logits}) == [["O", "B-x", "B-x", "O"]]
    assert references(task, found) == [row["labels"]]


def test_answers_to_questions(tokenizer: Tokenizer) -> None:
    spec = QuestionAnsweringSpec(stride=1, max_answer_length=2)
    none = {"text": [], "answer_start": []}
    rows = (
        {"question": "a", "context": "b c,  d e f", "answers": {"text": ["d e", "d"], "answer_start": [6, 6]}},
        {"question": "a", "context": "b c", "answers": none},
    )
    task = QuestionAnsweringConfig()
    found = encoded(tokenizer, spec, task, *rows, max_length=8)
    # [CLS] a [SEP] b c [UNK] d [SEP], [CLS] a [SEP] d e f [SEP] and [CLS] a [SEP] b c [SEP]
    assert found.items["length"][:] == [8, 7, 6]
    assert found.items["target"][:] == [[0, 0], [3, 4], [0, 0]]
    outputs = {item: np.zeros((length, 2), dtype=np.float32) for item, length in enumerate(found.items["length"])}
    outputs[0][0] = 4  # the first window has no answer
    outputs[1][3, 0], outputs[1][4, 1], outputs[1][5, 1] = 2, 1, 5  # "d e f" is too long
    outputs[2][0], outputs[2][3, 0] = 1, 1  # no answer beats "b"
    assert predictions(task, spec, found, outputs) == ["e f", ""]
    outputs[1][5, 1] = 0
    assert predictions(task, spec, found, outputs) == ["d e", ""]
    assert references(task, found) == [["d e", "d"], []]
    always = spec.model_copy(update={"no_answer_threshold": None})
    assert predictions(task, always, found, outputs)[1] == "b"


def test_scores_of_labels() -> None:
    logits = np.log(np.array([1.0, 3.0, 4.0]))
    assert label_scores(ClassificationConfig(labels=LABELS), logits) == pytest.approx(
        {"x": 1 / 8, "y": 3 / 8, "z": 0.5}
    )
    assert label_scores(MultiLabelConfig(labels=LABELS), logits) == pytest.approx({"x": 0.5, "y": 0.75, "z": 0.8})


def test_scores_are_the_references_of_pairs() -> None:
    items = Dataset.from_dict({"row": [0]})
    pairs = Encoded(Dataset.from_dict({"text": ["a"], "score": [0.5]}), items, Truncation(1, 0, 0, 3))
    assert references(EmbeddingConfig(), pairs) == [0.5]
