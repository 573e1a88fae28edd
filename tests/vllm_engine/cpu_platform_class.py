"""The platform itself, apart: vLLM's may be imported only when vLLM asks for it."""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform


class TestPlatform(CpuPlatform):  # type: ignore[misc]
    """A CPU with any attention back end."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        backend = selected_backend.get_class()
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(f"{selected_backend} is not valid for this configuration: {reasons}")
        module, name = backend.full_cls_name()
        return f"{module}.{name}"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        # vLLM's platform sets these for its own MLA on CPUs, whatever back end was asked for.
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        kept = (
            (cache, ("block_size", "enable_prefix_caching")),
            (scheduler, ("enable_chunked_prefill", "max_num_batched_tokens")),
        )
        asked = [(config, name, getattr(config, name)) for config, names in kept for name in names]
        super().check_and_update_config(vllm_config)
        for config, name, value in asked:
            setattr(config, name, value)

    @classmethod
    def get_mla_prefill_backend_cls(cls, mla_selector_config: Any) -> Any:
        from anystride.adapters.vllm.prefill import Prefill

        return Prefill

    @classmethod
    def import_kernels(cls) -> None:
        pass
