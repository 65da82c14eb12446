"""What Ray reads from the environment when it is first imported; its workers inherit it."""

from __future__ import annotations

import os
import secrets


def set_ray_environment(own_cluster: bool) -> None:
    """Call before ray is imported. `own_cluster`: Ray will be started here, for this run alone, instead of joined."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # each stands in two results, and we read the first
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a worker without GPUs keeps its view of them
    if not own_cluster:
        return
    # Loopback only. Ray replaces an address 127.0.0.1 by the machine's own and listens on 0.0.0.0, unless it believes
    # that clusters of several nodes are off, as they are on macOS.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Other users of this machine can reach loopback too, and Ray runs whatever code reaches it.
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
