"""The plugin for vLLM as far as it goes without vLLM; in the real engine: tests/vllm_engine."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from enum import Enum
from importlib.metadata import entry_points
from typing import Any

import pytest

from anystride.adapters import vllm as plugin

REGISTRY = "vllm.v1.attention.backends.registry"
PREFILL = "vllm.v1.attention.backends.mla.prefill.registry"


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="anystride")
    assert found.load() is plugin.register


def test_nothing_of_vllm_is_imported_with_the_plugin() -> None:
    code = "import sys, anystride.adapters.vllm; print([n for n in sys.modules if n.split('.')[0] == 'vllm'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_the_plugin_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        plugin.Nonsense  # noqa: B018


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """vLLM's two registries as far as ``register`` touches them: a member CUSTOM, and the path it has."""
    taken: dict[str, str] = {}

    def registry(enum: str, function: str) -> Any:
        class Slot(Enum):
            CUSTOM = None

            def is_overridden(self) -> bool:
                return enum in taken

            def get_path(self) -> str:
                return taken[enum]

        module = types.ModuleType(enum)
        setattr(module, enum, Slot)
        setattr(module, function, lambda slot, path: taken.__setitem__(enum, path))
        return module

    # Their parents are not imported where the module itself is there.
    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name in ("vllm.v1.attention.backends.mla", "vllm.v1.attention.backends.mla.prefill"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, REGISTRY, registry("AttentionBackendEnum", "register_backend"))
    prefill = registry("MLAPrefillBackendEnum", "register_mla_prefill_backend")
    monkeypatch.setitem(sys.modules, PREFILL, prefill)
    return taken


def test_registering_twice_is_registering_once(
    slots: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    plugin.register()
    plugin.register()
    assert slots == {
        "AttentionBackendEnum": "anystride.adapters.vllm.Backend",
        "MLAPrefillBackendEnum": "anystride.adapters.vllm.prefill.Prefill",
    }
    assert caplog.records == []


def test_what_another_plugin_has_registered_stays(
    slots: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    slots["AttentionBackendEnum"] = "other.Backend"
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert slots["AttentionBackendEnum"] == "other.Backend"
    (record,) = caplog.records
    assert "is other.Backend already: anystride is not registered" in record.getMessage()
