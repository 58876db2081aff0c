"""What a run shows: the figures of a step and of a window, a heat map, a table."""

import errno
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from routing import RoutingReport, RoutingStats
from training.alarms import Alarms, TellAlarm
from training.evaluate import Evaluation
from training.inspection.live import Seen
from training.metrics import RunLog, load_image, routing_table, worst_balance
from training.step import StepResult


def stats(assigned: list[int], dropped: int = 0) -> RoutingStats:
    """Of a router with top_k 1 whose tokens have an entropy of half a nat each."""
    tokens = sum(assigned)
    return RoutingStats(
        prob_sum=torch.tensor(assigned, dtype=torch.float32),
        assigned=torch.tensor(assigned),
        dropped=torch.tensor([dropped] + [0] * (len(assigned) - 1)),
        lse_sq_sum=torch.tensor(0.0),
        entropy_sum=torch.tensor(tokens / 2),
        tokens=torch.tensor(tokens),
        sequence_balance_sum=torch.tensor(0.0),
        sequences=torch.tensor(0),
        input_sum=torch.zeros(0),
    )


def result(loss: float, assigned: list[int], grad_norm: float = 1.0) -> StepResult:
    return StepResult(
        {"masked_lm": loss, "z": 2 * loss}, grad_norm, sum(assigned), {"0.experts": stats(assigned)}, False
    )


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_experts_that_take_turns_look_collapsed_in_a_step_and_balanced_in_the_window(
    tmp_path: Path, console: Console
) -> None:
    with RunLog(tmp_path, every=2, first_step=0, max_steps=9, console=console) as log:
        log.step(1, result(4.0, [8, 0]), lr=0.5, seconds=2.0)
        assert not printed(console)
        log.step(2, result(2.0, [0, 8], grad_norm=3.0), lr=0.25, seconds=2.0)
        log.step(3, result(1.0, [2, 6]), lr=0.125, seconds=2.0)
    curves = scalars(tmp_path)
    assert curves["loss/masked_lm"] == [(2, 3.0), (3, 1.0)]  # means of the windows, the last one cut short
    assert curves["loss/z"] == [(2, 6.0), (3, 2.0)]
    curves = {tag: points[:1] for tag, points in curves.items()}
    assert curves["optimizer/learning_rate"] == [(2, 0.25)]
    assert curves["optimizer/gradient_norm"] == [(2, 3.0)]
    assert curves["routing_step/0.experts/max_over_mean"] == [(2, 2.0)]
    assert curves["routing_window/0.experts/max_over_mean"] == [(2, 1.0)]
    assert curves["routing_step/0.experts/dead"] == [(2, 1.0)]
    assert curves["routing_window/0.experts/dead"] == [(2, 0.0)]
    assert curves["routing_step/0.experts/load/000"] == [(2, 0.0)]
    assert curves["routing_step/0.experts/load/001"] == [(2, 1.0)]
    assert curves["routing_window/0.experts/load/000"] == [(2, 0.5)]
    assert curves["routing_window/0.experts/entropy"] == [(2, 0.5)]
    assert "step 2: loss 2.000" in printed(console)
    assert "worst max/mean 2.00" in printed(console)


def test_a_part_that_only_some_steps_have_is_the_mean_of_those(tmp_path: Path, console: Console) -> None:
    with RunLog(tmp_path, every=3, first_step=0, max_steps=9, console=console) as log:
        for step, early in enumerate(({"exit_0": 4.0}, {}, {"exit_0": 6.0}, {}, {}, {}), start=1):
            log.step(step, result(1.0, [4, 4])._replace(parts={"masked_lm": 1.0, **early}), lr=1.0, seconds=1.0)
    assert scalars(tmp_path)["loss/exit_0"] == [(3, 5.0)]


def test_routers_whose_load_is_by_design_are_not_unbalanced(tmp_path: Path, console: Console) -> None:
    routing = {"0.heads": stats([0, 8, 0, 0]), "0.experts": stats([6, 2])}
    only = {"0.heads": routing["0.heads"]}
    step = result(1.0, [6, 2])._replace(routing=routing)
    with RunLog(tmp_path, every=1, first_step=0, max_steps=9, console=console, by_design={"0.heads"}) as log:
        log.step(1, step, lr=1.0, seconds=2.0)
        log.evaluation(1, Evaluation(2.5, routing))
        log.step(2, step._replace(routing=only), lr=1.0, seconds=2.0)
    assert [line for line in printed(console).splitlines() if "max/mean" in line] == [
        "step 1: loss 1.000  4 tokens/s  worst max/mean 1.50"
    ]
    for view in ("routing_step", "routing_window", "routing_held_out"):
        told = {tag.removeprefix(f"{view}/") for tag in scalars(tmp_path) if tag.startswith(view)}
        shares = {f"load/{choice:03d}" for choice in range(4)}
        assert {tag for tag in told if "heads" in tag} == {
            f"0.heads/{figure}" for figure in ("entropy", "dropped_fraction", *shares)
        }
        assert {"0.experts/max_over_mean", "0.experts/dead"} < told
    assert (worst_balance(routing), worst_balance(routing, {"0.heads"}), worst_balance(only, only)) == (4.0, 1.5, None)
    console.print(routing_table(routing, {"0.heads"}))
    lines = [line.strip() for line in printed(console).splitlines()]
    rows = [re.split(" {2,}", line) for line in lines if line.startswith(("0.heads", "0.experts"))]
    assert rows == [
        ["0.heads", "-", "0.50 of 1.39", "0.0%", "-", "0 100 0 0"],
        ["0.experts", "1.50", "0.50 of 0.69", "0.0%", "0", "75 25"],
    ]


def test_windows_do_not_overlap(tmp_path: Path, console: Console) -> None:
    with RunLog(tmp_path, every=2, first_step=0, max_steps=4, console=console) as log:
        for step, loss in enumerate([8.0, 4.0, 2.0, 1.0], 1):
            log.step(step, result(loss, [1, 1]), lr=1.0, seconds=2.0)
    assert scalars(tmp_path)["loss/masked_lm"] == [(2, 6.0), (4, 1.5)]


def test_a_resumed_log_supersedes_what_was_written_after_its_checkpoint(tmp_path: Path, console: Console) -> None:
    for first_step, loss in ((0, 4.0), (2, 1.0)):
        with RunLog(tmp_path, every=1, first_step=first_step, max_steps=4, console=console) as log:
            for step in range(first_step + 1, 5):
                log.step(step, result(loss, [1, 1]), lr=1.0, seconds=2.0)
    assert scalars(tmp_path)["loss/masked_lm"] == [(1, 4.0), (2, 4.0), (3, 1.0), (4, 1.0)]


def test_speed_is_of_the_windows_steps_alone(tmp_path: Path, console: Console) -> None:
    with RunLog(tmp_path, every=2, first_step=0, max_steps=9, console=console) as log:
        log.step(1, result(1.0, [3, 5]), lr=1.0, seconds=1.0)
        log.step(2, result(1.0, [3, 5]), lr=1.0, seconds=3.0)
        log.step(3, result(1.0, [3, 5]), lr=1.0, seconds=8.0)
    assert scalars(tmp_path)["speed/tokens_per_second"] == [(2, 4.0), (3, 1.0)]


def test_a_record_that_cannot_be_written_is_told_once_and_stops_nothing(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.metrics.SummaryWriter.add_scalar", full)
    with RunLog(tmp_path, every=1, first_step=0, max_steps=9, console=console) as log:
        for step in (1, 2):
            log.step(step, result(1.0, [3, 5]), lr=1.0, seconds=2.0)
    assert printed(console).count("No space left on device") == 1
    assert "step 2: loss 1.000" in printed(console)


def test_an_evaluation_has_its_curves_and_its_image(tmp_path: Path, console: Console) -> None:
    with RunLog(tmp_path, every=1, first_step=0, max_steps=9, console=console) as log:
        log.evaluation(7, Evaluation(2.5, {"0.experts": stats([3, 1], dropped=1)}))
        log.evaluation(8, Evaluation(2.0, {}))  # no routed layer
    curves = scalars(tmp_path)
    assert curves["loss/held_out"] == [(7, 2.5), (8, 2.0)]
    assert curves["routing_held_out/0.experts/max_over_mean"] == [(7, 1.5)]
    assert curves["routing_held_out/0.experts/dropped_fraction"] == [(7, 0.25)]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Images("routing_held_out/load")] == [7]
    assert "step 7: held-out loss 2.5000" in printed(console)


def test_load_image_is_a_row_per_router_blue_below_the_mean_and_red_above() -> None:
    def figures(load: list[float]) -> RoutingReport:
        return RoutingReport(load=load, max_over_mean=1.0, entropy=0.0, dropped_fraction=0.0, dead=0)

    image = load_image({"0.experts": figures([0.0, 1.0]), "1.experts": figures([0.25] * 4)})
    assert image.dtype == np.uint8
    assert image.shape == (170, 310, 3)  # 1.0 + 2 * 0.35 by 1.5 + 4 * 0.4 inches of 100 dots
    colours = {tuple(int(c) for c in pixel) for pixel in image.reshape(-1, 3)}
    assert {(5, 48, 97), (103, 0, 31)} <= colours  # the ends of RdBu: load 0 and twice the mean


def test_routing_table_says_it_in_words(console: Console) -> None:
    console.print(routing_table({"0.experts": stats([6, 2, 0, 0], dropped=2), "1.experts": stats([1] * 32)}))
    rows = [re.split(" {2,}", line.strip()) for line in printed(console).splitlines() if ".experts" in line]
    assert rows == [
        ["0.experts", "3.00", "0.50 of 1.39", "25.0%", "2", "75 25 0 0"],
        ["1.experts", "1.00", "0.50 of 3.47", "0.0%", "0", "min 3.12, max 3.12"],
    ]


def test_many_choices_have_a_histogram_instead_of_curves(tmp_path: Path, console: Console) -> None:
    few, many = stats([1] * 16), stats([3, *[1] * 16])
    step = result(1.0, [1])._replace(routing={"0.experts": few, "1.experts": many})
    with RunLog(tmp_path, every=1, first_step=0, max_steps=9, console=console) as log:
        log.step(1, step, lr=1.0, seconds=2.0)
    curves = scalars(tmp_path)
    assert sum("routing_step/0.experts/load/" in tag for tag in curves) == 16
    assert not any("1.experts/load/" in tag for tag in curves)
    assert curves["routing_step/1.experts/max_over_mean"][0][1] == pytest.approx(3 / 19 * 17)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    views = ["routing_step/1.experts/load_over_mean", "routing_window/1.experts/load_over_mean"]
    assert events.Tags()["histograms"] == views
    histogram = events.Histograms(views[0])[0].histogram_value
    assert (histogram.num, histogram.max) == (17, pytest.approx(3 / 19 * 17))


def test_load_has_its_spread_and_its_entropy(tmp_path: Path, console: Console) -> None:
    with RunLog(tmp_path, every=1, first_step=0, max_steps=9, console=console) as log:
        log.step(1, result(1.0, [6, 2, 0, 0]), lr=1.0, seconds=2.0)
    curves = scalars(tmp_path)
    load = np.array([0.75, 0.25, 0, 0])
    assert curves["routing_step/0.experts/coefficient_of_variation"][0][1] == pytest.approx(load.std() / load.mean())
    assert curves["routing_step/0.experts/load_entropy"][0][1] == pytest.approx(
        -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
    )


def test_alarms_are_told_on_the_console(tmp_path: Path, console: Console) -> None:
    alarms = Alarms(TellAlarm(max_over_mean=1.5, steps=2))
    with RunLog(tmp_path, every=10, first_step=0, max_steps=9, console=console, alarms=alarms) as log:
        for step in range(1, 4):
            log.step(step, result(1.0, [8, 0, 0, 0]), lr=1.0, seconds=2.0)
    assert [line for line in printed(console).splitlines() if "max/mean >" in line] == [
        "step 2: layer 0 has had max/mean > 1.5 for 2 steps (now 4.00)"
    ]


def test_what_was_seen_of_held_out_text_is_written(tmp_path: Path, console: Console) -> None:
    evaluation = Evaluation(2.5, {"0.experts": stats([3, 1])}, {"0.experts": Seen({"confidence": 0.75}, "| a | b |")})
    with RunLog(tmp_path, every=1, first_step=0, max_steps=9, console=console) as log:
        log.evaluation(7, evaluation)
    assert scalars(tmp_path)["routing_held_out/0.experts/confidence"] == [(7, 0.75)]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (text,) = events.Tensors("routing_held_out/0.experts/tokens/text_summary")
    assert text.tensor_proto.string_val == [b"| a | b |"]
