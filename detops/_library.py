"""Loads the compiled library `_C.so` and hands out its ops.

The wrappers call compiled ops as `_library.ops.nms(...)`, always through the module, so that `use_namespace` can put
the emulated CUDA kernels (tests/emulation) in their place.
"""

import contextlib
import ctypes
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch.autograd import forward_ad
from torch.library import get_ctx
from torch.utils import _pytree

Result = TypeVar("Result")  # so that type checkers see through `register_result`

_PATH = Path(__file__).with_name("_C.so")
_REBUILD = "rebuild it with 'pip install .' in the source folder of detops"


def _load() -> ctypes.CDLL:
    if not _PATH.exists():
        where = f"detops has no compiled library: {_PATH} is missing."
        if (_PATH.parents[1] / "setup.py").exists():
            raise ImportError(
                f"{where} This is the source folder. Start Python from another folder, where the package is found that "
                "'pip install .' has installed, or run 'pip install -e .' here to build the library in place."
            )
        raise ImportError(f"{where} The installation is incomplete: {_REBUILD}.")
    try:
        torch.ops.load_library(_PATH)
        return ctypes.CDLL(str(_PATH))
    except OSError as error:
        if torch.__version__ < (2, 10):  # pyright: ignore[reportOperatorIssue]
            advice = f"detops needs torch>=2.10, and this is torch {torch.__version__}: upgrade torch"
        else:
            advice = f"it does not fit this machine or torch {torch.__version__}: {_REBUILD}"
        reason = error.__cause__ or error  # torch names the file only, its cause what is wrong with it
        raise ImportError(f"the compiled library of detops cannot be loaded; {advice}. The loader: {reason}") from None


def _resolve(namespace: str) -> SimpleNamespace:
    """All ops of a torch namespace as plain attributes: looking them up in torch.ops costs more than a small op."""
    packets = getattr(torch.ops, namespace)
    return SimpleNamespace(**{name: getattr(packets, name).default for name in op_names(namespace)})


def op_names(namespace: str = "detops") -> list[str]:
    """The names of the compiled ops."""
    every_name = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return sorted(name for space, name in every_name if space == namespace)


_handle = _load()
_handle.detops_version.restype = ctypes.c_char_p
_handle.detops_build_info.restype = ctypes.c_char_p

version: str = _handle.detops_version().decode()
ops = _resolve("detops")

_fakes: dict[str, Callable] = {}
_autograds: dict[str, tuple[Callable, Callable]] = {}


def build_info() -> dict:
    """What the library was built from and for, and what it finds on this machine."""
    return json.loads(_handle.detops_build_info())


def register_fake(name: str) -> Callable[[Callable], Callable]:
    """Decorates the function that gives the shapes and dtypes of an op's results, for torch.compile and export."""

    if not hasattr(ops, name):
        raise ImportError(f"the compiled library of detops has no op {name}, so it is of another version; {_REBUILD}.")

    def register(fake: Callable) -> Callable:
        @functools.wraps(fake)
        def checked(*arguments):
            _check_tensors(name, arguments)
            return fake(*arguments)

        _fakes[name] = checked
        torch.library.register_fake(f"detops::{name}", checked)
        return fake

    return register


def _check_tensors(name: str, arguments: tuple) -> None:
    """As the entries of the ops do, which do not run where a tensor is on the meta device."""
    for argument, value in zip(getattr(ops, name)._schema.arguments, arguments, strict=False):
        if value is None and str(argument.type) == "Tensor":
            raise RuntimeError(f"{name}: {argument.name} must be a tensor, got None")
    tensors = [each for argument in arguments for each in (argument if isinstance(argument, list) else [argument])]
    devices = {str(each.device) for each in tensors if isinstance(each, torch.Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"{name}: all tensors must be on one device, got {' and '.join(sorted(devices))}")


def unknown_length(name: str) -> torch.SymInt:
    """The number of rows of a result that depends on the data, in the fake of an op."""
    try:
        return get_ctx().new_dynamic_size()
    except RuntimeError:
        raise RuntimeError(
            f"{name}: the length of the result depends on the data, which tensors on the meta device do not have"
        ) from None


def register_result(result: type[Result]) -> type[Result]:
    """Decorates a NamedTuple: programs of torch.export that return it can be saved, and torch.load reads it."""
    serialized = f"{result.__module__}.{result.__name__}"
    _pytree._register_namedtuple(result, serialized_type_name=serialized)
    torch.serialization.add_safe_globals([result])
    return result


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Registers the gradient of an op, as torch.library.register_autograd does."""
    _autograds[name] = (backward, setup_context)
    torch.library.register_autograd(f"detops::{name}", backward, setup_context=setup_context)


def refuse_second_derivative(name: str) -> None:
    """Registers that the gradient of an op, `<name>_backward`, has none."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{name}: there is no second derivative")

    register_autograd(f"{name}_backward", refuse, lambda ctx, inputs, output: None)


def refuse_forward_mode(op: str, *tensors: torch.Tensor) -> None:
    """Raises where a forward-mode derivative is asked for: torch would take it as 0 and not say so."""
    if not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(each).tangent is not None for each in tensors):
        raise RuntimeError(f"{op}: there is no forward-mode derivative: use backward")


def refuse_complex(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raises where a conversion would drop the imaginary parts."""
    if tensor.is_complex():
        raise RuntimeError(f"{op}: {name} must be real, got {dtype_name(tensor.dtype)}")


def refuse_vmap(op: str, *tensors: torch.Tensor) -> None:
    """Raises under torch.func.vmap, of which torch's own error would name an inner function."""
    if torch.compiler.is_compiling():
        return
    is_batched = torch._C._functorch.is_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
    if any(isinstance(each, torch.Tensor) and is_batched(each) for each in tensors):
        raise RuntimeError(f"{op}: its arguments must not be under vmap")


def plain(result: torch.Tensor) -> torch.Tensor:
    """A plain tensor, for a result that is no box: torchvision's `set_return_type("TVTensor")` makes all that is
    computed of boxes boxes."""
    if type(result) is torch.Tensor or not isinstance(result, _tv_tensor()):
        return result
    with torch._C.DisableTorchFunctionSubclass():
        return result.as_subclass(torch.Tensor)


def _tv_tensor() -> type | tuple:
    """The class of torchvision's boxes, images and masks, if there can be any: no class otherwise."""
    module = sys.modules.get("torchvision.tv_tensors")
    return () if module is None else module.TVTensor


def filled(values: Sequence[float], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[len(values)] on the device of `like`. A GPU fills it and waits for nothing, as it would for a copy from the
    host, which torch.tensor makes and a CUDA graph refuses."""
    result = like.new_empty(len(values), dtype=dtype)
    for place, value in zip(result, values, strict=True):
        place.fill_(value)
    return result


def dtype_name(dtype: torch.dtype) -> str:
    """As messages name it."""
    return str(dtype).removeprefix("torch.")


def load_emulation(path: str | Path) -> None:
    """Loads a library of emulated CUDA kernels, whose ops stand in the namespace `detops_emulated`."""
    torch.ops.load_library(path)
    names = set(op_names("detops_emulated"))  # all, or those of one family
    for name in names & _fakes.keys():
        torch.library.register_fake(f"detops_emulated::{name}", _fakes[name])
    for name in names & _autograds.keys():
        backward, setup_context = _autograds[name]
        torch.library.register_autograd(f"detops_emulated::{name}", backward, setup_context=setup_context)


@contextlib.contextmanager
def use_namespace(namespace: str) -> Iterator[None]:
    """Makes the wrappers call the ops of another namespace, where it has them."""
    global ops
    previous, ops = ops, SimpleNamespace(**{**vars(_resolve("detops")), **vars(_resolve(namespace))})
    try:
        yield
    finally:
        ops = previous
