"""``cast-fast launch``: writes, and on request submits, a Slurm job that pretrains on one or many nodes.

The job runs one ``torchrun`` a node. Slurm sends SIGUSR1 to the batch shell ``--notice`` seconds before the time limit;
the shell passes it to ``srun``, srun to every torchrun, and torchrun to its ranks, which save one checkpoint together
and exit with code 75. Then the shell requeues the job, and ``--resume``, which the script always carries, goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from cast_fast.config import PretrainConfig, add_config_arguments, config_from_args
from cast_fast.errors import UserError

HELP = "write (and submit) a Slurm job that pretrains on one or many nodes"

FORWARDED_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What torchrun passes on to its ranks; SIGUSR1, the notice, is not among its defaults and would kill it."""
_TIME = re.compile(r"(\d+-)?\d{1,3}(:\d{2}){0,2}")


class Job(NamedTuple):
    """What the batch script depends on beside the run's own settings."""

    name: str
    nodes: int
    gpus: int
    """A node, and so the number of ranks of a node."""
    cpus: int
    """A node."""
    time: str
    notice: int
    """Seconds between the notice and the time limit."""
    partition: str | None
    account: str | None
    setup: str
    """Shell line that runs on each node first, for instance ``source .venv/bin/activate``."""
    port: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the job; everything after ``--`` is a flag of ``cast-fast pretrain``."""
    parser.usage = f"{parser.prog} --script FILE [flags] -- PRETRAIN FLAGS"
    parser.epilog = f"example: {parser.prog} --script job.sh --nodes 2 -- --data shards --out runs/first"
    parser.add_argument("--script", type=Path, required=True, help="batch script to write")
    parser.add_argument("--name", default="cast_fast", help="name of the job")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs, and so processes, a node")
    parser.add_argument("--cpus", type=int, default=0, help="CPU cores a node; 0 for 8 a GPU")
    parser.add_argument(
        "--time", default="24:00:00", help="time limit in Slurm's form; the job requeues itself after it"
    )
    parser.add_argument("--notice", type=int, default=300, help="seconds before the limit in which to save and stop")
    parser.add_argument("--partition", default=None, help="partition")
    parser.add_argument("--account", default=None, help="account")
    parser.add_argument(
        "--setup", default="", help="shell line that runs first on each node, such as 'source .venv/bin/activate'"
    )
    parser.add_argument("--port", type=int, default=29_500, help="port of the rendezvous on the first node")
    parser.add_argument(
        "--submit", choices=("no", "sbatch", "submitit"), default="no", help="submit the job, and through what"
    )
    parser.add_argument("pretrain", nargs=argparse.REMAINDER, metavar="-- PRETRAIN FLAGS", help="as for pretrain")


def main(args: argparse.Namespace) -> int:
    """Writes the script; submits it if asked to."""
    job = job_from_args(args)
    flags = args.pretrain[1:] if args.pretrain[:1] == ["--"] else args.pretrain
    config = parse_pretrain_flags(flags)
    config.require_queue(job.nodes * job.gpus)
    assert config.out is not None
    text = batch_script(job, flags, config.out)
    try:
        args.script.parent.mkdir(parents=True, exist_ok=True)
        args.script.write_text(text, encoding="utf-8")
        config.out.mkdir(parents=True, exist_ok=True)  # Slurm drops the output of a job whose folder is missing
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    batch = job.nodes * job.gpus * config.batch
    nodes = f"{job.nodes} node{'s' if job.nodes > 1 else ''}"
    print(f"{args.script}: {nodes} × {job.gpus} GPUs, global batch {batch}, learning rate {config.lr * batch / 256:g}")
    for path in (config.images, config.saliency, config.data):
        if path is not None and not path.exists():
            print(f"{path} is not on this machine: it must be on the nodes")
    if args.submit == "no":
        print(f"submit it with: sbatch {shlex.quote(str(args.script))}")
    elif args.submit == "sbatch":
        print(submit_with_sbatch(args.script))
    else:
        print(submit_with_submitit(args.script, job, config.out))
    return 0


def job_from_args(args: argparse.Namespace) -> Job:
    """Checks the flags of the job.

    Raises:
        UserError: a value out of range; the message names the flag.
    """
    for name, low in (("nodes", 1), ("gpus", 1), ("cpus", 0), ("notice", 30), ("port", 1024)):
        if getattr(args, name) < low:
            raise UserError(f"--{name}: got {getattr(args, name)}, expected at least {low}")
    if args.port > 65_535:
        raise UserError(f"--port: got {args.port}, expected at most 65535")
    if not _TIME.fullmatch(args.time):
        raise UserError(f"--time: got {args.time!r}, expected Slurm's form: MINUTES, H:MM:SS or D-H:MM:SS")
    for name in ("name", "partition", "account"):
        value = getattr(args, name)
        if value is not None and not re.fullmatch(r"[\w.,@+-]+", value):
            raise UserError(f"--{name}: got {value!r}, expected letters, digits and . , @ + - _")
    cpus = args.cpus or 8 * args.gpus
    return Job(
        args.name,
        args.nodes,
        args.gpus,
        cpus,
        args.time,
        args.notice,
        args.partition,
        args.account,
        args.setup,
        args.port,
    )


def parse_pretrain_flags(flags: list[str]) -> PretrainConfig:
    """Checks the run's own flags now, on the login node, as ``cast-fast pretrain`` will on the compute nodes.

    Raises:
        UserError: a flag is wrong, or no dataset or run folder is named.
    """
    # argparse exits by itself on an unknown flag: its message is one line here too
    from cast_fast.cli import OneLineParser

    parser = OneLineParser(prog="cast-fast launch … -- (pretrain)", allow_abbrev=False)
    add_config_arguments(parser)
    config = config_from_args(parser.parse_args(flags))
    config.require_dataset()
    return config


def batch_script(job: Job, flags: list[str], out: Path) -> str:
    """The batch script, as text.

    Args:
        job: what Slurm needs to know.
        flags: of ``cast-fast pretrain``; ``--resume`` is added where it is missing.
        out: the run folder; the job's output goes there too.
    """
    flags = [*flags, *([] if "--resume" in flags else ["--resume"])]
    options = {
        "job-name": job.name,
        "partition": job.partition,
        "account": job.account,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus,
        "cpus-per-task": job.cpus,
        "time": job.time,
        "signal": f"B:USR1@{job.notice}",
        "output": shlex.quote(f"{out}/slurm-%j.out"),
        "open-mode": "append",
    }
    header = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    torchrun = [
        "torchrun",
        '--nnodes="$SLURM_JOB_NUM_NODES"',
        f"--nproc-per-node={job.gpus}",
        "--rdzv-backend=c10d",
        '--rdzv-endpoint="$HEAD:' + str(job.port) + '"',
        '--rdzv-id="$SLURM_JOB_ID"',
        "--max-restarts=3",
        "-m cast_fast pretrain",
        *map(shlex.quote, flags),
    ]
    command = " ".join(torchrun)
    setup = f"{job.setup} && " if job.setup else ""
    return f"""#!/usr/bin/env bash
{chr(10).join(header)}
#SBATCH --requeue

# One torchrun a node. The notice before the time limit (SIGUSR1 to this shell) goes on to srun, to each torchrun and
# to the ranks: they save one checkpoint and exit with 75. Then the job is requeued, and --resume goes on.
set -u
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD
export PET_SIGNALS_TO_HANDLE={FORWARDED_SIGNALS}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={max(30, job.notice - 30)}
export OMP_NUM_THREADS={max(1, job.cpus // job.gpus)}
# Since Slurm 22.05 srun does not take this over from sbatch by itself, and a step without it has one core.
export SRUN_CPUS_PER_TASK={job.cpus}
# Set NCCL_SOCKET_IFNAME and NCCL_IB_HCA here where a node has several networks; NCCL_DEBUG=INFO shows what it took.

noticed=0
step=
trap 'noticed=1; [ -n "$step" ] && kill -USR1 "$step"' USR1

srun --kill-on-bad-exit=0 bash -c {shlex.quote(setup + "exec " + command)} &
step=$!
# A trap interrupts wait: wait again until srun itself has ended.
while :; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done

if [ "$noticed" = 1 ] || [ "$code" = 75 ]; then
    echo "stopped with code $code, requeueing"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
"""


def submit_with_sbatch(script: Path) -> str:
    """Submits the script; returns what sbatch said.

    Raises:
        UserError: there is no sbatch here, or it refused.
    """
    program = shutil.which("sbatch")
    if program is None:
        raise UserError(
            f"--submit sbatch: sbatch is not on this machine; {script} is written, submit it from a login node"
        )
    answer = subprocess.run([program, str(script)], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise UserError(f"--submit sbatch: sbatch refused {script}: {answer.stderr.strip() or answer.stdout.strip()}")
    return answer.stdout.strip()


def submit_with_submitit(script: Path, job: Job, out: Path, cluster: str | None = None) -> str:
    """Submits the job through submitit: one task a node, which runs the part of the script that is a node's.

    Args:
        script: the batch script, for its settings; submitit writes its own from them.
        job: as in ``batch_script``.
        out: the run folder; submitit's logs go to ``out/submitit``.
        cluster: submitit's name of the executor; ``None`` lets it choose.

    Raises:
        UserError: submitit is not installed, or finds no Slurm.
    """
    if importlib.util.find_spec("submitit") is None:
        raise UserError(
            "--submit submitit: the package submitit is not installed; pip install submitit, or take sbatch"
        )
    import submitit

    if cluster is None and shutil.which("srun") is None:
        raise UserError(f"--submit submitit: Slurm is not on this machine; {script} is written")
    executor: Any = submitit.AutoExecutor(folder=str(out / "submitit"), cluster=cluster)
    executor.update_parameters(
        name=job.name,
        nodes=job.nodes,
        tasks_per_node=1,
        gpus_per_node=job.gpus,
        cpus_per_task=job.cpus,
        timeout_min=_minutes(job.time),
        slurm_partition=job.partition,
        slurm_account=job.account,
        slurm_signal_delay_s=job.notice,
    )
    submitted = executor.submit(NodeTask(script.resolve()))
    return f"submitted job {submitted.job_id} through submitit"


def _minutes(time: str) -> int:
    """Slurm's time limit in minutes, rounded up."""
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, parts[0], parts[1] if len(parts) == 2 else 0
    return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)


class NodeTask:
    """What submitit runs on each node: the script's torchrun, with the notice passed on to it.

    submitit calls ``checkpoint`` when the notice comes; it then requeues what ``checkpoint`` returns.
    """

    def __init__(self, script: Path) -> None:
        self.script = script
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Runs the node's torchrun to its end; returns its exit code."""
        command = node_command(self.script.read_text(encoding="utf-8"))
        self._process = subprocess.Popen(["bash", "-c", command])
        return self._process.wait()

    def checkpoint(self) -> Any:
        """Lets the ranks save, then asks for the job to be requeued."""
        import submitit

        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)  # bash has become torchrun by then
            self._process.wait()
        return submitit.helpers.DelayedSubmission(NodeTask(self.script))


def node_command(script: str) -> str:
    """The shell line of a batch script that each node runs: its exports, then the command after srun."""
    exports = [line for line in script.splitlines() if line.startswith(("export ", "HEAD="))]
    (srun,) = (line for line in script.splitlines() if line.startswith("srun "))
    words = shlex.split(srun.removesuffix(" &"))
    return "\n".join([*exports, words[words.index("-c") + 1]])
