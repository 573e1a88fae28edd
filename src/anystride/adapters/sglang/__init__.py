"""An attention back end of SGLang: ``--attention-backend anystride``.

SGLang finds :func:`register` by the entry point group ``sglang.srt.plugins`` and calls it in each of its
processes. The back end itself, and with it SGLang's modules, is imported when a model asks for it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["NAME", "READ_IN", "make_backend", "register"]

NAME = "anystride"
READ_IN = "0.5.23"  # of SGLang: its interface is not promised to stay


def register() -> None:
    """Make ``anystride`` a choice of ``--attention-backend``. May be called again."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(NAME)(make_backend)
    for known, add in (
        (choices.ATTENTION_BACKEND_CHOICES, choices.add_attention_backend_choices),
        (
            choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
            choices.add_deterministic_attention_backend_choices,
        ),
    ):
        if NAME not in known:
            add([NAME])
    if NAME not in choices.CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS:
        choices.add_chunked_prefix_cache_attention_backend(NAME)


def make_backend(runner: Any) -> Any:
    """The back end of one model.

    Args:
        runner: SGLang's ``ModelRunner``, its pools allocated.

    Returns:
        An :class:`anystride.adapters.sglang.backend.AnystrideBackend`.

    Raises:
        UnsupportedError: The model or the server's arguments ask for what is not here.
    """
    from anystride.adapters.sglang.backend import AnystrideBackend

    if runner.use_mla_backend:
        _register_mla()
    return AnystrideBackend(runner)


def _register_mla() -> None:
    """Have MLA models of the DeepSeek family call the back end as they call FlashAttention-3's.

    Prompts are attended to with the keys and values of each head where that is cheaper, in chunks where
    they have a cached prefix; all else is absorbed, with the rope parts apart. SGLang looks both lists up in
    each forward, and importing them is dear, so this waits until an MLA model is there.
    """
    from sglang.srt.models.deepseek_common import attention_backend_handler, utils

    if NAME not in utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS:
        utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS.append(NAME)
    attention_backend_handler.AttentionBackendRegistry.register(
        NAME, attention_backend_handler.handle_attention_fa3
    )
