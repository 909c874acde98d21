"""Persistent cache of compiled XLA programs."""

import os
from pathlib import Path

import jax

# Compilations that take less are not kept.
_MIN_SECONDS = 0.02


def cache_compilations() -> None:
    """Caches compiled programs in the user's cache directory, for later runs of any command.

    The directory is `$XDG_CACHE_HOME/drl_jax/xla`, `~/.cache/drl_jax/xla` by default.
    JAX's own variable JAX_COMPILATION_CACHE_DIR names another directory, or turns the cache off if
    it is empty.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(home) / "drl_jax" / "xla"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # A read-only home, as in some containers: compilation is only slower.
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # JAX keeps what takes a second. Opening a run compiles 30 small programs, for 4 seconds in all.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
