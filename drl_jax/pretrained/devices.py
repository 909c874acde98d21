"""The devices of a model, and the process that has it."""

import os
from collections.abc import Sequence
from typing import Any

import jax

from drl_jax.runtime.errors import UserError

# The process that has loaded a model.
_process: int | None = None


def claim_process() -> None:
    """Raises a UserError in a fork of a process that has loaded a model, where JAX would hang."""
    global _process
    if _process not in (None, os.getpid()):
        raise UserError(
            "JAX cannot be used in a forked process: start it with"
            " multiprocessing.get_context('spawn')"
        )
    _process = os.getpid()


def find_devices(wanted: Any) -> Sequence[jax.Device] | None:
    """The devices of a name such as "gpu" or "gpu:1", or devices themselves; None: all."""
    if wanted is None:
        return None
    if not isinstance(wanted, str):
        devices = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
        if not devices or not all(isinstance(device, jax.Device) for device in devices):
            raise UserError(f"a device is a name such as gpu:0, or devices of JAX, not {wanted!r}")
        return devices
    platform, _, number = wanted.partition(":")
    try:
        devices = jax.devices(platform or "none")
        if number and not number.isdecimal():
            raise ValueError(number)
        return [devices[int(number)]] if number else devices
    except (RuntimeError, ValueError, IndexError) as error:
        there = ", ".join(f"{one.platform}:{one.id}" for one in jax.devices())
        raise UserError(f"there is no device {wanted!r}, but {there}") from error
