"""Back ends: each a module with ``NAME``, ``refusals``, ``choose_config`` and ``run``."""
