#!/usr/bin/env python3
"""Stops one thread of one process, as a device that hangs would: stall.py ARGUMENT THREAD.

The process is the one of this machine that has ARGUMENT on its command line. Its other threads go on. Prints `stopped`, and lets
the thread go when standard input ends.
"""

import ctypes
import os
import pathlib
import sys

PTRACE_ATTACH, PTRACE_DETACH, WALL = 16, 17, 0x40000000
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def ptrace(request, thread):
    if libc.ptrace(request, thread, None, None) != 0:
        sys.exit(f"ptrace {request} of {thread}: {os.strerror(ctypes.get_errno())}")


argument, name = sys.argv[1:]
found = []
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        if argument.encode() in (process / "cmdline").read_bytes().split(b"\0") and int(process.name) != os.getpid():
            found += [int(task.name) for task in (process / "task").iterdir() if (task / "comm").read_text().strip() == name]
    except OSError:
        continue  # it has ended
if len(found) != 1:
    sys.exit(f"{len(found)} threads called {name} in processes with the argument {argument} on this machine")
ptrace(PTRACE_ATTACH, found[0])
os.waitpid(found[0], WALL)
print("stopped", flush=True)
sys.stdin.read()
ptrace(PTRACE_DETACH, found[0])
