"""The call shapes of other libraries: change one import, and anystride runs the call.

One module for each original, imported only when it is used: ``flash_mla``, ``cutlass_mla``, ``flashinfer``,
``vllm_triton``, ``flash_attn``. Each translates arguments and results and nothing more. None of them needs
the original to be installed.

``sglang`` is another kind: an attention back end that SGLang loads.
"""
