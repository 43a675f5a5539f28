"""Executes a study's runs: a `concurrent.futures.Executor` for each engine, by the name of `--executor`."""

import asyncio
import contextlib
import importlib.metadata
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, InvalidStateError, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from merge_jax.checks import check_at_least_one, check_choice
from merge_jax.study.grids.command import Command, Outcome, package_versions, run_command
from merge_jax.study.grids.grid import SlurmOptions

if TYPE_CHECKING:
    from distributed import Client
    from submitit import Executor as Submitter
    from submitit import Job
    from submitit.helpers import DelayedSubmission

__all__ = ["Engine", "check_executor", "open_engine"]

_ADDRESS = re.compile(r"(?:(?:tcp|tls|ws|wss|ucx)://)?(?:[\w.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}")
_FORMS = "local, slurm, or dask:HOST:PORT as `dask scheduler` prints it, such as dask:tcp://10.0.0.1:8786"
_ANSWER = 10.0  # Seconds within which a scheduler must answer.
_POLL = 1.0  # Seconds between checks of Slurm jobs.
_REQUEUES = 100  # Each continues from the last checkpoint.


class Engine(NamedTuple):
    """An engine that executes runs.

    Attributes:
      executor: accepts the runs.
      run: the function submitted with a `Command`.
      cancel: cancels runs that have not started.
      problem: returns why it no longer answers, if so.
    """

    executor: Executor
    run: Callable[[Command], Outcome]
    cancel: Callable[[Future[Outcome]], Any] = Future.cancel
    problem: Callable[[], str | None] = lambda: None


def check_executor(name: str, jobs: int) -> None:
    """Raises ValueError for an unknown executor, or for `jobs` if the executor decides the number itself."""
    kind, _, address = name.partition(":")
    if kind == "dask" and not _ADDRESS.fullmatch(address):
        raise ValueError(f"the executor must be {_FORMS}; got {name!r}")
    if kind != "dask":
        check_choice("executor", name, ("local", "slurm", "dask:HOST:PORT"))
    check_at_least_one(jobs=jobs)
    if kind != "local" and jobs > 1:
        raise ValueError(
            f"--jobs is for --executor local: with {kind}, the number of workers sets how many runs execute at a time"
        )


def open_engine(
    name: str, shares: Sequence[set[int]], folder: Path, slurm: SlurmOptions, here: Callable[[Command], Outcome]
) -> contextlib.AbstractContextManager[Engine]:
    """Returns the engine of a name, as a context manager.

    Args:
      name: as in `check_executor`.
      shares: the cores of each concurrent run, for the local engine.
      folder: the study's folder; it need not exist yet.
      slurm: what runs request from Slurm.
      here: executes a run in this process; used by the local engine with one share.

    Raises:
      ValueError: on entry: a scheduler that does not answer, no workers, or unfit workers.
      ImportError: a package is missing; the message has the command to install it.
    """
    kind, _, address = name.partition(":")
    factories: Mapping[str, Callable[[], contextlib.AbstractContextManager[Engine]]] = {
        "local": lambda: _local(shares, here),
        "dask": lambda: _dask(address, folder),
        "slurm": lambda: _slurm(slurm, folder),
    }
    return factories[kind]()


@contextlib.contextmanager
def _local(shares: Sequence[set[int]], here: Callable[[Command], Outcome]) -> Iterator[Engine]:
    """Runs one after another in this process, or several in separate processes, each on its share of the cores.

    Threads own these processes. A process pool would add a layer, and breaks as a whole if one process is killed.
    """
    if len(shares) == 1:
        yield Engine(_Here(), here)
        return
    left = iter(shares)
    # Processes inherit the cores of the thread that starts them, from their first instruction on.
    with ThreadPoolExecutor(len(shares), "run", initializer=lambda: _hold_to(next(left))) as executor:
        yield Engine(executor, run_command)


def _hold_to(cores: set[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)


class _Here(Executor):
    """Executes submitted work at once in the submitting thread: only the main thread receives signals."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextlib.contextmanager
def _dask(address: str, folder: Path) -> Iterator[Engine]:
    """Runs on the workers of a Dask scheduler, which reassigns the runs of a lost worker."""
    try:
        from distributed import Client
    except ImportError:
        raise ImportError("--executor dask is Dask's, which is not installed: pip install 'merge_jax[dask]'") from None
    address = address if "://" in address else f"tcp://{address}"
    _await_scheduler(address)
    with Client(address, timeout=_ANSWER, set_as_default=False) as client:
        _check_workers(client, address, folder)

        def lost() -> str | None:
            # Dask accepts runs even after its scheduler is gone, and never reports how they end.
            gone = client.status not in ("running", "connecting")
            return f"the Dask scheduler at {address} is lost" if gone else None

        def cancel(future: Future[Outcome]) -> None:
            # Dask reports a run in progress as cancelled, but lets it continue unseen. So we wait for all: a run not
            # yet started ends as soon as a worker takes it, since the session has ended.
            if lost():
                future.cancel()

        # Not pure: otherwise Dask would answer a retried run with its previous outcome.
        yield Engine(client.get_executor(pure=False), run_command, cancel, lost)


def _await_scheduler(address: str) -> None:
    """Raises ValueError unless a Dask scheduler answers in time; `Client` may wait beyond its timeout."""
    from distributed.comm.core import connect
    from distributed.security import Security

    async def shake_hands() -> None:
        comm = await connect(address, timeout=_ANSWER, **Security().get_connection_args("client"))
        await comm.close()

    try:
        asyncio.run(asyncio.wait_for(shake_hands(), _ANSWER))
    except Exception as error:  # From another program that listens there.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"no Dask scheduler answers at {address} within {_ANSWER:g} s ({reason}): `dask scheduler` starts one, "
            "and prints its address"
        ) from None


def _check_workers(client: "Client", address: str, folder: Path) -> None:
    """Raises ValueError for a scheduler or workers that cannot execute a study's runs in a folder.

    Uses only functions of Python itself: a worker without this package answers them too.
    """
    try:
        client.wait_for_workers(1, timeout=_ANSWER)
    except TimeoutError:
        raise ValueError(
            f"the Dask scheduler at {address} has no workers: `dask worker {address} --nthreads 1` starts one"
        ) from None
    threads_of = cast(dict[str, int], client.nthreads())
    wide = {worker: threads for worker, threads in threads_of.items() if threads > 1}
    if wide:
        worker, threads = next(iter(wide.items()))
        raise ValueError(
            f"the Dask worker {worker} has {threads} threads, and would do as many runs at a time on the same cores: "
            f"start it with `dask worker {address} --nthreads 1`"
        )
    for name, version in package_versions().items():
        found = _ask(client, importlib.metadata.version, name)
        _refuse(
            {worker: value for worker, value in found.items() if value != version},
            lambda value, name=name, version=version: (
                f"has no {name}"
                if isinstance(value, importlib.metadata.PackageNotFoundError)
                else f"has {name} {value}, and here it is {version}"
            ),
            "install the same where workers run",
        )
    try:
        client.run_on_scheduler(importlib.metadata.version, "merge_jax")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"the Dask scheduler at {address} has no merge_jax: it deserialises submitted runs, so install it there too"
        ) from None
    ancestor = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        probing = tempfile.TemporaryDirectory(prefix=".probe-", dir=ancestor)
    except OSError as error:
        raise ValueError(f"the study's folder {folder} cannot be written: {error}") from None
    with probing as probe:
        for path, access in ((probe, os.W_OK), (os.getcwd(), os.R_OK)):
            seen = _ask(client, os.access, path, access)
            _refuse(
                {worker: value for worker, value in seen.items() if value is not True},
                lambda value, path=path: f"does not see the folder {Path(path).parent if path == probe else path}",
                "the study's folder and the one it is called in must be on a disk that all machines share; --run-dir "
                "names another",
            )


def _ask(client: "Client", function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Returns each worker's answer, or the exception it raises."""
    return cast(dict[str, Any], client.run(function, *args, on_error="return"))


def _refuse(unfit: Mapping[str, Any], problem: Callable[[Any], str], remedy: str) -> None:
    if unfit:
        worker, value = next(iter(unfit.items()))
        others = f", and {len(unfit) - 1} others too" if len(unfit) > 1 else ""
        raise ValueError(f"the Dask worker {worker} {problem(value)}{others}: {remedy}")


@contextlib.contextmanager
def _slurm(options: SlurmOptions, folder: Path, cluster: str = "slurm") -> Iterator[Engine]:
    """Runs as Slurm jobs through submitit, which requeues a job whose time is up."""
    try:
        from submitit import AutoExecutor
    except ImportError:
        raise ImportError(
            "--executor slurm is submitit's, which is not installed: pip install 'merge_jax[slurm]'"
        ) from None
    check_at_least_one(minutes=options.minutes, cpus=options.cpus)
    if cluster == "slurm" and not shutil.which("sbatch"):
        raise ValueError("there is no sbatch on this machine: start the study on a machine that can submit Slurm jobs")
    pairs = [pair.partition("=") for pair in options.other]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise ValueError(
                f"an option of sbatch must be name=value, such as account=physics, got {name + equals + value!r}"
            )
    executor = AutoExecutor(folder.absolute() / "slurm", cluster=cluster, slurm_max_num_timeout=_REQUEUES)
    executor.update_parameters(
        name="merge_jax",
        timeout_min=options.minutes,
        cpus_per_task=options.cpus,
        **({"gpus_per_node": options.gpus} if options.gpus else {}),
        slurm_partition=options.partition,
        slurm_additional_parameters={name: value for name, _, value in pairs},
    )
    with _SlurmQueue(executor) as queue:
        yield Engine(queue, RequeuedRun(), problem=queue.problem)


class RequeuedRun:
    """`run_command` as a job that submitit may requeue: it then continues from its last checkpoint."""

    def __call__(self, command: Command) -> Outcome:
        """Does the run."""
        return run_command(command)

    def checkpoint(self, command: Command) -> "DelayedSubmission":
        """Returns the job to requeue; the run itself saves when submitit ends this process."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, command)


class _SlurmQueue(Executor):
    """Futures of submitit's jobs; jobs submitted within a second form one array, by one call of sbatch."""

    def __init__(self, submitter: "Submitter"):
        self._submitter = submitter
        self._new: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []
        self._jobs: dict[Future[Any], Job[Any]] = {}
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._new.append((future, fn, args))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed.set()
        self._thread.join()
        self._look()  # For jobs cancelled meanwhile.

    def problem(self) -> str | None:
        return None if self._thread.is_alive() else "submitit failed, as is printed above"

    def _watch(self) -> None:
        while not self._closed.wait(_POLL):
            with self._lock:
                new, self._new = self._new, []
            self._submit([one for one in new if not one[0].cancelled()])
            self._look()

    def _submit(self, new: Sequence[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]]) -> None:
        try:
            with self._submitter.batch():
                jobs = [self._submitter.submit(fn, *args) for _, fn, args in new]
        except Exception as error:  # A refusal by sbatch.
            for future, *_ in new:
                _settle(future, error)
        else:
            self._jobs |= zip((future for future, *_ in new), jobs, strict=True)

    def _look(self) -> None:
        for future, job in list(self._jobs.items()):
            if future.cancelled():
                del self._jobs[future]
                job.cancel(check=False)
            elif job.done():
                del self._jobs[future]
                try:
                    _settle(future, job.result())
                except Exception as error:
                    _settle(future, error)
            elif not future.running() and job.state == "RUNNING":
                future.set_running_or_notify_cancel()


def _settle(future: "Future[Any]", end: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # It was cancelled meanwhile.
        if isinstance(end, Exception):
            future.set_exception(end)
        else:
            future.set_result(end)
