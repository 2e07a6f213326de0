"""What a rank does by itself does not grow with the number of ranks."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType

import pytest

from ema_dist import ShardedEMA
from launch.cost.fake_ranks import FakeCase, FakeLayout, build, fake_ranks
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


def _count_calls(run: Callable[[], object]) -> int:
    """Functions that `run` calls, of Python and of C: steps of a loop over ranks are among them, time is not.

    Of two runs it returns the smaller number, without garbage collection, which calls finalizers of earlier tests.
    """
    gc.collect()
    gc.disable()
    try:
        return min(_count_calls_once(run) for _ in range(2))
    finally:
        gc.enable()


def _count_calls_once(run: Callable[[], object]) -> int:
    calls = Counter[str]()

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        calls[event] += 1

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls["call"] + calls["c_call"]


def _swap_and_save(layout: FakeLayout, ranks: int) -> list[int]:
    """The calls made by a construction and by everything that averages are used for."""
    with fake_ranks(ranks):
        model = build(FakeCase(layout, ranks, tensors=40))
        ema = ShardedEMA(model)  # meshes and kernels are made once
        full = dict(ema.gather())

        def use() -> None:
            with ema.swapped():
                pass
            with ema.serving():
                pass
            ema.check_replicas()
            ema.load_state_dict(ema.state_dict())

        use()
        return [
            _count_calls(call)
            for call in (
                lambda: ShardedEMA(model),
                use,
                lambda: list(ema.gather()),
                lambda: ema.load_full_state_dict(full),
            )
        ]


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "hsdp", "tp"])
def test_calls_do_not_grow_with_the_number_of_ranks(layout: FakeLayout) -> None:
    few, many = _swap_and_save(layout, 128), _swap_and_save(layout, 2048)
    assert [more / less for less, more in zip(few, many, strict=True)] == pytest.approx([1] * len(few), rel=0.1)
