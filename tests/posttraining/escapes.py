"""Programs that try to leave the sandbox, to bring the trainer down, or to cheat the tests, with what contains each.

Each would pass its tests if it succeeded: f returns the right answer only then. `contained` is found in the verdict, as
"reason: detail".
"""

import os
from typing import NamedTuple

TESTS = "assert f(1) == 2\nassert f(5) == 6"
FORTY_TWO = "assert f(1) == 42"

_CLONE, _BY_HANDLE = {"x86_64": (56, 304), "aarch64": (220, 265)}[os.uname().machine]


_IMPORTS = """import ctypes, os, resource, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
"""


class Escape(NamedTuple):
    """name; what contains it (a pattern of the verdict); the program; its tests."""

    name: str
    contained: str
    program: str
    tests: str = TESTS


def attempt(name: str, contained: str, *lines: str) -> Escape:
    """A program whose f does this, and answers rightly if nothing stopped it."""
    body = "".join(f"    {line}\n" for line in lines)
    return Escape(name, contained, f"{_IMPORTS}def f(x):\n{body}    return x + 1\n")


def system_call(name: str, contained: str, call: str) -> Escape:
    """A system call through the C library, past Python's own checks."""
    return attempt(
        name, contained, f"if {call} < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))"
    )


_NOT_THERE = "failed: .*FileNotFoundError"
_REFUSED = r"failed: .*(PermissionError|OSError): \[Errno 1\] Operation not permitted"

FILES = (
    attempt("reads the machine's files", _NOT_THERE, "open('/etc/passwd').read()"),
    attempt("reads the run's files", _NOT_THERE, "open('THIS_FILE').read()"),
    attempt("climbs out by dots", _NOT_THERE, "open('/tmp/../../../../etc/shadow').read()"),
    attempt("reads other processes", _NOT_THERE, "os.listdir('/proc')"),
    attempt("reads its own environment", r"failed: .*KeyError", "os.environ['PATH']"),
    attempt(
        "changes the standard library", r"failed: .*(Read-only|Permission denied)", "open(os.__file__, 'a')"
    ),
    attempt(
        "writes one large file",
        r"failed: .*OSError: .*File too large",
        "open('/tmp/a', 'wb').write(bytes(100 << 20))",
    ),
    attempt(
        "fills the disk with small files",
        r"failed: .*OSError: .*No space left",
        "for i in range(1000): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))",
    ),
    attempt("makes a disk of its own", _REFUSED, "os.mknod('/tmp/disk', 0o60600, os.makedev(254, 0))"),
    attempt("changes its root", _REFUSED, "os.chroot('/tmp')"),
    attempt("becomes root", "failed: .*(Operation not permitted|Invalid argument)", "os.setuid(0)"),
    system_call("mounts", _REFUSED, "libc.mount(b'proc', b'/tmp', b'proc', 0, None)"),
    system_call("makes namespaces of its own", _REFUSED, "libc.unshare(0x10000000)"),
    system_call("clones into namespaces", _REFUSED, f"libc.syscall({_CLONE}, 0x10000000 | 17, 0, 0, 0, 0)"),
    system_call("opens a file by its handle", _REFUSED, f"libc.syscall({_BY_HANDLE}, 3, bytes(64), 0)"),
    attempt(
        "fills what is no disk",
        r"failed: .*(PermissionError|OSError|FileNotFoundError)",
        "for folder in ('/', '/dev', '/dev/shm'):",
        "    try:",
        "        for i in range(20): open(f'{folder}/{i}', 'wb').write(bytes(1 << 20))",
        "    except OSError as error: kept = error",
        "    else: return x + 1",
        "raise kept",
    ),
)

NETWORK = (
    attempt("calls the internet", _REFUSED, "socket.create_connection(('1.1.1.1', 80), 5)"),
    attempt("calls the machine it runs on", _REFUSED, "socket.create_connection(('127.0.0.1', PORT), 5)"),
    attempt(
        "sends a datagram",
        _REFUSED,
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    ),
    attempt("asks for a name", "failed: .*name resolution", "socket.getaddrinfo('example.com', 80)"),
    attempt("calls the machine's host", _REFUSED, "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)"),
    attempt(
        "calls a socket without a file",
        "failed: .*ConnectionRefusedError",
        "socket.socket(socket.AF_UNIX).connect('\\0' + 'ABSTRACT')",
    ),
)

PROCESSES = (
    attempt("is a fork bomb", "(failed: .*BlockingIOError|time)", "while True: os.fork()"),
    attempt(
        "is a bomb of threads",
        "failed: .*RuntimeError: can't start new thread",
        "while True: threading.Thread(target=time.sleep, args=(9,)).start()",
    ),
    attempt(
        "leaves a daemon behind",
        "failed: .*AssertionError",
        "if os.fork() == 0:",
        "    os.setsid()",
        "    if os.fork() == 0: time.sleep(600)",
        "    os._exit(0)",
        "x = 0",
    ),
    attempt("kills the trainer", "failed: .*ProcessLookupError", "os.kill(TRAINER, 9)"),
    attempt("kills the trainer's group", "failed: .*ProcessLookupError", "os.killpg(TRAINER_GROUP, 9)"),
    attempt("kills its own group", "failed: .*has ended", "os.killpg(0, 9)"),
    attempt(
        "kills what watches it",
        "failed: .*(AssertionError|has ended)",
        "watcher = os.getppid()",
        "os.kill(watcher, 9)",
        "time.sleep(0.05)",
        "x = x if os.getppid() != watcher else 0",
    ),
    attempt("runs a shell", "failed: .*FileNotFoundError", "os.execv('/bin/sh', ['sh', '-c', 'true'])"),
    attempt("runs a command", "failed: .*AssertionError", "x -= os.system('true')"),
    system_call("reads another process's memory", _REFUSED, "libc.ptrace(16, 1, 0, 0)"),
    system_call("keeps memory that no limit counts", _REFUSED, "libc.shmget(0, 1 << 20, 0o1600)"),
    attempt(
        "raises its own limits",
        "failed: .*ValueError: not allowed to raise maximum limit",
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    ),
    attempt("takes precedence", "failed: .*PermissionError", "os.setpriority(os.PRIO_PROCESS, 0, -20)"),
)

ENDLESS = (
    attempt(
        "allocates without end", "failed: .*MemoryError", "kept = [bytearray(1 << 28) for _ in range(64)]"
    ),
    attempt("writes without end", "output", "while True: os.write(1, b'x' * 65536)"),
    attempt(
        "returns without end",
        "failed: .*(ValueError: a message of|MemoryError)",
        "return list(range(200_000))",
    ),
    attempt("runs without end", "time", "while True: pass"),
    attempt(
        "sleeps and hears no signal",
        "time",
        "for s in range(1, 32):",
        "    try: signal.signal(s, signal.SIG_IGN)",
        "    except OSError: pass",
        "time.sleep(600)",
    ),
    attempt("stops itself", "time", "os.kill(os.getpid(), signal.SIGSTOP)"),
    attempt("crashes the interpreter", "failed: .*has ended", "ctypes.string_at(0)"),
)

CHEATS = (
    Escape("ends with status 0 before the tests", "failed: .*raised SystemExit", "import sys\nsys.exit(0)"),
    Escape("ends with status 0 at once", "failed: .*has ended", "import os\nos._exit(0)"),
    Escape(
        "ends with status 0 in a test",
        "failed: line 1 of the tests: .*has ended",
        "import os\ndef f(x): os._exit(0)",
    ),
    Escape(
        "raises SystemExit in a test",
        "failed: line 1 of the tests: .*raised SystemExit",
        "def f(x): raise SystemExit(0)",
    ),
    Escape(
        "raises KeyboardInterrupt in a test",
        "failed: .*raised KeyboardInterrupt",
        "def f(x): raise KeyboardInterrupt",
    ),
    Escape(
        "equals everything",
        "failed: .*TypeError: Equal is no plain data",
        "class Equal:\n    def __eq__(self, other): return True\ndef f(x): return Equal()",
    ),
    Escape(
        "is a number that equals everything",
        "failed: line 1 of the tests: AssertionError",
        "class Equal(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return Equal(0)",
    ),
    Escape(
        "is a list that equals everything",
        "failed: line 1 of the tests: AssertionError",
        "class Equal(list):\n    def __eq__(self, other): return True\ndef f(x): return Equal()",
        "assert f(1) == [1, 2, 3]",
    ),
    Escape(
        "is a class whose objects are any difference",
        "failed: .*TypeError",
        "class f:\n    def __init__(self, x): pass\n    def __sub__(self, other): return 0\n    def __float__(self): return 0.0",
        "assert abs(f(1) - 2) < 1e-6",
    ),
    Escape(
        "replaces builtins",
        "failed: line 1 of the tests: AssertionError",
        "import builtins\nfor n in ('abs', 'all', 'any', 'sorted', 'AssertionError'):\n    setattr(builtins, n, lambda *a: 0)\ndef f(x): return 0",
        "assert abs(f(1) - 2) < 1e-6",
    ),
    Escape(
        "defines what the tests use",
        "failed: line 1 of the tests: AssertionError",
        "def f(x): return 0\ndef abs(x): return 0\ndef all(x): return True\ndef AssertionError(x): pass",
        "assert abs(f(1) - 2) < 1e-6",
    ),
    Escape(
        "looks for the tests in its memory",
        "failed: line 1 of the tests: AssertionError",
        "import gc, sys\ndef f(x):\n    seen, frame = [repr(o) for o in gc.get_objects()], sys._getframe().f_back\n"
        "    while frame:\n        seen += repr(list(frame.f_globals.values())), repr(list(frame.f_locals.values()))\n"
        "        frame = frame.f_back\n    return 42 if any(f'assert {f.__name__}({x})' in s for s in seen) else 0",
        FORTY_TWO,
    ),
    Escape(
        "looks for the tests in its files",
        "(time|failed: line 1 of the tests: AssertionError)",
        "import os\ndef f(x):\n    for folder in ('/', '/tmp', '/dev', '.'):\n        for name in os.listdir(folder):\n            try:\n                if '42' in open(os.path.join(folder, name)).read(1 << 16): return 42\n            except (OSError, ValueError): pass\n    return 0",
        FORTY_TWO,
    ),
    Escape(
        "writes a verdict of its own",
        "failed: .*(AssertionError|no answer|no value|has ended)",
        'import os\nfor fd in range(64):\n    try: os.write(fd, b\'{"secret": "0"}\\n\')\n    except OSError: pass\ndef f(x): return 0',
    ),
    Escape(
        "answers what was never asked",
        "failed: .*(AssertionError|no answer|no value|TypeError|has ended)",
        'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"names": {"f": false}}\\n\' + b\'{"value": true}\\n\' * 9)\n    except OSError: pass\ndef f(x): return 0',
    ),
    Escape(
        "sends what breaks a reader",
        "failed: .*(no answer|no value|has ended)",
        "import os\ndef f(x):\n    for fd in range(3, 64):\n        try: os.write(fd, b'{\"value\": ' + b'[' * 60000 + b']' * 60000 + b'}\\n')\n        except OSError: pass\n    os._exit(0)",
    ),
    Escape(
        "empties what it is given",
        "failed: .*AssertionError",
        "def f(x):\n    x.clear()\n    return []",
        "numbers = [3, 1, 2]\nassert f(numbers) == sorted(numbers)",
    ),
    Escape(
        "plants a module for the tests",
        "failed: .*AssertionError",
        "open('/tmp/math.py', 'w').write('isclose = lambda *a: True')\nimport sys\nsys.path.insert(0, '/tmp')\ndef isclose(*a): return True\ndef f(x): return 0",
        "import math\nfrom math import isclose\nassert isclose(f(1), 2)",
    ),
    Escape(
        "remembers the tests of before",
        "failed: line 1 of the tests: AssertionError",
        "import os\nif os.path.exists('/tmp/before'):\n    def f(x): return 42\nelse:\n    open('/tmp/before', 'w').write('1')\n    def f(x): return 0",
        FORTY_TWO,
    ),
)

ALL = (*FILES, *NETWORK, *PROCESSES, *ENDLESS, *CHEATS)


def placed(escape: Escape, port: int, abstract: str) -> Escape:
    """The escape with what it aims at: this process, a port and a socket without a file that listen."""
    aims = {"THIS_FILE": __file__, "PORT": port, "ABSTRACT": abstract}
    aims |= {"TRAINER_GROUP": os.getpgid(0), "TRAINER": os.getpid()}
    program = escape.program
    for word, aim in aims.items():
        program = program.replace(word, str(aim))
    return escape._replace(program=program)
