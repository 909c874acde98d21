"""Connects to a Ray cluster; an address without one is one line, after seconds."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import ray
import ray.exceptions
from ray._private.services import canonicalize_bootstrap_address

from drl_jax.runtime.cluster import ClusterError
from drl_jax.runtime.errors import one_line
from drl_jax.runtime.resources import available_cpus

# Seconds until a host accepts a connection.
_CONNECT_TIMEOUT = 10.0
# What a client of HTTP/2 sends first, and the type of the frame that the server answers with.
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HTTP2_SETTINGS = bytes([4])


def connect_ray(address: str) -> None:
    """Starts or joins a cluster, and keeps Ray's own messages off the terminal.

    Args:
      address: see `RayCluster`.

    Raises:
      ClusterError: no cluster is there, or it does not let this process in.
    """
    # It prints the last lines of the logs of workers that die; `map` says what follows from it.
    ray._private.worker._worker_logs_enabled = False
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address == "local":
        settings |= {"num_cpus": available_cpus(), "include_dashboard": False}
    else:
        _check_listening(address)
    try:
        with _quiet_stderr():
            ray.init(address=address, **settings)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise ClusterError(
            f"--ray={address}: the cluster does not let this command in ({one_line(error)}); if it"
            " was started with a token, set RAY_AUTH_MODE=token, and check the port"
        ) from error
    except (RuntimeError, ValueError, OSError) as error:
        message = " ".join(str(error).split())
        if "Version mismatch" in message:
            remedy = "install the same versions of Ray and Python on all nodes and this machine"
        else:
            remedy = "this machine must be a node of the cluster: `ray start --address=HOST:PORT`"
        raise ClusterError(f"--ray={address}: {message}; {remedy}") from error
    if threading.current_thread() is threading.main_thread():
        # Ray's handler prints the stack, and ends the process with status 1, as after an error.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _check_listening(address: str) -> None:
    """Checks that a gRPC server is there: Ray itself would try for minutes."""
    found = address
    if address == "auto":
        try:
            found = canonicalize_bootstrap_address("auto")
        except ConnectionError as error:
            raise _no_cluster(address, "no node of one runs on this machine") from error
    host, _, port = found.rpartition(":")
    if not host or not port.isdecimal() or "/" in found:
        raise ClusterError(
            f"--ray={address}: write local, auto, or HOST:PORT of the head of a Ray cluster"
        )
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT) as connection:
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", "") or str(error)
        raise _no_cluster(address, f"{found}: {reason}") from error
    if answer[3:4] != _HTTP2_SETTINGS:
        raise _no_cluster(address, f"{found} is the port of another server")


def _no_cluster(address: str, reason: str) -> ClusterError:
    return ClusterError(
        f"--ray={address}: no Ray cluster is there ({reason}); start one with `ray start --head`,"
        " and join it with `ray start --address=HOST:PORT` on the other nodes"
    )


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Ray's C++ part writes to the file descriptor."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
