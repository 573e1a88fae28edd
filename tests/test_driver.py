"""What the CUDA driver is given when a kernel is started past Triton's launcher."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from offline import standing_in
from twins import layouts_of

from anystride import driver, flash_attn_varlen_func, launch
from anystride.launch import Launch, Pointer, Ready
from anystride.testing import find_case, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")  # Triton 3.9 asks

FUNCTION, STREAM = 0x7F00, 0x5700
# Case, back end, what else is asked for, the kernels that are started.
CALLS = {
    "gqa": ("llama-3-8b", "hopper", {}, ["gqa_kernel"]),
    "gqa-splits": ("llama-3-8b", "hopper", {"num_splits": 3}, ["gqa_kernel", "combine_kernel"]),
    "alibi": ("alibi", "hopper", {}, ["gqa_kernel"]),
    "mla": ("deepseek-v3-h16", "hopper", {}, ["mla_narrow_kernel"]),
    "mla-wide": ("deepseek-v3-h128", "hopper", {}, ["mla_wide_kernel"]),
    "triton": ("all-features", "triton", {}, ["schedule_kernel", "decode_kernel", "combine_kernel"]),
}


class Started(NamedTuple):
    """A compiled kernel, and the launch that asked for it."""

    made: Any
    launch: Launch


def started_by(name: str) -> list[Started]:
    """What a call would start on a Hopper GPU."""
    case_name, backend, others, _kernels = CALLS[name]
    case = find_case(case_name)
    inputs = make_inputs(case, layouts_of(case)[0], guard=False)
    asked: list[Launch] = []
    first_start = launch.first_start

    def noted(launch: Launch, tensors: Any) -> Ready | None:
        asked.append(launch)
        return first_start(launch, tensors)

    with standing_in("sm_90") as launched, mock.patch.object(launch, "first_start", noted):
        flash_attn_varlen_func(**(inputs.kwargs | others), backend=backend)
    assert [name for name, _made in launched] == CALLS[name][3]
    return [Started(loaded(made), asked) for (_name, made), asked in zip(launched, asked, strict=True)]


def loaded(made: Any, **others: Any) -> Any:
    """As much of a compiled kernel as there is of one that is loaded on a device."""
    facts = {name: getattr(made, name) for name in ("metadata", "asm", "src", "packed_metadata")}
    return SimpleNamespace(**(facts | {"function": FUNCTION} | others))


@contextmanager
def driver_that(result: int) -> Iterator[list[Any]]:
    """A driver that answers ``result``; yields what it was given."""
    calls: list[Any] = []

    def launch_kernel(*arguments: ctypes.c_void_p) -> int:
        calls.append(arguments)
        return result

    with mock.patch.object(driver, "launch_function", return_value=launch_kernel):
        yield calls


def prepare(started: Started) -> driver.Function | None:
    arguments = [*started.launch.arguments, *started.launch.constants.values()]
    return driver.prepare(started.made, started.launch.grid, arguments, lambda x: isinstance(x, Pointer))


def at(address: int | None, size: int) -> bytes:
    assert address
    return ctypes.string_at(address, size)


@pytest.mark.parametrize("name", CALLS)
def test_the_driver_gets_every_argument_and_nothing_else(name: str) -> None:
    for started in started_by(name):
        with driver_that(0) as calls:
            function = prepare(started)
            assert function is not None
            given = [*started.launch.arguments, *started.launch.constants.values()]
            addresses = [0x1000 * (i + 1) for i in range(sum(isinstance(x, Pointer) for x in given))]
            assert function.start(STREAM, [0] * len(addresses)) == 0
            assert function.start(STREAM, addresses) == 0
        config_at, handle, parameters_at, extra = (argument.value for argument in calls[-1])
        assert (handle, extra) == (FUNCTION, None)
        config = driver.LaunchConfig.from_address(config_at)
        grid = started.launch.grid
        assert (config.grid_x, config.grid_y, config.grid_z) == grid
        num_warps, _num_ctas, shared_bytes = started.made.packed_metadata
        assert (config.block_x, config.block_y, config.block_z) == (32 * num_warps, 1, 1)
        assert (config.shared_bytes, config.stream) == (shared_bytes, STREAM)
        attributes = [
            driver.Attribute.from_address(config.attributes + i * ctypes.sizeof(driver.Attribute))
            for i in range(config.num_attributes)
        ]
        wanted = {"launch_cooperative_grid": driver.COOPERATIVE}
        wanted |= {"launch_pdl": driver.PROGRAMMATIC_STREAM_SERIALIZATION}
        assert [x.id for x in attributes] == [wanted[x] for x in wanted if x in started.launch.options]
        assert all(x.value[0] == 1 for x in attributes)

        sizes = driver.parameter_bytes(started.made.asm["ptx"])
        parameters = (ctypes.c_void_p * len(sizes)).from_address(parameters_at)
        left, places = iter(addresses), iter(zip(parameters, sizes, strict=True))
        for kind, argument in zip(started.made.src.signature.values(), given, strict=True):
            if kind == "constexpr":
                continue
            place, size = next(places)
            data = at(place, size)
            if isinstance(argument, Pointer):
                assert struct.unpack("Q", data) == (next(left),)
            elif kind == "fp32":
                assert struct.unpack("f", data) == pytest.approx((argument,), rel=1e-6)
            else:
                assert int.from_bytes(data, "little", signed=True) == argument
        # Triton's two for scratch, of which these kernels need none.
        assert [at(place, size) for place, size in places] == [bytes(8)] * 2
        assert next(left, None) is None


def test_sizes_of_parameters_are_read_from_the_assembly() -> None:
    ptx = """
.visible .entry some_kernel(
	.param .u64 .ptr .global .align 1 some_kernel_param_0,
	.param .u32 some_kernel_param_1,
	.param .f32 some_kernel_param_2,
	.param .align 64 .b8 some_kernel_param_3[128],
	.param .u8 some_kernel_param_4
)
.reqntid 128
{ .param .u64 no_parameter; }"""
    assert driver.parameter_bytes(ptx) == [8, 4, 4, 128, 1]


@pytest.mark.parametrize(
    "change", [{"global_scratch_size": 16}, {"profile_scratch_size": 16}, {"num_ctas": 2}]
)
def test_what_only_tritons_launcher_can_do_is_left_to_it(change: dict[str, int]) -> None:
    (started,) = started_by("gqa")
    metadata = started.made.metadata
    facts = {name: getattr(metadata, name) for name in ("launch_cooperative_grid", "launch_pdl")}
    facts |= {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1}
    with driver_that(0):
        same, other = (SimpleNamespace(**(facts | x)) for x in ({}, change))
        assert prepare(Started(loaded(started.made, metadata=same), started.launch)) is not None
        assert prepare(Started(loaded(started.made, metadata=other), started.launch)) is None
        more = dict(started.made.src.signature) | {"BLOCK_SIZE": "i32"}  # not what the assembly has
        source = SimpleNamespace(signature=more)
        assert prepare(Started(loaded(started.made, src=source), started.launch)) is None
    with mock.patch.object(driver, "launch_function", return_value=None):
        assert prepare(started) is None


@pytest.mark.parametrize("result", [0, 201])
def test_what_the_driver_refuses_goes_to_tritons_launcher(result: int) -> None:
    (started,) = started_by("gqa")
    with driver_that(result) as calls:
        function = prepare(started)
    by_triton: list[tuple[Any, ...]] = []
    given = [*started.launch.arguments, *started.launch.constants.values()]
    places = tuple((i, launch.SOURCES.index(x)) for i, x in enumerate(given) if isinstance(x, Pointer))
    ready = Ready(lambda *arguments: by_triton.append(arguments), list(given), places, (), function)
    tensors = tuple(torch.empty(1) for _ in launch.SOURCES)
    launch.run_again([ready], STREAM, tensors)
    assert len(calls) == 1
    assert len(by_triton) == (result != 0)
    for arguments in by_triton:
        assert all(arguments[place] == tensors[source].data_ptr() for place, source in places)
