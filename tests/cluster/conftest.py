"""What Ray is told before it is imported: a busy machine takes long, and no worker is needed before it is asked for."""

import os

os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")
os.environ.setdefault("RAY_health_check_timeout_ms", "60000")
os.environ.setdefault("RAY_health_check_period_ms", "100")  # a node that is gone is missed after five of them
os.environ.setdefault("RAY_worker_niceness", "0")  # a test waits for what they do
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
