"""Products that are prepared once equal plain ones; PyTorch's private names are where lmtrain expects them."""

import pytest
import torch

from lmtrain.model.kernels import sigmoid_backward, tanh_backward
from lmtrain.model.products import StepWeight

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1024, 1024), (32, 48)], ids=str)
def test_pytorch_2_13_has_onednns_linear_with_a_prepared_weight(dtype, shape):
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
def test_pytorch_2_13_has_derivatives_that_write_to_a_buffer(function, backward):
    """`torch.ops.aten.sigmoid_backward` and `.tanh_backward` with `grad_input`."""
    inputs, gradient, buffer = torch.randn(7, requires_grad=True), torch.randn(7), torch.empty(7)
    output = function(inputs)
    assert backward(gradient, output.detach(), grad_input=buffer) is buffer
    torch.testing.assert_close(buffer, torch.autograd.grad(output, inputs, gradient)[0])
