"""Start a compiled kernel with the CUDA driver's own function.

Triton's launcher looks at every argument at every launch. From call to call of a plan nothing changes but
addresses and the stream: all else is prepared once, and a launch takes less than half of the host's time.

Source: CUDA driver API, ``cuLaunchKernelEx``.
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

__all__ = ["Function", "parameter_bytes", "prepare"]

# CUlaunchAttributeID, and the size of the union CUlaunchAttributeValue
COOPERATIVE, PROGRAMMATIC_STREAM_SERIALIZATION = 2, 6
ATTRIBUTE_VALUE_BYTES = 64

FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"} | {
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
}  # fmt: skip


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int * (ATTRIBUTE_VALUE_BYTES // 4)),
    )


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


@cache
def launch_function() -> Any:
    """``cuLaunchKernelEx``, or None where the driver cannot be asked by this name."""
    try:
        # A process that has a CUDA device has the library already. The GIL is released while it runs.
        return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None


def parameter_bytes(ptx: str) -> list[int]:
    """Sizes of the parameters of a kernel, in order, as its assembly declares them."""
    begin = ptx.index(".entry")
    declared = ptx[begin : ptx.index(")", begin)]
    found = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z](\d+)\b[^,\[]*(?:\[(\d+)\])?", declared)
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


class Function:
    """A compiled kernel with all that does not change from call to call.

    Args:
        launch: ``cuLaunchKernelEx``.
        function: The kernel's handle.
        grid: Programs.
        threads: Of a program.
        shared_bytes: Of a program.
        attributes: ``CUlaunchAttributeID`` of those that are on.
        values: One for each parameter: a pair of a format of ``struct`` and a value, or None for an address.
    """

    def __init__(
        self,
        launch: Any,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        attributes: Sequence[int],
        values: Sequence[tuple[str, Any] | None],
    ) -> None:
        # Addresses lie side by side, to be written at once; everything else in places of 8 bytes.
        num_addresses = sum(value is None for value in values)
        self.addresses = ctypes.create_string_buffer(8 * max(1, num_addresses))
        self.constants = ctypes.create_string_buffer(8 * len(values))
        self.parameters = (ctypes.c_void_p * len(values))()
        address_at, constants_at = ctypes.addressof(self.addresses), ctypes.addressof(self.constants)
        for i, value in enumerate(values):
            if value is None:
                self.parameters[i] = address_at
                address_at += 8
            else:
                struct.pack_into(value[0], self.constants, 8 * i, value[1])
                self.parameters[i] = constants_at + 8 * i
        self.attributes = (Attribute * max(1, len(attributes)))()
        for attribute, identifier in zip(self.attributes, attributes, strict=False):
            attribute.id, attribute.value[0] = identifier, 1
        self.config = LaunchConfig(
            *grid, threads, 1, 1, shared_bytes, None, ctypes.addressof(self.attributes), len(attributes)
        )
        self.launch = launch
        self.pack = struct.Struct(f"{num_addresses}Q").pack_into
        # Passed as they are: an int would be converted at each call.
        self.arguments = (
            ctypes.c_void_p(ctypes.addressof(self.config)),
            ctypes.c_void_p(function),
            ctypes.c_void_p(ctypes.addressof(self.parameters)),
            ctypes.c_void_p(None),
        )
        self.lock = threading.Lock()

    def start(self, stream: int, addresses: Sequence[int]) -> int:
        """Launch it on a stream of the current device; returns the driver's ``CUresult``, 0 if it took it."""
        with self.lock:  # the driver reads the buffers before it returns
            self.pack(self.addresses, 0, *addresses)
            self.config.stream = stream
            result: int = self.launch(*self.arguments)
        return result


def prepare(
    made: Any, grid: tuple[int, int, int], arguments: Sequence[Any], is_address: Callable[[Any], bool]
) -> Function | None:
    """Prepare a kernel that Triton has compiled; None where only Triton's launcher can start it.

    Args:
        made: Triton's compiled kernel.
        grid: Programs.
        arguments: All arguments of the kernel, constants included.
        is_address: Whether an argument stands for an address, which ``start`` will be given.
    """
    launch = launch_function()
    metadata = getattr(made, "metadata", None)
    if launch is None or metadata is None or "ptx" not in made.asm:
        return None
    scratch = metadata.global_scratch_size or metadata.profile_scratch_size
    if scratch or metadata.num_ctas != 1 or getattr(metadata, "instrumentation_mode", ""):
        return None
    values = parameters(made.src.signature.values(), arguments, is_address)
    # The two that Triton adds are for scratch.
    sizes = parameter_bytes(made.asm["ptx"])
    if values is None or sizes != [8 if x is None else struct.calcsize(x[0]) for x in values] + [8, 8]:
        return None
    attributes = []
    if metadata.launch_cooperative_grid:
        attributes.append(COOPERATIVE)
    if metadata.launch_pdl:
        attributes.append(PROGRAMMATIC_STREAM_SERIALIZATION)
    num_warps, _num_ctas, shared_bytes = made.packed_metadata
    values += [("Q", 0), ("Q", 0)]
    return Function(launch, made.function, grid, 32 * num_warps, shared_bytes, attributes, values)


def parameters(
    signature: Iterable[Any], arguments: Sequence[Any], is_address: Callable[[Any], bool]
) -> list[tuple[str, Any] | None] | None:
    """Formats and values of a kernel's parameters, None for each address; None if there are others."""
    values: list[tuple[str, Any] | None] = []
    for kind, argument in zip(signature, arguments, strict=True):
        if kind == "constexpr":
            continue
        if not isinstance(kind, str):
            return None
        if is_address(argument):
            values.append(None)
        elif kind in FORMATS:
            values.append((FORMATS[kind], argument))
        else:
            return None
    return values
