"""The kernels equal torch.nn's layers, in values and gradients, for rows of equal and of different lengths."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lmtrain.config.schema import ModelConfig
from lmtrain.model.cells import CELLS, layer_weights
from lmtrain.model.directions import RecurrentLayers
from lmtrain.model.packing import pack_rows
from lmtrain.model.recurrence import RecurrentStack, in_one_buffer

IN_TORCH = [name for name, cell in CELLS.items() if cell.torch_module is not None]
LENGTHS = [[7, 5, 5, 2, 1], [4, 4, 4], [1], [9]]


def results(stack, inputs, rows, state):
    """Output, last state, and the gradient of inputs, state and weights for a random loss."""
    inputs = inputs.clone().requires_grad_()
    state = tuple(tuple(part.clone().requires_grad_() for part in layer) for layer in state)
    output, ends = stack(inputs, rows, state)
    state, last = ([part for layer in each for part in layer] for each in (state, ends))
    weights = [torch.randn(part.shape, generator=torch.Generator().manual_seed(3)) for part in (output, *last)]
    sum((part * weight.to(part)).sum() for part, weight in zip((output, *last), weights, strict=True)).backward()
    return [output, *last, inputs.grad, *(part.grad for part in state), *(p.grad for p in stack.parameters())]


def pair(cell, num_layers, dtype):
    packed = RecurrentStack(cell, 6, [8] * num_layers, backend="packed").to(dtype)
    stock = RecurrentStack(cell, 6, [8] * num_layers, backend="torch").to(dtype)
    with torch.no_grad():
        for parameter in packed.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    stock.load_state_dict(packed.state_dict())
    return packed, stock


def both_results(cell, num_layers, lengths, dtype):
    """The results of lmtrain's kernels, each with PyTorch's."""
    torch.manual_seed(1)
    packed, stock = pair(cell, num_layers, dtype)
    rows = pack_rows(torch.tensor(lengths))
    inputs = torch.randn(sum(lengths), 6, dtype=dtype)
    state = tuple(tuple(part.normal_() for part in layer) for layer in packed.zero_state(len(lengths), inputs))
    return zip(results(packed, inputs, rows, state), results(stock, inputs, rows, state), strict=True)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("cell", IN_TORCH)
def test_values_and_gradients_equal_torch(cell, num_layers, lengths):
    for dtype, rtol, atol in ((torch.float64, 1e-9, 1e-11), (torch.float32, 1e-5, 1e-5)):
        for ours, theirs in both_results(cell, num_layers, lengths, dtype):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.cuda
@pytest.mark.usefixtures("without_tf32")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients_on_cuda_equal_those_on_cpu(cell, num_layers, lengths):
    """cuDNN's and those of lmtrain's own kernel there, in fp32, against fp64."""
    torch.manual_seed(1)
    exact = RecurrentStack(cell, 6, [8] * num_layers, backend="packed").double()
    rows, inputs = pack_rows(torch.tensor(lengths)), torch.randn(sum(lengths), 6, dtype=torch.float64)
    state = tuple(tuple(part.normal_() for part in layer) for layer in exact.zero_state(len(lengths), inputs))
    wanted = results(exact, inputs, rows, state)
    for backend in ("auto", "packed", "torch"):
        stack = RecurrentStack(cell, 6, [8] * num_layers, backend=backend)
        stack.load_state_dict(exact.state_dict())
        stack.cuda()
        of_device = [tuple(part.float().cuda() for part in layer) for layer in state]
        found = results(stack, inputs.float().cuda(), rows.to(torch.device("cuda")), of_device)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.device.type == "cuda"
            # as a whole: one element may be a small difference of large ones
            assert (ours.cpu().double() - theirs).norm() <= 1e-4 * theirs.norm(), backend


@pytest.mark.parametrize("cell", CELLS)
def test_bf16_stays_within_its_rounding(cell):
    torch.manual_seed(2)
    stack = RecurrentStack(cell, 16, [32, 32], backend="packed")
    rows = pack_rows(torch.tensor([9, 7, 3]))
    inputs, state = torch.randn(19, 16), stack.zero_state(3, torch.zeros(()))
    exact = results(stack, inputs, rows, state)
    stack.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = results(stack, inputs, rows, state)
    for ours, wanted in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - wanted).norm() <= 0.02 * wanted.norm() + 1e-6
    assert any(not torch.equal(ours, wanted) for ours, wanted in zip(rounded, exact, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell):
    torch.manual_seed(0)
    stack = RecurrentStack(cell, 3, [4]).double()
    rows = pack_rows(torch.tensor([4, 2, 2, 1]))
    arguments = [
        torch.randn(9, 3),
        *(torch.randn(4, 4) for _ in stack.zero_state(1, torch.zeros(()))[0]),
        *stack.parameters(),
    ]
    arguments = [argument.detach().double().requires_grad_() for argument in arguments]
    assert torch.autograd.gradcheck(lambda *given: CELLS[cell].kernel.apply(*given, rows), arguments)


@pytest.mark.parametrize("cell", IN_TORCH)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_one_layer_equals_torch_in_both_directions(cell, bidirectional):
    torch.manual_seed(4)
    ours = RecurrentLayers(cell, 5, 7, 1, bidirectional)
    theirs = CELLS[cell].torch_module(5, 7, 1, bidirectional=bidirectional)
    for stack, suffix in zip(ours.stacks, ["", "_reverse"], strict=False):
        for name, parameter in stack.layers[0].named_parameters():
            getattr(theirs, name + suffix).data.copy_(parameter.data)
    packed = pack_padded_sequence(torch.randn(6, 4, 5), torch.tensor([6, 4, 3, 1]))
    (output, state), (wanted, wanted_state) = ours(packed), theirs(packed)
    torch.testing.assert_close(pad_packed_sequence(output), pad_packed_sequence(wanted), rtol=1e-5, atol=1e-6)
    wanted_state = (wanted_state,) if len(state) == 1 else wanted_state
    torch.testing.assert_close(state, wanted_state, rtol=1e-5, atol=1e-6)


def test_start_values_are_orthogonal_with_an_open_forget_gate():
    stack = RecurrentStack("lstm", 5, [8, 8])
    for layer in range(2):
        for gate in stack.layers[layer].weight_hh_l0.split(8):
            torch.testing.assert_close(gate @ gate.t(), torch.eye(8), rtol=1e-5, atol=1e-5)
        bias = stack.layers[layer].bias_ih_l0 + stack.layers[layer].bias_hh_l0
        assert bias.view(4, 8).sum(1).tolist() == [0, 8, 0, 0]


def test_a_configuration_may_name_every_cell():
    assert list(get_args(ModelConfig.model_fields["cell"].annotation)) == list(CELLS)


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_that_pytorch_lacks_has_its_own_weights_and_always_our_kernel(cell, monkeypatch):
    monkeypatch.setitem(CELLS, "ours", CELLS[cell]._replace(torch_module=None, torch_function=None))
    torch.manual_seed(5)
    theirs = RecurrentStack(cell, 6, [8, 8], backend="packed")
    rows, inputs = pack_rows(torch.tensor([3, 3])), torch.randn(6, 6)
    for backend in ("auto", "torch", "packed"):
        ours = RecurrentStack("ours", 6, [8, 8], backend=backend)
        assert not ours._uses_torch(inputs.to("meta"), rows)  # on no device
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(0 < float(layer.weight_ih_l0.detach().abs().max()) <= 8**-0.5 for layer in ours.layers)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(inputs, rows), theirs(inputs, rows), rtol=0, atol=0)


def ends_of(weights):
    return np.cumsum([weight.numel() for weight in weights])[:-1]


def lies_as_cudnn_reads_it(weights):
    """Whether each weight begins where the one before it ends, in a piece of memory that begins with the first."""
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    starts = [weight.data_ptr() for weight in weights[1:]]
    return starts == ends[:-1] and weights[0].storage_offset() == 0 and all(each.is_contiguous() for each in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", IN_TORCH)
def test_weights_that_lie_apart_come_into_one_buffer_with_their_gradients(cell, dtype):
    torch.manual_seed(6)
    apart = [weight.detach().clone().requires_grad_() for weight in layer_weights(CELLS[cell].layer(5, 7))]
    together = in_one_buffer(apart, dtype)
    assert lies_as_cudnn_reads_it(together)
    assert not lies_as_cudnn_reads_it(apart)
    for part, weight in zip(together, apart, strict=True):
        assert torch.equal(part, weight.to(dtype))
    factors = [torch.randn_like(weight).bfloat16().float() for weight in apart]
    sum((part * factor).sum() for part, factor in zip(together, factors, strict=True)).backward()
    for weight, factor in zip(apart, factors, strict=True):
        assert torch.equal(weight.grad, factor)
    if dtype == torch.float32:  # what lies so is used as it is
        again = in_one_buffer([part.detach() for part in together], dtype)
        assert [part.data_ptr() for part in again] == [part.data_ptr() for part in together]
        # pieces of memory that only happen to be neighbours
        pieces = np.split(torch.cat([weight.detach().flatten() for weight in apart]).numpy(), ends_of(apart))
        neighbours = [torch.from_numpy(piece).view_as(weight) for piece, weight in zip(pieces, apart, strict=True)]
        assert lies_as_cudnn_reads_it(neighbours)
        assert in_one_buffer(neighbours, dtype)[0].data_ptr() != neighbours[0].data_ptr()
