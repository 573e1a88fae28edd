"""Other projects' kernels, each called as its own project documents: for the kit and the benchmark.

A :class:`Peer` takes the arguments of ``anystride.flash_attn_varlen_func`` by name. ``prepare`` makes of them
what the peer wants (page lists, schedules, workspaces; never a copy of the cache) and returns a call without
arguments, which a benchmark repeats. ``kernel`` has the entry's signature and does both at once.

What a peer documents as unsupported is refused by :class:`Refused`, in its own words where it has some. A
peer that is not installed, nor in the folder that ``load`` is given, is :class:`Absent`.
"""

from anystride.peers.peer import Absent, Peer, Refused

__all__ = ["Absent", "Peer", "Refused"]
