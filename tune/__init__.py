"""Search for the frontier between standard and robust accuracy: Ray Tune runs the trials, Optuna proposes them."""
