"""Linux as the sandbox uses it, through the C library: namespaces, mounts, capabilities, a filter of system calls."""

import ctypes
import errno
import os
import struct

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
_ANY_NEW = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_DETACH = 2
_DEATH_SIGNAL, _NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 1, 38, 22, 2

_libc = ctypes.CDLL(None, use_errno=True)


def _done(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    _done(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    strings = (s.encode() for s in (source, target, kind))
    _done(_libc.mount(*strings, ctypes.c_ulong(flags), data.encode()), f"mount {source} on {target}")


def make_read_only(target: str) -> None:
    """The mount and all below it: read-only, no devices, no programs that run as their owner (Linux 5.12)."""
    attributes = struct.pack("QQQQ", 1 | MS_NOSUID | MS_NODEV, 0, 0, 0)
    at_cwd, recursive = -100, 0x8000
    number = ctypes.c_long(442)  # mount_setattr, on all machines
    arguments = (at_cwd, target.encode(), recursive, attributes, ctypes.c_size_t(len(attributes)))
    _done(_libc.syscall(number, *arguments), f"mount {target} read-only")


def change_root(path: str) -> None:
    """Makes `path` the root; the old one is gone."""
    os.chdir(path)
    pivot_root = ctypes.c_long({"x86_64": 155, "aarch64": 41}[os.uname().machine])
    _done(_libc.syscall(pivot_root, b".", b"."), "pivot_root")
    _done(_libc.umount2(b".", _DETACH), "umount of the old root")
    os.chdir("/")


def die_with_parent() -> None:
    _done(_libc.prctl(_DEATH_SIGNAL, 9, 0, 0, 0), "prctl of the death signal")


def drop_capabilities() -> None:
    """None now, and none by any program that is run."""
    _done(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl of no new privileges")
    header, nothing = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)
    _done(_libc.capset(header, nothing), "capset")


# --- the filter of system calls ---------------------------------------------------------------------------

# Numbers on x86_64 and aarch64 of what no solution needs: other processes' memory, mounts, namespaces, keys, the
# kernel's own programs and rings, file handles that lead out of the mounts, memory of System V, which stays when nobody has
# it in the address space and so counts in no limit.
_REFUSED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "personality": (135, 92),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
}
_CLONE, _CLONE3, _SOCKET = (56, 220), 435, (41, 198)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, the kernel's name

_LOAD, _EQUAL, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x50000
_NUMBER_AT, _MACHINE_AT, _ARGUMENT_AT = 0, 4, 16


def filter_program(machine: str) -> bytes:
    """The filter as the kernel's instructions, each (operation, jump if true, jump if false, operand)."""
    column, name = _MACHINES[machine]
    refuse = (_RETURN, 0, 0, _ERROR | errno.EPERM)
    program = [
        (_LOAD, 0, 0, _MACHINE_AT),
        (_EQUAL, 1, 0, name),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if machine == "x86_64":  # its second table of system calls begins there
        program += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for numbers in _REFUSED.values():
        program += [(_EQUAL, 0, 1, numbers[column]), refuse]
    # The C library takes clone for a clone3 that is not there; its flags can be seen.
    program += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    program += [
        (_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, _ARGUMENT_AT),
        (_HAS_BITS, 0, 1, _ANY_NEW),
        refuse,
    ]
    program += [(_LOAD, 0, 0, _NUMBER_AT)]
    program += [(_EQUAL, 0, 3, _SOCKET[column]), (_LOAD, 0, 0, _ARGUMENT_AT), (_EQUAL, 1, 0, 1), refuse]
    program += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_system_calls() -> None:
    """For this process and all that it starts. Needs `drop_capabilities` before."""
    program = filter_program(os.uname().machine)
    wanted = _Program(len(program) // 8, program)
    _done(_libc.prctl(_SECCOMP, _FILTER, ctypes.byref(wanted), 0, 0), "prctl of the filter of system calls")
