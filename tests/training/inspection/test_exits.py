"""Where sequences leave, and what is right there, against one sequence at a time, all of whose exits were run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from moe.batch import pack_lengths
from moe.exits.config import CriterionConfig, FixedExitConfig
from moe.heads import MaskedLM
from moe.pretrained import save_pretrained
from moe.tasks.model import TaskModel
from tests.moe.exits.models import (
    LAYERS,
    VOCABULARY,
    apart_from,
    criterion_config,
    leaves_at,
    masked_lm,
    run_alone,
    task_model,
)
from tests.training.calibration.test_outcomes import batch_of, correct_by_hand, criterion, model_of
from tests.training.inspection.models import tokenizer_of
from tests.training.inspection.test_inspect import SCHEMA, refused
from training.cli import main
from training.data.masking import MaskingConfig
from training.data.tokenizer import SpecialTokens, Vocabulary
from training.finetune.reading import Reading, save_reading
from training.inspection.ablation import masked
from training.inspection.exits import ExitCounts, add_exit_counts, exits_of, leave_examples, leave_text, unused
from training.inspection.text import TextBatch
from training.tasks.config import ClassificationSpec

LAST = 4  # the layer behind which the model's own head stands
WORDS = Vocabulary(VOCABULARY, SpecialTokens(0, 1, 2, 3, 4), np.zeros(VOCABULARY, bool))
MASKING = MaskingConfig(rate=0.3)
CPU = torch.device("cpu")


def sequences_of(count: int = 24) -> list[tuple[int, np.ndarray]]:
    generator = np.random.default_rng(3)
    return [
        (n, np.concatenate([[2], generator.integers(5, VOCABULARY, generator.integers(1, 17)), [3]]))
        for n in range(count)
    ]


def batches(sequences: list[tuple[int, np.ndarray]], size: int) -> Iterator[TextBatch]:
    for start in range(0, len(sequences), size):
        numbers, ids = zip(*sequences[start : start + size], strict=True)
        yield TextBatch(
            torch.from_numpy(np.concatenate(ids)), pack_lengths([len(one) for one in ids]), np.array(numbers), 0, 0
        )


def decided(model: MaskedLM | TaskModel, by: CriterionConfig) -> None:
    assert model.config.exits is not None
    model.config = model.config.model_copy(update={"exits": model.config.exits.model_copy(update={"criterion": by})})


def same(one: ExitCounts, other: ExitCounts) -> bool:
    pairs = zip((*one.stats, *one[1:]), (*other.stats, *other[1:]), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["max_probability", "entropy", "learned"])
def test_a_masked_language_model_leaves_when_sure_of_its_masked_tokens(kind: str) -> None:
    model, sequences = masked_lm(), sequences_of()
    asked = [masked([one], MASKING, WORDS, CPU) for one in sequences]
    by = criterion_config(kind)
    said = [run_alone(model, one.input_ids, by, one.target_index) for one in asked]
    by = criterion_config(kind, apart_from([score for one in said for score in one.scores], 0.3))
    left, right, targets = np.zeros(5, int), np.zeros(5), np.zeros(5)
    by_length: dict[int, list[int]] = {}
    for (_, ids), one, batch in zip(sequences, said, asked, strict=True):
        exit_number = leaves_at(one.scores, by.thresholds(LAYERS))
        layer = (*LAYERS, LAST)[exit_number]
        left[layer] += 1
        for logits, target in zip(one.logits[exit_number], batch.targets.tolist(), strict=True):
            targets[layer] += 1
            right[layer] += int(logits.argmax()) == target
        by_length.setdefault(len(ids).bit_length(), []).append(layer + 1)
    assert len(np.flatnonzero(left)) > 1
    decided(model, by)
    found = leave_text(model, batches(sequences, 5), MASKING, WORDS)
    assert found.targets.tolist() == targets.tolist()
    assert found.right.tolist() == right.tolist()
    assert model.config.exits is not None
    told = exits_of(found, model.config.exits, [])
    assert told.layers == [*LAYERS, LAST]
    assert told.histogram == left[told.layers].tolist()
    assert told.accuracy == [
        pytest.approx(right[layer] / targets[layer], rel=1e-3) if targets[layer] else None for layer in told.layers
    ]
    assert told.by_length.mean_layers == [pytest.approx(np.mean(by_length[g]), rel=1e-3) for g in sorted(by_length)]
    assert told.by_length.sequences == [len(by_length[g]) for g in sorted(by_length)]


def test_counts_of_parts_are_those_of_the_whole_in_any_batches() -> None:
    model, sequences = masked_lm(), sequences_of()
    decided(model, criterion_config("margin", 0.2))
    whole = leave_text(model, batches(sequences, 24), MASKING, WORDS)
    shares = [leave_text(model, batches(sequences[rank::2], 5), MASKING, WORDS) for rank in range(2)]
    assert same(add_exit_counts(shares), whole)
    assert int(whole.stats.sequences.sum()) == 24
    nobody = leave_text(model, [], MASKING, WORDS)
    assert same(add_exit_counts([whole, nobody]), whole)


def test_of_text_without_labels_a_task_model_tells_where_alone() -> None:
    model, sequences = task_model("classification"), sequences_of()
    by = criterion_config("entropy")
    scores = [run_alone(model, torch.from_numpy(ids), by).scores for _, ids in sequences]
    by = criterion_config("entropy", apart_from([score for one in scores for score in one], 0.4))
    decided(model, by)
    assert model.config.exits is not None
    told = exits_of(leave_text(model, batches(sequences, 7), MASKING, WORDS), model.config.exits, [])
    left = [leaves_at(one, by.thresholds(LAYERS)) for one in scores]
    assert told.histogram == [left.count(n) for n in range(len(LAYERS) + 1)]
    assert told.accuracy is None


@pytest.mark.parametrize("kind", ["classification", "multi_label", "token_classification", "question_answering"])
def test_of_labelled_examples_it_tells_how_much_is_right(kind: str) -> None:
    model, batch = model_of(kind), batch_of(kind)
    for layer in (0, 1):
        decided(model, criterion("fixed", layer))
        found = leave_examples(model, [batch, batch])
        correct, asked = correct_by_hand(kind, model(batch.input_ids, batch=batch.batch).exits[layer])
        assert found.stats.sequences.sum(0).tolist() == [6 if layers == layer + 1 else 0 for layers in range(4)]
        assert found.right.tolist() == [2 * sum(correct) if at == layer else 0 for at in range(3)]
        assert found.targets.tolist() == [2 * sum(asked) if at == layer else 0 for at in range(3)]


def test_a_number_is_not_right_or_wrong() -> None:
    model = model_of("regression")
    decided(model, criterion("fixed", 1))
    assert model.config.exits is not None
    told = exits_of(leave_examples(model, [batch_of("regression")]), model.config.exits, ["some.jsonl"])
    assert (told.histogram, told.accuracy, told.labels) == ([0, 3, 0], None, ["some.jsonl"])
    assert unused(told) == "Of 3 sequences none leaves behind layers 0, 2."


LABELS = ("a", "b", "c")
MODEL: dict[str, Any] = {"exits": {"criterion": {"kind": "max_probability", "threshold": 0.6}}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that reads pairs, whose columns have names of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_pretrained(task_model("classification", **MODEL), tmp_path / "model", tokenizer_of(VOCABULARY))
    spec = ClassificationSpec(text="question", text2="answer", label="verdict")
    save_reading(Reading(task=spec, max_length=16), tmp_path / "model")
    return tmp_path / "model"


def test_the_command_reads_labelled_pairs_as_the_model_was_trained(folder: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = [
        {name: " ".join(f"w{i}" for i in generator.integers(5, VOCABULARY, 4)) for name in ("question", "answer")}
        | {"verdict": LABELS[int(generator.integers(3))]}
        for _ in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.txt").write_text("\n".join(row["question"] for row in rows))
    out = tmp_path / "stats.json"
    words = ["inspect", folder, "--data", tmp_path / "text.txt", "--labels", tmp_path / "rows.jsonl", "--json", out]
    assert main(list(map(str, words))) == 0
    found = json.loads(out.read_text())
    jsonschema.validate(found, SCHEMA)
    model, tokenizer = task_model("classification", **MODEL), Tokenizer.from_str(tokenizer_of(VOCABULARY))
    by = criterion_config("max_probability", 0.6)
    left, right = [0] * 4, [0] * 4
    for row in rows:
        first, second = (tokenizer.encode(row[name]).ids for name in ("question", "answer"))
        alone = run_alone(model, torch.tensor([2, *first, 3, *second, 3]), by)
        at = leaves_at(alone.scores, by.thresholds(LAYERS))
        left[at] += 1
        right[at] += LABELS[int(alone.logits[at].argmax())] == row["verdict"]
    exits = found["exits"]
    assert exits["histogram"] == left
    assert len([count for count in left if count]) > 1
    assert exits["accuracy"] == [
        pytest.approx(r / n, rel=1e-3) if n else None for r, n in zip(right, left, strict=True)
    ]
    assert exits["labels"] == [str(tmp_path / "rows.jsonl")]
    assert found["data"]["sequences"] == 30  # routing is that of --data


def test_labels_that_would_tell_nothing_are_refused(folder: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "text.txt").write_text("w5 w6 w7\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "w5", "answer": "w6", "verdict": "z"}))
    save_pretrained(masked_lm(), tmp_path / "language", tokenizer_of(VOCABULARY))
    save_pretrained(task_model("classification"), tmp_path / "all", tokenizer_of(VOCABULARY))
    for problem, model in (
        ("is a masked language model, whose labels", tmp_path / "language"),
        ("has no exits with a criterion", tmp_path / "all"),
        ("rows.jsonl", folder),  # a label that it doesn't know
    ):
        assert problem in refused(capfd, model, "--data", tmp_path / "text.txt", "--labels", tmp_path / "rows.jsonl")


def test_a_fixed_exit_is_where_all_leave() -> None:
    model = masked_lm()
    decided(model, FixedExitConfig(threshold=1))
    assert model.config.exits is not None
    told = exits_of(leave_text(model, batches(sequences_of(), 8), MASKING, WORDS), model.config.exits, [])
    assert told.histogram == [0, 24, 0, 0]
    assert unused(told) == "Of 24 sequences none leaves behind layers 0, 3, 4."
