"""Launches of the tests' own: what fails in a process fails the test, and nothing outlives a call."""

import re

import pytest

from tests.training.conftest import run_ranks
from tests.training.forks import run_job
from tests.training.launch.processes import assert_no_process_names

pytestmark = pytest.mark.distributed


def test_a_failing_rank_fails_the_call_with_what_it_printed() -> None:
    told = r"on_ranks ended with 1:\n(.*\n)*rank 1 of 2:\nTraceback(.*\n)*KeyError: 'nothing'"
    with pytest.raises(AssertionError, match=told) as caught:
        run_ranks(2, "nothing")
    assert re.search(r"ranks ended with \[70, 70\]", str(caught.value))


def test_a_job_that_does_not_end_is_killed_with_all_that_it_started() -> None:
    with pytest.raises(AssertionError, match="ended with None"):
        run_job("os.system", "sleep 321.123 & sleep 321.123", timeout=0.5)
    assert_no_process_names("sleep 321.123")


def test_what_a_job_prints_is_returned_and_what_it_changes_is_gone_with_it() -> None:
    assert run_job("os.putenv", "LEFT_BEHIND", "321") == ""
    assert run_job("os.system", "echo :$LEFT_BEHIND:") == "::\n"
