"""FlashInfer's lse of a query that sees no key is finite; right is -inf. Argument: folder of peers."""

import sys
from pathlib import Path

import torch

from anystride.peers.folder import load_wheels

load_wheels(Path(sys.argv[1]), "flashinfer")
import flashinfer  # noqa: E402  # importable only now

torch.set_default_device("cuda")
space, kind = torch.empty(1 << 28, dtype=torch.int8), torch.bfloat16
wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend="fa2")
k, v = torch.randn(2, 3, 16, 2, 128, dtype=kind)


def lse_of_first_row(rows: list[int], starts: list[int], last: list[int], causal: bool) -> list[float]:
    lists = (torch.tensor(x, dtype=torch.int32) for x in (rows, starts, [1], last))
    wrapper.plan(*lists, 8, 2, 128, 16, causal=causal, q_data_type=kind, kv_data_type=kind)
    _out, lse = wrapper.run(torch.randn(rows[-1], 8, 128, dtype=kind), (k, v), return_lse=True)
    return lse[0].tolist()


masked = lse_of_first_row([0, 3], [0, 1], [1], causal=True)  # three queries and one key: the last sees it
print("3 queries, 1 key, causal: lse of the first, to base 2:", masked, "right: -inf")
empty = lse_of_first_row([0, 1, 2], [0, 0, 1], [0, 9], causal=False)  # the first sequence has no page
print("a sequence without keys: lse, to base 2:", empty, "right: -inf")
sys.exit(int(any(lse != -torch.inf for lse in masked + empty)))
