"""What lmtrain gives to PyTorch's recurrent functions on a device: all that cuDNN needs.

cuDNN itself is not here. Its backward pass asks for the training flag, it takes operands of one dtype only, states that
are contiguous, and the number of rows at each step as int64 on the CPU.
"""

import pytest
import torch

from lmtrain.data.batches.rows import make_batch
from lmtrain.inference.adaptation import Dynamic, evaluate_dynamically
from lmtrain.inference.scoring import evaluate
from lmtrain.model import recurrence
from lmtrain.model.cells import CELLS
from lmtrain.model.language_model import LanguageModel
from lmtrain.system.device import autocast
from lmtrain.training.step import TrainingStep
from tests import pretend_device
from tests.stories.pretended.test_waits import batches_of, step_of

IN_TORCH = [name for name, cell in CELLS.items() if cell.torch_function is not None]


def pretended():
    """The device, which has its name only in the process in which the tests run."""
    return torch.device(pretend_device.NAME, pretend_device.DEVICE_INDEX)


@pytest.fixture(params=IN_TORCH)
def called(request, monkeypatch):
    """The name of a cell, and the arguments of each call of its function."""
    calls, name = [], request.param
    function = CELLS[name].torch_function

    def watched(*arguments):
        calls.append((arguments, torch.is_grad_enabled(), torch.is_autocast_enabled(pretend_device.NAME)))
        return function(*arguments)

    monkeypatch.setitem(CELLS, name, CELLS[name]._replace(torch_function=watched))
    return name, calls


def check(calls, dtype=torch.float32):
    assert calls
    kinds = set()
    for (inputs, *rest), gradients, under_autocast in calls:
        assert not under_autocast  # whose wrapper of cuDNN casts to float16
        packed = inputs.dim() == 2
        sizes = rest.pop(0) if packed else None
        states, weights, has_biases, layers, dropout, train, bidirectional, *batch_first = rest
        states = states if isinstance(states, tuple) else (states,)
        for operand in (inputs, *states, *weights):
            assert operand.dtype == dtype
            assert operand.is_contiguous()
            assert operand.device == pretended()
        assert (has_biases, layers, dropout, bidirectional, batch_first) == (
            True,
            1,
            0.0,
            False,
            [] if packed else [False],
        )
        assert train or not gradients
        if packed:
            assert (sizes.device.type, sizes.dtype) == ("cpu", torch.int64)
            assert int(sizes.sum()) == len(inputs)
        kinds.add(packed)
    calls.clear()
    return kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_and_evaluation_give_cudnn_what_it_needs(called, dtype, monkeypatch):
    name, calls = called
    # what cuDNN answers where it takes bf16, and where it does not
    monkeypatch.setattr(recurrence, "_cudnn_takes_bf16", lambda *arguments: dtype == torch.bfloat16)
    options = {"cell": name, "bidirectional": True, "num_layers": 2, "weight_dropout": 0.2}
    step = step_of(pretended(), options, {})
    step.precision = "bf16"
    assert isinstance(step, TrainingStep)
    kinds = set()
    for ragged in (True, False):
        step(batches_of(step, 2, ragged), 1e-3)
        kinds |= check(calls, dtype)
        assert all(parameter.dtype == torch.float32 for parameter in step.model.parameters())
    assert kinds == {True, False}
    batch = make_batch([[1, 4, 5, 6, 2], [1, 7, 2]], 0)
    for precision, wanted in (("fp32", torch.float32), ("bf16", dtype)):
        with autocast(precision, pretended()):
            evaluate(step.model.eval(), [batch])
            check(calls, wanted)
            encoded = step.model.read(*batch[:2])
            assert all(part.dtype == torch.float32 for layer in encoded.state.layers for part in layer)
            check(calls, wanted)


def test_dynamic_evaluation_asks_for_a_backward_pass(called):
    name, calls = called
    model = LanguageModel(20, embedding_size=8, hidden_size=8, cell=name).to(pretended()).eval()
    evaluate_dynamically(model, [make_batch([[1, 4, 5, 6, 2]], 0), make_batch([[2, 7, 8, 2]], 0)], Dynamic(0.1))
    assert all(arguments[-3] for arguments, *_ in calls)  # the training flag, before two directions and time first
    check(calls)
