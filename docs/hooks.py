"""What the site needs beyond its settings: the names of a family, links from names, docstrings in griffe's form."""

import re
from pathlib import Path

import griffe

PACKAGE = griffe.load("detops", search_paths=[Path(__file__).parents[1]], allow_inspection=False, resolve_aliases=True)


def definition(name: str) -> griffe.Object:
    """Of a public name, found by its import: `nms` of the package is the function, not the module of that name."""
    found = PACKAGE[PACKAGE.imports[name].removeprefix("detops.")]
    return found.final_target if found.is_alias else found


DOCSTRING_ALONE = "\n    options: { members: [], show_root_heading: false }"
DEFINITIONS = {name: definition(name) for name in PACKAGE.exports}


def names_of(family: str) -> list[str]:
    """The public names imported from modules whose name begins so: in the order of the source, results last."""
    names = [name for name in DEFINITIONS if PACKAGE.imports[name].startswith(f"detops.{family}")]

    def place(name: str) -> tuple:
        found = DEFINITIONS[name]
        return found.module.path, is_result(found), found.lineno

    return sorted(names, key=place)


def modules_of(family: str) -> list[str]:
    """The modules that these names are imported from, where their docstrings say what holds for all names."""
    paths = dict.fromkeys(PACKAGE.imports[name].rpartition(".")[0] for name in names_of(family))
    return [path for path in paths if "\n\n" in PACKAGE[path.removeprefix("detops.")].docstring.value]


def is_result(found: griffe.Object) -> bool:
    return found.is_class and "NamedTuple" in map(str, found.bases)


def on_page_markdown(markdown: str, **_) -> str:
    """`::: family nms` describes its names, `names of nms` lists them."""

    def descriptions(found: re.Match) -> str:
        modules = [f"::: {path}{DOCSTRING_ALONE}" for path in modules_of(found[1])]
        return "\n".join([*modules, *(f"::: {DEFINITIONS[name].path}" for name in names_of(found[1]))])

    def listing(found: re.Match) -> str:
        return ", ".join(f"`{name}`" for name in names_of(found[1]))

    markdown = re.sub(r"^::: family (\w+)$", descriptions, markdown, flags=re.MULTILINE)
    return re.sub(r"\bnames of (\w+)", listing, markdown)


def on_page_content(html: str, **_) -> str:
    """A public name, or a module, in code font links to its description. A strict build fails where it has none."""
    pieces = re.split(r"(<pre.*?</pre>|<a .*?</a>|<h\d.*?</h\d>)", html, flags=re.DOTALL)
    pieces[::2] = [re.sub(r"<code>([\w.]+)</code>", link, piece) for piece in pieces[::2]]
    return "".join(pieces)


def link(found: re.Match) -> str:
    name = found[1].removeprefix("detops.")
    if name in DEFINITIONS:
        path = DEFINITIONS[name].path
    elif found[1] in modules_of(name):
        path = found[1]
    else:
        return found[0]
    return f'<autoref identifier="{path}">{found[0]}</autoref>'


class Docstrings(griffe.Extension):
    """Examples are code, what is called returns what its signature says, and the fields of a result are a list."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        # Lines of a session that no section holds.
        obj.docstring.value = re.sub(r"((?:^(?:>>>|\.\.\.) .*\n)+)", r"```pycon\n\1```\n", text, flags=re.MULTILINE)

    def on_function(self, *, func: griffe.Function, **_) -> None:
        self.type_result(func.docstring, func)

    def on_class_members(self, *, cls: griffe.Class, **_) -> None:
        if call := cls.members.get("__call__") or cls.members.get("forward"):
            self.type_result(cls.docstring, call)
        if not is_result(cls):
            return
        lines = [cls.docstring.value, "", "Attributes:"]
        for name, field in list(cls.attributes.items()):
            text = field.docstring.value.replace("\n", "\n        ")
            lines.append(f"    {name} ({field.annotation}): {text}")
            del cls.members[name]
        cls.docstring.value = "\n".join(lines)

    @staticmethod
    def type_result(docstring: griffe.Docstring | None, function: griffe.Function) -> None:
        if docstring is not None and function.returns is not None:
            typed = rf"\1{function.returns}: "
            docstring.value = re.sub(r"^(Returns:\n    )", typed, docstring.value, flags=re.MULTILINE)
