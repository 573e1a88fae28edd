"""Compile what a call would launch, for a GPU that is not here.

The call goes the whole way, entry, plan and back end, with tensors on the CPU. Three things are put in its
way: the back end is told that the device is the target, Triton too, and a launch compiles and launches
nothing. Signatures and specialisations are then those that the JIT chooses, whatever a kernel's arguments.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from anystride import flash_attn_varlen_func, launch, plan, store_plan
from anystride.backends import hopper, triton_blocks, triton_store
from anystride.backends import triton as portable
from anystride.launch import Target
from anystride.problem import Problem

__all__ = ["TARGETS", "Binary", "compile_call", "compile_launches", "compile_store", "standing_in"]

# Shared memory: what one program can have, CUDA programming guide, table of compute capabilities; CDNA3 ISA.
TARGETS = {
    "sm_80": (Target("cuda", 80, 108, 166912), GPUTarget("cuda", 80, 32)),
    "sm_89": (Target("cuda", 89, 142, 101376), GPUTarget("cuda", 89, 32)),
    "sm_90": (Target("cuda", 90, 132, 232448), GPUTarget("cuda", 90, 32)),
    "sm_100": (Target("cuda", 100, 148, 232448), GPUTarget("cuda", 100, 32)),
    "gfx942": (Target("hip", 0, 304, 65536), GPUTarget("hip", "gfx942", 64)),
}


class Binary(NamedTuple):
    """A compiled kernel and what it takes of the machine."""

    kernel: str
    shared_bytes: int
    spilled_bytes: int  # a thread; on NVIDIA its stack, which is empty when nothing is spilled
    assembly: str  # PTX or AMD's
    cubin: bytes  # empty on AMD

    @property
    def sass(self) -> str:
        """The machine code as text."""
        return _cuobjdump(self.cubin, "--dump-sass")


class _Driver:
    """As much of a driver as compiling needs, for a device on which nothing is compiled yet."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> _Driver:
        return self  # the key under which the JIT remembers what it has compiled

    def get_current_stream(self, device: _Driver) -> int:
        return 0


@contextmanager
def standing_in(target: str) -> Iterator[list[tuple[str, Any]]]:
    """Let the GPU back ends believe that the CPU is the target, and compile instead of launching.

    Yields:
        The name and the compiled kernel of every launch, in order, as they come.
    """
    facts, gpu = TARGETS[target]
    launched: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    def refuse(problem: Problem) -> list[str]:
        if facts.arch != 90:
            return ["not the target's"]
        return hopper.shape_refusals(problem) + hopper.stride_refusals(problem)

    plan._PLANS.clear()  # plans do not know about the stand-in
    store_plan._PLANS.clear()
    try:
        with (
            mock.patch.object(launch, "device_target", return_value=facts),
            mock.patch.object(portable, "device_target", return_value=facts),
            mock.patch.object(hopper, "device_target", return_value=facts),
            mock.patch.object(triton_store, "device_target", return_value=facts),
            mock.patch.object(portable, "refusals", return_value=[]),
            mock.patch.object(hopper, "refusals", refuse),
            mock.patch.object(triton_store, "refusals", return_value=[]),
            mock.patch.object(triton_blocks, "refusals", return_value=[]),
            mock.patch.object(driver, "_active", _Driver(gpu)),
            mock.patch.object(JITFunction, "run", compile_only),
            # A torch for the CPU cannot answer.
            mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        ):
            yield launched
    finally:
        plan._PLANS.clear()
        store_plan._PLANS.clear()


def compile_call(kwargs: dict[str, Any], target: str, backend: str = "triton") -> list[Binary]:
    """Compile every kernel that a call would launch on a target.

    Args:
        kwargs: Arguments of ``flash_attn_varlen_func``, on the CPU.
        target: A key of ``TARGETS``.
        backend: Who runs it.

    Returns:
        The kernels in the order of their launches.
    """
    with standing_in(target) as launched:
        flash_attn_varlen_func(**kwargs, backend=backend)
    return [_inspect(*kernel) for kernel in launched]


def compile_store(store: Callable[..., None], arguments: Sequence[Any], target: str) -> Binary:
    """Compile the kernel that a call of the write side would launch on a target."""
    (binary,) = compile_launches(lambda: store(*arguments, backend="triton"), target)
    return binary


def compile_launches(run: Callable[[], None], target: str) -> list[Binary]:
    """Compile whatever a function would launch on a target."""
    with standing_in(target) as launched:
        run()
    return [_inspect(*kernel) for kernel in launched]


def _inspect(name: str, made: Any) -> Binary:
    assembly = made.asm.get("ptx") or made.asm["amdgcn"]
    cubin = made.asm.get("cubin", b"")
    if cubin:
        # Bytes of stack of a thread, as the binary itself says.
        text = _cuobjdump(cubin, "--dump-resource-usage")
        found = re.findall(r"STACK:(\d+)", text)
        assert found, f"cuobjdump says nothing of the stack:\n{text}"
        spilled = max(int(n) for n in found)
    else:
        # A spilled register is 4 bytes of each lane.
        spilled = 4 * sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly))
    return Binary(name, made.metadata.shared, spilled, assembly, cubin)


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
