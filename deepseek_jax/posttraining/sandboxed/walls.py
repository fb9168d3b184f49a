"""Walls around a process: namespaces, a root of its own, limits, no rights, few system calls.

Three processes: the outer one, which waits and, told to stop, ends all others before itself; the first inside, whose
end is the end of every process in there; and the one that does the work, in a session of its own.
"""

import os
import resource
import signal
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import syscalls

NEW_ROOT = "/proc"  # covered inside; nothing that a solution reads lies there
_SCRATCH = "size=16m,nr_inodes=1024,mode=755"
_NOBODY = 65534
_FIRST_OWN_ID = 0x70000000  # of users that nobody else is
_DEVICES = ("null", "zero", "urandom")
_GRACE = 2  # seconds after which the first process ends by itself, whoever waits or not


def around(work: Callable[[], None], settings: dict[str, Any]) -> NoReturn:
    """Runs `work` inside walls and ends this process with its status; 128 + signal if one ended it."""
    if settings["walls"] != "bubblewrap":  # which does this itself
        syscalls.die_with_parent()
        if os.getppid() != settings["parent"]:
            os._exit(1)
    if settings["walls"] == "namespaces":
        _in_namespaces(work, settings)
    _end(_run_and_wait(lambda: _inside(work, settings), _kill_session))


def _kill_session(child: int) -> None:
    """The child with its group, or alone while it has none of its own yet."""
    own = os.getpgid(child) == child
    os.killpg(child, signal.SIGKILL) if own else os.kill(child, signal.SIGKILL)


def _in_namespaces(work: Callable[[], None], settings: dict[str, Any]) -> NoReturn:
    as_root, own = _separate(), _FIRST_OWN_ID + os.getpid()

    def first() -> None:
        _new_root(settings["readable"])
        if as_root:
            _become(own)
        syscalls.drop_capabilities()
        syscalls.die_with_parent()
        signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + signal.SIGALRM))
        signal.alarm(int(settings["seconds"]) + _GRACE)
        _end(_run_and_wait(lambda: _inside(work, settings), lambda child: os._exit(1)))

    _end(_run_and_wait(first, lambda child: os.kill(child, signal.SIGKILL)))


def _separate() -> bool:
    """Enters new namespaces; returns whether by root's right, without one of users."""
    flags = (
        syscalls.NEWNS
        | syscalls.NEWPID
        | syscalls.NEWNET
        | syscalls.NEWIPC
        | syscalls.NEWUTS
        | syscalls.NEWCGROUP
    )
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        try:
            syscalls.unshare(flags)
            return True
        except PermissionError:
            pass
    syscalls.unshare(flags | syscalls.NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{_NOBODY} {user} 1"),
        ("gid_map", f"{_NOBODY} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return False


def _run_and_wait(run: Callable[[], None], stop: Callable[[int], None]) -> int:
    """Runs `run` in a child; told to stop, stops it, and waits for it all the same. Returns its status."""
    child = 0

    def stopped(*_: Any) -> None:
        os._exit(1) if not child else stop(child)

    signal.signal(signal.SIGTERM, stopped)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until it is known whom to stop
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if child == 0:
        try:
            run()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    while True:  # the first process of a namespace gets others' orphans too
        ended, status = os.wait()
        if ended == child:
            return status


def _end(status: int) -> NoReturn:
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _new_root(readable: Sequence[str]) -> None:
    """A root with the readable folders, a scratch folder and three devices, and nothing else."""
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("scratch", NEW_ROOT, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, _SCRATCH)
    for path in readable:
        _show(path, NEW_ROOT + path)
    os.mkdir(f"{NEW_ROOT}/dev")
    for name in _DEVICES:
        _show(f"/dev/{name}", f"{NEW_ROOT}/dev/{name}", read_only=False)
    os.mkdir(f"{NEW_ROOT}/tmp")
    os.chmod(f"{NEW_ROOT}/tmp", 0o1777)
    syscalls.change_root(NEW_ROOT)
    os.chdir("/tmp")


def _show(path: str, target: str, read_only: bool = True) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    syscalls.mount(path, target, "", syscalls.MS_BIND | syscalls.MS_REC)
    if read_only:
        syscalls.make_read_only(target)


def _become(own: int) -> None:
    """A user that owns nothing, and whom the limit on processes binds (it does not bind root)."""
    os.setgroups([])
    for user in (own, _NOBODY):
        try:
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return
        except OSError:  # an id that this machine's container has not
            continue
    raise PermissionError("root cannot become another user here")


def _inside(work: Callable[[], None], settings: dict[str, Any]) -> None:
    """The last walls, then the work."""
    syscalls.die_with_parent()
    os.setsid()
    limit(settings)
    if settings["walls"] != "none":
        syscalls.drop_capabilities()
        syscalls.filter_system_calls()
    work()


def limit(settings: dict[str, Any]) -> None:
    """Limits of this process and its children; none can be raised again."""
    seconds = int(settings["seconds"]) + 1
    wanted = {
        resource.RLIMIT_AS: settings["memory"],
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_NPROC: settings["processes"],
        resource.RLIMIT_FSIZE: settings["file"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if settings["walls"] == "none":
        del wanted[resource.RLIMIT_NPROC]  # it would count all processes of the user
    for kind, most in wanted.items():
        had = resource.getrlimit(kind)[1]
        most = most if had == resource.RLIM_INFINITY else min(most, had)
        resource.setrlimit(kind, (most, most))
