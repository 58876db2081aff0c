"""One arm: its rate, its turns, branches, and what may change on its way."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks import quality_arm
from benchmarks.quality import HERE
from benchmarks.quality_arm import (
    Arm,
    CourseConfig,
    MidUpcycleConfig,
    RouterRateConfig,
    steps_spent,
    train_in_turns,
    upcycled_moment,
)
from moe.upcycling import UpcycleConfig
from routing import Tokens
from routing.errors import UserError
from tests.benchmarks.conftest import EXPERTS, small
from training.config import load_run_config
from training.data.prepare import prepare
from training.engine import Ranks
from training.step import NonFiniteLoss, StepResult

LAYER = "encoder.blocks.0.feed_forward."
UPCYCLED = CourseConfig(upcycle=MidUpcycleConfig(at=0.5, experts=4, layers=(0,)))


def arm_of(folder: Path, ranks: Ranks, overrides: list[str], course: CourseConfig | None = None) -> Arm:
    run = load_run_config(HERE / "quality_base.yaml", [*overrides, f"run_dir={folder}"])
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


def test_loads_are_of_steps_and_of_windows(
    text: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_arm, "WINDOW", 4)
    arm = arm_of(tmp_path, ranks, [*small(text), f"model.block.feed_forward={json.dumps(EXPERTS)}"])
    counts = []
    train = quality_arm.train_step

    def noted(*given: Any) -> StepResult:
        result = train(*given)
        counts.append(torch.stack([s.assigned for s in result.routing.values()]).double())
        return result

    monkeypatch.setattr(quality_arm, "train_step", noted)
    for step in range(10):
        arm.train(step / 10)

    def load(layers: torch.Tensor) -> float:  # [layers, experts]
        return float((layers.amax(1) / layers.mean(1)).max())

    each = [load(layers) for layers in counts]
    assert arm.loads_on_the_way() == pytest.approx([median(each[:4]), median(each[4:8]), median(each[8:])])
    windows = arm.windows_on_the_way()
    assert windows == pytest.approx([load(sum(counts[:4])), load(sum(counts[4:8]))])
    assert arm.balance() == pytest.approx((median(each[6:]), load(sum(counts[6:]))))
    arm.train(1.0)
    arm.train(1.0)
    assert (len(windows), len(arm.windows_on_the_way())) == (2, 3)  # a row that is written stays as it was


def test_a_step_takes_as_long_as_on_the_slowest_rank(
    text: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = arm_of(tmp_path, ranks, small(text))
    monkeypatch.setattr(quality_arm, "gather_over_ranks", lambda mine, _: [mine, mine + 50.0, mine])
    took = arm.train(0.0)
    assert took == arm.seconds > 50


def test_the_rate_warms_up_in_steps_and_falls_in_shares_of_the_budget(text: Path, tmp_path: Path, ranks: Ranks) -> None:
    schedule = "optimizer.schedule={kind: stable, warmup: 4, decay: 0.5, final: 0.1}"
    arm = arm_of(tmp_path, ranks, small(text, schedule, "optimizer.lr=0.001"))
    found = []
    for share in (0.0, 0.25, 0.5, 0.5, 0.75, 1.0):
        arm.train(share)
        found.append(arm._parts.engine.optimizer.param_groups[0]["lr"] / 0.001)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.55, 0.1])
    arm = arm_of(tmp_path, ranks, small(text, "optimizer.schedule={kind: stable, warmup: 0, decay: 0}"))
    arm.train(1.0)
    assert arm._parts.engine.optimizer.param_groups[0]["lr"] == arm._lr


class FakeArm:
    """Trains in no time at all, which it says took as long as it was told to say."""

    def __init__(self, name: str, took: float, log: list[str], breaks_at: int | None = None) -> None:
        self.name, self.took, self.log, self.breaks_at = name, took, log, breaks_at
        self.seconds, self.step, self.failed = 0.0, 0, None
        self.curve: list[float] = []
        self.kept: list[float] = []

    def train(self, share: float) -> float:
        assert share == pytest.approx(self.seconds / 60)
        if self.step == self.breaks_at:
            raise NonFiniteLoss("loss = nan")
        self.log.append(self.name)
        self.step += 1
        self.seconds += self.took
        return self.took

    def evaluate(self) -> None:
        self.curve.append(self.seconds)

    def keep(self, share: float) -> None:
        self.kept.append(share)


def test_arms_take_turns_of_some_seconds_and_are_evaluated_on_the_way() -> None:
    log: list[str] = []
    slow, fast = FakeArm("slow", 2.0, log), FakeArm("fast", 1.0, log)
    train_in_turns([slow, fast], 60.0, branching=slow)
    assert log[:11] == ["slow"] * 3 + ["fast"] * 5 + ["slow"] * 3
    assert (slow.step, fast.step) == (30, 60)
    assert slow.curve == [6.0 * n for n in range(11)]  # a turn is longer than a fifteenth of the budget
    assert fast.curve == [5.0 * n for n in range(13)]
    assert slow.kept[:3] == pytest.approx([0, 4 / 60, 6 / 60])  # at least 3 seconds from the one before
    assert len(slow.kept) == 20
    assert fast.kept == []


def test_an_arm_that_breaks_ends_and_the_others_go_on() -> None:
    log: list[str] = []
    arms = [FakeArm("whole", 2.0, log), FakeArm("broken", 2.0, log, breaks_at=4)]
    train_in_turns(arms, 60.0)
    assert [(arm.step, arm.failed) for arm in arms] == [(30, None), (4, "loss = nan at step 4")]
    assert arms[1].curve == [0.0, 6.0]


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


def test_what_needs_a_router_is_refused_without(text: Path, tmp_path: Path, ranks: Ranks) -> None:
    for course in (CourseConfig(masked="uncounted"), CourseConfig(routers=RouterRateConfig(factor=0.5))):
        with pytest.raises(UserError, match="'arm' says how routers learn, but has none"):
            arm_of(tmp_path, ranks, small(text), course)
    hashed = small(text, f"model.block.feed_forward={json.dumps(EXPERTS | {'router': {'kind': 'hash', 'top_k': 2}})}")
    with pytest.raises(UserError, match=r"router 0\.experts learns no logits"):
        arm_of(tmp_path, ranks, hashed, CourseConfig(masked="apart"))


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
