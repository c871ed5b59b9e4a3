"""What the code of a function changes in place after one of its calls: read from its source, in every way through it.

Names stand for the objects that they may refer to. A name that is bound to another's value, to a view of it, or to what
a call makes of it may be the same memory; what an operator, `clone()` or the call itself computes is memory of its own.
Where in doubt, it may be the same.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

Objects = frozenset[Any]
NOTHING: Objects = frozenset()
NEW_MEMORY = ("clone", "cat", "stack", "matmul", "bmm", "embedding", "linear")  # and *_like, new_*
# Of a called expression: the positions of the arguments that it changes, or None where it cannot be told.
Changes = Callable[[ast.expr], Iterable[int]]


@dataclass(frozen=True)
class Argument:
    """Of a call: by position or keyword."""

    key: int | str


@dataclass(frozen=True)
class Later:
    """What becomes of an argument after the call. `line`: where it is changed in place, or None; `returned`: whether
    the function may return it."""

    line: int | None
    returned: bool


@dataclass(frozen=True)
class Source:
    """A function's tree; its lines count from `first` in its file, its columns from `indent`."""

    tree: ast.FunctionDef | ast.AsyncFunctionDef
    first: int
    indent: int

    def calls_at(self, code: CodeType, instruction: int, line: int | None) -> list[ast.Call]:
        """The call that an instruction makes; every call on its line where Python (3.10) does not tell."""
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        if hasattr(code, "co_positions"):
            place = next(itertools.islice(code.co_positions(), instruction // 2, None), None)
            return [call for call in calls if place == self._place(call)]
        return [call for call in calls if line is not None and call.lineno <= line - self.first + 1 <= call.end_lineno]

    def _place(self, node: ast.expr) -> tuple[int, int, int, int]:
        before = self.first - 1
        return (
            node.lineno + before,
            node.end_lineno + before,
            node.col_offset + self.indent,
            node.end_col_offset + self.indent,
        )


def source_of(code: CodeType) -> Source | None:
    """None where there is no source, or another one than the code was made from."""
    try:
        lines = inspect.getsource(code)
        body = ast.parse(textwrap.dedent(lines)).body
    except (OSError, TypeError, SyntaxError):
        return None
    if len(body) != 1 or not isinstance(body[0], (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    if body[0].name != code.co_name:
        return None
    return Source(body[0], code.co_firstlineno, len(lines) - len(lines.lstrip(" ")))


def what_becomes(
    source: Source,
    call: ast.Call,
    arguments: Iterable[Argument] | None,
    names: Iterable[str],
    result: bool,
    of: Changes,
) -> Later:
    """Of what `call` is given as `arguments` (None: as any), of the variables `names`, and of its `result`."""
    flow = _Flow(source.tree, of, call, None if arguments is None else tuple(arguments), tuple(names), result)
    flow.run()
    return Later(None if flow.line is None else flow.line + source.first - 1, flow.returned)


def changed_parameters(source: Source, of: Changes) -> tuple[int, ...]:
    """The positions, `self` included, of the parameters that a function changes in place."""
    names = [each.arg for each in (*source.tree.args.posonlyargs, *source.tree.args.args)]
    return tuple(
        index for index, name in enumerate(names) if _Flow(source.tree, of, watched=name).run().line is not None
    )


@dataclass
class _State:
    """At one point: what each name may refer to, and the objects that are watched."""

    names: dict[str, Objects] = field(default_factory=dict)
    watched: Objects = NOTHING

    def copied(self) -> _State:
        return _State(dict(self.names), self.watched)

    def joined(self, others: Iterable[_State | None]) -> _State:
        found = self.copied()
        for other in others:
            if other is not None:
                found.watched |= other.watched
                for name, objects in other.names.items():
                    found.names[name] = found.names.get(name, NOTHING) | objects
        return found


def _join(states: Iterable[_State | None]) -> _State | None:
    living = [each for each in states if each is not None]
    return living[0].joined(living[1:]) if living else None


class _Flow:
    """Runs over the statements with nothing known but what names may refer to."""

    def __init__(
        self,
        tree: ast.FunctionDef | ast.AsyncFunctionDef,
        changes: Changes,
        call: ast.Call | None = None,
        arguments: tuple[Argument, ...] | None = (),
        names: tuple[str, ...] = (),
        result: bool = False,
        watched: str | None = None,
    ) -> None:
        self.tree, self.changes, self.call, self.arguments = tree, changes, call, arguments
        self.closed_over, self.result, self.watched = names, result, watched
        self.line: int | None = None
        self.returned = False
        self._new = itertools.count()
        self._nested: list[ast.AST] = []
        self._exits: list[_State | None] = []  # of the innermost loop
        first = (*tree.args.posonlyargs, *tree.args.args)
        self.self_name = first[0].arg if first and first[0].arg == "self" else None
        self.local = {each.arg for each in ast.walk(tree.args) if isinstance(each, ast.arg)}

    def run(self) -> _Flow:
        state = _State({name: frozenset([name]) for name in self.local})
        if self.watched is not None:
            state.watched = frozenset([self.watched])
        ends: list[_State | None] = []
        self._ends = ends
        ends.append(self._block(self.tree.body, state))
        last = _join(ends)
        for nested in self._nested if last is not None else ():
            body = nested.body if isinstance(nested.body, list) else [ast.Expr(nested.body)]
            inner = last.copied()
            for each in ast.walk(nested.args):
                if isinstance(each, ast.arg):
                    inner.names[each.arg] = self._fresh()
            self._block(body, inner)
        return self

    def _fresh(self) -> Objects:
        return frozenset([next(self._new)])

    def _changed(self, objects: Objects, state: _State, node: ast.AST) -> None:
        if self.line is None and objects & state.watched:
            self.line = node.lineno

    # Statements: each gives the state after it, or None where nothing comes after it.

    def _block(self, body: Iterable[ast.stmt], state: _State | None) -> _State | None:
        for statement in body:
            if state is None:
                return None
            state = self._statement(statement, state)
        return state

    def _statement(self, node: ast.stmt, state: _State) -> _State | None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self._nested.append(node)
        elif isinstance(node, ast.Return):
            if node.value is not None and self._value(node.value, state) & state.watched:
                self.returned = True
            self._ends.append(state)
            return None
        elif isinstance(node, ast.Raise):
            return None
        elif isinstance(node, (ast.Break, ast.Continue)):
            self._exits.append(state)
            return None
        elif isinstance(node, ast.Assign):
            value = self._value(node.value, state)
            for target in node.targets:
                self._bind(target, node.value, value, state)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self._bind(node.target, node.value, self._value(node.value, state), state)
        elif isinstance(node, ast.AugAssign):
            self._added_to(node, state)
        elif isinstance(node, ast.If):
            self._value(node.test, state)
            branches = [self._block(body, state.copied()) for body in (node.body, node.orelse)]
            return _join(branches)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
            return self._loop(node, state)
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                value = self._value(item.context_expr, state)
                if item.optional_vars is not None:
                    self._bind(item.optional_vars, item.context_expr, value, state)
            return self._block(node.body, state)
        elif isinstance(node, ast.Match):
            subject = self._value(node.subject, state)
            branches = [state]
            for case in node.cases:
                inner = state.copied()
                for each in ast.walk(case.pattern):
                    name = getattr(each, "name", None) or getattr(each, "rest", None)
                    if isinstance(name, str):
                        inner.names[name] = subject
                branches.append(self._block(case.body, inner))
            return _join(branches)
        elif isinstance(node, ast.Try) or type(node).__name__ == "TryStar":
            tried = self._block(node.body, state.copied())
            before = _join([state, tried])
            handled = [self._block(handler.body, before.copied()) for handler in node.handlers]
            after = self._block(node.orelse, tried)
            joined = _join([after, *handled])
            return self._block(node.finalbody, joined or before) if joined or node.finalbody else None
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self._value(child, state)
        return state

    def _loop(self, node: ast.For | ast.AsyncFor | ast.While, state: _State) -> _State | None:
        """Twice: what the first pass makes is not what the second makes."""
        outer, self._exits = self._exits, []
        for _ in range(2):
            if isinstance(node, ast.While):
                self._value(node.test, state)
            else:
                self._bind(node.target, node.iter, self._value(node.iter, state), state)
            after = self._block(node.body, state.copied())
            state = state.joined([after, *self._exits])
        self._exits = outer
        return self._block(node.orelse, state)

    def _added_to(self, node: ast.AugAssign, state: _State) -> None:
        value, target = self._value(node.value, state), node.target
        if isinstance(node.value, (ast.Tuple, ast.List)):  # a collection grows
            self._put_into(target, value, state)
            return
        self._changed(self._value(target, state), state, node)

    def _bind(self, target: ast.expr, expression: ast.expr, value: Objects, state: _State) -> None:
        if isinstance(target, ast.Name):
            state.names[target.id] = value
            self.local.add(target.id)
        elif isinstance(target, (ast.Tuple, ast.List)):
            each = expression.elts if isinstance(expression, (ast.Tuple, ast.List)) else ()
            alike = len(each) == len(target.elts) and not any(isinstance(one, ast.Starred) for one in target.elts)
            values = [self._value(one, state) for one in each] if alike else [value] * len(target.elts)
            for one, its in zip(target.elts, values, strict=True):
                self._bind(one, one, its, state)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, expression, value, state)
        elif isinstance(target, ast.Subscript):
            self._value(target.slice, state)
            self._changed(self._value(target.value, state), state, target)
            self._put_into(target.value, value, state)
        elif isinstance(target, ast.Attribute):
            if target.attr == "data":
                self._changed(self._value(target.value, state), state, target)
            if self._is_outside(target.value):
                state.names[ast.unparse(target)] = value
            else:
                self._put_into(target.value, value, state)

    def _put_into(self, container: ast.expr, value: Objects, state: _State) -> None:
        while isinstance(container, (ast.Subscript, ast.Attribute)) and not self._is_outside(container):
            container = container.value
        name = ast.unparse(container)
        if isinstance(container, (ast.Name, ast.Attribute)) and name != self.self_name:
            state.names[name] = self._value(container, state) | value

    def _is_outside(self, node: ast.expr) -> bool:
        """`self`, a module or another global, or an attribute of one."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and (node.id == self.self_name or node.id not in self.local)

    # Expressions: each gives what its value may be.

    def _value(self, node: ast.expr, state: _State) -> Objects:
        if isinstance(node, ast.Name):
            return state.names.get(node.id) or frozenset([node.id])
        if isinstance(node, ast.Attribute):
            if self._is_outside(node):
                name = ast.unparse(node)
                return state.names.get(name) or frozenset([name])
            return self._value(node.value, state)
        if isinstance(node, ast.Subscript):
            value = self._value(node.value, state)
            self._value(node.slice, state)
            masked = isinstance(node.slice, ast.Compare) or (
                isinstance(node.slice, ast.UnaryOp) and isinstance(node.slice.op, ast.Invert)
            )
            return self._fresh() if masked and isinstance(node.ctx, ast.Load) else value
        if isinstance(node, ast.Call):
            return self._called(node, state)
        if isinstance(node, ast.NamedExpr):
            value = self._value(node.value, state)
            self._bind(node.target, node.value, value, state)
            return value
        if isinstance(node, ast.IfExp):
            self._value(node.test, state)
            return self._value(node.body, state) | self._value(node.orelse, state)
        if isinstance(node, (ast.BoolOp, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Starred, ast.Await)):
            return self._all(ast.iter_child_nodes(node), state)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            inner = state.copied()
            for each in node.generators:
                self._bind(each.target, each.iter, self._value(each.iter, inner), inner)
                self._all(each.ifs, inner)
            found = self._all([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt], inner)
            state.watched |= inner.watched
            return found
        if isinstance(node, ast.Lambda):
            self._nested.append(node)
            return self._fresh()
        self._all(ast.iter_child_nodes(node), state)
        return self._fresh()

    def _all(self, nodes: Iterable[ast.AST], state: _State) -> Objects:
        return functools.reduce(
            frozenset.union, [self._value(each, state) for each in nodes if isinstance(each, ast.expr)], NOTHING
        )

    def _called(self, node: ast.Call, state: _State) -> Objects:
        function = node.func
        method = isinstance(function, ast.Attribute) and not self._is_outside(function.value)
        owner = self._value(function.value, state) if method else NOTHING
        if not method and not isinstance(function, (ast.Name, ast.Attribute)):
            owner = self._value(function, state)
        given: list[tuple[Argument | None, Objects]] = []
        starred = False
        for index, each in enumerate(node.args):
            starred |= isinstance(each, ast.Starred)
            given.append((None if starred else Argument(index), self._value(each, state)))
        for each in node.keywords:
            given.append((None if each.arg is None else Argument(each.arg), self._value(each.value, state)))
        every = functools.reduce(frozenset.union, [objects for _, objects in given], owner)
        if node is self.call:
            return self._passed(given, every, state)
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        self._changes_of(node, name, method, owner, given, state)
        if method and isinstance(function.value, ast.Name) and name in ("append", "extend", "insert", "update", "add"):
            self._put_into(function.value, every, state)
        if name in NEW_MEMORY or name.endswith("_like") or name.startswith("new_"):
            return self._fresh()
        return every | self._fresh()

    def _passed(self, given: list[tuple[Argument | None, Objects]], every: Objects, state: _State) -> Objects:
        """The call in question: its arguments are watched from here on."""
        if self.arguments is None:
            found = every
        else:
            found = [objects for key, objects in given if key is None or key in self.arguments]
            found = functools.reduce(frozenset.union, found, NOTHING)
        for name in self.closed_over:
            found |= state.names.get(name, NOTHING)
        result = self._fresh()
        state.watched |= found | (result if self.result else NOTHING)
        return result

    def _changes_of(
        self,
        node: ast.Call,
        name: str,
        method: bool,
        owner: Objects,
        given: list[tuple[Argument | None, Objects]],
        state: _State,
    ) -> None:
        by_key = {key.key: objects for key, objects in given if key is not None}
        first = by_key.get(0, by_key.get("input", NOTHING))
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            self._changed(owner if method else first, state, node)
        for keyword in node.keywords:
            if keyword.arg == "out":
                self._changed(by_key["out"], state, node)
            elif keyword.arg == "inplace" and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value):
                self._changed(first, state, node)
        if not method and getattr(node.func, "id", None) not in self.local:
            for key in self.changes(node.func):
                self._changed(by_key.get(key, NOTHING), state, node)
