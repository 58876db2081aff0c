"""What a plan concludes, and what `moe plan` prints and refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from routing.errors import UserError
from tests.training.conftest import ROOT, write_yaml
from tests.training.plan.runs import experts, small_run
from training.cli import main
from training.config import RunConfig, load_run_config
from training.plan.plan import best, expert_sizes, make_plan, over_experts, over_gpus, over_stages
from training.plan.report import unit_for
from training.plan.specs import GPUS, find_gpu

H100 = GPUS["h100"]
LARGE = load_run_config(ROOT / "configs" / "large-64e.yaml", [])


def test_times_follow_from_the_figures() -> None:
    plan = make_plan(small_run(), 1, H100, 0.5)
    assert plan.step_tokens == 2048
    assert plan.times.update == pytest.approx(7 * 4 * plan.parameters.total / 3.35e12)
    assert plan.times.compute == pytest.approx(max(plan.reading, plan.flops.total * 2048 / (0.5 * 67e12)))
    assert plan.seconds == pytest.approx(plan.times.compute + plan.times.update)  # nobody to talk to
    assert plan.days == pytest.approx(plan.seconds * 1000 / 86_400)


def test_what_binds() -> None:
    tiny_steps = small_run(**experts(64, 1, 1024), train__micro_batch_tokens=128, train__step_tokens=128)
    assert make_plan(tiny_steps, 1, H100, 0.4).binds == "memory bandwidth"  # two rows an expert: weights are read
    assert make_plan(LARGE, 32, H100, 0.4).binds == "compute"
    assert make_plan(large_of(2048), 2048, H100, 0.4).binds == "gradients"
    crossing = [plan for plan in over_experts(LARGE, 64, H100, 0.4) if plan.expert == 64]
    assert [plan.binds for plan in crossing] == ["all-to-all"]
    assert make_plan(LARGE, 32, GPUS["cpu"], 0.4).binds == "memory size"


def test_a_rank_holds_its_share() -> None:
    whole, shared = (make_plan(with_expert(LARGE, n), 64, H100, 0.4) for n in (1, 8))
    assert whole.here == whole.parameters.total
    assert shared.here == whole.here - whole.parameters.experts * 7 // 8
    assert shared.memory.weights == 4 * shared.here
    assert shared.memory.optimizer == whole.memory.optimizer == 12 * whole.here / 64  # ZeRO-1 spreads it anyway


def with_expert(run: RunConfig, expert: int) -> RunConfig:
    return run.model_copy(update={"parallel": run.parallel.model_copy(update={"expert": expert})})


def test_zero_stages_hold_ever_less() -> None:
    plans = over_stages(LARGE, 64, H100, 0.4)
    assert [plan.zero_stage for plan in plans] == [0, 1, 2, 3]
    held = [plan.memory.weights + plan.memory.gradients + plan.memory.optimizer for plan in plans]
    assert held == sorted(held, reverse=True)


def test_the_sweep_covers_what_divides_gpus_and_experts() -> None:
    assert expert_sizes(LARGE, 48) == [1, 2, 4, 8, 16]
    assert expert_sizes(LARGE, 2048) == [1, 2, 4, 8, 16, 32, 64]
    assert expert_sizes(small_run(), 8) == [1]  # nothing is routed
    assert expert_sizes(small_run(**experts(6)), 12) == [1, 2, 3, 6]
    plans = over_experts(large_of(2048), 2048, H100, 0.4)
    assert best(plans).seconds == min(plan.seconds for plan in plans if plan.fits)


def test_the_sweep_over_gpus_goes_to_thousands() -> None:
    plans = over_gpus(LARGE, 48, H100, 0.4)
    assert [plan.gpus for plan in plans] == [1, 2, 4, 8, 16, 32, 48, 64, 128, 256, 512, 1024, 2048, 4096]
    steps = {plan.gpus: round(plan.step_tokens) for plan in plans}
    assert steps.pop(4096) == 4096 * LARGE.data.max_length  # a sequence each; the configured step has half as many
    assert set(steps.values()) == {LARGE.train.step_tokens}
    wide = large_of(1024)
    for plan in plans[-4:-2]:
        assert plan == best(over_experts(wide, plan.gpus, H100, 0.4))


def large_of(lanes: int) -> RunConfig:
    return load_run_config(ROOT / "configs" / "large-64e.yaml", [f"data.corpus.lanes={lanes}"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["demo", "--gpus", "1"], "MB per GPU"),
        (["demo", "--gpus", "1"], "need no more than engine.deepspeed.zero_optimization.reduce_bucket_size=1753376"),
        (["demo", "--gpus", "1", "--gpu", "cpu"], "figures of the GPU: orders of magnitude for a core with AVX-512"),
        (["large-64e", "--gpus", "8"], "GB per GPU"),
        (["large-64e", "--gpus", "8"], "+ train.step_tokens raised to a sequence for each GPU"),
    ],
)
def test_what_the_report_says(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "configs" / f"{words[0]}.yaml"), *words[1:]]) == 0
    assert expected in " ".join(capsys.readouterr().out.split())


SCALE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
RUNGS = re.findall(r"^\$ moe plan (.*)\n(.*)$", SCALE, re.MULTILINE)


def printed_by(words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    config, *others = words.split()
    assert main(["plan", str(ROOT / config), *others]) == 0
    return [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]


@pytest.mark.parametrize(("words", "line"), RUNGS)
def test_the_docs_ladder_is_what_the_plan_says(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line in printed_by(words, capsys)


def test_the_docs_plan_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(RUNGS) == 5
    [block] = re.findall(r"^```\n(256 x H100.*?)^```", SCALE, re.MULTILINE | re.DOTALL)
    expected = printed_by("configs/large-64e.yaml --gpus 256", capsys)
    assert [line for line in block.splitlines() if line.strip()] == expected


def test_a_bucket_that_the_model_fills_needs_no_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "configs" / "large-64e.yaml"), "--gpus", "8"]) == 0
    assert "reduce_bucket_size" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("most", "number", "printed"),
    [
        (1e9, 1e9, "1.00"),
        (5e9, 4e6, "0.004"),
        (9.99e8, 9.99e8, "999.00"),
        (1e6, 1.5e5, "0.150"),
        (2e9, 2.5e12, "2,500.00"),
    ],
)
def test_bytes_are_given_in_megabytes_below_a_gigabyte(most: float, number: float, printed: str) -> None:
    unit = unit_for(most)
    assert unit.name == ("GB" if most >= 1e9 else "MB")
    assert unit.of(number) == printed


def test_the_best_fits_if_any_does() -> None:
    plans = over_experts(LARGE, 32, H100._replace(memory=20e9), 0.4)
    assert not plans[0].fits  # though it is the fastest
    assert best(plans).fits
    hopeless = over_experts(LARGE, 32, H100._replace(memory=1e9), 0.4)
    assert best(hopeless) == min(hopeless, key=lambda plan: plan.memory.total)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UserError, match=r"--gpu b200 isn't known; choose one of h100, h200, a100, cpu"):
        find_gpu("b200")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus is 0; give a number of at least 1"),
        (["--gpus", "2", "--efficiency", "40"], "--efficiency is 40; give the share of the peak"),
        (["--gpus", "2", "--gpu", "v100"], "--gpu v100 isn't known"),
        (["parallel.expert=16", "--gpus", "24"], "with --gpus 24 valid sizes are 1, 2, 4, 8"),
        (["--gpus", "4096"], "raise train.step_tokens to at least 4194304, or plan for at most 2048 GPUs"),
        (["parallel.experts=3", "--gpus", "8"], "did you mean 'expert'?"),
        (["--gpus", "8", "--json", "/nowhere/plan.json"], "cannot write /nowhere/plan.json"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "configs" / "large-64e.yaml"), *words]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("moe plan: ")
    assert message in errors


def test_what_training_refuses_is_not_planned() -> None:
    of = {"kind": "text", "files": ["a.txt"]}
    run = small_run(data__corpus={"kind": "stream", "of": of, "lanes": 4})
    assert make_plan(run, 4, H100, 0.4).gpus == 4
    with pytest.raises(UserError, match=r"data\.corpus\.lanes is 4, but there are 8 ranks, and each reads a lane"):
        make_plan(run, 8, H100, 0.4)


def test_what_does_not_fit_is_printed_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train.micro_batch_tokens=262144", "train.activation_checkpointing=false", "--gpus", "8"]
    assert main(["plan", str(ROOT / "configs" / "large-64e.yaml"), *words]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Does not fit" in printed
    assert "most of it activations. Lower train.micro_batch_tokens, or set train.activation_checkpointing" in printed
    assert "none does" in printed


UNKNOWN_MEMORY = {  # configs of what has no memory model yet
    "convbert-small": "a feed-forward network of kind grouped",
    "long-local": "attention of kind local",
    "adaptive-resolution": "attention of kind adaptive_resolution",
    "routed-heads": "attention of kind routed_heads",
}
UNKNOWN = {*UNKNOWN_MEMORY, "mixture-of-depths"}
CONFIGS = sorted(
    path
    for path in (ROOT / "configs").glob("*.yaml")
    if path.stem not in UNKNOWN and not path.stem.startswith("finetune")
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_be_planned(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config), "--gpus", "8", "--json", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert f"{sum(written['plan']['parameters'].values()):,}" in printed
    assert written["plan"]["memory_total"] > 0
    assert len(written["sweep"]) == 4
    assert len(written["stages"]) == 4
    assert [plan["gpus"] for plan in written["gpus"]] == [2**n for n in range(13)]


@pytest.mark.parametrize(("config", "what"), UNKNOWN_MEMORY.items())
def test_what_has_no_memory_model_is_refused(config: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "configs" / f"{config}.yaml"), "--gpus", "2"]) == 2
    assert f"what {what} keeps in memory isn't known here" in capsys.readouterr().err


def test_a_run_whose_tokens_skip_blocks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "configs" / "mixture-of-depths.yaml"), "--gpus", "2"]) == 2
    assert "whose tokens skip blocks isn't known here; plan without depth" in capsys.readouterr().err


def test_grouped_feed_forward_has_no_memory_model() -> None:
    run = small_run(model__block={"feed_forward": {"kind": "grouped"}})
    with pytest.raises(UserError, match="of kind grouped keeps in memory isn't known here; plan with kind: dense"):
        make_plan(run, 8, H100, 0.4)


def test_planning_needs_no_training_engine(tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "run.yaml", {"run_dir": "none"})
    code = (
        "import sys; from training.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'deepspeed', 'matplotlib', 'tensorboard'} & set(sys.modules))); sys.exit(code)"
    )
    words = [sys.executable, "-c", code, "plan", str(config), "--gpus", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
