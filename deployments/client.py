"""For programs on the machine of a `tempo serve`: connect to its Ray and get the Python handle.

In a cluster that was not started by `tempo serve`, `serve.get_app_handle` is all that is needed.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

from deployments.cli import ENVIRONMENT, LOCAL_ENVIRONMENT
from deployments.run_file import RunFile
from tempo_router.errors import TempoError

_SETTINGS = {
    "RAY_AUTH_MODE": ENVIRONMENT["RAY_AUTH_MODE"],
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": LOCAL_ENVIRONMENT["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"],
}


def connect(data_dir: Path | str = ".tempo", *, name: str = "tempo") -> Any:
    """The handle of the application that is served from this folder.

    Ray reads what makes it use the loopback interface when it is imported, so call this before the program imports
    Ray, or set RAY_AUTH_MODE=disabled and RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 for it. Raises TempoError.
    """
    run = RunFile(Path(data_dir)).read()
    if run is None or not run.ray_address:
        raise TempoError(f"nothing is served from {data_dir}; start it with `tempo serve`, or name its data_dir")
    if "ray" in sys.modules and any(os.environ.get(key) != value for key, value in _SETTINGS.items()):
        wanted = " ".join(f"{key}={value}" for key, value in _SETTINGS.items())
        raise TempoError(f"Ray was imported before connect() could set it up; import it later, or start with {wanted}")
    os.environ.update(_SETTINGS)

    import ray
    from ray import serve

    ray.init(address=run.ray_address, namespace="serve", log_to_driver=False, logging_level=logging.ERROR)
    return serve.get_app_handle(name)
