"""What holds the package together: what an import needs, who may import whom, what nobody may write."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest

import anystride
import anystride.adapters.cutlass_mla
import anystride.adapters.flash_attn
import anystride.adapters.flash_mla
import anystride.adapters.flashinfer
import anystride.adapters.sglang
import anystride.adapters.transformers
import anystride.adapters.vllm_triton
import anystride.cache
import anystride.distributed

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "anystride"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up. A room may import what lies below it; rooms of one line may not import each other.
ROOMS = (
    ("anystride.errors", "anystride.merge", "anystride.kernels", "anystride.memory", "anystride.driver"),
    ("anystride.problem", "anystride.logs"),
    ("anystride.reference", "anystride.packing", "anystride.store"),
    ("anystride.blocks",),
    ("anystride.launch",),
    ("anystride.work",),
    ("anystride.backends",),
    ("anystride.plan",),
    ("anystride.store_plan",),
    ("anystride.ops", "anystride.explanation"),
    ("anystride.api", "anystride.cache"),
    ("anystride",),
    ("anystride.distributed", "anystride.peers", "anystride.collect_env", "anystride.adapters"),
    ("anystride.testing",),
    ("anystride.bench",),
    ("anystride.cli",),
)

# Packages besides torch and the standard library, and where they may be imported.
OTHERS = {
    "triton": (
        "anystride.kernels.",
        "anystride.launch",
        "anystride.backends.triton",
        "anystride.peers",
        "anystride.bench",
    ),
    "pytest": ("anystride.testing.pytest_items",),
    "vllm": ("anystride.adapters.vllm.",),
    "sglang": ("anystride.adapters.sglang",),
    "rich": ("anystride.cli",),
    "typer": ("anystride.cli",),
    "matplotlib": ("anystride.cli",),
    "transformers": ("anystride.adapters.transformers",),
}

READS_VALUES = (
    "anystride.reference",
    "anystride.backends.reference",
    "anystride.backends.cpu",
    "anystride.packing",
    "anystride.explanation",
    "anystride.peers",
    "anystride.testing",
    "anystride.bench",
    "anystride.cli",
    "anystride.adapters.flashinfer.page_lists",  # in plan, once a step, as the original does
)
# Methods and functions that a module may not call, the modules that may, and why the others may not.
BANNED = {
    # What the yardstick on CPUs is about: a copy of each sequence.
    "contiguous": (("anystride.peers.gathered_sdpa",), "the cache is never copied: strides are data"),
    "is_contiguous": (("anystride.testing",), "contiguity is never asked for"),
    "clone": (("anystride.testing",), "clone() gives a strided view other strides"),
    "empty_like": (("anystride.testing",), "empty_like() gives a strided view other strides"),
    "make_block_ptr": ((), "block pointers count offsets in 32 bits"),
    "synchronize": (
        ("anystride.explanation", "anystride.testing", "anystride.bench", "anystride.cli"),
        "a call never waits for the device",
    ),
    "item": (READS_VALUES, "a call never reads a value on the host"),
    "tolist": (READS_VALUES, "a call never reads a value on the host"),
    "cpu": (READS_VALUES, "a call never reads a value on the host"),
    "numpy": (READS_VALUES, "a call never reads a value on the host"),
    "nonzero": (READS_VALUES, "its shape depends on values, which the host must then read"),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_in(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(room.rstrip(".") + ".") for room in rooms)


def floor_of(module: str) -> tuple[int, str]:
    """The floor and the room of a module."""
    found = [
        (floor, room)
        for floor, rooms in enumerate(ROOMS)
        for room in rooms
        if module == room or (room != "anystride" and module.startswith(room + "."))
    ]
    assert len(found) == 1, f"{module} has no place in ROOMS; say what it may import"
    return found[0]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}:{node.lineno}: relative import"
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = any(name_of(other) == whole for other in MODULES)
                yield node.lineno, whole if is_module else node.module


def calls_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and last name of every function or method that a file calls."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield node.lineno, node.func.attr
            elif isinstance(node.func, ast.Name):
                yield node.lineno, node.func.id


def fresh_process(code: str) -> str:
    """Run code in an interpreter of its own and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_call_runs_with_nothing_but_torch_installed() -> None:
    code = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "rich", "typer", "matplotlib", "numpy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
import anystride
import anystride.backends.cpu
import anystride.testing
from anystride.adapters import cutlass_mla, flash_attn, flash_mla, flashinfer, sglang, vllm_triton

q, k = torch.randn(1, 4, 16), torch.randn(3, 2, 2, 16)
cu_seqlens_q = torch.tensor([0, 1], dtype=torch.int32)
args = (q, k, k[..., :8], 1, cu_seqlens_q, 3)
more = {"seqused_k": torch.tensor([3], dtype=torch.int32)}
more["block_table"] = torch.tensor([[2, 0]], dtype=torch.int32)
out = anystride.flash_attn_varlen_func(*args, **more)
law = anystride.flash_attn_varlen_func(*args, **more, backend="reference")
torch.testing.assert_close(out, law)
told = anystride.explain(*args, **more)
print(told.backend, told.refusals)
try:
    anystride.flash_attn_varlen_func(*args, **more, backend="triton")
except anystride.UnsupportedError as error:
    print(error)
"""
    printed = fresh_process(code)
    assert printed.startswith("cpu ")
    assert printed.count("triton is not installed; needs the package triton") == 2
    assert printed.count("hopper is not installed; needs the package triton") == 1


def test_the_import_loads_no_other_package_than_torch_loads() -> None:
    code = """
import sys
import torch, torch.library
before = {name.partition(".")[0] for name in sys.modules}
import anystride
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before - set(sys.stdlib_module_names)))
"""
    assert fresh_process(code).split() == ["anystride"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way_down(path: Path) -> None:
    module = name_of(path)
    floor, room = floor_of(module)
    for line, imported in imports_of(path):
        package = imported.partition(".")[0]
        if package == "anystride":
            other_floor, other_room = floor_of(imported)
            same_room = room == other_room
            if same_room and room == "anystride.backends":
                raise AssertionError(f"{path}:{line}: a back end imports {imported}, another one")
            assert same_room or other_floor < floor, f"{path}:{line}: imports {imported}, not below it"
        elif package != "torch" and package not in sys.stdlib_module_names:
            assert is_in(module, OTHERS.get(package, ())), f"{path}:{line}: imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_banned_is_called(path: Path) -> None:
    module = name_of(path)
    for line, called in calls_of(path):
        allowed, why = BANNED.get(called, ((module,), ""))
        assert is_in(module, allowed), f"{path}:{line}: calls {called}(): {why}"
    for line, text in enumerate(path.read_text().splitlines(), 1):
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), f"{path}:{line}: {text.strip()}"


def test_the_changelog_begins_with_the_version() -> None:
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == anystride.__version__


def test_the_version_is_written_in_one_place() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^dynamic = \["version"\]', text, re.MULTILINE)
    assert not re.search(r'^version = "', text, re.MULTILINE)


PUBLIC = [name for name in anystride.__all__ if name != "__version__"]
PUBLIC += [f"cache.{name}" for name in anystride.cache.__all__]
PUBLIC += [f"distributed.{name}" for name in anystride.distributed.__all__]
PUBLIC += [
    f"adapters.{original}.{name}"
    for original in ("cutlass_mla", "flash_attn", "flash_mla", "flashinfer", "transformers", "vllm_triton")
    for name in attrgetter(f"adapters.{original}.__all__")(anystride)
]
PUBLIC += ["adapters.sglang.make_backend"]
PUBLIC += [
    f"adapters.flashinfer.{wrapper}.{method}"
    for wrapper in anystride.adapters.flashinfer.__all__
    for method in ("plan", "run")
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_name_every_argument(name: str) -> None:
    public = attrgetter(name)(anystride)
    text = inspect.getdoc(public) or ""
    assert text, f"{name} has no docstring"
    if inspect.isclass(public):
        return
    signature = inspect.signature(public)
    sections = re.split(r"^(Args|Returns|Raises|Notes|Source):", text, flags=re.MULTILINE)
    if name == "explain":  # its arguments are those of the entry
        assert "Takes the arguments of :func:`flash_attn_varlen_func`" in sections[0]
    else:
        described = sections[sections.index("Args") + 1] if signature.parameters else ""
        heads = re.findall(r"^    (\**\w+(?:, \**\w+)*):", described, re.MULTILINE)
        told = {word.strip().lstrip("*") for head in heads for word in head.split(",")}
        assert told == set(signature.parameters) - {"self"}
    assert ("Returns" in sections) == (signature.return_annotation != "None")


@pytest.mark.parametrize("document", ["README.md", "docs/adapters.md", "docs/transformers.md"])
def test_the_examples_in_documents_run(document: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks, f"{document} shows no example"
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, document, "exec"), names)


def test_links_in_documents_lead_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document}: {target} does not exist"
