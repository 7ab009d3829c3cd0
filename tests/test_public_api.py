"""What every public name has: a place in `__all__`, documentation, Optax's signature."""

import importlib
import inspect
import pathlib
import pkgutil
import re

import optax
import optax.contrib
import pytest

import optax_lowbit

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = [
    "optax_lowbit",
    *(
        module.name
        for module in pkgutil.walk_packages(optax_lowbit.__path__, "optax_lowbit.")
        if module.ispkg and not module.name.startswith("optax_lowbit.kernels.")
    ),
]
NAMES = [
    (package, name) for package in PACKAGES for name in importlib.import_module(package).__all__
]

COUNTERPARTS = {
    "adagrad8bit": optax.adagrad,
    "adam4bit": optax.adam,
    "adam8bit": optax.adam,
    "adamw4bit": optax.adamw,
    "adamw8bit": optax.adamw,
    "ademamix4bit": optax.contrib.ademamix,
    "factor4bit": optax.adamw,
    "lion4bit": optax.lion,
    "lion8bit": optax.lion,
    "rmsprop8bit": optax.rmsprop,
    "muon4bit": optax.contrib.muon,
    "scale_by_adam4bit": optax.scale_by_adam,
    "scale_by_adam8bit": optax.scale_by_adam,
    "scale_by_factor4bit": optax.scale_by_adam,
    "sgd4bit": optax.sgd,
    "sgd8bit": optax.sgd,
    "trace4bit": optax.trace,
}
# What optax has as a class, or not at all.
OWN = {"correct_bfloat16"}
LOW_BIT = {
    "backend", "eps1", "key", "m1_spec", "m2_spec", "mu_spec", "nu_spec", "policy",
    "sum_of_squares_spec", "trace_spec",
}  # fmt: skip


def import_order(name):
    """The order of ruff's RUF022: constants, classes, the rest; numbers by their value."""
    kind = 0 if len(name) > 1 and name.isupper() else 1 if name[0].isupper() else 2
    pieces = re.split(r"(\d+)", name)
    return kind, [(piece.isdigit(), int(piece) if piece.isdigit() else piece) for piece in pieces]


def documented_objects():
    """What the directives of the API page name."""
    directives = re.findall(r"^\.\. auto\w+:: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.M)
    found = []
    for target in directives:
        module, name = target.rsplit(".", 1)
        found.append(getattr(importlib.import_module(module), name))
    return found


def is_factory(value):
    """Whether it makes a transform from nothing but numbers: wrappers have no counterpart."""
    if not inspect.isfunction(value):
        return False
    signature = inspect.signature(value)
    is_wrapper = next(iter(signature.parameters), "") == "tx"
    return "GradientTransformation" in str(signature.return_annotation) and not is_wrapper


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_without_repetition(package):
    names = importlib.import_module(package).__all__
    assert list(names) == sorted(set(names), key=import_order)


def test_import_order_is_that_of_ruff():
    names = ["adam8bit", "Policy", "QuantSpec", "adam10bit", "NAMES", "QuantizedArray", "adam"]
    assert sorted(names, key=import_order) == [
        "NAMES", "Policy", "QuantSpec", "QuantizedArray", "adam", "adam8bit", "adam10bit",
    ]  # fmt: skip


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_name_exists_and_is_the_same_everywhere(package, name):
    value = getattr(importlib.import_module(package), name)
    if name in optax_lowbit.__all__:
        assert value is getattr(optax_lowbit, name)


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_name_is_documented(package, name):
    value = getattr(importlib.import_module(package), name)
    doc = inspect.getdoc(value)
    assert doc
    if isinstance(value, optax_lowbit.QuantSpec):
        return
    if inspect.isclass(value):
        # What a dataclass or a NamedTuple writes for itself is a signature.
        assert not doc.startswith(f"{name}(")
        return
    assert "\nExamples:\n" in doc and ">>>" in doc
    if len(inspect.signature(value).parameters) > 1:
        assert "\nArgs:\n" in doc and "\nReturns:\n" in doc


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_every_argument_is_documented(package, name):
    value = getattr(importlib.import_module(package), name)
    doc = inspect.getdoc(value)
    if not inspect.isfunction(value) or "\nArgs:\n" not in doc:
        return
    section = re.split(r"\n(?=\S)", doc.split("\nArgs:\n")[1])[0]
    entries = re.findall(r"^  (\w+(?:, \w+)*):", section, re.M)
    listed = [name for entry in entries for name in entry.split(", ")]
    assert sorted(listed) == sorted(inspect.signature(value).parameters)


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_name_is_on_the_api_page(package, name):
    value = getattr(importlib.import_module(package), name)
    assert any(value is documented for documented in documented_objects())


def test_every_factory_has_a_counterpart():
    factories = {n for n in optax_lowbit.__all__ if is_factory(getattr(optax_lowbit, n))}
    assert factories == COUNTERPARTS.keys() | OWN


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_signature_is_that_of_optax_then_low_bit_keywords(name):
    theirs = inspect.signature(COUNTERPARTS[name]).parameters
    ours = inspect.signature(getattr(optax_lowbit, name)).parameters

    def positional(parameters):
        return [
            (p.name, p.default) for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

    assert positional(ours) == positional(theirs)
    keywords = {p.name: p.default for p in ours.values() if p.kind is p.KEYWORD_ONLY}
    for parameter in theirs.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert keywords.pop(parameter.name) == parameter.default
    assert keywords.keys() <= LOW_BIT
    assert len(ours) == len(positional(theirs)) + len(keywords) + sum(
        p.kind is p.KEYWORD_ONLY for p in theirs.values()
    )  # no *args, no **kwargs: optax.inject_hyperparams cannot pass them on
