"""What TensorBoard is told of held-out text: the same figures as `moe inspect`'s, and training isn't changed by it."""

import torch
from tokenizers import Tokenizer

from moe.batch import pack_lengths
from tests.training.inspection.models import build, tokenizer_of
from tests.training.inspection.test_fail_if import router_of
from training.inspection.live import HeldOutLook, token_table
from training.inspection.schema import Router


def test_it_sees_what_the_routers_do_and_forgets() -> None:
    model = build(sick=True)
    look = HeldOutLook(model, Tokenizer.from_str(tokenizer_of()), 80, 24)
    ids = torch.randint(5, 80, (1000,))
    batch = pack_lengths([20] * 50)
    with torch.no_grad():
        expected = model(ids, batch=batch).logits
        for _ in range(2):
            with look:
                heard = model(ids, batch=batch).logits
                model(ids[:0], batch=pack_lengths([]))  # a rank whose share ended earlier
            assert torch.equal(heard, expected)
            seen = look.seen()
            assert list(seen) == [f"{layer}.experts" for layer in range(5)]
            assert seen["0.experts"].scalars["known_by_position"] > 0.9
            assert "known_by_position" not in seen["1.experts"].scalars  # collapsed: there is nothing to know
            assert 0.25 <= seen["4.experts"].scalars["margin"] <= seen["4.experts"].scalars["confidence"] <= 1
            assert "| 3 | 100.0% | 1.00 | " in seen["1.experts"].table
            assert "| 2 | 0.0% | - |  |" in seen["2.experts"].table
    assert look.seen() == {}
    assert not model.encoder._forward_hooks


def test_a_table_is_markdown_that_no_token_breaks() -> None:
    nasty = [("<script>alert(1)</script>", 3.0), ("a|b", 2.5), ("`", 2.25), (" the", 2.0)]
    typical = [[{"token": t, "id": 1, "count": 5, "of": 5, "lift": lift, "lift_low": lift} for t, lift in nasty]]
    table = {"groups": ["whole word"], "tokens": [10], "share": [[0.5, 0.5]]}
    router = router_of(load=[0.25, 0.75], typical=[*typical, []], takes={"word_part": table})
    assert token_table(router).splitlines() == [
        "| choice | load | whole word | typical tokens (lift) |",
        "|---|---|---|---|",
        "| 0 | 25.0% | 2.00 | `<script>alert(1)</script>` 3.0, `a❘b` 2.5, `\u02cb` 2.2, `the` 2.0 |",
        "| 1 | 75.0% | 0.67 |  |",
    ]


def test_of_many_choices_the_first_are_shown() -> None:
    table = {"groups": ["whole word"], "tokens": [10], "share": [[1 / 40] * 40]}
    router: Router = router_of(load=[1 / 40] * 40, typical=[[]] * 40, takes={"word_part": table})
    lines = token_table(router).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 32
    assert lines[-1] == "8 more choices aren't shown; `moe inspect` shows all."
