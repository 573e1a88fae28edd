"""A small language-model engine on paged attention: one file, two models, any layout of the cache.

    python examples/generate.py --model mla --layout M2
    python examples/generate.py --model gqa --layout G9 --check

From top to bottom: the cache (views into the memory that a layout of the catalogue describes) and
its blocks, one step of a batch, the two models (random weights: the tokens mean nothing), the
engine with continuous batching, and the command. New rows are written through the views by
``anystride.cache`` and read in place by ``anystride.flash_attn_varlen_func``. The models and the
engine do not know how the cache lies in memory. ``dense`` is a model without a cache, for ``--check``.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anystride import flash_attn_varlen_func, get_scheduler_metadata
from anystride.cache import store_kv, store_mla
from anystride.testing import CacheShape, Layout, find_layout
from anystride.testing.storage import Form

# ---- The cache ----------------------------------------------------------------------------------

# K and V of one layer, [num_pages, blocks_per_page, block_size, num_kv_heads, d_qk or d_v]. Block b
# is block b % blocks_per_page of page b // blocks_per_page; in most layouts a page is one block.
Views = tuple[Tensor, Tensor]
Row = tuple[Form, int, int, int]  # form of the cache, num_kv_heads, d_qk, d_v


def make_cache(
    layout: Layout, model: Model, num_blocks: int, block_size: int, dtype: torch.dtype
) -> list[Views]:
    """The views of every layer, full of NaN. ValueError if the layout cannot hold them."""
    form, num_kv_heads, d_qk, d_v = model.attentions[0].cache_row(layout)
    n, ours = model.num_layers, model.num_layers // 2
    shape = CacheShape(
        num_blocks, block_size, num_kv_heads, d_qk, d_v, dtype, form, layers=n,
        blocks_per_page=2 if layout.only == "pages" else 1,
    )  # fmt: skip
    if reason := layout.misfit(shape):
        raise ValueError(reason)
    if "H" not in layout.axes(shape) or layout.lookalike in ("overlap", "same_pointer"):
        raise ValueError(f"{layout.name} gives two rows the same bytes: they can only be read")
    # Where the layout keeps layers together there is one buffer, described from the middle layer.
    shared = "L" in layout.axes(shape)
    storages = [layout.build(shape, model.device) for _ in range(1 if shared else n)]
    places = [(s.buffers, place) for s in storages for place in (s.k_geometry, s.v_geometry)]
    if shared:
        others = [(storages[0].buffers, place) for place in storages[0].others[: 2 * (n - 1)]]
        places = others[: 2 * ours] + places + others[2 * ours :]
    views = [place.view(buffers) for buffers, place in places]
    return list(zip(views[::2], views[1::2], strict=True))


class BlockManager:
    """Hands out the blocks of the cache. A block id means the same block in every layer."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.free = list(range(num_blocks))

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def grow(self, blocks: list[int], num_tokens: int) -> bool:
        """Lengthen a request's list to hold its tokens. False, and no change: too few are free."""
        missing = self.blocks_for(num_tokens) - len(blocks)
        if missing > len(self.free):
            return False
        blocks.extend(self.free.pop() for _ in range(missing))
        return True

    def release(self, blocks: list[int]) -> None:
        self.free.extend(blocks)
        blocks.clear()


# ---- One step -----------------------------------------------------------------------------------


@dataclass
class Step:
    """A batch of prefill chunks and decode rows, one request after the other, for all layers."""

    tokens: Tensor  # [total_q]
    positions: Tensor  # [total_q], each in its own request
    slot_mapping: Tensor  # [total_q], where each new row goes
    max_seqlen_q: int
    cu_seqlens_q: Tensor  # [batch + 1], where each request's new tokens begin
    max_seqlen_k: int
    seqused_k: Tensor  # [batch], rows in the cache, the new ones included
    block_table: Tensor  # [batch, num_blocks]
    scheduler_metadata: Tensor  # the work of the step, shared out once
    backend: str | None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, q_v: Tensor | None = None
    ) -> Tensor:
        """``[total_q, num_q_heads, d_v]``, over a cache of any strides."""
        out = flash_attn_varlen_func(
            q, k, v, self.max_seqlen_q, self.cu_seqlens_q, self.max_seqlen_k,
            seqused_k=self.seqused_k, q_v=q_v, softmax_scale=softmax_scale, causal=True,
            block_table=self.block_table, scheduler_metadata=self.scheduler_metadata,
            backend=self.backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # a tuple only if the lse is asked for
        return out


# ---- The models ---------------------------------------------------------------------------------


def weight(n_in: int, n_out: int) -> Tensor:
    return torch.randn(n_in, n_out) / math.sqrt(n_in)


def rms_norm(x: Tensor) -> Tensor:
    """Without weights: in a model that was never trained they are ones."""
    return F.rms_norm(x, x.shape[-1:])


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate the halves of each head by the token's position. ``x``: ``[tokens, heads, d]``."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = (positions[:, None] * frequency)[:, None]  # [tokens, 1, half]
    a, b, cos, sin = *x.chunk(2, dim=-1), angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """The textbook: causal, over one whole sequence, all three ``[tokens, heads, d]``."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * softmax_scale
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


class GQA:
    """Attention as in Llama: several query heads share one head of K and V."""

    num_q_heads, num_kv_heads, d, softmax_scale = 6, 2, 32, 32**-0.5

    def __init__(self, hidden: int) -> None:
        self.w_q = 4 * weight(hidden, self.num_q_heads * self.d)  # scores as sharp as trained ones
        self.w_k = weight(hidden, self.num_kv_heads * self.d)
        self.w_v = weight(hidden, self.num_kv_heads * self.d)
        self.w_o = weight(self.num_q_heads * self.d, hidden)

    def cache_row(self, layout: Layout) -> Row:
        return "kv", self.num_kv_heads, self.d, self.d

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ((x @ w).unflatten(-1, (-1, self.d)) for w in (self.w_q, self.w_k, self.w_v))
        return rope(q, positions), rope(k, positions), v

    def paged(self, x: Tensor, step: Step, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q, k, v = self.project(x, step.positions)
        store_kv(k, v, k_cache, v_cache, step.slot_mapping)
        return step.attend(q, k_cache, v_cache, self.softmax_scale).flatten(1) @ self.w_o

    def dense(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self.project(x, positions)
        k, v = (t.repeat_interleave(self.num_q_heads // self.num_kv_heads, 1) for t in (k, v))
        return dense_attention(q, k, v, self.softmax_scale).flatten(1) @ self.w_o


class MLA:
    """Attention as in DeepSeek-V2: all heads share one row, a latent part and a rope part.

    A head's key is ``W_UK latent | rope part``, its value is ``W_UV latent``. ``dense`` forms them.
    ``paged`` does not: because ``q . (W_UK latent) = (q W_UK) . latent`` the query goes into the
    latent space, attention runs over the rows as they are, and W_UV is applied to its result.
    """

    num_q_heads, d_nope, d_rope, kv_lora_rank, d_v = 6, 32, 16, 64, 32
    softmax_scale = (d_nope + d_rope) ** -0.5  # by the width of the keys that dense forms

    def __init__(self, hidden: int) -> None:
        heads, rank = self.num_q_heads, self.kv_lora_rank
        self.w_q = 4 * weight(hidden, heads * (self.d_nope + self.d_rope))
        self.w_kv = weight(hidden, rank + self.d_rope)
        self.w_uk = weight(rank, heads * self.d_nope).unflatten(1, (heads, -1))
        self.w_uv = weight(rank, heads * self.d_v).unflatten(1, (heads, -1))
        self.w_o = weight(heads * self.d_v, hidden)

    def cache_row(self, layout: Layout) -> Row:
        """K the whole row and V its latent part, or K the rope part alone, as the layout has it."""
        if "row" in layout.forms and not layout.lookalike:
            return "row", 1, self.kv_lora_rank + self.d_rope, self.kv_lora_rank
        return "q_v", 1, self.d_rope, self.kv_lora_rank

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q = (x @ self.w_q).unflatten(-1, (self.num_q_heads, -1))
        q_nope, q_rope = q.split([self.d_nope, self.d_rope], dim=-1)
        latent, k_rope = (x @ self.w_kv)[:, None].split([self.kv_lora_rank, self.d_rope], dim=-1)
        return q_nope, rope(q_rope, positions), rms_norm(latent), rope(k_rope, positions)

    def paged(self, x: Tensor, step: Step, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q_nope, q_rope, latent, k_rope = self.project(x, step.positions)
        q_latent = torch.einsum("thn,rhn->thr", q_nope, self.w_uk)
        if k_cache.shape[-1] == self.d_rope:  # K is the rope part, V the latent part
            q, q_v, rope_cache = q_rope, q_latent, k_cache
        else:  # K is the row and V lies in it: where it begins, or after the rope part
            v_first = v_cache.storage_offset() == k_cache.storage_offset()
            q, q_v = torch.cat([q_latent, q_rope] if v_first else [q_rope, q_latent], dim=-1), None
            rope_cache = k_cache[..., self.kv_lora_rank :] if v_first else k_cache[..., : self.d_rope]
        store_mla(latent, k_rope, (v_cache, rope_cache), step.slot_mapping)
        out = step.attend(q, k_cache, v_cache, self.softmax_scale, q_v)
        return torch.einsum("thr,rhv->thv", out, self.w_uv).flatten(1) @ self.w_o

    def dense(self, x: Tensor, positions: Tensor) -> Tensor:
        q_nope, q_rope, latent, k_rope = self.project(x, positions)
        k_nope, v = (torch.einsum("tr,rhd->thd", latent[:, 0], w) for w in (self.w_uk, self.w_uv))
        k = torch.cat([k_nope, k_rope.expand(-1, self.num_q_heads, -1)], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        return dense_attention(q, k, v, self.softmax_scale).flatten(1) @ self.w_o


MODELS: dict[str, type[GQA | MLA]] = {"gqa": GQA, "mla": MLA}


class Model:
    """Embedding, layers of attention and SwiGLU, unembedding, in float32."""

    vocabulary, hidden, num_layers = 512, 96, 3

    def __init__(self, kind: str, seed: int, device: str = "cpu") -> None:
        torch.manual_seed(seed)
        self.device, h, layers = device, self.hidden, range(self.num_layers)
        with torch.device(device):
            self.embedding = weight(self.vocabulary, h)
            self.unembedding = weight(h, self.vocabulary)
            self.attentions = [MODELS[kind](h) for _ in layers]
            self.mlps = [[weight(h, 2 * h), weight(h, 2 * h), weight(2 * h, h)] for _ in layers]

    def logits(self, tokens: Tensor, attention: Callable[[int, Tensor], Tensor]) -> Tensor:
        """``[tokens, vocabulary]``. ``attention`` gets the number of the layer, and its input."""
        x = rms_norm(self.embedding[tokens])
        for layer, (w_gate, w_up, w_down) in enumerate(self.mlps):
            x = x + attention(layer, rms_norm(x))
            y = rms_norm(x)
            x = x + (F.silu(y @ w_gate) * (y @ w_up)) @ w_down
        return rms_norm(x) @ self.unembedding

    def paged(self, step: Step, cache: list[Views]) -> Tensor:
        """Of new tokens; their rows are written, all others are read from the cache."""
        attentions = self.attentions
        return self.logits(step.tokens, lambda i, x: attentions[i].paged(x, step, *cache[i]))

    def dense(self, tokens: list[int]) -> Tensor:
        """Of one whole sequence, without a cache."""
        attentions, positions = self.attentions, torch.arange(len(tokens), device=self.device)
        ids = torch.tensor(tokens, device=self.device)
        return self.logits(ids, lambda i, x: attentions[i].dense(x, positions))


def generate_dense(model: Model, prompt: list[int], max_new: int) -> list[int]:
    """Greedy tokens of the dense model."""
    tokens = list(prompt)
    for _ in range(max_new):
        tokens.append(int(model.dense(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


# ---- The engine ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """What was asked for, and how far it has come."""

    prompt: list[int]
    max_new: int
    arrival: int = 0  # the step before which it comes
    generated: list[int] = field(default_factory=list)
    num_cached: int = 0  # of its tokens, so many have rows in the cache
    blocks: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated


class Engine:
    """Continuous batching: requests join and leave between steps and share one pool of blocks.

    Each step brings every running request on by at most ``chunk`` tokens: the rest of its prompt,
    or the one token that it generated last. If too few blocks are free, the youngest request gives
    its own back and waits; later its rows are computed again.
    """

    def __init__(
        self, model: Model, layout: Layout, *, num_blocks: int = 24, block_size: int = 16,
        max_batch: int = 6, chunk: int = 32, dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> None:  # fmt: skip
        self.model, self.backend = model, backend
        self.cache = make_cache(layout, model, num_blocks, block_size, dtype)
        self.manager = BlockManager(num_blocks, block_size)
        self.num_blocks, self.max_batch, self.chunk = num_blocks, max_batch, chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.num_steps = self.num_preemptions = 0

    def submit(self, request: Request) -> None:
        """Queue a request. ValueError if it could not even run alone."""
        if not request.prompt or request.max_new < 1:
            raise ValueError("a request needs a prompt, and at least one token to generate")
        needed = self.manager.blocks_for(len(request.prompt) + request.max_new - 1)
        if needed > self.num_blocks:
            raise ValueError(f"the request needs {needed} blocks; the cache has {self.num_blocks}")
        self.waiting.append(request)

    def step(self) -> None:
        """Bring all running requests on; let waiting ones join as far as there is room."""
        work = self._schedule()
        step = self._make_step(work)
        logits = self.model.paged(step, self.cache)[step.cu_seqlens_q[1:] - 1]
        for (request, num_new), token in zip(work, logits.argmax(-1).tolist(), strict=True):
            request.num_cached += num_new
            if request.num_cached == len(request.tokens):  # else more of the prompt is to come
                request.generated.append(token)
                if len(request.generated) == request.max_new:
                    self.running.remove(request)
                    self._release(request)
        self.num_steps += 1

    def _schedule(self) -> list[tuple[Request, int]]:
        """Who takes part, each with its number of new tokens, for which it now has the blocks."""
        work: list[tuple[Request, int]] = []
        while len(work) < len(self.running):
            request = self.running[len(work)]
            num_new = min(self.chunk, len(request.tokens) - request.num_cached)
            if self.manager.grow(request.blocks, request.num_cached + num_new):
                work.append((request, num_new))
            else:
                youngest = self.running.pop()  # this request, or one that comes after it
                self._release(youngest)
                self.waiting.appendleft(youngest)
                self.num_preemptions += 1
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            if self.manager.blocks_for(len(request.tokens)) > len(self.manager.free):
                break  # first come, first served
            num_new = min(self.chunk, len(request.tokens))
            self.manager.grow(request.blocks, num_new)
            work.append((request, num_new))
            self.running.append(self.waiting.popleft())
        return work

    def _release(self, request: Request) -> None:
        """Take its blocks back, full of NaN: if anything still read them, it would show."""
        blocks = torch.tensor(request.blocks, device=self.model.device)
        for view in (view for views in self.cache for view in views):
            view[blocks // view.shape[1], blocks % view.shape[1]] = float("nan")
        self.manager.release(request.blocks)
        request.num_cached = 0

    def _make_step(self, work: list[tuple[Request, int]]) -> Step:
        def tensor(values: Iterable[Any], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=self.model.device)

        k, v = self.cache[0]
        block_size, num_kv_heads, d_qk = k.shape[2:]
        new = [(r, i) for r, n in work for i in range(r.num_cached, r.num_cached + n)]
        ids = (token for r, n in work for token in r.tokens[r.num_cached : r.num_cached + n])
        tokens = tensor(ids, torch.int64)
        positions = tensor((i for _, i in new), torch.int64)
        block = tensor((r.blocks[i // block_size] for r, i in new), torch.int64)
        slot_mapping = block * block_size + positions % block_size
        max_q = max(n for _, n in work)
        cu_seqlens_q = tensor(accumulate((n for _, n in work), initial=0))
        lengths = [r.num_cached + n for r, n in work]
        max_k, seqused_k = max(lengths), tensor(lengths)
        table = tensor(r.blocks + [-1] * (self.num_blocks - len(r.blocks)) for r, _ in work)
        num_q_heads = self.model.attentions[0].num_q_heads
        metadata = get_scheduler_metadata(
            len(work), max_q, max_k, num_q_heads, num_kv_heads, d_qk, seqused_k, torch.float32,
            v.shape[-1], cu_seqlens_q, causal=True,
        )  # fmt: skip
        return Step(
            tokens, positions, slot_mapping, max_q, cu_seqlens_q, max_k, seqused_k, table, metadata,
            self.backend,
        )  # fmt: skip


def serve(engine: Engine, requests: list[Request]) -> None:
    """Run until every request has its tokens. ``requests`` are in the order of their arrival."""
    arriving = deque(requests)
    while arriving or engine.waiting or engine.running:
        idle = not (engine.waiting or engine.running)
        while arriving and (idle or arriving[0].arrival <= engine.num_steps):
            engine.submit(arriving.popleft())
            idle = False
        engine.step()


# ---- The command --------------------------------------------------------------------------------


def random_requests(count: int, seed: int) -> list[Request]:
    """Prompts of 1 to 90 tokens, answers of 4 to 40; a new one before every other step."""
    draw, words = random.Random(seed), range(Model.vocabulary)
    sizes = [(draw.randint(1, 90), draw.randint(4, 40)) for _ in range(count)]
    return [Request(draw.choices(words, k=n), new, 2 * i) for i, (n, new) in enumerate(sizes)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate tokens from a cache of any layout.")
    parser.add_argument("--model", choices=MODELS, default="mla")
    parser.add_argument("--layout", help="a name or number of the catalogue; default M1 or G2")
    parser.add_argument("--backend", help="triton, cpu or reference; default: the first that can")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--block-size", type=int, default=16, help="tokens; the cache holds 384")
    parser.add_argument("--fp8", action="store_true", help="an e4m3 cache")
    parser.add_argument("--check", action="store_true", help="compare with the dense model")
    a = parser.parse_args()
    if a.check and a.fp8:
        parser.error("--check compares float32 with float32: leave --fp8 out")
    model = Model(a.model, a.seed, a.device)
    requests = random_requests(8, a.seed)
    try:
        layout = find_layout(a.layout or {"mla": "M1", "gqa": "G2"}[a.model])
        engine = Engine(
            model, layout, num_blocks=384 // a.block_size, block_size=a.block_size,
            dtype=torch.float8_e4m3fn if a.fp8 else torch.float32, backend=a.backend,
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        parser.error(error.args[0])
    begin = time.perf_counter()
    serve(engine, requests)
    seconds = time.perf_counter() - begin

    print(f"layout {layout.name}: {layout.description}\nused by {layout.users}")
    for name, view in zip("KV", engine.cache[0], strict=True):
        where = f"strides {view.stride()}, from element {view.storage_offset()} on"
        print(f"layer 0, {name}: {list(view.shape)} {view.dtype}, {where}")
    for i, request in enumerate(requests):
        print(f"request {i}, {len(request.prompt)} tokens:", *request.generated)
    count, steps = sum(request.max_new for request in requests), engine.num_steps
    print(f"{count} tokens in {steps} steps, {engine.num_preemptions} preemptions,", end=" ")
    print(f"{seconds:.2f} s: {count / seconds:.0f} tokens/s")
    if a.check:
        equal = all(r.generated == generate_dense(model, r.prompt, r.max_new) for r in requests)
        print("the dense model generates", "the same tokens" if equal else "OTHER TOKENS")
        return 0 if equal else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
