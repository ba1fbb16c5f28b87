"""What Ray is told before it is imported: no worker is needed before it is asked for, and nobody counts how it is used."""

import os

os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
