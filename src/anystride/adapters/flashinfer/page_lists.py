"""What both wrappers share: lists of pages turned into a block table, buffers, and the dialect of the lse.

``PagedBatch.fill`` runs once a step, outside of a CUDA graph, and reads how long the lists are on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anystride.adapters.translation import invalid
from anystride.problem import bucket

__all__ = ["PagedBatch", "all_given", "check_planned", "copy_lists", "lse_by_rows"]


class PagedBatch:
    """What the layers of a step read: tables, lengths, and the share-out of the work.

    Args:
        operation: Who fills it in, for messages.
        device: Where everything lies.
        frozen: None, or ``(requests, room for pages)``: a captured graph reads what is here. Then every
            tensor keeps its address and its shape from the first step on, the table has an equal share of the
            room for each request, and ``max_query_len`` is that of the first step.

    Attributes:
        starts: ``[batch + 1]`` int32: where each request's query tokens begin; None before the first step.
        lengths: ``[batch]`` int32: tokens in the cache of each request.
        table: ``[batch, columns]`` int32: its pages.
        schedule: From :func:`anystride.get_scheduler_metadata`.
        max_query_len: Upper bound on the query tokens of a request.
        longest: Upper bound on its tokens in the cache.
    """

    def __init__(self, operation: str, device: torch.device, frozen: tuple[int, int] | None) -> None:
        self.operation, self.device, self.frozen = operation, device, frozen
        self.starts: Tensor | None = None
        self.lengths: Tensor | None = None
        self.table: Tensor | None = None
        self.schedule: Tensor | None = None
        self.max_query_len = self.longest = 0

    def fill(
        self, starts: Tensor, indptr: Tensor, indices: Tensor, lengths: Tensor, page_size: int
    ) -> tuple[Tensor, Tensor]:
        """Take the lists of a step.

        Args:
            starts: ``[batch + 1]`` integers, on any device, as are the others: becomes ``starts``.
            indptr: ``[batch + 1]`` integers: where the pages of each request begin in ``indices``.
            indices: Integers: pages of all requests, one request after the other.
            lengths: ``[batch]`` integers: becomes ``lengths``.
            page_size: Tokens of a page.

        Returns:
            ``starts`` and ``lengths``, on the device.

        Raises:
            InvalidInputError: A step does not fit what a captured graph reads.
        """
        batch = lengths.shape[0]
        query_len = max(starts.diff().tolist(), default=0)
        pages = max(indptr.diff().tolist(), default=0)
        columns = bucket(pages)  # few widths, so that few plans are made
        if self.frozen is not None:
            columns, query_len = self._fits(batch, pages, query_len)
        where = indptr.to(self.device, torch.int64)[:-1, None] + torch.arange(columns, device=self.device)
        here = indices.to(self.device, torch.int32)
        # Past the end of a request's list stands what comes behind it: nobody reads that.
        table = here[where.clamp(max=len(here) - 1)] if len(here) else torch.zeros_like(where).int()
        self.table = self._keep(self.table, table)
        self.starts = self._keep(self.starts, starts.to(self.device, torch.int32, copy=True))
        self.lengths = self._keep(self.lengths, lengths.to(self.device, torch.int32, copy=True))
        self.max_query_len, self.longest = query_len, columns * page_size
        return self.starts, self.lengths

    def keep_schedule(self, schedule: Tensor) -> None:
        """Take the share-out of the work of a step."""
        self.schedule = self._keep(self.schedule, schedule)

    def _fits(self, batch: int, pages: int, query_len: int) -> tuple[int, int]:
        """Columns of the table, and the bound on query tokens, that a captured graph has."""
        assert self.frozen is not None  # or nothing need fit
        requests, room = self.frozen
        if batch != requests:
            raise invalid(
                self.operation,
                "with use_cuda_graph the number of requests is that of the buffers.",
                f"{batch} requests",
                f"{requests}",
            )
        columns = max(1, -(-room // max(requests, 1)))
        if pages > columns:
            raise invalid(
                self.operation,
                "with use_cuda_graph no request may have more pages than an equal share of the buffer.",
                f"a request of {pages} pages, a buffer of {room} for {requests} requests",
                f"a buffer of {requests * pages} pages or more",
                "reserve the number of requests times the pages of the longest",
            )
        frozen_len = self.max_query_len if self.table is not None else query_len
        if query_len > frozen_len:
            raise invalid(
                self.operation,
                "with use_cuda_graph no request may have more query tokens than at the first plan.",
                f"{query_len}",
                f"{frozen_len} or fewer",
                "a wrapper of its own for each query length",
            )
        return columns, frozen_len

    def _keep(self, old: Tensor | None, new: Tensor) -> Tensor:
        if self.frozen is None or old is None:
            return new
        if old.shape != new.shape:
            raise invalid(
                self.operation,
                "with use_cuda_graph shapes are those of the first plan.",
                f"a tensor of {list(new.shape)}",
                f"{list(old.shape)}",
                "a wrapper of its own for each shape",
            )
        return old.copy_(new)


def all_given(name: str, names: str, buffers: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """The buffers, if none of them is missing."""
    given = tuple(buffer for buffer in buffers if buffer is not None)
    if len(given) != len(buffers):
        raise invalid(
            name,
            f"use_cuda_graph needs {names}.",
            "None among them",
        )
    return given


def copy_lists(buffers: tuple[Tensor, ...], lists: tuple[Tensor, ...]) -> None:
    """Copy what was planned into the caller's buffers, if there are any."""
    for buffer, given in zip(buffers, lists, strict=False):
        buffer[: len(given)].copy_(given)


def check_planned(name: str, batch: PagedBatch, q: Tensor, dtype: torch.dtype) -> None:
    """Fail without a plan, or with one for another dtype, whose shares of the work would be wrong."""
    if batch.schedule is None:
        raise invalid(
            name,
            "plan must be called before run.",
            "no plan",
        )
    if q.dtype != dtype:
        raise invalid(
            name,
            "q must have the dtype of plan.",
            str(q.dtype),
            f"q_data_type={dtype}",
        )


def lse_by_rows(lse: Tensor, given: Tensor | None, factor: float) -> Tensor:
    """``[num_heads, total_q]``, natural, as ``[total_q, num_heads]`` times a factor."""
    by_rows = lse.t()
    if given is not None:
        return torch.mul(by_rows, factor, out=given)
    return by_rows if factor == 1.0 else by_rows.mul_(factor)
