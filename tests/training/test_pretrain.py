"""Pre-training as a user meets it: what a run leaves behind, and that no interruption changes a bit of it."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import moe
from routing.errors import UserError
from tests.training.conftest import contents, moe_process, run_ranks, saved_bits, write_yaml
from tests.training.workers import assemble
from training import step
from training.checkpoint_files import find_fault
from training.cli import main
from training.config import RunConfig, load_run_config
from training.data.packing import held_out_batches
from training.data.prepare import prepare
from training.data.tokenizer import vocabulary
from training.engine import Ranks
from training.objective import MaskedLMObjective
from training.optimizer_state import whole_parameters
from training.pretrain import pretrain
from training.resume import find_checkpoint

pytestmark = pytest.mark.usefixtures("alone")


def interrupt(reference: Path, run: Path, signum: int, delay: float) -> tuple[int, str]:
    """Start the reference's run in `run`, and signal it `delay` seconds after its next checkpoint.

    It evaluates at every step, which changes no bit and gives the signal time to arrive.
    """
    latest = run / "checkpoints" / "latest"
    before = latest.read_text() if latest.exists() else ""
    config = str(reference / "run.yaml")
    process = moe_process("pretrain", config, f"run_dir={run}", "train.evaluate_every=1")
    while process.poll() is None and (not latest.exists() or latest.read_text() == before):
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signum)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output + errors


def finish(reference: Path, run: Path) -> None:
    process = moe_process("pretrain", str(reference / "run.yaml"), f"run_dir={run}")
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors


def assert_same_end(reference: Path, run: Path) -> None:
    expected, actual = reference / "run", run
    model = "model/model.safetensors"
    assert (actual / model).read_bytes() == (expected / model).read_bytes()
    last = Path("checkpoints/step-000012")
    assert saved_bits(actual / last) == saved_bits(expected / last)
    states = [json.loads((folder / last / "state.json").read_text())["train"] for folder in (actual, expected)]
    for state in states:
        del state["seconds"]
    assert states[0] == states[1]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (actual, expected)]
    for summary in summaries:
        del summary["tokens_per_second"]
    assert summaries[0] == summaries[1]


def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bits(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for _ in range(2):
        code, output = interrupt(reference, run, signal.SIGKILL, random.uniform(0, 0.2))
        assert code == -signal.SIGKILL, output
        newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
        assert find_fault(newest) is None
    finish(reference, run)
    assert_same_end(reference, run)


def test_asked_to_stop_it_saves_its_step_and_resumes_with_the_same_bits(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    reached = 0
    for signum in (signal.SIGTERM, signal.SIGINT):
        code, output = interrupt(reference, run, signum, 0.0)
        assert code == 0, output
        newest = (run / "checkpoints" / "latest").read_text().strip()
        steps = int(newest.removeprefix("step-"))
        assert reached < steps < 12
        assert f"stopped at step {steps}, which is saved" in output
        assert "Traceback" not in output
        assert find_fault(run / "checkpoints" / newest) is None
        assert not (run / "summary.json").exists()
        reached = steps
    finish(reference, run)
    assert_same_end(reference, run)


def test_summary_holds_what_a_run_came_to(reference: Path) -> None:
    summary = json.loads((reference / "run" / "summary.json").read_text())
    assert summary["steps"] == 12
    assert 12 * (256 - 32) < summary["tokens"] <= 12 * 256
    assert summary["tokens_per_second"] > 100
    assert summary["initial_loss"] == pytest.approx(6.24, abs=0.15)  # log 512, for 512 tokens alike
    assert summary["final_loss"] < summary["initial_loss"] - 0.2
    assert summary["eval_loss"] < summary["initial_eval_loss"] - 0.4
    assert 3 < summary["unigram_entropy"] < 6.24
    assert 1 <= summary["load_max_over_mean"] < 4
    assert summary["dropped_fraction"] == 0
    assert summary["world_size"] == 1


def test_run_dir_holds_config_checkpoints_curves_and_model(reference: Path) -> None:
    run = reference / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "model",
        "summary.json",
        "tensorboard",
    ]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-000009", "step-000012"]
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["optimizer"]["betas"] == [0.9, 0.98]
    assert RunConfig.model_validate(resolved) == load_run_config(reference / "run.yaml", [])


def test_saved_model_has_the_held_out_loss_of_the_summary(reference: Path) -> None:
    run = load_run_config(reference / "run.yaml", [])
    model = moe.from_pretrained(reference / "run" / "model")
    data = prepare(run.data, reference / "run" / "model" / "tokenizer.json")
    loss, targets = 0.0, 0
    for batch in held_out_batches(
        data.held_out,
        run.data.masking,
        vocabulary(data.tokenizer),
        micro_batch_tokens=256,
        max_tokens=run.train.evaluation_tokens,
    ):
        with torch.no_grad():
            output = model(batch.input_ids, batch=batch.batch, target_index=batch.target_index)
        loss += float(F.cross_entropy(output.logits, batch.targets, reduction="sum"))
        targets += len(batch.targets)
    summary = json.loads((reference / "run" / "summary.json").read_text())
    assert loss / targets == pytest.approx(summary["eval_loss"], rel=1e-5)


def test_curves_tell_losses_speed_and_routing(reference: Path) -> None:
    events = EventAccumulator(str(reference / "run" / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    figures = ["max_over_mean", "entropy", "dropped_fraction", "dead", *(f"load/{e:03d}" for e in range(4))]
    figures += ["coefficient_of_variation", "load_entropy"]
    held_out = ["confidence", "margin", "known_by_token"]  # positions: there are too few sequences to tell
    assert scalars == {
        "loss/total",
        "loss/masked_lm",
        "loss/balance",
        "loss/z",
        "loss/held_out",
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "speed/tokens_per_second",
        *(
            f"{view}/{layer}.experts/{figure}"
            for view in ("routing_step", "routing_window", "routing_held_out")
            for layer in (0, 1)
            for figure in [*figures, *(held_out if view == "routing_held_out" else [])]
        ),
    }
    texts = [f"routing_held_out/{layer}.experts/tokens/text_summary" for layer in (0, 1)]
    assert [tag for tag in events.Tags()["tensors"] if "tokens" in tag] == texts
    (table,) = events.Tensors(texts[0])[-1].tensor_proto.string_val
    assert table.decode().startswith("| choice | load | whole word | ")
    assert events.Tags()["images"] == ["routing_held_out/load"]
    rates = {event.step: event.value for event in events.Scalars("optimizer/learning_rate")}
    assert rates == pytest.approx({2: 0.01, 4: 0.01, 6: 0.01, 8: 0.01 * 5 / 6, 10: 0.005, 12: 0.01 / 6})
    assert [event.step for event in events.Scalars("loss/held_out")] == [0, 6, 12]
    loads = [events.Scalars(f"routing_window/0.experts/load/{e:03d}")[0].value for e in range(4)]
    assert sum(loads) == pytest.approx(1)
    summary = json.loads((reference / "run" / "summary.json").read_text())
    assert events.Scalars("loss/held_out")[-1].value == pytest.approx(summary["eval_loss"])


def test_resumed_with_more_steps_it_goes_on(reference: Path, finished: Path) -> None:
    run = load_run_config(reference / "run.yaml", [f"run_dir={finished}", "train.max_steps=14"])
    before = json.loads((finished / "summary.json").read_text())
    summary = pretrain(run)
    assert summary is not None
    assert summary["steps"] == 14
    assert summary["initial_loss"] == before["initial_loss"]
    assert summary["initial_eval_loss"] == before["initial_eval_loss"]
    assert summary["tokens"] > before["tokens"]
    assert (finished / "checkpoints" / "latest").read_text() == "step-000014\n"
    assert find_fault(finished / "checkpoints" / "step-000014") is None


def test_a_finished_run_started_again_says_the_same(reference: Path, finished: Path) -> None:
    before = json.loads((finished / "summary.json").read_text())
    model = (finished / "model" / "model.safetensors").read_bytes()
    summary = pretrain(load_run_config(reference / "run.yaml", [f"run_dir={finished}"]))
    assert summary is not None
    del before["tokens_per_second"], summary["tokens_per_second"]
    assert summary == pytest.approx(before)
    assert (finished / "model" / "model.safetensors").read_bytes() == model


@pytest.mark.distributed
def test_machines_with_other_configs_or_data_are_refused_before_anything_is_prepared(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny["data"]["cache_dir"] = str(tmp_path / "cache")
    run_ranks(3, "refuse_other_machines", str(write_yaml(tmp_path / "run.yaml", tiny)))
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_changed_config_is_refused_field_by_field(
    reference: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    changes = ["model.width=64", "optimizer.lr=0.02", "data.tokenizer.lowercase=false", "train.max_steps=20"]
    assert main(["pretrain", str(reference / "run.yaml"), f"run_dir={finished}", *changes]) == 2
    assert capsys.readouterr().err == (
        f"moe pretrain: cannot resume {finished}/checkpoints/step-000012: the run's config differs from the "
        "one it was saved with:\n"
        "  data.tokenizer.lowercase: True -> False\n"
        "  model.width: 32 -> 64\n"
        "  optimizer.lr: 0.01 -> 0.02\n"
        "restore these values, choose another run_dir, or set checkpoint.resume=never to start again\n"
    )
    assert contents(finished) == before


def test_a_changed_corpus_is_refused(
    tiny: dict[str, Any], tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.txt"
    shutil.copy(text_file, corpus)
    tiny["data"]["corpus"]["files"] = [str(corpus)]
    tiny["train"]["max_steps"] = 1
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny), encoding="utf-8")
    assert main(["pretrain", str(config)]) == 0
    before = contents(tmp_path / "run")
    capsys.readouterr()
    with corpus.open("a", encoding="utf-8") as file:
        file.write("".join(f"\n\nA document that was not there before, number {n}." for n in range(9)))
    assert main(["pretrain", str(config), "train.max_steps=2"]) == 2
    message = capsys.readouterr().err
    assert f"cannot resume {tmp_path}/run/checkpoints/step-000001: it was trained on " in message
    assert "restore the corpus, or set checkpoint.resume=never" in message
    assert contents(tmp_path / "run") == before


def test_resume_never_starts_again_and_loses_nothing(reference: Path, finished: Path) -> None:
    before = contents(finished)
    changes = ["checkpoint.resume=never", "optimizer.lr=0.02", "train.max_steps=1"]
    for n in (1, 2):
        summary = pretrain(load_run_config(reference / "run.yaml", [f"run_dir={finished}", *changes]))
        assert summary is not None
        assert summary["steps"] == 1
        aside = contents(finished.with_name("run.old-1"))
        assert aside | {".lock": b""} == before | {".lock": b""}
        assert finished.with_name("run.old-2").exists() == (n == 2)


def test_resume_from_a_named_checkpoint(reference: Path, tmp_path: Path) -> None:
    source = reference / "run" / "checkpoints" / "step-000009"
    overrides = [f"run_dir={tmp_path / 'run'}", f"checkpoint.resume={source}", "train.max_steps=10"]
    summary = pretrain(load_run_config(reference / "run.yaml", overrides))
    assert summary is not None
    assert summary["steps"] == 10
    checkpoints = [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert checkpoints == ["step-000010"]
    assert find_fault(source) is None


def test_a_run_that_went_back_goes_on_from_there(reference: Path, finished: Path) -> None:
    checkpoints = finished / "checkpoints"
    back = [f"run_dir={finished}", f"checkpoint.resume={checkpoints / 'step-000009'}", "train.max_steps=10"]
    pretrain(load_run_config(reference / "run.yaml", back))
    assert (checkpoints / "latest").read_text() == "step-000010\n"
    run = load_run_config(reference / "run.yaml", [f"run_dir={finished}"])
    assert find_checkpoint(run) == checkpoints / "step-000010"  # not the step 12 it had reached before


def test_a_named_checkpoint_that_is_not_there_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["checkpoint"] = {"resume": str(tmp_path / "nowhere")}
    with pytest.raises(UserError, match=r"checkpoint.resume is .*/nowhere, which can't be resumed: .*state"):
        pretrain(RunConfig.model_validate(tiny))
    assert not (tmp_path / "run").exists()


def test_an_exploding_run_stops_before_it_saves_anything(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    changes = ["optimizer.lr=1.0e+38", "optimizer.schedule.warmup=0", "checkpoint.every=1"]
    assert main(["pretrain", str(reference / "run.yaml"), f"run_dir={run}", *changes]) == 1
    message = capsys.readouterr().err
    assert message.startswith("moe pretrain: training is not finite any more (")
    assert f"checkpoints in {run}/checkpoints, if there are any, are from before" in message
    assert "Traceback" not in message
    assert not list((run / "checkpoints").glob("*"))
    assert not (run / "summary.json").exists()


@pytest.mark.parametrize("experts", [True, False])
def test_heads_that_all_input_takes_do_not_count_as_unbalanced(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str], experts: bool
) -> None:
    heads = {"kind": "routed_heads", "heads": 4, "shared": 0, "router": {"kind": "learned", "top_k": 1}}
    measured = {**heads, "router": {"kind": "measured", "top_k": 1}}
    block = {"attention": heads} | ({"feed_forward": tiny["model"]["block"]["feed_forward"]} if experts else {})
    tiny["model"] |= {"block": block, "overrides": [{"layers": [1], "attention": measured}]}
    tiny["train"] |= {"max_steps": 2}
    summary = pretrain(RunConfig.model_validate(tiny))
    rows = {words[0]: words for words in map(str.split, capsys.readouterr().out.splitlines()) if words}
    assert rows["0.heads"][1] == rows["1.heads"][1] == "-"
    assert sorted(rows["0.heads"][-4:]) == ["0", "0", "0", "100"]
    if experts:
        worst = max(float(rows[f"{layer}.experts"][1]) for layer in (0, 1))
        assert summary["load_max_over_mean"] == pytest.approx(worst, abs=0.006)
    else:
        assert summary["load_max_over_mean"] is None


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_non_finite_loss_leaves_the_parameters_alone(
    tiny: dict[str, Any], alone: Ranks, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    tiny["parallel"] = {"zero_stage": stage}
    run = RunConfig.model_validate(tiny)
    engine, stream = assemble(run, alone)
    before = {name: tensor.clone() for name, tensor in whole_parameters(engine)}
    objective = step.share_of_loss

    def broken(*arguments: Any) -> Any:
        loss, parts = objective(*arguments)
        return loss * float("nan"), parts | {"z": parts["z"] * float("nan")}

    monkeypatch.setattr(step, "share_of_loss", broken)
    with pytest.raises(step.NonFiniteLoss, match="z = nan"):
        step.train_step(engine, stream.next_step(), MaskedLMObjective(run.model.depth, run.objective), alone)
    for name, tensor in whole_parameters(engine):
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_non_finite_gradient_is_never_saved(
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    write_config: Callable[[dict[str, Any]], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    objective = step.share_of_loss
    losses = []

    def broken(*arguments: Any) -> Any:
        loss, parts = objective(*arguments)
        losses.append(loss)
        # At the third step a finite loss, but its slope is not.
        return (loss + (loss * 0).sqrt() if len(losses) == 3 else loss), parts

    monkeypatch.setattr(step, "share_of_loss", broken)
    tiny |= {"parallel": {"zero_stage": stage}, "checkpoint": {"every": 1}}
    assert main(["pretrain", str(write_config(tiny))]) == 1
    assert "(gradient norm = " in capsys.readouterr().err
    checkpoints = Path(tiny["run_dir"]) / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step-000002\n"
    assert not (checkpoints / "step-000003").exists()
