"""Programs that try to pass without passing, and honest ones, whatever their tests look like."""

from __future__ import annotations

import pytest

from llmscale.rewards.inside.limits import Reason
from llmscale.rewards.sandbox import Sandbox
from tests.rewards.programs import RIGHT, run

pytestmark = pytest.mark.usefixtures("launchers")

ALWAYS = """
    class Always:
        def __eq__(self, other): return True
        __ne__ = lambda self, other: False
        __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
        __hash__ = lambda self: 2
        __sub__ = __rsub__ = __add__ = __radd__ = __mul__ = __abs__ = lambda self, *other: self
        __len__ = __int__ = __index__ = lambda self: 1
        __float__ = lambda self: 0.0
        def __iter__(self): return iter([self])
        def __getattr__(self, name): return self
        def __call__(self, *args): return self
    f = lambda x: Always()
"""


@pytest.mark.parametrize(
    "test",
    [
        "assert f(1) == 2",
        "assert 2 == f(1)",
        "assert not f(1) != 2",
        "assert f(1) > 1",
        "assert 1 < f(1)",
        "assert abs(f(1) - 2) < 1e-6",
        "assert 2 - f(1) == 0",
        "assert f(1) in [2]",
        "assert 2 in f(1)",
        "assert f(1) == [2]",
        "assert [f(1)] == [2]",
        "assert {'a': f(1)} == {'a': 2}",
        "assert list(f(1)) == [2]",
        "assert f(1) in {2}",
        "assert max(f(1), 2) == 2",
        "assert f(1)[0] == 2",
        "assert f(1).x == 2",
        "assert isinstance(f(1), int)",
        "assert type(f(1)) is int",
        "assert round(f(1)) == 2",
        "assert sum([f(1)]) == 2",
        "import math; assert math.isclose(f(1), 2)",
        "import re; assert re.match('a', f(1))",
        "assert str(f(1)) == '2'",
    ],
)
def test_an_object_that_equals_everything_convinces_nobody(sandbox: Sandbox, test: str):
    assert run(sandbox, ALWAYS, test).reason is Reason.failed
    assert run(sandbox, "def f(x): return 2", "assert f(1) == 2").reason is Reason.passed


SPEAKS = """
    import sys
    frame = sys._getframe()
    while "wire" not in frame.f_locals: frame = frame.f_back
    wire = frame.f_locals["wire"]
"""


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)",
        "import os\ndef f(x): os._exit(0)",
        "import sys\nsys.exit()",
        "def f(x): raise SystemExit(0)",
        "def f(x): raise KeyboardInterrupt",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nos.abort()",
        "import os\nos.closerange(0, 256)",
        "import os\ndef f(x):\n    os.closerange(0, 256)\n    return 2",
        "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\nbuiltins.compile = lambda *a: None",
        "import sys\nsys.modules['llmscale.rewards.inside.judge'].run_tests = lambda *a: None",
        'print(\'{"ok": true}\\n{"ok": true}\\n{"end": true}\')',
        'import os\nfor fd in range(64):\n    try: os.write(fd, b\'{"ok": true}\\n{"ok": true}\\n{"end": true}\\n\')\n'
        "    except OSError: pass",
        SPEAKS + "    wire.send({'ok': None}); wire.send({'end': True}); wire.send({'ok': True})",
        SPEAKS + "    while True: wire.send({'ok': True})",
        SPEAKS + "    wire._connection.sendall(b'\\xff' * 8)",
        SPEAKS + "    wire._connection.sendall(b'\\x08\\0\\0\\0[[[[[[[[')",
        SPEAKS + "    import json; wire._connection.sendall(b'\\xff\\xff\\0\\0' + b'[' * 65535)",
        # It hands over names that nobody asked for, to replace the builtins of the tests.
        SPEAKS + "    wire.send({'ok': None}); wire.receive()\n"
        "    wire.send({'ok': [[n, {'object': 0}] for n in ('f', 'abs', '__builtins__', 'AssertionError', '__debug__')]})\n"
        "    while True: wire.receive(); wire.send({'ok': {'object': 0}})",
        SPEAKS + "    wire.send({'ok': None}); wire.receive()\n    wire.send({'ok': [['f', {'module': 'operator'}]]})",
        SPEAKS + "    wire.send({'ok': None}); wire.receive(); wire.send({'ok': [['f', {'builtin': 'exit'}]]})",
        SPEAKS
        + "    wire.send({'error': {'name': 'x', 'base': 'SystemExit', 'args': [], 'text': '', 'reason': 'passed'}})",
        SPEAKS + "    wire.send({'callback': 0, 'args': [], 'kwargs': []}); wire.receive(); wire.send({'end': True})",
        # A second process speaks for it.
        "import os\nif os.fork(): os._exit(0)",
    ],
)
def test_only_the_tests_decide(sandbox: Sandbox, source: str):
    result = run(sandbox, source, "assert abs(f(1)) == 2", "assert f(2) == 3")
    assert result.reason in (Reason.failed, Reason.killed, Reason.syntax), result
    assert result.passed == (False, False)


def test_a_test_that_swallows_everything_does_not_pass_a_program_that_is_gone(sandbox: Sandbox):
    test = "try:\n    f(1)\nexcept:\n    pass"
    assert run(sandbox, "import os\ndef f(x): os._exit(0)", test, test).passed == (False, False)
    assert run(sandbox, "def f(x): return 1", test, test).passed == (True, True)


LOOKS = """
    import ctypes, os, sys
    libc, size = ctypes.CDLL(None), 2**16
    out = os.open("out", os.O_RDWR | os.O_CREAT)
    def told(data):
        at = data.find(b"a-word-")  # and the rest piece by piece, or it would find what it looks for here
        return at >= 0 and (data[at + 7 : at + 12] == b"that-" and data[at + 12 : at + 18] == b"nobody" or told(data[at + 1 :]))
    def f(own):
        for fd in range(64):
            try:
                if fd != out and told(os.pread(fd, 10**6, 0)): return True
            except OSError: pass
        spots = {id(o) >> 26 for o in (f, sys, bytes(100), bytes(10**5), [0] * 1000)}
        for spot in spots | {s + 1 for s in spots} | {s - 1 for s in spots}:
            for address in range(spot << 26, (spot + 1) << 26, size):
                copied = libc.pwrite(out, ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_long(0))
                if copied > 0 and told(os.pread(out, copied, 0)): return True
        return False
"""


def test_nothing_is_learned_of_tests_or_of_programs_before(sandbox: Sandbox):
    """It looks through its own memory and every descriptor."""
    word = "a-word-that-nobody-told"
    assert run(sandbox, f"x = '{word}'\nprint(x)\n{RIGHT}", f"assert f(1) == 2, '{word}'").reason is Reason.passed
    assert run(sandbox, RIGHT, f"assert f(1) == '{word}'").reason is Reason.failed
    result = run(sandbox, LOOKS, f"'{word}'\nassert f('') == False")
    assert result.reason is Reason.passed, result
    told = run(sandbox, LOOKS, f"assert f('{word}') == True")  # else the look could not fail
    assert told.reason is Reason.passed, told


def test_programs_do_not_see_each_others_files_or_modules(sandbox: Sandbox):
    assert run(sandbox, "open('left', 'w').write('x'); import math; math.pi = 3\n" + RIGHT).reason is Reason.passed
    looks = "import math, os\ndef f(x): return os.path.exists('left'), math.pi > 3"
    assert run(sandbox, looks, "assert f(1) == (False, True)").reason is Reason.passed


@pytest.mark.parametrize(
    ("source", "test"),
    [
        ("def f(*a, **k): return a, k", "assert f(1, 'a', [2], x={1: (2,)}) == ((1, 'a', [2]), {'x': {1: (2,)}})"),
        ("def f(x): return x", "for v in [None, True, 1.5, float('inf'), 10**5000, -5, 'é\\ud800', b'\\xff', {1}, 2j]:\n"
         "    assert f(v) == v and type(f(v)) is type(v)"),
        ("from fractions import Fraction\nfrom decimal import Decimal\nf = lambda: [Fraction(1, 3), Decimal('1.10')]",
         "from fractions import Fraction\nfrom decimal import Decimal\nassert f() == [Fraction(1, 3), Decimal('1.1')]"),
        ("from collections import Counter, deque\nf = lambda x: (Counter(x), deque(x), range(3), frozenset(x))",
         "assert f('aab')[0] == {'a': 2, 'b': 1} and list(f('ab')[1]) == ['a', 'b']\nassert f('')[2] == range(3)"),
        ("from datetime import datetime\nf = lambda: datetime(2020, 1, 2, 3)",
         "from datetime import datetime\nassert f() == datetime(2020, 1, 2, 3)"),
        ("def f(x): x.sort(); x.append(9)", "a = [3, 1]; f(a); assert a == [1, 3, 9]"),
        ("def f(d): d['x'] = 1", "d = {}; f(d); assert d == {'x': 1}"),
        ("def f(g, x): return [g(v) for v in x]", "assert f(lambda v: v * 2, [1, 2]) == [2, 4]"),
        ("def f(g, x): return g(x)", "assert f(int, '3') == 3 and f(str, 3) == '3'"),
        ("def f(g):\n    try: g()\n    except ValueError as e: return str(e)",
         "def g(): raise ValueError('no')\nassert f(g) == 'no'"),
        ("def f(n):\n    for i in range(n): yield i * i", "assert list(f(4)) == [0, 1, 4, 9]\nassert next(f(1)) == 0"),
        ("def f(n): return lambda x: x + n", "assert f(2)(3) == 5"),
        ("def f(x): raise ValueError('negative', x)",
         "try: f(-1)\nexcept ValueError as e: assert e.args == ('negative', -1)\nelse: assert False"),
        ("class Bad(KeyError): pass\ndef f(): raise Bad('x')",
         "try: f()\nexcept Bad as e: assert isinstance(e, KeyError)\nelse: assert False"),
        ("class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
         "    def pop(self): return self.items.pop()\n    def __len__(self): return len(self.items)",
         "s = Stack(); s.push(1); s.push(2)\nassert len(s) == 2 and s.pop() == 2 and s.items == [1]\nassert bool(s)"),
        ("from dataclasses import dataclass\n@dataclass(frozen=True)\nclass P:\n    x: int\n"
         "    def __add__(self, o): return P(self.x + o.x)\n    def __lt__(self, o): return self.x < o.x",
         "assert P(1) + P(2) == P(3) and P(1) != P(2) and P(1) < P(2)\nassert repr(P(1)) == 'P(x=1)' and sorted([P(2), P(1)])"),
        ("import math\nclass Solution:\n    def area(self, r): return math.pi * r ** 2",
         "assert math.isclose(Solution().area(1), math.pi)"),
        ("def has(x): return x > 0", "def check(f):\n    assert f(1)\n    assert not f(-1)\ncheck(has)"),
        ("LIMIT = 3\nclass M:\n    def __getitem__(self, i): return i\n    def __setitem__(self, i, v): self.v = v",
         "assert LIMIT == 3\nm = M(); m[1] = 5\nassert m[7] == 7 and m.v == 5"),
        ("import threading\nf = []\nt = threading.Thread(target=f.append, args=[1]); t.start(); t.join()", "assert f == [1]"),
        ("from concurrent.futures import ThreadPoolExecutor\nf = lambda: list(ThreadPoolExecutor(2).map(abs, [-1, -2]))",
         "assert f() == [1, 2]"),
        ("import os\ndef f():\n    if (p := os.fork()) == 0: os._exit(7)\n    return os.waitpid(p, 0)[1]",
         "assert f() == 7 << 8"),
        ("import asyncio\nasync def g(): await asyncio.sleep(0.01); return 3\nf = lambda: asyncio.run(g())", "assert f() == 3"),
        ("import sqlite3\ndef f(): return sqlite3.connect(':memory:').execute('select 1 + 1').fetchone()",
         "assert f() == (2,)"),
        ("import hashlib, json, csv, io, re, zlib, uuid, bz2, lzma, logging, unittest, pickle, email, ssl\nf = 1",
         "assert f == 1"),
        ("import time\nf = time.strftime('%Y', time.localtime(0))", "assert f in ('1970', '1969')"),
        ("import traceback\ndef f():\n    try: 1 / 0\n    except ZeroDivisionError: return 'div' in traceback.format_exc()",
         "assert f() is True"),
        ("if __name__ == '__main__':\n    input()\nf = 1", "assert f == 1"),
        ("import sys\nf = sys.stdin.read()", "assert f == ''"),
        ("import random\nf = random.random()", "assert f == 0.8444218515250481"),  # random.Random(0).random()
    ],
)  # fmt: skip
def test_honest_programs_pass(sandbox: Sandbox, source: str, test: str):
    result = run(sandbox, source, test)
    assert result.reason is Reason.passed, result


def test_each_test_has_its_own_verdict(sandbox: Sandbox):
    result = run(sandbox, RIGHT, "assert f(1) == 2", "assert f(1) == 3", "x = f(5)", "assert x == 6")
    assert result.passed == (True, False, True, True) and result.reason is Reason.failed
    assert result.text == "AssertionError in: assert f(1) == 3"
    ended = run(sandbox, "import os\ndef f(x): return os._exit(4) if x else 1", "assert f(0) == 1", "f(1)", "f(0)")
    assert ended.passed == (True, False, False) and "during its tests, with exit code 4" in ended.text


def test_what_is_printed_is_kept(sandbox: Sandbox):
    assert run(sandbox, "print('hello')\n" + RIGHT).output == "hello\n"
