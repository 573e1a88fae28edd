"""Time the cpu back end against gathering each sequence and calling PyTorch's own attention.

    python benchmarks/cpu_decode.py
    python benchmarks/cpu_decode.py --only llama --json results.json

The baseline gathers a sequence's blocks into a contiguous tensor and calls ``scaled_dot_product_attention``,
one sequence after the other; what that cannot express (softcap) it computes with two matrix products. It can
give no lse, so none is asked for. Each answer is checked against the float64 reference before anything is
timed. The two are timed in turn, and the least of all rounds counts: whatever else the machine does only adds
time. Extra memory is the peak of what PyTorch's allocator hands out during a call, without out.

Exits with 1 if a case is slower than the baseline, if the median ratio is below 1.5, or if a call takes more
than 64 MB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

import anystride
from anystride.testing import Case, Inputs, compatible, find_case, find_layout, make_inputs, select
from anystride.testing.allocations import peak_bytes

MEDIAN_RATIO, MIN_RATIO, MOST_EXTRA_MB = 1.5, 1.0, 64.0
LAYOUTS = ("G2", "M1", "M7", "G11", "M3b")  # the first that can hold the case


class Row(NamedTuple):
    """One row of the table."""

    case: str
    layout: str
    baseline_ms: float
    anystride_ms: float
    extra_mb: float

    @property
    def ratio(self) -> float:
        """How many times faster than the baseline."""
        return self.baseline_ms / self.anystride_ms


def gather(cache: Tensor, arguments: dict[str, Any], seq: int, length: int, dtype: torch.dtype) -> Tensor:
    """The rows of a sequence in a new contiguous tensor: ``[length, num_kv_heads, d]`` in the dtype of q."""
    table = arguments.get("block_table")
    if table is None:
        first = int(arguments["cu_seqlens_k"][seq])
        rows = cache[first : first + length]
    elif length == 0:
        rows = cache.flatten(0, -3)[:0]
    else:
        size = cache.shape[-3]
        ids = table[seq, : -(-length // size)]
        if cache.dim() == 5:
            blocks = cache[ids // cache.shape[1], ids % cache.shape[1]]
        elif cache.itemsize == 1:
            blocks = cache.view(torch.uint8).index_select(0, ids).view(cache.dtype)
        else:
            blocks = cache.index_select(0, ids)
        rows = blocks.flatten(0, 1)[:length]
    return rows.to(dtype).contiguous()


def positions(arguments: dict[str, Any], seq: int, length: int) -> tuple[Tensor, int]:
    """Where the keys stand in the whole sequence, and how long that is."""
    world = arguments.get("cp_world_size", 1)
    if world == 1:
        return torch.arange(length), length
    total, run = int(arguments["cp_tot_seqused_k"][seq]), arguments["cp_interleave"]
    position = torch.arange(total)
    return position[position // run % world == arguments["cp_rank"]], total


def bias_of(arguments: dict[str, Any], seq: int, n: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores, ``[n, length]`` or ``[num_q_heads, n, length]``; None if nothing."""
    left, right = arguments.get("window_size", (-1, -1))
    right = 0 if arguments["causal"] else right
    slopes, sinks = arguments.get("alibi_slopes"), arguments.get("s_aux")
    masked = left >= 0 or (right >= 0 and not (n == 1 and right == 0))
    if not masked and slopes is None and sinks is None:
        return None
    position, total = positions(arguments, seq, length)
    distance = position - torch.arange(total - n, total)[:, None]
    bias = torch.zeros(n, length, dtype=dtype)
    if right >= 0:
        bias.masked_fill_(distance > right, float("-inf"))
    if left >= 0:
        bias.masked_fill_(distance < -left, float("-inf"))
    if slopes is not None:
        slopes = slopes[seq] if slopes.dim() == 2 else slopes
        bias = bias - (slopes[:, None, None] * distance.abs()).to(dtype)
    return bias


def factor(arguments: dict[str, Any], name: str, seq: int) -> Any:
    """A descale as a float, or ``[num_kv_heads]``."""
    descale = arguments.get(name, 1.0)
    return descale[seq] if isinstance(descale, Tensor) and descale.dim() == 2 else descale


def per_head(factor: Any, num_q_heads: int) -> Any:
    """A factor of each query head, to multiply ``[tokens, num_q_heads, d]``."""
    if isinstance(factor, Tensor) and factor.dim() == 1:
        return factor.repeat_interleave(num_q_heads // len(factor))[:, None]
    return factor


def with_descales(q: Tensor, factor: Any) -> Tensor:
    """The query times its factor, in its own dtype."""
    return (
        q if isinstance(factor, float) and factor == 1.0 else (q * per_head(factor, q.shape[1])).to(q.dtype)
    )


def attend_one(arguments: dict[str, Any], seq: int, begin: int, end: int, length: int) -> Tensor:
    """``[n, num_q_heads, d_v]`` of one sequence."""
    q, dtype = arguments["q"][begin:end], arguments["q"].dtype
    n, num_q_heads = q.shape[:2]
    k = gather(arguments["k"], arguments, seq, length, dtype)
    k_view, v_view = arguments["k"], arguments["v"]
    inside = k_view.data_ptr() == v_view.data_ptr() and k_view.stride() == v_view.stride()
    d_v = v_view.shape[-1]
    v = k[..., :d_v] if inside and "q_v" not in arguments else gather(v_view, arguments, seq, length, dtype)
    q_by, k_by, v_by = (factor(arguments, f"{name}_descale", seq) for name in "qkv")
    q = with_descales(q, q_by * k_by)
    if "q_v" in arguments:
        q_v = with_descales(arguments["q_v"][begin:end], q_by * v_by)
        q, k = torch.cat([q, q_v], -1), torch.cat([k, v], -1)
    bias = bias_of(arguments, seq, n, length, dtype)
    causal = n == length and n > 1 and arguments["causal"] and "alibi_slopes" not in arguments
    causal = causal and "window_size" not in arguments and "s_aux" not in arguments
    causal = causal and arguments.get("cp_world_size", 1) == 1
    if arguments["softcap"] > 0:
        out = capped(arguments, q, k, v, bias)
    else:
        sinks = arguments.get("s_aux")
        if sinks is not None:  # one more key, of score 0 and value 0, biased by the sink
            assert bias is not None
            k, v = pad(k, (0, 0, 0, 0, 0, 1)), pad(v, (0, 0, 0, 0, 0, 1))
            column = sinks[:, None, None].expand(-1, n, 1)
            bias = torch.cat([bias.expand(num_q_heads, n, length), column.to(dtype)], -1)
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
            attn_mask=None if causal or bias is None else bias.expand(1, 1, -1, -1) if bias.dim() == 2
            else bias[None],
            is_causal=causal, scale=arguments["softmax_scale"], enable_gqa=k.shape[1] != num_q_heads,
        )[0].transpose(0, 1)  # fmt: skip
    return with_descales(out, v_by)


def capped(arguments: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention with a softcap: PyTorch has no function for it."""
    n, num_q_heads, d = q.shape
    heads = k.shape[1]
    rows = q.unflatten(1, (heads, -1)).permute(1, 2, 0, 3).reshape(heads, -1, d)
    scores = rows @ k.permute(1, 2, 0) * arguments["softmax_scale"]
    cap = arguments["softcap"]
    scores = (torch.tanh(scores / cap) * cap).unflatten(1, (-1, n)).flatten(0, 1)
    if bias is not None:
        scores = scores + bias
    sinks = arguments.get("s_aux")
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, n, 1)], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[0]]
    out = weights.unflatten(0, (heads, -1)).flatten(1, 2) @ v.transpose(0, 1)
    result: Tensor = out.view(num_q_heads, n, -1).transpose(0, 1)
    return result


def baseline(arguments: dict[str, Any]) -> Tensor:
    """Attention of all sequences, each gathered and computed on its own."""
    q, v = arguments["q"], arguments["v"]
    out: Tensor = q.new_empty(*q.shape[:2], v.shape[-1])
    starts = arguments["cu_seqlens_q"].tolist()
    used = arguments.get("seqused_k")
    lengths = (arguments["cu_seqlens_k"].diff() if used is None else used).tolist()
    for seq, length in enumerate(lengths):
        begin, end = starts[seq], starts[seq + 1]
        if begin == end:
            continue
        if length == 0:
            out[begin:end] = 0
        else:
            out[begin:end] = attend_one(arguments, seq, begin, end, length)
    return out


def ours(arguments: dict[str, Any]) -> Tensor:
    """The call that is timed."""
    result = anystride.flash_attn_varlen_func(**arguments, backend="cpu")
    return result[0] if isinstance(result, tuple) else result


def check(inputs: Inputs) -> None:
    """Both against the reference: a wrong answer must not be timed.

    Raises:
        SystemExit: One is off by more than its dtype explains.
    """
    result = anystride.flash_attn_varlen_func(**inputs.kwargs, backend="reference")
    right = (result[0] if isinstance(result, tuple) else result)[: inputs.case.total_q].double()
    errors = []
    for function in (baseline, ours):
        got = function(inputs.kwargs)[: inputs.case.total_q].double()
        # Rows that see no key: PyTorch's attention has no answer of its own for them.
        seen = (right != 0).any(-1)
        errors.append((got - right)[seen].abs().max().item() if seen.any() else 0.0)
    allowed = (
        max(2 * errors[0], torch.finfo(inputs.case.torch_dtype).eps * right.abs().amax().item())
        if (right.numel())
        else 0.0
    )
    if not errors[1] <= allowed or not errors[0] < 0.1:
        raise SystemExit(f"{inputs.case.name}: wrong: baseline {errors[0]:.2e}, anystride {errors[1]:.2e}")


def time_in_turn(
    functions: list[Callable[[], object]], budget: float, clock: Callable[[], float]
) -> list[float]:
    """Least milliseconds of a call of each function, measured in turn for about ``budget`` seconds."""
    calls = []
    for function in functions:
        function()
        start = clock()
        function()
        calls.append(max(1, int(0.002 / (clock() - start))))
    best = [float("inf")] * len(functions)
    stop = clock() + budget
    rounds = 0
    while rounds < 5 or clock() < stop:
        for index, (function, count) in enumerate(zip(functions, calls, strict=True)):
            start = clock()
            for _ in range(count):
                function()
            best[index] = min(best[index], (clock() - start) / count)
        rounds += 1
    return [1e3 * seconds for seconds in best]


def measure(case: Case, budget: float, clock: Callable[[], float]) -> Row:
    layout = next(layout for layout in map(find_layout, LAYOUTS) if not compatible(case, layout))
    inputs = make_inputs(case, layout, guard=False)
    inputs.kwargs["return_softmax_lse"] = False
    check(inputs)
    both: list[Callable[[], object]] = [lambda: baseline(inputs.kwargs), lambda: ours(inputs.kwargs)]
    times = time_in_turn(both, budget, clock)
    rows = (case.total_q + case.padded_q) * case.num_q_heads
    results = rows * case.d_v * case.torch_dtype.itemsize
    baseline_ms, anystride_ms = times
    extra = max(0, peak_bytes(both[1]) - results)
    return Row(case.name, layout.name, baseline_ms, anystride_ms, extra / 1e6)


def has_work(case: Case) -> bool:
    """Whether a sequence has both queries and keys: else there is nothing to gather or to attend to."""
    return any(n and length for n, length in zip(case.q_lens, case.seqused_k, strict=True))


def show(rows: list[Row]) -> None:
    titles = ("case", "layout", "baseline ms", "anystride ms", "ratio", "extra MB")
    cells = [
        (
            r.case,
            r.layout,
            f"{r.baseline_ms:.3f}",
            f"{r.anystride_ms:.3f}",
            f"{r.ratio:.2f}",
            f"{r.extra_mb:.1f}",
        )
        for r in rows
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in (titles, *cells):
            print(f"{line[0]:<26}{line[1]:<24}" + "".join(f"{cell:>14}" for cell in line[2:]))
        return
    table = Table()
    for title in titles:
        table.add_column(title, justify="left" if title in ("case", "layout") else "right", no_wrap=True)
    for line in cells:
        table.add_row(*line)
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--threads", type=int, default=0, help="threads of PyTorch; 0 leaves its own choice")
    parser.add_argument("--seconds", type=float, default=0.4, help="time spent on a case")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time, with one thread: for a machine that is busy"
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        options.threads = 1
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = [case for case in select("cpu") if options.only in case.name and has_work(case)]
    rows = [measure(case, options.seconds, clock) for case in cases]
    if not rows:
        parser.error(f"no case has {options.only!r} in its name")
    show(rows)
    median, least = statistics.median(r.ratio for r in rows), min(rows, key=lambda r: r.ratio)
    largest = max(rows, key=lambda r: r.extra_mb)
    print(f"{len(rows)} cases, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"median ratio {median:.2f} (needs {MEDIAN_RATIO})")
    models = [r.ratio for r in rows if "model" in find_case(r.case).tags]
    if models:
        print(f"{'of models':>12} {statistics.median(models):.2f}, least {min(models):.2f}")
    slower = sum(r.ratio < MIN_RATIO for r in rows)
    print(f"slower       {slower} of {len(rows)} cases")
    print(f"least ratio  {least.ratio:.2f} (needs {MIN_RATIO}), {least.case}")
    print(f"extra memory {largest.extra_mb:.1f} MB (at most {MOST_EXTRA_MB:.0f}), {largest.case}")
    if options.json:
        facts = {"median_ratio": median, "min_ratio": least.ratio, "torch": torch.__version__}
        facts["threads"] = torch.get_num_threads()
        table = [r._asdict() | {"ratio": r.ratio} for r in rows]
        options.json.write_text(json.dumps({**facts, "rows": table}, indent=1) + "\n")
    met = median >= MEDIAN_RATIO and least.ratio >= MIN_RATIO and largest.extra_mb <= MOST_EXTRA_MB
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
