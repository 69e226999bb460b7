"""Compiled kernels as bytes, and back, without pickle: Numba's own cache on disk is unpickled, this is an object file and its
symbols' names.

The only place that reaches into Numba. What it does not understand is an error here, and then a kernel is compiled as usual.

Source: Numba 0.68, `numba.core.compiler.CompileResult` (`_reduce`, `_rebuild`).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import llvmlite
import numba
import numpy as np
from numba.core.compiler import CompileResult
from numba.core.environment import Environment
from numba.core.funcdesc import PythonFunctionDescriptor
from numba.core.registry import cpu_target

from node.runtime.engine.kernels.book import ObjectCode

_IMPORTED: Final = ("blocks.py", "maxima.py", "philox.py", "race.py")


@cache
def stamp() -> str:
    """What compiled kernels depend on: versions, processor, the text of the kernels and of what they import. Hexadecimal."""
    versions = (platform.python_version(), numba.__version__, llvmlite.__version__, np.__version__)
    digest = hashlib.sha256(repr((versions, cpu_target.target_context.codegen().magic_tuple())).encode())
    here = Path(__file__).parent
    for source in (*(here.parent / name for name in _IMPORTED), *sorted(here.glob("*.py"))):
        text = source.read_bytes()
        digest.update(f"{source.name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def taken(name: str, compiled: Any) -> ObjectCode:
    """Of a kernel that was compiled in this process. Raises `ValueError` for one that needs more than its code."""
    (result,) = compiled.overloads.values()
    if result.objectmode or result.lifted or result.library.has_dynamic_globals or result.environment.consts:
        raise ValueError(f"{name} is not code alone")
    _, _, (code, module) = result.library.serialize_using_object_code()
    return ObjectCode(name, result.fndesc.uid, tuple(result.fndesc.abi_tags), code, module)


def put_back(kernel: ObjectCode, run: Callable[..., None], signature: Any, *, parallel: bool) -> Any:
    """The `CompileResult` of `run`, whose name is the kernel's. Raises `ValueError` when the code does not have it."""
    context = cpu_target.target_context
    context.refresh()  # the runtime's functions that the code calls
    if parallel:
        from numba.np.ufunc.parallel import _launch_threads

        _launch_threads()
    code = run.__code__
    function = PythonFunctionDescriptor(
        native=True,
        modname=run.__module__,
        qualname=run.__qualname__,
        unique_name=run.__qualname__,
        doc="",
        typemap=None,
        restype=signature.return_type,
        calltypes=None,
        args=code.co_varnames[: code.co_argcount],
        kws=(),
        mangler=context.mangler,
        argtypes=signature.args,
        abi_tags=kernel.tags,
        uid=kernel.number,
    )
    library = context.codegen().unserialize_library((kernel.name, "object", (kernel.code, kernel.module)))
    if not library.get_pointer_to_function(function.llvm_cpython_wrapper_name):
        raise ValueError(f"{kernel.name} is not in its code")
    environment = Environment.from_fndesc(function)
    return CompileResult(
        typing_context=cpu_target.typing_context,
        target_context=context,
        library=library,
        environment=environment,
        entry_point=context.get_executable(library, function, environment),
        fndesc=function,
        type_annotation="",
        signature=signature,
        objectmode=False,
        lifted=(),
        typing_error=None,
        call_helper=None,
        metadata=None,
        reload_init=[],
        referenced_envs=(),
    )
