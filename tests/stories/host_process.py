"""A program that uses lmtrain as a library, and compares all of its process that lmtrain could change before and after.

`test_host_process.py` runs it in the folder of a small corpus, with the name of a device.
"""

import ctypes
import gc
import hashlib
import inspect
import logging
import os
import random
import resource
import signal
import sys
import threading
import warnings
from typing import Any

import numpy
import tokenizers  # noqa: F401  # what importing the libraries changes is not lmtrain's doing
import torch
import torch.utils.tensorboard.summary

BLOCK_BYTES = 1 << 28


class Blocks(ctypes.Structure):
    """mallinfo2(3) of glibc."""

    _fields_ = tuple((f"figure {number}", ctypes.c_size_t) for number in range(10))
    MAPPED = "figure 3"  # its name there: hblks


def takes_large_blocks_from_the_system() -> bool | None:
    """Whether glibc maps a large block, and so gives it back when it is freed; None: another C library."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Blocks, ctypes.c_void_p, [ctypes.c_void_p]
    before = getattr(libc.mallinfo2(), Blocks.MAPPED)
    block = libc.malloc(ctypes.c_size_t(BLOCK_BYTES))
    mapped: bool = getattr(libc.mallinfo2(), Blocks.MAPPED) > before
    libc.free(block)
    return mapped


def digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def names_of(kind: type) -> dict[str, Any]:
    """What a class holds, and what hangs on its functions and on those that they wrap."""
    held: dict[str, Any] = {}
    for name, value in vars(kind).items():
        held[f"{kind.__name__}.{name}"] = id(value)
        if inspect.isfunction(value):
            held[f"{kind.__name__}.{name}, inside"] = sorted(getattr(inspect.unwrap(value), "__dict__", ()))
    return held


def process() -> dict[str, Any]:
    """Everything that is compared, by name."""
    cudnn, deterministic = torch.backends.cudnn, torch.utils.deterministic
    state = {
        **{f"environment: {name}": value for name, value in os.environ.items()},
        **{f"signal {number}": signal.getsignal(number) for number in signal.valid_signals()},
        **{f"file descriptor {number}": os.readlink(f"/proc/self/fd/{number}") for number in (0, 1, 2)},
        **{name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")},
        **names_of(torch.optim.Optimizer),
        **names_of(torch.nn.Module),
        **names_of(torch.Tensor),
        "directory": os.getcwd(),
        "path": list(sys.path),
        "streams": [id(sys.stdin), id(sys.stdout), id(sys.stderr), sys.stdout.errors],
        "hooks": [sys.excepthook, sys.unraisablehook, threading.excepthook, sys.gettrace(), sys.getprofile()],
        "interpreter": [sys.getrecursionlimit(), sys.getswitchinterval(), gc.isenabled(), gc.get_threshold()],
        "warnings": list(warnings.filters),
        "logging": [logging.root.level, list(logging.root.handlers), logging.root.manager.disable],
        "random": digest(random.getstate()),
        "random of numpy": digest(numpy.random.get_state()),
        "random of torch": digest(torch.get_rng_state().tolist()),
        "deterministic algorithms": torch.get_deterministic_debug_mode(),
        "filled memory": deterministic.fill_uninitialized_memory,
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "numbers": [torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_default_device()],
        "gradients": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()],
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "cudnn": [cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32],
        "products": [torch.backends.cuda.matmul.allow_tf32, torch.backends.mkldnn.enabled],
        "large blocks": takes_large_blocks_from_the_system(),
    }
    if torch.cuda.is_initialized():
        state["CUDA device"] = torch.cuda.current_device()
        state["random of CUDA"] = [digest(each.tolist()) for each in torch.cuda.get_rng_state_all()]
    return state


def main(device: str) -> None:
    torch.set_num_threads(2)
    torch.ones(1, device=device)
    before = process()

    def compare(use: str) -> None:
        now = process()
        changed = [
            f"{key}: {before.get(key)} -> {now.get(key)}" for key in before | now if before.get(key) != now.get(key)
        ]
        assert not changed, f"{use} changed {changed}"

    import lmtrain
    from lmtrain.errors import DivergedError

    compare("import lmtrain")
    settings = ["training.num_threads=1", f"training.device={device}"]
    config = lmtrain.load_config("config.yaml", settings)
    run = lmtrain.train(config, "run", stop_at_step=4).run
    compare("train")
    lmtrain.train(config, "run", resume=True)
    compare("a resume")
    try:
        lmtrain.train(lmtrain.load_config("config.yaml", [*settings, "optimizer.lr=1e30", "schedule.warmup_steps=0"]))
    except DivergedError:
        compare("a training that failed")
    else:
        raise AssertionError("this training should fail")
    model = lmtrain.load(run, device)
    compare("load")
    model.generate(["a"], 3)
    model.generate(["a"], 3, sampling=lmtrain.Sampling(seed=1))
    model.generate(["a"], 3, beams=lmtrain.Beams(2))
    compare("generate")
    for unfinished in (model.stream("a"), model.score(["a b", "c"])):
        next(unfinished)
        compare("a result that is half read")
    model.fill("a ____ b")
    model.embed(["a"], "vectors.npz")
    model.export("weights", "safetensors")
    model.evaluate(["valid.txt"])
    compare("fill, embed, export or evaluate")
    stream = lmtrain.load_config("config.yaml", [*settings, "batching.mode=stream", "model.bidirectional=false"])
    adapting = lmtrain.load(lmtrain.train(stream).run, device)
    adapting.evaluate(["valid.txt"], cache=lmtrain.Cache(9), dynamic=lmtrain.Dynamic(0.1))
    compare("cache or dynamic evaluation")


if __name__ == "__main__":
    main(sys.argv[1])
