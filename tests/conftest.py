import os

# Ray must listen on loopback only, ask nobody for a token, and fail fast; set before anything imports it.
os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

from hypothesis import settings

# the same examples on every machine of a continuous integration, new ones at home
settings.register_profile("scviaduct", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("scviaduct")
