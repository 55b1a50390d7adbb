"""The `--section.field` flags of `pathways train`, read from the source of the configuration's dataclasses.

Read, not imported: a help text must not wait for numpy. Values are TOML; their types are checked when the
configuration is made.
"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

HOUSE = Path(__file__).resolve().parent.parent
SOURCES = (HOUSE / "config.py", HOUSE.parent / "tasks" / "encoded.py")
ROOT = "Config"


@dataclass(frozen=True)
class Field:
    """One setting: its dotted name, its type and default as they are written, and what its docstring says."""

    name: str
    type: str
    default: str
    help: str

    @property
    def section(self) -> str:
        return self.name.partition(".")[0]

    @property
    def metavar(self) -> str:
        """The choices of a Literal, else the type in capitals."""
        choices = re.fullmatch(r"Literal\[(.*)\]", self.type)
        if choices:
            return "{" + choices[1].replace('"', "").replace("'", "").replace(" ", "") + "}"
        return {"bool": "{true,false}", "str": "TEXT"}.get(self.type, self.type.partition("[")[0].upper())


def read_fields() -> list[Field]:
    """Every leaf setting of the configuration but its tasks, in order."""
    classes: dict[str, ast.ClassDef] = {}
    for source in SOURCES:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return list(_fields(classes, ROOT, ""))


def _fields(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> list[Field]:
    node, found = classes[name], []
    texts = attribute_texts(ast.get_docstring(node) or "")
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        kind, key = ast.unparse(item.annotation), item.target.id
        if kind in classes:
            found += _fields(classes, kind, f"{prefix}{key}.")
        elif not (prefix == "" and key == "tasks"):
            found.append(Field(f"{prefix}{key}", kind, _default(item.value), texts.get(key, "")))
    return found


def _default(value: ast.expr | None) -> str:
    """The default as TOML would have it."""
    if isinstance(value, ast.Call):
        factory = next((word.value for word in value.keywords if word.arg == "default_factory"), None)
        value = factory.body if isinstance(factory, ast.Lambda) else None
    if value is None:
        return ""
    if isinstance(value, ast.Dict):
        items = ast.literal_eval(value).items()
        return "{" + ", ".join(f"{key} = {item}" for key, item in items) + "}"
    constant = ast.literal_eval(value)
    if isinstance(constant, tuple):
        return str(list(constant))
    return str(constant).lower() if isinstance(constant, bool) else str(constant)


def attribute_texts(docstring: str) -> dict[str, str]:
    """Name -> text, of the lines `name, name: text` under `Attributes:`."""
    lines = docstring.partition("Attributes:\n")[2].splitlines()
    block = textwrap.dedent("\n".join(takewhile(lambda line: line[:1] in ("", " "), lines)))
    found: dict[str, str] = {}
    names: list[str] = []
    for line in block.splitlines():
        head = re.match(r"(\w+(?:, \w+)*): (.*)", line)
        if head:
            names = head[1].split(", ")
            found |= dict.fromkeys(names, head[2])
        elif line.startswith(" "):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return {name: text.replace("`", "") for name, text in found.items()}


def parse_value(text: str) -> Any:
    """A flag's value: TOML where it is TOML, else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
