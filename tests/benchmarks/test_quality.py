"""Dense and routed arms from one start: branches, upcycling on the way, and a whole small comparison."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import quality
from benchmarks.finetune import arms_of
from benchmarks.quality_arm import (
    Arm,
    CourseConfig,
    MidUpcycleConfig,
    RouterRateConfig,
    steps_spent,
    train_in_turns,
    upcycled_moment,
)
from moe.pretrained import from_pretrained
from moe.upcycling import UpcycleConfig
from routing import Tokens
from routing.errors import UserError
from tests.training.conftest import ROOT
from training.config import load_run_config
from training.data.prepare import prepare
from training.engine import Ranks, start_processes

EXPERTS = {
    "kind": "experts",
    "count": 4,
    "width": 16,
    "router": {"top_k": 2, "selection_bias": {"rate": 0.01}},
}
ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "routed": {"model.block.feed_forward": EXPERTS},
    "upcycled": {"upcycle": {"at": 0.5, "experts": 4, "layers": [0]}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"the red dog {n} is in a blue cow" for n in range(200)))
    return path


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_processes()


def small(text: Path, *more: str) -> list[str]:
    corpus = json.dumps(quality.corpus_of(text))
    return [
        f"data.corpus={corpus}",
        f"data.held_out={corpus}",
        "data.tokenizer.vocab_size=64",
        "model.vocab_size=64",
        "model.width=16",
        "model.depth=2",
        "model.block.attention.heads=2",
        "model.block.feed_forward.width=32",
        "train.step_tokens=256",
        "train.micro_batch_tokens=256",
        "train.precision=fp32",
        "train.evaluation_tokens=512",
        *more,
    ]


LAYER = "encoder.blocks.0.feed_forward."
UPCYCLED = CourseConfig(upcycle=MidUpcycleConfig(at=0.5, experts=4, layers=(0,)))


def arm_of(folder: Path, ranks: Ranks, overrides: list[str], course: CourseConfig | None = None) -> Arm:
    run = load_run_config(quality.HERE / "quality_base.yaml", [*overrides, f"run_dir={folder}"])
    return Arm("arm", run, prepare(run.data), ranks, {}, course)


def test_a_branch_is_the_run_that_had_that_budget(text: Path, tmp_path: Path, ranks: Ranks) -> None:
    short, long, longer = (arm_of(tmp_path, ranks, small(text)) for _ in range(3))
    train_in_turns([short], 8, steps_spent)
    train_in_turns([longer], 30, steps_spent)
    train_in_turns([long], 24, steps_spent, branching=long)
    assert long.step == 24
    assert long.curve[-1].loss != short.curve[-1].loss
    assert long.loss_after(8) == short.curve[-1].loss
    assert long.loss_after(24) == long.curve[-1].loss  # another one, from where it should start
    assert long.loss_after(30) == longer.curve[-1].loss  # of more steps than its own, from before its rate fell


def test_upcycling_on_the_way_changes_no_output_and_keeps_what_adamw_knows(
    text: Path, tmp_path: Path, ranks: Ranks
) -> None:
    arm = arm_of(tmp_path, ranks, small(text), UPCYCLED)
    dense = arm_of(tmp_path, ranks, small(text))
    for each in (arm, dense):
        for step in range(4):
            each.train(step / 20)
    before = arm.evaluate().loss
    upcycling = arm._upcycling
    assert upcycling is not None
    arm._upcycle(upcycling)
    assert arm.evaluate().loss == pytest.approx(before, rel=1e-6)
    assert arm.parameters == dense.parameters + 3 * 2 * 16 * 32 + 4 * 16  # three more copies, and a router
    moments = {
        name: arm._parts.engine.optimizer.state.get(p, {}) for name, p in arm._parts.engine.module.named_parameters()
    }
    kept = dense._parts.engine.optimizer.state
    for name, p in dense._parts.engine.module.named_parameters():
        if name in moments:
            assert torch.equal(moments[name]["exp_avg"], kept[p]["exp_avg"])
            assert moments[name]["step"] == kept[p]["step"]
    assert [name for name, moment in moments.items() if not moment] == [f"{LAYER}router.logits.weight"]
    network = dense._parts.engine.module.encoder.blocks[0].feed_forward
    up, down = (moments[f"{LAYER}experts.{name}"] for name in ("up", "down"))
    for expert in range(4):  # a quarter of the tokens each
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(up[moment][expert].T, kept[network.up.weight][moment] / 4)
            torch.testing.assert_close(down[moment][expert].T, kept[network.down.weight][moment] / 4)
    arm.train(0.6)
    assert arm.balance()[0] is not None


def test_moments_of_scaled_matrices_are_those_of_their_gradients(text: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Two slices a copy, so last matrices are doubled and their gradients halved."""
    dense = arm_of(tmp_path, ranks, small(text))
    dense.train(0.1)
    model, known = dense._parts.engine.module, dense._parts.engine.optimizer.state
    config = UpcycleConfig(experts=4, granularity=2, shared_width=8, layers=(0,))
    network, copies = model.encoder.blocks[0].feed_forward, 2
    for order, moment in ((1, "exp_avg"), (2, "exp_avg_sq")):
        found = upcycled_moment({n: known[p][moment] for n, p in model.named_parameters()}, order, model, config)
        down = known[network.down.weight][moment].T
        torch.testing.assert_close(found[f"{LAYER}shared.down.weight"], down[:8].T)
        for expert in range(4):
            units = slice(8 + 12 * (expert % 2), 20 + 12 * (expert % 2))
            torch.testing.assert_close(found[f"{LAYER}experts.down"][expert], down[units] / copies / 2**order)


def test_an_arm_goes_on_with_the_same_text_after_upcycling(text: Path, tmp_path: Path, ranks: Ranks) -> None:
    arm = arm_of(tmp_path, ranks, small(text), UPCYCLED)
    other = arm_of(tmp_path, ranks, small(text))
    train_in_turns([arm, other], 6, steps_spent)
    assert arm._parts.stream.position == other._parts.stream.position
    assert arm.tokens == other.tokens


def test_routers_may_stay_as_they_are_and_learn_at_a_rate_of_their_own(
    text: Path, tmp_path: Path, ranks: Ranks
) -> None:
    routed = small(text, f"model.block.feed_forward={json.dumps(EXPERTS)}")
    alike, slow, late = (
        arm_of(tmp_path, ranks, routed, CourseConfig(routers=routers))
        for routers in (None, RouterRateConfig(factor=0.1), RouterRateConfig(after=0.5))
    )
    before = alike.weights()
    for arm in (alike, slow, late):
        arm.train(0.0)
    for name in before:
        moved, slowly, not_yet = ((arm.weights()[name] - before[name]) for arm in (alike, slow, late))
        if "router.logits" in name:
            torch.testing.assert_close(slowly, 0.1 * moved, rtol=1e-2, atol=1e-9)
            assert moved.any()
            assert not not_yet.any()
        else:
            assert torch.equal(slowly, moved)
            assert torch.equal(not_yet, moved)
    late.train(0.5)
    name = next(name for name in before if "router.logits" in name)
    assert (late.weights()[name] != before[name]).any()


def test_masked_tokens_may_be_routed_apart(text: Path, tmp_path: Path, ranks: Ranks) -> None:
    routed = small(text, f"model.block.feed_forward={json.dumps(EXPERTS)}")
    arm = arm_of(tmp_path, ranks, routed, CourseConfig(masked="apart"))
    own = arm.weights()["encoder.blocks.0.feed_forward.router.logits.masked"]
    arm.train(0.0)
    weights = arm.weights()
    assert not torch.equal(weights["encoder.blocks.0.feed_forward.router.logits.masked"], own)
    router = arm._parts.engine.module.encoder.blocks[0].feed_forward.router.logits
    x, tokens = torch.randn(3, 16), Tokens(torch.tensor([5, router.mask_id, 6]), torch.tensor([0, 3]))
    found = router(x, tokens)
    torch.testing.assert_close(found[[0, 2]], x[[0, 2]] @ router.weight.T)
    torch.testing.assert_close(found[1], router.masked @ x[1])


def test_masked_tokens_may_be_left_out_of_the_balance(text: Path, tmp_path: Path, ranks: Ranks) -> None:
    routed = small(text, f"model.block.feed_forward={json.dumps(EXPERTS)}")
    arm, every = (arm_of(tmp_path, ranks, routed, CourseConfig(masked=masked)) for masked in ("uncounted", None))
    batches = arm._parts.stream.next_step()
    mask_id = arm._data.tokenizer.token_to_id("[MASK]")
    words = sum(int((batch.input_ids != mask_id).sum()) for batch in batches)
    arm._parts.stream.position = every._parts.stream.position
    for each in (arm, every):
        each.train(0.0)
    assert int(arm._recent[0]["0.experts"].tokens) == words
    assert int(every._recent[0]["0.experts"].tokens) == sum(len(batch.input_ids) for batch in batches) > words
    assert int(arm._recent[0]["0.experts"].assigned.sum()) == 2 * words


def test_a_whole_small_comparison(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "stop_processes", lambda: None)  # other tests' engines know this process's group
    (tmp_path / "arms.yaml").write_text(json.dumps(ARMS))
    words = ["--data", str(text), "--valid", str(text), "--arms", str(tmp_path / "arms.yaml"), "--threads", "1"]
    words += ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.png"), "--seeds", "2"]
    words += ["--minutes", "0.01", "--keep", str(tmp_path / "kept")]
    words += [f"--override={each}" for each in small(text)[2:]]
    quality.main(words)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["contender"], row["seed"]) for row in rows] == [(name, seed) for seed in (0, 1) for name in ARMS]
    for row in rows:
        assert row["curve"][-1][0] >= 0.6  # its own seconds
        assert row["curve"][-1][1:] == [row["steps"], row["loss"]]
        assert row["equal steps"] != 0 or row["contender"] == "dense"
        assert (row["window"] is None) == (row["contender"] == "dense")
    assert all(row["speed"] == 1 and row["equal time"] == row["equal steps"] == 0 for row in rows[::3])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ARMS)
    for row in rows[1::3]:
        assert row["per step"] >= row["window"] >= 1
        assert row["loads"][0] >= 1
    with pytest.raises(SystemExit):
        quality.main(words)
    assert "rows.json is there already; name another file" in capsys.readouterr().err
    shown = ["--seeds", "0", "--with", str(tmp_path / "rows.json"), "--json", str(tmp_path / "again.json")]
    quality.main(shown)
    assert json.loads((tmp_path / "again.json").read_text()) == rows
    assert capsys.readouterr().out in printed
    dense = [row["curve"][-1] for row in rows[::3]]
    loss, steps = (sum(point[i] for point in dense) / 2 for i in (2, 1))
    assert f"{loss:.3f} at {steps:,.0f}" in printed
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    models = {name: tmp_path / "kept" / f"{name} 0" for name in ARMS}
    assert [*arms_of(models, {})] == [*(f"ours, {name}" for name in ARMS), "ours, upcycled, random start"]
    assert [len(from_pretrained(path).encoder.routers()) for path in models.values()] == [0, 2, 1]


@pytest.mark.parametrize("name", ["quality_arms.yaml", "quality_trials.yaml", "quality_ablations.yaml"])
def test_every_arm_that_comes_with_it_can_be_planned(name: str, text: Path) -> None:
    plans = quality.plans_of(quality.HERE / name, None, text, text, 0)
    assert len(plans) >= 5
    for arm, plan in plans.items():
        assert (plan.course.upcycle is not None) == ("upcycled" in arm)
        assert (plan.course.routers is not None) == ("routers a" in arm)
        assert (plan.course.masked is not None) == ("masked" in arm)


def test_the_recipe_is_what_was_measured_and_the_demo_takes_its_model(text: Path) -> None:
    plans = quality.plans_of(quality.HERE / "quality_arms.yaml", None, text, text, 0)
    measured = plans["mixed attention, 8 x 128 of 2 in the last two layers"].run
    ablations = quality.plans_of(quality.HERE / "quality_ablations.yaml", None, text, text, 0)
    assert ablations["recipe"].run == ablations["recipe, steps of 4096"].run == measured
    recipe, demo = (load_run_config(ROOT / "configs" / name, []) for name in ("recipe-cpu.yaml", "demo.yaml"))
    assert recipe.model == measured.model == demo.model
    assert recipe.optimizer == measured.optimizer
    assert recipe.train.step_tokens == measured.train.step_tokens
    assert recipe.data.masking == measured.data.masking == demo.data.masking


def test_what_is_not_there_is_told(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "arms.yaml").write_text(json.dumps(ARMS))
    with pytest.raises(UserError, match=r"no arm 'sparse'; it has 'dense', 'routed', 'upcycled'"):
        quality.plans_of(tmp_path / "arms.yaml", ["sparse"], text, text, 0)
    with pytest.raises(UserError, match=r"can't be held against 'upcycled', which is upcycled on its way"):
        quality.plans_of(tmp_path / "arms.yaml", ["upcycled", "dense"], text, text, 0)
    (tmp_path / "apart.yaml").write_text(json.dumps({"dense": {}, "other": {"masked": "apart"}}))
    words = ["--data", str(text), "--valid", str(text), "--arms", str(tmp_path / "apart.yaml"), "--keep", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"'other' can't be kept: no model folder knows two matrices of a router"):
        quality.main(words)
    (tmp_path / "bad.yaml").write_text(json.dumps({"dense": {}, "late": {"upcycle": {"at": 2, "experts": 4}}}))
    with pytest.raises(UserError, match=r"'late', is not a valid run:\n  upcycle\.at: .*less than 1 \(given: 2\)"):
        quality.plans_of(tmp_path / "bad.yaml", None, text, text, 0)
    with pytest.raises(UserError, match=r"no\.yaml"):
        quality.plans_of(tmp_path / "no.yaml", None, text, text, 0)
    with pytest.raises(SystemExit):
        quality.main(["--data", str(text), "--valid", str(text), "--with", str(tmp_path / "no.json")])
    assert "no.json holds no rows of this benchmark" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text(json.dumps({"dense": {"modle.width": 8}}))
    with pytest.raises(UserError, match=r"bad\.yaml, 'dense', can't be run\. .*\n  unknown key 'modle'"):
        quality.plans_of(tmp_path / "bad.yaml", None, text, text, 0)
    (tmp_path / "bad.yaml").write_text("dense: [1]")
    with pytest.raises(UserError, match=r"'dense', holds list, not overrides such as `model\.width: 96`"):
        quality.plans_of(tmp_path / "bad.yaml", None, text, text, 0)
    (tmp_path / "bad.yaml").write_text("")
    with pytest.raises(UserError, match=r"bad\.yaml names no arm; write `dense: \{\}`"):
        quality.plans_of(tmp_path / "bad.yaml", None, text, text, 0)
    (tmp_path / "bad.yaml").write_text("dense:\n")
    assert [*quality.plans_of(tmp_path / "bad.yaml", None, text, text, 0)] == ["dense"]
    (tmp_path / "other.json").write_text('[{"contender": "dense"}]')
    with pytest.raises(SystemExit):
        quality.main(["--seeds", "0", "--with", str(tmp_path / "other.json")])
    assert "not all of them have contender, seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the training text with --data and the held-out text with --valid"),
        (["--seeds", "0"], "--seeds 0 trains nothing; name what to show with --with"),
        (["--seeds", "-1"], "whole numbers of at least 0"),
        (["--minutes", "nan"], "'nan' isn't a number above 0"),
        (["--minutes", "0"], "'0' isn't a number above 0"),
        (["--threads", "0"], "'0' isn't a whole number of at least 1"),
        (["--plot", "plot.xyz"], "plot.xyz ends in none of .png, .pdf, .svg"),
    ],
)
def test_options_that_name_nothing_to_do_are_told(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quality.main(words)
    assert message in capsys.readouterr().err
