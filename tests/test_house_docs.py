"""The documentation says what is so: its links resolve, its commands and flags exist, its settings are the code's."""

from __future__ import annotations

import dataclasses
import re
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

import pathways as pw
from pathways.cli.overrides import Field, read_fields
from tasks.spec import LOSSES, METRICS, Task

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SECTIONS = ("model", "encoders", "balance", "train", "mesh")

if not (ROOT / "docs").is_dir():
    pytest.skip("the documentation is not beside the tests", allow_module_level=True)


def _commands() -> dict[str, object]:
    from pathways.cli.parser import build

    return dict(build()[1])


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def _links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(page.read_text(encoding="utf-8"))):
        if "://" not in target:
            yield target


def _anchors(page: Path) -> set[str]:
    """The names that headings of a page get, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _code(text: str) -> Iterator[str]:
    """Lines of fenced blocks and pieces of inline code."""
    for block in re.findall(r"^```.*?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def _table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(heading + "\n")[2]
    lines = [line for line in re.split(r"\n(?=[^|])", text[text.index("\n|") + 1 :])[0].splitlines() if line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in _anchors(target), f"{page.name}: {link}"


def test_every_page_is_reachable_from_the_first() -> None:
    found = {link for link in _links(ROOT / "docs" / "index.md") if link.endswith(".md")}
    assert {page.name for page in PAGES if page.parent.name == "docs"} - {"index.md"} <= found


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "pictures").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_can_be_read_on_any_background(picture: Path) -> None:
    root = ElementTree.parse(picture).getroot()
    space = "{http://www.w3.org/2000/svg}"
    ground = root.find(f"{space}rect")
    assert ground is not None
    assert (ground.get("fill"), ground.get("width")) == ("#ffffff", root.get("width"))
    assert ground.get("height") == root.get("height")
    assert root.find(f"{space}title") is not None
    texts = " ".join((ROOT / "docs" / name.name).read_text() for name in PAGES if name.parent.name == "docs")
    assert picture.name in texts, "no page shows it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_their_flags(page: Path) -> None:
    known = _commands()
    overrides = {f"--{field.name}" for field in read_fields()}
    for code in _code(page.read_text(encoding="utf-8")):
        for words in _invocations(code):
            name = words[0]
            assert name in known, f"{page.name}: pathways {name}"
            flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            defined = set(known[name]._option_string_actions)  # type: ignore[attr-defined]
            assert flags <= defined | overrides, f"{page.name}: {' '.join(words)}"


def _invocations(code: str) -> Iterator[list[str]]:
    match = re.match(r"\s*(?:\$ )?(?:python -m )?pathways\s+([a-z][a-z-]*.*)", code)
    if match:
        # Comments end at a #, and quotes may be left open by a line that goes on.
        text = match[1].partition(" #")[0]
        try:
            yield shlex.split(text)
        except ValueError:
            yield text.split()


def test_every_command_is_told_of_in_the_list_of_commands() -> None:
    page = ROOT / "docs" / "commands.md"
    if not page.exists():
        pytest.skip("there is no list of commands yet")
    text = page.read_text(encoding="utf-8")
    assert [name for name in _commands() if f"pathways {name}" not in text] == []


def test_the_table_of_a_task_is_the_task() -> None:
    told = {row[0].strip("`"): row for row in _table("tasks.md", "## Fields of a task")}
    fields = {field.name: field for field in dataclasses.fields(Task)}
    assert set(told) == set(fields)
    for name in ("weight", "on_bad"):
        assert told[name][2].strip('`"') == str(fields[name].default).removesuffix(".0")


def test_the_table_of_targets_is_that_of_the_code() -> None:
    told = {row[0].strip("`"): row for row in _table("tasks.md", "## Targets")}
    assert set(told) == set(LOSSES)
    for kind, row in told.items():
        assert tuple(re.findall(r"`(\w+)`", row[3])) == LOSSES[kind]  # type: ignore[index]
        assert tuple(re.findall(r"`(\w+)`", row[4])) == METRICS[kind]  # type: ignore[index]


def test_the_table_of_encoders_is_that_of_the_code() -> None:
    told: dict[str, str] = {}
    for names, values, _ in _table("tasks.md", "### Settings of the encoders"):
        told |= dict(zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True))
    assert told == {f.name.partition(".")[2]: f.default for f in read_fields() if f.section == "encoders"}


def _settings() -> dict[str, Field]:
    return {field.name: field for field in read_fields()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page: Path) -> None:
    known, prefixes = _settings(), {name.rpartition(".")[0] for name in _settings()}
    for code in _code(page.read_text(encoding="utf-8")):
        for name in re.findall(rf"(?<![\w/.\-])((?:{'|'.join(SECTIONS)})\.[a-z_]+(?:\.[a-z_]+)?)(?![\w/])", code):
            rest = name.partition(".")[2]  # may be a file, or a method: `model.predict(...)` in an example
            assert rest in ("py", "toml") or hasattr(pw.Model, rest) or name in known or name in prefixes, (
                f"{page.name}: {name}"
            )


@pytest.mark.parametrize(("key", "heading"), [("kind", "## Kinds of gates"), ("scope", "## Scope: whose gate")])
def test_the_gates_of_the_routing_page_are_those_of_the_code(key: str, heading: str) -> None:
    field = _settings()[f"model.gate.{key}"]
    told = [row[0] for row in _table("routing.md", heading)]
    assert {re.findall(r"`(\w+)`", cell)[0] for cell in told} == set(field.metavar.strip("{}").split(","))
    assert [cell for cell in told if "default" in cell] == [f"`{field.default}` (default)"]


def test_the_balance_table_is_that_of_the_code() -> None:
    told = {row[0].strip("`"): row[1] for row in _table("routing.md", "## Balance")}
    found = {name: field.default for name, field in _settings().items() if field.section == "balance"}
    assert told == {name: default.removesuffix(".0") for name, default in found.items()}


def test_python_names_in_pages_are_public() -> None:
    for page in PAGES:
        for name in re.findall(r"\bpw\.([A-Za-z_]\w*)", page.read_text(encoding="utf-8")):
            assert name in pw.__all__, f"{page.name}: pw.{name}"
