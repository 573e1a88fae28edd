"""Hugging Face transformers: ``attn_implementation="anystride"``, continuous batching, and absorbed MLA.

    from anystride.adapters.transformers import absorb, register

    register()
    model.set_attn_implementation("anystride")         # model.generate(...)
    model.set_attn_implementation("paged|anystride")   # model.generate_batch(...)
    absorb(model)                                      # DeepSeek-V3: reads the compressed cache in place

transformers' caches are read where they lie. Instead of a dense mask a step has a list of the keys that each
sequence sees, made once for all of its layers: a block table of blocks of one token. Left padding, static
caches that are not full, and in decode steps any mask, are no more than other lists.

Written against transformers 5.17.0, whose mask functions, caches and ``PagedAttentionCache`` it relies on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from types import MethodType
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, __version__
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from anystride import UnsupportedError, flash_attn_varlen_func, get_scheduler_metadata
from anystride.adapters.translation import Refusal, query_starts, refuse
from anystride.cache import store_kv

__all__ = ["absorb", "register"]

T = TypeVar("T")

NAME = "anystride"
PAGED = "paged|anystride"

_PACKED = Refusal(
    None, "asks for several sequences in one row, and a row of the batch is one sequence here",
    "a batch with left padding, or model.generate_batch with 'paged|anystride'",
)  # fmt: skip
REFUSED = {
    "dropout": Refusal(0.0, "asks for training, and this is inference", "model.eval()"),
    "gradients": Refusal(
        False, "are wanted, and no gradient is recorded here", "with torch.no_grad(): ..."
    ),
    "output_attentions": Refusal(
        False, "asks for probabilities, which are never formed in memory", "attn_implementation='eager'"
    ),
    "is_causal": Refusal(
        True, "asks for attention in both directions, and decoders look back only here",
        "attn_implementation='sdpa'",
    ),
    "position_bias": Refusal(
        None, "adds a bias to the scores, and none can be added here", "attn_implementation='sdpa'"
    ),
    "head_mask": Refusal(None, "scales heads, which is not done here", "attn_implementation='eager'"),
    "cu_seq_lens_q": _PACKED,
    "cu_seq_lens_k": _PACKED,
}  # fmt: skip
PAGED_REFUSED = {name: REFUSED[name] for name in ("dropout", "gradients", "output_attentions", "is_causal")}
PAGED_REFUSED |= {
    "block_table": Refusal(
        None, "is what transformers gives to FlashAttention, which appends to the cache as it attends",
        "the name 'paged|anystride' for this function",
    )
}  # fmt: skip

# Functions that one ``def`` made share its code: what a mask function is, can be told without calling it.
_AND = and_masks(causal_mask_function).__code__
_SLIDING = sliding_window_overlay(1).__code__


def register() -> None:
    """Make ``attn_implementation="anystride"`` and ``"paged|anystride"`` known to transformers.

    Call it in each process, before a model is loaded with one of the names or set to it; twice does no harm.

    What the two cannot do is refused when the model runs, by :class:`anystride.UnsupportedError` with the
    reason: training, ``output_attentions``, attention in both directions, biases, several sequences packed in
    one row; and, in forwards of several query tokens, masks that are not causal or a causal window, dense
    4-D masks, and padding between the tokens of a prompt.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, list_keys)
    AttentionInterface.register(PAGED, attend_paged)


def absorb(model: PreTrainedModel) -> PreTrainedModel:
    """Let DeepSeek-V3's attention read its compressed cache in place.

    As it is in transformers, the cache holds latents, and each layer expands those of all tokens, in every
    step, to the keys and values of every head. Absorbed, ``kv_b_proj`` is applied to the new queries and
    outputs instead. In effect while the model is set to ``attn_implementation="anystride"``; with other names
    it computes as before.

    Args:
        model: A model with ``DeepseekV3Attention`` layers. Changed in place.

    Returns:
        ``model``.

    Raises:
        UnsupportedError: There is no such layer, or the weight of a ``kv_b_proj`` cannot be used as a matrix.
    """
    layers = [module for module in model.modules() if isinstance(module, DeepseekV3Attention)]
    odd = sorted(
        {type(layer.kv_b_proj).__name__ for layer in layers if type(layer.kv_b_proj) is not nn.Linear}
    )
    if odd or not layers:
        raise UnsupportedError(
            "absorb: this model cannot be absorbed.",
            type(model).__name__,
            {"kv_b_proj": [f"is {', '.join(odd)}; needs torch.nn.Linear, whose weight is the matrix"]}
            if odd
            else {"model": ["has no DeepseekV3Attention"]},
            "leave out absorb(model): attn_implementation='anystride' expands the cache as transformers does",
        )
    for layer in layers:
        layer.forward = MethodType(_absorbed_forward, layer)
    return model


def list_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """The keys that each sequence of a step sees, in place of a mask: what transformers calls for masks.

    A decode step, of one query token, evaluates the mask function and lists what it lets through: any mask
    goes, and nothing is read on the host. Of several query tokens, those before the first valid one see
    nothing, and others the valid tokens before them; padding on the right of new tokens is visible to padding
    only, whose rows mean nothing. Whether the mask is such a one is read on the host, once a forward.

    Args:
        batch_size, q_length, kv_length: Sequences, new tokens, and keys as the cache will return them.
        q_offset, kv_offset: Positions of the first query token and of the first key.
        mask_function: Who sees whom.
        attention_mask: bool ``[batch, tokens]``, False for padding; None for none.
        use_vmap: Whether ``mask_function`` takes single indices only.
        device: Where the list shall be.
        **_: What other implementations need.

    Returns:
        int32 ``[batch, 1, 1 + window, 1 + kv_length]``, four dimensions as of a finished mask, so that
        ``generate`` can make it ahead. The last dimension is the number of keys, then the keys themselves in
        order, as indices into ``[batch * kv_length]``, then anything. ``window`` is what is left to be
        masked, in tokens, 0 for none; the dimension has stride 0.

    Raises:
        UnsupportedError: Several query tokens, and not causal or a causal window, or padding in between.
    """
    window = 0
    if q_length == 1:
        seen = sdpa_mask(
            batch_size, 1, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
        )[:, 0, 0]  # fmt: skip
    else:
        found = _window_of(mask_function)
        if found is None:
            raise _unsupported_mask(
                q_length,
                "mask_function",
                "lets a token see others than a causal mask or a causal window does",
            )
        window = found if kv_length > found else 0  # a window of all keys hides none
        positions = torch.arange(kv_length, device=device) + kv_offset
        past, end = positions < q_offset, positions < q_offset + q_length
        seen = end[None].expand(batch_size, -1)
        if attention_mask is not None:
            valid = prepare_padding_mask(attention_mask, kv_length, kv_offset)
            seen = _without_padding(valid[:, kv_offset : kv_offset + kv_length], past, end, q_length, window)
    count = seen.cumsum(-1)
    keys = torch.arange(batch_size * kv_length, dtype=torch.int32, device=device).view(batch_size, -1)
    table = keys.new_empty(batch_size, 1 + kv_length)
    table.scatter_(1, torch.where(seen, count, 0), keys)  # what is not seen goes to 0, which is written last
    table[:, 0] = count[:, -1]
    return table[:, None, None].expand(-1, 1, 1 + window, -1)


def _window_of(mask_function: Callable[..., Any]) -> int | None:
    """The window of a causal mask, 0 for none; None if the mask is another one."""
    if mask_function is causal_mask_function:
        return 0
    if getattr(mask_function, "__code__", None) is not _AND:
        return None
    parts = inspect.getclosurevars(mask_function).nonlocals["mask_functions"]
    if len(parts) != 2 or parts[1] is not causal_mask_function or parts[0].__code__ is not _SLIDING:
        return None
    window: int = inspect.getclosurevars(parts[0]).nonlocals["sliding_window"]
    return window


def _without_padding(valid: Tensor, past: Tensor, end: Tensor, q_length: int, window: int) -> Tensor:
    """The keys of a forward of several query tokens, ``[batch, kv_length]``; refuses what is none.

    Queries are aligned with the last keys. So of the new tokens all from the first valid one on are kept:
    padding behind it is behind every valid query.
    """
    new = end & ~past
    seen = torch.where(new, (valid & new).cumsum(-1) > 0, valid & past)
    faults = [_has_a_gap(valid & new)]
    if window:  # counts positions, so that none may be missing
        faults.append(_has_a_gap(seen))
    if torch.stack(faults).any():
        reason = "has padding between tokens, and queries are counted from the last key"
        raise _unsupported_mask(q_length, "attention_mask", reason)
    return seen


def _has_a_gap(seen: Tensor) -> Tensor:
    """Whether a row of ``[batch, n]`` has False between True and True: bool, no dimensions."""
    begins = (seen[:, 1:] & ~seen[:, :-1]).sum(-1) + seen[:, 0]
    return (begins > 1).any()


def _unsupported_mask(q_length: int, name: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"attn_implementation='{NAME}': {name} cannot be passed on.",
        f"{q_length} query tokens",
        {name: [reason]},
        "attn_implementation='sdpa' for this forward; a decode step, of one query token, takes any mask",
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: The layer.
        query: ``[batch, num_q_heads, q_length, d_qk]``; copied if a sequence has several tokens.
        key: ``[batch, num_kv_heads, kv_length, d_qk]``, as the cache returns it. Any strides, never copied.
        value: The same with ``d_v``.
        attention_mask: From :func:`list_keys`. None: every key is valid, and the last ones are the queries'.
        dropout: Refused unless 0.
        scaling: Of the scores, default ``d_qk ** -0.5``.
        sliding_window: The layer's window in tokens; where there is a mask, the mask says it.
        softcap: ``softcap * tanh(s / softcap)`` on the scaled scores.
        s_aux: ``[num_q_heads]``, sinks.
        is_causal: Refused if False; default what the layer says.
        **kwargs: Refused where they ask for what is not here, see ``REFUSED``; else without effect.

    Returns:
        ``[batch, q_length, num_q_heads, d_v]``, and None for the probabilities.
    """
    _refuse_training(NAME, REFUSED, module, (query, key, value), dropout, is_causal, kwargs)
    batch, _, length, _ = query.shape
    out = _attend(
        query.transpose(1, 2).flatten(0, 1), key, value, attention_mask, length, scaling, sliding_window,
        softcap=softcap or 0.0, s_aux=s_aux,
    )  # fmt: skip
    return out.unflatten(0, (batch, length)), None


def _attend(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    q_length: int,
    scaling: float | None,
    sliding_window: int | None,
    **options: Any,
) -> Tensor:
    """Attention of rows, ``[batch * q_length, num_q_heads, d]``, over a cache as :func:`attend` gets it."""
    batch, _, kv_length, _ = key.shape
    if mask is None:  # each sequence is one block
        table, lengths = _constant(_whole, batch, kv_length, key.device)
        k, v = key.transpose(1, 2), value.transpose(1, 2)
        window = sliding_window or 0
    else:  # each sequence is a page of blocks of one token
        if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[-1] != 1 + kv_length:
            raise _unsupported_mask(
                q_length, "attention_mask",
                f"is {mask.dtype} {list(mask.shape)}, a dense mask; needs one of 2 dimensions, or none",
            )  # fmt: skip
        lengths, table = mask[:, 0, 0, 0], mask[:, 0, 0, 1:]
        k, v = key.transpose(1, 2).unsqueeze(2), value.transpose(1, 2).unsqueeze(2)
        window = mask.shape[2] - 1
    starts = _constant(query_starts, batch, q_length, key.device)
    out = flash_attn_varlen_func(
        rows, k, v, q_length, starts, kv_length,
        seqused_k=lengths, softmax_scale=scaling, causal=True, window_size=_pair(window), block_table=table,
        **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)  # no lse was asked for
    return out


def _constant(make: Callable[[int, int, torch.device], T], batch: int, n: int, device: torch.device) -> T:
    """``make(batch, n, device)``, the same for all layers of a step, and of later ones of its shape.

    What a graph records is filled when it is replayed, so it is of no use to anybody else.
    """
    recorded = torch.compiler.is_compiling() or (
        device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    )
    return make(batch, n, device) if recorded else _remembered(make, batch, n, device)


@lru_cache(maxsize=64)
def _remembered(make: Callable[[int, int, torch.device], T], batch: int, n: int, device: torch.device) -> T:
    return make(batch, n, device)


def _whole(batch: int, kv_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Table ``[batch, 1]`` and lengths ``[batch]`` of full caches that keep each sequence in one piece."""
    table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    return table, torch.full((batch,), kv_length, dtype=torch.int32, device=device)


def _pair(window: int) -> tuple[int, int]:
    """The query's own token counts in a window of transformers, and 0 is none."""
    return (window - 1, 0) if window else (-1, -1)


def _refuse_training(
    name: str,
    refusals: dict[str, Refusal],
    module: nn.Module,
    tensors: tuple[Tensor, ...],
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> None:
    given: dict[str, Any] = {key: kwargs[key] for key in refusals if key in kwargs}
    given["dropout"] = dropout
    given["gradients"] = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    given["output_attentions"] = bool(kwargs.get("output_attentions", False))
    given["is_causal"] = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    refuse(f"attn_implementation='{name}'", refusals, **given)


def _absorbed_forward(
    self: DeepseekV3Attention,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``DeepseekV3Attention.forward`` with ``kv_b_proj`` on the side of the queries and outputs.

    With ``kv_b_proj``'s weight as ``[heads, d_nope + d_v, latent]``: the scores ``q_nope . (W_k c)`` are
    ``(W_k^T q_nope) . c``, and outputs ``sum p (W_v c)`` are ``W_v (sum p c)``.
    """
    if self.config._attn_implementation != NAME:
        expanded: tuple[Tensor, None] = type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
        return expanded
    batch, length = hidden_states.shape[:-1]
    nope, rope, latent = self.qk_nope_head_dim, self.qk_rope_head_dim, self.kv_lora_rank
    if self.q_lora_rank is None:
        q = self.q_proj(hidden_states)
    else:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
    q_nope, q_rope = q.view(batch, length, -1, self.qk_head_dim).transpose(1, 2).split([nope, rope], -1)
    c, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([latent, rope], -1)
    c, k_rope = self.kv_a_layernorm(c)[:, None], k_rope[:, None]  # one head
    rotate = apply_rotary_pos_emb_interleave if self.config.rope_interleave else apply_rotary_pos_emb
    q_rope, k_rope = rotate(q_rope, k_rope, *position_embeddings)
    if past_key_values is not None:
        c, k_rope = past_key_values.update(c, k_rope, self.layer_idx)

    dropout = self.attention_dropout if self.training else 0.0
    _refuse_training(NAME, REFUSED, self, (q_rope, c), dropout, None, kwargs)
    w_k, w_v = self.kv_b_proj.weight.view(-1, nope + self.v_head_dim, latent).split(
        [nope, self.v_head_dim], 1
    )
    q_latent = torch.einsum("bhtn,hnl->bthl", q_nope, w_k)
    out = _attend(
        q_rope.transpose(1, 2).flatten(0, 1), k_rope, c, attention_mask, length, self.scaling, None,
        q_v=q_latent.flatten(0, 1),
    )  # fmt: skip
    out = torch.einsum("thl,hvl->thv", out, w_v)
    return self.o_proj(out.reshape(batch, length, -1)), None


class _Step(NamedTuple):
    """What a step of continuous batching shares between the layers of a group.

    Attributes:
        table: ``[batch, max_blocks]`` int32.
        lengths: ``[batch]`` int32.
        schedules: For each number of query heads.
    """

    table: Tensor
    lengths: Tensor
    schedules: dict[int, Tensor]


# The last step of each cache, by group. A step begins anew at the first layer of a group, under a CUDA graph
# that is captured too: nothing of an earlier step is ever used.
_STEPS: WeakKeyDictionary[PagedAttentionCache, dict[int, _Step]] = WeakKeyDictionary()


def attend_paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    cache: PagedAttentionCache | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | dict[str, Tensor] | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int | dict[str, int] = 0,
    read_index: list[Tensor] | None = None,
    write_index: list[Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer under continuous batching: stores the new keys and values, then attends.

    Full attention reads the pages where they lie, through a block table made of ``read_index``. Layers with a
    window have a ring of as many slots as the window: steps of one new token a sequence read it in place,
    steps without old tokens read none of it. Where a sequence has old tokens and several new ones, the new
    ones overwrite old ones that are still to be seen; for these steps ``PagedAttentionCache.update`` collects
    the keys of the window before it stores, as transformers does for all of its implementations.

    Args:
        module, attention_mask, dropout, scaling, softcap, s_aux, is_causal: As in :func:`attend`.
        query: ``[1, num_q_heads, total_q, d]``, the tokens of all sequences one after the other.
        key, value: ``[1, num_kv_heads, total_q, d]``, of the new tokens.
        sliding_window: Ignored: the cache knows the windows of its layers.
        cache: transformers' cache: ``[slots, num_kv_heads, d]`` for each layer of a group.
        cu_seq_lens_q: ``[batch + 1]`` int32.
        cu_seq_lens_k: The same of the keys; by the type of the layer, if there are two.
        max_seqlen_q, max_seqlen_k: Upper bounds of a sequence's query tokens and keys.
        read_index: For each group ``[total_k]`` int64, the slots of all keys; empty where no token is old.
        write_index: For each group ``[total_q]`` int64, the slots of the new tokens.
        **kwargs: As in :func:`attend`.

    Returns:
        ``[total_q, num_q_heads, d]`` with a first dimension of 1, and None for the probabilities.
    """
    _refuse_training(PAGED, PAGED_REFUSED, module, (query, key, value), dropout, is_causal, kwargs)
    dims = getattr(cache, "head_dim", None)
    if cache is None or dims != key.shape[-1] or dims != value.shape[-1]:
        raise _unsupported_cache(cache, key, value)
    assert cu_seq_lens_q is not None  # as everything that comes with a cache
    assert read_index is not None
    assert write_index is not None
    layer: int = module.layer_idx  # type: ignore[assignment]
    group, place = cache.layer_index_to_group_indices[layer]
    window = cache.sliding_windows[layer]
    window = 0 if window == 1 else window  # it writes 1 for none
    kind = "sliding_attention" if window else "full_attention"
    cu_k = cu_seq_lens_k[kind] if isinstance(cu_seq_lens_k, dict) else cu_seq_lens_k
    max_k = max_seqlen_k[kind] if isinstance(max_seqlen_k, dict) else max_seqlen_k
    assert cu_k is not None
    options: dict[str, Any] = {
        "softmax_scale": scaling, "causal": True, "window_size": _pair(window), "softcap": softcap or 0.0,
        "s_aux": s_aux,
    }  # fmt: skip
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    read, write = read_index[group], write_index[group]
    old = read.numel() > 0  # the shape says it, no value
    if old and window and max_seqlen_q > 1:
        k, v = cache.update(key, value, layer, read_index, write_index)
    else:
        slots = (cache.key_cache[place], cache.value_cache[place])
        pages = [whole.unflatten(0, (-1, cache.block_size)) for whole in slots]
        store_kv(k, v, pages[0], pages[1], write)
        if old:
            # A ring begins anywhere in a page, so it is read as blocks of one token.
            k, v = [whole[:, None] for whole in slots] if window else pages
            steps = _STEPS.setdefault(cache, {})
            if place == 0:
                steps[group] = _make_step(
                    1 if window else cache.block_size, cu_k, max_k, read, write if window else None
                )
            step = steps[group]
            options |= {"seqused_k": step.lengths, "block_table": step.table}
            if q.shape[1] not in step.schedules:
                step.schedules[q.shape[1]] = get_scheduler_metadata(
                    step.lengths.shape[0], max_seqlen_q, max_k, q.shape[1], k.shape[-2], k.shape[-1],
                    step.lengths, q.dtype, v.shape[-1], cu_seq_lens_q, causal=True, window_size=_pair(window),
                )  # fmt: skip
            options["scheduler_metadata"] = step.schedules[q.shape[1]]
    if "block_table" not in options:
        options["cu_seqlens_k"] = cu_k
    out = flash_attn_varlen_func(q, k, v, max_seqlen_q, cu_seq_lens_q, max_k, **options)
    assert isinstance(out, Tensor)  # no lse was asked for
    return out[None], None


def _make_step(block_size: int, cu_k: Tensor, max_k: int, read: Tensor, write: Tensor | None) -> _Step:
    """The block table of a step from the slots of all keys, and the lengths.

    ``write`` is given for rings, where ``read`` does not name the slot of a sequence's one new token.
    """
    if write is not None:
        read = read.scatter(0, cu_k[1:].long() - 1, write)
    firsts = torch.arange(0, max_k, block_size, device=read.device)
    # Beyond a sequence's end stand the slots of its neighbour, and nobody reads them.
    index = (cu_k[:-1, None] + firsts).clamp_(max=read.numel() - 1)
    table = (read[index] // block_size).to(torch.int32)
    return _Step(table, cu_k.diff(), {})


def _unsupported_cache(cache: PagedAttentionCache | None, key: Tensor, value: Tensor) -> UnsupportedError:
    got = f"key {list(key.shape)}, value {list(value.shape)}"
    if cache is None:
        reason, do = "was not given: this name is for continuous batching", "attn_implementation='anystride'"
    elif not hasattr(cache, "head_dim"):
        reason = f"is laid out as transformers {__version__} does it; this reads the pages of 5.17"
        do = "pip install 'transformers>=5.17,<5.18', or model.generate with attn_implementation='anystride'"
    else:
        reason = (
            f"has rows of {cache.head_dim} numbers, the model's head_dim, for keys and for values: "
            "PagedAttentionCache of transformers 5.17 has no place for those of MLA"
        )
        do = "model.generate with attn_implementation='anystride', and absorb(model)"
    return UnsupportedError(
        f"attn_implementation='{PAGED}': cache cannot be used.", got, {"cache": [reason]}, do
    )
