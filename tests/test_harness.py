"""Tests of tests/support/harness.py: what ranks see, and what a developer reads when a test fails on one of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st

HERE = Path(__file__).parent
PRELUDE = """
import os, sys, time, types, warnings
import hypothesis, pytest
import torch.distributed as dist
from hypothesis import strategies as st
"""


@dataclass(frozen=True)
class Case:
    """An argument whose class is defined in this module: pickle finds it by the module's name."""

    value: int


@pytest.mark.world_size(2)
def test_ranks_form_one_world() -> None:
    ranks = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(ranks)
    assert ranks.item() == 3
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == (str(dist.get_rank()), str(dist.get_rank()))
    assert os.environ["WORLD_SIZE"] == str(dist.get_world_size()) == "2"
    assert dist.get_backend() == "gloo"
    assert torch.get_num_threads() == 1


@pytest.mark.world_size(1)
def test_a_world_of_one_is_a_world() -> None:
    assert dist.get_world_size() == 1


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", [Case(3), Case(4)], ids=["three", "four"])
def test_arguments_reach_every_rank(case: Case, tmp_path: Path) -> None:
    seen: list[object] = [None, None]
    dist.all_gather_object(seen, (case, tmp_path))
    assert seen == [(case, tmp_path)] * 2
    assert type(case) is Case
    assert tmp_path.is_dir()


@pytest.mark.world_size(2)
@hypothesis.given(numbers=st.lists(st.integers(0, 9), max_size=5))
@hypothesis.settings(max_examples=5)
def test_hypothesis_gives_each_example_a_world(numbers: list[int]) -> None:
    total = torch.tensor([sum(numbers)])
    dist.all_reduce(total)
    assert total.item() == 2 * sum(numbers)


@pytest.mark.world_size(2)
def test_examples_drawn_in_the_body_are_the_same_on_every_rank() -> None:
    """A hundred examples in one world; an example that fails on one rank only is not shrunk well."""

    @hypothesis.given(number=st.integers())
    def same(number: int) -> None:
        seen = [0, 0]
        dist.all_gather_object(seen, number)
        assert seen == [number, number]

    same()


@pytest.mark.world_size(2)
def test_warnings_are_errors_on_ranks_too() -> None:
    with pytest.raises(UserWarning, match="look out"):
        warnings.warn("look out", stacklevel=1)


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings("ignore:look out")
def test_a_warning_filter_travels_with_its_test() -> None:
    warnings.warn("look out", stacklevel=1)


@pytest.mark.gpu
@pytest.mark.world_size(1)
def test_gpu_ranks_talk_through_nccl() -> None:
    ranks = torch.ones(1, device="cuda")
    dist.all_reduce(ranks)
    assert ranks.item() == 1
    assert "nccl" in dist.get_backend_config()


@pytest.mark.gpu(shared=True)
@pytest.mark.world_size(2)
def test_ranks_share_a_gpu_through_gloo() -> None:
    ranks = torch.ones(1, device="cuda")
    dist.all_reduce(ranks)
    assert ranks.item() == 2
    assert torch.cuda.current_device() == 0


Session = Callable[[str], pytest.RunResult]


@pytest.fixture
def session(pytester: pytest.Pytester) -> Session:
    """Runs a test module's source in a pytest session of its own, under this harness."""
    pytester.makeconftest((HERE / "conftest.py").read_text())
    pytester.makeini("[pytest]\nfilterwarnings = error")

    def run(source: str) -> pytest.RunResult:
        pytester.makepyfile(PRELUDE + source)
        return pytester.runpytest_inprocess("-rs", "-p", "no:cacheprovider")

    return run


def test_a_failure_names_its_rank_and_shows_its_traceback(session: Session) -> None:
    result = session("""
@pytest.mark.world_size(3)
def test_body():
    print("about to fail")
    if dist.get_rank() == 1:
        assert [dist.get_rank()] == [7]
    dist.barrier()
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "rank 1 of 3 failed:",
            "*: in test_body",
            "    assert [[]dist.get_rank()] == [[]7]",
            "E   assert [[]1] == [[]7]",
            "E     At index 0 diff: 1 != 7",
            "*Captured stdout call*",
            "--- rank 1",
            "about to fail",
        ]
    )


def test_a_failure_kills_its_peers_at_once(session: Session, tmp_path: Path) -> None:
    result = session(f"""
@pytest.mark.world_size(2)
def test_body():
    with open({str(tmp_path)!r} + f"/{{dist.get_rank()}}", "w") as file:
        file.write(str(os.getpid()))
    dist.barrier()
    if dist.get_rank() == 0:
        raise SystemExit("enough")
    time.sleep(60)
""")
    result.stdout.fnmatch_lines(
        ["rank 0 of 2 failed:", "E   SystemExit: enough", "killed without an answer: ranks [[]1]"]
    )
    assert result.duration < 10
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def test_a_hang_shows_all_stacks_within_its_limit(session: Session) -> None:
    result = session("""
def stuck():
    time.sleep(60)

@pytest.mark.world_size(2, timeout=1)
def test_body():
    if dist.get_rank() == 1:
        stuck()
    dist.barrier()
""")
    result.assert_outcomes(failed=1)
    assert result.duration < 10
    report = result.stdout.str()
    for rank in range(2):
        assert f"rank {rank} of 2 hung, its stacks after 1 s:" in report
    assert " in stuck" in report
    assert " in barrier" in report


@pytest.mark.parametrize(
    ("end", "reason"), [("os._exit(7)", "with exit code 7"), ("os.abort()", "by SIGABRT")], ids=["exit", "abort"]
)
def test_a_rank_that_dies_is_reported(session: Session, end: str, reason: str) -> None:
    result = session(f"""
@pytest.mark.world_size(2)
def test_body():
    if dist.get_rank() == 1:
        {end}
    dist.barrier()
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"rank 1 of 2 died {reason}, without an answer"])


def test_a_rank_saves_its_coverage_before_it_is_killed(session: Session, tmp_path: Path) -> None:
    result = session(f"""
class Coverage:
    current = classmethod(lambda cls: cls())

    def stop(self):
        self.stopped = True

    def save(self):
        time.sleep(0.2)  # time enough for a rank that has answered already to be killed
        assert self.stopped
        open({str(tmp_path)!r} + f"/{{os.environ['RANK']}}", "w").close()

@pytest.mark.world_size(2)
def test_body():
    sys.modules["coverage"] = types.SimpleNamespace(Coverage=Coverage)
""")
    result.assert_outcomes(passed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_skip_needs_all_ranks(session: Session) -> None:
    result = session("""
@pytest.mark.world_size(2)
@pytest.mark.parametrize("skipping", [{0, 1}, {1}], ids=["all", "one"])
def test_body(skipping):
    if dist.get_rank() in skipping:
        pytest.skip("not today")
""")
    result.assert_outcomes(skipped=1, failed=1)
    result.stdout.fnmatch_lines(["*test_body[[]one]*", "rank 1 of 2 skipped:", "not today"])


def test_ranks_that_skip_at_once_wait_until_their_peers_have_joined(session: Session) -> None:
    """A rank that left at once broke connections that its peers were still making: one skip in eight failed."""
    result = session("""
@pytest.mark.world_size(4)
@pytest.mark.parametrize("attempt", range(16))
def test_body(attempt):
    pytest.skip("not today")
""")
    result.assert_outcomes(skipped=16)


def test_hypothesis_shrinks_across_worlds(session: Session) -> None:
    result = session("""
@pytest.mark.world_size(2)
@hypothesis.settings(max_examples=5)
@hypothesis.given(rows=st.integers(0, 9))
@hypothesis.example(rows=8)
def test_body(rows):
    assert dist.get_rank() == 0 or rows < 3
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["rank 1 of 2 failed:", "E   assert *", "*test_body(", "*rows=*"])


def test_warnings_fail_a_rank(session: Session) -> None:
    result = session("""
@pytest.mark.world_size(1)
def test_body():
    warnings.warn("look out")
""")
    result.stdout.fnmatch_lines(["rank 0 of 1 failed:", "E   UserWarning: look out"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_gpu_tests_say_what_they_need(session: Session) -> None:
    result = session("""
@pytest.mark.gpu
def test_body():
    raise AssertionError
""")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED * needs CUDA"])


@pytest.mark.parametrize("world_size", ["", "@pytest.mark.world_size(1)"])
def test_gpu_tests_let_pass_what_torch_warns_of_there(
    world_size: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA is pretended here; in a world of ranks, gloo on the CPU stands for the shared GPU."""
    for name in ("is_available", "device_count", "set_device"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))  # undoes what the session sets in this process
    result = session(f"""
import torch
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 1, lambda _: None

@pytest.mark.gpu(shared=True)
{world_size}
def test_body():
    for text in (
        "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
        "Warning: Profiler clears events at the end of each cycle.",
        "FSDP is switching to use `NO_SHARD` instead of ShardingStrategy.FULL_SHARD since the world size is 1.",
        "serving() swaps the averages into the model: FSDP1",
    ):
        warnings.warn(text, UserWarning)

@pytest.mark.gpu(shared=True)
{world_size}
def test_other_warnings_are_errors():
    with pytest.raises(UserWarning):
        warnings.warn("look out")
""")
    result.assert_outcomes(passed=2)
