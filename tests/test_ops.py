"""The operator behind the entry: its schema, its fake, and what compilers make of a call."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from anystride import InvalidInputError, flash_attn_varlen_func, plan
from anystride.problem import Call, Numbers, Problem, make_problem
from anystride.testing import Case, Inputs, Layout, find_case, find_layout, make_inputs
from anystride.testing.judgement import attend

OPERATOR = torch.ops.anystride.attention.default

CALLS = [
    ("tiny-gqa", "G2"),
    ("tiny-row", "M2"),
    ("tiny-q_v", "M9"),
    ("tiny-all-features", "G5"),
    ("tiny-fp8", "G12"),
    ("tiny-scales", "G12"),
    ("tiny-row-scales", "A-padded-rows"),
    ("tiny-cp", "G3"),
    ("tiny-pages", "G11"),
    ("tiny-dense", "A-inner-step-2"),
    ("tiny-gqa", "A-expanded-heads"),
    ("no-lse", "A-overlap"),
]
every_call = pytest.mark.parametrize(("case", "layout"), CALLS)


class Watch(TorchDispatchMode):
    """Keeps the arguments of the operator's calls, and lets them pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, ...]] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is OPERATOR:
            self.calls.append(args)
        else:
            self.others.append(str(func))
        return func(*args, **kwargs or {})


def inputs_of(case: str, layout: str, **options: Any) -> Inputs:
    return make_inputs(find_case(case), find_layout(layout), **options)


def arguments_of(inputs: Inputs) -> tuple[Any, ...]:
    """What the operator gets when somebody watches the call."""
    with Watch() as watch:
        attend(inputs, "cpu")
    assert len(watch.calls) == 1
    arguments: tuple[Any, ...] = watch.calls[0]
    return arguments


def same(left: Any, right: Any) -> bool:
    pairs = zip(left, right, strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_out_and_lse_are_declared_as_written_and_nothing_else() -> None:
    arguments = OPERATOR._schema.arguments
    written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == {"out", "lse"}
    assert OPERATOR._schema.returns == []
    assert OPERATOR._schema.is_mutable
    assert torch.Tag.needs_fixed_stride_order in OPERATOR.tags


@every_call
def test_opcheck_passes(case: str, layout: str) -> None:
    arguments = arguments_of(inputs_of(case, layout))
    utils = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not find_case(case).tags & {"fp8"}:  # PyTorch's own comparison has no fp8
        utils.append("test_schema")
    results = torch.library.opcheck(OPERATOR, arguments, test_utils=utils)
    assert set(results) == set(utils)
    assert set(results.values()) == {"SUCCESS"}


@every_call
def test_a_watched_call_gives_the_bits_of_an_eager_one(case: str, layout: str) -> None:
    inputs = inputs_of(case, layout)
    eager = attend(inputs, "cpu")
    with Watch() as watch:
        watched = attend(inputs, "cpu")
    assert len(watch.calls) == 1
    assert same(eager, watched)


def test_the_views_reach_the_operator_as_they_are() -> None:
    # A copy on the way would have other strides, and would not be at the cache's address.
    inputs = inputs_of("tiny-gqa", "A-inner-step-2", rows="dim_major", table="transposed", out="heads_first")
    arguments = arguments_of(inputs)
    names = [a.name for a in OPERATOR._schema.arguments]
    for name in ("q", "k", "v", "block_table", "seqused_k", "out"):
        assert arguments[names.index(name)] is inputs.kwargs[name], name


def test_a_watched_call_allocates_its_results_and_nothing_else() -> None:
    inputs = inputs_of("tiny-gqa", "G2")
    with Watch() as watch:
        attend(inputs, "cpu")
    assert watch.others == ["aten.new_empty.default"] * 2  # out and lse; the rest is inside of the operator


@every_call
def test_a_fake_call_has_the_shapes_and_strides_of_a_real_one(case: str, layout: str) -> None:
    inputs = inputs_of(case, layout)
    real = attend(inputs, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake_arguments: dict[str, Any] = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in inputs.kwargs.items()
        }
        result = flash_attn_varlen_func(**fake_arguments)
        fake = result if isinstance(result, tuple) else (result, None)
    for one, other in zip(real, fake, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (other.shape, other.stride(), other.dtype) == (one.shape, one.stride(), one.dtype)
            assert other.device == one.device


def test_a_trace_holds_one_operator_and_runs_with_other_values() -> None:
    inputs, others = (inputs_of("tiny-gqa", "G2", seed=seed) for seed in (0, 1))
    names = [name for name, value in inputs.kwargs.items() if isinstance(value, Tensor)]

    def call(*tensors: Tensor) -> Any:
        given = inputs.kwargs | dict(zip(names, tensors, strict=True))
        return flash_attn_varlen_func(**given, backend="cpu")

    traced = make_fx(call)(*(inputs.kwargs[name] for name in names))
    operators = [node for node in traced.graph.nodes if node.target is OPERATOR]
    assert len(operators) == 1
    assert same(traced(*(others.kwargs[name] for name in names)), attend(others, "cpu"))


def compiled_call(inputs: Inputs, backend: str, **options: Any) -> Callable[..., Any]:
    """The call of the inputs, compiled, taking what differs from them by name."""

    def call(**others: Any) -> Any:
        return flash_attn_varlen_func(**(inputs.kwargs | {"backend": "cpu"} | others))

    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(call, fullgraph=True, backend=backend, **options)
    return compiled


def tensors_of(inputs: Inputs) -> dict[str, Any]:
    return {name: value for name, value in inputs.kwargs.items() if isinstance(value, Tensor)}


@every_call
def test_a_compiled_call_is_one_graph_and_gives_the_same_bits(case: str, layout: str) -> None:
    inputs = inputs_of(case, layout)
    result = compiled_call(inputs, "aot_eager")(**tensors_of(inputs))
    assert same(result if isinstance(result, tuple) else (result, None), attend(inputs, "cpu"))
    inputs.assert_untouched()


def test_a_compiled_call_writes_the_out_it_was_given() -> None:
    inputs = inputs_of("tiny-gqa", "G2", out="padded_rows")
    given = inputs.kwargs["out"]
    out, lse = compiled_call(inputs, "aot_eager")(**tensors_of(inputs))
    wanted = attend(inputs_of("tiny-gqa", "G2"), "cpu")
    assert same((given, lse), wanted)
    assert torch.equal(out, given)
    assert out.data_ptr() == given.data_ptr()
    inputs.assert_untouched()


def test_views_made_inside_of_a_compiled_function_stay_views(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of("tiny-row", "M1")
    rows = inputs.kwargs["k"]  # [num_blocks, block_size, 1, 48]; V is its first 32 elements
    found: list[Problem] = []

    def watched(call: Call, numbers: Numbers) -> Problem:
        found.append(make_problem(call, numbers))
        return found[-1]

    monkeypatch.setattr(plan, "make_problem", watched)
    monkeypatch.setattr(plan, "_PLANS", {})
    torch._dynamo.reset()

    def layer(rows: Tensor) -> Any:
        return flash_attn_varlen_func(**(inputs.kwargs | {"k": rows, "v": rows[..., :32], "backend": "cpu"}))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert same(compiled(rows), attend(inputs, "cpu"))
    assert found
    assert {problem.relation.kind for problem in found} == {"v_in_k"}


def recording(graphs: list[Any]) -> Callable[[Any, Any], Any]:
    """A compiler that runs each graph as it is, and notes it."""

    def record(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    return record


def test_other_lengths_and_tables_compile_nothing_new() -> None:
    inputs = inputs_of("tiny-gqa", "G2")
    graphs: list[Any] = []

    def call(**others: Any) -> Any:
        return flash_attn_varlen_func(**(inputs.kwargs | {"backend": "cpu"} | others))

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=recording(graphs), dynamic=False)
    for seed in range(3):
        other = inputs_of("tiny-gqa", "G2", seed=seed)
        lengths = other.kwargs["seqused_k"] - seed
        tensors = tensors_of(other) | {"seqused_k": lengths.clamp(min=0)}
        assert same(compiled(**tensors), attend(other, "cpu", seqused_k=tensors["seqused_k"]))
    assert len(graphs) == 1


def test_other_bounds_on_the_keys_do_not_compile_again_and_again() -> None:
    inputs = inputs_of("tiny-gqa", "G2")
    graphs: list[Any] = []

    def call(max_seqlen_k: int, tensors: dict[str, Tensor]) -> Any:
        return flash_attn_varlen_func(**(inputs.kwargs | tensors | {"max_seqlen_k": max_seqlen_k}))

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=recording(graphs))
    for bound in range(33, 45):
        assert same(compiled(bound, tensors_of(inputs)), attend(inputs, None, max_seqlen_k=bound))
    assert len(graphs) <= 2  # the number itself, then any number


def test_batches_of_other_sizes_run_in_one_dynamic_graph() -> None:
    graphs: list[Any] = []

    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_varlen_func, fullgraph=True, backend=recording(graphs), dynamic=True)
    for batch in (2, 3, 5, 8):
        case = Case(f"batch-{batch}", "sizes", tuple(range(3, 3 + batch)), (1,) * batch, 4, 2, 16, 16)
        inputs = make_inputs(case, find_layout("G2"))
        assert same(compiled(**inputs.kwargs), attend(inputs, None))
    assert len(graphs) <= 2  # at most: small lengths may be constants in the first


@pytest.mark.parametrize("number", [2.0, 2])
def test_descales_may_be_numbers_when_a_call_is_watched(number: float) -> None:
    inputs = inputs_of("tiny-gqa", "G2")
    given = {"q_descale": number, "k_descale": number, "v_descale": number}
    eager = attend(inputs, "cpu", **given)
    with Watch():
        assert same(attend(inputs, "cpu", **given), eager)


def test_wrong_calls_are_refused_when_they_are_watched() -> None:
    inputs = inputs_of("tiny-gqa", "G2")
    with Watch(), pytest.raises(InvalidInputError, match="softcap must not be negative"):
        attend(inputs, "cpu", softcap=-1.0)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # Inductor's own imports
@pytest.mark.parametrize(("case", "layout"), [("tiny-gqa", "A-inner-step-2"), ("tiny-row", "M2")])
def test_inductor_hands_over_the_views_it_was_given(case: str, layout: str) -> None:
    if shutil.which("g++") is None:
        pytest.skip("Inductor on a CPU needs a C++ compiler, g++")
    inputs = inputs_of(case, layout)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Any:
        # Work before and after, so that there is something to fuse.
        given = inputs.kwargs | {"q": q * 1.0, "k": k, "v": v, "backend": "cpu"}
        out, lse = flash_attn_varlen_func(**given)
        return out + 1.0, lse

    a = inputs.kwargs
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="inductor")
    out, lse = compiled(a["q"], a["k"], a["v"])
    wanted, wanted_lse = attend(inputs, "cpu")
    assert same((out, lse), (wanted + 1.0, wanted_lse))
    inputs.assert_untouched()


def test_every_argument_of_the_schema_is_used() -> None:
    # The operator and the entry agree on what there is: a new argument of one is one of the other.
    names = [a.name for a in OPERATOR._schema.arguments]
    numbers = [name for name in Numbers._fields if name not in ("window", "wants_lse")]
    assert names[: len(Call._fields)] == list(Call._fields)
    rest = names[len(Call._fields) :]
    assert sorted(rest) == sorted([*numbers, "window_left", "window_right", "backend"])


def test_replaced_numbers_arrive_under_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each number differs from its neighbours in the schema: a swap would be seen.
    case = replace(find_case("tiny-cp"), causal=False, window=(9, 7), softcap=1.5)
    layout: Layout = find_layout("G3")
    inputs = make_inputs(case, layout, rank=1)
    seen: list[Numbers] = []

    def watched(call: Call, numbers: Numbers) -> Problem:
        seen.append(numbers)
        return make_problem(call, numbers)

    monkeypatch.setattr(plan, "make_problem", watched)
    for options in (
        {"num_splits": 5, "deterministic": True},
        {"batch_invariant": True, "softmax_scale": 0.3},
    ):
        monkeypatch.setattr(plan, "_PLANS", {})
        eager = attend(inputs, "cpu", max_seqlen_q=3, **options)
        monkeypatch.setattr(plan, "_PLANS", {})
        with Watch():
            assert same(attend(inputs, "cpu", max_seqlen_q=3, **options), eager)
    assert len(seen) == 4
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert seen[0] != seen[2]
