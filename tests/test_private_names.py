"""Names that PyTorch and TensorBoard keep to themselves: each stands in one file of lmtrain, and does what it did.

They may change with any new version. Where a test fails here, the file that the table names has to change. All of them
are in PyTorch 2.11 to 2.13 and TensorBoard 2.21.
"""

import ast
import inspect
import io
import struct
import subprocess
import sys

import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lmtrain.model.kernels import sigmoid_backward, tanh_backward
from lmtrain.model.products import StepWeight
from tests.conftest import ROOT

PRIVATE = {
    "__dynamo_disable": "training/optimization.py",
    "_ddp_params_and_buffers_to_ignore": "training/parallel.py",
    "_foreach_zero_": "training/graphs.py",
    "_indices": "training/optimization.py",
    "_is_mkldnn_bf16_supported": "model/products.py",
    "_linear_pointwise": "model/products.py",
    "_reorder_linear_weight": "model/products.py",
    "_values": "training/optimization.py",
    "grad_input": "model/kernels.py",
    "tensorboard.compat.proto.event_pb2": "training/tracking.py",
    "tensorboard.summary.writer.record_writer": "training/tracking.py",
}
PUBLIC = {"_asdict", "_exit", "_fields", "_replace"}  # of named tuples and `os`: their pages document them


def private_names(tree):
    """The private names that a file uses, those of its own classes aside."""
    for node in ast.walk(tree):
        own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not (own or node.attr.endswith("__")):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tensorboard."):
            yield node.module
        elif isinstance(node, ast.keyword) and node.arg == "grad_input":
            yield node.arg


def test_each_private_name_stands_in_one_file():
    used = {}
    for path in sorted((ROOT / "lmtrain").rglob("*.py")):
        for name in private_names(ast.parse(path.read_text())):
            if name not in PUBLIC:
                used.setdefault(name, set()).add(str(path.relative_to(ROOT / "lmtrain")))
    assert used == {name: {file} for name, file in PRIVATE.items()}


@pytest.mark.parametrize(("context", "imported"), [("without_compiler()", False), ("nullcontext()", True)])
def test_dynamo_disable_keeps_pytorchs_compiler_out(context, imported):
    """`__dynamo_disable`, where an optimizer is made. If PyTorch no longer imports its compiler there, the attribute
    can go."""
    code = (
        "import sys, torch; from contextlib import nullcontext; "
        "from lmtrain.training.optimization import without_compiler\n"
        f"with {context}: torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{imported}\n"


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.SparseAdam])
def test_a_step_without_its_wrappers_is_the_optimizers_own(kind):
    """`inspect.unwrap` of `step`: PyTorch's wrappers name what they wrap."""
    moved = []
    for unwrapped in (False, True):
        weight = torch.ones(3, 2, requires_grad=True)
        optimizer = kind([weight], lr=0.1)
        weight.grad = torch.full((3, 2), 0.5)
        if kind is torch.optim.SparseAdam:
            weight.grad = weight.grad.to_sparse(1)
        if unwrapped:
            with torch.no_grad():
                inspect.unwrap(type(optimizer).step)(optimizer)
        else:
            optimizer.step()
        moved.append(weight.detach())
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], torch.ones(3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1024, 1024), (32, 48)], ids=str)
def test_onednns_linear_takes_a_prepared_weight(dtype, shape):
    """`torch.ops.mkldnn._reorder_linear_weight`, `._linear_pointwise` and `._is_mkldnn_bf16_supported`."""
    torch.manual_seed(1)
    weight, left = torch.randn(shape).t().contiguous().t(), torch.randn(5, shape[0]).to(dtype)
    total = torch.ones(5, shape[1])
    step_weight = StepWeight(weight, dtype, 5)
    step_weight.add_to(total, left)
    torch.testing.assert_close(total, 1 + (left.float() @ weight.to(dtype).float()), rtol=0.02, atol=0.3)
    assert torch.ops.mkldnn._is_mkldnn_bf16_supported() in (False, True)
    if torch.backends.mkldnn.is_available() and dtype == torch.float32:
        assert (step_weight.packed is not None) == (shape[0] == 1024)


@pytest.mark.parametrize(("function", "backward"), [(torch.sigmoid, sigmoid_backward), (torch.tanh, tanh_backward)])
def test_derivatives_write_to_a_buffer(function, backward):
    """`torch.ops.aten.sigmoid_backward` and `.tanh_backward` with `grad_input`."""
    inputs, gradient, buffer = torch.randn(7, requires_grad=True), torch.randn(7), torch.empty(7)
    output = function(inputs)
    assert backward(gradient, output.detach(), grad_input=buffer) is buffer
    torch.testing.assert_close(buffer, torch.autograd.grad(output, inputs, gradient)[0])


def test_a_sparse_tensor_gives_its_parts_before_its_rows_are_summed():
    """`_indices` and `_values`; the public `indices` and `values` refuse a tensor that is not coalesced."""
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[2, 0, 2]]), torch.ones(3, 4), (5, 4), is_coalesced=False, check_invariants=False
    )
    assert sparse._indices().tolist() == [[2, 0, 2]]
    assert torch.equal(sparse._values(), torch.ones(3, 4))


def test_many_tensors_are_zeroed_at_once():
    """`_foreach_zero_`, which PyTorch's own optimizers call."""
    tensors = [torch.ones(3), torch.ones(2, 2)]
    torch._foreach_zero_(tensors)
    assert not any(tensor.any() for tensor in tensors)


def test_distributed_data_parallel_leaves_named_weights_out():
    """`_ddp_params_and_buffers_to_ignore`."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        module, summed = nn.Sequential(nn.Linear(2, 2)), []
        module._ddp_params_and_buffers_to_ignore = {"0.weight"}
        parallel = DistributedDataParallel(module)

        def note(state, bucket):
            summed.extend(bucket.parameters())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        parallel.register_comm_hook(None, note)
        parallel(torch.ones(1, 2)).sum().backward()
        assert [each is module[0].bias for each in summed] == [True]
    finally:
        distributed.destroy_process_group()


def test_tensorboards_writer_frames_a_record():
    """`tensorboard.summary.writer.record_writer.RecordWriter` and `tensorboard.compat.proto.event_pb2.Event`: length,
    checksum, event, checksum (https://github.com/tensorflow/tensorboard/blob/master/tensorboard/summary/writer)."""
    written = io.BytesIO()
    RecordWriter(written).write(Event(step=7, wall_time=1.0, file_version="brain.Event:2").SerializeToString())
    data = written.getvalue()
    (length,) = struct.unpack("<Q", data[:8])
    assert len(data) == 12 + length + 4
    assert Event.FromString(data[12:-4]).step == 7
