"""How other projects' kernels are called, refused and missed, without a GPU and without the projects.

FlashAttention-3, FlashMLA, FlashInfer and vLLM's Triton files are stood in for by ``peer_stand_ins``;
FlexAttention is PyTorch's own, on the CPU.
"""

from __future__ import annotations

import lzma
import sys
import tempfile
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_stand_ins import FlashAttn, FlashInfer, FlashMla, Record, VllmDecode, VllmUnified
from torch import Tensor

from anystride.peers import PEERS, Absent, Peer, Refused, find_peer, flashinfer, folder
from anystride.peers.calls import blocks_in_use, four_dims, whole
from anystride.testing import Case, Inputs, find_layout, make_inputs
from anystride.testing.judgement import assert_right
from anystride.testing.probes import GQA, MLA
from anystride.testing.taming import tame

BY_NAME = pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)

EVERY_FEATURE: dict[str, tuple[Any, str]] = {
    "q_v": (torch.zeros(2, 8, 128), "queries in two parts (q_v)"),
    "alibi_slopes": (torch.zeros(8), "alibi slopes"),
    "s_aux": (torch.zeros(8), "sinks"),
    "q_descale": (0.5, "a scale of the queries"),
    "k_descale": (0.5, "a scale of K"),
    "v_descale": (0.5, "a scale of V"),
    "k_scale_cache": (torch.zeros(1), "scales of K's rows"),
    "v_scale_cache": (torch.zeros(1), "scales of V's rows"),
    "window_size": ((4, 0), "a window"),
    "softcap": (20.0, "a softcap"),
    "cp_world_size": (2, "context parallelism"),
    "batch_invariant": (True, "a promise of the same bits in any batch"),
    "block_table": (None, "a cache without a block table"),
    "num_splits": (3, "a number of splits"),
}
SCALES = {"q_descale", "k_descale", "v_descale"}
# What each has an argument for; of FlashInfer the wrappers for K and V of their own.
TAKEN = {
    "flash-mla": set(),
    "flash-attn-3": SCALES | {
        "q_v", "window_size", "softcap", "s_aux", "cp_world_size", "num_splits", "block_table"
    },
    "flashinfer-fa2": SCALES | {"window_size", "softcap", "s_aux"},
    "flashinfer-fa3": SCALES | {"window_size", "softcap", "s_aux"},
    "flashinfer-decode": SCALES | {"window_size", "softcap", "s_aux"},
    "vllm-triton-decode": SCALES | {"softcap"},
    "vllm-triton-unified": SCALES | {
        "window_size", "softcap", "alibi_slopes", "s_aux", "k_scale_cache", "v_scale_cache"
    },
    "flex-attention": {"window_size", "softcap"},
    "gathered-sdpa": {*EVERY_FEATURE} - {"k_scale_cache", "v_scale_cache"},
}  # fmt: skip
OF_PYTORCH = ("flex-attention", "gathered-sdpa")


def call_of(case: Case = GQA, layout: str = "", **options: Any) -> Inputs:
    return make_inputs(case, find_layout(layout or ("G2" if case.form == "kv" else "M1")), **options)


def answer(peer: str, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    result = find_peer(peer).kernel(**inputs.kwargs)
    return result if isinstance(result, tuple) else (result, None)


def refusal(peer: str, kwargs: dict[str, Any]) -> str:
    with pytest.raises(Refused) as refused:
        find_peer(peer).prepare(kwargs)
    return str(refused.value)


# Names, and what is not here.


def test_names_are_unique_and_found() -> None:
    names = [peer.name for peer in PEERS]
    assert len(set(names)) == len(names)
    assert all(find_peer(peer.name) is peer for peer in PEERS)
    with pytest.raises(KeyError, match=", ".join(names)):
        find_peer("flash-attn-5")


@pytest.mark.parametrize("name", [peer.name for peer in PEERS if peer.name not in OF_PYTORCH])
@pytest.mark.parametrize("given", [False, True], ids=["no folder", "an empty folder"])
def test_an_absent_peer_says_what_is_missing_and_where(
    name: str, given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops, "_flashmla_C", types.SimpleNamespace(), raising=False)
    monkeypatch.setattr(torch.ops, "_vllm_fa3_C", types.SimpleNamespace(), raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(Absent) as absent:
        find_peer(name).load(tmp_path if given else None)
    missing = {"flash-mla": "_flashmla_C.abi3.so", "flash-attn-3": "_vllm_fa3_C.abi3.so.xz"}
    assert "the folder of peers" in str(absent.value)
    assert missing.get(name, name.split("-")[0]) in str(absent.value)


@pytest.mark.parametrize("name", OF_PYTORCH)
def test_what_comes_with_pytorch_is_never_absent(name: str) -> None:
    assert find_peer(name).load(None) == torch.__version__


def test_a_gathered_cache_is_right_where_it_is_not_refused() -> None:
    inputs = call_of(replace(GQA, lse=False))
    assert_right(inputs, *answer("gathered-sdpa", inputs))


@pytest.mark.parametrize("file", ["library.so", "library.so.xz"])
def test_a_library_that_does_not_fit_is_absent(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "unpacked"))
    (tmp_path / "unpacked").mkdir()
    content = b"not a library"
    (tmp_path / file).write_bytes(lzma.compress(content) if file.endswith("xz") else content)
    with pytest.raises(Absent, match=r"library\.so"):
        folder.load_library(tmp_path, file)


def test_a_packed_library_is_unpacked_once_and_no_other_of_its_name_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loaded: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: loaded.append(Path(path)))
    for version in (b"one", b"another", b"one"):
        (tmp_path / "library.so.xz").write_bytes(lzma.compress(version))
        folder.load_library(tmp_path, "library.so.xz")
        assert loaded[-1].read_bytes() == version
    assert loaded[0] == loaded[2] != loaded[1]
    assert sorted(tmp_path.iterdir()) == sorted({*loaded, tmp_path / "library.so.xz"})


# What is refused before anything is called.


@BY_NAME
def test_every_feature_without_an_argument_is_named_at_once(peer: Peer) -> None:
    kwargs = call_of().kwargs | {name: value for name, (value, _text) in EVERY_FEATURE.items()}
    if peer.name.startswith("flashinfer-fa"):
        del kwargs["q_v"]  # would go to the wrapper for MLA
    rest = [
        text for name, (_, text) in EVERY_FEATURE.items() if name in kwargs and name not in TAKEN[peer.name]
    ]
    assert refusal(peer.name, kwargs) == f"no argument for {', '.join(rest)}"


@pytest.mark.parametrize("peer", ["flashinfer-fa2", "flashinfer-fa3"])
def test_flashinfer_mla_takes_two_parts_and_nothing_else(peer: str) -> None:
    kwargs = call_of(MLA).kwargs | {name: value for name, (value, _text) in EVERY_FEATURE.items()}
    rest = [text for name, (_, text) in EVERY_FEATURE.items() if name != "q_v"]
    assert refusal(peer, kwargs) == f"no argument for {', '.join(rest)}"


UNEVEN = replace(GQA, name="uneven", q_lens=(3, 1))
WIDE = {"window_size": (-1, 4), "causal": False, "alibi_slopes": torch.zeros(2, 8)}


@pytest.mark.parametrize(
    ("peer", "case", "more", "needs"),
    [
        ("flash-mla", UNEVEN, {}, "rows of 576 with values of 512; one KV head; "
         "V is the first part of K's row; as many query tokens of each sequence"),
        ("flash-attn-3", replace(GQA, name="long", d_qk=320), {}, "head dimensions up to 256, or MLA's row"),
        ("flashinfer-fa2", replace(GQA, name="wide", d_qk=512, d_v=256), {}, "one KV head"),
        ("flashinfer-fa2", GQA, {"k_descale": torch.ones(2, 2)}, "one scale for a whole cache"),
        ("flashinfer-fa2", GQA, WIDE | {"alibi_slopes": None},
         "no keys after the query's own (window_right 0)"),
        ("flashinfer-decode", replace(UNEVEN, name="unlike", d_v=64), {},
         "one query token of each sequence; K and V of one head dimension"),
        ("vllm-triton-decode", UNEVEN, {}, "one query token of each sequence"),
        ("vllm-triton-decode", GQA, {"v_descale": torch.ones(2, 2)}, "one scale for a whole cache"),
        ("vllm-triton-unified", replace(GQA, name="unlike", d_v=64), WIDE, "K and V of one head dimension; "
         "no keys after the query's own; alibi slopes of heads"),
        ("vllm-triton-unified", GQA, {"v_descale": torch.ones(2, 2)}, "one scale for a whole cache"),
        ("flex-attention", replace(GQA, name="none", seqused_k=(0, 0)), {}, "a key"),
        ("flex-attention", UNEVEN, {}, "as many query tokens of each sequence"),
    ],
)  # fmt: skip
def test_what_a_peer_documents_as_unsupported_is_refused(
    peer: str, case: Case, more: dict[str, Any], needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_flashinfer(monkeypatch)
    assert refusal(peer, call_of(case, "G1" if case.d_qk != case.d_v else "").kwargs | more) == needs


# Reading a call.


def test_four_dims_of_a_cache_of_blocks_are_itself() -> None:
    cache = torch.zeros(3, 16, 2, 8)
    assert four_dims(cache, "k") is cache


@pytest.mark.parametrize("pages", [1, 3])
def test_four_dims_of_pages_without_a_gap_are_a_view(pages: int) -> None:
    numbers = torch.arange(pages * 2 * 4 * 3 * 10.0).view(pages, 2, 4, 3, 10)
    cache = numbers[..., 2:8]  # rows with gaps, not at the beginning of the storage
    blocks = four_dims(cache, "k")
    assert blocks.data_ptr() == cache.data_ptr()
    assert blocks.stride() == cache.stride()[1:]
    assert torch.equal(blocks, cache.flatten(0, 1))


def test_four_dims_of_pages_with_a_gap_are_refused() -> None:
    with pytest.raises(Refused, match="v has pages of 2 blocks with a gap"):
        four_dims(torch.zeros(3, 5, 4, 3, 8)[:, :2], "v")
    assert four_dims(torch.zeros(1, 5, 4, 3, 8)[:, :2], "v").shape == (2, 4, 3, 8)  # one page has none


def test_blocks_in_use_are_those_that_hold_a_token() -> None:
    table = torch.tensor([[5, 6, -9], [-9, -9, -9], [7, 8, 9]], dtype=torch.int32)
    starts, ids = blocks_in_use(table, torch.tensor([17, 0, 33], dtype=torch.int32), 16)
    assert starts.dtype == ids.dtype == torch.int32
    assert starts.tolist() == [0, 2, 2, 5]
    assert ids.tolist() == [5, 6, 7, 8, 9]


def test_whole_adds_rows_of_zeros_or_nothing() -> None:
    rows = torch.ones(2, 3)
    assert whole(rows, 2) is rows
    assert whole(rows, 4).tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]


# FlexAttention, for real.


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "case",
    [
        replace(GQA, name="flex", lse=True, padded_q=2),
        replace(GQA, name="flex-3", lse=True, q_lens=(3, 3), window=(20, 0), softcap=8.0),
        replace(GQA, name="flex-empty", seqused_k=(40, 0), lse=True),
        replace(MLA, name="flex-mla", lse=True),
    ],
    ids=lambda case: case.name,
)
def test_flex_attention_is_right_over_a_packed_cache(case: Case) -> None:
    inputs = tame(call_of(case, "G16" if case.form == "kv" else "M1", out="padded_rows"), ())
    assert_right(inputs, *answer("flex-attention", inputs))


# vLLM's Triton files.


def stand_in_for_vllm(monkeypatch: pytest.MonkeyPatch, file: str, record: Record) -> None:
    monkeypatch.setitem(sys.modules, f"vllm.v1.attention.ops.{file}", record)


def test_a_module_that_is_there_is_the_one_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_vllm(monkeypatch, "triton_decode_attention", VllmDecode())
    assert find_peer("vllm-triton-decode").load(None) == folder.VLLM_VERSION


@pytest.mark.parametrize(("longest", "splits"), [(1, 1), (512, 1), (1600, 4), (10**6, 8)])  # 8: 4 processors
@pytest.mark.parametrize("case", [GQA, MLA], ids=["gqa", "mla"])
def test_vllm_decode_is_given_splits_scales_and_strides(
    case: Case, longest: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_vllm(monkeypatch, "triton_decode_attention", stand_in := VllmDecode())
    inputs = call_of(replace(case, name="vllm", lse=True, padded_q=2))
    inputs.kwargs["max_seqlen_k"] = longest
    out, lse = answer("vllm-triton-decode", inputs)
    assert_right(inputs, out, lse)
    ((q, k, *_rest, given, _scale, _block), named) = stand_in.calls[0]
    assert (len(q), given) == (2, splits)
    assert (k.data_ptr(), k.stride()) == (inputs.kwargs["k"].data_ptr(), inputs.kwargs["k"].stride())
    assert named["is_mla"] == (case is MLA)
    assert (named["logit_cap"], named["k_scale"].item(), named["v_scale"].item()) == (0.0, 1.0, 1.0)


def test_vllm_decode_is_given_scales_without_a_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_vllm(monkeypatch, "triton_decode_attention", stand_in := VllmDecode())
    more = {"k_descale": torch.tensor([0.5]), "v_descale": 2, "q_descale": 0.75, "softcap": 30.0}
    find_peer("vllm-triton-decode").kernel(**(given := call_of().kwargs) | more)
    args, named = stand_in.calls[0]
    assert args[-2] == 0.75 * given["softmax_scale"]
    assert named["logit_cap"] == 30.0
    for name, value in (("k_scale", 0.5), ("v_scale", 2.0)):
        assert (named[name].shape, named[name].dtype, named[name].item()) == ((), torch.float32, value)


def test_vllm_unified_is_given_the_buffers_of_its_path_for_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_vllm(monkeypatch, "triton_unified_attention", stand_in := VllmUnified())
    inputs = call_of(replace(UNEVEN, padded_q=2), out="heads_first")
    assert_right(inputs, *answer("vllm-triton-unified", inputs))
    sinks, slopes = torch.zeros(8), torch.ones(8)
    more = {"k_descale": 0.5, "window_size": (9, 0), "softcap": 5.0, "s_aux": sinks, "alibi_slopes": slopes}
    find_peer("vllm-triton-unified").kernel(**call_of().kwargs | more)
    (_, named), (args, others) = stand_in.calls
    assert named["num_par_softmax_segments"] == named["softmax_segm_output"].shape[2] == 16
    assert named["softmax_segm_output"].shape == (named["seq_threshold_3D"], 8, 16, 128)
    assert named["softmax_segm_max"].shape == named["softmax_segm_expsum"].shape == (64, 8, 16)
    assert (args[10], args[12], others["sinks"], others["alibi_slopes"]) == ((9, 0), 5.0, sinks, slopes)
    assert (args[13], args[15], args[14].tolist()) == (None, None, [[0.5, 0.5]] * 2)
    assert args[8] == inputs.kwargs["softmax_scale"]
    scaled = call_of().kwargs | {"q_descale": torch.tensor(0.75)}  # which it reads for fp8 queries alone
    find_peer("vllm-triton-unified").kernel(**scaled)
    assert stand_in.calls[-1][0][8] == 0.75 * inputs.kwargs["softmax_scale"]
    assert stand_in.calls[-1][0][13] is None


# FlashMLA and FlashAttention-3.


def test_flash_mla_keeps_its_schedule_and_its_lse_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "_flashmla_C", stand_in := FlashMla(), raising=False)
    assert find_peer("flash-mla").load(None) == f"of vLLM {folder.VLLM_VERSION}"
    case = replace(MLA, name="flash-mla", seqused_k=(150, 0), q_lens=(2, 2), padded_q=1, lse=True)
    inputs = call_of(case, "M3")
    call = find_peer("flash-mla").prepare(inputs.kwargs)
    for _layer in range(2):
        out, lse = call()
        assert lse is not None
        assert_right(inputs, out, lse)
    (first, _), (second, _) = stand_in.calls
    assert first[7:9] == (None, None)
    assert [made.item() for made in second[7:9]] == [7, 8]
    assert first[0].shape == (2, 2, 16, 576)
    assert first[1].data_ptr() == inputs.kwargs["k"].data_ptr()


def test_flash_attn_splits_a_row_of_mla_into_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "_vllm_fa3_C", stand_in := FlashAttn(), raising=False)
    assert find_peer("flash-attn-3").load(None) == f"of vLLM {folder.VLLM_VERSION}"
    inputs = call_of(replace(MLA, name="fa3-mla", seqused_k=(150, 0), lse=True, q_lens=(2, 1)), "M3")
    assert_right(inputs, *answer("flash-attn-3", inputs))
    q, k, v, _, _, q_v = stand_in.calls[0][0][:6]
    given = inputs.kwargs["k"]
    assert (q.shape[-1], k.shape[-1], v.shape[-1], q_v.shape[-1]) == (64, 64, 512, 512)
    assert (k.data_ptr() - v.data_ptr(), k.stride()) == (512 * k.itemsize, given.stride())
    assert v.data_ptr() == given.data_ptr()


def test_flash_attn_is_given_scales_a_window_and_a_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "_vllm_fa3_C", stand_in := FlashAttn(), raising=False)
    inputs = call_of(replace(UNEVEN, lse=True), out="padded_rows")
    assert_right(inputs, *answer("flash-attn-3", inputs))
    more = {"window_size": (9, 0), "softcap": 5.0, "k_descale": 0.5, "v_descale": torch.ones(2, 2)}
    more |= {"num_splits": 3, "cp_world_size": 2, "cp_rank": 1, "s_aux": torch.zeros(8)}
    find_peer("flash-attn-3").kernel(**inputs.kwargs | more)
    args = stand_in.calls[1][0]
    assert args[20] is None
    assert [(scale.shape, scale.dtype) for scale in args[21:23]] == [((2, 2), torch.float32)] * 2
    assert (args[25:28], args[30], args[34:36]) == ((9, 0, 5.0), 3, (2, 1))
    assert args[33] is more["s_aux"]
    schedule, longest = args[29], inputs.kwargs["max_seqlen_k"]
    assert (schedule[:4], schedule[14], schedule[16:19]) == ((2, 3, longest, 8), 16, (True, 9, 0))


# FlashInfer.


def stand_in_for_flashinfer(monkeypatch: pytest.MonkeyPatch) -> FlashInfer:
    stand_in = FlashInfer()
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flashinfer, "_workspace", lambda device: torch.empty(16, device=device))
    return stand_in


EMPTY = replace(GQA, name="flashinfer", seqused_k=(32, 0, 45), q_lens=(1,) * 3, lse=True, padded_q=2)


@pytest.mark.parametrize(
    ("peer", "case"),
    [
        ("flashinfer-fa2", EMPTY),
        ("flashinfer-fa3", replace(EMPTY, q_lens=(3, 1, 2))),
        ("flashinfer-decode", EMPTY),
    ],
)
def test_flashinfer_is_given_pages_and_its_lse_is_to_base_e(
    peer: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = stand_in_for_flashinfer(monkeypatch)
    assert find_peer(peer).load(None) == "0.0"
    inputs = call_of(case, "G9")
    assert_right(inputs, *answer(peer, inputs))
    (lists, options), (tensors, _scales) = stand_in.calls
    starts, ids, last = lists[:3] if peer == "flashinfer-decode" else lists[1:4]
    assert (starts.tolist(), last.tolist(), len(ids)) == ([0, 2, 2, 5], [16, 0, 13], 5)
    assert all(of.dtype == torch.int32 for of in (starts, ids, last))
    assert options["window_left"] == -1
    assert options["logits_soft_cap"] is None
    assert [x.data_ptr() for x in tensors[1:]] == [inputs.kwargs[name].data_ptr() for name in "kv"]


@pytest.mark.parametrize("form", ["row", "q_v"])
def test_flashinfer_mla_is_given_two_views_and_lengths(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = stand_in_for_flashinfer(monkeypatch)
    case = replace(MLA, name="flashinfer-mla", seqused_k=(128, 0, 70), q_lens=(1,) * 3, lse=True, padded_q=1)
    if form == "q_v":
        case = replace(case, form="q_v", d_qk=64)
    inputs = call_of(case, "M3" if form == "row" else "M9")
    assert_right(inputs, *answer("flashinfer-fa2", inputs))
    (plan, _), (tensors, _) = stand_in.calls
    assert (plan[1].tolist(), plan[3].tolist()) == ([0, 2, 2, 4], [128, 0, 70])
    assert plan[4:8] == (16, 512, 64, 64)
    assert [x.shape[-1] for x in tensors] == [512, 64, 512, 64]
    assert tensors[2].data_ptr() == inputs.kwargs["v"].data_ptr()


def test_flashinfer_is_given_scales_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = stand_in_for_flashinfer(monkeypatch)
    more = {"k_descale": torch.tensor(0.5), "v_descale": 2, "s_aux": torch.zeros(8).bfloat16()}
    find_peer("flashinfer-fa3").kernel(**call_of().kwargs | more)
    named = stand_in.calls[1][1]
    assert (named["k_scale"], named["v_scale"], named["sinks"].dtype) == (0.5, 2.0, torch.float32)
    assert all(isinstance(named[name], float) for name in ("k_scale", "v_scale"))


def test_the_stand_in_for_flashinfer_counts_to_base_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the conversion might be right by chance: neither converts."""
    stand_in_for_flashinfer(monkeypatch)
    monkeypatch.setattr(flashinfer, "_natural", lambda lse, total: whole(lse, total).t())
    inputs = call_of(replace(GQA, name="base", lse=True))
    with pytest.raises(AssertionError, match="lse"):
        assert_right(inputs, *answer("flashinfer-fa2", inputs))
