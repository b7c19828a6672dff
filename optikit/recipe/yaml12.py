"""YAML 1.2 (core schema) over PyYAML's parser, with the place of every value, within budgets.

PyYAML resolves YAML 1.1, where `no` is false, `012` is ten and `1e-3` is text. Here its parser only delivers events
(which, unlike the nodes of `yaml.compose()`, also know where an alias stands, and need no recursion); scalars are
resolved by the tables of the YAML 1.2.2 specification, chapter 10.3.2. Always the parser written in Python: its
messages and columns are the same on every machine.

Refused, each with its place: duplicate keys, keys that aren't text, tags outside the core schema, merge keys,
several documents, and files whose aliases would expand beyond the budgets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Protocol

import yaml

from optikit.problems import Hint, Mark, Problem, did_you_mean
from optikit.recipe.node import Node, Scalar, plain

MAX_CHARACTERS = 2**18
"""Most characters of a recipe: of the densest, PyYAML reads about 50,000 a second; our own have up to 4,000."""
MAX_NODES = 100_000
MAX_EXPANDED_CHARACTERS = 4 * 2**20
MAX_DEPTH = 64
MAX_ALIASES = 100

_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(?:inf|Inf|INF)")

_CORE = "tag:yaml.org,2002:"
_SCALAR_TAGS: dict[str, type] = {"int": int, "float": float, "bool": bool, "null": type(None)}

_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # PyYAML's, so that its line numbers fit

_TAB = "found character '\\t' that cannot start any token"
_SYNTAX: tuple[tuple[str, str, str], ...] = (
    (_TAB, "a tab can't indent", "indent with spaces"),
    ("cannot start any token", "", "put quotes around the value"),
    ("mapping values are not allowed here", "a ':' where no key can be", "quote the value, or fix the indentation"),
    ("could not find expected ':'", "this is not `key: value`", "put a colon and a space after the key"),
    ("expected <block end>, but found", "this is not aligned with the lines above", "align keys of one mapping"),
    ("found unexpected end of stream", "a quote is opened and never closed", "close the quote"),
    ("expected ',' or ']'", "a list is not closed, or lacks a comma", "add ',' or ']'"),
    ("expected ',' or '}'", "a mapping is not closed, or lacks a comma", "add ',' or '}'"),
)
"""Part of PyYAML's message → the same in plain words (empty: PyYAML's own), fix."""
_MISALIGNED = frozenset({"a tab can't indent", "this is not aligned with the lines above"})
"""Of these, what another indentation of the line mends."""


def resolve(text: str) -> Scalar:
    """Return what a plain (unquoted) scalar means in the YAML 1.2 core schema.

    Raises:
        ValueError: If it is an integer of more than 64 bits.

    >>> [resolve(text) for text in ("1e-3", "no", "012", "0o14", "0x1F", "~", "2024-01-01", "1:30", "-.inf")]
    [0.001, 'no', 12, 12, 31, None, '2024-01-01', '1:30', -inf]
    """
    if text in _WORDS:
        return _WORDS[text]
    if _DECIMAL.fullmatch(text):
        return _integer(text, 10)
    if _BASED.fullmatch(text):
        return _integer(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    match = _INF.fullmatch(text)
    return float(match[1] + "inf") if match else text


def _integer(text: str, base: int) -> int:
    # Beyond 64 bits JSON readers disagree; and Python refuses to parse more than 4300 digits anyway.
    value = int(text, base) if len(text.lstrip("+-0ox")) <= 20 else 2**64
    if not -(2**63) <= value < 2**64:
        msg = "an integer of more than 64 bits"
        raise ValueError(msg)
    return value


@dataclass(frozen=True, kw_only=True)
class Document:
    """A file's one YAML document: `root` is None where nothing could be read, `problems` is all that was refused."""

    root: Node | None
    problems: tuple[Problem, ...] = ()


class _Refused(Exception):  # noqa: N818 - not an error: a problem on its way out of the event loop
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def compose(text: str, file: str) -> Document:
    """Read one YAML document.

    Args:
        text: The file's text; a byte order mark is skipped.
        file: Its name, for marks.

    Returns:
        The tree and every problem found. Never raises.
    """
    text = text.removeprefix("\ufeff")
    composer = _Composer(_Source(file=file, lines=tuple(_LINE_BREAK.split(text))))
    if len(text) > MAX_CHARACTERS:
        message = f"the file has {len(text)} characters; a recipe has at most {MAX_CHARACTERS}"
        return Document(root=None, problems=(_too_large(message, composer.source.first),))
    try:
        composer.read(text)
    except _Refused as refused:
        return Document(root=None, problems=(*composer.problems, refused.problem))
    return Document(root=composer.root, problems=tuple(composer.problems))


def _too_large(message: str, mark: Mark) -> Problem:
    return Problem(code="too-large", message=message, fix="split the recipe, or write less of it", mark=mark)


class _Point(Protocol):
    """PyYAML's mark: counts from 0."""

    line: int
    column: int


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The text by lines, to make marks."""

    file: str
    lines: tuple[str, ...]

    @property
    def first(self) -> Mark:
        return Mark(file=self.file, line=1, column=1, text=self.lines[0])

    def mark(self, start: _Point | None, end: _Point | None = None) -> Mark:
        """Return the mark of what starts there; on its first line it is `width` characters long."""
        if start is None:  # PyYAML's stubs allow it; its parser doesn't do it
            return self.first
        text = self.lines[start.line] if start.line < len(self.lines) else ""
        stop = start.column + 1 if end is None else end.column if end.line == start.line else len(text)
        width = max(1, stop - start.column)
        return Mark(file=self.file, line=start.line + 1, column=start.column + 1, text=text, width=width)

    def after(self, text: str) -> Mark:
        """Return the mark of the character that follows `text`, a beginning of the whole."""
        before = _LINE_BREAK.split(text)
        return Mark(file=self.file, line=len(before), column=len(before[-1]) + 1, text=self.lines[len(before) - 1])


@dataclass(frozen=True, kw_only=True)
class _Anchored:
    """An anchored value with what it adds to the budgets each time an alias repeats it."""

    node: Node
    nodes: int
    characters: int
    height: int


@dataclass(kw_only=True)
class _Open:
    """A mapping or sequence whose end has not come yet; a mapping's children are keys and values in turn."""

    mapping: bool
    mark: Mark
    start: _Point | None
    anchor: str | None
    nodes: int
    characters: int
    height: int = 1
    children: list[Node] = field(default_factory=list)


class _Composer:
    def __init__(self, source: _Source) -> None:
        self.source = source
        self.problems: list[Problem] = []
        self.root: Node | None = None
        self._open: list[_Open] = []
        self._anchors: dict[str, _Anchored | None] = {}  # None: its own content is being read
        self._documents = 0
        self._aliases = 0
        self._nodes = 0
        self._characters = 0

    def read(self, text: str) -> None:
        """Compose the whole text, or raise _Refused where reading can't go on."""
        try:
            parser = yaml.SafeLoader(text)
        except yaml.reader.ReaderError as error:
            # typed as str in the stubs, but a code point here
            message = f"the character U+{int(error.character):04X} is not allowed in YAML"
            mark = self.source.after(text[: error.position])
            raise _Refused(Problem(code="yaml-syntax", message=message, fix="remove it", mark=mark)) from None
        try:
            while parser.check_event():
                self._feed(parser.get_event())  # type: ignore[no-untyped-call] # missing in the stubs
        except yaml.MarkedYAMLError as error:
            raise _Refused(self._syntax(error)) from None
        except (ValueError, OverflowError, IndexError) as error:
            # PyYAML lets a few of Python's own errors through, e.g. chr() of the escape "\UFFFFFFFF".
            mark = self.source.mark(parser.get_mark())
            message = f"not readable as YAML: {error}"
            raise _Refused(Problem(code="yaml-syntax", message=message, fix="correct the text", mark=mark)) from None

    def _syntax(self, error: yaml.MarkedYAMLError) -> Problem:
        raw = error.problem or "not readable as YAML"
        place = error.problem_mark or error.context_mark
        if error.context_mark is not None and ("end of stream" in raw or "<stream end>" in raw):
            place = error.context_mark  # where the quote or bracket was opened says more than where the file ends
        mark = self.source.mark(place)
        for part, words, fix in _SYNTAX:
            if part in raw:
                hint = Hint(edit="align", told=f"indent line {mark.line} as its neighbours are")
                aligned = hint if words in _MISALIGNED else None
                return Problem(code="yaml-syntax", message=words or raw, fix=fix, mark=mark, hint=aligned)
        context = f"{error.context}, " if error.context else ""
        return Problem(code="yaml-syntax", message=f"{context}{raw}", fix="correct the YAML", mark=mark)

    def _feed(self, event: yaml.Event) -> None:
        match event:
            case yaml.DocumentStartEvent():
                self._begin(event)
            case yaml.ScalarEvent():
                self._count(1, len(event.value), 0, event)
                self._finish(self._scalar(event), event.anchor, nodes=1, characters=len(event.value), height=0)
            case yaml.AliasEvent():
                self._alias(event)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._start(event)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self._end(event)
            case _:
                pass  # the ends of the stream and its documents

    def _problem(self, code: str, message: str, fix: str, mark: Mark, hint: Hint | None = None) -> None:
        self.problems.append(Problem(code=code, message=message, fix=fix, mark=mark, hint=hint))

    def _begin(self, event: yaml.DocumentStartEvent) -> None:
        self._documents += 1
        if self._documents > 1:
            mark = self.source.mark(event.start_mark, event.end_mark)
            message, fix = "a second document begins here", "keep one recipe in one file"
            raise _Refused(Problem(code="several-documents", message=message, fix=fix, mark=mark))

    def _count(self, nodes: int, characters: int, height: int, event: yaml.Event) -> None:
        """Add to the budgets, or refuse."""
        self._nodes += nodes
        self._characters += characters
        depth = len(self._open) + height
        mark = self.source.mark(event.start_mark, event.end_mark)
        if depth > MAX_DEPTH:
            raise _Refused(_too_large(f"more than {MAX_DEPTH} levels of nesting", mark))
        if self._nodes > MAX_NODES:
            raise _Refused(_too_large(f"more than {MAX_NODES} values, aliases expanded", mark))
        if self._characters > MAX_EXPANDED_CHARACTERS:
            raise _Refused(_too_large(f"more than {MAX_EXPANDED_CHARACTERS} characters, aliases expanded", mark))

    def _finish(self, node: Node, anchor: str | None, *, nodes: int, characters: int, height: int) -> None:
        """Hand a complete value to whatever it is part of."""
        if anchor is not None:
            self._anchors[anchor] = _Anchored(node=node, nodes=nodes, characters=characters, height=height)
        if self._open:
            self._open[-1].children.append(node)
            self._open[-1].height = max(self._open[-1].height, height + 1)
        else:
            self.root = node

    def _scalar(self, event: yaml.ScalarEvent) -> Node:
        mark = self.source.mark(event.start_mark, event.end_mark)
        return Node(value=self._value(event, mark), mark=mark, source=event.value)

    def _value(self, event: yaml.ScalarEvent, mark: Mark) -> Scalar:
        text: str = event.value
        if "\0" in text or not _is_unicode(text):
            self._problem("not-text", "text can't hold NUL or half a surrogate pair", "remove the escape", mark)
            return ""
        if event.tag == "!" or (event.tag is None and event.style):
            return text
        try:
            if event.tag is None:
                return resolve(text)
            return self._tagged(event.tag, text, mark)
        except ValueError as error:
            self._problem("number-too-large", f"{text[:40]!r} is {error}", "write it as text, in quotes", mark)
            return 0

    def _tagged(self, tag: str, text: str, mark: Mark) -> Scalar:
        name = tag.removeprefix(_CORE) if tag.startswith(_CORE) else ""
        if name == "str":
            return text
        if name not in _SCALAR_TAGS:
            self._foreign(tag, mark)
            return text
        value = resolve(text)
        if name == "float" and type(value) is int:
            return float(value)
        if type(value) is not _SCALAR_TAGS[name]:
            self._problem("foreign-tag", f"{text[:40]!r} is no !!{name}", "remove the tag", mark)
        return value

    def _foreign(self, tag: str, mark: Mark) -> None:
        shown = f"!!{tag.removeprefix(_CORE)}" if tag.startswith(_CORE) else tag
        self._problem("foreign-tag", f"tag {shown!r} is not allowed: a recipe is plain data", "remove the tag", mark)

    def _alias(self, event: yaml.AliasEvent) -> None:
        mark = self.source.mark(event.start_mark, event.end_mark)
        self._aliases += 1
        if self._aliases > MAX_ALIASES:
            raise _Refused(_too_large(f"more than {MAX_ALIASES} aliases", mark))
        name = event.anchor or ""
        if name not in self._anchors:
            message, fix = f"alias '*{name}' has no anchor before it", did_you_mean(name, self._anchors)
            raise _Refused(Problem(code="unknown-alias", message=message, fix=fix or f"define &{name}", mark=mark))
        anchored = self._anchors[name]
        if anchored is None:
            message = f"'*{name}' stands inside the value that it repeats"
            raise _Refused(Problem(code="unknown-alias", message=message, fix="write the value out", mark=mark))
        self._count(anchored.nodes, anchored.characters, anchored.height, event)
        self._finish(
            replace(anchored.node, mark=mark),
            None,
            nodes=anchored.nodes,
            characters=anchored.characters,
            height=anchored.height,
        )

    def _start(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent) -> None:
        mapping = isinstance(event, yaml.MappingStartEvent)
        mark = self.source.mark(event.start_mark)
        if event.tag not in {None, "!", _CORE + ("map" if mapping else "seq")}:
            self._foreign(event.tag, mark)
        nodes, characters = self._nodes, self._characters
        self._count(1, 0, 1, event)
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        self._open.append(
            _Open(
                mapping=mapping,
                mark=mark,
                start=event.start_mark,
                anchor=event.anchor,
                nodes=nodes,
                characters=characters,
            )
        )

    def _end(self, event: yaml.MappingEndEvent | yaml.SequenceEndEvent) -> None:
        done = self._open.pop()
        # A flow collection on one line is underlined whole; one that spans lines, at its start.
        on_one_line = event.end_mark is not None and event.end_mark.line + 1 == done.mark.line
        mark = self.source.mark(done.start, event.end_mark) if on_one_line else done.mark
        value: tuple[Node, ...] | dict[str, Node]
        value = self._entries(done.children) if done.mapping else tuple(done.children)
        self._finish(
            Node(value=value, mark=mark),
            done.anchor,
            nodes=self._nodes - done.nodes,
            characters=self._characters - done.characters,
            height=done.height,
        )

    def _entries(self, children: list[Node]) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key, value in zip(children[::2], children[1::2], strict=True):
            name = key.value
            if not isinstance(name, str):
                shown = f"'{key.source}'" if not isinstance(name, dict | tuple) else "a list or a mapping"
                self._problem("key-not-text", f"a key must be text, not {shown}", "put it in quotes", key.mark)
            elif name == "<<":
                fix = "use `extends: base.yaml`, or write the keys out"
                hint = Hint(edit="merge", told="write the keys that '<<' merges out")
                self._problem("merge-key", "merge keys ('<<') are not part of YAML 1.2", fix, key.mark, hint)
            elif name in entries:
                first = entries[name].key
                where = f"; first on line {first.line}" if first else ""
                message = f"key {name!r} is written twice{where}"
                hint = _second(name, value, entries[name])
                self._problem("duplicate-key", message, "keep one of them", key.mark, hint)
            else:
                entries[name] = replace(value, key=key.mark)
        return entries


def _second(name: str, value: Node, first: Node) -> Hint:
    """Return the edit that leaves out a key's second value: nothing is lost where both are the same."""
    told = f"leave out the second {name!r}"
    if plain(value) == plain(first):
        return Hint(edit="drop", told=told)
    kept = f"; {first.source} stays" if first.source else ""
    lost = f"{name!r} has two values, and {value.source or 'the second'} of line {value.mark.line} goes{kept}"
    return Hint(edit="drop", told=told, lost=lost)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
