"""The averages equal a float64 reference on full tensors, whatever the layout."""

from __future__ import annotations

import torch
from torch import Tensor

from ema_dist import ShardedEMA
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, full_weights, layouts, make_net, train_step, wrap

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


def reference_step(average: dict[str, Tensor], live: dict[str, Tensor], decay: float, averaged: set[str]) -> None:
    for name, value in live.items():
        if name in averaged:
            finite = average[name].isfinite() & value.isfinite()
            average[name] = torch.where(finite, average[name] * decay + value * (1 - decay), value)
        else:
            average[name] = value


AVERAGED_BUFFERS = {"stats.running_mean", "stats.running_var", "mask"}


def averaged_names(net: torch.nn.Module) -> set[str]:
    names = {name for name, parameter in net.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    return names | AVERAGED_BUFFERS


@layouts()
def test_average_equals_the_float64_reference(layout: str) -> None:
    """Sharding is a layout, not an approximation."""
    net = make_net(layout)
    averaged = averaged_names(net)
    model = wrap(layout, net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    reference = full_weights(model)
    ema = ShardedEMA(model, decay=0.8)
    for step in range(4):
        train_step(model, optimizer, step)
        ema.update()
        reference_step(reference, full_weights(model), 0.8, averaged)
    full = ema.full_state_dict()
    if ema_is_here(full):
        assert full.keys() == reference.keys()
        for name, value in reference.items():
            torch.testing.assert_close(
                full[name].double(), value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
        make_net(layout).load_state_dict(full, strict=True)


def ema_is_here(full: dict[str, Tensor]) -> bool:
    rank = torch.distributed.get_rank()
    assert bool(full) == (rank == 0), "the first rank has everything, the others nothing"
    return rank == 0
