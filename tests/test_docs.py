"""The code on README.md and on the pages of docs/ runs and prints what stands there."""

import contextlib
import doctest
import io
import pathlib
import re
import tomllib

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def code_blocks(text):
    """(language, code, line of the code's start) of every fenced block."""
    return [
        (match[1], match[2], text[: match.start(2)].count("\n") + 1)
        for match in FENCE.finditer(text)
    ]


def run_page(name, text):
    """Runs a page's Python blocks one after the other in one namespace; returns what they print.

    A block with `>>>` is a doctest. Any other block is run as it is, and if a `text` block follows
    it, that is what it must print.
    """
    namespace, printed, last = {"__name__": "__main__"}, io.StringIO(), ""
    for language, code, line in code_blocks(text):
        if language == "text":
            assert squeezed(last) == squeezed(code), f"{name}:{line}"
        if language != "python":
            continue
        if ">>>" in code:
            last = run_doctest(name, code, line, namespace)
        else:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * (line - 1) + code, name, "exec"), namespace)
            last = out.getvalue()
        printed.write(last)
    return printed.getvalue()


def run_doctest(name, code, line, namespace):
    test = doctest.DocTestParser().get_doctest(code, namespace, name, name, line - 1)
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    results = runner.run(test, out=report.write, clear_globs=False)
    assert not results.failed, report.getvalue()
    namespace.update(test.globs)  # the test works on a copy
    return ""


def squeezed(text):
    return [" ".join(line.split()) for line in text.strip().splitlines()]


@pytest.fixture
def users_settings():
    """JAX as a user finds it, not as strict as in other tests."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_on_page_runs(page, users_settings):
    run_page(page.name, page.read_text())


def test_runner_notices_wrong_output():
    with pytest.raises(AssertionError, match="Expected"):
        run_page("page", "```python\n>>> 1 + 1\n3\n```\n")
    with pytest.raises(AssertionError, match="page:5"):
        run_page("page", "```python\nprint(2)\n```\n```text\n3\n```\n")
    with pytest.raises(ZeroDivisionError):
        run_page("page", "```python\n1 / 0\n```\n")


def test_blocks_of_a_page_share_names():
    assert run_page("page", "```python\n>>> x = 2\n```\n\n```python\nprint(x)\n```\n") == "2\n"


def test_memory_table_of_readme_is_what_its_command_prints(users_settings):
    memory = (ROOT / "README.md").read_text().split("## Memory")[1].split("\n## ")[0]
    table = re.findall(r"^\| `.*\| ([0-9.]+) \|$", memory, re.MULTILINE)
    assert len(table) == 5
    assert run_page("README.md", memory).split() == table


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_readme_has_one_test_command_and_one_job_command():
    commands = [
        code for lang, code, _ in code_blocks((ROOT / "README.md").read_text()) if lang == "sh"
    ]
    assert len(commands) == 2
    assert all(len(command.splitlines()) == 1 for command in commands)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for command in commands:
        assert command.startswith("python3.11 -m venv .venv && ")
        (extra,) = re.findall(r'-e "\.\[(\w+)\]"', command)
        assert extra in extras
    assert "-m pytest" in commands[1] and "-m pytest" not in commands[0]
