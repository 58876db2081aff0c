"""What `moe inspect` is pointed at, told apart."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from training.inspection.models import told_apart


def test_models_of_one_name_are_told_with_a_folder() -> None:
    paths = [Path("a/checkpoints/step-5"), Path("b/checkpoints/step-5"), Path("b/checkpoints/step-6"), Path("b/model")]
    assert told_apart(["step 5", "step 5", "step 6", "b"], paths) == [
        "a, step 5",
        "b, step 5",
        "step 6",
        "b",
    ]
    assert told_apart(["model", "model"], [Path("/x/model"), Path("/y/model")]) == ["x, model", "y, model"]
    three = [Path("/a/a/model"), Path("/a/b/model"), Path("/b/a/model")]  # no one folder tells all apart
    assert told_apart(["model"] * 3, three) == ["a/a/model", "a/b/model", "b/a/model"]
    assert told_apart(["one", "other"], [Path("/x/one"), Path("/x/other")]) == ["one", "other"]


folders = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(lambda parts: Path("/", *parts))


@given(st.lists(folders, min_size=1, max_size=6, unique=True))
def test_no_two_have_the_same_name(paths: list[Path]) -> None:
    told = told_apart([path.name for path in paths], paths)
    assert len(set(told)) == len(paths)
    names = [path.name for path in paths]
    assert all(new == old for new, old in zip(told, names, strict=True) if names.count(old) == 1)
