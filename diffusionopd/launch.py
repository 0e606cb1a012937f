"""Start a script in one or several processes and pass signals on to them: ``python -m diffusionopd.launch``.

Takes the arguments of ``accelerate launch``; accelerate prepares the processes' environment from its configuration
files. Its own launcher, torchrun, answers a signal with a stack trace and status 1 whatever status its processes end
with, and leaves them behind when it is killed. Here each process gets every signal and may finish what it is doing;
when one fails the others are ended, and when the launcher is killed so are they (on Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from diffusionopd.signals import SAME, SIGNALS, STOPPED, name

GRACE = 10.0
"""Seconds that processes have to end by themselves after another one failed, or after a second signal."""
POLL = 0.05
"""Seconds between two looks at the processes."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: Sequence[str] | None = None) -> int:
    """Start what the arguments say; the exit status is that of :func:`supervise`."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args = _validate_launch_command(launch_command_parser().parse_args(arguments))[0]
    if args.num_processes % args.num_machines:
        sys.exit(f"error: {args.num_processes} processes cannot be shared equally by {args.num_machines} machines")
    command = [sys.executable, args.training_script, *args.training_script_args]
    try:
        return supervise(command, worker_environments(args))
    except OSError as error:  # the port is taken, or the address of machine 0 is none
        sys.exit(f"error: {error}")


def worker_environments(args: argparse.Namespace) -> list[dict[str, str]]:
    """The environment of each process of this machine: accelerate's, and what torch's ``env://`` start-up reads."""
    from accelerate.utils import launch

    if args.num_processes == 1:
        return [launch.prepare_simple_launcher_cmd_env(args)[1]]
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""  # only says which settings a DeepSpeed file overrides
        common = launch.prepare_deepspeed_cmd_env(args)[1]
    else:
        common = launch.prepare_multi_gpu_env(args)
    machine, local = int(args.machine_rank or 0), args.num_processes // args.num_machines
    address = args.main_process_ip if args.num_machines > 1 else "127.0.0.1"
    common |= {"MASTER_ADDR": address, "MASTER_PORT": str(args.main_process_port)}
    common |= {"WORLD_SIZE": str(args.num_processes), "LOCAL_WORLD_SIZE": str(local)}
    if interface := _interface_towards(address):
        common.setdefault("GLOO_SOCKET_IFNAME", interface)
    return [common | {"RANK": str(machine * local + i), "LOCAL_RANK": str(i)} for i in range(local)]


def supervise(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Run ``command`` once with each environment until all have ended.

    Returns the status of the first that failed (128 + its number for a signal), else STOPPED if one ended so, else 0.
    """
    received: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda n, _: received.append(n))
    libc, launcher = ctypes.CDLL(None), os.getpid()

    def die_with_launcher() -> None:
        if sys.platform.startswith("linux"):
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != launcher:
                os._exit(128 + signal.SIGKILL)

    # Of several, a session of its own for each: what a terminal sends to the launcher's group reaches them from here. A
    # single one keeps the terminal, for debuggers.
    several = len(environments) > 1
    workers = [
        subprocess.Popen(command, env=dict(environment), start_new_session=several, preexec_fn=die_with_launcher)
        for environment in environments
    ]
    failure, passed_on, first_at, deadline = 0, 0, 0.0, float("inf")
    while True:
        running = None in [worker.poll() for worker in workers]
        failed = [index for index, worker in enumerate(workers) if worker.returncode not in (None, 0, STOPPED)]
        if failed and not failure:
            failure, deadline = workers[failed[0]].returncode, min(deadline, time.monotonic() + GRACE)
            if running and failure != 2:  # of wrong arguments, which rank 0 explains
                how = f"with exit status {failure}" if failure > 0 else f"by {name(-failure)}"
                rank = environments[failed[0]]["RANK"]
                print(f"rank {rank} ended {how}; ending the others", file=sys.stderr, flush=True)
        if not running:
            return (failure if failure >= 0 else 128 - failure) or max(worker.returncode for worker in workers)
        for passed in received[passed_on:]:
            passed_on, now = passed_on + 1, time.monotonic()
            first_at = first_at or now
            for worker in workers:
                worker.send_signal(passed)
            if now - first_at > SAME:
                deadline = min(deadline, now + GRACE)
        if time.monotonic() > deadline:
            for worker in workers:
                worker.kill()
        time.sleep(POLL)


def _interface_towards(address: str) -> str | None:
    """The network interface that leads to an address: gloo would choose by the machine's own name, often a loopback."""
    import psutil  # comes with accelerate

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # of a datagram socket: nothing is sent
        own = probe.getsockname()[0]
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, entries in interfaces if own in [entry.address for entry in entries]), None)


if __name__ == "__main__":
    sys.exit(main())
