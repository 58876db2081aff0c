"""The user's mistakes end in exit code 2 and a few words on stderr, and leave nothing behind."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tests.training.conftest import ROOT, contents, moe_process, write_yaml
from training.cli import main

pytestmark = pytest.mark.usefixtures("alone")

Edit = Callable[[dict[str, Any], Path], None]


def missing_corpus(data: dict[str, Any], folder: Path) -> None:
    data["data"]["corpus"]["files"] = [str(folder / "none-*.txt")]


def empty_corpus(data: dict[str, Any], folder: Path) -> None:
    (folder / "empty.txt").write_text("\n\n  \n")
    data["data"]["corpus"]["files"] = [str(folder / "empty.txt")]


def one_document(data: dict[str, Any], folder: Path) -> None:
    (folder / "one.txt").write_text("One document can't be split in two.")
    data["data"]["corpus"]["files"] = [str(folder / "one.txt")]


def latin_1(data: dict[str, Any], folder: Path) -> None:
    (folder / "latin.txt").write_bytes("one\n\ntwo\n\nü".encode("latin-1"))
    data["data"]["corpus"]["files"] = [str(folder / "latin.txt")]


def other_column(data: dict[str, Any], folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"body": "some text"}\n')
    data["data"]["corpus"] = {"kind": "jsonl", "files": [str(folder / "rows.jsonl")]}


def no_json(data: dict[str, Any], folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    data["data"]["corpus"] = {"kind": "jsonl", "files": [str(folder / "rows.jsonl")]}


def no_parquet(data: dict[str, Any], folder: Path) -> None:
    (folder / "rows.parquet").write_text("text")
    data["data"]["corpus"] = {"kind": "parquet", "files": [str(folder / "rows.parquet")]}


def large_tokenizer(data: dict[str, Any], folder: Path) -> None:
    tokenizer = Tokenizer.from_str(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "unk_token": "[UNK]", '
        '"vocab": {"[UNK]": 0}}}'
    )
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(600))])
    tokenizer.save(str(folder / "tokenizer.json"))
    data["data"]["tokenizer"] = {"kind": "file", "path": str(folder / "tokenizer.json")}


def no_tokenizer(data: dict[str, Any], folder: Path) -> None:
    data["data"]["tokenizer"] = {"kind": "file", "path": str(folder / "tokenizer.json")}


def unwritable_cache(data: dict[str, Any], folder: Path) -> None:
    (folder / "cache").write_text("a file")
    data["data"]["cache_dir"] = str(folder / "cache")


def unknown_key(data: dict[str, Any], folder: Path) -> None:
    data["model"]["block"]["feed_forward"]["router"]["topk"] = 2


def many_choices(data: dict[str, Any], folder: Path) -> None:
    data["model"]["block"]["feed_forward"]["router"]["top_k"] = 5


def odd_heads(data: dict[str, Any], folder: Path) -> None:
    data["model"]["block"]["attention"]["heads"] = 5


def generated_setting(data: dict[str, Any], folder: Path) -> None:
    data["engine"] = {"deepspeed": {"gradient_clipping": 2.0}}


MISTAKES: list[tuple[Edit, list[str]]] = [
    (missing_corpus, ["no file matches '", "none-*.txt"]),
    (empty_corpus, ["the corpus holds no text"]),
    (one_document, ["holding out 0.1 of 1 documents leaves"]),
    (latin_1, ["latin.txt isn't UTF-8: line 5, byte 10 of the file"]),
    (other_column, ["rows.jsonl, line 1 has no column 'text'; its columns are body"]),
    (no_json, ["rows.jsonl, line 2 isn't valid JSON"]),
    (no_parquet, ["rows.parquet isn't a readable parquet file"]),
    (large_tokenizer, ["the tokenizer has 605 tokens", "model.vocab_size = 512 rows", "at least 605"]),
    (no_tokenizer, ["the tokenizer ", "tokenizer.json can't be read"]),
    (unwritable_cache, ["the data cache ", "can't be written", "data.cache_dir"]),
    (unknown_key, ["model.block.feed_forward.router: unknown key 'topk': did you mean 'top_k'?"]),
    (many_choices, ["model.block.feed_forward: router.top_k is 5 but there are only 4 choices"]),
    (odd_heads, ["model: layer 0: width 32 does not divide into 5 heads"]),
    (generated_setting, ["engine: deepspeed sets gradient_clipping, which is generated"]),
]


def assert_told(errors: str, parts: list[str]) -> None:
    message = errors[errors.index("moe ") :]  # after the progress bars
    for part in parts:
        assert part in message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 25
    assert max(len(line) for line in message.splitlines()) < 600


@pytest.mark.parametrize(("edit", "parts"), MISTAKES, ids=[edit.__name__ for edit, _ in MISTAKES])
def test_a_mistake_is_told_and_nothing_is_left(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Edit, parts: list[str]
) -> None:
    edit(tiny, tmp_path)
    assert main(["pretrain", str(write_yaml(tmp_path / "run.yaml", tiny))]) == 2
    assert_told(capsys.readouterr().err, parts)
    assert not Path(tiny["run_dir"]).exists()


def test_an_unwritable_run_dir_is_told(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("a file")
    assert main(["pretrain", str(write_yaml(tmp_path / "run.yaml", tiny))]) == 2
    assert_told(capsys.readouterr().err, [f"cannot write {tmp_path}/run"])
    assert (tmp_path / "run").read_text() == "a file"
    tiny["run_dir"] = str(tmp_path / "run" / "below")
    assert main(["pretrain", str(write_yaml(tmp_path / "run.yaml", tiny))]) == 2
    assert_told(capsys.readouterr().err, [f"cannot write {tmp_path}/run/below"])


def test_resuming_a_changed_config_is_told(reference: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished)
    assert main(["pretrain", str(reference / "run.yaml"), f"run_dir={finished}", "seed=1"]) == 2
    assert_told(capsys.readouterr().err, ["cannot resume", "\n  seed: 0 -> 1\n"])
    assert contents(finished) == before


def test_a_real_process_tells_it_alike(tiny: dict[str, Any], tmp_path: Path) -> None:
    latin_1(tiny, tmp_path)
    process = moe_process("pretrain", str(write_yaml(tmp_path / "run.yaml", tiny)))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == ""
    assert_told(errors, ["latin.txt isn't UTF-8: line 5"])
    assert len(errors.splitlines()) == 1
    assert not Path(tiny["run_dir"]).exists()


def test_a_bad_config_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from training.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'deepspeed', 'matplotlib', 'tensorboard'} & set(sys.modules))); sys.exit(code)"
    )
    words = [sys.executable, "-c", code, "pretrain", str(tmp_path / "none.yaml")]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stdout == "[]\n"
    assert process.stderr == (
        f"moe pretrain: cannot read config {tmp_path}/none.yaml: [Errno 2] No such file or directory: "
        f"'{tmp_path}/none.yaml'\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "2"], "say what to launch after --, such as: moe launch --ranks 2 -- pretrain CONFIG"),
        (["--ranks", "2", "--"], "say what to launch after --"),
        (["--ranks", "0", "--", "pretrain", "CONFIG"], "--ranks"),
        (
            ["--ranks", "1", "--hostfile", "/nowhere/hosts", "--", "pretrain", "CONFIG"],
            "the hostfile /nowhere/hosts does not exist",
        ),
        (
            ["--ranks", "2", "--", "checkpoint", "verify", "runs/a"],
            "checkpoint is no work for several ranks, which would each do all of it; run: moe checkpoint verify runs/a",
        ),
        (
            ["--ranks", "2", "--", "plan", "CONFIG", "--gpus", "4"],
            "plan is no work for several ranks, which would each do all of it",
        ),
        (["--ranks", "2", "--last-call", "5", "--", "pretrain", "CONFIG"], "--last-call goes with --nodes and"),
        (["--ranks", "2", "--", "pretrain", "none.yaml"], "cannot read config none.yaml"),
        (
            ["--ranks", "2", "--", "pretrain", "CONFIG", "model.widht=1"],
            "CONFIG is not a valid run:\n  model: ",
        ),
        pytest.param(
            ["--", "pretrain", "CONFIG"],
            "0 processes can't be started; say how many with --ranks N (by default one per GPU)",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to count by"),
        ),
    ],
)
def test_what_cannot_be_launched_is_told_before_a_process_starts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("nothing should be started")

    monkeypatch.setattr(subprocess, "run", refuse)
    config = str(write_yaml(tmp_path / "run.yaml", {"run_dir": str(tmp_path / "run")}))
    assert main(["launch", *(config if word == "CONFIG" else word for word in words)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("moe launch: ")
    assert message.replace("CONFIG", config if "CONFIG is" in message else "CONFIG") in errors


def test_overrides_may_stand_before_and_after_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, given = str(write_yaml(tmp_path / "run.yaml", {"run_dir": "a"})), []
    monkeypatch.setattr("training.plan.plan.make_plan", lambda run, *_: given.append(run) or 1 / 0)
    for words in (
        [config, "train.max_steps=2", "seed=3", "--gpus", "4"],
        [config, "--gpus", "4", "train.max_steps=2", "seed=3"],
        [config, "seed=1", "--gpus", "4", "train.max_steps=2", "--gpu", "a100", "seed=3"],
        ["--gpus", "4", config, "train.max_steps=2", "seed=3"],
    ):
        with pytest.raises(ZeroDivisionError):
            main(["plan", *words])
        assert (given[-1].train.max_steps, given[-1].seed) == (2, 3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["plan", "a.yaml", "--gpus", "4", "seed"], "seed"),
        (["plan", "a.yaml", "--gpus", "4", "--gpuz=h100", "seed=1"], "--gpuz=h100"),
        (["pretrain", "a.yaml", "--seed=1"], "--seed=1"),
        (["checkpoint", "verify", "runs/a", "seed=1"], "seed=1"),
    ],
)
def test_what_is_neither_an_option_nor_an_override(
    words: list[str], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {wrong}\n")


@pytest.mark.parametrize("words", [[], ["pretrian", "a.yaml"], ["pretrain"], ["launch", "--", "pretrian"]])
def test_words_that_are_no_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: moe")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_before_training_it_says_so(
    signum: int,
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("training.pretrain.prepare", lambda *_: signal.raise_signal(signum))
    before = signal.getsignal(signal.SIGTERM)
    # Ctrl-C as in a terminal; a runner of tests may have had it ignored.
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["pretrain", str(write_yaml(tmp_path / "run.yaml", tiny))]) == 130
    finally:
        signal.signal(signal.SIGINT, interrupts)
    told = capsys.readouterr().err
    assert told.startswith("moe pretrain: interrupted, and nothing was saved of this; the same command goes on")
    assert "Traceback" not in told
    assert signal.getsignal(signal.SIGTERM) is before
