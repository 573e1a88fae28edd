"""A sharded cache on several GPUs of one host, with NCCL: right, then how long it takes.

    python tests/multi_gpu.py --check                     # on all GPUs that are here: minutes, of compiling
    python tests/multi_gpu.py --time --json results.jsonl # a table, and a line of JSON for each of its rows

Checks: the cases of ``sharded.py`` against the law, and a captured call that is replayed with other lengths,
blocks and queries. Times: MLA of 16 heads over all ranks, 576 / 512, bf16, blocks of 64, interleave 64, one
query token, from events around the replay of a graph of ``CALLS`` calls, which share a schedule as the
layers of a model do and read caches of their own where memory allows. Each shape is held to float64 first,
and so is the same call on one GPU. Not collected by pytest: it starts a process for each GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sharded import MORE, RUNS, SHARES, Result, assert_whole, attend, attend_to_runs
from torch import Tensor

import anystride
from anystride import flash_attn_varlen_func
from anystride.distributed import ShardedDecode, shard_lengths
from anystride.testing import select
from anystride.testing.judgement import assert_close_as_plain

HEADS, D_QK, D_V, BLOCK = 16, 576, 512, 64
SCALE = (128 + 64) ** -0.5
BATCHES, LENGTHS = (1, 4, 16), (131072, 524288, 1048576)
CALLS = 8  # in a graph
REPLAYS = 9
MOST_BLOCKS = max(BATCHES) * max(LENGTHS) // BLOCK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="hold results to the law")
    parser.add_argument(
        "--time", action="store_true", help="measure, at shapes whose results are checked first"
    )
    parser.add_argument("--json", type=Path, help="append each row of the table to this file")
    options = parser.parse_args()
    if not (options.check or options.time):
        parser.error("nothing to do: --check, --time, or both")
    count = torch.cuda.device_count()
    if count < 2:
        parser.error(f"needs 2 GPUs or more; {count} here")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (count, (Path(folder) / "store").as_uri(), options), nprocs=count)  # type: ignore[attr-defined, no-untyped-call]


def work(rank: int, count: int, place: str, options: argparse.Namespace) -> None:
    """What one process does on its GPU. Groups of fewer ranks leave the others waiting on the host."""
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=place, rank=rank, world_size=count, timeout=timedelta(minutes=3)
    )  # fmt: skip
    host = dist.new_group(backend="gloo")
    sizes = [size for size in (1, 2, 4, 8) if size <= count]
    groups = {size: dist.new_group(list(range(size))) for size in sizes}
    if rank == 0:
        name, nccl = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.nccl.version()))
        print(f"{count} x {name}, torch {torch.__version__}, NCCL {nccl}, anystride {anystride.__version__}")
        print({name: value for name, value in os.environ.items() if name.startswith("NCCL_")})
    for size in sizes[1:] if options.check else ():
        dist.barrier(host)
        if rank < size:
            began = time.monotonic()
            replays = sum(check_replays(groups[size], gather) for gather in (True, False))
            cases = check_cases(groups[size], size)
            if rank == 0:
                took = time.monotonic() - began
                print(f"{size} GPUs: {cases} cases and {replays} replays are right, {took:.0f} s", flush=True)
    if options.time:
        time_all(rank, groups, host, options.json)
    dist.barrier(host)
    dist.destroy_process_group()


def check_cases(group: dist.ProcessGroup, size: int) -> int:
    """The cases that this many ranks hold; rank 0 holds all rows to the law."""
    done = 0
    for case in (*select("cp"), *MORE):
        if case.cp is None or case.cp.world_size != size:
            continue
        for gather in (True, False):
            gather_to_law(group, case, attend(group, case, gather, "cuda"), gather)
            done += 1
    shares = {2: ((16, 0), (3, 13)), 4: tuple(SHARES.values())}.get(size, ())
    for case in RUNS:
        for share in shares:
            result = attend_to_runs(group, case, share, False, "cuda")
            gather_to_law(group, case, result, False)
            done += 1
    return done


def gather_to_law(group: dist.ProcessGroup, case: Any, result: Result, gather: bool) -> None:
    results: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(results, tuple(x.cpu() for x in result), group)
    if dist.get_rank(group) == 0:
        try:
            assert_whole(case, results, gather)
        except AssertionError as error:
            raise AssertionError(f"{case.name}, heads gathered: {gather}: {error}") from None


class Step:
    """A decoding step over a cache that this rank holds a part of; all ranks draw the same cache.

    The memory of every rank has the whole cache, so that it can also be read as one; as a rank of several it
    reads its own blocks, which are neighbours. Block ``i`` of a sequence lives on rank ``i % world_size``.

    Args:
        cache: ``[num_blocks, BLOCK, 1, D_QK]``.
        batch: Sequences.
        blocks: Of each sequence, over all ranks.
        first: The first block of the cache that the step may use.
        group: None on one GPU.
        gather: Whether each rank has heads of its own.
    """

    def __init__(
        self,
        cache: Tensor,
        batch: int,
        blocks: int,
        first: int,
        group: dist.ProcessGroup | None,
        gather: bool,
    ) -> None:
        self.size, self.rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        share = -(-blocks // self.size)  # of a sequence on a rank
        index = torch.arange(blocks, device="cuda")
        at = (index % self.size * batch)[None, :] * share + index[None, :] // self.size
        at = at + (torch.arange(batch, device="cuda") * share)[:, None] + first
        self.whole_table = at.to(torch.int32)
        self.table = self.whole_table[:, self.rank :: self.size]
        self.k, self.v, self.batch, self.most = cache, cache[..., :D_V], batch, share * BLOCK
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        self.totals = torch.zeros(batch, dtype=torch.int32, device="cuda")
        self.lengths = torch.zeros(batch, dtype=torch.int32, device="cuda")
        generator = torch.Generator().manual_seed(first + batch)
        self.q = torch.randn(batch, HEADS, D_QK, generator=generator).to("cuda", torch.bfloat16)
        heads = HEADS // self.size if gather else HEADS
        self.own = slice(self.rank * heads, (self.rank + 1) * heads) if gather else slice(None)
        self.decode: ShardedDecode | None = None
        if group is not None:
            self.decode = ShardedDecode(
                group, num_q_heads=heads, num_kv_heads=1, d_qk=D_QK, d_v=D_V, softmax_scale=SCALE,
                cp_interleave=BLOCK, gather_heads=gather,
            )  # fmt: skip

    def set_lengths(self, lengths: Tensor) -> None:
        self.totals.copy_(lengths)
        self.lengths.copy_(shard_lengths(self.totals, self.size, self.rank, BLOCK))

    def metadata(self) -> Tensor:
        if self.decode is not None:
            return self.decode.scheduler_metadata(self.lengths, 1, self.most)
        return anystride.get_scheduler_metadata(
            self.batch, 1, self.most, HEADS, 1, D_QK, self.lengths, headdim_v=D_V
        )

    def run(self, metadata: Tensor | None = None) -> Result:
        """The call of an engine: over all ranks."""
        if self.decode is None:
            return self.local(metadata)
        result = self.decode(
            self.q[:, self.own], self.k, self.v, 1, self.starts, self.most, seqused_k=self.lengths,
            cp_tot_seqused_k=self.totals, block_table=self.table, scheduler_metadata=metadata,
            return_softmax_lse=True,
        )  # fmt: skip
        assert isinstance(result, tuple)
        return result

    def local(self, metadata: Tensor | None = None) -> Result:
        """This rank's tokens alone, all heads."""
        return self._plain(self.table, self.lengths, self.most, metadata)

    def alone(self) -> Result:
        """The whole cache on this GPU."""
        return self._plain(self.whole_table, self.totals, self.whole_table.shape[1] * BLOCK, None)

    def _plain(self, table: Tensor, lengths: Tensor, most: int, metadata: Tensor | None) -> Result:
        result = flash_attn_varlen_func(
            self.q, self.k, self.v, 1, self.starts, most, seqused_k=lengths, block_table=table,
            softmax_scale=SCALE, causal=False, return_softmax_lse=True, scheduler_metadata=metadata,
        )  # fmt: skip
        assert isinstance(result, tuple)
        return result

    def communicate(self) -> None:
        """The collectives of a call, with what they must put in order for them, and nothing else."""
        assert self.decode is not None
        q = self.q[:, self.own]
        if self.decode.gather_heads:
            q, _ = self.decode._gather_queries(q, None)
        send, _, _ = self.decode._partial_rows(q)
        self.decode._exchange(send, q.shape[0])

    def law(self, dtype: torch.dtype) -> Result:
        """The formula in plain PyTorch on the GPU, one sequence at a time, with every result in ``dtype``."""
        outs, lses = [], []
        for seq, length in enumerate(self.totals.tolist()):
            rows = self.k[self.whole_table[seq].long()].flatten(0, 2)[:length].to(dtype)
            scores = (self.q[seq].to(dtype) @ rows.T) * SCALE
            outs.append(torch.softmax(scores, -1) @ rows[:, :D_V])
            lses.append(scores.to(torch.promote_types(dtype, torch.float32)).logsumexp(-1))
        return torch.stack(outs), torch.stack(lses, 1)

    def check(self) -> Result:
        """Hold this rank's rows, and those of one GPU, to float64."""
        out, lse = self.run()
        (right_out, right_lse), (plain_out, plain_lse) = self.law(torch.float64), self.law(torch.bfloat16)
        for name, (got, got_lse), heads in (
            ("", (out, lse), self.own),
            ("alone: ", self.alone(), slice(None)),
        ):
            assert_close_as_plain(
                f"{name}out", got, plain_out[:, heads], right_out[:, heads].cpu(), torch.bfloat16
            )
            assert_close_as_plain(
                f"{name}lse", got_lse, plain_lse[heads], right_lse[heads].cpu(), torch.float32
            )
        return out, lse


def captured(body: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what the body launches, after it has run once: NCCL and Triton set themselves up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        body()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks about events from a thread of its own, which must not end the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        kept = body()
    return graph, kept


def check_replays(group: dist.ProcessGroup, gather: bool) -> int:
    """One graph, replayed with lengths from nothing to all, other blocks and other queries."""
    step = Step(drawn(600), 4, 130, 0, group, gather)
    step.set_lengths(torch.tensor([8000, 65, 1, 300]))
    graph, (out, lse) = captured(step.run)
    replays = ([8000, 65, 1, 300], [1, 8320, 64, 0], [4097, 3, 8191, 129], [0, 0, 0, 5])
    for lengths in replays:
        step.set_lengths(torch.tensor(lengths))
        step.q.copy_(step.q.roll(1, 0))
        step.whole_table.add_(7)
        graph.replay()
        torch.cuda.synchronize()
        eager_out, eager_lse = step.check()
        assert torch.equal(out, eager_out), "a replay gives other bits than the eager call"
        assert torch.equal(lse, eager_lse), "a replay gives other bits than the eager call"
    return len(replays)


def drawn(num_blocks: int) -> Tensor:
    """A cache ``[num_blocks, BLOCK, 1, D_QK]`` of random rows, the same on every rank."""
    generator = torch.Generator("cuda").manual_seed(1)
    cache = torch.empty(num_blocks, BLOCK, 1, D_QK, dtype=torch.bfloat16, device="cuda")
    return cache.normal_(generator=generator)


def time_all(
    rank: int, groups: dict[int, dist.ProcessGroup], host: dist.ProcessGroup, path: Path | None
) -> None:
    cache = drawn(MOST_BLOCKS)
    if rank == 0:
        print(f"{'':33}{'us a call':>11}{'local':>9}{'moving':>9}{'rest':>8}{'lost':>7}{'speed-up':>10}")
    for length in LENGTHS:
        for batch in BATCHES:
            alone = 0.0
            for size, group in groups.items():
                for gather in (True, False) if size > 1 else (False,):
                    dist.barrier(host)
                    if rank >= size:
                        continue
                    row = time_one(cache, batch, length, size, group, gather)
                    alone = alone or row["us"]
                    row["speed_up"] = alone / row["us"]
                    if rank == 0:
                        report(row, path)


def time_one(
    cache: Tensor, batch: int, length: int, size: int, group: dist.ProcessGroup, gather: bool
) -> dict[str, Any]:
    blocks = length // BLOCK
    layers = min(CALLS, MOST_BLOCKS // (batch * blocks))
    steps = []
    for layer in range(layers):
        first = layer * batch * blocks
        steps.append(Step(cache, batch, blocks, first, group if size > 1 else None, gather))
        steps[-1].set_lengths(torch.full((batch,), length))
    steps[0].check()

    def layered(call: Callable[[Step, Tensor], object]) -> float:
        """Microseconds of a call, of ``CALLS`` in a graph, with a share of what they share."""

        def body() -> None:
            metadata = steps[0].metadata()
            for i in range(CALLS):
                call(steps[i % layers], metadata)

        return microseconds(body) / CALLS

    def communicate() -> None:
        for i in range(CALLS):
            steps[i % layers].communicate()

    local = layered(Step.local)
    moving = microseconds(communicate) / CALLS if size > 1 else 0.0
    whole = layered(Step.run) if size > 1 else local
    # The slowest rank says when a step is over.
    told: list[Any] = [None] * size
    dist.all_gather_object(told, (whole, local, moving), group)
    whole, local, moving = (max(times) for times in zip(*told, strict=True))
    return {
        "gpus": size,
        "heads": "own" if gather else "all",
        "batch": batch,
        "kv": length,
        "us": whole,
        "local_us": local,
        "moving_us": moving,
        "lost": 1 - local / whole,
    }


def microseconds(body: Callable[[], Any]) -> float:
    """The median time of a replay of what the body launches, on this GPU."""
    graph, _ = captured(body)
    for _ in range(2):
        graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times: list[float] = [begin.elapsed_time(end) for begin, end in events]
    return 1e3 * statistics.median(times)


def report(row: dict[str, Any], path: Path | None) -> None:
    rest = row["us"] - row["local_us"] - row["moving_us"]
    name = f"b {row['batch']}, kv {row['kv'] >> 10}k, {row['gpus']} GPUs, {row['heads']} heads"
    print(
        f"{name:33}{row['us']:11.1f}{row['local_us']:9.1f}{row['moving_us']:9.1f}{rest:8.1f}"
        f"{row['lost']:7.1%}{row['speed_up']:9.2f}x",
        flush=True,
    )
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
