"""Options of pytest with which another project puts the conformance kit into its own tests.

A module outside of the package, because pytest imports it in every run of every project that has anystride
installed: it must not bring PyTorch along. What the options ask for is in ``anystride.testing.pytest_items``.
"""

from __future__ import annotations

import pytest

__all__: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("anystride", "anystride: is a paged-attention kernel right in every layout?")
    group.addoption(
        "--anystride-kernel",
        action="append",
        default=[],
        metavar="KERNEL",
        help="add the tests of a kernel: module:function, a back end of anystride, or a peer; repeatable",
    )
    group.addoption("--anystride-device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1, ...")
    group.addoption(
        "--anystride-layouts",
        default=None,
        metavar="NAMES",
        help="layouts of the catalogue, with commas between them, or none; by default all",
    )
    group.addoption(
        "--anystride-peers", default=None, metavar="FOLDER", help="the folder of peers that are not installed"
    )
    group.addoption(
        "--anystride-allow-copies",
        action="store_true",
        help="let a kernel pass that is right but copies the cache",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Load the kit, if a kernel was named."""
    if config.getoption("anystride_kernel"):
        from anystride.testing.pytest_items import Kit

        config.pluginmanager.register(Kit(config), "anystride-kit")
