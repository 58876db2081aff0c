"""A run's config: every mistake is named by its path in the YAML, with what would be valid."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from routing.errors import UserError
from tests.training.conftest import ROOT
from training.config import RunConfig, StableSchedule, differences, load_config, load_run_config
from training.finetune.config import FinetuneConfig

MINIMAL = """\
run_dir: runs/a
model:
  block:
    attention: {kind: softmax, heads: 4}
    feed_forward:
      kind: experts
      count: 4
      router: {top_k: 2}
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., RunConfig]:
    def load(text: str = MINIMAL, *overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_run_config(path, list(overrides))

    return load


def test_what_the_file_leaves_out_has_its_default(load: Callable[..., RunConfig]) -> None:
    run = load()
    assert run.run_dir == "runs/a"
    assert run.model.block.feed_forward.router.top_k == 2  # type: ignore[union-attr]
    assert run.optimizer.schedule == StableSchedule(warmup=100, decay=0.25, final=0.0)
    assert run.checkpoint.resume == "auto"


def test_a_resolved_run_reads_back_as_itself(load: Callable[..., RunConfig]) -> None:
    run = load(MINIMAL, "model.overrides=[{layers: [1], feed_forward: {kind: dense, width: 8}}]")
    assert load(yaml.safe_dump(run.model_dump(mode="json"))) == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.max_steps=5", "unknown key 'trian': did you mean 'train'? "),
        ("zzz=1", "unknown key 'zzz': valid keys are run_dir, seed, start, model, data, "),
        ("model.widht=8", "model: unknown key 'widht': did you mean 'width'? "),
        (
            "model.block.feed_forward.router.topk=2",
            "model.block.feed_forward.router: unknown key 'topk': did you mean 'top_k'? ",
        ),
        (
            "model.block.feed_forward.shared_witdh=2",
            "model.block.feed_forward: unknown key 'shared_witdh': did you mean 'shared_width'? ",
        ),
        (
            "optimizer.schedule={kind: cosine, warmpu: 3}",
            "optimizer.schedule: unknown key 'warmpu': did you mean 'warmup'? ",
        ),
        (
            "data.corpus={kind: text, files: [a], documents: line}",
            "data.corpus: unknown key 'documents': did you mean 'document'? ",
        ),
        (
            "model.overrides=[{layers: [0], feed_forwrad: {kind: dense}}]",
            "model.overrides.0: unknown key 'feed_forwrad': did you mean 'feed_forward'? ",
        ),
        (
            "model.overrides=[{layers: [0], feed_forward: {kind: dense, widht: 8}}]",
            "model.overrides.0.feed_forward: unknown key 'widht': did you mean 'width'? ",
        ),
    ],
)
def test_an_unknown_key_is_named_by_its_path_with_the_nearest_valid_one(
    load: Callable[..., RunConfig], override: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        load(MINIMAL, override)
    first, line = str(caught.value).splitlines()
    assert first.endswith("run.yaml is not a valid run:")
    assert line.startswith(f"  {message}")
    assert "valid keys are " in line


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("model.width=-8", ["model.width: Input should be greater than or equal to 1 (given: -8)"]),
        ("model.dropout=1", ["model.dropout: Input should be less than 1 (given: 1)"]),
        ("optimizer.lr=0", ["optimizer.lr: Input should be greater than 0 (given: 0)"]),
        ("optimizer.lr=fast", ["optimizer.lr: Input should be a valid number", "(given: 'fast')"]),
        (
            "optimizer.schedule={kind: linear, final: 2}",
            ["optimizer.schedule.final: Input should be less than or equal to 1 (given: 2)"],
        ),
        (
            "engine.deepspeed.zero_optimization.stage=1",
            ["engine: deepspeed sets zero_optimization.stage, which is generated from the sections train"],
        ),
        ("data.corpus={kind: text}", ["data.corpus.files: Field required"]),
        ("parallel.zero_stage=4", ["parallel.zero_stage: Input should be 0, 1, 2 or 3 (given: 4)"]),
        ("parallel.expert=0", ["parallel.expert: Input should be greater than or equal to 1 (given: 0)"]),
        (
            "parallel.expert=3",
            [
                "parallel.expert is 3, but layer 0 has 4 experts, which 3 ranks can't share evenly",
                "what fits every layer: 1, 2, 4",
            ],
        ),
        ("train.precision=fp8", ["train.precision: Input should be 'fp32' or 'bf16' (given: 'fp8')"]),
        ("checkpoint.keep=0", ["checkpoint.keep: Input should be greater than or equal to 1 (given: 0)"]),
        (
            "model.block.feed_forward.router.top_k=5",
            [
                "model.block.feed_forward: router.top_k is 5 but there are only 4 choices",
                "set router.top_k to at most 4",
            ],
        ),
        (
            "model.block.attention.heads=3",
            ["model: layer 0: width 256 does not divide into 3 heads", "valid numbers of heads: 1, 2, 4, 8"],
        ),
        (
            "data.tokenizer={kind: byte_bpe, vocab_size: 9000}",
            ["data.tokenizer.vocab_size is 9000 but the embedding has model.vocab_size = 8192 rows"],
        ),
        (
            "model.positions={max_length: 100}",
            ["data.max_length is 128 but there are only model.positions.max_length = 100 learned positions"],
        ),
        (
            "train.step_tokens=100",
            ["train.step_tokens is 100 but one sequence may have data.max_length = 128 tokens"],
        ),
        (
            "model.block.feed_forward={kind: sparse}",
            ["model.block.feed_forward: Input tag 'sparse'", "'dense', 'grouped', 'experts'"],
        ),
        ("model.block.attention={kind: linaer}", ["model.block.attention: ", "did you mean 'linear'?"]),
        ("optimizer.schedule={kind: step}", ["optimizer.schedule: ", "'linear', 'cosine', 'stable'"]),
        ("data.corpus={files: [a]}", ["data.corpus: unknown key 'files': valid keys are kind"]),
        ("model=3", ["model: Input should be a valid dictionary or instance of EncoderConfig (given: 3)"]),
        ("run_dir=", ["run_dir: Input should be a valid string (given: None)"]),
    ],
)
def test_a_bad_value_is_named_by_its_path(load: Callable[..., RunConfig], override: str, messages: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(MINIMAL, override)
    assert len(str(caught.value).splitlines()) == 2
    line = str(caught.value).splitlines()[1]
    assert line.startswith(f"  {messages[0]}")
    for message in messages:
        assert message in line


def test_projections_over_length_must_reach_the_longest_sequence(load: Callable[..., RunConfig]) -> None:
    override = "model.overrides=[{layers: [2], attention: {kind: linformer, max_length: %d}}]"
    assert load(MINIMAL, override % 128, "data.max_length=128").model.blocks()[2].attention.kind == "linformer"
    with pytest.raises(UserError, match=r"layer 2: .* max_length = 127 tokens, but data\.max_length is 128"):
        load(MINIMAL, override % 127, "data.max_length=128")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            "{layers: [3], feed_forward: {kind: experts, count: 6}}",
            "parallel.expert is 4, but layer 3 has 6 experts, which 4 ranks can't share evenly; "
            "what fits every layer: 1, 2",
        ),
        (
            "{layers: {every: 1}, feed_forward: {kind: dense}}",
            "parallel.expert is 4, but no layer has experts to spread; set it to 1",
        ),
    ],
)
def test_experts_that_cannot_be_spread_are_named(load: Callable[..., RunConfig], layer: str, message: str) -> None:
    assert load(MINIMAL, "parallel.expert=4").parallel.expert == 4
    with pytest.raises(UserError) as caught:
        load(MINIMAL, "parallel.expert=4", f"model.overrides=[{layer}]")
    assert str(caught.value).splitlines()[1] == f"  {message}"


def test_a_union_without_tag_names_the_place_for_each_of_its_ways(load: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError) as caught:
        load(MINIMAL, "data.held_out={kind: text, fils: [a]}")
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == ["  data.held_out"] * 2
    assert "unknown key 'fils': did you mean 'files'?" in lines[1]


def test_every_mistake_has_its_line(load: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError) as caught:
        load("model: {width: 0}\ntrain: {max_steps: 0}\n")
    assert str(caught.value).splitlines()[1:] == [
        "  run_dir: Field required",
        "  model.width: Input should be greater than or equal to 1 (given: 0)",
        "  train.max_steps: Input should be greater than or equal to 1 (given: 0)",
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configs_that_come_along_are_valid(path: Path) -> None:
    kind = FinetuneConfig if path.name.startswith("finetune-") else RunConfig
    assert load_config(path, [], kind).run_dir


def test_overrides_reach_any_depth(load: Callable[..., RunConfig]) -> None:
    run = load(
        MINIMAL,
        "train.max_steps=7",
        "model.block.feed_forward.router.selection_bias.rate=0.5",  # the section is made
        "engine.deepspeed.zero_optimization.reduce_bucket_size=1000",
        "data.corpus={kind: text, files: [a.txt, b.txt]}",
        "data.corpus.files.1=c.txt",
        "optimizer.betas=[0.5, 0.75]",
        "run_dir=runs/x=y",
    )
    assert run.train.max_steps == 7
    assert run.model.block.feed_forward.router.selection_bias.rate == 0.5  # type: ignore[union-attr]
    assert run.engine.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}}
    assert run.data.corpus.files == ["a.txt", "c.txt"]  # type: ignore[union-attr]
    assert run.optimizer.betas == (0.5, 0.75)
    assert run.run_dir == "runs/x=y"


def test_a_later_override_wins(load: Callable[..., RunConfig]) -> None:
    assert load(MINIMAL, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed"], "override 'seed' is not of the form a.b=value, such as train.max_steps=100"),
        (["=1"], "override '=1' is not of the form"),
        (["model..width=1"], "override 'model..width=1' is not of the form"),
        (["seed=[1"], "override 'seed=[1': the value is not valid YAML: "),
        (["run_dir.a=1"], "override 'run_dir.a=1': run_dir is 'runs/a', not a section"),
        (
            ["data.corpus={kind: text, files: [a]}", "data.corpus.files.1=b"],
            "override 'data.corpus.files.1=b': data.corpus.files is a list of 1",
        ),
        (
            ["data.corpus={kind: text, files: [a]}", "data.corpus.files.x=b"],
            "override 'data.corpus.files.x=b': data.corpus.files is a list of 1",
        ),
    ],
)
def test_a_bad_override_is_quoted(load: Callable[..., RunConfig], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(MINIMAL, *overrides)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "run.yaml is not valid YAML: while parsing"),
        ("a: 1\n  b: 2\n", "run.yaml is not valid YAML: mapping values are not allowed here"),
        ("- 1\n", "run.yaml holds list, not sections such as `model:` and `train:`"),
        ("just text\n", "run.yaml holds str, not sections"),
        ("", "run.yaml is not a valid run:\n  run_dir: Field required"),
    ],
)
def test_a_file_that_is_no_config_is_refused(load: Callable[..., RunConfig], text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(text)
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read config .*/none.yaml: .*No such file"):
        load_run_config(tmp_path / "none.yaml", [])
    with pytest.raises(UserError, match=r"cannot read config .*: .*Is a directory"):
        load_run_config(tmp_path, [])
    (tmp_path / "latin.yaml").write_bytes("run_dir: ü".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read config .*/latin.yaml: 'utf-8' codec"):
        load_run_config(tmp_path / "latin.yaml", [])


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1, "b": 2}, {"a": 3, "b": 2}, ["a: 1 -> 3"]),
        ({"m": {"x": 1, "y": [1, 2]}}, {"m": {"x": 1, "y": [1, 3]}}, ["m.y: [1, 2] -> [1, 3]"]),
        ({"m": {"x": 1}}, {"m": None}, ["m: {'x': 1} -> None"]),
        ({"b": 1}, {"a": 2}, ["a: None -> 2", "b: 1 -> None"]),
        ({"m": [{"x": 1}, {"y": 2}]}, {"m": [{"x": 1}, {"y": 3}]}, ["m.1.y: 2 -> 3"]),
        ({"m": [{"x": 1}]}, {"m": [{"x": 1}, {"y": 3}]}, ["m.1: None -> {'y': 3}"]),
        ({"m": []}, {"m": [{"x": 1}]}, ["m: [] -> [{'x': 1}]"]),
        (
            {"optimizer": {"schedule": {"kind": "cosine", "warmup": 1}}},
            {"optimizer": {"schedule": {"kind": "stable", "warmup": 1}}},
            ["optimizer.schedule.kind: 'cosine' -> 'stable'"],
        ),
        ({"train": {"max_steps": 1, "step_tokens": 8}}, {"train": {"max_steps": 2, "step_tokens": 8}}, []),
        (
            {"train": {"max_steps": 1, "step_tokens": 8}},
            {"train": {"max_steps": 2, "step_tokens": 9}},
            ["train.step_tokens: 8 -> 9"],
        ),
        ({"parallel": {"zero_stage": 1}}, {"parallel": {"zero_stage": 3}}, []),
        ({"log": {"every": 1}, "run_dir": "a"}, {"log": {"every": 2}, "run_dir": "b"}, []),
    ],
)
def test_differences_that_a_resumed_run_may_not_have(
    old: dict[str, Any], new: dict[str, Any], lines: list[str]
) -> None:
    assert differences(old, new) == lines


def test_a_variant_without_its_kind_is_the_default_one(
    tiny: dict[str, Any], write_config: Callable[[dict[str, Any]], Path]
) -> None:
    del tiny["optimizer"]["schedule"]
    run = load_run_config(write_config(tiny), ["optimizer.schedule.final=0.5"])
    assert run.optimizer.schedule == StableSchedule(final=0.5)
