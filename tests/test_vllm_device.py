"""What vllm_device.py makes of its measurements: which kernels attend, and what is compared with what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import vllm_device

import anystride

FA3 = "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::Collective"


def test_every_kernel_of_ours_but_those_that_move_the_cache_is_attention() -> None:
    folder = Path(anystride.__file__).parent / "kernels"
    found = {
        name
        for path in folder.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert {name for name in found if not vllm_device.ATTENTION.search(name)} == {
        "store_kernel",
        "copy_blocks_kernel",
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (FA3, True),
        ("void cutlass::device_kernel<flash::FlashAttnFwdCombine<cute::tuple<cute::C<8>, cute", True),
        ("void flash::prepare_varlen_num_blocks_kernel<8, true>(int, int, int, int const*)", True),
        ("void sm90::flash_fwd_splitkv_mla_kernel<cutlass::bfloat16_t>(DecodingParams)", True),
        ("void flash_fwd_mla_combine_kernel<cutlass::bfloat16_t, float, 512>(DecodingParams)", True),
        ("get_mla_metadata_kernel(Mla_metadata_params)", True),
        ("_fwd_grouped_kernel_stage1", True),
        ("_fwd_kernel_stage2", True),
        ("kernel_unified_attention", True),
        ("reduce_segments", True),
        ("void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, unsigned char>(", False),
        ("void vllm::concat_and_cache_mla_kernel<__nv_bfloat16, __nv_bfloat16>(", False),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", False),
        ("triton_red_fused_add_mean_mul_pow_rsqrt_0", False),
    ],
)  # fmt: skip
def test_kernels_of_others_are_known_by_name(name: str, expected: bool) -> None:
    assert bool(vllm_device.ATTENTION.search(name)) is expected


def test_device_times_are_those_of_a_step_without_copies() -> None:
    events = [("gqa_kernel", 30.0), ("gemm", 50.0), ("Memcpy HtoD (Pinned -> Device)", 9.0)] * 4
    times = vllm_device.add_up(events, 2)
    assert times is not None
    assert (times["all"], times["attention"]) == (160.0, 60.0)
    assert [(kernel["name"], kernel["us"]) for kernel in times["most"]] == [
        ("gemm", 100.0),
        ("gqa_kernel", 60.0),
    ]
    assert vllm_device.add_up([("Memset (Device)", 1.0)], 2) is None


def make_result(run: dict[str, Any], **changes: Any) -> dict[str, Any]:
    result = {
        **run,
        "name": vllm_device.name_of(run),
        "cache": {"strides": [run["block_size"]]},
        "tokens": [[5, 6, 7], [8, 9, 10]],
        "logprobs": [[-1.0, -1.0, -1.0]] * 2,
        "leads": [[1.0, 0.25, 2.0]] * 2,
        "scores": [[-2.0, -3.0]],
        "step_us": {"mean": 1000.0},
        "device_us": {"all": 800.0, "attention": 300.0},
    }
    return result | changes


def test_each_run_is_compared_with_the_right_one() -> None:
    runs = [*vllm_device.RUNS, *vllm_device.MORE, *vllm_device.SHARDED]
    results = [make_result(run) for run in runs]
    assert len({result["name"] for result in results}) == len(results)
    by_name = {result["name"]: result for result in results}
    for name, expected in {
        "deepseek-TRITON_MLA-eager-block64": "deepseek-FLASH_ATTN_MLA-eager-block64",
        "deepseek-FLASH_ATTN_MLA-graphs-block64": None,
        "deepseek-CUSTOM-graphs-block64-fp8": "deepseek-TRITON_MLA-graphs-block64-fp8",
        "llama-CUSTOM-graphs-block16-fp8": "llama-FLASH_ATTN-graphs-block16-fp8",
        "llama-CUSTOM-graphs-block1-cross-layer": "llama-FLASH_ATTN-graphs-block16",
        "llama-loops-CUSTOM-graphs-block16-drafts3": "llama-loops-CUSTOM-graphs-block16",
        "llama-loops-CUSTOM-graphs-block16": None,
        "mimo-CUSTOM-graphs-block32": "mimo-FLASH_ATTN-graphs-block32",
    }.items():
        base = vllm_device.base_of(by_name[name], results)
        assert (base and base["name"]) == expected


def test_lines_say_where_rows_part_what_was_drafted_and_what_is_unknown() -> None:
    plain, drafting = (run for run in vllm_device.MORE if run["kind"] == "llama-loops")
    first = make_result(plain)
    second = make_result(
        drafting,
        tokens=[[5, 6, 7], [8, 1, 10]],
        device_us=None,
        draft_tokens={"proposed": 9, "accepted": 4},
    )
    lines = vllm_device.compare([first, second, {**plain, "name": "x", "error": "a\nlast"}])
    assert "device   800.0 us, attention   300.0 us" in lines[0]
    assert "device unknown: the profiler saw no kernel" in lines[1]
    assert "9 proposed, 4 accepted" in lines[1]
    assert "4/6 (1/2 rows; led by at most 0.2500 where rows part)" in lines[1]
    assert "FAILED: ['last']" in lines[2]
