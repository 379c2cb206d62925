"""The processes of a run meet before JAX starts, and notice at once when one of them dies.

JAX alone says neither well: a process that never comes, or one that dies, makes its C++ abort all others with a stack
dump, on GPUs only after a heartbeat's timeout. So process 0 first listens on the coordinator's port itself. The others
come, say who they are, and everything that does not fit is answered in one line. Then JAX gets the port, and these
connections stay open, with nothing sent on them: the system closes them when a process dies, however it dies, and its
keepalive breaks them when a host is gone. Process 0 tells the rest who it was.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import abc
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn, Protocol

from megajax.config_checks import ConfigError
from megajax.parallel.cluster import Cluster

_ANSWER_SECONDS = 5.0
"""How long a connection may take to say who it is, and the other processes to leave once one has died."""
_BIND_SECONDS = 3.0
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
"""30 seconds until a host that has vanished counts as dead."""
_LONGEST_LINE = 4096
MISTAKE = 2
"""Exit code after a mistake of the user, which most likely every process is about to find."""
_OWN_MISTAKE_SECONDS = 1.0
"""A process has so long to name the mistake itself."""


class Lifeline(Protocol):
    """A process's connections to the others. While they are open a thread watches them, and ends this process with one
    line when another one dies (exit code 1) or fails (that one's code)."""

    def wait_for_verdict(self, seconds: float) -> None:
        """Returns only when in this time nothing has been heard of another process that died or failed."""
        ...

    def fail(self, reason: str, code: int) -> None:
        """Tells the others that this process stops with this exit code, and why. It has to leave then, with
        `os._exit`."""
        ...

    def close(self) -> None:
        """Leaves in peace, when all have come to the end."""
        ...


def meet(cluster: Cluster, *, timeout: float) -> Lifeline:
    """Waits, up to `timeout` seconds, until all processes are there.

    Raises:
      ConfigError: some did not come, process 0 does not answer, or what they say of themselves does not fit together.
    """
    return _Hub(cluster, timeout) if cluster.process_id == 0 else _Spoke(cluster, timeout)


class _Connection:
    """Lines of text on a socket."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._pending = b""
        self.name = ""
        self.left = False
        """Whether it has said that it is done."""
        connection.settimeout(_ANSWER_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":
            for option, value in _KEEPALIVE:
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: object) -> None:
        """Nothing happens when the other side has gone: whoever reads from it will see."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> dict | None:
        """The next message; None when the connection is closed, or what comes is not one of ours."""
        try:
            while b"\n" not in self._pending:
                data = self._socket.recv(_LONGEST_LINE)
                if not data or len(self._pending) > _LONGEST_LINE:
                    return None
                self._pending += data
            line, _, self._pending = self._pending.partition(b"\n")
            message = json.loads(line)
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def forever(self) -> None:
        """From now on the other side may be silent."""
        self._socket.settimeout(None)

    def wait(self, deadline: float) -> None:
        """Returns when the other side has closed the connection, or at the deadline."""
        self._socket.settimeout(max(0.01, deadline - time.monotonic()))
        while self.receive() is not None:
            continue

    def close(self) -> None:
        self._socket.close()


class _Watch(abc.ABC):
    """What both ends have in common: the thread, and the way out."""

    def __init__(self) -> None:
        self._closing = threading.Event()
        self._verdict = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)

    @abc.abstractmethod
    def _watch(self) -> None: ...

    def wait_for_verdict(self, seconds: float) -> None:
        if self._verdict.wait(seconds):
            self._thread.join()  # which ends the process

    def _end(self, what: str, code: int) -> NoReturn:
        if code == MISTAKE:
            time.sleep(_OWN_MISTAKE_SECONDS)
            what += "; the run has stopped"
        else:
            what += "; the run has stopped, start it again to resume from its last checkpoint"
        sys.stdout.flush()
        sys.stderr.write(f"error: {what}\n")
        sys.stderr.flush()
        os._exit(code)


class _Hub(_Watch):
    """Process 0's end."""

    def __init__(self, cluster: Cluster, timeout: float):
        super().__init__()
        self._cluster = cluster
        self._connections: list[_Connection] = []
        deadline = time.monotonic() + timeout
        with _listen(cluster) as listener:
            self._gather(listener, deadline, timeout)
        for connection in self._connections:
            connection.forever()
            connection.send(go=True)
        self._thread.start()

    def _gather(self, listener: socket.socket, deadline: float, timeout: float) -> None:
        count = self._cluster.num_processes
        missing = list(range(1, count))
        while missing:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection = _Connection(listener.accept()[0])
            except TimeoutError:
                shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                self._refuse(
                    f"num_processes={count}: process {shown} did not come to {self._cluster.coordinator} within"
                    f" {timeout:g} s; start every process, or raise distributed_timeout_minutes"
                )
            hello = connection.receive()
            if hello is None or hello.get("program") != "megajax":
                connection.close()  # a stranger
                continue
            self._connections.append(connection)
            index, host = hello["id"], hello["host"]
            connection.name = f"process {index} on {host}"
            if hello["count"] != count:
                self._refuse(
                    f"num_processes={count} in process 0, but {hello['count']} in process {index}; give all the same"
                )
            if index not in missing:
                self._refuse(f"process_id={index} is given to two processes; give each its own, 0 to {count - 1}")
            missing.remove(index)

    def _refuse(self, why: str) -> NoReturn:
        for connection in self._connections:
            connection.send(error=why)
            connection.close()
        raise ConfigError(why)

    def _watch(self) -> None:
        for connection, message in self._messages():
            if self._closing.is_set():
                return
            if message is not None and message.get("done"):
                connection.left = True
            elif message is not None:
                self._stop(f"{connection.name} has failed ({message['failed']})", message["code"])
            elif not connection.left:
                self._stop(f"{connection.name} has died", 1)

    def _messages(self) -> Iterator[tuple[_Connection, dict | None]]:
        """What comes from any of the others, until all have closed their connections."""
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection, selectors.EVENT_READ, connection)
            while selector.get_map():
                for key, _ in selector.select():
                    message = key.data.receive()
                    if message is None:
                        selector.unregister(key.data)
                    yield key.data, message

    def _stop(self, what: str, code: int) -> NoReturn:
        self._verdict.set()
        self._tell(what, code)
        self._end(what, code)

    def _tell(self, what: str, code: int) -> None:
        """Tells all, and waits until they have gone: JAX aborts every process that outlives process 0."""
        for connection in self._connections:
            connection.send(stop=what, code=code)
        deadline = time.monotonic() + _ANSWER_SECONDS
        for connection in self._connections:
            connection.wait(deadline)

    def fail(self, reason: str, code: int) -> None:
        self._closing.set()
        self._tell(f"process 0 on {socket.gethostname()} has failed ({reason})", code)

    def close(self) -> None:
        self._closing.set()
        for connection in self._connections:
            connection.send(done=True)
            connection.close()


class _Spoke(_Watch):
    """The end of any other process."""

    def __init__(self, cluster: Cluster, timeout: float):
        super().__init__()
        self._hub = _call(cluster, time.monotonic() + timeout, timeout)
        self._cluster = cluster
        self._thread.start()

    def _watch(self) -> None:
        message = self._hub.receive()
        if self._closing.is_set() or (message is not None and message.get("done")):
            return
        self._verdict.set()
        if message is None:
            self._end(f"process 0 at {self._cluster.coordinator} has died", 1)
        self._end(message["stop"], message["code"])

    def fail(self, reason: str, code: int) -> None:
        self._closing.set()
        self._hub.send(failed=reason, code=code)

    def close(self) -> None:
        self._closing.set()
        self._hub.send(done=True)
        self._hub.close()


def _listen(cluster: Cluster) -> socket.socket:
    _, port = cluster.address
    six = socket.has_dualstack_ipv6()
    deadline = time.monotonic() + _BIND_SECONDS
    while True:
        try:
            return socket.create_server(
                ("", port),
                family=socket.AF_INET6 if six else socket.AF_INET,
                dualstack_ipv6=six,
                backlog=min(cluster.num_processes, 4096),
            )
        except OSError as error:
            if time.monotonic() > deadline:
                why = os.strerror(error.errno).lower() if error.errno else str(error)
                raise ConfigError(f"coordinator={cluster.coordinator}: {why}; choose another port") from None
            time.sleep(0.2)


def _call(cluster: Cluster, deadline: float, timeout: float) -> _Connection:
    """The connection to process 0, once all are there."""
    pause, why = 0.05, "it is silent"
    while (left := deadline - time.monotonic()) > 0:
        try:
            raw = socket.create_connection(cluster.address, timeout=left)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
        else:
            connection = _Connection(raw)
            # A port of our own host that nobody listens on may be given to this very connection.
            if raw.getsockname() != raw.getpeername():
                host = socket.gethostname()
                connection.send(program="megajax", id=cluster.process_id, count=cluster.num_processes, host=host)
                raw.settimeout(max(0.01, deadline - time.monotonic()))
                answer = connection.receive()
                if answer is not None and "error" in answer:
                    raise ConfigError(str(answer["error"]))
                if answer is not None and "go" in answer:
                    connection.forever()
                    return connection
            connection.close()
            why = "it has left, or is no process of this run"
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, 1.0)
    raise ConfigError(
        f"process 0 at {cluster.coordinator} did not answer within {timeout:g} s ({why}); start it, correct"
        " coordinator, or raise distributed_timeout_minutes"
    )
