"""The side that runs a program, and then does what its judge asks of it. Nothing that this process says is believed: it can
be anything by now. It never sees a test."""

from __future__ import annotations

import builtins
import errno
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from llmscale.rewards.inside.exchange import Wire, decode, encode
from llmscale.rewards.inside.limits import Reason

_UNARY: dict[str, Callable[..., Any]] = {
    "__len__": len,
    "__iter__": iter,
    "__next__": next,
    "__str__": str,
    "__repr__": repr,
    "__bool__": bool,
    "__int__": int,
    "__float__": float,
    "__reversed__": reversed,
    "__enter__": lambda o: type(o).__enter__(o),
    "__exit__": lambda o: type(o).__exit__(o, None, None, None),
}


def run_program(source: str, wire: Wire) -> None:
    """Run the source as a module named `program`, then serve until the judge is done."""
    namespace: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
    module = types.ModuleType("program")
    module.__dict__.update(namespace)
    sys.modules["program"] = module  # dataclasses and pickle look a class's module up
    code = None
    try:
        code = compile(source, "program.py", "exec")
        exec(code, module.__dict__)
        sys.stdout.flush()
        answer: dict[str, Any] = {"ok": None}
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, MemoryError):
            module.__dict__.clear()
        answer = {"error": _described(error)}
        if code is None and isinstance(error, ValueError):  # a null byte, to Python before 3.11.4
            answer["error"]["reason"] = Reason.syntax.name
    wire.send(answer)
    Service(module.__dict__, wire).serve()


class Service:
    def __init__(self, namespace: dict[str, Any], wire: Wire):
        self.namespace, self.wire = namespace, wire
        self.objects: list[Any] = []  # what the judge knows by number

    def serve(self) -> None:
        while True:
            try:
                request = self.wire.receive()
            except EOFError:
                return
            self.answer(request)

    def answer(self, request: dict[str, Any]) -> None:
        try:
            reply = self.do(request)
            sys.stdout.flush()
            self.wire.send(reply)
        except SystemExit as error:
            os._exit(error.code if isinstance(error.code, int) else 1)
        except BaseException as error:
            self.wire.send({"error": _described(error)})

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "names":
                known = [n for n in request["names"] if n in self.namespace]
                return {"ok": [[n, encode(self.namespace[n], self.export)] for n in known]}
            case "get":
                return {"ok": encode(getattr(self.objects[request["on"]], request["name"]), self.export)}
            case "set":
                setattr(self.objects[request["on"]], request["name"], decode(request["value"], self.take))
                return {"ok": None}
        target = self.objects[request["on"]]
        args, kwargs = decode(request["args"], self.take), dict(decode(request["kwargs"], self.take))
        if request["do"] == "call":
            result = target(*args, **kwargs)
        else:
            name = request["name"]
            result = _UNARY[name](target) if name in _UNARY else getattr(operator, name)(target, *args)
        changed = [encode(a, self.export) if isinstance(a, list | dict | set) else None for a in args]
        same = [None if new == old else new for new, old in zip(changed, request["args"], strict=True)]
        return {"ok": encode(result, self.export), "changed": same}

    def export(self, value: Any) -> tuple[str, Any]:
        if isinstance(value, types.ModuleType):
            return "module", value.__name__
        self.objects.append(value)
        if isinstance(value, type) and issubclass(value, Exception):
            return "exception", [value.__name__, _builtin_base(value), len(self.objects) - 1]
        return "object", len(self.objects) - 1

    def take(self, message: tuple[str, Any]) -> Any:
        tag, content = message
        if tag == "builtin":
            return getattr(builtins, content)
        if tag == "object":
            return self.objects[content]

        def callback(*args: Any, **kwargs: Any) -> Any:
            pairs = [encode(p, self.export) for p in kwargs.items()]
            self.wire.send({"callback": content, "args": [encode(a, self.export) for a in args], "kwargs": pairs})
            while "do" in (reply := self.wire.receive()):  # the function itself may ask for something
                self.answer(reply)
            if "error" in reply:
                raise getattr(builtins, reply["error"]["base"])(reply["error"]["text"])
            return decode(reply["ok"], self.take)

        return callback


def _described(error: BaseException) -> dict[str, Any]:
    try:
        args = encode(list(error.args), lambda value: ("str", repr(value)))
    except Exception:  # an argument that cannot be handed over
        args = []
    text = f"{type(error).__name__}: {error}"[:500]
    base = _builtin_base(type(error))
    return {"name": type(error).__name__, "base": base, "args": args, "text": text, "reason": _reason(error).name}


def _builtin_base(kind: type) -> str:
    names = (k.__name__ for k in kind.__mro__ if k.__module__ == "builtins" and issubclass(k, Exception))
    return next(names, "Exception")


def _reason(error: BaseException) -> Reason:
    if isinstance(error, SyntaxError):
        return Reason.syntax
    if isinstance(error, MemoryError):
        return Reason.memory
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG):
        return Reason.files
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    asked_environment = frame is not None and frame.tb_frame.f_code is type(os.environ).__getitem__.__code__
    return Reason.environment if asked_environment else Reason.failed
