"""What the code of a function changes in place after one of its calls: read from its source, in every way through it.

Names stand for the objects that they may refer to. A name that is bound to another's value, to a view of it, or to what
a call makes of it may be the same memory; what an operator, `clone()` or the call itself computes is memory of its own.
Where in doubt, it may be the same.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

Objects = frozenset[Any]
NOTHING: Objects = frozenset()
NO_MEMORY = ("shape", "dtype", "device", "ndim", "size", "dim", "numel", "item", "tolist")  # of the tensor's own
FILLS = ("append", "extend", "insert", "update", "add")  # a collection
# Of torch.nn.functional, those that may be given `inplace` by position.
TAKE_INPLACE = (
    *("relu", "relu6", "elu", "selu", "celu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu"),
    *("rrelu", "threshold", "dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d"),
)
TRIES: tuple[type[ast.Try], ...] = tuple(each for each in (ast.Try, getattr(ast, "TryStar", None)) if each)
NEW_MEMORY = ("clone", "cat", "stack", "matmul", "bmm", "embedding", "linear")  # and *_like, new_*


@dataclass(frozen=True)
class Effect:
    """Of a function on what it is given, by position and by keyword: what it changes in place, and what its result may
    be, or be a view of."""

    changes: frozenset[int | str]
    returns: frozenset[int | str]


# Of a called expression, as far as it is known.
EffectOf = Callable[[ast.expr], Effect | None]


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
        if line is None:
            return []
        return [call for call in calls if call.lineno <= line - self.first + 1 <= (call.end_lineno or call.lineno)]

    def _place(self, node: ast.expr) -> tuple[int, int, int, int] | None:
        if node.end_lineno is None or node.end_col_offset is None:
            return None
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
    arguments: Iterable[int | str] | None,
    names: Iterable[str],
    result: bool,
    effect_of: EffectOf,
) -> Later:
    """Of what `call` is given as `arguments` (None: as any), of the variables `names`, and of its `result`."""
    flow = _Flow(source.tree, effect_of, _Watch(call, arguments, tuple(names), result)).run()
    return Later(None if flow.line is None else flow.line + source.first - 1, bool(flow.returned & flow.seen))


def effect(source: Source, bound: bool, effect_of: EffectOf) -> Effect:
    """Of a function; `bound`: it is called without its first argument."""
    flow = _Flow(source.tree, effect_of).run()
    names = [each.arg for each in (*source.tree.args.posonlyargs, *source.tree.args.args)]
    names_of: dict[str, tuple[int | str, ...]] = {
        name: (index, name) for index, name in enumerate(names[1:] if bound else names)
    }
    names_of |= {each.arg: (each.arg,) for each in source.tree.args.kwonlyargs}

    def keys(objects: Objects) -> frozenset[int | str]:
        return frozenset(key for name, keys in names_of.items() if name in objects for key in keys)

    return Effect(keys(flow.changed), keys(flow.returned))


@dataclass(frozen=True)
class _Watch:
    """A call, and what is watched from it on."""

    call: ast.Call
    arguments: Iterable[int | str] | None
    names: tuple[str, ...]
    result: bool


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
        self, tree: ast.FunctionDef | ast.AsyncFunctionDef, effect_of: EffectOf, watch: _Watch | None = None
    ) -> None:
        self.tree, self.effect_of, self.watch = tree, effect_of, watch
        self.line: int | None = None  # where something watched is changed first
        self.changed = self.returned = self.seen = NOTHING
        first = (*tree.args.posonlyargs, *tree.args.args)
        self._self = first[0].arg if first and first[0].arg == "self" else None
        self._local = {each.arg for each in ast.walk(tree.args) if isinstance(each, ast.arg)}
        self._new = itertools.count()
        self._nested: list[ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda] = []
        self._exits: list[_State] = []  # of the innermost loop
        self._ends: list[_State | None] = []

    def run(self) -> _Flow:
        self._ends.append(self._block(self.tree.body, _State({name: frozenset([name]) for name in self._local})))
        last, returned = _join(self._ends), self.returned
        for nested in self._nested:
            if last is None:
                break
            inner = last.copied()
            for each in ast.walk(nested.args):
                if isinstance(each, ast.arg):
                    inner.names[each.arg] = self._fresh()
            self._block(nested.body if isinstance(nested.body, list) else [ast.Expr(nested.body)], inner)
        self.returned = returned
        return self

    def _fresh(self) -> Objects:
        return frozenset([next(self._new)])

    def _change(self, objects: Objects, state: _State, node: ast.stmt | ast.expr) -> None:
        self.changed |= objects
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
            self.returned |= NOTHING if node.value is None else self._value(node.value, state)
            self.seen |= state.watched
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
            return _join([self._block(body, state.copied()) for body in (node.body, node.orelse)])
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
            branches: list[_State | None] = [state]
            for case in node.cases:
                inner = state.copied()
                for each in ast.walk(case.pattern):
                    name = getattr(each, "name", None) or getattr(each, "rest", None)
                    if isinstance(name, str):
                        inner.names[name] = subject
                branches.append(self._block(case.body, inner))
            return _join(branches)
        elif isinstance(node, TRIES):
            tried = self._block(node.body, state.copied())
            before = state.joined([tried])
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
        self._change(self._value(target, state), state, node)

    def _bind(self, target: ast.expr, expression: ast.expr, value: Objects, state: _State) -> None:
        if isinstance(target, ast.Name):
            state.names[target.id] = value
            self._local.add(target.id)
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
            self._change(self._value(target.value, state), state, target)
            self._put_into(target.value, value, state)
        elif isinstance(target, ast.Attribute):
            if target.attr == "data":
                self._change(self._value(target.value, state), state, target)
            if self._is_outside(target.value):
                state.names[ast.unparse(target)] = value
            else:
                self._put_into(target.value, value, state)

    def _put_into(self, container: ast.expr, value: Objects, state: _State) -> None:
        while isinstance(container, (ast.Subscript, ast.Attribute)) and not self._is_outside(container):
            container = container.value
        name = ast.unparse(container)
        if isinstance(container, (ast.Name, ast.Attribute)) and name != self._self:
            state.names[name] = self._value(container, state) | value

    def _is_outside(self, node: ast.expr) -> bool:
        """`self`, a module or another global, or an attribute of one."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and (node.id == self._self or node.id not in self._local)

    # Expressions: each gives what its value may be.

    def _value(self, node: ast.expr, state: _State) -> Objects:
        if isinstance(node, ast.Name):
            return state.names.get(node.id) or frozenset([node.id])
        if isinstance(node, ast.Attribute):
            if self._is_outside(node):
                name = ast.unparse(node)
                return state.names.get(name) or frozenset([name])
            value = self._value(node.value, state)
            return self._fresh() if node.attr in NO_MEMORY else value
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
        return NOTHING.union(*(self._value(each, state) for each in nodes if isinstance(each, ast.expr)))

    def _called(self, node: ast.Call, state: _State) -> Objects:
        function = node.func
        attribute = function if isinstance(function, ast.Attribute) else None
        method = attribute if attribute is not None and not self._is_outside(attribute.value) else None
        owner = NOTHING if method is None else self._value(method.value, state)
        if not isinstance(function, (ast.Name, ast.Attribute)):
            owner = self._value(function, state)
        given: list[tuple[int | str | None, Objects]] = []
        for index, each in enumerate(node.args):
            known = not any(isinstance(before, ast.Starred) for before in node.args[: index + 1])
            given.append((index if known else None, self._value(each, state)))
        given += [(each.arg, self._value(each.value, state)) for each in node.keywords]
        if self.watch is not None and node is self.watch.call:
            return self._watched(self.watch, given, owner, state)
        called = None if method is not None else self._effect(function, state)
        name = attribute.attr if attribute is not None else getattr(function, "id", "")
        if called is None:
            own = attribute is not None and (method is not None or ast.unparse(attribute).startswith(f"{self._self}."))
            changed = self._value(attribute.value, state) if attribute is not None and own else None
            self._change_by_convention(node, name, changed, given, state)
        else:
            self._change(_of(given, called.changes), state, node)
        if method is not None and name in FILLS:
            self._put_into(method.value, _of(given), state)
        if name in (*NEW_MEMORY, *NO_MEMORY) or name.endswith("_like") or name.startswith("new_"):
            return self._fresh()
        return self._fresh() | (owner | _of(given) if called is None else _of(given, called.returns))

    def _effect(self, function: ast.expr, state: _State) -> Effect | None:
        """A local name may be one of the modules that an attribute holds: `for layer in self.layers`."""
        if not isinstance(function, ast.Name) or function.id not in self._local:
            return self.effect_of(function)
        known = [each for each in state.names.get(function.id, ()) if isinstance(each, str)]
        held = len(known) == 1 and known[0].startswith(f"{self._self}.")
        return self.effect_of(ast.parse(known[0], mode="eval").body) if held else None

    def _watched(self, watch: _Watch, given: Given, owner: Objects, state: _State) -> Objects:
        """The call in question: what is watched, is from here on."""
        result = self._fresh()
        found = owner | _of(given) if watch.arguments is None else _of(given, watch.arguments)
        for name in watch.names:
            found |= state.names.get(name, NOTHING)
        state.watched |= found | (result if watch.result else NOTHING)
        return result

    def _change_by_convention(
        self, node: ast.Call, name: str, owner: Objects | None, given: Given, state: _State
    ) -> None:
        """torch's: `add_`, `out=`, `inplace=True`."""
        first = _of(given, (0, "input"))
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            self._change(first if owner is None else owner, state, node)
        if name in TAKE_INPLACE and any(isinstance(each, ast.Constant) and each.value is True for each in node.args):
            self._change(first, state, node)
        for keyword in node.keywords:
            if keyword.arg == "out":
                self._change(_of(given, ("out",)), state, node)
            elif keyword.arg == "inplace" and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value):
                self._change(first, state, node)


# What a call is given, by position or keyword; None for what `*` and `**` unpack.
Given = Sequence[tuple[int | str | None, Objects]]


def _of(given: Given, keys: Iterable[int | str] | None = None) -> Objects:
    """The objects given as one of `keys`, or perhaps, where not all of them are named; None for all."""
    named = {key for key, _ in given}
    unpacked = keys is None or not named.issuperset(keys)
    return NOTHING.union(
        *(objects for key, objects in given if (unpacked if key is None else keys is None or key in keys))
    )
