"""Inside `swapped` the model computes with the averages, and afterwards the live weights are back to the bit."""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ema_dist import ShardedEMA, checkpoint, compute_ema
from ema_dist.evaluation.swap import Swap
from ema_dist.kernels import DEVICE_SCRATCH_BYTES
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    LAYOUTS,
    Net,
    assert_bitwise_equal,
    evaluate,
    full_weights,
    layouts,
    make_net,
    make_trained,
    peak_resident_memory,
    wrap,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


def unwrapped_output(layout: str, weights: dict[str, Tensor]) -> Tensor:
    net = make_net(layout)
    net.load_state_dict({name: value.to(net.state_dict()[name].dtype) for name, value in weights.items()})
    return evaluate(net)


# Under HSDP and FSDP2 x TP, compilation and checkpointing act on modules that `fully_shard` wraps as under FSDP2.
SWAPPED = [
    name for name in LAYOUTS if not (name.startswith(("hsdp-", "fsdp2-tp-")) or name in ("fsdp2-4", "tp-checkpointed"))
]


@layouts(*SWAPPED)
def test_evaluating_before_inside_and_after_a_swap(layout: str) -> None:
    """Also right after a no-grad forward, which leaves weights gathered that nobody would gather again (failure 1)."""
    model, ema = make_trained(layout)
    live = full_weights(model)
    before = evaluate(model)
    with ema.swapped():
        inside = evaluate(model)
        averaged = full_weights(model)
    after = evaluate(model)
    with ema.swapped():
        inside_again = evaluate(model)
    assert_bitwise_equal(full_weights(model), live)
    torch.testing.assert_close(inside, unwrapped_output(layout, averaged), rtol=1e-4, atol=1e-5)
    assert torch.equal(after, before)
    assert torch.equal(inside_again, inside)
    assert not torch.equal(inside, before)
    full = ema.full_state_dict()
    assert_bitwise_equal(full, averaged if full else {})


@layouts("plain", "ddp", "ddp-3", "fsdp1", "fsdp1-flat-grad-op", "fsdp1-hybrid", "fsdp2-3", "hsdp", "tp", "fsdp2-tp")
def test_a_swap_into_narrower_weights_does_not_touch_the_average(layout: str) -> None:
    """Exchanged through bfloat16, the average would be rounded at each validation (failure 6)."""
    net = make_net(layout)
    for parameter in net.parameters():
        parameter.data = parameter.data.bfloat16()
    model = wrap(layout, net)
    ema = ShardedEMA(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    ema.update()
    moved = full_weights(model)
    before = ema.full_state_dict(dtype=torch.float32)
    with ema.swapped():
        inside = full_weights(model)
    assert_bitwise_equal(full_weights(model), moved)
    assert_bitwise_equal(ema.full_state_dict(dtype=torch.float32), before)
    trainable = {name for name in before if name.startswith(("blocks", "embed", "head"))}
    for name, value in before.items():
        assert torch.equal(inside[name], (value.bfloat16() if name in trainable else value).double()), name


@layouts("plain", "ddp", "fsdp1", "fsdp1-flat", "fsdp2", "hsdp", "tp")
def test_live_comes_back_when_the_block_raises(layout: str) -> None:
    model, ema = make_trained(layout)
    live = full_weights(model)
    with pytest.raises(ZeroDivisionError), ema.swapped():
        raise ZeroDivisionError
    assert_bitwise_equal(full_weights(model), live)
    ema.update()


@layouts("plain", "fsdp2", "fsdp2-keep", "hsdp")
@pytest.mark.parametrize("backward", [False, True])
def test_an_exception_in_the_middle_of_a_pass_leaves_no_averages_behind(layout: str, backward: bool) -> None:  # noqa: FBT001
    """FSDP2 would keep what it has gathered, the root's or for backward, and compute the next pass with it."""
    model, ema = make_trained(layout)
    before = evaluate(model)

    def stumble(*_: object) -> None:
        raise ZeroDivisionError

    if backward:
        handle = model.blocks[0].register_full_backward_pre_hook(stumble)
    else:
        handle = model.stats.register_forward_pre_hook(stumble)
    with pytest.raises(ZeroDivisionError), ema.swapped():
        model(torch.randn(8, 6)).sum().backward() if backward else evaluate(model)
    handle.remove()
    assert torch.equal(evaluate(model), before)


@layouts("plain", "ddp", "fsdp1", "fsdp1-flat", "fsdp2", "fsdp2-keep", "hsdp", "tp")
def test_writing_parameters_inside_is_an_error_after_live_is_back(layout: str) -> None:
    model, ema = make_trained(layout)
    live = full_weights(model)
    with (
        pytest.raises(RuntimeError, match=r"swapped\(\).*out\.weight"),
        ema.swapped(),
        torch.no_grad(),
    ):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert_bitwise_equal(full_weights(model), live)


@layouts("plain", "ddp", "fsdp1", "fsdp2", "hsdp")
def test_live_comes_back_also_when_the_model_was_changed_inside(layout: str) -> None:
    """What is wrong with it now is told after that."""
    model, ema = make_trained(layout)
    live = full_weights(model)
    with pytest.raises(ValueError, match=r"frozen\.weight, frozen\.bias.*trainable"), ema.swapped():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("frozen" in name or parameter.requires_grad)
    assert_bitwise_equal(full_weights(model), live)
    expected = live["blocks.1.out.weight"]
    if layout == "plain":
        model.frozen.requires_grad_(requires_grad=False)
        changed = model.blocks[1].out
        with pytest.raises(ValueError, match=r"blocks.1.out.weight"), ema.swapped():
            model.blocks[1].out = nn.Identity()
        assert torch.equal(changed.weight.double(), expected)


@pytest.mark.parametrize("change", ["buffer", "parameter"])
def test_weights_that_moved_are_not_given_up_when_the_model_was_changed_too(change: str) -> None:
    """They come back once the change is undone."""
    model = nn.BatchNorm1d(3)
    ema = ShardedEMA(model, decay=0.5)
    model.weight.data.add_(1)
    ema.update()
    live, mean = full_weights(model), model.running_mean
    block = ema.swapped()
    block.__enter__()
    model.weight.data = model.weight.data.clone()
    if change == "buffer":
        model.running_mean = torch.zeros(5)
    else:
        model.extra = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"(running_mean|extra).*restore\(\)"):
        block.__exit__(None, None, None)
    model.running_mean = mean
    if change == "parameter":
        del model.extra
    ema.restore()
    assert_bitwise_equal(full_weights(model), live)
    ema.update()


def test_weights_with_other_strides_or_dtype_at_the_same_address_are_noticed() -> None:
    model = nn.Linear(3, 3, bias=False)
    ema = ShardedEMA(model, decay=0.5)
    average = model.weight.detach().clone()
    model.weight.data = model.weight.data.t()
    with ema.swapped():
        assert torch.equal(model.weight, average)
    ema.update()
    torch.testing.assert_close(ema.full_state_dict()["weight"], (average + average.t()) / 2)


class CountingNet(nn.Module):
    """Replaces its buffer in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.zeros(2))

    def forward(self) -> Tensor:
        self.count = self.count + 1
        return self.weight * self.count


def test_buffers_that_modules_replace_inside_are_followed_after_a_save(tmp_path: Path) -> None:
    model = CountingNet()
    ema = ShardedEMA(model, decay=0.5)
    with ema.serving():
        pass
    with ema.swapped():
        model()
        checkpoint.save({"model": model}, tmp_path, step=1)
    assert torch.equal(model.count, torch.zeros(2))
    assert torch.equal(ema.full_state_dict()["count"], torch.ones(2))
    model.count.fill_(10)
    ema.update()
    assert torch.equal(ema.full_state_dict()["count"], torch.full((2,), 5.5))
    with ema.serving():
        pass
    assert torch.equal(model.count, torch.full((2,), 10.0))


@layouts("plain", "ddp", "fsdp2")
def test_casting_or_replacing_weights_inside_is_an_error(layout: str) -> None:
    """The averages were among them, and have been rounded or lost."""
    model, ema = make_trained(layout)
    with pytest.raises(RuntimeError, match=r"swapped\(\).*out\.weight"), ema.swapped():
        model.to(torch.bfloat16)
        model.to(torch.float32)
    if layout == "plain":
        with pytest.raises(RuntimeError, match=r"swapped\(\).*\bembed\.weight\b(?!, )"), ema.swapped():
            model.embed.weight.data = torch.zeros(5, 6)


@layouts("plain", "ddp", "fsdp1", "fsdp2")
def test_buffers_written_inside_stay_in_the_average(layout: str) -> None:
    """As `torch.optim.swa_utils.update_bn` does."""
    model, ema = make_trained(layout)
    live = full_weights(model)
    batches = [torch.randn(16, 6, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    with ema.swapped():
        torch.optim.swa_utils.update_bn(batches, model)
        recalibrated = full_weights(model)
    assert_bitwise_equal(full_weights(model), live)
    full = ema.full_state_dict()
    assert not torch.equal(recalibrated["stats.running_mean"], live["stats.running_mean"])
    assert_bitwise_equal(full, recalibrated if full else {})


@layouts("plain")
def test_a_graph_from_before_the_swap_refuses_to_run_backward(layout: str) -> None:
    """Its weights were written to: autograd says so, and we let it (failure 9)."""
    model, ema = make_trained(layout)
    loss = model(torch.randn(8, 6)).sum()
    with ema.swapped():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@layouts("plain", "ddp", "fsdp2")
def test_update_and_a_second_swap_inside_a_swap_are_refused(layout: str) -> None:
    _, ema = make_trained(layout)
    with ema.swapped():
        with pytest.raises(RuntimeError, match=r"update\(\).*swapped\(\)"):
            ema.update()
        with pytest.raises(RuntimeError, match=r"already.*restore\(\)"), ema.swapped():
            pass


@layouts("plain", "ddp", "fsdp2")
def test_averages_in_the_model_are_not_taken_for_live_weights(layout: str) -> None:
    model, ema = make_trained(layout)
    averaged = make_net(layout)
    before = full_weights(averaged)
    inside = pytest.raises(RuntimeError, match=r"\(.*\): .*swapped\(\)")
    with ema.swapped():
        for call in (lambda: ShardedEMA(model), lambda: compute_ema(model, averaged)):
            with inside:
                call()
    assert_bitwise_equal(full_weights(averaged), before)
    ShardedEMA(model)


@pytest.mark.world_size(2)
def test_one_rank_evaluates_alone_with_copies() -> None:
    """Common under DDP: with whole copies a swap needs nobody else (failure 13)."""
    _, ema = make_trained("ddp", replicas="copy")
    if dist.get_rank() == 0:
        with ema.swapped() as model:
            evaluate(model.module)


@pytest.mark.world_size(2)
def test_one_rank_swapping_alone_gets_an_error_naming_the_others() -> None:
    model, ema = make_trained("ddp", timeout=0.5)
    live = full_weights(model)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"0\.5 s.*swapped\(\).*rank 1"), ema.swapped():
            pass
        with pytest.raises(RuntimeError, match=r"0\.5 s.*full_state_dict\(\).*rank 1"):
            ema.full_state_dict()
    dist.barrier()
    with ema.swapped():
        pass
    assert_bitwise_equal(full_weights(model), live)


@pytest.mark.world_size(3)
def test_ranks_that_make_different_calls_get_an_error() -> None:
    _, ema = make_trained("ddp-3")
    with pytest.raises(RuntimeError, match=r"\b0, 2 .*swapped\(\).*\b1\b.*full_state_dict\(\)"):
        if dist.get_rank() == 1:
            ema.full_state_dict()
        else:
            with ema.swapped():
                pass


@pytest.mark.world_size(2)
def test_a_rank_that_waits_alone_raises_its_own_error_and_nothing_is_mixed() -> None:
    model, ema = make_trained("ddp", timeout=0.5)
    live = full_weights(model)
    with ema.swapped():
        averaged = full_weights(model)
    if dist.get_rank() == 0:
        with pytest.raises(ZeroDivisionError) as caught, ema.swapped():
            raise ZeroDivisionError
        (note,) = caught.value.__notes__
        assert re.search(r"0\.5 s.*rank 1.*restore\(\)", note)
    else:
        with pytest.raises(RuntimeError, match=r"0\.5 s.*swapped\(\).*restore\(\)"), ema.swapped():
            time.sleep(1.5)
    dist.barrier()
    assert_bitwise_equal(full_weights(model), averaged)
    ema.restore()
    assert_bitwise_equal(full_weights(model), live)


@pytest.mark.world_size(2)
def test_a_signal_while_entering_is_raised_though_the_others_do_not_leave_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ema = make_trained("ddp", timeout=0.5)
    live = full_weights(model)
    fill = Swap.fill

    def fill_and_interrupt(swap: Swap) -> None:
        fill(swap)
        signal.raise_signal(signal.SIGINT)

    if dist.get_rank() == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
        monkeypatch.setattr(Swap, "fill", fill_and_interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            ema.swapped().__enter__()
        assert re.search(r"rank 1.*restore\(\)", *caught.value.__notes__)
    else:
        with pytest.raises(RuntimeError, match=r"rank 0.*restore\(\)"), ema.swapped():
            time.sleep(1.5)
    dist.barrier()
    ema.restore()
    assert_bitwise_equal(full_weights(model), live)


@layouts("ddp-3", "hsdp")
def test_an_error_on_one_rank_restores_all_and_is_named_on_the_others(layout: str) -> None:
    model, ema = make_trained(layout, timeout=20.0)
    live = full_weights(model)
    handler = logging.handlers.BufferingHandler(capacity=100)
    logging.getLogger("ema_dist").addHandler(handler)
    begin = time.monotonic()
    if dist.get_rank() == 1:
        with pytest.raises(ZeroDivisionError) as caught, ema.swapped():
            raise ZeroDivisionError("my own")
        assert not hasattr(caught.value, "__notes__")
        (record,) = handler.buffer
        assert re.search(r"rank 1.*my own.*20 s", record.getMessage())
    else:
        with pytest.raises(RuntimeError, match=r"rank 1\b.*ZeroDivisionError.*my own"), ema.swapped():
            pass
    assert time.monotonic() - begin < 10
    assert_bitwise_equal(full_weights(model), live)
    with ema.swapped():
        pass


def test_a_rank_that_ends_inside_is_named_with_what_to_do() -> None:
    """Its part of the live weights ends with it."""
    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    messages = context.SimpleQueue()
    ranks = [context.Process(target=_end_rank_1_inside, args=(rank, store.port, messages)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    for call in ("leaving", "restore"):
        assert re.search(r"rank 1\b.*checkpoint.*replicas=\"copy\"", messages.get()), call


def _end_rank_1_inside(rank: int, port: int, messages: multiprocessing.SimpleQueue[str]) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    _, ema = make_trained("ddp", timeout=1.0)
    with pytest.raises(RuntimeError) as leaving, ema.swapped():
        if rank == 1:
            os._exit(0)
    with pytest.raises(RuntimeError) as restoring:
        ema.restore()
    for caught in (leaving, restoring):
        messages.put(str(caught.value))
    os._exit(0)  # leaving the process group would wait for rank 1


@pytest.mark.world_size(2)
def test_drifted_replicas_are_noticed_before_anything_is_mixed() -> None:
    model, ema = make_trained("ddp")
    if dist.get_rank() == 1:
        model.module.blocks[1].out.weight.data[0, 0] += 1
    live = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"blocks\.1\.out\.weight.*rank 1"), ema.swapped():
        pass
    assert_bitwise_equal(model.state_dict(), live)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.out\.weight"):
        ema.check_replicas()
    with pytest.raises(RuntimeError, match=r"blocks\.1\.out\.weight"):
        ShardedEMA(model)


@pytest.mark.parametrize(
    "layout",
    [pytest.param("plain", marks=pytest.mark.world_size(1)), pytest.param("ddp", marks=pytest.mark.world_size(2))],
)
def test_a_swap_of_a_large_model_needs_a_constant_scratch(layout: str) -> None:
    """Of the whole process, what gloo and malloc hold included, for a weight four times the bound."""
    model = nn.Linear(8192, 8192, bias=False)
    ema = ShardedEMA(model if layout == "plain" else DistributedDataParallel(model, gradient_as_bucket_view=True))

    def swap() -> None:
        with ema.swapped():
            pass

    swap()
    assert peak_resident_memory(swap) <= DEVICE_SCRATCH_BYTES


def test_net_has_tied_and_frozen_parts() -> None:
    net = Net()
    assert net.head.weight is net.embed.weight
    assert not net.frozen.weight.requires_grad


@pytest.mark.world_size(3)
@pytest.mark.parametrize("moves", [False, True], ids=["torch", "moved"])
def test_weights_that_the_wrapper_moves_inside_were_not_written_to(moves: bool) -> None:  # noqa: FBT001
    """FSDP2 in torch 2.7 does that to uneven shards when it first runs forward; later versions do not."""
    model = wrap("fsdp2", make_net("fsdp2"))
    ema = ShardedEMA(model)
    live = full_weights(model)
    with ema.swapped():
        evaluate(model)
        model.reshard()
        for parameter in model.parameters() if moves else ():
            shard = parameter.to_local().detach()
            parameter._local_tensor = shard.clone()  # noqa: SLF001  as FSDP2 does it
    assert_bitwise_equal(full_weights(model), live)
