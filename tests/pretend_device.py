"""A device that is only pretended: its tensors lie in the CPU's memory, but PyTorch takes them for another device's.

`set_up` makes the device known to PyTorch. Its tensors hold real numbers, which the CPU's own kernels compute, so a
whole training can be held against the same one on the CPU. The file uses PyTorch's PrivateUse1, the name under which a
backend that is not PyTorch's own is plugged in; https://docs.pytorch.org/tutorials/advanced/privateuseone.html.

What it shows without a GPU:

- an operation that mixes tensors of two devices raises, as it does on CUDA. Allowed are the mixtures that CUDA allows:
  copies, numbers (tensors of no dimension), and indices on the CPU into a tensor of the device;
- whatever makes the program wait for the device is counted in `waits`, with the line of lmtrain that asked for it:
  `.item()`, `.cpu()`, `bool(tensor)`, `.tolist()`, and results whose shape depends on values (`nonzero`, `unique`,
  indexing by a mask). What is copied to the device is counted in `copies`;
- `.numpy()` and the address of a tensor of the device are not to be had;
- lmtrain's branches for "any device but the CPU" run, and give the CPU's figures.

What it can't show:

- cuDNN's own functions. `torch.lstm`, `torch.gru` and `torch.rnn_tanh` are put together here from PyTorch's cells;
- autocast's rules for CUDA. Matrix products are cast here as they are on the CPU;
- which kernels a GPU lacks, in what order it sums, how fast it is, how much memory it takes, NCCL;
- that work on a GPU is only queued: here every operation is done when its call returns;
- inference mode, in which PyTorch refuses tensors of this kind: `torch.no_grad` stands in for it.

All of this holds for the whole process and can't be undone, so the tests that use the device run in a process of
their own: see `tests/stories/pretended/conftest.py`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils import backend_registration

NAME = "pretend"
DEVICE_INDEX = 0
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # PyTorch calls it experimental
PACKAGE = str(Path(__file__).parent.parent / "lmtrain") + "/"


class Event(NamedTuple):
    """Something that passed between the program and the device."""

    operation: str  # PyTorch's name for it, such as aten::_local_scalar_dense
    line: str  # file:line of lmtrain that asked for it


waits: list[Event] = []  # the program waited until the device had computed something
copies: list[Event] = []  # the program gave a tensor to the device

WAITING = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique", "_unique2", "unique_dim",
        "unique_consecutive", "unique_dim_consecutive", "_coalesce",
    )
}  # fmt: skip
COPYING = {"aten::copy_", "aten::_to_copy"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
CAST_BY_AUTOCAST = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")  # the matrix products of CPU autocast


class Generator:
    """The random numbers of the device.

    By default it draws from the CPU's generator: a model on the device then draws the numbers that it would draw on
    the CPU. `own` gives it a generator of its own, as every real device has one.
    """

    state: torch.Tensor | None = None

    def own(self, seed: int) -> None:
        """From now on draw from a generator of its own, begun with a seed."""
        self.state = torch.Generator().manual_seed(seed).get_state()

    def share(self) -> None:
        """From now on draw from the CPU's generator."""
        self.state = None

    def seed(self, seed: int) -> None:
        if self.state is not None:
            self.own(seed)

    def get(self, device: Any = NAME) -> torch.Tensor:
        return torch.get_rng_state() if self.state is None else self.state.clone()

    def set(self, state: torch.Tensor, device: Any = NAME) -> None:
        if self.state is None:
            torch.set_rng_state(state)
        else:
            self.state = state.clone()

    def draw(self, function: Callable[[], Any]) -> Any:
        """Call a function that draws random numbers, with the device's own generator."""
        of_cpu = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            return function()
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(of_cpu)


generator = Generator()


class _Module(types.ModuleType):
    """`torch.pretend`: what PyTorch and lmtrain ask of `torch.cuda` and its like."""

    is_available = is_initialized = is_bf16_supported = staticmethod(lambda: True)
    is_in_bad_fork = _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: DEVICE_INDEX)
    set_device = staticmethod(lambda device: None)
    get_device_name = staticmethod(lambda device=None: "a pretended device")
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    manual_seed = manual_seed_all = staticmethod(generator.seed)
    get_rng_state, set_rng_state = staticmethod(generator.get), staticmethod(generator.set)
    reset_peak_memory_stats = staticmethod(lambda device=None: None)
    max_memory_allocated = staticmethod(lambda device=None: 1 << 20)
    mem_get_info = staticmethod(lambda device=None: (1 << 36, 1 << 36))

    @staticmethod
    def synchronize(device: Any = None) -> None:
        waits.append(Event("synchronize", _line_of_lmtrain()))


class PretendTensor(torch.Tensor):
    """A tensor of the pretended device; `raw` holds its values on the CPU, or shares them with its views."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> PretendTensor:
        shape = {} if raw.is_sparse else {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), dtype=raw.dtype, layout=raw.layout, device=torch.device(NAME, DEVICE_INDEX), **shape
        )
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    # PyTorch has these for its own class of tensors only

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return 0  # not to be had; PyTorch says 0 for tensors whose memory it can't reach

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.raw!r} on {NAME}"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)


def _line_of_lmtrain() -> str:
    """The innermost line of lmtrain that runs, or `?` where none does."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back  # type: ignore[assignment]
    return "?" if frame is None else f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"


def _count(name: str, args: Any, kwargs: Any, flat: list[Any]) -> bool:
    """Count an operation as a wait or a copy, if it is one; returns whether its result lies on the CPU."""
    to_cpu = False
    waits_for_values = name in WAITING
    if name == "aten::_to_copy":
        to_cpu = torch.device(kwargs.get("device") or NAME).type == "cpu"
        waits_for_values = to_cpu and not kwargs.get("non_blocking")
    elif name == "aten::copy_":
        to_cpu = not isinstance(args[0], PretendTensor)
        waits_for_values = to_cpu and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    elif name in INDEXING:  # a mask has to be counted first, except where one number is written by it
        indices = [part for part in args[1] if part is not None]
        masks = any(part.dtype in (torch.bool, torch.uint8) for part in indices)
        waits_for_values = masks and (name == "aten::index" or args[2].dim() > 0)
        flat = indices
    elif name == "aten::repeat_interleave":
        waits_for_values = kwargs.get("output_size") is None
    if waits_for_values:
        waits.append(Event(name, _line_of_lmtrain()))
    if not to_cpu and name in COPYING | INDEXING and any(_on_cpu(part) for part in flat):
        copies.append(Event(name, _line_of_lmtrain()))
    return to_cpu


def _on_cpu(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and not isinstance(part, PretendTensor)


def _refuse_mixture(name: str, args: Any, flat: list[Any]) -> None:
    """Raise RuntimeError if an operation takes tensors of two devices, except where CUDA allows it."""
    if name in COPYING:
        return
    allowed: list[Any] = []
    if name in INDEXING and isinstance(args[0], PretendTensor):
        allowed = [part for part in args[1] if part is not None]
    for part in flat:
        if _on_cpu(part) and part.dim() > 0 and not any(part is each for each in allowed):
            raise RuntimeError(f"{name}: a tensor {tuple(part.shape)} on {part.device} among tensors on {NAME}")


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run one operation of PyTorch on the values of its tensors."""
    flat: list[Any] = []

    def plain(part: Any) -> Any:
        flat.append(part)
        if isinstance(part, PretendTensor):
            return part.raw
        return torch.device("cpu") if isinstance(part, torch.device) else part

    plain_args, plain_kwargs = _mapped(plain, args), _mapped(plain, kwargs)
    name = func._schema.name
    _refuse_mixture(name, args, flat)
    to_cpu = _count(name, args, kwargs, flat)
    function = OWN_FUNCTIONS.get(name, func)
    if generator.state is not None and torch.Tag.nondeterministic_seeded in func.tags:
        made = generator.draw(lambda: function(*plain_args, **plain_kwargs))
    else:
        made = function(*plain_args, **plain_kwargs)
    if to_cpu:
        return made
    own = {id(part.raw): part for part in flat if isinstance(part, PretendTensor)}

    def on_device(part: Any) -> Any:
        if not isinstance(part, torch.Tensor):
            return part
        if id(part) not in own:
            return PretendTensor(part)
        wrapper = own[id(part)]
        if wrapper.shape != part.shape:  # the function gave its `out` the shape of the result
            wrapper.data = PretendTensor(part)
        return wrapper

    return _mapped(on_device, made)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to each thing in nested lists, tuples and dictionaries."""
    if isinstance(value, list):
        return [_mapped(change, part) for part in value]
    if isinstance(value, tuple):
        return tuple(_mapped(change, part) for part in value)
    if isinstance(value, dict):
        return {key: _mapped(change, part) for key, part in value.items()}
    return change(value)


# ---- functions that PyTorch has for a GPU only; the formulas are those of torch.nn.LSTM's and torch.nn.GRU's pages


def _lstm_cell(of_input: Any, of_hidden: Any, c: Any, b_i: Any = None, b_h: Any = None) -> tuple[torch.Tensor, ...]:
    """Gates (B, 4H) of input and hidden state, and c (B, H) -> h, c, and the gates for the backward pass."""
    gates = of_input + of_hidden + (0 if b_i is None else b_i + b_h)
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    after = f * c + i * g
    return o * after.tanh(), after, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(
    to_h: Any, to_c: Any, c: torch.Tensor, after: torch.Tensor, gates: torch.Tensor, has_bias: bool
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of gates (B, 4H), c (B, H) and bias (4H,), from those of the new h and c, either of them None."""
    i, f, g, o = gates.chunk(4, 1)
    tanh = after.tanh()
    to_h = torch.zeros_like(after) if to_h is None else to_h
    to_after = to_h * o * (1 - tanh**2) + (0 if to_c is None else to_c)
    to_i, to_f = to_after * g * i * (1 - i), to_after * c * f * (1 - f)
    to_g, to_o = to_after * i * (1 - g**2), to_h * tanh * o * (1 - o)
    to_gates = torch.cat([to_i, to_f, to_g, to_o], 1)
    return to_gates, to_after * f, to_gates.sum(0) if has_bias else None


def _gru_cell(of_input: Any, of_hidden: Any, h: Any, b_i: Any = None, b_h: Any = None) -> tuple[torch.Tensor, ...]:
    """Gates (B, 3H) of input and hidden state, and h (B, H) -> the new h, and what the backward pass needs."""
    r_i, z_i, n_i = (of_input + (0 if b_i is None else b_i)).chunk(3, 1)
    r_h, z_h, n_h = (of_hidden + (0 if b_h is None else b_h)).chunk(3, 1)
    r, z = (r_i + r_h).sigmoid(), (z_i + z_h).sigmoid()
    n = (n_i + r * n_h).tanh()
    return n + z * (h - n), torch.cat([r, z, n, n_h, h], 1)


def _gru_cell_backward(to_after: torch.Tensor, kept: torch.Tensor, has_bias: bool) -> tuple[torch.Tensor | None, ...]:
    """The gradients of both kinds of gates (B, 3H), of h (B, H) and of both biases (3H,), from that of the new h."""
    r, z, n, n_h, h = kept.chunk(5, 1)
    to_n = to_after * (1 - z) * (1 - n**2)
    to_r, to_z = to_n * n_h * r * (1 - r), to_after * (h - n) * z * (1 - z)
    of_input, of_hidden = torch.cat([to_r, to_z, to_n], 1), torch.cat([to_r, to_z, to_n * r], 1)
    biases = (of_input.sum(0), of_hidden.sum(0)) if has_bias else (None, None)
    return of_input, of_hidden, to_after * z, *biases


def _dropout(values: torch.Tensor, fraction: float, training: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Dropout whose random numbers are those that lmtrain draws on the CPU; the second tensor holds the factors."""
    from lmtrain.model.dropout import drop

    factors = drop(torch.ones_like(values), fraction, training is not False)
    return values * factors, factors


OWN_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "aten::_thnn_fused_lstm_cell": _lstm_cell,
    "aten::_thnn_fused_lstm_cell_backward_impl": _lstm_cell_backward,
    "aten::_thnn_fused_gru_cell": _gru_cell,
    "aten::_thnn_fused_gru_cell_backward": _gru_cell_backward,
    "aten::native_dropout": _dropout,
    "aten::native_dropout_backward": lambda gradient, factors, scale: gradient * factors,
}


def _cast_products(library: torch.library.Library) -> None:
    """Under autocast, cast the float operands of matrix products, as autocast does on the CPU."""

    def caster(operation: Any) -> Callable[..., Any]:
        def cast(part: Any) -> Any:
            floating = isinstance(part, PretendTensor) and part.dtype == torch.float32
            return part.to(torch.get_autocast_dtype(NAME)) if floating else part

        def product(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(NAME, enabled=False):
                return operation(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

        return product

    for name in CAST_BY_AUTOCAST:
        library.impl(name, caster(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")


def set_up() -> torch.device:
    """Make the device known to PyTorch, before lmtrain is imported, once a process; returns the device."""
    # `no_grad` stands in for inference mode, which makes tensors that no wrapper can hold
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else torch.enable_grad()  # type: ignore
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(NAME))
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    # torch.tensor goes around the class of its tensors, and PyTorch's own copy_ would come before the fallback
    aten.impl("copy_", lambda *args, **kwargs: _run(torch.ops.aten.copy_.default, args, kwargs), "PrivateUse1")
    _cast_products(aten)
    set_up.libraries = everything, aten  # type: ignore[attr-defined]  # they end with their object
    torch.autograd.set_multithreading_enabled(False)  # the backward pass runs in the thread that asks for it
    torch.accelerator.synchronize = _Module.synchronize  # PyTorch's asks a part that is written in C++
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay one object, as on a real device
    return torch.device(NAME, DEVICE_INDEX)
