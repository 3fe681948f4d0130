"""The training loop, checkpoints, bundles, mapping, Ray and MLflow."""
