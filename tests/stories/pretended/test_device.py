"""The pretended device itself: it refuses and counts what it says it does."""

import pytest
import torch

from tests import pretend_device
from tests.pretend_device import NAME, copies, waits

CELLS = {"lstm": (2, 4, torch.lstm), "gru": (1, 3, torch.gru), "rnn": (1, 1, torch.rnn_tanh)}  # states, gates


def test_tensors_of_two_devices_do_not_mix():
    here, there = torch.ones(2, 2), torch.ones(2, 2, device=NAME)
    assert there.device.type == NAME
    for mix in (
        lambda: there + here,
        lambda: here @ there,
        lambda: torch.cat([there, here]),
        lambda: there.index_select(0, torch.tensor([0])),
        lambda: here[torch.tensor([0], device=NAME)],
        lambda: torch.nn.functional.embedding(torch.tensor([0]), there),
    ):
        with pytest.raises(RuntimeError, match="on cpu among tensors on pretend"):
            mix()
    assert (there * torch.tensor(2.0)).cpu().equal(2 * here)  # a number
    assert there[torch.tensor([0])].cpu().equal(here[:1])  # indices, which CUDA takes from the CPU too
    assert there.copy_(here).cpu().equal(here)


def test_a_tensor_of_the_device_is_none_of_numpy():
    there = torch.ones(2, device=NAME)
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    assert there.tolist() == [1.0, 1.0]
    assert there.data_ptr() == 0


@pytest.mark.parametrize(
    ("expected", "ask"),
    [
        (1, lambda x: x.sum().item()),
        (1, lambda x: bool((x > 0).all())),
        (1, lambda x: float(x[0])),
        (1, lambda x: x.tolist()),
        (1, lambda x: x.cpu()),
        (1, lambda x: x.to("cpu", torch.float64)),
        (1, lambda x: torch.empty(3).copy_(x)),
        (1, lambda x: x.nonzero()),
        (1, lambda x: x[x > 0]),
        (1, lambda x: x.masked_select(x > 0)),
        (1, lambda x: torch.unique(x)),
        (1, lambda x: torch.unique(x, return_inverse=True)),
        (1, lambda x: torch.equal(x, x)),
        (1, lambda x: x.repeat_interleave(torch.tensor([1, 0, 2], device=NAME))),
        (1, lambda x: torch.accelerator.synchronize()),
        (0, lambda x: x.to("cpu", non_blocking=True)),
        (0, lambda x: x.repeat_interleave(torch.tensor([1, 0, 2], device=NAME), output_size=3)),
        (0, lambda x: x.masked_fill(x > 0, 1)),
        (0, lambda x: x.__setitem__(x > 0, 1.0)),
        (0, lambda x: x[torch.tensor([0, 1], device=NAME)]),
        (0, lambda x: x.sort().values.cumsum(0)),
        (0, lambda x: (x @ x).softmax(0).to(torch.bfloat16)),
    ],
)
def test_waits_are_counted(expected, ask):
    values = torch.tensor([1.0, 0.0, 2.0], device=NAME)
    waits.clear()
    ask(values)
    assert len(waits) == expected


def test_a_sparse_gradient_is_gathered_with_a_wait():
    weight = torch.nn.Parameter(torch.ones(4, 2, device=NAME))
    torch.nn.functional.embedding(torch.tensor([1, 1], device=NAME), weight, sparse=True).sum().backward()
    assert weight.grad.is_sparse
    waits.clear()
    gathered = weight.grad.coalesce()
    assert len(waits) == 1
    assert gathered.values().tolist() == [[2.0, 2.0]]


def test_copies_to_the_device_are_counted():
    torch.ones(3).to(NAME)
    torch.tensor([1, 2], device=NAME)
    values = torch.ones(3, device=NAME)  # made there
    assert len(copies) == 2
    values[torch.tensor([0])]
    assert len(copies) == 3
    values.cpu()
    assert len(copies) == 3


def test_a_line_of_lmtrain_is_named():
    value = torch.ones((), device=NAME)
    exec(compile("\nfloat(value)", f"{pretend_device.PACKAGE}room/file.py", "exec"), {"value": value})
    float(value)
    assert [wait.line for wait in waits] == ["room/file.py:2", "?"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_pytorchs_recurrent_functions_equal_those_of_the_cpu(cell, packed):
    count, gates, function = CELLS[cell]
    inputs, initial = torch.randn(5, 2, 3), [torch.randn(1, 2, 4) for _ in range(count)]
    weights = [torch.randn(gates * 4, size) for size in (3, 4)] + [torch.randn(gates * 4) for _ in range(2)]
    results = []
    for place in ("cpu", NAME):
        own = [each.to(place, copy=True).requires_grad_() for each in (inputs, *initial, *weights)]
        state = own[1] if count == 1 else tuple(own[1:3])
        settings = (own[-4:], True, 1, 0.0, True, False)
        if packed:
            made = function(own[0].flatten(0, 1)[:8], torch.tensor([2, 2, 2, 1, 1]), state, *settings)
        else:
            made = function(own[0], state, *settings, False)
        sum(part.square().sum() for part in made).backward()
        results.append([each.detach().cpu() for each in (*made, *(each.grad for each in own))])
    torch.testing.assert_close(*results)


def test_random_numbers_of_its_own_leave_the_cpus_alone():
    shared = torch.rand(3, device=NAME).tolist()
    torch.manual_seed(1)
    assert torch.rand(3).tolist() == shared
    pretend_device.generator.own(1)
    before = torch.get_rng_state()
    assert torch.rand(3, device=NAME).tolist() == shared
    assert torch.get_rng_state().equal(before)
    state = torch.get_device_module(NAME).get_rng_state()
    drawn = torch.rand(3, device=NAME).tolist()
    torch.get_device_module(NAME).set_rng_state(state)
    assert torch.rand(3, device=NAME).tolist() == drawn != shared
