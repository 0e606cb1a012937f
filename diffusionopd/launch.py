"""Start a script in several processes and pass signals on to them: ``python -m diffusionopd.launch``.

Takes the arguments of ``accelerate launch`` and prepares the processes' environment by accelerate, from its
configuration files. It differs in how processes end. One process replaces the launcher. Of several, each gets every
signal that the launcher gets, so that they can finish what they are doing; when one fails, the others are ended and
the launcher returns its status; when the launcher is killed, so are they (on Linux). accelerate's own launcher turns a
signal into a failure, kills after 30 seconds, and leaves processes behind when it is killed.
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
from collections.abc import Callable, Mapping, Sequence

from diffusionopd.signals import SIGNALS, name

PATIENCE = 10.0
"""Seconds that processes have to end by themselves after another one failed, or after a second signal."""
POLL = 0.05
"""Seconds between two looks at the processes."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: Sequence[str] | None = None) -> int:
    """Start what the arguments say; the exit status is that of the first process that failed, else 0."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    args = _validate_launch_command(launch_command_parser().parse_args(arguments))[0]
    if args.num_processes % args.num_machines:
        sys.exit(f"error: {args.num_processes} processes cannot be shared equally by {args.num_machines} machines")
    if args.num_processes == 1:
        command, environment = prepare_simple_launcher_cmd_env(args)
        os.execvpe(command[0], command, environment)
    command = [sys.executable, args.training_script, *args.training_script_args]
    try:
        environments = worker_environments(args)
    except ConnectionError as error:  # the port is taken
        sys.exit(f"error: {error}")
    return supervise(command, environments, int(args.machine_rank or 0))


def worker_environments(args: argparse.Namespace) -> list[dict[str, str]]:
    """The environment of each process of this machine: accelerate's, and what torch's ``env://`` start-up reads."""
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""  # only says which settings a DeepSpeed file overrides
        common = prepare_deepspeed_cmd_env(args)[1]
    else:
        common = prepare_multi_gpu_env(args)
    machine, local = int(args.machine_rank or 0), args.num_processes // args.num_machines
    address = args.main_process_ip if args.num_machines > 1 else "127.0.0.1"
    common |= {"MASTER_ADDR": address, "MASTER_PORT": str(args.main_process_port)}
    common |= {"WORLD_SIZE": str(args.num_processes), "LOCAL_WORLD_SIZE": str(local)}
    if interface := _interface_towards(address):
        common.setdefault("GLOO_SOCKET_IFNAME", interface)
    return [common | {"RANK": str(machine * local + i), "LOCAL_RANK": str(i)} for i in range(local)]


def supervise(command: Sequence[str], environments: Sequence[Mapping[str, str]], machine: int = 0) -> int:
    """Run ``command`` once with each environment until all have ended; returns the first failure's status, else 0."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in SIGNALS}
    try:
        # A session of its own for each: what a terminal sends to the launcher's group reaches them once, from here.
        workers = [
            subprocess.Popen(command, env=dict(environment), start_new_session=True, preexec_fn=_die_with(os.getpid()))
            for environment in environments
        ]
        return _watch(workers, received, machine * len(workers))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(workers: Sequence[subprocess.Popen], received: Sequence[int], first_rank: int) -> int:
    passed_on, failure, deadline = 0, 0, float("inf")
    while None in [worker.poll() for worker in workers]:
        for number in received[passed_on:]:
            passed_on += 1
            for worker in workers:
                worker.send_signal(number)
            if passed_on > 1:
                deadline = min(deadline, time.monotonic() + PATIENCE)
        failed = [index for index, worker in enumerate(workers) if worker.returncode]
        if failed and not failure:
            failure = workers[failed[0]].returncode
            how = f"with exit status {failure}" if failure > 0 else f"by {name(-failure)}"
            print(f"rank {first_rank + failed[0]} ended {how}; ending the others", file=sys.stderr, flush=True)
            deadline = min(deadline, time.monotonic() + PATIENCE)
        if time.monotonic() > deadline:
            for worker in workers:
                worker.kill()
        time.sleep(POLL)
    failure = failure or next((worker.returncode for worker in workers if worker.returncode), 0)
    return failure if failure >= 0 else 128 - failure


def _die_with(parent: int) -> Callable[[], None] | None:
    """What a child does before its program starts, so that the kernel kills it when the launcher is gone."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def bind() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)

    return bind


def _interface_towards(address: str) -> str | None:
    """The network interface that leads to an address: gloo would choose by the machine's own name, often a loopback."""
    import psutil  # comes with accelerate

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # of a datagram socket: nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    for interface, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            return interface
    return None


if __name__ == "__main__":
    sys.exit(main())
