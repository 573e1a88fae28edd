"""Start Triton and Gluon kernels: what the GPU back ends share of the way from a plan to a device.

The first call of a plan goes through Triton's own look-up, which compiles; later ones fill addresses into a
list of arguments that is ready: nothing else changes from call to call.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from anystride import driver
from anystride.memory import Scratch
from anystride.problem import Call

STREAM = 3  # its position among a launcher's arguments


class Target(NamedTuple):
    """What of a device decides a configuration."""

    backend: str  # cuda, hip, xpu; cpu: the interpreter
    arch: int  # 90 for sm_90; 0 where that means nothing
    processors: int
    shared_bytes: int  # shared memory that one program can have


@lru_cache(maxsize=64)
def device_target(device: torch.device) -> Target:
    """The target of a device, asked once."""
    if device.type == "cpu":
        return Target("cpu", 0, 4, 1 << 20)
    properties = torch.cuda.get_device_properties(device)
    shared = int(getattr(properties, "shared_memory_per_block_optin", 65536))
    if torch.version.hip:
        return Target("hip", 0, properties.multi_processor_count, shared)
    arch = properties.major * 10 + properties.minor
    return Target("cuda", arch, properties.multi_processor_count, shared)


def device_refusals(device: torch.device) -> list[str]:
    """Every reason why kernels in Triton cannot run on a device."""
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        return ["tensors are on cpu; needs a GPU, or TRITON_INTERPRET=1 to check a kernel slowly"]
    if device.type not in ("cpu", "cuda", "xpu"):
        return [f"tensors are on {device}; needs a GPU that Triton supports"]
    if device.type == "cuda" and not torch.version.hip:
        arch = device_target(device).arch
        if arch < 80:
            return [f"compute capability {arch // 10}.{arch % 10}; needs 8.0 or later"]
    return []


class Pointer(str):
    """Stands for a tensor of the call, by its name, among the arguments of a launch."""


class TensorMap(NamedTuple):
    """Stands for a tensor of the call as TMA sees it, among the arguments of a launch."""

    name: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # elements
    box: tuple[int, ...]  # what is loaded at a time
    layout: Any  # of a box in shared memory


SOURCES = (*Call._fields, *Scratch._fields)  # what launches of attention point to: its tensors, the scratch


class Launch(NamedTuple):
    """One kernel launch of a plan, complete but for the addresses."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


class Ready(NamedTuple):
    """A launch whose kernel is compiled: what is left to do is to fill in addresses."""

    run: Any  # Triton's launcher
    arguments: list[Any]  # of the launcher
    places: tuple[tuple[int, int], ...]  # of addresses: (place among the arguments, which of the tensors)
    maps: tuple[tuple[int, int, dict[str, Any]], ...]  # of tensor maps: the same, and what they say
    function: driver.Function | None  # the way past Triton's launcher, where there is one


def pointer(call: Call, name: str) -> Pointer | None:
    """A tensor of the call as an argument, None where there is none."""
    return None if getattr(call, name) is None else Pointer(name)


def strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides of a tensor that may be missing."""
    return (0,) * dims if tensor is None else tensor.stride()


def sources(call: Call, scratch: tuple[Tensor, ...]) -> dict[str, Any]:
    """What launches point to, by name."""
    return call._asdict() | dict(zip(SOURCES[len(call) :], scratch, strict=False))


def first_start(launch: Launch, tensors: Mapping[str, Any]) -> Ready | None:
    """Compile a launch, or find it compiled, and start it; None from the interpreter.

    What the kernel is specialised on are strides, alignments and dtypes, all of which are a part of the
    plan: later calls of the plan skip Triton's own look-up, and pass addresses, about which Triton would ask
    the driver if they came as tensors. They skip its launch hooks, too: a Proton session sees first calls.
    """
    names = list(tensors)
    given = [_given(x, tensors) for x in launch.arguments]
    made = launch.kernel[launch.grid](*given, **launch.constants, **launch.options)
    if made is None:
        return None
    # The calling convention of compiled kernels, the same from Triton 3.6 to 3.9: grid, stream, function,
    # packed metadata, launch metadata, two hooks, then the arguments.
    before = [*launch.grid, None, made.function, made.packed_metadata, None, None, None]
    own = [*launch.arguments, *launch.constants.values()]
    arguments = [*before, *own]
    places = tuple((i, names.index(x)) for i, x in enumerate(arguments) if isinstance(x, Pointer))
    maps = tuple(
        (len(before) + i, names.index(x.name), _facts(given[i]))
        for i, x in enumerate(launch.arguments)
        if isinstance(x, TensorMap)
    )
    function = driver.prepare(made, launch.grid, own, lambda x: isinstance(x, Pointer))
    return Ready(made.run, arguments, places, maps, function)


def _given(argument: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(argument, TensorMap):
        name, *facts = argument
        return TensorDescriptor(tensors[name], *(list(x) for x in facts[:-1]), facts[-1])
    return tensors[argument] if isinstance(argument, Pointer) else argument


def _facts(descriptor: TensorDescriptor) -> dict[str, Any]:
    """What it says but for the tensor: a plan must not keep a cache alive."""
    return {name: value for name, value in vars(descriptor).items() if name != "base"}


def first_run(launches: list[Launch], tensors: Mapping[str, Any]) -> list[Ready]:
    """Start the launches of a plan for the first time, in order, on the current device."""
    started = [first_start(launch, tensors) for launch in launches]
    return [x for x in started if x is not None]


def run_again(ready: list[Ready], stream: int, sources: tuple[Any, ...]) -> None:
    """Start the compiled launches of a plan on a stream of the current device.

    Args:
        ready: From :func:`first_run`.
        stream: Its handle.
        sources: What launches point to, in the order in which :func:`first_run` was given it.
    """
    # All addresses first: the launches should reach the device one right behind the other.
    addresses = [[sources[source].data_ptr() for _place, source in launch.places] for launch in ready]
    for launch, own in zip(ready, addresses, strict=True):
        # Where the driver refuses, Triton's launcher says why, or makes the context that a new thread lacks.
        if launch.function is None or launch.function.start(stream, own):
            _start(launch, stream, sources)


def _start(launch: Ready, stream: int, sources: tuple[Any, ...]) -> None:
    """Start a launch by Triton's launcher."""
    arguments = launch.arguments.copy()
    arguments[STREAM] = stream
    for place, source in launch.places:
        arguments[place] = sources[source].data_ptr()
    for place, source, facts in launch.maps:
        described = object.__new__(TensorDescriptor)  # without its checks: the first call has passed them
        described.__dict__ = facts | {"base": sources[source]}
        arguments[place] = described
    launch.run(*arguments)


@lru_cache(maxsize=64)
def _alone(device: torch.device) -> bool:
    """Whether there is no other device that could be the current one."""
    return device.type == "cpu" or torch.get_device_module(device).device_count() == 1


@dataclass(frozen=True)
class Prepared:
    """A single launch, complete but for the addresses.

    Attributes:
        launch: The launch.
        ready: The same, once the first call has compiled it.
    """

    launch: Launch
    ready: list[Ready] = field(default_factory=list, compare=False)


def run_prepared(prepared: Prepared, device: torch.device, tensors: Mapping[str, Any]) -> None:
    """Start a single launch on the device's current stream; ``tensors`` by the names of its pointers."""
    if not is_current(device):
        with current(device):
            return run_prepared(prepared, device, tensors)
    if prepared.ready:
        return run_again(prepared.ready, current_stream(device), tuple(tensors.values()))
    prepared.ready[:] = first_run([prepared.launch], tensors)  # two threads may come here at once
    return None


def is_current(device: torch.device) -> bool:
    """Whether launches go to this device."""
    return _alone(device) or triton.runtime.driver.active.get_current_device() == device.index


def current_stream(device: torch.device) -> int:
    """The handle of the device's current stream."""
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream


def current(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device, whatever its tensors say."""
    if device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[None] = torch.get_device_module(device).device(device)
    return context
