"""Which part of the package may import which, read from its source."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "optax_lowbit"

# A part imports itself and parts below it. Parts on one level do not import one another.
LEVELS = (
    {"quant"},
    {"kernels"},
    {"moments"},
    {"optimizers", "zo", "adapters"},
    {"qlora"},
    {"sharding", "offload", "checkpoint", "memory"},
)
RUNTIME = {"jax", "numpy", "optax"}
# Only inside functions, or where `sys.modules` has shown that the user has imported it.
LAZY = {"flax", "orbax", "safetensors"}
# Modules that need one of these from their first line; imported only inside functions, too.
NEEDS = {
    "optax_lowbit.adapters.nnx_einsum": {"flax"},
    "optax_lowbit.adapters.nnx_layers": {"flax"},
    "optax_lowbit.adapters.nnx_models": {"flax"},
    "optax_lowbit.adapters.nnx_virtual_tokens": {"flax"},
    "optax_lowbit.adapters.linen_layers": {"flax"},
    "optax_lowbit.qlora.layers": {"flax"},
}
NEVER = {"examples", "benchmarks", "tests"}


def level(part):
    for number, parts in enumerate(LEVELS):
        if part in parts:
            return number
    raise AssertionError(f"{part!r} is in none of the levels of tests/test_dependencies.py")


def part_of(module):
    """`optax_lowbit.quant.array` -> `quant`; the package itself -> None."""
    return module.split(".")[1] if "." in module else None


def is_conditional(test):
    """Whether what stands under an `if` is imported by no user who has not imported it."""
    return "sys.modules" in test or test == "TYPE_CHECKING"


def imports(source, module, is_package=False):
    """(imported dotted name, whether it is lazy, line) of every import in a module's source."""
    found = []

    def visit(node, lazy):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            lazy = True
        if isinstance(node, ast.If) and is_conditional(ast.unparse(node.test)):
            for child in node.body:
                visit(child, True)
            for child in node.orelse:
                visit(child, lazy)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, lazy, node.lineno) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            # `from a import b` may import the module a.b.
            found.extend((f"{base}.{alias.name}", lazy, node.lineno) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return found


def violations(source, module, is_package=False):
    """What a module imports and must not, as texts."""
    wrong = []
    part = part_of(module)
    for name, lazy, line in imports(source, module, is_package):
        top = name.split(".")[0]
        needy = any(f"{name}.".startswith(f"{needy}.") for needy in NEEDS)
        if needy and not lazy and module not in NEEDS:
            wrong.append(f"{module}:{line}: {name} must be imported inside a function")
        if top == PACKAGE:
            # The package's __init__ only names what the parts offer.
            if part is None or part_of(name) == part:
                continue
            other = part_of(name)
            if other not in set().union(*LEVELS):
                wrong.append(f"{module}:{line}: {name}: import from the part, not from the package")
            elif level(other) >= level(part):
                wrong.append(f"{module}:{line}: {part} must not import {other}")
        elif top in NEVER or not (top in RUNTIME | LAZY or top in sys.stdlib_module_names):
            wrong.append(f"{module}:{line}: {top} is no run-time dependency")
        elif top in LAZY - NEEDS.get(module, set()) and not lazy:
            wrong.append(f"{module}:{line}: {top} must be imported inside a function")
        if "_src" in name.split("."):
            wrong.append(f"{module}:{line}: {name} is private")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr == "_src":
            wrong.append(f"{module}:{node.lineno}: {ast.unparse(node)} is private")
    return wrong


def modules():
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield ".".join(parts[:-1] if is_package else parts), is_package, path


@pytest.mark.parametrize(("module", "is_package", "path"), list(modules()), ids=str)
def test_module_imports_only_what_it_may(module, is_package, path):
    if part_of(module):
        level(part_of(module))
    assert violations(path.read_text(), module, is_package) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("quant.array", "from optax_lowbit.optimizers import Policy", "quant must not import opt"),
        ("quant.array", "from optax_lowbit import optimizers", "quant must not import optimizers"),
        ("quant.array", "from ..optimizers import policy", "quant must not import optimizers"),
        ("quant.array", "def f():\n  import optax_lowbit.qlora", "quant must not import qlora"),
        ("optimizers.sgd", "import optax_lowbit.zo.core", "optimizers must not import zo"),
        ("zo.core", "from optax_lowbit.adapters import lora", "zo must not import adapters"),
        ("memory", "import optax_lowbit.offload", "memory must not import offload"),
        ("quant.array", "from optax_lowbit import quantize", "import from the part"),
        ("quant.array", "import torch", "torch is no run-time dependency"),
        ("memory", "import examples.llm", "examples is no run-time dependency"),
        ("memory", "import flax", "flax must be imported inside a function"),
        ("adapters.nnx_layers", "import orbax", "orbax must be imported inside a function"),
        ("adapters.lora", "from . import nnx_layers", "nnx_layers must be imported inside a fun"),
        (
            "qlora.nf4",
            "from optax_lowbit.adapters.nnx_layers import LoRALinear",
            "LoRALinear must be imported inside a function",
        ),
        ("quant.array", "from jax._src import core", "jax._src.core is private"),
        ("quant.array", "import optax\noptax._src.base", "optax._src is private"),
    ],
)
def test_checker_can_fail(module, source, complaint):
    (found,) = violations(source, f"{PACKAGE}.{module}")
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("quant.array", "import math, jax.numpy as jnp\nfrom optax_lowbit.quant import packing"),
        ("quant.array", "from . import packing"),
        ("qlora.linear", "from optax_lowbit.adapters import lora\nfrom optax_lowbit import quant"),
        ("memory", "def f():\n  from flax import nnx"),
        ("adapters.nnx_layers", "from flax import nnx"),
        ("adapters.lora", "def f():\n  from optax_lowbit.adapters import nnx_layers"),
        ("adapters.nnx_models", "from optax_lowbit.adapters.nnx_layers import LoRALinear"),
        ("memory", "import sys\nif 'flax' in sys.modules:\n  import flax"),
    ],
)
def test_checker_allows(module, source):
    assert violations(source, f"{PACKAGE}.{module}") == []


def test_importing_the_package_imports_nothing_lazy():
    code = f"import sys, {PACKAGE}; sys.exit(not {LAZY}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
