"""anystride as an attention back end of vLLM: ``vllm serve MODEL --attention-backend CUSTOM``.

vLLM finds :func:`register` by the entry point group ``vllm.general_plugins``. Models with MLA get
:mod:`~anystride.adapters.vllm.mla`, all others :mod:`~anystride.adapters.vllm.gqa`. What it changes, and how
to see that it runs: docs/vllm.md. Nothing of vLLM is imported before it asks.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

__all__ = ["register"]


def register() -> None:
    """Register anystride as ``CUSTOM``, for attention and for the prefill of MLA.

    vLLM calls it in each of its processes, and twice at times. If another plugin has taken ``CUSTOM``, its
    registration stays and a warning names it.
    """
    registry = import_module("vllm.v1.attention.backends.registry")
    prefill = import_module("vllm.v1.attention.backends.mla.prefill.registry")
    _take(registry.AttentionBackendEnum.CUSTOM, registry.register_backend, f"{__name__}.Backend")
    _take(
        prefill.MLAPrefillBackendEnum.CUSTOM,
        prefill.register_mla_prefill_backend,
        f"{__name__}.prefill.Prefill",
    )


def _take(slot: Any, register_path: Any, path: str) -> None:
    if slot.is_overridden() and slot.get_path() != path:
        logging.getLogger("vllm.anystride").warning(
            "%s is %s already: anystride is not registered. VLLM_PLUGINS=anystride loads it alone.",
            slot,
            slot.get_path(),
        )
        return
    register_path(slot, path)


def __getattr__(name: str) -> Any:
    """``Backend``: vLLM has one place for back ends from outside, and looks it up for each model's layers."""
    if name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = import_module("vllm.config").get_current_vllm_config()
    kind = "mla" if config.model_config.use_mla else "gqa"
    return import_module(f"{__name__}.{kind}").Backend
