"""Other projects' kernels, each called as its own project documents: for the kit and the benchmark.

A :class:`Peer` takes the arguments of ``anystride.flash_attn_varlen_func`` by name. ``prepare`` makes of them
what the peer wants (page lists, schedules, workspaces; never a copy of the cache) and returns a call without
arguments, which a benchmark repeats. ``kernel`` has the entry's signature and does both at once.

What a peer documents as unsupported is refused by :class:`Refused`, in its own words where it has some. A
peer that is not installed, nor in the folder that ``load`` is given, is :class:`Absent`.
"""

from anystride.peers.flash_attn import FLASH_ATTN_3
from anystride.peers.flash_mla import FLASH_MLA
from anystride.peers.flashinfer import FLASHINFER_DECODE, FLASHINFER_FA2, FLASHINFER_FA3
from anystride.peers.flex_attention import FLEX_ATTENTION
from anystride.peers.gathered_sdpa import GATHERED_SDPA
from anystride.peers.peer import Absent, Peer, Refused
from anystride.peers.vllm_triton import VLLM_TRITON_DECODE, VLLM_TRITON_UNIFIED

__all__ = ["PEERS", "Absent", "Peer", "Refused", "find_peer"]

PEERS: tuple[Peer, ...] = (
    FLASH_MLA,
    FLASH_ATTN_3,
    FLASHINFER_FA2,
    FLASHINFER_FA3,
    FLASHINFER_DECODE,
    VLLM_TRITON_DECODE,
    VLLM_TRITON_UNIFIED,
    FLEX_ATTENTION,
    GATHERED_SDPA,
)


def find_peer(name: str) -> Peer:
    """The peer of this name.

    Raises:
        KeyError: There is none; the text lists all names.
    """
    for peer in PEERS:
        if peer.name == name:
            return peer
    raise KeyError(f"peers are {', '.join(peer.name for peer in PEERS)}")
