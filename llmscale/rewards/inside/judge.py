"""The side that runs the tests. What a test calls of the program is called over there; what comes back is data, and compared
here. Each test's verdict goes to a descriptor that the program's process never had."""

from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmscale.rewards.inside.exchange import Wire, decode, encode


class ProgramGone(BaseException):
    """It ended, or it does not keep to the form of the exchange. No Exception, so that no test catches it by mistake."""


def run_tests(tests: Sequence[str], wire: Wire, verdicts: int) -> None:
    """One line of JSON to `verdicts` for the program, one for each test in order, each as soon as it is known."""

    def say(**line: Any) -> None:
        os.write(verdicts, json.dumps(line).encode() + b"\n")

    peer = Peer(wire)
    try:
        peer.result()
        codes = [compile(test, f"test {number}", "exec") for number, test in enumerate(tests, start=1)]
        namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
        namespace |= peer.names(sorted({name for code in codes for name in _names(code)} - set(dir(builtins))))
    except ProgramGone:
        return
    except BaseException as error:
        say(ok=False, **_told(error))
        return
    say(ok=True)
    for code, test in zip(codes, tests, strict=True):
        try:
            exec(code, namespace)
        except ProgramGone:
            return
        except BaseException as error:
            say(ok=False, **_told(error, test))
        else:
            say(ok=not peer.gone)  # a test may have swallowed that the program is gone
    say(end=True)


class Peer:
    """The program, as seen from here."""

    def __init__(self, wire: Wire):
        self.wire = wire
        self.gone = False
        self.functions: list[Any] = []  # ours that the program was given
        self.exceptions: dict[tuple[str, str], type[Exception]] = {}

    def names(self, names: Sequence[str]) -> dict[str, Any]:
        """What the program defines of these. A module that it imports is the real one here, under the same name or not at
        all; nothing else than what was asked for is taken, or it could replace the builtins of the tests."""
        defined = {}
        for name, value in self.ask(do="names", names=names):
            if isinstance(value, dict) and "module" in value:
                if value["module"] == name and name in sys.stdlib_module_names:
                    defined[name] = importlib.import_module(name)
            elif name in names:
                defined[name] = decode(value, self.take)
        return defined

    def ask(self, **request: Any) -> Any:
        self.send(request)
        return self.result()["ok"]

    def send(self, message: dict[str, Any]) -> None:
        try:
            self.wire.send(message)
        except OSError as error:
            self.gone = True
            raise ProgramGone from error

    def apply(self, what: str, number: int, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        pairs = [encode(p, self.export) for p in kwargs.items()]
        encoded = [encode(a, self.export) for a in args]
        self.send({"do": what, "on": number, "name": name, "args": encoded, "kwargs": pairs})
        reply = self.result()
        for mine, new in zip(args, reply.get("changed", ()), strict=False):
            if new is not None:  # the program changed its argument in place
                _replace(mine, decode(new, self.take))
        return decode(reply["ok"], self.take)

    def result(self) -> dict[str, Any]:
        while True:
            try:
                reply = self.wire.receive()
                if "callback" not in reply:
                    break
            except (EOFError, ValueError, TypeError, RecursionError) as error:
                self.gone = True
                raise ProgramGone from error
            self._call_back(reply)
        if "error" in reply:
            raise self._exception(reply["error"])
        return reply

    def _call_back(self, request: dict[str, Any]) -> None:
        try:
            function = self.functions[request["callback"]]
            kwargs = dict(decode(request["kwargs"], self.take))
            reply = {"ok": encode(function(*decode(request["args"], self.take), **kwargs), self.export)}
        except Exception as error:
            known = type(error) is getattr(builtins, type(error).__name__, None)
            reply = {"error": {"base": type(error).__name__ if known else "Exception", "text": str(error)}}
        self.send(reply)

    def _exception(self, error: dict[str, Any]) -> Exception:
        kind = self.exception_class(str(error["name"]), str(error["base"]))
        try:
            made = kind(*decode(error["args"], lambda message: message[1]))
        except Exception:  # some want other arguments
            made = Exception(str(error["text"]))
        made.__dict__["_told"] = {"reason": str(error["reason"]), "text": str(error["text"])}
        return made

    def exception_class(self, name: str, base: str) -> type[Exception]:
        """A class of the same name here, so that a test can catch it."""
        known = getattr(builtins, base, Exception)
        if not (isinstance(known, type) and issubclass(known, Exception)):
            known = Exception
        if name == base:
            return known
        return self.exceptions.setdefault((name, base), type(name, (known,), {}))

    def export(self, value: Any) -> tuple[str, Any]:
        if type(value) is Remote:
            return "object", _number(value)
        if isinstance(value, type) and value in self.exceptions.values():
            raise TypeError("an exception class of the program cannot be handed back to it")
        if not callable(value):
            raise TypeError(f"a {type(value).__name__} cannot be handed to the program")
        name = getattr(value, "__name__", "")
        if getattr(builtins, name, None) is value:
            return "builtin", name
        self.functions.append(value)
        return "function", len(self.functions) - 1

    def take(self, message: tuple[str, Any]) -> Any:
        tag, content = message
        if tag == "exception":
            return self.exception_class(str(content[0]), str(content[1]))
        if tag != "object" or not isinstance(content, int):
            raise TypeError(f"the program handed over a {tag}")
        return Remote(self, content)


class Remote:
    """An object of the program's that is no data. What it is asked, it answers over there; but where it meets data of the
    test's (`f(1) == 3`, `f(1) - 3`) it is not asked: it could say what it likes."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: Peer, number: int):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _peer(self).apply("call", _number(self), "", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        return decode(_peer(self).ask(do="get", on=_number(self), name=name), _peer(self).take)

    def __setattr__(self, name: str, value: Any) -> None:
        peer = _peer(self)
        peer.ask(do="set", on=_number(self), name=name, value=encode(value, peer.export))

    def __eq__(self, other: object) -> bool:
        if type(other) is not Remote:
            return False
        return _number(self) == _number(other) or bool(_special(self, "__eq__", other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(_number(self))

    def __contains__(self, item: object) -> bool:
        return any(own is item or own == item for own in self)

    def __iter__(self) -> Iterator[Any]:
        return _special(self, "__iter__")

    def __exit__(self, *_: object) -> None:
        _special(self, "__exit__")


def _number(remote: Remote) -> int:
    return object.__getattribute__(remote, "_number")


def _peer(remote: Remote) -> Peer:
    return object.__getattribute__(remote, "_peer")


def _special(remote: Remote, name: str, *args: Any) -> Any:
    return _peer(remote).apply("special", _number(remote), name, args, {})


def _forward(name: str) -> Any:
    def forward(self: Remote, *args: Any) -> Any:
        return _special(self, name, *args)

    return forward


def _forward_between_objects(name: str) -> Any:
    def forward(self: Remote, other: Any) -> Any:
        return _special(self, name, other) if type(other) is Remote else NotImplemented

    return forward


for _name in ("len", "next", "str", "repr", "bool", "int", "float", "reversed", "enter", "neg", "abs", "getitem"):
    setattr(Remote, f"__{_name}__", _forward(f"__{_name}__"))
for _name in ("setitem", "delitem"):
    setattr(Remote, f"__{_name}__", _forward(f"__{_name}__"))
for _name in ("lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or"):
    setattr(Remote, f"__{_name}__", _forward_between_objects(f"__{_name}__"))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _replace(mine: Any, new: Any) -> None:
    if isinstance(mine, list) and isinstance(new, list):
        mine[:] = new
    elif isinstance(mine, dict | set) and type(new) is type(mine):
        mine.clear()
        mine.update(new)


def _told(error: BaseException, test: str = "") -> dict[str, str]:
    """What is logged: the program's own account of an exception of its own."""
    told = getattr(error, "_told", None)
    if told is not None:
        return {"reason": told["reason"], "text": told["text"][:500]}
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return {"reason": "failed", "text": f"{text} in: {test.strip()}"[:500]}
