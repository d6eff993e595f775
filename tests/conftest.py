"""What every test needs before anything is imported."""

import os

from hypothesis import settings

# Ray reads these at its import: no token file, and loopback addresses, as `tempo serve` has them.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

# A busy machine is no failure: nothing here is timed.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
